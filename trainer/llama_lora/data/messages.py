"""Read conversations in the shapes that datasets have them, as messages in the form that chat templates read.

Understood: role and content (OpenAI), from and value (ShareGPT), other names of the roles, content as a list of text
parts, tool calls (also as JSON text, and OpenAI's older function_call), and marks for turns without a loss.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from genvalues.common.text import one_line
from llama_lora.data.columns import Dropped, as_json, as_text, is_null, without_nulls
from llama_lora.data.rows import RowError

Message = dict[str, Any]

ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "chatbot", "model", "ai", "chatgpt", "bing", "bard"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "tool_response", "function_response", "ipython"), "tool"),
    "system": "system",
}
NO_QUESTION = ("assistant", "system", "developer")
FUNCTION_CALL_ROLES = ("function_call", "tool_call")  # ShareGPT: the assistant calls a tool; value is JSON
SHAPE_KEYS = {"role", "from", "content", "value", "weight", "train", "masked"}  # read here, not by the chat template
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
MARKS = {"true": True, "yes": True, "false": False, "no": False, "": None}  # as text, besides numbers
FIX = 'Write [{"role": "user", "content": "..."}, ...].'


@dataclass
class Conversation:
    """Messages in the form that chat templates read. ``loss``: whether the message may have a loss, for each one."""

    messages: list[Message]
    loss: list[bool]
    tools: list[Any] = field(default_factory=list)

    def add_system(self, prompt: str) -> None:
        """Put a system message first, unless there is one."""
        if prompt.strip() and not (self.messages and self.messages[0]["role"] == "system"):
            self.messages.insert(0, {"role": "system", "content": prompt})
            self.loss.insert(0, False)

    def mask_greeting(self) -> None:
        """Take the loss from what the assistant says before anybody has asked; a system prompt may ask on its own."""
        asks = (index for index, each in enumerate(self.messages) if each["role"] not in NO_QUESTION)
        for index in range(next(asks, 0)):
            self.loss[index] = False

    def extend(self, other: Conversation) -> None:
        self.messages += other.messages
        self.loss += other.loss


def conversation(pairs: list[tuple[str, str]]) -> Conversation:
    """A conversation of (role, text) pairs, in which every answer may have a loss."""
    messages: list[Message] = [{"role": role, "content": text} for role, text in pairs]
    return Conversation(messages, [role == "assistant" for role, _ in pairs])


def read_messages(value: Any, what: str, place: str) -> Conversation:
    """Read the value of a column, ``what``, as a conversation.

    Raises RowError if it is not a list of messages, Dropped if a message cannot be trained on.
    """
    value = as_json(value, what, place)
    if isinstance(value, Mapping) and "messages" in value:
        value = value["messages"]
    if value is None or value == []:
        raise Dropped("empty messages")
    if not isinstance(value, (list, tuple)) or not all(isinstance(message, Mapping) for message in value):
        raise RowError(f"{what} is not a list of messages", where=place, fix=FIX)
    value = [each for each in value if not (_is_role(each, "system") and _is_empty(_raw_content(each)))]
    messages = [_message(message, what, place) for message in value]
    loss = [
        read["role"] == "assistant" and _may_have_loss(raw, what, place)
        for raw, read in zip(value, messages, strict=True)
    ]
    return Conversation(messages, loss)


def parsed_messages(value: Any) -> Any:
    """A list of messages if ``value`` is one as JSON text; any other value as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        read = json.loads(value)
    except (ValueError, RecursionError):
        return value
    messages = isinstance(read, list) and all(
        isinstance(each, dict) and isinstance(_raw_role(each), str) for each in read
    )
    return read if messages and read else value


def read_tools(value: Any, what: str, place: str) -> list[Any]:
    """Read the tools that an assistant may call: a list, or a list as JSON text."""
    value = as_json(value, what, place)
    if isinstance(value, Mapping):
        value = [value]
    if value is None:
        return []
    if not isinstance(value, (list, tuple)):
        raise RowError(f"{what} is not a list of tools", where=place, fix='Write [{"type": "function", ...}].')
    tools = (as_json(tool, what, place) for tool in value)
    return [without_nulls(tool) for tool in tools if tool is not None]


def read_history(value: Any, what: str, place: str) -> list[tuple[str, str]]:
    """Read earlier turns, a list of [question, answer], as (role, text) pairs."""
    value = as_json(value, what, place)
    if value is None:
        return []
    if not isinstance(value, (list, tuple)) or not all(isinstance(t, (list, tuple)) and len(t) == 2 for t in value):
        raise RowError(
            f"{what} is not a list of [question, answer]", where=place, fix='Write [["QUESTION", "ANSWER"], ...].'
        )
    roles = ("user", "assistant")
    return [(role, as_text(text, what, place)) for turn in value for role, text in zip(roles, turn, strict=True)]


