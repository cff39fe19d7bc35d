"""Run both training scripts on "gpu", a device that this file makes from the CPU, and report where a GPU's host waits.

`test_cuda_guard.py` runs this file in a process of its own, because a device can't be unregistered. Tensors on "gpu"
have their memory and kernels on the CPU, so their numbers are right. Only the rules are a GPU's: an operation whose
tensors are on different devices raises, and an operation that makes the host wait is noted with the file of the project
that asked for it. The project is imported with every "cuda" in its source replaced by "gpu", so that it takes the same
branches as on CUDA.
"""

import json
import shutil
import sys
import tempfile
from collections import Counter
from contextlib import redirect_stdout
from importlib.machinery import PathFinder
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map_only

ROOT = Path(__file__).resolve().parent.parent
WAITS = Counter()  # file of the project, or "autograd" if an operation comes from a backward pass -> waits

# Operations whose result, or its shape, or an error, depends on numbers that the host has to read.
READS = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive"}
READS |= {"bincount", "repeat_interleave", "histc", "_linalg_eigh", "_linalg_svd", "_linalg_eigvals", "linalg_eig"}
SET, ON_CPU = torch.ops.aten.set_.source_Storage_storage_offset, DispatchKeySet(DispatchKey.CPU)
INDEXING = {"index", "index_put_", "_index_put_impl_", "_unsafe_index"}  # a GPU's may have CPU indices, and uploads them


def run(op, *args, **kwargs):
    """Run an operation of the device "gpu": the CPU's on the same memory."""
    name, twins, aliases = op.__name__.partition(".")[0], {}, {}
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if name == "_copy_from":
        note_copy(*args, **kwargs)
    elif name == "_fused_sdp_choice":
        return 0  # the plain form, of operations that are checked here
    elif name in READS or name in INDEXING and any(x.dtype == torch.bool or not x.is_gpu for x in tensors[1:]):
        WAITS[where()] += 1
    if name not in {"_copy_from"} | INDEXING and any(x.ndim > 0 and not x.is_gpu for x in tensors):
        raise RuntimeError(f"{name}: Expected all tensors to be on the same device, but {where()} mixes gpu and cpu")

    def down(x: Tensor) -> Tensor:
        if not x.is_gpu:
            return x
        storage = x.untyped_storage()
        alias = torch.empty(0, dtype=x.dtype).set_(storage.cpu, x.storage_offset(), x.shape, x.stride())
        twins[storage.cpu._cdata], aliases[id(alias)] = (storage, x.is_inference()), (alias, x)
        return alias

    def up(x: Tensor) -> Tensor:
        if id(x) in aliases:
            return aliases[id(x)][1]
        storage, is_inference = twins.get(x.untyped_storage()._cdata, (None, torch.is_inference_mode_enabled()))
        with torch.inference_mode(is_inference):  # a view of an ordinary tensor is one
            return point(torch._C._acc.create_empty_tensor((0,), x.dtype), storage or twin(x.untyped_storage()), x)

    args, kwargs = tree_map_only(Tensor, down, (args, kwargs))
    args, kwargs = tree_map_only(torch.device, lambda _: torch.device("cpu"), (args, kwargs))
    result = args[1].copy_(args[0]) if name == "_copy_from" else op(*args, **kwargs)
    for alias, x in aliases.values():
        if alias.shape != x.shape:  # an output that was empty
            point(x, twin(alias.untyped_storage()), alias)
    return tree_map_only(Tensor, up, result)


def twin(cpu: torch.UntypedStorage) -> torch.UntypedStorage:
    """Return a storage of the device "gpu" with the same memory."""
    storage = torch._C._construct_storage_from_data_pointer(cpu.data_ptr(), torch.device("gpu", 0), cpu.nbytes())
    storage.cpu = cpu  # keeps the memory
    return storage


def point(tensor: Tensor, storage: torch.UntypedStorage, like: Tensor) -> Tensor:
    """Make a tensor the part of a storage that `like` is of its own, and return it."""
    return SET.redispatch(ON_CPU, tensor, storage, like.storage_offset(), like.shape, like.stride())


def note_copy(source: Tensor, target: Tensor, non_blocking: bool = False) -> None:
    """Note a copy between host and GPU that the host waits for: all but asynchronous ones of pinned memory."""
    on_host = [x for x in (source, target) if not x.is_gpu]
    if on_host and not (non_blocking and on_host[0].is_pinned()):
        WAITS[where()] += 1


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
    max_memory_allocated = staticmethod(lambda device=None: 0)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16])


def make_device() -> torch.library.Library:
    """Make the device. It is there as long as the result is."""
    backend_registration._setup_privateuseone_for_python_backend("gpu", backend_module=DeviceModule())
    torch.backends.gpu = SimpleNamespace(matmul=SimpleNamespace(allow_tf32=False))
    Tensor.pin_memory = pinned
    Tensor.is_pinned = lambda tensor: hasattr(tensor.untyped_storage(), "is_in_pinned_memory")
    library = torch.library.Library("_", "IMPL")
    library.fallback(run, "PrivateUse1")
    return library


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


