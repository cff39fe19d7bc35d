"""Load a model from a folder in Hugging Face's format: safetensors, checked before memory is allocated.

No pickle is read and no code from a checkpoint is run. Peak host memory is the size of the model, plus one tensor where
the dtype changes: the model is built without storage (on the meta device) and takes its tensors from memory-mapped
files, one shard at a time. On a CPU, in the file's own dtype, weights stay mapped and are never copied.
"""

import hashlib
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minibalora.base.errors import InputError
from minibalora.base.files import read_json_object, refuse_pointer
from minibalora.checkpoints.config import Family, refuse_adapter
from minibalora.checkpoints.families import read_family

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # by safetensors' names
MIB = 1 << 20
DIGESTED = ("config.json", "tokenizer.json", "tokenizer_config.json", "spm.model")  # beside the weights
DIGESTED += ("special_tokens_map.json", "added_tokens.json", "generation_config.json", "chat_template.jinja")
NEW_LAYER_NORM = {"gamma": "weight", "beta": "bias"}


def load_model(
    path: str | Path,
    head: str = "lm",
    num_labels: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Load the model in the folder `path`, in eval mode, with parameters in `dtype` on `device`.

    head "lm": model(input_ids) -> logits (B, T, V); for T5, model(input_ids, attention_mask, decoder_input_ids).
    head "classifier": model(input_ids) -> logits (B, num_labels); None means the stored head's number of labels, or 2.
    A head that the files lack, or have for another number of classes, is drawn from torch's generator.
    `model.checkpoint.new_modules` names drawn modules, and `model.own_head` the modules that `adapt` leaves trainable:
    these, the head, and a pooler that was never trained.
    Raises InputError, which names file and tensor, if a tensor is missing, unexpected, misshapen or not finite, or if
    something is not implemented.
    """
    model = skeleton(path, head, num_labels)
    for name, stored in model.checkpoint.stored.items():
        set_parameter(model, name, nn.Parameter(read(stored, name, dtype, device)))
    for name in model.checkpoint.new_modules:
        _draw(model.get_submodule(name), model.config.initializer_range, dtype, device)
    return model


def skeleton(path: str | Path, head: str = "lm", num_labels: int | None = None) -> nn.Module:
    """Return the model of `load_model` without its numbers. All shapes are checked against the files.

    Parameters are on the meta device, in the file's dtype; `model.checkpoint.stored` says where each one is stored.
    """
    folder = Path(path)
    if head not in ("lm", "classifier") or (head == "lm" and num_labels is not None):
        raise InputError(f"head {head!r} with num_labels {num_labels}: give 'lm', without labels, or 'classifier'")
    if num_labels is not None and num_labels < 1:
        raise InputError(f"num_labels is {num_labels}: give at least 1 (1 is regression)")
    family, config = read_family(folder)
    names = family.names
    if head == "lm" and not family.has_language_model:
        raise InputError(f"{folder}: {family.transformers} is an encoder, which has no language model here: "
                         "give head='classifier', or use train_nlu.py")  # fmt: skip
    stored = stored_tensors(folder)
    _check_amount(folder, config, len(stored))
    _refuse_wrapper(folder, stored)
    if head == "classifier" and num_labels is None:
        shape = stored[names.classes].shape if names.classes in stored else ()
        num_labels = shape[0] if shape else 2
    model = empty_model(family, config, num_labels)
    stored = by_our_names(stored, model)
    is_other_head = names.classes in stored and stored[names.classes].shape[:1] != (num_labels,)
    if head == "classifier" and is_other_head:
        stored = {name: tensor for name, tensor in stored.items() if not name.startswith(f"{names.head}.")}
    embedding, copies = embedding_name(model), [name for name in stored if re.fullmatch(names.copies, name)]
    is_tied = getattr(config, "tie_word_embeddings", False) and "lm_head.weight" in stored
    if (copies or is_tied) and embedding not in stored:  # some programs store only one of several copies
        stored[embedding] = stored[copies[0] if copies else "lm_head.weight"]
    parts = [] if head == "lm" else [part for part in (names.pooler, names.head) if part is not None]
    new_modules = [part for part in parts if not any(name.startswith(f"{part}.") for name in stored)]
    check_tensors(folder, model, stored, new_modules)
    untrained_modules = [part for part in parts if part == names.pooler and _is_untrained(part, stored)]
    model.own_head = [part for part in parts if part in (names.head, *new_modules, *untrained_modules)]
    for name in copies:
        _check_copy(stored[embedding], stored[name], name, "download the weights again")
    if head == "lm" and is_tied:
        _check_copy(stored[embedding], stored["lm_head.weight"], "lm_head.weight", "set tie_word_embeddings to false")

    stored = {name: stored[name] for name, _ in model.named_parameters() if name in stored}
    model.checkpoint = Checkpoint(folder, family, stored, new_modules, untrained_modules)
    for name, tensor in stored.items():
        empty = torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype], device="meta")
        set_parameter(model, name, nn.Parameter(empty))
    return model.eval()


def _check_amount(folder: Path, config: object, tensors: int) -> None:
    """Raise InputError for more layers or experts than tensors, before a wrong number builds a million of them."""
    layers, experts = layers_and_experts(config)
    if max(layers, experts) > tensors:
        parts = f"{layers} hidden layers" + (f" and {experts} experts in all" if experts else "")
        raise InputError(f"{folder}: config.json has {parts}, but the weights are {tensors} tensors: download both")


def _refuse_wrapper(folder: Path, stored: dict[str, "StoredTensor"]) -> None:
    """Raise InputError if the weights were saved from inside a wrapper, which puts its name before all others, or with
    PEFT's layers in place of the model's."""
    for prefix, wrapper in (("_orig_mod.", "torch.compile"), ("module.", "DistributedDataParallel")):
        if stored and all(name.startswith(prefix) for name in stored):
            raise InputError(f"{folder}: all names of weights begin with {prefix}: save the model without the wrapper "
                             f"of {wrapper}")  # fmt: skip
    if any(re.search(r"^base_model\.model\.|\.base_layer\.|\.lora_[AB]\.", name) for name in stored):
        raise InputError(f"{folder}: the weights were saved from inside PEFT: call merge_and_unload() first, and save "
                         "what it returns")  # fmt: skip


def layers_and_experts(config: object) -> tuple[int, int]:
    """Return the numbers of layers and of experts in the whole model."""
    return config.num_hidden_layers, getattr(config, "num_experts", 0) * sum(getattr(config, "has_experts", ()))


def empty_model(family: Family, config: object, num_labels: int | None) -> nn.Module:
    """Return a configuration's model on the meta device: shapes without numbers, and a checkpoint without a folder."""
    with torch.device("meta"), _NoInitialValues():
        model = family.build(config, num_labels)
    model.checkpoint = Checkpoint(None, family)
    return model


class _NoInitialValues(TorchFunctionMode):
    """A mode in which torch.nn.init does nothing. Meta tensors have nothing to fill, and normal_ on them imports
    torch's compiler, which takes two seconds."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        is_initial = getattr(func, "__module__", "") == "torch.nn.init"
        return kwargs["tensor"] if is_initial else func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class StoredTensor:
    """The place of a tensor in a file."""

    file: Path
    name: str  # in the file
    dtype: str
    shape: tuple[int, ...]  # of the model's parameter
    is_transposed: bool = False


@dataclass(frozen=True)
class Checkpoint:
    """`model.checkpoint`: the files that a model is read from."""

    folder: Path | None  # of config.json and tokenizer; None if the model is not read from files
    family: Family
    stored: dict[str, StoredTensor] = field(default_factory=dict)  # by the names of the model's parameters
    new_modules: list[str] = field(default_factory=list)  # parts of the classifier that the files lack
    untrained_modules: list[str] = field(default_factory=list)  # its pooler, if the stored biases are all 0


def checkpoint_of(model: nn.Module) -> Checkpoint | None:
    """Return `model.checkpoint`, or None for a model that other code has built."""
    checkpoint = getattr(model, "checkpoint", None)
    return checkpoint if isinstance(checkpoint, Checkpoint) else None


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return every tensor in the folder's safetensors by its name. Reads the files' headers only."""
    stored = {}
    for file, names in _weight_files(folder).items():
        try:
            with safe_open(file, framework="pt") as shard:
                slices = {name: shard.get_slice(name) for name in shard.keys()}
                headers = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
        except FileNotFoundError:
            raise InputError(f"{file}: no such file, but the index names it: download the shard") from None
        except (SafetensorError, OSError, ValueError) as error:
            refuse_pointer(file)
            raise InputError(f"{file}: not a readable safetensors file ({error}): download it again") from None
        if missing := names - headers.keys():
            raise InputError(f"{file}: lacks {_some(missing)}, which the index says are there: download it again")
        for name, (dtype, shape) in headers.items():
            if name in stored:
                raise InputError(f"{file}: {name} is also in {stored[name].file.name}: download the folder again")
            stored[name] = StoredTensor(file, name, dtype, shape)
    return stored


def _weight_files(folder: Path) -> dict[Path, set[str]]:
    """Return the weight files and, for each, the names of its tensors according to the index, if there is one."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return {single: set()}
    if not index.exists():
        refuse_adapter(folder)
        if list(folder.glob("pytorch_model*.bin")):
            raise InputError(
                f"{folder}: has only pytorch_model.bin, a pickle, never read here: convert it with transformers, "
                "AutoModelForCausalLM (for an encoder AutoModel, for T5 AutoModelForSeq2SeqLM)"
                '.from_pretrained(folder).save_pretrained("new folder"), and copy the tokenizer files (tokenizer.json, '
                "tokenizer_config.json, *.model, vocab.*, merges.txt) into the new folder"
            )
        raise InputError(f"{folder}: has neither {single.name} nor {index.name}: download the weights")
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: has no weight_map: download it again")
    files = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or file in ("", ".", "..") or "/" in file or "\\" in file:
            raise InputError(f"{index}: puts {name} in {file!r}, which is not a file in this folder: download it again")
        files.setdefault(folder / file, set()).add(name)
    return files


def by_our_names(stored: dict[str, StoredTensor], model: nn.Module) -> dict[str, StoredTensor]:
    """Return the stored tensors by their names in our model.

    Files of a backbone alone leave out its prefix. Old files call LayerNorm's weight gamma and its bias beta, as
    TensorFlow does. GPT-2 stores its linears transposed.
    """
    expected, names = dict(model.named_parameters()), model.checkpoint.family.names
    is_bare = hasattr(model, names.backbone) and not any(name.startswith(f"{names.backbone}.") for name in stored)
    ours = {}
    for name, tensor in stored.items():
        name = re.sub(r"LayerNorm\.(gamma|beta)$", lambda m: f"LayerNorm.{NEW_LAYER_NORM[m[1]]}", name)
        if is_bare and name not in expected:
            name = f"{names.backbone}.{name}"
        if re.fullmatch(names.transposed, name):
            tensor = replace(tensor, shape=tensor.shape[::-1], is_transposed=True)
        ours[name] = tensor
    return ours


def check_tensors(folder: Path, model: nn.Module, stored: dict[str, StoredTensor], new_modules: list[str]) -> None:
    """Check all names and shapes against the model of config.json. Raises InputError for the first mismatch."""
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    new = tuple(f"{module}." for module in new_modules)
    if missing := {name for name in expected.keys() - stored.keys() if not name.startswith(new)}:
        files = ", ".join(sorted({tensor.file.name for tensor in stored.values()}))
        raise InputError(f"{folder}: {files or 'no file'} lacks {_some(missing)}: download the weights again")
    names = model.checkpoint.family.names
    for name, tensor in stored.items():
        if name in expected and tensor.dtype not in DTYPES:
            raise InputError(
                f"{tensor.file}: {name} is stored as {tensor.dtype}: use a checkpoint in {', '.join(DTYPES)}"
            )
        if name in expected and 0 in tensor.shape:
            raise InputError(f"{tensor.file}: {name} is empty, as DeepSpeed ZeRO-3 saves weights that it has not "
                             "gathered: run its zero_to_fp32.py, or download the weights again")  # fmt: skip
        if name in expected and tensor.shape != expected[name]:
            shapes = f"{list(tensor.shape)}, but config.json asks for {list(expected[name])}"
            raise InputError(f"{tensor.file}: {name} has shape {shapes}: config and weights are of different models")
    if unexpected := {name for name in stored.keys() - expected.keys() if not re.fullmatch(names.ignored, name)}:
        tensor = stored[min(unexpected)]
        raise InputError(f"{tensor.file}: holds {_some(unexpected)}, which a model of this config.json does not have: "
                         "config and weights are of different models")  # fmt: skip


def _is_untrained(pooler: str, stored: dict[str, StoredTensor]) -> bool:
    """Return whether all biases of a stored pooler are 0, as they are drawn: training would have changed them.

    This is so in all-MiniLM-L6-v2, which does not use its pooler. Frozen, it hands almost nothing to a new classifier.
    """
    bias = stored.get(f"{pooler}.dense.bias")
    return bias is not None and not _as_stored(bias).any()


def is_stored_transposed(model: nn.Module, name: str) -> bool:
    """Return whether checkpoints of this model store the tensor as (in, out), as for GPT-2's Conv1D."""
    checkpoint = checkpoint_of(model)
    return checkpoint is not None and re.fullmatch(checkpoint.family.names.transposed, name) is not None


def read(
    stored: StoredTensor,
    name: str,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    rows: slice | None = None,
) -> Tensor:
    """Read a tensor, or these rows of it only, oriented as in the model; dtype None keeps the file's.

    Raises InputError, which calls the tensor `name`, if a number is not finite.
    """
    tensor = _as_stored(stored, rows).to(device=device, dtype=dtype)
    # aminmax allocates nothing and propagates NaN
    if tensor.numel() > 0 and not torch.isfinite(torch.stack(tensor.aminmax())).all():
        raise InputError(f"{stored.file}: {name} has NaN or infinite values in {tensor.dtype}: download the file again")
    return tensor.T.contiguous() if stored.is_transposed else tensor


def _as_stored(stored: StoredTensor, rows: slice | None = None) -> Tensor:
    """Read a tensor as the file stores it. rows: the model's; in a file that stores the transpose they are columns."""
    with safe_open(stored.file, framework="pt") as shard:  # opened for each tensor: closing frees the mapped pages
        if rows is None:
            return shard.get_tensor(stored.name)
        part = shard.get_slice(stored.name)
        return part[:, rows] if stored.is_transposed else part[rows]


def _draw(module: nn.Module, std: float, dtype: torch.dtype, device: torch.device | str) -> None:
    """Fill a new head as transformers does: normal weights, zero biases. Drawn on the CPU, so devices do not matter."""
    for name, parameter in list(module.named_parameters()):
        values = torch.zeros(parameter.shape) if name.endswith("bias") else std * torch.randn(parameter.shape)
        set_parameter(module, name, nn.Parameter(values.to(device=device, dtype=dtype)))


@torch.no_grad()
def arrange_head(model: nn.Module, order: list[int] | None) -> None:
    """Put the stored classes of a classifier in another order: class i becomes what class order[i] was.

    None: they are other classes; draws a new head, and notes it in `model.checkpoint.new_modules`.
    """
    names = model.checkpoint.family.names
    if order is None:
        weight = model.get_parameter(names.classes)
        _draw(model.get_submodule(names.head), model.config.initializer_range, weight.dtype, weight.device)
        model.checkpoint.new_modules.append(names.head)
        return
    for name in (names.classes, names.classes.replace("weight", "bias")):
        if name in dict(model.named_parameters()):
            set_parameter(model, name, nn.Parameter(model.get_parameter(name)[order]))


def embedding_name(model: nn.Module) -> str | None:
    """Return the name of the embedding's weight, which a tied head shares; None for an encoder."""
    weight = model.embedding.weight if hasattr(model, "embedding") else None
    return next((name for name, parameter in model.named_parameters() if parameter is weight), None)


def _check_copy(embedding: StoredTensor, copy: StoredTensor, name: str, cure: str) -> None:
    """Raise InputError if a copy of the embedding, such as a tied head, differs from it: the copy is not loaded."""
    is_same = copy.shape == embedding.shape and torch.equal(_as_stored(copy).float(), _as_stored(embedding).float())
    if not is_same:
        raise InputError(f"{copy.file}: {name} differs from the embedding: {cure}")


def set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Replace the model's parameter `name`; the new one is trainable if the old one is. A mixture's router never is."""
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, parameter.requires_grad_(model.get_parameter(name).requires_grad))


def _some(names: set[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")


def weights_digest(folder: str | Path, every_byte: bool = False) -> str:
    """Return a SHA-256 that identifies a checkpoint: of config, tokenizer files, and each weight file's size and ends.

    The first and last MiB of each file take no time; every byte takes about a second per gigabyte. The short form may
    miss a change in the middle of a file: pass every_byte where that matters. Raises InputError as `load_model` does if
    a header can't be read.
    """
    folder = Path(folder)
    digest = hashlib.sha256()
    for name in DIGESTED:
        digest.update((folder / name).read_bytes() if (folder / name).exists() else b"")
    for path in sorted({tensor.file for tensor in stored_tensors(folder).values()}):
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            for start in range(0, size, MIB) if every_byte else (0, max(0, size - MIB)):
                file.seek(start)
                digest.update(file.read(MIB))
            digest.update(str(size).encode())
    return digest.hexdigest()
