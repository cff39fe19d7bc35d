"""Check that an adapter fits a model, and say why where it does not."""

import re
from typing import NoReturn

import torch
from torch import Tensor, nn

from minibalora.base.errors import InputError
from minibalora.checkpoints.adapter_config import SUBTRACTED_INITS, init_of, setting
from minibalora.checkpoints.adapter_file import Adapter
from minibalora.checkpoints.weights import checkpoint_of, embedding_name, is_stored_transposed, read


def check_layer(model: nn.Module, name: str, linear: nn.Linear | None, adapter: Adapter) -> None:
    """Raise InputError unless the adapter's factors for `name` fit its config and a linear layer of the model."""
    where, config = f"{adapter.file}: {name}", adapter.config
    factors, rank = adapter.factors[name], setting(config, "r", "rank_pattern", name)
    lora_A, lora_B = (factors[part] for part in ("AB" if "A" in factors else ("w1_b", "w1_a")))
    m, n = lora_A.shape[-1] if lora_A.ndim else 0, len(lora_B) if lora_B.ndim else 0
    shapes_of = dict.fromkeys(("A", "w1_b", "w2_b"), (rank, m)) | dict.fromkeys(("B", "w1_a", "w2_a"), (n, rank))
    shapes_of |= {"E": (rank, 1), "magnitude_vector": (n,)}
    if any(factor.shape != shapes_of[part] for part, factor in factors.items()):
        shapes = f"factors of shape {' and '.join(str(list(factor.shape)) for factor in factors.values())}"
        raise InputError(f"{where} has {shapes}, but adapter_config.json says rank {rank}: "
                         "use the two files that were saved together")  # fmt: skip
    if linear is None:
        _refuse_name(model, name, adapter)
    if _is_resized(model, len(lora_B), linear.weight) and lora_A.shape[1] == linear.in_features:
        raise InputError(_resized(where, len(lora_B), linear.weight))
    if (lora_A.shape[1], len(lora_B)) != (linear.in_features, linear.out_features):
        sizes = f"{lora_A.shape[1]} x {len(lora_B)}, but the model's layer is {linear.in_features} x "
        raise InputError(f"{where} is {sizes}{linear.out_features}: it is for another base{_base_of(adapter)}: "
                         "give that one")  # fmt: skip
    init = init_of(config)
    alpha = setting(config, "lora_alpha", "alpha_pattern", name)
    if init in SUBTRACTED_INITS and (rank > min(linear.weight.shape) or alpha <= 0):
        shape = list(linear.weight.shape)
        raise InputError(f"{where} has rank {rank} and alpha {alpha}, which {init} can't have for a layer of {shape}: "
                         "use the two files that were saved together")  # fmt: skip
    if config["peft_type"] == "LOHA" and is_stored_transposed(model, f"{name}.weight"):
        raise InputError(
            f"{where} is a LoHa, which PEFT does not have for GPT-2's layers: give the base that it is for"
        )
    if init == "olora" and is_stored_transposed(model, f"{name}.weight"):  # PEFT factors these the other way round
        raise InputError(f"{where}: init_lora_weights is 'olora', which is not implemented for GPT-2's layers: merge "
                         "the adapter in PEFT")  # fmt: skip


def _refuse_name(model: nn.Module, name: str, adapter: Adapter) -> NoReturn:
    """Raise InputError, which says what `name` is instead of a linear layer."""
    modules, checkpoint = dict(model.named_modules()), checkpoint_of(model)
    if name in modules:
        kind = type(modules[name]).__name__.lower()
        raise InputError(f"{adapter.file}: adapts {name} ({kind}), but only linear layers are adapted here: merge it "
                         "in PEFT")  # fmt: skip
    if checkpoint is not None and f"{checkpoint.family.names.backbone}.{name}" in modules:
        raise InputError(f"{adapter.file}: {name}: the adapter was trained on the model without its head (AutoModel), "
                         f"whose names lack {checkpoint.family.names.backbone!r}: merge the adapter in PEFT, into "
                         "AutoModel")  # fmt: skip
    raise InputError(f"{adapter.file}: {name} is not a linear layer of this model: it is for another base"
                     f"{_base_of(adapter)}: give that one")  # fmt: skip


