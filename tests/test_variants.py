"""Tests of the variants of LoRA: PEFT's numbers, each variant's own property, the teacher, saving, and what is refused.

`golden/variants.safetensors` holds PEFT 0.21's values and gradients of single layers (make_peft_adapters.py).
"""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from helpers import GOLDEN, distance, golden_example
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_lowrank import net
from torch import nn
from torch.utils.checkpoint import checkpoint

import minibalora as mb
from minibalora import nf4
from minibalora.checkpoints.export import main as export
from minibalora.lean_product import use_lean_product
from minibalora.lowrank import LowRankLinear, adapt, adapted_layers, initial_values, merge, pretrained
from minibalora.truncate import truncate
from minibalora.variants import (
    VARIANTS,
    add_penalty,
    after_step,
    before_step,
    budget,
    cut,
    fold,
    lora_plus,
    rslora_alpha,
    untrained_state,
    use,
)

PEFTS = load_file(GOLDEN / "variants.safetensors")
CASES = [(variant, "lora") for variant in VARIANTS] + [("dora", "pissa"), ("dora", "olora")]
sizes = st.integers(2, 20)


def varied(variant: str, init: str = "lora", rank: int = 4, **chosen) -> nn.Module:
    return use(adapt(net(), rank, alpha=6, init=init), variant, **chosen)


def changed(model: nn.Module, by: float = 0.1) -> nn.Module:
    """Change what is trained, as training might, in place."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += by * torch.randn_like(parameter)
    return model


def train(model: nn.Module, first: int = 0, last: int = 8, steps: int = 8, optimizer=None) -> torch.optim.Optimizer:
    """The loop of variants.py's docstring, from step `first` to step `last`."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(parameters, lr=0.02, weight_decay=0)
    x = torch.linspace(-2, 2, 60).view(5, 12)
    model.train()
    for step in range(first, last):
        torch.manual_seed(step)  # dropout
        before_step(model, step, seed=7)
        (model(x) - 1).square().mean().backward()
        add_penalty(model)
        optimizer.step()
        after_step(model, step + 1, steps)
        optimizer.zero_grad()
    model.eval()
    return optimizer


def layer_of(variant: str, m: int = 9, n: int = 7, rank: int = 3, init: str = "lora", bias=True, **chosen):
    """Return a layer in float64."""
    layers = nn.Sequential(nn.Linear(m, n, bias=bias))
    return use(adapt(layers, rank, alpha=5, init=init, targets="0"), variant, **chosen).double()[0]


# What all variants have in common.


@pytest.mark.parametrize(("variant", "init"), CASES)
def test_a_variant_starts_as_the_pretrained_model_which_stays_its_teacher(variant, init):
    base, model, x = net(), varied(variant, init), torch.randn(5, 12)
    assert torch.equal(model(x), base(x))
    assert all(torch.equal(layer.weight, layer.W) for _, layer in adapted_layers(model))
    train(model)
    assert distance(model(x), base(x)) > 1e-3
    with pretrained(model):
        assert torch.equal(model(x), base(x))
        assert all(torch.equal(layer.weight, layer.W) for _, layer in adapted_layers(model))


@pytest.mark.parametrize(("variant", "init"), CASES)
def test_weight_delta_and_merge_agree_with_the_forward_pass(variant, init):
    model, x = varied(variant, init), torch.randn(5, 12)
    train(model)
    expected = model(x)
    for _, layer in adapted_layers(model):
        rows = torch.eye(layer.in_features)
        weight = (layer(rows) - (0 if layer.bias is None else layer.bias)).T
        # a sum of a few float32 numbers of W's size
        assert distance(layer.weight, weight) < 2e-6 and distance(layer.W + layer.delta, weight) < 2e-6
        assert (
            distance(layer.residual + (0 if init == "lora" else layer.scaling * layer.A0 @ layer.B0), layer.W.T) < 1e-6
        )
    plain = {name for name, _ in net().named_parameters()}
    merge(model)
    assert distance(model(x), expected) < 1e-5
    assert {name for name, _ in model.named_parameters()} == plain
    assert not vars(model.up_proj).keys() - vars(nn.Linear(1, 1)).keys()  # nothing of the variant is left


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_input_may_have_another_dtype_than_the_base_with_its_bias(variant):
    base = nn.Sequential(nn.Linear(9, 7)).bfloat16()
    layer, x = use(adapt(copy.deepcopy(base), 3, init="lora", targets="0"), variant), torch.randn(5, 9)
    exact = F.linear(x, base[0].weight.float(), base[0].bias.float())
    assert distance(layer(x), exact) < 1e-5  # as it starts from the base; DoRA rounds when it divides by norms


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant != "dora"])
def test_folding_makes_a_plain_lora_that_computes_the_same(variant):
    model, x = varied(variant), torch.randn(5, 12)
    train(model)
    expected, whole = model(x), copy.deepcopy(model)
    fold(model)
    assert {type(layer) for _, layer in adapted_layers(model)} == {LowRankLinear}
    assert distance(model(x), expected) < 1e-5
    fresh = adapt(net(), rank=4, init="lora").state_dict().keys()
    assert model.state_dict().keys() == fresh
    with pytest.raises(ValueError, match=r"variants\.fold"):
        truncate(whole, 2)
    assert truncate(model, 20) < 1e-6
    assert distance(model(x), expected) < 1e-5


