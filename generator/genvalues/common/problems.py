"""What is wrong with settings, before anything knows where they were written."""

from __future__ import annotations

from dataclasses import dataclass

from genvalues.common.text import KeyPath


@dataclass(frozen=True)
class Problem:
    """What cannot work, or work together: the keys that take part (the likeliest to be wrong first), what is wrong,
    and what to write instead.
    """

    keys: tuple[KeyPath, ...]
    what: str
    fix: str


def key_paths(*keys: str) -> tuple[KeyPath, ...]:
    """``("lora.r",)`` as ``(("lora", "r"),)``."""
    return tuple(tuple(key.split(".")) for key in keys)
