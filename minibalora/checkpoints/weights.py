"""From a folder as Hugging Face hands it out to a model: safetensors, checked before allocating.

No pickle is read and no code from a checkpoint is run. Peak host memory is the model once, plus one tensor where the
dtype changes: the model is built without storage (on the meta device) and gets its tensors from memory-mapped files,
one shard at a time. On a CPU, in the file's own dtype, weights stay mapped and are not copied at all.
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
from minibalora.checkpoints.config import Family
from minibalora.checkpoints.families import read_family

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # as safetensors spells them
MIB = 1 << 20
NEW_LAYER_NORM = {"gamma": "weight", "beta": "bias"}


def load_model(
    path: str | Path,
    head: str = "lm",
    num_labels: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """The model in the folder `path`, in eval mode, its parameters in `dtype` on `device`.

    head "lm": model(input_ids) -> logits (B, T, V); a T5 is asked model(input_ids, attention_mask, decoder_input_ids).
    "classifier": (B, num_labels); None means as many as the stored head has, or 2. A head that the file lacks is drawn
    from torch's generator: `model.checkpoint.new_modules` names it, and `model.own_head` what `adapt` leaves trainable.
    Raises InputError, which names file and tensor, for anything missing, superfluous, misshapen, not finite, or not
    implemented.
    """
    model = skeleton(path, head, num_labels)
    for name, stored in model.checkpoint.stored.items():
        set_parameter(model, name, nn.Parameter(read(stored, name, dtype, device)))
    for name in model.checkpoint.new_modules:
        _draw(model.get_submodule(name), model.config.initializer_range, dtype, device)
    return model


def skeleton(path: str | Path, head: str = "lm", num_labels: int | None = None) -> nn.Module:
    """The model of `load_model` before its numbers are read; all shapes are checked against the files.

    Parameters are on the meta device, in the dtype of the file; `model.checkpoint.stored` says where each of them is.
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
    if head == "classifier" and num_labels is None:
        shape = stored[names.classes].shape if names.classes in stored else ()
        num_labels = shape[0] if shape else 2
    model = empty_model(family, config, num_labels)
    stored = by_our_names(stored, model)
    embedding, copies = embedding_name(model), [name for name in stored if re.fullmatch(names.copies, name)]
    if copies and embedding not in stored:  # as programs write it that leave out what is there twice
        stored[embedding] = stored[copies[0]]
    parts = [] if head == "lm" else [part for part in (names.pooler, names.head) if part is not None]
    new_modules = [part for part in parts if not any(name.startswith(f"{part}.") for name in stored)]
    model.own_head = [part for part in parts if part == names.head or part in new_modules]
    check_tensors(folder, model, stored, new_modules)
    for name in copies:
        _check_copy(stored[embedding], stored[name], name, "download the weights again")
    if head == "lm" and config.tie_word_embeddings and "lm_head.weight" in stored:
        _check_copy(stored[embedding], stored["lm_head.weight"], "lm_head.weight", "set tie_word_embeddings to false")

    stored = {name: stored[name] for name, _ in model.named_parameters() if name in stored}
    model.checkpoint = Checkpoint(folder, family, stored, new_modules)
    for name, tensor in stored.items():
        empty = torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype], device="meta")
        set_parameter(model, name, nn.Parameter(empty))
    return model.eval()


def _check_amount(folder: Path, config: object, tensors: int) -> None:
    """InputError for more layers or experts than tensors, before they are built: a wrong number may be a million."""
    layers, experts = layers_and_experts(config)
    if max(layers, experts) > tensors:
        parts = f"{layers} hidden layers" + (f" and {experts} experts in all" if experts else "")
        raise InputError(f"{folder}: config.json has {parts}, but the weights are {tensors} tensors: download both")


def layers_and_experts(config: object) -> tuple[int, int]:
    """How many there are in all."""
    return config.num_hidden_layers, getattr(config, "num_experts", 0) * sum(getattr(config, "has_experts", ()))


def empty_model(family: Family, config: object, num_labels: int | None) -> nn.Module:
    """The model of a configuration on the meta device: shapes without numbers, and a checkpoint without a folder."""
    with torch.device("meta"), _NoInitialValues():
        model = family.build(config, num_labels)
    model.checkpoint = Checkpoint(None, family)
    return model


