"""Estimate the memory of a training step from shapes alone. A model on the meta device is enough.

    peak = fixed + kept + working

fixed     frozen weights in their dtype (NF4: 4.127 bits a number); A, B, A₀ and B₀ in float32; the gradients and Adam's
          two moments of trained parameters, also in float32; the objective's blocks of logits, reused by every step
kept      the tensors of each block that autograd keeps for the backward pass, in proportion to the micro-batch's tokens
working   the largest set of temporary tensors: the objective's, or those of a block's backward pass with a dense weight

Counts the bytes of tensors, as `torch.cuda.max_memory_allocated` does. CUDA, Python and torch themselves, and memory
that an allocator can't use, come on top. `python tests/bench_memory.py` compares the estimate with the tensors that
steps hold on a CPU.
"""

from dataclasses import dataclass, replace
from operator import add

from torch import nn

from minibalora.data.batches import Packed
from minibalora.fused import BLOCK, ROOT_ROWS
from minibalora.lowrank import LowRankLinear, adapted_layers
from minibalora.models import blocks_of
from minibalora.objective import Objective, head_of
from minibalora.run.settings import Hardware

GATHERED = 3  # blocks that FSDP2 holds whole: the current one, the next one, and the buffer that receives it


@dataclass(frozen=True)
class Amount:
    """The size of a micro-batch."""

    tokens: int  # in the blocks
    seen: int  # the same, with a shared prefix counted in each row
    wanted: int  # tokens whose states the last block returns
    pairs: int  # (query, key) pairs of all rows: the numbers in one head's attention matrices
    is_packed: bool  # rows laid end to end for `Decoder.packed`: attention then copies its inputs


def packed_amount(batch: Packed) -> Amount:
    """Return the size of a packed micro-batch."""
    lengths = [batch.shared + length for length in batch.lengths]
    pairs = sum(length**2 for length in lengths)
    return Amount(len(batch.input_ids), sum(lengths), len(batch.targets), pairs, is_packed=True)


def padded_amount(rows: int, longest: int, as_text: bool = False) -> Amount:
    """Return the size of padded rows. as_text: T5's encoder reads them, and its decoder predicts one token a row."""
    tokens = rows * longest
    seen, wanted = (tokens + rows, rows) if as_text else (tokens, tokens)
    return Amount(tokens, seen, wanted, tokens * longest, is_packed=False)


def expected_memory(
    model: nn.Module,
    hardware: Hardware,
    amount: Amount,
    objective: Objective | None,
    accumulates: bool,
    ranks: int = 1,
    is_plain: bool = False,
) -> int:
    """Return the bytes at the peak of a step on one device.

    model: adapted, or without adapted layers if trained in full. amount: the largest micro-batch. objective: None for a
    classifier, whose logits are tiny. accumulates: a step has several micro-batches. ranks: the number of processes
    that share the blocks' frozen weights (--fsdp). is_plain: layers and loss are the paper's own formulas.
    """
    config, element = model.config, hardware.dtype.itemsize
    width = config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    step = Step(config, width, element, hardware.device.type, element < 4 and not adapted_layers(model), is_plain)
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    always = held(model, ranks) + 2 * trained
    if step.is_autocast:  # keeps a copy of each weight in the activations' dtype during a step
        linears = [module for module in model.modules() if type(module) is nn.Linear and module.weight.requires_grad]
        always += element * sum(linear.weight.numel() for linear in linears)
    stays, passes = (0, 0) if objective is None else objective_bytes(step, model, amount.wanted, objective)
    kept, backward = activations(step, model, amount, hardware.grad_checkpoint)
    # The gradients of the first micro-batch replace the kept tensors; in the second, both are there.
    gradients = trained if accumulates else 0
    return always + stays + max(trained, gradients + max(kept + passes, backward))


@dataclass(frozen=True)
class Step:
    """The settings that all estimates of a step need."""

    config: object  # of the model
    width: int  # of the queries, all heads together
    element: int  # bytes per number in the activations
    device: str  # "cpu" or "cuda"
    is_autocast: bool  # --method full: float32 weights, narrower activations
    is_plain: bool


