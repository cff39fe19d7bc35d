"""The code in a completion, however a model wraps it."""

import pytest

from minibalora.evaluation.programs import code_of, defined_names, program_of, without_thoughts

BEFORE = 'from typing import List\n\n\ndef twice(xs: List[int]) -> List[int]:\n    """Double all."""\n'
BODY = "    return [2 * x for x in xs]\n"
WHOLE = "def twice(xs):\n" + BODY
TYPED = f"def twice(xs: List[int]) -> List[int]:\n{BODY}"
TEST = "assert twice([1, 2]) == [2, 4]\n"
F = "```"
PY = f"{F}python\n"


def indented(text: str, by: str) -> str:
    return "".join(by + line for line in text.splitlines(keepends=True))


def runs(completion: str, before: str = BEFORE) -> bool:
    source = program_of(before, code_of(completion, ("twice",), before), TEST)
    try:
        exec(compile(source, "program", "exec"), {"__name__": "program"})
    except Exception:
        return False
    return True


WRAPPED = {
    "nothing": WHOLE,
    "python": f"{PY}{WHOLE}{F}",
    "python3": f"Sure:\n{F}python3\n{WHOLE}{F}\nDone.",
    "MBPP's tags": f"[BEGIN]\n{WHOLE}[DONE]\nYou are an expert",
    "Code Llama's tags": f"Sure.\n[PYTHON]\n{WHOLE}[/PYTHON]\nDone.",
    "no language": f"{F}\n{WHOLE}{F}",
    "upper case": f"{F}Python\n{WHOLE}{F}",
    "attributes": f"{F}{{.python .numberLines}}\n{WHOLE}{F}",
    "a title": f'{F}python title="a.py" {{1-2}}\n{WHOLE}{F}',
    "R Markdown": f"{F}{{python}}\n{WHOLE}{F}",
    "tildes": f"~~~python\n{WHOLE}~~~\n",
    "more tildes": f"~~~~ {{.python}}\n{WHOLE}~~~~\nAbout ~~~ 2.",
    "four backticks": f"{F}`python\n{WHOLE}{F}`\n",
    "an indented fence": f"1. Do:\n\n{indented(f'{PY}{WHOLE}{F}{chr(10)}', '   ')}   Done.\n",
    "a tab": indented(f"{PY}{WHOLE}{F}\n", "\t"),
    "a bullet": f"- {PY}{indented(WHOLE + F, '  ')}\n",
    "a fence after prose": f"Here: {PY}{WHOLE}{F}",
    "only a closing fence": f"{WHOLE}{F}\nThis doubles each.",
    "a closing fence after code": f"{WHOLE.rstrip()}{F}\nThis doubles each.",
    "a closing fence, then usage": f"{WHOLE}{F}\nUsage:\n{PY}print(twice([1]))\n{F}",
    "no closing fence": f"Sure!\n{PY}{WHOLE}",
    "no closing fence before a new one": f"{PY}{WHOLE}\nUsage:\n{PY}print(1)\n{F}",
    "CRLF": f"{PY}{WHOLE}{F}\n".replace("\n", "\r\n"),
    "a docstring with fences": f"{PY}def twice(xs):\n    '''\n    {F}\n    twice([1])\n    {F}\n    '''\n{BODY}{F}",
    "fences in a docstring alone": f"def twice(xs):\n    '''x\n{PY}twice([1])\n{F}\n    '''\n{BODY}",
    "shell first": f"{F}bash\npip install typing\n{F}\n{PY}{WHOLE}{F}",
    "a shell command that is Python": f"{F}\nls\n{F}\n{PY}{WHOLE}{F}",
    "output first": f"{F}text\n[2, 4]\n{F}\n{PY}{WHOLE}{F}",
    "usage first": f"{PY}print(twice([1]))\n{F}\n{PY}{WHOLE}{F}",
    "usage in a variable": f"{PY}result = twice([1])\n{F}\n{PY}{WHOLE}{F}",
    "doctest first": f"{F}\n>>> twice([1])\n[2]\n{F}\n{PY}{WHOLE}{F}",
    "two blocks": f"{PY}from typing import List\n{F}\nand\n{PY}{TYPED}{F}",
    "a helper after it": f"{PY}def twice(xs):\n    return list(map(d, xs))\n{F}\n{PY}def d(x):\n    return 2 * x\n{F}",
    "a correction": f"{PY}def twice(xs):\n    return xs\n{F}\nNo:\n{PY}{WHOLE}{F}",
    "a second one cut off": f"{PY}{WHOLE}{F}\nOr:\n{PY}def twice(xs):\n    return [2 *",
    "wrong tests of its own": f"{PY}{WHOLE}{F}\n{PY}assert twice([1]) == [3]\n{F}",
    "a main": f"{PY}{WHOLE}\nif __name__ == '__main__':\n    print(input())\n{F}",
    "a main in brackets": f"{PY}{WHOLE}\nif (__name__ == '__main__'):\n    assert False\n{F}",
    "a main that is called": f"{PY}import sys\n{WHOLE}\ndef main():\n    print(input())\n\nmain()\nsys.exit(0)\n{F}",
    "tests before it": f"{PY}# Example usage: twice([1])\nassert True\n{WHOLE}{F}",
    "wrong tests in a function": f"{PY}{WHOLE}\ndef test():\n    assert twice([1]) == [3]\n\ntest()\n{F}",
    "wrong tests in a loop": f"{PY}{WHOLE}\ncases = [1]\nfor x in cases:\n    assert twice(x) == 3\n{F}",
    "unittest": f"{PY}import unittest\n{WHOLE}\nclass T(unittest.TestCase):\n    pass\n\nunittest.main()\n{F}",
    "a script that reads": f"{PY}{WHOLE}\nn = int(input())\nm = n + 1\nprint(twice([m]))\n{F}",
    "usage that imports it": f"{PY}{WHOLE}{F}\n{PY}from solution import twice\nprint(twice([1]))\n{F}",
    "a table behind it": f"{PY}def twice(xs):\n    return [T[x] for x in xs]\n\nT = {{1: 2, 2: 4}}\n{F}",
    "a table in a block": f"{PY}T = {{}}\nfor i in range(9):\n    T[i] = 2 * i\n{F}\n"
    f"{PY}def twice(xs):\n    return [T[x] for x in xs]\n{F}",
    "a table that a call fills": f"{PY}T = {{}}\ndef twice(xs):\n    return [T[x] for x in xs]\n\n"
    f"def fill():\n    T.update({{1: 2, 2: 4}})\n\nfill()\n{F}",
    "a deep recursion": f"{PY}import sys\ndef deep(n):\n    return n and deep(n - 1)\n\ndef twice(xs):\n"
    f"    deep(2000)\n{BODY}\nsys.setrecursionlimit(5000)\n{F}",
    "a text with an assert": f"{PY}T = '''\nassert x\n'''\n{WHOLE}{F}",
    "prose in lower case": f"here it is:\n\n{WHOLE}\nthis doubles each.\n`twice` is short.\n1. It takes a list.\n",
    "tags": f"<answer>\n{WHOLE}</answer>",
    "a lambda": f"{PY}twice = lambda xs: [2 * x for x in xs]\n{F}",
    "prose around it": f"Here is the function:\n\n{WHOLE}\nIt takes 1 list.\n\nIt returns another.\n",
    "a future import": f"{PY}from __future__ import annotations\n\n{WHOLE}{F}",
    "a future import in brackets": f"{PY}from __future__ import (\n    annotations,\n)\n{WHOLE}{F}",
    "a stub after it": f"{PY}{WHOLE}{F}\nThe template:\n{PY}def twice(xs):\n    '''Double.'''\n    ...\n{F}",
    "a stub with imports": f"{PY}from typing import List\ndef twice(xs):\n    pass\n{F}\n{PY}{TYPED}{F}",
    "a space before it": f" {TYPED}\nThis doubles each.\n",
    "a language without its fence": f"python\n{WHOLE}",
    "a question before it": f"{PY}n, m = map(int, input().split())\nk = n + m\n{WHOLE}print(twice([k]))\n{F}",
    "its own input": f"{PY}input = lambda: 2\nn = input()\ndef twice(xs):\n    return [n * x for x in xs]\n{F}",
    "an attribute": f"{PY}def twice(xs):\n    return [twice.n * x for x in xs]\n\ntwice.n = 2\ntwice.m = twice(3)\n{F}",
    "a draft in thoughts": f"<think>\n{PY}def twice(xs):\n    return xs * 2\n{F}\nNo.\n</think>\n\n{PY}{WHOLE}{F}",
    "thoughts that the prompt began": f"Try {PY}def twice(xs): return xs\n{F}</think>\n{PY}{WHOLE}{F}",
}


