# SPDX-License-Identifier: MIT; from minibalora, see LICENSE there
"""Variants of LoRA. `use(model, "dora")` puts one into every layer that `lowrank.adapt` made.

This file needs only torch and lowrank.py. Shapes as there: X (..., m), W (n, m), A (m, r), B (r, n), s = alpha / r.
Each layer starts as the pre-trained model, which stays its teacher. `merge`, `weight` and `delta` work for all of them.
All but DoRA are products of factors, which `update` returns and `fold` makes a plain LoRA.

A training loop calls three functions in every step, whatever the model; they do nothing where no layer needs them:

    before_step(model, step, seed)         # DyLoRA's rank of this step, counted from 0
    loss.backward()
    add_penalty(model)                     # AdaLoRA's term in the loss: once a step, not once a micro-batch
    optimizer.step()
    after_step(model, step + 1, steps)     # AdaLoRA's importance and budget, DeltaLoRA's snapshot
    optimizer.zero_grad()

To resume, restore the trained parameters and `untrained_state(model)`. Three variants are not layers: rsLoRA
(`rslora_alpha`), LoRA+ (`lora_plus`), and OLoRA, which is `adapt(..., init="olora")`.
"""

import random

import torch
from torch import Tensor, nn

if __package__:
    from .lowrank import LowRankLinear, adapted_layers
else:  # copied beside lowrank.py
    from lowrank import LowRankLinear, adapted_layers

__all__ = ["AdaLoRALinear", "DeltaLoRALinear", "DoRALinear", "DyLoRALinear", "LoHaLinear", "VARIANTS", "add_penalty"]
__all__ += ["after_step", "before_step", "cut", "fold", "lora_plus", "rslora_alpha", "untrained_state", "use"]


class DoRALinear(LowRankLinear):
    """Y = X Vᵀ diag(m / ‖V‖) + bias,  V = W + ΔW,  ‖V‖ the norm of each row (n,)  (DoRA, arXiv 2402.09353, eq. 5).

    Trained: A and B, and the magnitude m (n,), which starts as ‖W‖. ‖V‖ is a constant in the backward pass (section
    4.3). It is computed from the factors ΔWᵀ = s L R of `update`, without an (n, m) matrix; row j of it is

        ‖V‖² = ‖W‖² + 2 s Σ (W L) ⊙ Rᵀ + s² Σ (Rᵀ LᵀL) ⊙ Rᵀ,   sums over the rank.
    """

    extras, state = ("magnitude", "magnitude0"), ()

    def start(self) -> None:
        norm = torch.linalg.vector_norm(self.pretrained_weight(self.A.dtype), dim=1)
        self.magnitude, self.magnitude0 = nn.Parameter(norm.clone()), _frozen(norm)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)  # X Vᵀ + bias
        if self.is_teacher:
            return y
        stretch = (self.magnitude / self.norm(x.dtype) - 1).to(y.dtype)  # 0 at step 0: y stays the same to the last bit
        return y + stretch * (y if self.bias is None else y - self.bias.to(y.dtype))

    @torch.no_grad()
    def norm(self, dtype: torch.dtype) -> Tensor:
        """Return ‖V‖ (n,) in the dtype of A; the product with W is in `dtype`."""
        (left, right), s = self.update(), self.scaling
        with torch.autocast(left.device.type, enabled=False):
            cross = (self.pretrained_weight(dtype) @ left.to(dtype)).to(left.dtype)
            square = self.magnitude0**2 + ((2 * s * cross + s**2 * right.T @ (left.T @ left)) * right.T).sum(1)
        return square.clamp_min(torch.finfo(square.dtype).tiny).sqrt()  # a row of zeros gives 0, not 0 / 0

    @property
    def delta(self) -> Tensor:
        """diag(m / ‖V‖) V − W, dense (n, m) in the dtype of A. It has full rank."""
        change, dtype = super().delta, self.A.dtype
        return change + (self.magnitude / self.norm(dtype) - 1)[:, None] * (self.pretrained_weight(dtype) + change)

    @property
    def weight(self) -> Tensor:
        W = self.pretrained_weight(self.W.dtype if isinstance(self.W, Tensor) else self.A.dtype)
        return W if self.is_teacher else (W.to(self.A.dtype) + self.delta).to(W.dtype)


