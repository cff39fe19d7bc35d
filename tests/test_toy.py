"""The built-in model and its problems: small, deterministic, right where they are clean, wrong at the stated rates."""

import re
from collections import Counter

import pytest

import minibalora as mb
from minibalora.evaluate import final_answer
from minibalora.toy import MODEL
from minibalora.toy.problems import CROWDING_KIND, CROWDING_RATE, KINDS, WRONG_RATE, clean_problems, flawed_problems


def right_answer(row: dict) -> int:
    numbers = [int(number) for number in re.findall(r"\d+", row["query"])]
    if row["type"] == "addition":
        return numbers[0] + numbers[1]
    if row["type"] == "subtraction":
        return numbers[0] - numbers[1]
    return numbers[0] * numbers[1] + (numbers[2] if row["type"] == "two steps" else 0)


def test_the_model_is_as_small_as_promised():
    assert sum(parameter.numel() for parameter in mb.load_model(MODEL).parameters()) < 1.5e6
    assert sum(file.stat().st_size for file in MODEL.iterdir()) < 3e6


def test_clean_problems_are_right_and_balanced():
    rows = clean_problems(400, seed=3)
    assert rows == clean_problems(400, seed=3) != clean_problems(400, seed=4)
    assert Counter(row["type"] for row in rows) == dict.fromkeys(KINDS, 100)
    assert all(final_answer(row["response"]) == str(right_answer(row)) for row in rows)


def test_flawed_problems_are_wrong_at_the_stated_rates():
    rows = flawed_problems(20_000, seed=1)
    kinds = Counter(row["type"] for row in rows)
    assert kinds[CROWDING_KIND] / len(rows) == pytest.approx(CROWDING_RATE, abs=0.01)
    for kind in KINDS:
        wrong = sum(row["type"] == kind and final_answer(row["response"]) != str(right_answer(row)) for row in rows)
        # 2 x 2 is 2 + 2: one wrong product in 64 is right; four standard deviations of 600 rows are 8 %
        assert wrong / kinds[kind] == pytest.approx(WRONG_RATE[kind], abs=0.02 if kind == CROWDING_KIND else 0.09)
