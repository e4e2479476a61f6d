"""The chart on disk: where it is, and whether it accepts values."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from genvalues.common.dicts import merge, without_null
from genvalues.common.errors import UserError
from genvalues.common.text import KeyPath, dotted, one_line

NAME = "llama-lora"
NAME_OURS = f"Name the directory of the chart {NAME}."
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the chart's files are ours, and long
BESIDE_THE_SOURCES = Path(__file__).parents[3] / "chart"


def find_chart(wanted: Path | None) -> Path | None:
    """The chart that was asked for, else ./chart if it is ours, else the one of the source tree, else none."""
    if wanted is not None:
        if not os.path.isfile(wanted / "Chart.yaml"):  # noqa: PTH113 - which never raises
            raise UserError("not a chart: Chart.yaml not found", where=f"--chart {wanted}", fix=NAME_OURS)
        return wanted
    for candidate in (Path("chart"), BESIDE_THE_SOURCES):
        if chart_name(candidate) == NAME:
            return candidate
    return None


def need_chart(wanted: Path | None) -> Path:
    """The same, for what cannot do without."""
    found = find_chart(wanted)
    if found is None:
        raise UserError("no chart found", fix="Name its directory: --chart DIR.")
    return found


def load(text: str) -> Any:
    return yaml.load(text, Loader=LOADER)


def chart_name(chart: Path) -> str:
    try:
        metadata = load((chart / "Chart.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return ""
    return str(metadata.get("name", "")) if isinstance(metadata, dict) else ""


def values_schema(chart: Path) -> dict[str, Any]:
    return part(chart, "values.schema.json", json.loads)


def values_schema_text(chart: Path) -> str:
    """As it is in the chart."""
    values_schema(chart)  # which says what is wrong where that is no schema
    return (chart / "values.schema.json").read_text(encoding="utf-8")


def part(chart: Path, name: str, parse: Callable[[str], Any]) -> dict[str, Any]:
    """A file of the chart that holds keys and values."""
    try:
        found = parse((chart / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise UserError(f"cannot be read: {reason}", where=str(chart / name), fix=NAME_OURS) from None
    if not isinstance(found, dict):
        raise UserError("must contain keys and values", where=str(chart / name), fix=NAME_OURS)
    return found


def on_top_of_defaults(chart: Path, values: dict[str, Any]) -> dict[str, Any]:
    """What the templates see, as Helm makes it of the chart's defaults and these values."""
    return dict(without_null(merge(part(chart, "values.yaml", load), values)))


def top_level_purposes(chart: Path) -> dict[str, str]:
    """What each top-level key of the values is for, in a line; as the chart's schema says it, shortened."""
    keys = values_schema(chart).get("properties", {})
    return {key: shortened(str(rules.get("description", ""))) for key, rules in keys.items()}


def shortened(description: str, width: int = 100) -> str:
    """Its first sentence, and of a long one what comes before a comma."""
    sentence = description.split(". ")[0].rstrip(".")
    while len(sentence) > width and "," in sentence:
        sentence = sentence.rpartition(",")[0]
    return one_line(f"{sentence}.", width + 1) if sentence else ""


def refusals(chart: Path, values: dict[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    """What the chart's schema has against values that are on top of its defaults: key and reason."""
    schema = values_schema(chart)

    try:
        errors = list(jsonschema.Draft7Validator(schema).iter_errors(values))
    except Exception as failure:  # whatever its code stumbles over, a schema that is none is not checked for that first
        wrong = next(jsonschema.Draft7Validator(jsonschema.Draft7Validator.META_SCHEMA).iter_errors(schema), None)
        if wrong is None:
            raise
        where = str(chart / "values.schema.json")
        raise UserError(f"not a valid JSON schema: {one_line(wrong.message)}", where=where, fix=NAME_OURS) from failure
    for error in errors:
        cause = jsonschema.exceptions.best_match([error])
        key = tuple(cause.absolute_path)
        if cause.validator == "additionalProperties" and (known := cause.schema.get("properties")):
            for name in cause.instance:
                if name not in known:
                    yield (*key, name), f"unknown key (keys: {', '.join(known)})"
        elif cause.validator == "required":
            for name in cause.validator_value:
                if name not in cause.instance:
                    yield (*key, name), "is required"
        else:
            value = repr(cause.instance)  # which comes before the reason, and may be long
            yield key, one_line(cause.message.replace(value, one_line(value, 60), 1), 200)


def written_in_chart_values(key: KeyPath, chart_values: Any) -> bool:
    """Whether the user wrote that key of the values, or one above it, under chartValues.

    The values as a whole (no key) are the user's only where a null takes something away from them.
    """
    if not key:
        return any(value is None for value in chart_values.values())
    for part in key:
        if not isinstance(chart_values, dict) or part not in chart_values:
            return not isinstance(chart_values, dict)
        chart_values = chart_values[part]
    return True


def refusal_error(key: KeyPath, reason: str, chart: Path) -> UserError:
    return UserError(
        reason, where=f"{chart}: {dotted(key) or 'values'}", fix="Use the chart and genvalues of one version."
    )
