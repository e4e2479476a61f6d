"""Pack examples into rows of at most maxSequenceLength tokens. Examples in a row do not attend to each other."""

from __future__ import annotations

import bisect
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from llama_lora.data.tokens import Example


@dataclass(frozen=True)
class PackedRow:
    """Concatenated examples. The attention mask and the positions follow from ``lengths``."""

    examples: tuple[Example, ...]

    @property
    def input_ids(self) -> array[int]:
        return array("i", chain.from_iterable(example.input_ids for example in self.examples))

    @property
    def labels(self) -> array[int]:
        return array("i", chain.from_iterable(example.labels for example in self.examples))

    @property
    def lengths(self) -> array[int]:
        return array("i", (len(example.input_ids) for example in self.examples))


def pack(examples: Sequence[Example], max_length: int) -> list[PackedRow]:
    """Pack best-fit-decreasing: the longest example first, each into the fullest row with enough room.

    Deterministic. Uses at most 22 % more rows than the optimum (11/9 OPT + 1: Johnson 1973), in practice 1 or 2 %.
    Examples are not split; none may be longer than ``max_length``.
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
    return [PackedRow(tuple(examples[index] for index in sorted(row))) for row in rows]
