"""MT-Bench (arXiv 2306.05685): two turns per question, answered and graded in the file formats of FastChat's llm_judge.

The question file, temperatures, answer file, judge prompts for single answers and judgment file are FastChat's
(github.com/lm-sys/FastChat), so its programs can judge our answers and show our judgments.
"""

import json
import re
import time
import uuid
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from minibalora.base import progress
from minibalora.base.errors import InputError
from minibalora.base.files import appending, keep_lines, replacing
from minibalora.checkpoints.template import RAW, Template
from minibalora.checkpoints.tokenizer import Tokenizer
from minibalora.data.files import read_rows
from minibalora.data.prompts import ask
from minibalora.evaluation.decoding import Decoding, encode_prompts, generate
from minibalora.evaluation.programs import without_thoughts
from minibalora.models import LanguageModel

TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0}
TEMPERATURES |= {"stem": 0.1, "humanities": 0.1}
OTHER_TEMPERATURE = 0.7
WITH_REFERENCE = ("math", "reasoning", "coding")  # categories judged with a reference answer
MAX_NEW_TOKENS, JUDGE_TOKENS = 1024, 2048
RATING = re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]")  # the second if the first has no match
NO_RATING = -1

Prompt = Callable[[list[dict], str], str]  # (messages with role and content, place for errors) -> prompt


@dataclass(frozen=True)
class Question:
    id: int | str
    category: str
    turns: tuple[str, ...]
    reference: tuple[str, ...]  # short answers in the question file, or ()
    where: str


@dataclass(frozen=True)
class Match:
    """An answer to judge, and the judge's prompt for it."""

    question: Question
    turn: int  # 1 or 2
    prompt_name: str  # of judge_prompts.jsonl
    system_prompt: str
    user_prompt: str


def prompt_of(template: Template, messages: list[dict], where: str) -> str:
    """Return a conversation as a prompt in the template. Alpaca's template and raw put one turn after another.

    In Alpaca's template, a system message comes before the first question.
    """
    if template.chat is not None:
        return ask(template, messages, where)
    if template == RAW:
        return "\n\n".join(message["content"] for message in messages)
    first = next(index for index, message in enumerate(messages) if message["role"] == "user")
    text = ask(template, messages[: first + 1], where)
    for message in messages[first + 1 :]:
        form = " {}\n\n" if message["role"] == "assistant" else "### Instruction:\n{}\n\n### Response:"
        text += form.format(message["content"])
    return text


def read_questions(path: Path, limit: int | None = None) -> list[Question]:
    """Read the first `limit` questions of FastChat's question.jsonl. Raises InputError for any other row."""
    questions = {}
    for number, (_, where, row) in enumerate(read_rows(path), start=1):
        turns = row.get("turns") if isinstance(row, dict) else None
        is_list = isinstance(turns, list) and turns and all(isinstance(turn, str) for turn in turns)
        if not is_list or not isinstance(row.get("question_id"), int | str) or not isinstance(row.get("category"), str):
            raise InputError(f"{where}: has no question_id, category and turns: give FastChat's question.jsonl")
        if row["question_id"] in questions:
            raise InputError(f"{where}: the question_id {row['question_id']} is there twice: remove one of them")
        reference = _references_of(row, where)
        questions[row["question_id"]] = Question(row["question_id"], row["category"], tuple(turns), reference, where)
        if number == limit:
            break
    if not questions:
        raise InputError(f"{path}: has no questions: give FastChat's question.jsonl")
    return list(questions.values())


def _references_of(row: dict, where: str) -> tuple[str, ...]:
    """Return the short answers of a question. A single string is one answer."""
    references = row.get("reference")
    if references is None or isinstance(references, str):
        references = [references] if references else []
    if not isinstance(references, list) or not all(isinstance(text, str) for text in references):
        raise InputError(f"{where}: its reference is not a list of texts: give a text for each turn")
    return tuple(references)


