"""Tokenize rendered examples into token ids and labels, and fit them to maxSequenceLength.

Segments are tokenized separately, as a prompt is at generation time, so that no token spans the border between a prompt
and its answer.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from genvalues.common.errors import UserError
from genvalues.common.text import one_line
from llama_lora.data.rendering import Dropped, RenderedExample
from llama_lora.data.word_cache import WordCache

IGNORED = -100  # the label of a token without loss, in torch and transformers

Overlong = Literal["split", "truncate", "drop"]


@dataclass(frozen=True)
class Example:
    """One tokenized example. ``input_ids`` and ``labels`` have the same length; tokens without loss have label IGNORED.

    Arrays of int32 rather than lists: a million tokens take 8 MB, not 36.
    """

    input_ids: array[int]
    labels: array[int]

    @functools.cached_property
    def trained_tokens(self) -> int:
        return len(self.labels) - self.labels.count(IGNORED)


class Fitted(NamedTuple):
    """What becomes of an example: its pieces of at most maxSequenceLength tokens, or none and the reason.

    ``lost`` counts the tokens that are in no piece, ``lost_trained`` those of them that have a loss.
    """

    pieces: list[Example]
    reason: str = ""
    lost: int = 0
    lost_trained: int = 0


class ExampleTokenizer:
    """Tokenizes rendered examples with one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.beginning = beginning(tokenizer)
        self._ids = WordCache(tokenizer)

    def tokenize(self, rendered: Sequence[RenderedExample]) -> list[Example]:
        """Tokenize examples at their full length, with at most one call of the tokenizer for all of them.

        Equal segments are tokenized once: those of a conversation whose history is in many examples, for instance.
        """
        texts = list(dict.fromkeys(segment.text for example in rendered for segment in example.segments))
        try:
            ids = dict(zip(texts, self._ids(texts), strict=True))
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # of Rust: a regular expression that needs too many attempts
                raise
            raise UserError(
                f"the tokenizer fails: {one_line(str(error), 200)}",
                where="model",
                fix="Use another model, or its original tokenizer.json.",
            ) from None
        return [self._joined(example, ids) for example in rendered]

    def example(self, rendered: RenderedExample, max_length: int) -> tuple[Example, bool]:
        """Tokenize an example, truncated to ``max_length``, and return whether it was truncated.

        Raises Dropped if no token has a loss.
        """
        [whole] = self.tokenize([rendered])
        fitted = fit(whole, max_length, "truncate", self.beginning)
        if fitted.reason:
            raise Dropped(fitted.reason)
        return fitted.pieces[0], len(whole.input_ids) > max_length

    def _joined(self, rendered: RenderedExample, found: Mapping[str, array[int]]) -> Example:
        ids = array("i", self.beginning if rendered.begins else [])
        labels = array("i", [IGNORED]) * len(ids)
        for segment in rendered.segments:
            piece = found[segment.text]
            if segment.ends:
                piece = piece + array("i", [self.tokenizer.eos_token_id])
            ids += piece
            labels += piece if segment.trained else array("i", [IGNORED]) * len(piece)
        labels[:1] = array("i", [IGNORED])[: len(labels)]  # the first token cannot be predicted from anything
        return Example(ids, labels)


def fit(example: Example, max_length: int, overlong: Overlong, beginning: Sequence[int]) -> Fitted:
    """Fit an example to ``max_length`` tokens, as dataset.overlong says.

    What is longer only because of tokens without loss at its end is cut there, and nothing is lost.
    """
    length, trained = len(example.input_ids), example.trained_tokens
    if not trained:
        return Fitted([], "no token to train on")
    if length <= max_length:
        return Fitted([example])
    if overlong == "split":
        return Fitted(split_text(example, max_length, beginning))
    first = Example(example.input_ids[:max_length], example.labels[:max_length])
    lost_trained = trained - first.trained_tokens
    if not lost_trained:
        return Fitted([first])
    if overlong == "drop":
        return Fitted([], "longer than maxSequenceLength", length, trained)
    if lost_trained == trained:
        return Fitted([], "prompt fills maxSequenceLength", length, trained)
    return Fitted([first], "", length - max_length, lost_trained)


def split_text(example: Example, max_length: int, beginning: Sequence[int]) -> list[Example]:
    """Split a text into pieces of ``max_length`` tokens, only the last of which may be shorter.

    Every piece begins as a text does (``beginning``), or, for a tokenizer that puts nothing before a text, with the
    last token of the piece before it. These tokens have no loss; every other token is in one piece, with its label.
    """
    ids, labels = example.input_ids, example.labels
    context = array("i", beginning)
    if ids[: len(context)] != context:
        context = array("i")
    ahead = len(context) or 1
    if ahead >= max_length:
        raise UserError(
            f"a piece of {max_length} tokens has no room for text",
            where="training.maxSequenceLength",
            fix=f"Raise it to {ahead + 1} or more.",
        )
    pieces = [Example(ids[:max_length], labels[:max_length])]
    for start in range(max_length, len(ids), max_length - ahead):
        end = start + max_length - ahead
        before = context or ids[start - 1 : start]
        pieces.append(Example(before + ids[start:end], array("i", [IGNORED]) * ahead + labels[start:end]))
    return pieces


def beginning(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer puts before a text: the beginning-of-sequence token, or none."""
    bare = tokenizer("a", add_special_tokens=False).input_ids
    ids: list[int] = tokenizer("a").input_ids
    if not bare or bare[0] not in ids:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path} gives no tokens for the text 'a'",
            where="model",
            fix="Use another model, or correct its tokenizer.json.",
        )
    return ids[: ids.index(bare[0])]
