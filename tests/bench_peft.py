"""Compare time and memory of a training step with transformers + PEFT: `python tests/bench_peft.py`.

Needs transformers and peft, and the repository's root in PYTHONPATH. All contenders have the same random weights and
take turns on the same rows in the same order. Prints median times, each contender's peak memory in its own process, and
ratios. The contenders are:

    ours METHOD, ours RECIPE           our step, as in `python -m minibalora bench`
    peft lora                          LlamaForCausalLM with PEFT's LoRA; the loss comes from its labels
    straightforward RECIPE             BA-LoRA on transformers + PEFT like the paper's own program: a second model as
                                       the teacher, full logits of both, a randomised SVD of the response rows
    straightforward exact RECIPE       the same with an exact SVD
    lean RECIPE                        straightforward with less memory: full logits are freed as soon as the response
                                       rows are copied, and the cross-entropy is computed from these rows
"""

import argparse
import statistics
from argparse import Namespace
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM

from minibalora import regularizers as R
from minibalora.base import cli
from minibalora.data.batches import Row
from minibalora.objective import NLG_RECIPES, Objective, lambdas
from minibalora.run import bench, workload
from minibalora.run.settings import Hardware
from minibalora.run.workload import LEARNING_RATE, STEPS, Contender, Load, Step

SHAPE = workload.SMALL


def main() -> None:
    args = parse_flags()
    hardware = Hardware(cli.device(args.device), cli.dtype(None, cli.device(args.device)))
    load = Load(SHAPE, hardware, args.rank, args.micro_batch_size, args.warmup, args.rounds)
    steps = {name: CONTENDERS[name](load) for name in args.contenders}
    check_losses({name: step(0) for name, step in steps.items()})
    seconds = bench.in_turn(steps, load)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    memories = {name: bench.in_own_process(peak_memory, name, load) for name in args.contenders}
    print(f"{'':31} ms: median fastest slowest  peak MB")
    for name, times in seconds.items():
        median, fastest, slowest = (1000 * value for value in (medians[name], min(times), max(times)))
        print(f"{name:31} {median:10.0f} {fastest:7.0f} {slowest:7.0f} {memories[name] / 1e6:8.0f}")
    for name, other in PAIRS:
        if {name, other} <= medians.keys():
            ratios = f"time {medians[name] / medians[other]:.2f}, memory {memories[name] / memories[other]:.2f}"
            print(f"{name} / {other}: {ratios}")


def parse_flags() -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=8, help="timed steps; 8 steps of 4 rows use every row once")
    parser.add_argument("--warmup", type=int, default=1, help="steps before the timed ones")
    parser.add_argument("--micro-batch-size", type=int, default=4, help="rows of a step")
    parser.add_argument("--rank", type=int, default=SHAPE.hidden_size // 32, help="the paper uses 128 at width 4096")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def check_losses(losses: dict[str, float]) -> None:
    """Check that the first losses of all contenders with the same objective agree.

    The tolerance for BA-LoRA is larger: the others' spectral term is randomised, and their nuclear norm is an estimate.
    """
    for name, loss in losses.items():
        objective, tolerance = name.split()[-1], 1e-4 if name.endswith("lora") else 1e-3
        others = [other for key, other in losses.items() if key.split()[-1] == objective]
        assert max(abs(loss - other) for other in others) < tolerance * loss, f"losses differ at the start: {losses}"


def peak_memory(name: str, load: Load) -> int:
    return bench.needs_of(lambda: {name: CONTENDERS[name](load)}, load)["peak_bytes"]


def ours(contender: Contender, load: Load) -> Step:
    return workload.steps_of(load, [contender])[contender]


def peft(loss_of: Callable[..., Tensor], objective: Objective | None, load: Load) -> Step:
    """Return a step with transformers + PEFT that minimises loss_of(student, teacher, batch, objective).

    Without an objective, the step is plain LoRA and has no teacher.
    """
    student = hugging_face(load.hardware)
    init = True if objective is None else "pissa_niter_16"
    config = LoraConfig(r=load.rank, lora_alpha=load.rank, target_modules="all-linear", init_lora_weights=init)
    student = get_peft_model(student, config).train()
    teacher = None if objective is None else hugging_face(load.hardware).requires_grad_(False).eval()
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)  # Trainer's default

    def step(index: int) -> float:
        batch = padded(workload.rows_of_step(SHAPE.vocab_size, index, load.rows), load.hardware.device)
        loss = loss_of(student, teacher, batch, objective)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def padded(rows: list[Row], device: torch.device) -> dict[str, Tensor]:
    """Return the arguments of transformers' models; labels are −100 on prompts and padding."""
    ids = [torch.from_numpy(row.ids).long() for row in rows]
    labels = [torch.cat([torch.full((row.prompt_length,), -100), row_ids[row.prompt_length :]])
              for row_ids, row in zip(ids, rows, strict=True)]  # fmt: skip
    masks = [torch.ones_like(row_ids) for row_ids in ids]
    parts = {"input_ids": (ids, 0), "attention_mask": (masks, 0), "labels": (labels, -100)}
    return {name: pad_sequence(tensors, True, padding).to(device) for name, (tensors, padding) in parts.items()}


