"""The prediction of memory against the tensors that steps hold, and the command that prints it from config.json."""

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from bench_memory import SHAPES, compare, random_model
from torch import nn

from minibalora.base.errors import InputError
from minibalora.checkpoints.families import read_family
from minibalora.data.batches import Packed
from minibalora.lowrank import LowRankLinear, adapt, adapted_layers
from minibalora.nf4 import quantize
from minibalora.objective import Objective
from minibalora.run import plan
from minibalora.run.memory import LiveBytes, expected_memory, generation_loss, held
from minibalora.run.settings import Adaptation, Hardware

CONFIGS = Path(__file__).with_name("configs")
# Published numbers of parameters. Encoders are counted without a head: BertModel, and the others without a pooler.
PUBLISHED = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "mistral-7b": 7_241_732_096,
    "gemma-7b": 8_537_680_896,
    "qwen1.5-7b": 7_721_324_544,
    "yi-1.5-34b": 34_388_917_248,
    "mixtral-8x7b": 46_702_792_704,
    "deepseek-moe-16b": 16_375_728_128,
    "gpt2-xl": 1_557_611_200,
    "t5-base": 222_903_552,
    "bert-large": 335_141_888,
    "roberta-large": 354_310_144,
    "deberta-v3-base": 183_831_552,
}


@pytest.fixture
def folder(tmp_path):
    """folder(name, **changes) -> a folder that has only the config.json of that model, with changes."""

    def make(name: str, **changes: int) -> Path:
        (tmp_path / name).mkdir()
        config = json.loads((CONFIGS / f"{name}.json").read_text()) | changes
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        return tmp_path / name

    return make


@pytest.fixture
def run(in_command):
    """run(*flags) -> status, standard output, standard error, of python -m minibalora plan."""
    return partial(in_command, plan.main)


# Predicted and measured.


@pytest.mark.parametrize(
    "case",
    [
        "toy lora bfloat16 plain",
        "toy ba-lora float32 grad-checkpoint",
        "toy pissa bfloat16 nf4",
        "toy full bfloat16 one",
        "llama-3 ba-lora float32 plain",
        "gpt2 pissa float32 grad-checkpoint",
        "gemma2 ba-lora float32 plain",
        "qwen3 lora bfloat16 plain",
        "mixtral ba-lora float32 plain",
        "deepseek lora float32 grad-checkpoint",
        "t5 ba-lora float32 plain",
        "flan-t5 full float32 plain",
        "bert ba-lora float32 plain",
        "deberta lora float32 grad-checkpoint",
        "llama-3 ba-lora float32 formulas",
        "toy dora float32 plain",
        "toy dora bfloat16 grad-checkpoint",
        "toy adalora bfloat16 plain",
        "toy loha float32 plain",
        "toy dylora float32 one",
        "toy deltalora bfloat16 plain",
        "toy olora float32 plain",
        "toy rslora bfloat16 plain",
        "toy lora+ float32 plain",
    ],
)
def test_the_prediction_is_within_three_percent_of_the_tensors_that_a_step_holds(case):
    shape, method, dtype, kind = case.split()
    predicted, measured = compare(
        shape, method, dtype, {"plain": "", "one": "one micro-batch", "formulas": "plain form"}.get(kind, kind), 96
    )
    assert predicted == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize("method, kind", [("ba-lora", "grad-checkpoint"), ("full", "")])
def test_a_deep_model_is_predicted_along_a_straight_line(method, kind, monkeypatch):
    monkeypatch.setitem(SHAPES, "deep", SHAPES["toy"] | {"num_hidden_layers": 12})
    predicted, measured = compare("deep", method, "float32", kind, 64)
    assert predicted == pytest.approx(measured, rel=0.03)


