"""Check and measure on a GPU, in at most ten minutes: `PYTHONPATH=. python tests/bench_gpu.py`.

Five parts: what the tests check on a CPU, memory and time of a training step, loading and PiSSA, generation. Each runs
in a process of its own within its budget of seconds, so that no failure of one part, such as too little memory, loses
the others. Needs a card of 80 GB for `--shape llama-2-7b`; transformers and PEFT are compared with where installed.
`--device cpu --shape tiny` tries the program itself in about a minute.
"""

import argparse
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from helpers import (
    CLASSIFIERS,
    GOLDEN,
    LANGUAGE_MODELS,
    SEQ2SEQ,
    distance,
    golden_example,
    kill_before,
    restless,
    status_of,
)
from safetensors.torch import save_file
from test_fused import both as fused_and_plain
from test_fused import states_and_head
from test_lean_product import both as plain_and_lean
from torch import Tensor, nn

import minibalora as mb
import train_nlg
from minibalora.base import cli
from minibalora.data.batches import pack
from minibalora.evaluation.decoding import Decoding, generate_ids
from minibalora.lean_product import use_lean_product
from minibalora.lowrank import adapt, factors_of, merge
from minibalora.models import blocks_of
from minibalora.models.llama import llama
from minibalora.nf4 import quantize
from minibalora.objective import NLG_RECIPES
from minibalora.run import bench, memory, workload
from minibalora.run.flags import DEFAULTS
from minibalora.run.settings import Hardware
from minibalora.run.workload import Contender, Load
from minibalora.toy import MODEL
from minibalora.toy.problems import clean_problems

SHAPES = {name: workload.SHAPES[name] for name in ("llama-2-7b", "small")} | {
    "tiny": replace(
        workload.SMALL, vocab_size=1000, hidden_size=64, intermediate_size=160, num_hidden_layers=2, head_dim=16,
        num_attention_heads=4, num_key_value_heads=4, windows=(None,) * 2,
    )
}  # fmt: skip
CONTENDERS = [Contender("lora"), Contender("pissa"), *(Contender("ba-lora", recipe) for recipe in NLG_RECIPES)]


def main() -> int:
    args = parse_flags()
    if args.part:
        PARTS[args.part][0](args)
        return 0
    facts = bench.machine(torch.device(args.device))
    print(f"{facts['gpu'] or facts['cpu']}, torch {facts['torch']}, {args.shape} in {args.dtype}", flush=True)
    failed = []
    for name, (part, budget) in PARTS.items():
        print(f"\n{name}: {part.__doc__.splitlines()[0]}", flush=True)
        started = time.perf_counter()
        try:
            command, paths = [sys.executable, *sys.argv, "--part", name], {"PYTHONPATH": os.pathsep.join(sys.path)}
            is_right = subprocess.run(command, timeout=budget, env=os.environ | paths).returncode == 0
            verdict = "" if is_right else "FAILED, "
        except subprocess.TimeoutExpired:
            verdict = f"FAILED, longer than {budget} s, "
        print(f"{name}: {verdict}{time.perf_counter() - started:.0f} s", flush=True)
        failed += [name] if verdict else []
    print(f"\nfailed: {', '.join(failed)}" if failed else "\nall parts done")
    return 1 if failed else 0


def parse_flags() -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--part", choices=PARTS, help="only this one, in this process and without a limit of time")
    args = parser.parse_args()
    args.hardware = Hardware(cli.device(args.device), torch.bfloat16)
    args.config, args.dtype = SHAPES[args.shape], "bfloat16"
    args.rank = args.config.hidden_size // 32  # the published 128 at 4096
    args.load = Load(args.config, args.hardware, args.rank, rows=4, warmup=2, rounds=8)
    return args


# What the tests check on a CPU.


def check(args: Namespace) -> None:
    """Results on the device, compared with transformers' and with those of the plain formulas and of the CPU."""
    results = [*golden_logits(args.device), greedy_tokens(args.device), *lean_forms(args.device), *runs(args.device)]
    for what, difference, limit in results:
        print(f"{what:58}{difference:9.1e}  {'ok' if difference <= limit else f'MORE THAN {limit:.0e}'}")
    if any(not difference <= limit for _, difference, limit in results):
        sys.exit(1)


@torch.no_grad()
def golden_logits(device: str) -> Iterator[tuple[str, float, float]]:
    """Yield the largest difference of each kind's logits from transformers', over their scale."""
    for kind, names in {"lm": [*LANGUAGE_MODELS, *SEQ2SEQ], "classifier": CLASSIFIERS}.items():
        worst = {}
        for name in names:
            *inputs, expected = golden_example(name)
            logits = mb.load_model(GOLDEN / name, kind, device=device).eval()(*(x.to(device) for x in inputs)).cpu()
            is_real = inputs[1].bool() if name in LANGUAGE_MODELS else ...
            worst[name] = ((logits - expected)[is_real].abs().max() / expected.abs().max()).item()
        name = max(worst, key=worst.get)
        yield f"logits of {len(names)} golden checkpoints, worst {name}", worst[name], 1e-5


