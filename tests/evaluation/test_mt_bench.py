"""MT-Bench in FastChat's formats: questions, both turns, temperatures, judge prompts, ratings, resuming."""

import json
from pathlib import Path

import pytest
from helpers import GOLDEN

import minibalora as mb
from minibalora.checkpoints.chat_template import ChatTemplate
from minibalora.checkpoints.template import ALPACA, RAW, Template
from minibalora.data.prompts import PROMPT
from minibalora.evaluation import mt_bench
from minibalora.evaluation.decoding import Decoding
from minibalora.toy import MODEL

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Tell 7 tales.", "Now 3."]},
    {"question_id": 111, "category": "math", "turns": ["What is 3 + 4?", "And 5?"], "reference": ["7", "9"]},
    {"question_id": 5, "category": "trivia", "turns": ["Who has 2 hens?"]},
]
GENERAL = "[Question]\n{question}\n\n[The Start of Assistant's Answer]\n{answer}\n[The End of Assistant's Answer]"
MATH = "[Question]\n{question}\n\n[Reference]\n{ref_answer_1}\n\n[Answer]\n{answer}"
TURNS = (
    "### User:\n{question_1}\n\n### Assistant A:\n{answer_1}\n\n### User:\n{question_2}\n\n### Assistant A:\n{answer_2}"
)
PROMPTS = {
    "single-v1": ("You are a helpful assistant.", GENERAL),
    "single-math-v1": ("You are a helpful assistant.", MATH),
    "single-v1-multi-turn": ("Judge the second.", TURNS),
    "single-math-v1-multi-turn": ("Judge the second.", "{ref_answer_1}|{ref_answer_2}|" + TURNS),
}


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def questions(tmp_path):
    return mt_bench.read_questions(lines(tmp_path / "question.jsonl", QUESTIONS))


@pytest.fixture
def prompts_file(tmp_path):
    rows = [
        {
            "name": name,
            "type": "single",
            "system_prompt": system,
            "prompt_template": text,
            "output_format": "[[rating]]",
        }
        for name, (system, text) in PROMPTS.items()
    ]
    return lines(tmp_path / "judge_prompts.jsonl", [{"name": "pair-v2", "output_format": "[[A]]"}, *rows])


@pytest.fixture(scope="module")
def toy():
    return mb.load_model(MODEL), mb.load_tokenizer(MODEL)


def ask(messages, where):
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages) + "\nassistant:"


@pytest.fixture
def generated(monkeypatch):
    """Let `generate` answer with the prompt's number. Returns its calls (prompts, decoding, keys)."""
    calls = []

    def generate(model, tok, prompts, decoding, keys=None):
        calls.append((prompts, decoding, keys))
        return [f" answer {index} " for index in range(len(prompts))]

    monkeypatch.setattr(mt_bench, "generate", generate)
    return calls


def test_both_turns_are_asked_at_the_categorys_temperature(questions, toy, generated, tmp_path):
    path = tmp_path / "mine.jsonl"
    records = mt_bench.answer_questions(questions, ask, *toy, Decoding(max_new_tokens=9, seed=3), 2, path)
    assert [json.loads(line) for line in path.read_text().splitlines()] == records
    assert [(row["question_id"], row["model_id"]) for row in records] == [(81, "mine"), (111, "mine"), (5, "mine")]
    for row in records:
        assert list(row) == ["question_id", "answer_id", "model_id", "choices", "tstamp"] and row["tstamp"] > 1e9
        assert len(row["answer_id"]) == 22
    assert records[0]["choices"] == [{"index": 0, "turns": ["answer 0", "answer 0"]}]
    assert records[2]["choices"] == [{"index": 0, "turns": ["answer 1"]}]
    first, second, third, fourth = generated
    assert first[0] == ["user: Tell 7 tales.\nassistant:", "user: Who has 2 hens?\nassistant:"]
    assert second[0] == ["user: Tell 7 tales.\nassistant: answer 0\nuser: Now 3.\nassistant:"]
    assert third[0] == ["user: What is 3 + 4?\nassistant:"]
    assert [call[1].temperature for call in generated] == [0.7, 0.7, 0, 0]
    assert [call[1].seed for call in generated] == [3, 4, 3, 4]
    assert [call[2] for call in generated] == [[0, 2], [0], [1], [1]]


def test_all_categories_have_fastchats_temperature():
    assert mt_bench.TEMPERATURES == {
        "writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1,
        "humanities": 0.1,
    }  # fmt: skip


MESSAGES = [
    {"role": "system", "content": "Be kind."}, {"role": "user", "content": "A?"},
    {"role": "assistant", "content": "B."}, {"role": "user", "content": "C?"},
]  # fmt: skip


def test_a_conversation_continues_in_alpacas_template():
    first = mt_bench.prompt_of(ALPACA, MESSAGES[:2], "")
    assert first == PROMPT.format(instruction="Be kind.\n\nA?")
    assert mt_bench.prompt_of(ALPACA, MESSAGES, "") == f"{first} B.\n\n### Instruction:\nC?\n\n### Response:"
    assert mt_bench.prompt_of(RAW, MESSAGES, "") == "Be kind.\n\nA?\n\nB.\n\nC?"