@pytest.mark.parametrize(("variant", "init"), CASES)
def test_a_resumed_run_equals_an_uninterrupted_one(variant, init):
    """As run/checkpoint.py resumes: the initial values, what is trained, and what changes without a gradient."""
    whole, first = varied(variant, init), varied(variant, init)
    train(whole)
    optimizer = train(first, last=3)
    resumed = changed(varied(variant, init))
    with torch.no_grad():
        for values in (
            initial_values,
            untrained_state,
            lambda m: {n: p for n, p in m.named_parameters() if p.requires_grad},
        ):
            for name, tensor in values(resumed).items():
                tensor.copy_(values(first)[name])
    again = torch.optim.AdamW([p for p in resumed.parameters() if p.requires_grad], lr=0.02, weight_decay=0)
    again.load_state_dict(optimizer.state_dict())
    train(resumed, first=3, optimizer=again)
    expected = whole.state_dict()
    assert all(torch.equal(torch.as_tensor(value), expected[name]) for name, value in resumed.state_dict().items())


@pytest.mark.parametrize(("variant", "init"), CASES)
def test_the_state_dict_has_all_that_a_layer_computes_with(variant, init):
    model, other, x = varied(variant, init), changed(varied(variant, init)), torch.randn(5, 12)
    train(model)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize(("variant", "init"), CASES)