def checked_whole(model: nn.Module, adapter: Adapter) -> dict[str, Tensor]:
    """Return the parameters that replace the base's. An embedding or head that only repeats the base's is left out.

    Raises InputError unless every tensor fits the model, and the adapter has all of each module that it replaces and
    all that the base lacks.
    """
    checkpoint, parameters, whole = checkpoint_of(model), dict(model.named_parameters()), {}
    for stored_name, value in (*adapter.whole.items(), *adapter.repeated.items()):
        _check_shape(model, stored_name, value, parameters.get(_own_name(model, stored_name)), adapter)
    if _is_tied(model) and any(name.startswith("lm_head") for name in adapter.factors):
        _refuse_tied(adapter, "lm_head")
    for stored_name, value in adapter.whole.items():
        name = _own_name(model, stored_name)
        if len(parameters[name]) == _vocabulary(model) and _is_same(value, base_value(model, name)):
            continue
        if _is_tied(model) and name == embedding_name(model):
            _refuse_tied(adapter, stored_name)
        whole[name] = value
    _check_repeated(model, adapter)
    to_save = [*(adapter.config.get("modules_to_save") or ()), *(checkpoint.new_modules if checkpoint else ())]
    for name in parameters:
        if name not in adapter.whole and any(f".{module}." in f".{name}" for module in to_save):
            raise InputError(f"{adapter.file}: lacks {name}, which modules_to_save names or the base lacks, too: save "
                             "the adapter again, with modules_to_save")  # fmt: skip
    return whole


def _check_repeated(model: nn.Module, adapter: Adapter) -> None:
    """Raise InputError unless the base's weights that the adapter repeats are the model's. Two kinds are not compared:
    a classifier's head, which may be new, and weights from which PiSSA or OLoRA subtracted factors."""
    head = tuple(f"{module}." for module in getattr(model, "own_head", ()))
    is_subtracted = init_of(adapter.config) in SUBTRACTED_INITS
    for stored_name, value in adapter.repeated.items():
        name = _own_name(model, stored_name)
        if not is_subtracted and not name.startswith(head) and not _is_same(value, base_value(model, name)):
            raise InputError(f"{adapter.file}: stores the base's {name}, and this model's differs: give the base that "
                             "the adapter was trained on, or merge it in PEFT")  # fmt: skip


def _check_shape(model: nn.Module, name: str, value: Tensor, parameter: Tensor | None, adapter: Adapter) -> None:
    """Raise InputError, which says why, unless a tensor that is saved whole has a parameter of its shape."""
    where, labels = f"{adapter.file}: {name}", getattr(model, "num_labels", None)
    has = "none" if parameter is None else list(parameter.shape)
    shapes = f"has shape {list(value.shape)}, but the model has {has}"
    if parameter is None and labels is None and adapter.config.get("task_type") == "SEQ_CLS":
        raise InputError(f"{where} {shapes}: the adapter is a classifier's: load the base with head='classifier'")
    if parameter is not None and value.shape == parameter.shape:
        return
    if parameter is not None and value.shape[1:] == parameter.shape[1:]:
        if _is_resized(model, len(value), parameter):
            raise InputError(_resized(where, len(value), parameter))
        if len(parameter) == labels:
            raise InputError(f"{where} {shapes}: its head is for {len(value)} classes: load the base with as many")
    raise InputError(f"{where} {shapes}: it is for another base or head{_base_of(adapter)}: give that one")


def _vocabulary(model: nn.Module) -> int | None:
    return getattr(getattr(model, "config", None), "vocab_size", None)


def _is_resized(model: nn.Module, rows: int, parameter: Tensor) -> bool:
    """Return whether `parameter` has a row for each token and the adapter has another number of rows."""
    return len(parameter) == _vocabulary(model) != rows


def _resized(where: str, rows: int, parameter: Tensor) -> str:
    return (
        f"{where} has rows for {rows} tokens, but the base has {len(parameter)}: tokens were added and the vocabulary "
        "resized, which is not implemented: call the base's resize_token_embeddings in transformers, merge the adapter "
        "in PEFT, and save the result with its tokenizer"
    )


def _is_tied(model: nn.Module) -> bool:
    return getattr(model, "num_labels", 0) is None and model.config.tie_word_embeddings


def _refuse_tied(adapter: Adapter, name: str) -> NoReturn:
    reason = "head and embedding of this model are one tensor (tie_word_embeddings), which would become two"
    raise InputError(f"{adapter.file}: changes {name}, but {reason}: not implemented, merge the adapter in PEFT")


def _own_name(model: nn.Module, name: str) -> str:
    """Return the model's name of what a file calls `name`: the embedding's for its copies, such as a tied head."""
    checkpoint = checkpoint_of(model)
    is_copy = checkpoint is not None and re.fullmatch(checkpoint.family.names.copies, name)
    return embedding_name(model) if is_copy or (_is_tied(model) and name == "lm_head.weight") else name


def base_value(model: nn.Module, name: str) -> Tensor:
    """Return the base's numbers, from its file if the model is a `weights.skeleton`."""
    parameter = model.get_parameter(name)
    return read(model.checkpoint.stored[name], name) if parameter.is_meta else parameter


def _is_same(value: Tensor, base: Tensor) -> bool:
    """Return whether two tensors are equal in the dtype of one of them: each may have been rounded to its own."""
    value = value.to(base.device)
    return torch.equal(value, base.to(value.dtype)) or torch.equal(value.to(base.dtype), base)


def _base_of(adapter: Adapter) -> str:
    base = adapter.config.get("base_model_name_or_path")
    return f" ({base})" if base else ""
