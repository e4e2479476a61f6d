"""How a training is stopped: its launcher is told, the workers save together, and all end with status 143.

Kubernetes sends SIGTERM to a container's first process and SIGKILL when terminationGracePeriodSeconds are over
(Kubernetes docs: Pod Lifecycle, Termination of Pods). That process is the launcher. torchrun's own way with SIGTERM
would leave no time to save: it sends it on and kills the workers 30 s later (torch 2.8, PContext.close in
distributed/elastic/multiprocessing/api.py). So the launcher takes the signal itself, and asks its workers by SIGUSR1,
as Slurm's users know it. To a worker SIGTERM means what torchrun means by it: another one has failed, end at once.

Either signal first writes the stacks of all the worker's threads into a file, also where its main thread hangs in C
and will never get to save.
"""

from __future__ import annotations

import contextlib
import faulthandler
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import IO

STOPPED = 128 + signal.SIGTERM
ASK = signal.SIGUSR1
# The pods' terminationGracePeriodSeconds (chart/templates/_stage-pod.tpl; tests/chart/test_pods.py compares them), and
# what of it is left to kill workers that do not end, and to end.
GRACE_PERIOD = 120.0
MARGIN = 10.0


class _Process:
    """What signals have done to this process, and where its stacks go: there is one of each."""

    asked = False
    stacks: IO[str] | None = None


class Stopped(Exception):
    """The training has ended early, as it was asked to, with everything saved."""


def ask_noted() -> None:
    """From now on being asked to stop is noted; until then it ends a worker at once, because it has nothing to save."""
    if _Process.stacks:
        faulthandler.unregister(ASK)
    signal.signal(ASK, _note)
    if _Process.stacks:
        faulthandler.register(ASK, _Process.stacks, chain=True)  # above the handler, which it calls after writing


def asked() -> bool:
    """Whether this worker has been asked to stop. The others may not have been, yet."""
    return _Process.asked


def _note(number: int, frame: FrameType | None) -> None:
    _Process.asked = True


@contextlib.contextmanager
def stacks_in(file: Path) -> Iterator[None]:
    """Within this, both signals write all threads' stacks into ``file``, which replaces an earlier one, and is removed
    at the end when it is empty."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8") as written:
        _Process.stacks = written
        for number in (ASK, signal.SIGTERM):
            faulthandler.register(number, written, chain=True)
        try:
            yield
        finally:
            for number in (ASK, signal.SIGTERM):
                faulthandler.unregister(number)
            _Process.stacks = None
    if not file.stat().st_size:
        file.unlink()
        with contextlib.suppress(OSError):  # others' are still there
            file.parent.rmdir()


def end_when_told() -> None:
    """SIGTERM ends this process with status 143: as a container's first process it would ignore it."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(STOPPED))
