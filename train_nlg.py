"""Fine-tune a LLaMA, Mistral or Gemma checkpoint with BA-LoRA, LoRA, PiSSA or in full: `python train_nlg.py --help`.

The whole story, top to bottom: load, adapt, then per step the teacher, the student, their terms and the update; save.
"""

import sys
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import minibalora as mb
from minibalora import data, evaluate, training
from minibalora.data import Example, Row
from minibalora.errors import InputError
from minibalora.flags import nlg_objective, parse_nlg_flags
from minibalora.models.decoder import Decoder
from minibalora.objective import Objective, entropy_share, lambdas, nlg_terms, predicted_rows, weighted_sum
from minibalora.plan import print_plan
from minibalora.toy.problems import clean_problems, flawed_problems
from minibalora.weights import read_config, weights_digest

TERMS = ("task", "consistency", "diversity", "svd", "non_target_kl")


def main() -> int:
    args = parse_nlg_flags()
    objective = nlg_objective(args)
    training.check_out(args.out, args.resume)
    torch.manual_seed(args.seed)

    # Load: data, tokenizer, model.
    examples, unanswered, held_out, pretraining = read_data(args)
    tok = mb.load_tokenizer(args.model)
    rows, truncated, dropped = data.encode_examples(examples, tok, args.max_length)
    if not rows:
        raise InputError(f"--max-length {args.max_length} leaves no room for a response in any row: raise it")
    full = args.method == "full"
    check_vocabulary(rows + data.encode_examples(held_out, tok, sys.maxsize)[0], args.model)
    settings = settings_of(args, examples)
    if args.resume:
        training.check_settings(args.out, settings)
    resumed_step = training.checkpoint_step(args.out) if args.resume else None
    model = mb.load_model(args.model, dtype=torch.float32 if full else args.dtype, device=args.device)

    # Adapt: W becomes W_res + s A B, and nothing but A and B is trained.
    if not full:
        adapt(model, args, is_resumed=resumed_step is not None)
    model.grad_checkpoint = args.grad_checkpoint
    parameters = list(training.trained_parameters(model).values())
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0, fused=args.device.type == "cuda")
    steps = args.epochs * data.steps_per_epoch(len(rows), args.batch_size)
    steps = min(steps, args.max_steps or steps)
    if resumed_step is not None and not 0 <= resumed_step <= steps:
        raise InputError(f"{args.out}: its checkpoint is of step {resumed_step}, but the run has {steps}: start anew")
    if not args.resume:
        training.start_run(args.out, settings)
    left_out = f"{truncated:,} responses cut, {dropped:,} rows too long, {unanswered:,} conversations without a reply"
    print_plan(args, model, rows, left_out, steps, objective)

    # At step 0 the student is the pre-trained model, whatever the init.
    judge = partial(evaluate.scores, model, tok, held_out, pretraining, args.micro_batch_size)
    before = judge()
    if resumed_step is None:
        training.save_checkpoint(args.out, model, optimizer, 0)
    else:
        training.load_checkpoint(args.out, model, optimizer)
        print(f"resumed at step {resumed_step}")
    step = resumed_step or 0

    # Train: a step is a batch of rows, taken in micro-batches, then one update.
    model.train()
    hidden = torch.compile(model.hidden, dynamic=True) if args.compile else model.hidden
    bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True)
    with training.open_log(args.out, step) as log, training.stop_signals() as stop, bar:
        while step < steps and not stop:
            started = time.perf_counter()
            batch = [rows[index] for index in data.rows_of_step(len(rows), args.batch_size, args.seed, step)]
            micro = data.micro_batches(batch, args.micro_batch_size)
            batches = [data.collate(part, args.device) for part in micro]
            response_tokens = sum(len(row.ids) - row.prompt_length for row in batch)
            with torch.autocast(args.device.type, args.dtype, enabled=full and args.dtype != torch.float32):
                losses, terms = backward(model, hidden, batches, response_tokens, objective, step, steps, stop)
            if stop:
                break  # within a step: its gradients are dropped, so the model is that of the last whole step
            norm = nn.utils.clip_grad_norm_(parameters, args.grad_clip)
            check_finite(losses, norm, step, micro)
            rate = training.learning_rate(step, steps, args.lr, args.warmup_ratio, args.schedule)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
            step += 1

            speed = sum(len(row.ids) for row in batch) / (time.perf_counter() - started)
            entry = {"step": step, "loss": sum(losses)} | dict.fromkeys(TERMS) | terms | {"lr": rate}
            entry |= {"tokens_per_s": round(speed), "memory_bytes": training.peak_memory(args.device)}
            log(entry)
            show(bar, entry)
            if step % args.save_every == 0 or step == steps:
                training.save_checkpoint(args.out, model, optimizer, step)

    # Save: the adapter for the original base, in PEFT's format.
    if stop:
        training.save_checkpoint(args.out, model, optimizer, step)
    if full:
        mb.save_model(model.to(args.dtype), args.out / "model")
    else:
        mb.save_adapter(model, args.out)
    if stop:
        print(f"stopped after step {step} of {steps}; saved to {args.out}; go on with the same command and --resume")
        return 128 + stop[0]
    print(f"saved to {args.out}")
    if before:
        print("\n" + evaluate.table(before, judge()))
    return 0


