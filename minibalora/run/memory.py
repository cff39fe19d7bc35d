"""What a training step holds in memory, counted from shapes alone: a model on the meta device will do.

    peak = fixed + kept + working

fixed     frozen weights in their dtype (NF4: 4.127 bits a number); A, B, A₀ and B₀ in float32; the gradients and Adam's
          two moments of what is trained, float32, too; the objective's blocks of logits, which every step uses again
kept      what autograd keeps of each block for the backward pass, so much a token of a micro-batch
working   the largest of what comes and goes: the objective's, or a block's backward pass with a dense weight in it

Bytes are those of tensors, as `torch.cuda.max_memory_allocated` counts them. What CUDA, Python and torch take for
themselves, and what an allocator can't use, comes on top. `python tests/bench_memory.py` compares with what steps hold
on a CPU, tensor by tensor.
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

GATHERED = 3  # blocks that FSDP2 has whole: the one in use, the next one, and the buffer in which it arrives


@dataclass(frozen=True)
class Amount:
    """How much one micro-batch is."""

    tokens: int  # that go through the blocks
    seen: int  # the same, but what rows share is counted in each of them
    wanted: int  # that the last block is asked for
    pairs: int  # of a query and a key, of all rows: the numbers in a head's attention matrices
    is_packed: bool  # laid end to end, as `Decoder.packed` takes them: attention then copies what it reads


def packed_amount(batch: Packed) -> Amount:
    lengths = [batch.shared + length for length in batch.lengths]
    pairs = sum(length**2 for length in lengths)
    return Amount(len(batch.input_ids), sum(lengths), len(batch.targets), pairs, is_packed=True)


def padded_amount(rows: int, longest: int, as_text: bool = False) -> Amount:
    """as_text: the encoder reads them, and the decoder is asked for one token of each row."""
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
    """Bytes at the peak of a step on one device.

    model: adapted; one without adapted layers is trained in full. amount: the largest micro-batch. objective: None of a
    classifier, whose logits are next to nothing. accumulates: a step has several micro-batches. ranks: how many share
    the blocks' frozen weights, as --fsdp has it. is_plain: layers and loss are the paper's own formulas.
    """
    config, element = model.config, hardware.dtype.itemsize
    width = config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    step = Step(config, width, element, hardware.device.type, element < 4 and not adapted_layers(model), is_plain)
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    always = held(model, ranks) + 2 * trained
    if step.is_autocast:  # which keeps a copy of each weight in the activations' dtype during a step
        linears = [module for module in model.modules() if type(module) is nn.Linear and module.weight.requires_grad]
        always += element * sum(linear.weight.numel() for linear in linears)
    stays, passes = (0, 0) if objective is None else objective_bytes(step, model, amount.wanted, objective)
    kept, backward = activations(step, model, amount, hardware.grad_checkpoint)
    # The first micro-batch's gradients take the place of what was kept; a second one finds them there.
    gradients = trained if accumulates else 0
    return always + stays + max(trained, gradients + max(kept + passes, backward))


@dataclass(frozen=True)
class Step:
    """What all counts of a step share."""

    config: object  # the model's
    width: int  # of the queries of all heads
    element: int  # bytes of a number in the activations
    device: str  # "cpu" or "cuda"
    is_autocast: bool  # activations are narrower than the weights, which are trained and so float32
    is_plain: bool


# What is always there.


def held(model: nn.Module, ranks: int = 1) -> int:
    """Bytes of all parameters and buffers on one of `ranks`."""
    whole = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    if ranks == 1:
        return whole
    blocks = blocks_of(model)
    frozen = sum(p.nbytes for block in blocks for p in block.parameters() if not p.requires_grad)
    return whole - frozen + frozen // ranks + GATHERED * frozen // len(blocks)


# What a backward pass needs.


def activations(step: Step, model: nn.Module, amount: Amount, is_checkpointed: bool) -> tuple[int, int]:
    """Bytes kept of all blocks when the forward pass is done, and those of the backward pass at its peak."""
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
    """A model's lists of blocks, each with what goes through it. T5's encoder takes prompts, its decoder answers."""
    lists = [list(stack) for stack in model.stacks]
    if len(lists) == 1 or amount.wanted == amount.seen:  # a classifier's decoder reads all that its encoder reads
        return [(blocks, amount) for blocks in lists]
    answer = amount.wanted / amount.seen
    prompts, answers = amount.seen - amount.wanted, amount.wanted
    of_prompts = replace(amount, tokens=prompts, seen=prompts, wanted=prompts, pairs=amount.pairs * (1 - answer) ** 2)
    of_answers = replace(amount, tokens=answers, seen=answers, pairs=amount.pairs * answer)  # its own and the prompt's
    return [(lists[0], of_prompts), (lists[1], of_answers)]


Linears = list[tuple[nn.Module, float]]  # of a block, each with the share of the tokens that pass it


def linears_of(config: object, block: nn.Module) -> Linears:
    """All of them. A token passes only the chosen ones of a mixture's experts."""
    linears = [(name, part) for name, part in block.named_modules() if isinstance(part, nn.Linear | LowRankLinear)]
    # ".shared_experts." are passed by all tokens.
    return [(part, config.num_experts_per_tok / config.num_experts if ".experts." in name else 1)
            for name, part in linears]  # fmt: skip


