"""Upload files of a run, each with the SHA-256 in its stage's manifest: to S3 (``s3``) and to the Hub (``hub``)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from genvalues.common.errors import UserError
from genvalues.common.files import open_regular


@dataclass(frozen=True)
class File:
    """A file to upload: its name at the destination, where it is, and what the manifest says of it."""

    name: str
    path: Path
    bytes: int
    sha256: str
    stage: str  # that wrote it, for messages

    @contextmanager
    def opened(self) -> Iterator[BinaryIO]:
        """Open it for reading; a symbolic link is refused. Raises UserError if it cannot be read."""
        try:
            source = open_regular(self.path)
        except OSError as error:
            raise self.error(f"cannot be read: {error.strerror}") from None
        with source:
            yield source

    def check(self, size: int, digest: str) -> None:
        """Raise UserError unless these are the size and the hex SHA-256 in the manifest."""
        if (size, digest) != (self.bytes, self.sha256):
            what = f"has {size} bytes, expected {self.bytes}" if size != self.bytes else "has another SHA-256"
            raise self.error(f"{what} than its manifest says" if size == self.bytes else what)

    def error(self, what: str) -> UserError:
        fix = f"Delete it and run the stage {self.stage} again, then publish."
        return UserError(what, where=str(self.path), fix=fix)


def check_digest(file: File) -> None:
    """Read a file, and raise UserError unless it is as its manifest says."""
    digest, size = hashlib.sha256(), 0
    with file.opened() as source:
        while piece := source.read(1 << 20):
            digest.update(piece)
            size += len(piece)
    file.check(size, digest.hexdigest())


def manifest_of(run: str, fingerprint: str, files: Sequence[File]) -> bytes:
    """The manifest that is uploaded last: whose files are complete, with their sizes and digests."""
    content: dict[str, Any] = {
        "format": FORMAT,
        "run": run,
        "fingerprint": fingerprint,
        "files": {file.name: {"bytes": file.bytes, "sha256": file.sha256} for file in files},
    }
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def published_files(manifest: bytes, run: str, where: str, place: str) -> dict[str, Any]:
    """The files in a manifest that is already at the destination. Raises UserError if it is not one of this run."""
    try:
        content = json.loads(manifest.decode("utf-8"))
        known, files = content.get("format") == FORMAT, content.get("files")
    except (ValueError, AttributeError, RecursionError):
        known, files = False, None
    if not known or not isinstance(files, dict):
        raise UserError(
            f"{place} has a manifest that llama-lora did not write", where=where, fix="Use a place of its own."
        )
    if content.get("run") != run:
        other = str(content.get("run"))[:63]
        raise UserError(f"{place} has the results of the run {other!r}", where=where, fix="Use a place of its own.")
    return files


FORMAT = "llama-lora publish 1"
