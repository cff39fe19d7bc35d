# SPDX-License-Identifier: MIT; from minibalora, see LICENSE there
"""The objective of generation and its exact gradient without the whole (M, V) logits. This file needs only torch.

`regularizers.py` stays the definition; this file computes the same numbers. A row is a predicted token: the student has
the final hidden state h (d,), the teacher h_P, and their logits are z = W h and z_P = W h_P, with one frozen head
W (V, d).

Every term but the spectral one is a mean over rows of a function ℓ of the row's logits. W is frozen, so only the
gradient of h is needed, and the chain rule gives it as soon as z is computed:

    ∂ℓ/∂h = Wᵀ ∂ℓ/∂z          So a block of rows multiplies by W twice, and its logits can be dropped at once.

With f = softmax(z), E its entropy, f_T = softmax(z/T), p_T = softmax(z_P/T), ∂ log f_j / ∂z_i = [i = j] − f_i, by hand:

    cross-entropy     ℓ = −log f_y                             ∂ℓ/∂z = f − e_y
    consistency       ℓ = T² Σ_i p_T,i (log p_T,i − log f_T,i)  ∂ℓ/∂z = T (f_T − p_T)
    diversity         ℓ = Σ_i f_i log f_i = −E                  ∂ℓ/∂z = f ⊙ (log f + E)
    ... of the top K  the same over the K largest z_i           the same, 0 elsewhere
    non-target KL     consistency at T = 1, entry y left out    f̃ − p̃, exactly 0 at y

The spectral term φ = −s/t, s = Σ_{i≤k} σ_i, t = ‖Z‖, is of all rows together. Their states are H (M, d), so
Z = H Wᵀ = U Σ Vᵀ. With G = WᵀW (d, d), computed once, S = Z Zᵀ = H G Hᵀ = U Σ² Uᵀ is only (M, M). By hand
∂σ_i/∂Z = u_i v_iᵀ, so ∂σ_i/∂H = u_i v_iᵀ W; and H G = Z W = U Σ Vᵀ W, so u_iᵀ H G = σ_i v_iᵀ W. Together
∂σ_i/∂H = (u_i u_iᵀ / σ_i) H G, and

    ∂s/∂H = C H G, C = Σ_{i≤k} u_i u_iᵀ / σ_i                ∂φ/∂H = −(∂s/∂H + φ ∂t/∂H) / t
    ∂t/∂H = S^(−½) H G for t = Σ σ_i = tr S^½ (nuclear), H G / t for t² = Σ σ_i² = tr S (Frobenius)

Nothing is divided by a gap σ_i − σ_j, so equal values are harmless. Where σ is 0, 1/σ is set to 0, the smallest
subgradient. If M > 1.5 d, H = Q R makes S smaller: Z = Q (R Wᵀ), so φ is that of R (d, d), and ∂φ/∂H = Q ∂φ/∂R.

s and C need no whole S: T = Xᵀ S X has the same leading values, and vectors but for X, if X is a basis of the Krylov
space of S Ω, ..., S¹⁰ Ω. For σ_i = i^−½ and steeper, s is 1e-11 and ∂s 1e-6 off. Without a gap after σ_k, the leading
k are not unique, but s is: 1e-5 off for equal values, 1e-4 for a Gaussian H, whose values crowd around σ_k.

On a CPU, `eigh` decomposes S or T. On a GPU it would make the host wait, so two iterations of products take its place.
Their matrices commute, so each acts on every eigenvalue by itself; Z / √(tr S) has the same φ, and these in [0, 1]:

    S^½, S^(−½)   Y = S, Z = I; then P = a (3 I − a² Z Y) / 2, Y ← Y P, Z ← P Z. So x = √(z y) → a x (3 − a² x²) / 2,
                  at most 1; for a² = 3 / (1 + ℓ + ℓ²) it is equal at x = ℓ and 1, so the smallest x, ℓ, grows fastest.
    leading k     P = S; then P ← P² if tr P > k, else 2 P − P². Both keep the order of eigenvalues in [0, 1], so the
                  k largest become 1, the others 0: P = Σ_{i≤k} u_i u_iᵀ (Niklasson, Phys. Rev. B 66, 155115).

Squaring halves the number of digits: in float64, σ below 3e-7 σ_1 count as 0, and Σ i⁻³, i ≤ 512, is 2e-5 off. A GPU
with slow float64 uses float32, which loses σ below 1e-2 σ_1: s is 1e-6 off if σ_k is larger, Σ σ_i up to 2e-2.

BA-LoRA: arXiv 2408.04556. Non-target KL: arXiv 2605.29498. Cross-entropy in blocks: arXiv 2411.09009.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["FrozenHead", "Terms", "WithGradient", "fused_objective", "mean_entropy"]
__all__ += ["spectral_place", "spectral_share"]

BLOCK = {"cpu": 192, "cuda": 512}  # rows at a time; fewer slow matrix products down; 5 blocks of logits are held
ROOT_ROWS = 4096  # rows of the head that are converted to float64 at once
WHOLE = 160  # rows of the largest S (M, M) that a CPU decomposes faster than it computes a Krylov basis
DEPTH = 10  # powers of S in a Krylov basis
FAST_FLOAT64 = ((6, 0), (7, 0), (8, 0), (9, 0), (10, 0))  # compute capabilities: P100, V100, A100, H100, B200
LEFT_OUT = -1e30  # a logit whose probability is exactly 0; unlike with −∞, the difference of two is not NaN


@dataclass(frozen=True)
class Terms:
    """The weights of the terms beside the cross-entropy (0: none), and their settings as in `regularizers.py`.

    Raises ValueError for a setting that `regularizers.py` refuses.
    """

    lambda1: float = 0.0
    temperature: float = 1.0
    lambda2: float = 0.0
    top_k: int | None = None
    lambda3: float = 0.0
    svd_k: int = 10
    svd_norm: str = "nuclear"
    non_target_kl: float = 0.0

    def __post_init__(self):
        _check_settings(self.svd_k, self.svd_norm, self.temperature)
        _check_settings(1 if self.top_k is None else self.top_k)

    @property
    def of_tokens(self) -> dict[str, float]:
        """Name -> weight of the terms that are means over tokens."""
        weights = {"consistency": self.lambda1, "diversity": self.lambda2, "non_target_kl": self.non_target_kl}
        return {"task": 1.0} | {name: weight for name, weight in weights.items() if weight != 0}


class FrozenHead:
    """The head z = W h, without bias or soft-cap. W (V, d) is frozen, and must not change after the first call.

    All calls write to one workspace, so threads must not share a head: give each its own, of the same W.
    """

    def __init__(self, weight: Tensor):
        self.weight = weight
        self.check()
        self.block = BLOCK.get(weight.device.type, 512)  # rows
        self.buffers = []

    def check(self) -> None:
        """Raise ValueError if the head is trained."""
        if self.weight.requires_grad:
            raise ValueError("the head is trained, so it needs a gradient: use the plain formulas")

    @cached_property
    def gram(self) -> Tensor:
        """G = WᵀW (d, d), where and in the dtype in which the spectral term is computed."""
        device, dtype = spectral_place(self.weight.device)
        with torch.inference_mode(False), torch.no_grad():  # training cannot use an inference tensor
            parts = (part.to(device, torch.float64) for part in self.weight.split(ROOT_ROWS))
            return sum(part.T @ part for part in parts).to(dtype)

    def workspace(self, count: int, rows: int) -> list[Tensor]:
        """Return `count` blocks (rows, V) in float32 or wider. Every call reuses the same memory: on a CPU, new memory
        costs more time than the computation in it."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        for _ in range(count - len(self.buffers)):
            shape = self.block, len(self.weight)
            with torch.inference_mode(False):
                self.buffers.append(torch.empty(shape, dtype=dtype, device=self.weight.device))
        return [buffer[:rows] for buffer in self.buffers[:count]]

    def logits(self, states: Tensor, out: Tensor) -> Tensor:
        """Write the shifted logits of states (b, d) to `out` (b, V), rounded as the model rounds its own."""
        states = states.to(self.weight.dtype)
        same = out.dtype == states.dtype
        z = torch.mm(states, self.weight.T, out=out) if same else out.copy_(F.linear(states, self.weight))
        return _shifted(z)


