"""Render and tokenize rows in batches, in as many processes as there are cores, into a store on disk.

The order of the rows, and so every byte of the result, does not depend on the number of processes.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import multiprocessing
import os
import signal
import sys
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import chain, islice
from typing import Any, TypeVar

from genvalues.common.errors import EXIT_USER_ERROR, Unavailable, UserError
from genvalues.common.process import PR_SET_PDEATHSIG, prctl
from llama_lora.config import Dataset, Training
from llama_lora.data.columns import Columns, listed
from llama_lora.data.parts import training_parts
from llama_lora.data.rendering import Dropped, RenderedExample, Renderer
from llama_lora.data.rows import BadRows, MissingColumn, Row, RowError
from llama_lora.data.selection import Kept, hash64
from llama_lora.data.token_store import TokenStore
from llama_lora.data.tokens import ExampleTokenizer, Overlong, fit
from llama_lora.limits import limited_process
from llama_lora.progress import StageProgress

BATCH_ROWS, BATCH_CHARACTERS = 128, 1 << 18  # of a batch: whichever is reached first
BATCHES_IN_PROCESS = 2  # a dataset of no more batches is not worth other processes
DROPPED_SHOWN = 3  # rows that the report shows for each reason
GROUP = "groupColumn"
UNREADABLE = "cannot be read"
MOST_KEYS, OTHER = 100, "other"  # of reasons and notes that the report counts each for itself
CHARACTERS_SHOWN = 500  # of such a row

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass
class Counts:
    """What the report says of the rows before they are divided into train and eval.

    ``histogram`` counts examples by their full length, before dataset.overlong: key n for 2^(n-1) < tokens <= 2^n.
    ``notes`` are those of the renderers. ``columns`` has the columns of the rows, ``named`` the keys of the named
    columns that were found, both by source.
    """

    rows: int = 0
    dropped_rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    dropped_shown: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    texts: int = 0
    tokens: int = 0
    truncated: int = 0
    split: int = 0
    lost: int = 0
    lost_trained: int = 0
    trained: int = 0
    histogram: Counter[int] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    columns: dict[str, set[str]] = field(default_factory=dict)
    named: dict[str, set[str]] = field(default_factory=dict)

    def drop(self, row: Row, reason: str) -> None:
        """Count an example of a row as dropped."""
        reason = _add(self.dropped, reason, 1)
        shown = self.dropped_shown.setdefault(reason, [])
        if len(shown) < DROPPED_SHOWN:
            text = json.dumps(row.values, ensure_ascii=False, default=str)[:CHARACTERS_SHOWN]
            shown.append({"place": row.place, "row": text})

    def skip(self, bad_rows: BadRows) -> None:
        """Count the rows that could not be read and are skipped (dataset.onBadRow)."""
        if bad_rows.number:
            self.rows += bad_rows.number
            self.dropped_rows += bad_rows.number
            self.dropped[UNREADABLE] += bad_rows.number
            self.dropped_shown[UNREADABLE] = [
                {"place": error.where, "row": f"{error.what}. {error.fix}".strip()}
                for error in bad_rows.first[:DROPPED_SHOWN]
            ]

    def check_any(self) -> None:
        """Raise UserError if there are no rows."""
        if not self.rows:
            raise UserError("the dataset has no rows", where="dataset.source", fix="Name data with rows.")

    def add(self, other: Counts) -> None:
        """Add the counts of later rows."""
        for name, value in vars(other).items():
            if isinstance(value, int):
                setattr(self, name, getattr(self, name) + value)
            elif isinstance(value, Counter):
                for key, count in value.items():
                    _add(getattr(self, name), key, count)
        for reason, rows in other.dropped_shown.items():
            shown = self.dropped_shown.setdefault(reason if reason in self.dropped else OTHER, [])
            shown += rows[: DROPPED_SHOWN - len(shown)]
        for mine, others in ((self.columns, other.columns), (self.named, other.named)):
            for source, found in others.items():
                names = mine.setdefault(source, set())
                names |= found if len(names) < MOST_KEYS else set()


def _add(counter: Counter[Any], key: Any, count: int) -> Any:
    """Count ``key``, as OTHER if there are many keys already: templates and messages make up their own."""
    key = key if key in counter or len(counter) < MOST_KEYS else OTHER
    counter[key] += count
    return key


@dataclass
class TokenizedRows:
    """A batch of rows: their examples' lengths and tokens (int32), what is known of them, and the counts.

    ``bad`` has the errors of the rows that are not as their format says; the counts do not cover these.
    """

    lengths: array[int]
    input_ids: bytes
    labels: bytes
    kept: Kept
    counts: Counts
    bad: list[RowError]


def renderers_of(dataset: Dataset, tokenizer: Any) -> dict[str, Renderer]:
    """A renderer for each source that is trained on, by its name."""
    return {
        part.name: Renderer(tokenizer, part.format, part.columns, dataset.train_on) for part in training_parts(dataset)
    }


class RowTokenizer:
    """Renders and tokenizes rows of all sources of a dataset."""

    def __init__(self, renderers: Mapping[str, Renderer], tokenizer: Any, dataset: Dataset, training: Training) -> None:
        self._renderers = renderers
        self._tokenizer = ExampleTokenizer(tokenizer)
        self._max_length = training.max_sequence_length
        self._overlong: dict[str, Overlong] = {
            name: dataset.overlong or ("split" if renderer.format == "text" else "drop")
            for name, renderer in renderers.items()
        }
        self._numbers = {part.name: number for number, part in enumerate(training_parts(dataset))}
        self._group = Columns({GROUP: dataset.group_column}) if dataset.group_column else None
        self._fails = dataset.on_bad_row == "fail"
        for name, renderer in renderers.items():
            if self._overlong[name] == "split" and renderer.format != "text":
                raise UserError(
                    f"split is for format text; a row of format {renderer.format} has one beginning",
                    where="dataset.overlong",
                    fix="Write truncate or drop.",
                )

    def __call__(self, rows: list[Row], *, only_render: bool = False) -> TokenizedRows:
        """Tokenize a batch. ``only_render``: only look for bad rows, because one has ended the run already.

        Raises UserError if the chat template fails.
        """
        counts = Counts()
        rendered: list[tuple[Row, int, list[RenderedExample]]] = []
        bad: list[RowError] = []
        with limited_process():
            for row in rows:
                if len(names := counts.columns.setdefault(row.source, set())) < MOST_KEYS:
                    names.update(row.values)
                try:
                    group = self._group_of(row)
                    rendered.append((row, group, self._renderers[row.source].render(row)))
                except RowError as error:
                    bad.append(error)
                except Dropped as reason:
                    counts.drop(row, str(reason))
                    counts.dropped_rows += 1
        counts.rows = len(rows) - len(bad)
        if only_render or (self._fails and bad):
            rendered = []
        for name, renderer in self._renderers.items():
            counts.notes.update(renderer.notes)
            counts.named[name] = set(renderer.columns.found)
            renderer.notes.clear()
        examples = iter(self._tokenizer.tokenize([each for _, _, texts in rendered for each in texts]))
        kept, lengths = Kept(), array("i")
        input_ids, labels = array("i"), array("i")
        for row, group, texts in rendered:
            kept_texts = 0
            for example in islice(examples, len(texts)):
                length = len(example.input_ids)
                fitted = fit(example, self._max_length, self._overlong[row.source], self._tokenizer.beginning)
                counts.texts += 1
                counts.tokens += length
                counts.trained += example.trained_tokens
                counts.histogram[max(0, length - 1).bit_length()] += 1
                counts.lost += fitted.lost
                counts.lost_trained += fitted.lost_trained
                if fitted.reason:
                    counts.drop(row, fitted.reason)
                    continue
                counts.split += len(fitted.pieces) > 1
                counts.truncated += len(fitted.pieces) == 1 and len(fitted.pieces[0].input_ids) < length
                kept_texts += 1
                kept.digests.append(hash64(example.input_ids.tobytes()))
                kept.pieces.append(len(fitted.pieces))
                for piece in fitted.pieces:
                    lengths.append(len(piece.input_ids))
                    input_ids += piece.input_ids
                    labels += piece.labels
            if kept_texts:
                kept.texts.append(kept_texts)
                kept.sources.append(self._numbers[row.source])
                kept.groups.append(group)
            else:
                counts.dropped_rows += 1
        return TokenizedRows(lengths, input_ids.tobytes(), labels.tobytes(), kept, counts, bad)

    def _group_of(self, row: Row) -> int:
        """The hash of the row's dataset.groupColumn; 0 if none is set."""
        if self._group is None:
            return 0
        if self._group.name(row, GROUP) is None:
            raise MissingColumn(
                f"has no column {self._group.named[GROUP]}",
                where=row.place,
                fix=f"Set dataset.{GROUP} to one of: {listed(row.values)}.",
            )
        value = _one_form(self._group.value(row, GROUP))
        # Rows without a value have nothing in common.
        content = row.place if value is None else json.dumps(value, sort_keys=True, default=str)
        return hash64(content.encode("utf-8", "surrogatepass"))


