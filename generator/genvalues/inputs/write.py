"""From an inputs file to a values file: check, plan, derive the values, check them against the chart, write."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genvalues import __version__
from genvalues.common.dicts import get, merge
from genvalues.common.errors import UserError, UserErrors, write_errors_as_user_errors
from genvalues.common.files import write_named
from genvalues.common.text import one_line, redacted
from genvalues.inputs.chart import (
    find_chart,
    on_top_of_defaults,
    refusal_error,
    refusals,
    top_level_purposes,
    written_in_chart_values,
)
from genvalues.inputs.check import absolute, check, paths, placed
from genvalues.inputs.document import Document, Mistake, read
from genvalues.inputs.generated_file import claimed_digest, difference, is_as_written, schema_comments, with_digest
from genvalues.inputs.input_options import Sources
from genvalues.inputs.values import values_from
from genvalues.inputs.yaml_text import dump
from genvalues.planner.layout import Refused
from genvalues.planner.planning import Plan, gather_facts, plan
from genvalues.planner.prices import Priced, known_price
from genvalues.settings.inputs import DatasetInputs, Inputs, ModelPath
from genvalues.settings.value_rules import contradictions, warnings

PriceOf = Callable[[Inputs], Priced]
Warn = Callable[[UserError], None]


def print_warning(warning: UserError) -> None:
    end = "" if warning.fix else "."  # the error message drops the final period
    print(f"warning: {warning}{end}", file=sys.stderr)


@dataclass(frozen=True)
class Checked:
    """Checked inputs, their plan, and the values derived from both."""

    document: Document
    inputs: Inputs
    values: dict[str, Any]
    plan: Plan


def checked(
    sources: Sources,
    offline: bool = False,
    price: PriceOf = known_price,
    *,
    count_rows: bool = False,
    warn: Warn = print_warning,
) -> Checked:
    """Check the inputs and derive the values: the only way from inputs to values.

    Raises UserErrors with every error in the inputs. ``offline``: do not look up an unknown model on the Hub.
    ``price``: replaces the price table. ``count_rows``: see ``gather_facts``. ``warn`` gets the warnings.
    """
    document = read(*sources.files, sets=sources.sets, set_strings=sources.set_strings)
    inputs = check(document, refusals_of_plan)
    if inputs.on_cpu:
        inputs = with_absolute_paths(inputs, document)
    try:
        made = plan(inputs, gather_facts(inputs, offline, count_rows), price(inputs))
    except Refused as refused:  # an input that the plan cannot keep to is an error at its key
        document.raise_mistakes(mistakes_of(refused))
        raise
    values = values_from(inputs, made)
    check_against(find_chart(sources.chart), values, document)
    for found in warnings(values):
        warn(document.error(placed(found, document)))
    for note in made.notes:
        if note.warns:
            warn(document.error(Mistake(note.key, note.text)))
    return Checked(document, inputs, values, made)


def mistakes_of(refused: Refused) -> list[Mistake]:
    return [Mistake(problem.keys[0], problem.what, problem.fix) for problem in refused.problems]


def refusals_of_plan(inputs: Inputs) -> list[Mistake]:
    """What the plan cannot keep to, as far as that is known without network access. For inputs with other errors."""
    facts = gather_facts(inputs, offline=True)
    try:
        if facts.model.architecture:
            plan(inputs, facts)
    except Refused as refused:
        return mistakes_of(refused)
    return []


def text_of(found: Checked, sources: Sources, output: Path | None = None) -> str:
    """The text of the values file. ``output`` is where it goes; None: stdout."""
    *files, last = (one_line(file.name) for file in sources.files)
    names = f"{', '.join(files)} and {last}: edit those" if files else f"{last}: edit that file"
    sets = [f"--set {assignment}" for assignment in sources.sets]
    sets += [f"--set-string {assignment}" for assignment in sources.set_strings]
    chart = find_chart(sources.chart)
    comments = [
        f"Written by genvalues {__version__} from {names} and run genvalues write again.",
        *(f"  {redacted(one_line(assignment, 200))}" for assignment in sets),
        *schema_comments(
            (chart or Path()) / "values.schema.json",
            Path(os.path.realpath(chart)).parent if chart else None,
            output.parent if output else Path(),
            "genvalues schema --values",
        ),
    ]
    purposes = top_level_purposes(chart) if chart else {}
    sections = []
    for key, value in found.values.items():
        comment = f"# {purposes[key]}\n" if purposes.get(key) else ""
        sections.append(f"\n{comment}{dump({key: value})}")
    return with_digest(comments, "".join(sections))


def with_absolute_paths(inputs: Inputs, document: Document) -> Inputs:
    """The inputs with absolute paths: on the CPU the stages may run in any directory of this machine."""
    for key, path in paths(document.value, document):
        folder = document.position(key).folder
        if key == ("model", "path"):
            inputs = inputs.model_copy(update={"model": ModelPath(path=str(absolute(path, folder)))})
        else:
            written: dict[str, Any] = {str(key[-1]): str(absolute(path, folder))}
            for name in reversed(key[1:-1]):
                written = {str(name): written}
            dataset = DatasetInputs.model_validate(merge(inputs.dataset.as_keys(), written))
            inputs = inputs.model_copy(update={"dataset": dataset})
    return inputs


def check_against(chart: Path | None, values: dict[str, Any], document: Document) -> None:
    """Report what the chart's templates, and its schema if the chart is found, would refuse at install."""
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


def write_values(output: Path, text: str, inputs: Sequence[Path], *, force: bool) -> None:
    """Write the values file atomically. Never over an inputs file; over a file edited by hand only with ``force``."""
    where = f"-o {output}"
    with write_errors_as_user_errors(where):
        if output.is_dir():
            raise UserError(
                "is a directory", where=where, fix=f"Write -o {one_line(str(output / 'values.yaml'), 200)}."
            )
        if output.exists():
            if not output.is_file():
                raise UserError("not a regular file", where=where, fix="Write -o values.yaml, or -o - for stdout.")
            if any(output.samefile(file) for file in inputs):
                raise UserError("is the inputs file itself", where=where, fix="Write -o values.yaml.")
            there = output.read_bytes().decode("utf-8", errors="surrogateescape")
            if not (force or there == text or is_as_written(there)):
                print(difference(there, text, one_line(str(output))), file=sys.stderr)
                what = (
                    "was edited after genvalues wrote it" if claimed_digest(there) else "was not written by genvalues"
                )
                raise UserError(what, where=where, fix="Write to another file, or overwrite this one with --force.")
        write_named(output, text.encode("utf-8"))
