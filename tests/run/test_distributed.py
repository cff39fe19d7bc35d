"""Two processes on a CPU against one: the same losses, the same adapter.

torchrun runs this very file, so that one start of two processes, which takes longer than what they compute here, serves
many tests.
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import GOLDEN, distance, status_of
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import minibalora as mb
from minibalora.base import cli, distributed
from minibalora.checkpoints import weights
from minibalora.data.batches import Row, pack
from minibalora.lean_product import use_lean_product
from minibalora.lowrank import adapted_layers
from minibalora.run import flags, loop
from minibalora.run.adapting import adapt_model
from minibalora.run.settings import Adaptation, Hardware
from minibalora.run.sharded import load_sharded, own_rows
from minibalora.toy.problems import clean_problems

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "train_nlg.py"
sys.path.insert(0, str(ROOT))
import train_nlg  # noqa: E402

CAN_SHARD = torch.__version__ >= (2, 7)
SHARDED = ["--fsdp"] if CAN_SHARD else []
needs_shards = pytest.mark.skipif(not CAN_SHARD, reason="--fsdp needs torch 2.7")
ADAPTER = "adapter_model.safetensors"
# 45 rows in steps of 11: four micro-batches a step, and at the end of an epoch one, so that one of two ranks is idle.
COMMON = ["--rank", "4", "--batch-size", "11", "--micro-batch-size", "3", "--lr", "1e-3", "--device", "cpu"]
RUNS = {
    "iclr2026 sharded": SHARDED,
    "2024 adaptive": ["--recipe", "2024", "--adaptive-lambda1", "--non-target-kl", "0.1"],
    "lora sharded": ["--method", "lora", *SHARDED, "--grad-checkpoint", "--targets", "q_proj", "down_proj"],
    "adalora sharded": ["--method", "adalora", "--method-settings", "target=2", "every=1", *SHARDED],
    "dylora sharded": ["--method", "dylora", *SHARDED],
    "full": ["--method", "full"],
}
WHOLE = "iclr2026 sharded"  # for comparison with a stopped and resumed run
STOPPED_AT = 3  # of 5 steps
GOLDENS = {"llama_bias_tied": torch.float32, "mistral_window": torch.float32, "gemma": torch.bfloat16}
GOLDENS |= dict.fromkeys(("gpt2", "t5_gated", "mixtral_window", "deepseek"), torch.float32)


def command(folder: Path, name: str, *more: str) -> list[str]:
    """Return the arguments of a run with --out folder / name; the tiny model is beside the folders."""
    rank = [] if "full" in more else COMMON[:2]
    source = ["--model", str(folder.parent / "tiny"), "--data", str(folder / "data.jsonl")]
    return [*source, *rank, *COMMON[2:], "--out", str(folder / name), *more]


def in_one_process(*arguments: str) -> int:
    """Run in one thread, like torchrun's processes: Adam's first steps amplify rounding errors."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return status_of(train_nlg.main, *arguments)
    finally:
        torch.set_num_threads(threads)


def torchrun(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *map(str, arguments)]


def stopping(seed_step, stopped_rank: int):
    """loop.seed_step that at STOPPED_AT sends SIGTERM to this process, if it is that rank."""

    def seed_and_stop(seed: int, step: int) -> None:
        seed_step(seed, step)
        if step == STOPPED_AT and distributed.rank() == stopped_rank:
            os.kill(os.getpid(), signal.SIGTERM)

    return seed_and_stop


# The program of each of the two ranks.


def as_a_rank(folder: Path) -> None:
    distributed.join()
    distributed.join, distributed.leave = lambda: None, dist.barrier  # torch's processes can't meet a second time
    report, seed_step = {}, loop.seed_step
    for name, more in RUNS.items():
        report[name] = status_of(train_nlg.main, *command(folder / "two", name, *more))
    # Rank 0 refuses a used --out, and every rank a rank that is too high.
    report["refused"] = status_of(train_nlg.main, *command(folder / "two", WHOLE))
    report["wrong flag"] = status_of(train_nlg.main, *command(folder / "two", "new", "--rank", "129"))
    loop.seed_step = stopping(seed_step, stopped_rank=1)
    report["stopped by two"] = status_of(train_nlg.main, *command(folder / "two", "stopped"))
    loop.seed_step = seed_step
    with reading() as sizes:
        resumed = command(folder / "one", "stopped", *SHARDED, "--resume")
        report["resumed by two"] = status_of(train_nlg.main, *resumed)
    report["read"] = sizes
    report["sums"] = sums_of_gradients()
    report["golden"] = {name: distance_from_whole(name, dtype) for name, dtype in GOLDENS.items() if CAN_SHARD}
    (folder / f"report{distributed.rank()}.json").write_text(json.dumps(report))
    if CAN_SHARD:  # the last of all, because it ends both ranks
        damaged = command(folder / "two", "damaged", "--model", str(folder / "damaged"), "--method", "lora", "--fsdp")
        sys.argv = ["train_nlg.py", *damaged]
        cli.run_script(train_nlg.main)
    distributed.leave()