def fused_objective(
    student: Tensor, teacher: Tensor | None, targets: Tensor, head: FrozenHead, **settings: object
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return L = cross-entropy + λ1·L_CR + λ2·L_DR + λ3·L_SVDR + λ·non-target KL, and the value of each term by name.

    student, teacher: (M, d) final hidden states of predicted tokens; teacher may be None without a KL term. targets:
    (M,) these tokens. settings: the fields of `Terms`. The names are task, consistency, diversity, svd and
    non_target_kl, without those of weight 0. The gradient flows into `student` only. Raises ValueError for shapes that
    do not match or have no row, and RuntimeError for a second derivative.
    """
    terms = Terms(**settings)
    _check_rows(student, teacher, targets, head, terms)
    states = student.detach()
    with torch.autocast(states.device.type, enabled=False):
        values, gradient = _token_terms(states, teacher, targets.long(), head, terms)
        if terms.lambda3 != 0:
            H = states.to(head.gram.device, head.gram.dtype)
            Q, H = torch.linalg.qr(H) if 2 * len(H) > 3 * H.shape[1] else (None, H)
            HG = H @ head.gram
            share, slope = spectral_share(HG @ H.T, HG, terms.svd_k, terms.svd_norm, H.is_cpu)
            values["svd"] = share.to(gradient)
            gradient.add_((slope if Q is None else Q @ slope).to(gradient), alpha=terms.lambda3)
    weights = terms.of_tokens | {"svd": terms.lambda3}
    total = sum(weights[name] * value for name, value in values.items())
    return WithGradient.apply(student, total, gradient), values


def _check_settings(k: int = 1, norm: str = "nuclear", temperature: float = 1.0) -> None:
    """Raise ValueError in the words of `regularizers.py`, which this file does without."""
    if not (hasattr(k, "__index__") and k >= 1 and 0 < temperature < math.inf):
        raise ValueError(f"k is {k}, temperature is {temperature}: give an integer from 1 up, a finite positive number")
    if norm not in ("nuclear", "frobenius"):
        raise ValueError(f"unknown norm {norm!r}: give nuclear or frobenius")


def _check_rows(student: Tensor, teacher: Tensor | None, targets: Tensor, head: FrozenHead, terms: Terms) -> None:
    head.check()
    M, width = (*student.shape, 0)[:2]
    if student.ndim != 2 or M == 0 or width != head.weight.shape[1]:
        expected = f"(M, {head.weight.shape[1]}), M at least 1, as the head is {list(head.weight.shape)}"
        raise ValueError(f"states of shape {list(student.shape)}: give {expected}")
    if targets.shape != (M,) or targets.is_floating_point():
        raise ValueError(
            f"targets are {targets.dtype} of shape {list(targets.shape)}: give a token for each of {M} rows"
        )
    is_checked = targets.device.type in ("cpu", "mps")  # CUDA's gather checks it, without making the host wait
    if is_checked and not ((targets >= 0) & (targets < len(head.weight))).all():
        raise ValueError(f"a target lies outside 0 to {len(head.weight) - 1}: leave out rows without a target")
    is_needed = terms.lambda1 != 0 or terms.non_target_kl != 0
    if is_needed and (teacher is None or teacher.shape != student.shape):
        shape = None if teacher is None else list(teacher.shape)
        raise ValueError(f"teacher of shape {shape}, student {list(student.shape)}: give the same rows")


class WithGradient(torch.autograd.Function):
    """Attach a gradient that is already computed to a value."""

    @staticmethod
    def forward(ctx, student: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.dtype = student.dtype
        return value.clone()  # the input itself could not be changed in place, as in loss /= steps

    @staticmethod
    def backward(ctx, upstream: Tensor):
        if torch.is_grad_enabled():
            raise RuntimeError("fused.py can't be differentiated twice: use the formulas of regularizers.py")
        (gradient,) = ctx.saved_tensors
        return (upstream.to(gradient.dtype) * gradient).to(ctx.dtype), None, None  # scale before rounding


@torch.no_grad()
def _token_terms(
    student: Tensor, teacher: Tensor | None, targets: Tensor, head: FrozenHead, terms: Terms
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the mean of each term over tokens, and the gradient (M, d) of their weighted sum in float32 or wider."""
    weights = terms.of_tokens
    needs_teacher = "consistency" in weights or "non_target_kl" in weights
    values = {name: [] for name in weights}
    gradient = torch.empty_like(student, dtype=torch.promote_types(student.dtype, torch.float32))
    for start in range(0, len(student), head.block):
        rows = slice(start, start + head.block)
        z, slope, *free = head.workspace(5 if needs_teacher else 3, len(targets[rows]))
        z = head.logits(student[rows], out=z)
        z_P = head.logits(teacher[rows], out=free.pop()) if needs_teacher else None
        for name, value in _block_terms(z, z_P, targets[rows, None], terms, slope, free):
            values[name].append(value)
        gradient[rows] = (slope.to(head.weight.dtype) @ head.weight).to(gradient.dtype)
    return {name: torch.cat(parts).mean() for name, parts in values.items()}, gradient.div_(len(student))


def _block_terms(
    z: Tensor, z_P: Tensor | None, y: Tensor, terms: Terms, slope: Tensor, free: list[Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, value (b, 1)) of each term for a block of rows, and write the weighted sum of ∂ℓ/∂z to `slope`.

    z, z_P: shifted logits (b, V), which are overwritten; y: targets (b, 1); free: buffers (b, V), one for the entropy
    of the whole vocabulary, two for each KL in turn.
    """
    f, lse = _softmax(z, 1.0, out=slope)
    yield "task", lse - z.gather(1, y)
    if terms.lambda2 != 0 and terms.top_k is None:
        mean = torch.mul(f, z, out=free[0]).sum(-1, keepdim=True)
        yield "diversity", mean - lse  # Σ f log f, as log f = z − lse
        slope.add_(torch.sub(z, mean, out=free[0]).mul_(f), alpha=terms.lambda2)
    elif terms.lambda2 != 0:
        value, columns, entropic = _entropy_of_largest(z, terms.top_k)
        yield "diversity", value
        slope.scatter_add_(1, columns, terms.lambda2 * entropic)
    slope.scatter_add_(1, y, -torch.ones_like(y, dtype=slope.dtype))
    if terms.lambda1 != 0:
        kl, difference = _kl(z, z_P, terms.temperature, free)
        yield "consistency", terms.temperature**2 * kl
        slope.add_(difference, alpha=terms.lambda1 * terms.temperature)
    if terms.non_target_kl != 0:
        z, z_P = (_shifted(logits.scatter_(1, y, LEFT_OUT)) for logits in (z, z_P))
        kl, difference = _kl(z, z_P, 1.0, free)
        yield "non_target_kl", kl
        slope.add_(difference, alpha=terms.non_target_kl)


def _shifted(z: Tensor) -> Tensor:
    """Subtract each row's largest logit in place. No term changes, and exp cannot overflow."""
    return z.sub_(z.amax(-1, keepdim=True))


def _softmax(z: Tensor, temperature: float, out: Tensor) -> tuple[Tensor, Tensor]:
    """Return softmax(z/T) (b, V), written to `out`, and logsumexp(z/T) (b, 1), for shifted z."""
    e = torch.div(z, temperature, out=out).exp_()
    norm = e.sum(-1, keepdim=True)
    return e.div_(norm), norm.log()


def _kl(z: Tensor, z_P: Tensor, temperature: float, buffers: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return KL(p_T ‖ f_T) = Σ p_T (z_P − z)/T − lse(z_P/T) + lse(z/T) of each row (b, 1), and f_T − p_T (b, V)."""
    p, lse_P = _softmax(z_P, temperature, out=buffers[0])
    value = torch.sub(z_P, z, out=buffers[1]).mul_(p).sum(-1, keepdim=True) / temperature - lse_P
    f, lse = _softmax(z, temperature, out=buffers[1])
    return value + lse, f.sub_(p)


def _entropy_of_largest(z: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return Σ f log f over the k largest logits of each row (b, 1), their columns (b, k) and gradients (b, k)."""
    largest, columns = _largest(z, k)
    log_f = largest.log_softmax(-1)
    f = log_f.exp()
    value = (f * log_f).sum(-1, keepdim=True)
    return value, columns, f * (log_f - value)


def _largest(z: Tensor, k: int, width: int = 64) -> tuple[Tensor, Tensor]:
    """Return what z.topk(k) returns, the k largest of each row and their columns, (b, k) each, in a tenth of its time.

    They lie in the k groups of `width` columns with the largest maxima, or in the columns after the last whole group.
    """
    k, groups = min(k, z.shape[1]), z.shape[1] // width
    if groups <= k:
        return z.topk(k)
    whole = z[:, : groups * width].unflatten(1, (groups, width))
    leading = whole.amax(-1).topk(k).indices  # (b, k)
    columns = (leading[..., None] * width + torch.arange(width, device=z.device)).flatten(1)
    beyond = torch.arange(groups * width, z.shape[1], device=z.device).expand(len(z), -1)
    columns = torch.cat([columns, beyond], dim=1)
    largest, place = z.gather(1, columns).topk(k)
    return largest, columns.gather(1, place)


def spectral_place(device: torch.device) -> tuple[torch.device, torch.dtype]:
    """Return where the spectral term of tensors on `device` is computed: in float64; on the CPU if the device has no
    float64 or no QR; in float32 on an NVIDIA GPU with slow float64, unless TF32 rounds its products."""
    if device.type in ("mps", "xpu"):
        return torch.device("cpu"), torch.float64
    if device.type != "cuda" or torch.version.cuda is None or torch.backends.cuda.matmul.allow_tf32:
        return device, torch.float64
    return device, torch.float64 if torch.cuda.get_device_capability(device) in FAST_FLOAT64 else torch.float32


@torch.no_grad()
def spectral_share(S: Tensor, Y: Tensor, k: int, norm: str, by_eigh: bool) -> tuple[Tensor, Tensor]:
    """Return φ and its gradient (M, n) from S = Z Zᵀ (M, M) and Y (M, n): H G for the gradient in H, Z for that in Z.

    by_eigh: use `eigh`, which makes the host of a GPU wait; otherwise only products and QR. Raises ValueError for a k
    below 1 and an unknown norm.
    """
    _check_settings(k, norm)
    is_finite, scale = S.isfinite().all(), torch.where(S.trace() > 0, S.trace(), 1.0)
    S = torch.where(is_finite, S / scale, 0.0)  # the same φ; eigh would raise for NaN
    X = None if by_eigh and (norm == "nuclear" or len(S) <= WHOLE) else _krylov_basis(S, k, by_eigh)
    s, C, t, inverse = (_by_eigh if by_eigh else _by_products)(S if X is None else X.T @ (S @ X), k)
    if norm == "frobenius":
        share = -s + torch.where(is_finite, 0.0, torch.nan)
        slope = C.to(Y) @ Y if X is None else (X @ C).to(Y) @ (X.T.to(Y) @ Y)
        return share, slope.add_(share.to(Y) * Y).div_(-scale)
    if X is not None:
        C, (root, inverse) = X @ C @ X.T, _roots(S)
        t = root.trace()
    t = torch.where(t > 0, t, 1.0)  # Z = 0: everything is 0
    share = -s / t + torch.where(is_finite, 0.0, torch.nan)
    return share, ((C + share * inverse) / (-t * scale)).to(Y) @ Y


def _krylov_basis(S: Tensor, k: int, by_eigh: bool) -> Tensor:
    """Return an orthonormal basis of [S Ω, ..., S¹⁰ Ω], Ω (M, k + 2): all of it, or by `eigh` its k best vectors."""
    X = torch.arange(len(S) * (k + 2), device=S.device).to(S.dtype).square().sin().view(len(S), -1)  # no upload
    blocks = []
    for _ in range(DEPTH):
        X = torch.linalg.qr(S @ X)[0]  # without it, every column would turn to the first eigenvector
        blocks.append(X)
    X = torch.linalg.qr(torch.cat(blocks, dim=1))[0]
    return X @ torch.linalg.eigh(X.T @ (S @ X))[1][:, -k:] if by_eigh else X


def _by_eigh(S: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return Σ_{i≤k} σ_i, C = Σ_{i≤k} u_i u_iᵀ / σ_i, and the same of all i: tr S^½ and S^(−½)."""
    squares, U = torch.linalg.eigh(S)
    squares, U = squares.flip(0), U.flip(1)  # descending
    is_noise = squares <= squares[0] * len(S) * torch.finfo(S.dtype).eps
    sigma = squares.masked_fill(is_noise, 0.0).sqrt()
    scaled = U * (1 / sigma).masked_fill(is_noise, 0.0)
    return sigma[:k].sum(), scaled[:, :k] @ U[:, :k].T, sigma.sum(), scaled @ U.T


def _roots(S: Tensor) -> tuple[Tensor, Tensor]:
    """Return S^½ and S^(−½) by Newton-Schulz, for tr S = 1."""
    one = torch.eye(len(S), dtype=S.dtype, device=S.device)
    Y, Z, smallest = S, one, math.sqrt(max(3e-13, len(S) * torch.finfo(S.dtype).eps))
    while 1 - smallest > 1e-15:
        a = math.sqrt(3 / (1 + smallest + smallest**2))
        P = torch.addmm(one, Z, Y, beta=1.5 * a, alpha=-(a**3) / 2)
        Y, Z, smallest = Y @ P, P @ Z, a * smallest * (3 - (a * smallest) ** 2) / 2
    return Y, Z


def _by_products(S: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what `_by_eigh` returns, for tr S = 1, by the two iterations of the file's docstring."""
    root, inverse = _roots(S)
    one, tiny = torch.eye(len(S), dtype=S.dtype, device=S.device), max(3e-13, len(S) * torch.finfo(S.dtype).eps)
    P = (S + tiny * one) / (1 + tiny * len(S))  # no eigenvalue is negative by rounding
    for _ in range(45 if S.dtype == torch.float64 else 30):  # resolves σ_k² − σ_{k+1}² of 1e-9 or 1e-5 tr S
        P = P.addcmul(torch.addmm(P, P, P, alpha=-1), (k - P.trace()).sign())
    P = torch.addmm(P @ P, P @ P, one - P, alpha=2)  # 3 P² − 2 P³ removes rounding errors, which P² doubles
    rest = torch.addmm(P, P, P, alpha=-1)  # 0 but for equal values around the k-th: they share what k leaves for them
    P = P + rest * torch.where(rest.trace() > 1e-6, (k - P.trace()) / rest.trace(), 0.0)
    return (P * root).sum(), P @ inverse, root.trace(), inverse


@torch.no_grad()
def mean_entropy(states: Tensor, head: FrozenHead, temperature: float) -> Tensor:
    """Return the mean of H(softmax(z/T)) over the rows of `states` (M, d), in nats: how uncertain the teacher is."""
    _check_settings(temperature=temperature)
    entropies = []
    for h in states.split(head.block):
        z, f = head.workspace(2, len(h))
        f, lse = _softmax(head.logits(h, out=z), temperature, out=f)
        entropies.append(lse - f.mul_(z).sum(-1, keepdim=True) / temperature)
    return torch.cat(entropies).mean()
