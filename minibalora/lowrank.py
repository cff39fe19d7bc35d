# SPDX-License-Identifier: MIT; from minibalora, see LICENSE there
"""A linear layer whose weight is a frozen residual plus a trainable low-rank product, and what is done with it.

This file needs only torch. It adapts any model made of `nn.Linear`; it knows nothing of losses, tokens or files.
LoRA: Hu et al., arXiv 2106.09685. PiSSA: Meng et al., arXiv 2404.02948. BA-LoRA starts from PiSSA: arXiv 2408.04556.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["LowRankLinear", "adapt", "adapted_layers", "evaluating", "factors_of", "initial_values", "install", "lora"]
__all__ += ["merge", "pissa", "pretrained"]

HEADS = {"lm_head", "score", "classifier", "pooler", "classification_head"}  # left alone, as all three papers do
OWN = ("weight", "bias", "W", "A", "B", "A0", "B0", "scaling", "is_teacher")  # of a linear and a LowRankLinear


class LowRankLinear(nn.Module):
    """Y = X W_res + s (X A) B + bias,  with  W_res = W − s A₀ B₀,  s = alpha / rank  (PiSSA, section 3).

    X: (..., m) -> Y: (..., n). The attribute `W` is the *pre-trained* weight, frozen, as PyTorch stores it: (n, m), the
    transpose of the paper's. A (m, r) and B (r, n) are trained, in float32 whatever the dtype of W; A0 and B0 are their
    initial values, frozen. `lora` starts with B₀ = 0 and keeps neither: both are None. `forward` takes the same sum in
    an order in which nothing large cancels, so that rounding loses nothing:

        X W_res + s (X A) B  =  X W + s X (A B − A₀ B₀)  =  X W + s (X (A − A₀) B + X A₀ (B − B₀))

    The teacher is X W. At step 0 both differences are 0: the student is the pre-trained model to the last bit.
    """

    def __init__(self, linear: nn.Linear, A: Tensor, B: Tensor, scaling: float, keep_initial: bool):
        super().__init__()
        _take_over(self, linear)
        self.scaling, self.is_teacher = scaling, False
        self.W = _frozen(linear.weight)
        self.bias = None if linear.bias is None else _frozen(linear.bias)
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.A0 = _frozen(A.clone()) if keep_initial else None  # a parameter, since DDP sends buffers at every pass
        self.B0 = _frozen(B.clone()) if keep_initial else None

    @classmethod
    def from_linear(cls, linear: nn.Linear, rank: int, alpha: float | None = None, init: str = "pissa"):
        """Wrap `linear`, on its own device. alpha=None means alpha = rank; init: see `factors_of`. ValueError for a
        rank outside 1..min(m, n), an alpha that is not positive, an unknown init, or what is not a plain nn.Linear."""
        _check(linear, rank, alpha)
        scaling = (rank if alpha is None else alpha) / rank
        return cls(linear, *factors_of(init)(linear.weight, rank, scaling), scaling, keep_initial=init != "lora")

    def forward(self, x: Tensor) -> Tensor:
        A, B, A0, B0, s = self.A, self.B, self.A0, self.B0, self.scaling
        y = F.linear(x, self.pretrained_weight(x.dtype), self.bias)  # X W
        if self.is_teacher:
            return y
        if A0 is None:
            return y + s * (x @ A.to(x.dtype)) @ B.to(x.dtype)
        dA, dB = (A - A0).to(x.dtype), (B - B0).to(x.dtype)  # first the difference, then x's dtype
        return y + s * ((x @ dA) @ B.to(x.dtype) + (x @ A0.to(x.dtype)) @ dB)

    def pretrained_weight(self, dtype: torch.dtype) -> Tensor:
        """W (n, m) in `dtype`. `nf4.quantize` puts a module in the place of W, which holds W_res in four bits."""
        if isinstance(self.W, Tensor):
            return self.W.to(dtype)
        residual = self.W.dequantize(dtype)
        if self.A0 is None:
            return residual
        return residual.addmm_(self.B0.T.to(dtype), self.A0.T.to(dtype), alpha=self.scaling)

    def update(self) -> tuple[Tensor, Tensor]:
        """ΔW as two factors, ΔWᵀ = s · left @ right; (m, R) and (R, n), R = r for `lora`, otherwise 2r."""
        if self.A0 is None:
            return self.A, self.B
        return torch.cat([self.A - self.A0, self.A0], dim=1), torch.cat([self.B, self.B - self.B0], dim=0)

    @property
    def weight(self) -> Tensor:
        """The dense (n, m) matrix that the layer acts as now, teacher or student, in the dtype of W."""
        W = self.pretrained_weight(self.W.dtype if isinstance(self.W, Tensor) else self.A.dtype)
        if self.is_teacher:
            return W
        left, right = (factor.to(W.dtype) for factor in self.update())
        with torch.autocast(W.device.type, enabled=False):
            return torch.addmm(W, right.T, left.T, alpha=self.scaling)

    @property
    def delta(self) -> Tensor:
        """ΔW = s (A B − A₀ B₀)ᵀ, what was learned, as a dense (n, m) matrix in the dtype of A."""
        left, right = self.update()
        return self.scaling * (left @ right).T

    @property
    def residual(self) -> Tensor:
        """W_res = W − s A₀ B₀, (m, n) in the dtype of A: the frozen part of Y = X W_res + s (X A) B."""
        W = self.pretrained_weight(self.A.dtype).T
        return W if self.A0 is None else W - self.scaling * self.A0 @ self.B0

    def get_extra_state(self) -> Tensor:  # without s, a state_dict would not say what its A and B mean
        return torch.tensor(self.scaling, dtype=torch.float64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        self.scaling = float(state)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.A.shape[1]}, scaling={self.scaling:g}"


def lora(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A: Kaiming-uniform with a = √5, B: zero, as the LoRA reference does. weight (n, m) -> (m, r), (r, n)."""
    n, m = weight.shape
    A = torch.empty(m, rank, dtype=torch.float32, device=weight.device)
    nn.init.kaiming_uniform_(A.T, a=5**0.5)  # LoRA keeps A as (r, m): the fan-in is m
    return A, torch.zeros(rank, n, dtype=torch.float32, device=weight.device)


