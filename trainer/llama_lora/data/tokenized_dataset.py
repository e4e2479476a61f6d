"""Make a dataset's folder: tokenized rows to train on and to hold out, packed, with the data report."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from genvalues.common import files
from genvalues.common.errors import UserError
from llama_lora.config import RunConfig
from llama_lora.data import data_report, token_store
from llama_lora.data.columns import listed
from llama_lora.data.dataset_readers import BadRows, read_held_out, read_rows
from llama_lora.data.packing import one_per_row, pack
from llama_lora.data.parts import Part, held_out_part, training_parts
from llama_lora.data.preparation import UNREADABLE, Counts, RowTokenizer, prepare, renderers_of
from llama_lora.data.resolve import ResolvedSources
from llama_lora.data.selection import Kept, Selection, select
from llama_lora.data.token_store import TokenStore
from llama_lora.environment import available_cores
from llama_lora.report.html import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REASONS = 3  # that an error names
SAMPLE_ROWS = 3  # rows that the report shows with their loss mask


def tokenize_dataset(
    config: RunConfig, sources: ResolvedSources, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Write train/, eval/ (Arrow), report.json and report.html.

    Raises UserError if no row is left to train on or to hold out, or if more rows are dropped than dataset.maxDropped.
    """
    dataset, training = config.dataset, config.training
    parts, held_out = training_parts(dataset), held_out_part(dataset)
    renderers = renderers_of(dataset, tokenizer)
    bad_rows = BadRows(skip=dataset.on_bad_row == "skip")
    with TokenStore(folder / "examples") as store:
        kept = Kept()
        work = RowTokenizer(renderers, tokenizer, dataset, training)
        cores = available_cores()
        counts = prepare(read_rows(dataset, sources, bad_rows), work, store, kept, bad_rows, cores, held_out=False)
        own_rows = read_held_out(dataset, sources, bad_rows)
        counts.add(prepare(own_rows, work, store, kept, bad_rows, cores, held_out=True))
        bad_rows.raise_errors()
        counts.skip(bad_rows)
        check_dropped(counts, dataset.max_dropped)
        for part in parts:
            check_columns(part, counts)
        store.finish()
        selection = select(
            kept,
            {number: part.weight for number, part in enumerate(parts)},
            fraction=dataset.eval_fraction,
            seed=training.seed,
            grouped=bool(dataset.group_column),
            eval_source=held_out is not None,
        )
        check_selection(config, counts, selection)
        lengths = numpy.asarray(store.lengths)[selection.train]
        packing = pack(lengths, training.max_sequence_length) if training.packing else one_per_row(len(lengths))
        report = {
            "source": dataset.source,
            "revision": sources.dataset.revision,
            **data_report.report_of(counts, renderers),
            "duplicates": selection.duplicates,
            "in_train_and_eval": selection.in_both,
            "train": _counts(store, selection.train, len(packing), training.max_sequence_length),
            "eval": {
                "rows": selection.held_out_rows,
                "examples": len(selection.held_out),
                "tokens": sum(store.lengths[number] for number in selection.held_out),
            },
            "shown": [
                data_report.masked_text(store.example(number), tokenizer) for number in selection.train[:SAMPLE_ROWS]
            ],
        }
        token_store.write_dataset(store, (selection.train[row] for row in packing), folder / "train")
        token_store.write_dataset(store, ([number] for number in selection.held_out), folder / "eval")
    files.write_json(folder / "report.json", report)
    files.write_bytes(folder / "report.html", encode(data_report.page(report)))


def check_columns(part: Part, counts: Counts) -> None:
    """Raise UserError for a column that no row has: a misspelled optional one would be ignored in every row."""
    available = counts.columns.get(part.name)
    for key, column in part.columns.items():
        if available and key not in counts.named[part.name]:
            raise UserError(
                f"no row has a column {column!r}",
                where=f"{part.key}.columns.{key}",
                fix=f"Available columns: {listed(sorted(available))}.",
            )


def check_dropped(counts: Counts, most: float) -> None:
    """Raise UserError if a greater share of the rows than ``most`` is dropped, or all."""
    counts.check_any()
    if counts.dropped_rows <= most * counts.rows and counts.dropped_rows < counts.rows:
        return
    reasons = ", ".join(f"{count} ({reason})" for reason, count in counts.dropped.most_common(REASONS))
    [(most_common, _)] = counts.dropped.most_common(1)
    first = counts.dropped_shown[most_common][0]
    reasons += f"; the first is {first['place']}" + (f": {first['row']}" if most_common == UNREADABLE else "")
    if counts.dropped_rows == counts.rows:
        what = f"no rows left to train on: {counts.rows} dropped: {reasons}"
        raise UserError(what, where="dataset", fix="" if most_common == UNREADABLE else "Correct the rows or settings.")
    needed = math.ceil(100 * counts.dropped_rows / counts.rows) / 100
    raise UserError(
        f"{counts.dropped_rows} of {counts.rows} rows are dropped: {reasons}",
        where="dataset.maxDropped",
        fix=f"Correct the rows or the settings, or raise it to {needed:.2f} or more.",
    )


def check_selection(config: RunConfig, counts: Counts, selection: Selection) -> None:
    """Raise UserError if no example is left to train on, or none to evaluate with."""
    kept = counts.rows - counts.dropped_rows
    own_rows, fraction = held_out_part(config.dataset), config.dataset.eval_fraction
    if not len(selection.train) and selection.in_both:
        raise UserError(
            f"no rows left to train on: each of the {selection.in_both} that are not held out repeats one that is",
            where="dataset",
            fix="Remove the duplicates, or hold out other rows: dataset.eval.",
        )
    if not len(selection.train) and selection.held_out_rows < kept:
        raise UserError(
            f"no rows left to train on: the weights draw none of {kept - selection.held_out_rows}",
            where="dataset.weight",
            fix="Raise the weights.",
        )
    if not len(selection.train):
        raise UserError(
            f"no rows left to train on: all {kept} are held out", where="dataset", fix="Lower dataset.evalFraction."
        )
    measures, evaluates = config.training.eval_steps is not None, config.evaluation.enabled
    needs_held_out = measures or evaluates
    removals = ["remove training.evalSteps"] * measures + ["set evaluation.enabled: false in the values"] * evaluates
    otherwise = " and ".join(removals)
    if needs_held_out and not len(selection.held_out) and config.dataset.group_column and fraction:
        raise UserError(
            f"has the same value in all {kept} rows, so no row can be held out",
            where="dataset.groupColumn",
            fix=f"Name another column, or {otherwise}.",
        )
    if needs_held_out and not len(selection.held_out):
        raise UserError(
            f"none of {kept} rows is held out, so the evaluation has no rows",
            where="dataset.eval" if own_rows else "dataset.evalFraction",
            fix=("Name a source with rows" if own_rows else f"Raise it to {1 / kept:.2g} or more")
            + f", or {otherwise}.",
        )


def _counts(store: TokenStore, train: Any, rows: int, max_length: int) -> dict[str, Any]:
    tokens = trained = longest = 0
    for number in train.tolist():
        length = store.lengths[number]
        tokens += length
        longest = max(longest, length)
        trained += store.trained_tokens(number)
    return {
        "examples": len(train),
        "tokens": tokens,
        "trained_tokens": trained,
        "mask_share": round(1 - trained / tokens, 4),
        "rows": rows,
        "packing_efficiency": round(tokens / (rows * max_length), 4),
        "longest_example": longest,
    }
