"""Show the first rows of a dataset as the model sees them, without a run: `llama-lora preview`."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import click
import numpy

from llama_lora.config import RunConfig
from llama_lora.data import data_report
from llama_lora.data.dataset_readers import BadRows, read_part
from llama_lora.data.parts import training_parts
from llama_lora.data.preparation import RowTokenizer, prepare, renderers_of
from llama_lora.data.resolve import dataset_sources
from llama_lora.data.rows import Row
from llama_lora.data.selection import Kept
from llama_lora.data.snapshot import tokenizer_folder
from llama_lora.data.token_store import TokenStore

READ_ROWS = 1000  # of each source: counts over more rows take longer than a glance


def preview(config: RunConfig, rows: int) -> dict[str, Any]:
    """The data report on the first rows of each source, with ``rows`` examples of each and without train and eval.

    Raises UserError if the model's tokenizer or the rows cannot be read, or if there are no rows.
    """
    dataset = config.dataset
    with tempfile.TemporaryDirectory() as name:
        tokenizer = load_tokenizer(config, Path(name))
        renderers = renderers_of(dataset, tokenizer)
        bad_rows, kept = BadRows(skip=dataset.on_bad_row == "skip"), Kept()
        with TokenStore(Path(name) / "examples") as store:
            work = RowTokenizer(renderers, tokenizer, dataset, config.training)
            counts = prepare(first_rows(config, bad_rows), work, store, kept, bad_rows, 1, held_out=False)
            bad_rows.raise_errors()
            counts.skip(bad_rows)
            counts.check_any()
            store.finish()
            return {
                "source": dataset.source,
                **data_report.report_of(counts, renderers),
                "duplicates": kept.duplicates(),
                "tokens": sum(store.lengths),
                "trained_tokens": sum(map(store.trained_tokens, range(len(store.lengths)))),
                "shown": {
                    part.key: [data_report.masked_text(store.example(number), tokenizer) for number in numbers[:rows]]
                    for part, numbers in zip(training_parts(dataset), examples_of(kept, len(renderers)), strict=True)
                },
            }


def examples_of(kept: Kept, sources: int) -> list[list[int]]:
    """The numbers of the examples of each source."""
    of_text = numpy.repeat(kept.sources, kept.texts)
    of_example = numpy.repeat(of_text, kept.pieces)
    return [numpy.flatnonzero(of_example == source).tolist() for source in range(sources)]


def load_tokenizer(config: RunConfig, folder: Path) -> Any:
    """Load the tokenizer of the run's model; ``folder`` is for the tokenizer of a GGUF file."""
    from llama_lora.stages.tokenize import load_tokenizer

    return load_tokenizer(tokenizer_folder(config.model, folder))


def first_rows(config: RunConfig, bad_rows: BadRows) -> Iterator[Row]:
    """The first rows of dataset.source and of each of dataset.additional."""
    sources = dataset_sources(config)
    for part in training_parts(config.dataset):
        yield from islice(read_part(part, sources.of(part), bad_rows), READ_ROWS)


def lines(report: dict[str, Any], *, color: bool) -> Iterator[str]:
    """The preview as text. Without color, what is trained is between {+ and +}."""
    for key, examples in report["shown"].items():
        for number, pieces in enumerate(examples, start=1):
            yield heading(f"example {number}" + (f" of {key}" if len(report["shown"]) > 1 else ""), color)
            yield marked(pieces, color=color)
    yield heading(f"report on the first {READ_ROWS:,} rows{' of each source' * (len(report['shown']) > 1)}", color)
    meaning = click.style("green", fg="green") if color else "between {+ and +}"
    yield f"trained: {meaning}; rendered with {report['template']['name']}"
    yield from (printable(line) for line in data_report.lines(report))
    for reason, rows in report["dropped_shown"].items():
        yield from (f"  {printable(reason)}: {printable(row['place'])}" for row in rows)
    bins = ", ".join(f"{each['examples']} up to {each['up_to']}" for each in report["histogram"])
    yield f"tokens of an example: {bins}"
    if report["tokens"]:
        yield f"share with loss: {report['trained_tokens'] / report['tokens']:.1%} of {report['tokens']} tokens"
    if warning := data_report.warning(report):
        yield f"warning: {warning}"


def heading(text: str, color: bool) -> str:
    line = f"--- {printable(text)}"
    return click.style(line, bold=True) if color else line


def marked(pieces: Sequence[dict[str, Any]], *, color: bool) -> str:
    """An example in which the trained text is green, or between {+ and +}, and special tokens are bold."""
    shown, trained = "", False
    for piece in pieces:
        text = printable(piece["text"])
        if color:
            text = click.style(text, fg="green" if piece["trained"] else None, bold=piece["special"] or None)
        elif piece["trained"] != trained:
            text = ("{+" if piece["trained"] else "+}") + text
        trained = piece["trained"]
        shown += text
    return shown + ("+}" if trained and not color else "")


def printable(text: str) -> str:
    """Text of a row for a terminal: no character of it can move the cursor, change colors or the direction of text."""
    return "".join(
        each if each.isprintable() or each in "\n\t" else each.encode("unicode_escape").decode() for each in text
    )


def wants_color() -> bool:
    """Whether stdout is a terminal and the user has not turned colors off (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")
