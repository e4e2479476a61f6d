"""Tokenize texts word by word, with a cache of the words, where the result is provably that of the whole text.

A byte-level tokenizer first cuts out its added tokens, then splits the rest with a regular expression, and only then
merges bytes, within each piece. The expressions below match no piece that goes on from a character that is not a space
to a space, and look ahead only from a space. So a text may be cut before each single space between two characters that
are not spaces: " b" is tokenized in "a b c" as it is alone. Text repeats its words, and looking one up is several times
faster than tokenizing it.
"""

from __future__ import annotations

import json
import re
from array import array
from itertools import chain
from typing import Any

MOST_WORDS = 100_000  # about 20 MB; the cache starts again when it is full
LONGEST_WORD = 64  # characters; longer ones hardly repeat

# Python's \s has all characters of Unicode's White_Space, which is the \s of the expressions, and a few more.
BEFORE_A_WORD = re.compile(r"(?= \S)(?<=\S)")

# Of the pre-tokenizer Split, as in tokenizer.json: those of Llama 3, Qwen2 (and 2.5, 3), GPT-4o and gpt-oss, GPT-2.
# That of the pre-tokenizer ByteLevel is GPT-2's too.
EXPRESSIONS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
}


class WordCache:
    """Token ids of texts, without the tokens that the tokenizer puts before a text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._fast = getattr(tokenizer, "backend_tokenizer", None)
        tokenizer(["a"])  # transformers turns off the truncation and padding of tokenizer.json
        self._by_words = tokenizes_by_words(tokenizer)
        self._cache: dict[str, bytes] = {}  # the int32 ids: as bytes, a text's words are joined fast

    def __call__(self, texts: list[str]) -> list[array[int]]:
        """Tokenize texts, with at most one call of the tokenizer."""
        if not self._by_words:
            return self._tokenize(texts)
        split = [BEFORE_A_WORD.split(text) for text in texts]
        if len(self._cache) > MOST_WORDS:
            self._cache.clear()
        known = self._cache
        missing = [word for word in dict.fromkeys(chain.from_iterable(split)) if word not in known]
        known.update(zip(missing, (ids.tobytes() for ids in self._tokenize(missing)), strict=True))
        ids = [array("i", b"".join([known[word] for word in words])) for words in split]
        for word in missing:
            if len(word) > LONGEST_WORD:
                del known[word]
        return ids

    def _tokenize(self, texts: list[str]) -> list[array[int]]:
        """The int32 ids of texts, if possible without the offsets that transformers asks for: twice as fast."""
        if not texts:
            return []
        if self._fast is None:
            return [array("i", ids) for ids in self._tokenizer(texts, add_special_tokens=False).input_ids]
        return [array("i", encoded.ids) for encoded in self._fast.encode_batch_fast(texts, add_special_tokens=False)]


def tokenizes_by_words(tokenizer: Any) -> bool:
    """Whether a text may be cut before a space without another result: see the module."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None or type(fast.model).__name__ != "BPE" or fast.model.dropout:
        return False
    if fast.normalizer is not None and not _only_composes(_state(fast.normalizer)):
        return False
    if fast.pre_tokenizer is None or not _splits_before_spaces(_state(fast.pre_tokenizer)):
        return False
    return all(
        not (token.lstrip or token.rstrip or token.single_word) and not re.search(r"\s", token.content)
        for token in tokenizer.added_tokens_decoder.values()
    )


def _state(part: Any) -> dict[str, Any]:
    """A part of a tokenizer as in tokenizer.json."""
    state: dict[str, Any] = json.loads(part.__getstate__())
    return state


def _only_composes(state: dict[str, Any]) -> bool:
    """Whether a normalizer is NFC or nothing. A space is a boundary of NFC: it never joins the character before it."""
    if state["type"] == "Sequence":  # transformers 4.57 makes an empty one of a GGUF file
        return all(map(_only_composes, state["normalizers"]))
    return bool(state["type"] == "NFC")


def _splits_before_spaces(state: dict[str, Any]) -> bool:
    kind = state["type"]
    if kind == "Sequence":
        parts = state["pretokenizers"]
        with_regex = [part for part in parts if part["type"] == "Split" or part.get("use_regex")]
        return bool(with_regex) and all(
            _splits_before_spaces(part) or (part["type"] == "ByteLevel" and not part["add_prefix_space"])
            for part in parts
        )
    if kind == "Split":
        return state["behavior"] == "Isolated" and not state["invert"] and state["pattern"].get("Regex") in EXPRESSIONS
    if kind == "ByteLevel":
        return bool(state["use_regex"]) and not state["add_prefix_space"]
    return kind == "Digits"
