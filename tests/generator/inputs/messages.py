"""Compare messages by what a user needs of them, not by whole sentences."""

from __future__ import annotations

# A sentence, or in brackets what the key is for or may hold.
ENDS_WITH_A_FIX = r"[^.]\. (\(.+\)|[^(].+[.)])$"


def tells(line: str, expected: str) -> bool:
    """Whether a line begins as expected, and has the expected parts (separated by `` ... ``) in their order."""
    first, *parts = expected.split(" ... ")
    if not line.startswith(first):
        return False
    at = len(first)
    for part in parts:
        found = line.find(part, at)
        if found < 0:
            return False
        at = found + len(part)
    return True


def assert_told(told: str, expected: str) -> None:
    """Each line of ``told`` is what the line of ``expected`` in its place says."""
    lines, wanted = told.splitlines(), expected.splitlines()
    for line, each in zip(lines, wanted, strict=False):
        assert tells(line, each), f"{line!r} is not {each!r}"
    assert len(lines) == len(wanted), (lines[len(wanted) :], wanted[len(lines) :])
