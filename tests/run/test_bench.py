"""The benchmark as a user runs it, and that what it counts and times is a step of train_nlg.py."""

import json
import sys
from argparse import Namespace
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, addmm_flop

import train_nlg
from minibalora.base import cli
from minibalora.data import batches
from minibalora.fused import FrozenHead
from minibalora.lowrank import adapt
from minibalora.models.llama import llama
from minibalora.run import bench
from minibalora.run.bench import STEPS, Contender

TINY = replace(
    bench.SMALL, vocab_size=1000, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=20,
)  # fmt: skip
EVERY = bench.contenders_of(bench.METHODS, bench.FORMS)


def settings(**changes) -> Namespace:
    common = {"rank": 4, "micro_batch_size": 3, "rounds": 2, "warmup": 1, "device": torch.device("cpu")}
    return Namespace(**common | {"dtype": torch.float32, "grad_checkpoint": False, "compile": False} | changes)


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """run(*flags) -> status, standard output, standard error, of python -m minibalora bench on a tiny shape."""
    monkeypatch.setitem(bench.SHAPES, "small", TINY)
    monkeypatch.chdir(tmp_path)

    def call(*flags) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["bench", *map(str, flags)])
        with pytest.raises(SystemExit) as stopped:
            cli.run_script(bench.main)
        return stopped.value.code, *capsys.readouterr()

    return call


# The shapes and the rows.


@pytest.mark.parametrize(
    "shape, parameters",  # as published
    [("llama-2-7b", 6_738_415_616), ("mistral-7b", 7_241_732_096), ("gemma-7b", 8_537_680_896), ("small", 58_466_816)],
)
def test_a_shape_has_the_parameters_of_its_checkpoint(shape, parameters):
    with torch.device("meta"):
        model = llama(bench.SHAPES[shape])
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    block = dict(model.model.layers[0].named_modules())
    for name, (m, n) in bench.linears(bench.SHAPES[shape]).items():
        (linear,) = (module for key, module in block.items() if key.endswith(name))
        assert (linear.in_features, linear.out_features) == (m, n)


def test_rows_share_the_preamble_and_come_again_an_epoch_later():
    rows = bench.rows_of_step(1000, 1, 4)
    assert [(row.prompt_length, len(row.ids) - row.prompt_length) for row in rows] == bench.ROW_LENGTHS[4:8]
    assert batches.pack(rows, "cpu").shared == bench.SHARED
    assert all((a.ids == b.ids).all() for a, b in zip(rows, bench.rows_of_step(1000, 9, 4), strict=True))


