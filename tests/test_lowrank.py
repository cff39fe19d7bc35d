"""Tests of the adapted layer: initialisation, gradients, the teacher, merging, targets and refused settings."""

import re

import pytest
import torch
from helpers import distance
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minibalora.lowrank import (
    LowRankLinear,
    adapt,
    adapted_layers,
    lora,
    merge,
    pretrained,
)

INITS = ("lora", "pissa", "pissa_niter_4", "pissa_krylov_2")
sizes = st.integers(1, 40)


class Net(nn.Module):
    """Two linears to adapt, one of them without bias, with dropout between them, and a head that is not adapted."""

    def __init__(self):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(12, 20), nn.Linear(20, 12, bias=False)
        self.dropout, self.lm_head = nn.Dropout(0.5), nn.Linear(12, 7)

    def forward(self, x):
        return self.lm_head(x + self.down_proj(self.dropout(torch.tanh(self.up_proj(x)))))


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().eval()


def train_a_little(model: nn.Module, x: torch.Tensor) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


@settings(deadline=None, max_examples=60)
@given(
    m=sizes,
    n=sizes,
    share=st.floats(0, 1, allow_subnormal=False),
    alpha=st.floats(0.1, 300),
    init=st.sampled_from(INITS),
    bias=st.booleans(),
)
def test_residual_plus_factors_equals_w_for_every_init(m, n, share, alpha, init, bias):
    linear = nn.Linear(m, n, bias=bias)
    rank = 1 + int(share * (min(m, n) - 1))
    layer = LowRankLinear.from_linear(linear, rank, alpha, init)
    assert layer.A.shape == (m, rank) and layer.B.shape == (rank, n) and layer.residual.shape == (m, n)
    # W_res is a difference of float32 numbers of W's size, with a few rounding errors of 6e-8
    assert distance(layer.residual + layer.scaling * layer.A @ layer.B, linear.weight.T) < 1e-6
    assert torch.equal(layer.weight, linear.weight)
    x = torch.randn(3, m)
    assert torch.equal(layer(x), linear(x))


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("bias", [True, False])
def test_forward_equals_the_papers_formula(init, bias):
    torch.manual_seed(0)
    layer = LowRankLinear.from_linear(nn.Linear(30, 17, bias=bias), 5, 8, init)
    with torch.no_grad():
        layer.A += 0.1 * torch.randn_like(layer.A)
        layer.B += 0.1 * torch.randn_like(layer.B)
    x = torch.randn(4, 6, 30, dtype=torch.float64)
    residual, A, B = layer.residual.double(), layer.A.double(), layer.B.double()
    expected = x @ residual + layer.scaling * (x @ A) @ B + (layer.bias.double() if bias else 0)
    assert distance(layer(x.float()), expected) < 1e-6
    assert distance(x @ layer.weight.double().T + (layer.bias.double() if bias else 0), expected) < 1e-6


@settings(deadline=None, max_examples=30)
@given(m=st.integers(2, 30), n=st.integers(2, 30), alpha=st.floats(0.5, 50), data=st.data())
def test_pissa_takes_the_top_singular_directions(m, n, alpha, data):
    rank = data.draw(st.integers(1, min(m, n)))
    linear = nn.Linear(m, n, bias=False)
    layer = LowRankLinear.from_linear(linear, rank, alpha)
    U, S, Vh = torch.linalg.svd(linear.weight.T.double(), full_matrices=False)
    best = U[:, :rank] * S[:rank] @ Vh[:rank]
    gap = (S[rank - 1] - S[rank]).item() if rank < min(m, n) else 1.0
    # the error of a singular subspace is rounding divided by the gap to the next singular value
    assert distance(layer.scaling * layer.A @ layer.B, best) < 1e-5 + 1e-6 / gap
    # both factors have √(S/s): s AᵀA = s B Bᵀ = diag(S), with entries of about 1 for every s
    for gram in (layer.A.T @ layer.A, layer.B @ layer.B.T):
        assert torch.allclose(layer.scaling * gram, S[:rank].diag().float(), atol=1e-5 + 1e-6 / gap)


