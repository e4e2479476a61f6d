"""Checks of tokenized rows against the model: token ids that it has, and answers that end."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genvalues.common.errors import UserError
from llama_lora.data.tokens import IGNORED

if TYPE_CHECKING:
    from datasets import Dataset

Row = dict[str, Any]


def check_vocabulary(rows: Dataset, tokenizer: Any, vocabulary: int) -> None:
    """Raise UserError if any row has a token id that the model has no embedding for."""
    import pyarrow.compute

    largest = pyarrow.compute.max(pyarrow.compute.list_flatten(rows.data.column("input_ids"))).as_py()
    if largest is not None and largest >= vocabulary:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise UserError(
            f"the rows contain token {largest} ({token}), but the model's vocabulary has {vocabulary} tokens",
            where="model",
            fix="Use the model's own tokenizer, or a model whose embeddings were resized for this one.",
        )


def check_ends(rows: Sequence[Row], tokenizer: Any, stops: set[int], max_length: int) -> None:
    """Raise UserError if no answer in the rows ends with a token at which the model stops to generate.

    Answers that were truncated to ``max_length`` have no end and are not counted.
    """
    ends = Counter(end for row in rows for end in answer_ends(row, max_length))
    if not ends or stops & ends.keys():
        return
    end, _ = ends.most_common(1)[0]
    raise UserError(
        f"the model is trained to end an answer with token {end} ({tokenizer.convert_ids_to_tokens(end)}), but it "
        f"stops only at {', '.join(f'{stop} ({tokenizer.convert_ids_to_tokens(stop)})' for stop in sorted(stops))}: it "
        "would never stop",
        where="model",
        fix=f"Have the chat template end an answer with {tokenizer.eos_token}, or add {end} to eos_token_id in the "
        "model's generation_config.json.",
    )


def answer_ends(row: Row, max_length: int) -> Iterator[int]:
    """The last token of each answer (run of trained tokens) in a row."""
    labels, lengths, end = row["labels"], row["lengths"], 0
    for length in lengths:
        start, end = end, end + length
        for index in range(start, end):
            ends_run = index + 1 == end or labels[index + 1] == IGNORED
            truncated = index + 1 == end and length >= max_length
            if labels[index] != IGNORED and ends_run and not truncated:
                yield labels[index]


def stop_tokens(model: Path, tokenizer: Any) -> set[int]:
    """The token ids at which generation stops: those of the model's generation config, and the tokenizer's."""
    stops = {tokenizer.eos_token_id}
    for name in ("generation_config.json", "config.json"):
        if (model / name).is_file():
            found = json.loads((model / name).read_text(encoding="utf-8")).get("eos_token_id")
            if found is not None:
                return stops | set(found if isinstance(found, list) else [found])
    return stops


def trained_window(row: Row, length: int) -> Row:
    """The part of a row up to its last trained token, at most ``length`` tokens."""
    end = max(index for index, label in enumerate(row["labels"]) if label != IGNORED) + 1
    start = max(0, end - length)
    lengths, done = [], 0
    for example in row["lengths"]:
        lengths.append(min(end, done + example) - max(start, done))
        done += example
    return {
        "input_ids": row["input_ids"][start:end],
        "labels": row["labels"][start:end],
        "lengths": [each for each in lengths if each > 0],
    }
