"""What a check of the world found: the one form of it, for the chart's preflight stage and for genvalues preflight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from genvalues.common.errors import EXIT_USER_ERROR

Level = Literal["ok", "warning", "error", "not checked"]

EXIT_UNANSWERED = 1


@dataclass(frozen=True)
class Finding:
    level: Level
    subject: str
    found: str
    fix: str = ""  # a command
    unanswered: bool = False  # who was asked was away: worth another try

    def __str__(self) -> str:
        line = f"{self.level:<11}  {self.subject}: {self.found}"
        return f"{line}\n{'':<11}  fix: {self.fix}" if self.fix else line

    def as_json(self) -> dict[str, Any]:
        """Every key always, so that a reader needs no defaults."""
        return asdict(self)


def show(findings: Sequence[Finding], say: Callable[[str], None] = print) -> None:
    """Each finding with its fix below it, and last how many of them stop the release."""
    for finding in findings:
        say(str(finding))
    if errors := sum(finding.level == "error" for finding in findings):
        say(f"{errors} of {len(findings)} findings stop this release; the fixes are above")


def exit_status(findings: Sequence[Finding]) -> int:
    """2: an error is among them, which the user must mend; 1: none, but somebody gave no answer; else 0."""
    if any(finding.level == "error" for finding in findings):
        return EXIT_USER_ERROR
    return EXIT_UNANSWERED if any(finding.unanswered for finding in findings) else 0


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """The document that --json prints."""
    return {"findings": [finding.as_json() for finding in findings], "exitStatus": exit_status(findings)}