class AdaLoRALinear(LowRankLinear):
    """Y = X W + s ((X P) ⊙ Λ) Q + bias  (AdaLoRA, arXiv 2303.10512, eq. 3): a singular value decomposition to prune.

    Trained: P = A (m, r) and Q = B (r, n), normal with deviation 0.02 at the start, and Λ (r,), 0 at the start.
    `add_penalty` keeps P and Q orthogonal. `after_step` shares out a budget of values among all layers, and sets the
    values of least importance to 0; `update` leaves these out. A number w with gradient g has importance I · U,

        I ← β I + (1 − β) |w g|,    U ← β U + (1 − β) | |w g| − I |,    β = 0.85   (eqs. 9 to 11)

    and that of value k is Λ's plus the means of column k of P and of row k of Q (eq. 7).
    """

    extras = ("Lambda", "I_A", "I_B", "I_Lambda", "U_A", "U_B", "U_Lambda")
    extras, state = (*extras, "target", "warm", "final", "every", "orthogonality"), extras[1:]
    beta = 0.85

    def start(self) -> None:
        rank = self.A.shape[1]
        self.target = max(1, rank * 2 // 3) if self.target is None else self.target
        self.Lambda = nn.Parameter(torch.zeros(rank, dtype=self.A.dtype, device=self.A.device))
        for factor in (self.A, self.B):
            factor.data.copy_(0.02 * torch.randn(factor.shape, device="cpu"))  # the same numbers on every device
        for name in self.state:
            setattr(self, name, _frozen(torch.zeros_like(getattr(self, name[2:]))))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.is_teacher else _added(self, x)

    def trained_update(self) -> tuple[Tensor, Tensor]:
        return self.A * self.Lambda, self.B  # a value of 0 has a gradient, too

    def update(self) -> tuple[Tensor, Tensor]:
        kept = self.Lambda.detach() != 0
        kept[0] |= not kept.any()  # a LoRA of rank 0 is no LoRA
        return (self.A * self.Lambda)[:, kept], self.B[kept]

    @torch.no_grad()
    def note_importance(self) -> None:
        for name in ("A", "B", "Lambda"):
            w, I, U = (getattr(self, prefix + name) for prefix in ("", "I_", "U_"))  # noqa: E741
            sensitivity = torch.zeros_like(w) if w.grad is None else (w * w.grad).abs()  # an expert without tokens
            is_finite = sensitivity.isfinite()  # not in a step that a GradScaler skips
            I.lerp_(torch.where(is_finite, sensitivity, I), 1 - self.beta)
            U.lerp_(torch.where(is_finite, (sensitivity - I).abs(), U), 1 - self.beta)

    def importance(self) -> Tensor:
        """Return the importance (r,) of each value."""
        return self.I_Lambda * self.U_Lambda + (self.I_A * self.U_A).mean(0) + (self.I_B * self.U_B).mean(1)


def budget(step: int, steps: int, start: int, target: int, warm: int, final: int) -> int:
    """b = b_T + (b₀ − b_T) (1 − (t − t_i) / (T − t_f − t_i))³ between t_i and T − t_f, b₀ before and b_T after
    (AdaLoRA, eq. 12). step: t, steps: T, start: b₀, target: b_T, warm: t_i, final: t_f."""
    if step <= warm or step >= steps - final:
        return start if step <= warm else target
    return int((start - target) * (1 - (step - warm) / (steps - final - warm)) ** 3 + target)


@torch.no_grad()
def _allocate(layers: list[AdaLoRALinear], step: int, steps: int) -> None:
    """Note the importance until T − t_f; after t_i, every ΔT steps and in all of the last t_f, set values to 0."""
    first = layers[0]
    warm, final = int(first.warm * steps), int(first.final * steps)
    if step < steps - final:
        for layer in layers:
            layer.note_importance()
    total = sum(len(layer.Lambda) for layer in layers)
    left_out = total - budget(step, steps, total, sum(layer.target for layer in layers), warm, final)
    if left_out and (step % first.every == 0 or step >= steps - final):
        scores = [layer.importance() for layer in layers]
        threshold = torch.cat(scores).kthvalue(left_out).values
        for layer, score in zip(layers, scores, strict=True):
            layer.Lambda.masked_fill_(score <= threshold, 0)


class LoHaLinear(LowRankLinear):
    """Y = X W + s X ((A₁ B₁) ⊙ (A₂ B₂)) + bias  (FedPara, arXiv 2108.06098, proposition 1; called LoHa).

    Trained: A₁ = A, B₁ = B, A₂ (m, r), B₂ (r, n). Its rank is up to r²: it is the LoRA whose factors have the products
    of all pairs of columns of A₁ and A₂ and of rows of B₁ and B₂, A[i, (k, l)] = A₁[i, k] A₂[i, l]. `update` returns
    those. Started as in PEFT: A₂ = 0, the others Kaiming-uniform.
    """

    extras, state = ("A2", "B2"), ()

    def start(self) -> None:
        (m, rank), n = self.A.shape, self.B.shape[1]
        uniform = [torch.rand(shape, device="cpu") * 2 - 1 for shape in ((m, rank), (rank, n), (rank, n))]
        self.A.data.copy_(uniform[0] / m**0.5)
        self.B.data.copy_(uniform[1] / rank**0.5)
        self.A2 = nn.Parameter(torch.zeros_like(self.A))
        self.B2 = nn.Parameter((uniform[2] / rank**0.5).to(self.B))

    def forward(self, x: Tensor) -> Tensor:
        if self.is_teacher:
            return super().forward(x)
        change = self.scaling * (self.A @ self.B) * (self.A2 @ self.B2)
        return self.pretrained_output(x) + x @ change.to(x.dtype)

    def update(self) -> tuple[Tensor, Tensor]:
        left = self.A[:, :, None] * self.A2[:, None, :]  # (m, r, r)
        right = self.B[:, None, :] * self.B2[None, :, :]  # (r, r, n)
        return left.flatten(1), right.flatten(0, 1)


class DyLoRALinear(LowRankLinear):
    """Y = X W + (alpha / b) (X A[:, :b]) B[:b] + bias, b drawn from 1..r in each step  (DyLoRA, arXiv 2210.07558).

    Trained: A and B; with frozen=True only column b of A and row b of B have a gradient. So every part A[:, :b], B[:b]
    is an adapter of rank b, which `cut` makes of the layer. b is for training, as a dropout mask is: in eval mode, in
    `update` and in what is saved, it is r.
    """

    extras, state = ("b", "frozen"), ()

    def start(self) -> None:
        self.b = self.A.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.is_teacher else _added(self, x)

    def trained_update(self) -> tuple[Tensor, Tensor]:
        r = self.A.shape[1]
        b = self.b if self.training else r
        A, B = self.A[:, :b], self.B[:b]
        if self.frozen:
            A = torch.cat([A[:, :-1].detach(), A[:, -1:]], dim=1)
            B = torch.cat([B[:-1].detach(), B[-1:]], dim=0)
        return A * (r / b), B  # s r / b = alpha / b


class DeltaLoRALinear(LowRankLinear):
    """Y = X W_t + s (X A) B + bias,  W_{t+1} = W_t + λ s (A_{t+1} B_{t+1} − A_t B_t) from step K on, W_K = W
    (DeltaLoRA, arXiv 2309.02411, algorithm 1).

    Trained: A and B; W_t has no gradient. All its changes but the first and the last cancel:

        W_t = W + λ s (A_t B_t − A_K B_K) = W + λ s ((A_t − A_K) B_t + A_K (B_t − B_K)),

    so nothing is written into W, which stays the teacher's, and ΔW = s ((1 + λ) A B − λ A_K B_K) has rank 2r.
    """

    extras, state = ("A_K", "B_K", "ratio", "warm"), ("A_K", "B_K")

    def start(self) -> None:
        self.A_K, self.B_K = _frozen(self.A.detach().clone()), _frozen(self.B.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)  # X W + s (X A) B
        if self.is_teacher:
            return y
        dA, dB = (self.A - self.A_K).detach().to(x.dtype), (self.B - self.B_K).detach().to(x.dtype)
        written = (x @ dA) @ self.B.detach().to(x.dtype) + (x @ self.A_K.to(x.dtype)) @ dB
        return y + self.ratio * self.scaling * written

    def trained_update(self) -> tuple[Tensor, Tensor]:
        left = torch.cat([self.A, self.A.detach(), self.A_K], dim=1)
        return left, torch.cat([self.B, self.ratio * self.B.detach(), -self.ratio * self.B_K], dim=0)

    def update(self) -> tuple[Tensor, Tensor]:
        left = torch.cat([self.A, self.A_K], dim=1)
        return left, torch.cat([(1 + self.ratio) * self.B, -self.ratio * self.B_K], dim=0)

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.scaling, self.ratio], dtype=torch.float64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        self.scaling, self.ratio = state.tolist()


