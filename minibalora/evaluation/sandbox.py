"""Run untrusted Python programs that a language model wrote, on Linux and without privileges.

Each program runs in its own interpreter, in a process that this file, run as a script, first encloses:

- Landlock: the program may read only the Python installation and /usr, and write only an empty temporary folder.
- seccomp: it may not start processes, open sockets, signal others, trace or share memory; nor call chmod, chown, utime
  or truncate, which Landlock does not cover, at least not in its first version.
- rlimits: CPU time, memory, open files and file size are limited. Root's capabilities are dropped; no_new_privs is set.

The caller watches the clock, the output, the threads and the temporary folder, and kills the program when it exceeds a
limit. The program sees none of our environment variables. It may start threads. A program that needs folders,
subprocesses or asyncio (which needs sockets) fails.

Not protected: the contents of the Python installation and /usr; the existence and sizes of other paths, and the targets
of links; disk space until the time is up (files that are deleted but still open or mapped are not counted); the speed
of the machine; anything that a kernel bug exposes. A program that means to cheat can do so, because "passed" depends on
a secret in the program's own source.
"""

import ctypes
import errno
import math
import os
import select
import signal
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

if __name__ != "__main__":  # the script must start fast, and the package would import torch
    import subprocess
    import tempfile

    from minibalora.base.errors import InputError

MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of the tables below, AUDIT_ARCH_*
# Calls refused to the program, except as ALLOWED_IF says: name: (number on x86_64, on aarch64).
# fmt: off
REFUSED = {
    # calls that change the enclosure, or could let the program survive its parent
    "prctl": (157, 167), "capset": (126, 91),
    "landlock_create_ruleset": (444, 444), "landlock_add_rule": (445, 445), "landlock_restrict_self": (446, 446),
    # processes and signals; fcntl and tkill send signals too
    "fork": (57, None), "vfork": (58, None), "clone": (56, 220), "clone3": (435, 435),
    "unshare": (272, 97), "setns": (308, 268), "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "fcntl": (72, 25),
    "pidfd_send_signal": (424, 424), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438),
    # reading and steering other processes
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "process_madvise": (440, 440), "process_mrelease": (448, 448), "prlimit64": (302, 261),
    "migrate_pages": (256, 238), "move_pages": (279, 239), "setpriority": (141, 140), "ioprio_set": (251, 30),
    "sched_setparam": (142, 118), "sched_setscheduler": (144, 119), "sched_setaffinity": (203, 122),
    "sched_setattr": (314, 274),
    # sockets, shared memory, queues, keys
    "socket": (41, 198), "socketpair": (53, 199), "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195),
    "semget": (64, 190), "semctl": (66, 191), "semop": (65, 193), "semtimedop": (220, 192), "msgget": (68, 186),
    "msgsnd": (69, 189), "msgrcv": (70, 188), "msgctl": (71, 187), "mq_open": (240, 180), "mq_unlink": (241, 181),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    # uncounted memory, and large parts of the kernel that no exercise needs
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "userfaultfd": (323, 282), "bpf": (321, 280),
    "perf_event_open": (298, 241), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    # changing files without opening them, or in a way that Landlock or this filter does not see
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "chown": (92, None), "fchown": (93, 55),
    "lchown": (94, None), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None),
    "futimesat": (261, None), "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    "truncate": (76, 45), "open": (2, None), "openat": (257, 56), "openat2": (437, 437),
    "ioctl": (16, 29), "inotify_init": (253, None), "inotify_init1": (294, 26), "fanotify_init": (300, 262),
}
# fmt: on
NEWEST = 451  # cachestat of Linux 6.5; later calls, and x86_64's x32 numbers, get "no such call"
CLONE_THREAD, OWN_PID = 0x10000, "own pid"
# name: (argument, mask, values): allowed if the argument, masked, is one of the values. The filter looks at 32 bits, as
# the kernel does in these calls.
ALLOWED_IF = {
    "clone": (0, CLONE_THREAD, [CLONE_THREAD]),
    "kill": (0, 0xFFFFFFFF, [OWN_PID]),
    "tgkill": (0, 0xFFFFFFFF, [OWN_PID]),
    "prlimit64": (0, 0xFFFFFFFF, [0, OWN_PID]),
    # F_DUPFD to F_SETLKW, F_DUPFD_CLOEXEC; not F_SETOWN, which makes the kernel signal any process
    "fcntl": (1, 0xFFFFFFFF, [*range(8), 1030]),
    # is it a terminal, its size, bytes to read, do not wait, close on exec or not; not a file's attributes
    "ioctl": (1, 0xFFFFFFFF, [0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451]),
    # Every access mode with and without O_TRUNC, except O_RDONLY | O_TRUNC, which early Landlock takes for reading
    "open": (1, 0o1003, [0, 1, 2, 0o1001, 0o1002]),
    "openat": (2, 0o1003, [0, 1, 2, 0o1001, 0o1002]),
}

