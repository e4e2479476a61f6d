"""How workers fail: each records why, and the launcher reports the failure that caused the others, in one line.

When a worker ends, the others lose their connections to it and fail as well. Their errors are only consequences.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from genvalues.common.errors import (
    EXIT_FAILED,
    EXIT_USER_ERROR,
    EXIT_VOLUME,
    Unavailable,
    UserError,
    UserErrors,
    VolumeError,
    internal_error,
    traceback_wanted,
)
from genvalues.common.system_errors import causes, explain
from genvalues.common.text import one_line

USER, VOLUME, OTHER, CONNECTION = "user", "volume", "other", "connection"
STATUSES = {USER: EXIT_USER_ERROR, VOLUME: EXIT_VOLUME, OTHER: EXIT_FAILED, CONNECTION: EXIT_FAILED}
# How gloo and torch's store report that another worker is gone; other transports raise classes of torch's DistError.
LOST_CONNECTION = re.compile(
    r"gloo|Connection (closed|reset) by peer|Broken pipe|failed to connect|Timed out waiting \d+ ?ms", re.IGNORECASE
)
TORCHS_CLASSES = {"DistBackendError", "DistNetworkError", "DistStoreError"}
# After a lost connection a worker waits this long for its launcher to end it. So the launcher sees the cause first.
LINGER = 2.0

SIGNALS = {
    signal.SIGKILL: "Out of memory? Then raise resources.limits.memory of the stage, or lower the batch.",
    signal.SIGBUS: "Is /dev/shm full? Then raise sharedMemory.",
}
CRASHED = "A library crashed: report it with the log of the stage."


class WorkersFailed(Unavailable):
    """Workers failed in a way that running the stage again may resolve."""


class OtherWorkerFailed(Exception):
    """This worker ends because another one failed, whose failure is reported."""


@dataclass(frozen=True)
class Failure:
    """Why a worker failed: one of the kinds above, and the message. ``at`` is a time in seconds."""

    rank: int
    kind: str
    message: str
    at: float

    @property
    def status(self) -> int:
        return STATUSES[self.kind]


def failure_of(error: BaseException, workspace: Path, rank: int) -> Failure:
    """Classify what a worker raised. Prints the traceback of an internal error where it is wanted."""
    explained = error if isinstance(error, (UserError, Unavailable, VolumeError)) else None
    if explained is None and is_lost_connection(error):
        return Failure(rank, CONNECTION, one_line(f"{type(error).__name__}: {error}", 200), time.time())
    explained = explained or explain(error, workspace)
    if isinstance(explained, UserError):
        return Failure(rank, USER, str(explained), time.time())
    if isinstance(explained, VolumeError):
        return Failure(rank, VOLUME, str(explained), time.time())
    if explained is not None:
        return Failure(rank, OTHER, str(explained), time.time())
    *trace, line = internal_error(error, "llama-lora", with_traceback=traceback_wanted()).split("\n")
    if trace:
        print("\n".join(trace), file=sys.stderr, flush=True)
    return Failure(rank, OTHER, line, time.time())


def is_lost_connection(error: BaseException) -> bool:
    """Whether an error says that another worker is gone."""
    return isinstance(error, OtherWorkerFailed) or any(
        TORCHS_CLASSES & {kind.__name__ for kind in type(each).__mro__}
        or (isinstance(each, (RuntimeError, ConnectionError)) and LOST_CONNECTION.search(str(each)))
        for each in causes(error)
    )


def record(failure: Failure, folder: Path) -> None:
    """Write a failure where the launcher reads it; print it if that is not possible."""
    try:
        partial = folder / f".{failure.rank}"
        partial.write_text(json.dumps(asdict(failure)), encoding="utf-8")
        partial.replace(folder / f"{failure.rank}.json")
    except OSError:
        print(failure.message, file=sys.stderr, flush=True)


def read(folder: Path) -> list[Failure]:
    """Read the failures of the workers, the earliest first."""
    found = [Failure(**json.loads(file.read_text(encoding="utf-8"))) for file in folder.glob("*.json")]
    return sorted(found, key=lambda failure: failure.at)


def raise_user_and_volume_errors(failures: Sequence[Failure]) -> None:
    """Raise UserErrors, each message once, else VolumeError, if a worker failed with one."""
    if of_users := sorted({failure.message for failure in failures if failure.kind == USER}):
        raise UserErrors([UserError(message) for message in of_users])
    for failure in failures:
        if failure.kind == VOLUME:
            raise VolumeError(failure.message)


def cause(failures: Sequence[Failure], statuses: Mapping[int, int]) -> WorkersFailed:
    """The error to report for workers of this node that failed otherwise.

    ``statuses`` maps ranks to exit statuses, -N for signal N. torchrun ends the workers that are left with SIGTERM.
    """
    own = [failure for failure in failures if failure.kind == OTHER]
    recorded = {failure.rank for failure in failures}
    ended = {rank: -status for rank, status in statuses.items() if status < 0 and rank not in recorded}
    killed = {rank: number for rank, number in ended.items() if number != signal.SIGTERM}
    silent = {rank: status for rank, status in statuses.items() if status > 0 and rank not in recorded}
    if killed and not own:
        return WorkersFailed(_ended_by_signal(killed))
    if own:
        return WorkersFailed(f"worker {own[0].rank}: {own[0].message}")
    if silent:
        rank, status = min(silent.items())
        return WorkersFailed(f"worker {rank} ended with status {status}; its output is above.")
    if failures:
        first = failures[0]
        what = f"worker {first.rank} lost the connection to another worker ({first.message})"
        return WorkersFailed(f"{what}. The log of the node whose worker ended first says why.")
    return WorkersFailed(_ended_by_signal(ended) if ended else "the workers failed; their output is above.")


def _ended_by_signal(numbers: Mapping[int, int]) -> str:
    number = numbers[min(numbers)]
    ranks = [str(rank) for rank in sorted(numbers) if numbers[rank] == number]
    who = f"worker {ranks[0]} was" if len(ranks) == 1 else f"workers {', '.join(ranks[:-1])} and {ranks[-1]} were"
    name = ""
    with suppress(ValueError):
        name = f" ({signal.Signals(number).name})"
    fix = "" if number == signal.SIGTERM else f" {SIGNALS.get(signal.Signals(number), CRASHED)}" if name else ""
    return f"{who} ended by signal {number}{name}.{fix}"


def end_worker(failure: Failure) -> None:
    """End this worker. A normal exit aborts if gloo's threads are waiting for other workers."""
    sys.stdout.flush()
    sys.stderr.flush()
    if failure.kind == CONNECTION:
        time.sleep(LINGER)
    os._exit(failure.status)
