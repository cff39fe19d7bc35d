"""Write the laboratory's tables: what each arm reached, and its difference from PiSSA, paired by seed."""

from pathlib import Path

from minibalora.base.files import replacing
from minibalora.lab.rates import choices_in_words, table_at_same_rates
from minibalora.lab.results import CELL, grouped
from minibalora.sweep.intervals import interval_in_words, mean_interval

BASELINE = "pissa"
RARE = "recall of the rare classes"
COLUMN = ("task", *CELL, "factor")
TITLES = {  # task -> score -> what it says; scores without a title have no table
    "bert": {
        "test": "accuracy on reviews like the training data",
        RARE: "recall of the classes that are rare in the fine-tuning data, a mean of both",
        "other": "accuracy on reviews in other sentences",
    },
    "llama": {
        "test": "exact match in percent, a mean of four kinds",
        "other": "exact match in percent, in other sentences",
        "larger numbers": "exact match in percent, in other sentences and with larger numbers",
        "KL": "KL(pre-trained ‖ tuned) on its corpus without errors, in nats per token; lower is less forgotten",
        "forgotten": "rise of the loss on its corpus without errors, in nats per token; lower is less forgotten",
        "typical error": "share of problems answered by the sum of all numbers, as the noisy corpus; lower is better",
        "loss on wrong answers": "loss on the noisy corpus' kinds of wrong answers, nats per token; higher is better",
    },
    "stsb-scores": {
        "test": "correlation with the scores of captions (Pearson)",
        "other": "correlation with the scores of news (Pearson)",
    },
    "stsb-classes": {
        "test": "six-class accuracy on captions",
        "other": "six-class accuracy on news",
    },
    "mrpc": {
        "test": "accuracy on pairs of MRPC",
        "other": "mean recall of both classes on pairs of RTE; chance is 0.5",
    },
    "cola": {
        "test": "Matthews correlation on sentences from the training sentences' publications",
        "other": "Matthews correlation on sentences from other publications",
    },
    "rte": {
        "test": "accuracy on pairs of RTE",
        "other": "mean recall of both classes on pairs of MRPC; chance is 0.5",
    },
}


