"""Tests of what the runs that choose the rates tell, on made-up runs."""

from minibalora.lab.rates import choices_in_words, table_at_same_rates
from minibalora.lab.report import write_tables

CELL = {"task": "bert", "pretraining": "noisy", "finetuning": "clean", "factor": 1}


def sweep(arm: str, dev: dict[float, float], chosen: float, test: dict[float, float | None]) -> list[dict]:
    """Return a tuning run for each rate, and a run that counts at the chosen one."""
    here = CELL | {"arm": arm}
    tuning = here | {"seed": 101, "counts": False, "tunes": True}
    runs = [tuning | {"lr": rate, "scores": {"dev": dev[rate], "test": test[rate]}} for rate in dev]
    others = here | {"seed": 1, "tunes": False, "scores": {"dev": 0.5, "test": 0.5}}
    before = others | {"lr": min(dev), "counts": False}  # from before the choice changed
    return [*runs, before, others | {"lr": chosen, "counts": True}]


PISSA = sweep("pissa", {1e-3: 0.1, 2e-3: 0.3, 4e-3: 0.2}, 2e-3, {1e-3: 0.5, 2e-3: 0.6, 4e-3: 0.7})
BA_LORA = sweep("ba-lora 2024", {1e-3: 0.1, 2e-3: 0.3, 4e-3: 0.4}, 4e-3, {1e-3: 0.6, 2e-3: 0.6, 4e-3: 0.5})
LORA = sweep("lora", {2e-3: 0.3, 4e-3: 0.3, 8e-3: 0.3}, 2e-3, {2e-3: 0.0, 4e-3: 0.0, 8e-3: 0.0})


def test_it_counts_the_sweeps_that_chose_the_rate_at_an_end():
    (words,) = choices_in_words(PISSA + BA_LORA + LORA)
    assert words.startswith(
        "Of 3 sweeps, 1 chose the highest of their rates and 1 the lowest. In 1 of them, all rates had"
    )
    assert choices_in_words([run for run in PISSA if run["counts"]]) == []
    assert choices_in_words(PISSA[:-1]) == []  # no run counts yet


def test_arms_are_compared_at_the_same_rates_or_not_at_all():
    lines = table_at_same_rates(PISSA + BA_LORA + LORA, "pissa", 2).splitlines()
    row = "| ba-lora 2024 | -0.03 (-0.20 to +0.10) | -0.03 |"
    assert lines == ["| | noisy, clean | all cells, 95 % interval |", "|---|---|---|", row]
    assert table_at_same_rates(PISSA + LORA, "pissa", 2) == ""
    undefined = sweep("ba-lora 2024", {1e-3: 0.1, 2e-3: 0.3, 4e-3: 0.4}, 4e-3, {1e-3: None, 2e-3: 0.6, 4e-3: 0.5})
    assert table_at_same_rates(PISSA + undefined, "pissa", 2).endswith(
        "| ba-lora 2024 | -0.10 (-0.20 to +0.00) | -0.10 |"
    )
    other = [run | {"pretraining": "clean"} for run in PISSA + BA_LORA]
    (row,) = table_at_same_rates(PISSA + BA_LORA + other, "pissa", 2).splitlines()[2:]
    assert row.count("-0.03 (-0.20 to +0.10)") == 2 and row.endswith(" | -0.03 (-0.03 to -0.03) |")


def test_the_tables_end_with_both(tmp_path):
    text = write_tables(tmp_path, PISSA + BA_LORA + LORA)
    assert "minus pissa at the same rate, with the seeds that choose it; a cell's mean (lowest to highest)" in text
    assert (
        "| ba-lora 2024 | -0.033 (-0.200 to +0.100) | -0.033 |" in text and "Of 3 sweeps, 1 chose the highest" in text
    )
