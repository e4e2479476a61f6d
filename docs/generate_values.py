"""docs/values.md, from the schema that the chart checks values with and its defaults: `make docs`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

Part = dict[str, Any]  # of the schema

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "docs/values.md"
DEFINITIONS = {"stage": "Stage", "resourceList": "Resources", "quantity": "Quantity"}  # and their headings
NO_DEFAULT = object()

INTRODUCTION = """\
# Values of the chart

Every key, what it may be, and its default. Written by `make docs` from `chart/values.schema.json` and
`chart/values.yaml`: change those, not this page. Helm refuses a value that does not fit, and a key that is not here.
What contradicts itself across several keys is refused by the chart, all mistakes at once, each with its fix.

`genvalues write finetune.yaml` writes such values from a short inputs file and derives parallelism, processes, devices
and resources. `helm show values chart` shows the defaults with their comments.
"""


class Row(NamedTuple):
    key: str  # dotted; NAME stands for what the user names
    kind: str
    default: str
    description: str


def reference(schema: Part, values: Part) -> str:
    """The page: a section for each top-level key, in the order of ``values``, then one for each definition."""
    keys = sorted(schema["properties"], key=lambda name: list(values).index(name) if name in values else len(values))
    contents = "Keys: " + ", ".join(f"[{name}](#{anchor(name)})" for name in keys) + ".\n"
    sections = [section(schema, name, schema["properties"][name], values.get(name, NO_DEFAULT)) for name in keys]
    shared = [definition(heading, schema["definitions"][name]) for name, heading in DEFINITIONS.items()]
    return "\n".join([INTRODUCTION, contents, *sections, *shared])


def section(schema: Part, name: str, part: Part, default: Any) -> str:
    if "properties" not in part:
        usually = f"; default: {shown(default)}" if default is not NO_DEFAULT else ""
        body = f"{kind(part).capitalize()}{usually}.\n"
    elif shared := same_keys(schema, part):
        lines = [[code(f"{name}.{key}"), shown(value)] for key, value in default.items()]
        body = f"The keys of a {link(shared)}, with these defaults:\n\n" + table(["Key", "Default"], lines)
    else:
        lines = [[code(row.key), *row[1:]] for row in rows(name, part, default)]
        body = table(["Key", "Value", "Default", "Description"], lines)
    return f"## {name}\n\n{part['description']}\n\n{body}"


def definition(heading: str, part: Part) -> str:
    lines = [[code(row.key), row.kind, row.description] for row in rows("", part, NO_DEFAULT)]
    body = table(["Key", "Value", "Description"], lines) if lines else f"{kind(part).capitalize()}.\n"
    return f"## {heading}\n\n{part['description']}\n\n{body}"


def same_keys(schema: Part, part: Part) -> str | None:
    """The definition with the same keys: stageDefaults has those of a stage."""
    for name, shared in schema["definitions"].items():
        if "properties" in shared and shared["properties"].keys() == part["properties"].keys():
            return str(name)
    return None


def rows(prefix: str, part: Part, defaults: Any) -> Iterator[Row]:
    """Every key below ``prefix``."""
    for name, inner in part.get("properties", {}).items():
        key = f"{prefix}.{name}".lstrip(".")
        default = defaults.get(name, NO_DEFAULT) if isinstance(defaults, dict) else NO_DEFAULT
        spelled_out_below = "properties" in inner and default != {}
        yield Row(key, kind(inner), "" if spelled_out_below else shown(default), inner["description"])
        yield from rows(key, inner, default)
        named = inner.get("additionalProperties")
        if isinstance(named, dict):
            yield from rows(f"{key}.NAME", named, NO_DEFAULT)


def kind(part: Part) -> str:
    """What a value may be, in words."""
    if "$ref" in part:
        return link(part["$ref"].rpartition("/")[2])
    if "enum" in part:
        return ", ".join(map(shown, part["enum"]))
    if "anyOf" in part:
        return " or ".join(map(kind, part["anyOf"]))
    types = [part["type"]] if isinstance(part["type"], str) else part["type"]
    if types == ["array"]:
        return f"list of {kind(part['items'])}"
    if types == ["object"]:
        named = [part.get("additionalProperties"), *part.get("patternProperties", {}).values()]
        return next((f"map of NAME: {kind(each)}" for each in named if isinstance(each, dict)), "map")
    return " or ".join(types) + bounds(part)


def bounds(part: Part) -> str:
    if "minimum" in part and "maximum" in part:
        return f", {part['minimum']} to {part['maximum']}"
    words = {
        "minimum": "at least",
        "exclusiveMinimum": "more than",
        "maximum": "at most",
        "exclusiveMaximum": "less than",
    }
    return "".join(f", {text} {part[word]}" for word, text in words.items() if word in part)


def shown(value: Any) -> str:
    """A value as YAML on one line."""
    if value is NO_DEFAULT:
        return ""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=float("inf"))
    return code(text.removesuffix("\n").removesuffix("\n...").replace("'", '"'))


def link(name: str) -> str:
    heading = DEFINITIONS[name]
    return f"[{heading.lower()}](#{anchor(heading)})"


def anchor(heading: str) -> str:
    """What GitHub makes of a heading of one word."""
    return heading.lower()


def code(text: str) -> str:
    return f"`{text}`"


def table(head: list[str], lines: list[list[str]]) -> str:
    cells = [head, ["---"] * len(head), *lines]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in cells)


def current() -> str:
    schema = json.loads((ROOT / "chart/values.schema.json").read_text(encoding="utf-8"))
    return reference(schema, yaml.safe_load((ROOT / "chart/values.yaml").read_text(encoding="utf-8")))


if __name__ == "__main__":
    REFERENCE.write_text(current(), encoding="utf-8")
