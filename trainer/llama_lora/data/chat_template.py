"""Render messages with a chat template: compiled once, with a fixed date, and with limits on time and memory.

A template is a program that comes with a model. transformers' sandbox keeps it from the file system and the network,
but not from running forever or from filling the memory.
"""

from __future__ import annotations

import hashlib
import json
import operator
import re
from contextlib import AbstractContextManager
from datetime import datetime
from functools import partial
from itertools import islice, product
from typing import Any, NamedTuple

from genvalues.common.errors import UserError
from llama_lora.data.columns import Dropped
from llama_lora.data.messages import Message
from llama_lora.data.rows import RowError
from llama_lora.limits import TimeUp, limited

# Llama 3.1's default date. Templates insert today's date otherwise, and the prompt would change every day.
TEMPLATE_DATE = datetime(2024, 7, 26)

MOST_SOURCE = 1 << 18  # characters; the longest in use have some ten thousand. Compiling cannot be interrupted.
PIECES = 10_000_000  # strings that one rendering may consist of
# Length of an integer that is multiplied, divided or rounded. More could take hours in a single operation, which no
# signal interrupts.
INTEGER_BITS = 4096

FIX = "Use another model, or correct its chat template (chat_template.jinja, or tokenizer_config.json)."


class ChatTemplate:
    """One chat template of a tokenizer.

    Raises UserError if it is not a valid template.
    """

    def __init__(self, source: str, tokens: dict[str, Any], date: datetime = TEMPLATE_DATE) -> None:
        self.source = source
        self._variables = {"documents": None, **tokens, "date_string": date.strftime("%d %b %Y")}  # Llama 3's
        environment = _environment(date)
        if len(source) > MOST_SOURCE:
            what = f"the chat template has {len(source)} characters, the most is {MOST_SOURCE}"
            raise UserError(what, where="model", fix=FIX)
        with limits("model"):
            try:
                self._template = environment.from_string(source)
                tree = environment.parse(source)
                check_alone(tree)
                self.message_keys = message_keys(tree)
                self._template.globals = dict(self._template.globals)  # copied for each rendering: slow as a ChainMap
                self._words = {
                    value if kind == "name" else value[1:-1]
                    for _, kind, value in environment.lex(source)
                    if kind in ("name", "string")
                }
            except (TimeUp, MemoryError, UserError):
                raise
            except Exception as error:  # a hostile template can raise what it wants, RecursionError for example
                raise UserError(f"invalid chat template: {_with_kind(error)}", where="model", fix=FIX) from None

    @property
    def digest(self) -> str:
        """The first 16 digits of the source's SHA-256."""
        return hashlib.sha256(self.source.encode()).hexdigest()[:16]

    def reads(self, key: str) -> bool:
        """Whether the template contains ``key`` as a name or a string."""
        return key in self._words

    def render(self, messages: list[Message], tools: list[Any], *, prompt: bool, place: str) -> str:
        """Render messages, with a generation prompt after them if ``prompt``.

        Raises Dropped if the template does not accept the messages, RowError if it expects others, UserError if it
        fails. Call it within ``limits``.
        """
        import jinja2

        context = self._template.new_context(
            {**self._variables, "messages": messages, "tools": tools or None, "add_generation_prompt": prompt}
        )
        pieces = self._template.root_render_func(context)
        try:
            text = "".join(islice(pieces, PIECES))
            if next(pieces, None) is not None:
                raise UserError(f"the chat template writes more than {PIECES} pieces of text", where=place, fix=FIX)
        except (jinja2.TemplateError, TypeError) as error:
            if type(error) is jinja2.TemplateError:  # by raise_exception
                raise Dropped(f"the chat template raises: {_one_line(error)}") from None
            raise RowError(f"the chat template fails: {_with_kind(error)}", where=place, fix=FIX) from None
        except (TimeUp, MemoryError, UserError):
            raise
        except Exception as error:
            raise UserError(f"the chat template fails: {_with_kind(error)}", where=place, fix=FIX) from None
        return text


def check_alone(template: Any) -> None:
    """Raise UserError if a template, a syntax tree of Jinja, reads other templates: a model has none."""
    from jinja2 import nodes

    for node in template.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)):
        statement = "import" if isinstance(node, nodes.FromImport) else type(node).__name__.lower()
        raise UserError(
            f"the chat template includes another template ({statement}, line {node.lineno})", where="model", fix=FIX
        )


