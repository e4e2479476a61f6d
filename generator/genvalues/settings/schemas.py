"""JSON schemas of the declared settings: of an inputs file, and of the chart's values."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from genvalues.common.text import SECRET_KEYS
from genvalues.settings.base import NUMBER
from genvalues.settings.inputs import Inputs
from genvalues.settings.values import StageSettings, Values

Schema = dict[str, Any]

# Helm shows a value that does not match its pattern, and here users paste tokens: the templates check these instead.
HIDDEN = {key[-1] for key in SECRET_KEYS if len(key) > 1}
# What the templates refuse anywhere (chart/templates/_validations.tpl has the same): a pattern lets it pass to them.
TOKEN = r"\bhf_[A-Za-z0-9]{20,}|\b(AKIA|ASIA)[0-9A-Z]{16}\b|-----BEGIN "
NO_TOKEN = "noToken"
DEFINITIONS = {StageSettings.__name__: "stage"}  # blocks that the values' schema does not repeat, and their names there


class InOrder(GenerateJsonSchema):
    """Keys in the order in which files show them, and no titles: pydantic's repeat the field's own name."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def model_schema(self, schema: Any) -> Schema:
        generated = super().model_schema(schema)
        keys = [schema["cls"].key_of(name) for name in schema["cls"].fields_in_order()]
        return {**generated, "properties": {key: generated["properties"][key] for key in keys}}

    def sort(self, value: Schema, parent_key: str | None = None) -> Schema:
        return value


def inputs_schema() -> Schema:
    """The JSON schema of an inputs file (draft 2020-12)."""
    schema = Inputs.model_json_schema(schema_generator=InOrder)
    blocks = schema["$defs"]
    for block in [schema, *blocks.values()]:
        block.pop("title", None)
        block["description"] = one_paragraph(block["description"])
        for key, rules in block["properties"].items():
            typed = nullable(rules) if rules.get("default") == "" else rules  # NullIsEmpty
            block["properties"][key] = {**typed, "description": description_of(rules, blocks)}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def description_of(rules: Schema, blocks: dict[str, Schema]) -> str:
    """A key's own description, or that of the type or the block that it may have."""
    branches = [rules, *rules.get("anyOf", [])]
    branches += [blocks[branch["$ref"].rpartition("/")[2]] for branch in branches if "$ref" in branch]
    return one_paragraph(next(branch["description"] for branch in branches if "description" in branch))


def nullable(rules: Schema) -> Schema:
    outer: Schema = {word: rules[word] for word in ("default", "description") if word in rules}
    inner = {word: value for word, value in rules.items() if word not in outer}
    return {"anyOf": [inner, {"type": "null"}], **outer}


def values_schema() -> Schema:
    """The JSON schema of the chart's values.

    Draft-07 words only: Helm up to 3.18.4 ignores newer ones silently. No key with a default is required, so that a
    short values file is valid and ``helm upgrade --reuse-values`` accepts a chart that has gained keys. Blocks stand
    where they are used, because draft-07 ignores what stands beside a ``$ref``.
    """
    schema = Values.model_json_schema(schema_generator=InOrder)
    blocks = schema.pop("$defs")
    written = draft_07(schema, blocks)
    definitions = {DEFINITIONS[name]: draft_07(blocks[name], blocks) for name in DEFINITIONS}
    for rules in (written, definitions):
        hide_tokens(rules)
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "llama-lora",
        "definitions": {**definitions, NO_TOKEN: {"not": {"type": "string", "pattern": TOKEN}}},
        **written,
    }


def hide_tokens(rules: Any) -> None:
    """Have patterns apply to text without a token: Helm's message of a pattern shows the text."""
    if isinstance(rules, list):
        for one in rules:
            hide_tokens(one)
    elif isinstance(rules, dict):
        for one in list(rules.values()):
            hide_tokens(one)
        if isinstance(rules.get("pattern"), str):
            rules |= {"if": {"$ref": f"#/definitions/{NO_TOKEN}"}, "then": {"pattern": rules.pop("pattern")}}


def draft_07(rules: Schema, blocks: dict[str, Schema]) -> Schema:
    """A schema of pydantic's in draft-07, with the blocks that it refers to in their places."""
    rules = dict(rules)
    if reference := rules.pop("$ref", "").rpartition("/")[2]:
        rules.pop("default", None)
        if reference in DEFINITIONS:
            return {**rules, "$ref": f"#/definitions/{DEFINITIONS[reference]}"}
        return draft_07({**blocks[reference], **rules}, blocks)
    if "properties" in rules:
        rules.pop("title", None)
        rules["properties"] = {key: draft_07(inner, blocks) for key, inner in rules["properties"].items()}
        for key in HIDDEN & rules["properties"].keys():
            rules["properties"][key].pop("pattern")
    for word in ("items", "additionalProperties"):
        if isinstance(rules.get(word), dict):
            rules[word] = draft_07(rules[word], blocks)
    if names := rules.pop("propertyNames", None):  # for which Helm 4 names another key
        rules["patternProperties"] = {names["pattern"]: rules["additionalProperties"]}
    if "patternProperties" in rules:
        rules["patternProperties"] = {key: draft_07(inner, blocks) for key, inner in rules["patternProperties"].items()}
        rules["additionalProperties"] = False
    if "const" in rules:
        rules["enum"] = [rules.pop("const")]
    if "enum" in rules:
        rules.pop("type", None)
    if "anyOf" in rules:
        rules = one_of_several([draft_07(branch, blocks) for branch in rules.pop("anyOf")], rules)
    if rules.get("type") == "number":
        rules |= {"type": ["number", "string"], "pattern": NUMBER}
    if "description" in rules:
        rules["description"] = one_paragraph(rules["description"])
    return rules


def one_of_several(branches: list[Schema], outer: Schema) -> Schema:
    """``anyOf`` without it where the branches differ in their types only: Helm's message then names the rule broken."""
    described = next((branch["description"] for branch in branches if "description" in branch), "")
    outer = {"description": described, **outer} if described else outer
    branches = [{word: value for word, value in branch.items() if word != "description"} for branch in branches]
    null = [branch for branch in branches if branch == {"type": "null"}]
    others = [branch for branch in branches if branch not in null]
    if len(others) == 1 and null and "type" in others[0]:
        types = others[0]["type"] if isinstance(others[0]["type"], list) else [others[0]["type"]]
        return {**others[0], "type": [*types, "null"], **outer}
    if all("enum" in branch for branch in others):
        choices = [choice for branch in others for choice in branch["enum"]]
        return {"enum": [*choices, *([None] if null else [])], **outer}
    plain = [branch for branch in others if branch.keys() <= {"type", "pattern"}]
    if len(plain) == len(others):  # number's pattern is for text that stands for one; here any text is allowed
        types = [branch["type"] if isinstance(branch["type"], str) else branch["type"][0] for branch in others]
        return {"type": [*types, *(["null"] if null else [])], **outer}
    return {"anyOf": branches, **outer}


def one_paragraph(text: str) -> str:
    return " ".join(text.split())
