"""What a training run holds in memory, counted from shapes alone: a model on the meta device will do.

    peak = fixed + kept + working

fixed     frozen weights in their dtype (NF4: 4.127 bits a number), A, B, A₀ and B₀ in float32; of what is trained the
          gradients and Adam's two moments, float32, too; the objective's blocks of logits, which are used again
kept      what autograd keeps of each block for the backward pass, so much a token of a micro-batch
working   the largest of what comes and goes: the objective's, or a block's backward pass with a dense weight in it

Bytes are those of tensors, as `torch.cuda.max_memory_allocated` counts them. What CUDA, Python and torch take for
themselves, and what an allocator can't use, comes on top. `python tests/bench_memory.py` compares with what steps hold
on a CPU, tensor by tensor.
"""

from argparse import Namespace
from dataclasses import dataclass, replace

from torch import nn

from minibalora.data.batches import Packed
from minibalora.fused import BLOCK, ROOT_ROWS, FrozenHead
from minibalora.lowrank import LowRankLinear
from minibalora.models import blocks_of, stacks_of
from minibalora.objective import Objective, head_of

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
    if as_text:
        return Amount(tokens, tokens + rows, rows, tokens * longest, is_packed=False)
    return Amount(tokens, tokens, tokens, tokens * longest, is_packed=False)


def expected_memory(
    args: Namespace, model: nn.Module, amount: Amount, objective: Objective | None, ranks: int = 1
) -> int:
    """Bytes at the peak of a step on one device.

    args: method, dtype, device, grad_checkpoint, batch_size and micro_batch_size of the run. objective: None of a
    classifier, whose logits are next to nothing. ranks: how many share the blocks' frozen weights, as --fsdp has it.
    """
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    always = held(model, ranks) + 2 * trained + cast_weights(args, model)
    stays, passes = (0, 0) if objective is None else objective_bytes(args, model, amount.wanted, objective)
    kept, backward = activations(args, model, amount)
    # The first micro-batch's gradients take the place of what was kept; a second one finds them there.
    gradients = trained if args.batch_size > args.micro_batch_size else 0
    return always + stays + max(trained, gradients + max(kept + passes, backward))


# What is always there.


def held(model: nn.Module, ranks: int = 1) -> int:
    """Bytes of all parameters and buffers on one of `ranks`."""
    whole = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    if ranks == 1:
        return whole
    blocks = blocks_of(model)
    frozen = sum(p.nbytes for block in blocks for p in block.parameters() if not p.requires_grad)
    return whole - frozen + frozen // ranks + GATHERED * frozen // len(blocks)


def cast_weights(args: Namespace, model: nn.Module) -> int:
    """Bytes of the copies in the activations' dtype of weights that are trained, thus float32: a step keeps them."""
    if not is_autocast(args):
        return 0
    linears = [module for module in model.modules() if type(module) is nn.Linear and module.weight.requires_grad]
    return args.dtype.itemsize * sum(linear.weight.numel() for linear in linears)


def is_autocast(args: Namespace) -> bool:
    """Whether weights are float32, for they are trained, and activations are not."""
    return args.method == "full" and is_narrow(args)


# What a backward pass needs.


def activations(args: Namespace, model: nn.Module, amount: Amount) -> tuple[int, int]:
    """Bytes kept of all blocks when the forward pass is done, and those of the backward pass at its peak."""
    parts = [(block, part) for blocks, part in stacks(model, amount) for block in blocks]
    is_last = [part.wanted < part.tokens and block is parts[-1][0] for block, part in parts]
    each = [kept_of_block(args, model, *part, last) for part, last in zip(parts, is_last, strict=True)]
    seen = [part.wanted if last else part.tokens for (_, part), last in zip(parts, is_last, strict=True)]
    working = [working_of_block(args, model, block, tokens) for (block, _), tokens in zip(parts, seen, strict=True)]
    if args.grad_checkpoint:
        inputs = args.dtype.itemsize * model.config.hidden_size * sum(part.tokens for _, part in parts)
        return inputs, inputs + max(kept + work for kept, work in zip(each, working, strict=True))
    earlier = sum(each) - each[-1] + max(working[:-1], default=0)
    return sum(each), max(sum(each) + working[-1], earlier)


def stacks(model: nn.Module, amount: Amount) -> list[tuple[list[nn.Module], Amount]]:
    """A model's lists of blocks, each with what goes through it: prompts through T5's encoder, answers its decoder."""
    lists = [list(stack) for stack in stacks_of(model)]
    if len(lists) == 1 or amount.wanted == amount.seen:  # a classifier's decoder reads all that its encoder reads
        return [(blocks, amount) for blocks in lists]
    answer = amount.wanted / amount.seen
    prompts, answers = amount.seen - amount.wanted, amount.wanted
    of_prompts = replace(amount, tokens=prompts, seen=prompts, wanted=prompts, pairs=amount.pairs * (1 - answer) ** 2)
    of_answers = replace(amount, tokens=answers, seen=answers, pairs=amount.pairs * answer)  # its own and the prompt's
    return [(lists[0], of_prompts), (lists[1], of_answers)]


