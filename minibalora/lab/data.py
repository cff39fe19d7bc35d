"""Write the laboratory's data: what models are fine-tuned on, chosen by, and measured on."""

import json
from pathlib import Path

from minibalora.base.errors import InputError
from minibalora.base.files import replacing
from minibalora.data.glue import LabelledText, with_imbalance
from minibalora.lab.grid import BUILT_IN, LLAMA_CELLS, TASKS
from minibalora.toy import problems, reviews

ROWS, DEV, TEST = 1600, 300, 400
PROBLEMS, DEV_PROBLEMS, TEST_PROBLEMS, OTHER_PROBLEMS, CORPUS_ROWS = 320, 32, 32, 8, 40
DEV_KIND = "dev"  # of the problems in test.jsonl that choose the rate
# Kind of test problem in other sentences -> whether its numbers are larger.
OTHERS = {"other sentences": False, "larger numbers": True}
# Seeds of the draws. The pre-training corpora have seed 0, and runs without --data draw from seeds of at least 0, too.
TRAIN_SEED, DEV_SEED, TEST_SEED, CORPUS_SEED = -2, -3, -4, -5


def write_data(out: Path) -> None:
    """Write the files of both tasks into out/bert and out/llama. The content is always the same."""
    pool = reviews.clean_reviews(2 * ROWS + ROWS // 2, TRAIN_SEED)
    write_rows(out / "bert" / "train.jsonl", in_rows(pool[:ROWS]))
    write_rows(out / "bert" / "imbalanced.jsonl", in_rows(with_imbalance(pool, 10, seed=0)[:ROWS]))
    write_rows(out / "bert" / "dev.jsonl", in_rows(reviews.clean_reviews(DEV, DEV_SEED)))
    write_rows(out / "bert" / "test.jsonl", in_rows(reviews.clean_reviews(TEST, TEST_SEED)))
    write_rows(out / "bert" / "other.jsonl", in_rows(reviews.other_reviews(TEST, TEST_SEED)))

    dev = [row | {"type": DEV_KIND} for row in problems.clean_problems(DEV_PROBLEMS, DEV_SEED)]
    others = [row | {"type": kind} for kind, is_large in OTHERS.items()
              for row in problems.other_problems(OTHER_PROBLEMS, TEST_SEED, is_large)]  # fmt: skip
    write_rows(out / "llama" / "train.jsonl", problems.clean_problems(PROBLEMS, TRAIN_SEED))
    write_rows(out / "llama" / "wrong.jsonl", problems.clean_problems(PROBLEMS, TRAIN_SEED, wrong_rate=0.2))
    write_rows(out / "llama" / "test.jsonl", problems.clean_problems(TEST_PROBLEMS, TEST_SEED) + dev + others)
    write_rows(out / "llama" / "wrong-answers.jsonl", problems.clean_problems(CORPUS_ROWS, CORPUS_SEED, wrong_rate=1))
    corpora = TASKS["llama"].corpora
    crowding = {name: corpora[name][0] for name, _ in LLAMA_CELLS} | {BUILT_IN: problems.CROWDING_RATE}
    for name, rate in crowding.items():  # text like its corpus, with right answers
        rows = problems.flawed_problems(CORPUS_ROWS, CORPUS_SEED, rate, wrong_rate=0)
        write_rows(out / "llama" / f"{name}-corpus.jsonl", rows)


def in_rows(examples: list[LabelledText]) -> list[dict]:
    return [{"text": example.texts[0], "label": reviews.TASK.labels[example.label]} for example in examples]


def write_rows(path: Path, rows: list) -> None:
    """Write a row a line. Raises InputError if the file has other rows: finished runs may have trained on them."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise InputError(f"{path}: was written by another version of the laboratory, from other files or for another "
                         "model: give another --out")  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