@pytest.mark.parametrize("wrapping", WRAPPED)
@pytest.mark.parametrize("before", [BEFORE, "from typing import List\n"])
def test_the_code_is_extracted_from_any_wrapping(wrapping, before):
    assert runs(WRAPPED[wrapping], before)


@pytest.mark.parametrize("completion", [
    BODY, f"\n{BODY}", f"{BODY}{F}\nDone.", f"{PY}{BODY}{F}", f"{F}bash\npip install x\n{F}\n{PY}{BODY}{F}",
    f"<think>x</think>{BODY}",
])  # fmt: skip
def test_a_body_continues_the_prompt(completion):
    assert runs(completion)


@pytest.mark.parametrize("completion", [
    "", f"<think>{PY}{WHOLE}{F}", f"{PY}{WHOLE}    (\n{F}", f"{PY}def other(xs):\n{BODY}{F}",
    f"{PY}class Solution:\n{indented(WHOLE, '    ')}{F}",
    f"{PY}{WHOLE}{F}\n{PY}def twice(xs):\n    return xs\n{F}", f"{PY}def twice(xs):\n    pass\n{F}",
    f"{PY}{WHOLE}\ntwice = None\n{F}",
    "def twice(xs):\n    return [2 * x for x in xs\n",
])  # fmt: skip
def test_wrong_code_does_not_become_right(completion):
    assert not runs(completion)