# Memory that is always held.


def held(model: nn.Module, ranks: int = 1) -> int:
    """Return the bytes of all parameters and buffers on one of `ranks`."""
    whole = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    if ranks == 1:
        return whole
    blocks = blocks_of(model)
    frozen = sum(p.nbytes for block in blocks for p in block.parameters() if not p.requires_grad)
    return whole - frozen + frozen // ranks + GATHERED * frozen // len(blocks)


# Activations.


def activations(step: Step, model: nn.Module, amount: Amount, is_checkpointed: bool) -> tuple[int, int]:
    """Return the bytes that all blocks keep after the forward pass, and the peak in the backward pass."""
    parts = [(block, part) for blocks, part in stacks(model, amount) for block in blocks]
    kept, working = [], []
    for index, (block, part) in enumerate(parts):
        linears = linears_of(step.config, block)
        is_last = index == len(parts) - 1 and part.wanted < part.tokens
        kept.append(kept_of_block(step, block, linears, part, is_last))
        working.append(working_of_block(step, linears, part.wanted if is_last else part.tokens))
    if is_checkpointed:
        inputs = step.element * step.config.hidden_size * sum(part.tokens for _, part in parts)
        return inputs, inputs + max(map(add, kept, working))
    earlier = sum(kept[:-1]) + max(working[:-1], default=0)
    return sum(kept), max(sum(kept) + working[-1], earlier)


def stacks(model: nn.Module, amount: Amount) -> list[tuple[list[nn.Module], Amount]]:
    """Return the model's lists of blocks, each with its amount. T5's encoder reads prompts, its decoder answers."""
    lists = [list(stack) for stack in model.stacks]
    if len(lists) == 1 or amount.wanted == amount.seen:  # a classifier's decoder reads the same text as its encoder
        return [(blocks, amount) for blocks in lists]
    answer = amount.wanted / amount.seen
    prompts, answers = amount.seen - amount.wanted, amount.wanted
    of_prompts = replace(amount, tokens=prompts, seen=prompts, wanted=prompts, pairs=amount.pairs * (1 - answer) ** 2)
    pairs = amount.pairs * answer  # each answer token attends to the answer and to the prompt
    of_answers = replace(amount, tokens=answers, seen=answers, pairs=pairs)
    return [(lists[0], of_prompts), (lists[1], of_answers)]


Linears = list[tuple[nn.Module, float]]  # of a block, each with its share of the tokens


def linears_of(config: object, block: nn.Module) -> Linears:
    """Return the linears of a block. In a mixture, a token passes only some of the experts."""
    linears = [(name, part) for name, part in block.named_modules() if isinstance(part, nn.Linear | LowRankLinear)]
    # ".shared_experts." see all tokens.
    return [(part, config.num_experts_per_tok / config.num_experts if ".experts." in name else 1)
            for name, part in linears]  # fmt: skip


