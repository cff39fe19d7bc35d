"""`python -m minibalora`: the list of commands, and that each command exists."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from minibalora.__main__ import COMMANDS, main


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",)])
def test_without_a_command_all_commands_are_listed(words, in_command):
    status, listed, error = in_command(main, *words)
    assert (status, error) == (0, "")
    lines = [line.split(maxsplit=1) for line in listed.splitlines()[2:]]
    assert {name: purpose for name, purpose in lines} == {name: purpose for name, (_, purpose) in COMMANDS.items()}


@pytest.mark.parametrize("words", [("train",), ("--verbose",), ("generat", "--help"), ("",)])
def test_an_unknown_command_is_refused_in_a_line_that_names_the_others(words, in_command):
    status, printed, error = in_command(main, *words)
    assert (status, printed) == (2, "")
    (line,) = error.splitlines()
    assert line.startswith(f"error: there is no command {words[0]!r}") and all(name in line for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_refuses_an_unknown_flag(name, in_command):
    status, printed, error = in_command(main, name, "--help")
    assert (status, error) == (0, "")
    assert printed.startswith(f"usage: python -m minibalora {name} ")
    status, printed, error = in_command(main, name, "--no-such-flag")
    assert (status, printed) == (2, "") and len(error.splitlines()) == 1


def test_the_module_runs_as_a_program():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    for words, status in ([], 0), (["train"], 2):
        command = [sys.executable, "-m", "minibalora", *words]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert ended.returncode == status
        spoken, silent = (ended.stdout, ended.stderr) if status == 0 else (ended.stderr, ended.stdout)
        assert all(name in spoken for name in COMMANDS) and silent == ""
