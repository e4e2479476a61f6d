"""How a stage that runs as a PyTorchJob fails, as its gate tells it."""

from __future__ import annotations

from genvalues.common.errors import EXIT_USER_ERROR

STAGE_FAILED = 1


class StageFailed(Exception):
    """The stage's job ended badly. ``status`` is 2 when the user must change something."""

    def __init__(self, reason: str, *, status: int = STAGE_FAILED) -> None:
        self.reason = reason
        self.status = status
        self.pod = ""
        self.tail: list[str] = []
        super().__init__(reason)


class StoppedByGuard(StageFailed):
    """The gate itself has ended the job. Status 2: what tries again unasked would pay again, for the same."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason, status=EXIT_USER_ERROR)


def describe_failure(stage: str, failure: StageFailed) -> str:
    """The last words of the gate's log: stage, reason, tail."""
    lines = [f"{stage} failed: {failure.reason}"]
    if failure.tail:
        lines += [f"last {len(failure.tail)} lines of {failure.pod}:", *(f"  {line}" for line in failure.tail)]
    return "\n".join(lines)
