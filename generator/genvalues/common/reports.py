"""What a command prints of a structure: one JSON document for programs, or lines for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from datetime import datetime, timezone
from typing import Any

from genvalues.common.text import camel_case


def print_json(document: dict[str, Any]) -> None:
    """Print the document on stdout."""
    import click

    click.echo(json.dumps(document, indent=2, ensure_ascii=False))


def document_of(value: Any) -> Any:
    """Convert dataclasses to JSON objects with camelCase keys, and times to ISO 8601.

    Every field is written, also if it is empty. Mappings are not converted: their keys are names of resources, or the
    fields of an annotation.
    """
    if is_dataclass(value):
        return {camel_case(field.name): document_of(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, (list, tuple)):
        return [document_of(one) for one in value]
    if isinstance(value, datetime):
        return value.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    return value


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """One line per row, with the columns below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return [line.rstrip() for line in padded]
