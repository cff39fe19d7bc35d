"""Hostile programs, run for real: their verdicts, and that nothing outside has changed."""

import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from minibalora.base.errors import InputError
from minibalora.evaluation import sandbox
from minibalora.evaluation.sandbox import Limits, Outcome, check_sandbox, run_program

try:
    check_sandbox()
except InputError as error:
    pytest.skip(f"no sandbox here: {error}", allow_module_level=True)

SECRET = "the quick brown fox"
# The start of programs that try several calls with `attempt`, which prints those that are not refused.
ATTEMPTS = """
import ctypes, errno, fcntl, os, resource, signal, socket, struct, subprocess, sys, threading
libc = ctypes.CDLL(None, use_errno=True)
def syscall(number, *arguments):
    result = libc.syscall(number, *(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), "")
    return result
def attempt(source):
    try:
        print(source, eval(source))
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EXDEV):
            raise
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """The parent of the sandbox's folders. Checks that a test leaves no file and no process behind."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert not processes_in(folder)
    assert not list(folder.iterdir())


@pytest.fixture
def outside(tmp_path):
    """A file that the program must not reach."""
    path = tmp_path / "outside" / "file.txt"
    path.parent.mkdir()
    path.write_text(SECRET)
    return path


@pytest.fixture
def bystander():
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def processes_in(folder: Path) -> list[int]:
    pids = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.readlink(entry / "cwd").startswith(f"{folder}/"):
                pids.append(int(entry.name))
        except OSError:  # the process has ended, or is not ours
            continue
    return pids


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def run(source, **limits) -> Outcome:
    return run_program(source, Limits(**limits))


def run_attempts(*sources, setup="") -> Outcome:
    """Run a program that makes these attempts and prints those that succeed."""
    return run(ATTEMPTS + setup + "".join(f"\nattempt({source!r})" for source in sources))


def number(name: str) -> int:
    """Return the number of a system call on this machine; -1 if it does not exist."""
    number = sandbox.REFUSED[name][sandbox.MACHINES[os.uname().machine][0]]
    return -1 if number is None else number


ALL_REFUSED = Outcome("passed", "")


# Honest programs


@pytest.mark.parametrize(
    "source",
    [
        "",
        "# no newline at the end",
        "from __future__ import annotations\nfrom typing import List\ndef f(x: List[int]) -> Nothing: ...",
        "import math, collections, datetime, re, random, itertools, functools, json, heapq, string, decimal\n"
        "assert random.random() < 1 and datetime.datetime.now().year > 2000 and math.isqrt(17) == 4",
        "import threading\nfound = []\nthreads = [threading.Thread(target=found.append, args=(n,)) for n in range(8)]\n"
        "for t in threads: t.start()\nfor t in threads: t.join()\nassert sorted(found) == list(range(8))",
        "if __name__ == '__main__':\n    ran = True\nassert ran",
        "x = input if False else 1\r\nassert x == 1\r\n",
        "import os; os.write(1, bytes([255, 10]))",
    ],
)
def test_an_honest_program_passes(source):
    assert run(source).verdict == "passed"


def test_numpy_works():
    numpy = pytest.importorskip("numpy")
    if not numpy.__file__.startswith((sys.prefix, sys.base_prefix)):
        pytest.skip("numpy comes from PYTHONPATH, which the sandbox does not see")
    assert run("import numpy as np\nprint(np.linalg.svd(np.eye(3))[1].sum())") == Outcome("passed", "3.0\n")


def test_output_is_stdout_and_stderr():
    program = "import sys\nprint('one', flush=True)\nprint('two', file=sys.stderr)\nsys.stdout.buffer.write(b'\\xff')"
    assert run(program) == Outcome("passed", "one\ntwo\n\ufffd")


