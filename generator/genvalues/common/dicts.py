"""Plain nested data, as YAML gives it: looking into it and laying one over the other."""

from __future__ import annotations

from typing import Any


def get(value: Any, dotted_key: str, kind: type) -> Any:
    """The value at a key when it is of that kind, else None."""
    for part in dotted_key.split("."):
        if not isinstance(value, dict) or part not in value:
            return None
        value = value[part]
    if isinstance(value, bool) and kind is not bool:
        return None
    if kind is float and isinstance(value, int):
        return value
    return value if isinstance(value, kind) else None


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Both, key by key; where both have a key that is not a mapping twice, ``above`` wins."""
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        merged[key] = merge(under, value) if isinstance(under, dict) and isinstance(value, dict) else value
    return merged


def without_null(value: Any) -> Any:
    """Helm takes a null in values for: no such key."""
    if not isinstance(value, dict):
        return value
    return {key: without_null(inner) for key, inner in value.items() if inner is not None}