def test_a_prediction_changes_neither_model_nor_random_numbers():
    model = adapt(random_model("toy", torch.float32), rank=2, init="lora")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = torch.get_rng_state()
    ids = torch.arange(40)
    batch = Packed(ids, [20, 20], [5, 5], 0, ids[:10])
    loss_of = partial(generation_loss, batch, Objective(), 1, False)
    expected_memory(model, Hardware(torch.device("cuda"), torch.float32, grad_checkpoint=True), loss_of, True)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_live_bytes_counts_tensors_alive_at_once_without_views():
    kept = torch.zeros(10)
    with LiveBytes(kept) as live:
        view = kept[2:]
        for _ in range(3):
            passing = view.repeat(5)  # 160 bytes; the next one is made while the last one is alive
        del passing
    assert (live.peak, live.now) == (40 + 2 * 160, 40)


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 100_000}, {"num_local_experts": 100_000}])
def test_too_many_layers_or_experts_are_refused_before_they_are_built(changes, tmp_path, monkeypatch, refuses):
    config = json.loads((CONFIGS / "mixtral-8x7b.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(sys, "argv", ["plan", "--model", str(tmp_path)])
    refuses(plan.main, tmp_path, "layers", "experts")


def test_an_empty_nf4_weight_has_the_shapes_of_a_real_one():
    layer = LowRankLinear.from_linear(nn.Linear(61, 37), rank=3)
    room = plan.room_in_four_bits(layer)
    quantize(layer)
    shapes = [[(tensor.shape, tensor.dtype) for tensor in form.buffers()] for form in (layer.W, room)]
    assert shapes[0] == shapes[1] and layer.W.shape == room.shape


def test_ranks_share_only_the_frozen_weights_of_blocks():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(10, 16)
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 16, bias=False)) for _ in range(12))
            self.stacks = [self.layers]

    model = adapt(Model(), rank=2, init="lora")
    factors = sum(layer.A.nbytes + layer.B.nbytes for _, layer in adapted_layers(model))
    assert held(model) == 10 * 16 * 4 + 12 * 16 * 16 * 4 + factors
    assert held(model, ranks=4) == 10 * 16 * 4 + (12 // 4 + 3) * 16 * 16 * 4 + factors  # 3: gathered blocks


# Published models.


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_model_has_the_published_number_of_parameters(name, folder):
    family, config = read_family(folder(name))
    with torch.device("meta"):
        model = family.build(config, None if family.has_language_model else 2)
    part = model if family.has_language_model else model.get_submodule(family.names.backbone)
    assert sum(parameter.numel() for parameter in part.parameters()) == PUBLISHED[name]


def test_every_config_is_in_the_table():
    assert {path.stem for path in CONFIGS.glob("*.json")} == PUBLISHED.keys()


# The command.


def test_the_facts_of_llama_2_7b(folder):
    path = folder("llama-2-7b")
    model, load, trained = plan.facts(path, *read_family(path), Adaptation("lora", 128, 128, "lora"))
    assert model == f"model    {path}, 6,738,415,616 parameters"
    assert load.startswith("load     13.5 GB in bfloat16, 27.0 GB in float32") and "13 and 27 s" in load
    assert trained.split()[1:3] == ["319,815,680", "(4.75%)"] and "rank 128, in 224 layers" in trained


def test_the_plan_has_a_line_for_each_method(run, folder):
    path = folder("llama-2-7b", num_hidden_layers=1)
    status, out, error = run("--model", path, "--micro-batch-size", 1)
    assert status == 0 and "plan: 10 of 10" in error
    _, _, _, rows, _, dtypes, titles, *lines, _, marks = out.splitlines()
    assert rows == "rows     1 of 512 tokens at a time, 256 of them response; 32 a step"
    assert dtypes.split()[-2:] == ["bfloat16", "float32"] and titles.split()[:4] == ["1", "GPU", "fsdp", "2"]
    table = {line[:40].strip(): [line[start : start + 10].strip() for start in range(40, 120, 10)] for line in lines}
    assert len(table) == 2 + 3 * 4 and max(map(len, out.splitlines())) <= 120
    assert table["full"][1:4] == table["ba-lora --quantize nf4"][1:4] == ["-"] * 3
    numbers = {name: [float(each.split()[0]) for each in cells if each != "-"] for name, cells in table.items()}
    assert numbers["full"][0] > 18 * 0.46  # bytes a parameter: float32, a copy in bfloat16, gradient, two moments
    for method in ("lora", "pissa", "ba-lora"):
        assert numbers[f"{method} --quantize nf4"][1] < numbers[method][4]  # float32
    assert table["ba-lora --quantize nf4 --grad-checkpoint"][0].endswith(" s")
    assert marks.startswith("fits a card of s: 24 GB, m: 40 GB, l: 80 GB")


def test_an_encoder_is_planned_as_train_nlu_trains_it(run, folder):
    status, out, _ = run("--model", folder("deberta-v3-base", num_hidden_layers=1), "--rank", 4)
    assert status == 0 and max(map(len, out.splitlines())) <= 120
    assert "rows     32 of 128 tokens at a time; 32 a step" in out and "rank 4, in 6 layers" in out
    assert "fsdp" not in out and "nf4" not in out


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--rank", 5000], ["--rank or --targets", "rank 5000"]),
        (["--targets", "query"], ["--rank or --targets", "query", "q_proj"]),
        (["--response-share", 1.5], ["--response-share", "share"]),
    ],
)
def test_flags_that_do_not_fit_the_model_are_refused_in_one_line(run, folder, flags, words):
    status, out, error = run("--model", folder("llama-2-7b"), *flags)
    assert status == 2 and len(error.splitlines()) == 1 and all(word in error for word in words), error


def test_rows_beyond_learned_positions_are_refused(run, folder):
    status, _, error = run("--model", folder("gpt2-xl"), "--max-length", 1025)
    assert status == 2 and "--max-length 1025: the model has 1024 positions" in error


@pytest.mark.parametrize("text", [None, "{", '{"model_type": "mamba"}', '{"model_type": "llama"}'])
def test_an_unreadable_config_is_refused_with_the_message_of_read_config(run, tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError) as caught:
        read_family(tmp_path)
    assert run("--model", tmp_path) == (2, "", f"error: {caught.value}\n")
