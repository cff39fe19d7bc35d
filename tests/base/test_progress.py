"""Progress on a terminal, and in a file or a pipe. The clock is fake."""

import io
import sys
import time

import pytest
from tqdm import std

from minibalora.base import progress
from minibalora.base.progress import Progress


class Stream(io.StringIO):
    """Standard error, as a terminal or as a file."""

    def __init__(self, is_terminal: bool):
        super().__init__()
        self.isatty = lambda: is_terminal


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    monkeypatch.setattr(std, "time", clock)
    return clock


@pytest.fixture
def stderr(monkeypatch, clock):
    """stderr(is_terminal) puts a stream in the place of standard error and returns it."""

    def replace(is_terminal: bool) -> Stream:
        stream = Stream(is_terminal)
        monkeypatch.setattr(sys, "stderr", stream)
        return stream

    return replace


def test_in_a_file_there_is_a_line_every_30_seconds_and_one_at_the_end(stderr, clock):
    file = stderr(is_terminal=False)
    for _ in progress.over(range(100), "steps", "step"):
        clock.now += 3
    lines = file.getvalue().splitlines()
    assert lines[0] == "steps: 10 of 100, 3.0 s each, about 4 minutes left"
    assert lines[-2:] == [
        "steps: 90 of 100, 3.0 s each, about 30 seconds left",
        "steps: 100 of 100, 3.0 s each, 5 minutes in all",
    ]
    assert len(lines) == 10
    assert "\r" not in file.getvalue()


def test_a_line_has_the_note_and_the_rate_of_this_run(stderr, clock):
    file = stderr(is_terminal=False)
    with Progress("steps", 1000, "step", first=900) as bar:
        clock.now += 20
        bar.update(40, note="loss 0.5")
    assert file.getvalue() == "steps: 940 of 1,000, 2.0 a second, about 30 seconds left, loss 0.5\n"


def test_a_failure_leaves_a_line_with_the_count(stderr, clock):
    file = stderr(is_terminal=False)
    with pytest.raises(KeyError), Progress("layers", 3, "layer"):
        raise KeyError
    assert file.getvalue() == "layers: 0 of 3\n"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_other_ranks_and_short_tasks_show_nothing(is_terminal, stderr, clock):
    stream = stderr(is_terminal)
    for _ in progress.over(range(3), "answers", "batch", delay=2):
        clock.now += 0.1
    for _ in progress.over(range(3), "answers", "batch", is_shown=False):
        clock.now += 100
    assert stream.getvalue() == ""


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_rate_is_the_average_however_often_the_bar_is_refreshed(is_terminal, stderr, clock):
    """As in generation, 8 prompts end together after 170 steps of 0.1 s. tqdm's estimate was 80 prompts/s."""
    stream = stderr(is_terminal)
    with Progress("generate", 16, "prompt") as bar:
        for step in range(170):
            clock.now += 0.1
            bar.update(8 if step == 169 else 0)
        shown = stream.getvalue() if is_terminal else bar.line(17)
    assert ("8/16 [00:17<00:17,  2.13s/prompt]" in shown) if is_terminal else (
        shown == "generate: 8 of 16, 2.1 s each, about 17 seconds left"
    )  # fmt: skip


@pytest.mark.parametrize("seconds, text", [(1, "1 second"), (89, "89 seconds"), (90, "2 minutes"), (9000, "2.5 hours")])
def test_a_duration_is_in_a_suitable_unit(seconds, text):
    assert progress.in_words(seconds) == text