def test_random_weights_depend_on_the_name_alone_and_are_made_in_their_dtype():
    first, second = (bench.random_model(TINY, torch.device("cpu"), torch.bfloat16).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {value.dtype for value in first.values()} == {torch.bfloat16}
    up = [value for name, value in first.items() if name.endswith("up_proj.weight")]
    assert not torch.equal(*up[:2]) and abs(up[0].float().std() - 0.02) < 1e-3


# The step.


@pytest.mark.parametrize("contender", EVERY, ids=lambda contender: f"{contender} {contender.form}")
def test_a_step_is_that_of_train_nlg(contender, tmp_path):
    args = settings(teacher_cache=tmp_path)
    base = bench.random_model(TINY, args.device, args.dtype)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    step = bench.step_of(base, contender, args)
    losses = [step(index) for index in range(3)]

    torch.manual_seed(0)
    model = adapt(deepcopy(base), args.rank, init="lora" if contender.method == "lora" else "pissa")
    rows, head = bench.rows_of_step(1000, 0, 3), FrozenHead(model.head_weight)
    expected, _ = train_nlg.backward(model, head, [rows], contender.objective, STEPS // 2, STEPS, [])
    # Fused and plain share the numbers to float32's rounding; whatever PiSSA starts from, step 0 has W's loss.
    assert losses[0] == pytest.approx(sum(expected), rel=1e-5)
    assert len(set(losses)) == 3
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


def test_checkpointed_blocks_take_the_same_step():
    base = bench.random_model(TINY, torch.device("cpu"), torch.float32)
    plain, checkpointed = (
        bench.step_of(base, Contender("ba-lora", "iclr2026"), settings(grad_checkpoint=value))
        for value in (False, True)
    )
    assert [checkpointed(index) for index in range(2)] == pytest.approx([plain(index) for index in range(2)], rel=1e-6)


@pytest.mark.parametrize("rows", [1, 8])  # few tokens: the change stays beside W; many: it is folded in
@pytest.mark.parametrize("contender", [each for each in EVERY if each.form == "fused"], ids=str)
def test_flops_are_those_of_the_profiler(contender, rows, tmp_path):
    args = settings(micro_batch_size=rows, rank=8, teacher_cache=tmp_path)
    config = replace(TINY, hidden_size=512) if rows == 1 else TINY
    step = bench.step_of(bench.random_model(config, args.device, args.dtype), contender, args)
    step(0)  # the head's root is made once
    in_place = {torch.ops.aten.addmm_: addmm_flop}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=in_place) as profiler:
        step(0)
    batch = batches.pack(bench.rows_of_step(1000, 0, rows), "cpu")
    counted = bench.flops(config, batch, args.rank, contender, args.dtype)
    # The profiler sees the sums over a row's vocabulary, too, which fused.py takes as products.
    assert counted == pytest.approx(profiler.get_total_flops(), rel=0.01)


# The command.


def test_the_table_and_the_file_have_every_contender(run, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "in_own_process", lambda function, *arguments: function(*arguments))  # 9 times torch
    monkeypatch.setattr(bench, "matmul_rate", lambda *_: 1e12)
    status, out, error = run("--device", "cpu", "--rounds", 2, "--warmup", 1, "--rank", 4)
    assert status == 0, error
    headline, where, columns, *lines, peak, init, saved = out.splitlines()
    assert headline == "small, rank 4, 4 rows a step, float32" and f"torch {torch.__version__}" in where
    assert peak == "peak: 1,000 GFLOP/s in matrix products alone"
    assert columns.split() == "form ms a step fastest tokens/s of peak peak MB x lora".split()
    assert [line[:40].split() for line in lines] == [[*str(each).split(), each.form] for each in EVERY]
    assert init.startswith("init pissa_krylov_8: ") and saved == "saved to bench-small-cpu.json"

    written = json.loads((tmp_path / "bench-small-cpu.json").read_text())
    assert written["settings"]["config"]["vocab_size"] == 1000 and written["settings"]["rounds"] == 2
    assert written["machine"]["threads"] == torch.get_num_threads() and written["machine"]["gpu"] is None
    assert written["init_seconds"] > 0
    for found, contender in zip(written["results"], EVERY, strict=True):
        assert {name: found[name] for name in vars(contender)} == vars(contender)
        assert len(found["seconds"]) == len(found["tokens"]) == len(found["flops"]) == 2
        assert found["fastest_ms"] <= found["median_ms"] and 0 < found["share_of_peak"] < 1
        assert (found["peak_bytes"] is not None) == sys.platform.startswith("linux")
    assert written["results"][0]["times_lora"] == 1


def test_memory_is_taken_in_another_process_and_without_lora_there_is_no_ratio(run, tmp_path):
    status, out, error = run(
        *("--device", "cpu", "--rounds", 1, "--warmup", 1, "--methods", "pissa", "--forms", "plain", "--json", "a.json")
    )
    assert status == 0, error
    assert [line.split()[:2] for line in out.splitlines()[3:-3]] == [["pissa", "plain"]]
    assert out.splitlines()[3].split()[-1] == "-"
    (found,) = json.loads((tmp_path / "a.json").read_text())["results"]
    assert found["times_lora"] is None
    if sys.platform.startswith("linux"):
        assert found["peak_bytes"] > 4 * 1000 * 64  # the embedding alone


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--shape", "tiny"), ["--shape", "'tiny'"]),
        (("--rank", 41), ["--rank 41", "1 to 40"]),
        (("--rounds", 0), ["--rounds", "positive"]),
        (("--forms", "dense"), ["--forms", "'dense'"]),
        (("--device", "tpu"), ["--device tpu"]),
        (("--json", "no/such/folder.json"), ["--json no/such/folder.json", "can't write"]),
        (("--json", "."), ["--json .", "is a folder"]),
    ],
)
def test_what_can_not_be_meant_is_refused_in_a_line(run, flags, words):
    status, out, error = run(*flags)
    assert status == 2 and out == "" and len(error.splitlines()) == 1
    assert all(word in error for word in words), error


def test_what_does_not_fit_memory_is_said_in_a_line(run, monkeypatch):
    monkeypatch.setattr(bench, "matmul_rate", lambda *_: 1e12)
    monkeypatch.setattr(bench, "in_own_process", lambda *_: (_ for _ in ()).throw(bench.BrokenProcessPool("killed")))
    status, _, error = run("--device", "cpu")
    assert status == 2 and "--shape small does not fit" in error and len(error.splitlines()) <= 2
