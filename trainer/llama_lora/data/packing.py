"""Pack examples into rows of at most maxSequenceLength tokens, each example isolated from its neighbours."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

from llama_lora.data.rendering import IGNORED, Example


@dataclass(frozen=True)
class PackedRow:
    """Examples behind one another. ``lengths`` are theirs; the attention mask and positions follow from them."""

    input_ids: list[int]
    labels: list[int]
    lengths: list[int]

    @property
    def trained_tokens(self) -> int:
        return sum(label != IGNORED for label in self.labels)


def pack(examples: Sequence[Example], max_length: int) -> list[PackedRow]:
    """Best-fit-decreasing: the longest example first, each into the fullest row that still has room for it.

    Deterministic. At most 22 % more rows than the fewest possible (11/9 OPT + 1: Johnson 1973), in practice 1 or 2 %.
    Every example is in exactly one row, whole; examples must not be longer than ``max_length``.
    """
    order = sorted(range(len(examples)), key=lambda index: (-len(examples[index].input_ids), index))
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for index in order:
        length = len(examples[index].input_ids)
        fits = bisect.bisect_left(room, (length, -1))
        if fits == len(room):
            free, row = max_length, len(rows)
            rows.append([])
        else:
            free, row = room.pop(fits)
        rows[row].append(index)
        bisect.insort(room, (free - length, row))
    return [join([examples[index] for index in sorted(row)]) for row in rows]


def join(examples: Sequence[Example]) -> PackedRow:
    """Examples behind one another as one row."""
    return PackedRow(
        input_ids=[token for example in examples for token in example.input_ids],
        labels=[label for example in examples for label in example.labels],
        lengths=[len(example.input_ids) for example in examples],
    )