def sums_of_gradients() -> list[list[float]]:
    """Return the sums of gradients that fill several buckets, one alone and one with others."""
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((2, 3), (1,), (20,), (3, 1), (4,))]
    for index, parameter in enumerate(parameters):
        parameter.grad = torch.full_like(parameter, 10 * index + distributed.rank())
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(distributed, "BUCKET", 8)
        distributed.sum_gradients(parameters)
    return [parameter.grad.flatten().tolist() for parameter in parameters]


class reading:
    """Count how many numbers of each tensor are read inside; a second read of a tensor does not count."""

    def __enter__(self) -> dict[str, int]:
        self.as_stored, sizes = weights._as_stored, {}

        def counted(stored, rows=None):
            tensor = self.as_stored(stored, rows)
            sizes[stored.name] = tensor.numel()
            return tensor

        weights._as_stored = counted
        return sizes

    def __exit__(self, *_) -> None:
        weights._as_stored = self.as_stored


def distance_from_whole(name: str, dtype: torch.dtype) -> list[float]:
    """Return the distances of a sharded model's states, and gradients of all A and B, from the whole model's."""
    hardware = Hardware(torch.device("cpu"), dtype)
    whole = mb.adapt(mb.load_model(GOLDEN / name, dtype=dtype), 3, 5)
    use_lean_product(whole)
    sharded = weights.skeleton(GOLDEN / name)
    adapt_model(sharded, Adaptation("pissa", 3, 5, "pissa"), hardware, seed=0)
    load_sharded(sharded, dtype, hardware.device)
    assert all(not parameter.is_meta for parameter in sharded.parameters())
    rng = np.random.default_rng(distributed.rank())
    rows = [Row(rng.integers(0, 61, length).astype(np.int32), 2, 0) for length in (5, 9)]
    batch, results = pack(rows, "cpu"), []
    for model in (whole, sharded):
        states = model.packed(batch.input_ids, batch.lengths, batch.wanted, batch.shared)
        with mb.pretrained(model):
            teacher = model.packed(batch.input_ids, batch.lengths, batch.wanted, batch.shared)
        states.float().square().sum().backward()
        gradients = [factor.grad for _, layer in adapted_layers(model) for factor in (layer.A, layer.B)]
        results.append([states, teacher, *gradients])
    return [distance(a, b) for a, b in zip(*results, strict=True)]


