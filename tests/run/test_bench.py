"""The benchmark as a user runs it; it counts and times a step of train_nlg.py."""

import json
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from minibalora import variants
from minibalora.data.batches import Packed, pack
from minibalora.fused import WHOLE
from minibalora.lowrank import adapt, pretrained
from minibalora.models.llama import llama
from minibalora.objective import lambdas, nlg_loss
from minibalora.run import bench, memory, roofline, workload
from minibalora.run.memory import LiveBytes
from minibalora.run.methods import METHODS, STARTS
from minibalora.run.settings import Hardware
from minibalora.run.workload import STEPS, Contender, Load

TINY = replace(
    workload.SMALL, vocab_size=1000, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=20,
)  # fmt: skip
DEFAULT = bench.contenders_of(bench.PAPER, bench.FORMS)
EVERY = bench.contenders_of(METHODS, bench.FORMS)

CPU = Hardware(torch.device("cpu"), torch.float32)
LOAD = Load(TINY, CPU, rank=4, rows=3, warmup=1, rounds=2)


@pytest.fixture
def run(in_command, monkeypatch, tmp_path):
    """run(*flags) -> status, standard output, standard error, of python -m minibalora bench on a tiny shape."""
    monkeypatch.setitem(bench.SHAPES, "small", TINY)
    monkeypatch.chdir(tmp_path)
    return partial(in_command, bench.main)


# The shapes and the rows.


@pytest.mark.parametrize(
    "shape, parameters",  # as published
    [("llama-2-7b", 6_738_415_616), ("mistral-7b", 7_241_732_096), ("gemma-7b", 8_537_680_896), ("small", 58_466_816)],
)
def test_a_shape_has_the_parameters_of_its_checkpoint(shape, parameters):
    with torch.device("meta"):
        model = llama(workload.SHAPES[shape])
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_rows_share_the_preamble_and_repeat_an_epoch_later():
    rows = workload.rows_of_step(1000, 1, 4)
    lengths = [(row.prompt_length, len(row.ids) - row.prompt_length) for row in rows]
    assert lengths == list(zip(workload.PROMPTS, workload.RESPONSES, strict=True))[4:8]
    assert pack(rows, "cpu").shared == workload.SHARED
    assert all((a.ids == b.ids).all() for a, b in zip(rows, workload.rows_of_step(1000, 9, 4), strict=True))


