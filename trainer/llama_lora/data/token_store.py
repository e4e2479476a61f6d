"""Tokenized examples on disk, and the datasets that are written from them. Memory grows by 4 bytes an example."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy

from genvalues.common import files
from genvalues.common.json_files import read_object
from llama_lora.data.tokens import IGNORED, Example

COLUMNS = ("input_ids", "labels", "lengths")
DATA_FILE = "data-00000-of-00001.arrow"  # as save_to_disk names the only one
BATCH_TOKENS = 1 << 20  # of a record batch: 8 MB; also at most BATCH_ROWS rows
BATCH_ROWS = 1000


class TokenStore:
    """A folder of examples: append them in order, then read any of them. Deleted at the end of the block."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.lengths = array("i")
        self._ends: Any = None
        self._written = {name: (folder / name).open("wb") for name in ("input_ids", "labels")}
        self._mapped: dict[str, Any] = {}

    def __enter__(self) -> TokenStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._mapped.clear()
        for name, file in self._written.items():
            file.close()
            (self.folder / name).unlink()
        self.folder.rmdir()

    def append(self, lengths: array[int], input_ids: bytes, labels: bytes) -> None:
        """Append examples of these lengths; their tokens are int32, one example after the other."""
        self.lengths.extend(lengths)
        self._written["input_ids"].write(input_ids)
        self._written["labels"].write(labels)

    def finish(self) -> None:
        """Make everything appended readable."""
        self._ends = numpy.cumsum(numpy.asarray(self.lengths), dtype=numpy.int64)
        for name, file in self._written.items():
            file.flush()
            if len(self._ends):
                mapped = numpy.memmap(self.folder / name, dtype=numpy.int32, mode="r")
                self._mapped[name] = numpy.asarray(mapped)  # a slice of a memmap takes several times longer

    def example(self, number: int) -> Example:
        """Read one example."""
        return Example(*(array("i", self.part(name, number).tobytes()) for name in ("input_ids", "labels")))

    def trained_tokens(self, number: int) -> int:
        """How many tokens of an example have a loss."""
        return int(numpy.count_nonzero(self.part("labels", number) != IGNORED))

    def part(self, name: str, number: int) -> Any:
        """The ``input_ids`` or ``labels`` of an example."""
        end = int(self._ends[number])
        return self._mapped[name][end - self.lengths[number] : end]


def write_dataset(store: TokenStore, rows: Iterable[Any], folder: Path) -> None:
    """Write rows of examples (their numbers) as a dataset that load_from_disk reads, a batch of rows at a time.

    Its columns are input_ids, labels and lengths (int32 lists). The same rows give the same bytes.
    """
    import pyarrow
    from datasets import Dataset, Features, Sequence, Value, disable_progress_bars

    disable_progress_bars()
    schema = Features({name: Sequence(Value("int32")) for name in COLUMNS}).arrow_schema
    Dataset(schema.empty_table()).save_to_disk(folder)  # the metadata; without rows, no data file
    state_file = folder / "state.json"
    state = read_object(state_file)
    digest = hashlib.sha256()
    with (
        pyarrow.OSFile(str(folder / DATA_FILE), "wb") as file,
        pyarrow.ipc.new_stream(file, schema) as stream,
    ):
        batch = _Batch()
        for numbers in rows:
            batch.add(store, numbers)
            if batch.tokens >= BATCH_TOKENS or batch.rows >= BATCH_ROWS:
                stream.write_batch(batch.records(schema, digest))
                batch = _Batch()
        stream.write_batch(batch.records(schema, digest))
    state["_data_files"] = [{"filename": DATA_FILE}]
    state["_fingerprint"] = digest.hexdigest()[:16]  # datasets would make a new one each time
    files.write_json(state_file, state)


class _Batch:
    """Rows that become one record batch."""

    def __init__(self) -> None:
        self.rows = self.tokens = 0
        self._values: dict[str, list[Any]] = {name: [] for name in COLUMNS}
        self._offsets = {name: array("i", [0]) for name in COLUMNS}

    def add(self, store: TokenStore, numbers: Any) -> None:
        lengths = numpy.asarray([store.lengths[number] for number in numbers], dtype=numpy.int32)
        for name in ("input_ids", "labels"):
            self._values[name] += [store.part(name, number) for number in numbers]
            self._offsets[name].append(self._offsets[name][-1] + int(lengths.sum()))
        self._values["lengths"].append(lengths)
        self._offsets["lengths"].append(self._offsets["lengths"][-1] + len(lengths))
        self.rows += 1
        self.tokens += int(lengths.sum())

    def records(self, schema: Any, digest: Any) -> Any:
        import pyarrow

        columns = []
        for name in COLUMNS:
            values = numpy.concatenate([numpy.empty(0, dtype=numpy.int32), *self._values[name]])
            digest.update(values.tobytes())
            columns.append(pyarrow.ListArray.from_arrays(numpy.asarray(self._offsets[name]), pyarrow.array(values)))
        return pyarrow.record_batch(columns, schema=schema)
