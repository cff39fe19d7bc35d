"""Run the training script of a sweep in processes of its own, several at a time."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from minibalora.base.errors import InputError

SECONDS_BETWEEN_LOOKS = 0.1


@contextmanager
def only_sweep(out: Path) -> Iterator[int]:
    """Hold the lock of the folder `out`, and give its file descriptor for the children, which hold it as well: then no
    sweep starts beside runs of one that was killed. Raises InputError if another sweep holds it."""
    import fcntl  # not on Windows

    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"{out}: runs of another sweep are at work there: wait for them or end them") from None
        yield file.fileno()


def run_all(commands: dict[Path, list[str]], jobs: int, lock: int, report: Callable[[Path, str | None], None]) -> None:
    """Run the command of each folder, `jobs` at a time. Calls report(folder, reason) whenever one has ended; the reason
    is None if it left a report.json. After a signal, ends the running ones, which save their state, and raises."""
    waiting, working = list(commands.items()), {}
    try:
        while waiting or working:
            while waiting and len(working) < jobs:
                folder, command = waiting.pop(0)
                working[folder] = start(folder, command, jobs, lock)
            time.sleep(SECONDS_BETWEEN_LOOKS)
            for folder in [folder for folder, process in working.items() if process.poll() is not None]:
                status = working.pop(folder).returncode
                report(folder, None if is_finished(folder) and status == 0 else reason(folder, status))
    finally:
        end(list(working.values()))


def start(folder: Path, command: list[str], jobs: int, lock: int) -> subprocess.Popen:
    """Start a command that writes output.txt and errors.txt in its folder. Ctrl-C does not reach it."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ)
    if jobs > 1:  # by default, each would use all cores
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    with open(folder / "output.txt", "a") as output, open(folder / "errors.txt", "w") as errors:
        return subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            env=environment,
            start_new_session=True,
            pass_fds=[lock],
        )


def end(processes: list[subprocess.Popen]) -> None:
    """Ask the processes to save their state and end, and wait for them. A second signal kills them."""
    for process in processes:
        process.terminate()
    try:
        for process in processes:
            process.wait()
    except BaseException:
        for process in processes:
            process.kill()
        raise


def is_finished(folder: Path) -> bool:
    return (folder / "report.json").is_file()


def last_error(folder: Path) -> str | None:
    """Return the last line that the run wrote on standard error; None if it wrote none."""
    path = folder / "errors.txt"
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), None)


def reason(folder: Path, status: int) -> str:
    """Return in one line why a run has failed. status: its exit status, negative after a signal."""
    if status < 0:
        return f"killed by {signal.Signals(-status).name}; out of memory, if you did not kill it"
    return last_error(folder) or f"ended with status {status} and without a message"
