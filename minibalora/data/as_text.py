"""Classification as text: T5 reads "mnli hypothesis: ... premise: ..." and answers "entailment".

T5 was trained on these questions and answers (arXiv 1910.10683, appendix D). Only the first token of each
class's word counts, as in LoRA-GA (arXiv 2407.05000, section 4.1): D logits of the language model's head. There is no
new head, so the pre-trained model gives meaningful answers, and consistency keeps the student near them.
"""

from dataclasses import replace

from minibalora.base.errors import InputError
from minibalora.checkpoints.tokenizer import Tokenizer
from minibalora.data.glue import LabelledText, Task

WORDS = {  # for tasks whose classes are numbers
    "cola": ("unacceptable", "acceptable"),
    "sst2": ("negative", "positive"),
    "mrpc": ("not_equivalent", "equivalent"),
    "qqp": ("not_duplicate", "duplicate"),
    "wnli": ("not_entailment", "entailment"),
}
QUESTIONS = {  # for tasks with a special form
    "mnli": "mnli hypothesis: {1} premise: {0}",
    "qnli": "qnli question: {0} sentence: {1}",
    "qqp": "qqp question1: {0} question2: {1}",
}


def questions(examples: list[LabelledText], task: Task) -> list[LabelledText]:
    """Return the examples with one text each: the question that asks T5 for the class."""
    pairs = len(task.columns[0]) == 3
    form = QUESTIONS.get(task.name, "{2} sentence1: {0} sentence2: {1}" if pairs else "{1} sentence: {0}")
    return [replace(example, texts=(form.format(*example.texts, task.name),)) for example in examples]


def words_of(task: Task) -> tuple[str, ...]:
    return WORDS.get(task.name, task.labels)


def first_tokens(task: Task, tok: Tokenizer) -> list[int]:
    """Return the first token of each class's word, in order.

    Raises InputError if two words have the same first token, or if the tokenizer is a decoder's.
    """
    if not tok.is_encoder_decoder:
        raise InputError("--as-text needs an encoder-decoder such as T5, and --model is not one: leave it out")
    words = words_of(task)
    first = {tuple(ids[:1]): word for word, ids in zip(words, tok.encode_responses(list(words)), strict=True)}
    if len(first) < len(words) or () in first:
        twins = ", ".join(repr(word) for word in words if word not in first.values() or word == first.get(()))
        raise InputError(f"--as-text: {twins} has no first token, or shares it with another class: rename the classes")
    return [ids[0] for ids in first]
