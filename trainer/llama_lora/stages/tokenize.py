"""Copy the model to the workspace, and convert the dataset to packed token rows with a data report."""

from __future__ import annotations

import json
import logging
import random
from array import array
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genvalues.common import files
from genvalues.common.errors import UserError
from llama_lora import backends
from llama_lora.config import RunConfig, Training
from llama_lora.data.dataset_readers import read_rows
from llama_lora.data.packing import PackedRow, pack
from llama_lora.data.rendering import Dropped, Renderer
from llama_lora.data.resolve import ResolvedSources
from llama_lora.data.shared_folders import make_once
from llama_lora.data.snapshot import take_snapshot
from llama_lora.data.tokens import IGNORED, Example, ExampleTokenizer
from llama_lora.progress import track
from llama_lora.stage import Declaration, Stage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

SAMPLE_ROWS = 3  # rows that the report shows with their loss mask


def tokenize(stage: Stage) -> None:
    """Take the model snapshot, then make the dataset folder if no other run has made it."""
    assert stage.sources is not None and stage.fingerprint is not None
    model = take_snapshot(stage.config.model, stage.sources.model, stage.paths.models)
    backends.get(stage.config.backend).check(stage.config, model)  # before any Trainium node is requested
    dataset = stage.paths.datasets / stage.fingerprint[:16]
    with make_once(dataset) as missing:
        if missing:
            with files.whole_folder(dataset) as folder:
                write_dataset(stage.config, stage.sources, load_tokenizer(model), folder)
    report = json.loads((dataset / "report.json").read_text(encoding="utf-8"))
    stage.facts = {
        "model": str(model.relative_to(stage.paths.workspace)),
        "dataset": str(dataset.relative_to(stage.paths.workspace)),
    }
    stage.finish([model, dataset])
    _log_report(report, dataset)


STAGE = Declaration(
    name="tokenize",
    version=1,
    summary="Copy the model, and tokenize, split and pack the rows; writes a data report.",
    reads_sources=True,
    reads=lambda config: {
        "dataset": config.dataset.model_dump(include={"config", "split", "format", "columns", "eval_fraction"}),
        "kind": Path(config.dataset.source).suffix,  # the same bytes give other rows as .txt than as .jsonl
        "training": config.training.model_dump(include={"max_sequence_length", "packing", "seed"}),
    },
    run=tokenize,
)


