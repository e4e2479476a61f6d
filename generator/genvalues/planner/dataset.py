"""The size of a dataset: a local file is counted, the Hub's dataset viewer is asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

MOST_BYTES = 32 << 20  # of a file that is counted, so that counting takes no noticeable time
# A token of Llama 3's vocabulary is about four characters of English text (Meta, "Introducing Meta Llama 3"). It is a
# range because of templates, other languages and column names in the file.
BYTES_PER_TOKEN = (3.0, 6.0)
SHORTEST = 50.0  # tokens of an average example of unknown size


class Examples(NamedTuple):
    """The number of a dataset's examples and their bytes."""

    number: int
    bytes: int

    def tokens(self, length: int) -> tuple[float, float]:
        """Fewest and most tokens of an average example, truncated at ``length``."""
        fewest, most = (self.bytes / self.number / each for each in reversed(BYTES_PER_TOKEN))
        return min(length, fewest), min(length, most)

    def rows(self, length: int, packing: bool, held_out: float) -> tuple[int, int]:
        """Fewest and most rows of ``length`` tokens to train on. With packing, several examples share a row."""
        kept = max(1, round(self.number * (1 - held_out)))
        if not packing:
            return kept, kept
        fewest, most = (self.bytes * (1 - held_out) / each / length for each in reversed(BYTES_PER_TOKEN))
        return min(kept, max(1, round(fewest))), min(kept, max(1, round(most)))


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


def count(path: Path) -> Examples | None:
    """The examples of a .jsonl, .json, .csv or .txt file; None for large, invalid or other files."""
    try:
        size = path.stat().st_size
        if size > MOST_BYTES or not path.is_file():
            return None
        number = _count(path)
    except (OSError, ValueError, RecursionError):
        return None
    return Examples(number, size) if number else None


def _count(path: Path) -> int | None:
    if path.suffix in (".jsonl", ".txt"):
        with path.open("rb") as lines:
            return sum(1 for line in lines if line.strip())
    if path.suffix == ".csv":
        import csv  # slow to import

        with path.open(encoding="utf-8-sig", newline="") as file:
            try:
                return max(0, sum(1 for _ in csv.reader(file)) - 1)
            except csv.Error:
                return None
    if path.suffix == ".json":
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
        return len(rows) if isinstance(rows, list) else None
    return None  # counting .parquet requires pyarrow