def hugging_face(hardware: Hardware) -> nn.Module:
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps")
    names += ("num_attention_heads", "num_key_value_heads", "tie_word_embeddings")
    config = LlamaConfig(use_cache=False, **{name: getattr(SHAPE, name) for name in names})
    model = LlamaForCausalLM._from_config(config, dtype=hardware.dtype, attn_implementation="sdpa")
    return workload.fill(model.to(hardware.device))


def lora_loss(student: nn.Module, teacher: None, batch: dict[str, Tensor], objective: None) -> Tensor:
    return student(**batch).loss


def straightforward_loss(
    student: nn.Module, teacher: nn.Module, batch: dict[str, Tensor], objective: Objective, share: Callable
) -> Tensor:
    out = student(**batch)
    with torch.no_grad():
        teacher_logits = teacher(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    is_response = batch["labels"][:, 1:] != -100
    z_f, z_p = out.logits[:, :-1][is_response], teacher_logits[:, :-1][is_response]
    return out.loss + regularizers(z_f, z_p, objective, share)


def lean_loss(student: nn.Module, teacher: nn.Module, batch: dict[str, Tensor], objective: Objective) -> Tensor:
    inputs, targets = {name: batch[name] for name in ("input_ids", "attention_mask")}, batch["labels"][:, 1:]
    is_response = targets != -100
    with torch.no_grad():
        z_p = teacher(**inputs).logits[:, :-1][is_response]
    z_f = student(**inputs).logits[:, :-1][is_response]
    return F.cross_entropy(z_f.float(), targets[is_response]) + regularizers(z_f, z_p, objective, randomised_share)


def regularizers(z_f: Tensor, z_p: Tensor, objective: Objective, share: Callable) -> Tensor:
    """Return the weighted sum of the three terms of logits (M, V), with the weights at the middle of a run.

    share: the function for the spectral term.
    """
    weights = lambdas(objective, STEPS // 2, STEPS)
    return (
        weights["consistency"] * R.consistency_kl(z_f, z_p, objective.temperature)
        + weights["diversity"] * R.diversity_entropy(z_f, objective.top_k)
        + weights["svd"] * share(z_f.float(), objective.svd_k, objective.svd_norm)
    )


def randomised_share(Z: Tensor, k: int, norm: str) -> Tensor:
    """Compute svd_share with torch.svd_lowrank, k + 5 values and 2 iterations, as in the paper's own program.

    The nuclear norm is estimated by the sum of these values; the exact SVD takes seconds for (500, 32000) logits.
    """
    sigma = torch.svd_lowrank(Z, q=k + 5, niter=2)[1]
    return -sigma[:k].sum() / (torch.linalg.vector_norm(Z) if norm == "frobenius" else sigma.sum())


STRAIGHTFORWARD = partial(straightforward_loss, share=randomised_share)
EXACT = partial(straightforward_loss, share=R.svd_share)
CONTENDERS = {
    "ours lora": partial(ours, Contender("lora")),
    **{f"ours {name}": partial(ours, Contender("ba-lora", name)) for name in NLG_RECIPES},
    "peft lora": partial(peft, lora_loss, None),
    **{f"straightforward {name}": partial(peft, STRAIGHTFORWARD, recipe) for name, recipe in NLG_RECIPES.items()},
    **{f"straightforward exact {name}": partial(peft, EXACT, recipe) for name, recipe in NLG_RECIPES.items()},
    **{f"lean {name}": partial(peft, lean_loss, recipe) for name, recipe in NLG_RECIPES.items()},
}

PAIRS = [("ours lora", "peft lora")]
for recipe in NLG_RECIPES:
    others = [f"{kind} {recipe}" for kind in ("straightforward", "straightforward exact", "lean")]
    PAIRS += [(f"ours {recipe}", other) for other in [*others, "peft lora"]]

if __name__ == "__main__":
    main()
