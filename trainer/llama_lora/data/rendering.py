"""Render a row as examples: text segments with and without a loss.

Only answers, with their end-of-sequence tokens, have a loss (format text: everything).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from genvalues.common.errors import UserError
from llama_lora.data.dataset_readers import Row

# Llama 3.1's default date. Templates insert today's date otherwise, and the prompt would change every day.
TEMPLATE_DATE = datetime(2024, 7, 26)

# Put before a chat template, this replaces the strftime_now that transformers provides, which formats today's date. It
# is a macro because transformers 5 passes only JSON values to a template; 4.57 also passes functions. A format that is
# not a literal in the template has no entry in template_dates. The newline is part of the block (trim_blocks).
FIXED_STRFTIME_NOW = (
    "{% macro strftime_now(format) %}"
    "{{ template_dates[format] if format in template_dates else raise_exception('strftime_now without a literal') }}"
    "{% endmacro %}\n"
)

# For tokenizers without a chat template. The context is left out if the row has no input.
PROMPT_TEMPLATE = "### Instruction\n{instruction}\n\n"
PROMPT_TEMPLATE_INPUT = "### Context\n{input}\n\n"
PROMPT_TEMPLATE_ANSWER = "### Answer\n"
TURN_TEMPLATE = "### {role}\n"  # for chat rows


class Segment(NamedTuple):
    """A piece of a rendered example. ``ends`` appends the end-of-sequence token."""

    text: str
    trained: bool
    ends: bool = False


class Dropped(Exception):
    """Raised for a row that cannot be trained on. The message is the reason, which the report counts."""


@dataclass(frozen=True)
class RenderedExample:
    """The text of one example. ``begins``: the tokens that the tokenizer puts before a text come first."""

    segments: tuple[Segment, ...]
    begins: bool


class Renderer:
    """Render and tokenize rows of one format with one tokenizer."""

    def __init__(self, tokenizer: Any, format: str, columns: dict[str, str]) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                "the tokenizer has no end-of-sequence token, so the model cannot learn to stop",
                where="model",
                fix="Set eos_token in its tokenizer_config.json.",
            )
        self.tokenizer = tokenizer
        self.format = format
        self.columns = columns
        self._segments: Callable[[Row], list[Segment]] = {
            "text": self._text,
            "instruction": self._instruction,
            "prompt-completion": self._prompt_completion,
            "chat": self._chat,
        }[format]
        self.uses_chat_template = format in ("instruction", "chat") and bool(tokenizer.chat_template)
        self._chat_template = tokenizer.get_chat_template() if self.uses_chat_template else ""
        self._special = set(tokenizer.all_special_ids)
        if format != "text" and self._marks_beginnings():
            raise UserError(
                "the model's tokenizer marks the beginning of every text (SentencePiece, as in Llama 2), so a prompt "
                "and its answer cannot be tokenized separately",
                where="model",
                fix="Use format text, or a model with a byte-level tokenizer, such as Llama 3.",
            )

    def template(self) -> str:
        """Describe how rows are rendered, for the report."""
        if self.uses_chat_template:
            return "the tokenizer's chat template"
        if self.format == "instruction":
            return PROMPT_TEMPLATE + PROMPT_TEMPLATE_INPUT + PROMPT_TEMPLATE_ANSWER + "{output}"
        return TURN_TEMPLATE + "{content}" if self.format == "chat" else "as written"

    def date(self) -> str | None:
        """The fixed date in the chat template's output; None if it contains no date."""
        if not self.uses_chat_template:
            return None
        messages = [{"role": "user", "content": "?"}]
        try:
            another = self._apply_template(messages, date=datetime(1999, 12, 31))
            return TEMPLATE_DATE.strftime("%d %b %Y") if self._apply_template(messages) != another else None
        except Dropped:  # the template does not accept a single question
            return None

    def render(self, row: Row) -> list[RenderedExample]:
        """Render a row.

        Raises Dropped if it has nothing to train on, UserError if a column is missing or not text.
        """
        return [RenderedExample(tuple(self._segments(row)), begins=not self.uses_chat_template)]

    def _text(self, row: Row) -> list[Segment]:
        return [Segment(self._column(row, "text"), trained=True, ends=True)]

    def _prompt_completion(self, row: Row) -> list[Segment]:
        return [
            Segment(self._column(row, "prompt"), trained=False),
            Segment(self._column(row, "completion"), trained=True, ends=True),
        ]

    def _instruction(self, row: Row) -> list[Segment]:
        instruction, answer = self._column(row, "instruction"), self._column(row, "output")
        context = self._column(row, "input", required=False)
        if self.uses_chat_template:
            question = f"{instruction}\n\n{context}" if context else instruction
            return self._conversation([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
        prompt = PROMPT_TEMPLATE.format(instruction=instruction)
        prompt += PROMPT_TEMPLATE_INPUT.format(input=context) if context else ""
        return [Segment(prompt + PROMPT_TEMPLATE_ANSWER, trained=False), Segment(answer, trained=True, ends=True)]

    def _chat(self, row: Row) -> list[Segment]:
        messages = self._messages(row)
        if self.uses_chat_template:
            return self._conversation(messages)
        segments = []
        for message in messages:
            answer = message["role"] == "assistant"
            segments.append(Segment(TURN_TEMPLATE.format(role=message["role"].capitalize()), trained=False))
            segments.append(Segment(message["content"], trained=answer, ends=answer))
            segments.append(Segment("\n\n", trained=False))
        return segments

    def _conversation(self, messages: list[dict[str, str]]) -> list[Segment]:
        """Render a conversation with the chat template. Each assistant turn, up to its end token, has a loss."""
        whole = self._apply_template(messages)
        segments: list[Segment] = []
        done = 0
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if index == 0:
                raise Dropped("starts with an assistant turn")
            prompt = self._apply_template(messages[:index], add_generation_prompt=True)
            through = self._apply_template(messages[: index + 1])
            # Some templates rewrite earlier turns (drop their reasoning): the trained text would never be generated.
            if not (whole.startswith(prompt) and whole.startswith(through) and through.startswith(prompt)):
                raise Dropped("the chat template rewrites earlier turns")
            segments.append(Segment(whole[done : len(prompt)], trained=False))
            segments += self._answer(whole[len(prompt) : len(through)])
            done = len(through)
        segments.append(Segment(whole[done:], trained=False))
        return segments

    def _answer(self, turn: str) -> list[Segment]:
        """Split a rendered assistant turn after its last special token, which ends it: the rest is not trained."""
        encoded = self.tokenizer(turn, add_special_tokens=False, return_offsets_mapping=True)
        ends = [
            end
            for token, (_, end) in zip(encoded.input_ids, encoded.offset_mapping, strict=True)
            if token in self._special
        ]
        if not ends:  # the template does not end a turn: without an end token the model would not learn to stop
            return [Segment(turn, trained=True, ends=True)]
        return [Segment(turn[: ends[-1]], trained=True), Segment(turn[ends[-1] :], trained=False)]

    def _apply_template(
        self, messages: list[dict[str, str]], *, add_generation_prompt: bool = False, date: datetime = TEMPLATE_DATE
    ) -> str:
        from jinja2 import TemplateError

        try:
            text: str = self.tokenizer.apply_chat_template(
                messages,
                chat_template=FIXED_STRFTIME_NOW + self._chat_template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                date_string=date.strftime("%d %b %Y"),  # read by Llama 3's templates
                template_dates=_template_dates(self._chat_template, date),  # for those that call strftime_now
            )
        except TemplateError as error:
            raise Dropped(f"the chat template raises: {error}") from None
        return text

    def _messages(self, row: Row) -> list[dict[str, str]]:
        name = self.columns.get("messages", "messages")
        messages = row.values.get(name)
        if messages is None:
            self._missing(row, name, "messages")
        if not isinstance(messages, list) or not all(
            isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages
        ):
            raise UserError(
                f"column {name} is not a list of messages",
                where=row.place,
                fix='Write [{"role": "user", "content": "..."}, ...].',
            )
        for message in messages:
            # Only the text of a message is rendered: a tool call would be trained as an empty answer.
            if message.get("tool_calls") or message["role"] in ("tool", "function"):
                raise Dropped("has tool calls")
            if not isinstance(message.get("content"), str):
                raise Dropped("has a message without plain text")
            if message["role"] == "assistant" and not message["content"].strip():
                raise Dropped("has an empty assistant turn")
            _check_unicode(message["content"])
        if not any(message["role"] == "assistant" for message in messages):
            raise Dropped("no assistant turn")
        return [{"role": message["role"], "content": message["content"]} for message in messages]

    def _column(self, row: Row, key: str, *, required: bool = True) -> str:
        """The text of the column for ``key``. Raises Dropped if it is required and empty or null."""
        name = self.columns.get(key, key)
        value = row.values.get(name)
        if value is None:
            if required and name not in row.values:
                self._missing(row, name, key)
            value = ""
        if isinstance(value, (list, dict)):
            raise UserError(
                f"column {name} contains a {type(value).__name__}, not text",
                where=row.place,
                fix="Use format chat for lists of messages.",
            )
        text = str(value)
        if required and not text.strip():
            raise Dropped(f"empty {key}")
        _check_unicode(text)
        return text

    def _missing(self, row: Row, name: str, key: str) -> None:
        raise UserError(
            f"has no column {name}",
            where=row.place,
            fix=f"Set dataset.columns.{key} to one of: {', '.join(map(str, row.values))}.",
        )

    def _marks_beginnings(self) -> bool:
        """Whether the tokens of a text differ between the beginning of a text and a later place in it."""
        alone = self.tokenizer("a", add_special_tokens=False).input_ids
        after_newline = self.tokenizer("\na", add_special_tokens=False).input_ids
        return bool(after_newline[-len(alone) :] != alone)


@functools.cache
def _template_dates(template: str, date: datetime) -> dict[str, str]:
    """Format ``date`` with each string literal of a template that can be a format of strftime."""
    from jinja2 import Environment

    literals = (token.value for token in Environment().lexer.tokenize(template) if token.type == "string")
    return {literal: date.strftime(literal) for literal in literals if "%" in literal}


def _check_unicode(text: str) -> None:
    """Raise Dropped for text with half a surrogate pair (from truncated JSON), which a tokenizer cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Dropped("is not valid Unicode") from None
