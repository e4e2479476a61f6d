"""inputs.schema.json, made by pydantic of the blocks in inputs.py: ``make schema``."""

from __future__ import annotations

import json
from dataclasses import MISSING, fields, is_dataclass
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, create_model

from genvalues.common.files import write_text
from genvalues.settings import inputs


def json_schema() -> dict[str, Any]:
    """The JSON schema of an inputs file."""
    schema = model(inputs.Inputs, {}).model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **without_titles(schema)}


def schema_text() -> str:
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


def model(block: type, models: dict[type, type[BaseModel]]) -> type[BaseModel]:
    """A block as pydantic's model; ``models`` are those made so far."""
    if block not in models:
        types = get_type_hints(block, include_extras=True)
        keys: dict[str, Any] = {}
        for setting in fields(block):
            rules = {name: value for name, value in setting.metadata.items() if name != "block"}
            default = plain_default(setting)
            given = {} if default is MISSING else {"default": default}
            keys[setting.name] = (translated(types[setting.name], models), Field(**given, **rules))
        written = block.__doc__ if not (block.__doc__ or "").startswith(f"{block.__name__}(") else None
        settings = ConfigDict(alias_generator=inputs.camel, extra="forbid")
        models[block] = create_model(block.__name__, __config__=settings, __doc__=written, **keys)
    return models[block]


def plain_default(setting: Any) -> Any:
    default = setting.default if setting.default_factory is MISSING else setting.default_factory()
    return inputs.plain(default) if is_dataclass(default) else default


def translated(kind: Any, models: dict[type, type[BaseModel]]) -> Any:
    """A type of inputs.py as pydantic takes it: blocks as models, limits as fields."""
    if is_dataclass(kind) and isinstance(kind, type):
        return model(kind, models)
    if get_origin(kind) is Annotated:
        inner, limits = get_args(kind)
        return Annotated[inner, Field(**limits.rules)]
    if get_origin(kind) in (Union, UnionType):
        return Union[tuple(translated(option, models) for option in get_args(kind))]  # noqa: UP007 - made at run time
    return kind


def without_titles(schema: Any) -> Any:
    """Pydantic titles every key with its own name, which says nothing."""
    if isinstance(schema, list):
        return [without_titles(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: without_titles(value) for key, value in schema.items() if not (key == "title" and isinstance(value, str))
    }


if __name__ == "__main__":
    write_text(inputs.SCHEMA, schema_text())
