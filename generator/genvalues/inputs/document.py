"""YAML files merged into one document that knows where each key was written, so that errors show their place.

YAML 1.2 core schema: 5e-5 is a number; yes, on and 2024-01-01 are strings. Tags, anchors, aliases, duplicate keys and
NaN are errors.
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
from genvalues.common.text import KeyPath, dotted, has_surrogate, one_line, redacted
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

DIGITS = 300  # of a number; longer ones are mistakes
LONGEST_PATH = 4096  # characters, the limit of Linux
MOST_MISTAKES = 200  # reported; a file with more is probably the wrong file
PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")  # of surrogates
NUMBER_FIX = "Write a number such as 16 or 5e-5."
KEY_FIX = "Write key: value, the key a name."


@dataclass(frozen=True, order=True)
class Position:
    """Where a key was written: a place in a file, or a --set option. ``order``: files first, then options."""

    order: int
    line: int
    column: int
    label: str = field(compare=False, default="")
    folder: Path = field(compare=False, default=Path())  # that relative paths written there refer to


@dataclass(frozen=True)
class Mistake:
    """One error: the key, what is wrong, and what to write instead."""

    key: KeyPath
    what: str
    fix: str = ""
    position: Position | None = None  # if it is not that of the key


class PlacedError(UserError):
    """The error of a mistake: its key, and its line where it was written in a file, for programs."""

    def __init__(self, mistake: Mistake, position: Position, where: str) -> None:
        super().__init__(redacted(mistake.what), where=redacted(where), fix=redacted(mistake.fix))
        self.key = dotted(mistake.key)
        self.position = position


class Document:
    """The merged data of the files, with --set applied last; the place of each key; and the errors found in reading
    them, without those in values that a later file replaces.
    """

    def __init__(self, path: Path) -> None:
        self.path = path  # the first file's
        self.value: dict[str, Any] = {}
        self.positions: dict[KeyPath, Position] = {}
        self.mistakes: list[Mistake] = []
        self.all_files_read = True  # false if a file could not be read

    def holds(self, key: KeyPath) -> bool:
        """Whether a value was read at this key."""
        value: Any = self.value
        for part in key:
            try:
                value = value[part]
            except (KeyError, IndexError, TypeError):
                return False
        return value not in (None, {}, [])

    def position(self, key: KeyPath) -> Position:
        """Where ``key``, or the nearest block around it, was written."""
        for length in range(len(key), -1, -1):
            if key[:length] in self.positions:
                return self.positions[key[:length]]
        return Position(0, 1, 1, f"{shown(self.path)}:1:1", self.path.parent)

    def lay_over(self, value: dict[str, Any], positions: dict[KeyPath, Position], mistakes: list[Mistake]) -> None:
        """Merge a later file: mappings key by key; other values replace; null removes the key."""
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
        """Drop the places and errors of these keys: their values are replaced."""
        self.positions = {key: place for key, place in self.positions.items() if not is_in(key, keys)}
        self.mistakes = [mistake for mistake in self.mistakes if not is_in(mistake.key, keys)]

    def set(self, text: str, order: int, *, as_text: bool = False) -> None:
        """Apply one --set option, which may have several assignments (see genvalues.inputs.assignments)."""
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
            self.mistakes.append(Mistake((), f"more than {DEPTH} levels deep", "Use fewer levels.", position))
            return
        self.forget({key})
        inside: Any = {"": self.value}
        last: str | int = ""
        for depth, part in enumerate(key):  # descend into the block or list, creating what does not exist
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
        if has_surrogate(text):  # Python's substitute for bytes of an argument that are not UTF-8
            what = "not UTF-8 text"
        elif as_text:
            value = text
        elif len(text) > DIGITS and NUMBER.fullmatch(text):
            what = f"a number of {len(text)} digits is too large"
        else:
            value = typed(text, kinds(key))
            if type(value) in (int, float) and is_variable(key):
                value = text
            elif isinstance(value, float) and not math.isfinite(value):
                what = f"{one_line(text)} is not a finite number"
        if what:
            self.mistakes.append(Mistake(key, what, NUMBER_FIX, position))
            return None
        return value

    def error(self, mistake: Mistake) -> PlacedError:
        position = mistake.position or self.position(mistake.key)
        where = position.label
        key = dotted(mistake.key)
        # --set lora.rank=3 and --model already name the key
        is_named = f" {key}=" in where if where.startswith("--set") else where.startswith("--")
        if key and not is_named:
            where = f"{where} {key}"
        return PlacedError(mistake, position, where)

    def raise_mistakes(self, mistakes: Iterable[Mistake]) -> None:
        """Raise all errors, ordered by place, at most MOST_MISTAKES of them. Does nothing if there are none."""
        unique = dict.fromkeys(mistakes)
        ordered = sorted(unique, key=lambda mistake: mistake.position or self.position(mistake.key))
        if ordered:
            errors: list[UserError] = [self.error(mistake) for mistake in ordered[:MOST_MISTAKES]]
            if len(ordered) > MOST_MISTAKES:
                errors.append(UserError("further errors are not shown", fix="Fix these first."))
            raise UserErrors(errors)


class Reader:
    """Convert the YAML nodes of one file to plain data. Records the place of each key, and errors."""

    def __init__(self, path: Path, order: int) -> None:
        self.path, self.order = path, order
        self.positions: dict[KeyPath, Position] = {}
        self.mistakes: list[Mistake] = []

    def value(self, *, empty: bool) -> dict[str, Any]:
        """Read the file. Raises UserError if it cannot be read, or is empty and may not be."""
        name = shown(self.path)
        try:
            node = compose(decode(self.path, name))
        except UnreadableYAML as error:
            raise error.at(name) from None
        if isinstance(node, yaml.ScalarNode) and node.tag == PREFIX + "null":  # a file that contains only ---
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
        return self.mistake(key, f"the tag {node.tag.replace(PREFIX, '!!')} is not supported", "Remove it.", node)

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
            return self.mistake(key, f"the alias *{one_line(text)} is not supported", "Write the value instead.", node)
        kind = node.tag.removeprefix(PREFIX)
        if kind == "str":
            # JSON escapes a character beyond U+FFFF as two.
            text = PAIR.sub(lambda pair: pair[0].encode("utf-16", "surrogatepass").decode("utf-16"), text)
            if has_surrogate(text):
                return self.mistake(key, "contains a lone surrogate", "Remove the escape.", node)
            return text
        if kind not in CORE_SCHEMA:
            return self.mistake(key, f"the tag {node.tag.replace(PREFIX, '!!')} is not supported", "Remove it.", node)
        if not re.match(f"^(?:{CORE_SCHEMA[kind][0]})\\Z", text):
            what = f"{one_line(text)} does not match its tag !!{kind}"
            return self.mistake(key, what, "Remove the tag.", node)
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        if is_variable(key):
            return text
        if len(text) > DIGITS:
            return self.mistake(key, f"a number of {len(text)} digits is too large", NUMBER_FIX, node)
        if kind == "int":
            return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
        number = float(
            text.replace(".", "") if "n" in text.lower() else text
        )  # Python spells inf and nan without a dot
        if not math.isfinite(number):
            return self.mistake(key, f"{one_line(text)} is not a finite number", NUMBER_FIX, node)
        return number

    def mistake(self, key: KeyPath, what: str, fix: str, node: yaml.Node) -> None:
        self.mistakes.append(Mistake(key, what, fix, self.position_of(node)))


def read(file: Path, *overlays: Path, sets: Iterable[str] = (), set_strings: Iterable[str] = ()) -> Document:
    """Read a file, merge the overlays over it, and apply the --set options.

    Errors are recorded in the document. A file that cannot be read is one of them; the others are still checked.
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
    """The path of a file, in one line."""
    return one_line(str(path), LONGEST_PATH)


def is_in(key: KeyPath, keys: set[KeyPath]) -> bool:
    """Whether ``key``, or a block around it, is one of ``keys``."""
    return any(key[:length] in keys for length in range(1, len(key) + 1))


def is_variable(key: KeyPath) -> bool:
    """Whether the value is an environment variable's: its text, because a number would lose digits (1.10, 1e3)."""
    return key[:1] == ("chartValues",) and key[1:2] in (("stageDefaults",), ("stages",)) and key[-2:-1] == ("extraEnv",)
