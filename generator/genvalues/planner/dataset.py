"""How much there is to train on: a file on this computer is counted; the Hub is asked, where it may be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

MOST_BYTES = 32 << 20  # of a file that is counted: it must not be felt
# A token of Llama 3's vocabulary is some four characters of English text (Meta, "Introducing Meta Llama 3"); templates,
# other languages and names of columns in the file make it a range.
BYTES_PER_TOKEN = (3.0, 6.0)


SHORTEST = 50.0  # tokens of an example of which nothing is known


class Examples(NamedTuple):
    """A dataset's examples, and the bytes of its file."""

    number: int
    bytes: int

    def tokens(self, length: int) -> tuple[float, float]:
        """Fewest and most tokens of an example, on average, cut at ``length``."""
        fewest, most = (self.bytes / self.number / each for each in reversed(BYTES_PER_TOKEN))
        return min(length, fewest), min(length, most)

    def rows(self, length: int, packing: bool, held_out: float) -> tuple[int, int]:
        """Fewest and most rows of ``length`` tokens that are trained on. Packed, several examples share one."""
        kept = max(1, round(self.number * (1 - held_out)))
        if not packing:
            return kept, kept
        fewest, most = (self.bytes * (1 - held_out) / each / length for each in reversed(BYTES_PER_TOKEN))
        return min(kept, max(1, round(fewest))), min(kept, max(1, round(most)))


def on_hub(name: str, config: str | None, split: str) -> Examples | None:
    """What the Hub's dataset viewer has counted in a split; None where it has not, or does not answer.

    Its endpoint /size (Hugging Face docs, Dataset viewer: Get the number of rows and the size in bytes). Where a split
    is too large for it, it has estimated the number of rows. Its bytes are those in memory: texts and little more.
    """
    from urllib.parse import quote

    from genvalues.common.hub import ask, endpoint_of_environment, token_of_environment

    viewer = endpoint_of_environment().replace("://", "://datasets-server.")  # as the library datasets finds it
    answer = ask(viewer, f"/size?dataset={quote(name, safe='')}", token_of_environment()).json()
    listed = answer.get("size")
    splits = listed.get("splits") if isinstance(listed, dict) else None
    named = [one for one in splits if isinstance(one, dict)] if isinstance(splits, list) else []
    found = [one for one in named if one.get("split") == split and (not config or one.get("config") == config)]
    if len(found) != 1:  # several configurations, and none was named
        return None
    rows, size = found[0].get("estimated_num_rows") or found[0].get("num_rows"), found[0].get("num_bytes_memory")
    return Examples(rows, size) if isinstance(rows, int) and isinstance(size, int) and rows > 0 else None


def count(path: Path) -> Examples | None:
    """The examples of a .jsonl, .json, .csv or .txt file; None where it cannot be counted cheaply, or at all."""
    try:
        size = path.stat().st_size
        if size > MOST_BYTES or not path.is_file():
            return None
        number = _count(path)
    except (OSError, ValueError, RecursionError):
        return None
    return Examples(number, size) if number else None


def _count(path: Path) -> int | None:
    if path.suffix == ".jsonl":
        with path.open("rb") as lines:
            return sum(1 for line in lines if line.strip())
    if path.suffix == ".txt":
        with path.open("rb") as lines:
            return sum(1 for line in lines if line.strip())
    if path.suffix == ".csv":
        import csv  # takes longer than the rest of this module

        with path.open(encoding="utf-8-sig", newline="") as file:
            try:
                return max(0, sum(1 for _ in csv.reader(file)) - 1)
            except csv.Error:
                return None
    if path.suffix == ".json":
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
        return len(rows) if isinstance(rows, list) else None
    return None  # .parquet: its footer is Thrift, and needs pyarrow
