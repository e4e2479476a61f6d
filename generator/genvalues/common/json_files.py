"""Read a JSON file that another process, an earlier release or a stranger may have written.

The content is not trusted: size, depth, numbers and the kind of the file are limited, and every way in which reading
fails is one exception with its own words. The caller decides what a file with a problem means.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, NoReturn

MOST_BYTES = 64 << 20


class InvalidJson(Exception):
    """Why a file was not read, as the rest of a sentence that begins with its path: "is not valid JSON (line 1)"."""


class JsonNotFound(InvalidJson):
    """There is no such file."""


def read_json(path: Path, most_bytes: int = MOST_BYTES) -> Any:
    """Read a regular file as JSON in UTF-8, without following a link. Raises InvalidJson."""
    content = read_bytes(path, most_bytes)
    if not content.strip():
        raise InvalidJson("is empty")
    try:
        return json.loads(content.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise InvalidJson(f"is not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        cut = ": the file is cut off" if error.pos >= len(content.decode("utf-8").rstrip()) else ""
        raise InvalidJson(f"is not valid JSON (line {error.lineno}, column {error.colno}{cut})") from None
    except RecursionError:
        raise InvalidJson("is not valid JSON: it is nested too deeply") from None
    except ValueError as error:  # a number of more digits than Python converts, NaN
        raise InvalidJson(f"is not valid JSON: {error}") from None


def read_object(path: Path, most_bytes: int = MOST_BYTES) -> dict[str, Any]:
    """Read a JSON file that must contain an object. Raises InvalidJson."""
    content = read_json(path, most_bytes)
    if not isinstance(content, dict):
        raise InvalidJson(f"contains {_kind(content)}, expected an object")
    return content


def read_bytes(path: Path, most_bytes: int) -> bytes:
    """Read a regular file of at most ``most_bytes``, without following a link. Raises InvalidJson."""
    try:
        # O_NONBLOCK: opening a FIFO would wait for a writer
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise JsonNotFound("not found") from None
    except OSError as error:
        raise InvalidJson("is a symbolic link" if path.is_symlink() else f"cannot be read: {error.strerror}") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise InvalidJson("is not a regular file")
        if status.st_size > most_bytes:
            raise InvalidJson(f"has {status.st_size} bytes, the most is {most_bytes}")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(most_bytes + 1)
    except OSError as error:
        raise InvalidJson(f"cannot be read: {error.strerror}") from None
    finally:
        os.close(descriptor)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _kind(content: Any) -> str:
    names = {list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if content is None else names[type(content)]
