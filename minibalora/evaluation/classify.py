"""Label new texts: `python -m minibalora classify`."""

import json
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from minibalora.base import cli
from minibalora.base.errors import InputError
from minibalora.base.files import check_writable, read_json_object, recorded_settings
from minibalora.checkpoints import BUILT_IN
from minibalora.checkpoints.adapters import Adapter, put_adapter, read_adapter
from minibalora.checkpoints.families import read_family
from minibalora.checkpoints.tokenizer import Tokenizer, load_tokenizer
from minibalora.checkpoints.weights import load_model
from minibalora.data import as_text
from minibalora.data.batches import check_fits
from minibalora.data.glue import TASKS, LabelledText, Task
from minibalora.data.labelled import encode
from minibalora.data.texts import columns_of, lines, read_texts, table
from minibalora.evaluation.class_scoring import answers
from minibalora.evaluation.submission import check_task, files_to_submit, write_submission
from minibalora.lowrank import merge
from minibalora.models.t5 import AsText

WINDOW = 64  # number of batches whose answers are written together


@dataclass(frozen=True)
class Classifier:
    model: nn.Module  # ids and mask -> logits (B, D); one logit is a score
    tok: Tokenizer
    labels: list[str] | None  # None: a score
    task: Task | None  # one of GLUE's or a custom one; None if unknown
    is_asked: bool  # a T5 is asked in words, see `as_text`

    def logits(self, examples: list[LabelledText], source: str, max_length: int, batch_size: int) -> Iterator[Tensor]:
        """Yield the logits (n, D) of the next WINDOW batches of examples. First prints how many texts are cut.

        Raises InputError if a text does not fit the model.
        """
        if self.is_asked:
            examples = as_text.questions(examples, self.task)
        rows, cut = encode(examples, self.tok, max_length)
        check_fits(rows, source, self.model.config, max_length)
        print(f"{source}: {len(rows):,} rows, {cut:,} cut to {max_length} tokens", file=sys.stderr)
        device = next(self.model.parameters()).device
        for start in range(0, len(rows), WINDOW * batch_size):
            yield answers(self.model, rows[start : start + WINDOW * batch_size], batch_size, device)


def main() -> int:
    args = parse_flags()
    if args.glue_submission is not None:
        check_writable(args.glue_submission, "--glue-submission")
    adapter = None if args.adapter is None else read_adapter(args.adapter)
    recorded = recorded_settings(args.adapter or args.model)
    if adapter is None and args.model.name == "model":  # where train_nlu.py --method full saves
        recorded = recorded or recorded_settings(args.model.parent)
    if args.task and recorded.get("task") in TASKS.keys() - {args.task}:
        raise InputError(f"--task {args.task}: run.json names the task {recorded['task']}: leave --task out")
    if args.task:
        recorded |= {"task": args.task}
    classifier = load_classifier(args.model, adapter, recorded, args.dtype, args.device)
    columns = [tuple(args.text_field)] if args.text_field else columns_of(classifier.task)
    if args.text_field and classifier.task and len(args.text_field) != len(columns_of(classifier.task)[0]):
        raise InputError(f"--text-field names {len(args.text_field)} columns, but {classifier.task.name} has "
                         f"{len(columns_of(classifier.task)[0])} texts: give as many")  # fmt: skip
    longest = classifier.model.config.max_position_embeddings or 128
    length = args.max_length or recorded.get("max_length") or min(128, longest)
    if args.glue_submission is not None:
        check_task(classifier.task, classifier.labels)
        for path, name in files_to_submit(args.data, classifier.task):
            texts = read_texts(table(path), columns, str(path))
            logits = torch.cat([*classifier.logits([text for text, _ in texts], str(path), length, args.batch_size)])
            indices, file = [index for _, index in texts], args.glue_submission / f"{name}.tsv"
            print(write_submission(file, indices, logits, classifier.labels, classifier.task))
        return 0
    is_stdin = args.data in (None, Path("-"))
    source, rows = ("standard input", lines(columns)) if is_stdin else (str(args.data), table(args.data))
    examples = [example for example, _ in read_texts(rows, columns, source)]
    sys.stdout.reconfigure(encoding="utf-8")
    if args.format == "tsv":
        if any("\t" in label or "\n" in label for label in classifier.labels or ()):
            raise InputError("--format tsv: the name of a class has a tab or a newline: use --format jsonl")
        print("\t".join(["line", *(["score"] if classifier.labels is None else ["label", *classifier.labels])]))
    written = 0
    for logits in classifier.logits(examples, source, length, args.batch_size):
        for example, row in zip(examples[written : written + len(logits)], logits, strict=True):
            print(as_line(example.line, row, classifier.labels, args.format))
        written += len(logits)
        sys.stdout.flush()
    return 0


