"""The JSON schema of an inputs file: read once, and asked what a key may hold."""

from __future__ import annotations

import functools
import json
from typing import Any

from genvalues.common.text import KeyPath
from genvalues.settings.inputs import SCHEMA

FREE = "chartValues"  # below it anything is allowed: the chart's schema says what


@functools.cache
def inputs_schema() -> dict[str, Any]:
    return dict(json.loads(SCHEMA.read_text(encoding="utf-8")))


def resolve(schema: dict[str, Any], root: dict[str, Any]) -> dict[str, Any]:
    reference = schema.get("$ref")
    return root["$defs"][reference.rpartition("/")[2]] if reference else schema


def kinds(key: KeyPath) -> frozenset[str]:
    """The JSON types that may stand at a key; none where the schema knows no such key.

    What is below chartValues is asked of the inputs' key of that name: most sections are alike.
    """
    schema = inputs_schema()
    nodes = [schema]
    for part in key[1:] if key[:1] == (FREE,) else key:
        inner = [
            node["items"] if isinstance(part, int) else node["properties"][part]
            for node in nodes
            if (isinstance(part, int) and "items" in node) or part in node.get("properties", {})
        ]
        nodes = [resolve(branch, schema) for node in inner for branch in (node, *node.get("anyOf", []))]
    return frozenset(kind for node in nodes for kind in kinds_of(node)) if key else frozenset()


def kinds_of(node: dict[str, Any]) -> list[str]:
    if "enum" in node or "const" in node:
        return ["string"]
    kind = node.get("type", [])
    return [kind] if isinstance(kind, str) else list(kind)


def may_be_null(key: KeyPath) -> bool:
    """Whether null is a value there, rather than none. Below chartValues it is Helm's: takes a default away."""
    return (key[:1] == (FREE,) and len(key) > 1) or "null" in kinds(key)