def kept_of_block(step: Step, block: nn.Module, linears: Linears, amount: Amount, is_last: bool) -> int:
    """Return the bytes of one block that autograd keeps.

    If a linear widens, the activation or attention keeps its output; if it narrows, the linear keeps its input. So the
    wider side counts: q, k and v (as many heads as queries have), the output of attention, gate, up, and their product.
    For a norm, autograd keeps the input, in float32 where the norm is written out (RMSNorm), and the output, which
    linears read.
    """
    config, element, f, width = step.config, step.element, widest(linears), step.width
    # The product in an MLP is kept only for the linear that reads it: not for a frozen one.
    counted = [(linear, share) for linear, share in linears if keeps_input(linear) or linear.in_features != f]
    products = element * sum(share * wider_side(linear) for linear, share in counted)
    if any(share != 1 for _, share in linears):  # the experts' inputs and outputs, sorted by expert
        products += element * 2 * config.num_experts_per_tok * config.hidden_size
    if is_gated(linears) and getattr(config, "activation", "gelu") != "silu":
        products += element * linears[-1][1] * f  # gelu(gate); SwiGLU recomputes its activation
    if step.is_plain:  # X (A - A0) and X A0; the lean product does not keep them
        adapted = [(layer, share) for layer, share in linears if isinstance(layer, LowRankLinear)]
        products += element * sum(share * layer.A.shape[1] * (2 - (layer.A0 is None)) for layer, share in adapted)
    norms = norm_bytes(step, block, linears)
    copied = element * width if amount.is_packed else 0  # the output of attention, all rows in one tensor
    a_token, a_pair = attention_bytes(step, amount)
    a_token += products + norms + copied + dropout_bytes(step, block, linears)
    shared = 4 * element * width * (amount.seen - amount.tokens)  # q, k, v and the output of attention
    if not is_last:
        return int(amount.tokens * a_token + shared + amount.pairs * a_pair)
    early = norms / 2 + 2 * element * width  # the first norm, keys and values need all tokens
    of_wanted = amount.wanted * (a_token - early) + amount.wanted / amount.tokens * amount.pairs * a_pair
    return int(amount.tokens * early + shared / 2 + of_wanted)


def keeps_input(linear: nn.Module) -> bool:
    """Return whether the linear is trained or adapted: a frozen one does not keep its input."""
    return isinstance(linear, LowRankLinear) or linear.weight.requires_grad


def wider_side(linear: nn.Module) -> int:
    return max(linear.in_features, linear.out_features)


def widest(linears: Linears) -> int:
    return max(wider_side(linear) for linear, _ in linears)


def is_gated(linears: Linears) -> bool:
    """Return whether the MLP has gate, up and down: three linears of its width."""
    f = widest(linears)
    return sum(wider_side(linear) == f for linear, _ in linears) >= 3


def norm_bytes(step: Step, block: nn.Module, linears: Linears) -> float:
    """Return the bytes per token that autograd keeps for a block's norms."""
    config, d, f = step.config, step.config.hidden_size, widest(linears)
    norms = [module for module in block.modules() if is_norm(module) and module.weight.numel() == d]
    is_plain = isinstance(norms[0], nn.LayerNorm)
    inputs = (step.element if is_plain and not step.is_autocast else 4) * len(norms)
    if norms[0].weight.requires_grad and not is_plain:
        inputs += 4 * len(norms)  # the derivative for an RMSNorm's gain
    if step.is_autocast:  # each linear keeps its own copy; the output of attention comes from no norm
        readers = sum(share for linear, share in linears if linear.in_features == d) - (step.width == d)
    else:
        halves = len(norms) // (
            2 if getattr(config, "has_post_norms", False) else 1
        )  # the output of a post-norm is only added
        of_mlp = any(keeps_input(linear) for linear, _ in linears if linear.out_features == f)
        others = any(keeps_input(linear) for linear, _ in linears if wider_side(linear) != f)
        readers = of_mlp + (halves - 1) * others
    heads = 0
    if getattr(config, "qk_norm", False):  # Qwen 3's norms of queries and keys also keep their input
        heads = 4 * config.head_dim * (config.num_attention_heads + config.num_key_value_heads)
    return d * (inputs + step.element * readers) + heads


def is_norm(module: nn.Module) -> bool:
    parameters = dict(module.named_parameters(recurse=False))  # `module.weight` would compute a LowRankLinear's weight
    return "weight" in parameters and parameters["weight"].ndim == 1


def dropout_bytes(step: Step, block: nn.Module, linears: Linears) -> int:
    """Return the bytes per token of dropout masks: for the states of each half of a block and, in T5, in the MLP."""
    used = [module for module in block.modules() if isinstance(module, nn.Dropout) and module.p > 0]
    numbers = len(used) * step.config.hidden_size
    if used and hasattr(step.config, "dropout_rate"):  # T5 uses one module several times
        numbers = sum(map(is_norm, block.modules())) * step.config.hidden_size + widest(linears)
    return numbers * (1 if step.device == "cuda" else step.element)