def test_adapt_uses_the_factors_of_the_caller():
    expected, model = adapt(net(), rank=2, alpha=3), net()
    factors = {name: (layer.A.detach() * 2, layer.B.detach()) for name, layer in adapted_layers(expected)}
    adapt(model, rank=2, alpha=3, factors=lambda name, weight: factors[name])
    for name, layer in adapted_layers(model):
        assert torch.equal(layer.A, factors[name][0]) and torch.equal(layer.B, factors[name][1])
        assert torch.equal(layer.A0, layer.A) and layer.scaling == 1.5


def test_lora_starts_from_the_reference_distribution():
    torch.manual_seed(0)
    layer = LowRankLinear.from_linear(nn.Linear(100, 50), 8, 16, "lora")
    torch.manual_seed(0)
    linear = nn.Linear(100, 50)
    lora_A = torch.empty(8, 100)
    nn.init.kaiming_uniform_(lora_A, a=5**0.5)
    bound = 1 / 100**0.5
    assert layer.scaling == 2 and torch.equal(layer.B, torch.zeros(8, 50)) and torch.equal(layer.W, linear.weight)
    assert layer.A.abs().max() <= bound and layer.A.std().item() == pytest.approx(lora_A.std().item(), rel=0.1)


def test_lora_draws_on_the_cpu_whatever_the_device():
    """A GPU's generator gives other numbers on another model of GPU, so ranks would start from different adapters."""
    states = []
    for device in ("cpu", "meta"):
        torch.manual_seed(0)
        A, B = lora(torch.empty(5, 7, device=device), 2, 1.0)
        assert A.device.type == B.device.type == device
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("init", INITS)
def test_only_a_and_b_get_gradients(init):
    model = adapt(net(), rank=3, init=init)
    model(torch.randn(5, 12)).sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"{layer}.{factor}" for layer in ("up_proj", "down_proj") for factor in "AB"}
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trained
    assert all(parameter.grad.abs().sum() > 0 for name, parameter in model.named_parameters() if name.endswith("B"))


@pytest.mark.parametrize("init", INITS)
def test_gradients_equal_those_of_the_explicit_form(init):
    torch.manual_seed(0)
    layer = LowRankLinear.from_linear(nn.Linear(9, 8), 3, 5, init)
    with torch.no_grad():
        layer.A += 0.1 * torch.randn_like(layer.A)
        layer.B += 0.1 * torch.randn_like(layer.B)
    x, residual = torch.randn(6, 9), layer.residual
    weights = torch.randn(6, 8)
    gradients = torch.autograd.grad((layer(x) * weights).sum(), [layer.A, layer.B])
    explicit = x @ residual + layer.scaling * (x @ layer.A) @ layer.B + layer.bias
    expected = torch.autograd.grad((explicit * weights).sum(), [layer.A, layer.B])
    assert all(distance(a, b) < 1e-5 for a, b in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_teacher_is_the_pretrained_model_to_the_last_bit(init, dtype):
    model, x = net().to(dtype), torch.randn(5, 12).to(dtype)
    before = model(x)
    adapt(model, rank=4, alpha=6, init=init)
    assert model.up_proj.A.dtype == torch.float32
    assert torch.equal(model(x), before)  # the student at step 0
    train_a_little(model, x)
    assert not torch.equal(model(x), before)
    with pretrained(model):
        assert torch.equal(model(x), before)


def test_pretrained_restores_everything_after_an_exception():
    model = adapt(net(), rank=2).train()
    model.dropout.eval()  # a mixed state must be restored, too
    with pytest.raises(KeyError), pretrained(model):
        assert not model.training and not torch.is_grad_enabled() and model.up_proj.is_teacher
        with pretrained(model):
            pass
        assert model.up_proj.is_teacher  # the end of a nested block does not end the outer one
        raise KeyError
    assert model.training and model.up_proj.training and not model.dropout.training
    assert torch.is_grad_enabled() and not model.up_proj.is_teacher


def test_the_teacher_has_no_dropout():
    model, x = net(), torch.randn(5, 12)
    before = model(x)
    adapt(model, rank=2).train()
    with pretrained(model):
        assert torch.equal(model(x), before)


def test_a_first_small_step_is_not_lost_in_bfloat16():
    """Rounding A itself to bfloat16 would erase a relative change of 1e-4; A − A₀ keeps it."""
    torch.manual_seed(0)
    layer = LowRankLinear.from_linear(nn.Linear(64, 64, bias=False).bfloat16(), 8)
    x = torch.randn(10, 64).bfloat16()
    with torch.no_grad():
        layer.A *= 1 + 1e-4
        expected = layer.scaling * (x.double() @ (layer.A - layer.A0).double()) @ layer.B.double()
        left, right = (factor.bfloat16() for factor in layer.update())
        assert distance(layer.scaling * (x @ left) @ right, expected) < 0.02  # three bfloat16 roundings of 0.4 %


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_keeps_the_output(init, dtype):
    model, x = net().to(dtype), torch.randn(5, 12).to(dtype)
    adapt(model, rank=4, alpha=2, init=init)
    train_a_little(model, x)
    before = model(x)
    merge(model)
    assert type(model.up_proj) is nn.Linear and model.up_proj.weight.dtype == dtype and not adapted_layers(model)
    assert distance(model(x), before) < (1e-6 if dtype == torch.float32 else 2e-2)
    with pytest.raises(ValueError, match="nothing to merge"):
        merge(model)


def test_merging_a_layer_alone_returns_the_plain_linear():
    layer = LowRankLinear.from_linear(nn.Linear(6, 4), 2)
    layer.B.data += 1
    x = torch.randn(3, 6)
    expected = layer(x)
    merged = merge(layer)
    assert type(merged) is nn.Linear and torch.allclose(merged(x), expected, atol=1e-5)


def test_merging_at_step_0_restores_the_weights_to_the_last_bit():
    model = net().bfloat16()
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    merge(adapt(model, rank=4))
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())


