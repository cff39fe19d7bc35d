"""Run the training script of a sweep in processes of its own, several at a time.

Each is forked from a worker, which has imported torch: importing it takes longer than a small run.
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from minibalora.base.errors import InputError

SECONDS_BETWEEN_LOOKS = 0.1
WORKER = Path(__file__).with_name("worker.py")


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
    """Run the command of each folder, a script and its flags, `jobs` at a time. Calls report(folder, reason) whenever
    one has ended; the reason is None if it left a report.json. After a signal, ends the running ones, which save their
    state, and raises."""
    waiting, working, idle = list(commands.items()), {}, []
    try:
        while waiting or working:
            while waiting and len(working) < jobs:
                folder, (script, *words) = waiting.pop(0)
                working[folder] = idle.pop() if idle else start_worker(script, jobs, lock)
                start_run(working[folder], folder, words)
            time.sleep(SECONDS_BETWEEN_LOOKS)
            for folder, worker in list(working.items()):
                if (status := status_of(worker)) is not None:
                    del working[folder]
                    if worker.returncode is None:
                        idle.append(worker)
                    report(folder, None if is_finished(folder) and status == 0 else reason(folder, status))
    finally:
        end([*working.values(), *idle])


def start_worker(script: str, jobs: int, lock: int) -> subprocess.Popen:
    """Start a process that runs the script one time after another. Ctrl-C does not reach it and its runs."""
    environment = dict(os.environ)
    if jobs > 1:  # by default, each would use all cores
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    return subprocess.Popen(
        [sys.executable, str(WORKER), script],
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        start_new_session=True,
        pass_fds=[lock],
    )


def start_run(worker: subprocess.Popen, folder: Path, words: list[str]) -> None:
    """Let a worker start a run that writes output.txt and errors.txt in its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "errors.txt").write_text("")  # those of an earlier run
    with suppress(BrokenPipeError):  # the worker has died, as status_of will say
        worker.stdin.write(f"{json.dumps({'folder': str(folder), 'words': words})}\n".encode())


def status_of(worker: subprocess.Popen) -> int | None:
    """Return the exit status of the worker's run, or of the worker if it has died; None if the run is at work."""
    if not select.select([worker.stdout], [], [], 0)[0]:
        return None
    line = worker.stdout.readline()
    return int(line) if line else worker.wait()


def end(workers: list[subprocess.Popen]) -> None:
    """Ask the runs to save their state and end, and wait for them and the workers. A second signal kills them."""
    try:
        for process in workers:
            process.stdin.close()  # no more runs
            process.terminate()
        for process in workers:
            process.wait()
            process.stdout.close()
    except BaseException:
        for process in workers:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
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
