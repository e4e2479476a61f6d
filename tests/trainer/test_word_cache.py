"""Texts are tokenized word by word where that is exact: it must give the tokens of the whole text."""

from __future__ import annotations

import functools
import json
from array import array
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llama_lora.data import word_cache
from llama_lora.data.word_cache import EXPRESSIONS, WordCache, tokenizes_by_words

WORDS = [
    "It's a test, isn't it?",
    "we'll see 1234 of 12,345 tests...",
    "naïve café Ünïcode 東京 ٣٤",
    "x = f(a, b)\n    y\n",
]
BYTES_ONLY = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def tokenizer_of(pre_tokenizer: Any, normalizer: Any = None, **added: Any) -> Any:
    """A byte-level BPE with merges of these words, some of which begin with a space."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        WORDS * 3, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens(["<|end|>", "<|start|>"])
    if added:
        tokenizer.add_tokens([AddedToken(**added)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


PRE_TOKENIZERS = {
    **{f"split {index}": [("split", expression)] for index, expression in enumerate(sorted(EXPRESSIONS))},
    "byte level": [("bytes", "")],
    "digits": [("digits", ""), ("bytes", "")],
}


NORMALIZERS = {
    "none": lambda: None,
    "NFC": normalizers.NFC,
    "an empty sequence and NFC": lambda: normalizers.Sequence([normalizers.Sequence([]), normalizers.NFC()]),
}


@functools.cache
def tokenizer(name: str, normalizer: str = "none") -> Any:
    parts = {
        "split": lambda expression: pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(expression), "isolated"), BYTES_ONLY]
        ),
        "bytes": lambda _: pre_tokenizers.ByteLevel(add_prefix_space=False),
        "digits": lambda _: pre_tokenizers.Digits(individual_digits=True),
    }
    made = [parts[kind](expression) for kind, expression in PRE_TOKENIZERS[name]]
    return tokenizer_of(made[0] if len(made) == 1 else pre_tokenizers.Sequence(made), NORMALIZERS[normalizer]())


# What matters to the expressions: kinds of characters, all kinds of whitespace, contractions, special tokens.
PIECES = [
    "a",
    "Bc",
    "é",
    "e\u0301",
    "\u0301",
    "東",
    "1",
    "23",
    "٣",
    "'s",
    "'LL",
    "'",
    ".",
    "/",
    "-_",
    "<|end|>",
    "<|start|>",
]
SPACES = [" ", "  ", "\n", "\r\n", " \n ", "\t", "\u00a0", "\u2003", "\x1c", "\x85", "\u200b"]
texts = st.lists(st.sampled_from([*PIECES, *SPACES, *[" "] * 8]), max_size=14).map("".join)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("name", PRE_TOKENIZERS)
@given(batch=st.lists(texts, max_size=4))
def test_words_give_the_tokens_of_the_whole_text(name: str, normalizer: str, batch: list[str]) -> None:
    whole = tokenizer(name, normalizer)
    cache = WordCache(whole)
    expected = [array("i", whole(text, add_special_tokens=False).input_ids) for text in batch]
    assert cache(batch) == expected and cache(batch) == expected
    assert cache._by_words, "the cache is used"


def test_a_word_is_tokenized_once_and_long_and_many_words_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tokenizer("byte level")
    cache, calls = WordCache(whole), []
    monkeypatch.setattr(cache, "_tokenize", lambda words: calls.append(words) or [array("i", [1])] * len(words))
    cache(["a b b a", "b c"])
    cache(["a b c " + "x" * 100])
    cache(["a"])
    assert [words for words in calls if words] == [["a", " b", " a", "b", " c"], [" " + "x" * 100]]
    assert max(map(len, cache._cache)) <= word_cache.LONGEST_WORD
    monkeypatch.setattr(word_cache, "MOST_WORDS", 3)
    cache(["z"])
    assert list(cache._cache) == ["z"]


def test_the_truncation_and_padding_of_a_tokenizer_are_not_applied() -> None:
    whole = tokenizer_of(pre_tokenizers.ByteLevel(add_prefix_space=False))
    whole.backend_tokenizer.enable_truncation(2)
    whole.backend_tokenizer.enable_padding(length=9)
    [ids] = WordCache(whole)(["xyzzy x"])
    assert whole.decode(ids) == "xyzzy x"


def changed(**options: Any) -> Any:
    return tokenizer_of(pre_tokenizers.ByteLevel(add_prefix_space=False), content="<x>", **options)


def with_a_space_before_every_text() -> Any:
    whole = tokenizer_of(pre_tokenizers.ByteLevel(add_prefix_space=False))
    whole.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # transformers 4 resets it
    return whole


UNFIT = {
    "a space before every text": with_a_space_before_every_text,
    "no expression": lambda: tokenizer_of(BYTES_ONLY),
    "another expression": lambda: tokenizer_of(
        pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\S+ \S+|\s+"), "isolated"), BYTES_ONLY])
    ),
    "merged pieces": lambda: tokenizer_of(
        pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(sorted(EXPRESSIONS)[0]), "merged_with_next"), BYTES_ONLY])
    ),
    "SentencePiece": lambda: tokenizer_of(pre_tokenizers.Metaspace()),
    "another normalizer": lambda: tokenizer_of(pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.Strip()),
    "another one in a sequence": lambda: tokenizer_of(
        pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.Sequence([normalizers.NFC(), normalizers.Strip()])
    ),
    "a token that takes spaces": lambda: changed(lstrip=True),
    "a token of whole words": lambda: changed(single_word=True),
}


@pytest.mark.parametrize("why", UNFIT)
def test_other_tokenizers_get_whole_texts(why: str) -> None:
    unfit = UNFIT[why]()
    assert not tokenizes_by_words(unfit)
    text = "<x> a b <|end|> c"
    assert WordCache(unfit)([text]) == [array("i", unfit(text, add_special_tokens=False).input_ids)]


def test_a_token_with_a_space_is_not_cut() -> None:
    assert tokenizes_by_words(changed()) and not tokenizes_by_words(
        tokenizer_of(pre_tokenizers.ByteLevel(add_prefix_space=False), content="a b")
    )


def test_the_expressions_are_as_in_tokenizer_json() -> None:
    for expression in EXPRESSIONS:
        state = json.loads(pre_tokenizers.Split(Regex(expression), "isolated").__getstate__())
        assert state["pattern"]["Regex"] == expression
