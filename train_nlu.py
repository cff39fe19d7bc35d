"""Fine-tune BERT, RoBERTa, DeBERTa-v3, T5 or a decoder to classify texts with BA-LoRA or a baseline; see `--help`.

The whole story, top to bottom: load, adapt, the teacher's logits once, then steps, with a look at the dev set after
every epoch; save the best one.
"""

import json
import math
import tempfile
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from textwrap import shorten

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

import minibalora as mb
from minibalora.base import cli
from minibalora.base.errors import InputError
from minibalora.base.files import check_writable, read_json_object, replacing, write_json
from minibalora.checkpoints.families import read_config
from minibalora.checkpoints.weights import weights_digest
from minibalora.data import as_text, batches, glue, labelled, prompts
from minibalora.data.glue import LabelledText, Task
from minibalora.data.labelled import ClassRow
from minibalora.evaluation import classify, records
from minibalora.models.mixture import MixtureConfig
from minibalora.models.t5 import AsText
from minibalora.objective import Objective, entropy_share, lambdas, nlu_terms, weighted_sum
from minibalora.run import run_folder, training
from minibalora.run.flags import nlu_objective, parse_nlu_flags
from minibalora.run.memory import expected_memory, padded_amount
from minibalora.run.plan import nlu_formula, print_plan
from minibalora.run.settings import Hardware
from minibalora.toy import reviews


@dataclass(frozen=True)
class EvalSet:
    name: str
    examples: list[LabelledText]
    is_folded: bool  # its labels tell class 0 from all others, and no more


