"""Checks of tokenized rows against the model: token ids that it has, and answers that end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genvalues.common import files
from genvalues.common.errors import UserError
from llama_lora import library_versions
from llama_lora.data.rendering import end_tokens
from llama_lora.data.tokens import IGNORED
from llama_lora.model_files import CONFIG, GENERATION_CONFIG, has_tokenizer, read_model_json

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
    """The token ids at which generation with the merged model stops; see ``record_stop_tokens``."""
    return set(_configured_stops(model)) | end_tokens(tokenizer)


def record_stop_tokens(model: Path, base: Path) -> None:
    """Add the tokens that the training ends answers with to the model's generation config, if it lacks any.

    They are the tokenizer's end-of-sequence token and the chat template's end of a turn. A base model lacks the latter:
    Qwen2.5 stops at <|endoftext|>, and its template ends a turn with <|im_end|>. ``model`` is a copy of ``base`` that
    does not outlive an error, so errors name the files of ``base``.
    """
    if not has_tokenizer(model):
        return  # merge takes it, too
    try:
        own = end_tokens(library_versions.load_tokenizer(model))
    except Exception:
        return
    try:
        stops = _configured_stops(model)
    except UserError as error:
        raise UserError(error.what, where=str(base / Path(error.where).name), fix=error.fix) from None
    if own <= set(stops):
        return
    file = model / GENERATION_CONFIG
    names = ("bos_token_id", "pad_token_id")
    settings = read_model_json(file) or {name: read_model_json(model / CONFIG).get(name) for name in names}
    settings["eos_token_id"] = [*stops, *sorted(own - set(stops))]
    files.write_json(file, {name: value for name, value in settings.items() if value is not None})


def _configured_stops(model: Path) -> list[int]:
    """The end-of-sequence tokens of the generation config, else those of the model's config, as transformers does."""
    for name in (GENERATION_CONFIG, CONFIG):
        found = read_model_json(model / name).get("eos_token_id")
        if found is not None:
            ids = list(found) if isinstance(found, list) else [found]
            if not all(type(each) is int for each in ids):
                raise UserError(
                    "eos_token_id is no token id", where=str(model / name), fix="Write a number or a list of numbers."
                )
            return ids
    return []


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
