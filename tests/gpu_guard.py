"""Run both training scripts on an imitation of a GPU (`fake_gpu.py`) and print where the host waits, as JSON.

Arguments: names in MODELS and PLANTS. `test_cuda_guard.py` runs this in a process of its own.
"""

from fake_gpu import WAITS  # before the project is imported

# isort: split
import json
import shutil
import sys
import tempfile
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from helpers import GOLDEN, status_of
from models.test_decoder import varlen_attn as plain_varlen_attn
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

import minibalora as mb
import train_nlg
import train_nlu
from minibalora.data.batches import Row
from minibalora.data.labelled import ClassRow
from minibalora.evaluation.class_scoring import answers
from minibalora.evaluation.decoding import Decoding, generate_ids
from minibalora.evaluation.perplexity import mean_loss
from minibalora.run.loop import Run

try:
    from torch.nn.attention.varlen import varlen_attn as torch_varlen_attn
except ImportError:
    torch_varlen_attn = None  # an older torch

CLASSIFY = ["--task", "custom", "--text-field", "prompt", "--label-field", "label"]
MODELS = {
    "llama3": ["--dtype", "bfloat16"],
    "gpt2": ["--grad-checkpoint", "--adaptive-lambda1"],
    "t5": ["--quantize", "nf4", "--dtype", "bfloat16"],
    "gemma2": ["--dtype", "bfloat16"],
    "mixtral": ["--router-aux-loss", 0.01, "--dtype", "bfloat16"],
    "bert": CLASSIFY,
    "deberta": [*CLASSIFY, "--dtype", "bfloat16"],
}
STEP = ["--rank", 3, "--batch-size", 4, "--micro-batch-size", 2, "--max-steps", 3, "--non-target-kl", 0.1]
STEP += ["--max-length", 16, "--dtype", "float32"]


def write_checkpoint(name: str, folder: Path) -> None:
    """Copy a golden checkpoint and give it a tokenizer, of a token for each character."""
    shutil.copytree(GOLDEN / name, folder)
    vocabulary = {token: number for number, token in enumerate(["<pad>", "</s>", "<s>", "<unk>", *"0123456789+="])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = Split(Regex("."), "isolated")
    backend.post_processor = TemplateProcessing(single="$A </s>", pair="$A </s> $B:1", special_tokens=[("</s>", 1)])
    backend.save(str(folder / "tokenizer.json"))
    rows = [{"prompt": f"{n}+{n % 5}=", "completion": f"{n + n % 5}", "label": "abc"[n % 3]} for n in range(16)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))


def waits_of(work, *arguments) -> Counter:
    before = Counter(WAITS)
    work(*arguments)
    return WAITS - before


def varlen_attn(q: Tensor, *arguments, **settings) -> Tensor:
    """Compute torch's varlen_attn, which only CUDA has, in plain operations. It waits for nothing."""
    if isinstance(q, FakeTensor):  # of a run that only counts memory
        return torch_varlen_attn(q, *arguments, **settings)
    before = Counter(WAITS)
    with torch.device("gpu"):
        y = plain_varlen_attn(q, *arguments, **settings)
    WAITS.clear()
    WAITS.update(before)
    return y


def train(name: str, folder: Path, device: str) -> tuple[list[float], Counter]:
    """Return the losses of a run of a script, and the waits of its third step, from update to update."""
    data, out, is_classifier = folder / "rows.jsonl", folder / device, "--task" in MODELS[name]
    flags = [*STEP, *MODELS[name], "--model", folder, "--data", data, "--device", device, "--out", out]
    flags += ["--eval", data] if is_classifier else ["--template", "raw"]
    marks, update = [], Run.update

    def noted(run: Run) -> None:
        update(run)
        marks.append(Counter(WAITS))

    Run.update = noted
    try:
        assert status_of((train_nlu if is_classifier else train_nlg).main, *flags) == 0
    finally:
        Run.update = update
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").open()], marks[2] - marks[1]


def use(name: str, folder: Path) -> dict[str, Counter]:
    """Return the waits of evaluation on two batches, and of each token in generation."""
    if "--task" in MODELS[name]:
        model, rows = mb.load_model(folder, "classifier", device="gpu"), [ClassRow(np.arange(9), np.zeros(9), 0, 0, 0)]
        return {"evaluation": waits_of(answers, model, 4 * rows, 2, "gpu")}
    model, prompts = mb.load_model(folder, device="gpu"), [[5, 6, 7], [8, 9]]
    rows = [Row(np.arange(9), 4, 0)] * 4

    def of_token(**settings) -> Counter:
        three, four = (waits_of(generate_ids, model, prompts, Decoding(count, **settings)) for count in (3, 4))
        return four - three

    drawn = of_token(temperature=1.0, top_p=0.9)
    return {"evaluation": waits_of(mean_loss, model, rows, 2), "greedy": of_token(), "drawn": drawn}


def report(name: str) -> dict:
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / name
        write_checkpoint(name, folder)
        (on_cpu, _), (on_gpu, step) = (train(name, folder, device) for device in ("cpu", "gpu"))
        return {"losses": [on_cpu, on_gpu], "step": step} | use(name, folder)


# Mistakes: what is made of the teacher's states (M, d) in train_nlg.py.
PLANTS = {
    "item": lambda states: states + 0 * states.sum().item(),
    "cpu": lambda states: states.cpu().pin_memory().to(states.device, non_blocking=True),
    "device": lambda states: torch.zeros(states.shape),
}


def report_plant(plant: str) -> Counter | str:
    """Return the waits of a step with a mistake, or the message of the error that it causes."""
    right = train_nlg.teacher_states
    train_nlg.teacher_states = lambda *arguments: [PLANTS[plant](states) for states in right(*arguments)]
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "llama3"
        write_checkpoint("llama3", folder)
        try:
            return train("llama3", folder, "gpu")[1]
        except RuntimeError as error:
            return str(error)
        finally:
            train_nlg.teacher_states = right


if __name__ == "__main__":
    sys.modules["torch.nn.attention.varlen"] = SimpleNamespace(varlen_attn=varlen_attn)
    with redirect_stdout(sys.stderr):
        reports = {name: report_plant(name) if name in PLANTS else report(name) for name in sys.argv[1:]}
    print(json.dumps(reports))
