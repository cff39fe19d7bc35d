# SPDX-License-Identifier: MIT; from minibalora, see LICENSE there
"""The low-rank layer of LoRA and PiSSA, and four functions around it: adapt, pretrained, merge, evaluating.

This file needs only torch. It adapts any model made of `nn.Linear`; it knows nothing about losses, tokens or files.
LoRA: Hu et al., arXiv 2106.09685. PiSSA: Meng et al., arXiv 2404.02948. BA-LoRA starts from PiSSA: arXiv 2408.04556.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["LowRankLinear", "adapt", "adapted_layers", "evaluating", "factors_of", "initial_values", "install", "lora"]
__all__ += ["merge", "olora", "pissa", "pretrained"]

HEADS = {"lm_head", "score", "classifier", "pooler", "classification_head"}  # never adapted, as in all three papers
OWN = ("weight", "bias", "W", "A", "B", "A0", "B0", "scaling", "is_teacher")  # attributes that `_take_over` leaves out


class LowRankLinear(nn.Module):
    """Y = X W_res + s (X A) B + bias,  with  W_res = W − s A₀ B₀,  s = alpha / rank  (PiSSA, section 3).

    X: (..., m) -> Y: (..., n). The attribute `W` is the frozen *pre-trained* weight in PyTorch's layout: (n, m), the
    transpose of the paper's. A (m, r) and B (r, n) are trained, in float32 whatever the dtype of W. A0 and B0 are their
    frozen initial values; `lora` starts with B₀ = 0 and needs neither: both are None. `forward` computes the same
    sum in an order in which no large numbers cancel, so that rounding does no harm:

        X W_res + s (X A) B  =  X W + s X (A B − A₀ B₀)  =  X W + s (X (A − A₀) B + X A₀ (B − B₀))

    The teacher is X W. At step 0 both differences are 0: the student equals the pre-trained model to the last bit.
    """

    def __init__(self, linear: nn.Linear, A: Tensor, B: Tensor, scaling: float, keep_initial: bool):
        super().__init__()
        _take_over(self, linear)
        self.scaling, self.is_teacher = scaling, False
        self.W = _frozen(linear.weight)
        self.bias = None if linear.bias is None else _frozen(linear.bias)
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.A0 = _frozen(A.clone()) if keep_initial else None  # a parameter: DDP broadcasts buffers at every pass
        self.B0 = _frozen(B.clone()) if keep_initial else None

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, rank: int, alpha: float | None = None, init: str = "pissa"
    ) -> "LowRankLinear":
        """Wrap `linear` on its device. alpha=None means alpha = rank; init: see `factors_of`. Raises ValueError for
        a rank outside 1..min(m, n), an alpha that is not positive, an unknown init, a layer that is not a plain
        nn.Linear, and a weight that is not of a common float type, is on the meta device, or has infinite numbers."""
        _check(linear, rank, alpha)
        scaling = (rank if alpha is None else alpha) / rank
        return cls(linear, *factors_of(init)(linear.weight, rank, scaling), scaling, keep_initial=init != "lora")

    def forward(self, x: Tensor) -> Tensor:
        A, B, A0, B0, s = self.A, self.B, self.A0, self.B0, self.scaling
        y = self.pretrained_output(x)
        if self.is_teacher:
            return y
        if A0 is None:
            return y + s * (x @ A.to(x.dtype)) @ B.to(x.dtype)
        dA, dB = (A - A0).to(x.dtype), (B - B0).to(x.dtype)  # subtract in float32, then cast
        return y + s * ((x @ dA) @ B.to(x.dtype) + (x @ A0.to(x.dtype)) @ dB)

    def pretrained_output(self, x: Tensor) -> Tensor:
        """Return X W + bias (..., n), the teacher's output."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.pretrained_weight(x.dtype), bias)

    def pretrained_weight(self, dtype: torch.dtype) -> Tensor:
        """Return W (n, m) in `dtype`. `nf4.quantize` replaces W by a module that holds W_res in four bits.

        Raises ValueError for integers, in which W would be rounded to zeros.
        """
        is_known = isinstance(dtype, torch.dtype)  # torch.fx gives a proxy
        if is_known and not (dtype.is_floating_point or dtype.is_complex):
            raise ValueError(f"X is {dtype}: give floating-point numbers")
        if not isinstance(self.W, nn.Module):
            return self.W.to(dtype)
        residual = self.W.dequantize(dtype)
        if self.A0 is None:
            return residual
        return residual.addmm_(self.B0.T.to(dtype), self.A0.T.to(dtype), alpha=self.scaling)

    def update(self) -> tuple[Tensor, Tensor]:
        """Return ΔW as factors left (m, R) and right (R, n): ΔWᵀ = s · left @ right. R is r for `lora`, else 2r."""
        if self.A0 is None:
            return self.A, self.B
        return torch.cat([self.A - self.A0, self.A0], dim=1), torch.cat([self.B, self.B - self.B0], dim=0)

    def trained_update(self) -> tuple[Tensor, Tensor]:
        """Return the factors of ΔW in a form through which A and B get the gradients of `forward`."""
        return self.update()

    @property
    def weight(self) -> Tensor:
        """The dense (n, m) matrix that the layer applies now, as teacher or student, in the dtype of W."""
        W = self.pretrained_weight(self.W.dtype if isinstance(self.W, Tensor) else self.A.dtype)
        if self.is_teacher:
            return W
        left, right = (factor.to(W.dtype) for factor in self.trained_update())
        with torch.autocast(W.device.type, enabled=False):
            return torch.addmm(W, right.T, left.T, alpha=self.scaling)

    @property
    def delta(self) -> Tensor:
        """ΔW = s (A B − A₀ B₀)ᵀ, the learned change, as a dense (n, m) matrix in the dtype of A."""
        left, right = self.update()
        with torch.autocast(left.device.type, enabled=False):
            return self.scaling * (left @ right).T

    @property
    def residual(self) -> Tensor:
        """W_res = W − s A₀ B₀, (m, n) in the dtype of A: the frozen part of Y = X W_res + s (X A) B."""
        W = self.pretrained_weight(self.A.dtype).T
        with torch.autocast(W.device.type, enabled=False):
            return W if self.A0 is None else W - self.scaling * self.A0 @ self.B0

    def _apply(self, fn: Callable, recurse: bool = True):
        """Apply fn, such as .half()'s, but leave A, B, A₀ and B₀ in float32: rounded, A − A₀ would be wrong."""
        own = [parameter for name, parameter in self._parameters.items() if name not in ("W", "bias")]
        kept = {id(tensor) for parameter in own if parameter is not None for tensor in (parameter, parameter.grad)}

        def moved(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return tensor.to(new.device) if id(tensor) in kept and new.dtype.itemsize < 4 else new

        return super()._apply(moved, recurse)

    def get_extra_state(self) -> Tensor:  # puts s into the state_dict: A and B mean nothing without it
        return torch.tensor(self.scaling, dtype=torch.float64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        self.scaling = float(state)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.A.shape[1]}, scaling={self.scaling:g}"


def lora(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A Kaiming-uniform with a = √5, B zero, as in the LoRA reference code. weight (n, m) -> A (m, r), B (r, n)."""
    n, m = weight.shape
    A = torch.empty(m, rank, dtype=torch.float32, device="cpu")  # other GPUs would draw other numbers from one seed
    nn.init.kaiming_uniform_(A.T, a=5**0.5)  # LoRA keeps A as (r, m): the fan-in is m
    return A.to(weight.device), torch.zeros(rank, n, dtype=torch.float32, device=weight.device)


def pissa(weight: Tensor, rank: int, scaling: float, svd: Callable | None = None) -> tuple[Tensor, Tensor]:
    """A = U[:, :r] S[:r]^½ / √s, B = S[:r]^½ V[:, :r]ᵀ / √s with W = U S Vᵀ (PiSSA, section 3), in float32.

    weight (n, m) is Wᵀ. svd(W, rank) returns U, S and Vᵀ, approximations too: W_res absorbs their error.
    """
    W = weight.detach().T.float()
    U, S, Vh = torch.linalg.svd(W, full_matrices=False) if svd is None else svd(W, rank)
    root = (S[:rank] / scaling).sqrt()
    return (U[:, :rank] * root).contiguous(), (root[:, None] * Vh[:rank]).contiguous()


def olora(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A = R[:r]ᵀ, B = Q[:, :r]ᵀ with Wᵀ = Q R, in float32 (OLoRA, arXiv 2406.01775). weight (n, m) is Wᵀ."""
    Q, R = torch.linalg.qr(weight.detach().float())
    return R[:rank].T.contiguous(), Q.T[:rank].clone()  # a view would keep all of Q, which LAPACK has in columns


def factors_of(init: str) -> Callable[[Tensor, int, float], tuple[Tensor, Tensor]]:
    """Return the function (weight (n, m), rank, scaling) -> A (m, r), B (r, n) that `init` names: "lora", "olora",
    "pissa" (exact), "pissa_krylov_N" or "pissa_niter_N" (faster, see krylov.py). Raises ValueError for others."""
    if init in (exact := {"lora": lora, "pissa": pissa, "olora": olora}):
        return exact[init]
    try:
        if __package__:
            from .krylov import svd_named
        else:
            from krylov import svd_named
    except ImportError:  # this file was copied alone
        raise ValueError(f"unknown init {init!r}: give lora, olora or pissa") from None
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
    """Replace linears of `model` by LowRankLinear in place, freeze all but their A and B, and return the model.

    Modules that the model, or a part of it, names in an attribute `own_head` (for instance a new classifier) stay
    trainable, in float32; their initial values are kept for the teacher.
    targets: last parts of names ("q_proj") or dotted suffixes ("mlp.up_proj"); None means every linear but the heads.
    progress wraps the list of names, for instance `tqdm`, because the SVDs of a large model take minutes.
    factors(name, weight (n, m)) returns A (m, r) and B (r, n) of that layer; None means those of `init`.
    Queries, keys and values of nn.MultiheadAttention are not linears of their own, so they stay as they are.
    Raises ValueError, with the model unchanged, if the model is adapted already, if a target matches no linear, if two
    linears share a weight, if factors have other shapes, or if `LowRankLinear.from_linear` refuses a layer.
    """
    chosen, make = _chosen(model, targets), factors_of(init)
    for name, linear in chosen.items():
        _check(linear, rank, alpha, f"{name}: ", is_known=factors is not None)
    scaling, layers = (rank if alpha is None else alpha) / rank, {}
    for name in progress(list(chosen)):
        weight = chosen[name].weight
        A, B = make(weight, rank, scaling) if factors is None else factors(name, weight)
        n, m = weight.shape
        if (A.shape, B.shape) != ((m, rank), (rank, n)):
            raise ValueError(f"{name}: A is {tuple(A.shape)} and B {tuple(B.shape)}: give {(m, rank)} and {(rank, n)}")
        layers[name] = LowRankLinear(chosen[name], A, B, scaling, keep_initial=init != "lora")
    for module in _own_head(model):
        module._apply(lambda t: t.to(torch.promote_types(t.dtype, torch.float32)) if t.is_floating_point() else t)
    return install(model, layers)


def install(model: nn.Module, layers: dict[str, LowRankLinear]) -> nn.Module:
    """Put each layer in the place of the linear of that name and return the model. Freeze everything else but
    `own_head`, and register the initial value of each of its tensors beside it: weight0 beside weight."""
    if _head_with_initial(model):
        raise ValueError(
            "own_head has a tensor and another of the same name with a 0, where its initial value goes: rename one"
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
    """Return (name, layer) of every LowRankLinear in the model, in order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LowRankLinear)]


def initial_values(model: nn.Module) -> dict[str, Tensor]:
    """Return the initial values of all that is trained, by name: A0 for A, weight0 for the weight of a head."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: tensor for name, tensor in tensors.items() if name[-1] == "0" and name[:-1] in tensors}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Switch dropout off inside; give every module its own mode back afterwards, also after an exception."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield model.eval()
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def pretrained(model: nn.Module) -> Iterator[nn.Module]:
    """Make `model` the pre-trained model inside: the teacher of the consistency terms, on the student's own weights.

    A trained head takes its initial values. There is no gradient and no dropout. The student comes back afterwards,
    also after an exception. Raises ValueError if no layer is adapted, or if training changes something else: a
    parameter without an initial value, or the running means of a batch norm.
    """
    layers = [layer for _, layer in adapted_layers(model)]
    if not layers:
        raise ValueError("the model has no adapted layer, so there is no record of the pre-trained one: adapt first")
    head = [(tensor, tensor.data, initial) for _, _, tensor, initial in _head_with_initial(model)]
    known = {id(tensor) for tensor, _, _ in head}
    _check_rest_is_frozen(model, known | {id(p) for layer in layers for p in _trained(layer)})
    roles = [layer.is_teacher for layer in layers]
    try:
        for layer in layers:
            layer.is_teacher = True
        for tensor, _, initial in head:
            tensor.data = initial.data
        torch.clear_autocast_cache()  # it may hold casts of the trained head
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
    """Replace every LowRankLinear in place by a plain nn.Linear that computes the same, and return the model. If the
    model is itself a LowRankLinear, return the nn.Linear.

    W + ΔW is summed in float32, or float64 if W is, and rounded once, to the dtype of W (float32 if W is quantised). A
    trained head stays.
    Raises ValueError if nothing is adapted, or if FSDP2 shards a layer.
    """
    linears = {layer: nn.Linear(1, 1, device="meta") for _, layer in adapted_layers(model)}
    if not linears:
        raise ValueError("nothing to merge: the model has no adapted layer")
    if any(hasattr(parameter, "placements") for layer in linears for parameter in layer.parameters()):
        raise ValueError("the adapted layers are sharded: load their whole state_dict into an unsharded model first")
    for layer, linear in linears.items():
        _take_over(linear, layer)
        dtype = layer.W.dtype if isinstance(layer.W, Tensor) else layer.A.dtype
        wide = max(dtype, layer.A.dtype, key=lambda one: one.itemsize)
        linear.weight = _frozen((layer.pretrained_weight(wide) + layer.delta).to(dtype))
        linear.bias = layer.bias
    _replace(model, linears)
    for module, leaf, _, _ in _head_with_initial(model):
        delattr(module, f"{leaf}0")
    return linears.get(model, model)


def _trained(layer: LowRankLinear) -> list[Tensor]:
    """Return the parameters of the layer that may be trained: all but W, the bias and initial values."""
    return [p for name, p in layer.named_parameters() if name not in ("W", "bias") and not name.endswith("0")]


def _check_rest_is_frozen(model: nn.Module, known: set[int]) -> None:
    """Raise ValueError if training changes a tensor whose id is not in `known`."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in known:
            raise ValueError(f"{name} is trained, but its initial value is not kept: name its module in own_head")
    for name, module in model.named_modules():
        mean = getattr(module, "running_mean", None)
        if module.training and mean is not None and id(mean) not in known:
            raise ValueError(
                f"{name} has running means, which training changes: call its eval(), or name it in own_head"
            )


# Which linears are adapted, and which are refused.


def _chosen(model: nn.Module, targets: str | Iterable[str] | None) -> dict[str, nn.Module]:
    """Return name -> linear for `targets`; a linear that is registered twice counts once."""
    if done := {name.rpartition(".")[2] for name, _ in adapted_layers(model)}:
        raise ValueError(f"the model is adapted already, in {', '.join(sorted(done))}: merge it first")
    linears = _linears(model)
    wanted = [targets] if isinstance(targets, str) else list(targets or ())
    fitting = {target: {name for name in linears if f".{name}".endswith(f".{target}")} for target in wanted}
    unknown = [target for target, names in fitting.items() if not names]
    if unknown or not linears or (targets is not None and not wanted):
        there = ", ".join(sorted({name.rpartition(".")[2] for name in linears})) or "none"
        missing = f"is called {' or '.join(unknown)}" if unknown else "is to be adapted"
        raise ValueError(f"no linear layer {missing}: there are {there}, and heads, which are never adapted")
    names = set(linears) if targets is None else set().union(*fitting.values())
    chosen = {name: linear for name, linear in linears.items() if name in names}
    owners: dict[int, str] = {}
    for name, linear in chosen.items():
        if (other := owners.setdefault(id(linear.weight), name)) != name:
            raise ValueError(f"{other} and {name} share a weight, which would become two: leave one out of targets")
    return chosen


def _linears(model: nn.Module) -> dict[str, nn.Module]:
    """Return name -> linear without the heads. A head is known by its name, by `own_head`, by transformers'
    get_output_embeddings, or by a weight that it shares with an embedding. Linears of other types are included, so that
    `_check` refuses them instead of leaving them out silently."""
    heads = {*_own_head(model), *(getattr(m, "get_output_embeddings", lambda: None)() for m in model.modules())}
    linears = {name: module for name, module in model.named_modules() if name and _passes_for_linear(module)}
    others = set(model.modules()) - set(linears.values())
    tied = {id(parameter) for module in others for parameter in module._parameters.values()}
    heads |= {module for name, module in linears.items() if HEADS & {*name.split(".")} or id(module.weight) in tied}
    return {name: module for name, module in linears.items() if module not in heads}


def _passes_for_linear(module: nn.Module) -> bool:
    kind = type(module).__name__
    return isinstance(module, nn.Linear) or (("Linear" in kind or kind == "Conv1D") and hasattr(module, "weight"))


def _check(linear: nn.Module, rank: int, alpha: float | None, name: str = "", is_known: bool = False) -> None:
    """Refuse a layer that LowRankLinear cannot replace. is_known: A and B exist, so W may be on the meta device."""
    kind, own = type(linear).__name__, linear._parameters
    is_plain = getattr(type(linear), "forward", None) is nn.Linear.forward and {"weight", "bias"} <= own.keys()
    is_plain = is_plain and type(linear).__call__ is nn.Module.__call__
    is_replaced = {"forward", "_compiled_call_impl"} & vars(linear).keys()
    if not is_plain or is_replaced or nn.parameter.is_lazy(linear.weight) or hasattr(linear.weight, "placements"):
        why = "it has a forward of its own, or was pruned, parametrised, offloaded, compiled or sharded"
        raise ValueError(f"{name}this {kind} is not a plain nn.Linear ({why}): undo that, or leave it out of targets")
    if linear.weight.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"{name}the weight of this {kind} is {linear.weight.dtype}: convert it to a wider float first")
    if linear.weight.is_meta and not is_known:
        raise ValueError(f"{name}the weight of this {kind} is on the meta device: load it first")
    m, n = linear.in_features, linear.out_features
    if not 1 <= rank <= min(m, n):
        raise ValueError(f"{name}rank {rank} does not fit a {m} x {n} layer: give 1 to {min(m, n)}")
    if alpha is not None and not 0 < alpha < float("inf"):
        raise ValueError(f"{name}alpha is {alpha}: give a positive number")
    # aminmax allocates nothing and propagates NaN; it takes a tenth of isfinite's time
    if not linear.weight.is_meta and not torch.stack(linear.weight.aminmax()).isfinite().all():
        raise ValueError(f"{name}the weight of this {kind} has numbers that are not finite: load another checkpoint")


# Heads that are trained, and how one module takes the place of another.


def _own_head(model: nn.Module) -> list[nn.Module]:
    """Return the modules that stay trainable: the model, or a part of it as under DDP, names them in `own_head`."""
    named = [(part, vars(part).get("own_head", getattr(type(part), "own_head", ()))) for part in model.modules()]
    heads = [part.get_submodule(n) for part, names in named for n in ([names] if isinstance(names, str) else names)]
    return list(dict.fromkeys(inner for head in heads for inner in head.modules()))


def _head_with_initial(model: nn.Module) -> list[tuple[nn.Module, str, Tensor, Tensor]]:
    """Return (module, name, tensor, initial value) for each tensor of `own_head`; ValueError if FSDP shards one."""
    stores = [(module, module._parameters | module._buffers) for module in _own_head(model)]
    pairs = [(m, name, own[name], own[f"{name}0"]) for m, own in stores for name in own if f"{name}0" in own]
    if any(hasattr(tensor, mark) for _, _, tensor, _ in pairs for mark in ("placements", "_fsdp_flattened")):
        raise ValueError("the head in own_head is sharded: keep it whole, with ignored_params (FSDP1: ignored_states)")
    return pairs


def _take_over(new: nn.Module, old: nn.Module) -> None:
    """Give `new` the sizes, mode, hooks (their handles still work), buffers and other attributes of `old`."""
    own = {name: vars(old)[name].copy() for name in ("_parameters", "_buffers", "_modules")}
    vars(new).update(vars(old) | own)
    for store in (vars(new), new._parameters, new._modules):
        for name in (*OWN, *getattr(old, "extras", ())):  # extras: those of a layer in variants.py
            store.pop(name, None)


def _replace(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    """Replace modules in place, under every name that they are registered by."""
    for parent in list(model.modules()):
        parent._modules.update({name: replacements[m] for name, m in parent._modules.items() if m in replacements})


def _frozen(parameter: Tensor) -> nn.Parameter:
    """Return a parameter on the same storage that needs no gradient."""
    return nn.Parameter(parameter.detach(), requires_grad=False)
