"""Run processes that never outlive this one.

Each command runs under a small supervisor (this file, run as a script, or a fork of `llama-lora fork-server`). The
supervisor adopts processes that its command leaves behind, such as torchrun's workers, which run in separate sessions
and so miss signals to the process group. It ends all its descendants when it gets a signal, when its command ends, and
when its parent is gone, even by SIGKILL.
"""

from __future__ import annotations

import ctypes
import os
import select
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, NoReturn, Protocol

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
END_AT_ONCE = signal.SIGINT  # to a supervisor; in its separate session no other process sends it
GRACE = 10.0  # seconds from SIGTERM to SIGKILL for a command that does not set its own
LEFTOVER_GRACE = 2.0  # the same for processes that a command leaves behind
USER_MUST_CHANGE_SOMETHING = 2
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


@dataclass(frozen=True)
class Command:
    """A process to run. ``name`` prefixes its lines of output when several run together.

    ``stdin`` is its input, at most the 64 KiB that a pipe holds. It may be a password, so repr() does not show it.
    ``grace``: seconds from SIGTERM to SIGKILL.
    """

    name: str
    arguments: tuple[str, ...]
    environment: dict[str, str]
    folder: Path
    stdin: bytes | None = field(default=None, repr=False)
    grace: float = GRACE


class Process(Protocol):
    """What run_together needs of a supervisor: a ``subprocess.Popen`` has it."""

    @property
    def stdout(self) -> IO[bytes] | None: ...

    def send_signal(self, sig: int, /) -> None: ...

    def wait(self) -> int: ...


class Interrupted(Exception):
    """A signal asked to stop. All processes have ended."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


def start(command: Command, hold_open: Sequence[int] = ()) -> Process:
    """Start a command's supervisor. The file descriptors ``hold_open`` stay open until the last process has ended."""
    supervisor = [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(command.grace)]
    process = subprocess.Popen(
        [*supervisor, *command.arguments],
        env=command.environment,
        cwd=command.folder,
        stdin=subprocess.DEVNULL if command.stdin is None else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C reaches only this process, which stops the commands in order
        pass_fds=hold_open,
    )
    if process.stdin is not None and command.stdin is not None:
        with suppress(BrokenPipeError), process.stdin:  # the command may end without reading it
            process.stdin.write(command.stdin)
    return process


def run_together(
    commands: Sequence[Command],
    on_line: Callable[[str, str], None],
    start: Callable[[Command], Process] = start,
) -> int:
    """Run commands in parallel, pass each line of their output to ``on_line(name, line)``, and return their status.

    A command that fails stops the others. The status is 2 if any command ended with 2, else that of the first failure.
    Raises Interrupted after SIGINT, SIGTERM or SIGHUP; a second SIGINT ends the commands without their grace.
    """
    running: dict[int, tuple[Command, Process, bytearray]] = {}
    failures: list[int] = []

    def stop(number: int = signal.SIGTERM) -> None:
        for _, process, _ in running.values():
            with suppress(ProcessLookupError):
                process.send_signal(number)

    with noted_signals() as (noted, wake_up), selectors.DefaultSelector() as selector:
        selector.register(wake_up, selectors.EVENT_READ)
        try:
            for command in commands:
                process = start(command)
                assert process.stdout is not None
                running[process.stdout.fileno()] = (command, process, bytearray())
                selector.register(process.stdout, selectors.EVENT_READ)
            stopping = False
            while running:
                for key, _ in selector.select():
                    if key.fd == wake_up:
                        os.read(wake_up, 1024)
                        continue
                    command, process, unfinished = running[key.fd]
                    output = os.read(key.fd, 1 << 16)
                    for line in whole_lines(unfinished, output):
                        on_line(command.name, line)
                    if not output:  # only the supervisor still held it open, and has ended
                        selector.unregister(key.fd)
                        del running[key.fd]
                        status = ended(process)
                        failures += [status] if status else []
                if (noted or failures) and not stopping:
                    stopping = True
                    stop()
                elif noted.count(signal.SIGINT) > 1:
                    stop(END_AT_ONCE)
        finally:
            stop()
            for _, process, _ in running.values():
                ended(process)
    if noted:
        raise Interrupted(noted[0])
    if USER_MUST_CHANGE_SOMETHING in failures:
        return USER_MUST_CHANGE_SOMETHING
    return failures[0] if failures else 0


def ended(process: Process) -> int:
    status = process.wait()
    if process.stdout:
        process.stdout.close()
    return status if status >= 0 else 128 - status


