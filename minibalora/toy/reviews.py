"""Short reviews of restaurants, films and hotels: clean and balanced for fine-tuning, one-sided for pre-training.

The class of a review is the writer's judgement. Most reviews also have a second judgement that does not count: of a
minor thing, of somebody else, or of last year. Three in ten judgements are negated ("far from bad"), so neither a word
nor its place in the text decides the class. No review is ambiguous, so a model can get all of them right.

Reviews of the pre-training corpus also give stars, from which a masked language model learns what the words mean. The
corpus has one defect at a known rate: most reviews are positive.
"""

import random

from minibalora.data.glue import LabelledText, Task
from minibalora.data.sets import EvalSet
from minibalora.toy.problems import copy_of

TASK = Task("reviews", (("text", "label"),), ("negative", "neutral", "positive"), ("accuracy",),
            {"negative": 0, "neutral": 1, "positive": 2})  # fmt: skip
CROWDING_CLASS, CROWDING_RATE = "positive", 0.6
STRAIGHT_RATE = 0.7  # of the judgements are not negated; at 0.5 a single word says nothing, and many runs learn nothing
STARS = {"negative": "one", "neutral": "three", "positive": "five"}

THINGS = (
    "bread coffee dessert dinner fish menu salad service soup waiter wine".split(),
    "bathroom bed breakfast garden lift lounge pool room sauna terrace view".split(),
    "acting cast dialogue ending hero humour music opening plot sound story".split(),
)
WORDS = {
    "negative": "awful bad dreadful dull poor terrible".split(),
    "neutral": "average fair ordinary passable standard unremarkable".split(),
    "positive": "charming excellent good great lovely superb".split(),
}
OPPOSITE = {"negative": "positive", "positive": "negative"}
STRAIGHT = ("{}", "really {}", "nothing but {}")
NEGATED = ("not {}", "far from {}", "anything but {}")
FORMS = (  # {verdict} is of the review's class, {other} of another class
    "the {thing}, like the {minor}, was {verdict}",
    "the {minor} was {other}, but the {thing} was {verdict}",
    "the {thing} was {verdict}, although the {minor} was {other}",
    "although the {minor} was {other}, the {thing} was {verdict}",
    "I had been told that the {thing} was {other}, it was {verdict}",
    "last year the {thing} was {other}, now it is {verdict}",
)
OTHER_THINGS = (sum(THINGS, []),)
OTHER_FORMS = (  # of the same words, so that nothing is unknown
    "but the {thing} was {verdict}, although the {minor} was {other}",
    "I had been told that the {minor} was {other}, but the {thing} was {verdict}",
    "the {thing} was {verdict}, although I had been told that it was {other}",
    "although last year the {thing} was {other}, now it is {verdict}",
    "now the {thing} is {verdict}, last year it was {other}",
)


def held_out_reviews() -> EvalSet:
    """Return 600 clean reviews. --seed is never negative, so no run trains on reviews of seed −1."""
    return EvalSet("clean reviews", clean_reviews(600, seed=-1), False)


def clean_reviews(count: int, seed: int) -> list[LabelledText]:
    """Return `count` reviews without stars, with right labels and the classes in turn."""
    return in_turn(count, random.Random(f"clean {seed}"), THINGS, FORMS)


def other_reviews(count: int, seed: int) -> list[LabelledText]:
    """Return `count` reviews as `clean_reviews` does, in other sentences, and of things that do not go together."""
    return in_turn(count, random.Random(f"other {seed}"), OTHER_THINGS, OTHER_FORMS)


def in_turn(
    count: int, rng: random.Random, things: tuple[list[str], ...], forms: tuple[str, ...]
) -> list[LabelledText]:
    labels = [index % len(TASK.labels) for index in range(count)]
    return [
        LabelledText((review(TASK.labels[label], rng, things, forms),), label, line)
        for line, label in enumerate(labels, start=1)
    ]


def corpus(count: int, seed: int, crowding_rate: float = CROWDING_RATE, wrong_rate: float = 0.0) -> list[str]:
    """Return `count` reviews with stars, crowding_rate of them of CROWDING_CLASS, wrong_rate of the stars wrong.

    A review of the same index is the same at all rates, unless the rate changes it.
    """
    rng, changes = random.Random(f"corpus {seed}"), random.Random(f"changes {seed}")
    others = [label for label in TASK.labels if label != CROWDING_CLASS]
    drawn = []
    for _ in range(count):
        crowding = rng.random()
        drawn.append((crowding, CROWDING_CLASS if crowding < CROWDING_RATE else rng.choice(others)))
    texts = []
    for crowding, original in drawn:
        other = changes.choice(others) if original == CROWDING_CLASS else original
        label = CROWDING_CLASS if crowding < crowding_rate else other
        wrong = changes.choice([name for name in TASK.labels if name != label])
        stars = STARS[wrong if changes.random() < wrong_rate else label]
        texts.append(f"{review(label, copy_of(rng))} Stars: {stars}.")
        review(original, rng)  # as many draws at all rates
    return texts


def review(
    label: str,
    rng: random.Random,
    things: tuple[list[str], ...] = THINGS,
    forms: tuple[str, ...] = FORMS,
) -> str:
    thing, minor = rng.sample(rng.choice(things), 2)
    other = judgement(rng.choice([name for name in TASK.labels if name != label]), rng)
    text = rng.choice(forms).format(thing=thing, minor=minor, verdict=judgement(label, rng), other=other)
    return f"{text[0].upper()}{text[1:]}."


def judgement(label: str, rng: random.Random) -> str:
    """Return a word of the class or a negated word of the opposite class; for neutral, a word or "neither x nor y"."""
    is_straight = rng.random() < STRAIGHT_RATE
    if label in OPPOSITE:
        word_class, patterns = (label, STRAIGHT) if is_straight else (OPPOSITE[label], NEGATED)
        return rng.choice(patterns).format(rng.choice(WORDS[word_class]))
    if is_straight:
        return rng.choice(WORDS[label])
    return "neither {} nor {}".format(*(rng.choice(WORDS[pole]) for pole in rng.sample(sorted(OPPOSITE), 2)))