def test_gradient_checkpointing_changes_no_gradient(variant, init):
    model, x = changed(varied(variant, init)).train(), torch.randn(5, 12)
    before_step(model, 1, seed=0)
    gradients = []
    for run in (model.up_proj, lambda x: checkpoint(model.up_proj, x, use_reentrant=False)):
        model.zero_grad()
        run(x).square().sum().backward()
        gradients.append([p.grad for p in model.up_proj.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(("variant", "init"), CASES)
def test_bfloat16_models_and_autocast_have_float32_gradients(variant, init):
    for dtype in (torch.bfloat16, torch.float32):
        model = changed(use(adapt(net().to(dtype), 4, init=init), variant))
        x = torch.randn(5, 12, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            y = model.up_proj(x)
        y.float().square().sum().backward()
        assert y.dtype == torch.bfloat16
        assert {p.grad.dtype for p in model.up_proj.parameters() if p.requires_grad} == {torch.float32}
        exact = x.double() @ model.up_proj.weight.double().T + model.up_proj.bias.double()
        assert distance(y, exact) < 0.02  # a few roundings of 2^-9


@pytest.mark.parametrize(("variant", "init"), CASES)
def test_a_variant_is_put_into_a_quantised_model(variant, init):
    model, x = adapt(net(), 4, init=init), torch.randn(5, 12)
    for _, layer in adapted_layers(model):
        nf4.quantize(layer)
    with torch.no_grad():
        expected = model(x)
    use(model, variant)
    assert torch.equal(model(x), expected)
    train(model)
    with pretrained(model):
        assert torch.equal(model(x), expected)
    y = model(x)
    assert distance(merge(model)(x), y) < 1e-5


# DoRA.


@settings(deadline=None, max_examples=40)
@given(m=sizes, n=sizes, bias=st.booleans(), init=st.sampled_from(["lora", "pissa"]), data=st.data())
def test_doras_factored_norm_and_gradients_equal_the_dense_ones(m, n, bias, init, data):
    """y = x (m ⊙ V / ‖V‖)ᵀ with a constant ‖V‖. The layer is in float64, so only rounding differs."""
    rank = data.draw(st.integers(1, min(m, n)))
    torch.manual_seed(m * n)
    layer = layer_of("dora", m, n, rank, init, bias)
    layer.magnitude0.data.copy_(layer.W.norm(dim=1))  # adapted in float32
    changed(layer, 0.3)
    V = layer.W + LowRankLinear.delta.fget(layer)
    assert distance(layer.norm(torch.float64), V.norm(dim=1)) < 1e-10
    x, y_weights = torch.randn(4, m, dtype=torch.float64, requires_grad=True), torch.randn(4, n, dtype=torch.float64)
    y = layer(x)
    expected = x @ (layer.magnitude[:, None] * V / V.norm(dim=1, keepdim=True).detach()).T
    expected = expected if layer.bias is None else expected + layer.bias
    wanted = [x, layer.A, layer.B, layer.magnitude]
    for a, b in zip(
        [y, *torch.autograd.grad((y * y_weights).sum(), wanted)],
        [expected, *torch.autograd.grad((expected * y_weights).sum(), wanted)],
        strict=True,
    ):
        assert (a - b).abs().max() < 1e-9 * (1 + b.abs().max())


def test_dora_gives_0_for_a_row_of_zeros():
    """PEFT gives NaN there."""
    linear = nn.Linear(6, 5)
    linear.weight.data[2] = 0
    layer = use(adapt(nn.Sequential(linear), 2, init="lora", targets="0"), "dora")[0]
    y = layer(torch.randn(3, 6))
    y.sum().backward()
    assert torch.equal(y[:, 2], layer.bias[2].expand(3)) and layer.magnitude.grad.isfinite().all()


# AdaLoRA.


def test_adaloras_budget_importance_and_penalty_equal_pefts():
    """A run of 12 steps with t_i = 2, t_f = 3 and a budget every 2 steps; each step has the gradients that PEFT had."""
    model = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 4), nn.Linear(4, 4))
    use(adapt(model, 4, init="lora", targets=["0", "1", "2"]), "adalora", target=2, warm=2 / 12, final=0.25, every=2)
    leaves = [(layer, index, leaf) for index, layer in enumerate(model) for leaf in ("lora_A", "lora_B", "lora_E")]
    ours = {f"{index}.{leaf}": getattr(layer, OURS[leaf]) for layer, index, leaf in leaves}
    for name, parameter in ours.items():
        parameter.data.copy_(pefts(f"run/start/{name}"))
    assert distance(add_penalty(model), PEFTS["run/penalty"]) < 1e-6
    assert all("lora_E" in name or distance(p.grad, pefts(f"run/penalty/{name}")) < 1e-6 for name, p in ours.items())
    for step in range(1, 13):
        for name, parameter in ours.items():
            parameter.grad = pefts(f"run/{step}/gradient/{name}")
            parameter.data -= 0.1 * parameter.grad
        after_step(model, step, 12)
        for name, parameter in ours.items():
            assert "lora_E" not in name or distance(parameter, pefts(f"run/{step}/{name}")) < 1e-6
            assert "lora_E" not in name or torch.equal(parameter == 0, pefts(f"run/{step}/{name}") == 0)
    for layer, index, leaf in leaves:  # noted until step 8: the last 3 steps have a fixed budget, as PEFT's
        for kind in "IU":
            assert distance(getattr(layer, f"{kind}_{OURS[leaf]}"), pefts(f"run/{kind}/{index}.{leaf}")) < 1e-6


def test_adaloras_budget_falls_cubically_from_b0_to_bt():
    budgets = [budget(step, 20, start=40, target=20, warm=4, final=6) for step in range(1, 21)]
    assert budgets == [40] * 4 + [int(20 * (1 - step / 10) ** 3 + 20) for step in range(1, 10)] + [20] * 7


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 50])
def test_adalora_ends_within_its_budget_whatever_the_length_of_the_run(steps):
    model = varied("adalora", rank=6, target=2)
    train(model, last=steps, steps=steps)
    kept = [layer.update()[0].shape[1] for _, layer in adapted_layers(model)]
    assert sum(kept) <= 2 * len(kept) + (steps < 3)  # a layer keeps one column at least


