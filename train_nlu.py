"""Fine-tune BERT, RoBERTa, DeBERTa-v3, T5 or a decoder to classify texts with BA-LoRA or a baseline; see `--help`.

The whole story, top to bottom: load, adapt, compute the teacher's logits once, train with an evaluation on the dev set
after every epoch, save the best epoch.
"""

import minibalora as mb  # first, so that Ctrl-C during the imports ends quietly (base/interrupts.py)

# isort: split
from dataclasses import replace
from functools import partial
from pathlib import Path
from textwrap import shorten

import torch

from minibalora.base import cli, progress
from minibalora.base.errors import InputError
from minibalora.base.files import check_writable
from minibalora.checkpoints.families import read_config
from minibalora.checkpoints.weights import arrange_head, weights_digest
from minibalora.data import as_text, batches, files, glue, labelled, prompts, sets
from minibalora.evaluation import class_scoring, records
from minibalora.models.decoder import to_device
from minibalora.models.mixture import MixtureConfig
from minibalora.models.t5 import AsText
from minibalora.objective import entropy_share, lambdas, nlu_loss
from minibalora.run import checkpoint, run_folder
from minibalora.run.adapting import adapt_model, truncate_adapter
from minibalora.run.flags import parse_nlu_flags
from minibalora.run.hardware import checkpoint_blocks
from minibalora.run.loop import Run, optimizer_of, steps_of_run
from minibalora.run.memory import classification_loss, expected_memory
from minibalora.run.plan import nlu_formula, print_plan
from minibalora.run.term_warnings import nlu_warnings
from minibalora.toy import reviews