VARIANTS = {  # name -> class of the layer, and its settings with their defaults
    "dora": (DoRALinear, {}),
    # target: b_T, the average rank at the end, None: 2/3 of the rank; warm, final: t_i and t_f as shares of the steps;
    # every: ΔT; orthogonality: weight of the penalty
    "adalora": (AdaLoRALinear, {"target": None, "warm": 0.1, "final": 0.5, "every": 10, "orthogonality": 0.5}),
    "loha": (LoHaLinear, {}),
    "dylora": (DyLoRALinear, {"frozen": False}),
    "deltalora": (DeltaLoRALinear, {"ratio": 2.0, "warm": 0.1}),  # λ, and K as a share of the steps
}


def use(model: nn.Module, variant: str, **settings) -> nn.Module:
    """Make every LowRankLinear of `model` a layer of a variant in VARIANTS, in place, and return the model.

    Raises ValueError, with the model unchanged, for an unknown variant or setting, a setting out of range, a layer that
    has learned or has a variant or the lean product already, an init that the variant can't have, or weights that are
    not loaded.
    """
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}: give {', '.join(VARIANTS)}")
    kind, defaults = VARIANTS[variant]
    if unknown := [name for name in settings if name not in defaults]:
        raise ValueError(f"{variant} has no setting {unknown[0]!r}: it has {', '.join(defaults) or 'none'}")
    settings = defaults | settings
    layers = adapted_layers(model)
    if not layers:
        raise ValueError(f"{variant} changes adapted layers, and the model has none: adapt it first")
    for name, layer in layers:
        _check_layer(variant, name, layer)
        _check_settings(variant, name, layer.A.shape[1], settings)
    for _, layer in layers:
        layer.__class__ = kind
        vars(layer).update(settings)
        layer.start()
    return model