def test_targets_match_the_last_part_or_a_dotted_suffix_of_a_name():
    model = nn.ModuleDict({"a": net(), "b": net()})
    adapt(model, rank=2, targets=["b.up_proj", "down_proj"])
    assert [name for name, _ in adapted_layers(model)] == ["a.down_proj", "b.up_proj", "b.down_proj"]
    assert type(model["a"].lm_head) is nn.Linear


def test_a_single_target_may_be_a_string():
    assert [name for name, _ in adapted_layers(adapt(net(), rank=2, targets="up_proj"))] == ["up_proj"]


def test_a_target_that_matches_nothing_is_refused_with_the_list_of_names():
    model = net()
    for targets in (["up_proj", "q_proj"], ["proj"], ["lm_head"], []):
        with pytest.raises(ValueError, match="there are down_proj, up_proj"):
            adapt(model, targets=targets)
    assert not adapted_layers(model) and all(parameter.requires_grad for parameter in model.parameters())


def test_adapting_twice_is_refused_with_the_names_of_the_layers():
    model = adapt(net(), rank=2, targets=["up_proj"])
    with pytest.raises(ValueError, match="adapted already.*up_proj"):
        adapt(model, rank=2)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"rank": 13}, "up_proj: rank 13 does not fit a 12 x 20 layer: give 1 to 12"),
        ({"rank": 0}, "rank 0"),
        ({"rank": 2, "alpha": 0}, "alpha is 0"),
        ({"rank": 2, "alpha": -1.0}, "alpha is -1.0"),
        ({"rank": 2, "init": "gaussian"}, "unknown init 'gaussian': give lora, olora, pissa, pissa_krylov_N or "),
    ],
)
def test_a_refused_setting_does_not_change_the_model(wrong, message):
    model = net()
    with pytest.raises(ValueError, match=re.escape(message)):
        adapt(model, **wrong)
    assert not adapted_layers(model) and all(parameter.requires_grad for parameter in model.parameters())


def test_two_linears_that_share_a_weight_are_refused_because_they_would_get_two():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    with pytest.raises(ValueError, match="0 and 2 share a weight"):
        adapt(model, rank=2)
    assert [name for name, _ in adapted_layers(adapt(model, rank=2, targets=["1", "2"]))] == ["1", "2"]


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_with_its_name(init, wrong):
    model = net()
    model.down_proj.weight.data[3, 4] = wrong
    with pytest.raises(ValueError, match="down_proj: .* not finite"):
        adapt(model, rank=2, init=init)
    assert not adapted_layers(model)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64])