def main() -> int:
    settings = parse_nlu_flags()
    source, objective, adaptation = settings.source, settings.objective, settings.adaptation
    optimisation, hardware, output = settings.optimisation, settings.hardware, settings.output
    out, seed, device, is_full = output.folder, optimisation.seed, hardware.device, adaptation.method == "full"
    run_folder.check_apart(out, source.model, source.data)
    run_folder.check_out(out, output.resume)
    run_folder.check_features(output.features, out, output.resume)
    if adaptation.init_cache is not None:
        check_writable(adaptation.init_cache, "--init-cache")

    # Load: data, tokenizer, model. A head that the checkpoint lacks is new, drawn from the seed.
    if source.data is None:
        task, examples, skipped = reviews.TASK, reviews.clean_reviews(source.max_rows, seed), 0
        eval_sets = [reviews.held_out_reviews()]
    else:
        fields = source.text_field, source.label_field
        task, examples, skipped, eval_sets = sets.read_sets(source.data, source.task, source.eval or [], *fields)
        examples = examples[: source.max_rows]
    glue.check_classes(examples, task, f"{source.data}, {len(examples):,} rows")
    classes = 1 if task.labels is None else len(task.labels)
    examples, changes = sets.disturbed(examples, classes, source.imbalance, source.label_noise, seed)
    tok, config = mb.load_tokenizer(source.model), read_config(Path(source.model))
    if classes == 2 and objective.non_target_kl > 0:
        raise InputError("--non-target-kl needs at least three classes; with two, the term is always 0: leave it out")
    if hardware.compile and isinstance(config, MixtureConfig):
        raise InputError("--compile: a mixture is recompiled whenever its experts get other token counts: leave it out")
    words = as_text.first_tokens(task, tok) if source.as_text else []
    if source.as_text:
        examples = as_text.questions(examples, task)
        eval_sets = [replace(eval_set, examples=as_text.questions(eval_set.examples, task)) for eval_set in eval_sets]
    rows, cut = labelled.encode(examples, tok, source.max_length)
    unknown = labelled.unknown_share(rows, tok, source.data, source.model)
    eval_sets = [eval_set.encoded(tok, source.max_length) for eval_set in eval_sets]
    for name, measured in [(source.data, rows), *((eval_set.name, eval_set.rows) for eval_set in eval_sets)]:
        batches.check_fits(measured, name, config, source.max_length, source.model)
    dev = eval_sets[0]
    order = [] if source.as_text else sets.class_order(source.model, task)
    stored = sets.stored_order(order, classes)
    recorded = settings.recorded | {
        "labels": [task.labels[index] for index in stored] if task.labels else [],  # in the order of the saved head
        "teacher_digest": class_scoring.teacher_digest(source.teacher),
        "data_digest": prompts.examples_digest(examples),
        "eval_digest": prompts.examples_digest(dev.examples),  # they choose the best epoch
        "model_digest": weights_digest(source.model),
    }
    steps = steps_of_run(optimisation, len(rows))
    resumed = checkpoint.resumed_step(out, recorded, steps) if output.resume else None
    asked_at_once = 4 * optimisation.batch_size
    teacher = None  # logits (N, D) of all rows, from a fine-tuned model or, below, from the pre-trained one
    if objective.needs_teacher and source.teacher != "pretrained":
        teacher = class_scoring.fine_tuned_logits(source, task, examples, hardware, asked_at_once)
    torch.manual_seed(seed)
    kind = ("lm", None) if source.as_text else ("classifier", classes)
    base = mb.load_model(source.model, *kind, torch.float32 if is_full else hardware.dtype, device)
    model = AsText(base, words) if source.as_text else base  # `base` is trained and saved
    if base.own_head and base.own_head[-1] not in base.checkpoint.new_modules:
        arrange_head(base, order)

    # Adapt: W becomes W_res + s A B, and only the adapters and the head are trained.
    if not is_full:
        adapt_model(base, adaptation, hardware, seed, out if resumed is not None else None)
    longest = labelled.padded(batches.longest(rows, optimisation.micro_batch_size), model, "cpu")
    loss_of = partial(classification_loss, *longest, objective)
    memory = expected_memory(model, hardware, loss_of, optimisation.micro_batches > 1)
    if hardware.grad_checkpoint:
        checkpoint_blocks(base)
    optimizer = optimizer_of(base, adaptation.rate_of_b)
    if not output.resume:
        run_folder.start_run(out, recorded)
    skipped = f", {skipped:,} rows without a label" if source.data is not None else ""
    lines = [sets.in_words(examples, task, source.data and files.named(source.data))]
    lines.append(f"{cut:,} texts cut{skipped}{changes}")
    if unknown >= 0.01:
        lines.append(f"{unknown:.0%} of the tokens are unknown to the tokenizer")
    if source.as_text:
        lines.append(f"asked as '{shorten(examples[0].texts[0], 80)}', answered {' or '.join(as_text.words_of(task))}")
    lines += [f"measured on {eval_set.in_words()}" for eval_set in eval_sets]
    lines += sets.head_in_words(base.checkpoint, order, task, seed)
    if teacher is not None:
        lines.append(class_scoring.teacher_in_words(source.teacher, teacher, rows, task))
    terms, at_once = [nlu_formula(objective, classes)], min(optimisation.micro_batch_size, len(rows))
    has_random_teacher = teacher is None and len(base.checkpoint.new_modules) > 0
    terms += nlu_warnings(objective, classes, at_once, has_random_teacher)
    print_plan(settings, base, terms, lines, steps, memory)

    # Before the first step, the student is the pre-trained model, whatever the init.
    torch.backends.cuda.matmul.allow_tf32 = hardware.tf32  # only now: PiSSA's SVDs need every bit
    answer = partial(class_scoring.answers, model, batch_size=asked_at_once, device=device)
    judge = partial(class_scoring.scores_of_sets, answer, task, optimisation.batch_size)
    before = judge(eval_sets)
    features = [answer(dev.rows, part=model.features)] if output.features else []
    if objective.needs_teacher and teacher is None:
        with mb.pretrained(base):  # with the initial head; these logits never change, so computing them once is enough
            teacher = answer(rows)

    # Train: L = L_task + λ1·L_CR + λ2·L_DR + λ3·L_SVDR. A step is a batch of rows, cut into micro-batches, then one
    # update. However the step is cut, L is a mean over its examples, except for the covariance and the spectral term,
    # which are computed per micro-batch. The epoch that is best on the dev set is kept.
    forward = torch.compile(model, dynamic=True) if hardware.compile else model
    with Run(output, optimisation, hardware, base, optimizer, steps, resumed) as run:
        for step, parts in run.steps(rows):
            unsure = None
            if objective.adaptive_lambda1:
                asked = teacher[[row.index for part in parts for row in part.rows]]
                unsure = float(entropy_share(asked, objective.temperature).mean())
            weights = lambdas(objective, step, steps, unsure)
            for part in parts:
                indices = [row.index for row in part.rows]
                teacher_logits = None if teacher is None else to_device(teacher[indices], device)
                inputs, labels = labelled.padded(part.rows, model, device)
                with run.autocast():
                    loss, terms = nlu_loss(forward(*inputs), teacher_logits, labels, objective, weights)
                (part.share * loss).backward()
                run.note(part, loss, terms)
            run.update()
            if run.step % batches.steps_per_epoch(len(rows), optimisation.batch_size) == 0 or run.step == steps:
                score = class_scoring.dev_metric(judge([dev])[dev.name], task)
                checkpoint.keep_best(out, base, run.step, score)
                progress.say(f"step {run.step}: {' + '.join(task.metrics)} of {dev.name} {score:.4f}")
                run.entry["dev"] = class_scoring.finite(score)
    if run.signal:
        return run.say_end()

    # Save: the best epoch's adapter and head for the original base, in PEFT's format, and its scores.
    best_step = checkpoint.load_best(out, base)
    if is_full:
        base.to(hardware.dtype)  # so that the scores are those of the saved model
    else:
        truncate_adapter(base, output.adapter_rank)
    after = judge(eval_sets)
    if order:
        arrange_head(base, stored)  # other tools take the names of the classes from the base's config.json
    if is_full:
        mb.save_model(base, out / "model", recorded["labels"])
    else:
        mb.save_adapter(base, out)
    class_scoring.write_report(out, task, best_step, before, after)
    if output.features:
        features.append(answer(dev.rows, part=model.features))
        class_scoring.save_features(output.features, *features, [row.label for row in dev.rows], task.labels or ())
    status = run.say_end()
    table = records.side_by_side(class_scoring.flat(before), class_scoring.flat(after))
    print(f"best on {dev.name}: step {best_step}\n\n{table}")
    return status


if __name__ == "__main__":
    cli.run_script(
        main,
        smaller="lower --micro-batch-size or add --grad-checkpoint",
        resuming="give the same command to continue, with --resume if --out exists",
    )