def greedy_tokens(device: str) -> tuple[str, float, float]:
    """Return how many golden checkpoints continue prompts by other tokens than in transformers."""
    wrong, greedy = 0, json.loads((GOLDEN / "greedy.json").read_text())
    for name, values in greedy.items():
        model = restless(mb.load_model(GOLDEN / name, device=device))
        decoding = Decoding(max_new_tokens=24, eos_ids=frozenset([values["eos_id"]]))
        wrong += generate_ids(model, values["prompts"], decoding) != values["continuations"]
    return f"of {len(greedy)} golden checkpoints, with other greedy tokens", wrong, 0


def lean_forms(device: str) -> Iterator[tuple[str, float, float]]:
    """Yield the relative differences of gradients between the lean and the plain forms, and of NF4 to the CPU's."""
    for recipe, objective in NLG_RECIPES.items():
        student, *others = (x.detach().to(device) for x in states_and_head(600, 64, 3000, dtype=torch.float32))
        (_, fused, _), (_, plain, _) = fused_and_plain(student.requires_grad_(), *others, objective)
        yield f"gradient of the fused objective {recipe}, float32", distance(fused, plain), 1e-4
    for init in ("lora", "pissa"):
        gradients = []
        for layer in plain_and_lean(init):
            layer.to(device)(torch.linspace(-1, 1, 1200, device=device).sin().view(40, 30)).square().sum().backward()
            gradients.append(torch.cat([layer.A.grad.flatten(), layer.B.grad.flatten()]))
        yield f"gradient of the lean product, {init}, float32", distance(*gradients), 1e-5
    dense = []
    for place in ("cpu", device):
        torch.manual_seed(0)
        layer = mb.LowRankLinear.from_linear(nn.Linear(256, 128), 5, 8, "lora").to(place)
        quantize(layer)
        dense.append(layer.weight.detach().cpu())
    yield "weights in NF4, quantised there and on the CPU", distance(*dense), 1e-6


def runs(device: str) -> Iterator[tuple[str, float, float]]:
    """Yield the differences of train_nlg.py's losses from the CPU's, and of a resumed run's adapter from a whole one's.

    The orders of sums differ between devices. On one device, only operations that add in any order (atomics) differ.
    """
    with TemporaryDirectory() as parent:
        data = Path(parent, "data.jsonl")
        data.write_text("\n".join(map(json.dumps, clean_problems(16, seed=0))))
        common = ["--model", MODEL, "--data", data, "--batch-size", 4, "--max-steps", 4]
        common += ["--save-every", 2, "--dtype", "float32"]

        def run(out: str, place: str, *flags: object) -> Path:
            flags = [*common, *flags, "--device", place, "--out", Path(parent, out)]
            with redirect_stdout(StringIO()):
                assert status_of(train_nlg.main, *flags) == 0, f"train_nlg.py {' '.join(map(str, flags))}"
            return Path(parent, out)

        kinds = [[], ["--quantize", "nf4", "--grad-checkpoint"], ["--plain"], ["--method", "lora"]]
        kinds.append(["--method", "full", "--dtype", "bfloat16"])
        for number, flags in enumerate(kinds):
            there = run(f"there{number}", device, *flags)
            here = run(f"here{number}", "cpu", *flags)
            limit = 2e-2 if "full" in flags else 1e-3  # bfloat16's rounding, or float32's
            yield f"losses of train_nlg.py {' '.join(flags)}", distance(losses(there), losses(here)), limit
        out = Path(parent, "killed")
        kill_before(2, Path(train_nlg.__file__), *common, "--device", device, "--out", out)
        run("killed", device, "--resume")
        whole = losses(Path(parent, "there0"))
        yield "losses of a run that was killed and resumed", distance(losses(out), whole), 1e-5


def losses(folder: Path) -> Tensor:
    return torch.tensor([json.loads(line)["loss"] for line in (folder / "log.jsonl").open()])


# A training step.


def measure_memory(args: Namespace) -> None:
    """The peak of a step on the longest rows, measured and as the plan of a run announces it."""
    print(f"{'GB':33}{'measured':>10}{'announced':>11}{'ratio':>8}")
    longest = max(range(8), key=args.load.tokens_of)
    batch = pack(workload.rows_of_step(args.config.vocab_size, longest, args.load.rows), "cpu")
    for contender in CONTENDERS:
        measured, announced = peak(args.load, contender, longest), announced_memory(args, contender, batch)
        print(f"{contender!s:33}{measured / 1e9:10.3f}{announced / 1e9:11.3f}{announced / measured:8.2f}", flush=True)


def peak(load: Load, contender: Contender, index: int) -> int:
    """Return the largest number of bytes of live tensors in two steps, with the model."""
    device = load.hardware.device
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    with nullcontext() if device.type == "cuda" else memory.LiveBytes() as live:
        step = workload.steps_of(load, [contender])[contender]
        for _ in range(2):
            step(index)
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else live.peak


def announced_memory(args: Namespace, contender: Contender, batch: object) -> int:
    model = workload.empty_model(args.config, args.hardware.dtype, args.rank, contender)
    loss_of = partial(memory.generation_loss, batch, contender.objective, 1, False)
    return memory.expected_memory(model, args.hardware, loss_of, accumulates=False)


