"""Pack examples into rows of at most maxSequenceLength tokens. Examples in a row do not attend to each other.

Packing sees lengths alone (4 bytes an example) and adds at most 8 bytes an example, and some 20 while it works.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

TRIED_ENDS = 16  # lengths that are tried as the first of the last examples of a row


@dataclass(frozen=True)
class Packing:
    """Which examples each row holds: ``examples`` are their numbers, row after row; ``sizes`` how many a row has."""

    examples: Any  # numpy int32
    sizes: array[int]

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[Any]:
        """The numbers of the examples of each row, ascending."""
        start = 0
        for size in self.sizes:
            yield numpy.sort(self.examples[start : start + size])
            start += size


def one_per_row(examples: int) -> Packing:
    """Every example is a row."""
    return Packing(numpy.arange(examples, dtype=numpy.int32), array("i", [1]) * examples)


def pack(lengths: Sequence[int], max_length: int) -> Packing:
    """Pack examples of these lengths into rows. Deterministic; no example is split.

    Takes the better of two heuristics, so it uses at most as many rows as best-fit-decreasing, which needs at most 22 %
    more than the optimum (11/9 OPT + 1: Johnson 1973). Lengths are from 1 to ``max_length``.
    """
    numbers = numpy.asarray(lengths, dtype=numpy.int32)
    filled, best = fill(numbers, max_length), best_fit_decreasing(numbers, max_length)
    chosen, sizes = filled if len(filled[1]) <= len(best[1]) else best
    del filled, best
    # The n-th use of a length in the rows is the n-th example of that length.
    by_length = numpy.argsort(numbers, kind="stable").astype(numpy.int32)
    examples = numpy.empty(len(numbers), dtype=numpy.int32)
    examples[numpy.argsort(numpy.asarray(chosen, dtype=numpy.int32), kind="stable")] = by_length
    return Packing(examples, sizes)


def best_fit_decreasing(lengths: Any, max_length: int) -> tuple[Any, array[int]]:
    """The longest example first, each into the fullest row with enough room; (lengths row after row, row sizes)."""
    rows_with: list[list[int]] = [[] for _ in range(max_length + 1)]  # the rows, by free tokens
    present = 0  # bit n: there is a row with n free tokens
    row_of = array("i")
    rows = 0
    found, counts = (each[::-1] for each in numpy.unique(lengths, return_counts=True))
    for length, count in zip(found.tolist(), counts.tolist(), strict=True):
        for _ in range(count):
            fitting = present >> length
            if fitting:
                free = length + (fitting & -fitting).bit_length() - 1
                row = rows_with[free].pop()
                if not rows_with[free]:
                    present ^= 1 << free
            else:
                free, row, rows = max_length, rows, rows + 1
            row_of.append(row)
            rows_with[free - length].append(row)
            present |= 1 << (free - length)
    of = numpy.asarray(row_of, dtype=numpy.int32)
    sizes = array("i", numpy.bincount(of, minlength=rows).astype(numpy.int32).tobytes())
    return numpy.repeat(found, counts)[numpy.argsort(of, kind="stable")], sizes


def fill(lengths: Any, max_length: int) -> tuple[array[int], array[int]]:
    """Fill one row after the other, exactly where possible; (lengths row after row, row sizes).

    A row starts with the longest example that is left and goes on with the longest that fits, until one or two
    examples fill it exactly. Where none do, its last examples are taken back and three are searched that do.
    """
    left = Lengths(lengths, max_length)
    chosen, sizes = array("i"), array("i")
    while left:
        row = [left.take(left.longest(max_length))]
        room = max_length - row[0]
        while room:
            end = left.take_pair(room)
            if end:
                row += end
                room = 0
            elif longest := left.longest(room):
                row.append(left.take(longest))
                room -= longest
            else:
                break
        if room:
            _fill_end(row, room, left)
        chosen.extend(row)
        sizes.append(len(row))
    return chosen, sizes


def _fill_end(row: list[int], room: int, left: Lengths) -> None:
    """Replace the last examples of a row by others that fill it exactly, if some do."""
    for count in range(1, min(4, len(row))):
        given = row[-count:]
        for length in given:
            left.put(length)
        if end := left.take_three(room + sum(given)):
            row[-count:] = end
            return
        for length in given:
            left.take(length)


class Lengths:
    """A multiset of lengths up to ``max_length``. A bit in an integer says whether one is present, so that a question
    about all lengths is a few operations on ``max_length`` bits."""

    def __init__(self, lengths: Any, max_length: int) -> None:
        self._max = max_length
        self._counts: list[int] = numpy.bincount(lengths, minlength=max_length + 1).tolist()
        self._present = sum(1 << length for length, count in enumerate(self._counts) if count)
        self._mirrored = sum(1 << (max_length - length) for length, count in enumerate(self._counts) if count)

    def __bool__(self) -> bool:
        return bool(self._present)

    def longest(self, at_most: int) -> int:
        """The longest length up to ``at_most``; 0 if there is none."""
        return max(0, (self._present & ((2 << at_most) - 1)).bit_length() - 1)

    def take(self, length: int) -> int:
        self._counts[length] -= 1
        if not self._counts[length]:
            self._present ^= 1 << length
            self._mirrored ^= 1 << (self._max - length)
        return length

    def put(self, length: int) -> None:
        if not self._counts[length]:
            self._present ^= 1 << length
            self._mirrored ^= 1 << (self._max - length)
        self._counts[length] += 1

    def take_pair(self, total: int) -> list[int]:
        """Take one or two lengths of exactly ``total``; empty if there are none."""
        if self._present >> total & 1:
            return [self.take(total)]
        # Bit n of the mirrored lengths, moved, says whether total - n is present.
        pairs = self._present & (self._mirrored >> (self._max - total))
        if total % 2 == 0 and self._counts[total // 2] == 1:
            pairs &= ~(1 << total // 2)
        if not pairs:
            return []
        longer = pairs.bit_length() - 1
        return [self.take(longer), self.take(total - longer)]

    def take_three(self, total: int) -> list[int]:
        """Take one to three lengths of exactly ``total``, trying the longest as the first; empty if none are found."""
        if pair := self.take_pair(total):
            return pair
        first = total
        for _ in range(TRIED_ENDS):
            first = self.longest(first - 1)
            if not first:
                break
            self.take(first)
            if pair := self.take_pair(total - first):
                return [first, *pair]
            self.put(first)
        return []
