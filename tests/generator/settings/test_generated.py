"""Every setting is declared once: what is generated from the declarations is up to date and fit for its readers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import yaml

from genvalues.settings.base import NUMBER
from genvalues.settings.generate import ROOT, generated_files
from genvalues.settings.run import RunConfig
from genvalues.settings.schemas import inputs_schema, values_schema
from genvalues.settings.values import Values

SINCE_DRAFT_07 = {
    "$defs",
    "unevaluatedProperties",
    "dependentRequired",
    "dependentSchemas",
    "prefixItems",
    "minContains",
}


def parts(schema: Any) -> Iterator[dict[str, Any]]:
    """Its parts, without conditions, which repeat keys that are described elsewhere."""
    if isinstance(schema, dict):
        yield schema
        for word, inner in schema.items():
            if word not in ("if", "then", "else"):
                yield from parts(inner)
    elif isinstance(schema, list):
        for inner in schema:
            yield from parts(inner)


@pytest.mark.parametrize("path", generated_files(), ids=lambda path: path.name)
def test_what_is_generated_is_up_to_date(path: Any) -> None:
    assert path.read_text(encoding="utf-8") == generated_files()[path], "run: make generate"


def test_the_charts_schema_uses_draft_07_words_only() -> None:
    """Helm up to 3.18.4 ignores newer words silently."""
    schema = values_schema()
    jsonschema.Draft7Validator.check_schema(schema)
    for part in parts(schema):
        assert not SINCE_DRAFT_07 & part.keys()
        assert "$ref" not in part or part.keys() <= {"$ref", "description"}, "draft-07 ignores what stands beside it"


def test_the_charts_schema_requires_no_key_that_has_a_default() -> None:
    schema = values_schema()
    required = [part["required"] for part in parts(schema) if isinstance(part.get("required"), list)]
    assert required == [  # of a stage's lists and maps, which are empty by default, and of an additional source
        *(["nodeSelectorTerms"], ["weight", "preference"], ["weight", "podAffinityTerm"]),
        *(["weight", "podAffinityTerm"], ["maxSkew", "topologyKey", "whenUnsatisfiable"]),
        *(["name", "key"], ["name"], ["name"], ["mountPath"], ["type"], ["source"]),
    ]
    short = {"model": {"id": "org/model"}, "dataset": {"source": "org/rows", "format": "text"}}
    assert list(jsonschema.Draft7Validator(schema).iter_errors(short)) == []


def test_the_charts_defaults_fit_its_schema() -> None:
    defaults = yaml.safe_load((ROOT / "chart/values.yaml").read_text(encoding="utf-8"))
    assert list(jsonschema.Draft7Validator(values_schema()).iter_errors(defaults)) == []
    assert Values.model_validate(defaults) == Values()


@pytest.mark.parametrize("text", ["0.03", "5e-5", "5.0E-05", ".5", "1."])
def test_a_number_may_be_text_that_helm_made_of_it(text: str) -> None:
    validator = jsonschema.Draft7Validator(values_schema())
    assert list(validator.iter_errors({"training": {"warmupRatio": text}})) == []
    for wrong in (f"{text}x", "", "nan", "0x1"):
        (error,) = validator.iter_errors({"training": {"warmupRatio": wrong}})
        assert error.validator_value == NUMBER


def test_the_run_config_has_the_keys_of_the_values_and_their_types() -> None:
    """So that the chart can put whole sections of its values into the run config."""
    for name in RunConfig.model_fields:
        if name in ("name", "backend", "device", "verify"):  # no blocks
            continue
        run = RunConfig.model_fields[name].annotation.model_fields  # type: ignore[union-attr]
        values = Values.model_fields[name].annotation.model_fields  # type: ignore[union-attr]
        assert run.keys() == values.keys(), name


def test_both_schemas_describe_every_key() -> None:
    for schema in (inputs_schema(), values_schema()):
        described = [rules for part in parts(schema) for rules in part.get("properties", {}).values()]
        assert len(described) > 50
        for rules in described:
            assert rules["description"].endswith("."), rules


def test_the_schemas_are_json_that_editors_can_read() -> None:
    for name in ("chart/values.schema.json", "generator/genvalues/settings/inputs.schema.json"):
        assert json.loads((ROOT / name).read_text(encoding="utf-8"))["type"] == "object"
