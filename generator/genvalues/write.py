"""Inputs file to values file: check, derive, check against the chart, write."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from genvalues.chart import find_chart, refusal_error, refusals, written_in_chart_values
from genvalues.check import absolute, check, paths
from genvalues.document import Document, Mistake, dump, one_line, read, redacted
from genvalues.errors import UserError, UserErrors
from genvalues.files import write_text
from genvalues.inputs import Inputs, ModelPath
from genvalues.values import values_from


def values_text(file: Path, sets: Sequence[str], chart: Path | None, version: str) -> str:
    """The values file for an inputs file; raises every mistake in it."""
    document = read(file, sets=sets)
    inputs = check(document)
    if inputs.on_cpu:
        inputs = with_absolute_paths(inputs, document)
    values = values_from(inputs)
    if found := find_chart(chart):
        check_against(found, values, document)
    lines = [
        f"# Written by genvalues {version} from {one_line(file.name)}: change that file and write again, not this one.",
        *(f"#   --set {redacted(one_line(assignment))}" for assignment in sets),
    ]
    return "\n".join(lines) + "\n" + dump(values)


def with_absolute_paths(inputs: Inputs, document: Document) -> Inputs:
    """On the CPU the stages may run anywhere on this computer: paths as seen from the inputs file."""
    folder = document.path.parent
    for key, path in paths(document.value):
        if key == ("model", "path"):
            inputs = inputs.model_copy(update={"model": ModelPath(path=str(absolute(path, folder)))})
        else:
            source = inputs.dataset.model_copy(update={"source": str(absolute(path, folder))})
            inputs = inputs.model_copy(update={"dataset": source})
    return inputs


def check_against(chart: Path, values: dict[str, object], document: Document) -> None:
    """The chart's own schema has the last word, before Helm speaks it."""
    mistakes, mismatches = [], []
    for key, reason in refusals(chart, values):
        if written_in_chart_values(key, document.value.get("chartValues")):
            mistakes.append(Mistake(("chartValues", *key), reason, f"(the schema of {chart} says so)"))
        else:
            mismatches.append(refusal_error(key, reason, chart))
    document.raise_mistakes(mistakes)
    if mismatches:
        raise UserErrors(mismatches)


def write_values(output: Path, text: str, inputs: Path) -> None:
    """Whole or not at all, and never over the inputs."""
    if output.is_dir():
        raise UserError("this is a folder", where=f"-o {output}", fix=f"Write -o {output / 'values.yaml'}.")
    if output.exists() and output.samefile(inputs):
        raise UserError("that is the inputs file itself", where=f"-o {output}", fix="Write -o values.yaml.")
    try:
        write_text(output, text)
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", where=f"-o {output}") from None
