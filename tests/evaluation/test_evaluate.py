"""Evaluations as a user runs them: files, output, and continuing a stopped evaluation."""

import json
import re
from functools import partial

import pytest
from helpers import stretch

import minibalora as mb
from minibalora.data.prompts import example_from
from minibalora.evaluation import evaluate, records
from minibalora.evaluation.benchmarks import Item
from minibalora.evaluation.sandbox import check_sandbox
from minibalora.toy import MODEL
from minibalora.toy.problems import clean_problems

PROBLEMS = clean_problems(12, seed=5)
EXAMPLES = [example_from(row, line) for line, row in enumerate(PROBLEMS, start=1)]
ADD = {
    "task_id": 1,
    "text": "Add.",
    "code": "def add(a, b):\n    return a + b\n",
    "test_list": ["assert add(1, 2) == 3"],
}
NEGATE = ADD | {"task_id": 2, "code": "def negate(a):\n    return -a\n", "test_list": ["assert negate(1) == -1"]}


@pytest.fixture
def run(in_command):
    """run(*flags) -> status, standard output, standard error of python -m minibalora evaluate."""
    return partial(in_command, evaluate.main)


@pytest.fixture
def problems(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PROBLEMS))
    return path


@pytest.fixture
def programs(tmp_path):
    try:
        check_sandbox()
    except ValueError as error:
        pytest.skip(str(error))
    path = tmp_path / "mbpp.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (ADD, NEGATE)))
    return path


def records_of(out) -> list[dict]:
    return [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]


# The command.


def test_an_evaluation_writes_every_answer_and_prints_its_result_in_a_line(run, problems, tmp_path):
    flags = ("--task", "gsm8k", "--data", problems, "--out", tmp_path / "out", "--max-new-tokens", 60)
    status, out, error = run(*flags)
    assert status == 0, error
    (line,) = out.splitlines()
    records = records_of(tmp_path / "out")
    right = sum(record["verdict"] == "right" for record in records)
    assert line.startswith(f"gsm8k: pass@1 {100 * right / 12:.1f} % (95 % Wilson interval ")
    assert sorted(int(record["item"]) for record in records) == list(range(1, 13))
    for record in records:
        assert record["prompt"].endswith("Let's think step by step.")
        assert record["reference"] == PROBLEMS[int(record["item"]) - 1]["response"]
        assert record["verdict"] in ("right", "wrong", "no answer")
        assert (record["answer"] is None) == (record["verdict"] == "no answer")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["problems"] == 12 and summary["pass@1"]["share"] == right / 12
    settings = json.loads((tmp_path / "out" / "run.json").read_text())["settings"]
    assert settings["task"] == "gsm8k" and len(settings["model_digest"]) == len(settings["data_digest"]) == 64


def test_a_stopped_evaluation_is_continued(run, problems, tmp_path, monkeypatch):
    flags = ("--task", "gsm8k", "--data", problems, "--max-new-tokens", 60, "--temperature", 1, "--batch-size", 3)
    assert run(*flags, "--out", tmp_path / "whole")[0] == 0
    assert run(*flags, "--out", tmp_path / "out")[0] == 0
    path = tmp_path / "out" / "records.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:5]) + lines[5][:40])  # killed while writing
    asked = []
    generate_each = records.generate_each
    monkeypatch.setattr(
        records,
        "generate_each",
        lambda model, tok, prompts, *rest: asked.extend(prompts) or generate_each(model, tok, prompts, *rest),
    )
    assert run(*flags[:-2], "--batch-size", 4, "--out", tmp_path / "out")[0] == 0
    assert len(asked) == 7

    def by_item(name):
        return sorted(records_of(tmp_path / name), key=lambda record: int(record["item"]))

    assert by_item("out") == by_item("whole")  # random numbers belong to the item
    assert run(*flags, "--out", tmp_path / "out")[0] == 0 and len(asked) == 7  # complete, so nothing is asked


