"""A linear layer whose weight is a frozen residual plus a trainable low-rank product, and what is done with it.

This file needs only torch. It adapts any model made of `nn.Linear`; it knows nothing of losses, tokens or files.

LoRA: Hu et al., arXiv 2106.09685. PiSSA: Meng et al., arXiv 2404.02948. BA-LoRA starts from PiSSA: arXiv 2408.04556.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

HEADS = ("lm_head", "score", "classifier", "pooler")  # adapt leaves these alone, as all three papers do


class LowRankLinear(nn.Module):
    """Y = X W_res + s (X A) B + bias,  with  W_res = W − s A₀ B₀,  s = alpha / rank  (PiSSA, section 3).

    X: (..., m) -> Y: (..., n). W is the pre-trained weight in the paper's orientation (m, n); PyTorch stores its
    transpose. A: (m, r) and B: (r, n) are trained, in float32 whatever the dtype of W; A₀ and B₀ are their initial
    values, which a teacher needs anyway (`lora` starts with B₀ = 0, so it keeps none).

    The forward pass never forms W_res. It takes the same sum in another order, which loses nothing:

        X W_res + s (X A) B  =  X W + s X (A B − A₀ B₀)  =  X W + s (X [A − A₀, A₀]) [B; B − B₀]

    so the teacher (X W) and the student at step 0 (where both differences are 0) are the pre-trained model to the last
    bit, and what a first small step changes is not lost in rounding. `python tests/bench_storage.py` measured, on 2 CPU
    cores (m = n = 2048, r = 128, 512 rows), error at step 0 in units of the pre-trained layer's own, error of a first
    small step in units of that step, bytes a frozen weight, and the time of a forward and backward pass:

                                             bfloat16                       float32
        W_res rounded to W's dtype           2.13   4.1    2 B   14 ms      1.54   5e-4   4 B   55 ms
        W_res in float32                     1.00   1.9    4 B   54 ms      1.54   5e-4   4 B   54 ms
        X W − s (X A₀) B₀ + s (X A) B        1.00   3.8    2 B   14 ms      1.00   5e-4   4 B   61 ms
        differences first, as here           1.00   0.84   2 B   15 ms      1.00   3e-5   4 B   64 ms

    (0.84 is the rounding of Y itself.) For the backward pass autograd keeps X, which every layer that reads X shares,
    and nothing else: see `_LearnedChange`.
    """

    def __init__(self, linear: nn.Linear, A: Tensor, B: Tensor, scaling: float, keep_initial: bool):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scaling = scaling
        self.W = _frozen(linear.weight)  # (n, m)
        self.bias = None if linear.bias is None else _frozen(linear.bias)
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.register_buffer("A0", A.clone() if keep_initial else None)
        self.register_buffer("B0", B.clone() if keep_initial else None)
        self.is_teacher = False

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        rank: int,
        alpha: float | None = None,
        init: str = "pissa",
        factors: tuple[Tensor, Tensor] | None = None,
    ):
        """Wrap `linear`, on its own device. alpha=None means alpha = rank.

        init: "lora", "pissa" (exact SVD) or "pissa_niter_N" (randomised SVD, N subspace iterations).
        factors: A and B of that init, where they are known already.
        Raises ValueError for a rank outside 1..min(m, n), a scaling that is not positive, or an unknown init.
        """
        _check_settings(linear, rank, alpha, init)
        scaling = (rank if alpha is None else alpha) / rank
        if factors is None and init == "lora":
            factors = lora_factors(linear.weight, rank)
        elif factors is None:
            factors = pissa_factors(linear.weight, rank, scaling, init)
        return cls(linear, *factors, scaling, keep_initial=init != "lora")

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.W, self.bias)
        if self.is_teacher:
            return y
        return _LearnedChange.apply(y, x, self.A, self.B, self.A0, self.B0, self.scaling)

    def update(self) -> tuple[Tensor, Tensor]:
        """The learned change as two factors, W_now = W + s · left @ right; (m, R) and (R, n), R = r or 2r, float32."""
        return _change(self.A, self.B, self.A0, self.B0)

    @property
    def residual(self) -> Tensor:
        """W_res = W − s A₀ B₀ as an (m, n) tensor in float32: the frozen part of Y = X W_res + s (X A) B."""
        W = self.W.T.float()
        return W if self.A0 is None else W - self.scaling * self.A0 @ self.B0

    @property
    def delta(self) -> Tensor:
        """ΔW, what was learned, as a dense (n, m) = (out, in) matrix in float32."""
        left, right = self.update()
        return self.scaling * (left @ right).T

    @property
    def weight(self) -> Tensor:
        """The dense (n, m) = (out, in) matrix that the layer acts as, in float32."""
        return self.W.float() + self.delta

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.A.shape[1]}, scaling={self.scaling:g}"


def _change(A: Tensor, B: Tensor, A0: Tensor | None, B0: Tensor | None) -> tuple[Tensor, Tensor]:
    """A B − A₀ B₀ = (A − A₀) B + A₀ (B − B₀) as two factors: differences first, so that nothing large cancels."""
    if A0 is None:
        return A, B
    return torch.cat([A - A0, A0], dim=1), torch.cat([B, B - B0], dim=0)


class _LearnedChange(torch.autograd.Function):
    """Y + s X (A B − A₀ B₀), keeping for its backward pass X alone; what autograd would keep is computed once more.

    With D = s dY:  dX = D (A B − A₀ B₀)ᵀ,  dA = Xᵀ (D Bᵀ),  dB = (X A)ᵀ D,  and the gradient of Y is dY. So a PiSSA
    layer's dA and dB cost what LoRA's do, while autograd would also find those of A₀ and B₀. Products are in X's dtype.
    """

    @staticmethod
    def forward(ctx, y: Tensor, x: Tensor, A: Tensor, B: Tensor, A0: Tensor | None, B0: Tensor | None, s: float):
        ctx.save_for_backward(x, A, B, A0, B0)
        ctx.scaling = s
        left, right = (factor.to(x.dtype) for factor in _change(A, B, A0, B0))
        return torch.addmm(y.flatten(0, -2), x.flatten(0, -2) @ left, right, alpha=s).view(y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, A, B, A0, B0 = ctx.saved_tensors
        rows, D = x.flatten(0, -2), ctx.scaling * dy.flatten(0, -2)
        dA = (rows.T @ (D @ B.T.to(x.dtype))).to(A.dtype)
        dB = ((rows @ A.to(x.dtype)).T @ D).to(B.dtype)
        dx = None
        if ctx.needs_input_grad[1]:
            left, right = (factor.to(x.dtype) for factor in _change(A, B, A0, B0))
            dx = (D @ right.T @ left.T).view(x.shape)
        return dy, dx, dA, dB, None, None, None


def lora_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A: Kaiming-uniform with a = √5, B: zero, as the LoRA reference does. weight (n, m) -> (m, r), (r, n)."""
    n, m = weight.shape
    A = torch.empty(m, rank, dtype=torch.float32, device=weight.device)
    nn.init.kaiming_uniform_(A.T, a=5**0.5)  # LoRA keeps A as (r, m): the fan-in is m
    return A, torch.zeros(rank, n, dtype=torch.float32, device=weight.device)