def measure_steps(args: Namespace) -> None:
    """The time of a step of each method, in turn on the same rows, beside transformers and PEFT."""
    steps = {str(contender): step for contender, step in workload.steps_of(args.load, CONTENDERS).items()}
    try:
        import bench_peft

        bench_peft.SHAPE = args.config
        steps["transformers + PEFT lora"] = bench_peft.CONTENDERS["peft lora"](args.load)
    except ImportError as error:
        print(f"transformers + PEFT lora is not measured: {error}")
    seconds = bench.in_turn(steps, args.load)
    tokens = [args.load.tokens_of(index) for index in range(2, 10)]
    print(f"{'':33}{'ms a step':>10}{'fastest':>9}{'tokens/s':>10}{'x lora':>8}{'x PEFT':>8}")
    for name, times in seconds.items():
        median = statistics.median(times)
        speed = statistics.median(count / second for count, second in zip(tokens, times, strict=True))
        ratios = [median / statistics.median(seconds[other]) if other in seconds else float("nan")
                  for other in ("lora", "transformers + PEFT lora")]  # fmt: skip
        print(f"{name:33}{1e3 * median:10.1f}{1e3 * min(times):9.1f}{speed:10.0f}{ratios[0]:8.2f}{ratios[1]:8.2f}")


# Before and after training.


def measure_loading(args: Namespace) -> None:
    """The time to load a checkpoint and to compute the adapters' start."""
    config, device = args.config, args.hardware.device
    with TemporaryDirectory() as folder:
        with torch.device("meta"):
            size = sum(parameter.nbytes for parameter in llama(config).to(args.hardware.dtype).parameters())
        if shutil.disk_usage(folder).free < 1.2 * size:
            config = replace(config, num_hidden_layers=4, windows=config.windows[:4])
            print(f"{folder} has no room for {size / 1e9:.0f} GB: 4 layers are written")
        write_checkpoint(config, args.hardware, Path(folder))
        models = []
        load = partial(mb.load_model, folder, dtype=args.hardware.dtype, device=device)
        seconds = seconds_of(lambda: models.append(load()), device)
        print(f"{f'load {config.num_hidden_layers} layers':44}{seconds:8.2f} s", flush=True)
    (model,) = models
    weight = next(part.weight for part in blocks_of(model)[0].modules() if isinstance(part, nn.Linear))
    for init in ("pissa", "pissa_niter_16"):
        seconds = seconds_of(partial(factors_of(init), weight, args.rank, 1.0), device)
        print(f"{f'{init}, one weight {tuple(weight.shape)}':44}{seconds:8.2f} s", flush=True)
    init = DEFAULTS["init"]
    seconds = seconds_of(partial(adapt, model, args.rank, init=init), device)
    print(f"{f'{init}, all layers':44}{seconds:8.2f} s")


def write_checkpoint(config: object, hardware: Hardware, folder: Path) -> None:
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps", "rope_theta")
    names += ("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "tie_word_embeddings")
    fields = {"model_type": "llama", "head_dim": config.head_dim} | {name: getattr(config, name) for name in names}
    (folder / "config.json").write_text(json.dumps(fields))
    tensors = {name: tensor.cpu() for name, tensor in workload.random_model(config, hardware).state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    bench.seconds_of(lambda: None, device)  # what ran before has ended
    return bench.seconds_of(work, device)


def measure_generation(args: Namespace) -> None:
    """Tokens a second with the adapter beside the weights and merged into them."""
    torch.manual_seed(0)
    model = adapt(workload.random_model(args.config, args.hardware), args.rank, init="pissa_niter_0")
    use_lean_product(model)
    prompts = np.random.default_rng(0).integers(3, args.config.vocab_size, size=(8, 128)).tolist()
    few, more = (4, 24) if args.shape == "tiny" else (8, 72)
    kinds = {"greedy": {}, "top-p 0.9": {"temperature": 1.0, "top_p": 0.9}}
    print(f"{'tokens/s':12}" + "".join(f"{f'{kind}, {rows} rows':>20}" for kind in kinds for rows in (1, 8)))
    for name in ("unmerged", "merged"):
        if name == "merged":
            merge(model)
        generate_ids(model, prompts, Decoding(few))  # the first call of a kernel takes longer
        cells = []
        for settings in kinds.values():
            for rows in (1, 8):
                short, long = (
                    seconds_of(
                        partial(generate_ids, model, prompts[:rows], Decoding(count, **settings)), args.hardware.device
                    )
                    for count in (few, more)
                )
                cells.append(f"{rows * (more - few) / (long - short):20.0f}")
        print(f"{name:12}{''.join(cells)}", flush=True)


# The parts, and their budgets in seconds: together less than ten minutes.
PARTS = {
    "check": (check, 150),
    "memory": (measure_memory, 100),
    "steps": (measure_steps, 120),
    "loading": (measure_loading, 140),
    "generation": (measure_generation, 80),
}

if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
