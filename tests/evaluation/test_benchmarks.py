"""Prompts and verdicts of the benchmarks: the files' solutions are right, and wrong ones are not."""

import gzip
import json

import pytest

from minibalora.checkpoints.template import ALPACA, RAW, Template
from minibalora.evaluation.benchmarks import (
    BENCHMARKS,
    MBPP_PROMPT,
    PROTOCOLS,
    RIGHT,
    THINK,
    as_generated,
    judge_rounded,
    read_items,
)
from minibalora.evaluation.sandbox import Limits, check_sandbox

GSM8K = [
    {"question": "A robe takes 2 bolts. How many take two?", "answer": "2 * 2 = <<2*2=4>>4 bolts.\n#### 4"},
    {"query": "What do ten cost?", "response": "1,050 each.\n#### 10,500\nThe answer is: 10,500", "type": "GSM_SV"},
]
MATH = [
    {
        "problem": "Solve 2x = 1.",
        "solution": r"Halve: $x = \boxed{\frac{1}{2}}$.",
        "level": "Level 1",
        "type": "Algebra",
    },
    {"problem": "Where is it?", "solution": r"In $\boxed{[0,\infty)}$."},
]
HUMAN_EVAL = [
    {
        "task_id": "HumanEval/0",
        "prompt": "from math import sqrt\n\ndef half(x):\n    return x / 2\n\n\n"
        'def root(x):\n    """Half of the root."""\n',
        "entry_point": "root",
        "canonical_solution": "    return half(sqrt(x))\n",
        "test": "\n\ndef check(candidate):\n    assert candidate(16) == 2\n    assert candidate(0) == 0\n",
    }
]
MBPP = [
    {
        "task_id": 11,
        "text": "Write a function to add a number to every one of a list.",
        "code": "def add(numbers, n):\r\n  return [m + n for m in numbers]",
        "test_setup_code": "seven = 7",
        "test_list": ["assert add([1], 2) == [3]", "assert add([], 1) == []", "assert add([0], seven) == [7]"],
        "challenge_test_list": [],
    },
    {  # the sanitized form
        "task_id": 12,
        "prompt": "Write a function to take a root.",
        "code": "def root(x):\n    return math.sqrt(x)",
        "test_imports": ["import math"],
        "test_list": ["assert math.isclose(root(2) ** 2, 2)"],
    },
]
ROWS = {"gsm8k": GSM8K, "math": MATH, "humaneval": HUMAN_EVAL, "mbpp": MBPP}


@pytest.fixture
def items(tmp_path):
    """items(task, rows) -> the problems read from a file of these rows."""

    def read(task: str, rows: list | None = None, template: Template = ALPACA):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in (ROWS[task] if rows is None else rows)))
        return read_items(BENCHMARKS[task], path, template)

    return read


def verdict(task: str, item, completion: str, seconds: float = 5) -> str:
    return BENCHMARKS[task].judge(item, completion, Limits(seconds=seconds))[1]


def test_mathematical_prompts_are_training_prompts_with_the_papers_ending(items):
    for task, question in [("gsm8k", GSM8K[0]["question"]), ("math", MATH[0]["problem"])]:
        prompt = items(task)[0].prompt
        assert prompt.startswith("Below is an instruction") and f"### Instruction:\n{question}\n\n" in prompt
        assert prompt.endswith("### Response:" + THINK)


@pytest.mark.parametrize("task", ["gsm8k", "math"])
def test_solutions_in_the_file_are_right(items, task):
    for item in items(task):
        assert BENCHMARKS[task].judge(item, item.response, None)[1] == "right"


@pytest.mark.parametrize(
    "task, index, completion, expected",
    [
        ("gsm8k", 0, "It takes 4.\nThe answer is: 4", "right"),
        ("gsm8k", 0, "The answer is: $4.00.", "right"),
        ("gsm8k", 0, "The answer is: 5", "wrong"),
        ("gsm8k", 0, "It takes 4.", "no answer"),
        ("gsm8k", 0, "", "no answer"),
        ("gsm8k", 1, "The answer is: 10500", "right"),
        ("gsm8k", 1, "The answer is: 10,50", "wrong"),
        ("math", 0, "The answer is: 0.5", "right"),
        ("math", 0, r"so \boxed{\dfrac12}", "right"),
        ("math", 0, "The answer is: 2", "wrong"),
        ("math", 1, r"The answer is: $[0, \infty)$", "right"),
        ("math", 1, r"The answer is: $(0, \infty)$", "wrong"),
    ],
)
def test_answers_are_judged(items, task, index, completion, expected):
    assert verdict(task, items(task)[index], completion) == expected


