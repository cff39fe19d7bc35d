"""Record a benchmark's answers and summarise them.

Each answer is appended to a file as soon as it is judged, so a stopped evaluation can be continued and every verdict
can be looked up.
"""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

from minibalora.base import progress
from minibalora.base.files import appending, keep_lines, write_json
from minibalora.checkpoints.template import Template
from minibalora.checkpoints.tokenizer import Tokenizer
from minibalora.data.batches import Row, encode_examples
from minibalora.data.prompts import Example, read_examples
from minibalora.evaluation.benchmarks import (
    BENCHMARKS,
    RIGHT,
    Benchmark,
    Item,
    Judge,
    as_items,
    judge_answer,
    read_items,
)
from minibalora.evaluation.class_scoring import finite
from minibalora.evaluation.decoding import Decoding, generate_each
from minibalora.evaluation.forgetting import measure_retained
from minibalora.evaluation.metrics import pass_at_k, wilson
from minibalora.evaluation.perplexity import mean_loss, whole_text
from minibalora.evaluation.sandbox import Limits
from minibalora.lowrank import evaluating
from minibalora.models import LanguageModel

# (items, keys) -> (index of an item, completion) in any order; a key seeds the random numbers of its item.
Complete = Callable[[list[Item], list[int]], Iterable[tuple[int, str]]]


def by_model(model: LanguageModel, tok: Tokenizer, decoding: Decoding, batch_size: int, desc: str) -> Complete:
    return lambda items, keys: generate_each(
        model, tok, [item.prompt for item in items], decoding, batch_size, keys, desc
    )


def by_list(texts: list[str]) -> Complete:
    """Complete from a list of texts: sample 0 of all items, then sample 1, and so on. A key is an index."""
    return lambda items, keys: enumerate([texts[key] for key in keys])


def answer(
    items: list[Item],
    samples: int,
    judge: Judge,
    path: Path,
    measured: str,
    complete: Complete,
    limits: Limits | None = None,
) -> list[dict]:
    """Return a record of every sample of every item. Reads those in the file `path` and appends new ones once judged.

    measured: names the model and settings of these answers; records with another name are removed from the file.
    Programs are judged on all cores while the next answers are generated. Raises any error of a judge.
    """
    item_of = {(item.name, sample): item for sample in range(samples) for item in items}

    def belongs(record: dict) -> bool:
        name, sample = record.get("item"), record.get("sample")
        item = item_of.get((name, sample)) if isinstance(name, str) and isinstance(sample, int) else None
        asked = tuple(map(record.get, ("measured", "prompt", "reference")))
        return item is not None and asked == (measured, item.prompt, item.response)

    records = {(record["item"], record["sample"]): record for record in keep_lines(path, belongs)}
    missing = [(key, name) for key, name in enumerate(item_of) if name not in records]
    lock = Lock()
    with appending(path) as append, ThreadPoolExecutor(os.cpu_count()) as pool:

        def finish(name: tuple[str, int], completion: str) -> None:
            record = record_of(item_of[name], name[1], measured, completion, judge(item_of[name], completion, limits))
            with lock:
                append(record)
                records[name] = record

        waiting: list[Future] = []
        try:
            asked = [item_of[name] for _, name in missing], [key for key, _ in missing]
            for index, completion in complete(*asked) if missing else ():
                waiting.append(pool.submit(finish, missing[index][1], completion))
                while waiting and waiting[0].done():
                    waiting.pop(0).result()
            for future in progress.over(waiting, "judge", "answer", delay=2):
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # so that Ctrl-C does not wait for a thousand programs
            raise
    return [records[name] for name in item_of]


def record_of(
    item: Item, sample: int, measured: str, completion: str, judged: tuple[str | None, str, str]
) -> dict[str, object]:
    parsed, verdict, output = judged
    record = {"item": item.name, "sample": sample, "kind": item.kind, "measured": measured}
    record |= {"prompt": item.prompt, "completion": completion, "answer": parsed}
    return record | {"reference": item.response, "verdict": verdict} | ({"output": output} if output else {})


def summarize(records: list[dict], ks: list[int]) -> dict:
    """Return pass@k for each k with a 95 % Wilson interval. With one sample, pass@1 is the share of right answers.

    The interval counts problems and not samples, because the samples of a problem are not independent. With several
    samples it is too wide rather than too narrow.
    """
    samples, right = Counter(record["item"] for record in records), Counter()
    for record in records:
        right[record["item"]] += record["verdict"] in RIGHT
    summary = {"problems": len(samples), "samples": len(records)}
    for k in ks:
        share = sum(pass_at_k(samples[item], right[item], k) for item in samples) / len(samples)
        low, high = wilson(share, len(samples))
        summary[f"pass@{k}"] = {"share": share, "low": low, "high": high}
    return summary | {"verdicts": dict(Counter(record["verdict"] for record in records).most_common())}


