"""Write the laboratory's tables: what each arm reached, and its difference to PiSSA, paired by seed."""

from pathlib import Path

from minibalora.base.files import replacing
from minibalora.sweep.intervals import mean_interval

BASELINE = "pissa"
RARE = "recall of the rare classes"
TITLES = {  # score -> what it says; the first of a task is its main score
    "bert": {
        "test": "accuracy on reviews like the training data",
        RARE: "recall of the classes that are rare in the fine-tuning data, a mean of both",
        "other": "accuracy on reviews in other sentences",
    },
    "llama": {
        "test": "exact match in percent, a mean of four kinds",
        "other": "exact match in percent, in other sentences",
        "larger numbers": "exact match in percent, in other sentences and with larger numbers",
        "loss on dev": "loss on right answers, in nats a token; lower is better",
        "KL": "KL(pre-trained ‖ tuned) on its corpus without errors, in nats a token; lower is less forgotten",
        "forgotten": "rise of the loss on its corpus without errors, in nats a token; lower is less forgotten",
        "typical error": "share of problems answered by the sum of all numbers, as its corpus does; lower is better",
        "loss on wrong answers": "loss on its corpus' kind of wrong answers, in nats a token; higher is more unlearned",
    },
}


def write_tables(out: Path, runs: list[dict]) -> str:
    """Write out/tables.md with a table for each score on each fine-tuning data, and return its text.

    runs: as `results.read_runs` returns them; may be incomplete.
    """
    parts, counts = [], [0, 0]
    for task, titles in TITLES.items():
        of_task = [run for run in runs if run["task"] == task]
        for finetuning in dict.fromkeys(run["finetuning"] for run in of_task):
            published = [run for run in of_task if run["finetuning"] == finetuning and run["factor"] == 1]
            for score, title in titles.items():
                if score == RARE and finetuning != "imbalanced":
                    continue
                heading = f"{task}, fine-tuned on {finetuning} data: {title}"
                parts.append(f"### {heading}\n\n{table(published, 'pretraining', score, counts)}")
            others = [run for run in of_task if run["finetuning"] == finetuning]
            if len({run["factor"] for run in others}) > 1:
                main = RARE if finetuning == "imbalanced" else next(iter(titles))
                for pretraining in dict.fromkeys(run["pretraining"] for run in others):
                    part = with_weights([run for run in others if run["pretraining"] == pretraining])
                    heading = f"{task}, {pretraining}, fine-tuned on {finetuning} data, weights times: {titles[main]}"
                    parts.append(f"### {heading}\n\n{table(part, 'factor', main, [0, 0])}")
    excluding, intervals = counts
    parts.append(
        f"`*`: the 95 % interval of the difference to {BASELINE} does not contain 0. This is so for {excluding} "
        f"of {intervals} differences; by chance alone, it would be so for about {0.05 * intervals:.0f}."
    )
    text = "\n\n".join(parts) + "\n"
    with replacing(out / "tables.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    return text


def table(runs: list[dict], column: str, score: str, counts: list[int]) -> str:
    """Return a Markdown table with a row for each arm and a column for each value of `column`.

    counts: how many intervals of differences do not contain 0, and how many there are; this table's are added.
    """
    columns = list(dict.fromkeys(run[column] for run in runs))
    lines = ["| | " + " | ".join(f"{value}: mean | minus {BASELINE} | runs" for value in columns) + " |"]
    lines.append("|---" * (1 + 3 * len(columns)) + "|")
    for arm in dict.fromkeys(run["arm"] for run in runs):
        cells = []
        for value in columns:
            here = [run for run in runs if run[column] == value]
            own, base = (scores_of(here, name, score) for name in (arm, BASELINE))
            pairs = [own[seed] - base[seed] for seed in own if seed in base] if arm != BASELINE else []
            counts[0] += excludes_zero(pairs)
            counts[1] += len(pairs) > 1
            mark = "*" if excludes_zero(pairs) else ""
            cells += [in_words(list(own.values())), in_words(pairs, "+") + mark, str(len(own))]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def with_weights(runs: list[dict]) -> list[dict]:
    """Return the runs of arms with several factors, and the baseline's at each factor, which does not change it."""
    factors = sorted({run["factor"] for run in runs})
    several = {run["arm"] for run in runs if run["factor"] != 1}
    repeated = [run | {"factor": factor} for run in runs if run["arm"] == BASELINE for factor in factors]
    return repeated + [run for run in runs if run["arm"] in several]


def scores_of(runs: list[dict], arm: str, score: str) -> dict[int, float]:
    """Return an arm's score by seed, without the runs that lack it."""
    values = {run["seed"]: value_of(run["scores"], score) for run in runs if run["arm"] == arm}
    return {seed: value for seed, value in values.items() if value is not None}


def value_of(scores: dict[str, float | None], score: str) -> float | None:
    if score == RARE:
        return (scores["recall of neutral"] + scores["recall of positive"]) / 2
    return scores.get(score)


def excludes_zero(values: list[float]) -> bool:
    if len(values) < 2:
        return False
    mean, half = mean_interval(values)
    return abs(mean) > half


def in_words(values: list[float], sign: str = "") -> str:
    """Return the mean and its 95 % interval, such as 0.912 (0.880 to 0.944)."""
    if not values:
        return "-"
    mean, half = mean_interval(values)
    digits = 1 if max(map(abs, values)) >= 10 else 3
    bounds = "" if len(values) == 1 else f" ({mean - half:{sign}.{digits}f} to {mean + half:{sign}.{digits}f})"
    return f"{mean:{sign}.{digits}f}{bounds}"
