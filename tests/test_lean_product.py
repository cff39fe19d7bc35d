"""Tests of the lean product: values and gradients equal the plain product's, and fewer tensors are saved."""

import copy

import pytest
import torch
from helpers import distance
from torch import nn

from minibalora.lean_product import LeanLowRankLinear, use_lean_product
from minibalora.lowrank import LowRankLinear, adapt, adapted_layers, pretrained
from minibalora.nf4 import quantize

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
    assert {t.shape for t in saved} == {x.shape, lean.A.shape, lean.B.shape}


def test_a_second_derivative_is_refused():
    _, lean = both("pissa")
    x = torch.randn(3, 30, requires_grad=True)
    with pytest.raises(RuntimeError, match="twice"):
        torch.autograd.grad(lean(x).sum(), x, create_graph=True)


@pytest.mark.parametrize("leaf", ["W", "bias"])
def test_a_weight_or_bias_that_is_made_trainable_gets_a_gradient(leaf):
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
