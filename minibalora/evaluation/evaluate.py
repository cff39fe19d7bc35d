"""What a model can do: GSM8K, MATH, HumanEval, MBPP, and how well it predicts text: `python -m minibalora evaluate`."""

import argparse
import hashlib
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from minibalora.base import cli
from minibalora.base.errors import InputError
from minibalora.base.files import appending, keep_lines, write_json
from minibalora.checkpoints.weights import weights_digest
from minibalora.data.files import read_rows
from minibalora.evaluation.generate import (
    Decoding,
    add_decoding_flags,
    add_model_flags,
    encode_prompts,
    fill_in_defaults,
    load,
)
from minibalora.evaluation.perplexity import mean_predictions, predict, text_windows
from minibalora.evaluation.records import answer, by_model, in_words, summarize
from minibalora.evaluation.sandbox import Limits, check_sandbox
from minibalora.evaluation.tasks import TASKS, Item, read_items
from minibalora.models.t5 import T5
from minibalora.run.run_folder import check_out, check_settings, plain_settings, start_run

# An evaluation may go on with another of these: of files, digests are compared; the others don't change a verdict.
MAY_CHANGE = {"model", "adapter", "data", "completions", "out", "device", "batch_size", "allow_code_execution", "k"}


def main() -> int:
    args = parse_flags()
    if args.task in TASKS and TASKS[args.task].runs_code:
        check_sandbox()
    settings = plain_settings(args) | {"data_digest": file_digest(args.data), **source_digests(args)}
    check_folder(args.out, settings)
    return evaluate_text(args, settings) if args.task == "text" else evaluate_task(args, settings)


def evaluate_task(args: argparse.Namespace, settings: dict) -> int:
    task = TASKS[args.task]
    items = read_items(args.task, args.data, args.raw, args.max_rows)
    if args.gold or args.completions is not None:
        texts = [item.response for item in items] if args.gold else read_completions(args, items)

        def complete(items: list[Item], keys: list[int]) -> Iterable[tuple[int, str]]:
            return enumerate([texts[key] for key in keys])
    else:
        model, tok = load(args)
        encode_prompts(
            model, tok, [item.prompt for item in items], [f"{args.data}, line {i.line}: the prompt" for i in items]
        )
        stop = task.raw_stop if args.raw else task.stop
        decoding = Decoding(args.max_new_tokens, args.temperature, args.top_p, stop, args.seed)
        complete = by_model(model, tok, decoding, args.batch_size, args.task)
    start(args.out, settings)
    limits = Limits(seconds=args.timeout)
    records = answer(items, args.samples, task.judge, args.out / "records.jsonl", args.task, complete, limits)
    found = summarize(records, args.k)
    write_json(args.out / "summary.json", {"task": args.task} | found)
    print(f"{args.task}: {in_words(found)}")
    return 0


def evaluate_text(args: argparse.Namespace, settings: dict) -> int:
    """Loss and perplexity of a text file; of an adapter also those of its base, and the KL between the two."""
    model, tok = load(args)
    if isinstance(model, T5):
        raise InputError(f"--task text: {args.model} is a T5, which predicts answers and not the text: give a decoder")
    longest = model.config.max_position_embeddings
    length = args.max_length or min(1024, longest)
    if not 2 <= length <= longest:
        raise InputError(f"--max-length {length}: {args.model} has {longest} positions: give 2 to {longest}")
    windows = text_windows(args.data, tok, length, args.max_rows)
    if (highest := max(map(max, windows))) >= model.config.vocab_size:
        raise InputError(f"{args.model}: its tokenizer gives token {highest}, but the model has "
                         f"{model.config.vocab_size}: they do not belong together")  # fmt: skip
    start(args.out, settings)
    path = args.out / "records.jsonl"
    done = {record["window"]: record for record in keep_lines(path, lambda record: type(record.get("window")) is int)}
    with appending(path) as append:
        for number, ids in enumerate(tqdm(windows, "text", unit="window", dynamic_ncols=True, leave=False), start=1):
            if number not in done:
                done[number] = {"window": number} | predict(model, ids)
                append(done[number])
    found = mean_predictions(list(done.values()))
    write_json(args.out / "summary.json", {"task": "text"} | found)
    text = f"loss {found['loss']:.4f}, perplexity {found['perplexity']:,.2f}"
    if "kl" in found:
        text += f"; of the base: loss {found['base_loss']:.4f}, perplexity {found['base_perplexity']:,.2f}"
        text += f"; KL(base ‖ tuned) {found['kl']:.4f} nats a token"
    print(f"text: {text}; tokens: {found['tokens']:,}")
    return 0