# Tests.


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory) -> Path:
    """one/ has the runs of this process; two/ has the runs of two ranks, with their reports beside it. one/stopped was
    stopped by this process and resumed by two ranks; two/stopped was stopped by one of two ranks. tiny/ is the model.
    In damaged/, a number that only rank 1 reads is NaN."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(tiny, folder / "tiny")
    shutil.copytree(tiny, folder / "damaged")
    tensors = load_file(tiny / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][-1] = torch.nan
    save_file(tensors, folder / "damaged" / "model.safetensors", metadata={"format": "pt"})
    rows = "".join(json.dumps(row) + "\n" for row in clean_problems(45, seed=0))
    for name in ("one", "two"):
        (folder / name).mkdir()
        (folder / name / "data.jsonl").write_text(rows)
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, more in RUNS.items():
            arguments = command(folder / "one", name, *(flag for flag in more if flag != "--fsdp"))
            assert in_one_process(*arguments) == 0
        monkeypatch.setattr(loop, "seed_step", stopping(loop.seed_step, stopped_rank=0))
        assert in_one_process(*command(folder / "one", "stopped")) == 128 + signal.SIGTERM
    search_path = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}  # the package, and helpers
    result = subprocess.run(torchrun(__file__, folder), capture_output=True, text=True, env=os.environ | search_path)
    assert (folder / "report1.json").exists() and (result.returncode != 0) == CAN_SHARD, result.stderr
    (folder / "stderr").write_text(result.stderr)
    (folder / "stdout").write_text(result.stdout)
    return folder


@pytest.fixture(scope="module")
def reports(folder) -> list[dict]:
    return [json.loads((folder / f"report{rank}.json").read_text()) for rank in (0, 1)]


def assert_same_run(a: Path, b: Path, tolerance: float = 1e-5) -> None:
    logs = [[json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()] for out in (a, b)]
    assert len(logs[0]) == len(logs[1])
    for entries in zip(*logs, strict=True):
        for name in ("step", "loss", *loop.TERMS, "lr"):
            values = [math.nan if entry[name] is None else entry[name] for entry in entries]
            assert values[0] == pytest.approx(values[1], rel=0, abs=tolerance, nan_ok=True), name
    tensors = [load_file(next(out.rglob("*model*.safetensors"))) for out in (a, b)]
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[0].items():
        torch.testing.assert_close(tensors[1][name], tensor, rtol=0, atol=tolerance, msg=name)


def errors_of(folder: Path) -> list[str]:
    return [line for line in (folder / "stderr").read_text().splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_have_the_losses_and_the_adapter_of_one(name, folder, reports):
    """Equal to 1e-5. Two ranks add gradients in another order, which in float32 changes them by 1e-7 of the usual size.
    Adam divides each gradient by its own size, which for the smallest of 5,000 is a 5,000th of the usual size: an
    error of 5e-4 in a step of 1e-3.
    """
    assert [report[name] for report in reports] == [0, 0]
    assert_same_run(folder / "one" / name, folder / "two" / name)
    entries = (folder / "two" / name / "log.jsonl").read_text().splitlines()
    assert (json.loads(entries[-1])["svd"] is not None) == (name in ("iclr2026 sharded", "2024 adaptive"))


def test_gradients_are_summed_whatever_their_bucket(reports):
    for report in reports:
        assert report["sums"] == [[1] * 6, [21], [41] * 20, [61] * 3, [81] * 4]


def test_a_run_stopped_in_one_process_resumes_in_two_that_share_its_weights(folder, reports):
    assert [report["resumed by two"] for report in reports] == [0, 0]
    assert_same_run(folder / "one" / WHOLE, folder / "one" / "stopped")


def test_a_signal_to_one_rank_stops_both_after_the_step_and_one_process_resumes(folder, reports):
    assert [report["stopped by two"] for report in reports] == [128 + signal.SIGTERM] * 2
    out = folder / "two" / "stopped"
    assert len((out / "log.jsonl").read_text().splitlines()) == STOPPED_AT + 1
    assert in_one_process(*command(folder / "two", "stopped", "--resume")) == 0
    assert_same_run(folder / "one" / WHOLE, out)


@needs_shards
def test_a_rank_reads_only_its_own_rows_of_a_sharded_weight(reports, tiny):
    stored = {tensor.name: tensor for tensor in weights.stored_tensors(tiny).values()}
    for report in reports:
        assert report["read"].keys() == stored.keys()
        for name, tensor in stored.items():
            count = np.prod(tensor.shape)
            assert report["read"][name] == (count / 2 if ".layers." in name else count), name


@needs_shards
@pytest.mark.parametrize("name", GOLDENS)
def test_a_sharded_model_computes_the_same_as_the_whole_one(name, reports):
    """Covers each family, biases, transposed weights, a tied head, and rows that two ranks can't halve.

    The sums of float32 are the same, but in another order: ATen's plain kernels (ATEN_CPU_CAPABILITY=default) were
    1.02e-5 off in a gradient of t5_gated, AVX2's less.
    """
    for report in reports:
        assert max(report["golden"][name]) < 5e-5


def test_an_error_of_all_ranks_is_printed_once(folder, reports):
    assert [report["refused"] for report in reports] == [report["wrong flag"] for report in reports] == [2, 2]
    refused = [line for line in errors_of(folder) if "holds a run already" in line or "rank 129" in line]
    assert len(refused) == 2 and refused == errors_of(folder)[:2]


def test_only_one_rank_speaks(folder):
    saved = [line for line in (folder / "stdout").read_text().splitlines() if line.startswith("saved to ")]
    assert len(saved) == len(RUNS) + 1


@needs_shards
def test_an_error_of_one_rank_ends_both(folder):
    """Rank 1 reads the last rows of a weight, rank 0 does not."""
    wrong, *others = errors_of(folder)[2:]
    assert "model.layers.1.input_layernorm.weight has NaN" in wrong
    assert all("another process of this run has ended" in line for line in others)
    assert "[rank" not in (folder / "stderr").read_text()  # torch begins the lines of a traceback so


STOPPED = """
import os, signal, sys
from minibalora.base import distributed
from minibalora.run import loop

