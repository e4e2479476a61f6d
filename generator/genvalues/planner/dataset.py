"""The size of a dataset: a local file is counted, the Hub's dataset viewer is asked."""

from __future__ import annotations

import io
import json
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from genvalues.common.errors import UserError
from genvalues.settings.dataset_files import SPLIT_WORDS, by_split, files_of, is_saved
from genvalues.settings.datasets import (
    GZIP,
    ZSTANDARD,
    SplitPart,
    file_format,
    is_on_hub,
    is_path,
    row_format,
    split_parts,
)
from genvalues.settings.inputs import DatasetInputs
from genvalues.settings.run import AdditionalSource

MOST_BYTES = 32 << 20  # of a file that is counted, so that counting takes no noticeable time
# A token of Llama 3's vocabulary is about four characters of English text (Meta, "Introducing Meta Llama 3"). It is a
# range because of templates, other languages and column names in the file.
BYTES_PER_TOKEN = (3.0, 6.0)
SHORTEST = 50.0  # tokens of an average example of unknown size


class Examples(NamedTuple):
    """The number of a dataset's examples and their bytes. ``split``: a longer one than a row becomes several pieces."""

    number: int
    bytes: int
    split: bool = False

    def tokens(self, length: int) -> tuple[float, float]:
        """Fewest and most tokens of an average example, truncated at ``length``."""
        fewest, most = (self.bytes / self.number / each for each in reversed(BYTES_PER_TOKEN))
        return min(length, fewest), min(length, most)

    def rows(self, length: int, packing: bool, held_out: float) -> tuple[int, int]:
        """Fewest and most rows of ``length`` tokens to train on. With packing, several examples share a row."""
        kept = max(1, round(self.number * (1 - held_out)))
        fewest, most = (
            max(1, round(self.bytes * (1 - held_out) / each / length)) for each in reversed(BYTES_PER_TOKEN)
        )
        if self.split:
            unit = 1 if packing else kept  # without packing each text has as many rows of its own as it needs
            return unit * math.ceil(fewest / unit), unit * math.ceil(most / unit)
        return (min(kept, fewest), min(kept, most)) if packing else (kept, kept)


def on_hub(name: str, config: str | None, split: str) -> Examples | None:
    """A split's size from the Hub's dataset viewer; None where it has none, or does not answer.

    Its endpoint /size (Hugging Face docs, Dataset viewer: Get the number of rows and the size in bytes) estimates the
    number of rows of large splits. Its bytes are those in memory: mostly text.
    """
    from urllib.parse import quote

    from genvalues.common.hub import ask, endpoint_of_environment, token_of_environment

    viewer = endpoint_of_environment().replace("://", "://datasets-server.")  # as in the datasets library
    answer = ask(viewer, f"/size?dataset={quote(name, safe='')}", token_of_environment()).json()
    listed = answer.get("size")
    splits = listed.get("splits") if isinstance(listed, dict) else None
    named = [one for one in splits if isinstance(one, dict)] if isinstance(splits, list) else []
    found = [one for one in named if one.get("split") == split and (not config or one.get("config") == config)]
    if len(found) != 1:  # several configurations and none selected
        return None
    rows, size = found[0].get("estimated_num_rows") or found[0].get("num_rows"), found[0].get("num_bytes_memory")
    return Examples(rows, size) if isinstance(rows, int) and isinstance(size, int) and rows > 0 else None


def of_files(dataset: DatasetInputs) -> Examples | None:
    """The examples of an epoch over local sources; None if one of them cannot be counted."""
    return _weighted(dataset, lambda part: count(Path(part.source), part.split) if is_path(part.source) else None)


def of_hub(dataset: DatasetInputs) -> Examples | None:
    """The examples of an epoch over sources of the Hub; None if it does not know the size of one of them."""

    def ask(part: DatasetInputs | AdditionalSource) -> Examples | None:
        found = []
        for each in (split_parts(part.split) or [SplitPart("train")]) if is_on_hub(part.source) else []:
            if (whole := on_hub(part.source, part.config, each.name)) is None:
                return None
            found.append(_share(whole, each))
        return Examples(sum(each.number for each in found), sum(each.bytes for each in found)) if found else None

    return _weighted(dataset, ask)


def _share(examples: Examples, part: SplitPart) -> Examples:
    first, end = part.bounds(examples.number)
    return Examples(end - first, examples.bytes * (end - first) // max(1, examples.number))


def _weighted(
    dataset: DatasetInputs, counted: Callable[[DatasetInputs | AdditionalSource], Examples | None]
) -> Examples | None:
    number = size = 0.0
    parts: list[DatasetInputs | AdditionalSource] = [dataset, *dataset.additional.values()]
    for part in parts:
        found = counted(part)
        if not found:
            return None
        number, size = number + found.number * part.weight, size + found.bytes * part.weight
    formats = [row_format(dataset.format, dataset.source), *(each.format for each in dataset.additional.values())]
    return Examples(max(1, round(number)), round(size), "text" in formats and dataset.overlong in (None, "split"))


def count(path: Path, split: str = "") -> Examples | None:
    """The examples of a split of a file, a folder or a glob; None for large or invalid files, and for others than text.

    ``bytes`` are those of the decompressed rows.
    """
    try:
        found = files_of(str(path))
        if sum(file.path.stat().st_size for file in found) > MOST_BYTES or (path.is_dir() and is_saved(path)):
            return None
        splits = by_split(found) if path.is_dir() else {"train": found}
        shares = []
        for part in split_parts(split) or [SplitPart("train")]:
            counted = [_count(file.path) for file in splits.get(SPLIT_WORDS.get(part.name, part.name), [])]
            whole = Examples(sum(each.number for each in counted), sum(each.bytes for each in counted))
            shares.append(_share(whole, part))
    except (OSError, EOFError, ValueError, RecursionError, zlib.error, UserError):
        return None
    number = sum(each.number for each in shares)
    return Examples(number, sum(each.bytes for each in shares)) if number else None


def _count(path: Path) -> Examples:
    """The rows of a text file and its bytes. Raises ValueError if it cannot be counted here."""
    data = path.read_bytes()
    if data.startswith(GZIP):
        import gzip  # slow to import

        data = gzip.GzipFile(fileobj=io.BytesIO(data)).read(MOST_BYTES + 1)  # of all members
    if len(data) > MOST_BYTES or data.startswith(ZSTANDARD):  # which requires pyarrow
        raise ValueError("too large, or compressed with Zstandard")
    kind = file_format(path.name)
    if kind in ("jsonl", "text"):
        return Examples(sum(1 for line in data.split(b"\n") if line.strip()), len(data))
    if kind in ("csv", "tsv"):
        import csv  # slow to import

        lines = io.StringIO(data.decode("utf-8-sig"), newline="")
        try:
            rows = sum(1 for cells in csv.reader(lines, delimiter="," if kind == "csv" else "\t") if cells)
        except csv.Error as error:
            raise ValueError(error) from None
        return Examples(max(0, rows - 1), len(data))
    if kind == "json":
        found = json.loads(data.decode("utf-8-sig"))
        found = found.get("data") if isinstance(found, dict) else found
        if isinstance(found, list):
            return Examples(len(found), len(data))
    raise ValueError("no list of rows, or Parquet, which requires pyarrow")