class _NoInitialValues(TorchFunctionMode):
    """Inside, torch.nn.init does nothing: there is nothing to fill, and on the meta device its normal_ imports torch's
    compiler, two seconds of every start."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        is_initial = getattr(func, "__module__", "") == "torch.nn.init"
        return kwargs["tensor"] if is_initial else func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class StoredTensor:
    file: Path
    name: str  # in that file
    dtype: str
    shape: tuple[int, ...]  # as the model has it
    is_transposed: bool = False


@dataclass(frozen=True)
class Checkpoint:
    """`model.checkpoint`: what a model is read from."""

    folder: Path | None  # of config.json and tokenizer; None: the model is not read from files
    family: Family
    stored: dict[str, StoredTensor] = field(default_factory=dict)  # by the name of the model's parameter
    new_modules: list[str] = field(default_factory=list)  # parts of the classifier that the files lack


def checkpoint_of(model: nn.Module) -> Checkpoint | None:
    """None of a model that somebody else built."""
    found = getattr(model, "checkpoint", None)
    return found if isinstance(found, Checkpoint) else None


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Name -> file and shape of every tensor in the folder's safetensors, from the headers alone."""
    stored = {}
    for file, promised in _weight_files(folder).items():
        try:
            with safe_open(file, framework="pt") as shard:
                slices = {name: shard.get_slice(name) for name in shard.keys()}
                headers = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
        except FileNotFoundError:
            raise InputError(f"{file}: no such file, but the index names it: download the shard") from None
        except (SafetensorError, OSError, ValueError) as error:
            refuse_pointer(file)
            raise InputError(f"{file}: not a readable safetensors file ({error}): download it again") from None
        if absent := promised - headers.keys():
            raise InputError(f"{file}: lacks {_some(absent)}, which the index promises: download it again")
        for name, (dtype, shape) in headers.items():
            if name in stored:
                raise InputError(f"{file}: {name} is also in {stored[name].file.name}: download the folder again")
            stored[name] = StoredTensor(file, name, dtype, shape)
    return stored


def _weight_files(folder: Path) -> dict[Path, set[str]]:
    """Each weight file and the tensors that the index, if there is one, promises in it."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return {single: set()}
    if not index.exists():
        if list(folder.glob("pytorch_model*.bin")):
            raise InputError(
                f"{folder}: has only pytorch_model.bin, a pickle, never read here: convert it with transformers, "
                "AutoModelForCausalLM (of an encoder AutoModel, of T5 AutoModelForSeq2SeqLM)"
                '.from_pretrained(folder).save_pretrained("new folder")'
            )
        raise InputError(f"{folder}: has neither {single.name} nor {index.name}: download the weights")
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: has no weight_map: download it again")
    files = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or file in ("", ".", "..") or "/" in file or "\\" in file:
            raise InputError(f"{index}: {name} is said to be in {file!r}, which is no file of this folder")
        files.setdefault(folder / file, set()).add(name)
    return files


def by_our_names(stored: dict[str, StoredTensor], model: nn.Module) -> dict[str, StoredTensor]:
    """The stored tensors by their names in our model.

    Files of a backbone alone leave its prefix out; old ones call LayerNorm's weight gamma and its bias beta, as
    TensorFlow does; GPT-2 stores its linears transposed.
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
    """Every name and shape against the model that config.json describes; InputError names the first that differ."""
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    new = tuple(f"{module}." for module in new_modules)
    if missing := {name for name in expected.keys() - stored.keys() if not name.startswith(new)}:
        files = ", ".join(sorted({tensor.file.name for tensor in stored.values()}))
        raise InputError(f"{folder}: {files or 'no file'} lacks {_some(missing)}: download the weights again")
    names = model.checkpoint.family.names
    for name, tensor in stored.items():
        if name in expected and tensor.dtype not in DTYPES:
            known = ", ".join(DTYPES)
            raise InputError(f"{tensor.file}: {name} is stored as {tensor.dtype}: use a checkpoint in {known}")
        if name in expected and tensor.shape != expected[name]:
            if name.startswith(f"{names.head}.") and tensor.shape[1:] == expected[name][1:]:
                labels = f"{tensor.shape[0]} classes, but {expected[name][0]} are asked for"
                raise InputError(f"{tensor.file}: its head {name} has {labels}: use the base checkpoint or that task")
            shapes = f"{list(tensor.shape)}, but config.json asks for {list(expected[name])}"
            raise InputError(f"{tensor.file}: {name} has shape {shapes}: config and weights are of different models")
    if superfluous := {name for name in stored.keys() - expected.keys() if not re.fullmatch(names.ignored, name)}:
        tensor = stored[min(superfluous)]
        raise InputError(f"{tensor.file}: holds {_some(superfluous)}, which a model of this config.json does not have")