def test_random_weights_depend_on_the_name_alone_and_are_made_in_their_dtype():
    first, second = (workload.random_model(TINY, replace(CPU, dtype=torch.bfloat16)).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {value.dtype for value in first.values()} == {torch.bfloat16}
    up = [value for name, value in first.items() if name.endswith("up_proj.weight")]
    assert not torch.equal(*up[:2]) and abs(up[0].float().std() - 0.02) < 1e-3


# The step.


@pytest.mark.parametrize("contender", EVERY, ids=lambda contender: f"{contender} {contender.form}")
def test_a_step_equals_that_of_train_nlg(contender, tmp_path):
    step = workload.steps_of(LOAD, [contender], tmp_path)[contender]
    losses = [step(index) for index in range(3)]

    torch.manual_seed(0)
    model = adapt(workload.random_model(TINY, CPU), LOAD.rank)
    batch = pack(workload.rows_of_step(1000, 0, 3), "cpu")
    inputs = batch.input_ids, batch.lengths, batch.wanted, batch.shared
    with pretrained(model):
        teacher = model.head(model.packed(*inputs))
    weights = lambdas(contender.objective, STEPS // 2, STEPS)
    expected, _ = nlg_loss(model.head(model.packed(*inputs)), teacher, batch.targets, contender.objective, weights)
    # Fused and plain share the numbers to float32's rounding; whatever PiSSA starts from, step 0 has W's loss.
    assert losses[0] == pytest.approx(expected.item(), rel=1e-5)
    assert len(set(losses)) == 3


def test_contenders_share_frozen_weights_and_are_timed_in_turn():
    contenders, order = DEFAULT[:2], []
    with LiveBytes() as live:
        steps = workload.steps_of(LOAD, contenders)
    weights = sum(parameter.nbytes for parameter in workload.random_model(TINY, CPU).parameters())
    assert weights < live.now < 2 * weights
    steps = {name: lambda index, name=name: order.append((index, name)) for name in steps}
    seconds = bench.in_turn(steps, LOAD)
    lora, pissa = contenders
    assert order == [(0, lora), (0, pissa), (1, pissa), (1, lora), (2, lora), (2, pissa)]
    assert [len(times) for times in seconds.values()] == [LOAD.rounds] * 2


def test_full_trains_weights_of_its_own():
    full, lora = Contender("full", form="plain"), Contender("lora")
    steps, alone = workload.steps_of(LOAD, [full, lora]), workload.steps_of(LOAD, [lora])[lora]
    losses = [(steps[full](0), steps[lora](0)) for _ in range(3)]
    assert [loss for _, loss in losses] == [alone(0) for _ in range(3)]
    assert losses[2][0] < losses[0][0]


def test_a_step_includes_what_the_loop_does_around_it(monkeypatch):
    calls = []

    def noted(work, model, *args, **kwargs):
        calls.append((work.__name__, *args))
        return work(model, *args, **kwargs)

    for work in (variants.before_step, variants.add_penalty, variants.after_step):
        monkeypatch.setattr(variants, work.__name__, partial(noted, work))
    for method in ("adalora", "dylora", "deltalora"):
        contender = Contender(method, form="mixed")
        step = workload.steps_of(LOAD, [contender])[contender]
        del calls[:]
        step(1)
        assert calls == [("before_step", 1), ("add_penalty",), ("after_step", 2, 3)]


def test_loras_mixed_form_stands_before_the_methods_without_a_lean_product():
    contenders = bench.contenders_of(["full", "lora", "dora", "loha", "olora"], ["fused"])
    forms = ["plain", "fused", "mixed", "mixed", "mixed", "fused"]
    assert [each.method for each in contenders] == ["full", "lora", "lora", "dora", "loha", "olora"]
    assert [each.form for each in contenders] == forms
    rows = [dict.fromkeys(("median_ms", "fastest_ms", "tokens_per_s", "share_of_peak", "peak_bytes", "times_lora"), 1)]
    assert bench.timing_table(contenders[2:3], rows).endswith(bench.MIXED)
    assert bench.MIXED not in bench.timing_table(contenders[1:2], rows)


def test_checkpointed_blocks_take_the_same_step():
    loads = [replace(LOAD, hardware=replace(CPU, grad_checkpoint=value)) for value in (False, True)]
    contender = Contender("ba-lora", "iclr2026")
    plain, checkpointed = (workload.steps_of(load, [contender])[contender] for load in loads)
    assert [checkpointed(index) for index in range(2)] == pytest.approx([plain(index) for index in range(2)], rel=1e-6)


def expected_flops(load: Load, batch: Packed, contender: Contender) -> int:
    """Operations of the matrix products of a fused step on a CPU in float32, 2 m n a row of an (m, n) matrix.

    A frozen W takes part in the student's pass, in the gradient of its input (not where that is an embedding, which is
    frozen) and in the teacher's pass; never in a gradient of its own. A and B: 4 r (m + n) a row for their gradients,
    and twice the change, of rank R = r from `lora` and 2r from others: 2 R (m + n) a row, or 2 R m n at once where the
    change is folded into W. Attention: 4 · width · pairs of tokens a pass, the backward pass two, pairs beyond the
    diagonal included. In the last block only response tokens are queries and go through the MLP; only they reach the
    head, whose (V, d) takes part in their logits, the teacher's and the gradient. The spectral term: as fused.py takes
    it from (M, d) states, except for the eigenvectors and the QR.
    """
    config, rank, objective = load.config, load.rank, contender.objective
    tokens, predicted = len(batch.input_ids), sum(batch.wanted)
    rows_seen = [batch.shared + length for length in batch.lengths]
    d, f, width = config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    linears = {"q": (d, width), "k": (d, kv), "v": (d, kv), "o": (width, d)}
    linears |= {"gate": (d, f), "up": (d, f), "down": (f, d)}
    has_teacher_pass = objective.needs_teacher and not contender.knows_teacher
    R = rank if STARTS[contender.method][0] == "lora" else 2 * rank
    total = 0
    for layer in range(config.num_hidden_layers):
        is_last = layer == config.num_hidden_layers - 1
        for name, (m, n) in linears.items():
            rows = predicted if is_last and name not in ("k", "v") else tokens
            needs_slope = layer > 0 or name not in ("q", "k", "v")
            change = 2 * R * (m * n if rows * (m + n) > m * n else rows * (m + n))
            total += 2 * rows * m * n * (1 + needs_slope + has_teacher_pass)
            total += change * (1 + needs_slope) + 4 * rank * rows * (m + n)
        queries = batch.wanted if is_last else rows_seen
        pairs = sum(count * length for count, length in zip(queries, rows_seen, strict=True))
        total += 4 * width * pairs * (3 + has_teacher_pass)
    total += 2 * predicted * config.vocab_size * d * (2 + objective.needs_teacher)
    if objective.lambda3 > 0:
        assert predicted <= WHOLE or predicted > 1.5 * d
        smaller = predicted if predicted <= WHOLE else d
        total += 2 * smaller * d * d + 4 * smaller * smaller * d + 2 * smaller**3  # H G, S, its core
        total += 2 * predicted * d * d * (predicted > 1.5 * d)  # Q
    return total


@pytest.mark.parametrize("rows", [1, 8])  # few tokens: the change stays beside W; many: it is folded in
@pytest.mark.parametrize("contender", [each for each in EVERY if each.form == "fused"], ids=str)
def test_flops_equal_those_counted_in_a_step(contender, rows, tmp_path):
    wide = replace(workload.SMALL, vocab_size=1000, num_hidden_layers=3)
    load = replace(LOAD, rows=rows, rank=8, config=wide if rows == 1 else TINY)
    step = workload.steps_of(load, [contender], tmp_path)[contender]
    step(0)  # the head's root is made once
    with sdpa_kernel(SDPBackend.MATH):  # whose products are counted on a CPU, too
        counted = bench.flops(step)
    # Counted are the sums over a row's vocabulary, too, which fused.py takes as products.
    expected = expected_flops(load, pack(workload.rows_of_step(1000, 0, rows), "cpu"), contender)
    assert expected == pytest.approx(counted, rel=0.01)


# The command.


def test_the_table_and_the_file_have_every_contender(run, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "in_own_process", lambda function, *arguments: function(*arguments))  # 9 times torch
    monkeypatch.setattr(bench, "matmul_rate", lambda *_: 1e12)
    status, out, error = run("--device", "cpu", "--rounds", 2, "--warmup", 1, "--rank", 4, "--micro-batch-size", 2)
    assert status == 0, error
    headline, where, columns, *lines, peak, init, saved = out.splitlines()
    assert headline == "small, rank 4, 2 rows a step, float32" and f"torch {torch.__version__}" in where
    assert peak == "peak: 1,000 GFLOP/s in matrix products alone"
    assert columns.split() == "form ms a step fastest tokens/s of peak peak MB x lora".split()
    assert [line[:40].split() for line in lines] == [[*str(each).split(), each.form] for each in DEFAULT]
    assert init.startswith("init pissa_krylov_8: ") and saved == "saved to bench-small-cpu.json"

    written = json.loads((tmp_path / "bench-small-cpu.json").read_text())
    assert written["settings"]["config"]["vocab_size"] == 1000 and written["settings"]["rounds"] == 2
    assert written["machine"]["threads"] == torch.get_num_threads() and written["machine"]["gpu"] is None
    assert written["init_seconds"] > 0
    for result, contender in zip(written["results"], DEFAULT, strict=True):
        assert {name: result[name] for name in vars(contender)} == vars(contender)
        assert len(result["seconds"]) == len(result["tokens"]) == 2 and result["flops_per_token"] > 4 * 100_000
        assert result["fastest_ms"] <= result["median_ms"] and 0 < result["share_of_peak"] < 1
        assert (result["peak_bytes"] is not None) == sys.platform.startswith("linux")
    assert written["results"][0]["times_lora"] == 1


def test_memory_is_measured_in_another_process_and_without_lora_there_is_no_ratio(run, tmp_path):
    status, out, error = run(
        *("--device", "cpu", "--rounds", 1, "--warmup", 1, "--methods", "pissa", "--forms", "plain", "--json", "a.json")
    )
    assert status == 0, error
    assert [line.split()[:2] for line in out.splitlines()[3:-3]] == [["pissa", "plain"]]
    assert out.splitlines()[3].split()[-1] == "-"
    (result,) = json.loads((tmp_path / "a.json").read_text())["results"]
    assert result["times_lora"] is None
    if sys.platform.startswith("linux"):
        assert result["peak_bytes"] > 4 * 1000 * 64  # the embedding alone


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--shape", "tiny"), ["--shape", "'tiny'"]),
        (("--rank", 41), ["--rank 41", "1 to 40"]),
        (("--rounds", 0), ["--rounds", "positive"]),
        (("--forms", "dense"), ["--forms", "'dense'"]),
        (("--methods", "moe"), ["--methods", "'moe'"]),
        (("--methods", "adalora", "--rank", 1), ["--rank 1", "adalora"]),
        (("--methods", "dylora", "--compile"), ["--compile", "dylora", "every rank"]),
        (("--methods", "dora", "--dry"), ["--dry", "dora"]),
        (("--device", "tpu"), ["--device tpu"]),
        (("--json", "no/such/folder.json"), ["--json no/such/folder.json", "can't write"]),
        (("--json", "."), ["--json .", "is a folder"]),
    ],
)
def test_contradictory_flags_are_refused_in_a_line(run, flags, words):
    status, out, error = run(*flags)
    assert status == 2 and out == "" and len(error.splitlines()) == 1
    assert all(word in error for word in words), error


