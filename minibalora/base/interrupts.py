"""End a command without a traceback after Ctrl-C, even during the import of torch, which takes seconds."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# sys.argv[0] of our commands. For `python -m minibalora` it is -m until Python locates the module.
COMMANDS = ("-m", "minibalora", "train_nlg.py", "train_nlu.py")


def die_quietly() -> None:
    """Let SIGINT end this process at once, if it is a command of ours.

    A program that imports the package keeps its KeyboardInterrupt, and a command that was started in the background
    keeps ignoring the signal.
    """
    is_command = sys.argv and os.path.basename(sys.argv[0]) in COMMANDS
    if is_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def raising() -> Iterator[None]:
    """Let SIGINT raise KeyboardInterrupt within the block, even after `die_quietly`."""
    previous = signal.getsignal(signal.SIGINT)
    if previous == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


die_quietly()  # on import, because it must run before the import of torch