def backward(
    model: Decoder,
    hidden: Callable[[Tensor], Tensor],
    batches: list[tuple[Tensor, Tensor]],
    response_tokens: int,
    objective: Objective,
    step: int,
    steps: int,
    stop: list[int],
) -> tuple[list[float], dict[str, float]]:
    """Add the gradients of one step, L = L_task + λ1·L_CR + λ2·L_DR + λ3·L_SVDR, a mean over its response tokens.

    Returns each micro-batch's part of L and the step's terms. Dividing is done once, by the tokens of the whole step,
    so gradients are the same however it is cut into `batches` (but for the spectral term, see `nlg_terms`). Ends early,
    with gradients of no use, once `stop` is not empty.
    """
    teachers = teacher_states(model, hidden, batches) if objective.needs_teacher else [None] * len(batches)
    weights = lambdas(objective, step, steps, mean_entropy_share(model, teachers, objective, response_tokens))
    losses, totals = [], {}
    for (input_ids, labels), teacher in zip(batches, teachers, strict=True):
        if stop:
            return [], {}
        states, targets = predicted_rows(hidden(input_ids), labels)  # (M, d), (M,)
        teacher_logits = None if teacher is None else model.head(teacher)
        terms = nlg_terms(model.head(states), teacher_logits, targets, objective, weights)
        share = len(targets) / response_tokens
        loss = share * weighted_sum(terms, weights)
        loss.backward()
        losses.append(loss.detach())
        for name, term in terms.items():
            totals[name] = totals.get(name, 0.0) + share * term.detach()
    return torch.stack(losses).tolist(), {name: float(total) for name, total in totals.items()}


def teacher_states(model: Decoder, hidden: Callable[[Tensor], Tensor], batches: list[tuple[Tensor, Tensor]]):
    """The pre-trained model's states (M, d) of each micro-batch, on the student's weights; logits are V/d larger."""
    with mb.pretrained(model):
        return [predicted_rows(hidden(input_ids), labels)[0] for input_ids, labels in batches]


def mean_entropy_share(
    model: Decoder, teachers: list[Tensor], objective: Objective, response_tokens: int
) -> float | None:
    """H̄ / ln V of the teacher over the whole step, which the adaptive λ1 goes by."""
    if not objective.adaptive_lambda1:
        return None
    with torch.no_grad():
        shares = [entropy_share(model.head(teacher), objective.temperature).sum() for teacher in teachers]
    return float(sum(shares)) / response_tokens


def read_data(args: Namespace) -> tuple[list[Example], int, list[Example], list[Example]]:
    """Examples to train on, how many conversations without a reply were left out, held-out examples, and some of the
    pre-training text, which only the built-in model has."""
    if args.is_toy:  # --seed is never negative, so what is held out is drawn apart
        sets = clean_problems(args.max_rows, args.seed), clean_problems(200, seed=-1), flawed_problems(200, seed=-1)
        train, held_out, pretraining = (
            [data.example_from(row, line) for line, row in enumerate(rows, start=1)] for rows in sets
        )
        return train, 0, held_out, pretraining
    fields = args.prompt_field, args.response_field
    train, unanswered = data.read_examples(args.data, *fields, args.max_rows)
    return train, unanswered, data.read_examples(args.eval, *fields)[0] if args.eval else [], []


def adapt(model: Decoder, args: Namespace, is_resumed: bool) -> None:
    """mb.adapt with a progress bar; a resumed run takes its factors from the checkpoint and waits for no SVD."""
    init = "pissa_niter_0" if is_resumed and args.init != "lora" else args.init
    bar = iter if is_resumed else partial(tqdm, desc=init, unit="layer", dynamic_ncols=True, leave=False)
    try:
        mb.adapt(model, args.rank, args.alpha, init, args.targets, progress=bar)
    except ValueError as error:
        raise InputError(f"--rank or --targets: {error}") from None


def settings_of(args: Namespace, examples: list[Example]) -> dict:
    """Everything that makes the run what it is, as run.json keeps it."""
    plain = {name: value if value is None or isinstance(value, int | float | list) else str(value)
             for name, value in vars(args).items()}  # fmt: skip
    plain["objective"] = asdict(nlg_objective(args))
    return plain | {"data_digest": data.examples_digest(examples), "model_digest": weights_digest(args.model)}


def check_vocabulary(rows: list[Row], folder: str) -> None:
    size = read_config(Path(folder)).vocab_size
    for row in rows:
        if row.ids.max() >= size:
            which = f"token {row.ids.max()} for line {row.line}, the model has {size} tokens"
            raise InputError(f"{folder}: the tokenizer gives {which}: they do not belong together")


def check_finite(losses: list[float], norm: Tensor, step: int, micro: list[list[Row]]) -> None:
    """InputError with the step and the lines of the data whose loss, or else the step's gradient, is not finite."""
    bad = [rows for loss, rows in zip(losses, micro, strict=True) if not torch.tensor(loss).isfinite()]
    if bad or not norm.isfinite():
        lines = sorted(row.line for rows in bad or micro for row in rows)
        named = ", ".join(map(str, lines[:20])) + (" ..." if len(lines) > 20 else "")
        what = "loss" if bad else "gradient"
        raise InputError(
            f"step {step + 1}: the {what} is not finite (data lines {named}): lower --lr or mend the rows; "
            "the last checkpoint is kept"
        )


def show(bar: tqdm, entry: dict) -> None:
    shown = {"loss": f"{entry['loss']:.4f}"} | {
        name: f"{entry[name]:.3g}" for name in TERMS[1:] if entry[name] is not None
    }
    shown |= {"tokens/s": entry["tokens_per_s"], "GB": f"{entry['memory_bytes'] / 1e9:.1f}"}
    bar.set_postfix(shown, refresh=False)
    bar.update()


if __name__ == "__main__":
    training.run_script(main)
