"""Tests of NF4: levels, error bounds, sizes in memory, quantised layers, and QPiSSA's smaller error."""

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
    """Return (n, m) random numbers x · exp(spread · y), where x and y are normal."""
    torch.manual_seed(seed)
    return torch.randn(n, m) * (spread * torch.randn(n, m)).exp()


def with_exact_scales(weight: torch.Tensor) -> torch.Tensor:
    """Return nf4(W) without double quantisation."""
    blocks, levels = weight.view(-1, BLOCK), normal_levels().float()
    scales = blocks.abs().amax(dim=1, keepdim=True)
    return (levels[torch.bucketize(blocks / scales, (levels[1:] + levels[:-1]) / 2)] * scales).view_as(weight)


def test_levels_equal_the_published_ones():
    # the published levels were computed in float32; rounding of p moves the outer quantiles by about 1e-7
    assert torch.allclose(normal_levels(), torch.tensor(PUBLISHED, dtype=torch.float64), rtol=0, atol=5e-7)
    assert normal_levels()[[0, 7, 15]].tolist() == [-1, 0, 1]


@settings(deadline=None, max_examples=100)
@given(n=sizes, m=sizes, seed=seeds, spread=st.floats(0, 4, allow_subnormal=False), dtype=st.sampled_from(DTYPES))
def test_errors_are_within_the_stated_bound(n, m, seed, spread, dtype):
    weight = normal(n, m, seed, spread).clamp(-6e4, 6e4).to(dtype)
    packed = NF4.quantize(weight)
    difference = packed.dequantize(torch.float64) - weight.double()
    assert difference.shape == (n, m) and packed.dequantize(dtype).dtype == dtype
    blocks = F.pad(weight.double().flatten(), (0, -n * m % BLOCK)).view(-1, BLOCK)
    largest, scales = blocks.abs().amax(dim=1), packed.scales().double()
    error = (scales - largest).abs()
    steps = packed.scale_steps.double().repeat_interleave(SCALE_BLOCK)[: len(error)]
    rounding = 1e-6 * largest.max()  # float32 rounding: the smallest scale is subtracted and added again
    assert (scales >= 0).all() and (error <= steps / 2 + rounding).all()
    half_gap = normal_levels().diff().max() / 2
    bound = torch.maximum(half_gap * scales, error) + 1e-6 * scales
    assert (difference.flatten().abs() <= bound.repeat_interleave(BLOCK)[: n * m]).all()
    assert half_gap < 0.152  # the bound in nf4.py's docstring


@settings(deadline=None, max_examples=50)
@given(n=sizes, m=sizes, seed=seeds)
def test_quantising_twice_equals_quantising_once(n, m, seed):
    once = NF4.quantize(normal(n, m, seed))
    twice = NF4.quantize(once.dequantize())
    assert torch.equal(twice.codes, once.codes) and torch.equal(twice.scale_codes, once.scale_codes)
    assert distance(twice.dequantize(), once.dequantize()) < 1e-6


@settings(deadline=None, max_examples=30)
@given(n=sizes, m=sizes, seed=seeds, exponent=st.integers(-20, 20))
def test_a_factor_that_is_a_power_of_two_scales_the_result_exactly(n, m, seed, exponent):
    weight, factor = normal(n, m, seed), 2.0**exponent
    assert torch.equal(NF4.quantize(factor * weight).dequantize(), factor * NF4.quantize(weight).dequantize())


@pytest.mark.parametrize("shape", [(1, 1), (3, 64), (5, 7), (130, 300)])
def test_zeros_stay_zeros(shape):
    assert torch.equal(NF4.quantize(torch.zeros(shape)).dequantize(), torch.zeros(shape))
    weight = normal(*shape)
    weight[0] = 0
    assert (NF4.quantize(weight).dequantize()[0] == 0).all()


@pytest.mark.parametrize("value", [1.0, -3.5, 1e-30])
def test_a_constant_weight_is_restored(value):
    weight = torch.full((40, 30), value)
    assert distance(NF4.quantize(weight).dequantize(), weight) < 1e-6


@pytest.mark.parametrize("weight", [normal(40, 56), normal(90, 70, spread=0.5)])
def test_every_number_gets_its_nearest_level(weight):
    packed = NF4.quantize(weight)
    scales = packed.scales().double().repeat_interleave(BLOCK)[: weight.numel()].view_as(weight)
    choices = scales[..., None] * normal_levels()
    best = (choices - weight.double()[..., None]).abs().amin(dim=-1)
    assert torch.allclose((packed.dequantize(torch.float64) - weight.double()).abs(), best, rtol=0, atol=1e-6)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused(wrong):
    weight = normal(10, 20)
    weight[4, 5] = wrong
    with pytest.raises(ValueError, match="not finite"):
        NF4.quantize(weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dequantising_to_a_dtype_only_rounds_the_result(dtype):
    packed = NF4.quantize(normal(33, 70))
    assert torch.equal(packed.dequantize(dtype), packed.dequantize().to(dtype))


@pytest.mark.parametrize("cast", ["half", "bfloat16"])
def test_casting_a_model_leaves_the_scales_in_float32(cast):
    packed = NF4.quantize(2e-4 * normal(33, 70))
    before = packed.dequantize()
    assert torch.equal(getattr(packed, cast)().dequantize(), before)


@pytest.mark.parametrize("blocks_at_a_time", [1, 3])
def test_the_chunk_size_does_not_change_results(blocks_at_a_time, monkeypatch):
    weight = normal(37, 41)
    whole = NF4.quantize(weight)
    monkeypatch.setattr(nf4, "CHUNK", blocks_at_a_time)
    parts = NF4.quantize(weight)
    assert torch.equal(parts.codes, whole.codes) and torch.equal(parts.dequantize(), whole.dequantize())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantising_allocates_no_tensor_larger_than_the_codes(dtype, monkeypatch):
    sizes_in_bytes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            storages = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
            if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in storages:
                sizes_in_bytes.append(result.nbytes)
            return result

    monkeypatch.setattr(nf4, "CHUNK", 16)
    weight = normal(256, 512).to(dtype)
    with Watch():
        packed = NF4.quantize(weight)
    assert max(sizes_in_bytes) == packed.codes.nbytes == weight.numel() / 2


def test_a_number_takes_4_127_bits():
    packed = NF4.quantize(normal(1024, 1024))
    bits = 8 * sum(buffer.nbytes for buffer in packed.buffers()) / 1024**2
    assert bits == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-4) and round(bits, 3) == 4.127
    assert (packed.scale_codes.view(-1, SCALE_BLOCK).amax(dim=1) == 255).all()  # the whole range of codes is used


