"""Fine-tune a decoder or T5 checkpoint with BA-LoRA, LoRA, PiSSA or in full; see `--help`.

The whole story, top to bottom: load, adapt, then per step the teacher, the student, their terms and the update; save.
"""

import json
import math
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import minibalora as mb
from minibalora.base import cli, distributed
from minibalora.base.errors import InputError
from minibalora.base.files import check_writable
from minibalora.checkpoints.families import read_config
from minibalora.checkpoints.weights import skeleton, weights_digest
from minibalora.data import batches, prompts
from minibalora.data.batches import Row
from minibalora.data.prompts import Example
from minibalora.evaluation import benchmarks, records
from minibalora.evaluation.benchmarks import Item
from minibalora.fused import FrozenHead, mean_entropy
from minibalora.models import LanguageModel
from minibalora.models.mixture import MixtureConfig, keep_router_outputs, load_balance
from minibalora.objective import Objective, entropy_share, head_of, lambdas, nlg_loss
from minibalora.run import run_folder, training
from minibalora.run.cache import Cache
from minibalora.run.flags import nlg_objective, parse_nlg_flags
from minibalora.run.memory import expected_memory, packed_amount
from minibalora.run.plan import nlg_formula, print_plan
from minibalora.run.settings import Hardware
from minibalora.run.teacher import open_cache, teacher_states
from minibalora.toy.problems import clean_problems, flawed_problems


def main() -> int:
    distributed.join()
    args = parse_nlg_flags()
    objective = nlg_objective(args)
    distributed.on_main(run_folder.check_out, args.out, args.resume)
    if args.init_cache is not None:
        check_writable(args.init_cache, "--init-cache")
    torch.manual_seed(args.seed)

    # Load: data, tokenizer, model.
    examples, unanswered, held_out, pretraining = read_data(args)
    tok = mb.load_tokenizer(args.model)
    rows, truncated, dropped = batches.encode_examples(examples, tok, args.max_length)
    if not rows:
        raise InputError(f"--max-length {args.max_length} leaves no room for a response in any row: raise it")
    full = args.method == "full"
    config = read_config(Path(args.model))
    if objective.router_aux > 0 and not isinstance(config, MixtureConfig):
        raise InputError(f"--router-aux-loss: {args.model} has no experts to choose from: leave it out")
    batches.check_fits(rows, args.data, config, args.max_length, args.model)
    asked, _, _ = batches.encode_examples(held_out, tok, sys.maxsize)
    batches.check_fits(asked, args.eval, config, args.max_length, args.model)
    settings = settings_of(args, examples)
    steps = training.steps_of_run(args, len(rows))
    resumed_step = distributed.on_main(run_folder.resumed_step, args, settings, steps)
    cache = teacher_cache(args, rows) if args.teacher_cache else None
    if args.fsdp:
        model = skeleton(args.model)  # numbers come when it is known which of them this rank keeps
    else:
        place = "cpu" if args.quantize else args.device  # whole, it need not fit the GPU
        model = mb.load_model(args.model, dtype=torch.float32 if full else args.dtype, device=place)

    # Adapt: W becomes W_res + s A B, and nothing but A and B is trained.
    if not full:
        training.adapt_model(model, args, is_resumed=resumed_step is not None)
    training.fit_hardware(model, args, is_resumed=resumed_step is not None)
    optimizer, head = training.optimizer_of(model), head_of(model)
    if not args.resume:
        distributed.on_main(run_folder.start_run, args.out, settings)
    left_out = f"{truncated:,} responses cut, {dropped:,} rows too long, {unanswered:,} conversations without a reply"
    longest = sorted(rows, key=lambda row: len(row.ids))[-args.micro_batch_size :]
    amount = packed_amount(batches.pack(longest, "cpu"))
    hardware = Hardware(args.device, args.dtype, grad_checkpoint=args.grad_checkpoint)
    memory = expected_memory(
        model,
        hardware,
        amount,
        objective,
        args.batch_size > args.micro_batch_size,
        distributed.size() if args.fsdp else 1,
    )
    why = "" if isinstance(head, FrozenHead) else ", of whole logits, for the head is trained or caps them"
    print_plan(args, model, nlg_formula(objective) + why, [amounts(args, rows), left_out], steps, memory)

    # At step 0 the student is the pre-trained model, whatever the init.
    benchmark = benchmarks.BENCHMARKS[args.eval_task] if args.eval_task else None
    held_out = records.HeldOut(held_out, pretraining, benchmark, args.micro_batch_size)
    measure = partial(records.measure, model, tok, held_out)
    before = distributed.on_main(measure, args.out / "eval-before.jsonl", settings["model_digest"])
    step = run_folder.first_step(args.out, model, optimizer, resumed_step)

    # Train: a step is a batch of rows, taken in micro-batches, then one update.
    def gradients(step: int, stop: list[int]) -> tuple[list[float], dict[str, float], list[list[Row]]]:
        batch = [rows[index] for index in batches.rows_of_step(len(rows), args.batch_size, args.seed, step)]
        micro = batches.micro_batches(batch, args.micro_batch_size)
        return *backward(model, head, micro, objective, step, steps, stop, cache), micro

    step, stop = training.train(args, model, optimizer, step, steps, gradients)

    # Save, on one rank for all.
    distributed.on_main(save, model, args)
    status = training.finish(args.out, step, steps, stop)
    if (held_out.items or held_out.pretraining) and not stop:
        after = distributed.on_main(measure, args.out / "eval-after.jsonl", training.trained_digest(model))
        print("\n" + records.before_and_after(before, after))
    distributed.leave()
    return status


