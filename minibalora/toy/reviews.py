"""Short reviews of restaurants, films and hotels: clean and balanced for fine-tuning, one-sided for pre-training.

A review says what its writer thinks now, which is its class, and often something else: of a lesser matter, from
hearsay, or of last year. Three in ten judgements are turned round ("far from bad"), so that neither a word nor its
place in the text gives the class away. Nothing is ambiguous: without noise, a model can have them all right.

The pre-training corpus gives stars, too, from which a masked language model learns what the judgements are worth. It
has one defect at a known rate: most of it is praise.
"""

import random

from minibalora.data.glue import LabelledText, Task
from minibalora.data.sets import EvalSet

TASK = Task("reviews", (("text", "label"),), ("negative", "neutral", "positive"), ("accuracy",))
CROWDING_CLASS, CROWDING_RATE = "positive", 0.6
STRAIGHT_RATE = 0.7  # of the judgements; at one half a word alone would say nothing, and runs learn all or nothing
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
TURNED = ("not {}", "far from {}", "anything but {}")
FORMS = (  # {own} decides; {other} is of another class
    "the {thing}, like the {lesser}, was {own}",
    "the {lesser} was {other}, but the {thing} was {own}",
    "the {thing} was {own}, although the {lesser} was {other}",
    "although the {lesser} was {other}, the {thing} was {own}",
    "I had been told that the {thing} was {other}, it was {own}",
    "last year the {thing} was {other}, now it is {own}",
)


def held_out_reviews() -> EvalSet:
    """--seed is never negative, so training never draws them."""
    return EvalSet("clean reviews", clean_reviews(600, seed=-1), False)


def clean_reviews(count: int, seed: int) -> list[LabelledText]:
    """Rightly labelled, every class in turn; without stars."""
    rng = random.Random(f"clean {seed}")
    labels = [index % len(TASK.labels) for index in range(count)]
    return [LabelledText((review(TASK.labels[label], rng),), label, line) for line, label in enumerate(labels, start=1)]


def corpus(count: int, seed: int) -> list[str]:
    """Reviews with stars, CROWDING_RATE of them of one class."""
    rng = random.Random(f"corpus {seed}")
    others = [label for label in TASK.labels if label != CROWDING_CLASS]
    labels = [CROWDING_CLASS if rng.random() < CROWDING_RATE else rng.choice(others) for _ in range(count)]
    return [f"{review(label, rng)} Stars: {STARS[label]}." for label in labels]


def review(label: str, rng: random.Random) -> str:
    thing, lesser = rng.sample(rng.choice(THINGS), 2)
    other = judgement(rng.choice([name for name in TASK.labels if name != label]), rng)
    text = rng.choice(FORMS).format(thing=thing, lesser=lesser, own=judgement(label, rng), other=other)
    return f"{text[0].upper()}{text[1:]}."


def judgement(label: str, rng: random.Random) -> str:
    """A word of the class, or its opposite turned round; between the two, a word or neither of both."""
    is_straight = rng.random() < STRAIGHT_RATE
    if label in OPPOSITE:
        words, patterns = (label, STRAIGHT) if is_straight else (OPPOSITE[label], TURNED)
        return rng.choice(patterns).format(rng.choice(WORDS[words]))
    if is_straight:
        return rng.choice(WORDS[label])
    return "neither {} nor {}".format(*(rng.choice(WORDS[pole]) for pole in rng.sample(sorted(OPPOSITE), 2)))
