"""A file in the lines of a log: compressed, in short lines of base64, with its size and digest.

A log is the one way out of a pod that needs no rights beyond those that following a stage needs. Container runtimes
split lines of more than 16 KiB, and kubelets rotate logs of more than 10 MiB.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator

from genvalues.common.dicts import get

BEGIN, END = "file: begin ", "file: end"
WIDTH = 120  # characters of a line
MOST_BYTES = 32 << 20  # of a file
MOST_IN_LOG = 9 << 20  # characters


class InvalidLog(Exception):
    """Why a log does not contain a whole file."""


def lines_of(content: bytes) -> Iterator[str]:
    """Yield the lines. Raises InvalidLog if there would be too many of them."""
    text = base64.b64encode(zlib.compress(content, 9)).decode("ascii")
    if len(content) > MOST_BYTES or len(text) > MOST_IN_LOG:
        raise InvalidLog(f"has {len(content)} bytes, which is too much for a log")
    about = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    yield BEGIN + json.dumps(about)
    for start in range(0, len(text), WIDTH):
        yield text[start : start + WIDTH]
    yield END


def content_of(lines: Iterable[str]) -> bytes:
    """The file in a log, which may have other lines before and after. Raises InvalidLog if it is not whole."""
    about: object = None
    body: list[str] = []
    for line in map(str.strip, lines):
        if line.startswith(BEGIN):
            about, body = _about(line.removeprefix(BEGIN)), []
        elif line == END and about is not None:
            return _unpacked(about, "".join(body))
        elif about is not None:
            body.append(line)
    raise InvalidLog("ends before the file does" if about is not None else "has no file")


def _about(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidLog("has a damaged first line") from None


def _unpacked(about: object, text: str) -> bytes:
    size, digest = get(about, "bytes", int), get(about, "sha256", str)
    if size is None or digest is None or not 0 <= size <= MOST_BYTES:
        raise InvalidLog("has a damaged first line")
    try:
        unpacker = zlib.decompressobj()
        content = unpacker.decompress(base64.b64decode(text, validate=True), size + 1)
    except (binascii.Error, ValueError, zlib.error):
        raise InvalidLog("has damaged lines") from None
    if len(content) != size or hashlib.sha256(content).hexdigest() != digest:
        raise InvalidLog("has another file than its digest says")
    return content
