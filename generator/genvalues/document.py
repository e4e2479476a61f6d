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

KeyPath = tuple[str | int, ...]

MAX_BYTES = 1 << 18  # a page is 2 KB; PyYAML needs seconds for more than this
DEPTH = 50  # levels of keys and lists; those we know are 7 deep
DIGITS = 300  # of a number: more is no number that anybody means
TOKEN = re.compile(r"hf_[A-Za-z0-9]{4,}")  # what a Hugging Face token looks like
SECRET_KEYS = {("huggingFace",), ("huggingFace", "tokenSecret"), ("huggingFace", "tokenKey")}  # where one gets pasted

CORE_SCHEMA = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}
PREFIX = "tag:yaml.org,2002:"


class CoreSchemaLoader(yaml.SafeLoader):
    """PyYAML with YAML 1.2's idea of what is a number and what is text."""


class UnambiguousDumper(yaml.SafeDumper):
    """Quotes what either YAML 1.1 or 1.2 would take for something else than text; writes no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


CoreSchemaLoader.yaml_implicit_resolvers = {}
for _name in ("null", "bool", "int", "float"):  # in this order: an integer is not a float
    _pattern, _first = CORE_SCHEMA[_name]
    CoreSchemaLoader.add_implicit_resolver(PREFIX + _name, re.compile(f"^(?:{_pattern})\\Z"), _first)
    UnambiguousDumper.add_implicit_resolver(PREFIX + _name, re.compile(f"^(?:{_pattern})\\Z"), _first)


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
        shown = f"{name}=..." if key in SECRET_KEYS else assignment
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


class UnreadableYAML(Exception):
    """Text that is not YAML, from ``line`` and ``column`` on."""

    def __init__(self, what: str, fix: str = "", line: int = 1, column: int = 1) -> None:
        super().__init__(what)
        self.what, self.fix, self.line, self.column = what, fix, line, column


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
                self.mistake(key, f"a key must be text, not{one_line(shown) or ' a list or mapping'}", "", key_node)
                continue
            name = key_node.value
            if "\n" in name or not name.strip() or has_surrogate(name):
                self.mistake(key, "a key must be one line of text", "", key_node)
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
            return self.mistake(key, f"{one_line(text)} is not of the type that its tag !!{kind} says", "", node)
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        if len(text) > DIGITS:
            return self.mistake(key, f"a number of {len(text)} digits is too large", "", node)
        if kind == "int":
            return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
        number = float(text.replace(".", "") if "n" in text.lower() else text)  # Python's inf and nan have no dot
        if not math.isfinite(number):
            return self.mistake(key, f"{one_line(text)} is not a finite number", "", node)
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
        where = f"{document.name}:{error.line}:{error.column}"
        raise UserError(redacted(error.what), where=where, fix=redacted(error.fix)) from None
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


def decode(path: Path, name: str) -> str:
    try:
        if path.is_dir():
            raise UserError("this is a folder", where=name, fix="Name the file in it.")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise UserError("no such file", where=name) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(f"cannot be read: {reason}", where=name) from None
    if len(data) > MAX_BYTES:
        raise UserError(f"larger than {MAX_BYTES >> 10} KiB", where=name, fix="This is not the file you mean.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        line, column = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        raise UnreadableYAML("not UTF-8 text", "Save the file as UTF-8.", line, column) from None


def compose(text: str) -> yaml.Node | None:
    """The nodes of one YAML document, None for an empty one."""
    try:
        depth = 0
        for event in yaml.parse(text, Loader=CoreSchemaLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEPTH:
                raise UnreadableYAML(f"more than {DEPTH} levels deep", "", *place(event.start_mark))
            if isinstance(event, yaml.AliasEvent):
                mark = event.start_mark
                what = f"the alias *{one_line(event.anchor or '')} is not read here"
                raise UnreadableYAML(what, "Write its value out.", *place(mark))
        node: yaml.Node | None = yaml.compose(text, Loader=CoreSchemaLoader)
        return node
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        code = error.character if isinstance(error.character, int) else ord(error.character[:1] or "\0")
        raise UnreadableYAML(f"the character U+{code:04X} is not allowed in YAML", "Remove it.", line, column) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = place(mark)
        what, fix = (
            f"not valid YAML: {', '.join(one_line(part) for part in (error.context, error.problem) if part)}",
            "",
        )
        if "'\\t'" in what:
            what, fix = "a tab, which YAML does not allow here", "Indent with spaces."
        raise UnreadableYAML(what, fix, line, column) from None
    except (ValueError, OverflowError, IndexError):  # PyYAML on escapes such as "\UFFFFFFFF"
        raise UnreadableYAML("not valid YAML: an escape in it stands for no character") from None


def place(mark: Any) -> tuple[int, int]:
    """Line and column as editors count them."""
    return (mark.line + 1, mark.column + 1) if mark else (1, 1)


def dump(value: Any) -> str:
    """Plain data as YAML that every reader reads alike; the same data gives the same bytes."""
    text: str = yaml.dump(value, Dumper=UnambiguousDumper, sort_keys=False, allow_unicode=True, width=100)
    return text


def dotted(key: KeyPath) -> str:
    """lora.targetModules[1], as one says it."""
    text = ""
    for part in key:
        text += f"[{part}]" if isinstance(part, int) else f".{one_line(part)}" if text else one_line(part)
    return text


def one_line(text: str, width: int = 80) -> str:
    """Text from a file, fit to be printed in an error."""
    shown = "".join(character if character.isprintable() else "?" for character in text)
    return shown if len(shown) <= width else shown[: width - 3] + "..."


def redacted(text: str) -> str:
    """Nothing that looks like a token gets printed."""
    return TOKEN.sub("hf_...", text)


def has_surrogate(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)
