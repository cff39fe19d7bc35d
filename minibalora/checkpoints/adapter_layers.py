"""Our layers as PEFT's tensors, and PEFT's tensors as our layers. Only this file converts between the two.

PEFT's factors are the transposes of the paper's A (m, r) and B (r, n): lora_A (r, m), lora_B (n, r), and of LoHa's
hada_w1_a (n, r) and hada_w1_b (r, m). DoRA is a LoRA with magnitudes; AdaLoRA and LoHa have a type of their own.
"""

import torch
from torch import Tensor, nn

from minibalora.checkpoints.adapter_checks import base_value
from minibalora.checkpoints.adapter_config import ADALORA_EPSILON, SUBTRACTED_INITS, init_of, scaling_of
from minibalora.checkpoints.adapter_file import Adapter
from minibalora.lowrank import LowRankLinear, olora, pissa
from minibalora.variants import AdaLoRALinear, DoRALinear, LoHaLinear


def type_of(layers: list[tuple[str, LowRankLinear]], as_lora: bool) -> str:
    """Return the peft_type to save these layers as. Raises ValueError if as_lora is False and they have no own type."""
    own_types = {AdaLoRALinear: "ADALORA", LoHaLinear: "LOHA"}
    types = {"LORA" if as_lora else own_types.get(type(layer)) for _, layer in layers}
    if None in types:
        raise ValueError("only AdaLoRA and LoHa have a format of their own in PEFT: leave as_lora=False out")
    return types.pop()


def parts_of(layer: LowRankLinear, peft_type: str) -> tuple[dict[str, Tensor], int, float]:
    """Return a layer's tensors, by the last part of their names, and its rank and alpha, as `peft_type` has them."""
    rank = layer.A.shape[1]
    if peft_type == "LOHA":
        w1, w2 = {"hada_w1_a": layer.B.T, "hada_w1_b": layer.A.T}, {"hada_w2_a": layer.B2.T, "hada_w2_b": layer.A2.T}
        return w1 | w2, rank, layer.scaling * rank
    if peft_type == "ADALORA":
        kept = layer.Lambda != 0
        parts = {"lora_A": layer.A.T[kept], "lora_B": layer.B.T[:, kept], "lora_E": layer.Lambda[kept, None]}
        return parts, rank, layer.scaling * (rank + ADALORA_EPSILON)
    left, right = layer.update()
    parts = {"lora_A.weight": left.T, "lora_B.weight": right.T}
    if isinstance(layer, DoRALinear):
        parts["lora_magnitude_vector"] = layer.magnitude
    return parts, left.shape[1], layer.scaling * left.shape[1]


def config_of(config: dict, peft_type: str, layers: list[tuple[str, LowRankLinear]]) -> dict:
    """Return adapter_config.json for `peft_type`, from that of a LoRA of the same ranks and alphas.

    Raises ValueError for AdaLoRA with several initial ranks or alphas and for LoHa in GPT-2, which PEFT does not have.
    """
    config = config | {"peft_type": peft_type, "use_dora": all(isinstance(layer, DoRALinear) for _, layer in layers)}
    if peft_type == "LOHA":
        if config["fan_in_fan_out"]:
            raise ValueError("PEFT has no LoHa for GPT-2's layers: save it as a LoRA, without as_lora=False")
        config["alpha"] = config["lora_alpha"]
        return {key: value for key, value in config.items() if "lora" not in key and key not in NOT_IN_LOHA}
    if peft_type == "ADALORA":
        if config["rank_pattern"] or config["alpha_pattern"]:
            raise ValueError("PEFT's AdaLoRA has one initial rank and alpha: save it as a LoRA, without as_lora=False")
        kept = {f"{name}.lora_E": (layer.Lambda != 0).tolist() for name, layer in layers}
        steps = {"total_step": 1, "tinit": 0, "tfinal": 0}  # of training, but PEFT reads no config without them
        return config | steps | {"init_r": config["r"], "target_r": layers[0][1].target, "rank_pattern": kept}
    return config


NOT_IN_LOHA = ("bias", "fan_in_fan_out", "use_dora")


def layer_of(model: nn.Module, name: str, linear: nn.Linear, adapter: Adapter) -> LowRankLinear:
    """Return the layer that takes the place of `linear`.

    PiSSA and OLoRA train A and B against W − s A₀B₀. Here the base stays W, so the adapter becomes the LoRA
    A B − A₀B₀ = (A − A₀) B + A₀ (B − B₀), of rank 2r. As in PEFT, A₀ and B₀ come from W in float32. PEFT then rounds
    the residual to the base's dtype; here nothing is rounded. AdaLoRA becomes a LoRA with Λ folded in.
    """
    device, config = device_of(linear.weight), adapter.config
    parts = {part: tensor.to(device) for part, tensor in adapter.factors[name].items()}
    parts = {part: tensor.T.contiguous() if tensor.ndim == 2 else tensor for part, tensor in parts.items()}
    if config["peft_type"] == "LOHA":
        layer = LoHaLinear(linear, parts["w1_b"], parts["w1_a"], scaling_of(config, name, len(parts["w1_a"])), False)
        layer.A2, layer.B2 = nn.Parameter(parts["w2_b"]), nn.Parameter(parts["w2_a"])
        return layer
    A, B = parts["A"], parts["B"]
    rank, weight = A.shape[1], None
    scaling = scaling_of(config, name, rank)
    if "E" in parts:
        A = A * parts["E"].flatten()
        if rank == 0:  # AdaLoRA may have set all values to 0; a LoRA of rank 0 is no LoRA
            A, B = A.new_zeros(len(A), 1), B.new_zeros(1, B.shape[1])
    if init_of(config) in SUBTRACTED_INITS or config.get("use_dora"):
        weight = base_value(model, f"{name}.weight")
    if init_of(config) in SUBTRACTED_INITS:
        A0, B0 = (pissa if init_of(config) == "pissa" else olora)(weight, rank, scaling)
        A, B = torch.cat([A - A0, A0], dim=1), torch.cat([B, B - B0], dim=0)
    if not config.get("use_dora"):
        return LowRankLinear(linear, A, B, scaling, keep_initial=False)
    layer = DoRALinear(linear, A, B, scaling, keep_initial=False)
    layer.magnitude = nn.Parameter(parts["magnitude_vector"])
    layer.magnitude0 = nn.Parameter(torch.linalg.vector_norm(weight.float(), dim=1), requires_grad=False)
    return layer


def device_of(parameter: Tensor) -> torch.device:
    """Return the parameter's device, or the CPU for a parameter of a `weights.skeleton`, which has no memory yet."""
    return torch.device("cpu") if parameter.is_meta else parameter.device
