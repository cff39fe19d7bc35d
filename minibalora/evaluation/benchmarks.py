"""What a benchmark asks and what is right: GSM8K and MATH by their final answers, HumanEval and MBPP by their tests."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
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
# What a model adds to show that its code works, which is not measured.
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
    item: Callable[[object, int, str, bool], Item | None]  # (row, line, where it stands, raw); None: leave it out
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
    rows = islice(read_rows(path), limit)
    found = [BENCHMARKS[name].item(row, line, where, raw) for line, where, row in rows]
    items = [item for item in found if item is not None]
    if not items:
        raise InputError(f"{path}: has no problems: give the file of --task {name}")
    seen = set()
    for item in items:
        if item.name in seen:
            raise InputError(f"{path}, line {item.line}: {item.name} is there twice: take one away")
        seen.add(item.name)
    return items


def as_items(examples: list[Example]) -> list[Item]:
    """Problems whose prompts are those of training."""
    return [Item(str(e.line), e.line, e.prompt, e.response, e.kind) for e in examples]


def _math_item(row: object, line: int, where: str, raw: bool) -> Item | None:
    example = example_from(row, line, where)
    if example is None:
        return None
    if final_answer(example.response) is None:
        raise InputError(f"{where}: its solution has no final answer: is it for another --task?")
    return replace(*as_items([example]), prompt=example.prompt + THINK)


def _gsm8k_item(row: object, line: int, where: str, raw: bool) -> Item | None:
    item = _math_item(row, line, where, raw)
    if item is not None and number(answer := final_answer(item.response)) is None:
        raise InputError(f"{where}: its answer {answer!r} is not a number: is it for --task math?")
    return item


def _human_eval_item(row: object, line: int, where: str, raw: bool) -> Item:
    task_id, prompt, entry_point, solution, test = _texts(row, HUMAN_EVAL, where)
    request = f"Complete this Python function. Give the whole of it, in a code block.\n\n{prompt}"
    asked = prompt if raw else PROMPT.format(instruction=request)
    return Item(task_id, line, asked, solution, before=prompt, after=f"\n{test}\ncheck({entry_point})\n")


def _mbpp_item(row: object, line: int, where: str, raw: bool) -> Item:
    """Both published forms: mbpp.jsonl, and the sanitized one, whose text is called prompt and whose setup imports."""
    text, code = _texts(row, ("text" if isinstance(row, dict) and "text" in row else "prompt", "code"), where)
    tests, imports = (_list_of_texts(row, name, where) for name in ("test_list", "test_imports"))
    if not tests:
        raise InputError(f"{where}: has no test_list: give the file of --task mbpp")
    listed = "\n".join(tests)
    asked = MBPP_PROMPT.format(text=text) + listed
    asked = f"{asked}\n[BEGIN]\n" if raw else PROMPT.format(instruction=asked)
    before, after = "".join(f"{text}\n" for text in imports), f"\n{row.get('test_setup_code') or ''}\n{listed}\n"
    return Item(str(row.get("task_id", line)), line, asked, code, before=before, after=after)


def _texts(row: object, names: tuple[str, ...], where: str) -> list[str]:
    missing = [name for name in names if not isinstance(row, dict) or not isinstance(row.get(name), str)]
    if missing:
        raise InputError(f"{where}: has no text in {', '.join(missing)}: is it the file of another --task?")
    return [row[name] for name in names]


def _list_of_texts(row: dict, name: str, where: str) -> list[str]:
    value = row.get(name) or []
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise InputError(f"{where}: {name} is not a list of texts: is it the file of another --task?")
    return value


def judge_answer(
    item: Item, completion: str, limits: Limits | None = None, same: Callable[[str, str], bool] = same_answer
) -> tuple[str | None, str, str]:
    answer, gold = final_answer(completion), final_answer(item.response)
    if answer is None or gold is None:
        return answer, "no answer", ""
    return answer, "right" if same(answer, gold) else "wrong", ""


def judge_program(item: Item, completion: str, limits: Limits) -> tuple[str, str, str]:
    """Runs the completion's code with the problem's tests, after the item's `before`: a completion that has the whole
    function redefines what `before` begins, and the imports and helpers there stay."""
    code = code_of(completion)
    outcome = run_program(f"{item.before}{code}\n{item.after}", limits)
    return code, outcome.verdict, outcome.output[-2000:]


def code_of(completion: str) -> str:
    """The first code block of a completion, or all of it if it has none, up to the model's own tests."""
    fenced = FENCED.search(completion)
    code = fenced[1] if fenced else completion
    return code[: found.start()] if (found := OWN_TESTS.search(code)) else code


MATH_STOP = ("### Instruction",)  # where a base model that does not stop begins the next problem
BENCHMARKS = {
    "gsm8k": Benchmark(_gsm8k_item, partial(judge_answer, same=same_number), 512, stop=MATH_STOP),
    "math": Benchmark(_math_item, judge_answer, 1024, stop=MATH_STOP),
    "humaneval": Benchmark(_human_eval_item, judge_program, 512, raw_stop=HUMAN_EVAL_ENDS, runs_code=True),
    "mbpp": Benchmark(_mbpp_item, judge_program, 512, raw_stop=("[DONE]",), runs_code=True),
}