def stop(seed, at, seed_step=loop.seed_step):
    if at == 2 and distributed.rank() == 0:
        os.kill(os.getppid(), signal.SIGTERM)
    seed_step(seed, at)

loop.seed_step = stop
"""


def test_torchrun_stopped_by_a_signal_leaves_a_checkpoint(folder, tmp_path):
    """One rank sends SIGTERM to torchrun, which passes it on to all ranks."""
    out = folder / "two" / "terminated"
    (tmp_path / "train.py").write_text(f"{STOPPED}\n{SCRIPT.read_text()}")
    arguments = command(folder / "two", "terminated", "--epochs", "1000", "--recipe", "2024")
    search_path = {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        torchrun(tmp_path / "train.py", *arguments), capture_output=True, env=os.environ | search_path
    )
    assert ended.returncode != 0
    steps = len((out / "log.jsonl").read_text().splitlines())
    with weights.safe_open(out / "checkpoint" / "state.safetensors", "pt") as state:
        assert int(state.metadata()["step"]) == steps >= 2
    assert (out / ADAPTER).exists()


@given(count=st.integers(1, 20), ranks=st.integers(1, 7))
def test_every_part_is_dealt_once_and_all_ranks_get_equally_many(count, ranks):
    hands = [as_rank(rank, ranks, lambda: distributed.deal(list(range(count)), idle=None)) for rank in range(ranks)]
    assert len({len(hand) for hand in hands}) == 1
    rounds = [part for turn in zip(*hands, strict=True) for part in turn]  # the order of `Run.update`
    assert rounds[:count] == list(range(count)) and set(rounds[count:]) <= {None} and len(rounds) < count + ranks


@given(count=st.integers(1, 20), ranks=st.integers(1, 7))
def test_rows_are_kept_as_chunk_deals_them(count, ranks):
    rows = torch.arange(count)
    chunks = [chunk.tolist() for chunk in rows.chunk(ranks)] + [[]] * ranks
    assert [rows[as_rank(r, ranks, lambda: own_rows(count))].tolist() for r in range(ranks)] == chunks[:ranks]


def as_rank(rank: int, ranks: int, call):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        monkeypatch.setattr(distributed, "size", lambda: ranks)
        return call()


FSDP = ["--fsdp", "--model", "m", "--data", "d", "--device", "cpu"]


@pytest.mark.parametrize(
    "more, version, parts",
    [
        (["--method", "full"], "2.7.0", ["--fsdp", "--method full"]),
        (["--eval", "e"], "2.7.0", ["--fsdp", "--eval", "minibalora evaluate"]),
        (["--retain", "r"], "2.7.0", ["--fsdp", "--retain"]),
        (["--compile"], "2.7.0", ["--fsdp", "--compile"]),
        ([], "2.6.0", ["--fsdp", "torch 2.7", "2.6.0"]),
    ],
)
def test_unsupported_flags_are_refused_with_fsdp(more, version, parts, monkeypatch, refuses):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    refuses(lambda: flags.parse_nlg_flags([*FSDP, *more]), *parts)


def test_torchrun_is_refused_where_it_is_useless(monkeypatch, refuses):
    refuses(lambda: flags.parse_nlg_flags(FSDP), "--fsdp", "torchrun")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    refuses(lambda: flags.parse_nlg_flags(["--fsdp", "--device", "cpu"]), "--fsdp", "--model")
    refuses(lambda: flags.parse_nlu_flags(["--device", "cpu"]), "train_nlu.py", "torchrun")


def test_each_rank_has_its_own_gpu_or_none(monkeypatch, refuses):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    distributed.check_device(torch.device("cpu"))
    refuses(lambda: distributed.check_device(torch.device("cuda:1")), "--device cuda:1", "--device cuda")
    refuses(lambda: distributed.check_device(torch.device("cuda")), "--nproc-per-node 3", "2 GPUs")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    distributed.check_device(torch.device("cuda"))


if __name__ == "__main__":
    as_a_rank(Path(sys.argv[1]))