def kept_of_block(step: Step, block: nn.Module, linears: Linears, amount: Amount, is_last: bool) -> int:
    """Bytes that autograd keeps of one block.

    Where a linear widens, its output is kept, by the activation or by attention; where it narrows, its input. So the
    wider of the two counts: q, k and v, with as many heads as there are queries, what attention found, gate, up, and
    their product. Of a norm, autograd keeps the input, in float32 where the norm is written out (RMSNorm), and the
    output, which linears read.
    """
    config, element, f, width = step.config, step.element, widest(linears), step.width
    # An MLP's product is kept for the linear that reads it alone, so not for a frozen one.
    kept = [(linear, share) for linear, share in linears if keeps_input(linear) or linear.in_features != f]
    products = element * sum(share * wider_side(linear) for linear, share in kept)
    if any(share != 1 for _, share in linears):  # of each token, the input and output of its experts, in their order
        products += element * 2 * config.num_experts_per_tok * config.hidden_size
    if is_gated(linears) and getattr(config, "activation", "gelu") != "silu":
        products += element * linears[-1][1] * f  # gelu(gate), which SwiGLU computes again
    if step.is_plain:  # X (A - A0) and X A0, which the lean product does not keep
        adapted = [(layer, share) for layer, share in linears if isinstance(layer, LowRankLinear)]
        products += element * sum(share * layer.A.shape[1] * (2 - (layer.A0 is None)) for layer, share in adapted)
    norms = norm_bytes(step, block, linears)
    copied = element * width if amount.is_packed else 0  # what attention found, all rows in one
    a_token, a_pair = attention_bytes(step, amount)
    a_token += products + norms + copied + dropout_bytes(step, block, linears)
    shared = 4 * element * width * (amount.seen - amount.tokens)  # q, k, v and what was found
    if not is_last:
        return int(amount.tokens * a_token + shared + amount.pairs * a_pair)
    early = norms / 2 + 2 * element * width  # the first norm, keys and values are of all tokens
    of_wanted = amount.wanted * (a_token - early) + amount.wanted / amount.tokens * amount.pairs * a_pair
    return int(amount.tokens * early + shared / 2 + of_wanted)


def keeps_input(linear: nn.Module) -> bool:
    """A frozen one, which `targets` left out, does not."""
    return isinstance(linear, LowRankLinear) or linear.weight.requires_grad


def wider_side(linear: nn.Module) -> int:
    return max(linear.in_features, linear.out_features)


def widest(linears: Linears) -> int:
    return max(wider_side(linear) for linear, _ in linears)


def is_gated(linears: Linears) -> bool:
    """Gate, up and down: three linears as wide as the MLP."""
    f = widest(linears)
    return sum(wider_side(linear) == f for linear, _ in linears) >= 3


def norm_bytes(step: Step, block: nn.Module, linears: Linears) -> float:
    """Bytes a token that autograd keeps of a block's norms."""
    config, d, f = step.config, step.config.hidden_size, widest(linears)
    norms = [module for module in block.modules() if is_norm(module) and module.weight.numel() == d]
    is_plain = isinstance(norms[0], nn.LayerNorm)
    inputs = (step.element if is_plain and not step.is_autocast else 4) * len(norms)
    if norms[0].weight.requires_grad and not is_plain:
        inputs += 4 * len(norms)  # the slope of an RMSNorm's gain
    if step.is_autocast:  # each linear has its own copy; what attention found comes from no norm
        readers = sum(share for linear, share in linears if linear.in_features == d) - (step.width == d)
    else:
        halves = len(norms) // (2 if getattr(config, "has_post_norms", False) else 1)  # whose output is only added
        of_mlp = any(keeps_input(linear) for linear, _ in linears if linear.out_features == f)
        others = any(keeps_input(linear) for linear, _ in linears if wider_side(linear) != f)
        readers = of_mlp + (halves - 1) * others
    heads = 0
    if getattr(config, "qk_norm", False):  # Qwen 3's norms of queries and keys keep their input, too
        heads = 4 * config.head_dim * (config.num_attention_heads + config.num_key_value_heads)
    return d * (inputs + step.element * readers) + heads


