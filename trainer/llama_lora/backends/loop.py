"""The training loop, the same on every accelerator: rows, steps, learning rate, checkpoints, log and probe.

What differs is behind ``Engine``: taking a step, and the content of a checkpoint.
"""

from __future__ import annotations

import logging
import resource
import shutil
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn, Protocol

from genvalues.common.errors import UserError
from llama_lora import probe
from llama_lora.backends import checkpoints, stopping
from llama_lora.backends.base import TrainingJob, TrainingResult
from llama_lora.backends.checkpoints import CheckpointRecord
from llama_lora.backends.held_out import HeldOutLoss, HeldOutState, read_rows
from llama_lora.backends.step_plan import StepPlan
from llama_lora.backends.worker_group import WorkerGroup
from llama_lora.data.tokens import IGNORED
from llama_lora.probe import ProbeRecord, Row
from llama_lora.runlog import DryRunLog, HeldOutMetrics, RunLog, StepMetrics, check_loss

log = logging.getLogger(__name__)

ADAM_BETAS = (0.9, 0.999)  # transformers' defaults, as are epsilon and plain AdamW
ADAM_EPSILON = 1e-8
REHEARSED_SAVE = 3  # the step after which a rehearsal saves for the first time


@dataclass(frozen=True)
class StepResult:
    """The result of a step over all workers.

    ``loss`` is the mean in nats per trained token, ``grad_norm`` the gradient's norm before clipping.
    ``learning_rate`` is read back from the optimizer.
    """

    loss: float
    grad_norm: float
    learning_rate: float


class Engine(Protocol):
    """One worker's part of the model on its accelerator, with the optimizer.

    - ``data_rank``, ``data_size``: workers that hold parts of one copy of the model have the same rank and rows
    - ``steps_in_flight``: how many steps may be running before the host waits for a result
    - ``rehearses``: whether a dry run also saves, probes and resumes, because these have graphs to compile
    """

    data_rank: int
    data_size: int
    steps_in_flight: int
    rehearses: bool

    def step(
        self, step: int, micro_batches: Sequence[Sequence[Row | None]], trained_tokens: int, learning_rate: float
    ) -> Callable[[], StepResult]:
        """Take an optimizer step on this worker's rows (None is a padding row). Call the result to wait for it.

        The loss is divided by ``trained_tokens``, the number over all workers' rows.
        """

    def row_loss(self, *rows: Row | None) -> float:
        """The summed loss of up to perDeviceBatchSize rows in nats, without dropout. None is a padding row.

        Every worker calls this equally often; those with the same ``data_rank`` with the same rows.
        """

    def save(self, folder: Path) -> None:
        """Write this worker's part of a checkpoint. Raises UserError if workers disagree about shared weights."""

    def restore(self, checkpoint: Path, record: CheckpointRecord) -> None:
        """Load a checkpoint whose files have been verified."""


def run_training(
    job: TrainingJob, engine: Engine, workers: WorkerGroup, finish: Callable[[TrainingResult], None]
) -> None:
    """Train, or rehearse if the job is a dry run. See ``base.Backend.train``."""
    from datasets import load_from_disk

    rows: Sequence[Row] = load_from_disk(str(job.dataset / "train"))
    plan = StepPlan(len(rows), engine.data_size, job.training)
    plan.check_learns()
    held_out = None
    if job.training.eval_steps is not None and job.dry_run is None:
        held_out = HeldOutLoss(read_rows(job.dataset, job.training), engine, workers, job.training)
    loop = Loop(job, engine, workers, rows, plan, held_out)
    result = loop.train() if job.dry_run is None else loop.rehearse(job.dry_run)
    if loop.run_log:
        loop.run_log.close()
    if workers.rank == 0:
        finish(result)
    workers.barrier()  # with an elastic policy the operator counts the job as done when the first worker exits


