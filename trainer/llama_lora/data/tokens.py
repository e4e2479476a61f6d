"""Tokenize rendered examples into token ids and labels.

Segments are tokenized separately, as a prompt is at generation time, so that no token spans the border between a prompt
and its answer.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Any

from llama_lora.data.rendering import Dropped, RenderedExample

IGNORED = -100  # the label of a token without loss, in torch and transformers


@dataclass(frozen=True)
class Example:
    """One tokenized row. ``input_ids`` and ``labels`` have the same length; tokens without loss have label IGNORED.

    Arrays of int32 rather than lists: a million tokens take 8 MB, not 36.
    """

    input_ids: array[int]
    labels: array[int]

    @property
    def trained_tokens(self) -> int:
        return sum(label != IGNORED for label in self.labels)


class ExampleTokenizer:
    """Tokenizes rendered examples with one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._beginning = beginning(tokenizer)

    def example(self, rendered: RenderedExample, max_length: int) -> tuple[Example, bool]:
        """Tokenize an example, truncated to ``max_length``, and return whether it was truncated.

        Raises Dropped if no token has a loss.
        """
        ids = [*self._beginning] if rendered.begins else []
        labels = [IGNORED] * len(ids)
        for text, trained, ends in rendered.segments:
            piece = self.tokenizer(text, add_special_tokens=False).input_ids
            if ends:
                piece = [*piece, self.tokenizer.eos_token_id]
            ids += piece
            labels += piece if trained else [IGNORED] * len(piece)
        labels[:1] = [IGNORED]  # the first token cannot be predicted from anything
        example = Example(array("i", ids[:max_length]), array("i", labels[:max_length]))
        if not example.trained_tokens:
            raise Dropped("prompt fills maxSequenceLength" if len(ids) > max_length else "no token to train on")
        return example, len(ids) > max_length


def beginning(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer puts before a text: the beginning-of-sequence token, or none."""
    bare = tokenizer("a", add_special_tokens=False).input_ids
    ids: list[int] = tokenizer("a").input_ids
    return ids[: ids.index(bare[0])]