def parse_flags() -> Namespace:
    parser = cli.OneLineParser(
        prog="python -m minibalora classify",
        description="Classify texts with a model that train_nlu.py trained. Writes a label and probabilities per text, "
        "or a score, in the order of the input.",
    )
    add = parser.add_argument_group("model").add_argument
    add("--model", metavar="DIR", type=cli.folder, default=BUILT_IN / "bert", help="checkpoint folder: config.json, "
        "tokenizer.json, *.safetensors (default: the built-in tiny BERT)")  # fmt: skip
    add("--adapter", metavar="DIR", type=cli.folder, help="folder of an adapter for the model, with its run.json")
    add("--batch-size", type=cli.positive_int, metavar="N", default=32, help="texts at a time (default: 32)")
    add("--max-length", type=cli.positive_int, metavar="N", help="tokens per text (default: as in training, or 128)")
    cli.add_hardware_flags(add)
    add = parser.add_argument_group("texts").add_argument
    add("--data", metavar="FILE", type=cli.path, help="TSV with a header, JSON Lines, an array or Parquet. Without it "
        "or with -, standard input: JSON Lines, or a text per line with a tab between the texts of a pair")  # fmt: skip
    add("--text-field", metavar="NAME", nargs="+", help="column of the text, or columns of the two texts of a pair "
        "(default: as in training)")  # fmt: skip
    add("--task", choices=tuple(TASKS), help="GLUE's task, for a model without a run.json that names it")
    add = parser.add_argument_group("output").add_argument
    add("--format", choices=("jsonl", "tsv"), help="each row begins with its line in the data (default: jsonl)")
    add("--glue-submission", metavar="DIR", type=cli.path, help="write the files that GLUE's server takes, such as "
        "CoLA.tsv; --data: the task's test file or GLUE's folder of it")  # fmt: skip
    args = parser.parse_args()
    cli.settle_hardware(args)
    if args.text_field and (len(args.text_field) > 2 or len(set(args.text_field)) < len(args.text_field)):
        raise InputError(f"--text-field {' '.join(args.text_field)}: give one column, or two different ones")
    if args.glue_submission is not None and (args.format or args.data in (None, Path("-"))):
        raise InputError("--glue-submission needs --data with the test file, and takes no --format: see --help")
    if args.data is None and (sys.stdin is None or sys.stdin.isatty()):
        raise InputError("there is nothing to classify: give --data")
    args.format = args.format or "jsonl"
    return args


def load_classifier(
    folder: Path, adapter: Adapter | None, recorded: dict, dtype: torch.dtype, device: torch.device
) -> Classifier:
    """Load model, adapter and tokenizer. recorded: the settings of the training run, {} if unknown.

    Raises InputError if the model has no trained head.
    """
    task, names = TASKS.get(recorded.get("task")), recorded.get("labels") or []
    if recorded.get("task") == "custom":
        columns = ((*recorded["text_field"], recorded["label_field"]),)
        task = Task("custom", columns, tuple(names), ("accuracy",))
    tok, is_asked = load_tokenizer(folder), bool(recorded.get("as_text"))
    if is_asked:
        model = load_model(folder, dtype=dtype, device=device)
    else:
        head = None if adapter is None else adapter.whole.get(read_family(folder)[0].names.classes)
        if head is None:
            refuse_multi_label(folder)
        count = None if head is None else len(head)
        model = load_model(folder, "classifier", count, dtype, device)
        new = [name for name in model.checkpoint.new_modules if head is None]
        if new or (adapter is not None and head is None and adapter.config.get("task_type") != "SEQ_CLS"):
            fault = f"{folder}: has no trained {new[0]}" if new else f"{adapter.file}: is not a classifier's adapter"
            raise InputError(f"{fault}: give the --adapter of a classifier, or a fine-tuned model")
    if adapter is not None:
        put_adapter(model, adapter)
        if dtype == torch.float32:
            merge(model)  # plain linears are faster, but in bfloat16, the sum would be rounded
    model = AsText(model, as_text.first_tokens(task, tok)) if is_asked else model
    folders = [folder] if adapter is None else [adapter.file.parent, folder]
    labels = None if model.num_labels == 1 else labels_of(model.num_labels, names, folders)
    return Classifier(model, tok, labels, task, is_asked)


def refuse_multi_label(folder: Path) -> None:
    """Raise InputError for a model that gives a text several labels: softmax would force it to one."""
    if read_json_object(folder / "config.json").get("problem_type") == "multi_label_classification":
        fault = "problem_type is multi_label_classification, several labels per text"
        raise InputError(f"{folder / 'config.json'}: {fault}: give a model with one label per text")


def labels_of(count: int, names: list[str], folders: list[Path]) -> list[str]:
    """Return the class names: those of the training run, or id2label of the first config.json with `count` classes."""
    if len(names) == count:
        return names
    for folder in folders:
        if (folder / "config.json").exists():
            id2label = read_json_object(folder / "config.json").get("id2label")
            if isinstance(id2label, dict) and sorted(id2label) == sorted(map(str, range(count))):
                return [str(id2label[str(index)]) for index in range(count)]
    return [f"LABEL_{index}" for index in range(count)]


def as_line(line: int, logits: Tensor, labels: list[str] | None, form: str) -> str:
    """Return a line of JSON or TSV for one text with logits (D,)."""
    if labels is None:
        score = round(logits.item(), 6)
        return f"{line}\t{score}" if form == "tsv" else json.dumps({"line": line, "score": score})
    shares = [round(share, 6) for share in logits.softmax(0).tolist()]
    label = labels[int(logits.argmax())]
    if form == "tsv":
        return "\t".join(map(str, [line, label, *shares]))
    row = {"line": line, "label": label, "probabilities": dict(zip(labels, shares, strict=True))}
    return json.dumps(row, ensure_ascii=False)
