"""Render a conversation with a chat template, with a loss on what the assistant generates.

A turn is trained as it is generated: after the template's output for the messages before it and a generation prompt.
So its text is what the template's output with the turn adds to that prompt. Most templates only append, and one example
holds the whole conversation. Some rewrite history (Qwen3 and DeepSeek drop earlier thoughts, gpt-oss ends the last turn
with another token); then each turn is an example of its own, as it is generated.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol

from llama_lora.data.columns import Dropped
from llama_lora.data.messages import Message

LONG = 24  # messages from which a conversation is rendered in windows: rendering all before each turn is quadratic
MOST_CHARACTERS = 2**28  # of the prompts of one conversation, rendered in full for each turn
CLOSED_THOUGHT = re.compile(r"</[^<>\s]*think[^<>\s]*>")
WORD = re.compile(r"\w+")
OPENED_THOUGHT = re.compile(r"<([^<>\s]*think[^<>\s]*)>\s*$")  # at the end of a generation prompt


class Segment(NamedTuple):
    """A piece of a rendered example. ``ends`` appends the end-of-sequence token."""

    text: str
    trained: bool
    ends: bool = False


@dataclass(frozen=True)
class RenderedExample:
    """The text of one example. ``begins``: the tokens that the tokenizer puts before a text come first."""

    segments: tuple[Segment, ...]
    begins: bool


class Turn(NamedTuple):
    """An assistant's turn: the text that asks for it, its own text, and what the template writes after its end."""

    prompt: str
    answer: str
    rest: str
    ends: bool  # the template does not end the turn, so an end-of-sequence token has to

    @property
    def whole(self) -> str:
        return self.prompt + self.answer + self.rest


class Render(Protocol):
    """Renders messages with a chat template, with a generation prompt after them if ``prompt``."""

    def __call__(self, messages: list[Message], *, prompt: bool = False) -> str: ...