def _one_form(value: Any) -> Any:
    """A number in the one form that all numbers equal to it have: 7 for 7.0 and Decimal("7.00"). Others as they are."""
    if not isinstance(value, (float, Decimal)) or not math.isfinite(value):
        return value
    return int(value) if value == int(value) else float(value)


def prepare(
    rows: Iterable[Row],
    tokenize: RowTokenizer,
    store: TokenStore,
    kept: Kept,
    bad_rows: BadRows,
    processes: int,
    *,
    held_out: bool,
) -> Counts:
    """Tokenize rows into ``store`` and ``kept``, and add those that cannot be rendered to ``bad_rows``.

    ``held_out``: they are the rows of dataset.eval. After a bad row that ends the run, the others are only rendered.
    """
    counts = Counts()
    items = ((batch, bad_rows.ends_run) for batch in batches(rows))
    with StageProgress("row") as progress, _frozen():
        for batch in mapped(lambda item: tokenize(item[0], only_render=item[1]), items, processes):
            if _all_lack_a_column(batch) and not bad_rows.skip and not bad_rows.number:
                raise batch.bad[0]
            for error in batch.bad:
                bad_rows.add(error)
            store.append(batch.lengths, batch.input_ids, batch.labels)
            batch.kept.held_out.extend([held_out] * len(batch.kept.texts))
            kept.extend(batch.kept)
            counts.add(batch.counts)
            progress.advance(batch.counts.rows)
    return counts


