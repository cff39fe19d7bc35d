"""How long a step takes and what memory it needs, ours beside transformers + PEFT: `python tests/bench_peft.py`.

Needs transformers and peft, and the repository's root in PYTHONPATH. Every contender has the same random weights and
takes the same rows in the same order, in turn; medians, each contender's peak memory in a process of its own, and the
ratios are printed. The contenders:

    ours METHOD, ours RECIPE           a step of ours
    peft lora                          LlamaForCausalLM in PEFT's LoRA, loss from its labels
    straightforward RECIPE             BA-LoRA on transformers + PEFT as the paper's own program does it: a second model
                                       as the teacher, full logits of both, randomised SVD of the response rows
    lean RECIPE                        the same by somebody careful: full logits live only until their response rows are
                                       taken, and the cross-entropy is taken on those
"""

import argparse
import re
import statistics
import subprocess
import sys
import time
import zlib
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import minibalora as mb
import train_nlg
from minibalora import data, training
from minibalora import regularizers as R
from minibalora.data import Row
from minibalora.models.decoder import Decoder, DecoderConfig
from minibalora.objective import NLG_RECIPES, Objective, lambdas

VOCAB, HIDDEN, INNER, LAYERS, HEADS, EPS = 32000, 512, 1408, 8, 8, 1e-5  # the shape `small`
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STEPS = 100  # of a run; every step measured is the one in the middle, where all terms of iclr2026 have a weight
Step = Callable[[int], float]  # which step, from 0 -> its loss, before the update


def main() -> None:
    args = parse_flags()
    torch.manual_seed(0)
    if args.only:
        print(peak_memory_alone(args.only, args))
        return
    memories = {name: memory_in_own_process(name) for name in args.contenders}
    steps = {name: CONTENDERS[name](args) for name in args.contenders}
    check_losses({name: step(0) for name, step in steps.items()})
    seconds = interleaved(steps, args.rounds, args.warmup)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"{'':25} ms: median fastest slowest  peak MiB")
    for name, times in seconds.items():
        median, fastest, slowest = (1000 * value for value in (medians[name], min(times), max(times)))
        print(f"{name:25} {median:10.0f} {fastest:7.0f} {slowest:7.0f} {memories[name] / 2**20:9.0f}")
    for mine, other in PAIRS:
        if {mine, other} <= medians.keys():
            ratios = f"time {medians[mine] / medians[other]:.2f}, memory {memories[mine] / memories[other]:.2f}"
            print(f"{mine} / {other}: {ratios}")