def main() -> int:
    args = parse_nlu_flags()
    run_folder.check_out(args.out, args.resume)
    if args.init_cache is not None:
        check_writable(args.init_cache, "--init-cache")
    check_features(args)

    # Load: data, tokenizer, model. A head that the checkpoint lacks is new, drawn from the seed.
    task, examples, eval_sets, changes = read_data(args)
    classes = 1 if task.labels is None else len(task.labels)
    objective = nlu_objective(args)
    if classes == 2 and objective.non_target_kl > 0:
        raise InputError("--non-target-kl needs three classes or more: of two, one is left, and the term is always 0")
    if args.compile and isinstance(read_config(Path(args.model)), MixtureConfig):
        raise InputError("--compile: a mixture would be compiled anew whenever experts get other counts: leave it out")
    tok = mb.load_tokenizer(args.model)
    words = as_text.first_tokens(task, tok) if args.as_text else []
    if args.as_text:
        examples, *asked = (as_text.questions(each, task) for each in (examples, *(e.examples for e in eval_sets)))
        eval_sets = [replace(eval_set, examples=each) for eval_set, each in zip(eval_sets, asked, strict=True)]
    rows, cut = labelled.encode(examples, tok, args.max_length)
    eval_rows = [labelled.encode(eval_set.examples, tok, args.max_length)[0] for eval_set in eval_sets]
    config = read_config(Path(args.model))
    sources = [args.data, *(eval_set.name for eval_set in eval_sets)]
    for source, found in zip(sources, [rows, *eval_rows], strict=True):
        batches.check_fits(found, source, config, args.max_length, args.model)
    settings = settings_of(args, objective, task, examples + eval_sets[0].examples)
    steps = training.steps_of_run(args, len(rows))
    resumed_step = run_folder.resumed_step(args, settings, steps)
    full = args.method == "full"
    teacher = fine_tuned_logits(args, task, classes, examples) if objective.needs_teacher else None
    torch.manual_seed(args.seed)
    kind = ("lm", None) if args.as_text else ("classifier", classes)
    model = mb.load_model(args.model, *kind, torch.float32 if full else args.dtype, args.device)
    if model.own_head and model.own_head[-1] not in model.checkpoint.new_modules:
        check_class_order(args.model, task)

    # Adapt: W becomes W_res + s A B, and nothing but A, B and the classifier's own head is trained.
    if not full:
        training.adapt_model(model, args, is_resumed=resumed_step is not None)
    if args.grad_checkpoint:
        training.checkpoint_blocks(model)
    optimizer = training.optimizer_of(model)
    if not args.resume:
        run_folder.start_run(args.out, settings)
    lines = [amounts(args, task, examples), f"{cut:,} texts cut{changes}"]
    if args.as_text:
        lines.append(f"asked as '{shorten(examples[0].texts[0], 80)}', answered {' or '.join(as_text.words_of(task))}")
    lines += [f"measured on {eval_set.name}, {len(eval_set.examples):,} rows" for eval_set in eval_sets]
    if new := model.checkpoint.new_modules:
        lines.append(f"no {' and no '.join(new)} in the checkpoint: new, from seed {args.seed}")
    amount = padded_amount(min(args.micro_batch_size, len(rows)), max(len(row.ids) for row in rows), args.as_text)
    hardware = Hardware(args.device, args.dtype, grad_checkpoint=args.grad_checkpoint)
    memory = expected_memory(model, hardware, amount, None, args.batch_size > args.micro_batch_size)
    print_plan(args, model, nlu_formula(objective, classes), lines, steps, memory)

    # Before the first step the student is the pre-trained model, whatever the init.
    logits = AsText(model, words) if args.as_text else model
    answer = partial(classify.answers, model, batch_size=4 * args.batch_size, device=args.device, part=logits)
    judge = partial(scores, answer, task, eval_sets, eval_rows, args.batch_size)
    before = judge()
    features = [answer(eval_rows[0], part=model.features)] if args.features else []
    if objective.needs_teacher and teacher is None:
        with mb.pretrained(model):  # with the initial head; never changes, so this is all that a teacher costs
            teacher = answer(rows)
    step = run_folder.first_step(args.out, model, optimizer, resumed_step)

    # Train: a step is a batch of rows, then one update. The epoch that is best on the dev set is kept.
    forward = torch.compile(logits, dynamic=True) if args.compile else logits

    def gradients(step: int, stop: list[int]) -> tuple[list[float], dict[str, float], list[list[ClassRow]]]:
        batch = [rows[index] for index in batches.rows_of_step(len(rows), args.batch_size, args.seed, step)]
        micro = batches.micro_batches(batch, args.micro_batch_size)
        return *backward(model, forward, micro, teacher, objective, step, steps, args.device, stop), micro

    def after_step(step: int) -> dict:
        if step % batches.steps_per_epoch(len(rows), args.batch_size) != 0 and step != steps:
            return {}
        dev = classify.dev_metric(judge(first=1)[eval_sets[0].name], task)
        run_folder.keep_best(args.out, model, step, dev)
        tqdm.write(f"step {step}: {' + '.join(task.metrics)} of {eval_sets[0].name} {dev:.4f}")
        return {"dev": finite(dev)}

    step, stop = training.train(args, model, optimizer, step, steps, gradients, after_step)
    if stop:
        return training.finish(args.out, step, steps, stop)

    # Save: the best epoch's adapter and head for the original base, in PEFT's format, and what it is worth.
    best_step = run_folder.load_best(args.out, model)
    if full:
        model.to(args.dtype)  # what is measured is what is saved
    else:
        training.truncate_adapter(model, args.adapter_rank)
    after = judge()
    if full:
        mb.save_model(model, args.out / "model", task.labels)
    else:
        mb.save_adapter(model, args.out)
    write_report(args.out, task, best_step, before, after)
    if args.features:
        features.append(answer(eval_rows[0], part=model.features))
        save_features(args.features, *features, [row.label for row in eval_rows[0]], task.labels or ())
    training.finish(args.out, step, steps, stop)
    print(f"best on {eval_sets[0].name}: step {best_step}\n\n" + records.side_by_side(flat(before), flat(after)))
    return 0


