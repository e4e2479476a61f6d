"""Parse --set options in Helm's syntax: a.b=c,d=e, lists {x,y}, items a[0].b=c, null, and \\ before , . = [ { }.

After helm/helm, pkg/strvals/parser.go (version 4), and helm.sh, "The format and limitations of --set". Where Helm
silently accepts half an assignment (a key without a name, text after the } of a list), it is an error here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from genvalues.common.text import KeyPath, dotted, may_hold_a_secret, one_line

LARGEST_INDEX = 65536  # Helm's limit
INTEGER = re.compile(r"0|[-+]?[1-9][0-9]*|-0")  # 007 is a string, as in Helm
NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
FORM = "Write --set lora.r=8."
COMMA = "Write \\, for a comma in a value, and {a,b} for a list."


@dataclass(frozen=True)
class Assignment:
    """One assignment of a --set option: the key and its untyped value, a string or a list of strings."""

    key: KeyPath
    value: str | tuple[str, ...]
    written: str  # the part of the option

    @property
    def shown(self) -> str:
        """The assignment as it may be printed, without a secret."""
        return shown(self.key, self.written)


class NotAnAssignment(Exception):
    """An invalid --set option: what is wrong, what to write, and the part that may be printed."""

    def __init__(self, what: str, fix: str, shown: str) -> None:
        super().__init__(what)
        self.what, self.fix, self.shown = what, fix, shown


def assignments(text: str) -> Iterator[Assignment]:
    """Yield the assignments of one --set option. Raises NotAnAssignment at the first invalid one."""
    scanner = Scanner(text)
    secret: KeyPath | None = None  # what follows may be the rest of its value after a comma
    while True:
        start = scanner.at
        key: list[str | int] = []
        try:
            read_key(scanner, key)
            value = read_value(scanner)
        except ValueError as error:
            what, fix = error.args
            written = text[start:]
            part = f"{dotted(secret)}=..." if secret else shown(tuple(key), written)
            raise NotAnAssignment(what, fix, part) from None
        found = Assignment(tuple(key), value, text[start : scanner.at].removesuffix(","))
        secret = secret or (found.key if may_hold_a_secret(found.key) else None)
        yield found
        if not scanner.rest:
            return


def shown(key: KeyPath, written: str) -> str:
    return f"{dotted(key)}=..." if may_hold_a_secret(key) else one_line(written)


class Scanner:
    """A position in a text."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    @property
    def rest(self) -> str:
        return self.text[self.at :]

    def until(self, stops: str) -> tuple[str, str]:
        """The text up to one of ``stops``, without escapes, and the stop that was found; empty at the end."""
        taken = ""
        while self.at < len(self.text):
            character = self.text[self.at]
            self.at += 1
            if character in stops:
                return taken, character
            if character == "\\" and self.at < len(self.text):
                character = self.text[self.at]
                self.at += 1
            taken += character
        return taken, ""


def read_key(scanner: Scanner, key: list[str | int]) -> None:
    """Read a key up to the =. ``key`` holds what was read even if this fails."""
    stop = "."
    while stop != "=":
        if stop == "[":
            index, closed = scanner.until("]")
            if not closed or not re.fullmatch("[0-9]{1,9}", index) or int(index) > LARGEST_INDEX:
                raise ValueError("the text in [ ] is not a valid index", "Write a[0] for the first.")
            key.append(int(index))
            between, stop = scanner.until("[.=,")
            if between.strip() or stop in (",", ""):
                raise ValueError(f"{dotted(tuple(key))} has no value", f"{FORM} {COMMA}")
            continue
        name, stop = scanner.until("=[.,")
        name = name.strip()
        if stop in (",", ""):
            raise ValueError("is not of the form key=value", f"{FORM} {COMMA}" if "," in scanner.text else FORM)
        if not name:
            raise ValueError("is not of the form key=value: a key has no name", FORM)
        key.append(name)


def read_value(scanner: Scanner) -> str | tuple[str, ...]:
    """Read a value up to the next assignment."""
    if scanner.rest.startswith("{"):
        scanner.at += 1
        items = []
        stop = ","
        while stop == ",":
            item, stop = scanner.until(",}")
            items.append(item)
        if not stop:
            raise ValueError("the list has no closing }", "Write {a,b}.")
        if scanner.rest and not scanner.rest.startswith(","):
            raise ValueError("unexpected text after the closing }", f"{FORM} {COMMA}")
        scanner.at += 1
        return () if items == [""] else tuple(items)
    text, _ = scanner.until(",")
    return () if text == "[]" else text


def typed(text: str, kinds: frozenset[str]) -> Any:
    """Convert a text to a value, given the JSON types that its key accepts (none: unknown).

    Helm's rule: true, false, null and integers; everything else is a string. Where the schema is known, also: 5e-5 is a
    number where a number is expected, and 7 is a string where only a string is.
    """
    if text.lower() == "null":
        return None
    if kinds and kinds <= {"string", "null"}:
        return text
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if INTEGER.fullmatch(text):
        return int(text)
    if kinds & {"number", "integer"} and NUMBER.fullmatch(text):
        return float(text)
    return text
