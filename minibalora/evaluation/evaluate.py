"""Measure a model on GSM8K, MATH, HumanEval, MBPP, MT-Bench or a text: `python -m minibalora evaluate`."""

import argparse
import hashlib
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from minibalora.base import cli
from minibalora.base.errors import InputError
from minibalora.base.files import write_json
from minibalora.checkpoints.template import (
    ALPACA,
    RAW,
    Template,
    add_template_flags,
    choose_template,
    trained_template,
)
from minibalora.checkpoints.weights import weights_digest
from minibalora.data.chat import CONVERSATIONS
from minibalora.data.files import in_short, read_rows, shards
from minibalora.evaluation import mt_bench, perplexity, records
from minibalora.evaluation.benchmarks import (
    BENCHMARKS,
    NEXT,
    PROTOCOLS,
    Benchmark,
    Item,
    as_generated,
    judge_rounded,
    read_items,
    without_first_marks,
)
from minibalora.evaluation.decoding import Decoding, encode_prompts
from minibalora.evaluation.generate import DEFAULT, add_decoding_flags, add_model_flags, load, parse
from minibalora.evaluation.sandbox import Limits, check_sandbox
from minibalora.run.run_folder import check_out, check_settings, plain_settings, start_run

# A stopped evaluation may be continued with other values of these flags: digests reveal a changed file, and the other
# flags change no verdict.
MAY_CHANGE = {"model", "adapter", "data", "completions", "out", "device", "batch_size", "allow_code_execution", "k"}
MAY_CHANGE |= {"judge", "judge_prompts", "references"}  # each judgment is stored with its prompt and its judge's digest
IDS = ("question_id", "problem_id")  # fields of completions that name the problems or number them
NUMBERS = ("idx", "index", "id", "doc_id", *IDS)  # fields of completions that often number the problems
QUESTIONS = ("question", "prompt", "query", "problem", "instruction")  # fields of completions that tell their problem


def main() -> int:
    args = parse_flags()
    benchmark = benchmark_of(args.task, args.protocol)
    if benchmark is not None and benchmark.runs_code:
        check_sandbox()
    digests = source_digests(args.gold, args.completions, args.model, args.adapter)
    asks_nothing = args.task == "text" or args.gold or args.completions
    name = "alpaca" if asks_nothing else args.template or trained_template(args.model, args.adapter)
    template = choose_template(name, args.model, args.adapter)
    settings = plain_settings(vars(args)) | {"template": template.name}
    settings |= {"data_digest": file_digest(*shards(args.data)), **digests}
    is_new = not os.path.exists(args.out / "run.json")
    if is_new:
        check_out(args.out, resume=False)
    else:
        check_settings(args.out, settings, MAY_CHANGE)
    start = partial(start_run, args.out, settings) if is_new else lambda: None
    if args.template is None and template != ALPACA:
        print(f"template: {template}", file=sys.stderr)
    if args.task == "text":
        summary, words = measure_text(args, start)
    elif args.task == "mt-bench":
        summary, words = measure_mt_bench(args, template, start)
    else:
        summary, words = measure_benchmark(args, benchmark, template, start)
    write_json(args.out / "summary.json", {"task": args.task} | summary)
    print(f"{args.task}: {words}")
    return 0


# Each of these returns the summary and a line about it, and calls start() after checking its input.


def measure_text(args: argparse.Namespace, start: Callable[[], None]) -> tuple[dict, str]:
    model, tok = load(args.model, args.adapter, args.dtype, args.device)
    windows = perplexity.text_windows(args.data, tok, model.config, args.max_length, args.max_rows)
    start()
    summary = perplexity.mean_predictions(perplexity.predict_each(model, windows, args.out / "records.jsonl"))
    return summary, perplexity.in_words(summary)


