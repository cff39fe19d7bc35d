"""Tests of truncation to a smaller rank: the best approximation, its reported error, and the teacher."""

import pytest
import torch
from helpers import distance
from test_lowrank import net

from minibalora.lowrank import adapt, adapted_layers, pretrained
from minibalora.truncate import best_factors, truncate


@pytest.mark.parametrize("shape", [(9, 4, 7), (5, 8, 6), (6, 3, 3), (4, 4, 4)])  # m, R, n
@pytest.mark.parametrize("rank", [1, 2, 3, 9])
def test_best_factors_equal_the_truncated_svd(shape, rank):
    m, R, n = shape
    left, right = torch.randn(m, R), torch.randn(R, n)
    A, B, singular_values = best_factors(left, right, rank)
    assert A.shape[1] == B.shape[0] == min(rank, *shape)
    U, S, Vh = torch.linalg.svd(left.double() @ right.double(), full_matrices=False)
    k = min(rank, len(S))
    assert distance(A @ B, U[:, :k] * S[:k] @ Vh[:k]) < 1e-5
    assert distance(singular_values, S[: len(singular_values)]) < 1e-5


@pytest.mark.parametrize("rank", [1, 3, 6, 50])
@pytest.mark.parametrize("init", ["pissa", "lora"])
@torch.no_grad()
def test_truncate_returns_its_relative_error_and_keeps_the_teacher(rank, init):
    model = adapt(net(), rank=3, alpha=5, init=init)
    x = torch.randn(4, 12)
    with pretrained(model):
        teacher = model(x)
    for _, layer in adapted_layers(model):
        layer.A += 0.1 * torch.randn_like(layer.A)
        layer.B += 0.1 * torch.randn_like(layer.B)
    before = [layer.delta.double() for _, layer in adapted_layers(model)]
    error = truncate(model, rank)
    after = [layer.delta.double() for _, layer in adapted_layers(model)]
    squares = sum((a - b).square().sum() for a, b in zip(after, before, strict=True))
    assert error == pytest.approx((squares / sum(b.square().sum() for b in before)).sqrt().item(), rel=1e-3, abs=1e-6)
    assert (error < 1e-6) == (rank >= (6 if init == "pissa" else 3))
    with pretrained(model):
        assert torch.equal(model(x), teacher)


@pytest.mark.parametrize("rank", [0, -1, 2.0, None])
def test_a_rank_that_is_no_integer_from_1_up_is_refused(rank):
    model = adapt(net(), rank=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"rank is {rank}: give an integer"):
        truncate(model, rank)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_truncating_an_untrained_model_has_no_error():
    model = adapt(net(), rank=2)
    assert truncate(model, 1) == 0
    assert all((layer.delta == 0).all() for _, layer in adapted_layers(model))
    with pytest.raises(ValueError, match="nothing to truncate"):
        truncate(net(), 1)
