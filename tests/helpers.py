"""Helpers for several tests, and for the program that makes the golden values."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from minibalora.base import cli
from minibalora.data.batches import Row, micro_batches, pack
from minibalora.lowrank import adapted_layers
from minibalora.models.mixture import keep_router_outputs, load_balance
from minibalora.objective import head_of, lambdas
from minibalora.run.teacher import teacher_states
from minibalora.toy import MODEL

GOLDEN = Path(__file__).with_name("golden")
# The golden checkpoints, made by make_golden.py. To test a new family, add its names here.
LANGUAGE_MODELS = ("llama2", "llama3", "llama_bias_tied", "mistral", "mistral_window", "gemma", "gemma2", "gpt2")
LANGUAGE_MODELS += ("yi", "qwen2", "qwen2_window", "qwen3", "mixtral", "mixtral_window", "deepseek", "deepseek_norm")
SEQ2SEQ = ("t5", "t5_gated")
CLASSIFIERS = ("bert", "bert_relu", "roberta", "deberta", "deberta_tanh", "gpt2_classifier", "llama_classifier")
CLASSIFIERS += ("t5_classifier", "xlm_roberta")


def golden_example(name: str) -> list[torch.Tensor]:
    """Return the arguments for a model in `tests/golden/`, in order, and transformers' logits."""
    return list(named_example(name).values())


def named_example(name: str) -> dict[str, torch.Tensor]:
    """Return the values of `golden_example` by transformers' names, with BERT's token types and T5's decoder inputs."""
    expected = load_file(GOLDEN / name / "expected.safetensors")
    names = ("input_ids", "attention_mask", "token_type_ids", "decoder_input_ids", "logits")
    return {name: expected[name] for name in names if name in expected}


def real_tokens(name: str) -> torch.Tensor:
    """Return an index for the first axes of the example's logits that leaves out padding."""
    example = named_example(name)
    mask, logits = example["attention_mask"].bool(), example["logits"]
    return mask if mask.shape == logits.shape[:2] else torch.ones(len(logits), dtype=torch.bool)


