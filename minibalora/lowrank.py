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

OVERSAMPLING = 16  # columns of a Krylov block beyond the rank: a third of the error on a flat spectrum
# adapt leaves these alone, as all three papers do
HEADS = ("lm_head", "score", "classifier", "pooler", "classification_head")


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
    and nothing else: see `_LowRankProduct`. `quantize` keeps W_res instead of W, in four bits: what is said of W then
    holds of that and s A₀ B₀ together, and the pre-trained model, so the teacher, is the one of quantised weights.
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

        init: "lora", "pissa" (exact SVD), "pissa_krylov_N" or "pissa_niter_N" (see pissa_factors). factors: A and B of
        that init, where they are known already.
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
        if self.is_teacher:
            return F.linear(x, self.pretrained_weight(x.dtype), self.bias)
        return _LowRankProduct.apply(x, self.W, self.bias, self.A, self.B, self.A0, self.B0, self.scaling)

    def update(self) -> tuple[Tensor, Tensor]:
        """The learned change as two factors, W_now = W + s · left @ right; (m, R) and (R, n), R = r or 2r, float32."""
        return _change(self.A, self.B, self.A0, self.B0)

    @property
    def residual(self) -> Tensor:
        """W_res = W − s A₀ B₀ as an (m, n) tensor in float32: the frozen part of Y = X W_res + s (X A) B."""
        W = self.pretrained_weight(torch.float32).T
        return W if self.A0 is None else W - self.scaling * self.A0 @ self.B0

    @property
    def delta(self) -> Tensor:
        """ΔW, what was learned, as a dense (n, m) = (out, in) matrix in float32."""
        left, right = self.update()
        return self.scaling * (left @ right).T

    @property
    def weight(self) -> Tensor:
        """The dense (n, m) = (out, in) matrix that the layer acts as, in float32."""
        return self.pretrained_weight(torch.float32) + self.delta

    def pretrained_weight(self, dtype: torch.dtype) -> Tensor:
        """W (n, m), in `dtype`."""
        return _dense(self.W, self.A0, self.B0, self.scaling, dtype)

    @torch.no_grad()
    def quantize(self, form: Callable[[Tensor], nn.Module]) -> None:
        """Keep W_res as form(W_resᵀ), a module with `dequantize(dtype)`, in place of W; for instance `NF4.quantize`.

        Of a PiSSA layer that is the residual, whose largest directions are in A₀ and B₀, so less is lost of it than of
        W (QPiSSA, arXiv 2404.02948); of a LoRA layer it is W itself (QLoRA, arXiv 2305.14314).
        """
        residual = self.residual.T
        del self.W  # a parameter's name takes no module
        self.W = form(residual)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.A.shape[1]}, scaling={self.scaling:g}"


def _change(A: Tensor, B: Tensor, A0: Tensor | None, B0: Tensor | None) -> tuple[Tensor, Tensor]:
    """A B − A₀ B₀ = (A − A₀) B + A₀ (B − B₀) as two factors: differences first, so that nothing large cancels."""
    if A0 is None:
        return A, B
    return torch.cat([A - A0, A0], dim=1), torch.cat([B, B - B0], dim=0)


class _LowRankProduct(torch.autograd.Function):
    """X W + bias + s X (A B − A₀ B₀), keeping for its backward pass X alone: what autograd would keep is found anew.

    With D = s dY:  dX = dY Wᵀ + D (A B − A₀ B₀)ᵀ,  dA = Xᵀ (D Bᵀ),  dB = (X A)ᵀ D.  So dA and dB cost PiSSA what
    they cost LoRA; autograd would find those of A₀ and B₀, too. Products are taken in X's dtype.
    """

    @staticmethod
    def forward(ctx, x: Tensor, W, bias: Tensor | None, A: Tensor, B: Tensor, A0, B0, s: float) -> Tensor:
        ctx.save_for_backward(x, A, B, A0, B0)
        ctx.W, ctx.scaling = W, s
        rows = x.reshape(-1, x.shape[-1])
        W, left, right = _acting(rows, W, A, B, A0, B0, s)
        y = F.linear(rows, W, bias)
        return (y if left is None else y.addmm_(rows @ left, right, alpha=s)).view(*x.shape[:-1], len(W))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, A, B, A0, B0 = ctx.saved_tensors
        rows, dy, s = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1]), ctx.scaling
        dA = s * (rows.T @ (dy @ B.T.to(x.dtype))).to(A.dtype)
        dB = s * ((rows @ A.to(x.dtype)).T @ dy).to(B.dtype)
        dx = None
        if ctx.needs_input_grad[0]:
            W, left, right = _acting(rows, ctx.W, A, B, A0, B0, s)
            dx = dy @ W
            dx = (dx if left is None else dx.addmm_(dy @ right.T, left.T, alpha=s)).view(x.shape)
        return dx, None, None, dA, dB, None, None, None


