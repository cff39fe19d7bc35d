"""What all commands share: exit status, one line for an error, and what a flag's value may be."""

import argparse
import math
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError

from minibalora.base import distributed
from minibalora.base.errors import InputError
from minibalora.base.files import entered, is_full_disk


def run_script(
    main: Callable[[], int], smaller: str = "lower --batch-size", goes_on: str | None = "give the same command to go on"
) -> None:
    """Exit with main's status; 2 and one line for what the user can mend, 1 and one line for a full disk or memory.

    smaller: what takes less memory; goes_on: what to do to go on with what is saved, None if nothing is.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that temporary files are removed
    then = f"; {goes_on} with what is saved" if goes_on else ""
    try:
        sys.exit(main())
    except InputError as error:
        _exit_with_line(2, error)
    except BrokenPipeError:  # the reader, `head` for one, has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python flushes once more at its end
        sys.exit(141)
    except KeyboardInterrupt:
        _exit_with_line(130, f"interrupted{then}")
    except torch.OutOfMemoryError:
        _exit_with_line(1, f"out of GPU memory: {smaller}{then}")
    except (OSError, SafetensorError) as error:
        if not is_full_disk(error):
            raise
        _exit_with_line(1, f"the disk is full ({error}): make room{then}")
    except RuntimeError as error:
        if not distributed.is_lost_rank(error):
            raise
        _exit_with_line(1, f"another process of this run has ended: see what it says{then}")


def _exit_with_line(status: int, message: object) -> None:
    line = f"error: {' '.join(str(message).split())}"
    if distributed.is_first_to_say(line):
        print(line, file=sys.stderr)
    sys.exit(status)


class OneLineParser(argparse.ArgumentParser):
    """Refuses in one line, and takes no flag for another that it begins."""

    def __init__(self, prog: str, description: str):
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def error(self, message: str):
        raise InputError(f"{message}: see --help")


def positive_int(text: str) -> int:
    value = natural(text)
    if value == 0:
        raise argparse.ArgumentTypeError("0 is not a positive integer")
    return value


def natural(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", text):  # what fits 64 bits
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 0 to 999999999999999999")
    return int(text)


def number(what: str, accepts: Callable[[float], bool]) -> Callable[[str], float]:
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


def path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("the name is empty")
    return Path(text)


def folder(text: str) -> Path:
    """A folder; one of the Hub's cache is entered at its snapshot."""
    try:
        return entered(path(text))
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def flag(name: str) -> str:
    """The flag of an attribute of the parsed arguments."""
    return f"--{name.replace('_', '-')}"


def device(name: str | None) -> torch.device:
    """The named one, or a GPU if there is one; InputError if it can't be used."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=torch.device(name)).item()  # "meta" has tensors, but nothing in them
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {name} can't be used here ({reason}): give cpu, cuda or cuda:N") from None
    return torch.device(name)


def dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The named one, or bfloat16 on a GPU and float32 on a CPU."""
    return getattr(torch, name or ("bfloat16" if device.type == "cuda" else "float32"))