def message_keys(template: Any) -> set[str]:
    """The keys that a template, a syntax tree of Jinja, may read from a message.

    Not those that it reads only from what is in a message, such as the name of the function in a tool call, or from the
    tools.
    """
    from jinja2 import nodes

    bound: dict[str, list[Any]] = {"tools": []}  # what each name stands for, or whose elements it stands for
    for each in template.find_all((nodes.Assign, nodes.For)):
        if isinstance(each.target, nodes.Name):
            bound.setdefault(each.target.name, []).append(each.node if isinstance(each, nodes.Assign) else each.iter)

    def is_inner(node: Any, seen: frozenset[str] = frozenset()) -> bool:
        """Whether a node is a part of a message, or of the tools."""
        if isinstance(node, nodes.Getattr) or (isinstance(node, nodes.Getitem) and _text(node.arg)):
            return not _is_namespace(node.node, bound)
        if isinstance(node, (nodes.Getitem, nodes.Filter)):
            return is_inner(node.node, seen)
        if not isinstance(node, nodes.Name) or node.name == "messages" or node.name not in bound:
            return False
        if node.name in seen:  # bound to a part of itself
            return True
        return all(is_inner(each, seen | {node.name}) for each in bound[node.name])

    keys = set()
    for each in template.find_all((nodes.Getattr, nodes.Getitem, nodes.Compare, nodes.Call, nodes.Filter)):
        if isinstance(each, nodes.Compare):  # "key" in message
            keys |= {_text(each.expr) for operand in each.ops if not is_inner(operand.expr)}
        elif isinstance(each, nodes.Call):  # message.get("key")
            getter = isinstance(each.node, nodes.Getattr) and not is_inner(each.node.node)
            keys |= {_text(argument) for argument in each.args if getter}
        elif isinstance(each, nodes.Filter):  # messages | selectattr("key")
            keys |= {_text(argument) for argument in [*each.args, *(pair.value for pair in each.kwargs)]}
        elif not is_inner(each.node):
            keys.add(each.attr if isinstance(each, nodes.Getattr) else _text(each.arg))
    return keys - {""}


def _text(node: Any) -> str:
    """The value of a constant that is text; empty for other nodes."""
    value = getattr(node, "value", None)
    return value if isinstance(value, str) else ""


def _is_namespace(node: Any, bound: dict[str, list[Any]]) -> bool:
    """Whether a node is a name that a template sets to namespace(...), whose attributes can be messages."""
    values = bound.get(getattr(node, "name", ""), [])
    return any(getattr(getattr(value, "node", None), "name", "") == "namespace" for value in values)


class ChatTemplates:
    """The chat templates of a tokenizer: one, or one for conversations with tools and one for the others."""

    def __init__(self, tokenizer: Any, date: datetime = TEMPLATE_DATE) -> None:
        self._tokens = dict(tokenizer.special_tokens_map)
        self._date = date
        self._compiled: dict[str, ChatTemplate] = {}
        try:
            self._sources = {tools: tokenizer.get_chat_template(tools=[] if tools else None) for tools in (False, True)}
        except ValueError as error:  # several templates, and none is the default
            raise UserError(f"no chat template: {error}", where="model", fix=FIX) from None
        self._calls: dict[str, CallStyle | None] = {}

    def of(self, tools: list[Any]) -> ChatTemplate:
        """The template for conversations with ``tools``."""
        source = self._sources[bool(tools)]
        if source not in self._compiled:
            self._compiled[source] = ChatTemplate(source, self._tokens, self._date)
        return self._compiled[source]

    def with_calls(self, messages: list[Message], tools: list[Any], place: str) -> list[Message]:
        """The messages, with tool calls in the style that the template renders.

        Raises Dropped if there are tool calls and the template renders none: the answer would be trained empty.
        """
        if not any("tool_calls" in message for message in messages):
            return messages
        template = self.of(tools)
        if template.source not in self._calls:
            self._calls[template.source] = _call_style(template, place)
        style = self._calls[template.source]
        if style is None:
            raise Dropped("has tool calls, which the chat template does not render")
        return [_in_style(message, style) if "tool_calls" in message else message for message in messages]