def test_exhausted_memory_is_reported_in_a_line(run, monkeypatch):
    monkeypatch.setattr(bench, "matmul_rate", lambda *_: 1e12)
    monkeypatch.setattr(bench, "in_own_process", lambda *_: (_ for _ in ()).throw(bench.BrokenProcessPool("killed")))
    status, _, error = run("--device", "cpu")
    assert status == 2 and "--shape small does not fit" in error and len(error.splitlines()) <= 2


# Counting.


def test_the_count_is_that_of_a_step_written_out():
    """Forward, and backward for the states alone: 4 numbers a weight and token, without the first layer's 3 inputs.

    The head is multiplied by for the wanted tokens only, forward and for the states' gradient.
    """
    config = replace(TINY, num_hidden_layers=12, windows=(None,) * 12)  # more than by_straight_line computes
    gpu, rows, rank, peaks = Hardware(torch.device("cuda"), torch.bfloat16), 2, 4, (1e12, 1e9)
    kernels, moved, flops, seconds = roofline.work_of(config, gpu, rank, rows, Contender("lora"), peaks)
    length, wanted, d, f = workload.FULL - 1, workload.FULL // 2, 64, 160
    T, M = rows * length, rows * wanted
    qkv, o, mlp = d * (80 + 40 + 40), 80 * d, 3 * d * f  # of the last layer, only keys and values see every token
    whole, last = (qkv + o + mlp) * T, 2 * d * 40 * T + (80 * d + o + mlp) * M
    products = 2 * (2 * (11 * whole + last) - qkv * T) + 2 * 2 * M * d * config.vocab_size
    attention = 3.5 * 2 * 2 * rows * 80 * length * (11 * length + wanted)  # 2 products forward, 5 backward
    assert products + attention < flops < 1.1 * (products + attention)  # the adapter comes on top
    assert seconds > 0.999 * moved / peaks[1] and 1000 < kernels < 4000

    more = roofline.work_of(config, gpu, rank, rows, Contender("ba-lora", "iclr2026"), peaks)
    assert (more > [kernels, moved, flops, seconds]).all()