def measure_benchmark(
    args: argparse.Namespace, benchmark: Benchmark, template: Template, start: Callable[[], None]
) -> tuple[dict, str]:
    items = read_items(benchmark, args.data, template, args.max_rows)
    if args.gold:
        complete = records.by_list([item.response for item in items])
    elif args.completions is not None:
        limit = "" if args.max_rows is None else f" (up to --max-rows {args.max_rows})"
        texts = read_completions(args.completions, f"{args.data}{limit}", items, args.samples)
        pairs = zip(texts, items * args.samples, strict=True)
        ended = [as_generated(text, benchmark, item.before) for text, item in pairs]
        cut = sum(len(end) < len(without_first_marks(text)) for end, text in zip(ended, texts, strict=True))
        print(f"{cut:,} of {len(texts):,} completions cut at a stop string or an end-of-text mark")
        complete = records.by_list(ended)
    else:
        model, tok = load(args.model, args.adapter, args.dtype, args.device, template.chat)
        names = [f"{args.data}, line {item.line}: the prompt" for item in items]
        encode_prompts(model, tok, [item.prompt for item in items], names)  # refuses prompts that are too long
        stop = benchmark.stop + (benchmark.raw_stop if template == RAW else ())
        decoding = Decoding(args.max_new_tokens, args.temperature, args.top_p, stop, args.seed)
        complete = records.by_model(model, tok, decoding, args.batch_size, args.task)
    start()
    limits, file = Limits(seconds=args.timeout), args.out / "records.jsonl"
    judged = records.answer(items, args.samples, benchmark.judge, file, args.task, complete, limits)
    summary = records.summarize(judged, args.k)
    missing = summary["verdicts"].get("no answer", 0)
    if missing >= 0.9 * len(judged):
        forms = '"The answer is: 18"' + ("" if benchmark.judge is judge_rounded else r', "#### 18" or "\boxed{18}"')
        print(f"{missing:,} of {len(judged):,} texts have no answer: only {forms} is one", file=sys.stderr)
    return summary, records.in_words(summary)


def measure_mt_bench(args: argparse.Namespace, template: Template, start: Callable[[], None]) -> tuple[dict, str]:
    questions = mt_bench.read_questions(args.data, args.max_rows)
    references = mt_bench.read_references(args.references)
    if args.judge is not None:  # check the judge's files before answering for hours
        blank = [{"choices": [{"turns": [""] * len(question.turns)}]} for question in questions]
        mt_bench.matches_of(questions, blank, args.judge_prompts, references)
        judge_digest = weights_digest(args.judge)
        judge_template = choose_template(trained_template(args.judge, None), args.judge)
    model, tok = load(args.model, args.adapter, args.dtype, args.device, template.chat)
    ask = partial(mt_bench.prompt_of, template)
    mt_bench.check_first_turns(questions, ask, model, tok)
    start()
    names = [name_of(folder) for folder in (args.model, args.adapter) if folder is not None]
    file = new_file(args.out / "model_answer" / f"{'-'.join(names)}.jsonl")
    decoding = Decoding(args.max_new_tokens, seed=args.seed, stop=() if template.chat else NEXT)
    answers = mt_bench.answer_questions(questions, ask, model, tok, decoding, args.batch_size, file)
    judgments = []
    if args.judge is not None:
        del model  # so that the judge has its memory
        judge, tok = load(args.judge, None, args.dtype, args.device, judge_template.chat)
        matches = mt_bench.matches_of(questions, answers, args.judge_prompts, references)
        names = {"model": file.stem, "judge": name_of(args.judge), "judge_digest": judge_digest}
        path = new_file(args.out / "model_judgment" / f"{names['judge']}_single.jsonl")
        ask = partial(mt_bench.prompt_of, judge_template)
        judgments = mt_bench.grade(matches, ask, judge, tok, args.batch_size, path, names)
    summary = mt_bench.summarize(questions, answers, judgments)
    return summary, mt_bench.in_words(summary, file)


def name_of(folder: Path) -> str:
    """Return the name of a model's folder; for a snapshot in the Hub's cache, the names of organisation and model."""
    folder = folder.absolute()
    is_snapshot = folder.parent.name == "snapshots"
    return folder.parents[1].name.removeprefix("models--") if is_snapshot else folder.name