def load_tokenizer(model: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder. Raises UserError if transformers cannot."""
    from llama_lora import library_versions

    try:
        tokenizer: PreTrainedTokenizerBase = library_versions.load_tokenizer(model)
        return tokenizer
    except (OSError, ValueError) as error:
        raise UserError(f"transformers cannot load the tokenizer: {error}", where=str(model)) from None


def split(examples: Sequence[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Split into (train, held out): a seeded draw of round(fraction x rows) examples, before packing.

    The held-out examples keep the order of the draw, so that the first few are a fair sample too.
    """
    drawn = random.Random(seed).sample(range(len(examples)), round(fraction * len(examples)))
    held_out = set(drawn)
    return [example for index, example in enumerate(examples) if index not in held_out], [examples[i] for i in drawn]


def rows_of(examples: Sequence[Example], training: Training) -> list[PackedRow]:
    """Make the training rows: packed, or one example each."""
    if training.packing:
        return pack(examples, training.max_sequence_length)
    return [PackedRow((example,)) for example in examples]


def write_dataset(
    config: RunConfig, sources: ResolvedSources, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Write train/, eval/ (Arrow) and report.json. Raises UserError if no row is left to train on or to hold out."""
    renderer = Renderer(tokenizer, config.dataset.format, config.dataset.columns.named())
    examples, report = _examples(config, sources, renderer, ExampleTokenizer(tokenizer))
    train, held_out = split(examples, config.dataset.eval_fraction, config.training.seed)
    if not train:
        raise UserError("no rows left to train on", where="dataset", fix=f"Dropped: {report['dropped']}.")
    if config.evaluation.enabled and not held_out:
        raise UserError(
            f"none of {len(examples)} rows is held out, so the evaluation has no rows",
            where="dataset.evalFraction",
            fix=f"Raise it to {1 / len(examples):.2g} or more, or set evaluation.enabled: false in the values.",
        )
    rows = rows_of(train, config.training)
    report["train"] = _counts(train, rows, config.training.max_sequence_length)
    report["eval"] = {"examples": len(held_out), "tokens": sum(len(example.input_ids) for example in held_out)}
    report["shown"] = [_masked_text(example, tokenizer) for example in train[:SAMPLE_ROWS]]
    _store(rows, folder / "train")
    _store([PackedRow((example,)) for example in held_out], folder / "eval")
    files.write_json(folder / "report.json", report)


def _examples(
    config: RunConfig, sources: ResolvedSources, renderer: Renderer, tokenizer: ExampleTokenizer
) -> tuple[list[Example], dict[str, Any]]:
    """Render every row; return the examples and the counts for the report."""
    examples: list[Example] = []
    dropped: Counter[str] = Counter()
    truncated = 0
    found: set[str] = set()
    for row in track(read_rows(config.dataset, sources), "row"):
        found.update(row.values)
        try:
            for rendered in renderer.render(row):
                example, cut = tokenizer.example(rendered, config.training.max_sequence_length)
                examples.append(example)
                truncated += cut
        except Dropped as reason:
            dropped[str(reason)] += 1
    for key, column in config.dataset.columns.named().items():
        if found and column not in found:  # a misspelled optional column would be ignored in every row
            raise UserError(
                f"no row has a column {column!r}",
                where=f"dataset.columns.{key}",
                fix=f"Available columns: {', '.join(sorted(found))}.",
            )
    return examples, {
        "source": config.dataset.source,
        "revision": sources.dataset.revision,
        "rendered_with": renderer.template(),
        "date_in_template": renderer.date(),
        "rows_read": len(examples) + sum(dropped.values()),
        "kept": len(examples),
        "dropped": dict(dropped),
        "truncated": truncated,
    }


def _counts(examples: Sequence[Example], rows: Sequence[PackedRow], max_length: int) -> dict[str, Any]:
    tokens = sum(len(example.input_ids) for example in examples)
    trained = sum(example.trained_tokens for example in examples)
    return {
        "examples": len(examples),
        "tokens": tokens,
        "trained_tokens": trained,
        "mask_share": round(1 - trained / tokens, 4),
        "rows": len(rows),
        "packing_efficiency": round(tokens / (len(rows) * max_length), 4),
        "longest_example": max(len(example.input_ids) for example in examples),
    }


def _masked_text(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Decode an example in pieces, split where the loss mask changes."""
    pieces: list[tuple[bool, list[int]]] = []
    for token, label in zip(example.input_ids, example.labels, strict=True):
        if not pieces or pieces[-1][0] != (label != IGNORED):
            pieces.append((label != IGNORED, []))
        pieces[-1][1].append(token)
    return [{"trained": trained, "text": tokenizer.decode(ids)} for trained, ids in pieces]


def _store(rows: Sequence[PackedRow], folder: Path) -> None:
    """Save rows as an Arrow dataset with the columns input_ids, labels and lengths (int32 lists), one at a time."""
    import pyarrow
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    columns = {}
    for name in ("input_ids", "labels", "lengths"):
        values, offsets = array("i"), array("i", [0])
        for row in rows:
            values.extend(getattr(row, name))
            offsets.append(len(values))
        columns[name] = pyarrow.ListArray.from_arrays(_int32(offsets), _int32(values))
    Dataset(pyarrow.table(columns)).save_to_disk(folder)


def _int32(numbers: array[int]) -> Any:
    """Wrap the memory of ``numbers`` in an Arrow array."""
    import pyarrow

    return pyarrow.Array.from_buffers(pyarrow.int32(), len(numbers), [None, pyarrow.py_buffer(numbers)])


def _log_report(report: dict[str, Any], dataset: Path) -> None:
    train = report["train"]
    log.info(f"rows: {report['rows_read']} read, {report['kept']} kept, {report['eval']['examples']} of them held out")
    for reason, count in report["dropped"].items():
        log.info(f"rows dropped: {count} ({reason})")
    if report["truncated"]:
        log.info(f"rows truncated to maxSequenceLength: {report['truncated']}")
    log.info(
        f"train: {train['tokens']} tokens, {train['trained_tokens']} of them with loss, in {train['rows']} rows "
        f"({train['packing_efficiency']:.1%} full)"
    )
    log.info(f"report: {dataset / 'report.json'}")