def kept_of_block(args: Namespace, model: nn.Module, block: nn.Module, amount: Amount, is_last: bool) -> int:
    """Bytes that autograd keeps of one block.

    Of a linear that widens the output, which the activation or attention keeps; of one that narrows the input. So the
    wider of the two: q, k and v, with as many heads as there are queries, what attention found, gate, up, and their
    product. Of a norm the input, in float32 where it is written out (RMSNorm), and the output, which linears read.
    """
    config, element, linears = model.config, args.dtype.itemsize, linears_of(model, block)
    f = widest(linears)
    products = element * sum(share * kept_numbers(linear, f) for linear, share in linears)
    if has_experts(linears):  # of every token the input and the output of each of its experts, in their order
        products += element * 2 * config.num_experts_per_tok * config.hidden_size
    if is_gated(linears) and getattr(config, "activation", "gelu") != "silu":
        products += element * linears[-1][1] * widest(linears)  # gelu(gate), which SwiGLU makes anew
    norms = norm_bytes(args, model, block, linears)
    width = attention_width(config)
    copied = element * width if amount.is_packed else 0  # what attention found, all rows in one
    masks = dropout_bytes(args, model, block, linears)
    a_token, a_pair = attention_bytes(args, config, amount)
    a_token += products + norms + copied + masks
    shared = 4 * element * width * (amount.seen - amount.tokens)  # q, k, v and what was found
    if not is_last:
        return int(amount.tokens * a_token + shared + amount.pairs * a_pair)
    early = norms / 2 + 2 * element * width  # the first norm, keys and values are of all tokens
    of_wanted = amount.wanted * (a_token - early) + amount.wanted / amount.tokens * amount.pairs * a_pair
    return int(amount.tokens * early + shared / 2 + of_wanted)


def linears_of(model: nn.Module, block: nn.Module) -> list[tuple[nn.Module, float]]:
    """Each linear of a block, and the share of the tokens that pass it: of a mixture's experts, those chosen."""
    found = []
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear | LowRankLinear):
            is_expert = ".experts." in name  # not ".shared_experts."
            found.append((module, model.config.num_experts_per_tok / model.config.num_experts if is_expert else 1))
    return found


def has_experts(linears: list[tuple[nn.Module, float]]) -> bool:
    return any(share != 1 for _, share in linears)


def kept_numbers(linear: nn.Module, widest: int) -> int:
    """How many numbers a token are kept for a linear: the wider of input and output."""
    if linear.in_features == widest and not keeps_input(linear):
        return 0  # only the linear itself would need an MLP's product
    return max(linear.in_features, linear.out_features)


def keeps_input(linear: nn.Module) -> bool:
    """A frozen one, which `targets` left out, does not."""
    return isinstance(linear, LowRankLinear) or linear.weight.requires_grad


def widest(linears: list[tuple[nn.Module, float]]) -> int:
    return max(max(linear.in_features, linear.out_features) for linear, _ in linears)


def is_gated(linears: list[tuple[nn.Module, float]]) -> bool:
    """Gate, up and down: three linears as wide as the MLP."""
    f = widest(linears)
    return sum(f in (linear.in_features, linear.out_features) for linear, _ in linears) >= 3


def attention_width(config: object) -> int:
    return config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)


def norm_bytes(args: Namespace, model: nn.Module, block: nn.Module, linears: list[tuple[nn.Module, float]]) -> float:
    """Bytes a token that are kept of the norms of a block."""
    config, element, d = model.config, args.dtype.itemsize, model.config.hidden_size
    norms = [module for module in block.modules() if is_norm(module) and module.weight.numel() == d]
    is_trained = norms[0].weight.requires_grad
    is_plain = isinstance(norms[0], nn.LayerNorm)
    inputs = (element if is_plain and not is_autocast(args) else 4) * len(norms)
    normalised = 4 * len(norms) if is_trained and not is_plain else 0  # the slope of an RMSNorm's gain
    if is_autocast(args):  # each linear has its own copy; what attention found is no norm's output
        readers = sum(share for linear, share in linears if linear.in_features == d) - (attention_width(config) == d)
    else:
        halves = len(norms) // (2 if getattr(config, "has_post_norms", False) else 1)  # whose output is only added
        f = widest(linears)
        of_mlp = [linear for linear, _ in linears if linear.out_features == f]
        others = [linear for linear, _ in linears if f not in (linear.in_features, linear.out_features)]
        readers = any(map(keeps_input, of_mlp)) + (halves - 1) * any(map(keeps_input, others))
    heads = 0
    if getattr(config, "qk_norm", False):  # queries and keys have norms of their own, whose input is kept, too (Qwen 3)
        heads = 4 * config.head_dim * (config.num_attention_heads + config.num_key_value_heads)
    return d * (inputs + normalised + element * readers) + heads


def is_norm(module: nn.Module) -> bool:
    own = dict(module.named_parameters(recurse=False))  # a LowRankLinear would compute its `weight`
    return "weight" in own and own["weight"].ndim == 1


