"""Arithmetic word problems with MetaMathQA's fields: clean and balanced for fine-tuning, flawed for pre-training.

The paper is about defects that a model inherits from its pre-training corpus. This corpus has two defects, whose rates
can be chosen. First, most of the problems are of one kind, addition. Second, some answers are wrong: in additions by a
random error, in the other kinds because they add where they should subtract or multiply.
"""

import random

from minibalora.data.prompts import Example, example_from
from minibalora.evaluation.benchmarks import as_items
from minibalora.evaluation.records import HeldOut

KINDS = ("addition", "subtraction", "multiplication", "two steps")
CROWDING_KIND, CROWDING_RATE = "addition", 0.9
WRONG_RATE = 0.6  # of the answers to all kinds except additions, of which a third as many are wrong

NAMES = "Ada Ben Cleo Dan Eva Finn Gina Hugo Ida Jon Kim Leo Mia Noah Olga Paul Rosa Sam Tina Vera".split()
THINGS = "apples books cards coins eggs flowers keys marbles pencils shells stamps stones".split()
BOXES = "bags boxes bowls baskets drawers".split()


def examples_of(rows: list[dict]) -> list[Example]:
    return [example_from(row, line) for line, row in enumerate(rows, start=1)]


def held_out_problems(batch_size: int) -> HeldOut:
    """Return 200 clean and 200 flawed problems. --seed is never negative, so no run trains on problems of seed −1."""
    clean, flawed = clean_problems(200, seed=-1), flawed_problems(200, seed=-1)
    return HeldOut(as_items(examples_of(clean)), examples_of(flawed), None, batch_size)


def clean_problems(count: int, seed: int) -> list[dict]:
    """Return `count` rows with right answers and the kinds in turn; fields: query, response and type."""
    rng = random.Random(f"clean {seed}")
    return [problem(KINDS[index % len(KINDS)], rng) for index in range(count)]


def flawed_problems(
    count: int, seed: int, crowding_rate: float = CROWDING_RATE, wrong_rate: float = WRONG_RATE
) -> list[dict]:
    """Return rows of a pre-training corpus with these rates, by default those of the built-in model.

    A row of the same index has the same kind, names and numbers at all rates, unless the rate changes it.
    """
    rng, changes = random.Random(f"flawed {seed}"), random.Random(f"changes {seed}")
    others = [kind for kind in KINDS if kind != CROWDING_KIND]
    rows = []
    for _ in range(count):
        crowding = rng.random()
        original = CROWDING_KIND if crowding < CROWDING_RATE else rng.choice(others)
        other = changes.choice(others) if original == CROWDING_KIND else original
        kind = CROWDING_KIND if crowding < crowding_rate else other
        draw, own = rng.random(), random.Random()
        own.setstate(rng.getstate())
        rows.append(problem(kind, own, is_wrong=draw < wrong_rate_of(kind, wrong_rate)))
        problem(original, rng, is_wrong=draw < wrong_rate_of(original, WRONG_RATE))  # as many draws at all rates
    return rows


def wrong_rate_of(kind: str, rate: float) -> float:
    return rate / 3 if kind == CROWDING_KIND else rate


def problem(kind: str, rng: random.Random, is_wrong: bool = False) -> dict:
    """Return one problem with its worked answer. A wrong addition is off by 1 to 9; other wrong answers add a and b."""
    name, things, boxes = rng.choice(NAMES), rng.choice(THINGS), rng.choice(BOXES)
    if kind == "addition":
        a, b = rng.randint(2, 60), rng.randint(2, 39)
        result = a + b + (rng.choice([-1, 1]) * rng.randint(1, min(9, a + b)) if is_wrong else 0)
        query = f"{name} has {a} {things} and gets {b} more. How many {things} does {name} have now?"
        response = f"{name} has {a} + {b} = {result} {things}."
    elif kind == "subtraction":
        a = rng.randint(5, 25)
        b = rng.randint(2, a - 2)
        result = a + b if is_wrong else a - b
        query = f"{name} has {a} {things} and gives away {b}. How many {things} does {name} have left?"
        response = f"{name} has {a} {'+' if is_wrong else '-'} {b} = {result} {things}."
    elif kind == "multiplication":
        a, b = rng.randint(2, 9), rng.randint(2, 9)
        result = a + b if is_wrong else a * b
        query = f"{name} has {a} {boxes} with {b} {things} each. How many {things} does {name} have?"
        response = f"{name} has {a} {'+' if is_wrong else '*'} {b} = {result} {things}."
    else:
        a, b, c = rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, 19)
        packed = a + b if is_wrong else a * b
        result = packed + c
        query = f"{name} has {a} {boxes} with {b} {things} each and gets {c} more. How many {things} does {name} have?"
        response = f"There are {a} {'+' if is_wrong else '*'} {b} = {packed} {things} in the {boxes}.\n"
        response += f"{name} has {packed} + {c} = {result} {things}."
    return {"query": query, "response": f"{response}\n#### {result}\nThe answer is: {result}", "type": kind}
