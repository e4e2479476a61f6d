"""YAML files, one laid over the other, that know where every key stands, so that a mistake is shown where it was made.

YAML 1.2's core schema: 5e-5 is a number, yes and on are text, 2024-01-01 is text. What has no place in such a file
(tags, anchors, aliases, two keys of one name, NaN) is a mistake, not a surprise.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from genvalues.common.errors import UserError, UserErrors
from genvalues.common.text import KeyPath, dotted, one_line, redacted
from genvalues.inputs.assignments import NUMBER, Assignment, NotAnAssignment, assignments, typed
from genvalues.inputs.schema_lookup import kinds, may_be_null
from genvalues.inputs.yaml_text import (
    ALIAS,
    CORE_SCHEMA,
    DEPTH,
    PREFIX,
    UnreadableYAML,
    anchor_of,
    compose,
    decode,
    place,
)

DIGITS = 300  # of a number: more is no number that anybody means
LONGEST_PATH = 4096  # characters, as on Linux
MOST_MISTAKES = 200  # of a file; with more, it is not the file that was meant
NUMBER_FIX = "Write a number such as 16 or 5e-5."
KEY_FIX = "Write key: value, the key a name."


@dataclass(frozen=True, order=True)
class Position:
    """Where something was written: a place in a file, or a --set (which come after the files, in their order)."""

    order: int
    line: int
    column: int
    label: str = field(compare=False, default="")
    folder: Path = field(compare=False, default=Path())  # from where a relative path written there is seen


@dataclass(frozen=True)
class Mistake:
    """One thing to change: which key, what is wrong, what to write instead."""

    key: KeyPath
    what: str
    fix: str = ""
    position: Position | None = None  # where it is not the key's own


class Document:
    """The plain data of files laid one over the other, with --set on top; the place of every key, and the mistakes
    found in reading what counts of it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path  # the first file's
        self.value: dict[str, Any] = {}
        self.positions: dict[KeyPath, Position] = {}
        self.mistakes: list[Mistake] = []
        self.all_files_read = True  # no file is left out because it could not be read

    def holds(self, key: KeyPath) -> bool:
        """Whether anything was read there: not where all that is written is a mistake."""
        value: Any = self.value
        for part in key:
            try:
                value = value[part]
            except (KeyError, IndexError, TypeError):
                return False
        return value not in (None, {}, [])

    def position(self, key: KeyPath) -> Position:
        """Where ``key`` was written, or the nearest key around it."""
        for length in range(len(key), -1, -1):
            if key[:length] in self.positions:
                return self.positions[key[:length]]
        return Position(0, 1, 1, f"{shown(self.path)}:1:1", self.path.parent)

    def lay_over(self, value: dict[str, Any], positions: dict[KeyPath, Position], mistakes: list[Mistake]) -> None:
        """Take what a later file says: mappings key by key, all else instead of what was there; null takes away."""
        replaced: set[KeyPath] = set()

        def lay(above: dict[str, Any], below: dict[str, Any], block: KeyPath) -> None:
            for name, value in above.items():
                key = (*block, name)
                if isinstance(value, dict) and isinstance(below.get(name), dict):
                    lay(value, below[name], key)
                    continue
                replaced.add(key)
                if value is None and not may_be_null(key):
                    below.pop(name, None)
                else:
                    below[name] = value

        lay(value, self.value, ())
        self.forget(replaced)
        self.positions |= {key: place for key, place in positions.items() if is_in(key, replaced)}
        self.mistakes += mistakes

    def forget(self, keys: set[KeyPath]) -> None:
        """What was written at these keys, and what was wrong with it, counts no more."""
        self.positions = {key: place for key, place in self.positions.items() if not is_in(key, keys)}
        self.mistakes = [mistake for mistake in self.mistakes if not is_in(mistake.key, keys)]

    def set(self, text: str, order: int, *, as_text: bool = False) -> None:
        """Take one --set, which may have several assignments (see genvalues.inputs.assignments)."""
        option = "--set-string" if as_text else "--set"
        column = 0
        try:
            for column, assignment in enumerate(assignments(text)):
                position = Position(order, 0, column, f"{option} {assignment.shown}")
                self.assign(assignment, position, as_text)
        except NotAnAssignment as error:
            position = Position(order, 0, column + 1, f"{option} {error.shown}")
            self.mistakes.append(Mistake((), error.what, error.fix, position))

    def assign(self, assignment: Assignment, position: Position, as_text: bool) -> None:
        key, written = assignment.key, assignment.value
        if len(key) > DEPTH:
            self.mistakes.append(Mistake((), f"more than {DEPTH} levels deep", "Write it flatter.", position))
            return
        self.forget({key})
        inside: Any = {"": self.value}
        last: str | int = ""
        for depth, part in enumerate(key):  # into the block or list that the part is in, made where it is not there
            kind: type = list if isinstance(part, int) else dict
            if not isinstance(inside[last], kind):
                self.forget({key[:depth]})
                inside[last] = kind()
                self.positions[key[:depth]] = position
            inside = inside[last]
            if isinstance(part, int):
                inside += [None] * (part + 1 - len(inside))
            elif part not in inside:
                inside[part] = None
            last = part
        self.positions[key] = position
        if isinstance(written, tuple):
            inner = [(*key, index) for index in range(len(written))]
            inside[last] = [
                self.typed(text, item, position, as_text) for text, item in zip(written, inner, strict=True)
            ]
            return
        inside[last] = self.typed(written, key, position, as_text)
        if inside[last] is None and isinstance(inside, dict) and not may_be_null(key):
            del inside[last]

    def typed(self, text: str, key: KeyPath, position: Position, as_text: bool) -> Any:
        what = ""
        value = None
        if has_surrogate(text):  # which Python makes of an argument's bytes that are not UTF-8
            what = "not UTF-8 text"
        elif as_text:
            value = text
        elif len(text) > DIGITS and NUMBER.fullmatch(text):
            what = f"a number of {len(text)} digits is too large"
        else:
            value = typed(text, kinds(key))
            if isinstance(value, float) and not math.isfinite(value):
                what = f"{one_line(text)} is not a finite number"
        if what:
            self.mistakes.append(Mistake(key, what, NUMBER_FIX, position))
            return None
        return value

    def error(self, mistake: Mistake) -> UserError:
        position = mistake.position or self.position(mistake.key)
        where = position.label
        key = dotted(mistake.key)
        # --set lora.rank=3 names the key already, and so does --model
        is_named = f" {key}=" in where if where.startswith("--set") else where.startswith("--")
        if key and not is_named:
            where = f"{where} {key}"
        return UserError(redacted(mistake.what), where=redacted(where), fix=redacted(mistake.fix))

    def raise_mistakes(self, mistakes: Iterable[Mistake]) -> None:
        """Raise all of them at once, in the order of their places (of very many, the first); nothing where none is."""
        unique = dict.fromkeys(mistakes)
        ordered = sorted(unique, key=lambda mistake: mistake.position or self.position(mistake.key))
        if ordered:
            errors = [self.error(mistake) for mistake in ordered[:MOST_MISTAKES]]
            if len(ordered) > MOST_MISTAKES:
                errors.append(UserError("and there are more mistakes", fix="Correct these first."))
            raise UserErrors(errors)