def test_the_state_dict_loads_into_another_module():
    first, second = NF4.quantize(normal(30, 50)), NF4.quantize(normal(30, 50, seed=1))
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.dequantize(), first.dequantize())
    assert not list(first.parameters())


@pytest.mark.parametrize("spread", [0, 0.5, 1])
def test_eight_bit_scales_hardly_increase_the_error(spread):
    weight = normal(512, 512, spread=spread)
    exact = distance(with_exact_scales(weight), weight)
    assert distance(NF4.quantize(weight).dequantize(), weight) < 1.005 * exact


def trained_layer(init: str, dtype: torch.dtype = torch.float32) -> LowRankLinear:
    """Return a quantised layer 30 -> 17 with a bias and factors changed as if trained, converted to `dtype`."""
    torch.manual_seed(0)
    layer = LowRankLinear.from_linear(torch.nn.Linear(30, 17), rank=3, alpha=6, init=init)
    quantize(layer)
    layer.A.data += 0.1 * torch.randn_like(layer.A)
    layer.B.data += 0.1 * torch.randn_like(layer.B)
    return layer.to(dtype)


@pytest.mark.parametrize("init", ["lora", "pissa"])
@pytest.mark.parametrize("rows", [(1,), (2, 40)])
def test_a_quantised_layer_has_the_output_and_gradients_of_its_dense_weight(init, rows):
    layer, x = trained_layer(init, torch.float64), torch.randn(*rows, 30, dtype=torch.float64, requires_grad=True)
    residual = layer.W.dequantize(torch.float64).T
    weight = residual + layer.scaling * layer.A @ layer.B
    output, expected = layer(x), x @ weight + layer.bias
    assert torch.allclose(output, expected, atol=1e-6)  # scales are float32
    upstream = torch.randn_like(output)
    grads = (torch.autograd.grad((y * upstream).sum(), (x, layer.A, layer.B)) for y in (output, expected))
    assert all(distance(a, b) < 1e-6 for a, b in zip(*grads, strict=True))
    assert torch.allclose(layer.weight.double(), weight.T, atol=1e-6)


@pytest.mark.parametrize("init", ["lora", "pissa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_teacher_of_a_quantised_model_equals_the_student_at_step_0(init, dtype):
    model = nn.Sequential(nn.Linear(30, 17).to(dtype))
    adapt(model, rank=3, init=init)
    x, W = torch.randn(5, 30, dtype=dtype), model[0].W.float()
    quantize(model[0])
    start = model(x)
    with pretrained(model):
        assert torch.equal(model(x), start)
    assert 0 < distance(model[0].weight, W) < 0.2  # the teacher is the quantised model, not the original
    model[0].A.data += 1
    model[0].B.data += 1
    with pretrained(model):
        assert torch.equal(model(x), start)


def test_no_dense_weight_is_saved_for_backward(monkeypatch):
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
    assert {tensor.shape for tensor in saved} == {x.shape, layer.A.shape, *(factor.shape for factor in layer.update())}
    y.sum().backward()
    assert len(dense) == 2 and dense[1]() is None


def test_a_quantised_model_can_be_merged_but_not_truncated():
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
def test_qpissa_has_a_smaller_error_than_qlora_if_the_spectrum_decays(decay, rank):
    torch.manual_seed(0)
    qlora, qpissa = errors(decaying(256, decay), rank)
    ratio = (qpissa.norm(p="nuc") / qlora.norm(p="nuc")).item()
    energy = (torch.arange(256) + 1.0) ** (-2 * decay)
    # For numbers from one distribution, the error is proportional to the norm of the quantised matrix: the ratio is
    # ‖W_res‖ / ‖W‖. If few directions hold most of W, its numbers are not normal; we measured a deviation of 9 %.
    assert ratio == pytest.approx((energy[rank:].sum() / energy.sum()).sqrt().item(), rel=0.15)
    assert ratio < 0.8


def test_qpissa_gains_little_if_the_spectrum_is_flat():
    torch.manual_seed(0)
    qlora, qpissa = errors(decaying(256, 0), 16)
    assert 0.95 < qpissa.norm(p="nuc") / qlora.norm(p="nuc") < 1.02  # √(1 − 16/256) = 0.97


def test_export_leaves_no_fake_tensors_in_the_table_of_levels(monkeypatch):
    """torch.export reads the levels as fake tensors, which must not be cached for the next forward pass."""
    monkeypatch.setattr(nf4, "TABLES", {})
    model = adapt(nn.Sequential(nn.Linear(30, 17)), rank=3)
    quantize(model[0])
    x = torch.randn(3, 30)
    y = model(x)
    nf4.TABLES.clear()
    torch.export.export(model, (x,))
    assert torch.equal(model(x), y)
