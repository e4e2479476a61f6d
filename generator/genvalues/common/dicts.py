"""Look up and merge nested dictionaries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def get(value: Any, dotted_key: str, kind: type) -> Any:
    """The value at a dotted key if it has the given type, else None. An int is also a float; a bool is neither."""
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
    """Merge two dictionaries recursively; ``above`` wins."""
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        merged[key] = merge(under, value) if isinstance(under, dict) and isinstance(value, dict) else value
    return merged


def without_null(value: Any) -> Any:
    """The value without keys that are null: in Helm, null removes a key."""
    if not isinstance(value, dict):
        return value
    return {key: without_null(inner) for key, inner in value.items() if inner is not None}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings into one with dotted keys: ``{"lora.r": 16}``."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
