"""A YAML file that knows where every key stands, so that a mistake can be shown where it was made.

YAML 1.2's core schema: 5e-5 is a number, yes and on are text, 2024-01-01 is text. What has no place in such a file
(tags, aliases, two keys of one name, NaN) is a mistake, not a surprise.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from genvalues.errors import UserError, UserErrors
from genvalues.wording import KeyPath, dotted, may_hold_a_secret, one_line, redacted
from genvalues.yamltext import CORE_SCHEMA, PREFIX, UnreadableYAML, compose, decode, place

DIGITS = 300  # of a number: more is no number that anybody means
NUMBER_FIX = "Write a number such as 16 or 5e-5."
KEY_FIX = "Write key: value, the key a name."


@dataclass(frozen=True, order=True)
class Position:
    """Where something was written: a place in the file, or a --set (which come after the file, in their order)."""

    order: int
    line: int
    column: int
    label: str = field(compare=False, default="")


@dataclass(frozen=True)
class Mistake:
    """One thing to change: which key, what is wrong, what to write instead."""

    key: KeyPath
    what: str
    fix: str = ""
    position: Position | None = None  # where it is not the key's own


class Document:
    """The plain data of a file with --set on top, the place of every key, and the mistakes found in reading."""

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.path = path
        self.name = name or str(path)
        self.value: dict[str, Any] = {}
        self.positions: dict[KeyPath, Position] = {}
        self.mistakes: list[Mistake] = []

    def position(self, key: KeyPath) -> Position:
        """Where ``key`` was written, or the nearest key around it."""
        for length in range(len(key), -1, -1):
            if key[:length] in self.positions:
                return self.positions[key[:length]]
        return Position(0, 1, 1, f"{self.name}:1:1")

    def set(self, assignment: str, order: int) -> None:
        """Take one --set key=value, the value in YAML, the key with dots (``\\.`` for a dot in a name)."""
        name, separator, text = assignment.partition("=")
        key: KeyPath = tuple(part.replace("\\.", ".") for part in re.split(r"(?<!\\)\.", name.strip()))
        shown = f"{name}=..." if may_hold_a_secret(key) else assignment
        position = Position(order, 0, 0, f"--set {one_line(shown)}")
        if not separator or not all(key):
            self.mistakes.append(Mistake((), "not of the form key=value", "Write --set lora.r=8.", position))
            return
        try:
            node = compose(text)
        except UnreadableYAML as error:
            self.mistakes.append(Mistake((), error.what, error.fix, position))
            return
        for known in [known for known in self.positions if known[: len(key)] == key]:
            del self.positions[known]
        inside = self.value
        for depth, part in enumerate(key[:-1], 1):
            if not isinstance(inside.get(str(part)), dict):
                inside[str(part)] = {}
                self.positions[key[:depth]] = position
            inside = inside[str(part)]
        self.positions[key] = position
        reader = Reader(lambda node: position)
        inside[str(key[-1])] = reader.plain(node, key)
        self.mistakes += reader.mistakes

    def error(self, mistake: Mistake) -> UserError:
        position = mistake.position or self.position(mistake.key)
        where = position.label
        key = dotted(mistake.key)
        # --set lora.rank=3 names the key already
        if key and not where.startswith(f"--set {key}="):
            where = f"{where} {key}"
        return UserError(redacted(mistake.what), where=redacted(where), fix=redacted(mistake.fix))

    def raise_mistakes(self, mistakes: Iterable[Mistake]) -> None:
        """Raise all of them at once, in the order of their places; do nothing when there are none."""
        unique = dict.fromkeys(mistakes)
        ordered = sorted(unique, key=lambda mistake: mistake.position or self.position(mistake.key))
        if ordered:
            raise UserErrors([self.error(mistake) for mistake in ordered])


class Reader:
    """Nodes to plain data, noting the place of every key and what has no place in the file."""

    def __init__(self, position_of: Any) -> None:
        self.position_of = position_of
        self.positions: dict[KeyPath, Position] = {}
        self.mistakes: list[Mistake] = []

    def plain(self, node: yaml.Node | None, key: KeyPath = ()) -> Any:
        if node is None:
            return None
        if isinstance(node, yaml.MappingNode) and node.tag == PREFIX + "map":
            return dict(self.items(node, key))
        if isinstance(node, yaml.SequenceNode) and node.tag == PREFIX + "seq":
            return [self.item(item, (*key, index)) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node, key)
        return self.mistake(key, f"the tag {node.tag.replace(PREFIX, '!!')} is not used here", "Remove it.", node)

    def item(self, node: yaml.Node, key: KeyPath) -> Any:
        self.positions[key] = self.position_of(node)
        return self.plain(node, key)

    def items(self, node: yaml.MappingNode, key: KeyPath) -> Iterator[tuple[str, Any]]:
        seen: dict[str, Position] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != PREFIX + "str":
                shown = f" {key_node.value}" if isinstance(key_node, yaml.ScalarNode) else ""
                self.mistake(
                    key, f"a key must be text, not{one_line(shown) or ' a list or mapping'}", KEY_FIX, key_node
                )
                continue
            name = key_node.value
            if "\n" in name or not name.strip() or has_surrogate(name):
                self.mistake(key, "a key must be one line of text", KEY_FIX, key_node)
                continue
            inner = (*key, name)
            if name in seen:
                self.mistake(inner, f"written twice, first in line {seen[name].line}", "Keep one of the two.", key_node)
                continue
            seen[name] = self.positions[inner] = self.position_of(key_node)
            yield name, self.plain(value_node, inner)

    def scalar(self, node: yaml.ScalarNode, key: KeyPath) -> Any:
        text = node.value
        kind = node.tag.removeprefix(PREFIX)
        if kind == "str":
            if has_surrogate(text):
                return self.mistake(key, "holds half of a character (a lone surrogate)", "Remove the escape.", node)
            return text
        if kind not in CORE_SCHEMA:
            return self.mistake(key, f"the tag {node.tag.replace(PREFIX, '!!')} is not used here", "Remove it.", node)
        if not re.match(f"^(?:{CORE_SCHEMA[kind][0]})\\Z", text):
            what = f"{one_line(text)} is not of the type that its tag !!{kind} says"
            return self.mistake(key, what, "Remove the tag.", node)
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        if len(text) > DIGITS:
            return self.mistake(key, f"a number of {len(text)} digits is too large", NUMBER_FIX, node)
        if kind == "int":
            return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
        number = float(text.replace(".", "") if "n" in text.lower() else text)  # Python's inf and nan have no dot
        if not math.isfinite(number):
            return self.mistake(key, f"{one_line(text)} is not a finite number", NUMBER_FIX, node)
        return number

    def mistake(self, key: KeyPath, what: str, fix: str, node: yaml.Node) -> None:
        self.mistakes.append(Mistake(key, what, fix, self.position_of(node)))


def read(path: Path, name: str | None = None, sets: Iterable[str] = ()) -> Document:
    """Read a file and the --set that change it. Raises what leaves nothing to check; notes the other mistakes."""
    document = Document(path, name)

    def position_of(node: yaml.Node) -> Position:
        line, column = place(node.start_mark)
        return Position(0, line, column, f"{document.name}:{line}:{column}")

    try:
        node = compose(decode(path, document.name))
    except UnreadableYAML as error:
        raise error.at(document.name) from None
    if node is None:
        raise UserError("the file is empty", where=document.name, fix="Write at least model, dataset and instance.")
    if not isinstance(node, yaml.MappingNode):
        kind = "a list" if isinstance(node, yaml.SequenceNode) else "a single value"
        raise UserError(
            f"the file must hold keys and values, not {kind}",
            where=f"{document.name}:1:1",
            fix="Write key: value lines.",
        )
    reader = Reader(position_of)
    document.value = reader.plain(node) or {}
    document.positions = reader.positions
    document.mistakes = reader.mistakes
    for order, assignment in enumerate(sets, 1):
        document.set(assignment, order)
    return document


def has_surrogate(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)