def _message(message: Mapping[str, Any], what: str, place: str) -> Message:
    """A message with its role and content under these keys, and its other keys unless they are empty."""
    role, content = _raw_role(message), _raw_content(message)
    if not isinstance(role, str) or not role.strip():
        raise RowError(f"{what} is not a list of messages: one has no role", where=place, fix=FIX)
    other = {key: each for key, each in message.items() if key not in SHAPE_KEYS and not _is_empty(each)}
    name = role.strip().lower()
    read: Message = {"role": ROLES.get(name, role), "content": "", **other}
    if name in FUNCTION_CALL_ROLES:
        read["role"] = "assistant"
        calls = _calls_in(content)
        if calls is not None:
            read["tool_calls"] = [_tool_call(call, what, place) for call in calls]
            return read
    if is_null(content) and read["role"] == "user":
        raise Dropped("has a message without plain text")
    read["content"] = _content(content, what, place)
    calls = other.get("tool_calls") or read.pop("function_call", None)
    if calls:
        read["tool_calls"] = [_tool_call(call, what, place) for call in _as_list(as_json(calls, what, place))]
    reasoning = next((other[key] for key in REASONING_KEYS if key in other), None)
    if reasoning is not None:  # transformers 5 gives templates both names too
        read["thinking"] = read["reasoning_content"] = as_text(reasoning, what, place)
        read.pop("reasoning", None)
    return read


def _calls_in(content: Any) -> list[Any] | None:
    """The calls in the content of a ShareGPT function_call, None if it is other text."""
    try:
        calls = _as_list(json.loads(content) if isinstance(content, str) else content)
    except (ValueError, RecursionError):
        return None
    return calls if all(isinstance(call, Mapping) for call in calls) else None


def _raw_role(message: Mapping[str, Any]) -> Any:
    role = message.get("role")
    return message.get("from") if _is_empty(role) else role


def _raw_content(message: Mapping[str, Any]) -> Any:
    content = message.get("content")
    return message.get("value") if is_null(content) else content


def _is_role(message: Mapping[str, Any], role: str) -> bool:
    name = _raw_role(message)
    return isinstance(name, str) and ROLES.get(name.strip().lower()) == role


def _content(content: Any, what: str, place: str) -> str:
    if isinstance(content, (list, tuple)):
        parts: list[Any] = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        if not all(isinstance(part, str) for part in parts):
            raise Dropped("has a message with an image, audio or another part that is not text")
        return "".join(parts)
    if isinstance(content, Mapping):  # the result of a tool
        return json.dumps(content, ensure_ascii=False, default=str)
    return as_text(content, f"a message of {what}", place)


def _tool_call(call: Any, what: str, place: str) -> dict[str, Any]:
    """A call in OpenAI's form, with its arguments as an object."""
    call = without_nulls(as_json(call, what, place))
    if not isinstance(call, dict):
        raise RowError(
            f"{what} has a tool call that is not an object", where=place, fix='Write {"name": ..., "arguments": {...}}.'
        )
    function = call.get("function") if isinstance(call.get("function"), dict) else call
    assert isinstance(function, dict)
    if "name" not in function:
        return call  # another form: the template may know it
    arguments = function.get("arguments", function.get("parameters", {}))
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError, RecursionError):  # not JSON: passed on as text
            arguments = json.loads(arguments)
    function = {"name": function["name"], "arguments": arguments}
    outer = {key: value for key, value in call.items() if key in ("id", "index")}
    return {"type": "function", **outer, "function": function}


def _may_have_loss(message: Mapping[str, Any], what: str, place: str) -> bool:
    """Whether no mark of an assistant's message (weight, train or masked) takes its loss."""
    marks = {key: _mark(message, key, what, place) for key in ("weight", "train", "masked")}
    return marks["weight"] is not False and marks["train"] is not False and not marks["masked"]


def _mark(message: Mapping[str, Any], key: str, what: str, place: str) -> bool | None:
    """Whether a mark is set, None if the message does not have it. It may be text, as in CSV. Raises RowError."""
    value = message.get(key)
    if isinstance(value, str):
        word = value.strip().lower()
        with contextlib.suppress(ValueError):
            value = MARKS[word] if word in MARKS else float(word)
    if is_null(value):
        return None
    if isinstance(value, (int, float, Decimal)):
        return bool(value)
    raise RowError(
        f"{what} has a message with {key}: {one_line(str(value))!r}",
        where=place,
        fix="Write true, false or a number; 0 is false.",
    )


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _is_empty(value: Any) -> bool:
    return is_null(value) or value in ("", [], {}, ())
