"""A process that imports what a training script needs once, and forks for each run; see processes.py.

    python worker.py SCRIPT

Each line on standard input starts a run: a JSON object with its folder and the words after SCRIPT. When the run has
ended, its exit status is written to standard output, negative after a signal. SIGTERM is passed on to the run.
"""

import json
import os
import runpy
import signal
import sys
import warnings
from pathlib import Path

SIGNALS = signal.SIGTERM, signal.SIGCHLD


def main(script: str) -> None:
    sys.argv, sys.path[0] = [script], str(Path(script).absolute().parent)  # as for `python SCRIPT`
    if sys.platform != "darwin":  # whose linear algebra does not survive a fork
        preload(script)
    warnings.filterwarnings("ignore", ".*multi-threaded, use of fork", DeprecationWarning)  # OpenBLAS stops its threads
    signal.signal(signal.SIGCHLD, lambda *_: None)  # by default, some systems drop it though it is blocked
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # so that none is missed: wait_for takes them
    for line in sys.stdin:
        run = json.loads(line)
        child = os.fork()
        if child == 0:
            become(run["folder"])
            sys.argv[1:] = run["words"]
            runpy.run_path(script, run_name="__main__")
            return
        status = wait_for(child)
        try:
            os.write(sys.stdout.fileno(), f"{status}\n".encode())
        except BrokenPipeError:  # the sweep was killed
            return


def preload(script: str) -> None:
    try:
        runpy.run_path(script, run_name="preload")  # only its imports
        import torch._dynamo  # noqa: F401  # the count of a run's memory needs it; it takes as long as torch itself
    except Exception:
        pass  # the run will meet the same error and report it


def become(folder: str) -> None:
    """Make this process the run in `folder`: its files as standard streams, and signals as in a new process."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    flags = os.O_RDONLY, os.O_WRONLY | os.O_CREAT | os.O_APPEND, os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    for stream, name in enumerate((os.devnull, os.path.join(folder, "output.txt"), os.path.join(folder, "errors.txt"))):
        file = os.open(name, flags[stream], 0o666)
        os.dup2(file, stream)
        os.close(file)


def wait_for(child: int) -> int:
    """Wait until the run ends, and pass SIGTERM on to it. Returns its exit status, negative after a signal."""
    while True:
        if signal.sigwait(SIGNALS) == signal.SIGTERM:
            os.kill(child, signal.SIGTERM)
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    main(sys.argv[1])
