"""Read files that may be compressed with gzip or Zstandard, in bounded memory and time."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from genvalues.common.errors import UserError
from genvalues.common.text import one_line
from genvalues.settings.datasets import GZIP, ZSTANDARD

# A file that decompresses to more than both is refused. Text rarely compresses to less than a fiftieth; gzip reaches at
# most a 1032nd (https://www.zlib.net/zlib_tech.html), Zstandard a 10,000th and less.
MOST_FREE_BYTES = 64 << 20
MOST_EXPANSION = 500


@contextmanager
def open_decompressed(path: Path, name: str) -> Iterator[io.BufferedReader]:
    """Open a file for reading, decompressed if its first bytes are those of gzip or Zstandard.

    Reading raises UserError for ``name`` if the file is damaged, or expands to an implausible size.
    """
    with path.open("rb") as file:
        first = file.read(4)
        file.seek(0)
        if first.startswith(GZIP):
            yield io.BufferedReader(_Decompressed(gzip.GzipFile(fileobj=file), path, name), 1 << 20)
        elif first.startswith(ZSTANDARD):
            import pyarrow

            yield io.BufferedReader(_Decompressed(pyarrow.CompressedInputStream(file, "zstd"), path, name), 1 << 20)
        else:
            yield file


class _Decompressed(io.RawIOBase):
    """A stream of decompressed bytes that counts them."""

    def __init__(self, stream: Any, path: Path, name: str) -> None:
        self._stream = stream
        self._name = name
        self._left = max(MOST_FREE_BYTES, MOST_EXPANSION * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._stream.read(len(buffer))
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(
                f"cannot be decompressed: {one_line(str(error), 200)}",
                where=self._name,
                fix="The file is damaged or incomplete.",
            ) from None
        self._left -= len(data)
        if self._left < 0:
            raise UserError(
                f"decompresses to more than {MOST_EXPANSION} times its size",
                where=self._name,
                fix="If this is intended, store it decompressed.",
            )
        buffer[: len(data)] = data
        return len(data)
