"""Stop a training on request: the launcher gets the signal, the workers save together, and all exit with status 143.

Kubernetes sends SIGTERM to a container's first process, and SIGKILL after terminationGracePeriodSeconds (Kubernetes
docs: Pod Lifecycle, Termination of Pods). The first process is the launcher. torchrun's default handling leaves no time
to save: it forwards SIGTERM and kills the workers after 30 s (torch 2.8, PContext.close in
distributed/elastic/multiprocessing/api.py). So the launcher handles the signal and sends its workers SIGUSR1, as is
common with Slurm. In a worker SIGTERM has torchrun's meaning: another worker failed, exit at once.

Both signals first write the stack traces of all threads of the worker to a file, even if its main thread hangs in C
code and cannot save.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import IO

from genvalues.common import files
from genvalues.settings.run import TRAIN_GRACE_SECONDS

EXIT_STOPPED = 128 + signal.SIGTERM
STOP_SIGNAL = signal.SIGUSR1
MARGIN = 10.0  # of the grace period, to kill workers that do not end, and to exit
MOST_DELETIONS = 100  # of the folder for stack traces: once by each worker that ends meanwhile


class _Process:
    """The state of this process: whether a stop was requested, and the file for stack traces."""

    stop_requested = False
    stacks: IO[str] | None = None


class TrainingStopped(Exception):
    """Raised when the training ended early on request, with everything saved."""


def grace_period() -> float:
    """The pod's terminationGracePeriodSeconds, which the chart gives to its container (tests/chart/test_config.py)."""
    return float(os.environ.get("LLAMA_LORA_GRACE_SECONDS") or TRAIN_GRACE_SECONDS)


def note_requests() -> None:
    """Handle stop requests by noting them. Before this call they end the worker, which has nothing to save yet."""
    if _Process.stacks:
        faulthandler.unregister(STOP_SIGNAL)
    signal.signal(STOP_SIGNAL, _note)
    if _Process.stacks:
        # faulthandler must be registered last: it writes the stacks and then calls the handler below it.
        faulthandler.register(STOP_SIGNAL, _Process.stacks, chain=True)


def stop_requested() -> bool:
    """Whether this worker was asked to stop. Other workers may not have been asked yet."""
    return _Process.stop_requested


def _note(number: int, frame: FrameType | None) -> None:
    _Process.stop_requested = True


@contextlib.contextmanager
def write_stacks_to(file: Path) -> Iterator[None]:
    """Within the block, both signals write all threads' stack traces to ``file``. An empty file is deleted after it."""
    with open_in_folder(file) as written:
        _Process.stacks = written
        for number in (STOP_SIGNAL, signal.SIGTERM):
            faulthandler.register(number, written, chain=True)
        try:
            yield
        finally:
            for number in (STOP_SIGNAL, signal.SIGTERM):
                faulthandler.unregister(number)
            _Process.stacks = None
    with contextlib.suppress(FileNotFoundError):  # a second training of the run, which waited, has deleted it
        if not file.stat().st_size:
            file.unlink()
    with contextlib.suppress(OSError):  # the folder has files of other workers
        file.parent.rmdir()


def open_in_folder(file: Path) -> IO[str]:
    """Open an empty file. Its folder is made, again if a worker that ends has just deleted it."""
    for _ in range(MOST_DELETIONS):
        file.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            return files.open_to_append(file, empty=True)
    return files.open_to_append(file, empty=True)


def exit_on_sigterm() -> None:
    """Exit with status 143 on SIGTERM, which a container's first process ignores by default."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(EXIT_STOPPED))
