"""Limit the CPU time and the memory of what a stranger's file makes this process compute.

Python handles a signal between two of its operations. A single one, such as the comparison of two lists, can take
years, so a second signal ends the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from genvalues.common.errors import EXIT_USER_ERROR, UserError

SECONDS = 30.0  # CPU time of this process that a block, such as the rendering of a row, may take
END_SECONDS = 60.0  # the same of one that cannot be interrupted, with the time in the kernel; it ends the process
MEMORY = 2 * 2**30  # bytes that the blocks of one limited_process may take, beyond what the process has

_libc = ctypes.CDLL(None)
_libc.signal.argtypes, _libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p


class TimeUp(Exception):
    """Raised in a block that takes longer than it may."""


class _Thread(threading.local):
    limited = False  # whether it is in a block of limited_process


class _Process:
    block = ("", "", "")  # the arguments of the innermost block of ``limited``


_thread = _Thread()


@contextlib.contextmanager
def limited(what: str, where: str, fix: str) -> Iterator[None]:
    """Limit the CPU time and the memory of the block, and raise UserError for ``what`` if it needs more.

    An operation that cannot be interrupted ends the process, with the same line and status 2. The time limit needs the
    main thread, because only that one handles signals; the memory limit needs Linux.
    """
    try:
        with contextlib.nullcontext() if _thread.limited else limited_process(), _limited_time(what, where, fix):
            yield
    except TimeUp:
        raise _too_slow(what, where, fix) from None
    except MemoryError:
        raise UserError(f"{what} takes more than {MEMORY / 2**30:g} GiB of memory", where=where, fix=fix) from None


def _too_slow(what: str, where: str, fix: str) -> UserError:
    return UserError(f"{what} takes more than {SECONDS:g} seconds", where=where, fix=fix)


@contextlib.contextmanager
def limited_process() -> Iterator[None]:
    """Limit the memory of the block, so that ``limited`` in it has only to start the time again.

    For a batch of rows: setting the memory limit and the signal handlers takes as long as a rendering.
    """
    with _limited_memory(), _handled_signals():
        _thread.limited = True
        try:
            yield
        finally:
            _thread.limited = False


@contextlib.contextmanager
def _handled_signals() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    before = signal.signal(signal.SIGVTALRM, _stop)
    before_end = _libc.signal(signal.SIGPROF, ctypes.cast(_END_PROCESS, ctypes.c_void_p))
    try:
        yield
    finally:
        _libc.signal(signal.SIGPROF, before_end)
        signal.signal(signal.SIGVTALRM, before)


def _stop(number: int, frame: FrameType | None) -> None:
    if frame is not None and frame.f_code is _end_process.__code__:  # this signal has waited for Python until there
        _end_process(number)
    raise TimeUp


def _end_process(number: int) -> None:
    os.write(2, f"{_too_slow(*_Process.block)}\n".encode(errors="replace"))
    os._exit(EXIT_USER_ERROR)


# As a handler of C, which is called at once, in the middle of any operation: only an exit is safe there.
_END_PROCESS = ctypes.CFUNCTYPE(None, ctypes.c_int)(_end_process)


@contextlib.contextmanager
def _limited_time(what: str, where: str, fix: str) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    outer, _Process.block = _Process.block, (what, where, fix)
    # Again each second, in case an exception handler swallows it.
    before = signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS, 1)
    before_end = signal.setitimer(signal.ITIMER_PROF, END_SECONDS, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, *before_end)
        signal.setitimer(signal.ITIMER_VIRTUAL, *before)
        _Process.block = outer


@contextlib.contextmanager
def _limited_memory() -> Iterator[None]:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = pages * resource.getpagesize() + MEMORY
    others = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(most, *others) if others else most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