def _all_lack_a_column(batch: TokenizedRows) -> bool:
    """Whether every row of a batch lacks a column: then one error says it, because the settings are wrong."""
    return not batch.counts.rows and all(isinstance(error, MissingColumn) for error in batch.bad)


@contextlib.contextmanager
def _frozen() -> Iterator[None]:
    """Keep the garbage collector from the objects that exist now.

    Going through those of the imported libraries would take a fifth of the time, and copy their pages in each process.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Lists of consecutive rows, smaller ones where rows are long, so that a batch takes bounded memory."""
    batch: list[Row] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += _characters(row.values)
        if len(batch) == BATCH_ROWS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _characters(value: Any) -> int:
    """About how long a value of a row is."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list) else 1


def mapped(work: Callable[[Item], Result], items: Iterable[Item], processes: int) -> Iterator[Result]:
    """``work`` of each item, in order, in ``processes`` processes if there are enough items. Bounded look-ahead."""
    iterator = iter(items)
    first = list(islice(iterator, BATCHES_IN_PROCESS + 1))
    yield from map(work, first[:BATCHES_IN_PROCESS])
    rest = chain(first[BATCHES_IN_PROCESS:], iterator)
    # Where processes cannot be forked, each would import the libraries again, for seconds.
    if processes == 1 or len(first) <= BATCHES_IN_PROCESS or sys.platform != "linux":
        yield from map(work, rest)
        return
    context = multiprocessing.get_context("fork")  # work, with its tokenizer, is inherited, not copied
    children: list[multiprocessing.process.BaseProcess] = []
    try:
        with ProcessPoolExecutor(processes, context, _start, (work, os.getpid())) as pool:
            waiting: deque[Future[Result]] = deque()
            try:
                for item in rest:
                    waiting.append(pool.submit(_run, item))
                    children = children if len(children) == processes else multiprocessing.active_children()
                    if len(waiting) > 2 * processes:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)
    except BrokenProcessPool:
        if any(child.exitcode == EXIT_USER_ERROR for child in children):  # llama_lora.limits: it has printed the error
            raise SystemExit(EXIT_USER_ERROR) from None
        raise Unavailable("a process that tokenizes rows was killed; has the pod enough memory?") from None


class _Process:
    """What a process of the pool works with."""

    work: Callable[[Any], Any]


def _start(work: Callable[[Any], Any], parent: int) -> None:
    """Prepare a process of the pool: it ends with its parent, which alone handles signals."""
    _Process.work = work
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _run(item: Any) -> Any:
    return _Process.work(item)
