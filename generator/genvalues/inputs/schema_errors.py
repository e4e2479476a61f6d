"""Errors of the JSON schema of an inputs file, as messages: what is wrong, and what to write instead."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import jsonschema
from jsonschema.exceptions import ValidationError

from genvalues.accelerators.instances import HYPERPOD, of_same_service, unsupported
from genvalues.common.text import SECRET_KEYS, KeyPath, dotted, one_line
from genvalues.inputs.document import MOST_MISTAKES, Mistake
from genvalues.inputs.exact_ends import with_exact_ends
from genvalues.inputs.schema_lookup import inputs_schema, inside, kinds, resolve
from genvalues.settings.base import BOUNDS
from genvalues.settings.datasets import BUCKET_RULES, hub_id_of, invalid_bucket, is_url, on_s3

MISSING = "missing"
UNKNOWN = "unknown key"
ALSO_CALLED = {  # names that other tools have for our keys
    "rank": "r",
    "lorar": "r",
    "loraalpha": "alpha",
    "loradropout": "dropout",
    "lr": "learningRate",
    "lrschedulertype": "lrScheduler",
    "scheduler": "lrScheduler",
    "batchsize": "perDeviceBatchSize",
    "perdevicetrainbatchsize": "perDeviceBatchSize",
    "attnimplementation": "attention",
    "gradientcheckpointing": "activationCheckpointing",
    "maxlength": "maxSequenceLength",
    "maxseqlength": "maxSequenceLength",
    "modulestosave": "targetModules",
    "numtrainepochs": "epochs",
    "instancetype": "instance",
    "modelid": "model",
    "modelname": "model",
    "numnodes": "nodes",
    "nodecount": "nodes",
    "steps": "maxSteps",
    "token": "tokenSecret",
    "values": "chartValues",
}


InputsValidator = with_exact_ends(jsonschema.Draft202012Validator)


def schema_mistakes(value: Any) -> Iterator[Mistake]:
    schema = inputs_schema()
    for error in telling(islice(InputsValidator(schema).iter_errors(value), MOST_MISTAKES)):
        yield from islice(explain(error, schema), MOST_MISTAKES)


def telling(errors: Iterable[ValidationError]) -> list[ValidationError]:
    """Per place, only the errors that matter: a value that is not allowed, or of the wrong type, needs no other
    error.
    """
    found = list(errors)
    rank = {"enum": 0, "const": 0, "type": 1}
    best: dict[KeyPath, int] = {}
    for error in found:
        place = tuple(error.absolute_path)
        best[place] = min(rank.get(str(error.validator), 2), best.get(place, 2))
    return [error for error in found if rank.get(str(error.validator), 2) == best[tuple(error.absolute_path)]]


def words_of(branches: list[dict[str, Any]]) -> list[Any]:
    """The words that a schema allows, such as all-linear."""
    return [branch["const"] for branch in branches if "const" in branch]


def items_of(branch: dict[str, Any], schema: dict[str, Any]) -> list[Any]:
    """The allowed items of a list, if the schema lists them."""
    items: dict[str, Any] = resolve(resolve(branch, schema).get("items", {}), schema)
    return list(items.get("enum", []))


def explain(error: ValidationError, schema: dict[str, Any]) -> Iterator[Mistake]:
    """The message of one error of the validator."""
    key: KeyPath = tuple(error.absolute_path)
    keyword = str(error.validator)
    found: Any = error.instance
    wanted: Any = error.validator_value
    rules: Any = error.schema
    described = purpose(key, schema)
    if keyword == "anyOf" and any(found in items_of(branch, schema) for branch in wanted):
        yield Mistake(key, f"must be a list, not {shown(found, key)}", f"Write [{found}].")
    elif keyword == "anyOf" and (
        alone := [each for each in words_of(wanted) if isinstance(found, list) and each in found]
    ):
        yield Mistake(key, f"{alone[0]} is not a list item", f"Write {alone[0]} without brackets.")
    elif keyword == "anyOf":
        fitting = [branch for branch in wanted if type_fits(found, resolve(branch, schema))]
        if len(fitting) == 1:
            index = wanted.index(fitting[0])
            for inner in telling(inner for inner in error.context or [] if inner.relative_schema_path[0] == index):
                yield from explain(inner, schema)
        else:
            types = [kind for branch in wanted if (kind := type_words(resolve(branch, schema)))]
            yield Mistake(key, f"must be {either(types)}, not {shown(found, key)}", described)
    elif keyword == "additionalProperties":
        properties = rules["properties"]
        for name in found:
            if name not in properties:
                needed = [key for key in rules.get("required", []) if key not in found]
                yield Mistake((*key, name), UNKNOWN, did_you_mean(name, key, properties, needed, schema))
    elif keyword == "required":
        for name in wanted:
            if name not in found:
                yield Mistake((*key, name), MISSING, purpose((*key, name), schema))
    elif keyword == "type":
        yield Mistake(key, f"must be {type_words(rules)}, not {shown(found, key)}", described)
    elif key == ("instance",) and isinstance(found, str) and (why := unsupported(found)):
        near = close_matches(found, of_same_service(found)) if "not supported" not in why else []
        asks = f"Did you mean {near[0]}? " if near else ""
        names = either([*of_same_service(found)])
        yield Mistake(key, f"{shown(found, key)} is {why}", f"{asks}Use one of {names}, or cpu.")
    elif keyword in ("enum", "const"):
        choices = [each for each in (wanted if keyword == "enum" else [wanted]) if isinstance(each, str)]
        beginning = [choice for choice in choices if choice.startswith(str(found)) and found]
        close = close_matches(str(found), choices) or beginning
        guess = f"Did you mean {close[0]}? " if close else ""
        listed = ", ".join(choice for choice in choices if not choice.startswith(HYPERPOD))
        also = f"; on HyperPod with the prefix {HYPERPOD!r}" if key == ("instance",) else ""
        yield Mistake(key, f"{shown(found, key)} is not allowed", f"{guess}Allowed values: {listed}{also}.")
    elif keyword == "pattern":
        yield Mistake(key, pattern_words(key, found), described)
    elif keyword in BOUNDS:
        yield Mistake(key, f"must be {BOUNDS[keyword]} {number(wanted)}, not {shown(found, key)}", described)
    elif keyword == "uniqueItems":
        twice = sorted({str(item) for item in found if item is not None and found.count(item) > 1})
        if twice:
            yield Mistake(key, f"duplicate item {', '.join(map(one_line, twice))}", "Remove one.")
    elif keyword in ("minLength", "minItems"):
        yield Mistake(key, "must not be empty", described)
    elif keyword == "maxLength":
        yield Mistake(key, f"longer than {wanted} characters", described)
    else:
        yield Mistake(key, one_line(error.message, 200), described)


def close_matches(word: str, choices: Iterable[str], least: float = 0.6) -> list[str]:
    """The most similar choice, if any is similar."""
    from difflib import get_close_matches

    return get_close_matches(word, list(choices), 1, cutoff=least)


TYPES = {
    "integer": "an integer",
    "number": "a number",
    "string": "a string",
    "boolean": "true or false",
    "null": "null",
    "array": "a list",
    "object": "a mapping",
}
PYTHON_TYPES: dict[str, tuple[type, ...]] = {
    "integer": (int,),
    "number": (int, float),
    "string": (str,),
    "array": (list,),
    "object": (dict,),
}


def type_fits(value: Any, schema: dict[str, Any]) -> bool:
    if "const" in schema:
        return isinstance(value, str)
    return not isinstance(value, bool) and isinstance(value, PYTHON_TYPES.get(schema.get("type", ""), ()))


def type_words(schema: dict[str, Any]) -> str:
    if "const" in schema:
        return str(schema["const"])
    if "enum" in schema:
        return either(list(schema["enum"]))
    return TYPES.get(schema.get("type", ""), "")


def either(words: list[str]) -> str:
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def purpose(key: KeyPath, schema: dict[str, Any]) -> str:
    """The first sentence of a key's description (or of the nearest block around it) and the keys inside, in
    brackets.
    """
    described, nodes = "", [schema]
    for part in key:
        below = [found for node in nodes if (found := inside(node, part))]
        branches = [branch for node in below for branch in (node, *node.get("anyOf", []))]
        described = next((node["description"] for node in below if "description" in node), described)
        nodes = [resolve(branch, schema) for branch in branches]
    not_null = [node for node in nodes if node.get("type", "null") != "null"]
    blocks = [node["properties"] for node in not_null if key and "properties" in node]
    names = blocks[0] if len(blocks) == len(not_null) == 1 else []
    words = [described.split(". ")[0].rstrip("."), f"keys: {', '.join(names)}" if names else ""]
    return f"({'; '.join(filter(None, words))})" if any(words) else ""


def pattern_words(key: KeyPath, found: Any) -> str:
    """What is wrong with a string that does not match its key's pattern."""
    if key == ("model",) and is_url(str(found)):
        named = hub_id_of(str(found), "models")
        return f"{shown(found, key)} is a web address{f'; write {named}' if named else ''}"
    if isinstance(found, str) and on_s3(found) and (bucket := invalid_bucket(found)) is not None:
        return f"{shown(bucket, key)} is not a valid name of a bucket: it has {BUCKET_RULES}"
    if key == ("model",):
        return f"{shown(found, key)} is not a Hub id; write {{path: ...}} for a folder or file"
    if key == ("image",):
        return (
            f"{shown(found, key)} is not an image reference (registry/name:tag or registry/name@sha256:64 hex digits)"
        )
    if key in SECRET_KEYS:
        return "is not a valid Kubernetes name. Never write the token itself here"
    return f"{shown(found, key)} is invalid"


