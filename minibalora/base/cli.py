"""The parts that all commands share: exit status, one-line errors, and types of flags."""

import argparse
import math
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from minibalora.base import distributed, interrupts
from minibalora.base.errors import InputError, is_failed_write, is_out_of_memory
from minibalora.base.files import entered


def run_script(
    main: Callable[[], int],
    smaller: str = "lower --batch-size",
    resuming: str | None = "give the same command to continue",
) -> None:
    """Exit with the status of main(). After an error, print one line on standard error and exit with
    2 (bad input), 1 (out of memory, a failed write, a lost process) or 130 (Ctrl-C). Our own bugs keep their traceback.

    smaller: how to need less memory. resuming: how to continue from the saved files; None if nothing is saved.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that temporary files are removed
    then = f"; {resuming}" if resuming else ""
    _mend_streams()
    try:
        with interrupts.raising():
            sys.exit(main())
    except InputError as error:
        _exit_with_line(2, error)
    except BrokenPipeError:  # the reader, for instance `head`, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it exits
        sys.exit(141)
    except KeyboardInterrupt:
        _exit_with_line(130, f"interrupted{then}")
    except Exception as error:
        reason = _reason(error, smaller)
        if reason is None:
            raise
        _exit_with_line(1, f"{reason}{then}")


def _mend_streams() -> None:
    """Write \\u2016 and the like where the terminal has no such letter, and nothing where a stream is closed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))
        elif hasattr(stream, "reconfigure"):  # a notebook's has not
            stream.reconfigure(errors="backslashreplace")


def _reason(error: Exception, smaller: str) -> str | None:
    """Return one line about the machine's problem; None if the error is a bug of ours."""
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of GPU memory: {smaller}"
    if is_out_of_memory(error):
        return f"out of memory on this machine: {smaller}, or use a smaller model"
    if is_failed_write(error):
        failure = "the disk is full" if "No space left" in str(error) else "writing failed"
        return f"{failure} ({error}): make room, lift the limit or use another disk"
    if isinstance(error, PermissionError):  # in the middle of a run: what a run needs is checked before
        return f"no permission ({error}): change the mode or the owner"
    if isinstance(error, RuntimeError) and distributed.is_lost_rank(error):
        return "another process of this run has ended: see its message"
    return None


def _exit_with_line(status: int, message: object) -> None:
    line = f"error: {' '.join(str(message).split())}"
    if distributed.is_first_to_say(line):
        print(line, file=sys.stderr)
    sys.exit(status)


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, and which accepts no abbreviated flags."""

    def __init__(self, prog: str, description: str):
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def error(self, message: str):
        message = message.removeprefix("argument ").replace(": is empty", " is empty")
        raise InputError(f"{message} (see --help)")


def positive_int(text: str) -> int:
    """Return an integer of at least 1."""
    value = natural(text)
    if value == 0:
        raise argparse.ArgumentTypeError("0 is not a positive integer")
    return value


def natural(text: str) -> int:
    """Return an integer of at least 0, which fits into 64 bits."""
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 0 to 999999999999999999")
    return int(text)


def number(what: str, accepts: Callable[[float], bool]) -> Callable[[str], float]:
    """Return a flag's type: a float for which `accepts` is true. what: describes these numbers in the error."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not accepts(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return value

    return parse


rate = number("a number of at least 0", lambda value: 0 <= value < math.inf)
positive_rate = number("a positive number", lambda value: 0 < value < math.inf)
ratio = number("a number of at least 1", lambda value: 1 <= value < math.inf)
fraction = number("a share, 0 to 1", lambda value: 0 <= value <= 1)
share_below_one = number("a share, 0 to below 1", lambda value: 0 <= value < 1)


def path_text(text: str) -> str:
    """Return the path unchanged. Raises an error if it is empty."""
    if not text:
        raise argparse.ArgumentTypeError("is empty: give a path")
    return text


def path(text: str) -> Path:
    return Path(path_text(text))


def folder(text: str) -> Path:
    """Return the folder, or its snapshot if it is a folder of the Hub's cache."""
    try:
        return entered(path(text))
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def flag(name: str) -> str:
    """Return the flag that argparse stores under this name."""
    return f"--{name.replace('_', '-')}"


def add_hardware_flags(add: Callable) -> None:
    """Add --device and --dtype with a group's `add_argument`; `settle_hardware` fills in their defaults."""
    add("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    add("--dtype", choices=("float32", "bfloat16"), help="dtype of weights and activations (default: bfloat16 on GPUs, "
        "float32 on CPUs); what an adapter trains is always float32")  # fmt: skip


def settle_hardware(args: argparse.Namespace) -> None:
    """Replace the names in args.device and args.dtype, or None, by a device and a dtype."""
    args.device = device(args.device)
    args.dtype = dtype(args.dtype, args.device)


def device(name: str | None) -> torch.device:
    """Return the named device; by default a GPU if there is one. Raises InputError if the device can't be used."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=torch.device(name)).item()  # .item(): tensors on "meta" have no values
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {name} can't be used here ({reason}): give cpu, cuda or cuda:N") from None
    return torch.device(name)


def dtype(name: str | None, device: torch.device) -> torch.dtype:
    """Return the named dtype; by default bfloat16 on a GPU and float32 on a CPU."""
    return getattr(torch, name or ("bfloat16" if device.type == "cuda" else "float32"))
