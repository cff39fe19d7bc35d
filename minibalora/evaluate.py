"""What a model can do: GSM8K, MATH, HumanEval, MBPP, and how well it predicts text: `python -m minibalora.evaluate`.

Every answer is kept in a file as soon as it is judged, so that an evaluation goes on where it was stopped.
"""

import argparse
import hashlib
import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Lock

from tqdm import tqdm

from minibalora import cli
from minibalora.data import Example, encode_examples, read_rows
from minibalora.errors import InputError
from minibalora.files import keep_lines, write_json
from minibalora.generate import Decoding, add_decoding_flags, add_model_flags, check_decoding, generate_each, load
from minibalora.metrics import pass_at_k, wilson
from minibalora.models.decoder import Decoder
from minibalora.perplexity import mean_loss, mean_predictions, predict, text_windows, whole_text
from minibalora.run_folder import check_out, check_settings, plain_settings, start_run
from minibalora.sandbox import Limits, check_sandbox
from minibalora.tasks import RIGHT, TASKS, Item, Judge, read_items
from minibalora.text import Tokenizer
from minibalora.weights import weights_digest

# An evaluation may go on with another of these: of files, digests are compared; the others don't change a verdict.
MAY_CHANGE = {"model", "adapter", "data", "completions", "out", "device", "batch_size", "allow_code_execution", "k"}
Complete = Callable[[list[Item], list[int]], Iterable[tuple[int, str]]]  # (items, keys) -> (index, completion)


def main() -> int:
    args = parse_flags()
    settings = plain_settings(args) | {"data_digest": file_digest(args.data)}
    if args.completions is not None:
        settings["completions_digest"] = file_digest(args.completions)
    return evaluate_text(args, settings) if args.task == "text" else evaluate_task(args, settings)


