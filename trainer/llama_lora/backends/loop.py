"""The training loop, the same on every accelerator: rows, steps, learning rate, checkpoints, the log and the probe.

What differs is behind ``Engine``: how a step is taken, and what a checkpoint of it looks like.
"""

from __future__ import annotations

import resource
import shutil
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from llama_lora import probe, stopping
from llama_lora.backends import checkpoints
from llama_lora.backends.base import TrainingJob, TrainingResult
from llama_lora.backends.checkpoints import Record
from llama_lora.backends.workers import Workers
from llama_lora.data.rendering import IGNORED
from llama_lora.plan import Plan
from llama_lora.probe import Row
from llama_lora.runlog import DryRunLog, RunLog, StepMetrics, check_loss

ADAM_BETAS = (0.9, 0.999)  # transformers' defaults, as are epsilon and plain AdamW
ADAM_EPSILON = 1e-8


@dataclass(frozen=True)
class StepResult:
    """A step as measured over all workers.

    ``loss`` is the mean in nats per trained token, ``grad_norm`` the gradient's norm before clipping, and
    ``learning_rate`` is read back from the optimizer.
    """

    loss: float
    grad_norm: float
    learning_rate: float


class Engine(Protocol):
    """A model on its accelerator, with its optimizer: one worker's part of it.

    Workers that hold parts of one copy of the model share a ``data_rank`` and get the same rows. ``steps_in_flight`` is
    how many steps a worker may be ahead of what it has read back: an accelerator need not wait for its host.
    ``rehearses`` says whether a dry run saves, probes and resumes too, because all of that has graphs to compile.
    """

    data_rank: int
    data_size: int
    steps_in_flight: int
    rehearses: bool

    def step(
        self, step: int, micro_batches: Sequence[Sequence[Row | None]], trained_tokens: int, learning_rate: float
    ) -> Callable[[], StepResult]:
        """Take an optimizer step on this worker's rows (None is a row of padding); what came of it, to be read later.

        The loss is divided by ``trained_tokens``, those of all workers' rows.
        """

    def row_loss(self, row: Row) -> float:
        """The summed loss of a row, in nats, without dropout. Every worker calls this with the same row."""

    def save(self, folder: Path) -> None:
        """Write this worker's part of a checkpoint. Raises UserError where the weights contradict one another."""

    def restore(self, checkpoint: Path, record: Record) -> None:
        """Go on from a checkpoint, which has been checked against its list."""