def backward(
    model: nn.Module,
    forward: Callable[..., Tensor],
    micro: list[list[ClassRow]],
    teacher: Tensor | None,
    objective: Objective,
    step: int,
    steps: int,
    device: torch.device | str,
    stop: list[int],
) -> tuple[list[float], dict[str, float]]:
    """Add the gradients of one step, L = L_task + λ1·L_CR + λ2·L_DR + λ3·L_SVDR, a mean over its examples.

    teacher: the logits (N, D) of all rows. Returns each micro-batch's part of L and the step's terms. Dividing is done
    once, by the examples of the whole step; the covariance and the spectral term depend on how it is cut into `micro`.
    """
    count = sum(map(len, micro))
    share = None
    if objective.adaptive_lambda1:
        known = teacher[[row.index for rows in micro for row in rows]]
        share = float(entropy_share(known, objective.temperature).mean())
    weights = lambdas(objective, step, steps, share)

    def losses() -> Iterator[tuple[float, Tensor, dict[str, Tensor]]]:
        for rows in micro:
            inputs, labels = labelled.padded(rows, model, device)
            known = None if teacher is None else teacher[[row.index for row in rows]].to(device)
            terms = nlu_terms(forward(*inputs), known, labels, objective, weights)
            yield len(rows) / count, weighted_sum(terms, weights), terms

    return training.add_gradients(losses(), stop)


def fine_tuned_logits(args: Namespace, task: Task, classes: int, examples: list[LabelledText]) -> Tensor | None:
    """What the model in the folder `--teacher`, with its own tokenizer, answers to every example, (N, D).

    None if the student's pre-trained self is the teacher.
    """
    if args.teacher == "pretrained":
        return None
    teacher = mb.load_model(args.teacher, "classifier", classes, args.dtype, args.device)
    if new := teacher.checkpoint.new_modules:
        raise InputError(f"--teacher {args.teacher}: has no trained {new[0]}: give a fine-tuned model")
    check_class_order(args.teacher, task)
    rows, _ = labelled.encode(examples, mb.load_tokenizer(args.teacher), args.max_length)
    batches.check_fits(rows, args.data, teacher.config, args.max_length, args.teacher)
    return classify.answers(teacher, rows, 4 * args.batch_size, args.device)


def check_class_order(folder: str, task: Task) -> None:
    """InputError if config.json says that a class of the head is another class of the task.

    Published heads of MNLI differ in their order. Names that the task does not know, such as LABEL_0, say nothing.
    """
    id2label = read_json_object(Path(folder) / "config.json").get("id2label")
    known = {str(name).lower().replace("-", "_"): index for name, index in task.spellings.items()} | task.spellings
    for index, name in (id2label if isinstance(id2label, dict) else {}).items():
        ours = known.get(name, known.get(str(name).lower().replace("-", "_"))) if isinstance(name, str) else None
        if ours is not None and str(ours) != index:
            which = f"class {index} is {name!r}, which is class {ours} of {task.name}"
            raise InputError(f"{folder}/config.json: {which}: put the head's rows and id2label into the task's order")


def read_data(args: Namespace) -> tuple[Task, list[LabelledText], list[EvalSet], str]:
    """The task, what to learn from, what to measure on (the first is the dev set), and what was done to the data."""
    skipped = 0
    if args.is_toy:  # --seed is never negative, so what is held out is drawn apart
        task, examples = reviews.TASK, reviews.clean_reviews(args.max_rows, args.seed)
        eval_sets = [EvalSet("clean reviews", reviews.clean_reviews(600, seed=-1), False)]
    else:
        path, dev = Path(args.data), []
        task = glue.TASKS[args.task] if args.task != "custom" else None
        if path.is_dir() and task is not None:
            path, dev = glue.glue_files(path, task)
        task = task or glue.custom_task(path, args.text_field, args.label_field)
        examples, skipped, _ = glue.read_labelled(path, task)
        examples = examples[: args.max_rows]
        eval_sets = read_eval_sets([*dev, *map(Path, args.eval or [])], task)
        if not eval_sets:
            raise InputError(f"--data {args.data}: a file needs --eval with the dev file: give it")
    glue.check_classes(examples, task, f"{args.data}, {len(examples):,} rows")
    changes, count = f", {skipped:,} rows without a label", len(examples)
    if args.imbalance:
        examples = glue.with_imbalance(examples, args.imbalance, args.seed)
        changes += f", {count - len(examples):,} left out for the imbalance"
    if args.label_noise:
        examples = glue.with_label_noise(examples, args.label_noise, len(task.labels), args.seed)
        changes += f", {round(args.label_noise * len(examples)):,} with another label"
    return task, examples, eval_sets, changes