def test_a_program_can_write_in_its_own_folder():
    program = """
import os, tempfile
with open("a.txt", "w") as file:
    file.write("text")
os.rename("a.txt", "b.txt")
with open("b.txt", "r+") as file:
    file.truncate(2)
assert open("b.txt").read() == "te" and "b.txt" in os.listdir()
os.remove("b.txt")
with tempfile.NamedTemporaryFile() as file:
    file.write(b"x")
open(os.path.expanduser("~/stays.txt"), "w").close()
print("x", file=open(os.devnull, "w"))
"""
    assert run(program) == ALL_REFUSED


def test_a_program_that_closes_stdout_passes():
    assert run("import os\nos.close(1)\nos.close(2)").verdict == "passed"


# Programs that go wrong


@pytest.mark.parametrize(
    "source",
    [
        "assert 1 + 1 == 3",
        "import sys\nsys.exit(0)",
        "import os\nos._exit(0)",
        "raise SystemExit",
        "import sys; sys.exit()",
    ],
)
def test_a_program_that_ends_early_fails(source):
    assert run(source).verdict == "failed"


@pytest.mark.parametrize(
    "source",
    [
        "x = (",
        "x = '''",
        'f"""{',
        "x = \\",
        "if True:",
        "@print",
        "a\0b",
        "x = 1\0",
        "'\ud800'",
        "é = '\udcff'",
        "\tx = 1",
        "x y",
    ],
)
def test_source_that_does_not_compile_fails_with_pythons_message(source):
    outcome = run(source)
    assert outcome.verdict == "failed" and "Error" in outcome.output


@pytest.mark.parametrize(
    "source",
    [
        "import sys\nsys.setrecursionlimit(10**9)\nf = lambda x: f([f(x)])\nf(1)",
        "import ctypes\nctypes.string_at(1)",
        "import os\nos.kill(os.getpid(), 9)",
        "import os\nos.abort()",
    ],
)
def test_a_crash_fails(source):
    assert run(source, memory_bytes=1 << 27).verdict == "failed"


@pytest.mark.parametrize(
    "source",
    [
        "import time\ntime.sleep(60)",
        "while True: pass",
        "import os, time\nos.close(1)\nos.close(2)\ntime.sleep(60)",
        "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
        "import signal\nfor n in set(signal.Signals) - {9, 19}: signal.signal(n, signal.SIG_IGN)\nwhile True: pass",
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()",
        "import atexit, time\natexit.register(time.sleep, 60)",
        "import os\nreader, writer = os.pipe()\nos.read(reader, 1)",
    ],
)
def test_a_program_that_does_not_end_is_stopped_in_time(source):
    began = time.monotonic()
    assert run(source, seconds=0.3).verdict == "timed out"
    assert time.monotonic() - began < 5


def test_standard_input_is_empty():
    assert "EOFError" in run("input()").output


def test_the_kernel_enforces_the_limits():
    program = "from resource import *\nprint([getrlimit(kind) for kind in (RLIMIT_CPU, RLIMIT_AS, RLIMIT_FSIZE)])"
    outcome = run(program, seconds=1.5, memory_bytes=1 << 29, file_bytes=12345)
    assert outcome.output == f"[(2, 3), {(1 << 29, 1 << 29)}, (12345, 12345)]\n"


def test_cpu_time_of_all_threads_counts():
    burn = "import hashlib, threading\nburn = lambda: hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)\n"
    assert run(burn + "for _ in range(8): threading.Thread(target=burn).start()", seconds=1).verdict == "timed out"


def test_memory_is_limited():
    outcome = run("x = bytearray(1 << 29)", memory_bytes=1 << 28)
    assert outcome.verdict == "failed" and outcome.output.endswith("MemoryError\n")
    assert run("x = bytearray(1 << 27)", memory_bytes=1 << 28).verdict == "passed"
    assert run("x = []\nwhile True: x.append([0] * 10**6)", memory_bytes=1 << 28).verdict == "failed"


@pytest.mark.parametrize("source", ["while True: print('x' * 50)", "import os\nwhile True: os.write(2, b'xxxxx')"])
def test_endless_output_is_cut(source):
    outcome = run(source, output_bytes=12345)
    assert outcome.verdict == "too much output" and len(outcome.output) == 12345