def parse_flags() -> argparse.Namespace:
    parser = cli.OneLineParser(
        prog="python -m minibalora.evaluate",
        description="Measure a decoder, with or without an adapter, on a benchmark, or its predictions of a text.",
        allow_abbrev=False,
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
    add("--samples", type=cli.positive_int, default=1, metavar="N", help="answers a problem (default: 1)")
    add("--k", type=cli.positive_int, nargs="+", default=[1], help="report pass@k (default: 1)")
    add("--allow-code-execution", action="store_true", help="humaneval, mbpp: run what the model wrote, in a sandbox "
        "(see minibalora/sandbox.py)")  # fmt: skip
    add("--timeout", type=cli.positive_rate, default=10.0, metavar="S", help="seconds a program (default: 10)")
    args = parser.parse_args()
    check_decoding(args)
    refuse_contradictions(args)
    return args


def refuse_contradictions(args: argparse.Namespace) -> None:
    runs_code = args.task in TASKS and TASKS[args.task].runs_code
    if runs_code and not args.allow_code_execution:
        raise InputError(f"--task {args.task} runs code that a model wrote: allow it by --allow-code-execution")
    no_model = args.gold or args.completions is not None
    unused = {
        "--allow-code-execution": args.allow_code_execution and not runs_code,
        "--raw": args.raw and not runs_code,
        "--max-length": args.max_length is not None and args.task != "text",
        "--gold": args.gold and args.task == "text",
        "--completions": args.completions is not None and args.task == "text",
        "--samples": args.samples > 1 and (args.task == "text" or args.gold),
    }
    for flag, is_unused in unused.items():
        if is_unused:
            raise InputError(f"{flag} has no meaning here, with --task {args.task}: leave it out")
    if args.gold and args.completions is not None:
        raise InputError("--gold and --completions are both given: leave one out")
    if no_model and args.adapter is not None:
        raise InputError("--adapter has no meaning with --gold or --completions: leave one out")
    if args.samples > 1 and args.temperature == 0 and not no_model:
        raise InputError(f"--samples {args.samples} would all be the same: add --temperature")
    if max(args.k) > args.samples:
        raise InputError(f"--k {max(args.k)} needs as many samples: raise --samples")


def evaluate_task(args: argparse.Namespace, settings: dict) -> int:
    task, limits = TASKS[args.task], Limits(seconds=args.timeout)
    if task.runs_code:
        check_sandbox()
    items = read_items(args.task, args.data, args.raw, args.max_rows)
    if args.gold or args.completions is not None:  # no model
        texts = [item.response for item in items] if args.gold else read_completions(args, items)
        bar = partial(tqdm, desc=args.task, unit="problem", dynamic_ncols=True, leave=False)

        def complete(items: list[Item], keys: list[int]) -> Iterable[tuple[int, str]]:
            return enumerate(bar([texts[key] for key in keys]))
    else:
        settings |= model_digests(args)
        model, tok = load(args)
        stop = task.raw_stop if args.raw else task.stop
        decoding = Decoding(args.max_new_tokens or task.max_new_tokens, args.temperature, args.top_p, stop, args.seed)
        complete = completer(model, tok, decoding, args.batch_size, args.task)
    start_or_go_on(args.out, settings)
    records = answer(items, args.samples, task.judge, args.out / "records.jsonl", complete, limits)
    found = summarize(records, args.k)
    write_json(args.out / "summary.json", {"task": args.task} | found)
    print(f"{args.task}: {in_words(found)}")
    return 0


def evaluate_text(args: argparse.Namespace, settings: dict) -> int:
    """Loss and perplexity of a text file; of an adapter also those of its base, and the KL between the two."""
    settings |= model_digests(args)
    model, tok = load(args)
    longest = model.config.max_position_embeddings
    length = args.max_length or min(1024, longest)
    if not 2 <= length <= longest:
        raise InputError(f"--max-length {length}: {args.model} has {longest} positions: give 2 to {longest}")
    windows = text_windows(args.data, tok, length, args.max_rows)
    if (highest := max(map(max, windows))) >= model.config.vocab_size:
        raise InputError(f"{args.model}: its tokenizer gives token {highest}, but the model has "
                         f"{model.config.vocab_size}: they do not belong together")  # fmt: skip
    start_or_go_on(args.out, settings)
    path = args.out / "records.jsonl"
    done = {record["window"]: record for record in keep_lines(path, lambda record: "window" in record)}
    with open(path, "a", encoding="utf-8") as file:
        for number, ids in enumerate(tqdm(windows, "text", unit="window", dynamic_ncols=True), start=1):
            if number not in done:
                done[number] = {"window": number} | predict(model, ids)
                file.write(json.dumps(done[number]) + "\n")
                file.flush()
    found = mean_predictions(list(done.values()))
    write_json(args.out / "summary.json", {"task": "text"} | found)
    parts = [f"loss {found['loss']:.4f}, perplexity {found['perplexity']:.2f}"]
    if "kl" in found:
        parts.append(f"of the base {found['base_loss']:.4f}, {found['base_perplexity']:.2f}")
        parts.append(f"KL(base ‖ tuned) {found['kl']:.4f} nats a token")
    print(f"text: {'; '.join(parts)}; {found['tokens']:,} tokens")
    return 0


def completer(model: Decoder, tok: Tokenizer, decoding: Decoding, batch_size: int, desc: str) -> Complete:
    return lambda items, keys: generate_each(
        model, tok, [item.prompt for item in items], decoding, batch_size, keys, desc
    )


def answer(
    items: list[Item], samples: int, judge: Judge, path: Path, complete: Complete, limits: Limits | None = None
) -> list[dict]:
    """A record of every sample of every item: those that `path` has, and new ones, each appended once it is judged.

    complete(items, keys) yields (index, completion) in any order; a key is what makes a sample's random numbers its
    own. Programs are judged on all cores while the next answers are generated.
    """
    wanted = {(item.name, sample): item for sample in range(samples) for item in items}
    keys = {name: key for key, name in enumerate(wanted)}

    def is_wanted(record: dict) -> bool:
        item = wanted.get((record.get("item"), record.get("sample")))
        return item is not None and record.get("prompt") == item.prompt

    records = {(record["item"], record["sample"]): record for record in keep_lines(path, is_wanted)}
    missing = [name for name in wanted if name not in records]
    lock = Lock()
    with open(path, "a", encoding="utf-8") as file, ThreadPoolExecutor(os.cpu_count()) as pool:

        def finish(name: tuple[str, int], completion: str) -> None:
            item = wanted[name]
            parsed, verdict = judge(item, completion, limits)
            record = {"item": item.name, "sample": name[1], "kind": item.kind, "prompt": item.prompt}
            record |= {"completion": completion, "answer": parsed, "reference": item.response, "verdict": verdict}
            with lock:
                file.write(json.dumps(record) + "\n")
                file.flush()
                records[name] = record

        found = complete([wanted[name] for name in missing], [keys[name] for name in missing]) if missing else []
        judged = [pool.submit(finish, missing[index], completion) for index, completion in found]
        for future in judged:
            future.result()  # raises what judging raised
    return [records[name] for name in wanted]


def summarize(records: list[dict], ks: list[int]) -> dict:
    """pass@k for each k, the share of right answers where there is one sample; with Wilson's interval of 95 %.

    The interval counts problems, not samples, for the samples of one problem are not independent: with several it is
    too wide rather than too narrow.
    """
    samples, right = Counter(record["item"] for record in records), Counter()
    for record in records:
        right[record["item"]] += record["verdict"] in RIGHT
    found = {"problems": len(samples), "samples": len(records)}
    for k in ks:
        share = sum(pass_at_k(samples[item], right[item], k) for item in samples) / len(samples)
        low, high = wilson(share, len(samples))
        found[f"pass@{k}"] = {"share": share, "low": low, "high": high}
    return found | {"verdicts": dict(Counter(record["verdict"] for record in records).most_common())}


def in_words(found: dict) -> str:
    def share(k: str) -> str:
        percent = {name: 100 * value for name, value in found[k].items()}
        return f"{k} {percent['share']:.1f} % (95 % Wilson interval {percent['low']:.1f} to {percent['high']:.1f})"

    shares = ", ".join(share(name) for name in found if name.startswith("pass@"))
    samples = f" x {found['samples'] // found['problems']} samples" if found["samples"] > found["problems"] else ""
    verdicts = ", ".join(f"{count:,} {verdict}" for verdict, count in found["verdicts"].items())
    return f"{shares}, {found['problems']:,} problems{samples}: {verdicts}"


def read_completions(args: argparse.Namespace, items: list[Item]) -> list[str]:
    """The `completion` of each row for the item that `item` or `task_id` names, or in the data's order; by key."""
    given = defaultdict(list)
    for index, (line, row) in enumerate(read_rows(args.completions)):
        where = f"{args.completions}, line {line}"
        if not isinstance(row, dict) or not isinstance(row.get("completion"), str):
            raise InputError(f"{where}: has no text in the field completion: mend the row")
        name = row.get("item", row.get("task_id", items[index % len(items)].name))
        given[str(name)].append(row["completion"])
    for name in [*given, *(item.name for item in items)]:
        if len(given[name]) != args.samples or name not in {item.name for item in items}:
            counts = f"{len(given[name])} completions of problem {name}, not {args.samples}"
            raise InputError(f"{args.completions}: has {counts}: give as many as --samples for each problem of --data")
    return [given[item.name][sample] for sample in range(args.samples) for item in items]


def start_or_go_on(out: Path, settings: dict) -> None:
    """InputError if `out` holds anything but this very evaluation."""
    if (out / "run.json").exists():
        check_settings(out, settings, MAY_CHANGE)
    else:
        check_out(out, resume=False)
        start_run(out, settings)


def file_digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}: give a file") from None


