"""Fixtures that several tests need."""

import os

import pytest
import torch
from helpers import status_of, with_toy_tokenizer

from minibalora.base.errors import InputError

# Tests multiply small matrices: threads would cost more than they save, and much more on a machine that is busy.
if "OMP_NUM_THREADS" not in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
    torch.set_num_threads(1)


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
def in_command(capsys):
    """in_command(main, *flags) -> status, standard output, standard error of a command, run in this process."""
    return lambda main, *flags: (status_of(main, *flags), *capsys.readouterr())


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A random LLaMA of two blocks, 24 numbers wide, that reads text: for what does not depend on the weights."""
    return with_toy_tokenizer("llama3", tmp_path_factory.mktemp("models") / "tiny")
