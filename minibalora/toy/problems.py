"""Arithmetic word problems in MetaMathQA's form, clean and balanced for fine-tuning, flawed for pre-training.

The paper's motive is what a model inherits from its pre-training corpus. This corpus has two defects at known rates:
wrong answers, and one kind of problem that crowds out the others.
"""

import random

KINDS = ("addition", "subtraction", "multiplication", "two steps")
CROWDING_KIND, CROWDING_RATE = "addition", 0.9
WRONG_ANSWER_RATE = 0.2

NAMES = "Ada Ben Cleo Dan Eva Finn Gina Hugo Ida Jon Kim Leo Mia Noah Olga Paul Rosa Sam Tina Vera".split()
THINGS = "apples books cards coins eggs flowers keys marbles pencils shells stamps stones".split()
BOXES = "bags boxes bowls baskets drawers".split()


def clean_problems(count: int, seed: int) -> list[dict]:
    """Right answers, every kind in turn: `count` rows with the fields query, response and type."""
    rng = random.Random(f"clean {seed}")
    return [problem(KINDS[index % len(KINDS)], rng) for index in range(count)]


def flawed_problems(count: int, seed: int) -> list[dict]:
    """The pre-training corpus: CROWDING_RATE of one kind, and WRONG_ANSWER_RATE of all answers off by 1 to 9."""
    rng = random.Random(f"flawed {seed}")
    others = [kind for kind in KINDS if kind != CROWDING_KIND]
    rows = []
    for _ in range(count):
        kind = CROWDING_KIND if rng.random() < CROWDING_RATE else rng.choice(others)
        error = rng.choice([-1, 1]) * rng.randint(1, 9) if rng.random() < WRONG_ANSWER_RATE else 0
        rows.append(problem(kind, rng, error))
    return rows


def problem(kind: str, rng: random.Random, error: int = 0) -> dict:
    """One problem; `error` is added to its result (and taken off where that would be negative)."""
    name, things, boxes = rng.choice(NAMES), rng.choice(THINGS), rng.choice(BOXES)

    def wrong(result: int) -> int:
        return result + error if result + error >= 0 else result - error

    if kind == "addition":
        a, b = rng.randint(2, 60), rng.randint(2, 39)
        result = wrong(a + b)
        query = f"{name} has {a} {things} and gets {b} more. How many {things} does {name} have now?"
        response = f"{name} has {a} + {b} = {result} {things}."
    elif kind == "subtraction":
        a = rng.randint(12, 99)
        b = rng.randint(2, a - 2)
        result = wrong(a - b)
        query = f"{name} has {a} {things} and gives away {b}. How many {things} does {name} have left?"
        response = f"{name} has {a} - {b} = {result} {things}."
    elif kind == "multiplication":
        a, b = rng.randint(2, 9), rng.randint(2, 9)
        result = wrong(a * b)
        query = f"{name} has {a} {boxes} with {b} {things} each. How many {things} does {name} have?"
        response = f"{name} has {a} * {b} = {result} {things}."
    else:
        a, b, c = rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, 19)
        result = wrong(a * b + c)
        query = (
            f"{name} has {a} {boxes} with {b} {things} each and gets {c} more. How many {things} does {name} have now?"
        )
        response = f"There are {a} * {b} = {a * b} {things} in the {boxes}.\n"
        response += f"{name} has {a * b} + {c} = {result} {things}."
    return {"query": query, "response": f"{response}\n#### {result}\nThe answer is: {result}", "type": kind}