def is_stored_transposed(model: nn.Module, name: str) -> bool:
    """Whether checkpoints of this model hold the tensor as (in, out), as GPT-2's Conv1D does."""
    checkpoint = checkpoint_of(model)
    return checkpoint is not None and re.fullmatch(checkpoint.family.names.transposed, name) is not None


def read(
    stored: StoredTensor,
    name: str,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    rows: slice | None = None,
) -> Tensor:
    """The tensor as the model has it, in its own dtype unless told otherwise; of it these rows, and no more is read.

    InputError, which calls it `name`, if a number is not finite.
    """
    tensor = _as_stored(stored, rows).to(device=device, dtype=dtype)
    # aminmax allocates nothing and passes NaN on
    if tensor.numel() > 0 and not torch.isfinite(torch.stack(tensor.aminmax())).all():
        raise InputError(f"{stored.file}: {name} has NaN or infinite values in {tensor.dtype}: download the file again")
    return tensor.T.contiguous() if stored.is_transposed else tensor


def _as_stored(stored: StoredTensor, rows: slice | None = None) -> Tensor:
    """rows: of the model's tensor, whose columns these are in a file that has it transposed."""
    with safe_open(stored.file, framework="pt") as shard:  # opened anew: closing gives a mapped file's pages back
        if rows is None:
            return shard.get_tensor(stored.name)
        part = shard.get_slice(stored.name)
        return part[:, rows] if stored.is_transposed else part[rows]


def _draw(module: nn.Module, std: float, dtype: torch.dtype, device: torch.device | str) -> None:
    """Normal weights and zero biases, as transformers begins a new head; drawn on the CPU, the same everywhere."""
    for name, parameter in list(module.named_parameters()):
        values = torch.zeros(parameter.shape) if name.endswith("bias") else std * torch.randn(parameter.shape)
        set_parameter(module, name, nn.Parameter(values.to(device=device, dtype=dtype)))


def embedding_name(model: nn.Module) -> str | None:
    """What the parameter is called that a tied head would be; None of an encoder."""
    weight = model.embedding.weight if hasattr(model, "embedding") else None
    return next((name for name, parameter in model.named_parameters() if parameter is weight), None)


def _check_copy(embedding: StoredTensor, copy: StoredTensor, name: str, cure: str) -> None:
    """Some files repeat the embedding, for instance as a tied head; if the copy differs, it would be silently lost."""
    same = copy.shape == embedding.shape and torch.equal(_as_stored(copy).float(), _as_stored(embedding).float())
    if not same:
        raise InputError(f"{copy.file}: {name} differs from the embedding: {cure}")


def set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """In the place of the one that is there, which says whether it is trained: a mixture's router never is."""
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, parameter.requires_grad_(model.get_parameter(name).requires_grad))


def _some(names: set[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")


def weights_digest(folder: str | Path, every_byte: bool = False) -> str:
    """SHA-256 over config, tokenizer and, of each weight file, its size, first and last MiB: which checkpoint it is.

    It reads a few MiB where a digest of every byte would read gigabytes, a second for each; what was merged into the
    middle of a file it may not see, so what must not be wrong asks for every byte. Raises InputError as `load_model`
    does where a header can't be read.
    """
    folder = Path(folder)
    digest = hashlib.sha256()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "spm.model"):
        digest.update((folder / name).read_bytes() if (folder / name).exists() else b"")
    for path in sorted({tensor.file for tensor in stored_tensors(folder).values()}):
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            for start in range(0, size, MIB) if every_byte else (0, max(0, size - MIB)):
                file.seek(start)
                digest.update(file.read(MIB))
            digest.update(str(size).encode())
    return digest.hexdigest()