def rows_of(path: Path) -> list[dict]:
    """Return the rows of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def headless(name: str, folder: Path) -> Path:
    """Copy a golden checkpoint without pooler and classifier, like a base checkpoint."""
    folder.mkdir(exist_ok=True)
    tensors = load_file(GOLDEN / name / "model.safetensors")
    is_head = re.compile(r"(.*\.)?(pooler|classifier|score|classification_head)\.")
    backbone = {name: tensor for name, tensor in tensors.items() if not is_head.match(name)}
    save_file(backbone, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(GOLDEN / name / "config.json", folder)
    return folder


def with_toy_tokenizer(name: str, folder: Path) -> Path:
    """Make a golden language model read text, with the built-in LLaMA's tokenizer and vocabulary."""
    shutil.copytree(MODEL, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((GOLDEN / name / "config.json").read_text())
    toy = json.loads((MODEL / "config.json").read_text())
    config |= {key: toy[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "max_position_embeddings")}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {}
    for file in (GOLDEN / name).glob("model*.safetensors"):
        tensors |= load_file(file)
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        generator = torch.Generator().manual_seed(0)
        tensors[key] = 0.3 * torch.randn(toy["vocab_size"], config["hidden_size"], generator=generator)
    save_file(tensors, folder / "model.safetensors")
    return folder


def status_of(main, *flags) -> int:
    """Run a command in this process. Returns its exit status."""
    argv, handler = sys.argv, signal.getsignal(signal.SIGTERM)
    sys.argv = [main.__module__.rpartition(".")[2], *map(str, flags)]
    try:
        cli.run_script(main)
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = argv
        signal.signal(signal.SIGTERM, handler)


def stop_within(monkeypatch, script, step: int, number: int) -> None:
    """Let a script (a module) send this process a signal in the middle of a step, counted from 0."""
    lambdas = script.lambdas

    def stop(objective, at, *rest):
        if at == step:
            os.kill(os.getpid(), number)
        return lambdas(objective, at, *rest)

    monkeypatch.setattr(script, "lambdas", stop)


KILLED = """
import os, runpy, signal, sys
from pathlib import Path
step, script, *flags = sys.argv[1:]
sys.path.insert(0, str(Path(script).parent))
from minibalora.run import loop

def kill(seed, at, seed_step=loop.seed_step):
    if at == int(step):
        os.kill(os.getpid(), signal.SIGKILL)
    seed_step(seed, at)

loop.seed_step = kill
sys.argv[:] = [script, *flags]
runpy.run_path(script, run_name="__main__")
"""


def kill_before(step: int, script: Path, *flags) -> None:
    """Run a script in a separate process that is killed by SIGKILL before a step, counted from 0."""
    command = [sys.executable, "-c", KILLED, str(step), str(script), *map(str, flags)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr


IGNORED = -100  # in labels: nothing is predicted there


def padded_rows(rows: list, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Return `Row`s as input_ids (B, T), padded on the right with 0, and labels (B, T): response ids or IGNORED."""
    width = max(len(row.ids) for row in rows)
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full((len(rows), width), IGNORED)
    for index, row in enumerate(rows):
        ids = torch.as_tensor(row.ids).long()
        input_ids[index, : len(ids)] = ids
        labels[index, row.prompt_length : len(ids)] = ids[row.prompt_length :]
    return input_ids.to(device), labels.to(device)


def predicted_rows(states: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the states (M, d) that predict a response token, and the tokens (M,): position t predicts token t + 1."""
    counts = labels[:, 1:] != IGNORED
    return states[:, :-1][counts], labels[:, 1:][counts]


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return ‖a − b‖ / ‖b‖."""
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-300)).item()


@torch.no_grad()
def stretch(model: nn.Module) -> None:
    """Change the adapter as training might, independently of the signs of the singular vectors."""
    for index, (_, layer) in enumerate(adapted_layers(model)):
        m, n = layer.A.shape[0], layer.B.shape[1]
        layer.A *= 1 + 0.2 * torch.sin(torch.arange(m) + index)[:, None]
        layer.B *= 1 + 0.2 * torch.cos(torch.arange(n) + index)


@torch.no_grad()
def restless(model: nn.Module) -> nn.Module:
    """Negate the final norm if the head is tied: otherwise random weights repeat one token forever. In place."""
    # Transformers' T5 always says that its head is tied; only scale_decoder_outputs tells the truth.
    is_tied = getattr(model.config, "scale_decoder_outputs", model.config.tie_word_embeddings)
    vectors = {name: parameter for name, parameter in model.named_parameters() if parameter.ndim == 1}
    norm = [name for name in vectors if name.endswith("weight")][-1]  # a model's last vector belongs to its final norm
    if is_tied:
        vectors[norm].abs_().neg_()
    if (bias := norm.replace("weight", "bias")) in vectors:
        vectors[bias].zero_()
    return model


def gradients_of_a_step(model, rows, micro_batch_size, objective, step=5, steps=10):
    """Do a step of train_nlg.py on one rank. Returns the gradient of all factors in one vector, L, and its terms."""
    model.zero_grad()
    if objective.router_aux > 0:
        keep_router_outputs(model)
    head, micro = head_of(model), micro_batches(rows, micro_batch_size)
    shares = [sum(row.predicted for row in part) / sum(row.predicted for row in rows) for part in micro]
    packed = [pack(part, "cpu") for part in micro]
    teachers = teacher_states(model, packed, micro) if objective.needs_teacher else [None] * len(micro)
    unsure = None
    if objective.adaptive_lambda1:
        means = [head.entropy_share(teacher, objective.temperature) for teacher in teachers]
        unsure = sum(share * mean.item() for share, mean in zip(shares, means, strict=True))
    weights, total, sums = lambdas(objective, step, steps, unsure), 0.0, {}
    for share, batch, teacher in zip(shares, packed, teachers, strict=True):
        student = model.packed(batch.input_ids, batch.lengths, batch.wanted, batch.shared)
        loss, terms = head.loss(student, teacher, batch.targets, objective, weights)
        if objective.router_aux > 0:
            terms["router_aux"] = load_balance(model)
            loss = loss + objective.router_aux * terms["router_aux"]
        (share * loss).backward()
        total += share * loss.item()
        sums = {name: sums.get(name, 0.0) + share * term.item() for name, term in terms.items()}
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    return gradient, total, sums


def random_rows(count: int, seed: int) -> list[Row]:
    """Return rows of 2 to 13 tokens below 61, with prompts and responses of random lengths."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 14, count)
    prompts = [int(rng.integers(1, length)) for length in lengths]
    return [
        Row(rng.integers(0, 61, length).astype(np.int32), prompt, line)
        for line, (length, prompt) in enumerate(zip(lengths, prompts, strict=True))
    ]
