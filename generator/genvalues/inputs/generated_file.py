"""The header of a generated file: its sources, its schema, and a digest that shows whether it was edited.

The digest covers all other lines. Line endings and a BOM, which git and editors change, do not count.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from genvalues.common.text import SECRET_NAME, one_line, redacted

DIGEST = re.compile(r"^# digest: ([0-9a-f]{16})$")
LONGEST_DIFF = 60  # lines of a diff that are shown


def with_digest(comments: Iterable[str], body: str) -> str:
    """The text of a file: ``comments``, the digest, ``body``."""
    head = [f"# {comment}" for comment in comments]
    lines = [*head, *body.splitlines()]
    return "\n".join([*head, f"# digest: {digest(lines)}", *body.splitlines()]) + "\n"


def digest(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode("utf-8", errors="surrogateescape")).hexdigest()[:16]


def claimed_digest(text: str) -> str:
    """The digest in the header of a file; empty if there is none."""
    for line in text.removeprefix("\ufeff").splitlines():
        if found := DIGEST.match(line):
            return found[1]
        if not line.startswith("#"):
            break
    return ""


def is_as_written(text: str) -> bool:
    """Whether genvalues wrote this text and it was not edited since."""
    claimed = claimed_digest(text)
    lines = text.removeprefix("\ufeff").splitlines()
    return bool(claimed) and claimed == digest([line for line in lines if line != f"# digest: {claimed}"])


def difference(there: str, wanted: str, name: str) -> str:
    """A unified diff of what overwriting would change, without secrets."""
    import difflib

    diff = difflib.unified_diff(
        there.splitlines(), wanted.splitlines(), f"{name} (current)", f"{name} (new)", lineterm="", n=1
    )
    lines = [printable(line) for line in redacted("\n".join(diff)).split("\n")]
    if len(lines) > LONGEST_DIFF:
        lines[LONGEST_DIFF:] = [f"... and {len(lines) - LONGEST_DIFF} more lines"]
    return "\n".join(lines)


def printable(line: str) -> str:
    key, colon, _ = line.partition(":")
    if colon and SECRET_NAME.search(key.lstrip("-+ #\"'").rstrip("\"' ")):
        return one_line(f"{key}: ...", 200)
    return one_line(line, 200)


def schema_comments(schema: Path, tree: Path | None, folder: Path, command: str) -> list[str]:
    """The comment with which editors (yaml-language-server, JetBrains) find the schema of a file in ``folder``.

    A relative path if file and schema are in the same ``tree``, else a schema beside the file, which ``command``
    writes.
    """
    folder = Path(os.path.realpath(folder))
    if tree is not None and (root := Path(os.path.realpath(tree))) in (folder, *folder.parents):
        place = Path(os.path.relpath(root / os.path.relpath(os.path.realpath(schema), root), folder)).as_posix()
        return [f"yaml-language-server: $schema={place}"]
    return [
        f"For editors: {command} > {schema.name} (beside this file)",
        f"yaml-language-server: $schema={schema.name}",
    ]
