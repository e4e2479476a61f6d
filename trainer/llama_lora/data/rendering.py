"""Render a row as examples: text segments with and without a loss.

Only answers, with the token that ends them, have a loss (format text: everything).
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from typing import Any

from genvalues.common.errors import UserError
from genvalues.common.text import has_surrogate
from llama_lora.data import messages as shapes
from llama_lora.data.chat_template import TEMPLATE_DATE, ChatTemplate, ChatTemplates, limits
from llama_lora.data.columns import Columns, Dropped
from llama_lora.data.messages import Conversation, Message
from llama_lora.data.rows import Row, RowError
from llama_lora.data.turns import RenderedExample, Segment, TurnRenderer

__all__ = ["TEMPLATE_DATE", "Dropped", "RenderedExample", "Renderer", "Segment"]

# For tokenizers without a chat template. A part that the row does not have is left out.
PROMPT_TEMPLATE_SYSTEM = "### System\n{system}\n\n"
PROMPT_TEMPLATE = "### Instruction\n{instruction}\n\n"
PROMPT_TEMPLATE_INPUT = "### Context\n{input}\n\n"
PROMPT_TEMPLATE_ANSWER = "### Answer\n"
TURN_TEMPLATE = "### {role}\n"  # for conversations


class Renderer:
    """Render rows of one format with one tokenizer.

    ``notes`` counts what the report tells about rows that are kept, by its text. ``columns.found`` has the keys of
    the named columns that were found.
    """

    def __init__(self, tokenizer: Any, format: str, columns: dict[str, str], train_on: str = "all-answers") -> None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                "the tokenizer has no end-of-sequence token, so the model cannot learn to stop",
                where="model",
                fix="Set eos_token in its tokenizer_config.json.",
            )
        self.tokenizer = tokenizer
        self.format = format
        self.columns = Columns(columns)
        self.train_on = train_on
        self.notes: Counter[str] = Counter()
        self._examples: Callable[[Row], list[RenderedExample]] = {
            "text": self._text,
            "instruction": self._instruction,
            "prompt-completion": self._prompt_completion,
            "chat": self._chat,
        }[format]
        self._special = special_tokens(tokenizer)
        strips = {token.content for token in tokenizer.added_tokens_decoder.values() if token.lstrip}
        self._turns = TurnRenderer(self._special, [text for text in self._special if text not in strips])
        self.uses_chat_template = format in ("instruction", "chat") and bool(tokenizer.chat_template)
        if self.uses_chat_template:
            self._templates.of([])  # report an invalid template before the first row
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

    def template_hash(self) -> str | None:
        """The first 16 digits of the chat template's SHA-256; None if none is used."""
        return self._templates.of([]).digest if self.uses_chat_template else None

    def date(self) -> str | None:
        """The fixed date in the chat template's output; None if it contains no date."""
        if not self.uses_chat_template:
            return None
        question: list[Message] = [{"role": "user", "content": "?"}]
        another = ChatTemplates(self.tokenizer, datetime(1999, 12, 31))
        try:
            with limits("model"):
                outputs = {
                    templates.of([]).render(question, [], prompt=True, place="model")
                    for templates in (self._templates, another)
                }
            return TEMPLATE_DATE.strftime("%d %b %Y") if len(outputs) > 1 else None
        except (Dropped, RowError):  # the template does not accept a single question
            return None

    def render(self, row: Row) -> list[RenderedExample]:
        """Render a row.

        Raises Dropped if it has nothing to train on, RowError if a column is missing or not as the format says,
        UserError if the chat template fails.
        """
        try:
            with limits(row.place):
                examples = self._examples(row)
                for example in examples:
                    for segment in example.segments:
                        _check_unicode(segment.text)
        except RecursionError:
            raise RowError("is nested too deeply", where=row.place, fix="Write a row with fewer levels.") from None
        if len(examples) > 1:
            self.notes["conversations whose history the chat template rewrites: one example for each answer"] += 1
        return examples

    @functools.cached_property
    def _templates(self) -> ChatTemplates:
        return ChatTemplates(self.tokenizer)

    def _text(self, row: Row) -> list[RenderedExample]:
        text = self.columns.text(row, "text")
        return [self._as_written([Segment(text, trained=True, ends=not self._is_ended(text))])]

    def _prompt_completion(self, row: Row) -> list[RenderedExample]:
        values = {key: shapes.parsed_messages(self.columns.value(row, key)) for key in ("prompt", "completion")}
        if any(isinstance(value, (list, tuple)) for value in values.values()):
            parts = []
            for role, (key, value) in zip(("user", "assistant"), values.items(), strict=True):
                is_list = isinstance(value, (list, tuple))
                messages = value if is_list else [{"role": role, "content": self.columns.text(row, key)}]
                parts.append(shapes.read_messages(messages, f"column {self.columns.name(row, key)}", row.place))
            prompt, completion = parts
            prompt.loss = [False] * len(prompt.loss)
            prompt.extend(completion)
            prompt.tools = self._tools(row, None)
            return self._conversation(row, prompt)
        if self._tools(row, None):
            self.notes["ignored column tools: the prompt is plain text"] += 1
        completed = self.columns.text(row, "completion")
        return [
            self._as_written(
                [
                    Segment(self.columns.text(row, "prompt"), trained=False),
                    Segment(completed, trained=True, ends=not self._is_ended(completed)),
                ]
            )
        ]

    def _is_ended(self, text: str) -> bool:
        """Whether generation stops at the end of a text, apart from white space: other special tokens end nothing."""
        return text.rstrip().endswith(self._ends)

    @functools.cached_property
    def _ends(self) -> tuple[str, ...]:
        return tuple(self.tokenizer.convert_ids_to_tokens(sorted(end_tokens(self.tokenizer))))

    def _as_written(self, segments: list[Segment]) -> RenderedExample:
        """An example of text that the row has: it may be rendered already, with its own first tokens."""
        text = segments[0].text
        if text.startswith(self._special):
            self.notes["rows that begin with a special token: already rendered"] += 1
        bos = self.tokenizer.bos_token
        return RenderedExample(tuple(segments), begins=not (bos and text.startswith(bos)))

    def _instruction(self, row: Row) -> list[RenderedExample]:
        context = self.columns.text(row, "input", required=False)
        instruction = self.columns.text(row, "instruction", required=not context.strip())
        answer = self.columns.text(row, "output")
        system = self.columns.text(row, "system", required=False)
        history = shapes.read_history(self.columns.value(row, "history", required=False), "history", row.place)
        question = "\n\n".join(text for text in (instruction, context) if text.strip())
        conversation = shapes.conversation([*history, ("user", question), ("assistant", answer)])
        if self.uses_chat_template:
            conversation.add_system(system)
            return self._conversation(row, conversation)
        self._check_messages(conversation.messages, [], None)
        segments = [Segment(PROMPT_TEMPLATE_SYSTEM.format(system=system), trained=False)] if system.strip() else []
        for role, text in history:
            asks = role == "user"
            trained = not asks and self.train_on == "all-answers"
            prompt = PROMPT_TEMPLATE.format(instruction=text) + PROMPT_TEMPLATE_ANSWER if asks else text
            segments.append(Segment(prompt, trained=trained, ends=trained))
            segments += [] if asks else [Segment("\n\n", trained=False)]
        prompt = PROMPT_TEMPLATE.format(instruction=instruction) if instruction.strip() else ""
        prompt += PROMPT_TEMPLATE_INPUT.format(input=context) if context.strip() else ""
        segments.append(Segment(prompt + PROMPT_TEMPLATE_ANSWER, trained=False))
        segments.append(Segment(answer, trained=True, ends=True))
        return [RenderedExample(tuple(segments), begins=True)]

    def _chat(self, row: Row) -> list[RenderedExample]:
        value = self.columns.value(row, "messages")
        name = f"column {self.columns.name(row, 'messages')}"
        conversation = shapes.read_messages(value, name, row.place)
        conversation.mask_greeting()
        conversation.add_system(self.columns.text(row, "system", required=False))
        conversation.tools = self._tools(row, value)
        return self._conversation(row, conversation)

    def _tools(self, row: Row, messages: Any) -> list[Any]:
        """The tools of a row: its column, or a key beside the messages in theirs."""
        tools = self.columns.value(row, "tools", required=False)
        if tools is None and isinstance(messages, dict):
            tools = messages.get("tools")
        return shapes.read_tools(tools, f"column {self.columns.name(row, 'tools') or 'tools'}", row.place)

    def _conversation(self, row: Row, conversation: Conversation) -> list[RenderedExample]:
        messages, tools = conversation.messages, conversation.tools
        template = self._templates.of(tools) if self.tokenizer.chat_template else None
        if template is None or not template.reads("developer"):  # OpenAI's newer name of the system prompt
            messages = [{**each, "role": "system"} if each["role"] == "developer" else each for each in messages]
        self._check_messages(messages, tools, template)
        # Nothing asks for a first message, so it has no loss.
        trained = [index for index, loss in enumerate(conversation.loss) if loss and index > 0]
        if not trained:
            raise Dropped("no assistant turn has a loss")
        if self.train_on == "last-answer":
            trained = trained[-1:]
        messages = messages[: trained[-1] + 1]  # what follows the last trained turn has no effect
        self.uses_chat_template = template is not None
        if template is None:
            return [RenderedExample(tuple(_plain(messages, trained)), begins=True)]
        messages = self._templates.with_calls(messages, tools, row.place)

        def render(messages: list[Message], *, prompt: bool = False) -> str:
            return template.render(messages, tools, prompt=prompt, place=row.place)

        examples = self._turns.examples(render, messages, trained)
        return [RenderedExample(tuple(segments), begins=False) for segments in examples]

    def _check_messages(self, messages: list[Message], tools: list[Any], template: ChatTemplate | None) -> None:
        """Count the keys that the template does not read. Raises Dropped if an answer would be empty without them."""
        read = template.message_keys if template else set()
        ignored = Counter(key for message in messages for key in message if key not in read)
        if tools and not (template and template.reads("tools")):
            ignored["tools"] += 1
        reasoning = bool(read & {"thinking", "reasoning_content"})  # the same text under both names
        for key in ("role", "content", "thinking", *(["reasoning_content"] if reasoning else [])):
            del ignored[key]
        if ignored["tool_calls"]:
            raise Dropped("has tool calls, which the chat template does not render")
        answers = [message for message in messages if message["role"] == "assistant"]
        if not answers:
            raise Dropped("no assistant turn")
        for message in answers:
            rendered = reasoning and "reasoning_content" in message
            if not message["content"].strip() and not rendered and "tool_calls" not in message:
                raise Dropped("has an empty assistant turn")
        for key, count in ignored.items():
            self.notes[f"ignored key {key}: the chat template does not read it"] += count

    def _marks_beginnings(self) -> bool:
        """Whether the tokens of a text differ between the beginning of a text and a later place in it."""
        alone = self.tokenizer("a", add_special_tokens=False).input_ids
        after_newline = self.tokenizer("\na", add_special_tokens=False).input_ids
        return bool(after_newline[-len(alone) :] != alone)


