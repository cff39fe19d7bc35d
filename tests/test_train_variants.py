"""The training scripts with LoRA's variants: each is trained, stopped, resumed and saved, and no call is forgotten."""

import json
import signal
from pathlib import Path

import pytest
import test_train_nlg
import torch
from helpers import stop_within
from test_lowrank import net

import minibalora as mb
from minibalora.lowrank import adapt, adapted_layers
from minibalora.run import loop
from minibalora.run.checkpoint import changing_tensors, keep_best, load_best
from minibalora.run.methods import METHODS
from minibalora.variants import use

small_data, flags_of, train = test_train_nlg.small_data, test_train_nlg.flags_of, test_train_nlg.train
train_nlg = test_train_nlg.train_nlg
VARIANTS = METHODS[4:]
QUICK = ("--max-steps", 6, "--save-every", 2, "--lr", 1e-2)


@pytest.fixture
def trained(monkeypatch) -> list:
    """The models that runs have saved the adapter of."""
    models, save = [], mb.save_adapter
    monkeypatch.setattr(mb, "save_adapter", lambda model, out: (models.append(model), save(model, out)))
    return models


def entries(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key not in ("tokens_per_s", "memory_bytes")} for line in lines
    ]


@pytest.mark.parametrize("method", VARIANTS)
def test_a_variant_is_trained_with_any_recipe_resumed_byte_for_byte_and_saved(
    method, train, trained, tiny, tmp_path, monkeypatch
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = (*QUICK, "--method", method, "--recipe", "2024", "--adaptive-lambda1", "--non-target-kl", 0.1)
    assert train(whole, *flags)[0] == 0
    with monkeypatch.context() as patch:
        stop_within(patch, train_nlg, 3, signal.SIGTERM)
        assert train(parts, *flags)[0] == 128 + signal.SIGTERM
    assert train(parts, *flags, "--resume")[0] == 0
    adapter = "adapter_model.safetensors"
    assert (parts / adapter).read_bytes() == (whole / adapter).read_bytes() and entries(parts) == entries(whole)
    assert all(entries(whole)[-1][term] is not None for term in ("consistency", "diversity", "svd", "non_target_kl"))

    loaded, input_ids = mb.load_adapter(mb.load_model(tiny), whole), torch.arange(40).view(2, 20)
    with torch.no_grad():
        expected, base = trained[0].eval()(input_ids), mb.load_model(tiny)(input_ids)
        torch.testing.assert_close(loaded(input_ids), expected)
        assert not torch.allclose(expected, base, atol=1e-3)
        with mb.pretrained(trained[0]):
            assert torch.equal(trained[0](input_ids), base)


@pytest.mark.parametrize(
    "method, flags",
    [
        ("dora", ["--init", "pissa", "--grad-checkpoint"]),
        ("dora", ["--quantize", "nf4", "--dtype", "bfloat16"]),
        ("adalora", ["--adapter-rank", 2, "--plain"]),
        ("adalora", ["--quantize", "nf4"]),
        ("loha", ["--adapter-rank", 3, "--dtype", "bfloat16"]),
        ("dylora", ["--method-settings", "frozen=true", "--targets", "q_proj"]),
        ("deltalora", ["--method-settings", "ratio=0.5", "warm=0.5", "--adapter-rank", 4]),
        ("rslora", ["--init", "pissa", "--alpha", 2]),
        ("lora+", ["--method-settings", "ratio=4", "--init", "olora"]),
    ],
)
def test_variants_go_with_other_flags(method, flags, train, tiny, tmp_path):
    assert train(tmp_path / "out", *QUICK, "--method", method, *flags)[0] == 0
    mb.load_adapter(mb.load_model(tiny), tmp_path / "out")


def test_adalora_ends_within_its_budget_and_logs_its_penalty_once_a_step(train, trained, tmp_path):
    for size in ("2", "8"):
        flags = ("--method", "adalora", "--method-settings", "target=2", "every=1", "--micro-batch-size", size)
        assert train(tmp_path / size, *QUICK, *flags)[0] == 0
    for model in trained:
        kept = [(layer.Lambda != 0).sum().item() for _, layer in adapted_layers(model)]
        assert sum(kept) == 2 * len(kept) and max(kept) > 2  # 4 at the start, shared out among the layers
    penalties = [[entry["orthogonality"] for entry in entries(tmp_path / size)] for size in ("2", "8")]
    assert penalties[0] == pytest.approx(penalties[1], rel=1e-3) and penalties[0][-1] < penalties[0][0]


def test_dylora_draws_a_rank_in_each_step_and_the_same_one_after_a_resumption(train, tmp_path, monkeypatch):
    drawn, before_step = {}, loop.variants.before_step

    def noting(model, step, seed):
        before_step(model, step, seed)
        drawn.setdefault(step, set()).update(layer.b for _, layer in adapted_layers(model))

    monkeypatch.setattr(loop.variants, "before_step", noting)
    flags = ("--method", "dylora", "--max-steps", 6)
    with monkeypatch.context() as patch:
        stop_within(patch, train_nlg, 3, signal.SIGTERM)
        assert train(tmp_path / "out", *flags)[0] == 128 + signal.SIGTERM
    assert train(tmp_path / "out", *flags, "--resume")[0] == 0
    assert all(len(ranks) == 1 for ranks in drawn.values())  # the same in all layers; step 3 was drawn twice
    assert list(drawn) == list(range(6)) and len(set.union(*drawn.values())) > 1


def test_deltaloras_snapshot_is_that_of_the_end_of_its_warm_up(train, trained, tmp_path, monkeypatch):
    seen, after_step = {}, loop.variants.after_step

    def noting(model, step, steps):
        after_step(model, step, steps)
        seen[step, steps] = [layer.A.detach().clone() for _, layer in adapted_layers(model)]

    monkeypatch.setattr(loop.variants, "after_step", noting)
    flags = ("--method", "deltalora", "--method-settings", "warm=0.5")
    assert train(tmp_path / "out", *QUICK, *flags)[0] == 0
    for (_, layer), at_3 in zip(adapted_layers(trained[0]), seen[3, 6], strict=True):
        assert torch.equal(layer.A_K, at_3) and not torch.equal(layer.A, at_3)


def test_lora_plus_has_another_rate_for_b(train, tmp_path, monkeypatch):
    optimizers, optimizer_of = [], train_nlg.optimizer_of
    monkeypatch.setattr(
        train_nlg, "optimizer_of", lambda *args: optimizers.append(optimizer_of(*args)) or optimizers[0]
    )
    assert train(tmp_path / "out", *QUICK, "--method", "lora+", "--method-settings", "ratio=4")[0] == 0
    slow, fast = (group["lr"] for group in optimizers[0].param_groups)
    assert fast == 4 * slow == 4 * entries(tmp_path / "out")[-1]["lr"] > 0


def test_the_best_epoch_has_all_that_a_variant_changes(tmp_path):
    model = use(adapt(net(), 2, init="lora"), "deltalora")
    (tmp_path / "checkpoint").mkdir()
    expected = {name: tensor.detach().clone() for name, tensor in changing_tensors(model).items()}
    keep_best(tmp_path, model, step=1, score=0.5)
    with torch.no_grad():
        for tensor in changing_tensors(model).values():
            tensor += 1
    load_best(tmp_path, model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in changing_tensors(model).items())
    assert any(name.endswith("A_K") for name in expected)