def test_pieces_without_a_name_to_look_for():
    assert code_of("no block") == "no block"
    assert code_of(f"a\n{F}py\nx = 1\n{F}\n{PY}y = 2\n{F}") == "x = 1\n"
    assert code_of("x = 1\n# Example usage:\nprint(x)") == "x = 1\n"
    assert code_of("def f():\n    assert True\n") == "def f():\n    assert True\n"


def test_thoughts_are_removed_wherever_they_begin_and_end():
    assert without_thoughts("<think>a</think>b") == "b" == without_thoughts("a</think>b")
    assert without_thoughts("b<think>a") == "b" == without_thoughts("<thinking>a</thinking>b<think></think>")
    assert without_thoughts("<think>a<think>b</think>c</think>d") == "d"
    assert without_thoughts("1 < 2 and think") == "1 < 2 and think"
    for tag in ("think", "thoughts", "reasoning", "seed:think"):
        assert without_thoughts(f"<{tag}>a</{tag}>b") == "b" == without_thoughts(f"a</{tag}>b")
    assert without_thoughts("◁think▷a◁/think▷b") == "b"


def test_names_come_from_the_top_level():
    code = "import re\nA = 1\nclass B:\n    def c(self): pass\nasync def d():\n    e = 1\n"
    assert defined_names(code) == {"A", "B", "d"} == defined_names(code.replace("A = 1\n", "")) | {"A"}
    assert defined_names("def f(:\n") == {"f"}
