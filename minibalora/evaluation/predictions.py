"""Labels of new texts: `python -m minibalora classify`."""

import json
import re
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from minibalora.base import cli
from minibalora.base.errors import InputError
from minibalora.base.files import check_writable, entered, read_json_object, recorded_settings, replacing
from minibalora.checkpoints import BUILT_IN
from minibalora.checkpoints.adapters import Adapter, put_adapter, read_adapter
from minibalora.checkpoints.families import read_family
from minibalora.checkpoints.tokenizer import Tokenizer, load_tokenizer
from minibalora.checkpoints.weights import load_model
from minibalora.data import as_text
from minibalora.data.batches import check_fits
from minibalora.data.files import Row, counted_on, has_objects, opened, rows_of_file, shards, text_of
from minibalora.data.glue import TASKS, LabelledText, Task
from minibalora.data.labelled import encode
from minibalora.evaluation.classify import answers
from minibalora.lowrank import merge
from minibalora.models.t5 import AsText

ONE_TEXT = ("text",), ("sentence",)  # the columns of a task that is not known
INDICES = ("index", "idx", "id")  # GLUE's, Hugging Face's, QQP's
WINDOW = 64  # batches of which the answers are written together
# The test files of GLUE and Hugging Face -> the files that the server takes, see gluebenchmark.com.
SUBMISSIONS = {"cola": "CoLA", "sst2": "SST-2", "mrpc": "MRPC", "stsb": "STS-B", "qqp": "QQP", "qnli": "QNLI"}
SUBMISSIONS |= {"rte": "RTE", "wnli": "WNLI"}
SUBMISSIONS = {name: {"test": file} for name, file in SUBMISSIONS.items()}
SUBMISSIONS["mnli"] = {"test_matched": "MNLI-m", "test_mismatched": "MNLI-mm", "diagnostic": "AX"}