def test_a_conversation_is_rendered_by_the_models_own_template():
    chat = ChatTemplate(Path("here"), {"default": (GOLDEN / "chat" / "smollm2.jinja").read_text()}, {}, ["<|im_end|>"])
    assert mt_bench.prompt_of(Template("chat", chat), MESSAGES, "") == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nA?<|im_end|>\n<|im_start|>assistant\nB.<|im_end|>\n"
        "<|im_start|>user\nC?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_answers_that_a_file_has_are_kept(questions, toy, generated, tmp_path):
    path = tmp_path / "mine.jsonl"
    records = mt_bench.answer_questions(questions, ask, *toy, Decoding(), 1, path)
    whole = path.read_text()
    path.write_text("".join(whole.splitlines(keepends=True)[1:]) + '{"question_id": 81, "answ')
    generated.clear()
    again = mt_bench.answer_questions(questions, ask, *toy, Decoding(), 1, path)
    assert [call[2] for call in generated] == [[0], [0]] and again[1:] == records[1:]
    assert [json.loads(line)["question_id"] for line in path.read_text().splitlines()] == [81, 111, 5]


def test_a_real_model_answers_and_a_turn_that_does_not_fit_stays_empty(questions, toy, tmp_path):
    long = mt_bench.Question(7, "math", ("What is 3 + 4?", "word " * 600), (), "here")
    records = mt_bench.answer_questions(
        [*questions, long], ask, *toy, Decoding(max_new_tokens=5), 4, tmp_path / "x.jsonl"
    )
    assert records[3]["choices"][0]["turns"][0] and records[3]["choices"][0]["turns"][1] == ""
    assert mt_bench.summarize([*questions, long], records, [])["empty answers"] >= 1


def test_a_first_turn_that_does_not_fit_is_refused(toy, refuses):
    long = mt_bench.Question(7, "math", ("word " * 600,), (), "q.jsonl, line 1")
    refuses(lambda: mt_bench.check_first_turns([long], ask, *toy), "q.jsonl, line 1: the prompt", "512 positions")


# Judging.

ANSWERS = [
    {
        "question_id": question["question_id"],
        "choices": [{"index": 0, "turns": ["one {x}", "two"][: len(question["turns"])]}],
    }
    for question in QUESTIONS
]


def test_the_judge_is_asked_in_fastchats_prompts(questions, prompts_file):
    matches = mt_bench.matches_of(questions, ANSWERS, prompts_file, {})
    assert [(match.question.id, match.turn, match.prompt_name) for match in matches] == [
        (81, 1, "single-v1"), (81, 2, "single-v1-multi-turn"),
        (111, 1, "single-math-v1"), (111, 2, "single-math-v1-multi-turn"), (5, 1, "single-v1"),
    ]  # fmt: skip
    assert matches[0].user_prompt == GENERAL.format(question="Tell 7 tales.", answer="one {x}")
    assert matches[0].system_prompt == "You are a helpful assistant."
    assert matches[1].user_prompt == TURNS.format(
        question_1="Tell 7 tales.", answer_1="one {x}", question_2="Now 3.", answer_2="two"
    )
    assert matches[2].user_prompt == MATH.format(question="What is 3 + 4?", ref_answer_1="7", answer="one {x}")
    assert matches[3].user_prompt.startswith("7|9|### User:\nWhat is 3 + 4?")


def test_a_reference_may_be_one_string_but_no_number(tmp_path, refuses):
    for value, expected in [("42", ("42",)), (["7", "9"], ("7", "9")), (None, ())]:
        (question,) = mt_bench.read_questions(lines(tmp_path / "q.jsonl", [QUESTIONS[1] | {"reference": value}]))
        assert question.reference == expected
    for value in (42, 0, [7], {"a": "b"}):
        path = lines(tmp_path / "q.jsonl", [QUESTIONS[1] | {"reference": value}])
        refuses(lambda path=path: mt_bench.read_questions(path), "q.jsonl, line 1", "not a list of texts")


def test_a_reference_file_comes_before_the_question_files(questions, prompts_file, tmp_path):
    row = {"question_id": 111, "choices": [{"index": 0, "turns": ["It is seven.", "It is nine."]}]}
    references = mt_bench.read_references(lines(tmp_path / "gpt-4.jsonl", [row]))
    matches = mt_bench.matches_of(questions, ANSWERS, prompts_file, references)
    assert "[Reference]\nIt is seven.\n" in matches[2].user_prompt