def is_norm(module: nn.Module) -> bool:
    own = dict(module.named_parameters(recurse=False))  # a LowRankLinear would compute its `weight`
    return "weight" in own and own["weight"].ndim == 1


def dropout_bytes(step: Step, block: nn.Module, linears: Linears) -> int:
    """Bytes a token of the masks: of the states of each half of a block, and, in T5, within the MLP."""
    used = [module for module in block.modules() if isinstance(module, nn.Dropout) and module.p > 0]
    numbers = len(used) * step.config.hidden_size
    if used and hasattr(step.config, "dropout_rate"):  # T5 has one module for all halves
        numbers = sum(map(is_norm, block.modules())) * step.config.hidden_size + widest(linears)
    return numbers * (1 if step.device == "cuda" else step.element)


def attention_bytes(step: Step, amount: Amount) -> tuple[float, float]:
    """Bytes a token and bytes a pair of tokens that are kept beside q, k, v and what was found: 0 in a fused kernel."""
    config, element, width = step.config, step.element, step.width
    heads, on_gpu = config.num_attention_heads, step.device == "cuda"
    if getattr(config, "attention_cap", None) is not None:  # Gemma 2's is written out: tanh and softmax in float32
        return -element * width, heads * (8 + element * (step.element < 4))
    a_token = a_pair = 0
    if getattr(config, "position_buckets", 0):  # DeBERTa's scores of positions, before the distances are picked
        length = amount.pairs / amount.tokens
        a_token += 2 * element * width
        a_pair += 2 * element * heads * min(2, 2 * config.position_buckets / length)
        a_pair += element * heads * on_gpu  # their sum is the kernel's bias
    if getattr(config, "dropout_rate", getattr(config, "attention_dropout", 0)) and not on_gpu:
        a_token += 3 * (4 - element) * width  # a CPU has no kernel with dropout: float32, softmax, mask and product
        a_pair += 12 * heads
    return a_token, a_pair


def working_of_block(step: Step, linears: Linears, tokens: int) -> int:
    """Bytes that the backward pass of a block takes at its peak besides what is kept: in the MLP."""
    slope = step.element * tokens * max(share * wider_side(linear) for linear, share in linears)
    dense = max(dense_bytes(step, linear, tokens) for linear, _ in linears)
    states = 2 * step.element * tokens * step.config.hidden_size
    return int(states + max(slope + dense, 3 * slope if is_gated(linears) else 0))


def dense_bytes(step: Step, linear: nn.Module, tokens: int) -> int:
    """Of the (n, m) matrices that a linear's backward pass makes."""
    n, m = linear.out_features, linear.in_features
    if type(linear) is nn.Linear:
        return n * m * (4 + 2 * (step.element < 4)) * linear.weight.requires_grad
    unpacked = step.element if isinstance(linear.W, nn.Module) else 0
    folded = 4 if step.element >= 4 and tokens * (m + n) > m * n else 0
    return n * m * (unpacked + folded)


# The objective's own.


def objective_bytes(step: Step, model: nn.Module, predicted: int, objective: Objective) -> tuple[int, int]:
    """What L takes for that many predicted tokens: bytes that stay from step to step, and bytes that come and go."""
    element, (V, d) = step.element, model.head_weight.shape
    states = predicted * d * (4 + 4 * element)  # the last norm's input and output; student, teacher and gradient
    if head_of(model, step.is_plain).is_whole:
        stays, passes = whole_logits_bytes(step, model, predicted, objective)
        return stays, states + passes
    rows = BLOCK.get(step.device, 512)
    stays = 4 * (5 if objective.needs_teacher else 3) * rows * V
    passes = element * min(rows, predicted) * V * (step.element < 4)
    if objective.lambda3 > 0:  # all in float64
        stays += 8 * d * d  # R; made once, and then:
        root = 8 * (2 * min(ROOT_ROWS, V) * d + 3 * d * d)
        passes = max(passes, root, 8 * (3 * predicted * d + 4 * min(predicted, d) ** 2))
    return stays, states + passes


def whole_logits_bytes(step: Step, model: nn.Module, predicted: int, objective: Objective) -> tuple[int, int]:
    """The same where L is taken on (M, V) logits in float32: with their logarithms and gradients."""
    head, element = model.head_weight, step.element
    a_logit = 24 + 2 * element if objective.needs_teacher else 12
    a_logit += element if model.config.logit_cap is not None else 0
    logits = predicted * head.shape[0]
    if not head.requires_grad:
        return 0, a_logit * logits
    waits = head.nbytes if model.config.tie_word_embeddings else 0  # the head's gradient, for the embedding's
    slope = head.nbytes + head.nbytes // 2 * (step.element < 4)
    return waits, max(a_logit * logits, 4 * logits + slope)
