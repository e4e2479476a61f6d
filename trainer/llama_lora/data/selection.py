"""Choose what is trained on and what is held out: draws, groups of rows, duplicates, weights. No I/O."""

from __future__ import annotations

import hashlib
import random
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy


@dataclass
class Kept:
    """What is known of the rows that are kept, and of their texts, in the order of the sources. About 30 bytes a row.

    A row has one or more texts (rendered examples), a text one or more examples: the pieces of dataset.overlong: split.
    - ``sources``, ``groups``, ``held_out``, ``texts``: by row: the number of its source, the hash of its
      dataset.groupColumn, whether it is from dataset.eval, and how many texts it has
    - ``digests``, ``pieces``: by text: the hash of its tokens, and how many examples it has
    """

    sources: array[int] = field(default_factory=lambda: array("H"))
    groups: array[int] = field(default_factory=lambda: array("Q"))
    held_out: array[int] = field(default_factory=lambda: array("B"))
    texts: array[int] = field(default_factory=lambda: array("i"))
    digests: array[int] = field(default_factory=lambda: array("Q"))
    pieces: array[int] = field(default_factory=lambda: array("i"))

    def extend(self, other: Kept) -> None:
        """Append the rows of ``other``."""
        for name, values in vars(self).items():
            values.extend(getattr(other, name))

    def duplicates(self) -> int:
        """How many texts repeat an earlier one."""
        return len(self.digests) - len(numpy.unique(numpy.asarray(self.digests)))


@dataclass(frozen=True)
class Selection:
    """The numbers of the examples to train on, one for each use in an epoch, and of those held out.

    ``duplicates`` counts the texts that repeat an earlier one, ``in_both`` those removed from train because the same
    text is held out.
    """

    train: Any  # numpy int64
    held_out: Any
    held_out_rows: int
    duplicates: int
    in_both: int


def select(
    kept: Kept, weights: Mapping[int, float], *, fraction: float, seed: int, grouped: bool, eval_source: bool
) -> Selection:
    """Select the held-out rows, remove their texts from train, and repeat the rest as the weights of the sources say.

    ``fraction`` of the rows, or of the groups if ``grouped``, is held out; with ``eval_source``, its rows are.
    """
    rows = len(kept.texts)
    if eval_source:
        drawn = numpy.flatnonzero(numpy.asarray(kept.held_out))
    elif grouped:
        drawn = draw_groups(numpy.asarray(kept.groups), fraction, seed)
    else:
        drawn = draw(rows, fraction, seed)
    out_rows = numpy.zeros(rows, dtype=bool)
    out_rows[drawn] = True
    texts, pieces, digests = (numpy.asarray(each) for each in (kept.texts, kept.pieces, kept.digests))
    row_of_text = numpy.repeat(numpy.arange(rows), texts)
    out_texts = out_rows[row_of_text]
    in_both = numpy.isin(digests, digests[out_texts]) & ~out_texts
    uses = repeats(numpy.asarray(kept.sources), ~out_rows, weights, seed)
    text_uses = uses[row_of_text] * ~in_both
    first_text = numpy.cumsum(texts) - texts
    first_piece = numpy.cumsum(pieces) - pieces
    drawn_texts = [
        text for row in drawn for text in range(int(first_text[row]), int(first_text[row]) + int(texts[row]))
    ]
    held_out = [
        piece
        for text in drawn_texts
        for piece in range(int(first_piece[text]), int(first_piece[text]) + int(pieces[text]))
    ]
    examples = int(pieces.sum())
    return Selection(
        train=numpy.repeat(numpy.arange(examples), numpy.repeat(text_uses, pieces)),
        held_out=numpy.asarray(held_out, dtype=numpy.int64),
        held_out_rows=len(drawn),
        duplicates=kept.duplicates(),
        in_both=int(in_both.sum()),
    )


def draw(rows: int, fraction: float, seed: int) -> Any:
    """Draw round(fraction x rows) rows.

    They keep the order of the draw, so that the first few are a fair sample too.
    """
    return numpy.asarray(random.Random(seed).sample(range(rows), round(fraction * rows)), dtype=numpy.int64)


def draw_groups(groups: Any, fraction: float, seed: int) -> Any:
    """Draw whole groups, at least one and not all, with together about round(fraction x rows) rows, in random order.

    Groups come in the order of a hash of theirs and the seed, so that most stay where they are if rows are added.
    """
    found, sizes = numpy.unique(groups, return_counts=True)
    wanted, drawn, chosen = max(1, round(fraction * len(groups))) if fraction else 0, 0, []
    order = sorted(range(len(found)), key=lambda index: hash64(f"{seed} {found[index]}".encode()))
    for index in order[:-1]:
        if sizes[index] <= 2 * (wanted - drawn):  # brings the number nearer to what is wanted
            chosen.append(found[index])
            drawn += sizes[index]
    if wanted and not chosen and len(found) > 1:
        chosen.append(found[min(order, key=lambda index: sizes[index])])
    rows = numpy.flatnonzero(numpy.isin(groups, numpy.asarray(chosen, dtype=groups.dtype))).tolist()
    random.Random(seed).shuffle(rows)
    return numpy.asarray(rows, dtype=numpy.int64)


def repeats(sources: Any, train: Any, weights: Mapping[int, float], seed: int) -> Any:
    """How often an epoch uses each row: 0 if not in ``train``, else the weight of its source.

    The fraction of a weight is a seeded draw: with 2.5, half of the rows are used a third time.
    """
    uses = numpy.zeros(len(sources), dtype=numpy.int64)
    for source, weight in weights.items():
        rows = numpy.flatnonzero((sources == source) & train)
        uses[rows] = int(weight)
        more = round((weight - int(weight)) * len(rows))
        uses[rows[random.Random(f"{seed} {source}").sample(range(len(rows)), more)]] += 1
    return uses


def hash64(content: bytes) -> int:
    """A hash that is the same in every process. 10 million contents collide with a probability of 1 in 370,000."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")
