"""Prompts and judges of benchmarks: GSM8K and MATH by final answers, HumanEval(+) and MBPP(+) by running tests."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from itertools import islice
from pathlib import Path

from minibalora.base.errors import InputError
from minibalora.checkpoints.template import ALPACA, RAW, Template
from minibalora.data.files import read_rows
from minibalora.data.prompts import Example, ask, example_from
from minibalora.evaluation.answers import final_answer, number, same_answer, same_number
from minibalora.evaluation.decoding import before_stop
from minibalora.evaluation.programs import (
    END_MARKS,
    FENCE,
    FIRST_MARKS,
    before_marks,
    code_of,
    continues,
    defined_names,
    program_of,
    without_thoughts,
)
from minibalora.evaluation.sandbox import Limits, run_program

THINK = " Let's think step by step."  # appended to the training prompt
RIGHT = ("right", "passed")  # verdicts
HUMAN_EVAL = ("task_id", "prompt", "entry_point", "canonical_solution", "test")
# The published stop strings (arXiv 2107.03374) for a text that continues the prompt.
HUMAN_EVAL_ENDS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(")
CHAT = re.compile(r"\s*(?:[A-Z<]|(?:from|import|async def|def|class)\b|@)")  # begins prose or a whole function
MBPP_PROMPT = (
    "You are an expert Python programmer, and here is your task: {text} Your code should pass these tests:\n\n"
)


@dataclass(frozen=True)
class Item:
    """A problem. The program before + code + after tests a completion's code."""

    name: str  # the benchmark's name for the problem, or its line
    line: int  # its line in the file, from 1
    prompt: str  # the whole prompt, template included
    response: str  # the file's own solution
    kind: str = ""  # the row's "type"
    rendered: str | None = None  # see `Example`
    learned: tuple[tuple[int, int], ...] | None = None
    before: str = ""
    after: str = ""
    defines: tuple[str, ...] = ()  # the names that the tests call


# (item, completion, limits of programs) -> (parsed answer, verdict, output of the program)
Judge = Callable[[Item, str, Limits | None], tuple[str | None, str, str]]


@dataclass(frozen=True)
class Benchmark:
    name: str
    item: Callable[[object, int, str, Template], Item]  # (row, line, where, template)
    judge: Judge
    max_new_tokens: int
    stop: tuple[str, ...]
    raw_stop: tuple[str, ...] = ()  # for a text that continues the prompt, as with --raw
    runs_code: bool = False


def read_items(
    benchmark: Benchmark, path: str | Path, template: Template = ALPACA, limit: int | None = None
) -> list[Item]:
    """Read the first `limit` problems of a benchmark's file.

    template: raw asks for programs with the prompts published for base models. Raises InputError for a row that does
    not fit the benchmark, and for the second of two problems with the same name.
    """
    rows = islice(read_rows(path), limit)
    items = [benchmark.item(row, line, where, template) for line, where, row in rows]
    if not items:
        raise InputError(f"{path}: has no problems: give the file of --task {benchmark.name}")
    seen = set()
    for item in items:
        if item.name in seen:
            raise InputError(f"{path}, line {item.line}: the name {item.name} is there twice: remove one of them")
        seen.add(item.name)
    return items


def as_items(examples: list[Example]) -> list[Item]:
    """Return the examples as problems with their training prompts."""
    return [Item(str(e.line), e.line, e.prompt, e.response, e.kind, e.rendered, e.learned) for e in examples]


def _math_item(row: object, line: int, where: str, template: Template, ending: str = THINK) -> Item:
    example = example_from(row, line, where, template=replace(template, ending=ending))
    if example is None:
        raise InputError(f"{where}: a conversation without a reply, so without a solution: remove the row")
    if final_answer(example.response) is None:
        raise InputError(f"{where}: its solution has no final answer: give the file of this --task")
    return as_items([example])[0]


def _gsm8k_item(row: object, line: int, where: str, template: Template, ending: str = THINK) -> Item:
    item = _math_item(row, line, where, template, ending)
    if number(answer := final_answer(item.response)) is None:
        raise InputError(f"{where}: its answer {answer!r} is not a number: correct it, or give --task math")
    return item


def _human_eval_item(row: object, line: int, where: str, template: Template) -> Item:
    """Read a row of HumanEval or HumanEval+, which have the same columns."""
    task_id, prompt, entry_point, solution, test = _texts(row, HUMAN_EVAL, where)
    if row.get("plus_input") and max(map(repr, row["plus_input"]), key=len) not in test:
        mend = "give the converted file, evalplus/humanevalplus on the Hub, whose `test` has all of them"
        raise InputError(f"{where}: its plus_input is not in its test, so HumanEval+ would not be run: {mend}")
    request = f"Complete this Python function. Give the whole of it, in a code block.\n\n{prompt}"
    asked = prompt if template == RAW else ask(template, [{"role": "user", "content": request}], where)
    after = f"\n{test}\ncheck({entry_point})\n"
    return Item(task_id, line, asked, solution, before=prompt, after=after, defines=(entry_point,))