@pytest.mark.parametrize("task, right", [("gsm8k", "The answer is: 4"), ("math", "The answer is: 0.5")])
def test_a_draft_in_the_thoughts_does_not_count_as_an_answer(items, task, right):
    item = items(task)[0]
    for thoughts in ("<think>The answer is: 9</think>", "The answer is: 9</think>", "[THINK]The answer is: 9[/THINK]"):
        assert verdict(task, item, f"{thoughts}\n{right}") == "right"
        assert verdict(task, item, thoughts) == "no answer"
    assert verdict(task, item, f"<think>{right}") == "no answer"


@pytest.mark.parametrize("protocol, thinks, rounds", [
    ("steps-exact", True, False), ("steps-rounded", True, True),
    ("plain-exact", False, False), ("plain-rounded", False, True),
])  # fmt: skip
def test_protocols_of_gsm8k_differ_in_prompt_and_rounding(tmp_path, protocol, thinks, rounds):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GSM8K[0]))
    (item,) = read_items(PROTOCOLS[protocol], path)
    assert item.prompt.endswith("### Response:" + THINK * thinks)
    for completion, exact, rounded in [
        ("The answer is: 4", "right", "right"),
        ("The answer is: 3.6", "wrong", "right"),
        ("The answer is: 9/2", "wrong", "right"),  # 4.5, and Python rounds to even
        ("The answer is: 4 - 1 = 3", "wrong", "right"),
        ("#### 4", "right", "no answer"),
        ("<think>The answer is: 3</think>The answer is: 4", "right", "right"),
    ]:
        verdict = PROTOCOLS[protocol].judge(item, completion, None)[1]
        assert verdict == (rounded if rounds else exact), completion


@pytest.mark.parametrize("answer, verdict", [
    ("4,000", "wrong"), ("-4", "wrong"), ("$4.", "right"), (".4e1", "wrong"), ("4/0", "right"), ("/4", "no answer"),
    ("-/4", "no answer"), ("four", "no answer"), ("", "no answer"), ("4" * 5000, "no answer"),
])  # fmt: skip
def test_rounded_protocols_read_as_the_published_scripts(items, answer, verdict):
    assert judge_rounded(items("gsm8k")[0], f"The answer is: {answer}")[1] == verdict


@pytest.mark.parametrize("task, completion, kept", [
    ("gsm8k", "It is 4. The answer is: 4\n\n### Instruction:\nNext?", "It is 4. The answer is: 4\n\n"),
    ("math", "The answer is: 4</s><s>The answer is: 5", "The answer is: 4"),
    ("gsm8k", "4<|eot_id|><|start_header_id|>", "4"),
    ("gsm8k", "4<end_of_turn>\n", "4"),
    ("gsm8k", "4<|im_end|>\n<|endoftext|>", "4"),
    ("mbpp", "x = 1\n[DONE]\nmore", "x = 1\n"),
    ("humaneval", "    return 1\n\ndef other():\n    pass", "    return 1\n"),
    ("humaneval", "\n    return 1\n# Test\n", "\n    return 1"),
    ("humaneval", "import re\n\ndef root(x):\n    return 1\n", "import re\n\ndef root(x):\n    return 1\n"),
    ("humaneval", "def root(x):\n    return 1\n<|endoftext|>import", "def root(x):\n    return 1\n"),
    ("humaneval", "    return 1\nThis is it.\n\n# Use\n```python\nroot(1)\n```", "    return 1\nThis is it.\n"),
    ("gsm8k", "4<|im_end|>\n<think>5</think>The answer is: 5", "4"),
    ("mbpp", "```python\nx = 1<|im_end|>\n<|im_start|>user\nWrong:\n```\nx = 1\n```", "```python\nx = 1"),
    ("mbpp", "x = 1\n### Instruction:\n[DONE]", "x = 1\n"),
])  # fmt: skip
def test_completions_from_a_file_end_where_a_generated_one_would(task, completion, kept):
    assert as_generated(completion, BENCHMARKS[task], "def root(x):\n") == kept