def pissa(weight: Tensor, rank: int, scaling: float, svd: Callable | None = None) -> tuple[Tensor, Tensor]:
    """A = U[:, :r] S[:r]^½ / √s, B = S[:r]^½ V[:, :r]ᵀ / √s with W = U S Vᵀ (PiSSA, section 3), in float32.

    weight (n, m) is Wᵀ. svd(W, rank) finds U, S and Vᵀ in place of the exact SVD: W_res makes up for what it misses.
    """
    W = weight.detach().T.float()
    U, S, Vh = torch.linalg.svd(W, full_matrices=False) if svd is None else svd(W, rank)
    root = (S[:rank] / scaling).sqrt()
    return (U[:, :rank] * root).contiguous(), (root[:, None] * Vh[:rank]).contiguous()


def factors_of(init: str) -> Callable[[Tensor, int, float], tuple[Tensor, Tensor]]:
    """The function (weight (n, m), rank, scaling) -> A (m, r), B (r, n) of "lora", "pissa" (the exact SVD), or
    "pissa_krylov_N" and "pissa_niter_N" (faster, see krylov.py). ValueError for any other name."""
    if init in ("lora", "pissa"):
        return lora if init == "lora" else pissa
    try:
        from minibalora.krylov import svd_named
    except ImportError:  # this file was copied alone
        raise ValueError(f"unknown init {init!r}: give lora or pissa") from None
    return partial(pissa, svd=svd_named(init))


def adapt(
    model: nn.Module,
    rank: int = 8,
    alpha: float | None = None,
    init: str = "pissa",
    targets: str | Iterable[str] | None = None,
    progress: Callable[[list], Iterable] = iter,
    factors: Callable[[str, Tensor], tuple[Tensor, Tensor]] | None = None,
) -> nn.Module:
    """Replace linears of `model` by LowRankLinear, in place; freeze everything but their A and B; return the model.

    What a model, or a part of it, names in an attribute `own_head`, for instance a new classifier, stays trainable, in
    float32, and its initial values are kept for the teacher.
    targets: the last part of the names of linears ("q_proj") or a dotted suffix ("mlp.up_proj"); None = every linear
    but the heads. progress wraps the list of names, for instance `tqdm`: the SVDs of a large model take minutes.
    factors: A (m, r) and B (r, n) of the layer of that name from its weight (n, m); None = as `init` says.
    ValueError, with the model unchanged, if it is adapted already, if a target matches no linear, or if a layer is
    refused, see `LowRankLinear.from_linear`.
    """
    chosen, make = _chosen(model, targets), factors_of(init)
    for name, linear in chosen.items():
        _check(linear, rank, alpha, f"{name}: ", is_known=factors is not None)
    scaling, layers = (rank if alpha is None else alpha) / rank, {}
    for name in progress(list(chosen)):
        weight = chosen[name].weight
        A, B = make(weight, rank, scaling) if factors is None else factors(name, weight)
        layers[name] = LowRankLinear(chosen[name], A, B, scaling, keep_initial=init != "lora")
    for module in _own_head(model):
        module._apply(lambda t: t.to(torch.promote_types(t.dtype, torch.float32)) if t.is_floating_point() else t)
    return install(model, layers)


