"""What a file that genvalues writes says of itself: from what it came, which schema it has, and whether it was edited.

The digest is of all other lines, so that any edit shows; line ends and a BOM, which git and editors change, are none.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from genvalues.common.text import SECRET_NAME, one_line, redacted

DIGEST = re.compile(r"^# digest: ([0-9a-f]{16})$")
LONGEST_DIFF = 60  # lines


def with_digest(comments: Iterable[str], body: str) -> str:
    """A file of ``comments`` and ``body`` with its own digest after the comments."""
    head = [f"# {comment}" for comment in comments]
    lines = [*head, *body.splitlines()]
    return "\n".join([*head, f"# digest: {digest(lines)}", *body.splitlines()]) + "\n"


def digest(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode("utf-8", errors="surrogateescape")).hexdigest()[:16]


def claimed_digest(text: str) -> str:
    """The digest a file has among its first comments; empty where it has none."""
    for line in text.removeprefix("\ufeff").splitlines():
        if found := DIGEST.match(line):
            return found[1]
        if not line.startswith("#"):
            break
    return ""


def is_as_written(text: str) -> bool:
    """Whether genvalues wrote this, and nobody has changed it since."""
    claimed = claimed_digest(text)
    lines = text.removeprefix("\ufeff").splitlines()
    return bool(claimed) and claimed == digest([line for line in lines if line != f"# digest: {claimed}"])


def difference(there: str, wanted: str, name: str) -> str:
    """What overwriting would change, as a unified diff that shows no secret."""
    import difflib

    diff = difflib.unified_diff(
        there.splitlines(), wanted.splitlines(), f"{name} (as it is)", f"{name} (as it would be)", lineterm="", n=1
    )
    lines = [printable(line) for line in redacted("\n".join(diff)).split("\n")]
    if len(lines) > LONGEST_DIFF:
        lines[LONGEST_DIFF:] = [f"... and {len(lines) - LONGEST_DIFF} lines more"]
    return "\n".join(lines)


def printable(line: str) -> str:
    key, colon, _ = line.partition(":")
    if colon and SECRET_NAME.search(key.lstrip("-+ #\"'").rstrip("\"' ")):
        return one_line(f"{key}: ...", 200)
    return one_line(line, 200)


def schema_comments(schema: Path, tree: Path | None, folder: Path, command: str) -> list[str]:
    """The line by which editors find a file's schema (yaml-language-server, JetBrains), for a file in ``folder``.

    Relative where file and schema are in one ``tree``: the same wherever that is. Else the schema is looked for beside
    the file, where ``command`` puts it.
    """
    folder = Path(os.path.realpath(folder))
    if tree is not None and (root := Path(os.path.realpath(tree))) in (folder, *folder.parents):
        place = Path(os.path.relpath(root / os.path.relpath(os.path.realpath(schema), root), folder)).as_posix()
        return [f"yaml-language-server: $schema={place}"]
    return [
        f"For editors: {command} > {schema.name} (beside this file)",
        f"yaml-language-server: $schema={schema.name}",
    ]
