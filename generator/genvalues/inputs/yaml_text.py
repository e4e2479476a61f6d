"""Read and write YAML: types by the core schema, errors with their place, output that all readers read alike."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from genvalues.common.errors import UserError
from genvalues.common.files import refuse_fifo
from genvalues.common.text import one_line, redacted

MAX_BYTES = 1 << 18  # inputs files have about 2 KB; PyYAML takes seconds for more than this
NOT_READABLE = "Name a readable file."
SYNTAX_FIX = (
    "Write lines of the form key: value, indent a block evenly, and put text with : # [ { or % in single quotes."
)
DEPTH = 50  # levels of nesting; real files have at most 7
MOST_NODES = 100_000  # keys and values of a values file with its aliases expanded; real ones have about 1,000
PREFIX = "tag:yaml.org,2002:"
ALIAS = "alias"  # the tag of the node that replaces an alias; its value is the alias's name

# PyYAML's messages for an unclosed quote or bracket, and for a line without a colon.
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
# How Helm's YAML reader types plain text (tried with Helm 3.17 and 4.3): YAML 1.1 except for dates and 1:30.
HELM_SCHEMA = {
    "null": CORE_SCHEMA["null"],
    "bool": (r"(?i:true|false|yes|no|on|off|y|n)", list("tTfFyYnNoO")),
    "int": (r"[-+]?(0|[1-9][0-9_]*)|0o?[0-7]+|0x[0-9a-fA-F]+|0b[01]+", list("-+0123456789")),
    "float": FLOAT,
    "merge": (r"<<", ["<"]),
}


class UnreadableYAML(Exception):
    """Text that is not valid YAML, with the place of the error."""

    def __init__(self, what: str, fix: str = "", line: int = 1, column: int = 1) -> None:
        super().__init__(what)
        self.what, self.fix, self.line, self.column = what, fix, line, column

    def at(self, name: str) -> UserError:
        """The error of the file of this name."""
        return UserError(redacted(self.what), where=f"{name}:{self.line}:{self.column}", fix=redacted(self.fix))


class ShallowLoader(yaml.SafeLoader):
    """PyYAML's loader with a limit on nesting.

    The C loader has other marks and messages, and deep nesting crashes it.
    """

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.CollectionStartEvent) and self.depth == DEPTH:
            raise UnreadableYAML(f"more than {DEPTH} levels deep", "Use fewer levels.", *place(event.start_mark))
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class CoreSchemaLoader(ShallowLoader):
    """Types by the YAML 1.2 core schema. Does not follow aliases: see ``anchor_of`` and ``ALIAS``."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            self.get_event()
            start: Any = event.start_mark
            return yaml.ScalarNode(ALIAS, event.anchor, start)
        name, event.anchor = event.anchor, None  # PyYAML refuses duplicate anchors with a message of its own
        node = super().compose_node(parent, index)
        if node is not None:
            vars(node)["anchor"] = name
        return node


def anchor_of(node: yaml.Node) -> str:
    """The anchor of a node of ``compose``; empty if it has none."""
    return getattr(node, "anchor", None) or ""


class HelmLoader(ShallowLoader):
    """Types as Helm reads them. Follows aliases, and limits what they expand to: whoever walks the values walks all."""

    bool_values = yaml.SafeLoader.bool_values | {"y": True, "n": False}

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.sizes: dict[yaml.Node, tuple[int, int]] = {}  # nodes and levels of each node, itself included

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        mark: Any = self.peek_event().start_mark
        node = super().compose_node(parent, index)
        if node is None or node in self.sizes:
            return node
        if node.end_mark is None:
            raise UnreadableYAML("an alias inside its own anchor", "Write the value in its place.", *place(mark))
        nodes, levels = 1, 0
        for inner in inner_nodes(node):
            nodes += self.sizes[inner][0]
            levels = max(levels, self.sizes[inner][1])
        if nodes > MOST_NODES:
            what = f"more than {MOST_NODES:,} keys and values, with aliases expanded"
            raise UnreadableYAML(what, "Use fewer aliases of aliases.", *place(mark))
        if levels == DEPTH:
            what = f"more than {DEPTH} levels deep, with aliases expanded"
            raise UnreadableYAML(what, "Use fewer levels.", *place(mark))
        self.sizes[node] = nodes, levels + 1
        return node


def inner_nodes(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from (key, value)
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value


class UnambiguousDumper(yaml.SafeDumper):
    """Quotes strings that YAML 1.1 or 1.2 would read as another type. Writes no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.Node:
        """In double quotes, which escape them, if it has line breaks that readers fold into spaces (NEL, LS, PS)."""
        return self.represent_scalar(PREFIX + "str", text, '"' if re.search("[\x85\u2028\u2029]", text) else None)


def resolve_by(schema: dict[str, tuple[str, list[str]]], reader: Any) -> None:
    for kind, (pattern, first) in schema.items():  # in this order: every integer would also match float
        reader.add_implicit_resolver(PREFIX + kind, re.compile(f"^(?:{pattern})\\Z"), first)


CoreSchemaLoader.yaml_implicit_resolvers = {}
HelmLoader.yaml_implicit_resolvers = {}
resolve_by(CORE_SCHEMA, CoreSchemaLoader)
UnambiguousDumper.add_representer(str, UnambiguousDumper.represent_text)
resolve_by(CORE_SCHEMA, UnambiguousDumper)
resolve_by(HELM_SCHEMA, UnambiguousDumper)  # y is a string for PyYAML and true for Helm
resolve_by(HELM_SCHEMA, HelmLoader)


def decode(path: Path, name: str) -> str:
    try:
        if path.is_dir():
            raise UserError("is a directory", where=name, fix="Name a file in it.")
        refuse_fifo(path)
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise UserError("no such file", where=name, fix="Name an existing file.") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(f"cannot be read: {reason}", where=name, fix=NOT_READABLE) from None
    if len(data) > MAX_BYTES:
        raise UserError(
            f"larger than {MAX_BYTES >> 10} KiB", where=name, fix="An inputs file is smaller; name another file."
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        line, column = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        raise UnreadableYAML("not UTF-8 text", "Save the file as UTF-8.", line, column) from None


def compose(text: str) -> yaml.Node | None:
    """The root node of one YAML document; None if it is empty."""
    with errors_placed(text):
        node: yaml.Node | None = yaml.compose(text, Loader=CoreSchemaLoader)
        return node


def load_as_helm(text: str) -> Any:
    """Load a YAML document as Helm reads it, with aliases and merge keys. They expand to at most MOST_NODES."""
    with errors_placed(text):
        return yaml.load(text, Loader=HelmLoader)


def replaced(text: str, key: str, old: str, new: str) -> str | None:
    """Replace the value of a top-level key and leave everything else unchanged: comments, quotes, line endings.

    Returns None if the key's value is not ``old``, or is written with escapes. Raises UnreadableYAML.
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
    """Translate PyYAML's errors into UnreadableYAML."""
    try:
        yield
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        code = error.character if isinstance(error.character, int) else ord(error.character[:1] or "\0")
        raise UnreadableYAML(f"the character U+{code:04X} is not allowed in YAML", "Remove it.", line, column) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        if error.context_mark and UNFINISHED.search(
            error.problem or ""
        ):  # the problem is found only at the end of the text
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
    """Line and column, counted from 1."""
    return (mark.line + 1, mark.column + 1) if mark else (1, 1)


def dump(value: Any) -> str:
    """Dump plain data as YAML that all readers read alike. Deterministic."""
    text: str = yaml.dump(value, Dumper=UnambiguousDumper, sort_keys=False, allow_unicode=True, width=100)
    return text
