"""How a stage behind a gate fails, and how its gate's log reports it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from genvalues.common.errors import EXIT_USER_ERROR

# Exit statuses besides EXIT_USER_ERROR: see genvalues.cluster.
STAGE_FAILED, RETRY = 1, 3
STOPPED = "stopped: "  # starts the reason when a guard has ended the job


class StageFailed(Exception):
    """The stage failed. ``status`` is 2 if the user must change something."""

    def __init__(self, reason: str, *, status: int = STAGE_FAILED) -> None:
        self.reason = reason
        self.status = status
        self.pod = ""
        self.tail: list[str] = []
        super().__init__(reason)


class StoppedByGuard(StageFailed):
    """The gate ended the job, or did not start it. Status 2, because an automatic retry would incur the same cost."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason, status=EXIT_USER_ERROR)


def describe_failure(stage: str, failure: StageFailed) -> str:
    """The last lines of the gate's log: stage and reason, then the last log lines of the pod that failed."""
    lines = [f"{stage} failed: {failure.reason}"]
    if failure.tail:
        lines += [f"last {len(failure.tail)} lines of {failure.pod}:", *(f"  {line}" for line in failure.tail)]
    return "\n".join(lines)


def parse_failure(stage: str, lines: Sequence[str]) -> tuple[str, str, tuple[str, ...]]:
    """Read ``describe_failure`` back from a gate's log: the reason, the pod and the last lines of that pod's log.

    A log without it, e.g. of a gate that ended with another error, gives its last line as the reason.
    """
    first = f"{stage} failed: "
    start = max((index for index, line in enumerate(lines) if line.startswith(first)), default=None)
    if start is None:
        return (lines[-1] if lines else ""), "", tuple(lines[:-1])
    reason = [lines[start].removeprefix(first)]
    for index, line in enumerate(lines[start + 1 :], start + 1):
        if begins := re.fullmatch(r"last \d+ lines of (\S+):", line):
            return " ".join(reason), begins[1], tuple(one.removeprefix("  ") for one in lines[index + 1 :])
        reason.append(line.strip())
    return " ".join(reason), "", ()