def test_output_up_to_the_limit_is_not_too_much():
    assert run("print('x' * 99)", output_bytes=100) == Outcome("passed", "x" * 99 + "\n")
    assert run("print('x' * 100)", output_bytes=100) == Outcome("too much output", "x" * 100)


def test_a_program_may_be_larger_than_the_limit_of_its_files():
    assert run(f"open('x', 'w').write('y' * 99)\nx = {'a' * 2000!r}", file_bytes=100).verdict == "passed"


@pytest.mark.parametrize(
    "source",
    [
        "n = 0\nwhile True:\n    n += 1\n    open(str(n), 'w').close()",
        "for n in range(65): open(str(n), 'w').close()",
        "import os\nfor n in range(65): os.link('program.py', str(n))",
        "file = open('x', 'wb')\nwhile True: file.write(bytes(1000))",
        "open('x', 'wb').truncate(99_999); open('y', 'w').write('zz')",
        "for n in range(4): open(str(n), 'wb').write(bytes(30_000))",
        "import os\nfor n in range(65): open(b'\\xff\\n ' + str(n).encode() + b'x' * 200, 'w').close()",
    ],
)
def test_many_files_and_many_bytes_are_too_many(source):
    assert run(source, file_bytes=100_000).verdict == "too many files"


def test_a_thread_bomb_is_stopped():
    bomb = "import threading, time\nthreading.stack_size(32768)\nwhile True: "
    assert run(bomb + "threading.Thread(target=time.sleep, args=(60,)).start()").verdict == "too many threads"


# Programs that try to get out


def test_a_fork_bomb_starts_no_process():
    outcome = run("import os\nwhile True: os.fork()")
    assert outcome.verdict == "failed" and "PermissionError" in outcome.output


def test_no_call_starts_a_process(outside):
    touch = ["touch", str(outside.parent / "made")]
    sources = [
        "os.fork()",
        "os.forkpty()",
        "os.posix_spawn('/bin/sh', ['sh'], {})",
        f"subprocess.run({touch})",
        f"subprocess.run({' '.join(touch)!r}, shell=True)",
        "__import__('multiprocessing').Process(target=print).start()",
        *(f"syscall({number(name)}, 17, 0, 0, 0, 0)" for name in ("fork", "vfork", "clone")),
        f"syscall({number('clone3')}, struct.pack('8Q', 0, 0, 0, 0, 17, 0, 0, 0), 64)",
        f"syscall({0x40000000 + number('fork')})",  # x86_64's x32 numbers
    ]
    assert run_attempts(*sources) == ALL_REFUSED
    run(f"import os\nos.system({' '.join(touch)!r})")
    assert os.listdir(outside.parent) == ["file.txt"]


def test_a_shell_in_place_of_the_program_is_enclosed_too(outside):
    made = outside.parent / "made"
    assert run(f"import os\nos.execv('/bin/sh', ['sh', '-c', 'echo > {made}; cat {outside}'])").verdict == "failed"
    assert not made.exists()
    outcome = run("import os\nos.execv('/bin/sh', ['sh', '-c', 'echo here; cat /etc/passwd; :'])")
    assert outcome.output.startswith("here\n") and "root" not in outcome.output


def test_a_file_that_the_program_wrote_cannot_be_executed():
    program = "import os, shutil, sys\nshutil.copyfile('/bin/true', 'x')\nos.execv('x', ['x'])"
    outcome = run(program, file_bytes=1 << 24)
    assert outcome.verdict == "failed" and "PermissionError" in outcome.output