def write_tables(out: Path, runs: list[dict]) -> str:
    """Write out/tables.md with a table for each score on each fine-tuning data, and return its text.

    runs: as `results.read_runs` returns them; may be incomplete.
    """
    parts, excluded = [], {}
    for (task,), here in grouped(runs, ("task",)).items():
        parts += tables_of(task, [run for run in here if run["counts"]], excluded)
        published = [run for run in here if run["factor"] == 1]
        title = TITLES[task]["test"]
        if same := table_at_same_rates(published, BASELINE, digits_of(title)):
            parts.append(f"### {task}, {title}: minus {BASELINE} at the same rate, with the seeds that choose it; a "
                         f"cell's mean (lowest to highest)\n\n{same}")  # fmt: skip
    parts += undefined_in_words([run for run in runs if run["counts"]])
    parts.append(
        f"`*`: the 95 % interval of the difference from {BASELINE} does not contain 0. This is so for "
        f"{sum(excluded.values())} of {len(excluded)} differences; by chance alone, it would be so for about "
        f"{0.05 * len(excluded):.1f}. They are not independent: scores share runs, and arms share those of {BASELINE}."
    )
    text = "\n\n".join([*parts, *choices_in_words(runs)]) + "\n"
    with replacing(out / "tables.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    return text


def tables_of(task: str, runs: list[dict], excluded: dict[tuple, bool]) -> list[str]:
    """Return the tables of a task's runs that count; see `table` for `excluded`."""
    titles, parts = TITLES[task], []
    for (finetuning,), here in grouped(runs, ("finetuning",)).items():
        published = [run for run in here if run["factor"] == 1]
        for score, title in titles.items():
            is_measured = any(value_of(run["scores"], score) is not None for run in published)
            if is_measured and (score != RARE or finetuning == "imbalanced"):
                heading = f"{task}, fine-tuned on {finetuning} data: {title}"
                parts.append(f"### {heading}\n\n{table(published, 'pretraining', score, excluded)}")
        main = main_score(finetuning)
        for pretraining, part in with_weights(here).items():
            heading = f"{task}, {pretraining}, fine-tuned on {finetuning} data, weights times: {titles[main]}"
            parts.append(f"### {heading}\n\n{table(part, 'factor', main, excluded)}")
    return parts


def undefined_in_words(runs: list[dict]) -> list[str]:
    """Name the runs that a mean lacks because their correlation is undefined: they gave all rows the same answer."""
    names = [f"{run['task']}, {run['finetuning']}, {run['arm']}, seed {run['seed']}" for run in runs
             if any(run["scores"].get(score, 0) is None for score in ("test", "other"))]  # fmt: skip
    return [f"Left out, because a correlation of equal answers is undefined: {'; '.join(names)}."] if names else []


def table(runs: list[dict], column: str, score: str, excluded: dict[tuple, bool]) -> str:
    """Return a Markdown table with a row for each arm and a column for each value of `column`.

    excluded: whether the interval of each difference excludes 0; this table's are added. A difference in two tables has
    one entry.
    """
    columns = list(dict.fromkeys(run[column] for run in runs))
    lines = ["| | " + " | ".join(f"{value}: mean | minus {BASELINE} | runs" for value in columns) + " |"]
    lines.append("|---" * (1 + 3 * len(columns)) + "|")
    digits = digits_of(TITLES[runs[0]["task"]][score])
    for arm in dict.fromkeys(run["arm"] for run in runs):
        cells = []
        for value in columns:
            here = [run for run in runs if run[column] == value]
            own, pairs = scores_of(here, arm, score), differences_of(here, arm, score)
            is_excluded = excludes_zero(pairs)
            if len(pairs) > 1:
                cell = next(run for run in here if run["arm"] == arm)
                excluded[(*(cell[name] for name in COLUMN), arm, score)] = is_excluded
            mark = "*" if is_excluded else ""
            cells += [
                interval_in_words(list(own.values()), digits),
                interval_in_words(pairs, digits, "+") + mark,
                str(len(own)),
            ]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def digits_of(title: str) -> int:
    return 1 if "percent" in title else 3


def main_score(finetuning: str) -> str:
    return RARE if finetuning == "imbalanced" else "test"


def with_weights(runs: list[dict]) -> dict[str, list[dict]]:
    """Return, for each pre-training on which several factors were tried, the runs of arms with several factors, and the
    baseline's at each factor, which does not change it. The runs have the same task and fine-tuning data."""
    parts = {}
    for pretraining in dict.fromkeys(run["pretraining"] for run in runs if run["factor"] != 1):
        here = [run for run in runs if run["pretraining"] == pretraining]
        factors = sorted({run["factor"] for run in here})
        several = {run["arm"] for run in here if run["factor"] != 1}
        repeated = [run | {"factor": factor} for factor in factors for run in here if run["arm"] == BASELINE]
        parts[pretraining] = repeated + sorted(
            (run for run in here if run["arm"] in several), key=lambda run: run["factor"]
        )
    return parts


def scores_of(runs: list[dict], arm: str, score: str) -> dict[int, float]:
    """Return an arm's score by seed, without the runs that lack it."""
    values = {run["seed"]: value_of(run["scores"], score) for run in runs if run["arm"] == arm}
    return {seed: value for seed, value in values.items() if value is not None}


def differences_of(runs: list[dict], arm: str, score: str) -> list[float]:
    """Return the differences of an arm to the baseline, paired by seed; [] for the baseline itself."""
    own, base = scores_of(runs, arm, score), scores_of(runs, BASELINE, score)
    return [own[seed] - base[seed] for seed in own if seed in base] if arm != BASELINE else []


def value_of(scores: dict[str, float | None], score: str) -> float | None:
    if score != RARE:
        return scores.get(score)
    recalls = [scores.get(f"recall of {label}") for label in ("neutral", "positive")]
    return None if None in recalls else sum(recalls) / 2


def excludes_zero(values: list[float]) -> bool:
    if len(values) < 2:
        return False
    mean, half = mean_interval(values)
    return abs(mean) > half