def pissa_factors(weight: Tensor, rank: int, scaling: float, init: str) -> tuple[Tensor, Tensor]:
    """A = U[:, :r] S[:r]^½ / √s, B = S[:r]^½ V[:, :r]ᵀ / √s with W = U S Vᵀ (PiSSA, section 3), in float32.

    weight is (n, m), W its transpose. "pissa" is the exact SVD; "pissa_niter_N" is PEFT's name for the randomised
    one of Halko et al. (arXiv 0909.4061) with N subspace iterations.
    """
    W = weight.detach().T.float()
    if init == "pissa":
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        U, S, Vh = U[:, :rank], S[:rank], Vh[:rank]
    else:
        U, S, V = torch.svd_lowrank(W, q=rank, niter=int(init.removeprefix("pissa_niter_")))
        Vh = V.T
    root = (S / scaling).sqrt()
    return (U * root).contiguous(), (root[:, None] * Vh).contiguous()


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

    A model may name modules in `model.own_head`, as a classifier does with its new head: they stay trainable, in
    float32, and their initial values are kept for the teacher.

    targets: the last part of the names of linears ("q_proj") or a dotted suffix ("mlp.up_proj"); None = every linear
    but the heads. progress wraps the list of layers, for instance `tqdm`: an SVD of a large model takes minutes.
    factors: A (m, r) and B (r, n) of the layer of that name from its weight (n, m); None = as `init` says.
    Raises ValueError, with the model unchanged, if it is adapted already, if a target matches nothing (the message
    lists the names there are), or if a layer refuses (see LowRankLinear.from_linear).
    """
    if done := _last_parts(name for name, _ in adapted_layers(model)):
        raise ValueError(f"the model is adapted already, in {', '.join(done)}: merge it first")
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear and name}
    linears = {name: module for name, module in linears.items() if not set(HEADS) & set(name.split("."))}
    wanted = list(linears) if targets is None else [targets] if isinstance(targets, str) else list(targets)
    chosen = [name for name in linears if any(_matches(name, target) for target in wanted)]
    unknown = [target for target in wanted if not any(_matches(name, target) for name in linears)]
    if unknown or not chosen:
        missing = ", ".join(unknown) or "an empty list"
        raise ValueError(f"no linear layer is named {missing}: there are {', '.join(_last_parts(linears)) or 'none'}")

    for name in chosen:
        try:
            _check_settings(linears[name], rank, alpha, init)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    layers = {
        name: LowRankLinear.from_linear(
            linears[name], rank, alpha, init, factors and factors(name, linears[name].weight)
        )
        for name in progress(chosen)
    }
    for module in _own_head(model):
        module.float()
    return install(model, layers)


def install(model: nn.Module, layers: dict[str, LowRankLinear]) -> nn.Module:
    """Put each layer in the place of the linear of that name, in place; nothing else but `model.own_head` stays
    trainable, and its initial values are kept beside it. Returns the model."""
    model.requires_grad_(False)
    for name, layer in layers.items():
        _replace(model, name, layer.train(model.get_submodule(name).training))
    for module in _own_head(model):
        module.requires_grad_(True)
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            module.register_buffer(f"{leaf}0", parameter.detach().clone())
    return model


def adapted_layers(model: nn.Module) -> list[tuple[str, LowRankLinear]]:
    """(name, layer) of every LowRankLinear in the model, in order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LowRankLinear)]


