"""The errors and warnings of inputs, for programs."""

from __future__ import annotations

from typing import Any, Literal

from genvalues.common.errors import EXIT_USER_ERROR, UserError, UserErrors
from genvalues.inputs.document import PlacedError
from genvalues.inputs.input_options import Sources
from genvalues.inputs.write import checked


def findings_of(sources: Sources) -> dict[str, Any]:
    """The document of `genvalues check --json`: errors in the order of their places, or else warnings."""
    warned: list[UserError] = []
    errors: list[UserError] = []
    try:
        checked(sources, warn=warned.append)
    except UserErrors as found:
        errors = found.errors
    except UserError as found:
        errors = [found]
    findings = [finding("error", each) for each in errors] + [finding("warning", each) for each in warned]
    return {"findings": findings, "exitStatus": EXIT_USER_ERROR if errors else 0}


def finding(level: Literal["error", "warning"], error: UserError) -> dict[str, Any]:
    placed = error if isinstance(error, PlacedError) else None
    return {
        "level": level,
        "key": placed.key if placed else "",
        "where": error.where,
        "line": (placed.position.line or None) if placed else None,
        "message": error.what,
        "fix": error.fix,
    }