def model_digests(args: argparse.Namespace) -> dict[str, str | None]:
    adapter = None if args.adapter is None else file_digest(args.adapter / "adapter_model.safetensors")
    return {"model_digest": weights_digest(args.model), "adapter_digest": adapter}


# For the training scripts.


def scores(
    model: Decoder,
    tok: Tokenizer,
    judge: Judge,
    items: list[Item],
    pretraining: list[Example],
    batch_size: int,
    path: Path,
) -> tuple[dict[str, float], list[dict]]:
    """One column of the before / after table: exact match per kind in percent, and losses; and the records of `answer`.

    Only items whose response has a final answer are asked.
    """
    rows, _, _ = encode_examples(items, tok, sys.maxsize)
    longest = max((len(row.ids) - row.prompt_length for row in rows), default=1)
    # Who has not stopped at twice the length of the longest reference has no answer.
    complete = completer(model, tok, Decoding(max_new_tokens=2 * longest), batch_size, "exact match")
    asked = [item for item in items if judge(item, item.response, None)[1] in RIGHT]
    records = answer(asked, 1, judge, path, complete) if asked else []
    by_kind = {
        kind: [record for record in records if record["kind"] == kind] for kind in {i.kind for i in asked} - {""}
    }
    groups = {f", {kind}": found for kind, found in sorted(by_kind.items())} | ({", all": records} if records else {})
    column = {f"exact match{name} ({len(found)})": 100 * share_right(found) for name, found in groups.items()}
    was_training = model.training
    model.eval()
    if rows:
        column["loss on held-out responses"] = mean_loss(model, rows, batch_size)
    if pretraining:
        rows, _, _ = encode_examples(pretraining, tok, sys.maxsize)
        column["loss on pre-training text"] = mean_loss(model, whole_text(rows), batch_size)
    model.train(was_training)
    return column, records


def share_right(records: list[dict]) -> float:
    return sum(record["verdict"] in RIGHT for record in records) / len(records)


def before_and_after(before: tuple[dict, list[dict]], after: tuple[dict, list[dict]]) -> str:
    """The table of two results of `scores`, and how sure the exact match is."""
    text = table(before[0], after[0])
    if not after[1]:
        return text
    intervals = [wilson(share_right(records), len(records)) for _, records in (before, after)]
    ranges = [f"{100 * low:.1f} to {100 * high:.1f}" for low, high in intervals]
    return f"{text}\n95 % Wilson interval of the exact match of all: {ranges[0]} before, {ranges[1]} after"


def table(before: dict[str, float], after: dict[str, float]) -> str:
    """Both columns side by side."""
    width = max(map(len, before))
    lines = [f"{'':{width}}  {'before':>8}  {'after':>8}"]
    lines += [f"{name:{width}}  {before[name]:8.3f}  {after[name]:8.3f}" for name in before]
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run_script(main)
