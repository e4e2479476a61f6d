"""SHA-256 of the files that a stage reads: compared with what the stage that wrote them has recorded.

With ``verify: cached`` a file is not read again on the same node as long as its device, inode, size and times are the
same. The cache is in a folder of this user on the node (not on the volume, where others can write), and is believed
only if no other user can write to it. A byte that changes on the disk itself changes no time: only ``always`` finds it.
"""

from __future__ import annotations

import json
import logging
import os
import stat
import tempfile
import time
from collections.abc import Container, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from genvalues.common import files
from genvalues.common.json_files import FileRecord, InvalidJson, Sha256, as_record, parse_json
from llama_lora import environment
from llama_lora.config import Verify

log = logging.getLogger(__name__)

NOT_FOUND = "not found"
OTHER_CONTENT = "has the expected size but another SHA-256"
FORMAT = 1
MOST_ENTRIES = 10_000
MOST_BYTES = 4 << 20
MOST_THREADS = 8
# A file that was written less than this before it was read is read again: a later write could have the same time. Times
# on Lustre are in seconds, and a local file system's are those of the last tick of the clock. As git does:
# https://git-scm.com/docs/racy-git
SETTLED_SECONDS = 2.0


@dataclass
class CacheFile:
    """The content of the cache's file: digests by the identity of a file, the oldest first."""

    format: int = FORMAT
    digests: dict[str, Sha256] = field(default_factory=dict)


class Digests:
    """Digests of files, with a cache on this node unless ``verify`` is always."""

    def __init__(self, verify: Verify, folder: Path | None = None) -> None:
        self.verify = verify
        self.folder = folder or Path(tempfile.gettempdir(), f"llama-lora-digests-{os.geteuid()}")

    def of(self, paths: Iterable[Path]) -> dict[Path, str | OSError]:
        """The digest of each file, or why it cannot be read. Files are read side by side."""
        paths = list(paths)
        cached = self._read() if self.verify == "cached" else {}
        found: dict[Path, str | OSError] = {}
        identities: dict[Path, str] = {}
        for path in paths:
            try:
                identities[path] = identity(path.stat())
            except OSError as error:
                found[path] = error
                continue
            if identities[path] in cached:
                found[path] = cached[identities[path]]
        missing = [path for path in paths if path not in found]
        began = time.time()
        with ThreadPoolExecutor(max(1, min(MOST_THREADS, environment.available_cores(), len(missing)))) as pool:
            found |= zip(missing, pool.map(digest_of, missing), strict=True)
        if self.verify == "cached":
            read = {path: digest for path in missing if isinstance(digest := found[path], str)}
            new = {identities[path]: read[path] for path in read if settled(path, identities[path], began)}
            if new:
                self._write(new)
        return found

    def _read(self) -> dict[str, str]:
        """The cached digests; empty if the cache does not exist, is not valid, or others could have written it."""
        try:
            folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return {}
        try:
            if not is_own(os.fstat(folder)):
                log.debug(f"{self.folder} is not used: others can write to it")
                return {}
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            with open(os.open("digests.json", flags, dir_fd=folder), "rb") as file:  # noqa: PTH123
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode) or not is_own(status):
                    return {}
                content = file.read(MOST_BYTES)
            cache = as_record(parse_json(content.decode("utf-8")), CacheFile)
            return cache.digests if cache.format == FORMAT else {}
        except (OSError, UnicodeDecodeError, InvalidJson):
            return {}
        finally:
            os.close(folder)

    def _write(self, new: Mapping[str, str]) -> None:
        """Add digests to the cache. Nothing depends on it: a failure is only logged."""
        try:
            self.folder.mkdir(mode=0o700, exist_ok=True)
            if not is_own(self.folder.lstat()):
                return
            digests = dict(list(({**self._read(), **new}).items())[-MOST_ENTRIES:])
            content = json.dumps({"format": FORMAT, "digests": digests})
            files.write_bytes(self.folder / "digests.json", content.encode(), mode=0o600)
        except OSError as error:
            log.debug(f"digests are not cached: {error}")


def identity(status: os.stat_result) -> str:
    """What changes when a file is replaced or written."""
    values = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return ":".join(map(str, values))


def settled(path: Path, before: str, read_at: float) -> bool:
    """Whether a digest can be kept: the file did not change while it was read, and was not written just before."""
    try:
        status = path.stat()
    except OSError:
        return False
    written_at = (status.st_mtime, status.st_ctime)  # mtime can be set, ctime cannot
    return identity(status) == before and all(abs(read_at - each) > SETTLED_SECONDS for each in written_at)


def is_own(status: os.stat_result) -> bool:
    """Whether only this user can write to a file or folder."""
    return status.st_uid == os.geteuid() and not stat.S_IMODE(status.st_mode) & 0o022


def digest_of(path: Path) -> str | OSError:
    try:
        return files.sha256(path)
    except OSError as error:
        return error


def differences(recorded: Mapping[Path, FileRecord], digests: Digests) -> dict[Path, str]:
    """How each file differs from its record, for those that do."""
    found = {path: difference for path, record in recorded.items() if (difference := other_size(path, record.bytes))}
    for path, digest in digests.of(path for path in recorded if path not in found).items():
        if isinstance(digest, OSError):
            found[path] = f"cannot be read: {digest.strerror}"
        elif digest != recorded[path].sha256:
            found[path] = OTHER_CONTENT
    return found


def record_of(file: Path) -> FileRecord:
    """The size and digest of a file. Raises OSError if it cannot be read."""
    return FileRecord(file.stat().st_size, files.sha256(file))


def files_in(folder: Path) -> list[Path]:
    """Every file in a folder, also in folders inside it."""
    return sorted(file for file in folder.rglob("*") if file.is_file())


def unlisted(folder: Path, listed: Container[Path]) -> list[Path]:
    """What is in a folder besides the files ``listed``, also links: libraries may read it.

    Names that begin with a dot are left out: they are of a file system or an editor, and nothing reads them.
    """
    found = (file for file in folder.rglob("*") if not file.is_dir() and not file.name.startswith("."))
    return sorted(file for file in found if file not in listed)


def other_size(path: Path, expected: int) -> str:
    """How a file's size differs from the expected one; empty if it does not."""
    try:
        size = path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return NOT_FOUND
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return "" if size == expected else f"has {size} bytes, expected {expected}"
