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
OTHER_NAMES = "Anton Berta Carla Dora Emil Frida Georg Hanna".split()
OTHER_THINGS = "buttons candles forks lemons nails plums ribbons tickets".split()
BOXES = "bags boxes bowls baskets drawers".split()


def examples_of(rows: list[dict]) -> list[Example]:
    return [example_from(row, line) for line, row in enumerate(rows, start=1)]


def held_out_problems(batch_size: int) -> HeldOut:
    """Return 200 clean and 200 flawed problems. --seed is never negative, so no run trains on problems of seed −1."""
    clean, flawed = clean_problems(200, seed=-1), flawed_problems(200, seed=-1)
    return HeldOut(as_items(examples_of(clean)), examples_of(flawed), None, batch_size)


def clean_problems(count: int, seed: int, wrong_rate: float = 0.0) -> list[dict]:
    """Return `count` rows with the kinds in turn, each answered wrongly with probability wrong_rate; fields: query,
    response, type.

    The problems are the same at all rates.
    """
    rng, changes = random.Random(f"clean {seed}"), random.Random(f"changes {seed}")
    rows = []
    for index in range(count):
        kind, own = KINDS[index % len(KINDS)], copy_of(rng)
        right = problem(kind, rng)
        rows.append(problem(kind, own, is_wrong=True) if changes.random() < wrong_rate else right)
    return rows


def other_problems(count: int, seed: int, is_large: bool) -> list[dict]:
    """Return `count` right rows, the kinds in turn, with names and sentences of their own, and with larger numbers if
    `is_large`."""
    rng = random.Random(f"other {seed}")
    return [other_problem(KINDS[index % len(KINDS)], rng, is_large) for index in range(count)]


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
        draw = rng.random()
        own = copy_of(rng)
        rows.append(problem(kind, own, is_wrong=draw < wrong_rate_of(kind, wrong_rate)))
        problem(original, rng, is_wrong=draw < wrong_rate_of(original, WRONG_RATE))  # as many draws at all rates
    return rows


def copy_of(rng: random.Random) -> random.Random:
    """Return a generator that draws what `rng` will draw."""
    own = random.Random()
    own.setstate(rng.getstate())
    return own


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


def other_problem(kind: str, rng: random.Random, is_large: bool) -> dict:
    """Return a right problem that `problem` can't make. Its numbers are in the same ranges, or above them."""
    name, things = rng.choice(OTHER_NAMES), rng.choice(OTHER_THINGS)
    a, b, c = (rng.randint(10, 12) if is_large else rng.randint(2, 9)), rng.randint(2, 9), rng.randint(2, 19)
    if kind == "addition":
        a, b = (rng.randint(61, 99), rng.randint(40, 99)) if is_large else (rng.randint(2, 60), rng.randint(2, 39))
        query = f"There are {a} {things} on the shelf. {name} puts {b} more there. How many {things} are there now?"
        response, result = f"There are {a} + {b} = {a + b} {things}.", a + b
    elif kind == "subtraction":
        a = rng.randint(26, 99) if is_large else rng.randint(5, 25)
        b = rng.randint(2, a - 2)
        query = f"{name} bought {a} {things} and lost {b}. How many {things} remain?"
        response, result = f"There remain {a} - {b} = {a - b} {things}.", a - b
    elif kind == "multiplication":
        query = f"Each of {a} rows has {b} {things}. How many {things} does {name} count?"
        response, result = f"{name} counts {a} * {b} = {a * b} {things}.", a * b
    else:
        query = f"Each of {a} rows has {b} {things}, and {name} adds {c} more. How many {things} are there?"
        response = f"The rows have {a} * {b} = {a * b} {things}.\nThere are {a * b} + {c} = {a * b + c} {things}."
        result = a * b + c
    return {"query": query, "response": f"{response}\n#### {result}\nThe answer is: {result}", "type": kind}
