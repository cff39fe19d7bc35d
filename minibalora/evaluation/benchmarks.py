"""What a benchmark asks and what is right: GSM8K and MATH by their final answers, HumanEval and MBPP by their tests."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from minibalora.base.errors import InputError
from minibalora.data.files import read_rows
from minibalora.data.prompts import PROMPT, Example, example_from
from minibalora.evaluation.answers import final_answer, number, same_answer, same_number
from minibalora.evaluation.sandbox import Limits, run_program

THINK = " Let's think step by step."  # what the paper's evaluations append to the training prompt
RIGHT = ("right", "passed")  # verdicts
HUMAN_EVAL = ("task_id", "prompt", "entry_point", "canonical_solution", "test")
# As published for base models (arXiv 2107.03374, 2108.07732), with --raw; otherwise Alpaca's template is around it.
HUMAN_EVAL_ENDS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(")
MBPP_PROMPT = (
    "You are an expert Python programmer, and here is your task: {text} Your code should pass these tests:\n\n"
)
# What a model adds to show that its code works; it is not what is measured.
OWN_TESTS = re.compile(r"^(?:assert\b|if __name__ ?==|# Example usage)", re.MULTILINE)
FENCED = re.compile(r"```(?:python|py)?[ \t]*\r?\n(.*?)(?:^```|\Z)", re.DOTALL | re.MULTILINE | re.IGNORECASE)


@dataclass(frozen=True)
class Item:
    """A problem. The program that tests a completion is before + code + after."""

    name: str  # the benchmark's own, or the line
    line: int  # where it stands in its file, from 1
    prompt: str  # the whole prompt, template included
    response: str  # the file's own solution
    kind: str = ""  # the row's "type"
    before: str = ""
    after: str = ""


# (item, completion, limits of programs) -> (what was parsed, verdict, what a program said)
Judge = Callable[[Item, str, Limits | None], tuple[str | None, str, str]]


@dataclass(frozen=True)
class Benchmark:
    items: Callable[[list[tuple[int, object]], Path, bool], list[Item]]  # (rows with their lines, path, raw)
    judge: Judge
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    raw_stop: tuple[str, ...] = ()  # with --raw, of programs
    runs_code: bool = False


def read_items(name: str, path: str | Path, raw: bool = False, limit: int | None = None) -> list[Item]:
    """The first `limit` problems of a benchmark's file, JSON Lines or a JSON array.

    raw: the prompt published for base models. InputError names a line that is not of this benchmark, or the second of
    two problems with one name.
    """
    items = BENCHMARKS[name].items(list(islice(read_rows(Path(path)), limit)), Path(path), raw)
    if not items:
        raise InputError(f"{path}: has no problems: give the file of --task {name}")
    seen = set()
    for item in items:
        if item.name in seen:
            raise InputError(f"{path}, line {item.line}: {item.name} is there twice: take one away")
        seen.add(item.name)
    return items


def as_items(examples: list[Example]) -> list[Item]:
    """Problems that are asked as in training."""
    return [Item(str(e.line), e.line, e.prompt, e.response, e.kind) for e in examples]


def _math_items(rows: list[tuple[int, object]], path: Path, raw: bool) -> list[Item]:
    found = [example_from(row, line, f"{path}, line {line}") for line, row in rows]
    items = []
    for item in as_items([example for example in found if example is not None]):
        if final_answer(item.response) is None:
            raise InputError(f"{path}, line {item.line}: its solution has no final answer: is it of another --task?")
        items.append(replace(item, prompt=item.prompt + THINK))
    return items


def _gsm8k_items(rows: list[tuple[int, object]], path: Path, raw: bool) -> list[Item]:
    items = _math_items(rows, path, raw)
    for item in items:
        answer = final_answer(item.response)
        if number(answer) is None:
            raise InputError(f"{path}, line {item.line}: its answer {answer!r} is no number: is it of --task math?")
    return items


def _human_eval_items(rows: list[tuple[int, object]], path: Path, raw: bool) -> list[Item]:
    items = []
    for line, row in rows:
        task_id, prompt, entry_point, solution, test = _fields(row, HUMAN_EVAL, path, line)
        request = f"Complete this Python function. Give the whole of it, in a code block.\n\n{prompt}"
        after = f"\n{test}\ncheck({entry_point})\n"
        asked = prompt if raw else PROMPT.format(instruction=request)
        items.append(Item(task_id, line, asked, solution, before=prompt, after=after))
    return items


def _mbpp_items(rows: list[tuple[int, object]], path: Path, raw: bool) -> list[Item]:
    """Both published forms: mbpp.jsonl and the sanitized one, which calls the text prompt and the setup imports."""
    items = []
    for line, row in rows:
        names = ("text" if isinstance(row, dict) and "text" in row else "prompt", "code")
        text, code = _fields(row, names, path, line)
        tests, imports = (_strings(row, name, path, line) for name in ("test_list", "test_imports"))
        if not tests:
            raise InputError(f"{path}, line {line}: has no test_list: give the file of --task mbpp")
        listed = "\n".join(tests)
        asked = MBPP_PROMPT.format(text=text) + listed
        asked = f"{asked}\n[BEGIN]\n" if raw else PROMPT.format(instruction=asked)
        setup = row.get("test_setup_code") or ""
        before = "".join(f"{line}\n" for line in imports)
        items.append(
            Item(str(row.get("task_id", line)), line, asked, code, before=before, after=f"\n{setup}\n{listed}\n")
        )
    return items


def _fields(row: object, names: tuple[str, ...], path: Path, line: int) -> list[str]:
    missing = [name for name in names if not isinstance(row, dict) or not isinstance(row.get(name), str)]
    if missing:
        raise InputError(f"{path}, line {line}: has no text in {', '.join(missing)}: is it the file of another --task?")
    return [row[name] for name in names]


def _strings(row: dict, name: str, path: Path, line: int) -> list[str]:
    value = row.get(name) or []
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise InputError(f"{path}, line {line}: {name} is no list of texts: is it the file of another --task?")
    return value


def judge_number(item: Item, completion: str, limits: Limits | None = None) -> tuple[str | None, str, str]:
    return _judged(item, completion, same_number)


def judge_answer(item: Item, completion: str, limits: Limits | None = None) -> tuple[str | None, str, str]:
    return _judged(item, completion, same_answer)


def _judged(item: Item, completion: str, same: Callable[[str, str], bool]) -> tuple[str | None, str, str]:
    answer, gold = final_answer(completion), final_answer(item.response)
    if answer is None or gold is None:
        return answer, "no answer", ""
    return answer, "right" if same(answer, gold) else "wrong", ""


def judge_program(item: Item, completion: str, limits: Limits) -> tuple[str, str, str]:
    """Run the completion's code with the problem's tests. A function that is given whole replaces its beginning in
    `before`, whose imports and helpers stay."""
    code = code_of(completion)
    outcome = run_program(f"{item.before}{code}\n{item.after}", limits)
    return code, outcome.verdict, outcome.output[-2000:]


def code_of(completion: str) -> str:
    """The first code block, or else all of it, up to the model's own tests."""
    fenced = FENCED.search(completion)
    code = fenced[1] if fenced else completion
    return code[: found.start()] if (found := OWN_TESTS.search(code)) else code


MATH_STOP = ("### Instruction",)  # where a base model that does not stop begins the next problem
BENCHMARKS = {
    "gsm8k": Benchmark(_gsm8k_items, judge_number, 512, stop=MATH_STOP),
    "math": Benchmark(_math_items, judge_answer, 1024, stop=MATH_STOP),
    "humaneval": Benchmark(_human_eval_items, judge_program, 512, raw_stop=HUMAN_EVAL_ENDS, runs_code=True),
    "mbpp": Benchmark(_mbpp_items, judge_program, 512, raw_stop=("[DONE]",), runs_code=True),
}
