"""The chart on disk: its place, its defaults, and whether its schema accepts values."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from genvalues.common.dicts import merge, without_null
from genvalues.common.errors import UserError
from genvalues.common.files import refuse_fifo
from genvalues.common.text import KeyPath, dotted, may_hold_a_secret, one_line, redacted
from genvalues.inputs.exact_ends import with_exact_ends
from genvalues.inputs.schema_errors import TYPES, either, shown
from genvalues.settings.base import BOUNDS, NUMBER
from genvalues.settings.by_instance import completed

NAME = "llama-lora"
NAME_OURS = f"Name the directory of the chart {NAME}."
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # faster; these files are part of the project
BESIDE_THE_SOURCES = Path(__file__).parents[3] / "chart"


def find_chart(wanted: Path | None) -> Path | None:
    """The given chart, else ./chart if it is llama-lora, else that of the source tree, else None."""
    if wanted is not None:
        if not os.path.isfile(wanted / "Chart.yaml"):  # noqa: PTH113 - which never raises
            raise UserError("not a chart: Chart.yaml not found", where=f"--chart {wanted}", fix=NAME_OURS)
        return wanted
    for candidate in (Path("chart"), BESIDE_THE_SOURCES):
        if chart_name(candidate) == NAME:
            return candidate
    return None


def need_chart(wanted: Path | None) -> Path:
    """The same, but raises UserError if there is none."""
    found = find_chart(wanted)
    if found is None:
        raise UserError("no chart found", fix="Name its directory: --chart DIR.")
    return found


def load(text: str) -> Any:
    return yaml.load(text, Loader=LOADER)


def chart_name(chart: Path) -> str:
    try:
        metadata = load(text_of(chart / "Chart.yaml"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return ""
    return str(metadata.get("name", "")) if isinstance(metadata, dict) else ""


def text_of(file: Path) -> str:
    refuse_fifo(file)
    return file.read_text(encoding="utf-8")


def values_schema(chart: Path) -> dict[str, Any]:
    return part(chart, "values.schema.json", json.loads)


def values_schema_text(chart: Path) -> str:
    """The text of the chart's values.schema.json."""
    values_schema(chart)  # raises UserError if it is not valid
    return text_of(chart / "values.schema.json")


def part(chart: Path, name: str, parse: Callable[[str], Any]) -> dict[str, Any]:
    """Read a file of the chart that must contain keys and values."""
    try:
        found = parse(text_of(chart / name))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise UserError(f"cannot be read: {reason}", where=str(chart / name), fix=NAME_OURS) from None
    if not isinstance(found, dict):
        raise UserError("must contain keys and values", where=str(chart / name), fix=NAME_OURS)
    return found


def on_top_of_defaults(chart: Path, values: dict[str, Any]) -> dict[str, Any]:
    """The values that the templates see: these over the chart's defaults, completed by the instance type; a null gives
    the default back. Below ``stages`` it takes away the chart's default, else that of stageDefaults.
    """
    defaults = part(chart, "values.yaml", load)
    complete = completed(merge(defaults, without_null(values)))
    return {**complete, "stages": coalesced(defaults.get("stages"), values.get("stages") or {})}


def coalesced(defaults: Any, values: Any) -> Any:
    """The values over the defaults, as Helm lays them: a null removes a default, and stays where there is none."""
    if not isinstance(values, dict) or not isinstance(defaults, dict):
        return values
    both = {**defaults, **{key: coalesced(defaults.get(key), value) for key, value in values.items()}}
    return {key: value for key, value in both.items() if value is not None or defaults.get(key) is None}


def top_level_purposes(chart: Path) -> dict[str, str]:
    """A one-line description of each top-level key of the values, from the chart's schema."""
    keys = values_schema(chart).get("properties", {})
    return {key: shortened(str(rules.get("description", ""))) for key, rules in keys.items()}


def shortened(description: str, width: int = 100) -> str:
    """The first sentence of a description; a long one is cut at a comma."""
    sentence = description.split(". ")[0].rstrip(".")
    while len(sentence) > width and "," in sentence:
        sentence = sentence.rpartition(",")[0]
    return one_line(f"{sentence}.", width + 1) if sentence else ""


def refusals(chart: Path, values: dict[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    """Keys that the chart's schema does not accept, with the reason. ``values`` include the chart's defaults.

    A reason shows no token.
    """
    schema = values_schema(chart)

    try:
        errors = list(ValuesValidator(schema).iter_errors(values))
    except Exception as failure:  # an invalid schema can fail in many ways
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
        elif cause.validator == "type":
            kinds = [cause.validator_value] if isinstance(cause.validator_value, str) else cause.validator_value
            found = redacted(cause.instance) if isinstance(cause.instance, str) else cause.instance
            what = "the value" if may_hold_a_secret(key) else shown(found, key)
            yield key, f"must be {either([TYPES[kind] for kind in kinds])}, not {what}"
        else:
            value = repr(cause.instance)  # precedes the reason in the message, and may be long
            what = "the value" if may_hold_a_secret(key) else one_line(redacted(value), 60)
            yield key, one_line(redacted(cause.message.replace(value, what, 1)), 200)


def limit(word: str) -> Callable[..., Iterator[jsonschema.ValidationError]]:
    """A keyword such as minimum, also for a number as text, which the chart's templates compare."""
    of_numbers = jsonschema.Draft7Validator.VALIDATORS[word]

    def check(validator: Any, bound: Any, value: Any, rules: Any) -> Iterator[jsonschema.ValidationError]:
        if isinstance(value, str) and rules.get("then") == {"pattern": NUMBER} and re.search(NUMBER, value):
            value = float(value)
        yield from of_numbers(validator, bound, value, rules) or ()

    return check


ValuesValidator = jsonschema.validators.extend(
    with_exact_ends(jsonschema.Draft7Validator), {word: limit(word) for word in BOUNDS}
)


def written_in_chart_values(key: KeyPath, chart_values: Any) -> bool:
    """Whether the user wrote this key of the values, or a block around it, under chartValues.

    An empty key stands for the values as a whole: written there only if a null removes one of their keys.
    """
    if not key:
        return any(value is None for value in chart_values.values())
    for part in key:
        if not isinstance(chart_values, dict) or part not in chart_values:
            return not isinstance(chart_values, dict)
        chart_values = chart_values[part]
    return True


def refusal_error(key: KeyPath, reason: str, chart: Path) -> UserError:
    where = f"{chart}: {redacted(dotted(key)) or 'values'}"
    return UserError(reason, where=where, fix="Use a chart and genvalues of the same version.")