def test_a_folder_of_another_run_is_refused_and_left_alone(run, problems, tmp_path):
    flags = ("--task", "gsm8k", "--data", problems, "--gold")
    assert run(*flags, "--out", tmp_path / "out")[0] == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for change, word in [
        (("--task", "math", "--data", problems, "--gold"), "--task is math"),
        ((*flags, "--max-rows", 3), "--max-rows is 3"),
        (flags[:-1], "--gold is False"),
    ]:
        status, _, error = run(*change, "--out", tmp_path / "out")
        assert status == 2 and word in error and len(error.splitlines()) == 1
    problems.write_text(problems.read_text() + json.dumps(PROBLEMS[0]) + "\n")
    status, _, error = run(*flags, "--out", tmp_path / "out")
    assert status == 2 and "data_digest" in error
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "log.jsonl").write_text("a run's\n")
    assert run(*flags, "--out", tmp_path / "other")[0] == 2


def test_gold_answers_are_all_right(run, problems, programs, tmp_path):
    for task, path, allowed in [
        ("gsm8k", problems, ()),
        ("math", problems, ()),
        ("mbpp", programs, ("--allow-code-execution",)),
    ]:
        status, out, _ = run("--task", task, "--data", path, "--gold", "--out", tmp_path / task, *allowed)
        assert status == 0 and out.startswith(f"{task}: pass@1 100.0 %")


@pytest.mark.parametrize("flags, stops, more", [
    ((), {"### Instruction", "[DONE]"}, 512), (("--raw",), {"### Instruction", "[DONE]"}, 512),
    (("--max-new-tokens", 7), {"### Instruction", "[DONE]"}, 7),
])  # fmt: skip
def test_programs_end_at_the_tasks_stops(run, programs, tmp_path, monkeypatch, flags, stops, more):
    decodings = []

    def by_model(model, tok, decoding, batch_size, desc):
        decodings.append(decoding)
        return records.by_list([ADD["code"], NEGATE["code"]])

    monkeypatch.setattr(records, "by_model", by_model)
    status, out, error = run(
        "--task", "mbpp", "--data", programs, "--allow-code-execution", "--out", tmp_path / "out", *flags
    )
    assert status == 0 and "2 passed" in out, error
    assert (set(decodings[0].stop), decodings[0].max_new_tokens) == (stops, more)


def test_completions_from_a_file_are_judged_and_pass_at_k_is_unbiased(run, programs, tmp_path):
    rows = [{"task_id": 1, "completion": code} for code in (ADD["code"], "x", ADD["code"], "x")]
    rows += [{"task_id": 2, "completion": code} for code in ("x", "x", NEGATE["code"], "x")]
    path = tmp_path / "completions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--task", "mbpp", "--data", programs, "--completions", path, "--allow-code-execution", "--samples", 4)
    status, out, error = run(*flags, "--k", 1, 2, "--out", tmp_path / "out")
    assert status == 0, error
    shares = [float(share) for share in re.findall(r"pass@\d ([0-9.]+) %", out)]
    assert shares == [37.5, pytest.approx(100 * ((1 - 1 / 6) + (1 - 3 / 6)) / 2, abs=0.05)]
    assert "2 problems x 4 samples: 5 failed, 3 passed" in out and out.startswith("0 of 8 completions cut")
    status, _, error = run(*flags[:-1], 3, "--out", tmp_path / "other")
    assert status == 2 and "4 completions of problem 1, not 3" in error
    path.write_text(json.dumps({"completion": 3}))
    status, _, error = run(*flags, "--out", tmp_path / "other")
    assert status == 2 and "completions.jsonl, line 1" in error and not (tmp_path / "other").exists()
    path.write_text(json.dumps({"completion": "x", "task_id": 7}))
    status, _, error = run(*flags, "--out", tmp_path / "other")
    assert status == 2 and "problem 7, which" in error