def parse_flags() -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--only", choices=list(CONTENDERS), metavar="NAME", help="only the peak memory of this one")
    parser.add_argument("--rounds", type=int, default=8, help="8 rounds of 4 rows see every row once")
    parser.add_argument("--warmup", type=int, default=1, help="rounds that do not count")
    parser.add_argument("--micro-batch-size", type=int, default=4, help="rows of a step")
    parser.add_argument("--rank", type=int, default=HIDDEN // 32, help="the paper has 128 at 4096")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    args.dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    return args


def interleaved(steps: dict[str, Step], rounds: int, warmup: int) -> dict[str, list[float]]:
    """Seconds of every contender's steps, one after the other on the same rows, each round begun by another.

    What slows the machine for a while slows all of them. A step returns a number, so a GPU has finished its backward
    pass; its update is waited for here.
    """
    names, seconds = list(steps), {name: [] for name in steps}
    for index in range(warmup + rounds):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            started = time.perf_counter()
            steps[name](index)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if index >= warmup:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def check_losses(losses: dict[str, float]) -> None:
    """The first losses of all who minimise the same thing agree: the same rows, the same weights, adapters at their
    start. BA-LoRA's spectral term is randomised over there, and of the nuclear norm only an estimate."""
    for name, loss in losses.items():
        kind, same = name.split()[-1], 1e-4 if name.endswith("lora") else 1e-3
        others = [other for key, other in losses.items() if key.split()[-1] == kind]
        assert max(abs(loss - other) for other in others) < same * loss, f"losses differ at the start: {losses}"


def memory_in_own_process(name: str) -> int:
    command = [sys.executable, "-W", "ignore", __file__, *sys.argv[1:], "--only", name]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def peak_memory_alone(name: str, args: Namespace) -> int:
    """Bytes that the model and two steps on the longest rows take at most, beyond what there was before the model.

    Linux's VmHWM, because ru_maxrss begins with the peak of the process that started this one.
    """
    if args.device == "cuda":
        before, peak = torch.cuda.memory_allocated, torch.cuda.max_memory_allocated
    else:
        before, peak = (partial(own_memory, field) for field in ("VmRSS", "VmHWM"))
    start, step, size = before(), CONTENDERS[name](args), args.micro_batch_size
    longest = max(range(8), key=lambda index: max(len(row.ids) for row in rows_of_step(index, size)))
    for _ in range(2):
        step(longest)
    return peak() - start


def own_memory(field: str) -> int:
    return 1024 * int(re.search(rf"{field}:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def row_lengths() -> list[tuple[int, int]]:
    """Tokens of prompt and response of 32 rows of GSM8K's training set in Alpaca's prompt, by LLaMA's tokenizer.

    Rows 1/64, 3/64, ... of all 7473 in order of length, then shuffled. Their mean is 101 + 130 tokens (all rows: 101 +
    131); a quarter of a batch of 4 is padding, here as there.
    """
    # fmt: off
    return [
        (150, 135), (145, 124), (106, 104), (82, 118), (75, 84), (91, 73), (128, 219), (127, 247),
        (74, 101), (155, 170), (70, 110), (113, 184), (89, 106), (131, 122), (67, 86), (89, 172),
        (122, 154), (83, 63), (74, 51), (82, 151), (97, 93), (112, 134), (96, 143), (142, 167),
        (71, 156), (81, 104), (86, 135), (94, 111), (153, 277), (106, 109), (75, 63), (80, 90),
    ]
    # fmt: on


def rows_of_step(index: int, count: int) -> list[Row]:
    """`count` rows with random ids, the same for every contender; an epoch later the same again."""
    random, lengths = np.random.default_rng(0), row_lengths()
    rows = [Row(random.integers(VOCAB, size=sum(both)), both[0], line) for line, both in enumerate(lengths)]
    return [rows[(index * count + offset) % len(rows)] for offset in range(count)]


@torch.no_grad()
def fill(model: nn.Module) -> nn.Module:
    """Random weights that depend on a tensor's name and shape only: both sides name them alike, so they are equal."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            parameter.copy_(torch.empty(parameter.shape).normal_(0, 0.02, generator=generator))
    return model


def ours(objective: Objective, init: str, args: Namespace) -> Step:
    """Ours, from what train_nlg.py has: one model, one step, its micro-batches."""
    config = DecoderConfig(
        VOCAB, HIDDEN, INNER, LAYERS, HEADS, HEADS, HIDDEN // HEADS, EPS, 10000.0, None, None, False, False, False,
        "silu", 0.0, 1.0, 4096, 0.02,
    )  # fmt: skip
    with torch.device(args.device):
        model = fill(Decoder(config).to(args.dtype))
    mb.adapt(model, args.rank, init=init).train()
    optimizer = training.optimizer_of(model, torch.device(args.device))
    optimizer.param_groups[0]["lr"] = 2e-5
    parameters = optimizer.param_groups[0]["params"]

    def step(index: int) -> float:
        batch = rows_of_step(index, args.micro_batch_size)
        batches = [data.collate(batch, args.device)]
        tokens = sum(len(row.ids) - row.prompt_length for row in batch)
        losses, _ = train_nlg.backward(model, model.hidden, batches, tokens, objective, STEPS // 2, STEPS, [])
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return sum(losses)

    return step


def peft(loss_of: Callable[..., Tensor], objective: Objective | None, args: Namespace) -> Step:
    """transformers + PEFT, minimising loss_of(student, teacher, batch, objective); no objective: LoRA, no teacher."""
    student = hugging_face(args)
    init = True if objective is None else "pissa_niter_16"
    config = LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=LINEARS, init_lora_weights=init)
    student = get_peft_model(student, config).train()
    teacher = None if objective is None else hugging_face(args).requires_grad_(False).eval()
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-5, weight_decay=0.0, fused=True)  # fused is the Trainer's default

    def step(index: int) -> float:
        batch = rows_of_step(index, args.micro_batch_size)
        ids, labels = data.collate(batch, args.device)
        lengths = torch.tensor([len(row.ids) for row in batch], device=args.device)
        mask = (torch.arange(ids.shape[1], device=args.device) < lengths[:, None]).long()
        loss = loss_of(student, teacher, {"input_ids": ids, "attention_mask": mask, "labels": labels}, objective)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def hugging_face(args: Namespace) -> nn.Module:
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS, use_cache=False,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, rms_norm_eps=EPS, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM._from_config(config, dtype=args.dtype, attn_implementation="sdpa")
    return fill(model).to(args.device)


def lora_loss(student: nn.Module, teacher: None, batch: dict[str, Tensor], objective: None) -> Tensor:
    return student(**batch).loss


def straightforward_loss(student: nn.Module, teacher: nn.Module, batch: dict[str, Tensor], objective: Objective):
    out = student(**batch)
    with torch.no_grad():
        teacher_logits = teacher(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    is_response = batch["labels"][:, 1:] != -100
    z_f, z_p = out.logits[:, :-1][is_response], teacher_logits[:, :-1][is_response]
    return out.loss + regularizers(z_f, z_p, objective)


def lean_loss(student: nn.Module, teacher: nn.Module, batch: dict[str, Tensor], objective: Objective) -> Tensor:
    inputs, targets = {name: batch[name] for name in ("input_ids", "attention_mask")}, batch["labels"][:, 1:]
    is_response = targets != -100
    with torch.no_grad():
        z_p = teacher(**inputs).logits[:, :-1][is_response]
    z_f = student(**inputs).logits[:, :-1][is_response]
    return F.cross_entropy(z_f.float(), targets[is_response]) + regularizers(z_f, z_p, objective)


def regularizers(z_f: Tensor, z_p: Tensor, objective: Objective) -> Tensor:
    """The three terms of (M, V) logits, with the weights of the run's middle."""
    weights = lambdas(objective, STEPS // 2, STEPS)
    return (
        weights["consistency"] * R.consistency_kl(z_f, z_p, objective.temperature)
        + weights["diversity"] * R.diversity_entropy(z_f, objective.top_k)
        + weights["svd"] * randomised_share(z_f.float(), objective.svd_k, objective.svd_norm)
    )


def randomised_share(Z: Tensor, k: int, norm: str) -> Tensor:
    """svd_share by torch.svd_lowrank, k + 5 values and 2 iterations as in the paper's own program.

    The nuclear norm is the sum of those k + 5 values: all of them would need the exact SVD, seconds at (500, 32000).
    """
    sigma = torch.svd_lowrank(Z, q=k + 5, niter=2)[1]
    return -sigma[:k].sum() / (torch.linalg.vector_norm(Z) if norm == "frobenius" else sigma.sum())


CONTENDERS = {
    "ours lora": partial(ours, Objective(), "lora"),
    **{f"ours {name}": partial(ours, objective, "pissa_niter_16") for name, objective in NLG_RECIPES.items()},
    "peft lora": partial(peft, lora_loss, None),
    **{f"straightforward {name}": partial(peft, straightforward_loss, NLG_RECIPES[name]) for name in NLG_RECIPES},
    **{f"lean {name}": partial(peft, lean_loss, NLG_RECIPES[name]) for name in NLG_RECIPES},
}

PAIRS = [("ours lora", "peft lora")]
for recipe in NLG_RECIPES:
    PAIRS += [(f"ours {recipe}", other) for other in (f"straightforward {recipe}", f"lean {recipe}", "peft lora")]

if __name__ == "__main__":
    main()