def install(model: nn.Module, layers: dict[str, LowRankLinear]) -> nn.Module:
    """Put each layer in the place of the linear of that name, in place; nothing else but `own_head` stays trainable,
    and beside each of its tensors stands the initial value, weight0 beside weight. Returns the model."""
    if _head_with_initial(model):
        raise ValueError(
            "a name in own_head and the same with a 0 are both taken: the 0 is for initial values, rename it"
        )
    model.requires_grad_(False)
    _replace(model, {model.get_submodule(name): layer for name, layer in layers.items()})
    for module in _own_head(model):
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            module.register_parameter(f"{leaf}0", _frozen(parameter.clone()))
            parameter.requires_grad_(True)
        for leaf, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(f"{leaf}0", buffer.clone())
    return model


def adapted_layers(model: nn.Module) -> list[tuple[str, LowRankLinear]]:
    """(name, layer) of every LowRankLinear in the model, in order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LowRankLinear)]


def initial_values(model: nn.Module) -> dict[str, Tensor]:
    """What was trained, as it was before, by its name and 0: A0 of A, weight0 of a head's weight."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: tensor for name, tensor in tensors.items() if name[-1] == "0" and name[:-1] in tensors}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, nothing drops out; every module gets its own mode back afterwards, also after an exception."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield model.eval()
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def pretrained(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, `model` is the pre-trained model: the teacher of the consistency terms, on the student's own weights.

    A trained head is the initial one. No gradient, no dropout; all comes back afterwards, also after an exception.
    ValueError without an adapted layer, or if something is trained whose initial value is kept nowhere.
    """
    layers = [layer for _, layer in adapted_layers(model)]
    if not layers:
        raise ValueError("the model has no adapted layer, so there is no record of the pre-trained one: adapt first")
    head = [(tensor, tensor.data, initial) for _, _, tensor, initial in _head_with_initial(model)]
    known = {id(factor) for layer in layers for factor in (layer.A, layer.B)} | {id(tensor) for tensor, _, _ in head}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in known:
            raise ValueError(f"{name} is trained, but its initial value is not kept: name its module in own_head")
    roles = [layer.is_teacher for layer in layers]
    try:
        for layer in layers:
            layer.is_teacher = True
        for tensor, _, initial in head:
            tensor.data = initial.data
        torch.clear_autocast_cache()  # it would go on with the casts of the trained head
        with evaluating(model), torch.no_grad():
            yield model
    finally:
        for layer, role in zip(layers, roles, strict=True):
            layer.is_teacher = role
        for tensor, trained, _ in head:
            tensor.data = trained
        torch.clear_autocast_cache()


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Replace every LowRankLinear by the plain nn.Linear that it acts as, in place; return the model.

    The sum is taken in float32 and rounded once, to W's dtype (float32 if it is quantised); a trained head stays.
    ValueError if nothing is adapted.
    """
    linears = {layer: nn.Linear(1, 1, device="meta") for _, layer in adapted_layers(model)}
    if not linears:
        raise ValueError("nothing to merge: the model has no adapted layer")
    for layer, linear in linears.items():
        _take_over(linear, layer)
        weight = layer.pretrained_weight(layer.A.dtype) + layer.delta
        linear.weight = _frozen(weight.to(layer.W.dtype) if isinstance(layer.W, Tensor) else weight)
        linear.bias = layer.bias
    _replace(model, linears)
    for module, leaf, _, _ in _head_with_initial(model):
        delattr(module, f"{leaf}0")
    return model


# Which linears are adapted, and what is refused.


def _chosen(model: nn.Module, targets: str | Iterable[str] | None) -> dict[str, nn.Module]:
    """Name -> linear, of those that `targets` ask for; every linear once, also where it is registered twice."""
    if done := {name.rpartition(".")[2] for name, _ in adapted_layers(model)}:
        raise ValueError(f"the model is adapted already, in {', '.join(sorted(done))}: merge it first")
    linears = _linears(model)
    wanted = [targets] if isinstance(targets, str) else list(targets or ())
    fitting = {target: {name for name in linears if f".{name}".endswith(f".{target}")} for target in wanted}
    unknown = [target for target, names in fitting.items() if not names]
    if unknown or not linears or (targets is not None and not wanted):
        there = ", ".join(sorted({name.rpartition(".")[2] for name in linears})) or "none"
        missing = f"is called {' or '.join(unknown)}" if unknown else "is to be adapted"
        raise ValueError(f"no linear layer {missing}: there are {there}, and heads, which stay as they are")
    names = set(linears) if targets is None else set().union(*fitting.values())
    return {name: linear for name, linear in linears.items() if name in names}


def _linears(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> linear, without the heads: by name, by `own_head`, by transformers' word, or tied to an embedding. What
    only passes for a linear is there too: `_check` refuses it, so that nothing is left out in silence."""
    heads = {*_own_head(model), *(getattr(m, "get_output_embeddings", lambda: None)() for m in model.modules())}
    found = {name: module for name, module in model.named_modules() if name and _passes_for_linear(module)}
    owners = set(model.modules()) - set(found.values())
    tied = {id(parameter) for module in owners for parameter in module._parameters.values()}
    left_alone = [name for name, module in found.items() if module in heads or id(module.weight) in tied]
    return {n: module for n, module in found.items() if n not in left_alone and not HEADS & {*n.split(".")}}


def _passes_for_linear(module: nn.Module) -> bool:
    kind = type(module).__name__
    return isinstance(module, nn.Linear) or (("Linear" in kind or kind == "Conv1D") and hasattr(module, "weight"))


def _check(linear: nn.Module, rank: int, alpha: float | None, name: str = "", is_known: bool = False) -> None:
    """Refuse what LowRankLinear can't stand for. is_known: A and B are known, so the numbers of W are not needed."""
    kind, own = type(linear).__name__, linear._parameters
    is_plain = getattr(type(linear), "forward", None) is nn.Linear.forward and {"weight", "bias"} <= own.keys()
    is_replaced = {"forward", "_compiled_call_impl"} & vars(linear).keys()
    if not is_plain or is_replaced or nn.parameter.is_lazy(linear.weight) or hasattr(linear.weight, "placements"):
        why = "it computes something of its own, or was pruned, parametrised, offloaded, compiled or sharded"
        raise ValueError(f"{name}this {kind} is not a plain nn.Linear ({why}): undo that, or leave it out of targets")
    if linear.weight.is_meta and not is_known:
        raise ValueError(f"{name}the weight of this {kind} is on the meta device: load it first")
    m, n = linear.in_features, linear.out_features
    if not 1 <= rank <= min(m, n):
        raise ValueError(f"{name}rank {rank} does not fit a {m} x {n} layer: give 1 to {min(m, n)}")
    if alpha is not None and not 0 < alpha < float("inf"):
        raise ValueError(f"{name}alpha is {alpha}: give a positive number")


# How modules keep what they have, and take each other's place.


def _own_head(model: nn.Module) -> list[nn.Module]:
    """The modules that stay trainable: what a model, or a part of it as under DDP, names in `own_head`."""
    named = [(part, vars(part).get("own_head", getattr(type(part), "own_head", ()))) for part in model.modules()]
    heads = [part.get_submodule(n) for part, names in named for n in ([names] if isinstance(names, str) else names)]
    return list(dict.fromkeys(inner for head in heads for inner in head.modules()))


def _head_with_initial(model: nn.Module) -> list[tuple[nn.Module, str, Tensor, Tensor]]:
    """(module, name, tensor, its initial value) of what `install` kept; ValueError if it is sharded."""
    stores = [(module, module._parameters | module._buffers) for module in _own_head(model)]
    found = [(m, name, own[name], own[f"{name}0"]) for m, own in stores for name in own if f"{name}0" in own]
    if any(hasattr(tensor, "placements") for _, _, tensor, _ in found):
        raise ValueError("the head in own_head is sharded (a DTensor): keep it whole, with ignored_params")
    return found


def _take_over(new: nn.Module, old: nn.Module) -> None:
    """Give `new` all that `old` carries but its numbers: sizes, mode, hooks (whose handles go on to work), buffers."""
    own = {name: vars(old)[name].copy() for name in ("_parameters", "_buffers", "_modules")}
    vars(new).update(vars(old) | own)
    for store in (vars(new), new._parameters, new._modules):
        for name in OWN:
            store.pop(name, None)


def _replace(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    """In place, under every name that a module has."""
    for parent in list(model.modules()):
        parent._modules.update({name: replacements[m] for name, m in parent._modules.items() if m in replacements})


def _frozen(parameter: Tensor) -> nn.Parameter:
    """The same storage, without gradient."""
    return nn.Parameter(parameter.detach(), requires_grad=False)