def attention_bytes(step: Step, amount: Amount) -> tuple[float, float]:
    """Return the bytes per token and per pair that attention keeps besides input and output; 0 in fused kernels."""
    config, element, width = step.config, step.element, step.width
    heads, on_gpu = config.num_attention_heads, step.device == "cuda"
    if getattr(config, "attention_cap", None) is not None:  # Gemma 2 has no fused kernel: tanh and softmax in float32
        return -element * width, heads * (8 + element * (step.element < 4))
    a_token = a_pair = 0
    if getattr(config, "position_buckets", 0):  # DeBERTa's scores of all distances, before gather
        length = amount.pairs / amount.tokens
        a_token += 2 * element * width
        a_pair += 2 * element * heads * min(2, 2 * config.position_buckets / length)
        a_pair += element * heads * on_gpu  # their sum is the bias of the kernel
    if getattr(config, "dropout_rate", getattr(config, "attention_dropout", 0)) and not on_gpu:
        a_token += 3 * (4 - element) * width  # CPUs have no kernel with dropout: float32 softmax, mask, product
        a_pair += 12 * heads
    return a_token, a_pair


def working_of_block(step: Step, linears: Linears, tokens: int) -> int:
    """Return the temporary bytes at the peak of a block's backward pass, which is in the MLP."""
    slope = step.element * tokens * max(share * wider_side(linear) for linear, share in linears)
    dense = max(dense_bytes(step, linear, tokens) for linear, _ in linears)
    states = 2 * step.element * tokens * step.config.hidden_size
    return int(states + max(slope + dense, 3 * slope if is_gated(linears) else 0))


def dense_bytes(step: Step, linear: nn.Module, tokens: int) -> int:
    """Return the bytes of the (n, m) matrices that a linear's backward pass makes."""
    n, m = linear.out_features, linear.in_features
    if type(linear) is nn.Linear:
        return n * m * (4 + 2 * (step.element < 4)) * linear.weight.requires_grad
    unpacked = step.element if isinstance(linear.W, nn.Module) else 0
    folded = 4 if step.element >= 4 and tokens * (m + n) > m * n else 0
    return n * m * (unpacked + folded)


# The objective.


def objective_bytes(step: Step, model: nn.Module, predicted: int, objective: Objective) -> tuple[int, int]:
    """Return the bytes for L with so many predicted tokens: those that stay from step to step, and temporary ones."""
    element, (V, d) = step.element, model.head_weight.shape
    states = predicted * d * (4 + 4 * element)  # the last norm's input and output; student, teacher and gradient
    if head_of(model, step.is_plain).is_whole:
        stays, passes = whole_logits_bytes(step, model, predicted, objective)
        return stays, states + passes
    rows = BLOCK.get(step.device, 512)
    stays = 4 * (5 if objective.needs_teacher else 3) * rows * V
    passes = element * min(rows, predicted) * V * (step.element < 4)
    if objective.lambda3 > 0:  # all in float64
        stays += 8 * d * d  # R, which is computed once; then:
        root = 8 * (2 * min(ROOT_ROWS, V) * d + 3 * d * d)
        passes = max(passes, root, 8 * (3 * predicted * d + 4 * min(predicted, d) ** 2))
    return stays, states + passes


def whole_logits_bytes(step: Step, model: nn.Module, predicted: int, objective: Objective) -> tuple[int, int]:
    """Return the same for L on (M, V) logits in float32, with their logarithms and gradients."""
    head, element = model.head_weight, step.element
    a_logit = 24 + 2 * element if objective.needs_teacher else 12
    a_logit += element if model.config.logit_cap is not None else 0
    logits = predicted * head.shape[0]
    if not head.requires_grad:
        return 0, a_logit * logits
    waits = (
        head.nbytes if model.config.tie_word_embeddings else 0
    )  # the head's gradient is held until the embedding's is there
    slope = head.nbytes + head.nbytes // 2 * (step.element < 4)
    return waits, max(a_logit * logits, 4 * logits + slope)