def test_adaloras_penalty_draws_p_and_q_to_orthogonality():
    free, bound = varied("adalora", orthogonality=0), varied("adalora")
    train(free, last=60, steps=60)
    train(bound, last=60, steps=60)
    gaps = [distance(model.up_proj.A.T @ model.up_proj.A, torch.eye(4)) for model in (free, bound)]
    assert gaps[1] < 0.5 * gaps[0]


def test_adalora_says_when_the_gradients_are_gone():
    with pytest.raises(ValueError, match="before zero_grad"):
        after_step(varied("adalora"), 1, 10)


# LoHa.


@settings(deadline=None, max_examples=40)
@given(m=sizes, n=sizes, data=st.data())
def test_loha_is_a_lora_of_rank_r_squared_with_khatri_rao_factors(m, n, data):
    rank = data.draw(st.integers(1, min(m, n)))
    layer = changed(layer_of("loha", m, n, rank), 0.3)
    left, right = layer.update()
    assert left.shape == (m, rank**2) and right.shape == (rank**2, n)
    for i in range(m):  # row-wise Kronecker products
        assert torch.equal(left[i], torch.kron(layer.A[i], layer.A2[i]))
    dense = (layer.A @ layer.B) * (layer.A2 @ layer.B2)
    assert (left @ right - dense).abs().max() < 1e-12 * (1 + dense.abs().max())
    x = torch.randn(3, m, dtype=torch.float64)
    assert distance(layer(x), x @ (layer.W.T + layer.scaling * dense) + layer.bias) < 1e-12


# DyLoRA.


def test_dylora_is_cut_to_any_rank_without_loss():
    model, x = changed(varied("dylora")), torch.randn(5, 12)
    for rank in range(1, 5):
        smaller = cut(copy.deepcopy(model), rank)
        assert {type(layer) for _, layer in adapted_layers(smaller)} == {LowRankLinear}
        for (_, layer), (_, short) in zip(adapted_layers(model), adapted_layers(smaller), strict=True):
            assert short.A.shape[1] == rank and short.scaling == pytest.approx(6 / rank)
            assert distance(short.delta, 6 / rank * (layer.A[:, :rank] @ layer.B[:rank]).T) < 1e-6
            layer.b = rank
            x = torch.randn(5, layer.in_features)
            assert distance(short(x), layer.train()(x)) < 1e-6  # what was trained at this rank
    for rank in (0, 5):
        with pytest.raises(ValueError, match="ranks 1 to 4"):
            cut(model, rank)
    with pytest.raises(ValueError, match="no DyLoRA layer"):
        cut(varied("loha"), 1)


def test_dylora_draws_each_rank_from_seed_and_step_and_uses_all_of_it_in_eval_mode():
    model, x = changed(varied("dylora")), torch.randn(5, 12)
    whole = model.eval()(x)
    ranks = []
    for step in range(200):
        torch.manual_seed(step)  # another rank's generator
        before_step(model, step, seed=3)
        ranks.append({layer.b for _, layer in adapted_layers(model)})
    assert all(len(b) == 1 for b in ranks) and set.union(*ranks) == {1, 2, 3, 4}
    other = varied("dylora")
    before_step(other, 199, seed=3)
    assert {layer.b for _, layer in adapted_layers(other)} == ranks[-1]
    model.up_proj.b = 1
    assert torch.equal(model(x), whole) and model.up_proj.update()[0].shape == (12, 4)
    assert not torch.equal(model.up_proj.train()(x), model.up_proj.eval()(x))


@pytest.mark.parametrize("frozen", [False, True])
def test_dyloras_gradient_reaches_the_drawn_rank_or_its_last_row_alone(frozen):
    layer = changed(layer_of("dylora", rank=4, frozen=frozen)).train()
    layer.b = 3
    layer(torch.randn(5, 9, dtype=torch.float64)).square().sum().backward()
    expected = [frozen is False, frozen is False, True, False]
    assert layer.A.grad.any(0).tolist() == layer.B.grad.any(1).tolist() == expected


# DeltaLoRA.