SYSTEM = ["/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/localtime", "/dev/urandom"]
# Landlock's rights to files, in the order of their bits
EXECUTE, WRITE, READ, LIST, REMOVE, MAKE, TRUNCATE = (1 << bit for bit in (0, 1, 2, 3, 5, 8, 14))
OPEN_FILES = 64
ENTERED = b"entered"  # the script's last message before it becomes the program
TICK = 20  # milliseconds between two looks at the temporary folder


@dataclass(frozen=True)
class Limits:
    seconds: float = 10  # wall-clock time, and (rounded up) CPU time of all threads
    memory_bytes: int = 1 << 30  # address space
    output_bytes: int = 1 << 16  # stdout and stderr together
    file_bytes: int = 1 << 20  # all files in the temporary folder together, except the program itself
    files: int = 64
    threads: int = 64


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class Outcome:
    """The result of a program.

    verdict: "passed": the program ran to its end; "failed": an exception (also MemoryError), an early exit, a signal,
    or source that is not Python; or the limit that it exceeded: "timed out", "too much output", "too many files" (or
    bytes in them), "too many threads".
    """

    verdict: str
    output: str  # the first `output_bytes` of stdout and stderr


def check_sandbox() -> None:
    """Check that this system has all parts of the sandbox. Raises InputError with the missing ones."""
    if sys.platform != "linux" or os.uname().machine not in MACHINES:
        machine = os.uname().machine if hasattr(os, "uname") else ""
        raise InputError(f"sandbox: this is {sys.platform} {machine}: run it on Linux, on x86_64 or aarch64")
    parts = {
        "Landlock (Linux 5.13, switched on at boot)": can("landlock_create_ruleset", None, 0, 1),
        "seccomp (CONFIG_SECCOMP_FILTER of the kernel)": can("prctl", 21),  # PR_GET_SECCOMP
        "pidfd_open (a Python built on Linux 5.3 or newer)": hasattr(os, "pidfd_open"),
        "/proc": os.path.exists("/proc/self/task"),
    }
    missing = [part for part, is_there in parts.items() if not is_there]
    if missing:
        raise InputError(f"sandbox: missing {', '.join(missing)}: use a newer system, or a container that allows it")
    outcome = run_program("")
    if outcome.verdict != "passed":
        output = " ".join(outcome.output.split())
        raise InputError(f"sandbox: an empty program {outcome.verdict} ({output}): use a Python that needs only /usr")


def can(name: str, *arguments: int | None) -> bool:
    try:
        return call(name, *arguments) >= 0
    except OSError:
        return False


def run_program(source: str, limits: Limits = DEFAULT_LIMITS) -> Outcome:
    """Run a program in the sandbox and remove everything it leaves behind. Several threads may call this at once.

    Anything the program does becomes an Outcome. An added last line reports through a pipe that it was reached, because
    a program may exit early with status 0. This guards against accidents such as sys.exit(0), not against a program
    that reads its own source. Raises InputError if the sandbox cannot be set up.
    """
    if "\0" in source:  # before 3.11.4, Python ignores the rest of such a line
        return Outcome("failed", "SyntaxError: source code cannot contain null bytes\n")
    with tempfile.TemporaryDirectory(prefix="minibalora-") as folder, pipe() as output, pipe() as steps, pipe() as end:
        nonce = os.urandom(16).hex()
        # The empty line completes a last line that ends in a backslash.
        ended = source + f'\n\n__import__("os").write({end[1]}, b"{nonce}")\n'
        with open(os.path.join(folder, "program.py"), "wb") as file:
            size = file.write(ended.encode("utf-8", "surrogatepass"))  # Python itself refuses lone surrogates
        process = start(folder, output[1], steps[1], end[1], limits)
        try:
            with_program = replace(limits, file_bytes=limits.file_bytes + size)
            excess, written = watch(process.pid, output[0], folder, with_program)
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # before wait(), after which another process may get its number
            status = process.wait()
        step = drain(steps[0], 4096)
        reached_end = drain(end[0], 4096) == nonce.encode()
    output = written.decode(errors="replace")
    if excess:
        return Outcome(excess, output)
    if step != ENTERED:
        reason = " ".join((step.removeprefix(ENTERED).decode() or output or f"status {status}").split())
        raise InputError(f"sandbox: cannot be set up ({reason}): check_sandbox() says what this system lacks")
    if status == -signal.SIGXCPU:
        return Outcome("timed out", output)
    return Outcome("passed" if reached_end and status == 0 else "failed", output)


@contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    """Yield (reading end, non-blocking; writing end). Both stay open here, so the program cannot close the pipe."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    try:
        yield reader, writer
    finally:
        os.close(reader)
        os.close(writer)


def drain(reader: int, most: int) -> bytes:
    """Return the bytes that are in a pipe now, up to `most`."""
    content = b""
    try:
        while len(content) < most:
            content += os.read(reader, most - len(content))
    except BlockingIOError:
        pass
    return content


def start(folder: str, output: int, steps: int, end: int, limits: Limits) -> "subprocess.Popen":
    numbers = (os.getpid(), steps, math.ceil(limits.seconds), limits.memory_bytes, limits.file_bytes)
    return subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, *map(str, numbers), *SYSTEM, sys.prefix, sys.base_prefix],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        pass_fds=(steps, end),
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8"}
        | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},  # so that no verdict depends on the order of a set
        start_new_session=True,  # so that Ctrl-C reaches only us
    )


def watch(pid: int, reader: int, folder: str, limits: Limits) -> tuple[str, bytes]:
    """Wait until the program ends or exceeds a limit. Returns the verdict ("" if it ended) and the output."""
    output = b""
    deadline = time.monotonic() + limits.seconds
    poller = select.poll()
    pidfd = os.pidfd_open(pid)
    try:
        poller.register(pidfd, select.POLLIN)
        poller.register(reader, select.POLLIN)
        while True:
            ended = pidfd in dict(poller.poll(TICK))
            output += drain(reader, limits.output_bytes + 1 - len(output))
            if len(output) > limits.output_bytes:
                return "too much output", output[: limits.output_bytes]
            sizes = file_sizes(folder)
            if len(sizes) > limits.files or sum(sizes) >= limits.file_bytes:
                return "too many files", output
            if os.stat(f"/proc/{pid}/task").st_nlink - 2 > limits.threads:
                return "too many threads", output
            if ended:
                return "", output
            if time.monotonic() > deadline:
                return "timed out", output
    finally:
        os.close(pidfd)


def file_sizes(folder: str) -> list[int]:
    """Return the size of each file in a folder that may change meanwhile. The sandbox allows no subfolders."""
    sizes = []
    with os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                sizes.append(entry.stat(follow_symlinks=False).st_size)
    return sizes


# In the child, before the program.


def enclose(parent: int, steps: int, seconds: int, memory_bytes: int, file_bytes: int, readable: list[str]) -> None:
    """Become the program in the current folder, or write the error to `steps` and exit."""
    os.set_inheritable(steps, False)  # so that the program cannot write to it
    try:
        call("prctl", 1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            sys.exit("the parent is gone")
        set_limits(seconds, memory_bytes, file_bytes)
        drop_privileges()
        restrict_files(readable)
        restrict_calls()
        os.write(steps, ENTERED)
        os.execv(sys.executable, [sys.executable, "-s", "program.py"])  # not -I, which would ignore PYTHONHASHSEED
    except (OSError, ValueError) as error:
        os.write(steps, str(error).encode())
        sys.exit(1)


def call(name: str, *arguments: int | bytes | None) -> int:
    """Make a system call. Raises OSError with the call's name if it fails."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    number = REFUSED[name][MACHINES[os.uname().machine][0]]
    # prctl requires unused arguments to be 0; a plain int would leave half of a register unchanged.
    padded = [*arguments, 0, 0, 0, 0, 0, 0][:6]
    longs = [ctypes.c_long(argument) if isinstance(argument, int) else argument for argument in padded]
    result = libc.syscall(ctypes.c_long(number), *longs)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), name)
    return result