def read_eval_sets(paths: list[Path], task: Task) -> list[EvalSet]:
    """Each file by its name, or by its path where another has the same name."""
    if len(set(paths)) < len(paths):
        raise InputError(f"--eval names {max(paths, key=paths.count)} twice: name each file once")
    names = Counter(path.name for path in paths)
    sets = {path.name if names[path.name] == 1 else str(path): glue.read_labelled(path, task) for path in paths}
    return [EvalSet(name, examples, is_folded) for name, (examples, _, is_folded) in sets.items()]


def scores(
    answer: Callable[[list[ClassRow]], Tensor],
    task: Task,
    eval_sets: list[EvalSet],
    eval_rows: list[list[ClassRow]],
    batch_size: int,
    first: int | None = None,
) -> dict[str, dict[str, float]]:
    """Name of an evaluation set -> its scores; of the first `first` sets, or of all."""
    return {
        eval_set.name: classify.class_scores(answer(rows), rows, task, eval_set.is_folded, batch_size)
        for eval_set, rows in list(zip(eval_sets, eval_rows, strict=True))[:first]
    }


def settings_of(args: Namespace, objective: Objective, task: Task, examples: list[LabelledText]) -> dict:
    """Everything that makes the run what it is, as run.json keeps it."""
    settings = run_folder.plain_settings(args) | {"objective": asdict(objective), "labels": list(task.labels or [])}
    settings["teacher_digest"] = None
    if args.teacher not in (None, "pretrained"):
        if not Path(args.teacher).is_dir():
            raise InputError(f"--teacher {args.teacher}: no such folder: give pretrained or a fine-tuned checkpoint")
        settings["teacher_digest"] = weights_digest(args.teacher)
    return settings | {"data_digest": prompts.examples_digest(examples), "model_digest": weights_digest(args.model)}


def check_features(args: Namespace) -> None:
    """InputError if --features can't be written, which would be known only after training, or is no place for it."""
    path = args.features
    if path is None:
        return
    folder = path.absolute().parent
    if folder == args.out.absolute():
        if path.name in run_folder.RUN_FILES:
            raise InputError(f"--features {path}: is a file of the run itself: give another name")
        return  # check_out has seen to it
    is_own = args.resume and run_folder.recorded_settings(args.out).get("features") == str(path)
    if path.exists() and not is_own:
        raise InputError(f"--features {path}: exists already: give another name")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"--features {path}: can't write there ({error.strerror}): give another folder") from None


def save_features(path: Path, before: Tensor, after: Tensor, labels: list[int | float], names: Sequence[str]) -> None:
    """The states (N, d) that the head reads, of the dev set before and after training, and its labels (N,); the names
    of the classes are in the metadata."""
    tensors = {"before": before, "after": after, "labels": torch.tensor(labels)}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"classes": json.dumps(list(names))})


def write_report(out: Path, task: Task, best_step: int, before: dict, after: dict) -> None:
    """report.json: every score of every evaluation set, and the dev metric after each epoch."""
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    epochs = [{"step": entry["step"], "dev": entry["dev"]} for entry in entries if "dev" in entry]
    before, after = (
        {name: {key: finite(value) for key, value in found.items()} for name, found in column.items()}
        for column in (before, after)
    )
    report = {"task": task.name, "dev_metric": task.metrics, "best_step": best_step, "epochs": epochs}
    write_json(out / "report.json", report | {"before": before, "after": after})


def flat(column: dict[str, dict[str, float]]) -> dict[str, float]:
    return {f"{name}: {key}": value for name, found in column.items() for key, value in found.items()}


def finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def amounts(args: Namespace, task: Task, examples: list[LabelledText]) -> str:
    counts = Counter(example.label for example in examples)
    classes = ", ".join(f"{counts[index]:,} of class {label}" for index, label in enumerate(task.labels or ()))
    return f"{args.data or 'built-in reviews'}, {len(examples):,} rows{f': {classes}' if classes else ''}"


if __name__ == "__main__":
    cli.run_script(
        main, "lower --micro-batch-size or add --grad-checkpoint", "give the same command and --resume to go on"
    )
