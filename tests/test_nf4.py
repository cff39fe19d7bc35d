"""Four bits: the published levels, what quantising may change, what a layer keeps, and what QPiSSA gains."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from bench_nf4 import decaying, errors
from helpers import distance
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from minibalora import nf4
from minibalora.lean_product import use_lean_product
from minibalora.lowrank import LowRankLinear, adapt, merge, pretrained
from minibalora.nf4 import BLOCK, NF4, SCALE_BLOCK, normal_levels, quantize
from minibalora.truncate import truncate

PUBLISHED = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
PUBLISHED += [-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725]
PUBLISHED += [0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
sizes, seeds = st.integers(1, 150), st.integers(0, 2**31)


def normal(n: int, m: int, seed: int = 0, spread: float = 0.0) -> torch.Tensor:
    """(n, m), the size of a number exp(spread · another normal number)."""
    torch.manual_seed(seed)
    return torch.randn(n, m) * (spread * torch.randn(n, m)).exp()


def with_exact_scales(weight: torch.Tensor) -> torch.Tensor:
    """nf4(W) without double quantisation."""
    blocks, levels = weight.view(-1, BLOCK), normal_levels().float()
    scales = blocks.abs().amax(dim=1, keepdim=True)
    return (levels[torch.bucketize(blocks / scales, (levels[1:] + levels[:-1]) / 2)] * scales).view_as(weight)


def test_the_levels_are_the_published_ones():
    # the paper's were computed in float32, whose rounding of p moves the outer quantiles by some 1e-7
    assert torch.allclose(normal_levels(), torch.tensor(PUBLISHED, dtype=torch.float64), rtol=0, atol=5e-7)
    assert normal_levels()[[0, 7, 15]].tolist() == [-1, 0, 1]


@settings(deadline=None, max_examples=100)
@given(n=sizes, m=sizes, seed=seeds, spread=st.floats(0, 4), dtype=st.sampled_from(DTYPES))
def test_no_number_changes_by_more_than_the_stated_bound(n, m, seed, spread, dtype):
    weight = normal(n, m, seed, spread).clamp(-6e4, 6e4).to(dtype)
    packed = NF4.quantize(weight)
    changed = packed.dequantize(torch.float64) - weight.double()
    assert changed.shape == (n, m) and packed.dequantize(dtype).dtype == dtype
    blocks = F.pad(weight.double().flatten(), (0, -n * m % BLOCK)).view(-1, BLOCK)
    largest, scales = blocks.abs().amax(dim=1), packed.scales().double()
    error = (scales - largest).abs()
    steps = packed.scale_steps.double().repeat_interleave(SCALE_BLOCK)[: len(error)]
    rounding = 1e-6 * largest.max()  # of float32, in scales whose least was taken off and added again
    assert (scales >= 0).all() and (error <= steps / 2 + rounding).all()
    half_gap = normal_levels().diff().max() / 2
    bound = torch.maximum(half_gap * scales, error) + 1e-6 * scales
    assert (changed.flatten().abs() <= bound.repeat_interleave(BLOCK)[: n * m]).all()
    assert half_gap < 0.152  # as the docstring says


@settings(deadline=None, max_examples=50)
@given(n=sizes, m=sizes, seed=seeds)
def test_quantising_again_changes_nothing(n, m, seed):
    once = NF4.quantize(normal(n, m, seed))
    again = NF4.quantize(once.dequantize())
    assert torch.equal(again.codes, once.codes) and torch.equal(again.scale_codes, once.scale_codes)
    assert distance(again.dequantize(), once.dequantize()) < 1e-6


@settings(deadline=None, max_examples=30)
@given(n=sizes, m=sizes, seed=seeds, exponent=st.integers(-20, 20))
def test_a_power_of_two_passes_through(n, m, seed, exponent):
    weight, factor = normal(n, m, seed), 2.0**exponent
    assert torch.equal(NF4.quantize(factor * weight).dequantize(), factor * NF4.quantize(weight).dequantize())


@pytest.mark.parametrize("shape", [(1, 1), (3, 64), (5, 7), (130, 300)])
def test_zeros_stay_zeros(shape):
    assert torch.equal(NF4.quantize(torch.zeros(shape)).dequantize(), torch.zeros(shape))
    weight = normal(*shape)
    weight[0] = 0
    assert (NF4.quantize(weight).dequantize()[0] == 0).all()


@pytest.mark.parametrize("value", [1.0, -3.5, 1e-30])
def test_a_constant_comes_back(value):
    weight = torch.full((40, 30), value)
    assert distance(NF4.quantize(weight).dequantize(), weight) < 1e-6


@pytest.mark.parametrize("weight", [normal(40, 56), normal(90, 70, spread=0.5)])
def test_a_nearer_level_never_exists(weight):
    packed = NF4.quantize(weight)
    scales = packed.scales().double().repeat_interleave(BLOCK)[: weight.numel()].view_as(weight)
    choices = scales[..., None] * normal_levels()
    best = (choices - weight.double()[..., None]).abs().amin(dim=-1)
    assert torch.allclose((packed.dequantize(torch.float64) - weight.double()).abs(), best, rtol=0, atol=1e-6)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(wrong):
    weight = normal(10, 20)
    weight[4, 5] = wrong
    with pytest.raises(ValueError, match="not finite"):
        NF4.quantize(weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_dtype_is_a_rounding_at_the_end(dtype):
    packed = NF4.quantize(normal(33, 70))
    assert torch.equal(packed.dequantize(dtype), packed.dequantize().to(dtype))


@pytest.mark.parametrize("blocks_at_a_time", [1, 3])
def test_it_does_not_matter_how_many_blocks_are_worked_on_at_a_time(blocks_at_a_time, monkeypatch):
    weight = normal(37, 41)
    whole = NF4.quantize(weight)
    monkeypatch.setattr(nf4, "CHUNK", blocks_at_a_time)
    parts = NF4.quantize(weight)
    assert torch.equal(parts.codes, whole.codes) and torch.equal(parts.dequantize(), whole.dequantize())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantising_makes_no_tensor_of_the_weights_size(dtype, monkeypatch):
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            storages = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
            if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in storages:
                made.append(result.nbytes)
            return result

    monkeypatch.setattr(nf4, "CHUNK", 16)
    weight = normal(256, 512).to(dtype)
    with Watch():
        packed = NF4.quantize(weight)
    assert max(made) == packed.codes.nbytes == weight.numel() / 2


def test_a_number_takes_four_bits_and_an_eighth():
    packed = NF4.quantize(normal(1024, 1024))
    bits = 8 * sum(buffer.nbytes for buffer in packed.buffers()) / 1024**2
    assert bits == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-4) and round(bits, 3) == 4.127
    assert (packed.scale_codes.view(-1, SCALE_BLOCK).amax(dim=1) == 255).all()  # and all of them are used


def test_the_state_moves_to_another_module():
    first, second = NF4.quantize(normal(30, 50)), NF4.quantize(normal(30, 50, seed=1))
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.dequantize(), first.dequantize())
    assert not list(first.parameters())


@pytest.mark.parametrize("spread", [0, 0.5, 1])
def test_eight_bit_scales_cost_next_to_nothing(spread):
    weight = normal(512, 512, spread=spread)
    eight_bit, exact = (
        distance(held, weight) for held in (NF4.quantize(weight).dequantize(), with_exact_scales(weight))
    )
    assert eight_bit < 1.005 * exact


def trained_layer(init: str, dtype: torch.dtype = torch.float32) -> LowRankLinear:
    """30 -> 17 with a bias, quantised, then moved as if it had been trained; float64 factors for a float64 layer."""
    torch.manual_seed(0)
    layer = LowRankLinear.from_linear(torch.nn.Linear(30, 17), rank=3, alpha=6, init=init)
    quantize(layer)
    layer.A.data += 0.1 * torch.randn_like(layer.A)
    layer.B.data += 0.1 * torch.randn_like(layer.B)
    return layer.to(dtype)


@pytest.mark.parametrize("init", ["lora", "pissa"])
@pytest.mark.parametrize("rows", [(1,), (2, 40)])
def test_a_quantised_layer_acts_as_its_dense_weight_with_exact_gradients(init, rows):
    layer, x = trained_layer(init, torch.float64), torch.randn(*rows, 30, dtype=torch.float64, requires_grad=True)
    residual = layer.W.dequantize(torch.float64).T
    weight = residual + layer.scaling * layer.A @ layer.B
    ours, theirs = layer(x), x @ weight + layer.bias
    assert torch.allclose(ours, theirs, atol=1e-6)  # scales are float32
    upstream = torch.randn_like(ours)
    grads = (torch.autograd.grad((y * upstream).sum(), (x, layer.A, layer.B)) for y in (ours, theirs))
    assert all(distance(a, b) < 1e-6 for a, b in zip(*grads, strict=True))
    assert torch.allclose(layer.weight.double(), weight.T, atol=1e-6)


@pytest.mark.parametrize("init", ["lora", "pissa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_teacher_of_a_quantised_model_is_the_student_at_step_0(init, dtype):
    model = nn.Sequential(nn.Linear(30, 17).to(dtype))
    adapt(model, rank=3, init=init)
    x, W = torch.randn(5, 30, dtype=dtype), model[0].W.float()
    quantize(model[0])
    start = model(x)
    with pretrained(model):
        assert torch.equal(model(x), start)
    assert 0 < distance(model[0].weight, W) < 0.2  # the quantised model, not the one before
    model[0].A.data += 1
    model[0].B.data += 1
    with pretrained(model):
        assert torch.equal(model(x), start)


def test_nothing_dense_is_kept_for_backward(monkeypatch):
    layer, x = trained_layer("pissa"), torch.randn(5, 30, requires_grad=True)
    use_lean_product(layer)
    dense, saved = [], []
    dequantize = NF4.dequantize

    def watched(self, dtype):
        weight = dequantize(self, dtype)
        dense.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(NF4, "dequantize", watched)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        y = layer(x)
    assert len(dense) == 1 and dense[0]() is None
    assert {tensor.shape for tensor in saved} == {x.shape, layer.A.shape, layer.B.shape}
    y.sum().backward()
    assert len(dense) == 2 and dense[1]() is None


def test_a_quantised_model_merges_and_refuses_to_be_truncated():
    model = nn.Sequential(nn.Linear(30, 17))
    adapt(model, rank=3)
    quantize(model[0])
    x = torch.randn(4, 30)
    expected = model(x)
    with pytest.raises(ValueError, match="quantised"):
        truncate(model, 2)
    assert torch.allclose(merge(model)(x), expected, atol=1e-5)


@pytest.mark.parametrize("rank", [16, 64])
@pytest.mark.parametrize("decay", [0.5, 1.0])
def test_qpissa_loses_less_where_the_spectrum_decays(decay, rank):
    torch.manual_seed(0)
    qlora, qpissa = errors(decaying(256, decay), rank)
    kept = (qpissa.norm(p="nuc") / qlora.norm(p="nuc")).item()
    energy = (torch.arange(256) + 1.0) ** (-2 * decay)
    # the error is in proportion to what is quantised, ‖W_res‖ / ‖W‖, for numbers of one distribution; where a few
    # directions hold most of W, its numbers are products of normal ones and not normal: we saw 9 %
    assert kept == pytest.approx((energy[rank:].sum() / energy.sum()).sqrt().item(), rel=0.15)
    assert kept < 0.8


def test_qpissa_gains_little_where_the_spectrum_is_flat():
    torch.manual_seed(0)
    qlora, qpissa = errors(decaying(256, 0), 16)
    assert 0.95 < qpissa.norm(p="nuc") / qlora.norm(p="nuc") < 1.02  # √(1 − 16/256) = 0.97


def test_a_trace_leaves_nothing_behind(monkeypatch):
    """torch.export looks levels up with stand-ins for tensors; the next forward pass must not meet them."""
    monkeypatch.setattr(nf4, "TABLES", {})
    model = adapt(nn.Sequential(nn.Linear(30, 17)), rank=3)
    quantize(model[0])
    x = torch.randn(3, 30)
    y = model(x)
    nf4.TABLES.clear()
    torch.export.export(model, (x,))
    assert torch.equal(model(x), y)
