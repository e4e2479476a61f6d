"""Choose configurations and splits, and take parts of splits such as train[:10%]."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice

from genvalues.common.errors import UserError
from genvalues.settings.datasets import SplitPart
from llama_lora.data.rows import BadRows, Row

Split = Callable[[BadRows], Iterator[Row]]  # reads a split from its first row


def choose(key: str, name: str, wanted: str, available: Sequence[str]) -> str:
    """Return the wanted config or split; if none is set, "default" or the only one. Raises UserError otherwise."""
    what = key.rpartition(".")[2]
    if not wanted and ("default" in available or len(available) == 1):
        return "default" if "default" in available else available[0]
    if wanted not in available:
        wrong = f"has no {what} {wanted!r}" if wanted else f"has several {what}s"
        raise UserError(f"{name} {wrong}", where=key, fix=f"Set one of: {', '.join(available)}.")
    return wanted


def rows_of_parts(
    splits: Mapping[str, Split], parts: Sequence[SplitPart], key: str, name: str, bad_rows: BadRows
) -> Iterator[Row]:
    """Yield the rows of parts of splits. Percentages and bounds from the end read a split once more, to count its rows.

    A part is one of the rows that can be read.
    """
    for part in parts:
        read = splits[choose(f"{key}.split", name, part.name, list(splits))]
        if any("%" in bound or bound.startswith("-") for bound in (part.first, part.end)):
            first, end = part.bounds(sum(1 for _ in read(BadRows(skip=True))))
            yield from islice(read(bad_rows), first, end)
        else:
            yield from islice(read(bad_rows), int(part.first or 0), int(part.end) if part.end else None)
