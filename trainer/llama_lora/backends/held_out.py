"""The held-out loss while training: measured by all workers, and what follows from it: the best step, and the end.

Names and meanings are those of transformers (TrainingArguments and EarlyStoppingCallback).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from genvalues.common.errors import UserError
from genvalues.common.json_files import Count, Finite
from llama_lora.backends.worker_group import WorkerGroup
from llama_lora.config import Training
from llama_lora.data.tokens import IGNORED
from llama_lora.probe import Row, trained_tokens


class Measures(Protocol):
    """The part of ``loop.Engine`` that measures a loss."""

    data_rank: int
    data_size: int

    def row_loss(self, *rows: Row | None) -> float: ...


@dataclass(frozen=True)
class HeldOutState:
    """What the measurements after the first step say so far. Losses are in nats per trained token.

    Every checkpoint has it, so that a resumed training decides as an uninterrupted one does. ``best_rows_done`` is the
    position of the best measurement: with another number of workers a step has another number of rows.
    ``without_improvement`` counts the measurements since the loss last fell by more than earlyStoppingThreshold.
    """

    loss: Finite | None = None
    best_loss: Finite | None = None
    best_step: Count | None = None
    best_rows_done: Count | None = None
    without_improvement: Count = 0

    def after(self, loss: float, step: int, rows_done: int, threshold: float) -> HeldOutState:
        """The state with one measurement more."""
        improved = self.best_loss is None or self.best_loss - loss > threshold
        without_improvement = 0 if improved else self.without_improvement + 1
        if self.best_loss is None or loss < self.best_loss:
            return HeldOutState(loss, loss, step, rows_done, without_improvement)
        return HeldOutState(loss, self.best_loss, self.best_step, self.best_rows_done, without_improvement)

    def ends(self, training: Training) -> bool:
        """Whether training.earlyStoppingPatience is exhausted."""
        patience = training.early_stopping_patience
        return patience is not None and self.without_improvement >= patience


class HeldOutLoss:
    """Measures the loss of the same held-out rows, which the copies of the model share among them."""

    def __init__(self, rows: Sequence[Row], engine: Measures, workers: WorkerGroup, training: Training) -> None:
        self.rows = rows
        self.tokens = sum(map(trained_tokens, rows))
        self._engine, self._workers = engine, workers
        self._batch = training.per_device_batch_size

    def measure(self, step: int) -> float:
        """The mean loss in nats per trained token, equal in all workers. Raises UserError if it is not finite."""
        engine, workers = self._engine, self._workers
        shares = shares_of(self.rows, engine.data_rank, engine.data_size, self._batch)
        own = sum(engine.row_loss(*rows) for rows in shares)
        (summed,) = workers.sum([own / (workers.size // engine.data_size)])  # workers of one copy have the same loss
        loss = workers.broadcast(summed / self.tokens)  # to the last bit, because workers decide by it
        if not math.isfinite(loss):
            what = f"the held-out loss after step {step} is {loss}"
            if step == 0:  # that of the base model
                fix = "Check the base model: it has weights that are not finite, or values beyond its dtype."
                raise UserError(what, where="model", fix=fix)
            fix = "Lower it, or check the rows in the data report."
            raise UserError(what, where="training.learningRate", fix=fix)
        return loss


def shares_of(rows: Sequence[Row], rank: int, size: int, batch: int) -> Iterator[Sequence[Row | None]]:
    """One copy's batches, as many for each copy: with collectives inside the model all copies must take part."""
    for first in range(0, len(rows), size * batch):
        start = first + rank * batch
        yield rows[start : start + batch] or [None]


def read_rows(dataset: Path, training: Training) -> list[Row]:
    """The first training.evalRows held-out rows. Raises UserError if none of them has a trained token."""
    from datasets import load_from_disk

    held_out = load_from_disk(str(dataset / "eval"))
    rows = [held_out[number] for number in range(min(training.eval_rows, len(held_out)))]
    if not any(label != IGNORED for row in rows for label in row["labels"][1:]):
        raise UserError(
            "requires held-out rows, and there are none" if not rows else "the held-out rows have no trained token",
            where="training.evalSteps",
            fix="Raise dataset.evalFraction, set dataset.eval, or remove training.evalSteps.",
        )
    return rows