class CallStyle(NamedTuple):
    """How a template expects a message with tool calls: most want arguments as an object, some (DeepSeek's) as JSON
    text; most take any content, some render calls only if it is none."""

    text_arguments: bool
    no_content: bool


def _call_style(template: ChatTemplate, place: str) -> CallStyle | None:
    """The first style in which a template renders a call, and its arguments as JSON."""
    call = {"type": "function", "id": "abcdefghi", "function": {"name": "a_function", "arguments": {"a_key": 1}}}
    message: Message = {"role": "assistant", "content": "", "tool_calls": [call]}
    for style in (CallStyle(*choices) for choices in product((False, True), repeat=2)):
        messages = [{"role": "user", "content": "?"}, _in_style(message, style)]
        try:
            text = template.render(messages, [], prompt=False, place=place)
        except (Dropped, RowError):
            continue
        if "a_function" in text and "a_key" in text and "'a_key'" not in text:
            return style
    return None


def _in_style(message: Message, style: CallStyle) -> Message:
    def styled(call: dict[str, Any]) -> dict[str, Any]:
        arguments = call.get("function", {}).get("arguments")
        if not style.text_arguments or isinstance(arguments, str):
            return call
        return {**call, "function": {**call["function"], "arguments": json.dumps(arguments, ensure_ascii=False)}}

    content = None if style.no_content and not message["content"] else message["content"]
    return {**message, "content": content, "tool_calls": [styled(call) for call in message["tool_calls"]]}


def limits(place: str) -> AbstractContextManager[None]:
    """Limit the CPU time and the memory of a block that compiles or renders a template, and raise UserError at them."""
    return limited("the chat template", place, FIX)


def _environment(date: datetime) -> Any:
    from llama_lora import library_versions

    environment = library_versions.chat_template_environment()
    environment.globals["strftime_now"] = date.strftime
    limited = {"*": _times, "**": _power, "//": _floor_divided, "%": _remainder}
    environment.intercepted_binops = frozenset(limited)  # which also keeps Jinja from computing them to compile
    environment.binop_table = {**environment.binop_table, **limited}
    environment.filters = {**environment.filters, "round": _rounded, "sum": partial(_summed, environment)}
    environment.tests = {**environment.tests, "divisibleby": lambda value, num: _remainder(value, num) == 0}
    return environment


def _times(left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > INTEGER_BITS:
        raise OverflowError("a product of integers is too large")
    return operator.mul(left, right)


def _power(base: Any, exponent: Any) -> Any:
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * abs(exponent) > INTEGER_BITS:
        raise OverflowError("a power of integers is too large")
    return operator.pow(base, exponent)


def _floor_divided(left: Any, right: Any) -> Any:
    _check_length(left, "a quotient")
    return operator.floordiv(left, right)


def _remainder(left: Any, right: Any) -> Any:
    _check_length(left, "a remainder")
    return operator.mod(left, right)


def _rounded(value: Any, precision: int = 0, method: Any = "common") -> Any:
    """Jinja's filter round, which computes 10**precision."""
    from jinja2.filters import do_round

    _check_length(value, "a rounding")
    if abs(precision) * 4 > INTEGER_BITS:
        raise OverflowError("a rounding has too many digits")
    return do_round(value, precision, method)


def _summed(environment: Any, iterable: Any, attribute: Any = None, start: Any = 0) -> Any:
    """Jinja's filter sum in a loop that the time limit interrupts: sums of lists take quadratic time."""
    from jinja2.filters import make_attrgetter

    value = make_attrgetter(environment, attribute)
    for each in iterable:
        start = start + (each if attribute is None else value(each))
    return start


def _check_length(value: Any, what: str) -> None:
    if isinstance(value, int) and value.bit_length() > INTEGER_BITS:
        raise OverflowError(f"{what} of integers is too large")


def _with_kind(error: Exception) -> str:
    return f"{type(error).__name__}: {_one_line(error)}".removesuffix(": ")


def _one_line(error: Exception) -> str:
    """The start of an exception's text: a template can put a whole row into it."""
    return re.sub(r"\s+", " ", str(error))[:200]