def new_file(path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    return path


def benchmark_of(task: str, protocol: str | None) -> Benchmark | None:
    """Return the task's benchmark, None for text and MT-Bench. protocol: for GSM8K; None for the default."""
    return PROTOCOLS[protocol] if protocol else BENCHMARKS.get(task)


def parse_flags() -> argparse.Namespace:
    parser = cli.OneLineParser(
        prog="python -m minibalora evaluate",
        description="Measure a language model, with an adapter or without, on a benchmark, or how it predicts a text.",
    )
    add_model_flags(parser)
    add = parser.add_argument_group("what to measure").add_argument
    add("--task", choices=(*BENCHMARKS, "mt-bench", "text"), required=True, help="gsm8k, math: the final answer; "
        "humaneval, mbpp: tests; mt-bench: two turns, rated by --judge; text: loss and perplexity, with --adapter also "
        "of the base, and KL(base ‖ tuned)")  # fmt: skip
    add("--data", metavar="FILE", type=cli.path, required=True, help="the benchmark's file: JSON Lines, an array or "
        "Parquet, .gz too; any text file for --task text")  # fmt: skip
    add("--out", metavar="DIR", type=cli.path, required=True, help="folder for records.jsonl (every prompt, "
        "completion, answer and verdict) and summary.json; the same command continues a stopped run")  # fmt: skip
    add("--max-rows", type=cli.positive_int, metavar="N", help="the first N problems, or windows of text")
    add("--max-length", type=cli.positive_int, metavar="N", help="tokens in a window of text (default: 1024, or the "
        "model's maximum)")  # fmt: skip
    add("--protocol", choices=tuple(PROTOCOLS), help="gsm8k: steps ends the prompt with \"Let's think step by step.\"; "
        "exact compares numbers exactly, rounded as BA-LoRA's published scripts do (default: steps-exact)")  # fmt: skip
    add("--gold", action="store_true", help="judge the file's own solutions, without a model: all should be right")
    add("--completions", metavar="FILE", type=cli.path, help="judge the completions in this JSON Lines file, without "
        "a model; rows have completion and, unless they are one per problem and in order, item or task_id")  # fmt: skip
    add_template_flags(parser.add_argument_group("template"), f"{DEFAULT}; raw: humaneval's and mbpp's as published")
    add_decoding_flags(parser)
    add = parser.add_argument_group("samples and programs").add_argument
    add("--samples", type=cli.positive_int, metavar="N", help="answers per problem (default: 1)")
    add("--k", type=cli.positive_int, nargs="+", help="report pass@k (default: 1)")
    add("--allow-code-execution", action="store_true", help="humaneval, mbpp: run the model's programs in a sandbox "
        "(see minibalora/evaluation/sandbox.py)")  # fmt: skip
    add("--timeout", type=cli.positive_rate, metavar="S", help="seconds per program (default: 10)")
    add_judge_flags(parser)
    args = parser.parse_args()
    flags = {name for name, value in vars(args).items() if value is not None and value is not False}
    flags -= {"model"} if args.model == parser.get_default("model") else set()
    refuse_contradictions(args.task, flags)
    benchmark = benchmark_of(args.task, args.protocol)
    args = parse(
        parser,
        draws=args.task == "mt-bench",
        samples=1,
        k=[1],
        timeout=10.0,
        max_new_tokens=mt_bench.MAX_NEW_TOKENS if benchmark is None else benchmark.max_new_tokens,
    )
    if args.samples > 1 and args.temperature == 0 and args.completions is None:
        raise InputError(f"--samples {args.samples} would all be the same: add --temperature")
    if max(args.k) > args.samples:
        raise InputError(f"--k {max(args.k)} needs as many samples: raise --samples")
    return args


def add_judge_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("judge of mt-bench").add_argument
    add("--judge", metavar="DIR", type=cli.folder, help="checkpoint folder of the model that rates the answers "
        "(default: none)")  # fmt: skip
    add("--judge-prompts", metavar="FILE", type=cli.path, help="FastChat's judge_prompts.jsonl")
    add("--references", metavar="FILE", type=cli.path, help="FastChat's reference_answer/gpt-4.jsonl (default: the "
        "references in the question file)")  # fmt: skip


def refuse_contradictions(task: str, flags: set[str]) -> None:
    """Raise InputError for a flag that is missing or would have no effect. flags: the names of the flags in use."""
    is_benchmark = task in BENCHMARKS
    runs_code = is_benchmark and BENCHMARKS[task].runs_code
    if runs_code and "allow_code_execution" not in flags:
        raise InputError(f"--task {task} runs code that a model wrote: allow it with --allow-code-execution")
    if flags >= {"gold", "completions"}:
        raise InputError("--gold and --completions are both given: leave one out")
    decoding = {"max_new_tokens", "temperature", "top_p", "seed", "batch_size"}
    judging = {"judge", "judge_prompts", "references"}
    unused = {"max_length"} if is_benchmark else {"samples", "k", "gold", "completions"}
    unused |= {"text": {"template", *decoding}, "mt-bench": {"max_length", "temperature", "top_p"}}.get(task, set())
    unused |= set() if task == "mt-bench" else judging
    unused |= set() if runs_code else {"allow_code_execution", "timeout"}
    if flags & judging and not flags >= {"judge", "judge_prompts"} and task == "mt-bench":
        raise InputError("--judge and --judge-prompts belong together: give both or neither")
    unused |= set() if task == "gsm8k" else {"protocol"}
    where = f"--task {task}"
    if "gold" in flags or "completions" in flags:
        unused |= {"model", "adapter", "template", "device", "dtype", *decoding}
        where = "--gold" if "gold" in flags else "--completions"
    if "gold" in flags:
        unused |= {"samples", "k", "protocol"}  # solutions end in "####", which the rounded protocols do not read
    for name in sorted(unused & flags):
        raise InputError(f"{cli.flag(name)} has no meaning with {where}: leave it out")


def read_completions(path: Path, data: str, items: list[Item], samples: int) -> list[str]:
    """Return the completions in the order that `records.by_list` expects: sample 0 of all items, then sample 1.

    A row belongs to the item that its `item` or `task_id` names or, without these, to the next of the items, which
    `data` names in errors. Raises InputError where this order is in doubt.
    """
    completions, offsets = {item.name: [] for item in items}, {}
    for index, (_, where, row) in enumerate(read_rows(path)):
        _check_completion(row, where)
        item = items[index % len(items)]
        given = next((row[field] for field in ("item", "task_id") if row.get(field) is not None), None)
        if given is None:
            given = next((row[field] for field in IDS if _is_name(row.get(field)) and row[field] in completions), None)
        name, asked = item.name if given is None else str(given), _asked(row)
        if name == item.name and any(_asks_another(text, item, items) for text in asked):
            raise InputError(f"{where}: asks another question than problem {name}: name its own problem in item")
        if given is None and not any(_tells(text, item, items) for text in asked):
            if samples > 1:  # the rows may be in order of problems or of samples
                raise InputError(f"{where}: names no problem, which --samples {samples} needs: name it in item")
            if index >= len(items):
                raise InputError(f"{where}: is one row more than {data} has problems: remove the row")
            _check_order(row, item, index, offsets, where)
        if name not in completions:
            named = f"it has {items[0].name} to {items[-1].name}"
            raise InputError(f"{where}: is for problem {name}, which {data} does not have: {named}: name one of these")
        completions[name].append(row["completion"])
    for name, texts in completions.items():
        if len(texts) != samples:
            counts = f"{len(texts)} completions of problem {name}, not {samples}"
            raise InputError(f"{path}: has {counts}: give as many as --samples for each problem")
    return [completions[item.name][sample] for sample in range(samples) for item in items]


def _check_completion(row: object, where: str) -> None:
    if not isinstance(row, dict):
        raise InputError(f"{where}: a JSON {type(row).__name__}: give an object with completion for each sample")
    if not isinstance(row.get("completion"), str):
        fields = in_short(row)
        mend = f"rename the one of its fields ({fields}) that has it, as a text, and give each sample its own row"
        raise InputError(f"{where}: has no text in the field completion: {mend}")


def _is_name(value: object) -> bool:
    return isinstance(value, str) and not value.isdigit()


def _asked(row: dict) -> list[str]:
    """Return the texts with which a row may tell its problem; of a conversation, the last question."""
    texts = []
    for field in (*QUESTIONS, *CONVERSATIONS, "input"):
        value = row.get(field)
        turns = [turn for turn in value if isinstance(turn, dict)] if isinstance(value, list) else []
        turns = [turn for turn in turns if turn.get("role", turn.get("from")) in ("user", "human")]
        text = turns[-1].get("content", turns[-1].get("value")) if turns else value
        if isinstance(text, str) and not (field == "input" and texts):  # beside another, it is no question
            texts.append(text.strip())
    return texts


def _asks_another(text: str, item: Item, items: list[Item]) -> bool:
    """Return whether a text is in the prompt of another problem than `item`, but not in its own."""
    return text not in item.prompt and any(text in other.prompt for other in items)


def _tells(text: str, item: Item, items: list[Item]) -> bool:
    """Return whether a text is in the prompt of `item`, but not in every prompt, as a fixed instruction is."""
    return text in item.prompt and (len(items) == 1 or any(text not in other.prompt for other in items))


def _check_order(row: dict, item: Item, index: int, offsets: dict[str, int], where: str) -> None:
    """Check that the fields NUMBERS count up with the rows, from 0 or 1. offsets: the first number of each field.

    IDS may also hold something else, or the name of the row's item.
    """
    for field in NUMBERS:
        is_id = field in IDS and (_is_name(row.get(field)) or str(row.get(field)) == item.name != str(item.line))
        if row.get(field) is not None and not is_id:
            offset = next((start for start in (0, 1) if str(row[field]) == str(index + start)), None)
            if offset is None or offsets.setdefault(field, offset) != offset:
                raise InputError(f"{where}: {field} is {row[field]!r:.40}, out of order: name the problem in item")


def file_digest(*paths: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
        try:
            digest.update(path.read_bytes())
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}: give a file") from None
    return digest.hexdigest()


def source_digests(gold: bool, completions: Path | None, model: Path, adapter: Path | None) -> dict[str, str]:
    """Return digests of the answers' source: completions, or model and adapter; {} for the file's own solutions."""
    if gold:
        return {}
    if completions is not None:
        return {"completions_digest": file_digest(completions)}
    digests = {"model_digest": weights_digest(model)}
    if adapter is not None:
        files = (adapter / name for name in ("adapter_config.json", "adapter_model.safetensors"))
        digests["adapter_digest"] = file_digest(*files)
    return digests