def test_deep_models_are_counted_exactly(monkeypatch):
    config = replace(TINY, num_hidden_layers=12, windows=(None,) * 12)
    gpu, peaks = Hardware(torch.device("cuda"), torch.bfloat16), (1e12, 1e9)
    arguments = config, gpu, 4, 2, Contender("ba-lora", "2024"), peaks
    by_line = roofline.work_of(*arguments)
    monkeypatch.setattr(memory, "FEW", 12)
    assert roofline.work_of(*arguments) == pytest.approx(by_line, rel=1e-9)


def test_dry_prints_a_line_for_each_contender_and_writes_nothing(run, tmp_path):
    status, out, error = run("--dry", "--methods", "lora", "ba-lora", "--rank", 4)
    assert status == 0, error
    assert [line.split()[:2] for line in out.splitlines()[2:]] == [
        ["lora", "fused"], ["ba-lora", "2024"], ["ba-lora", "iclr2026"],
        ["lora", "plain"], ["ba-lora", "2024"], ["ba-lora", "iclr2026"],
    ]  # fmt: skip
    assert "4 rows of 512 tokens" in out and not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [["--dry", "--device", "cpu"], ["--dry", "--rounds", 3], ["--peak-tbps", 2]])
def test_a_flag_without_effect_is_refused(run, flags):
    status, _, error = run(*flags)
    assert status == 2 and "has no effect" in error and len(error.splitlines()) == 1
