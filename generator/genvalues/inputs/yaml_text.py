"""YAML text, read and written: which text is a number, where an error stands, what every reader reads alike."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from genvalues.common.errors import UserError
from genvalues.common.text import one_line, redacted

MAX_BYTES = 1 << 18  # a page is 2 KB; PyYAML needs seconds for more than this
NOT_READABLE = "Name a file that you may read."
SYNTAX_FIX = (
    "Write key: value lines, those of a block indented alike, and text with : # [ { or % in it in single quotes."
)
DEPTH = 50  # levels of keys and lists; those we know are 7 deep
PREFIX = "tag:yaml.org,2002:"
ALIAS = "alias"  # the tag of the node that stands in an alias's place, whose value is its name

# What PyYAML says of a quote or bracket that is not closed, and of a line without its colon.
UNFINISHED = re.compile("end of stream|<stream end>|could not find expected ':'")
NO_CHARACTER = re.compile(r"\\U(?!000[0-9a-fA-F]|0010)[0-9a-fA-F]{8}")  # above U+10FFFF

FLOAT = (
    r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    list("-+.0123456789"),
)
CORE_SCHEMA = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": FLOAT,
}
# What Helm's reader (Go's) makes of plain text, seen with Helm 3.17 and 4.3: YAML 1.1 but for dates and for 1:30.
HELM_SCHEMA = {
    "null": CORE_SCHEMA["null"],
    "bool": (r"(?i:true|false|yes|no|on|off|y|n)", list("tTfFyYnNoO")),
    "int": (r"[-+]?(0|[1-9][0-9_]*)|0o?[0-7]+|0x[0-9a-fA-F]+|0b[01]+", list("-+0123456789")),
    "float": FLOAT,
    "merge": (r"<<", ["<"]),
}


class UnreadableYAML(Exception):
    """Text that is not YAML, from ``line`` and ``column`` on."""

    def __init__(self, what: str, fix: str = "", line: int = 1, column: int = 1) -> None:
        super().__init__(what)
        self.what, self.fix, self.line, self.column = what, fix, line, column

    def at(self, name: str) -> UserError:
        """As an error of the file of that name."""
        return UserError(redacted(self.what), where=f"{name}:{self.line}:{self.column}", fix=redacted(self.fix))


class ShallowLoader(yaml.SafeLoader):
    """PyYAML, which recurses into a document no deeper than ours are.

    Not its C loader, which has other marks and words, and ends the process where a document is deep.
    """

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.CollectionStartEvent) and self.depth == DEPTH:
            raise UnreadableYAML(f"more than {DEPTH} levels deep", "Write it flatter.", *place(event.start_mark))
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class CoreSchemaLoader(ShallowLoader):
    """YAML 1.2's idea of what is a number and what is text. Follows no alias: see ``anchor_of`` and ``ALIAS``."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            self.get_event()
            start: Any = event.start_mark
            return yaml.ScalarNode(ALIAS, event.anchor, start)
        name, event.anchor = event.anchor, None  # PyYAML would refuse two of one name, in words of its own
        node = super().compose_node(parent, index)
        if node is not None:
            vars(node)["anchor"] = name
        return node


def anchor_of(node: yaml.Node) -> str:
    """The name of the anchor that a node of ``compose`` has; empty where it has none."""
    return getattr(node, "anchor", None) or ""


class HelmLoader(ShallowLoader):
    """Helm's idea of what is a number and what is text."""

    bool_values = yaml.SafeLoader.bool_values | {"y": True, "n": False}


class UnambiguousDumper(yaml.SafeDumper):
    """Quotes what either YAML 1.1 or 1.2 would take for something else than text; writes no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def resolve_by(schema: dict[str, tuple[str, list[str]]], reader: Any) -> None:
    for kind, (pattern, first) in schema.items():  # in this order: an integer is not a float
        reader.add_implicit_resolver(PREFIX + kind, re.compile(f"^(?:{pattern})\\Z"), first)


CoreSchemaLoader.yaml_implicit_resolvers = {}
HelmLoader.yaml_implicit_resolvers = {}
resolve_by(CORE_SCHEMA, CoreSchemaLoader)
resolve_by(CORE_SCHEMA, UnambiguousDumper)
resolve_by(HELM_SCHEMA, UnambiguousDumper)  # y is text to PyYAML, and true to Helm
resolve_by(HELM_SCHEMA, HelmLoader)


def decode(path: Path, name: str) -> str:
    try:
        if path.is_dir():
            raise UserError("is a directory", where=name, fix="Name the file in it.")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise UserError("no such file", where=name, fix="Name a file that is there.") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(f"cannot be read: {reason}", where=name, fix=NOT_READABLE) from None
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
    with errors_placed(text):
        node: yaml.Node | None = yaml.compose(text, Loader=CoreSchemaLoader)
        return node


def load_as_helm(text: str) -> Any:
    """The data of a YAML document as Helm reads it: aliases, merge keys and all."""
    with errors_placed(text):
        return yaml.load(text, Loader=HelmLoader)


def replaced(text: str, key: str, old: str, new: str) -> str | None:
    """``text`` with the value of a top-level key replaced, and not a byte beside: comments, quotes, line ends stay.

    None where the key's value is not ``old``, or is written in another way than letter by letter (escapes). Raises
    UnreadableYAML.
    """
    document = compose(text)
    if not isinstance(document, yaml.MappingNode):
        return None
    for key_node, value in document.value:
        if key_node.value == key and isinstance(value, yaml.ScalarNode) and value.value.strip() == old:
            start, end = value.start_mark.index, value.end_mark.index
            written = text[start:end]
            if written.count(old) == 1:
                return text[:start] + written.replace(old, new) + text[end:]
    return None


@contextmanager
def errors_placed(text: str) -> Iterator[None]:
    """PyYAML's errors as one kind, with the place."""
    try:
        yield
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        code = error.character if isinstance(error.character, int) else ord(error.character[:1] or "\0")
        raise UnreadableYAML(f"the character U+{code:04X} is not allowed in YAML", "Remove it.", line, column) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        if error.context_mark and UNFINISHED.search(error.problem or ""):  # found where the text ends, or much later
            mark = error.context_mark
        line, column = place(mark)
        what = f"not valid YAML: {', '.join(one_line(part) for part in (error.context, error.problem) if part)}"
        fix = SYNTAX_FIX
        if "'\\t'" in what:
            what, fix = "a tab, which YAML does not allow for indentation", "Write spaces instead."
        elif "another document" in what:
            what, fix = "not valid YAML: a second document starts here", "Remove the line ---, or what follows it."
        raise UnreadableYAML(what, fix, line, column) from None
    except (ValueError, OverflowError, IndexError):  # PyYAML on escapes such as "\UFFFFFFFF"
        escape = NO_CHARACTER.search(text)
        before = text[: escape.start()] if escape else ""
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        what = "not valid YAML: an escape is not a valid character"
        raise UnreadableYAML(what, "Remove the escape.", line, column) from None


def place(mark: Any) -> tuple[int, int]:
    """Line and column as editors count them."""
    return (mark.line + 1, mark.column + 1) if mark else (1, 1)


def dump(value: Any) -> str:
    """Plain data as YAML that every reader reads alike; the same data gives the same bytes."""
    text: str = yaml.dump(value, Dumper=UnambiguousDumper, sort_keys=False, allow_unicode=True, width=100)
    return text