class Reader:
    """One file's nodes to plain data, noting the place of every key and what has no place in the file."""

    def __init__(self, path: Path, order: int) -> None:
        self.path, self.order = path, order
        self.positions: dict[KeyPath, Position] = {}
        self.mistakes: list[Mistake] = []

    def value(self, *, empty: bool) -> dict[str, Any]:
        """What the file holds. Raises what leaves nothing to check; nothing at all is such, unless it may be empty."""
        name = shown(self.path)
        try:
            node = compose(decode(self.path, name))
        except UnreadableYAML as error:
            raise error.at(name) from None
        if isinstance(node, yaml.ScalarNode) and node.tag == PREFIX + "null":  # --- and no more
            node = None
        if node is None and empty:
            return {}
        if node is None:
            raise UserError("the file is empty", where=name, fix="Write at least model, dataset and instance.")
        if not isinstance(node, yaml.MappingNode):
            kind = "a list" if isinstance(node, yaml.SequenceNode) else "a single value"
            raise UserError(
                f"the file must be a mapping, not {kind}",
                where=f"{name}:1:1",
                fix="Write lines of the form key: value.",
            )
        return self.plain(node) or {}

    def position_of(self, node: yaml.Node) -> Position:
        line, column = place(node.start_mark)
        return Position(self.order, line, column, f"{shown(self.path)}:{line}:{column}", self.path.parent)

    def plain(self, node: yaml.Node | None, key: KeyPath = ()) -> Any:
        if node is None:
            return None
        self.refuse_anchor(node, key)
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
            if isinstance(key_node, yaml.ScalarNode) and key_node.tag == ALIAS:
                self.scalar(key_node, key)
                continue
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != PREFIX + "str":
                shown = f" {key_node.value}" if isinstance(key_node, yaml.ScalarNode) else ""
                self.mistake(
                    key, f"a key must be a string, not{one_line(shown) or ' a list or mapping'}", KEY_FIX, key_node
                )
                continue
            name = key_node.value
            if "\n" in name or not name.strip() or has_surrogate(name):
                self.mistake(key, "a key must be one line of text", KEY_FIX, key_node)
                continue
            inner = (*key, name)
            self.refuse_anchor(key_node, inner)
            if name == "<<" and key_node.style is None:
                self.mistake(key, "the merge key << is not supported", "Write out the keys it stands for.", key_node)
                continue
            if name in seen:
                self.mistake(inner, f"duplicate key, first in line {seen[name].line}", "Keep one of the two.", key_node)
                continue
            seen[name] = self.positions[inner] = self.position_of(key_node)
            yield name, self.plain(value_node, inner)

    def refuse_anchor(self, node: yaml.Node, key: KeyPath) -> None:
        if name := anchor_of(node):
            self.mistake(key, f"the anchor &{one_line(name)} is not supported", f"Remove &{one_line(name)}.", node)

    def scalar(self, node: yaml.ScalarNode, key: KeyPath) -> Any:
        text = node.value
        if node.tag == ALIAS:
            return self.mistake(key, f"the alias *{one_line(text)} is not supported", "Write its value out.", node)
        kind = node.tag.removeprefix(PREFIX)
        if kind == "str":
            if has_surrogate(text):
                return self.mistake(key, "contains a lone surrogate", "Remove the escape.", node)
            return text
        if kind not in CORE_SCHEMA:
            return self.mistake(key, f"the tag {node.tag.replace(PREFIX, '!!')} is not used here", "Remove it.", node)
        if not re.match(f"^(?:{CORE_SCHEMA[kind][0]})\\Z", text):
            what = f"{one_line(text)} does not match its tag !!{kind} says"
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