def set_limits(seconds: int, memory_bytes: int, file_bytes: int) -> None:
    import resource  # missing on some systems that can import this file

    for kind, soft, hard in (
        (resource.RLIMIT_CPU, seconds, seconds + 1),  # SIGXCPU, then SIGKILL if SIGXCPU is ignored
        (resource.RLIMIT_AS, memory_bytes, memory_bytes),
        (resource.RLIMIT_FSIZE, file_bytes, file_bytes),
        (resource.RLIMIT_NOFILE, OPEN_FILES, OPEN_FILES),
        (resource.RLIMIT_CORE, 1, 1),  # with 0, the kernel would still report a crash to a core dump collector
    ):
        ours = resource.getrlimit(kind)[1]
        most = sys.maxsize if ours == resource.RLIM_INFINITY else ours
        resource.setrlimit(kind, (min(soft, most), min(hard, most)))


def drop_privileges() -> None:
    """Drop all capabilities for good: after no_new_privs, an executed program gets no more than its caller has."""
    with suppress(OSError):  # raised after the last capability that this kernel knows; at once if we are not root
        for capability in range(64):
            call("prctl", 24, capability)  # PR_CAPBSET_DROP
    call("capset", struct.pack("Ii", 0x20080522, 0), bytes(24))  # this empties the ambient set too
    call("prctl", 38, 1)  # PR_SET_NO_NEW_PRIVS


def restrict_files(readable: list[str]) -> None:
    """Let Landlock forbid all file access that it covers on this kernel, except these rights beneath these paths."""
    abi = call("landlock_create_ruleset", None, 0, 1)
    covered = (1 << 13 + (abi >= 2) + (abi >= 3) + (abi >= 5)) - 1
    ruleset = call("landlock_create_ruleset", struct.pack("Q", covered), 8, 0)
    rules = [(path, EXECUTE | READ | LIST) for path in readable]
    rules += [("/dev/null", READ | WRITE), (".", READ | WRITE | LIST | MAKE | REMOVE | TRUNCATE)]
    for path, rights in rules:
        try:
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        if not os.path.isdir(path):
            rights &= ~LIST  # Landlock refuses this right for a file
        call("landlock_add_rule", ruleset, 1, struct.pack("=Qi", rights & covered, descriptor), 0)
        os.close(descriptor)
    call("landlock_restrict_self", ruleset, 0)
    os.close(ruleset)


def restrict_calls() -> None:
    code = filter_code(*MACHINES[os.uname().machine], os.getpid())
    code_buffer = ctypes.create_string_buffer(code, len(code))
    # struct sock_fprog: the number of instructions, 8 bytes each, and where they are
    call("prctl", 22, 2, struct.pack("HP", len(code) // 8, ctypes.addressof(code_buffer)))  # PR_SET_SECCOMP, a filter


def filter_code(column: int, architecture: int, pid: int) -> bytes:
    """Return the seccomp filter in BPF. A line is (operation, lines to skip if true, if false, value)."""
    load, mask, equal, at_least, answer = 0x20, 0x54, 0x15, 0x35, 0x06
    allow, kill, refuse, unknown = 0x7FFF0000, 0x80000000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS
    lines = [(load, 0, 0, 4), (equal, 1, 0, architecture), (answer, 0, 0, kill)]  # another ABI has other numbers
    lines += [(load, 0, 0, 0), (at_least, 0, 1, NEWEST + 1), (answer, 0, 0, unknown)]
    for name, numbers in REFUSED.items():
        if numbers[column] is None:
            continue
        # libc tries clone3, whose flags a filter cannot see, and then clone
        checks = [(answer, 0, 0, unknown if name == "clone3" else refuse)]
        if name in ALLOWED_IF:
            argument, bits, values = ALLOWED_IF[name]
            allowed = [(equal, 0, 1, pid if value == OWN_PID else value) for value in values]
            checks = [line for test in allowed for line in (test, (answer, 0, 0, allow))] + checks
            checks = [(load, 0, 0, 16 + 8 * argument), (mask, 0, 0, bits), *checks]
        lines += [(equal, 0, len(checks), numbers[column]), *checks]
    lines += [(answer, 0, 0, allow)]
    return b"".join(struct.pack("HBBI", *line) for line in lines)


if __name__ == "__main__":
    enclose(*map(int, sys.argv[1:6]), sys.argv[6:])
