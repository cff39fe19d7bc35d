"""Records of answers: written once judged, tied to their model and settings, and summed in the tables."""

import json
import time

import pytest
import torch

import minibalora as mb
from minibalora.data.prompts import example_from
from minibalora.evaluation import records
from minibalora.evaluation.benchmarks import BENCHMARKS, Item, as_items, judge_answer
from minibalora.evaluation.records import HeldOut, answer, before_and_after, measure, side_by_side, summarize
from minibalora.toy import MODEL
from minibalora.toy.problems import clean_problems

EXAMPLES = [example_from(row, line) for line, row in enumerate(clean_problems(12, seed=5), start=1)]


@pytest.fixture(scope="module")
def toy():
    return mb.load_model(MODEL), mb.load_tokenizer(MODEL)


@pytest.fixture
def ask(tmp_path):
    """ask(items, measured) -> the prompts that were asked. All are answered by 5, with records in one file."""

    def call(items: list[Item], measured: str = "this") -> list[str]:
        asked = []

        def complete(items, keys):
            asked.extend(item.prompt for item in items)
            return enumerate(["The answer is: 5"] * len(items))

        answer(items, 1, judge_answer, tmp_path / "r.jsonl", measured, complete)
        return asked

    return call


def test_only_items_without_a_record_are_asked(ask):
    items = [Item(name, 1, f"prompt {name}", "#### 5") for name in "abc"]
    assert ask(items[:2]) == ["prompt a", "prompt b"]
    assert ask(items) == ["prompt c"]
    assert ask(items) == []


def test_records_of_another_prompt_reference_or_model_are_asked_again(ask, tmp_path):
    items = [Item(name, 1, f"prompt {name}", "#### 5") for name in "ab"]
    ask(items)
    assert ask([items[0], Item("b", 1, "another", "#### 5")]) == ["another"]
    assert ask([items[0], Item("b", 1, "another", "#### 6")]) == ["another"]
    assert ask([items[0]], "another model") == ["prompt a"]
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 1  # records of another model are gone


@pytest.mark.parametrize(
    "line", ["{", "[]", "{}", '{"item": ["a"], "sample": 0}', '{"item": "a", "sample": {}}', "\x00"]
)
def test_damaged_records_are_removed_and_asked_again(ask, tmp_path, line):
    items = [Item("a", 1, "prompt a", "#### 5")]
    ask(items)
    whole = (tmp_path / "r.jsonl").read_text()
    (tmp_path / "r.jsonl").write_text(f"{line}\n{whole}{line}")
    assert ask(items) == [] and (tmp_path / "r.jsonl").read_text() == whole


def test_errors_of_a_judge_are_raised_before_generation_ends(tmp_path):
    def judge(item, completion, limits):
        raise OSError("no space")

    asked = []

    def complete(items, keys):
        for index in range(len(items)):
            asked.append(index)
            time.sleep(0.01)  # generating takes longer than judging
            yield index, "text"

    items = [Item(str(n), 1, "p", "r") for n in range(100)]
    with pytest.raises(OSError, match="no space"):
        answer(items, 1, judge, tmp_path / "r.jsonl", "this", complete)
    assert len(asked) < 50


def test_an_interruption_does_not_wait_for_programs_that_have_not_begun(tmp_path):
    judged = []

    def judge(item, completion, limits):
        judged.append(item.name)
        time.sleep(0.05)
        return None, "failed", ""

    def complete(items, keys):
        yield from ((index, "text") for index in range(100))
        raise KeyboardInterrupt

    items = [Item(str(n), 1, "p", "r") for n in range(101)]
    with pytest.raises(KeyboardInterrupt):
        answer(items, 1, judge, tmp_path / "r.jsonl", "this", complete)
    assert len(judged) < 50
    kept = [json.loads(line)["item"] for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert set(kept) <= set(judged)


def test_exact_match_counts_right_answers_by_kind(toy, tmp_path, monkeypatch):
    replies = ["The answer is: 5", "The answer is: 6", "no idea", "The answer is: 8"]
    monkeypatch.setattr(records, "generate_each", lambda *arguments: enumerate(replies))
    rows = [("q1", "5", "a"), ("q2", "6", "b"), ("q3", "7", "b"), ("q4", "9", "b")]
    examples = [
        example_from({"query": q, "response": f"The answer is: {answer}", "type": kind}, line)
        for line, (q, answer, kind) in enumerate(rows, start=1)
    ]
    examples.append(example_from({"query": "q5", "response": "no final answer"}, 5))
    results = measure(*toy, HeldOut(as_items(examples), [], None, 3), tmp_path / "r.jsonl", "this")
    exact = {name: value for name, value in results[0].items() if name.startswith("exact")}
    assert exact == pytest.approx(
        {"exact match, a (1)": 100, "exact match, b (3)": 100 / 3, "exact match, all (4)": 50}
    )
    assert len(results[1]) == 4
    assert "95 % Wilson interval of the exact match of all: 15.0 to 85.0 before, " in before_and_after(results, results)


def test_a_task_has_its_own_length_and_stop_strings(toy, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(records, "generate_each", lambda *arguments: asked.append(arguments[3]) or enumerate(["5"] * 2))
    items = as_items(EXAMPLES[:2])
    measure(*toy, HeldOut(items, [], BENCHMARKS["math"], 3), tmp_path / "math.jsonl", "this")
    measure(*toy, HeldOut(items, [], None, 3), tmp_path / "none.jsonl", "this")
    assert (asked[0].max_new_tokens, asked[0].stop) == (BENCHMARKS["math"].max_new_tokens, BENCHMARKS["math"].stop)
    assert asked[1].max_new_tokens < 200 and asked[1].stop == ()


def test_measuring_restores_every_mode_and_names_every_kind(toy, tmp_path):
    model, tok = toy
    model.train()
    model.model.layers[0].eval()
    column, _ = measure(model, tok, HeldOut(as_items(EXAMPLES), EXAMPLES[:2], None, 4), tmp_path / "r.jsonl", "this")
    assert model.training and not model.model.layers[0].training and model.model.layers[1].training
    model.eval()
    assert len([name for name in column if name.startswith("exact match")]) == 5
    assert list(column)[-1] == "loss on pre-training text"  # no KL, because nothing is adapted


def test_measuring_uses_neither_gradients_nor_dropout(toy, tmp_path, monkeypatch):
    model, tok = toy
    seen = set()
    hidden = model.hidden
    monkeypatch.setattr(
        model, "hidden", lambda *a, **k: seen.add((torch.is_grad_enabled(), model.training)) or hidden(*a, **k)
    )
    model.train()
    measure(model, tok, HeldOut(as_items(EXAMPLES[:2]), EXAMPLES[:2], None, 2), tmp_path / "r.jsonl", "this")
    model.eval()
    assert seen == {(False, False)}


def test_the_summary_counts_problems_and_not_samples():
    summary = summarize([{"item": n, "verdict": v} for n in range(50) for v in ("passed", "failed")], [1, 2])
    assert summary["pass@1"]["share"] == 0.5 and summary["pass@2"]["share"] == 1
    assert summary["pass@1"]["high"] - summary["pass@1"]["low"] == pytest.approx(0.268, abs=1e-3)  # of 50, not of 100


def test_the_table_has_both_columns():
    assert side_by_side({"loss": 1.0}, {"loss": 0.25}).splitlines() == [
        "        before     after",
        "loss     1.000     0.250",
    ]
