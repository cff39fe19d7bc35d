"""`python -m minibalora`: the list of commands, and that each is there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from minibalora.__main__ import COMMANDS


def run(*words: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    return subprocess.run([sys.executable, "-m", "minibalora", *words], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",)])
def test_without_a_command_all_are_listed(words):
    listed = run(*words)
    assert (listed.returncode, listed.stderr) == (0, "")
    lines = [line.split(maxsplit=1) for line in listed.stdout.splitlines()[2:]]
    assert {name: purpose for name, purpose in lines} == {name: purpose for name, (_, purpose) in COMMANDS.items()}


@pytest.mark.parametrize("words", [("train",), ("--verbose",), ("generat", "--help"), ("",)])
def test_an_unknown_command_is_refused_in_a_line_that_names_the_others(words):
    refused = run(*words)
    assert (refused.returncode, refused.stdout) == (2, "")
    (line,) = refused.stderr.splitlines()
    assert line.startswith(f"error: there is no command {words[0]!r}") and all(name in line for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_refuses_an_unknown_flag(name):
    helped = run(name, "--help")
    assert (helped.returncode, helped.stderr) == (0, "")
    assert helped.stdout.startswith(f"usage: python -m minibalora {name} ")
    refused = run(name, "--no-such-flag")
    assert (refused.returncode, refused.stdout) == (2, "") and len(refused.stderr.splitlines()) == 1