def read(file: Path, *overlays: Path, sets: Iterable[str] = (), set_strings: Iterable[str] = ()) -> Document:
    """Read a file, those laid over it, and the --set that change them.

    Notes the mistakes; a file that cannot be read is one of them, and what the others say stays to be checked.
    """
    document = Document(file)
    for order, path in enumerate((file, *overlays)):
        try:
            reader = Reader(path, order)
            value = reader.value(empty=bool(overlays))
        except UserError as error:
            document.all_files_read = False
            document.mistakes.append(Mistake((), error.what, error.fix, Position(order, 0, 0, error.where)))
            continue
        if order == 0:
            document.value, document.positions, document.mistakes = value, reader.positions, reader.mistakes
        else:
            document.lay_over(value, reader.positions, reader.mistakes)
    order = len(overlays)
    for as_text, texts in ((False, sets), (True, set_strings)):  # Helm's order
        for text in texts:
            order += 1
            document.set(text, order, as_text=as_text)
    return document


def shown(path: Path) -> str:
    """A file's name, whole and in one line."""
    return one_line(str(path), LONGEST_PATH)


def is_in(key: KeyPath, keys: set[KeyPath]) -> bool:
    """Whether ``key``, or one around it, is one of ``keys``."""
    return any(key[:length] in keys for length in range(1, len(key) + 1))


def has_surrogate(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)