def in_words(summary: dict) -> str:
    """Describe the result of `summarize` in a line."""

    def share(k: str) -> str:
        percent = {name: 100 * value for name, value in summary[k].items()}
        return f"{k} {percent['share']:.1f} % (95 % Wilson interval {percent['low']:.1f} to {percent['high']:.1f})"

    shares = ", ".join(share(name) for name in summary if name.startswith("pass@"))
    per_problem = summary["samples"] // summary["problems"]
    samples = f" x {per_problem} samples" if per_problem > 1 else ""
    verdicts = ", ".join(f"{count:,} {verdict}" for verdict, count in summary["verdicts"].items())
    return f"{shares}, {summary['problems']:,} problems{samples}: {verdicts}"


# The before / after tables of the training scripts.


@dataclass(frozen=True)
class HeldOut:
    """The held-out data that a training script measures on before and after."""

    items: list[Item]
    pretraining: list[Example]  # text like the pre-training corpus
    benchmark: Benchmark | None  # None: items with a final answer, asked as in training
    batch_size: int
    left_out: Mapping[str, int] = field(default_factory=dict)  # number of rows by reason
    retained: dict[str, list[Row]] = field(default_factory=dict)  # name -> rows for `measure_retained`


def read_held_out(
    path: str | None, benchmark: str | None, fields: tuple[str | None, ...], template: Template, batch_size: int
) -> HeldOut:
    """Read the held-out rows or problems of a file; without a file, there are none. fields: see `read_examples`."""
    if path is None:
        return HeldOut([], [], None, batch_size)
    if benchmark is not None:
        return HeldOut(read_items(BENCHMARKS[benchmark], path, template), [], BENCHMARKS[benchmark], batch_size)
    examples, left_out = read_examples(path, *fields, template=template)
    return HeldOut(as_items(examples), [], None, batch_size, left_out)


def measure(
    model: LanguageModel, tok: Tokenizer, held_out: HeldOut, path: Path, measured: str
) -> tuple[dict[str, float], list[dict]]:
    """Return a column of the table (exact match by kind in percent, losses and KL in nats), the records of `answer`.

    path and measured: see `answer`.
    """
    items, benchmark, batch_size = held_out.items, held_out.benchmark, held_out.batch_size
    rows, _, _ = encode_examples(items, tok, sys.maxsize)
    if benchmark is None:
        # An output longer than twice the longest reference counts as no answer.
        longest = max((row.predicted for row in rows), default=1)
        judge, decoding = judge_answer, Decoding(max_new_tokens=2 * longest)
    else:
        judge, decoding = benchmark.judge, Decoding(max_new_tokens=benchmark.max_new_tokens, stop=benchmark.stop)
    complete = by_model(model, tok, decoding, batch_size, "exact match")
    asked = [item for item in items if judge(item, item.response, None)[1] in RIGHT]
    records = answer(asked, 1, judge, path, measured, complete) if asked else []
    groups = {
        f", {kind}": [record for record in records if record["kind"] == kind]
        for kind in sorted({item.kind for item in asked} - {""})
    }
    groups |= {", all": records} if records else {}
    column = {f"exact match{name} ({len(group)})": 100 * share_right(group) for name, group in groups.items()}
    with evaluating(model):
        if rows:
            column["loss on held-out responses"] = mean_loss(model, rows, batch_size)
    retained = held_out.retained
    if held_out.pretraining:
        rows, _, _ = encode_examples(held_out.pretraining, tok, sys.maxsize)
        retained = retained | {"pre-training text": whole_text(rows)}
    return column | measure_retained(model, retained, batch_size), records


def write_report(out: Path, before: dict[str, float], after: dict[str, float]) -> None:
    """Write report.json: both columns of the table."""
    columns = {"before": before, "after": after}
    write_json(out / "report.json", {
        name: {key: finite(value) for key, value in column.items()} for name, column in columns.items()
    })  # fmt: skip


def share_right(records: list[dict]) -> float:
    return sum(record["verdict"] in RIGHT for record in records) / len(records)


def before_and_after(before: tuple[dict, list[dict]], after: tuple[dict, list[dict]]) -> str:
    """Return the table of two results of `measure`, and the intervals of the exact match."""
    text = side_by_side(before[0], after[0])
    if not after[1]:
        return text
    intervals = [wilson(share_right(records), len(records)) for _, records in (before, after)]
    ranges = [f"{100 * low:.1f} to {100 * high:.1f}" for low, high in intervals]
    return f"{text}\n95 % Wilson interval of the exact match of all: {ranges[0]} before, {ranges[1]} after"


def side_by_side(before: dict[str, float], after: dict[str, float]) -> str:
    """Return two columns with the same row names as a table."""
    width = max(map(len, before))
    lines = [f"{'':{width}}  {'before':>8}  {'after':>8}"]
    lines += [f"{name:{width}}  {before[name]:8.3f}  {after[name]:8.3f}" for name in before]
    return "\n".join(lines)