def test_missing_prompts_and_references_of_a_judge_are_refused(questions, prompts_file, tmp_path, refuses):
    no_reference = [mt_bench.Question(1, "coding", ("a", "b"), (), "q.jsonl, line 9")]
    refuses(lambda: mt_bench.matches_of(no_reference, ANSWERS[:1], prompts_file, {}), "line 9", "--references")
    pairs = lines(tmp_path / "pairs.jsonl", [{"name": "pair-v2", "output_format": "[[A]]"}])
    refuses(lambda: mt_bench.matches_of(questions, ANSWERS, pairs, {}), "pairs.jsonl", "single-v1")
    row = {"name": "single-v1", "system_prompt": "", "prompt_template": "{verdict}", "output_format": "[[rating]]"}
    other = lines(tmp_path / "other.jsonl", [row])
    refuses(lambda: mt_bench.matches_of(questions, ANSWERS, other, {}), "other.jsonl", "'verdict'")
    refuses(lambda: mt_bench.read_references(lines(tmp_path / "r.jsonl", [{"x": 1}])), "r.jsonl, line 1")


@pytest.mark.parametrize("judgment, rating", [
    ("Good. Rating: [[8]]", 8), ("[[7.5]] or [[3]]", 7.5), ("Rating: [6]", 6), ("[1] is wrong. Rating: [[2]]", 2),
    ("[[10]]", 10), ("[[8.0]]", 8), ("Rating: 8", -1), ("[[rating]]", -1), ("[[11]]", -1), ("[[0]]", -1), ("", -1),
    ("<think>[[3]]</think>[[9]]", 9), ("<think>[[3]]", -1), ("[[8/10]]", -1),
])  # fmt: skip
def test_ratings_are_read_as_fastchat_reads_them(judgment, rating):
    assert mt_bench.rating_of(judgment) == rating


def test_judgments_are_fastchats_and_are_kept(questions, prompts_file, toy, monkeypatch, tmp_path):
    calls, texts = [], iter(["Rating: [[8]]", "[[4]]", "no idea", "[[6]]", "[[7]]", "[[1]]"])

    def generate(model, tok, prompts, decoding, keys=None):
        calls.append((prompts, decoding))
        return [next(texts) for _ in prompts]

    monkeypatch.setattr(mt_bench, "generate", generate)
    matches, path = mt_bench.matches_of(questions, ANSWERS, prompts_file, {}), tmp_path / "judge_single.jsonl"
    names = {"model": "mine", "judge": "judge", "judge_digest": "d"}
    judgments = mt_bench.grade(matches, ask, *toy, 2, path, names)
    assert [row["score"] for row in judgments] == [8, 4, -1, 6, 7] and judgments[2]["judgment"] == "no idea"
    assert judgments[1] | {"tstamp": 0} == {
        "question_id": 81, "model": "mine", "judge": ["judge", "single-v1-multi-turn"],
        "user_prompt": matches[1].user_prompt, "judgment": "[[4]]", "score": 4, "turn": 2, "tstamp": 0,
        "judge_digest": "d",
    }  # fmt: skip
    assert calls[0][0][0] == f"system: You are a helpful assistant.\nuser: {matches[0].user_prompt}\nassistant:"
    assert {(call[1].temperature, call[1].max_new_tokens) for call in calls} == {(0, 2048)}
    calls.clear()
    assert mt_bench.grade(matches, ask, *toy, 2, path, names) == judgments and not calls
    changed = [{**ANSWERS[0], "choices": [{"turns": ["new", "two"]}]}, *ANSWERS[1:]]
    monkeypatch.setattr(mt_bench, "generate", lambda model, tok, prompts, decoding: ["[[1]]"] * len(prompts))
    again = mt_bench.grade(mt_bench.matches_of(questions, changed, prompts_file, {}), ask, *toy, 2, path, names)
    assert [row["score"] for row in again] == [1, 1, -1, 6, 7] and len(path.read_text().splitlines()) == 5
    summary = mt_bench.summarize(questions, ANSWERS, judgments)
    assert summary == {
        "questions": 3, "empty answers": 0, "ratings": 4, "without rating": 1,
        "score": 6.25, "turn 1": 7.5, "turn 2": 5, "writing": 6, "math": 6, "trivia": 7,
    }  # fmt: skip
    assert mt_bench.in_words(summary, path).startswith(
        "score 6.25, turn 1 7.50, turn 2 5.00; 4 ratings, 1 judgments without one; 3 questions answered"
    )


@pytest.mark.parametrize("row", [
    7, {}, {"question_id": 1, "category": "math"}, {"question_id": 1, "category": "math", "turns": []},
    {"question_id": 1, "category": "math", "turns": "a"}, {"question_id": 1, "category": 2, "turns": ["a"]},
    {"question_id": None, "category": "math", "turns": ["a"]}, {"question_id": 81, "category": "math", "turns": ["a"]},
])  # fmt: skip
def test_a_row_that_is_not_a_question_is_refused_by_its_line(tmp_path, refuses, row):
    path = lines(tmp_path / "question.jsonl", [QUESTIONS[0], row])
    refuses(lambda: mt_bench.read_questions(path), "question.jsonl, line 2")
    path.write_text("")
    refuses(lambda: mt_bench.read_questions(path), "has no questions")


def test_the_first_questions_are_enough(tmp_path):
    path = lines(tmp_path / "question.jsonl", [*QUESTIONS, {}])
    assert [question.id for question in mt_bench.read_questions(path, 2)] == [81, 111]
