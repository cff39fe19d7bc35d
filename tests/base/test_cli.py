"""How commands end: the exit status and one line on standard error."""

import errno
import os
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError

from minibalora.base import cli

TO_RESUME = "give the same command to continue, with --resume if --out exists"
OUT_OF_MEMORY = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 "
    "bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.fixture
def end_of(capsys):
    """end_of(error) -> the status and the standard error of a command that ends with this error."""

    def run(error: BaseException) -> tuple[int, str]:
        def main():
            raise error

        with pytest.raises(SystemExit) as stopped:
            cli.run_script(main, "lower --batch-size", TO_RESUME)
        return stopped.value.code, capsys.readouterr().err

    return run


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("is_rust", [True, False])
def test_a_failed_write_ends_with_status_1_and_a_line_that_says_why(number, is_rust, end_of):
    reason = os.strerror(number)
    error = SafetensorError(f"I/O error: {reason} (os error {number})") if is_rust else OSError(number, reason)
    status, line = end_of(error)
    assert status == 1 and len(line.splitlines()) == 1 and reason in line and line.endswith(f"; {TO_RESUME}\n")
    assert line.startswith("error: the disk is full" if number == errno.ENOSPC else "error: writing failed")


@pytest.mark.parametrize("streams", ["PYTHONIOENCODING=latin-1", "2>&-", ">&-"])
def test_a_stream_that_is_closed_or_lacks_a_letter_stops_no_command(streams):
    code = "import sys; from minibalora.base import cli; cli.run_script(lambda: sys.stderr.isatty() or print('‖') or 0)"
    command = f'"{sys.executable}" -c "{code}"'  # a folder's name may have a space
    command = f"{streams} {command}" if "=" in streams else f"{command} {streams}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert done.stdout.strip() == ("" if streams == ">&-" else "\\u2016" if "=" in streams else "‖")


def test_a_lost_permission_ends_with_status_1_and_a_line_that_names_the_file(end_of):
    status, line = end_of(PermissionError(errno.EACCES, os.strerror(errno.EACCES), "out/log.jsonl"))
    assert status == 1 and len(line.splitlines()) == 1
    assert "no permission" in line and "out/log.jsonl" in line and line.endswith(f"; {TO_RESUME}\n")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(OUT_OF_MEMORY),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes."),
        MemoryError("Unable to allocate 4 TiB for an array"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory."),
    ],
    ids=["torch", "torch on Windows", "numpy", "system", "GPU"],
)
def test_exhausted_memory_ends_with_status_1_and_a_line_that_says_what_to_do(error, end_of):
    status, line = end_of(error)
    assert status == 1 and len(line.splitlines()) == 1
    assert "memory" in line and "lower --batch-size" in line and TO_RESUME in line


def test_an_interrupt_ends_with_status_130_and_a_line(end_of):
    assert end_of(KeyboardInterrupt()) == (130, f"error: interrupted; {TO_RESUME}\n")


@pytest.mark.parametrize("error", [ValueError("a defect"), FileNotFoundError(errno.ENOENT, "a defect")])
def test_a_defect_of_ours_keeps_its_traceback(error):
    with pytest.raises(type(error), match="a defect"):
        cli.run_script(lambda: (_ for _ in ()).throw(error))


def test_an_empty_path_is_refused_as_empty(refuses):
    parser = cli.OneLineParser("prog", "")
    parser.add_argument("--model", type=cli.path_text)
    parser.add_argument("-o", "--out", type=cli.path)
    refuses(lambda: parser.parse_args(["--model", ""]), "--model is empty: give a path (see --help)")
    refuses(lambda: parser.parse_args(["--out", ""]), "-o/--out is empty: give a path")