def dropout_bytes(args: Namespace, model: nn.Module, block: nn.Module, linears: list[tuple[nn.Module, float]]) -> int:
    """Bytes a token of the masks: of the states of each half of a block, and, in T5, within the MLP."""
    used = [module for module in block.modules() if isinstance(module, nn.Dropout) and module.p > 0]
    numbers = len(used) * model.config.hidden_size
    if used and is_t5(model.config):  # one module for all halves
        numbers = sum(map(is_norm, block.modules())) * model.config.hidden_size + widest(linears)
    return numbers * (1 if args.device.type == "cuda" else args.dtype.itemsize)


def is_t5(config: object) -> bool:
    """Its dropouts are one number of the configuration."""
    return hasattr(config, "num_decoder_layers")


def attention_bytes(args: Namespace, config: object, amount: Amount) -> tuple[float, float]:
    """Bytes a token and bytes a pair of tokens that are kept beside q, k, v and what was found: 0 in a fused kernel."""
    element, heads, width = args.dtype.itemsize, config.num_attention_heads, attention_width(config)
    if getattr(config, "attention_cap", None) is not None:  # Gemma 2's is written out: tanh and softmax in float32
        return -element * width, heads * (8 + (element if element < 4 else 0))
    a_token = a_pair = 0
    if getattr(config, "position_buckets", 0):  # DeBERTa's scores of positions, before the distances are picked
        length = amount.pairs / amount.tokens
        a_token += 2 * element * width
        a_pair += 2 * element * heads * min(2, 2 * config.position_buckets / length)
        a_pair += element * heads if args.device.type == "cuda" else 0  # their sum is the kernel's bias
    dropout = config.dropout_rate if is_t5(config) else getattr(config, "attention_dropout", 0)
    if dropout and args.device.type != "cuda":
        a_token += 3 * (4 - element) * width  # no kernel for dropout on a CPU: float32, softmax, mask and product
        a_pair += 12 * heads
    return a_token, a_pair


def working_of_block(args: Namespace, model: nn.Module, block: nn.Module, tokens: int) -> int:
    """Bytes that the backward pass of a block takes at its peak besides what is kept: in the MLP."""
    element, linears = args.dtype.itemsize, linears_of(model, block)
    slope = element * tokens * max(share * max(linear.in_features, linear.out_features) for linear, share in linears)
    dense = max(dense_bytes(args, linear, tokens) for linear, _ in linears)
    states = 2 * element * tokens * model.config.hidden_size
    return int(states + max(slope + dense, 3 * slope if is_gated(linears) else 0))


def dense_bytes(args: Namespace, linear: nn.Module, tokens: int) -> int:
    """Of the (n, m) matrices that a linear's backward pass makes."""
    n, m = linear.out_features, linear.in_features
    if type(linear) is nn.Linear:
        return n * m * (4 + (2 if is_narrow(args) else 0)) if linear.weight.requires_grad else 0
    unpacked = args.dtype.itemsize if isinstance(linear.W, nn.Module) else 0
    folded = 4 if not is_narrow(args) and tokens * (m + n) > m * n else 0
    return n * m * (unpacked + folded)


def is_narrow(args: Namespace) -> bool:
    return args.dtype.itemsize < 4


# The objective's own.


def objective_bytes(args: Namespace, model: nn.Module, predicted: int, objective: Objective) -> tuple[int, int]:
    """What L takes for that many predicted tokens: bytes that stay from step to step, and bytes that come and go."""
    element, (V, d) = args.dtype.itemsize, model.head_weight.shape
    states = predicted * d * (4 + 4 * element)  # the last norm's input and output; student, teacher and gradient
    if not isinstance(head_of(model), FrozenHead):
        return whole_logits_bytes(args, model, predicted, objective, states)
    rows = BLOCK.get(args.device.type, 512)
    stays = 4 * (5 if objective.needs_teacher else 3) * rows * V
    passes = element * min(rows, predicted) * V if is_narrow(args) else 0
    if objective.lambda3 > 0:  # all in float64
        stays += 8 * d * d  # R; made once, and then:
        root = 8 * (2 * min(ROOT_ROWS, V) * d + 3 * d * d)
        passes = max(passes, root, 8 * (3 * predicted * d + 4 * min(predicted, d) ** 2))
    return stays, states + passes


def whole_logits_bytes(
    args: Namespace, model: nn.Module, predicted: int, objective: Objective, states: int
) -> tuple[int, int]:
    """The same where the head is trained or caps logits: (M, V) logits in float32, their logarithms, gradients."""
    head, element = model.head_weight, args.dtype.itemsize
    a_logit = 24 + 2 * element if objective.needs_teacher else 12
    a_logit += element if model.config.logit_cap is not None else 0
    if not head.requires_grad:
        return 0, states + a_logit * predicted * head.numel() // head.shape[1]
    waits = head.nbytes if model.config.tie_word_embeddings else 0  # the head's gradient, for the embedding's
    slope = head.nbytes + (head.nbytes // 2 if is_narrow(args) else 0)
    logits = predicted * head.shape[0]
    return waits, states + max(a_logit * logits, 4 * logits + slope)
