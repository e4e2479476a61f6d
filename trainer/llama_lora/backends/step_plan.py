"""The rows and the learning rate of each step, as a function of the run config, the row count and the workers.

The order of rows does not depend on the number of workers: 1 and 2 processes with the same global batch train on the
same rows.
"""

from __future__ import annotations

import functools
import math
import random
from dataclasses import dataclass

from genvalues.common.errors import UserError
from llama_lora.config import Training

SMALLEST_FLOAT32 = 2.0**-149


@dataclass(frozen=True)
class StepPlan:
    """The steps over ``rows`` rows, shuffled in each epoch, divided among ``workers`` workers."""

    rows: int
    workers: int
    training: Training

    @property
    def global_batch(self) -> int:
        """Rows per step: per device x accumulation x workers."""
        return self.training.per_device_batch_size * self.training.gradient_accumulation_steps * self.workers

    @property
    def total_rows(self) -> int:
        return max(1, round(self.rows * self.training.epochs))

    @property
    def total_steps(self) -> int:
        """Optimizer steps. The last one may have fewer rows."""
        return self.training.max_steps or math.ceil(self.total_rows / self.global_batch)

    def of_at_least(self, steps: int) -> StepPlan:
        """A plan with at least ``steps`` steps; rows repeat if there are too few."""
        longer = self.training.model_copy(update={"max_steps": max(steps, self.total_steps)})
        return StepPlan(self.rows, self.workers, longer)

    def step_rows(self, step: int) -> list[int | None]:
        """The row numbers of a step (from 0). None pads the last step to ``global_batch`` entries.

        With a constant shape, a backend that compiles a graph per shape needs only one. A padding row has no labels.
        """
        first = step * self.global_batch
        last = first + self.global_batch
        # With maxSteps the epochs do not limit the run: rows repeat as often as needed.
        end = last if self.training.max_steps is not None else self.total_rows
        return [self._row(position) if position < end else None for position in range(first, last)]

    def worker_rows(self, step: int, worker: int) -> list[list[int | None]]:
        """One worker's micro-batches: gradient_accumulation_steps lists of per_device_batch_size rows."""
        rows, size = self.step_rows(step), self.training.per_device_batch_size
        starts = range(worker * size, self.global_batch, size * self.workers)
        return [rows[start : start + size] for start in starts]

    def learning_rate(self, step: int) -> float:
        """The rate of a step (from 0), as in transformers' get_scheduler, except that the first step is not at 0.

        Linear warm-up, then linear or cosine to 0, or constant. The first step of a warm-up has half the rate of the
        second: at 0 it would train nothing, and a run of one step would have no effect.
        """
        peak, warmup = self.training.learning_rate, math.ceil(self.total_steps * self.training.warmup_ratio)
        if step < warmup:
            return peak * max(step, 0.5) / warmup
        if self.training.lr_scheduler == "constant":
            return peak
        progress = (step - warmup) / max(1, self.total_steps - warmup)
        if self.training.lr_scheduler == "cosine":
            return peak * 0.5 * (1 + math.cos(math.pi * progress))
        return peak * (1 - progress)

    def check_learns(self) -> None:
        """Raise UserError if the learning rate of every step is 0 as float32, the optimizer's type."""
        if all(self.learning_rate(step) < SMALLEST_FLOAT32 for step in range(self.total_steps)):
            raise UserError(
                f"the learning rate is 0 in each of the {self.total_steps} steps, so nothing would be trained",
                where="training.learningRate",
                fix=f"Raise it: {self.training.learning_rate:g} rounds to 0.",
            )

    def step_after(self, rows_done: int) -> int:
        """The step to resume with. The position is counted in rows, so the number of workers may change."""
        return rows_done // self.global_batch

    def _row(self, position: int) -> int:
        epoch, index = divmod(position, self.rows)
        return row_order(self.rows, self.training.seed, epoch)[index]


@functools.lru_cache(maxsize=2)
def row_order(rows: int, seed: int, epoch: int) -> list[int]:
    """The shuffled row numbers of an epoch."""
    return random.Random(f"{seed} {epoch}").sample(range(rows), rows)