def _dense(W: Tensor | nn.Module, A0: Tensor | None, B0: Tensor | None, s: float, dtype: torch.dtype) -> Tensor:
    """The pre-trained weight (n, m); of a module, see `LowRankLinear.quantize`, the residual with s (A₀ B₀)ᵀ added."""
    if isinstance(W, Tensor):
        return W.to(dtype)
    residual = W.dequantize(dtype)
    return residual if A0 is None else residual.addmm_(B0.T.to(dtype), A0.T.to(dtype), alpha=s)


def _acting(x: Tensor, W: Tensor | nn.Module, A: Tensor, B: Tensor, A0: Tensor | None, B0: Tensor | None, s: float):
    """What x (T, m) is multiplied by: W (n, m), and `left` (m, R) and `right` (R, n) of the change beside it.

    Where x is float32, in which W + ΔW loses nothing, and has so many rows that ΔW costs less than (X left) right, the
    change is in W already, and left and right are None. In bfloat16 it never is: rounding would eat it.
    """
    left, right = (factor.to(x.dtype) for factor in _change(A, B, A0, B0))
    W = _dense(W, A0, B0, s, x.dtype)
    n, m = W.shape
    if x.dtype.itemsize >= 4 and len(x) * (m + n) > m * n:
        return torch.addmm(W, right.T, left.T, alpha=s), None, None
    return W, left, right


def lora_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A: Kaiming-uniform with a = √5, B: zero, as the LoRA reference does. weight (n, m) -> (m, r), (r, n)."""
    n, m = weight.shape
    A = torch.empty(m, rank, dtype=torch.float32, device=weight.device)
    nn.init.kaiming_uniform_(A.T, a=5**0.5)  # LoRA keeps A as (r, m): the fan-in is m
    return A, torch.zeros(rank, n, dtype=torch.float32, device=weight.device)


def pissa_factors(weight: Tensor, rank: int, scaling: float, init: str) -> tuple[Tensor, Tensor]:
    """A = U[:, :r] S[:r]^½ / √s, B = S[:r]^½ V[:, :r]ᵀ / √s with W = U S Vᵀ (PiSSA, section 3), in float32.

    weight is (n, m), W its transpose. "pissa" is the exact SVD; "pissa_krylov_N" the best factors within a block Krylov
    basis of N + 1 blocks (Musco and Musco, arXiv 1504.05477), which keeps what N subspace iterations pass through and
    is a function of the weight alone; "pissa_niter_N", PEFT's name, those iterations alone, from torch's global seed
    (Halko et al., arXiv 0909.4061). `python tests/bench_pissa.py` measured, on one CPU core (AMD EPYC, r = 128),
    seconds and ‖A B − A₀ B₀‖ / ‖A₀ B₀‖, A₀ B₀ in float64; not yet on a GPU:

                           decaying, 2048 x 2048    flat, 2048 x 2048    flat, 1024 x 4096
        pissa                   3.44  2.3e-6            3.46  9.7e-6         2.40  1.2e-5
        by the Gram matrix      3.84  1.5e-6            3.56  1.4e-6         0.73  1.2e-6
        pissa_niter_16          0.79  8.8e-2            0.83  4.1e-1         0.78  4.1e-1
        pissa_krylov_2          0.30  8.5e-2            0.28  6.7e-1         0.31  6.3e-1
        pissa_krylov_4          0.67  1.0e-3            0.57  2.9e-1         0.79  1.9e-1
        pissa_krylov_8          1.96  4.7e-6            1.86  9.2e-4         0.83  1.1e-5
        pissa_krylov_12         4.60  6.8e-6            3.70  3.0e-5         0.80  1.1e-5

    A flat 4096 x 4096 took 27, 3.2 (niter_16) and 4.4 s (krylov_8, 4.9e-2 off). The flatter, the less it matters which
    directions lead, and whatever A and B are, nothing is lost of W. Where the basis would be the whole space, as in the
    last two numbers, it is the exact SVD after a QR factorisation. Neither that nor the Gram matrix (in float64, which
    not every device has) loses anything, but both gain only on elongated weights; "pissa" stays the plain SVD, to the
    bit.
    """
    W = weight.detach().T.float()
    name, _, number = init.rpartition("_")
    if name == "pissa_krylov":
        U, S, Vh = _krylov_svd(W, rank, int(number))
    elif name == "pissa_niter":
        U, S, V = torch.svd_lowrank(W, q=rank, niter=int(number))
        Vh = V.T
    else:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        U, S, Vh = U[:, :rank], S[:rank], Vh[:rank]
    root = (S / scaling).sqrt()
    return (U * root).contiguous(), (root[:, None] * Vh).contiguous()


def _krylov_svd(W: Tensor, rank: int, depth: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, r), S (r,) and Vᵀ (r, n): leading Ritz vectors and values of W (m, n) in its Krylov basis (Rayleigh-Ritz);
    the exact ones if that basis would be the whole space."""
    m, n = W.shape
    if m > n:
        U, S, Vh = _krylov_svd(W.T, rank, depth)
        return Vh.T, S, U.T
    width = rank + OVERSAMPLING
    if (depth + 1) * width >= m:
        return _wide_svd(W, rank)
    Q = _krylov_basis(W, width, depth)
    U, S, Vh = _wide_svd(Q.T @ W, rank)
    return Q @ U, S, Vh