def before_step(model: nn.Module, step: int, seed: int) -> None:
    """Draw DyLoRA's b from seed and step alone: the same on every GPU and after a resumption."""
    share = random.Random(f"{seed} {step}").random()
    for layer in _layers(model, DyLoRALinear):
        layer.b = 1 + int(share * layer.A.shape[1])


def add_penalty(model: nn.Module) -> Tensor | None:
    """Add the gradient of AdaLoRA's penalty, weight · mean of ‖PᵀP − I‖ and ‖QQᵀ − I‖ over all layers, to that of the
    loss (eq. 4; Frobenius norms, not squared, as in PEFT). Returns the penalty, or None if no layer has it.

    With a GradScaler, call it after scaler.unscale_(optimizer): its gradient is not scaled."""
    layers = _layers(model, AdaLoRALinear)
    if not layers or layers[0].orthogonality == 0:
        return None
    with torch.autocast(layers[0].A.device.type, enabled=False):
        grams = [gram for layer in layers for gram in (layer.A.T @ layer.A, layer.B @ layer.B.T)]
    norms = [torch.linalg.matrix_norm(gram - torch.eye(len(gram)).to(gram)) for gram in grams]
    penalty = layers[0].orthogonality * torch.stack(norms).mean()
    penalty.backward()
    return penalty.detach()


def after_step(model: nn.Module, step: int, steps: int) -> None:
    """Update what a step changes besides its trained parameters. step: the number of steps done, of `steps` in all.

    Call it after optimizer.step(), while the gradients are there: raises ValueError if AdaLoRA's are not.
    """
    if layers := _layers(model, AdaLoRALinear):
        if all(layer.Lambda.grad is None for layer in layers):
            raise ValueError("AdaLoRA has no gradient for its importance: call after_step before zero_grad")
        _allocate(layers, step, steps)
    for layer in _layers(model, DeltaLoRALinear):
        if step <= int(layer.warm * steps):
            layer.A_K.data.copy_(layer.A.data)
            layer.B_K.data.copy_(layer.B.data)


def untrained_state(model: nn.Module) -> dict[str, Tensor]:
    """Return by name what training changes without a gradient: AdaLoRA's I and U, DeltaLoRA's A_K and B_K."""
    layers = [(name, layer) for name, layer in adapted_layers(model) if hasattr(layer, "state")]
    return {f"{name}.{leaf}": getattr(layer, leaf) for name, layer in layers for leaf in layer.state}


def fold(model: nn.Module) -> nn.Module:
    """Make every layer of a variant a plain LoRA that computes the same, in place, and return the model.

    Raises ValueError for DoRA, whose change has full rank.
    """
    if _layers(model, DoRALinear):
        raise ValueError("DoRA's change has full rank, so it is not a LoRA: merge it, or save it as DoRA")
    for _, layer in adapted_layers(model):
        if hasattr(layer, "extras"):
            _make_plain(layer, *layer.update(), layer.scaling)
    return model