@dataclass(frozen=True)
class Classifier:
    model: nn.Module  # ids and mask -> logits (B, D); one logit is a score
    tok: Tokenizer
    labels: list[str] | None  # None: a score
    task: Task | None  # of GLUE, or a custom one; None if nothing names it
    is_asked: bool  # the task is put to a T5 in words, see `as_text`

    def logits(self, examples: list[LabelledText], source: str, max_length: int, batch_size: int) -> Iterator[Tensor]:
        """Yield the logits (n, D) of the next WINDOW batches of examples; say first how many texts are cut.

        Raises InputError if the model cannot take a text.
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
    if args.task:
        recorded |= {"task": args.task}
    classifier = load_classifier(args, adapter, recorded)
    columns = [tuple(args.text_field)] if args.text_field else columns_of(classifier.task)
    longest = classifier.model.config.max_position_embeddings or 128
    length = args.max_length or recorded.get("max_length") or min(128, longest)
    if args.glue_submission is not None:
        write_submissions(args, classifier, columns, length)
        return 0
    is_stdin = args.data in (None, Path("-"))
    source, rows = ("standard input", lines(columns)) if is_stdin else (str(args.data), table(args.data))
    examples = [example for example, _ in read_texts(rows, columns, source)]
    sys.stdout.reconfigure(encoding="utf-8")
    if args.format == "tsv":
        if any("\t" in label or "\n" in label for label in classifier.labels or ()):
            raise InputError("--format tsv: a class has a tab or a newline in its name: use --format jsonl")
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
    add("--model", metavar="DIR", type=cli.path, default=BUILT_IN / "bert", help="checkpoint folder: config.json, "
        "tokenizer.json, *.safetensors (default: the built-in tiny BERT)")  # fmt: skip
    add("--adapter", metavar="DIR", type=cli.path, help="folder of an adapter for it, with its run.json")
    add("--batch-size", type=cli.positive_int, metavar="N", default=32, help="texts at a time (default: 32)")
    add("--max-length", type=cli.positive_int, metavar="N", help="tokens per text (default: as in training, or 128)")
    add("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    add("--dtype", choices=("float32", "bfloat16"), help="of weights and activations (default: bfloat16 on GPUs, "
        "float32 on CPUs)")  # fmt: skip
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
    args.device = cli.device(args.device)
    args.dtype = cli.dtype(args.dtype, args.device)
    if args.text_field and (len(args.text_field) > 2 or len(set(args.text_field)) < len(args.text_field)):
        raise InputError(f"--text-field {' '.join(args.text_field)}: give one column, or two different ones")
    if args.glue_submission is not None and (args.format or args.data in (None, Path("-"))):
        raise InputError("--glue-submission needs --data with the test file, and takes no --format: see --help")
    if args.data is None and (sys.stdin is None or sys.stdin.isatty()):
        raise InputError("there is nothing to classify: give --data")
    args.format = args.format or "jsonl"
    return args


def load_classifier(args: Namespace, adapter: Adapter | None, recorded: dict) -> Classifier:
    """Load model, adapter and tokenizer. recorded: the settings of the training run, {} if they are not known.

    Raises InputError if the model has no trained head.
    """
    task, names = TASKS.get(recorded.get("task")), recorded.get("labels") or []
    if recorded.get("task") == "custom":
        columns = ((*recorded["text_field"], recorded["label_field"]),)
        task = Task("custom", columns, tuple(names), ("accuracy",))
    tok, is_asked = load_tokenizer(args.model), bool(recorded.get("as_text"))
    if is_asked:
        model = load_model(args.model, dtype=args.dtype, device=args.device)
    else:
        head = None if adapter is None else adapter.whole.get(read_family(args.model)[0].names.classes)
        count = None if head is None else len(head)
        model = load_model(args.model, "classifier", count, args.dtype, args.device)
        new = [name for name in model.checkpoint.new_modules if head is None]
        if new or (adapter is not None and head is None and adapter.config.get("task_type") != "SEQ_CLS"):
            what = f"{args.model}: has no trained {new[0]}" if new else f"{args.adapter}: is not a classifier's adapter"
            raise InputError(f"{what}: give the --adapter of a classifier, or a fine-tuned model")
    if adapter is not None:
        put_adapter(model, adapter)
        if args.dtype == torch.float32:
            merge(model)  # plain linears are faster; bfloat16 would round the sum
    model = AsText(model, as_text.first_tokens(task, tok)) if is_asked else model
    labels = None if model.num_labels == 1 else labels_of(model.num_labels, names, [args.adapter, args.model])
    return Classifier(model, tok, labels, task, is_asked)


def labels_of(count: int, names: list[str], folders: list[Path | None]) -> list[str]:
    """Return the names of the classes: of the training run, or id2label of the first config.json that has `count`."""
    if len(names) == count:
        return names
    for folder in folders:
        if folder is not None and (folder / "config.json").exists():
            id2label = read_json_object(folder / "config.json").get("id2label")
            if isinstance(id2label, dict) and sorted(id2label) == sorted(map(str, range(count))):
                return [str(id2label[str(index)]) for index in range(count)]
    return [f"LABEL_{index}" for index in range(count)]


# Texts.


def columns_of(task: Task | None) -> list[tuple[str, ...]]:
    """Return the alternatives for the columns of the texts, best first."""
    known = [columns[:-1] for each in ([task] if task else TASKS.values()) for columns in each.columns]
    return known if task else [*ONE_TEXT, *known]


def table(source: Path) -> Iterator[Row]:
    """Yield the rows of TSV, JSON or Parquet files as objects."""
    return counted_on(rows_of_file(path) if has_objects(path) else _tsv_rows(path) for path in shards(source))


def _tsv_rows(path: Path) -> Iterator[Row]:
    """Read cells between tabs, quotes as ordinary text. Files of CoLA without a header get one."""
    header = None
    with opened(path) as file:
        for line, raw in enumerate(file, start=1):
            where = f"{path}, line {line}"
            cells = _decoded(raw, where).split("\t")
            if cells == [""]:
                continue
            if header is None:
                is_cola = len(cells) == 4 and "sentence" not in cells and cells[1] in ("0", "1")
                header = TASKS["cola"].header if is_cola else cells
                if not is_cola:
                    continue
            while len(cells) > len(header) and not cells[-1]:
                cells.pop()
            if len(cells) != len(header):
                raise InputError(f"{where}: has {len(cells)} columns, not {len(header)}, between tabs: correct the row")
            yield line, where, dict(zip(header, cells, strict=True))


def lines(columns: list[tuple[str, ...]]) -> Iterator[Row]:
    """Yield the lines of standard input as objects with the first of the columns."""
    for line, raw in enumerate(sys.stdin.buffer, start=1):
        where = f"standard input, line {line}"
        text = _decoded(raw, where)
        if re.match(r'\{\s*"', text):
            try:
                yield line, where, json.loads(text)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{where}: broken JSON ({error}): correct the line") from None
        elif text.strip():
            texts = text.split("\t") if len(columns[0]) == 2 else [text]
            if len(texts) != len(columns[0]):
                raise InputError(f"{where}: has {len(texts)} texts between tabs, not a pair: correct the line")
            yield line, where, dict(zip(columns[0], texts, strict=True))


def _decoded(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError:
        raise InputError(f"{where}: not valid UTF-8: convert the file to UTF-8") from None


def read_texts(rows: Iterator[Row], columns: list[tuple[str, ...]], source: str) -> list[tuple[LabelledText, object]]:
    """Return the texts of each row in the first of the columns that it has, with label 0, and the row's own index.

    The index is that of a column INDICES, or else the row's number, from 0. Raises InputError for a row without texts.
    """
    texts = []
    for line, where, row in rows:
        fields = next((names for names in columns if isinstance(row, dict) and set(names) <= set(row)), None)
        if fields is None:
            present = ", ".join(map(repr, row)) if isinstance(row, dict) else f"a JSON {type(row).__name__}"
            needed = " or ".join(", ".join(names) for names in columns)
            raise InputError(f"{where}: has the columns {present or 'none'}, not {needed}: name them with --text-field")
        values = tuple(text_of(row[name], f"the field {name!r}", where) for name in fields)
        index = next((row[name] for name in INDICES if name in row), len(texts))
        texts.append((LabelledText(values, 0, line), index))
    if not texts:
        raise InputError(f"{source}: has no texts: give a file with a text per row")
    return texts


# Output.


def as_line(line: int, logits: Tensor, labels: list[str] | None, form: str) -> str:
    """Return an answer as a line of JSON or TSV. logits (D,)."""
    if labels is None:
        score = round(logits.item(), 6)
        return f"{line}\t{score}" if form == "tsv" else json.dumps({"line": line, "score": score})
    shares = [round(share, 6) for share in logits.softmax(0).tolist()]
    label = labels[int(logits.argmax())]
    if form == "tsv":
        return "\t".join(map(str, [line, label, *shares]))
    row = {"line": line, "label": label, "probabilities": dict(zip(labels, shares, strict=True))}
    return json.dumps(row, ensure_ascii=False)


def write_submissions(args: Namespace, classifier: Classifier, columns: list[tuple[str, ...]], max_length: int) -> None:
    """Write index and prediction of every row of the test files, one file of GLUE's server per test file."""
    task = classifier.task
    if task is None or task.name not in SUBMISSIONS:
        raise InputError("--glue-submission: the model's run names no task of GLUE: name it with --task")
    if task.labels is None and classifier.labels is not None:
        raise InputError(
            f"--glue-submission: the model has classes, but {task.name} has scores: give a model of that task"
        )
    names = None if task.labels is None else class_names(classifier.labels, task)
    args.glue_submission.mkdir(parents=True, exist_ok=True)
    for path, name in test_files(args.data, task):
        texts = read_texts(table(path), columns, str(path))
        logits = torch.cat([*classifier.logits([text for text, _ in texts], str(path), max_length, args.batch_size)])
        if names is None:
            predictions = [
                f"{score:.3f}" for score in logits[:, 0].clamp(0, 5).tolist()
            ]  # the range of the gold scores
        else:
            predictions = [names[index] for index in logits.argmax(1).tolist()]
        rows = [f"{index}\t{label}\n" for (_, index), label in zip(texts, predictions, strict=True)]
        with replacing(args.glue_submission / f"{name}.tsv") as temporary:
            temporary.write_text("".join(["index\tprediction\n", *rows]), encoding="utf-8")
        print(f"{args.glue_submission / name}.tsv: {len(rows):,} predictions")


