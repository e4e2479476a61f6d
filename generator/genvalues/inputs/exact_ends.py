"""A validator of JSON schemas whose patterns end where ECMA 262, Go and thus Helm end them.

There $ matches only at the end of a text; in Python also before a final line break.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import jsonschema
from jsonschema.exceptions import ValidationError


def with_exact_ends(validator: Any) -> Any:
    """The class of validator with other rules for the keywords that have a pattern."""
    keywords = validator.VALIDATORS

    def pattern_properties(validator: Any, rules: Any, value: Any, schema: Any) -> Iterator[ValidationError]:
        yield from keywords["patternProperties"](validator, exact_keys(rules), value, schema)

    def additional_properties(validator: Any, rule: Any, value: Any, schema: Any) -> Iterator[ValidationError]:
        if "patternProperties" in schema:
            schema = {**schema, "patternProperties": exact_keys(schema["patternProperties"])}
        for error in keywords["additionalProperties"](validator, rule, value, schema):
            error.message = error.message.replace(repr(r"\Z")[1:-1], "$")
            yield error

    changed = {
        "pattern": matches,
        "patternProperties": pattern_properties,
        "additionalProperties": additional_properties,
    }
    return jsonschema.validators.extend(validator, changed)


def matches(validator: Any, pattern: str, value: Any, schema: Any) -> Iterator[ValidationError]:
    if isinstance(value, str) and not re.search(exact(pattern), value):
        yield ValidationError(f"{value!r} does not match {pattern!r}")


def exact(pattern: str) -> str:
    return pattern.replace("$", r"\Z")


def exact_keys(rules: dict[str, Any]) -> dict[str, Any]:
    return {exact(pattern): rule for pattern, rule in rules.items()}
