"""--set in Helm's syntax: a.b=c,d=e, lists {x,y}, items a[0].b=c, null, and a backslash before , . = [ { } in a text.

After helm/helm, pkg/strvals/parser.go (version 4), and helm.sh, "The format and limitations of --set". Where Helm takes
half an assignment silently (a key without a name, text after a list's }), it is a mistake here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from genvalues.common.text import KeyPath, dotted, may_hold_a_secret, one_line

LARGEST_INDEX = 65536  # Helm's
INTEGER = re.compile(r"0|[-+]?[1-9][0-9]*|-0")  # 007 is text, as in Helm
NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
FORM = "Write --set lora.r=8."
COMMA = "A comma in a value is written \\, and a list {a,b}."


@dataclass(frozen=True)
class Assignment:
    """One key of a --set and what it gets, not yet typed: a text, or the texts of a list."""

    key: KeyPath
    value: str | tuple[str, ...]
    written: str  # the part of the --set that says it

    @property
    def shown(self) -> str:
        """What may be printed of it."""
        return shown(self.key, self.written)


class NotAnAssignment(Exception):
    """What is wrong with a --set, and what to write; ``shown`` is the part of it."""

    def __init__(self, what: str, fix: str, shown: str) -> None:
        super().__init__(what)
        self.what, self.fix, self.shown = what, fix, shown


def assignments(text: str) -> Iterator[Assignment]:
    """The assignments of one --set, one after the other; raises NotAnAssignment at the first that is none."""
    scanner = Scanner(text)
    secret: KeyPath | None = None  # what follows it may be the rest of its value, cut at a comma
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
    """Text, taken bit by bit."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    @property
    def rest(self) -> str:
        return self.text[self.at :]

    def until(self, stops: str) -> tuple[str, str]:
        """The text up to one of ``stops``, escapes undone, and which of them; none at the end."""
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
    """Up to the =; ``key`` holds what was read even where that goes wrong."""
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
    """Up to the next assignment."""
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
    """The value that a text stands for, where a value of these JSON types is wanted (none: of any).

    Helm's rule: true, false, null and whole numbers, all else is text. Ours beside it, where the schema is known: 5e-5
    is a number where one is wanted, and 7 is text where only text is.
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