def test_completions_from_a_file_are_cut_and_judged_by_the_protocol(run, problems, tmp_path):
    path = tmp_path / "completions.jsonl"
    answers = [row["response"].rpartition("The answer is: ")[2] for row in PROBLEMS]
    rows = [{"completion": f"The answer is: {answer}.2</s>The answer is: 9999"} for answer in answers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--task", "gsm8k", "--data", problems, "--completions", path)
    for protocol, verdict in [("steps-exact", "wrong"), ("plain-rounded", "right")]:
        status, out, error = run(*flags, "--protocol", protocol, "--out", tmp_path / protocol)
        assert status == 0, error
        assert out.startswith("12 of 12 completions cut") and f"12 {verdict}" in out
    status, _, error = run(*flags, "--protocol", "plain-rounded", "--out", tmp_path / "steps-exact")
    assert status == 2 and "--protocol is plain-rounded" in error


def test_completions_of_other_questions_are_not_judged_by_their_place(run, problems, tmp_path):
    path = tmp_path / "completions.jsonl"
    rows = [{"question": row["query"], "completion": row["response"]} for row in PROBLEMS]
    flags = ("--task", "gsm8k", "--data", problems, "--completions", path)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, out, error = run(*flags, "--out", tmp_path / "right")
    assert status == 0 and "12 right" in out, error
    path.write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    status, _, error = run(*flags, "--out", tmp_path / "wrong")
    assert status == 2 and "completions.jsonl, line 1: asks another question than problem 1" in error


def completions(*changes: dict) -> list[str]:
    """Return a right completion of each problem in order, with the changes to the rows, as lines."""
    rows = [{"completion": row["response"]} for row in PROBLEMS]
    return [json.dumps(row | change) + "\n" for row, change in zip(rows, changes, strict=True)]


@pytest.mark.parametrize("fields", [
    lambda text: {"input": text}, lambda text: {"prompt": [{"role": "user", "content": text}]},
    lambda text: {"messages": [{"from": "human", "value": text}, {"from": "gpt", "value": "7"}], "input": "7"},
])  # fmt: skip
def test_a_conversation_tells_its_problem_by_its_last_question(run, problems, tmp_path, fields):
    path = tmp_path / "completions.jsonl"
    lines = completions(*(fields(row["query"]) for row in PROBLEMS))
    path.write_text("".join(lines))
    flags = ("--task", "gsm8k", "--data", problems, "--completions", path)
    status, out, error = run(*flags, "--out", tmp_path / "right")
    assert status == 0 and "12 right" in out, error
    path.write_text("".join(lines[::-1]))
    status, _, error = run(*flags, "--out", tmp_path / "wrong")
    assert status == 2 and "line 1: asks another question than problem 1" in error


@pytest.mark.parametrize("field", ["question_id", "problem_id"])
def test_ids_name_problems_that_have_a_name(tmp_path, field, refuses):
    items = [Item(f"HumanEval/{index}", index + 1, "", "") for index in range(2)]
    path = tmp_path / "completions.jsonl"

    def read(ids: list) -> list[str]:
        path.write_text("".join(json.dumps({field: given, "completion": str(given)}) + "\n" for given in ids))
        return evaluate.read_completions(path, "data", items, 1)

    assert read(["HumanEval/1", "HumanEval/0"]) == ["HumanEval/0", "HumanEval/1"]
    assert read(["9f", "3a"]) == ["9f", "3a"]
    refuses(lambda: read([1, 0]), "line 2", f"{field} is 0, out of order")


@pytest.mark.parametrize("row, words", [
    ({"task_id": 1, "solution": "x"}, "rename the one of its fields (task_id, solution)"),
    ({"doc_id": 0, "resps": [["x"]]}, "(doc_id, resps) that has it"),
    ({"completion": ["x", "y"]}, "give each sample its own row"), ([["x"]], "a JSON list: give an object"),
    ({"task_id": 0, "completion": "x"}, "problems.jsonl does not have: it has 1 to 12"),
])  # fmt: skip
def test_rows_of_other_programs_are_refused_with_what_to_rename(run, problems, tmp_path, row, words):
    path = tmp_path / "completions.jsonl"
    path.write_text(json.dumps(row) + "\n")
    flags = ("--task", "gsm8k", "--data", problems, "--completions", path, "--out", tmp_path / "out")
    status, _, error = run(*flags)
    assert status == 2 and "completions.jsonl, " in error and words in error and len(error.splitlines()) == 1, error


@pytest.mark.parametrize("protocol, forms", [("steps-exact", "boxed"), ("plain-rounded", '18" is one')])
def test_answers_without_the_mark_are_pointed_out(run, problems, tmp_path, protocol, forms):
    path = tmp_path / "completions.jsonl"
    path.write_text("".join(completions(*[{"completion": "The answer is 18."}] * 12)))
    flags = ("--task", "gsm8k", "--data", problems, "--completions", path, "--protocol", protocol)
    status, out, error = run(*flags, "--out", tmp_path / "out")
    assert status == 0 and "12 no answer" in out
    assert "12 of 12 texts have no answer" in error and forms in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("field", ["idx", "index", "id", "doc_id", "question_id", "problem_id"])
@pytest.mark.parametrize("start", [0, 1, "0"])
def test_rows_that_number_their_problems_are_taken_in_order_only(run, problems, tmp_path, field, start):
    path, form = tmp_path / "completions.jsonl", type(start)
    lines = completions(*({field: form(number)} for number in range(int(start), int(start) + 12)))
    flags = ("--task", "gsm8k", "--data", problems, "--completions", path)
    path.write_text("".join(lines))
    status, out, error = run(*flags, "--out", tmp_path / "right")
    assert status == 0 and "12 right" in out, error
    for order in (lines[::-1], [*lines[:3], *lines[4:], lines[-1]]):  # the second: a row is missing, one is there twice
        path.write_text("".join(order))
        status, _, error = run(*flags, "--out", tmp_path / "wrong")
        assert status == 2 and "out of order: name the problem in item" in error and len(error.splitlines()) == 1


def test_samples_need_the_problems_names(run, problems, tmp_path):
    path = tmp_path / "completions.jsonl"
    flags = ("--task", "gsm8k", "--data", problems, "--completions", path, "--samples", 2)
    path.write_text("".join(completions(*[{}] * 12) * 2))
    status, _, error = run(*flags, "--out", tmp_path / "wrong")
    assert status == 2 and "line 1: names no problem, which --samples 2 needs: name it in item" in error
    path.write_text("".join(completions(*({"question": row["query"]} for row in PROBLEMS)) * 2))
    status, out, error = run(*flags, "--out", tmp_path / "right")
    assert status == 0 and "24 right" in out, error


def test_a_null_is_no_name(run, problems, tmp_path):
    path = tmp_path / "completions.jsonl"
    path.write_text("".join(completions(*[{"task_id": None, "item": None, "idx": None}] * 12)))
    status, out, error = run("--task", "gsm8k", "--data", problems, "--completions", path, "--out", tmp_path / "out")
    assert status == 0 and "12 right" in out, error


@pytest.mark.parametrize("fields, words", [
    (["item"], "is for problem 2, which"), ([], "is one row more than"),
])  # fmt: skip
def test_completions_beyond_max_rows_are_refused_by_this_flag(run, problems, tmp_path, fields, words):
    path = tmp_path / "completions.jsonl"
    path.write_text("".join(completions(*({field: number for field in fields} for number in range(1, 13)))))
    flags = ("--task", "gsm8k", "--data", problems, "--completions", path, "--max-rows", 1)
    status, _, error = run(*flags, "--out", tmp_path / "out")
    assert status == 2 and f"line 2: {words} {problems} (up to --max-rows 1)" in error


@pytest.fixture
def mt_bench_files(tmp_path):
    """(questions, judge prompts) in FastChat's formats."""
    turns = ["What is 7 times 8?", "And 7 times 9?"]
    rows = [
        {"question_id": 81, "category": "writing", "turns": turns},
        {"question_id": 4, "category": "x", "turns": turns},
    ]
    forms = {
        "single-v1": "{question} {answer}",
        "single-v1-multi-turn": "{question_1} {answer_1} {question_2} {answer_2}",
    }
    prompts = [
        {"name": name, "system_prompt": "Judge.", "prompt_template": form, "output_format": "[[rating]]"}
        for name, form in forms.items()
    ]
    for name, values in (("question.jsonl", rows), ("judge_prompts.jsonl", prompts)):
        (tmp_path / name).write_text("".join(json.dumps(value) + "\n" for value in values))
    return tmp_path / "question.jsonl", tmp_path / "judge_prompts.jsonl"


def test_mt_bench_is_answered_and_then_judged(run, mt_bench_files, tmp_path):
    questions, prompts = mt_bench_files
    out = tmp_path / "out"
    flags = ("--task", "mt-bench", "--data", questions, "--out", out, "--max-new-tokens", 9)
    status, printed, error = run(*flags)
    assert status == 0 and printed.startswith("mt-bench: 2 questions answered in"), error
    answers = (out / "model_answer" / "llama.jsonl").read_text()
    assert [len(json.loads(line)["choices"][0]["turns"]) for line in answers.splitlines()] == [2, 2]
    status, printed, error = run(*flags, "--judge", MODEL, "--judge-prompts", prompts)
    assert status == 0 and "4 judgments without one" in printed, error
    assert (out / "model_answer" / "llama.jsonl").read_text() == answers
    judgments = [json.loads(line) for line in (out / "model_judgment" / "llama_single.jsonl").read_text().splitlines()]
    first = json.loads(answers.splitlines()[0])["choices"][0]["turns"]
    assert [(row["question_id"], row["turn"], row["score"]) for row in judgments] == [
        (81, 1, -1), (81, 2, -1), (4, 1, -1), (4, 2, -1)
    ]  # fmt: skip
    assert judgments[1]["user_prompt"] == f"What is 7 times 8? {first[0]} And 7 times 9? {first[1]}"
    assert json.loads((out / "summary.json").read_text())["without rating"] == 4
    status, _, error = run(*flags[:-1], 8)
    assert status == 2 and "--max-new-tokens is 8" in error


def test_a_model_in_the_hubs_cache_has_its_own_name(tmp_path):
    assert evaluate.name_of(tmp_path / "models--org--tiny" / "snapshots" / "0ab1") == "org--tiny"
    assert evaluate.name_of(tmp_path / "tiny") == "tiny"


@pytest.mark.parametrize("flags, words", [
    (("--judge", "x"), "--judge and --judge-prompts belong together"),
    (("--references", "x"), "--judge and --judge-prompts belong together"),
    (("--judge", MODEL, "--judge-prompts", "nowhere"), "nowhere"),
    (("--temperature", "1"), "--temperature has no meaning with --task mt-bench"),
    (("--samples", "2"), "--samples has no meaning"), (("--gold",), "--gold has no meaning"),
    (("--data", "judge_prompts.jsonl"), "judge_prompts.jsonl, line 1: has no question_id"),
    (("--task", "gsm8k", "--judge", "x"), "--judge has no meaning with --task gsm8k"),
])  # fmt: skip
def test_bad_input_of_mt_bench_is_one_line(run, mt_bench_files, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    status, out, error = run("--task", "mt-bench", "--data", mt_bench_files[0], "--out", "out", *flags)
    assert status == 2 and out == "" and len(error.splitlines()) == 1 and words in error, error
    assert not (tmp_path / "out").exists()


def test_another_adapter_with_the_same_factors_is_another_evaluation(run, problems, tmp_path):
    model = mb.adapt(mb.load_model(MODEL), rank=2)
    stretch(model)
    mb.save_adapter(model, tmp_path / "adapter")
    flags = (
        "--task",
        "gsm8k",
        "--data",
        problems,
        "--max-rows",
        1,
        "--max-new-tokens",
        5,
        "--adapter",
        tmp_path / "adapter",
    )
    assert run(*flags, "--out", tmp_path / "out")[0] == 0
    assert run(*flags, "--dtype", "float32", "--out", tmp_path / "out")[0] == 0  # the default here
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 4', '"lora_alpha": 400'))
    status, _, error = run(*flags, "--out", tmp_path / "out")
    assert status == 2 and "adapter_digest" in error


def test_samples_differ_and_each_is_kept(run, problems, tmp_path):
    flags = ("--task", "gsm8k", "--data", problems, "--max-rows", 2, "--samples", 3, "--temperature", 1.5)
    assert run(*flags, "--max-new-tokens", 20, "--out", tmp_path / "out")[0] == 0
    records = records_of(tmp_path / "out")
    assert sorted((record["item"], record["sample"]) for record in records) == [(i, s) for i in "12" for s in range(3)]
    assert len({record["completion"] for record in records}) > 3


def test_text_is_measured_with_and_without_an_adapter(run, tmp_path):
    model = mb.adapt(mb.load_model(MODEL), rank=2)
    stretch(model)
    mb.save_adapter(model, tmp_path / "adapter")
    (tmp_path / "text.txt").write_text("".join(example.prompt + example.response for example in EXAMPLES))
    flags = ("--task", "text", "--data", tmp_path / "text.txt", "--max-length", 100)
    status, base, error = run(*flags, "--out", tmp_path / "base")
    assert status == 0, error
    status, tuned, _ = run(*flags, "--adapter", tmp_path / "adapter", "--out", tmp_path / "tuned")
    assert status == 0 and "KL(base ‖ tuned)" in tuned and "KL" not in base
    summary, plain = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("tuned", "base"))
    assert summary["base_loss"] == pytest.approx(plain["loss"]) and summary["kl"] > 0.001
    assert summary["loss"] != pytest.approx(plain["loss"], rel=1e-3)
    path = tmp_path / "tuned" / "records.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + lines[1][:9])
    assert run(*flags, "--adapter", tmp_path / "adapter", "--out", tmp_path / "tuned")[1] == tuned
    assert path.read_text() == "".join(lines)


def test_a_problem_beyond_the_models_context_is_refused_by_its_line(run, problems, tmp_path):
    rows = [PROBLEMS[0], PROBLEMS[1] | {"query": "many words " * 600}]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, _, error = run("--task", "gsm8k", "--data", problems, "--out", tmp_path / "out")
    assert status == 2 and "problems.jsonl, line 2: the prompt has" in error and "512 positions" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--task", "humaneval"), "--allow-code-execution"),
        (("--task", "gsm8k", "--allow-code-execution"), "--allow-code-execution has no meaning"),
        (("--task", "text", "--raw"), "--template has no meaning"),
        (("--task", "math", "--protocol", "plain-exact"), "--protocol has no meaning with --task math"),
        (("--task", "gsm8k", "--protocol", "plain-exact", "--gold"), "--protocol has no meaning with --gold"),
        (("--task", "gsm8k", "--max-length", "9"), "--max-length has no meaning"),
        (("--task", "text", "--gold"), "--gold has no meaning"),
        (("--task", "gsm8k", "--samples", "2"), "add --temperature"),
        (("--task", "gsm8k", "--k", "2"), "raise --samples"),
        (("--task", "gsm8k", "--gold", "--completions", "x"), "leave one out"),
        (("--task", "gsm8k", "--gold", "--adapter", "x"), "--adapter has no meaning with --gold"),
        (("--task", "gsm8k", "--gold", "--temperature", "1"), "--temperature has no meaning with --gold"),
        (("--task", "gsm8k", "--gold", "--dtype", "float32"), "--dtype has no meaning with --gold"),
        (("--task", "gsm8k", "--completions", "x", "--model", "."), "--model has no meaning with"),
        (("--task", "gsm8k", "--timeout", "1"), "--timeout has no meaning"),
        (("--task", "text", "--batch-size", "2"), "--batch-size has no meaning"),
        (("--task", "text", "--k", "1"), "--k has no meaning"),
        (("--task", "gsm8k", "--top-p", "0.5"), "--temperature"),
        (("--task", "gsm8k", "--seed", "7"), "--seed has no meaning without --temperature"),
        (("--task", "gsm8k", "--data", "nowhere"), "nowhere"),
        (("--task", "gsm8k", "--model", "nowhere"), "nowhere"),
        (("--task", "gsm8k", "--adapter", "nowhere"), "nowhere"),
        (("--task", "mbpp", "--allow-code-execution"), "problems.jsonl, line 1"),
        (("--task", "text", "--max-length", "100000"), "512 positions"),
        (("--task", "text", "--max-length", "1"), "512 positions"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing_behind(run, problems, tmp_path, flags, words):
    data = () if "--data" in flags else ("--data", problems)
    status, out, error = run(*flags, *data, "--out", tmp_path / "out")
    assert status == 2 and out == "" and len(error.splitlines()) == 1 and words in error, error
    assert not (tmp_path / "out").exists()
