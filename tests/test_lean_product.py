"""Tests of the lean product: values and gradients equal the plain product's, and fewer tensors are saved."""

import copy
from contextlib import nullcontext

import pytest
import torch
from helpers import distance
from torch import nn

from minibalora.lean_product import KEPT, LeanLowRankLinear, factors_kept, use_lean_product
from minibalora.lowrank import LowRankLinear, adapt, adapted_layers, pretrained
from minibalora.nf4 import quantize
from minibalora.truncate import truncate

INITS = ("lora", "pissa")
ROWS = [(1,), (2, 40)]  # for few rows the layer computes X W + X left right, for many X (W + ΔW)


def both(init: str, dtype: torch.dtype = torch.float32, bias: bool = True, is_quantised: bool = False):
    """Return a plain and a lean layer with equal parameters, changed as if trained."""
    torch.manual_seed(0)
    plain = LowRankLinear.from_linear(nn.Linear(30, 17, bias=bias).to(dtype), 5, 8, init)
    if is_quantised:
        quantize(plain)
    with torch.no_grad():
        plain.A += 0.1 * torch.randn_like(plain.A)
        plain.B += 0.1 * torch.randn_like(plain.B)
    lean = copy.deepcopy(plain)
    use_lean_product(lean)
    return plain, lean


