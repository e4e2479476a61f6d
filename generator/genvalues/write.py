"""Inputs file to values file: check, derive, check against the chart, write."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from genvalues import __version__
from genvalues.chart import find_chart, on_top_of_defaults, refusal_error, refusals, written_in_chart_values
from genvalues.check import absolute, check, paths, placed
from genvalues.contradictions import contradictions, warnings
from genvalues.document import Document, Mistake, read
from genvalues.errors import UserError, UserErrors
from genvalues.files import write_text
from genvalues.inputs import Inputs, ModelPath
from genvalues.nested import get
from genvalues.sources import Sources
from genvalues.values import values_from
from genvalues.wording import one_line, redacted
from genvalues.yamltext import dump

NOT_WRITABLE = "Name a file in a folder that is there and that you may write to."


@dataclass(frozen=True)
class Checked:
    """Inputs in which there is no mistake, and the values for them."""

    document: Document
    inputs: Inputs
    values: dict[str, Any]


def checked(sources: Sources) -> Checked:
    """The one way from inputs to values. Raises every mistake in the inputs; warnings go to stderr."""
    document = read(*sources.files, sets=sources.sets, set_strings=sources.set_strings)
    inputs = check(document)
    if inputs.on_cpu:
        inputs = with_absolute_paths(inputs, document)
    values = values_from(inputs)
    check_against(find_chart(sources.chart), values, document)
    for found in warnings(values):
        print(f"warning: {document.error(placed(found, document))}", file=sys.stderr)
    return Checked(document, inputs, values)


def text_of(found: Checked, sources: Sources) -> str:
    """The values file."""
    lines = [
        f"# Written by genvalues {__version__} from {one_line(sources.file.name)}: "
        "change that file and write again, not this one.",
        *(f"#   --set {redacted(one_line(assignment))}" for assignment in sources.sets),
    ]
    return "\n".join(lines) + "\n" + dump(found.values)


def with_absolute_paths(inputs: Inputs, document: Document) -> Inputs:
    """On the CPU the stages may run anywhere on this computer: paths as seen from the file they are written in."""
    for key, path in paths(document.value):
        folder = document.position(key).folder
        if key == ("model", "path"):
            inputs = replace(inputs, model=ModelPath(path=str(absolute(path, folder))))
        else:
            source = replace(inputs.dataset, source=str(absolute(path, folder)))
            inputs = replace(inputs, dataset=source)
    return inputs


def check_against(chart: Path | None, values: dict[str, Any], document: Document) -> None:
    """What the chart's templates refuse, and its schema where the chart is at hand: before Helm says it."""
    if chart is None:
        document.raise_mistakes(placed(found, document) for found in contradictions(values))
        return
    complete = on_top_of_defaults(chart, values)
    mistakes = [placed(found, document) for found in contradictions(complete)]
    mismatches = []
    for key, reason in refusals(chart, complete):
        if written_in_chart_values(key, get(document.value, "chartValues", dict) or {}):
            mistakes.append(Mistake(("chartValues", *key), reason, f"(the schema of {chart} says so)"))
        else:
            mismatches.append(refusal_error(key, reason, chart))
    document.raise_mistakes(mistakes)
    if mismatches:
        raise UserErrors(mismatches)


def write_values(output: Path, text: str, inputs: Path) -> None:
    """Whole or not at all, and never over the inputs."""
    try:
        if output.is_dir():
            raise UserError("this is a folder", where=f"-o {output}", fix=f"Write -o {output / 'values.yaml'}.")
        if output.exists() and output.samefile(inputs):
            raise UserError("that is the inputs file itself", where=f"-o {output}", fix="Write -o values.yaml.")
        write_text(output, text)
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", where=f"-o {output}", fix=NOT_WRITABLE) from None