def class_names(labels: list[str] | None, task: Task) -> list[str]:
    """Return the task's name for each of the model's classes; those that the task does not know are in its order."""
    if len(labels or [""]) != len(task.labels):
        has = f"the model has {len(labels or [''])} classes, but {task.name} has {len(task.labels)}"
        raise InputError(f"--glue-submission: {has}: give a model of that task")
    spellings = {str(name).lower().replace("-", "_"): index for name, index in task.spellings.items()}
    indices = [spellings.get(name.lower().replace("-", "_"), index) for index, name in enumerate(labels)]
    if len(set(indices)) < len(indices):
        raise InputError(f"--glue-submission: the model's classes {', '.join(labels)} are not those of {task.name}")
    return [task.labels[index] for index in indices]


def test_files(data: Path, task: Task) -> list[tuple[Path, str]]:
    """Return the task's test files in a folder, or the one file given, each with its name at GLUE's server."""
    names = SUBMISSIONS[task.name]
    if data.is_dir():
        folder = entered(data)
        folder = folder / task.name if (folder / task.name).is_dir() else folder
        shards_of = {stem: folder / f"{stem}-*.parquet" for stem in names if any(folder.glob(f"{stem}-*.parquet"))}
        files = [(shards_of.get(stem, folder / f"{stem}.tsv"), stem) for stem in names]
        return [(path, names[stem]) for path, stem in files if stem != "diagnostic" or path.exists()]
    stem = next((stem for stem in names if data.name.startswith(stem)), None) if len(names) > 1 else "test"
    if stem is None:
        raise InputError(f"{data}: the name of the file does not begin with {', '.join(names)}: rename it")
    return [(data, names[stem])]