def parse_flags() -> argparse.Namespace:
    parser = cli.OneLineParser(
        prog="python -m minibalora evaluate",
        description="Measure a language model, with an adapter or without, on a benchmark, or how it predicts a text.",
    )
    add_model_flags(parser)
    add = parser.add_argument_group("what is measured").add_argument
    add("--task", choices=(*TASKS, "text"), required=True, help="gsm8k, math: the final answer; humaneval, mbpp: "
        "tests; text: loss and perplexity, with --adapter also of the base, and KL(base ‖ tuned)")  # fmt: skip
    add("--data", metavar="FILE", type=cli.path, required=True, help="the benchmark's file, JSON Lines or an array, "
        ".gz too; of --task text any text")  # fmt: skip
    add("--out", metavar="DIR", type=cli.path, required=True, help="folder for records.jsonl (every prompt, "
        "completion, answer and verdict) and summary.json; the same command goes on where it was stopped")  # fmt: skip
    add("--max-rows", type=cli.positive_int, metavar="N", help="the first N problems, or windows of text")
    add("--max-length", type=cli.positive_int, metavar="N", help="tokens of a window of text (default: 1024, or what "
        "the model has)")  # fmt: skip
    add("--raw", action="store_true", help="humaneval, mbpp: the prompt published for base models, without Alpaca's")
    add("--gold", action="store_true", help="judge the file's own solutions and no model: all should be right")
    add("--completions", metavar="FILE", type=cli.path, help="judge these and no model: JSON Lines with completion "
        "and, unless in the data's order, task_id")  # fmt: skip
    add_decoding_flags(parser)
    add = parser.add_argument_group("samples and programs").add_argument
    add("--samples", type=cli.positive_int, metavar="N", help="answers a problem (default: 1)")
    add("--k", type=cli.positive_int, nargs="+", help="report pass@k (default: 1)")
    add("--allow-code-execution", action="store_true", help="humaneval, mbpp: run what the model wrote, in a sandbox "
        "(see minibalora/sandbox.py)")  # fmt: skip
    add("--timeout", type=cli.positive_rate, metavar="S", help="seconds a program (default: 10)")
    args = parser.parse_args()
    refuse_contradictions(args)
    tokens = TASKS[args.task].max_new_tokens if args.task in TASKS else None
    fill_in_defaults(args, {"samples": 1, "k": [1], "timeout": 10.0, "max_new_tokens": tokens})
    if args.samples > 1 and args.temperature == 0 and args.completions is None:
        raise InputError(f"--samples {args.samples} would all be the same: add --temperature")
    if max(args.k) > args.samples:
        raise InputError(f"--k {max(args.k)} needs as many samples: raise --samples")
    return args


def refuse_contradictions(args: argparse.Namespace) -> None:
    """InputError for a flag that would have no effect, or that is missing."""
    runs_code = args.task in TASKS and TASKS[args.task].runs_code
    if runs_code and not args.allow_code_execution:
        raise InputError(f"--task {args.task} runs code that a model wrote: allow it by --allow-code-execution")
    if args.gold and args.completions is not None:
        raise InputError("--gold and --completions are both given: leave one out")
    decoding = {"max_new_tokens", "temperature", "top_p", "seed", "batch_size"}
    unused = {"max_length"} if args.task in TASKS else {"samples", "k", "gold", "completions", *decoding}
    unused |= set() if runs_code else {"raw", "allow_code_execution", "timeout"}
    where = f"--task {args.task}"
    if args.gold or args.completions is not None:
        unused, where = unused | decoding | {"adapter", "raw"}, "--gold" if args.gold else "--completions"
    if args.gold:
        unused |= {"samples", "k"}
    for name in sorted(unused):
        if getattr(args, name) not in (None, False):
            raise InputError(f"{cli.flag(name)} has no meaning with {where}: leave it out")


def read_completions(args: argparse.Namespace, items: list[Item]) -> list[str]:
    """The `completion` of each row for the item that `item` or `task_id` names, or in the data's order; by key."""
    given = {item.name: [] for item in items}
    for index, (line, row) in enumerate(read_rows(args.completions)):
        where = f"{args.completions}, line {line}"
        if not isinstance(row, dict) or not isinstance(row.get("completion"), str):
            raise InputError(f"{where}: has no text in the field completion: mend the row")
        name = str(row.get("item", row.get("task_id", items[index % len(items)].name)))
        if name not in given:
            raise InputError(f"{where}: is for problem {name}, which {args.data} does not have: take it away")
        given[name].append(row["completion"])
    for name, texts in given.items():
        if len(texts) != args.samples:
            counts = f"{len(texts)} completions of problem {name}, not {args.samples}"
            raise InputError(f"{args.completions}: has {counts}: give as many as --samples for each problem")
    return [given[item.name][sample] for sample in range(args.samples) for item in items]


def check_folder(out: Path, settings: dict) -> None:
    """InputError if `out` holds anything but this very evaluation."""
    if (out / "run.json").exists():
        check_settings(out, settings, MAY_CHANGE)
    else:
        check_out(out, resume=False)


def start(out: Path, settings: dict) -> None:
    if not (out / "run.json").exists():
        start_run(out, settings)


def file_digest(*paths: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
        try:
            digest.update(path.read_bytes())
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}: give a file") from None
    return digest.hexdigest()


def source_digests(args: argparse.Namespace) -> dict[str, str]:
    """What answers: given completions, or a model and its adapter."""
    if args.gold or args.completions is not None:
        return {} if args.gold else {"completions_digest": file_digest(args.completions)}
    digests = {"model_digest": weights_digest(args.model)}
    if args.adapter is not None:
        files = (args.adapter / name for name in ("adapter_config.json", "adapter_model.safetensors"))
        digests["adapter_digest"] = file_digest(*files)
    return digests