def special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """The texts of all tokens that the vocabulary flags as special, whether or not the tokenizer gives them a role.

    Llama 3's <|eot_id|> has none: it is neither the eos token nor an additional special token.
    """
    flagged = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return tuple(sorted(text for text in flagged | set(tokenizer.all_special_tokens) if text.strip()))


def end_tokens(tokenizer: Any) -> set[int]:
    """The ids of the tokens that end a text: the end-of-sequence token, and that of the chat template's turns."""
    return {token for token in (tokenizer.eos_token_id, end_of_turn(tokenizer)) if token is not None}


def end_of_turn(tokenizer: Any) -> int | None:
    """The id of the token with which the chat template ends an assistant turn, None if it uses none.

    A token that also opens a turn is not counted: the model could not answer.
    """
    if not tokenizer.chat_template:
        return None
    messages = shapes.conversation([("user", "?"), ("assistant", "!")]).messages
    try:
        with limits("model"):
            template = ChatTemplates(tokenizer).of([])
            prompt = template.render(messages[:1], [], prompt=True, place="model")
            whole = template.render(messages, [], prompt=False, place="model").rstrip()
            asks = template.render(messages[:1], [], prompt=False, place="model")
    except (Dropped, UserError):
        return None
    ends = [text for text in special_tokens(tokenizer) if whole.endswith(text) and text not in prompt[len(asks) :]]
    return int(tokenizer.convert_tokens_to_ids(max(ends, key=len))) if ends else None


def _plain(messages: list[Message], trained: list[int]) -> list[Segment]:
    """Render a conversation for a tokenizer without a chat template."""
    segments = []
    for index, message in enumerate(messages):
        answer = index in trained
        segments.append(Segment(TURN_TEMPLATE.format(role=message["role"].capitalize()), trained=False))
        segments.append(Segment(message["content"], trained=answer, ends=answer))
        segments.append(Segment("\n\n", trained=False))
    return segments


def _check_unicode(text: str) -> None:
    """Raise Dropped for text with half a surrogate pair (from truncated JSON), which a tokenizer cannot encode."""
    if has_surrogate(text):
        raise Dropped("is not valid Unicode")
