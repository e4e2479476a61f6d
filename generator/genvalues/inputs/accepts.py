"""Whether a JSON schema surely takes a value, told without jsonschema, whose import costs a third of a command's start.

No answer of its own: what this does not take, or does not understand, is jsonschema's to judge and to explain.
"""

from __future__ import annotations

import re
from typing import Any

SAYS_NOTHING = {"$schema", "$defs", "definitions", "title", "description", "default", "examples"}
TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
}


def accepts(schema: dict[str, Any], value: Any) -> bool:
    """True: every rule of the schema is known here and kept. False says nothing."""
    try:
        return takes(schema, value, schema)
    except Exception:  # a schema that is none: jsonschema says it
        return False


def takes(rules: dict[str, Any], value: Any, root: dict[str, Any]) -> bool:
    return all(keyword in SAYS_NOTHING or keeps(keyword, rules, value, root) for keyword in rules)


def keeps(keyword: str, rules: dict[str, Any], value: Any, root: dict[str, Any]) -> bool:
    wanted = rules[keyword]
    if keyword == "type":
        return any(is_of(kind, value) for kind in ([wanted] if isinstance(wanted, str) else wanted))
    if keyword in ("enum", "const"):
        choices = wanted if keyword == "enum" else [wanted]
        return any(type(choice) is type(value) and choice == value for choice in choices)
    if keyword == "$ref":
        place: Any = root
        for part in wanted.removeprefix("#/").split("/"):
            place = place[part]
        return takes(place, value, root)
    if keyword == "anyOf":
        return any(takes(branch, value, root) for branch in wanted)
    if isinstance(value, str):
        return text_keeps(keyword, wanted, value)
    if isinstance(value, list):
        return list_keeps(keyword, wanted, value, root)
    if isinstance(value, dict):
        return object_keeps(keyword, rules, value, root)
    return number_keeps(keyword, wanted, value)


def is_of(kind: str, value: Any) -> bool:
    return isinstance(value, TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))


# The rules for one type of value say nothing of the others.
OF_TEXT = {"pattern", "minLength", "maxLength"}
OF_NUMBERS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
OF_LISTS = {"items", "minItems", "maxItems", "uniqueItems"}
OF_OBJECTS = {
    *("properties", "patternProperties", "additionalProperties"),
    *("required", "minProperties", "maxProperties"),
}
OF_ALL = OF_TEXT | OF_NUMBERS | OF_LISTS | OF_OBJECTS


def text_keeps(keyword: str, wanted: Any, value: str) -> bool:
    if keyword == "pattern":
        return re.search(wanted.replace("$", r"\Z"), value) is not None
    if keyword in OF_TEXT:
        return len(value) >= wanted if keyword == "minLength" else len(value) <= wanted
    return keyword in OF_ALL


def number_keeps(keyword: str, wanted: Any, value: Any) -> bool:
    if isinstance(value, bool) or value is None or keyword not in OF_NUMBERS:
        return keyword in OF_ALL
    if keyword == "minimum":
        return bool(value >= wanted)
    if keyword == "maximum":
        return bool(value <= wanted)
    return bool(value > wanted if keyword == "exclusiveMinimum" else value < wanted)


def list_keeps(keyword: str, wanted: Any, value: list[Any], root: dict[str, Any]) -> bool:
    if keyword == "items":
        return all(takes(wanted, item, root) for item in value)
    if keyword == "uniqueItems":
        return not wanted or len({repr(item) for item in value}) == len(value)
    if keyword in OF_LISTS:
        return len(value) >= wanted if keyword == "minItems" else len(value) <= wanted
    return keyword in OF_ALL


def object_keeps(keyword: str, rules: dict[str, Any], value: dict[str, Any], root: dict[str, Any]) -> bool:
    wanted = rules[keyword]
    if keyword == "properties":
        return all(takes(wanted[name], inner, root) for name, inner in value.items() if name in wanted)
    if keyword == "patternProperties":
        return all(
            takes(inner_rules, inner, root)
            for pattern, inner_rules in wanted.items()
            for name, inner in value.items()
            if re.search(pattern, name)
        )
    if keyword == "additionalProperties":
        known, patterns = rules.get("properties", {}), rules.get("patternProperties", {})
        others = [name for name in value if name not in known and not any(re.search(each, name) for each in patterns)]
        if isinstance(wanted, bool):
            return wanted or not others
        return all(takes(wanted, value[name], root) for name in others)
    if keyword == "required":
        return all(name in value for name in wanted)
    if keyword in OF_OBJECTS:
        return len(value) >= wanted if keyword == "minProperties" else len(value) <= wanted
    return keyword in OF_ALL
