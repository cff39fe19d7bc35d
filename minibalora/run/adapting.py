"""Adapt a model as `settings.Adaptation` says. Factors come from a checkpoint, a cache or another rank if possible."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from minibalora import nf4
from minibalora.base import distributed, progress
from minibalora.base.errors import InputError
from minibalora.checkpoints.weights import read
from minibalora.lean_product import use_lean_product
from minibalora.lowrank import adapt, adapted_layers, factors_of
from minibalora.run.checkpoint import load_initial_values
from minibalora.run.init_cache import cached_factors
from minibalora.run.settings import Adaptation, Hardware
from minibalora.truncate import truncate
from minibalora.variants import VARIANTS, fold, use


def adapt_model(
    model: nn.Module, adaptation: Adaptation, hardware: Hardware, seed: int, resumed: Path | None = None
) -> None:
    """Adapt the model in place, with a progress bar; then take the lean product, quantise, and make it the variant that
    `adaptation.method` names, as asked. A variant has no lean product.

    resumed: the folder of the run to continue, whose checkpoint has the factors: no SVD is needed. Several ranks share
    the SVDs: one rank computes each layer's factors for all. Raises InputError if rank or targets do not fit.
    """
    bar = partial(progress.over, name=adaptation.init, unit="layer", is_shown=distributed.is_main())
    comes_later = adaptation.init != "lora" and (resumed is not None or distributed.is_torchrun())

    def factors(_, weight: Tensor) -> tuple[Tensor, Tensor]:
        if comes_later:
            return empty_factors(weight, adaptation.rank, hardware.device)
        return first_factors(weight, adaptation, hardware.device)

    shape = adaptation.rank, adaptation.alpha, adaptation.init, adaptation.targets
    try:
        adapt(model, *shape, progress=iter if comes_later else bar, factors=factors)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"--model, --rank or --targets: {error}") from None
    if comes_later and resumed is not None:
        take_initial_values(model, resumed)
    elif comes_later:
        deal_factors(model, adaptation, hardware, seed, bar)
    if not adaptation.is_plain and adaptation.method not in VARIANTS:
        use_lean_product(model)
    if adaptation.quantize:
        for _, layer in adapted_layers(model):  # one layer at a time is on the device unquantised
            nf4.quantize(layer.to(hardware.device))
        model.to(hardware.device)
    if adaptation.method in VARIANTS:
        use(model, adaptation.method, **adaptation.settings)


@torch.no_grad()
def take_initial_values(model: nn.Module, folder: Path) -> None:
    """Load A₀ and B₀ from the checkpoint in `folder`, also into A and B: the student is then the pre-trained model."""
    load_initial_values(folder, model)
    for _, layer in adapted_layers(model):
        layer.A.copy_(layer.A0)
        layer.B.copy_(layer.B0)


def truncate_adapter(model: nn.Module, rank: int | None) -> None:
    """Reduce the learned change to --adapter-rank, before it is measured and saved."""
    if rank is not None:
        error = truncate(fold(model), rank)
        print(f"adapter of at most rank {rank}: relative error {error:.2e} of the change in the weights")


def empty_factors(weight: Tensor, rank: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Return zeros of the shapes of A (m, r) and B (r, n) for a weight (n, m)."""
    n, m = weight.shape
    return torch.zeros(m, rank, device=device), torch.zeros(rank, n, device=device)


def first_factors(weight: Tensor, adaptation: Adaptation, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return A and B for a weight (n, m), on the run's device, as --init says, or from --init-cache."""
    rank, scaling = adaptation.rank, adaptation.alpha / adaptation.rank
    if adaptation.init == "lora":  # only the shape matters
        weight = torch.empty(1, device=device).expand(weight.shape)
    weight = weight.to(device)
    if adaptation.init_cache is None:
        return factors_of(adaptation.init)(weight, rank, scaling)
    return cached_factors(adaptation.init_cache, rank, scaling, adaptation.init, weight)


@torch.no_grad()
def deal_factors(
    model: nn.Module, adaptation: Adaptation, hardware: Hardware, seed: int, bar: Callable[[list], Iterable]
) -> None:
    """Compute each layer's PiSSA factors on one rank in turn, and copy them to A, B, A₀ and B₀ on all ranks.

    Only that rank reads a weight which the model does not hold yet. The random numbers of pissa_niter_N depend on seed
    and layer: the same on any number of ranks, but others than in a run without torchrun.
    """
    layers = list(enumerate(adapted_layers(model)))
    for index, (name, layer) in bar(layers[distributed.rank() :: distributed.size()]):
        torch.manual_seed(seed + index)
        stored = f"{name}.weight"
        is_loaded = not layer.W.is_meta
        W = layer.W if is_loaded else read(model.checkpoint.stored[stored], stored, hardware.dtype, hardware.device)
        A, B = first_factors(W, adaptation, hardware.device)
        layer.A.copy_(A)
        layer.B.copy_(B)
    for index, (_, layer) in layers:
        distributed.broadcast((layer.A, layer.B), source=index % distributed.size())
        layer.A0.copy_(layer.A)
        layer.B0.copy_(layer.B)