def test_a_weight_of_a_dtype_that_is_not_for_training_is_refused(dtype):
    linear = nn.Linear(6, 6)
    linear.weight = nn.Parameter(linear.weight.detach().to(dtype), requires_grad=False)
    with pytest.raises(ValueError, match=f"is {dtype}: convert it"):
        LowRankLinear.from_linear(linear, 2)


def test_factors_of_other_shapes_are_refused_with_the_shapes():
    model = net()
    with pytest.raises(ValueError, match=re.escape("up_proj: A is (12, 3) and B (3, 20): give (12, 2) and (2, 20)")):
        adapt(model, rank=2, factors=lambda _, weight: lora(weight, 3, 1.0))
    assert not adapted_layers(model)


def test_pretrained_refuses_a_model_that_is_not_adapted():
    with pytest.raises(ValueError, match="adapt first"), pretrained(net()):
        pass


def test_the_residual_is_zero_at_full_rank():
    layer = LowRankLinear.from_linear(nn.Linear(12, 20), 12)
    assert layer.residual.abs().max() < 1e-6


@pytest.mark.parametrize("init", ["lora", "pissa"])
@pytest.mark.parametrize("shape", [(9,), (1, 9), (0, 9), (2, 3, 9)])
def test_inputs_may_have_any_number_of_dimensions(init, shape):
    layer = LowRankLinear.from_linear(nn.Linear(9, 5), rank=2, init=init)
    layer.B.data += 1
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    assert y.shape == (*shape[:-1], 5) and torch.allclose(y, x @ layer.weight.T + layer.bias, atol=1e-5)
    y.sum().backward()
    assert torch.allclose(x.grad, layer.weight.sum(0).expand(shape), atol=1e-5)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
@pytest.mark.parametrize("init", ["lora", "pissa"])
def test_casting_an_adapted_model_leaves_its_factors_in_float32_at_least(init, cast):
    model = adapt(net(), 4, init=init)
    train_a_little(model, torch.randn(5, 12))  # also leaves gradients
    before = {name: layer.delta for name, layer in adapted_layers(model)}
    getattr(model, cast)()
    for name, layer in adapted_layers(model):
        assert layer.A.dtype == layer.A.grad.dtype == (torch.float64 if cast == "double" else torch.float32)
        assert layer.W.dtype == model.lm_head.weight.dtype != torch.float32
        assert torch.allclose(layer.delta.float(), before[name], rtol=0, atol=0 if cast != "double" else 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_teacher_and_student_compute_in_the_dtype_of_their_input_with_and_without_a_bias(dtype):
    for bias in (True, False):
        layer = LowRankLinear.from_linear(nn.Linear(6, 4, bias=bias), 2)
        x = torch.randn(3, 6, dtype=dtype)
        with pretrained(layer):
            teacher = layer(x)
        assert layer(x).dtype == teacher.dtype == dtype and torch.equal(layer(x), teacher)


def test_integers_are_refused_instead_of_rounding_the_weight_to_zeros():
    model = adapt(net(), 4)
    with pytest.raises(ValueError, match="X is torch.int64: give floating-point numbers"):
        model(torch.ones(2, 12, dtype=torch.long))


def test_merging_keeps_float64_and_ignores_autocast():
    model = adapt(net().double(), 4)
    before = [parameter.clone() for _, layer in adapted_layers(model) for parameter in (layer.W,)]
    assert all(torch.equal(a, b.weight) for a, b in zip(before, [merge(model).up_proj, model.down_proj], strict=True))
    model, x = adapt(net(), 4), torch.randn(5, 12)
    train_a_little(model, x)
    y, layer = model(x), model.up_proj
    outside = layer.delta, layer.residual
    with torch.autocast("cpu", torch.bfloat16):
        inside = layer.delta, layer.residual
        merge(model)
    assert all(torch.equal(a, b) for a, b in zip(outside, inside, strict=True))
    assert torch.allclose(model(x), y, atol=1e-5)
