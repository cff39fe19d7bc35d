"""Run a step on tensors without numbers: a model of any size takes no memory, and an operation takes microseconds.

`Empty` makes such tensors. Inside `LikeGPU`, they say that they are on a GPU, and attention, dropout and norms save for
the backward pass what CUDA's kernels save. It needs no torch with CUDA.
"""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch
from warnings import catch_warnings, simplefilter

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minibalora.models import decoder

aten = torch.ops.aten
HALF = (torch.bfloat16, torch.float16)
DEVICE = torch.ops.prim.device.default  # half of all operations on empty tensors


@contextmanager
def without_numbers(device: torch.device) -> Iterator[None]:
    """Make new tensors empty inside, as if on this device. Nothing is allocated on it."""
    with ExitStack() as stack:
        stack.enter_context(catch_warnings())
        simplefilter("ignore")  # torch.autocast warns if CUDA is missing
        stack.enter_context(Empty())
        if device.type != "cpu":
            # varlen_attn looks for the GPU: attention is then a call a row, which keeps the same tensors.
            stack.enter_context(patch.object(decoder, "has_varlen", lambda: False))
            stack.enter_context(LikeGPU(device))
        yield


class Empty(TorchDispatchMode):
    """Makes new tensors of floats empty, and everything that is computed from them. What is computed from numbers
    alone stays real: token ids, positions, masks.

    If a step asks for the value of an empty tensor, `all` is True, other booleans are False, and numbers are 1. `topk`
    returns every column equally often, so a mixture's router deals the tokens evenly to its experts.
    """

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is DEVICE:
            return args[0].fake_device
        kwargs, name = kwargs or {}, function.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            is_float = (kwargs.get("dtype") or torch.get_default_dtype()).is_floating_point
            if tensors or not (name == "empty" or (is_float and name in ("zeros", "ones", "full"))):
                return function(*args, **kwargs)
            with self.fake:
                return function(*args, **kwargs)
        if name == "_local_scalar_dense":
            return hasattr(args[0], "is_true") if args[0].dtype == torch.bool else 1
        outputs = function(*args, **kwargs)
        if name == "all":
            outputs.is_true = True
        if name != "topk":
            return outputs
        values, indices = outputs
        return values, (torch.arange(indices.numel()) % args[0].shape[-1]).view(indices.shape)


class LikeGPU(TorchFunctionMode):
    """Makes tensors on the CPU, which must be empty, behave as if on a GPU."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.replaced = {
            Tensor.device.__get__: lambda x: device,
            Tensor.is_cuda.__get__: lambda x: device.type == "cuda",
            Tensor.pin_memory: lambda x: x,
            F.scaled_dot_product_attention: attention,
            F.dropout: dropout,
            F.layer_norm: layer_norm,
        }
        if hasattr(aten, "_fused_rms_norm"):  # torch 2.9
            self.replaced[F.rms_norm] = lambda x, shape, weight, eps: RMSNorm.apply(x, weight)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self.replaced:
            return self.replaced[function](*args, **kwargs or {})
        if function is Tensor.to:
            args = ["cpu" if isinstance(each, str | torch.device) else each for each in args]
        if kwargs and "device" in kwargs:
            kwargs = kwargs | {"device": "cpu"}
        return function(*args, **kwargs or {})


def backward(loss: Tensor) -> None:
    """Call the engine of loss.backward(), which would leave a TorchFunctionMode."""
    _engine_run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Call the kernel that torch chooses on CUDA: FlashAttention, or the one that takes masks and float32."""
    if torch.is_autocast_enabled("cpu"):
        q, k, v = (x.to(torch.get_autocast_dtype("cpu")) for x in (q, k, v))
    if attn_mask is None and q.dtype in HALF:
        return aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]
    bias = attn_mask
    if bias is not None:
        if bias.dtype == torch.bool:
            bias = torch.zeros_like(bias, dtype=q.dtype).masked_fill_(~bias, -torch.inf)
        keys = k.shape[2]
        if keys % 16:  # the kernel wants aligned rows
            bias = F.pad(bias, (0, -keys % 16))[..., :keys]
        bias = bias.to(q.dtype).expand(*q.shape[:3], keys)
    needs_sums = q.requires_grad
    return aten._scaled_dot_product_efficient_attention(q, k, v, bias, needs_sums, dropout_p, is_causal, scale=scale)[0]


def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(x, p, True)[0] if training and p > 0 else x  # saves a mask of bytes


def layer_norm(x: Tensor, *args: object, **kwargs: object) -> Tensor:
    return F.layer_norm(x.float() if torch.is_autocast_enabled("cpu") else x, *args, **kwargs)


class RMSNorm(torch.autograd.Function):
    """A kernel in each direction, which saves its input. `clone` and `add` move as many bytes as these kernels."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx, dy: Tensor):
        (x,) = ctx.saved_tensors
        return torch.add(dy, x), (dy * x).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None


def empty_copy(model: nn.Module, counts: list[int]) -> nn.Module:
    """Return a copy of the model with empty tensors and, of each stack, only so many blocks: the first ones and the
    last one. The model may be on any device; it is not changed."""
    left_out = [block for stack, count in zip(model.stacks, counts, strict=True) for block in stack[count - 1 : -1]]
    unused = {id(tensor) for block in left_out for tensor in [*block.parameters(), *block.buffers()]}
    memo = {id(block): nn.Identity() for block in left_out}
    for tensor in [*model.parameters(), *model.buffers()]:
        if id(tensor) not in unused:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype)
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
    twin = copy.deepcopy(model, memo)
    for stack, count in zip(twin.stacks, counts, strict=True):
        del stack[count - 1 : -1]
    return twin
