"""Ctrl-C at any moment: no traceback."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from minibalora.base import interrupts

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def restored():
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.parametrize("name", ["-m", "/usr/bin/minibalora", "train_nlg.py", "./train_nlu.py"])
def test_a_command_dies_quietly_before_and_after_its_main(name, monkeypatch):
    monkeypatch.setattr(sys, "argv", [name])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupts.die_quietly()
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    with pytest.raises(KeyboardInterrupt), interrupts.raising():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL


@pytest.mark.parametrize(
    "name, handler",
    [("own_program.py", signal.default_int_handler), ("train_nlg.py", signal.SIG_IGN)],
    ids=["a program that imports the package", "a command in the background"],
)
def test_other_programs_keep_their_handler(name, handler, monkeypatch):
    monkeypatch.setattr(sys, "argv", [name])
    signal.signal(signal.SIGINT, handler)
    interrupts.die_quietly()
    assert signal.getsignal(signal.SIGINT) == handler
    with interrupts.raising():
        assert signal.getsignal(signal.SIGINT) == handler


@pytest.mark.parametrize("command", [["train_nlg.py"], ["train_nlu.py"], ["-m", "minibalora", "plan"]])
def test_an_interrupt_during_the_imports_leaves_no_traceback(command, tmp_path):
    """A fake torch interrupts the process while it is imported."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background ignores it
    (tmp_path / "torch").mkdir()
    interrupted = "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(5)"
    (tmp_path / "torch" / "__init__.py").write_text(interrupted)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    ended = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, "", "")