def shown(value: Any, key: KeyPath) -> str:
    """The offending value, shortened; never the value of a key that may hold a token."""
    if key in SECRET_KEYS and value is not None:
        return "the value"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, str):
        return json.dumps(one_line(value, 60), ensure_ascii=False)
    return number(value)


def number(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 40 else f"a number of {len(text.lstrip('-'))} digits"


def did_you_mean(
    name: str, inside: KeyPath, properties: dict[str, Any], needed: list[str], schema: dict[str, Any]
) -> str:
    """The most similar key here (a required one first), else the same name in another block; and the allowed keys."""
    listed = f"(keys: {', '.join(properties)})"
    parts = name.split(".")
    if len(parts) > 1 and kinds((*inside, *parts)):  # spelled as in errors and --set
        nested = functools.reduce(lambda inner, part: f"{{{part}: {inner}}}", reversed(parts), "...")
        return f"Write {nested[1:-1]}. {listed}"
    plain = re.sub(r"[-_ ]", "", name).lower()
    if inside == ("model",) and plain in ("id", "name", "revision"):  # as in the chart's values
        return f"Write model: ID@REVISION for a model of the Hub. {listed}"
    here = {key.lower(): key for key in properties}
    guess = ""
    if plain in here:
        guess = dotted((*inside, here[plain]))
    elif ALSO_CALLED.get(plain) in properties:
        guess = dotted((*inside, ALSO_CALLED[plain]))
    elif elsewhere := keys_named(ALSO_CALLED.get(plain, plain).lower(), schema):
        guess = elsewhere
    elif close := [
        *close_matches(plain, [key.lower() for key in needed], 0.7),
        *close_matches(plain, here, 0.7),
    ]:
        guess = dotted((*inside, here[close[0]]))
    return f"{f'Did you mean {guess}? ' if guess else ''}{listed}"


def keys_named(name: str, schema: dict[str, Any]) -> str:
    """The path of the key with that name anywhere in an inputs file, or an empty string."""
    for block, block_schema in schema["properties"].items():
        if block.lower() == name:
            return block
        references = [block_schema, *block_schema.get("anyOf", [])]
        for reference in references:
            for key in resolve(reference, schema).get("properties", {}):
                if key.lower() == name:
                    return f"{block}.{key}"
    return ""
