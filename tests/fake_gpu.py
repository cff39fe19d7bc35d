"""Make a device "gpu" from the CPU, with a GPU's rules, and note where its host waits. Import this before the project.

Tensors on "gpu" have their memory and their kernels on the CPU, so their numbers are right. Only the rules are a GPU's:
an operation whose tensors are on different devices raises, and one that makes the host wait is counted for the file of
the project that asked for it. The project is imported with every "cuda" in its source replaced by "gpu", so that it
takes the branches that it takes on CUDA. The device can't be removed from the process again.
"""

import sys
from collections import Counter
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch.utils import backend_registration

ROOT = Path(__file__).resolve().parent.parent
WAITS = Counter()  # file of the project, or "autograd" if an operation comes from a backward pass -> waits

# Operations whose result, or its shape, or an error, depends on numbers that the host has to read.
READS = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive"}
READS |= {"bincount", "repeat_interleave", "histc", "_linalg_eigh", "_linalg_svd", "_linalg_eigvals", "linalg_eig"}
SET, ON_CPU = torch.ops.aten.set_.source_Storage_storage_offset, DispatchKeySet(DispatchKey.CPU)
INDEXING = {
    "index",
    "index_put_",
    "_index_put_impl_",
    "_unsafe_index",
}  # a GPU's may have CPU indices, and uploads them


def run(op, *args, **kwargs):
    """Run an operation of the device "gpu": the CPU's on the same memory."""
    name, tensors, storages, aliases = op.__name__.partition(".")[0], [], {}, {}

    def down(x: object) -> object:
        if isinstance(x, torch.device):
            return torch.device("cpu")
        if not isinstance(x, Tensor):
            return x
        tensors.append(x)
        if x.device.type == "cpu":
            return x
        storage = x.untyped_storage()
        alias = torch.empty(0, dtype=x.dtype).set_(storage.cpu, x.storage_offset(), x.shape, x.stride())
        storages[storage.cpu._cdata], aliases[id(alias)] = (storage, x.is_inference()), (alias, x)
        return alias

    def up(x: object) -> object:
        if not isinstance(x, Tensor):
            return x
        if id(x) in aliases:
            return aliases[id(x)][1]
        storage, is_inference = storages.get(x.untyped_storage()._cdata, (None, torch.is_inference_mode_enabled()))
        with torch.inference_mode(is_inference):  # a view of an ordinary tensor is one
            return point(torch._C._acc.create_empty_tensor((0,), x.dtype), storage or twin(x.untyped_storage()), x)

    args, kwargs = mapped(down, args), {key: mapped(down, value) for key, value in kwargs.items()}
    if name == "_fused_sdp_choice":
        return 0  # attention in the plain form, of operations that come here
    check(name, tensors, args)
    result = args[1].copy_(args[0]) if name == "_copy_from" else op(*args, **kwargs)
    for alias, x in aliases.values():
        if alias.shape != x.shape:  # an output that was empty
            point(x, twin(alias.untyped_storage()), alias)
    return mapped(up, result)


def mapped(function: Callable, value: object) -> object:
    """Apply a function to every entry of lists and tuples."""
    return type(value)(mapped(function, x) for x in value) if isinstance(value, list | tuple) else function(value)


def check(name: str, tensors: list[Tensor], args: tuple) -> None:
    """Raise if an operation mixes devices as CUDA's may not, and note it if the host waits for it."""
    on_host = [x for x in tensors if x.device.type == "cpu"]
    is_free = name == "_copy_from" or name in INDEXING  # CPU numbers without a dimension are scalars
    if not is_free and any(x.ndim > 0 for x in on_host):
        raise RuntimeError(f"{name}: Expected all tensors to be on the same device, but {where()} mixes gpu and cpu")
    if name == "_copy_from":
        is_wait = on_host and not (on_host[0].is_pinned() and args[2:] == (True,))
    else:
        is_wait = (
            name in READS
            or name in INDEXING
            and any(x.device.type == "cpu" or x.dtype == torch.bool for x in tensors[1:])
        )
    if is_wait:
        WAITS[where()] += 1


def twin(cpu: torch.UntypedStorage) -> torch.UntypedStorage:
    """Return a storage of the device "gpu" with the same memory."""
    storage = torch._C._construct_storage_from_data_pointer(cpu.data_ptr(), torch.device("gpu", 0), cpu.nbytes())
    storage.cpu = cpu  # keeps the memory
    return storage


def point(tensor: Tensor, storage: torch.UntypedStorage, like: Tensor) -> Tensor:
    """Make a tensor the part of a storage that `like` is of its own, and return it."""
    return SET.redispatch(ON_CPU, tensor, storage, like.storage_offset(), like.shape, like.stride())


def where() -> str:
    """Return the innermost file of the project on the stack; tests are not in it."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if ROOT in path.parents and path.parent != ROOT / "tests":
            return str(path.relative_to(ROOT))
        frame = frame.f_back
    return "autograd"


def pinned(tensor: Tensor) -> Tensor:
    copy = tensor.clone()
    copy.untyped_storage().is_in_pinned_memory = True
    return copy


class DeviceModule(backend_registration._DummyBackendModule):
    """torch.gpu, in place of torch.cuda."""

    device = torch.device
    get_rng_state = staticmethod(lambda device=None: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, device=None: torch.set_rng_state(state))
    is_bf16_supported = staticmethod(lambda including_emulation=True: True)
    max_memory_allocated = staticmethod(lambda device=None: 0)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16])
    get_device_capability = staticmethod(lambda device=None: (9, 0))
    get_device_name = staticmethod(lambda device=None: "imitation")


class FindProject(PathFinder):
    """Import the project with "gpu" for "cuda"."""

    @classmethod
    def find_spec(cls, name: str, path=None, target=None):
        if name.partition(".")[0] not in ("minibalora", "train_nlg", "train_nlu"):
            return None
        spec = super().find_spec(name, path, target)
        source = Path(spec.origin).read_text(encoding="utf-8").replace("cuda", "gpu")
        spec.loader.get_code = lambda _: compile(source, spec.origin, "exec")
        return spec


backend_registration._setup_privateuseone_for_python_backend("gpu", backend_module=DeviceModule())
torch.version.gpu = "imitation"
torch.backends.gpu = SimpleNamespace(matmul=SimpleNamespace(allow_tf32=False))
Tensor.pin_memory = pinned
Tensor.is_pinned = lambda tensor: hasattr(tensor.untyped_storage(), "is_in_pinned_memory")
LIBRARY = torch.library.Library("_", "IMPL")  # what it registers is there as long as it is
LIBRARY.fallback(run, "PrivateUse1")
sys.meta_path.insert(0, FindProject)
sys.path.insert(0, str(ROOT))
