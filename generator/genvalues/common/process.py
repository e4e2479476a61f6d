"""Running processes so that none outlives us: the one place that does.

Each command runs under a small supervisor (this file again, run as a script). It adopts what its command leaves
behind, torchrun's workers for example, which have sessions of their own that no signal to a process group reaches.
When it is told to stop, when its command ends or when whoever started it is gone, be it by SIGKILL, it ends
everything below it.
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

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE = 10.0  # seconds from SIGTERM to SIGKILL for a command
LEFTOVER_GRACE = 2.0  # the same for what a command leaves behind when it ends
USER_MUST_CHANGE_SOMETHING = 2
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


@dataclass(frozen=True)
class Command:
    """One process: its name (before its lines, when several run together), command line, environment and folder.

    ``stdin`` is what it reads, less than the 64 KiB that a pipe holds: a password, so no representation shows it.
    """

    name: str
    arguments: tuple[str, ...]
    environment: dict[str, str]
    folder: Path
    stdin: bytes | None = field(default=None, repr=False)


class Interrupted(Exception):
    """A signal asked for the end; every process is gone by now."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


def run_together(
    commands: Sequence[Command], on_line: Callable[[str, str], None], hold_open: Sequence[int] = ()
) -> int:
    """Run commands side by side, each line of their output to ``on_line(name, line)``, and return how they ended.

    The first that fails stops the others. Status 2 of any is the status of all, else the first failure's. The file
    descriptors ``hold_open`` stay open until the last process is gone. Raises Interrupted after a Ctrl-C, SIGTERM or
    hang-up.
    """
    running: dict[int, tuple[Command, subprocess.Popen[bytes], bytearray]] = {}
    failures: list[int] = []

    def stop() -> None:
        for _, process, _ in running.values():
            with suppress(ProcessLookupError):
                process.terminate()

    with noted_signals() as (noted, wake_up), selectors.DefaultSelector() as selector:
        selector.register(wake_up, selectors.EVENT_READ)
        try:
            for command in commands:
                process = start(command, hold_open)
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
                    if not output:  # the supervisor is the last to close it
                        selector.unregister(key.fd)
                        del running[key.fd]
                        status = ended(process)
                        failures += [status] if status else []
                if (noted or failures) and not stopping:
                    stopping = True
                    stop()
        finally:
            stop()
            for _, process, _ in running.values():
                ended(process)
    if noted:
        raise Interrupted(noted[0])
    if USER_MUST_CHANGE_SOMETHING in failures:
        return USER_MUST_CHANGE_SOMETHING
    return failures[0] if failures else 0


def start(command: Command, hold_open: Sequence[int]) -> subprocess.Popen[bytes]:
    supervisor = [sys.executable, "-I", "-S", __file__, str(os.getpid())]
    process = subprocess.Popen(
        [*supervisor, *command.arguments],
        env=command.environment,
        cwd=command.folder,
        stdin=subprocess.DEVNULL if command.stdin is None else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # a terminal's Ctrl-C comes to us alone, and we pass it on in order
        pass_fds=hold_open,
    )
    if process.stdin is not None and command.stdin is not None:
        with suppress(BrokenPipeError), process.stdin:  # it may end without reading it
            process.stdin.write(command.stdin)
    return process


def ended(process: subprocess.Popen[bytes]) -> int:
    status = process.wait()
    if process.stdout:
        process.stdout.close()
    return status if status >= 0 else 128 - status


def whole_lines(unfinished: bytearray, output: bytes) -> Iterator[str]:
    """The lines that ``output`` finishes (an empty one ends the last); of a redrawn progress bar, its last state."""
    unfinished += output
    *lines, rest = unfinished.split(b"\n")
    if not output and rest:
        lines, rest = [rest], bytearray()
    unfinished[:] = rest
    for line in lines:
        yield line.rstrip(b"\r").rpartition(b"\r")[2].decode(errors="replace")


@contextmanager
def noted_signals() -> Iterator[tuple[list[int], int]]:
    """Signals that ask for the end are noted, not raised: nothing is half started when they are looked at.

    Yields the list of them and a file descriptor that becomes readable with each.
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


def supervise(parent: int, arguments: list[str]) -> int:
    """Run one command to its end, or to ours; return its status once nothing of it is left."""
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    with noted_signals() as (noted, wake_up):
        signal.signal(signal.SIGCHLD, lambda number, frame: None)  # wakes select
        try:
            # preexec_fn is safe here: there is one thread. The signal is for when we are killed ourselves.
            child = subprocess.Popen(arguments, preexec_fn=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGTERM))  # noqa: PLW1509
        except OSError as error:
            print(f"{arguments[0]}: {error.strerror}", flush=True)
            return 127
        status = None
        kill_at = None
        while status is None:
            select.select([wake_up], [], [], 0.5)
            with suppress(BlockingIOError):
                os.read(wake_up, 1024)
            status = reap().get(child.pid)
            if status is None and kill_at is None and (noted or os.getppid() != parent):
                kill_at = time.monotonic() + GRACE
                with suppress(ProcessLookupError):
                    os.kill(child.pid, signal.SIGTERM)  # not terminate(), which could take its status from reap()
            if kill_at is not None and time.monotonic() > kill_at:
                send(signal.SIGKILL)
        end_leftovers()
        return status


def end_leftovers() -> None:
    """SIGTERM, then SIGKILL, to what the command left behind."""
    send(signal.SIGTERM)
    deadline = time.monotonic() + LEFTOVER_GRACE
    while descendants() and time.monotonic() < deadline + LEFTOVER_GRACE:
        if time.monotonic() > deadline:
            send(signal.SIGKILL)
        time.sleep(0.02)
        reap()


def reap() -> dict[int, int]:
    """The statuses of children, adopted ones too, that have ended."""
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
    """Every process below this one."""
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
    """Every process of this computer, with its parent."""
    if Path("/proc/self/stat").exists():
        for entry in os.listdir("/proc"):  # noqa: PTH208
            if entry.isdigit():
                with suppress(OSError):
                    # pid (name, which may hold spaces and brackets) state parent ...
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
    sys.exit(supervise(int(sys.argv[1]), sys.argv[2:]))
