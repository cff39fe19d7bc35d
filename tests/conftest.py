"""Fixtures that several tests need."""

import sys

import pytest

from minibalora.base import cli
from minibalora.base.errors import InputError


@pytest.fixture(scope="session")
def refuses():
    """refuses(call, *parts): the call raises InputError, whose message is one line and has all the parts."""

    def check(call, *parts):
        with pytest.raises(InputError) as caught:
            call()
        message = str(caught.value)
        assert len(message.splitlines()) == 1, message
        for part in parts:
            assert str(part) in message, message

    return check


@pytest.fixture
def in_command(monkeypatch, capsys):
    """in_command(main, *flags) -> status, standard output, standard error of a command, run in this process."""

    def call(main, *flags) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [main.__module__.rpartition(".")[2], *map(str, flags)])
        with pytest.raises(SystemExit) as stopped:
            cli.run_script(main)
        return stopped.value.code, *capsys.readouterr()

    return call