class Loop:
    """One worker's loop over the steps of a job."""

    def __init__(
        self,
        job: TrainingJob,
        engine: Engine,
        workers: WorkerGroup,
        rows: Sequence[Row],
        plan: StepPlan,
        held_out: HeldOutLoss | None = None,
    ) -> None:
        self.job = job
        self.engine = engine
        self.workers = workers
        self.rows = rows
        self.plan = plan
        self.held_out = held_out
        self.run_log: RunLog | DryRunLog | None = None  # only the worker of rank 0 has one
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self._in_flight: deque[Callable[[], StepMetrics]] = deque()
        self._step_began = 0.0

    def train(self) -> TrainingResult:
        """Train from the newest checkpoint to the last step, or until the held-out loss no longer falls.

        Raises TrainingStopped when asked to stop earlier.
        """
        job, plan = self.job, self.plan
        folder = job.paths.checkpoints(job.fingerprint)
        saved = JobCheckpoints(job, folder, self.engine, self.workers)
        rows_done = saved.restore_newest()
        step = plan.step_after(rows_done)
        if self.workers.rank == 0:
            self.run_log = RunLog(job.paths, job.fingerprint, plan.total_steps, step, rows_done)
        self._log_start(step, plan.total_steps)
        stopping.note_requests()
        if not rows_done and self.held_out:
            self._measure_held_out(0)
        if saved.restored and saved.restored[1].probe is None and step >= plan.total_steps:
            # Saved before the end: with maxSteps fewer workers reach it after fewer rows.
            saved.add_probe(self._measure_probe())
        self._step_began = time.monotonic()
        while step < plan.total_steps and not saved.held_out.ends(job.training):
            self._start_step(step)
            step += 1
            is_last = step == plan.total_steps
            measures = self.held_out is not None and (is_last or step % (job.training.eval_steps or 1) == 0)
            saves = is_last or step % job.training.save_steps == 0
            self._read_back(0 if saves or measures else self.engine.steps_in_flight)
            is_best = False
            if measures:
                saved.held_out = self._measured(saved.held_out, step)
                is_best = (
                    saved.held_out.best_rows_done == step * plan.global_batch and job.training.load_best_model_at_end
                )
                is_last = is_last or saved.held_out.ends(job.training)
            if saves or is_last or is_best:
                saves = True
                self._save(saved, step, self._measure_probe() if is_last or is_best else None)
            # All workers stop after the same step: one that stopped alone would leave the others in a collective.
            if not is_last and self.workers.any(stopping.stop_requested()):
                if not saves:
                    self._read_back(0)
                    self._save(saved, step, None)
                self._stop(step)
        if self.workers.rank == 0:
            saved.prune()  # a killed prune leaves files, and a training that resumes at its end saves nothing
            self._log_end(step, saved.held_out)
        best = saved.best() if job.training.load_best_model_at_end else None
        return self._result(step, best or saved.newest(), saved.held_out)

    def rehearse(self, steps: int) -> TrainingResult:
        """Take the first steps and delete what they write. If the engine rehearses, also save, probe and resume.

        Such an engine takes all ``steps`` steps even of a shorter training: a longer one later has the same graphs.
        """
        job, rehearses = self.job, self.engine.rehearses
        if rehearses:
            self.plan = self.plan.of_at_least(steps)
        last_step = min(steps, self.plan.total_steps)
        saved = JobCheckpoints(job, job.paths.rehearsal, self.engine, self.workers)
        if self.workers.rank == 0:
            shutil.rmtree(job.paths.rehearsal, ignore_errors=True)  # of a rehearsal that was killed
            self.run_log = DryRunLog(last_step)
        self._log_start(0, last_step)
        self._step_began = time.monotonic()
        for step in range(1, last_step + 1):
            self._start_step(step - 1)
            is_last = step == last_step
            saves = rehearses and (is_last or step % REHEARSED_SAVE == 0)
            self._read_back(0 if saves or is_last else self.engine.steps_in_flight)
            if saves:
                self._save(saved, step, self._measure_probe() if is_last else None)
                if job.training.eval_steps is not None:
                    self.engine.row_loss(None)  # a graph that the probe has too, unless it has no rows
        if rehearses:
            saved.restore_newest()
            self._take_step(last_step - 1)()
            self.workers.barrier()
            if self.workers.rank == 0:
                shutil.rmtree(job.paths.rehearsal)
        return self._result(last_step, None)

    def _log_start(self, step: int, last_step: int) -> None:
        if self.workers.rank == 0 and step < last_step:
            total, size = self.plan.total_steps, self.workers.size
            log.info(f"training: steps {step + 1} to {last_step} of {total}, {size} workers")

    def _start_step(self, step: int) -> None:
        self._in_flight.append(self._take_step(step))

    def _take_step(self, step: int) -> Callable[[], StepMetrics]:
        """Take a step (from 0). Call the result to wait for its metrics."""
        numbers = [number for number in self.plan.step_rows(step) if number is not None]
        read = {number: self.rows[number] for number in numbers}
        step_rows = [read[number] for number in numbers]  # rows of a small dataset can repeat within a step
        trained_tokens = sum(label != IGNORED for row in step_rows for label in row["labels"])
        micro_batches = [
            [None if number is None else read[number] for number in micro_batch]
            for micro_batch in self.plan.worker_rows(step, self.engine.data_rank)
        ]
        result = self.engine.step(step, micro_batches, trained_tokens, self.plan.learning_rate(step))
        tokens = sum(len(row["input_ids"]) for row in step_rows)
        return lambda: StepMetrics(
            step=step + 1,
            **vars(result()),
            tokens=tokens,
            trained_tokens=trained_tokens,
            rows_done=(step + 1) * self.plan.global_batch,
        )

    def _read_back(self, still_in_flight: int) -> None:
        """Wait for the oldest steps and log them, until ``still_in_flight`` steps are running."""
        while len(self._in_flight) > still_in_flight:
            metrics = self._in_flight.popleft()()
            check_loss(metrics)  # before any save: no checkpoint has weights that are not finite
            self.losses.append(metrics.loss)
            self.seconds.append(time.monotonic() - self._step_began)
            self._step_began = time.monotonic()
            if self.run_log:
                self.run_log.step(metrics)

    def _measure_probe(self) -> ProbeRecord | None:
        return probe.measure(self.rows, self.job.probe, self.engine.row_loss)

    def _measure_held_out(self, step: int) -> float:
        assert self.held_out is not None
        began = time.monotonic()
        loss = self.held_out.measure(step)
        if isinstance(self.run_log, RunLog):
            rows, tokens = len(self.held_out.rows), self.held_out.tokens
            metrics = HeldOutMetrics(step, loss, rows, tokens, step * self.plan.global_batch)
            self.run_log.held_out(metrics, time.monotonic() - began)
        self._step_began = time.monotonic()
        return loss

    def _measured(self, state: HeldOutState, step: int) -> HeldOutState:
        """Measure the held-out loss and note it."""
        loss = self._measure_held_out(step)
        threshold = self.job.training.early_stopping_threshold
        return state.after(loss, step, step * self.plan.global_batch, threshold)

    def _log_end(self, step: int, state: HeldOutState) -> None:
        if state.ends(self.job.training) and step < self.plan.total_steps:
            log.info(
                f"stopped early after step {step} of {self.plan.total_steps}: {state.without_improvement} measurements "
                f"have not lowered the held-out loss below {state.best_loss:.4f} of step {state.best_step}"
            )
        elif self.job.training.load_best_model_at_end and state.best_step is not None:
            log.info(f"the lowest held-out loss is {state.best_loss:.4f}, after step {state.best_step}")

    def _save(self, saved: JobCheckpoints, step: int, probed: ProbeRecord | None) -> None:
        saved.save(step, step * self.plan.global_batch, probed)
        if self.run_log:
            self.run_log.saved(step)
        self._step_began = time.monotonic()

    def _stop(self, step: int) -> NoReturn:
        if self.run_log:
            self.run_log.close()
        self.workers.barrier()  # torchrun ends the other workers as soon as one has ended
        raise stopping.TrainingStopped(
            f"stopped as asked, with step {step} of {self.plan.total_steps} saved; a rerun resumes there"
        )

    def _result(self, steps: int, checkpoint: Path | None, held_out: HeldOutState | None = None) -> TrainingResult:
        peak_memory = self.workers.max(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return TrainingResult(
            steps=steps,
            total_steps=self.plan.total_steps,
            seconds_per_step=round(statistics.median(self.seconds), 3) if self.seconds else None,
            peak_memory_bytes=peak_memory,
            first_loss=self.losses[0] if self.losses else None,
            last_loss=self.losses[-1] if self.losses else None,
            checkpoint=checkpoint,
            held_out=held_out if held_out and held_out.loss is not None else None,
        )


class JobCheckpoints:
    """The checkpoints of one training job."""

    def __init__(self, job: TrainingJob, folder: Path, engine: Engine, workers: WorkerGroup) -> None:
        self.job = job
        self.folder = folder
        self.engine = engine
        self.workers = workers
        self.held_out = HeldOutState()  # what is saved with the next checkpoint
        self.restored: tuple[Path, CheckpointRecord] | None = None

    def newest(self) -> Path | None:
        """The complete checkpoint with the most consumed rows."""
        found = checkpoints.complete(self.folder, self.job.fingerprint)
        return found[-1] if found else None

    def best(self) -> Path | None:
        """The complete checkpoint of the lowest held-out loss; None if there is none."""
        return checkpoints.at_rows(self.folder, self.job.fingerprint, self.held_out.best_rows_done)

    def restore_newest(self) -> int:
        """Load the newest intact checkpoint and return the number of rows it has consumed; 0 if nothing was saved.

        The worker of rank 0 verifies it for all. Raises UserError in every worker if only damaged ones are left.
        """
        found = self.workers.broadcast(self._newest_intact() if self.workers.rank == 0 else None)
        if isinstance(found, UserError):
            raise found
        if found is None:
            return 0
        self.restored = found
        newest, record = found
        if self.workers.rank == 0:
            log.info(f"resuming from {newest}")
        self.engine.restore(newest, record)
        self.held_out = record.held_out or HeldOutState()
        return record.rows_done

    def _newest_intact(self) -> tuple[Path, CheckpointRecord] | UserError | None:
        try:
            found = checkpoints.newest_intact(self.folder, self.job.fingerprint)
            if found and self.job.training.load_best_model_at_end:
                checkpoints.check_best(self.folder, found[1])
            return found
        except UserError as error:  # raised by every worker: one that ended alone would leave the others waiting
            return error

    def add_probe(self, probed: ProbeRecord | None) -> None:
        """Record the probe in the checkpoint that was restored."""
        assert self.restored
        checkpoint, record = self.restored
        if self.workers.rank == 0:
            checkpoints.write_record(checkpoint, replace(record, probe=probed))

    def save(self, step: int, rows_done: int, probed: ProbeRecord | None) -> None:
        """Save the state after ``step`` steps, and delete the oldest checkpoints beyond saveTotalLimit."""
        record = CheckpointRecord(
            fingerprint=self.job.fingerprint,
            step=step,
            rows_done=rows_done,
            workers=self.workers.size,
            tensor_parallel_size=self.workers.size // self.engine.data_size,
            probe=probed,
            held_out=self.held_out if self.held_out.loss is not None else None,
        )
        if self.workers.rank == 0:
            self._set_best_aside(record)
        checkpoints.save(self.folder, record, self.engine.save, self.workers)
        if self.workers.rank == 0:
            self.prune()

    def prune(self) -> None:
        """Delete the oldest checkpoints beyond saveTotalLimit, but no best one that the training may continue with."""
        training = self.job.training
        limit, keep_best = training.save_total_limit, training.load_best_model_at_end
        checkpoints.prune(self.folder, self.job.fingerprint, limit, keep_best=keep_best)

    def _set_best_aside(self, record: CheckpointRecord) -> None:
        """Rename the best checkpoint if ``record`` is about to get its name.

        That can be after a resume with another number of workers, with which the same step has other rows.
        """
        best = self.best() if self.job.training.load_best_model_at_end else None
        if best and best.name == checkpoints.name_of(record) and record.rows_done != self.held_out.best_rows_done:
            best.rename(best.with_name(f"{best.name}-of-{self.held_out.best_rows_done}-rows"))
