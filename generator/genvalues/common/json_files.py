"""Read a JSON file that another process, an earlier release or a stranger may have written.

The content is not trusted: size, depth, numbers and the kind of the file are limited, and every way in which reading
fails is one exception with its own words. The caller decides what a file with a problem means.

What a file contains is declared as a dataclass; ``read_record`` returns one whose fields have the declared types.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, NoReturn, TypeVar

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from genvalues.common.files import NotARegularFile, open_regular
from genvalues.common.text import one_line

MOST_BYTES = 64 << 20
MOST_DEPTH = 100
MOST_DIGITS = 100
SHOWN = 80  # characters of a value in a message
DIGEST = "sha256"  # the key in a JSON record of the digest of its other keys
Record = TypeVar("Record")
_adapter: Any = functools.cache(TypeAdapter)


class InvalidJson(Exception):
    """Why a file was not read, as the rest of a sentence that begins with its path: "is not valid JSON (line 1)"."""


class JsonNotFound(InvalidJson):
    """There is no such file."""


class JsonUnreadable(InvalidJson):
    """The system cannot read the file, for the reason ``errno``."""

    def __init__(self, error: OSError) -> None:
        self.errno = error.errno
        super().__init__(f"cannot be read: {error.strerror}")


def read_json(path: Path, most_bytes: int = MOST_BYTES) -> Any:
    """Read a regular file as JSON in UTF-8, without following a link. Raises InvalidJson."""
    content = read_bytes(path, most_bytes)
    try:
        return parse_json(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InvalidJson(f"is not UTF-8 (byte {error.start})") from None


def parse_json(text: str) -> Any:
    """Parse text from a file or a process as JSON. Raises InvalidJson."""
    if not text.strip():
        raise InvalidJson("is empty")
    try:
        content = json.loads(text, parse_constant=_refuse_constant, parse_int=_integer, parse_float=_finite)
        _check_depth(content)
        return content
    except json.JSONDecodeError as error:
        is_cut = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
        cut = ": it is cut off" if is_cut else ""
        raise InvalidJson(f"is not valid JSON (line {error.lineno}, column {error.colno}{cut})") from None
    except RecursionError:
        raise InvalidJson("is not valid JSON: it is nested too deeply") from None
    except ValueError as error:  # a number of more digits than Python converts, NaN
        raise InvalidJson(f"is not valid JSON: {error}") from None


class DuplicateKey(ValueError):
    """An object has the key ``key`` twice."""

    def __init__(self, key: str) -> None:
        self.key = key
        super().__init__(f"has the key {one_line(key)!r} twice")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these keys and values, for json. Raises DuplicateKey where json would take the last value."""
    found = dict(pairs)
    if len(found) != len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise DuplicateKey(key)
    return found


def _check_depth(content: Any) -> None:
    """Raise RecursionError for content in which a function that calls itself for each level may fail."""
    level, depth = [content], 0
    while level:
        if depth > MOST_DEPTH:
            raise RecursionError
        children = (
            node.values() if isinstance(node, dict) else node for node in level if isinstance(node, (dict, list))
        )
        level, depth = [child for each in children for child in each], depth + 1


def read_object(path: Path, most_bytes: int = MOST_BYTES) -> dict[str, Any]:
    """Read a JSON file that must contain an object. Raises InvalidJson."""
    return as_object(read_json(path, most_bytes))


def as_object(content: Any) -> dict[str, Any]:
    """Return parsed JSON that must be an object. Raises InvalidJson."""
    if not isinstance(content, dict):
        raise InvalidJson(f"contains {_kind(content)}, expected an object")
    return content


def read_record(path: Path, kind: type[Record], most_bytes: int = MOST_BYTES) -> Record:
    """Read a JSON file as a dataclass. Raises InvalidJson."""
    return as_record(read_json(path, most_bytes), kind)


def as_record(content: Any, kind: type[Record]) -> Record:
    """Convert parsed JSON to a dataclass, whose fields then have the declared types, also inside of containers.

    Raises InvalidJson, naming the first field that is missing or has another type. Unknown fields are ignored.
    """
    try:
        validated: Record = _adapter(kind).validate_python(as_object(content))
        return validated
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"])[:SHOWN]
        message = first["msg"].removeprefix("Value error, ")
        raise InvalidJson(f"has no valid {place!r}: {message[:1].lower()}{message[1:]}") from None


def json_digest(value: Any) -> str:
    """The hex SHA-256 of a value as JSON, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def with_own_digest(content: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON record with the digest of its other keys."""
    others = {key: value for key, value in content.items() if key != DIGEST}
    return {**others, DIGEST: json_digest(others)}


def check_own_digest(content: Mapping[str, Any], *, required: bool = True) -> None:
    """Raise InvalidJson unless a JSON record has its own digest, or none if that is not ``required``."""
    if (required or DIGEST in content) and content.get(DIGEST) != with_own_digest(content)[DIGEST]:
        raise InvalidJson("has another SHA-256 than it records of itself")


def _path_inside(name: str) -> str:
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in name:
        raise ValueError(f"{name[:SHOWN]!r} is not a path inside of the folder")
    return name


# A path in a record, relative to a folder that it cannot leave.
PathInside = Annotated[str, AfterValidator(_path_inside)]


def _time(text: str) -> str:
    try:
        datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError):
        raise ValueError(f"{text[:SHOWN]!r} is not a time in ISO 8601") from None
    return text


Time = Annotated[str, AfterValidator(_time)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True)
class FileRecord:
    """A file as a record lists it."""

    bytes: Count
    sha256: Sha256


def read_bytes(path: Path, most_bytes: int) -> bytes:
    """Read a regular file of at most ``most_bytes``, without following a link. Raises InvalidJson."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > most_bytes:
                raise InvalidJson(f"has {size} bytes, the most is {most_bytes}")
            return file.read(most_bytes + 1)
    except FileNotFoundError:
        raise JsonNotFound("not found") from None
    except NotARegularFile:
        raise InvalidJson("is not a regular file") from None
    except OSError as error:
        raise (InvalidJson("is a symbolic link") if path.is_symlink() else JsonUnreadable(error)) from None


def _integer(digits: str) -> int:
    """Refuse an integer that no float can hold: code that calculates with it would raise OverflowError."""
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits, the most is {MOST_DIGITS}")
    return int(digits)


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits[:SHOWN]} is too large")
    return number


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _kind(content: Any) -> str:
    names = {list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if content is None else names[type(content)]