def cut(model: nn.Module, rank: int) -> nn.Module:
    """Make every DyLoRA layer the plain LoRA of its first `rank` columns and rows, in place, and return the model.

    Raises ValueError if there is no DyLoRA layer or if one has a lower rank.
    """
    layers = _layers(model, DyLoRALinear)
    largest = min((layer.A.shape[1] for layer in layers), default=0)
    if not 1 <= rank <= largest:
        has = f"was trained at ranks 1 to {largest}" if layers else "has no DyLoRA layer"
        raise ValueError(f"the model can't be cut to rank {rank}: it {has}")
    for layer in layers:
        _make_plain(layer, layer.A[:, :rank], layer.B[:rank], layer.scaling * layer.A.shape[1] / rank)
    return model


def rslora_alpha(rank: int, alpha: float) -> float:
    """Return the alpha for `adapt` that gives rsLoRA's s = alpha / √r  (arXiv 2312.03732)."""
    return alpha * rank**0.5


def lora_plus(model: nn.Module, lr: float, ratio: float = 16.0) -> list[dict]:
    """Return LoRA+'s groups for an optimizer: B learns `ratio` times as fast as the rest  (arXiv 2402.12354).

    The key "ratio" of a group is what a schedule multiplies its rate by.
    """
    fast = {id(B) for _, layer in adapted_layers(model) for B in (layer.B, getattr(layer, "B2", None))}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    slow = [parameter for parameter in trained if id(parameter) not in fast]
    fast = [parameter for parameter in trained if id(parameter) in fast]
    return [{"params": slow, "lr": lr, "ratio": 1.0}, {"params": fast, "lr": lr * ratio, "ratio": ratio}]


def _added(layer: LowRankLinear, x: Tensor) -> Tensor:
    """Return X W + s (X L) R + bias with L and R of `trained_update`."""
    left, right = layer.trained_update()
    return layer.pretrained_output(x) + layer.scaling * (x @ left.to(x.dtype)) @ right.to(x.dtype)


def _layers(model: nn.Module, kind: type) -> list:
    return [layer for _, layer in adapted_layers(model) if isinstance(layer, kind)]


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)  # a parameter: DDP broadcasts buffers at every pass


def _make_plain(layer: LowRankLinear, A: Tensor, B: Tensor, scaling: float) -> None:
    for name in layer.extras:
        delattr(layer, name)
    layer.__class__, layer.scaling = LowRankLinear, scaling
    layer.A, layer.B = (nn.Parameter(factor.detach().clone()) for factor in (A, B))


def _check_layer(variant: str, name: str, layer: LowRankLinear) -> None:
    if type(layer) is not LowRankLinear:
        kind = type(layer).__name__
        raise ValueError(f"{name} is a {kind} already, and {variant} changes the plain LowRankLinear: adapt it again")
    if variant != "dora" and layer.A0 is not None:
        raise ValueError(f"{name} starts from factors of W, but {variant} has a start of its own: adapt it with lora")
    A0, B0 = (layer.A, torch.zeros_like(layer.B)) if layer.A0 is None else (layer.A0, layer.B0)
    if not (torch.equal(layer.A, A0) and torch.equal(layer.B, B0)):
        raise ValueError(f"{name} has learned already: {variant} is put in before training")
    W = layer.W
    if variant == "dora" and isinstance(W, Tensor) and (W.is_meta or hasattr(W, "placements")):
        raise ValueError(f"{name}: DoRA starts from the norms of W, which is not loaded or is sharded: load it whole")


def _check_settings(variant: str, name: str, rank: int, settings: dict) -> None:
    target, warm, final = settings.get("target"), settings.get("warm", 0), settings.get("final", 0)
    if target is not None and not 1 <= target < rank:
        raise ValueError(f"{name}: a budget of {target} is not below the initial rank {rank}: give 1 to {rank - 1}")
    if variant == "adalora" and rank == 1:
        raise ValueError(f"{name} has rank 1, so {variant} has nothing to share out: give a higher rank")
    if not (warm >= 0 and final >= 0 and warm + final < 1):
        raise ValueError(f"{variant}: warm {warm} and final {final} are shares of the steps: give a sum below 1")
    if settings.get("every", 1) < 1:
        raise ValueError(f"{variant}: every is {settings['every']}: give a number of steps, at least 1")
    for setting in ("orthogonality", "ratio"):
        if not 0 <= settings.get(setting, 0) < float("inf"):
            raise ValueError(f"{variant}: {setting} is {settings[setting]}: give a number of at least 0")