class TurnRenderer:
    """Renders conversations.

    ``end_tokens``: texts of the tokens that can end a turn. ``boundaries``: those of tokens that take no white space
    before them, so that the text before such a token can be tokenized on its own.
    """

    def __init__(self, end_tokens: Sequence[str], boundaries: Sequence[str]) -> None:
        self._end_tokens = tuple(end_tokens)
        self._boundaries = tuple(boundaries)

    def examples(self, render: Render, messages: list[Message], trained: list[int]) -> list[list[Segment]]:
        """Render a conversation with a loss on the messages with the indices ``trained``.

        Returns the segments of one example, or of one for each index if the template rewrites history. Raises Dropped
        if a turn does not continue its generation prompt.
        """
        if len(messages) >= LONG and len(trained) > 1:
            examples = self._in_windows(render, messages, trained)
            if examples:
                return examples
        turns: list[Turn] = []
        size = 0
        for index in trained:
            turns.append(self._turn(render, messages[: index + 1]))
            size += len(turns[-1].prompt)
            _check_size(size)
        appended = all(turn.prompt.startswith(before.whole) for before, turn in pairwise(turns))
        if not appended:
            return [_segments([turn]) for turn in turns]
        done = [0] + [len(turn.prompt) + len(turn.answer) for turn in turns]
        return [
            _segments([turn._replace(prompt=turn.prompt[start:]) for start, turn in zip(done, turns, strict=False)])
        ]

    def is_ended(self, text: str) -> bool:
        """Whether a text ends with an end token, apart from white space after it."""
        return text.rstrip().endswith(self._end_tokens)

    def _turn(self, render: Render, messages: list[Message]) -> Turn:
        """The last message of ``messages`` as the assistant's turn after those before it."""
        prompt = render(messages[:-1], prompt=True)
        text = _continuation(prompt, render(messages), messages[-1])
        if not _has_answer(self._without_end(text), messages[-1]):
            raise Dropped("the chat template renders an assistant turn without its content")
        if not self.is_ended(text):
            return Turn(prompt, text, "", ends=True)
        answer = text.rstrip()
        return Turn(prompt, answer, text[len(answer) :], ends=False)

    def _without_end(self, text: str) -> str:
        """A text without the end token at its end."""
        text = text.rstrip()
        ends = [token for token in self._end_tokens if text.endswith(token)]
        return text.removesuffix(max(ends, key=len)) if ends else text

    def _in_windows(self, render: Render, messages: list[Message], trained: list[int]) -> list[list[Segment]] | None:
        """Render a long conversation in linear time. None if this does not give what a rendering in full gives.

        The template sees a window: the messages before the first assistant turn, and the last few before the turn in
        question. What it writes for the messages that one window has more than the one before is put together, and
        compared with a rendering in full at the middle and at the end of the conversation.
        """
        assistants = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        head = messages[: assistants[0]]
        grown: list[str] = []  # what each turn's history has more than the history of the turn before
        turns: list[Turn] = []  # with the generation prompt alone as the prompt
        try:
            for number, index in enumerate(trained):
                earlier = trained[number - 1] if number else None
                history_before = ""
                start = len(head)
                if earlier is not None:
                    start = assistants[max(bisect.bisect_left(assistants, earlier) - 1, 0)]
                    history_before = render(head + messages[start:earlier])
                history = render(head + messages[start:index])
                turn = self._turn(render, head + messages[start : index + 1])
                if not history.startswith(history_before) or not turn.prompt.startswith(history):
                    return None
                grown.append(history[len(history_before) :])
                turns.append(turn._replace(prompt=turn.prompt[len(history) :]))
            for number in (len(trained) // 2, len(trained) - 1):
                turn = turns[number]
                in_full = self._turn(render, messages[: trained[number] + 1])
                if in_full != turn._replace(prompt="".join(grown[: number + 1]) + turn.prompt):
                    return None
        except Dropped:  # a template that does not accept the messages of a window
            return None
        if all(more.startswith(turn.whole) for turn, more in zip(turns, grown[1:], strict=False)):
            prompts = [grown[0]]
            prompts += [
                more[len(turn.prompt) + len(turn.answer) :] for turn, more in zip(turns, grown[1:], strict=False)
            ]
            joined = [turn._replace(prompt=more + turn.prompt) for more, turn in zip(prompts, turns, strict=True)]
            return [_segments(joined)]
        return self._rewritten(grown, turns)

    def _rewritten(self, grown: list[str], turns: list[Turn]) -> list[list[Segment]]:
        """An example for each turn, with the history before it.

        The histories share segments, so that the caller can tokenize each only once. They are cut before special
        tokens, where a tokenizer cuts a text in any case.
        """
        examples: list[list[Segment]] = []
        history: list[Segment] = []
        size = 0
        for more, turn in zip(grown, turns, strict=True):
            history = self._appended(history, more)
            size += sum(len(segment.text) for segment in history)
            _check_size(size)
            prompt = self._appended(history, turn.prompt)
            examples.append([*prompt, *_segments([turn])[1:]])
        return examples

    def _appended(self, segments: list[Segment], text: str) -> list[Segment]:
        """Untrained segments and more text: a segment of its own if it begins with a special token."""
        if segments and not text.startswith(self._boundaries):
            return [*segments[:-1], Segment(segments[-1].text + text, trained=False)]
        return [*segments, Segment(text, trained=False)]


def _continuation(prompt: str, text: str, message: Message) -> str:
    """What a turn adds to its generation prompt. ``text``: the template's output with the turn."""
    if text.startswith(prompt):
        return text[len(prompt) :]
    opened = OPENED_THOUGHT.search(prompt)
    if opened is None or not text.startswith(prompt[: opened.start()]):
        raise Dropped("the chat template renders an assistant turn that does not continue its generation prompt")
    # The prompt begins a thought that the template leaves out of the turn, or begins with other white space.
    begin, end = opened[0].rstrip(), f"</{opened[1]}>"
    turn = text[opened.start() :]
    if end in turn:
        return turn.removeprefix(begin).lstrip("\n")
    content = (message["content"] or "").strip()
    thought = message.get("reasoning_content", content.removeprefix(begin).partition(end)[0] if end in content else "")
    answer = turn.lstrip("\n")
    return f"{thought.strip()}\n{end}\n\n{answer}"


def _has_answer(text: str, message: Message) -> bool:
    """Whether the text of a turn has the message's content, as far as that can be told.

    Templates trim it, render thoughts elsewhere, or only the tool calls. So the longest word after a thought is enough.
    """
    content = message["content"] or ""
    answer = CLOSED_THOUGHT.split(content)[-1].strip() or content.strip()
    if not answer or "tool_calls" in message:
        return True
    return max(WORD.findall(answer), key=len, default=answer) in text


def _segments(turns: Sequence[Turn]) -> list[Segment]:
    """The segments of an example. Each prompt has what the template writes after the end of the turn before it."""
    segments = []
    for turn in turns:
        segments.append(Segment(turn.prompt, trained=False))
        segments.append(Segment(turn.answer, trained=True, ends=turn.ends))
    return [*segments, Segment(turns[-1].rest, trained=False)]


def _check_size(characters: int) -> None:
    if characters > MOST_CHARACTERS:
        raise Dropped("is too long for a chat template that rewrites history")