def test_no_signal_reaches_another_process(bystander):
    by_pipe = """
def signal_by_pipe(pid, command=fcntl.F_SETOWN):
    reader, writer = os.pipe()
    fcntl.fcntl(reader, command, pid if command == fcntl.F_SETOWN else struct.pack("ii", 1, pid))
    fcntl.fcntl(reader, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
    os.write(writer, b"x")
"""
    info = "struct.pack('iii116x', 9, 0, -1)"
    sources = []
    for pid in (bystander.pid, os.getpid(), "os.getppid()"):
        sources += [
            f"os.kill({pid}, 0)",
            f"os.kill({pid}, 9)",
            f"os.kill(-{pid}, 9)",
            f"syscall({number('tkill')}, {pid}, 9)",
            f"syscall({number('tgkill')}, {pid}, {pid}, 9)",
            f"syscall({number('rt_sigqueueinfo')}, {pid}, 9, {info})",
            f"syscall({number('rt_tgsigqueueinfo')}, {pid}, {pid}, 9, {info})",
            f"syscall({number('pidfd_open')}, {pid}, 0)",
            f"signal_by_pipe({pid})",
            f"signal_by_pipe({pid}, 15)",  # F_SETOWN_EX
        ]
    # The first attempt that succeeds ends the program, so kill(-1) is reached only if all others are refused.
    stop = by_pipe + "\nprint = lambda *said: os._exit(os.write(1, repr(said).encode()))\n"
    assert run_attempts(*sources, "os.kill(0, 9)", "os.kill(-1, 9)", setup=stop) == ALL_REFUSED
    assert bystander.poll() is None


def test_no_other_process_can_be_read_or_controlled(bystander):
    limits = resource_limits(bystander.pid)
    sources = []
    for pid in (bystander.pid, "os.getppid()"):
        sources += [
            *(f"syscall({number('ptrace')}, {request}, {pid}, 0, 0)" for request in (16, 0x4206)),  # ATTACH, SEIZE
            f"syscall({number('process_vm_readv')}, {pid}, bytes(16), 1, bytes(16), 1, 0)",
            f"syscall({number('process_vm_writev')}, {pid}, bytes(16), 1, bytes(16), 1, 0)",
            f"resource.prlimit({pid}, resource.RLIMIT_NOFILE)",
            f"resource.prlimit({pid}, resource.RLIMIT_NOFILE, (8, 8))",
            f"os.setpriority(os.PRIO_PROCESS, {pid}, 19)",
            f"os.sched_setaffinity({pid}, [0])",
            f"os.sched_setscheduler({pid}, os.SCHED_IDLE, os.sched_param(0))",
            f"syscall({number('ioprio_set')}, 1, {pid}, 3 << 13)",
            *(
                f"open(f'/proc/{{{pid}}}/{name}', 'rb').read()"
                for name in ("environ", "mem", "maps", "cmdline", "stat")
            ),
            f"os.listdir(f'/proc/{{{pid}}}/fd')",
        ]
    assert run_attempts(*sources) == ALL_REFUSED
    assert bystander.poll() is None and resource_limits(bystander.pid) == limits
    assert os.getpriority(os.PRIO_PROCESS, bystander.pid) == os.getpriority(os.PRIO_PROCESS, 0)


def resource_limits(pid: int) -> str:
    return Path(f"/proc/{pid}/limits").read_text()


def test_files_outside_cannot_be_read(outside):
    sources = [
        f"open({str(outside)!r}).read()",
        f"os.listdir({str(outside.parent)!r})",
        f"os.link({str(outside)!r}, 'x')",
        f"os.symlink({str(outside)!r}, 'x')",
        f"os.rename({str(outside)!r}, 'x')",
        f"syscall({number('openat2')}, -100, {os.fsencode(outside)!r}, bytes(24), 24)",
        f"syscall({number('io_uring_setup')}, 8, bytes(120))",
        f"syscall({number('inotify_init1')}, 0)",
        "open('/etc/passwd').read()",
        "open('/proc/self/environ').read()",
        "os.listdir('/')",
        "os.listdir('..')",
        "os.listdir('/tmp')",
        "os.listdir('/dev/shm')",
    ]
    home = Path(os.path.expanduser("~"))
    if home.is_dir() and str(home) != "/":
        sources.append(f"os.listdir({str(home)!r})")
    assert run_attempts(*sources) == ALL_REFUSED