def _mbpp_item(row: object, line: int, where: str, template: Template) -> Item:
    """Read any published form: mbpp.jsonl; the sanitized one, with `prompt` and imports; MBPP+, with more tests."""
    has_text = isinstance(row, dict) and row.get("text") is not None
    text, code = _texts(row, ("text" if has_text else "prompt", "code"), where)
    tests, imports = (_list_of_texts(row, name, where) for name in ("test_list", "test_imports"))
    if not tests:
        raise InputError(f"{where}: has no test_list: give the file of --task mbpp")
    (more_tests,) = _texts(row, ("test",), where) if row.get("test") is not None else ("",)
    listed = "\n".join(tests)
    asked = MBPP_PROMPT.format(text=text) + listed
    asked = f"{asked}\n[BEGIN]\n" if template == RAW else ask(template, [{"role": "user", "content": asked}], where)
    before = "".join(f"{text}\n" for text in imports)
    after = f"\n{row.get('test_setup_code') or ''}\n{listed}\n{more_tests}\n"
    called = tuple(sorted(name for name in defined_names(code) if re.search(rf"\b{name}\b", listed)))
    name = str(line if row.get("task_id") is None else row["task_id"])
    return Item(name, line, asked, code, before=before, after=after, defines=called)


def _texts(row: object, names: tuple[str, ...], where: str) -> list[str]:
    missing = [name for name in names if not isinstance(row, dict) or not isinstance(row.get(name), str)]
    if missing:
        raise InputError(f"{where}: has no text in {', '.join(missing)}: give the file of this --task")
    return [row[name] for name in names]


def _list_of_texts(row: dict, name: str, where: str) -> list[str]:
    value = row.get(name) or []
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise InputError(f"{where}: {name} is not a list of texts: give the file of this --task")
    return value


def judge_answer(
    item: Item, completion: str, limits: Limits | None = None, same: Callable[[str, str], bool] = same_answer
) -> tuple[str | None, str, str]:
    """Compare the final answer of a completion, without its thoughts, with the final answer of the item's response."""
    answer, gold = final_answer(without_thoughts(completion)), final_answer(item.response)
    if answer is None or gold is None:
        return answer, "no answer", ""
    return answer, "right" if same(answer, gold) else "wrong", ""


def judge_rounded(item: Item, completion: str, limits: Limits | None = None) -> tuple[str | None, str, str]:
    """Judge as the scripts of BA-LoRA and PiSSA do: the first number after the last "The answer is: ", rounded.

    Like the scripts, reads 2520 in 2,520,000 and 10 in 10 - 4, and sees no answer without this marker.
    """
    _, marker, tail = without_thoughts(completion).rpartition("The answer is: ")
    match = re.search(r"[-+]?\d*[.,/]?\d+", tail.strip()) if marker else None
    numerator, _, denominator = match[0].replace(",", "").partition("/") if match else ("", "", "")
    if not numerator.strip("+-") or len(numerator + denominator) > 300:  # more digits are infinite in float64
        return None, "no answer", ""
    value = round(Fraction(numerator) / (Fraction(denominator or 1) or 1))  # n/0 counts as n
    return match[0], "right" if value == number(final_answer(item.response)) else "wrong", ""


def judge_program(item: Item, completion: str, limits: Limits) -> tuple[str, str, str]:
    """Run the completion's code with the problem's tests.

    The code follows the item's `before`. A completion with the whole function thus redefines the function that `before`
    begins, and can use the imports and helpers in `before`.
    """
    code = code_of(completion, item.defines, item.before)
    outcome = run_program(program_of(item.before, code, item.after), limits)
    return code, outcome.verdict, outcome.output[-2000:]


def as_generated(completion: str, benchmark: Benchmark, before: str = "") -> str:
    """Cut another program's completion where `evaluate` would have ended it: at a stop string or an end-of-text mark.

    Marks in front are left out. Those in thoughts, and in strings of programs, are text. The stop strings for a text
    that continues the prompt apply if the completion begins with indented code, which goes on from the item's `before`.
    """
    text = without_first_marks(completion)
    text = before_marks(text, benchmark.stop + END_MARKS, benchmark.runs_code)
    if text.lstrip("\r\n")[:1] not in (" ", "\t"):
        return text
    body = before_stop(text, benchmark.raw_stop)
    is_chat = CHAT.match(text) or FENCE.search(text)  # a chat model's text may begin with a space, too
    return text if is_chat and not continues(body, before) else body


def without_first_marks(completion: str) -> str:
    """Leave out the marks of a tokenizer, such as <s>, in front of a completion."""
    marks = FIRST_MARKS.match(completion)
    return completion[marks.end() :] if marks else completion


NEXT = ("### Instruction",)  # a base model that does not stop begins the next problem so
GSM8K = Benchmark("gsm8k", _gsm8k_item, partial(judge_answer, same=same_number), 512, NEXT)
BENCHMARKS = {
    "gsm8k": GSM8K,
    "math": Benchmark("math", _math_item, judge_answer, 1024, NEXT),
    "humaneval": Benchmark("humaneval", _human_eval_item, judge_program, 512, NEXT, HUMAN_EVAL_ENDS, runs_code=True),
    "mbpp": Benchmark("mbpp", _mbpp_item, judge_program, 512, (*NEXT, "[DONE]"), runs_code=True),
}
# GSM8K with or without THINK, and answers compared exactly or as published. github.com/llm172/BA-LoRA has both
# "rounded" protocols: inference/gsm8k_inference.py (steps), utils/gen_vllm.py with utils/test_acc.py (plain).
_PLAIN = partial(_gsm8k_item, ending="")
PROTOCOLS = {
    "steps-exact": GSM8K,
    "steps-rounded": replace(GSM8K, judge=judge_rounded, max_new_tokens=1024, stop=("Instruction", "Response")),
    "plain-exact": replace(GSM8K, item=_PLAIN),
    "plain-rounded": replace(GSM8K, item=_PLAIN, judge=judge_rounded, max_new_tokens=1024, stop=()),
}