@pytest.mark.parametrize("task, completion, end", [
    ("gsm8k", "<think>The ### Instruction asks.</think>The answer is: 4", ""),
    ("gsm8k", "It ends with </s>.</think>The answer is: 4", "</s>"),
    ("humaneval", "<think>After <|im_end|>.</think>\n```python\nx = 1\n```", "<|im_end|>"),
    ("humaneval", "```python\ndef root(x):\n    end = '</s>'\n    return 1\n```", "</s>"),
    ("humaneval", "def root(x):\n    \"\"\"### Instruction\"\"\"\n    return 1\n", "<|eot_id|>"),
    ("humaneval", "    '''</s>\n    '''\n    return 1\n", "</s>"),
    ("mbpp", "Sure:\n```python\ndef root(x):\n    '''[DONE]'''\n    return 1\n```\n", "[DONE]\nmore"),
])  # fmt: skip
def test_marks_in_thoughts_and_strings_are_text(task, completion, end):
    assert as_generated(completion + end, BENCHMARKS[task]) == completion


@pytest.mark.parametrize("task, mark", [
    ("humaneval", "<|endoftext|>"), ("mbpp", "<s>"), ("mbpp", "[DONE]\n"), ("gsm8k", "</s>\n<|begin_of_text|>"),
])  # fmt: skip
def test_marks_in_front_end_nothing(task, mark):
    assert as_generated(f"{mark}x = 1</s>", BENCHMARKS[task]).strip() == "x = 1"


@pytest.mark.parametrize("completion", [
    " Sure! Here it is:\n\n```python\nimport re\n\ndef root(x):\n    return 1\n```\n", "\tSo:\n```\ndef root(x):\n",
    " <think>No.\n# Yes.</think>\n\n```python\n\ndef root(x):\n    return 1\n```", " import re\n\ndef root(x):\n",
    " Here it is:\n\ndef root(x):\n    return 1\n",
])  # fmt: skip
def test_a_space_in_front_of_a_chat_answer_does_not_make_it_code(completion):
    assert as_generated(completion, BENCHMARKS["humaneval"], "def root(x):\n    '''Root.'''\n") == completion


# Programs.


@pytest.fixture(scope="module")
def sandbox():
    try:
        check_sandbox()
    except ValueError as error:
        pytest.skip(str(error))


def test_prompts_for_code_are_in_the_template_or_as_published(items):
    (item,) = items("humaneval")
    assert HUMAN_EVAL[0]["prompt"] in item.prompt and item.prompt.endswith("### Response:")
    (item,) = items("humaneval", template=RAW)
    assert item.prompt == HUMAN_EVAL[0]["prompt"]
    raw = items("mbpp", template=RAW)[0].prompt
    assert raw == MBPP_PROMPT.format(text=MBPP[0]["text"]) + "\n".join(MBPP[0]["test_list"]) + "\n[BEGIN]\n"
    assert raw.removesuffix("\n[BEGIN]\n") in items("mbpp")[0].prompt


@pytest.mark.parametrize("task", ["humaneval", "mbpp"])
def test_code_in_the_file_passes(items, task, sandbox):
    for item in items(task):
        assert verdict(task, item, item.response) == "passed"


WHOLE = "def root(x):\n    return half(sqrt(x))\n"


@pytest.mark.parametrize(
    "completion, expected",
    [
        ("    return half(sqrt(x))", "passed"),
        (WHOLE, "passed"),
        (f"Here you are:\n\n```python\n{WHOLE}```\nIt halves the root.", "passed"),
        (f"```\n{WHOLE}", "passed"),  # never closed
        (f"```python\r\n{WHOLE}```", "passed"),
        (f"{WHOLE}\nassert root(16) == 5\n", "passed"),  # the model's own tests do not count
        (f'{WHOLE}\nif __name__ == "__main__":\n    print(root(input()))\n', "passed"),
        ("    return sqrt(x)", "failed"),
        ("    return half(sqrt(x)", "failed"),
        ("", "failed"),
        ("    import sys; sys.exit(0)", "failed"),
        ("    while True: pass", "timed out"),
    ],
)
def test_programs_are_judged_by_the_tests(items, completion, expected, sandbox):
    (item,) = items("humaneval")
    assert BENCHMARKS["humaneval"].judge(item, completion, Limits(seconds=1))[1] == expected


def test_mbpp_plus_runs_both_columns_of_tests(items, sandbox, refuses):
    more = "import math\nfor inp, exp in zip([[[1, 2], 1]], [[2, 3]]):\n    assert add(*inp) == exp\n"
    plus = {"prompt": "Add.", "test_imports": [], "test": more} | {key: MBPP[0][key] for key in ("code", "test_list")}
    (item,) = items("mbpp", [plus | {"test_list": ["assert add([1], 2) == [3]"]}])
    assert verdict("mbpp", item, item.response) == "passed"
    assert verdict("mbpp", item, "def add(numbers, n):\n    return [m + n for m in numbers[:1]]") == "failed"
    refuses(lambda: items("mbpp", [MBPP[0] | {"test": 3}]), "line 1", "test")