@pytest.mark.parametrize("start", [0, 3])
def test_deltaloras_sum_equals_writing_into_w_in_every_step(start):
    """Algorithm 1 as the paper writes it, in float64: after step K, W takes lambda s (A_{t+1} B_{t+1} - A_t B_t)."""
    layer = layer_of("deltalora", rank=3, ratio=0.7, warm=start / 10)
    plain = adapt(nn.Sequential(nn.Linear(9, 7)), 3, alpha=5, init="lora", targets="0").double()[0]
    for name in ("W", "bias", "A", "B"):
        getattr(plain, name).data.copy_(getattr(layer, name))
    x, goal = torch.randn(20, 9, dtype=torch.float64), torch.randn(20, 7, dtype=torch.float64)
    first, model = plain.W.clone(), nn.Sequential(layer)
    for step in range(10):
        x_step = x.clone().requires_grad_()
        outputs = []
        for each in (layer, plain):
            each.zero_grad()
            y = each(x_step)
            outputs.append((y, torch.autograd.grad((y - goal).square().mean(), x_step, retain_graph=True)[0]))
            (y - goal).square().mean().backward()
        for a, b in zip(*outputs, strict=True):
            assert distance(a, b) < 1e-12
        product = plain.A.detach() @ plain.B.detach()
        with torch.no_grad():
            for each in (layer, plain):
                each.A -= 0.1 * each.A.grad
                each.B -= 0.1 * each.B.grad
        after_step(model, step + 1, 10)
        if step >= start:
            plain.W.data += 0.7 * plain.scaling * (plain.A @ plain.B - product).T
        assert distance(layer.weight, plain.weight) < 1e-12
    assert torch.equal(layer.W, first) and distance(plain.W, first) > 1e-4
    assert layer.update()[0].shape[1] == 6


# rsLoRA, LoRA+ and OLoRA.


def test_lora_plus_gives_b_a_rate_of_its_own_and_leaves_nothing_out():
    model = varied("loha")
    slow, fast = lora_plus(model, lr=1e-3, ratio=16)
    assert slow["lr"] == 1e-3 and fast["lr"] == 16e-3 and fast["ratio"] == 16
    layers = [layer for _, layer in adapted_layers(model)]
    assert {*map(id, fast["params"])} == {id(B) for layer in layers for B in (layer.B, layer.B2)}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {*map(id, slow["params"] + fast["params"])} == {*map(id, trained)}
    torch.optim.AdamW(lora_plus(model, lr=1e-3))


def test_rslora_scales_by_the_root_of_the_rank():
    assert adapt(net(), 4, rslora_alpha(4, 6), init="lora").up_proj.scaling == pytest.approx(6 / 4**0.5)


def test_olora_starts_from_the_qr_of_w():
    layer = adapt(net(), 4, 6, init="olora").up_proj
    assert distance(layer.B @ layer.B.T, torch.eye(4)) < 1e-6  # rows of Q
    Q, R = torch.linalg.qr(layer.W)
    assert distance(layer.A0 @ layer.B0, (Q[:, :4] @ R[:4]).T) < 1e-6
    assert all(factor.untyped_storage().nbytes() == factor.nbytes for factor in (layer.A, layer.B))  # not all of Q


# PEFT's numbers.

OURS = {"lora_A": "A", "lora_B": "B", "lora_E": "Lambda", "lora_magnitude_vector": "magnitude"}
OURS |= {"hada_w1_a": "B", "hada_w1_b": "A", "hada_w2_a": "B2", "hada_w2_b": "A2"}


def pefts(key: str) -> torch.Tensor:
    """Return a tensor of PEFT's in our layout."""
    tensor = PEFTS[key]
    return tensor.flatten().clone() if key.endswith("lora_E") or tensor.ndim < 2 else tensor.T.clone()


@pytest.mark.parametrize("method", ["dora", "adalora", "loha", "rslora", "olora"])
def test_values_and_gradients_equal_pefts(method):
    """Same weights, same x: y and the gradients of x and of all that is trained, in float32."""
    model = nn.Sequential(nn.Linear(11, 7))
    model[0].weight.data, model[0].bias.data = PEFTS[f"{method}/weight"], PEFTS[f"{method}/bias"]
    alpha = rslora_alpha(3, 5) if method == "rslora" else 5
    adapt(model, 3, alpha, init="olora" if method == "olora" else "lora", targets="0")
    if method in VARIANTS:
        use(model, method)
    if method == "adalora":
        model[0].scaling = 5 / (3 + 1e-5)  # PEFT's, against a rank of 0
    leaves = [leaf for leaf in OURS if f"{method}/{leaf}" in PEFTS]
    for leaf in leaves:
        getattr(model[0], OURS[leaf]).data.copy_(pefts(f"{method}/{leaf}"))
    x = PEFTS[f"{method}/x"].clone().requires_grad_()
    y = model(x)
    assert distance(y, PEFTS[f"{method}/y"]) < 1e-6
    (y * PEFTS[f"{method}/y_weights"]).sum().backward()
    assert distance(x.grad, PEFTS[f"{method}/gradient/x"]) < 1e-6
    for leaf in leaves:
        assert distance(getattr(model[0], OURS[leaf]).grad, pefts(f"{method}/gradient/{leaf}")) < 1e-6, leaf


