"""What every declared setting shares: one class a block, one field a key, spelled in camelCase outside Python.

A field is the only declaration of its key: type, limits, default and description. Where the key exists is decided by
the class that has the field: ``run`` (values and run config; most of them inputs, too), ``inputs`` (what a user
writes), ``values`` (what the chart accepts besides). ``python -m genvalues.settings.generate`` writes everything that
follows from the declarations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PlainSerializer,
)
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, core_schema

from genvalues.common.text import camel_case

DNS_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
RUN_NAME = r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?"  # the name of a folder, and after it the value of a label
DNS_NAME = rf"{DNS_LABEL}(\.{DNS_LABEL})*"
REVISION = r"[A-Za-z0-9_][A-Za-z0-9_./-]*"
HUB_ID = r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)?"
REPOSITORY_PART = r"[a-z0-9]+((\.|__?|-+)[a-z0-9]+)*"  # as the distribution reference has it
# A port is followed by a path: x:1 is the repository x with the tag 1.
REPOSITORY = rf"{REPOSITORY_PART}(:[0-9]+/{REPOSITORY_PART})?(/{REPOSITORY_PART})*"
TAG = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"
DIGEST = r"sha256:[0-9a-f]{64}"
LARGE = 1_000_000_000  # an upper bound where nothing else limits a number
NUMBER = r"^[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?$"  # a number as `helm --set` passes it: as text
BOUNDS = {  # JSON Schema's words for limits, and ours
    "minimum": "at least",
    "exclusiveMinimum": "more than",
    "maximum": "at most",
    "exclusiveMaximum": "less than",
}


class Block(BaseModel):
    """A block of settings: camelCase keys outside, snake_case inside, unknown keys are refused."""

    FIRST: ClassVar[tuple[str, ...]] = ()  # fields of subclasses that files show before the block's own

    model_config = ConfigDict(
        alias_generator=camel_case, extra="forbid", frozen=True, populate_by_name=True, defer_build=True
    )

    def __init_subclass__(cls, **options: Any) -> None:
        """A block that only adds keys to another has its description."""
        super().__init_subclass__(**options)
        cls.__doc__ = cls.__doc__ or cls.__mro__[1].__doc__

    @classmethod
    def fields_in_order(cls) -> dict[str, FieldInfo]:
        """The fields by name, in the order in which files and pages show them."""
        first = {name: cls.model_fields[name] for name in cls.FIRST if name in cls.model_fields}
        return first | cls.model_fields

    @classmethod
    def key_of(cls, field: str) -> str:
        """A field's key in files."""
        return cls.model_fields[field].alias or field

    def as_keys(self) -> dict[str, Any]:
        """The block with its keys as a user writes them: for fingerprints, records and values."""
        return self.model_dump(by_alias=True)


@dataclass(frozen=True, eq=False)
class OtherWords:
    """Annotation of a key: words that are valid besides the key's own, and the key's own words for them.

    The classes read them as the key's own words. ``run.with_own_words`` and the chart's llama-lora.settings.complete
    replace them in values.
    """

    words: Mapping[Any, str]

    def own(self, value: Any) -> Any:
        return self.words[value] if isinstance(value, (str, bool)) and value in self.words else value

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self.own, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        rules = handler(schema)
        return {**rules, "enum": [*rules["enum"], *self.words]}


def other_words(block: type[Block], above: str = "") -> Iterator[tuple[str, OtherWords]]:
    """The dotted keys that have other words."""
    for name, field in block.model_fields.items():
        key = f"{above}{block.key_of(name)}"
        yield from ((key, each) for each in field.metadata if isinstance(each, OtherWords))
        if isinstance(field.annotation, type) and issubclass(field.annotation, Block):
            yield from other_words(field.annotation, f"{key}.")


def optional(pattern: str) -> str:
    """The pattern of a text that may also be empty."""
    return f"^({pattern})?$"


def as_written(number: float) -> float | int:
    """16 rather than 16.0, where a file shows what the user wrote."""
    return int(number) if number.is_integer() else number


def empty_for_null(value: Any) -> Any:
    return "" if value is None else value


Text = Annotated[str, Field(min_length=1, max_length=1024)]
Name = Annotated[str, Field(pattern=optional(DNS_NAME), max_length=253)]  # of a Kubernetes object; empty: none
NullIsEmpty = Annotated[str, BeforeValidator(empty_for_null)]  # in an inputs file null says "left out", too
Fraction = Annotated[float, Field(ge=0, lt=1)]
# A number for the trainer (16.0 in fingerprints), and in values files as the user wrote it (16).
Number = Annotated[float, PlainSerializer(as_written, return_type=Any, when_used="json")]