# The runs.

MODELS = {
    "llama3": [],
    "gpt2": ["--grad-checkpoint"],
    "t5": ["--quantize", "nf4"],
    "gemma2": [],
    "mixtral": ["--router-aux-loss", 0.01],
    "bert": ["--task", "custom", "--text-field", "prompt", "--label-field", "label"],
}
STEP = ["--rank", 3, "--batch-size", 4, "--micro-batch-size", 2, "--max-steps", 4, "--non-target-kl", 0.1]
STEP += ["--max-length", 16, "--dtype", "float32"]


def write_checkpoint(name: str, folder: Path) -> None:
    """Copy a golden checkpoint and give it a tokenizer, of a token for each character."""
    shutil.copytree(GOLDEN / name, folder)
    vocabulary = {token: number for number, token in enumerate(["<pad>", "</s>", "<s>", "<unk>", *"0123456789+="])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = Split(Regex("."), "isolated")
    backend.post_processor = TemplateProcessing(single="$A </s>", pair="$A </s> $B:1", special_tokens=[("</s>", 1)])
    backend.save(str(folder / "tokenizer.json"))
    rows = [{"prompt": f"{n}+{n % 5}=", "completion": f"{n + n % 5}", "label": "abc"[n % 3]} for n in range(16)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))


def waits_of(work, *arguments) -> Counter:
    before = Counter(WAITS)
    work(*arguments)
    return WAITS - before


def train(name: str, folder: Path, device: str) -> tuple[list[float], Counter]:
    """Return the losses of a run of a script, and the waits of its third step, from update to update."""
    data, out = folder / "rows.jsonl", folder / device
    flags = [*STEP, *MODELS[name], "--model", folder, "--data", data, "--device", device, "--out", out]
    flags += ["--eval", data] if name == "bert" else ["--template", "raw"]
    marks, update = [], Run.update

    def noted(run: Run) -> None:
        update(run)
        marks.append(Counter(WAITS))

    Run.update = noted
    try:
        assert status_of((train_nlu if name == "bert" else train_nlg).main, *flags) == 0
    finally:
        Run.update = update
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").open()], marks[2] - marks[1]


def use(name: str, folder: Path) -> dict[str, Counter]:
    """Return the waits of evaluation on two batches, and of each token in generation."""
    if name == "bert":
        model, rows = mb.load_model(folder, "classifier", device="gpu"), [ClassRow(np.arange(9), np.zeros(9), 0, 0, 0)]
        return {"evaluation": waits_of(answers, model, 4 * rows, 2, "gpu")}
    model, prompts = mb.load_model(folder, device="gpu"), [[5, 6, 7], [8, 9]]
    rows = [Row(np.arange(9), 4, 0)] * 4

    def of_token(**settings) -> Counter:
        three, four = (waits_of(generate_ids, model, prompts, Decoding(count, **settings)) for count in (3, 4))
        return four - three

    drawn = of_token(temperature=1.0, top_p=0.9)
    return {"evaluation": waits_of(mean_loss, model, rows, 2), "greedy": of_token(), "drawn": drawn}


def report(name: str) -> dict:
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / name
        write_checkpoint(name, folder)
        (on_cpu, _), (on_gpu, step) = (train(name, folder, device) for device in ("cpu", "gpu"))
        return {"losses": [on_cpu, on_gpu], "step": step} | use(name, folder)


def as_on_the_host(states: list[Tensor]) -> list[Tensor]:
    return [torch.zeros(state.shape) for state in states]


PLANTS = {
    "item": lambda states: [state + state.sum().item() * 0 for state in states],
    "cpu": lambda states: [state.cpu().to("gpu") for state in states],
    "device": as_on_the_host,
}

if __name__ == "__main__":
    device = make_device()
    sys.meta_path.insert(0, FindProject)
    sys.path.insert(0, str(ROOT))
    import numpy as np
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from tokenizers.processors import TemplateProcessing

    import minibalora as mb
    import train_nlg
    import train_nlu
    from helpers import GOLDEN, status_of
    from minibalora.data.batches import Row
    from minibalora.data.labelled import ClassRow
    from minibalora.evaluation.classify import answers
    from minibalora.evaluation.decoding import Decoding, generate_ids
    from minibalora.evaluation.perplexity import mean_loss
    from minibalora.run.loop import Run

    if plant := sys.argv[1:]:
        right = train_nlg.teacher_states
        train_nlg.teacher_states = lambda *arguments: PLANTS[plant[0]](right(*arguments))
    with redirect_stdout(sys.stderr):
        reports = {name: report(name) for name in (["llama3"] if plant else MODELS)}
    print(json.dumps(reports))