def answer_questions(
    questions: list[Question],
    to_prompt: Prompt,
    model: LanguageModel,
    tok: Tokenizer,
    decoding: Decoding,
    batch_size: int,
    path: Path,
) -> list[dict]:
    """Return FastChat's record of each question, in order. Reads those in the file `path` and appends new ones.

    The temperature depends on the category, random numbers on decoding.seed and the question's place in the list. If a
    conversation no longer fits the model's positions, the answer is "".
    """
    model_id, places = path.stem, {question.id: index for index, question in enumerate(questions)}
    records = {row["question_id"]: row for row in keep_lines(path, lambda row: row.get("question_id") in places)}
    groups = defaultdict(list)
    for question in questions:
        if question.id not in records:
            groups[TEMPERATURES.get(question.category, OTHER_TEMPERATURE)].append(question)
    batches = [
        (temperature, group[start : start + batch_size])
        for temperature, group in groups.items()
        for start in range(0, len(group), batch_size)
    ]
    with appending(path) as append:
        for temperature, batch in progress.over(batches, "mt-bench", "batch"):
            keys = [places[question.id] for question in batch]
            turns = _conversations(batch, to_prompt, model, tok, replace(decoding, temperature=temperature), keys)
            for question, answers in zip(batch, turns, strict=True):
                record = {"question_id": question.id, "answer_id": uuid.uuid4().hex[:22], "model_id": model_id}
                record |= {"choices": [{"index": 0, "turns": answers}], "tstamp": time.time()}
                append(record)
                records[question.id] = record
    ordered = [records[question.id] for question in questions]
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in ordered), encoding="utf-8")
    return ordered


def _conversations(
    batch: list[Question], to_prompt: Prompt, model: LanguageModel, tok: Tokenizer, decoding: Decoding, keys: list[int]
) -> list[list[str]]:
    """Return the answers to every turn of each question in a batch."""
    messages, answers = [[] for _ in batch], [[] for _ in batch]
    for turn in range(max(len(question.turns) for question in batch)):
        prompts = {}
        for index, question in enumerate(batch):
            if turn < len(question.turns):
                messages[index].append({"role": "user", "content": question.turns[turn]})
                prompt = to_prompt(messages[index], f"{question.where}, turn {turn + 1}")
                try:
                    encode_prompts(model, tok, [prompt])
                    prompts[index] = prompt
                except InputError:
                    answers[index].append("")
        # Each turn draws its own random numbers.
        seeded = replace(decoding, seed=decoding.seed + turn)
        texts = generate(model, tok, list(prompts.values()), seeded, [keys[index] for index in prompts])
        for index, text in zip(prompts, texts, strict=True):
            answers[index].append(text.strip())
            messages[index].append({"role": "assistant", "content": text.strip()})
    return answers


def check_first_turns(questions: list[Question], to_prompt: Prompt, model: LanguageModel, tok: Tokenizer) -> None:
    """Check that every first turn fits the model. Raises InputError for the first that does not."""
    names = [f"{question.where}: the prompt" for question in questions]
    encode_prompts(model, tok, [to_prompt(_user(q.turns[0]), q.where) for q in questions], names)