@pytest.mark.parametrize("is_quantised", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("init", INITS)
def test_values_and_gradients_equal_those_of_the_plain_product(init, rows, bias, is_quantised):
    """In float64, only the order of sums makes a difference."""
    plain, lean = (layer.double() for layer in both(init, bias=bias, is_quantised=is_quantised))
    assert type(lean) is LeanLowRankLinear
    results = []
    for layer in (plain, lean):
        x = torch.linspace(-1, 1, 30 * torch.Size(rows).numel(), dtype=torch.float64).sin().view(*rows, 30)
        y = layer(x.requires_grad_())
        weights = torch.linspace(0, 9, y.numel(), dtype=torch.float64).cos().view(y.shape)
        results.append([y, *torch.autograd.grad((y * weights).sum(), [x, layer.A, layer.B])])
    assert all(distance(a, b) < 1e-12 for a, b in zip(results[1], results[0], strict=True))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("init", INITS)
def test_autocast_gives_bfloat16_outputs_and_float32_gradients(init, rows):
    plain, lean = both(init)
    x, results = torch.randn(*rows, 30), []
    for layer in (plain, lean):
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        y.float().square().sum().backward()
        assert y.dtype == torch.bfloat16 and layer.A.grad.dtype == torch.float32
        results.append([y, layer.A.grad, layer.B.grad])
    # a few rounding errors of 2^-9 each
    assert all(distance(a, b) < 0.02 for a, b in zip(results[1], results[0], strict=True))


@pytest.mark.parametrize("init", INITS)
def test_only_x_and_the_factors_are_saved_for_backward(init):
    _, lean = both(init)
    x, saved = torch.randn(5, 30, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lean(x)
    left, right = lean.update()
    assert {t.shape for t in saved} == {x.shape, lean.A.shape, left.shape, right.shape}


def count_updates(monkeypatch: pytest.MonkeyPatch) -> list[LowRankLinear]:
    """Return a list to which each computation of a layer's factors adds the layer."""
    layers, update = [], LowRankLinear.update
    monkeypatch.setattr(LowRankLinear, "update", lambda layer: layers.append(layer) or update(layer))
    return layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("init", INITS)
def test_factors_are_computed_once_inside_factors_kept_and_once_a_forward_pass_outside(init, dtype, monkeypatch):
    _, lean = both(init, dtype)
    x, updates, results = torch.randn(3, 30, dtype=dtype), count_updates(monkeypatch), []
    with torch.inference_mode(), factors_kept(lean):
        lean(x)
    for scope in (factors_kept(lean), nullcontext()):
        updates.clear()
        with scope:
            with torch.inference_mode():
                lean(x)
            for _ in range(2):  # a micro-batch each
                lean(x).square().sum().backward()
            with factors_kept(lean):
                lean(x)
            lean(x)
        results.append([lean(x), lean.A.grad, lean.B.grad])
        lean.zero_grad()
        assert len(updates) == (2 if len(results) == 1 else 6), "one of these is the last call, which is outside"
    assert all(map(torch.equal, *results)) and not KEPT


CHANGES = {
    "in place": lambda layer: layer.A.detach().add_(1),
    "in inference mode": torch.inference_mode()(lambda layer: layer.B.mul_(2)),
    "foreach optimizer": lambda layer: torch.optim.SGD([layer.A, layer.B], foreach=True).step(),
    "fused optimizer": lambda layer: torch.optim.AdamW([layer.A, layer.B], fused=True).step(),
    "load_state_dict": lambda layer: layer.load_state_dict({k: v + 1 for k, v in layer.state_dict().items()}),
    "assigned": lambda layer: layer.load_state_dict({k: v + 1 for k, v in layer.state_dict().items()}, assign=True),
    ".data": lambda layer: setattr(layer.A, "data", layer.A + 1),
    ".data, same memory": lambda layer: setattr(layer.A, "data", layer.A.data.T.reshape(30, 5).flip(0)),
    "another parameter": lambda layer: setattr(layer, "B", nn.Parameter(layer.B + 1)),
    "initial value": lambda layer: layer.A0.detach().add_(1),
    "truncated": lambda layer: truncate(layer, 2),
    "dtype": lambda layer: layer.double(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_factors_that_were_changed_inside_factors_kept_are_computed_again(change):
    _, lean = both("pissa")
    x = torch.randn(3, 30)
    with factors_kept(lean):
        before = lean(x)
        lean.A.grad, lean.B.grad = torch.ones_like(lean.A), torch.ones_like(lean.B)
        change(lean)
        inside = lean(x.to(lean.A.dtype))
    assert torch.equal(inside, lean(x.to(lean.A.dtype))) and not torch.equal(inside, before)


def test_a_copy_of_a_layer_keeps_no_factors():
    _, lean = both("pissa")
    with factors_kept(lean):
        lean(torch.randn(3, 30))
        other = copy.deepcopy(lean)
        assert other not in KEPT and KEPT[lean] is not None
    assert not KEPT


def test_a_second_derivative_is_refused():
    _, lean = both("pissa")
    x = torch.randn(3, 30, requires_grad=True)
    with pytest.raises(RuntimeError, match="twice"):
        torch.autograd.grad(lean(x).sum(), x, create_graph=True)


def test_a_scaling_that_changes_before_the_backward_pass_is_refused():
    _, lean = both("pissa")
    y = lean(torch.randn(3, 30)).sum()
    lean.scaling *= 2
    with pytest.raises(RuntimeError, match="scaling changed from 1.6 to 3.2"):
        y.backward()


@pytest.mark.parametrize("leaf", ["W", "bias", "A0", "B0"])
def test_a_frozen_tensor_that_is_made_trainable_gets_a_gradient(leaf):
    _, lean = both("pissa")
    parameter = getattr(lean, leaf).requires_grad_()
    lean(torch.randn(4, 30)).square().sum().backward()
    assert parameter.grad.norm() > 0


def test_the_output_may_be_modified_in_place():
    _, lean = both("pissa")
    y = lean(torch.randn(2, 3, 30))
    y += 1
    y.relu_().sum().backward()
    assert lean.A.grad is not None


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_teacher_and_the_student_at_step_0_equal_the_pretrained_model_to_the_last_bit(init, dtype):
    model, x = nn.Sequential(nn.Linear(30, 17), nn.Tanh(), nn.Linear(17, 9)).to(dtype), torch.randn(5, 30).to(dtype)
    before = model(x)
    use_lean_product(adapt(model, 4, 6, init))
    assert torch.equal(model(x), before)
    for _, layer in adapted_layers(model):
        layer.A.data += 1
        layer.B.data += 1
    with pretrained(model):
        assert torch.equal(model(x), before)