def backward(
    model: LanguageModel,
    head: FrozenHead | Callable[[Tensor], Tensor],
    micro: list[list[Row]],
    objective: Objective,
    step: int,
    steps: int,
    stop: list[int],
    cache: Cache | None = None,
) -> tuple[list[float], dict[str, float]]:
    """Add the gradients of one step, L = L_task + λ1·L_CR + λ2·L_DR + λ3·L_SVDR, a mean over its response tokens.

    micro: the step's rows, cut; of several ranks each takes its share. Returns each micro-batch's part of L and the
    step's terms. Dividing is done once, by the tokens of the whole step, so gradients are the same however it is cut
    (but for the spectral term, see `nlg_terms`, and the routers' load balance, which is a product of two means). Ends
    early, with gradients of no use, once `stop` is not empty.
    """
    if objective.router_aux > 0:
        keep_router_outputs(model)
    counts = [sum(row.predicted for row in rows) for rows in micro]
    shares = distributed.deal([count / sum(counts) for count in counts], idle=0.0)
    own = distributed.deal(micro, idle=micro[-1])
    packed = [batches.pack(rows, model.embedding.weight.device) for rows in own]
    teachers = teacher_states(model, packed, own, cache) if objective.needs_teacher else [None] * len(own)
    weights = lambdas(objective, step, steps, mean_entropy_share(teachers, shares, head, objective))

    def losses() -> Iterator[tuple[float, Tensor, dict[str, Tensor]]]:
        for share, batch, teacher in zip(shares, packed, teachers, strict=True):
            student = model.packed(batch.input_ids, batch.lengths, batch.wanted, batch.shared)  # (M, d)
            loss, terms = nlg_loss(student, teacher, batch.targets, head, objective, weights)
            if objective.router_aux > 0:
                terms["router_aux"] = load_balance(model)
                loss = loss + objective.router_aux * terms["router_aux"]
            yield share, loss, terms

    parts, terms = training.add_gradients(losses(), stop)
    return parts[: len(micro)], terms  # beyond are those of idle ranks, which count for nothing


def mean_entropy_share(
    teachers: list[Tensor], shares: list[float], head: FrozenHead | Callable[[Tensor], Tensor], objective: Objective
) -> float | None:
    """H̄ / ln V of the teacher over the whole step, which the adaptive λ1 goes by."""
    if not objective.adaptive_lambda1:
        return None
    mean = 0.0
    for share, teacher in zip(shares, teachers, strict=True):
        if isinstance(head, FrozenHead):
            mean += share * mean_entropy(teacher, head, objective.temperature) / math.log(len(head.weight))
        else:
            mean += share * entropy_share(head(teacher), objective.temperature).mean()
    return distributed.total(mean.item())


def save(model: LanguageModel, args: Namespace) -> None:
    """The adapter for the original base, in PEFT's format; of a model that was trained in full, all of it."""
    if args.method == "full":
        mb.save_model(model.to(args.dtype), args.out / "model")
    else:
        training.truncate_adapter(model, args.adapter_rank)
        mb.save_adapter(model, args.out)


def read_data(args: Namespace) -> tuple[list[Example], int, list[Item], list[Example]]:
    """Examples to train on, how many conversations without a reply were left out, held-out problems, and some of the
    pre-training text, which only the built-in model has."""
    if args.is_toy:  # --seed is never negative, so what is held out is drawn apart
        sets = clean_problems(args.max_rows, args.seed), clean_problems(200, seed=-1), flawed_problems(200, seed=-1)
        train, held_out, pretraining = (
            [prompts.example_from(row, line) for line, row in enumerate(rows, start=1)] for rows in sets
        )
        return train, 0, benchmarks.as_items(held_out), pretraining
    fields = args.prompt_field, args.response_field
    train, unanswered = prompts.read_examples(args.data, *fields, args.max_rows, args.raw)
    if args.eval is None:
        return train, unanswered, [], []
    if args.eval_task:
        return train, unanswered, benchmarks.read_items(args.eval_task, args.eval), []
    return train, unanswered, benchmarks.as_items(prompts.read_examples(args.eval, *fields, raw=args.raw)[0]), []


def teacher_cache(args: Namespace, rows: list[Row]) -> Cache:
    """The cache of --teacher-cache for this run's teacher: of quantised weights, what was quantised counts, too."""
    config = read_config(Path(args.model))
    teacher = [weights_digest(args.model, every_byte=True), str(args.dtype), args.tf32]
    if args.quantize:
        teacher += [args.quantize, args.init, args.rank, args.alpha, args.targets, args.seed]
        teacher += [distributed.is_torchrun()]  # where pissa_niter_N draws otherwise
    return open_cache(args.teacher_cache, json.dumps(teacher), rows, config.hidden_size * args.dtype.itemsize)


def settings_of(args: Namespace, examples: list[Example]) -> dict:
    """Everything that makes the run what it is, as run.json keeps it."""
    settings = run_folder.plain_settings(args) | {"objective": asdict(nlg_objective(args))}
    return settings | {"data_digest": prompts.examples_digest(examples), "model_digest": weights_digest(args.model)}


def amounts(args: Namespace, rows: list[Row]) -> str:
    tokens = sum(len(row.ids) for row in rows)
    learned = tokens - sum(row.prompt_length for row in rows)
    return f"{args.data or 'built-in problems'}, {len(rows):,} rows, {tokens:,} tokens, {learned:,} learned"


if __name__ == "__main__":
    cli.run_script(
        main, "lower --micro-batch-size or add --grad-checkpoint", "give the same command and --resume to go on"
    )