def initial_values(model: nn.Module) -> dict[str, Tensor]:
    """What was trained, as it was before: buffers named like their parameter and 0, A0 of A and weight0 of weight."""
    trained = dict(model.named_parameters())
    return {name: buffer for name, buffer in model.named_buffers() if name.removesuffix("0") in trained}


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

    A trained head is the initial one. No gradient, no dropout; head and training modes come back afterwards, also after
    an exception. Raises ValueError if the model has no adapted layer, for then nothing remembers what it was before.
    """
    layers = [layer for _, layer in adapted_layers(model)]
    if not layers:
        raise ValueError("the model has no adapted layer, so there is no record of the pre-trained one: adapt first")
    roles = [(layer, layer.is_teacher) for layer in layers]
    head = [(parameter, parameter.data, initial) for parameter, initial in _head_with_initial(model)]
    try:
        for layer in layers:
            layer.is_teacher = True
        for parameter, _, initial in head:
            parameter.data = initial
        with evaluating(model), torch.no_grad():
            yield model
    finally:
        for layer, role in roles:
            layer.is_teacher = role
        for parameter, trained, _ in head:
            parameter.data = trained


@torch.no_grad()
def truncate(model: nn.Module, rank: int) -> float:
    """Bring every ΔW to at most this rank, in place, by its best approximation (Eckart and Young).

    Returns what this loses over all layers, ‖ΔW − ΔW_rank‖ / ‖ΔW‖ (Frobenius); 0 if nothing was learned. The teacher
    stays the pre-trained model. Raises ValueError if nothing is adapted.
    """
    layers = [layer for _, layer in adapted_layers(model)]
    if not layers:
        raise ValueError("nothing to truncate: the model has no adapted layer")
    lost = total = 0.0
    for layer in layers:
        left, right, S = best_factors(*layer.update(), rank)
        layer.A, layer.B, layer.A0, layer.B0 = nn.Parameter(left), nn.Parameter(right), None, None
        energy = (layer.scaling * S).square()
        lost, total = lost + energy[rank:].sum().item(), total + energy.sum().item()
    return (lost / total) ** 0.5 if total > 0 else 0.0


def best_factors(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best approximation of left @ right of at most `rank`, without forming the product.

    (m, R) and (R, n) -> (m, r), (r, n) in float32, r = min(rank, R, m, n), and all singular values of the product;
    those from r on are what is lost. QR of both factors leaves an SVD of R x R.
    """
    (Q_left, R_left), (Q_right, R_right) = torch.linalg.qr(left.double()), torch.linalg.qr(right.T.double())
    U, S, Vh = torch.linalg.svd(R_left @ R_right.T, full_matrices=False)
    root = S[:rank].sqrt()
    return (Q_left @ (U[:, :rank] * root)).float(), (root[:, None] * Vh[:rank] @ Q_right.T).float(), S


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Replace every LowRankLinear by the plain nn.Linear that it acts as, in place, in W's dtype; return the model.

    The sum is taken in float32 and rounded once; a trained head stays. Raises ValueError if nothing is adapted.
    """
    layers = adapted_layers(model)
    if not layers:
        raise ValueError("nothing to merge: the model has no adapted layer")
    for name, layer in layers:
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(layer.weight.to(layer.W.dtype), requires_grad=False)
        linear.bias = layer.bias
        _replace(model, name, linear.train(layer.training))
    for module in _own_head(model):
        for leaf in list(dict(module.named_buffers(recurse=False))):
            delattr(module, leaf)
    return model


def _check_settings(linear: nn.Linear, rank: int, alpha: float | None, init: str) -> None:
    largest = min(linear.in_features, linear.out_features)
    if not 1 <= rank <= largest:
        shape = f"{linear.in_features} x {linear.out_features}"
        raise ValueError(f"rank {rank} does not fit a {shape} layer: give 1 to {largest}")
    if alpha is not None and not 0 < alpha < float("inf"):
        raise ValueError(f"alpha is {alpha}: give a positive number")
    if not re.fullmatch(r"lora|pissa|pissa_niter_\d+", init):
        raise ValueError(f"unknown init {init!r}: give lora, pissa or pissa_niter_N")


def _own_head(model: nn.Module) -> list[nn.Module]:
    return [inner for name in getattr(model, "own_head", ()) for inner in model.get_submodule(name).modules()]


def _head_with_initial(model: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
    modules = _own_head(model)
    return [(p, getattr(m, f"{leaf}0")) for m in modules for leaf, p in m.named_parameters(recurse=False)]


def _frozen(parameter: Tensor) -> nn.Parameter:
    """The same storage, without gradient."""
    return nn.Parameter(parameter.detach(), requires_grad=False)


def _last_parts(names: Iterable[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