def test_large_tests_of_human_eval_plus_are_run(items, sandbox):
    inputs = "inputs = " + repr([[16.0]] * 150_000)  # 1.3 MB
    test = f"def check(candidate):\n    {inputs}\n    for x in inputs[:9]:\n        assert candidate(*x) == 2\n"
    (item,) = items("humaneval", [HUMAN_EVAL[0] | {"test": test}])
    assert verdict("humaneval", item, WHOLE, seconds=60) == "passed"  # 5 are too few on a busy machine
    assert verdict("humaneval", item, "    return x", seconds=60) == "failed"


def test_tests_of_human_eval_plus_that_would_not_be_run_are_refused(items, refuses):
    row = HUMAN_EVAL[0] | {"base_input": [[16]], "plus_input": [[1], [-400]]}
    refuses(lambda: items("humaneval", [row]), "line 1", "plus_input", "evalplus/humanevalplus")
    assert items("humaneval", [row | {"test": "inputs = [[16], [1], [-400]]\n" + row["test"]}])


def test_setup_and_imports_of_mbpp_are_run(items, sandbox):
    first, second = items("mbpp")
    assert verdict("mbpp", first, "def add(numbers, n):\n    return numbers") == "failed"
    assert verdict("mbpp", second, "def root(x):\n    return x") == "failed"


# Files.


@pytest.mark.parametrize("task", ROWS)
def test_a_file_of_another_task_is_refused(items, refuses, task):
    for other, rows in ROWS.items():
        if other != task and (task, other) != ("math", "gsm8k"):  # GSM8K's answers are valid for MATH
            refuses(lambda rows=rows: items(task, rows), "rows.jsonl, line")


@pytest.mark.parametrize("task", ROWS)
@pytest.mark.parametrize("rows", [[], [7], [{}], [{"question": "q", "answer": 3}], [[]]])
def test_rows_without_a_problem_are_refused(items, refuses, task, rows):
    refuses(lambda: items(task, rows), "rows.jsonl")


@pytest.mark.parametrize("change", [{"test_list": "assert"}, {"test_list": []}, {"test_list": [1]}, {"code": None}])
def test_damaged_rows_of_mbpp_are_refused_by_their_line(items, refuses, change):
    refuses(lambda: items("mbpp", [MBPP[0], MBPP[1] | change]), "line 2")


def test_a_null_counts_as_absent_in_mbpp(items):
    (item,) = items("mbpp", [MBPP[1] | {"text": None, "task_id": None}])
    assert item.name == "1" and MBPP[1]["prompt"] in item.prompt


@pytest.mark.parametrize("task", ["gsm8k", "math"])
def test_a_conversation_without_a_reply_is_refused_by_its_line(items, refuses, task):
    unanswered = {"messages": [{"role": "user", "content": "q"}]}
    refuses(lambda: items(task, [*ROWS[task], unanswered]), "line 3", "without a reply")


def test_an_answer_without_a_number_is_refused(items, refuses):
    refuses(lambda: items("gsm8k", [GSM8K[0], {"question": "q", "answer": "#### many"}]), "line 2", "'many'")
    refuses(lambda: items("math", [{"problem": "q", "solution": "2"}]), "line 1", "no final answer")


def test_a_duplicate_problem_is_refused(items, refuses):
    refuses(lambda: items("mbpp", [MBPP[0], MBPP[0]]), "line 2", "11 is there twice")


def test_compressed_files_and_arrays_are_read(tmp_path, refuses):
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in MBPP))
    (tmp_path / "rows.json").write_text(json.dumps(MBPP))
    mbpp = BENCHMARKS["mbpp"]
    assert read_items(mbpp, tmp_path / "rows.jsonl.gz") == read_items(mbpp, tmp_path / "rows.json")[:2]
    assert len(read_items(mbpp, tmp_path / "rows.json", limit=1)) == 1
    whole = (tmp_path / "rows.jsonl.gz").read_bytes()
    for damaged in (whole[:-20], b"no gzip", whole[:30] + b"\xff" * 30 + whole[60:]):
        (tmp_path / "rows.jsonl.gz").write_bytes(damaged)
        refuses(lambda: read_items(mbpp, tmp_path / "rows.jsonl.gz"), "rows.jsonl.gz")


def test_right_verdicts_are_right_and_passed():
    assert RIGHT == ("right", "passed")
