"""Look up keys in the JSON schema of an inputs file."""

from __future__ import annotations

import functools
import json
from typing import Any

from genvalues.common.text import KeyPath
from genvalues.settings.inputs import SCHEMA

FREE = "chartValues"  # the inputs' schema allows any key below it; the chart's schema checks them


@functools.cache
def inputs_schema() -> dict[str, Any]:
    return dict(json.loads(SCHEMA.read_text(encoding="utf-8")))


def resolve(schema: dict[str, Any], root: dict[str, Any]) -> dict[str, Any]:
    reference = schema.get("$ref")
    return root["$defs"][reference.rpartition("/")[2]] if reference else schema


def kinds(key: KeyPath) -> frozenset[str]:
    """The JSON types that a key accepts; empty if the schema does not know the key.

    A key below chartValues is looked up as the inputs' key of that name: most sections are the same.
    """
    schema = inputs_schema()
    nodes = [schema]
    for part in key[1:] if key[:1] == (FREE,) else key:
        inner = [below for node in nodes if (below := inside(node, part))]
        nodes = [resolve(branch, schema) for node in inner for branch in (node, *node.get("anyOf", []))]
    return frozenset(kind for node in nodes for kind in kinds_of(node)) if key else frozenset()


def inside(node: dict[str, Any], part: str | int) -> dict[str, Any]:
    """The schema of an item, a key, or any key of a map; empty if there is none."""
    if isinstance(part, int):
        found = node.get("items")
    else:
        found = node.get("properties", {}).get(part) or node.get("additionalProperties")
    return found if isinstance(found, dict) else {}


def kinds_of(node: dict[str, Any]) -> list[str]:
    if "enum" in node or "const" in node:
        return ["string"]
    kind = node.get("type", [])
    return [kind] if isinstance(kind, str) else list(kind)


def may_be_null(key: KeyPath) -> bool:
    """Whether null is a value of this key. If not, it removes the key. Below chartValues null is passed to Helm."""
    return (key[:1] == (FREE,) and len(key) > 1) or "null" in kinds(key)
