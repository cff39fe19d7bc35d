"""Fixtures that several tests need."""

import os

import pytest
import torch
from helpers import status_of, with_toy_tokenizer

from minibalora.base.errors import InputError

# Tests multiply small matrices: threads cost more than they save, especially on a busy machine.
if "OMP_NUM_THREADS" not in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
    torch.set_num_threads(1)

# On a processor with AMX, attention in bfloat16 asks oneDNN for a packing that plain ATen kernels lack. They stop with
# "pack_vnni2 is only supported when avx512 is supported", so plain kernels get a oneDNN without AMX.
if os.environ.get("ATEN_CPU_CAPABILITY") == "default":
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")


@pytest.fixture(scope="session")
def refuses():
    """refuses(call, *parts) checks that the call raises InputError with a one-line message that contains all parts."""

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
    """in_command(main, *flags) runs a command in this process and returns status, standard output, standard error."""
    return lambda main, *flags: (status_of(main, *flags), *capsys.readouterr())


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A random LLaMA with two blocks of width 24 that reads text, for tests that do not depend on the weights."""
    return with_toy_tokenizer("llama3", tmp_path_factory.mktemp("models") / "tiny")
