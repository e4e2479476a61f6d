"""Whether the merged model is better on the held-out rows, with the uncertainty that comes from having few of them.

The difference of the mean losses is a ratio of sums over rows: sum(base - merged) / sum(tokens). Its interval is that
of the percentile bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13): rows are drawn
with replacement, each with both of its losses, because the models are compared on the same rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

RESAMPLES = 2000
CONFIDENCE = 0.95
FEWEST_ROWS = 10  # with fewer the interval is much too narrow: there are too few different resamples
SEED = 0


@dataclass(frozen=True)
class Verdict:
    """``difference``: how much lower the merged model's loss is, in nats per trained token, with its interval."""

    verdict: Literal["better", "no difference", "worse"]
    difference: float
    low: float
    high: float
    rows: int

    def __str__(self) -> str:
        """``better: held-out loss is 0.31 lower (95 % interval 0.28 to 0.34, 256 rows)``."""
        sign = -1 if self.difference < 0 else 1
        low, high = sorted((sign * self.low, sign * self.high))
        digits = decimals(high - low)
        change = f"{abs(self.difference):.{digits}f} {'lower' if sign > 0 else 'higher'}"
        interval = f"{CONFIDENCE:.0%} interval {low:.{digits}f} to {high:.{digits}f}".replace("%", " %")
        if self.rows < FEWEST_ROWS:
            interval = f"fewer than {FEWEST_ROWS} rows show no difference"
        told = f"held-out loss is {change} ({interval}, {self.rows} row{'s' if self.rows != 1 else ''})"
        return f"{'no difference that can be told' if self.verdict == 'no difference' else self.verdict}: {told}"


def verdict(
    base: Sequence[float], merged: Sequence[float], tokens: Sequence[int], resamples: int = RESAMPLES
) -> Verdict:
    """Compare two models by their summed losses (nats) and the trained tokens of each row. The same rows give the same.

    At least one row must have a trained token.
    """
    import numpy

    counts = numpy.asarray(tokens, dtype=numpy.float64)
    gains = numpy.asarray(base, dtype=numpy.float64) - numpy.asarray(merged, dtype=numpy.float64)
    gains, counts = gains[counts > 0], counts[counts > 0]
    rows, random = len(counts), numpy.random.default_rng(SEED)
    drawn = numpy.empty(resamples)
    for number in range(resamples):
        chosen = random.integers(rows, size=rows)
        drawn[number] = gains[chosen].sum() / counts[chosen].sum()
    low, high = (float(each) for each in numpy.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]))
    told: Literal["better", "no difference", "worse"] = "no difference"
    if rows >= FEWEST_ROWS and (low > 0 or high < 0):
        told = "better" if low > 0 else "worse"
    return Verdict(told, float(gains.sum() / counts.sum()), low, high, rows)


def decimals(width: float) -> int:
    """The decimals that show the width of an interval: at least 2, at most 5."""
    return 2 if width <= 0 else min(5, max(2, -math.floor(math.log10(width))))