def train(job: TrainingJob, engine: Engine, workers: Workers, finish: Callable[[TrainingResult], None]) -> None:
    """See ``base.Backend.train``."""
    from datasets import load_from_disk

    rows = load_from_disk(str(job.dataset / "train"))
    plan = Plan(len(rows), engine.data_size, job.training)
    rehearsal = job.dry_run is not None
    if job.dry_run and engine.rehearses:  # of a short training too: a later, longer one has the same graphs
        plan = plan.of_at_least(job.dry_run)
    folder = job.paths.rehearsal if rehearsal else job.paths.checkpoints(job.fingerprint)
    saved = Checkpoints(job, folder, engine, workers)
    rows_done = 0 if rehearsal else saved.restore_newest()
    step = plan.step_after(rows_done)
    last_step = min(job.dry_run or plan.total_steps, plan.total_steps)
    save_steps = REHEARSED_SAVE if rehearsal else job.training.save_steps
    saves = engine.rehearses or not rehearsal
    log: RunLog | DryRunLog | None = None
    if workers.rank == 0 and rehearsal:
        shutil.rmtree(folder, ignore_errors=True)  # a killed one's
        log = DryRunLog(last_step)
    if workers.rank == 0 and not rehearsal:
        log = RunLog(job.paths, job.fingerprint, plan.total_steps, step, rows_done)
    if workers.rank == 0 and step < last_step:
        print(f"training: steps {step + 1} to {last_step} of {plan.total_steps}, {workers.size} workers", flush=True)

    def take(step: int) -> Callable[[], StepMetrics]:
        numbers = [number for number in plan.step_rows(step) if number is not None]
        read = {number: rows[number] for number in numbers}
        step_rows = [read[number] for number in numbers]  # a short dataset comes round within a step
        trained_tokens = sum(label != IGNORED for row in step_rows for label in row["labels"])
        micro_batches = [
            [None if number is None else read[number] for number in micro_batch]
            for micro_batch in plan.worker_rows(step, engine.data_rank)
        ]
        taken = engine.step(step, micro_batches, trained_tokens, plan.learning_rate(step))
        tokens = sum(len(row["input_ids"]) for row in step_rows)
        return lambda: StepMetrics(
            step=step + 1,
            **vars(taken()),
            tokens=tokens,
            trained_tokens=trained_tokens,
            rows_done=(step + 1) * plan.global_batch,
        )

    losses: list[float] = []
    seconds: list[float] = []
    in_flight: deque[Callable[[], StepMetrics]] = deque()
    began = time.monotonic()

    def read_back(still_in_flight: int) -> None:
        nonlocal began
        while len(in_flight) > still_in_flight:
            metrics = in_flight.popleft()()
            check_loss(metrics)  # before anything is saved: a checkpoint is never spoilt
            losses.append(metrics.loss)
            seconds.append(time.monotonic() - began)
            began = time.monotonic()
            if log:
                log.step(metrics)

    def save(probed: probe.Probe | None) -> None:
        saved.save(step, step * plan.global_batch, probed)
        if log:
            log.saved(step)

    if not rehearsal:
        stopping.ask_noted()
    while step < last_step:
        in_flight.append(take(step))
        step += 1
        saving = saves and (step % save_steps == 0 or step == last_step)
        read_back(0 if saving or step == last_step else engine.steps_in_flight)
        if saving:
            probed = probe.measured(rows, job.probe, engine.row_loss) if step == last_step else None
            save(probed)
            began = time.monotonic()
        # All stop at the same step, or none: a worker that was asked alone would leave the others in a collective.
        if step < last_step and not rehearsal and workers.any(stopping.asked()):
            if not saving:
                read_back(0)
                save(None)
            if log:
                log.close()
            workers.barrier()  # torchrun ends the others as soon as one has ended
            raise stopping.Stopped(f"stopped as asked, with step {step} of {plan.total_steps} saved; a rerun goes on")
    if rehearsal and engine.rehearses:  # what a training that is resumed does
        saved.restore_newest()
        take(last_step - 1)()
        workers.barrier()
        if workers.rank == 0:
            shutil.rmtree(folder)
    newest = saved.newest()
    if workers.rank == 0 and newest and not rehearsal:
        # A killed prune may have left more; and where training has been resumed at its end, nothing else cleans up.
        checkpoints.prune(folder, job.fingerprint, job.training.save_total_limit)
    peak_memory = workers.largest(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    result = TrainingResult(
        steps=last_step,
        total_steps=plan.total_steps,
        seconds_per_step=round(statistics.median(seconds), 3) if seconds else None,
        peak_memory_bytes=peak_memory,
        first_loss=losses[0] if losses else None,
        last_loss=losses[-1] if losses else None,
        checkpoint=None if rehearsal else newest,
    )
    if workers.rank == 0:
        if log:
            log.close()
        finish(result)
    workers.barrier()  # with an elastic policy the operator counts the job as done when the first worker ends


REHEARSED_SAVE = 3  # a dry run that saves does so after this many steps, and goes on


class Checkpoints:
    """The checkpoints of one training job."""

    def __init__(self, job: TrainingJob, folder: Path, engine: Engine, workers: Workers) -> None:
        self.job = job
        self.folder = folder
        self.engine = engine
        self.workers = workers

    def newest(self) -> Path | None:
        """The complete checkpoint of the job that is furthest in the rows."""
        found = checkpoints.complete(self.folder, self.job.fingerprint)
        return found[-1] if found else None

    def restore_newest(self) -> int:
        """Go on from the newest checkpoint, if there is one; the number of rows it had consumed."""
        newest = self.workers.broadcast(self.newest())
        if newest is None:
            return 0
        if self.workers.rank == 0:
            print(f"resuming from {newest}", flush=True)
        record = checkpoints.check(newest)
        self.engine.restore(newest, record)
        return record.rows_done

    def save(self, step: int, rows_done: int, probed: probe.Probe | None) -> None:
        """Save the state after ``step`` steps and drop the oldest checkpoints beyond saveTotalLimit."""
        record = Record(
            fingerprint=self.job.fingerprint,
            step=step,
            rows_done=rows_done,
            workers=self.workers.size,
            tensor_parallel_size=self.workers.size // self.engine.data_size,
            probe=probed.as_record() if probed else None,
        )
        checkpoints.save(self.folder, record, self.engine.save, self.workers)
        if self.workers.rank == 0:
            checkpoints.prune(self.folder, self.job.fingerprint, self.job.training.save_total_limit)
