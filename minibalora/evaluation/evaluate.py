"""What a model can do: GSM8K, MATH, HumanEval, MBPP, and how well it predicts text: `python -m minibalora evaluate`."""

import argparse
import hashlib
import os
from pathlib import Path

from minibalora.base import cli
from minibalora.base.errors import InputError
from minibalora.base.files import write_json
from minibalora.checkpoints.weights import weights_digest
from minibalora.data.files import read_rows
from minibalora.evaluation import perplexity, records
from minibalora.evaluation.benchmarks import BENCHMARKS, Item, read_items
from minibalora.evaluation.decoding import Decoding, encode_prompts
from minibalora.evaluation.generate import add_decoding_flags, add_model_flags, load, parse
from minibalora.evaluation.sandbox import Limits, check_sandbox
from minibalora.run.run_folder import check_out, check_settings, plain_settings, start_run

# A stopped evaluation may go on with other values of these. Digests tell whether a file is the same; the others change
# no verdict.
MAY_CHANGE = {"model", "adapter", "data", "completions", "out", "device", "batch_size", "allow_code_execution", "k"}


def main() -> int:
    args = parse_flags()
    benchmark = BENCHMARKS.get(args.task)  # None: --task text
    if benchmark is not None and benchmark.runs_code:
        check_sandbox()
    digests = source_digests(args.gold, args.completions, args.model, args.adapter)
    settings = plain_settings(vars(args)) | {"data_digest": file_digest(args.data), **digests}
    is_new = not os.path.exists(args.out / "run.json")
    if is_new:
        check_out(args.out, resume=False)
    else:
        check_settings(args.out, settings, MAY_CHANGE)
    file = args.out / "records.jsonl"
    if benchmark is None:
        model, tok = load(args.model, args.adapter, args.dtype, args.device)
        windows = perplexity.text_windows(args.data, tok, model.config, args.max_length, args.max_rows)
        if is_new:
            start_run(args.out, settings)
        found = perplexity.mean_predictions(perplexity.predict_each(model, windows, file))
        said = perplexity.in_words(found)
    else:
        items = read_items(args.task, args.data, args.raw, args.max_rows)
        if args.gold:
            complete = records.by_list([item.response for item in items])
        elif args.completions is not None:
            complete = records.by_list(read_completions(args.completions, args.data, items, args.samples))
        else:
            model, tok = load(args.model, args.adapter, args.dtype, args.device)
            names = [f"{args.data}, line {item.line}: the prompt" for item in items]
            encode_prompts(model, tok, [item.prompt for item in items], names)  # refuses what the model can't take
            stop = benchmark.raw_stop if args.raw else benchmark.stop
            decoding = Decoding(args.max_new_tokens, args.temperature, args.top_p, stop, args.seed)
            complete = records.by_model(model, tok, decoding, args.batch_size, args.task)
        if is_new:
            start_run(args.out, settings)
        limits = Limits(seconds=args.timeout)
        judged = records.answer(items, args.samples, benchmark.judge, file, args.task, complete, limits)
        found = records.summarize(judged, args.k)
        said = records.in_words(found)
    write_json(args.out / "summary.json", {"task": args.task} | found)
    print(f"{args.task}: {said}")
    return 0


def parse_flags() -> argparse.Namespace:
    parser = cli.OneLineParser(
        prog="python -m minibalora evaluate",
        description="Measure a language model, with an adapter or without, on a benchmark, or how it predicts a text.",
    )
    add_model_flags(parser)
    add = parser.add_argument_group("what is measured").add_argument
    add("--task", choices=(*BENCHMARKS, "text"), required=True, help="gsm8k, math: the final answer; humaneval, mbpp: "
        "tests; text: loss and perplexity, with --adapter also of the base, and KL(base ‖ tuned)")  # fmt: skip
    add("--data", metavar="FILE", type=cli.path, required=True, help="the benchmark's file, JSON Lines or an array, "
        ".gz too; with --task text any text")  # fmt: skip
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
        "(minibalora/evaluation/sandbox.py says what it forbids)")  # fmt: skip
    add("--timeout", type=cli.positive_rate, metavar="S", help="seconds a program (default: 10)")
    args = parser.parse_args()
    given = {name for name, value in vars(args).items() if value is not None and value is not False}
    refuse_contradictions(args.task, given)
    tokens = BENCHMARKS[args.task].max_new_tokens if args.task in BENCHMARKS else None
    args = parse(parser, samples=1, k=[1], timeout=10.0, max_new_tokens=tokens)
    if args.samples > 1 and args.temperature == 0 and args.completions is None:
        raise InputError(f"--samples {args.samples} would all be the same: add --temperature")
    if max(args.k) > args.samples:
        raise InputError(f"--k {max(args.k)} needs as many samples: raise --samples")
    return args


def refuse_contradictions(task: str, given: set[str]) -> None:
    """InputError for a flag that is missing, or that would have no effect; `given`: the names of what is given."""
    is_benchmark = task in BENCHMARKS
    runs_code = is_benchmark and BENCHMARKS[task].runs_code
    if runs_code and "allow_code_execution" not in given:
        raise InputError(f"--task {task} runs code that a model wrote: allow it by --allow-code-execution")
    if given >= {"gold", "completions"}:
        raise InputError("--gold and --completions are both given: leave one out")
    decoding = {"max_new_tokens", "temperature", "top_p", "seed", "batch_size"}
    unused = {"max_length"} if is_benchmark else {"samples", "k", "gold", "completions", *decoding}
    unused |= set() if runs_code else {"raw", "allow_code_execution", "timeout"}
    where = f"--task {task}"
    if "gold" in given or "completions" in given:
        unused, where = unused | decoding | {"adapter", "raw"}, "--gold" if "gold" in given else "--completions"
    if "gold" in given:
        unused |= {"samples", "k"}
    for name in sorted(unused & given):
        raise InputError(f"{cli.flag(name)} has no meaning with {where}: leave it out")


def read_completions(path: Path, data: Path, items: list[Item], samples: int) -> list[str]:
    """The `completion` of each row, sample by sample of all items: what `records.by_list` takes.

    A row is for the item that its `item` or `task_id` names, or else for the next one in the order of `data`.
    """
    given = {item.name: [] for item in items}
    for index, (line, row) in enumerate(read_rows(path)):
        where = f"{path}, line {line}"
        if not isinstance(row, dict) or not isinstance(row.get("completion"), str):
            raise InputError(f"{where}: has no text in the field completion: mend the row")
        name = str(row.get("item", row.get("task_id", items[index % len(items)].name)))
        if name not in given:
            raise InputError(f"{where}: is for problem {name}, which {data} does not have: take it away")
        given[name].append(row["completion"])
    for name, texts in given.items():
        if len(texts) != samples:
            counts = f"{len(texts)} completions of problem {name}, not {samples}"
            raise InputError(f"{path}: has {counts}: give as many as --samples for each problem")
    return [given[item.name][sample] for sample in range(samples) for item in items]


def file_digest(*paths: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
        try:
            digest.update(path.read_bytes())
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}: give a file") from None
    return digest.hexdigest()


def source_digests(gold: bool, completions: Path | None, model: Path, adapter: Path | None) -> dict[str, str]:
    """Digests of what answers: the file's own solutions, given completions, or a model and its adapter."""
    if gold:
        return {}
    if completions is not None:
        return {"completions_digest": file_digest(completions)}
    digests = {"model_digest": weights_digest(model)}
    if adapter is not None:
        files = (adapter / name for name in ("adapter_config.json", "adapter_model.safetensors"))
        digests["adapter_digest"] = file_digest(*files)
    return digests