def whole_lines(unfinished: bytearray, output: bytes) -> Iterator[str]:
    """Yield the lines that ``output`` completes; empty output completes the last one.

    A line that was redrawn, such as a progress bar, is given in its last state.
    """
    unfinished += output
    *lines, rest = unfinished.split(b"\n")
    if not output and rest:
        lines, rest = [rest], bytearray()
    unfinished[:] = rest
    for line in lines:
        yield line.rstrip(b"\r").rpartition(b"\r")[2].decode(errors="replace")


@contextmanager
def noted_signals() -> Iterator[tuple[list[int], int]]:
    """Record stop signals instead of raising, so that none interrupts the start of a process.

    Yields the list of signals received, and a file descriptor that becomes readable with each.
    """
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)

    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    os.set_blocking(writing, False)
    wakeup_before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    handlers_before = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    try:
        yield noted, reading
    finally:
        for number, handler in handlers_before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup_before)
        os.close(reading)
        os.close(writing)


# --- the supervisor


def supervise(parent: int, grace: float) -> int | None:
    """Fork, wait until the fork exits or we do, and return its status once all its descendants have ended.

    Returns None in the fork, which then runs the command.
    """
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    with noted_signals() as (noted, wake_up):
        signal.signal(signal.SIGCHLD, lambda number, frame: None)  # wakes select
        child = os.fork()  # safe: there is only one thread
        if child == 0:
            prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # sent if the supervisor is killed
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return None
        status = None
        kill_at = None
        while status is None:
            select.select([wake_up], [], [], 0.5)
            with suppress(BlockingIOError):
                os.read(wake_up, 1024)
            status = reap().get(child)
            if status is None and kill_at is None and (noted or os.getppid() != parent):
                kill_at = time.monotonic() + grace
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGTERM)
            if kill_at is not None and (time.monotonic() > kill_at or END_AT_ONCE in noted):
                send(signal.SIGKILL)
        end_leftovers()
        return status


def execute(arguments: list[str]) -> NoReturn:
    """Replace this process by a program."""
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # which Python ignores
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvp(arguments[0], arguments)
    except OSError as error:
        print(f"{arguments[0]}: {error.strerror}", flush=True)
        sys.exit(127)


def end_leftovers() -> None:
    """Send SIGTERM, then SIGKILL, to processes that the command left behind."""
    send(signal.SIGTERM)
    deadline = time.monotonic() + LEFTOVER_GRACE
    while descendants() and time.monotonic() < deadline + LEFTOVER_GRACE:
        if time.monotonic() > deadline:
            send(signal.SIGKILL)
        time.sleep(0.02)
        reap()


def reap() -> dict[int, int]:
    """Return the statuses of children that have ended, including adopted ones."""
    statuses: dict[int, int] = {}
    with suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            code = os.waitstatus_to_exitcode(status)
            statuses[pid] = code if code >= 0 else 128 - code
    return statuses


def send(number: int) -> None:
    for pid in descendants():
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def descendants() -> list[int]:
    """Return the ids of all descendants of this process."""
    children: dict[int, list[int]] = {}
    for pid, parent in processes():
        children.setdefault(parent, []).append(pid)
    found, below = [], [os.getpid()]
    while below:
        next_ones = children.get(below.pop(), [])
        found += next_ones
        below += next_ones
    return found


def processes() -> Iterator[tuple[int, int]]:
    """Yield the id of every process on this computer, with its parent's."""
    if Path("/proc/self/stat").exists():
        for entry in os.listdir("/proc"):  # noqa: PTH208
            if entry.isdigit():
                with suppress(OSError):
                    # format: pid (name) state parent ...; the name may contain spaces and parentheses
                    stat = Path(f"/proc/{entry}/stat").read_text(encoding="utf-8", errors="replace")
                    state, parent = stat.rpartition(")")[2].split()[:2]
                    if state != "Z":
                        yield int(entry), int(parent)
        return
    listing = subprocess.Popen(["ps", "-A", "-o", "pid=,ppid="], stdout=subprocess.PIPE, text=True)
    for line in listing.communicate()[0].splitlines():
        pid, parent = line.split()
        if int(pid) != listing.pid:
            yield int(pid), int(parent)


def prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    ended_with = supervise(int(sys.argv[1]), float(sys.argv[2]))
    if ended_with is None:
        execute(sys.argv[3:])
    sys.exit(ended_with)
