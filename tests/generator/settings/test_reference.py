"""docs/values.md documents every key of the chart's schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from chart.manifests import CHART
from genvalues.settings.reference import DEFINITIONS, values_page

SCHEMA: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
DEFAULTS: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))


def keys(part: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every key that the schema knows, dotted, with what it says of it; the same under each name of the user's."""
    for name, inner in part.get("properties", {}).items():
        yield f"{prefix}{name}", inner
        yield from keys(inner, f"{prefix}{name}.")
    named = part.get("additionalProperties")
    if isinstance(named, dict):
        yield from keys(named, f"{prefix}NAME.")


KEYS = dict(keys(SCHEMA))
PAGE = values_page(SCHEMA, DEFAULTS)
OF_DEFINITIONS = {name: dict(keys(part)) for name, part in SCHEMA["definitions"].items()}


def test_every_default_is_of_a_described_key() -> None:
    def below(values: dict[str, Any], prefix: str) -> Iterator[str]:
        for name, value in values.items():
            yield f"{prefix}{name}"
            if isinstance(value, dict) and "$ref" not in KEYS.get(f"{prefix}{name}", {}):
                yield from below(value, f"{prefix}{name}.")

    found = set(below(DEFAULTS, ""))
    assert len(found) > 100
    assert found <= KEYS.keys()


def test_every_key_is_on_the_page_once_in_the_section_of_its_top_level_key() -> None:
    sections = dict(section.split("\n", 1) for section in PAGE.split("\n## ")[1:])
    assert [*DEFAULTS, "global", *DEFINITIONS.values(), "Quantity"] == list(sections)
    for key, part in KEYS.items():
        top, _, below = key.partition(".")
        if not below:
            assert sections[top].startswith(f"\n{part['description']}\n"), key
        elif top == "stageDefaults":  # described as a stage's key, which it is the default of
            assert sections["Stage"].count(f"\n| `{below}` |") == 1, key
        else:
            assert sections[top].count(f"\n| `{key}` |") == 1, key
    for name, heading in DEFINITIONS.items():
        for key in OF_DEFINITIONS[name]:
            assert f"| `{key}` |" in sections[heading]


def test_every_default_is_on_the_page() -> None:
    page = PAGE
    for line in [
        '| `image.tag` | string | `""` |',
        "| `training.learningRate` | number, more than 0, at most 1 | `5.0e-05` |",
        "| `stageDefaults.backoffLimit` | `3` |",
        "| `stages.preflight` | [stage](#stage) | `{activeDeadlineSeconds: 600}` |",
        "String; default: `cpu`.",
    ]:
        assert f"\n{line}" in page


def test_links_lead_to_sections() -> None:
    page = PAGE
    anchors = {line.removeprefix("## ").lower() for line in page.splitlines() if line.startswith("## ")}
    linked = {part.split(")")[0] for part in page.split("](#")[1:]}
    assert linked <= anchors and {name.lower() for name in DEFAULTS} <= linked


@pytest.mark.parametrize(
    ("part", "row"),
    [
        ({"type": ["integer", "null"], "minimum": 1}, "integer, at least 1"),
        ({"enum": ["", "a"]}, '`""`, `a`'),
        ({"anyOf": [{"enum": ["all"]}, {"type": "array", "items": {"enum": ["x"]}}]}, "`all` or list of `x`"),
        ({"type": "object", "additionalProperties": {"type": "boolean"}}, "map of NAME: boolean"),
        ({"type": "object", "patternProperties": {"^x": {"type": "integer"}}}, "map of NAME: integer"),
        ({"type": "object"}, "map"),
    ],
)
def test_what_a_value_may_be_is_told_in_words(part: dict[str, Any], row: str) -> None:
    inner = {**part, "description": "One | two."}
    top = {"description": "T.", "type": "object", "properties": {"key": inner}}
    schema = {"definitions": SCHEMA["definitions"], "properties": {"top": top}}
    assert f"| `top.key` | {row} |  | One \\| two. |" in values_page(schema, {"top": {}})
