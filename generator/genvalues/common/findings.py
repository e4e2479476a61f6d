"""The result of a preflight check, for the chart's preflight stage and for genvalues preflight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from genvalues.common.errors import EXIT_USER_ERROR
from genvalues.common.reports import document_of

Level = Literal["ok", "warning", "error", "not checked"]

EXIT_UNANSWERED = 1


@dataclass(frozen=True)
class Finding:
    level: Level
    subject: str
    found: str
    fix: str = ""  # a command
    unanswered: bool = False  # the service that was asked did not answer; a retry may help

    def __str__(self) -> str:
        line = f"{self.level:<11}  {self.subject}: {self.found}"
        return f"{line}\n{'':<11}  fix: {self.fix}" if self.fix else line


def show(findings: Sequence[Finding], say: Callable[[str], None] = print) -> None:
    """Pass each finding, with its fix, to ``say``, and then the number of errors."""
    for finding in findings:
        say(str(finding))
    if errors := sum(finding.level == "error" for finding in findings):
        say(f"{errors} of {len(findings)} findings stop this release; the fixes are above")


def exit_status(findings: Sequence[Finding]) -> int:
    """2 if the user must fix an error, 1 if there is no error but a service did not answer, else 0."""
    if any(finding.level == "error" for finding in findings):
        return EXIT_USER_ERROR
    return EXIT_UNANSWERED if any(finding.unanswered for finding in findings) else 0


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """The document that --json prints."""
    return {"findings": document_of(findings), "exitStatus": exit_status(findings)}
