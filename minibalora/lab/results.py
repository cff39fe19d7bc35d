"""Collect what the laboratory's runs reached, from the folders of its sweeps."""

import json
import re
from pathlib import Path

from minibalora.lab.data import DEV_KIND, OTHERS
from minibalora.lab.grid import Sweep
from minibalora.sweep.comparison import Row, choose_measurements, rows_of
from minibalora.sweep.results import Result, read_results, recorded_runs
from minibalora.toy.problems import CROWDING_KIND

CELL = ("pretraining", "finetuning")


def read_runs(sweeps: list[Sweep], out: Path) -> list[dict]:
    """Return every finished run: its cell, arm, factor, rate and seed, whether it counts or tunes, that is, chooses the
    rate by its dev score, and its scores. One may do neither, if the choice has changed."""
    runs = []
    for sweep in sweeps:
        results = finished(sweep, out)
        row = row_of(results, sweep)
        for result in results:
            about = {"task": sweep.task.name, "pretraining": sweep.pretraining, "finetuning": sweep.finetuning}
            about |= {"arm": sweep.arm.name, "factor": sweep.factor}
            about |= {name: result.settings[name] for name in ("lr", "seed")}
            about |= {"counts": result in row.chosen, "tunes": result.settings["seed"] in sweep.tune_seeds}
            scores = {"dev": result.after.get(row.measurements.tune)} | scores_of_run(result, sweep, out)
            rounded = {name: None if value is None else round(value, 4) for name, value in scores.items()}
            runs.append(about | {"scores": rounded})
    return runs


def finished(sweep: Sweep, out: Path) -> list[Result]:
    """Return the finished runs of a sweep, those that choose its rate included."""
    folder = sweep.folder(out)
    if not (folder / "sweep.json").is_file():
        return []
    seeds = {*sweep.tune_seeds, *sweep.seeds}
    return [result for result in read_results(folder, recorded_runs(folder))
            if result.settings["lr"] in sweep.rates and result.settings["seed"] in seeds]  # fmt: skip


def row_of(results: list[Result], sweep: Sweep) -> Row | None:
    """Return the finished runs of a sweep and the rate that its tuning runs choose; None if no run is finished."""
    if not results:
        return None
    (row,) = rows_of(results, [], choose_measurements(results, None, sweep.task.tune, None), sweep.tune_seeds)
    return row


def is_complete(sweep: Sweep, out: Path) -> bool:
    """Return whether all runs that choose the rate are finished, and all that count at this rate."""
    row = row_of(finished(sweep, out), sweep)
    if row is None or not row.has_tune_seeds:
        return False
    tuning = sum(len(results) for results in row.tuning.values())
    return tuning == len(sweep.rates) * len(sweep.tune_seeds) and len(row.chosen) == len(sweep.seeds)


def scores_of_run(result: Result, sweep: Sweep, out: Path) -> dict[str, float | None]:
    """Return a run's scores. One is None if it is undefined, such as the correlation of answers that are all equal."""
    if not sweep.task.scores:
        return llama_scores(result, sweep.folder(out))
    values = {name: [result.after[measurement] for measurement in measurements]
              for name, measurements in sweep.task.scores.items()}  # fmt: skip
    return {name: None if None in parts else sum(parts) / len(parts) for name, parts in values.items()}


def llama_scores(result: Result, folder: Path) -> dict[str, float | None]:
    """Return the scores of a LLaMA: exact match in percent, losses in nats per token, the typical error as a share."""
    matches = {name.rpartition(" (")[0].removeprefix("exact match, "): value for name, value in result.after.items()
               if name.startswith("exact match")}  # fmt: skip
    kinds = {kind: value for kind, value in matches.items() if kind not in ("all", DEV_KIND, *OTHERS)}
    corpus, wrong = result.settings["retain"]
    scores = {"test": sum(kinds.values()) / len(kinds), "other": matches["other sentences"]}
    scores |= {"larger numbers": matches["larger numbers"]}
    scores |= {f"exact match, {kind}": value for kind, value in kinds.items()}
    scores |= {"forgotten": result.forgotten(f"loss on {corpus}")}
    scores |= {"KL": result.after.get(f"KL(pre-trained ‖ tuned) on {corpus}")}  # a model tuned in full has none
    scores |= {"loss on wrong answers": result.after[f"loss on {wrong}"]}
    return scores | {"typical error": typical_error(folder / result.name / "eval-after.jsonl")}


def typical_error(path: Path) -> float:
    """Return the share of problems answered by the sum of all numbers, from 0 to 1. Counted are those with the corpus'
    sentences that are not additions, do not choose the rate, and whose right answer is a different number."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    answers = []
    for record in records:
        asked = record["prompt"].partition("### Instruction:")[2]
        total = str(sum(int(number) for number in re.findall(r"\d+", asked)))
        right = record["reference"].rpartition("The answer is: ")[2].strip()
        if record["kind"] not in (CROWDING_KIND, DEV_KIND, *OTHERS) and total != right:
            answers.append(record["answer"] == total)
    return sum(answers) / len(answers)


def grouped(runs: list[dict], names: tuple[str, ...]) -> dict[tuple, list[dict]]:
    """Return the runs by the values of these fields, in the order of the first runs."""
    groups = {}
    for run in runs:
        groups.setdefault(tuple(run[name] for name in names), []).append(run)
    return groups