def _user(text: str, system: str = "") -> list[dict]:
    return [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": text}]


# Judging.


def read_references(path: Path | None) -> dict[int | str, list[str]]:
    """Return the turns of each answer in a file of FastChat's answers, by question_id; {} without a file."""
    references = {}
    for _, where, row in read_rows(path) if path is not None else ():
        try:
            references[row["question_id"]] = [str(turn) for turn in row["choices"][0]["turns"]]
        except (TypeError, KeyError, IndexError):
            raise InputError(f"{where}: has no question_id and choices: give FastChat's reference answers") from None
    return references


def matches_of(
    questions: list[Question], answers: list[dict], prompts_file: Path, references: dict[int | str, list[str]]
) -> list[Match]:
    """Return the matches to judge: the first turn of every question, and the second if there are two.

    prompts_file: FastChat's judge_prompts.jsonl. In the categories WITH_REFERENCE, the reference answer comes from
    `references` or else from the question file. Raises InputError if a prompt or a reference is missing.
    """
    prompts = {row.get("name"): row for _, _, row in read_rows(prompts_file) if isinstance(row, dict)}
    matches = []
    for question, answer in zip(questions, answers, strict=True):
        turns, values = answer["choices"][0]["turns"], {}
        needs_reference = question.category in WITH_REFERENCE
        if needs_reference:
            reference = references.get(question.id, question.reference)
            if len(reference) < len(question.turns):
                raise InputError(f"{question.where}: question {question.id} has no reference answer for the "
                                 "judge: give --references with FastChat's reference_answer/gpt-4.jsonl")  # fmt: skip
            values = {f"ref_answer_{number}": text for number, text in enumerate(reference, start=1)}
        for number in range(1, len(question.turns) + 1 if len(question.turns) == 2 else 2):
            asked = {"question": question.turns[0], "answer": turns[0]}
            if number == 2:
                asked = {f"question_{n}": text for n, text in enumerate(question.turns, start=1)}
                asked |= {f"answer_{n}": text for n, text in enumerate(turns, start=1)}
            name = f"single{'-math' * needs_reference}-v1{'-multi-turn' * (number == 2)}"
            matches.append(_match(question, number, name, prompts, asked | values, prompts_file))
    return matches


def _match(question: Question, turn: int, name: str, prompts: dict, values: dict, prompts_file: Path) -> Match:
    row = prompts.get(name, {})
    texts = [row.get(key) for key in ("system_prompt", "prompt_template")]
    if not all(isinstance(text, str) for text in texts) or row.get("output_format") != "[[rating]]":
        raise InputError(f"{prompts_file}: has no prompt {name} with the output format [[rating]]: give FastChat's "
                         "judge_prompts.jsonl")  # fmt: skip
    try:
        return Match(question, turn, name, texts[0], texts[1].format(**values))
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise InputError(f"{prompts_file}: the template of {name} asks for {error}: correct the template") from None


def grade(
    matches: list[Match],
    to_prompt: Prompt,
    judge: LanguageModel,
    tok: Tokenizer,
    batch_size: int,
    path: Path,
    names: dict[str, str],
) -> list[dict]:
    """Return FastChat's judgment of each match. Reads those in the file `path` and appends new ones, batch by batch.

    names: "model", "judge" and "judge_digest", which identify judgments in the file. The judge decodes
    greedily. Raises InputError if a prompt is too long for the judge.
    """
    prompts = [to_prompt(_user(match.user_prompt, match.system_prompt), match.question.where) for match in matches]
    places = [f"{match.question.where}: the judge's prompt for turn {match.turn}" for match in matches]
    encode_prompts(judge, tok, prompts, places)
    user_prompts = {(match.question.id, match.turn): match.user_prompt for match in matches}

    def belongs(row: dict) -> bool:
        is_same = (row.get("model"), (row.get("judge") or [None])[0], row.get("judge_digest")) == tuple(names.values())
        return is_same and user_prompts.get((row.get("question_id"), row.get("turn"))) == row.get("user_prompt")

    judgments = {(row["question_id"], row["turn"]): row for row in keep_lines(path, belongs)}
    missing = [index for index, match in enumerate(matches) if (match.question.id, match.turn) not in judgments]
    batches = [missing[start : start + batch_size] for start in range(0, len(missing), batch_size)]
    with appending(path) as append:
        for batch in progress.over(batches, "judge", "batch"):
            decoding = Decoding(max_new_tokens=JUDGE_TOKENS)
            texts = generate(judge, tok, [prompts[index] for index in batch], decoding)
            for match, text in zip((matches[index] for index in batch), texts, strict=True):
                row = {"question_id": match.question.id, "model": names["model"]}
                row |= {"judge": [names["judge"], match.prompt_name], "user_prompt": match.user_prompt}
                row |= {"judgment": text, "score": rating_of(text), "turn": match.turn, "tstamp": time.time()}
                row["judge_digest"] = names["judge_digest"]
                append(row)
                judgments[match.question.id, match.turn] = row
    return [judgments[match.question.id, match.turn] for match in matches]


def rating_of(judgment: str) -> int | float:
    """Return the first [[rating]] of a judgment, or else the first [rating]; NO_RATING if none is from 1 to 10."""
    text = without_thoughts(judgment)
    match = next((match for pattern in RATING if (match := pattern.search(text))), None)
    rating = float(match[1]) if match else NO_RATING
    return (int(rating) if rating.is_integer() else rating) if 1 <= rating <= 10 else NO_RATING


def summarize(questions: list[Question], answers: list[dict], judgments: list[dict]) -> dict:
    """Return the numbers of questions and empty answers, and the mean ratings overall, by turn and by category."""
    empty = sum(not text for answer in answers for text in answer["choices"][0]["turns"])
    summary = {"questions": len(questions), "empty answers": empty}
    if not judgments:
        return summary
    categories, ratings = {question.id: question.category for question in questions}, defaultdict(list)
    for row in judgments:
        if row["score"] != NO_RATING:
            for name in ("score", f"turn {row['turn']}", categories[row["question_id"]]):
                ratings[name].append(row["score"])
    means = {name: sum(scores) / len(scores) for name, scores in sorted(ratings.items())}
    return (
        summary | {"ratings": len(ratings["score"]), "without rating": len(judgments) - len(ratings["score"])} | means
    )


def in_words(summary: dict, path: Path) -> str:
    """Describe the result of `summarize` in a line. path: the file of answers."""
    text = f"{summary['questions']:,} questions answered in {path}, {summary['empty answers']:,} answers empty"
    if "ratings" not in summary:
        return text
    means = {name: f"{summary[name]:.2f}" for name in ("score", "turn 1", "turn 2") if name in summary}
    score = ", ".join(f"{name} {mean}" for name, mean in means.items()) or "no score"
    return f"{score}; {summary['ratings']:,} ratings, {summary['without rating']:,} judgments without one; {text}"