def _wide_svd(W: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading r of the exact SVD of W (m, n), m <= n. QR first, so that only r vectors of the long side are made:
    3 times faster than torch.linalg.svd of a matrix four times as long as high."""
    Q, R = torch.linalg.qr(W.T)
    U, S, Vh = torch.linalg.svd(R.T)
    return U[:, :rank], S[:rank], Vh[:rank] @ Q.T


def _krylov_basis(W: Tensor, width: int, depth: int) -> Tensor:
    """An orthonormal basis, (m, (N+1)·width), of [W Ω, (W Wᵀ) W Ω, ..., (W Wᵀ)ᴺ W Ω], Ω (n, width) Gaussian, N = depth.

    Each half step is made orthonormal, so that nothing over- or underflows and weak directions are not lost in strong.
    """
    omega = torch.randn(W.shape[1], width, generator=torch.Generator().manual_seed(0))
    blocks = [torch.linalg.qr(W @ omega.to(W.device))[0]]
    for _ in range(depth):
        blocks.append(torch.linalg.qr(W @ torch.linalg.qr(W.T @ blocks[-1])[0])[0])
    return torch.linalg.qr(torch.cat(blocks, dim=1))[0]


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
    wanted = [] if targets is None else [targets] if isinstance(targets, str) else list(targets)
    chosen = [name for name in linears if targets is None or any(_matches(name, target) for target in wanted)]
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
    stays the pre-trained model. Raises ValueError if nothing is adapted, or quantised, which needs A₀ and B₀ for ever.
    """
    layers = [layer for _, layer in adapted_layers(model)]
    if not layers:
        raise ValueError("nothing to truncate: the model has no adapted layer")
    if any(not isinstance(layer.W, Tensor) for layer in layers):
        raise ValueError("a quantised model can't be truncated: save its adapter and truncate that")
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
    """Replace every LowRankLinear by the plain nn.Linear that it acts as, in place; return the model.

    The sum is taken in float32 and rounded once, to W's dtype (float32 if it is quantised); a trained head stays.
    Raises ValueError if nothing is adapted.
    """
    layers = adapted_layers(model)
    if not layers:
        raise ValueError("nothing to merge: the model has no adapted layer")
    for name, layer in layers:
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        dtype = layer.W.dtype if isinstance(layer.W, Tensor) else torch.float32
        linear.weight = nn.Parameter(layer.weight.to(dtype), requires_grad=False)
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
    if not re.fullmatch(r"lora|pissa|pissa_(krylov|niter)_\d+", init):
        raise ValueError(f"unknown init {init!r}: give lora, pissa, pissa_krylov_N or pissa_niter_N")


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