# Saving and loading. test_adapters.py compares with PEFT's logits.


@pytest.mark.parametrize(
    ("variant", "as_lora"), [(variant, True) for variant in VARIANTS] + [("adalora", False), ("loha", False)]
)
@torch.no_grad()
def test_a_saved_variant_loads_as_the_same_model(variant, as_lora, tmp_path):
    *inputs, _ = golden_example("llama3")
    model = changed(use(mb.adapt(mb.load_model(GOLDEN / "llama3"), 3, 5, init="lora"), variant))
    if variant == "adalora":
        adapted_layers(model)[0][1].Lambda[1:] = 0
        adapted_layers(model)[1][1].Lambda[:] = 0
    mb.save_adapter(model, tmp_path, as_lora=as_lora)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == ("LORA" if as_lora else variant.upper())
    assert (config.get("use_dora") is True) == (variant == "dora")
    ranks = {"dora": 3, "adalora": 3, "loha": 9 if as_lora else 3, "dylora": 3, "deltalora": 6}
    assert config.get("init_r", config["r"]) == ranks[variant]
    assert as_lora is False or variant != "adalora" or set(config["rank_pattern"].values()) == {1}
    again = mb.load_adapter(mb.load_model(GOLDEN / "llama3"), tmp_path)
    assert distance(again(*inputs), model(*inputs)) < 1e-6
    with pretrained(again):
        assert torch.equal(again(*inputs), mb.load_model(GOLDEN / "llama3")(*inputs))


@pytest.mark.parametrize(("variant", "name"), [("dora", "llama3"), ("loha", "mistral_window")])
def test_export_merges_or_reduces_a_variant(variant, name, tmp_path, in_command):
    """The base is read a tensor at a time; DoRA's change depends on it. The checkpoints are in bfloat16."""
    flags = ("--model", GOLDEN / name, "--adapter", GOLDEN / f"adapter_{variant}")
    assert in_command(export, *flags, "--out", tmp_path / "merged")[0] == 0
    merged = mb.load_model(tmp_path / "merged")
    status, _, errors = in_command(export, *flags, "--out", tmp_path / "small", "--adapter-rank", 9)
    if variant == "dora":
        assert status == 2 and "full rank" in errors and len(errors.splitlines()) == 1
    else:
        small = dict(adapted_layers(mb.load_adapter(mb.load_model(GOLDEN / name), tmp_path / "small")))
    for layer_name, layer in adapted_layers(
        mb.load_adapter(mb.load_model(GOLDEN / name), GOLDEN / f"adapter_{variant}")
    ):
        assert distance(merged.get_submodule(layer_name).weight - layer.W, layer.delta) < 0.2  # rounded to 3 digits
        assert variant == "dora" or distance(small[layer_name].delta, layer.delta) < 1e-5


@pytest.mark.parametrize("variant", ["dora", "dylora", "deltalora"])
def test_peft_has_formats_of_its_own_for_adalora_and_loha_alone(variant, tmp_path):
    with pytest.raises(ValueError, match="only AdaLoRA and LoHa"):
        mb.save_adapter(varied(variant), tmp_path, as_lora=False)


def test_what_pefts_formats_cannot_say_is_refused(tmp_path):
    model = use(mb.adapt(mb.load_model(GOLDEN / "gpt2"), 3, init="lora"), "loha")
    with pytest.raises(ValueError, match="no LoHa for GPT-2"):
        mb.save_adapter(model, tmp_path, as_lora=False)
    model = varied("adalora")
    model.up_proj.scaling *= 2
    with pytest.raises(ValueError, match="one initial rank and alpha"):
        mb.save_adapter(model, tmp_path, as_lora=False)
    assert not list(tmp_path.iterdir())