def test_our_environment_variables_are_hidden(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("PYTHONSTARTUP", SECRET)
    monkeypatch.setenv("PYTHONPATH", SECRET)
    outcome = run("import os, sys\nprint(dict(os.environ), sys.path)")
    assert outcome.verdict == "passed" and SECRET not in outcome.output and "OMP_NUM_THREADS" in outcome.output


def test_files_outside_cannot_be_changed(outside):
    before = outside.stat()
    path, new = repr(str(outside)), repr(str(outside.parent / "new"))
    sources = [
        *(f"open({path}, {mode!r})" for mode in ("w", "a", "r+")),
        *(f"open({new}, {mode!r})" for mode in ("w", "a", "x")),
        *(f"os.open({path}, {flags})" for flags in (os.O_RDONLY | os.O_TRUNC, os.O_TRUNC | os.O_ACCMODE)),
        f"os.open({str(outside.parent)!r}, os.O_TMPFILE | os.O_RDWR)",
        f"os.truncate({path}, 0)",
        f"os.remove({path})",
        f"os.rmdir({str(outside.parent)!r})",
        f"os.rename({path}, {new})",
        f"os.rename('program.py', {path})",
        f"os.link('program.py', {new})",
        f"os.link({path}, {new})",
        f"os.symlink('program.py', {new})",
        f"os.mkdir({new})",
        f"os.mkfifo({new})",
        f"os.chmod({path}, 0o777)",
        f"os.chown({path}, os.getuid(), os.getgid())",
        f"os.utime({path})",
        f"os.setxattr({path}, 'user.x', b'')",
        f"os.removexattr({path}, 'user.x')",
    ]
    assert run_attempts(*sources) == ALL_REFUSED
    after = outside.stat()
    assert outside.read_text() == SECRET and os.listdir(outside.parent) == ["file.txt"]
    assert (after.st_mode, after.st_mtime_ns, after.st_ctime_ns) == (
        before.st_mode,
        before.st_mtime_ns,
        before.st_ctime_ns,
    )


def test_readable_files_cannot_be_changed():
    # None would change anything even if allowed, because these files belong to the Python that runs the tests.
    opened = "os.open(os.__file__, os.O_RDONLY)"
    sources = [
        f"os.fchmod({opened}, os.stat(os.__file__).st_mode)",
        f"os.fchown({opened}, -1, -1)",
        f"os.setxattr({opened}, 'user.x', b'')",
        f"fcntl.ioctl({opened}, 0x40086602, struct.pack('q', 0))",  # FS_IOC_SETFLAGS
        "open(os.__file__, 'r+')",
        "os.open('program.py', os.O_RDONLY | os.O_TRUNC)",
    ]
    assert run_attempts(*sources) == ALL_REFUSED


def test_the_folder_stays_flat():
    sources = ["os.mkdir('x')", "os.symlink('program.py', 'x')", "os.mkfifo('x')", "os.chmod('.', 0)"]
    assert run_attempts(*sources, "os.mknod('x', 0o140600)") == ALL_REFUSED


def test_no_connection_can_be_made(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
        with socket.socket(socket.AF_UNIX) as unix:
            udp.bind(("127.0.0.1", 0))
            unix.bind(str(tmp_path / "socket"))
            unix.listen()
            sources = [
                f"socket.create_connection({tcp.getsockname()})",
                f"socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', {udp.getsockname()})",
                f"socket.socket(socket.AF_UNIX).connect({unix.getsockname()!r})",
                "socket.socketpair(type=socket.SOCK_DGRAM)",
                f"syscall({number('io_uring_setup')}, 8, bytes(120))",
            ]
            assert run_attempts(*sources) == ALL_REFUSED
            for listener, receive in ((tcp, tcp.accept), (udp, lambda: udp.recv(1)), (unix, unix.accept)):
                listener.setblocking(False)
                with pytest.raises(BlockingIOError):
                    receive()


def test_every_call_of_the_table_is_refused():
    names = [name for name in sandbox.REFUSED if name not in sandbox.ALLOWED_IF and number(name) != -1]
    # -1 as every argument is an error too, but another one
    outcome = run(
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        f"for number in {[number(name) for name in names]}:\n"
        "    libc.syscall(number, *[-1] * 6)\n    print(ctypes.get_errno())"
    )
    assert outcome.verdict == "passed"
    assert outcome.output.split() == ["38" if name == "clone3" else "1" for name in names]


def test_the_process_has_no_privileges_left(temporary):
    with ThreadPoolExecutor() as pool:
        future = pool.submit(run, "import time\nprint(flush=True)\ntime.sleep(60)", seconds=1)
        wait_for(lambda: any(b"program.py" in command_line(pid) for pid in processes_in(temporary)))
        [pid] = processes_in(temporary)
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        assert future.result().verdict == "timed out"
    assert all(int(status[name], 16) == 0 for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"))
    assert os.getuid() != 0 or int(status["CapBnd"], 16) == 0
    assert status["NoNewPrivs"] == "1" and status["Seccomp"] == "2"


def command_line(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def test_the_program_dies_with_its_caller(temporary):
    caller = multiprocessing.get_context("fork").Process(target=run, args=("while True: pass",))
    caller.start()
    wait_for(lambda: any(b"program.py" in command_line(pid) for pid in set(processes_in(temporary)) - {caller.pid}))
    caller.kill()
    caller.join()
    wait_for(lambda: not processes_in(temporary))
    for folder in temporary.iterdir():  # the caller that would remove it is dead
        shutil.rmtree(folder)


# The caller


def test_eight_threads_get_their_own_outcomes():
    sources = {
        "passed": "print({0})",
        "failed": "print({0})\n1 / 0",
        "timed out": "print({0}, flush=True)\nwhile 1: pass",
    }
    wanted = [list(sources)[n % 2 if n % 8 else 2] for n in range(24)]
    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(lambda n: run(sources[wanted[n]].format(n), seconds=2), range(24)))
    assert [outcome.verdict for outcome in outcomes] == wanted
    assert [outcome.output.splitlines()[0] for outcome in outcomes] == [str(n) for n in range(24)]


def test_nothing_leaks():
    children = Path(f"/proc/self/task/{os.getpid()}/children")  # including children of other tests
    before, born_before = os.listdir("/proc/self/fd"), children.read_text()
    for source in ["pass", "1 / 0", "while True: print()", "'\ud800'"] * 3:
        run(source)
    assert len(os.listdir("/proc/self/fd")) == len(before)
    assert children.read_text() == born_before  # no child is left, not even a zombie


def test_a_sandbox_that_cannot_be_set_up_gives_no_verdict(refuses, monkeypatch):
    monkeypatch.setattr(sandbox, "SYSTEM", ["/usr/share"])
    monkeypatch.setattr(sys, "prefix", "/usr/share")
    monkeypatch.setattr(sys, "base_prefix", "/usr/share")
    refuses(lambda: run("pass"), "sandbox: cannot be set up", "Permission denied")
    refuses(check_sandbox, "Permission denied")


def test_a_message_of_the_sandbox_cannot_be_forged():
    program = "import os\nfor n in range(3, 64):\n    try: os.write(n, b'no Landlock')\n    except OSError: pass\n1 / 0"
    assert run(program).verdict == "failed"


def test_another_system_is_refused(refuses, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    refuses(check_sandbox, "darwin", "Linux", "aarch64")


def test_another_machine_is_refused(refuses, monkeypatch):
    monkeypatch.setattr(sandbox, "MACHINES", {"pdp11": (0, 0)})
    refuses(check_sandbox, os.uname().machine, "x86_64")


def test_every_missing_part_is_named(refuses, monkeypatch):
    def call(name, *arguments):
        raise OSError(38, "Function not implemented", name)

    monkeypatch.setattr(sandbox, "call", call)
    refuses(check_sandbox, "Landlock", "5.13", "seccomp")
    monkeypatch.delattr(os, "pidfd_open")
    refuses(check_sandbox, "Landlock", "seccomp", "pidfd_open")
