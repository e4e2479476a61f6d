"""The chart on disk: where it is, and whether it accepts values."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from genvalues.document import KeyPath, dotted, one_line
from genvalues.errors import UserError
from genvalues.values import merge

NAME = "llama-lora"
BESIDE_THE_SOURCES = Path(__file__).parents[2] / "chart"


def find_chart(wanted: Path | None) -> Path | None:
    """The chart that was asked for, else ./chart if it is ours, else the one of the source tree, else none."""
    if wanted is not None:
        if not (wanted / "Chart.yaml").is_file():
            raise UserError("is not a chart: it has no Chart.yaml", where=f"--chart {wanted}")
        return wanted
    for candidate in (Path("chart"), BESIDE_THE_SOURCES):
        if chart_name(candidate) == NAME:
            return candidate
    return None


def chart_name(chart: Path) -> str:
    try:
        metadata = yaml.safe_load((chart / "Chart.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return ""
    return str(metadata.get("name", "")) if isinstance(metadata, dict) else ""


def refusals(chart: Path, values: dict[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    """What the chart's schema has against the values: key and reason. As in Helm, on top of the chart's defaults."""
    import jsonschema

    schema = chart / "values.schema.json"
    if not schema.is_file():
        return
    defaults = yaml.safe_load((chart / "values.yaml").read_text(encoding="utf-8")) or {}
    validator = jsonschema.Draft7Validator(json.loads(schema.read_text(encoding="utf-8")))
    for error in validator.iter_errors(without_null(merge(defaults, values))):
        cause = jsonschema.exceptions.best_match([error])
        key = tuple(cause.absolute_path)
        if cause.validator == "additionalProperties" and (known := cause.schema.get("properties")):
            for name in cause.instance:
                if name not in known:
                    yield (*key, name), f"unknown key (keys: {', '.join(known)})"
        else:
            yield key, one_line(cause.message, 200)


def without_null(value: Any) -> Any:
    """Helm takes a null in values for: no such key."""
    if not isinstance(value, dict):
        return value
    return {key: without_null(inner) for key, inner in value.items() if inner is not None}


def written_in_chart_values(key: KeyPath, chart_values: Any) -> bool:
    """Whether the user wrote that key of the values, or one above it, under chartValues."""
    for part in key:
        if not isinstance(chart_values, dict) or part not in chart_values:
            return not isinstance(chart_values, dict)
        chart_values = chart_values[part]
    return True


def refusal_error(key: KeyPath, reason: str, chart: Path) -> UserError:
    return UserError(
        reason, where=f"{chart}: {dotted(key) or 'values'}", fix="Use the chart and genvalues of one version."
    )
