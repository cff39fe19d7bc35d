"""What a run is going to do and to take, said before its first step."""

from argparse import Namespace
from dataclasses import replace

from torch import Tensor, nn

from minibalora import distributed
from minibalora.data import Row
from minibalora.fused import FrozenHead
from minibalora.lowrank import adapted_layers
from minibalora.models.decoder import Decoder, DecoderConfig
from minibalora.models.mixture import MixtureConfig
from minibalora.objective import Objective, head_of


def print_plan(
    args: Namespace, model: nn.Module, formula: str, data: list[str], steps: int, memory: int | None = None
) -> None:
    """formula: `nlg_formula` or `nlu_formula`; data: lines on the rows; memory: bytes that the run will take."""
    parameters = base_parameters(model)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    layers = adapted_layers(model)
    adapter = f", {len(layers)} layers, init {args.init}, rank {args.rank}, alpha {args.alpha:g}" if layers else ""
    dtype = str(args.dtype).removeprefix("torch.")
    ranks = f" in each of {distributed.size()} processes" if distributed.size() > 1 else ""
    print(f"model   {args.model}, {parameters:,} parameters, {dtype} on {args.device}{ranks}")
    print(f"method  {args.method}{adapter}, {trained:,} trained ({trained / parameters:.2%})")
    print(f"terms   {formula}")
    print("data    " + "\n        ".join(data))
    print(f"steps   {steps:,} of {args.batch_size} rows in micro-batches of {args.micro_batch_size}, "
          f"peak learning rate {args.lr:g}, {args.schedule}")  # fmt: skip
    if memory is not None:
        print(f"memory  about {memory / 1e9:.1f} GB on {args.device}, beside what Python and torch take")
    print(f"out     {args.out}", flush=True)


def nlg_formula(objective: Objective) -> str:
    """The objective in words, weights included."""
    consistency = f"KL at T = {objective.temperature:g}"
    return _formula(objective, "cross-entropy", consistency, f"entropy of {objective.top_k or 'all'}")


def nlu_formula(objective: Objective, classes: int) -> str:
    """As `nlg_formula`; one class is a regression, which has no term of classes (see `objective.nlu_terms`)."""
    if classes == 1:
        regression = replace(objective, lambda2=0.0, lambda3=0.0, non_target_kl=0.0)
        return _formula(regression, "squared error", "squared error to the teacher", "")
    is_kl = objective.consistency == "kl"
    consistency = f"KL at T = {objective.temperature:g}" if is_kl else "squared distance of unit rows"
    return _formula(objective, "cross-entropy", consistency, "covariance of the classes")


def _formula(objective: Objective, task: str, consistency: str, diversity: str) -> str:
    share = "sum over N" if objective.svd_norm is None else f"{objective.svd_norm} share"
    weights = {
        consistency: objective.lambda1,
        diversity: objective.lambda2,
        f"{share} of {objective.svd_k} singular values": objective.lambda3,
        "non-target KL": objective.non_target_kl,
        "load balance of the experts": objective.router_aux,
    }
    moving = ", weights on the iclr2026 schedule" if objective.moving_lambdas else ""
    return task + "".join(f" + {weight:g} x {name}" for name, weight in weights.items() if weight > 0) + moving


def base_parameters(model: nn.Module) -> int:
    """How many numbers the model had before it was adapted; a quantised weight counts as the one that it was."""
    own = {id(factor) for _, layer in adapted_layers(model) for factor in (layer.A, layer.B)}
    dense = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in own)
    quantised = [layer.W.shape for _, layer in adapted_layers(model) if not isinstance(layer.W, Tensor)]
    return dense + sum(n * m for n, m in quantised)


def expected_memory(
    model: Decoder, rows: list[Row], micro_batch_size: int, grad_checkpoint: bool, objective: Objective
) -> int:
    """Bytes at the peak of a step: weights, gradients, Adam's moments, and what the backward pass keeps.

    Counted from the shapes, for the largest micro-batch possible.
    """
    config, element = model.config, model.embedding.weight.element_size()
    sharded = [parameter for parameter in model.parameters() if hasattr(parameter, "to_local")]
    fixed = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    fixed -= sum(parameter.nbytes - parameter.to_local().nbytes for parameter in sharded)  # what other ranks keep
    # Gathered: the block in use, the next one, and the buffer in which it arrives.
    fixed += 3 * sum(parameter.nbytes for parameter in sharded) // config.num_hidden_layers
    fixed += sum(3 * parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)

    longest = sorted(rows, key=lambda row: len(row.ids))[-micro_batch_size:]
    tokens = sum(len(row.ids) for row in longest)
    predicted = sum(row.predicted for row in longest)
    block = block_bytes(config, element)
    kept = element * config.hidden_size if grad_checkpoint else block
    activations = tokens * (config.num_hidden_layers * kept + block)
    return fixed + activations + objective_bytes(model, predicted, objective)


def objective_bytes(model: Decoder, predicted: int, objective: Objective) -> int:
    """What L takes for that many predicted tokens: blocks of logits, or all of them (see `head_of`)."""
    if isinstance(head := head_of(model), FrozenHead):
        blocks = 5 if objective.needs_teacher else 3
        d = model.config.hidden_size
        states = 3 * predicted * d * head.weight.element_size()  # student, teacher, gradient
        spectral = 8 * (d * d + 2 * predicted * d + 4 * min(predicted, d) ** 2) if objective.lambda3 > 0 else 0
        return 4 * blocks * min(head.block, predicted) * len(head.weight) + states + spectral
    # float32 copies of the (M, V) logits: log-probabilities, their gradient, and those of each further term
    regularizers = (objective.lambda1, objective.lambda2, objective.lambda3, objective.non_target_kl)
    copies = 4 + 3 * sum(weight > 0 for weight in regularizers)
    return 4 * predicted * model.config.vocab_size * copies


def block_bytes(config: DecoderConfig, element: int) -> int:
    """What autograd keeps of one block for one token: the norms' inputs in float32 and their outputs, q, k, v and what
    attention found, that once more as o_proj's input, gate, up and their product; of a mixture those of each expert
    that the token goes through, with a copy of the input and an output of its own."""
    d, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    width, copies = config.intermediate_size, 0
    if isinstance(config, MixtureConfig):
        width, copies = config.active_size, 2 * config.num_experts_per_tok
    return 2 * 4 * d + element * ((2 + copies) * d + 5 * heads + 3 * width)