# What is refused.


@pytest.mark.parametrize(
    ("variant", "chosen", "message"),
    [
        ("dorra", {}, "unknown variant 'dorra': give dora, adalora"),
        ("dora", {"target": 2}, "dora has no setting 'target': it has none"),
        ("dylora", {"target": 2}, "dylora has no setting 'target': it has frozen"),
        ("adalora", {"target": 4}, "a budget of 4 is not below the initial rank 4: give 1 to 3"),
        ("adalora", {"target": 0}, "a budget of 0 is not below the initial rank 4"),
        ("adalora", {"warm": 0.5, "final": 0.5}, "give a sum below 1"),
        ("adalora", {"warm": -0.1}, "shares of the steps"),
        ("adalora", {"every": 0}, "every is 0"),
        ("adalora", {"orthogonality": -1.0}, "orthogonality is -1.0"),
        ("deltalora", {"warm": 1.0}, "shares of the steps"),
        ("deltalora", {"ratio": float("nan")}, "ratio is nan"),
    ],
)
def test_settings_that_a_variant_cannot_have_are_refused(variant, chosen, message):
    model = adapt(net(), 4, init="lora")
    with pytest.raises(ValueError, match=message):
        use(model, variant, **chosen)
    assert {type(layer) for _, layer in adapted_layers(model)} == {LowRankLinear}


@pytest.mark.parametrize("variant", VARIANTS)
def test_layers_that_a_variant_cannot_take_are_refused(variant):
    def refused(model, message):
        state = model.state_dict()
        with pytest.raises(ValueError, match=message):
            use(model, variant)
        assert model.state_dict().keys() == state.keys()

    refused(net(), "adapt it first")
    refused(varied("loha"), "is a LoHaLinear already")
    refused(changed(adapt(net(), 4, init="lora")), "has learned already")
    lean = adapt(net(), 4, init="lora")
    use_lean_product(lean)
    refused(lean, "is a LeanLowRankLinear already")
    if variant != "dora":
        refused(adapt(net(), 4, init="pissa"), f"but {variant} has a start of its own")
    if variant == "adalora":
        refused(adapt(net(), 1, init="lora"), "rank 1")
    with pytest.raises(ValueError, match="has no lean product"):
        use_lean_product(varied(variant))


def test_dora_needs_the_weights_as_they_are_used():
    with pytest.raises(ValueError, match="quantise first"):
        nf4.quantize(varied("dora").up_proj)
    layers = nn.Sequential(nn.Linear(6, 6, device="meta"))
    adapt(layers, 2, init="lora", targets="0", factors=lambda *_: (torch.rand(6, 2), torch.zeros(2, 6)))
    with pytest.raises(ValueError, match="not loaded or is sharded"):
        use(layers, "dora")
    with pytest.raises(ValueError, match="full rank"):
        fold(varied("dora"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_weight_has_the_gradients_of_the_forward_pass(variant):
    # nn.TransformerEncoderLayer reads the weight of its out_proj.
    model = varied(variant) if variant == "adalora" else changed(varied(variant))  # AdaLoRA's values of 0 count, too
    layer, x = model.up_proj, torch.randn(5, 12)
    layer.train()
    before_step(model, 0, seed=3)
    upstream = torch.randn(5, 20)
    gradients = [
        torch.autograd.grad((y * upstream).sum(), [p for p in layer.parameters() if p.requires_grad], allow_unused=True)
        for y in (layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    ]
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_a_step_that_a_grad_scaler_skips_leaves_adaloras_importance_alone():
    model = changed(varied("adalora"))
    train(model, 0, 1)
    layer = model.up_proj
    before = [getattr(layer, name).clone() for name in layer.state]
    for parameter in layer.parameters():
        parameter.grad = torch.full_like(parameter, torch.inf) if parameter.requires_grad else None
    layer.note_importance()
    assert all(torch.equal(getattr(layer, name), old) for name, old in zip(layer.state, before, strict=True))


def test_deltaloras_ratio_is_in_the_state_dict():
    model, other = changed(varied("deltalora", ratio=2.0)), varied("deltalora", ratio=0.5)
    other.load_state_dict(model.state_dict())
    x = torch.randn(5, 12)
    assert torch.equal(other(x), model(x))
