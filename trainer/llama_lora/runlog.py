"""Record a training while it runs: progress bar or log lines, progress.json, metrics.jsonl and TensorBoard.

A line of metrics.jsonl is a step (``StepMetrics``, with tokens_per_second) or a measurement of the held-out loss
(``HeldOutMetrics``).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections import deque
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from genvalues.common import files
from genvalues.common.errors import UserError
from genvalues.common.json_files import FileRecord, InvalidJson, JsonNotFound, read_bytes
from llama_lora.monitoring import TrainingMonitor
from llama_lora.paths import Paths
from llama_lora.progress import StageProgress
from llama_lora.stage import Manifest, now

log = logging.getLogger(__name__)

MOST_BYTES = 1 << 30  # of metrics.jsonl: millions of steps
MOST_VALUE = 1e300
TOKEN_WINDOW = 50  # steps over which tokens per second are averaged


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step, over all workers. ``step`` counts from 1; ``loss`` is nats per trained token."""

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    trained_tokens: int
    rows_done: int  # since the start of the training


@dataclass(frozen=True)
class HeldOutMetrics:
    """The held-out loss after ``step`` steps (0: before the first), in nats per trained token.

    ``eval_tokens`` are the trained tokens of the ``eval_rows`` rows that it is measured on.
    """

    step: int
    eval_loss: float
    eval_rows: int
    eval_tokens: int
    rows_done: int  # since the start of the training


def check_loss(metrics: StepMetrics) -> None:
    """Raise UserError when the loss or the gradient is not finite: more steps would not recover."""
    if not (math.isfinite(metrics.loss) and math.isfinite(metrics.grad_norm)):
        raise UserError(
            f"the loss of step {metrics.step} is {metrics.loss} (gradient norm {metrics.grad_norm})",
            where="training.learningRate",
            fix=f"Lower it (currently {metrics.learning_rate:g}), or check the rows in the data report.",
        )


class RunLog:
    """Records the steps of one training. Only the worker of rank 0 creates one."""

    def __init__(self, paths: Paths, fingerprint: str, total_steps: int, first_step: int, rows_done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.paths = paths
        self.total_steps = total_steps
        self._progress = StageProgress("step", total_steps, first_step)
        self._tokens: deque[tuple[float, int]] = deque([(time.monotonic(), 0)], maxlen=TOKEN_WINDOW)
        self._written: dict[str, Any] = {}  # progress.json
        self._held_out: dict[str, Any] = {}  # its part on the held-out loss
        self._saved_step = first_step or None  # the checkpoint that training resumes from
        metrics = paths.metrics(fingerprint)
        paths.progress.unlink(missing_ok=True)  # of an earlier training
        for file in (metrics, paths.progress):
            files.remove_leftovers(file)
        # What comes after the checkpoint is trained and measured again; without one that is everything.
        steps, measurements = read_recorded(metrics) if rows_done else ([], [])
        recorded = [*steps, *measurements]
        kept = sorted((line for line in recorded if line["rows_done"] <= rows_done), key=lambda line: line["rows_done"])
        files.write_text(metrics, "".join(json.dumps(line) + "\n" for line in kept))
        self._metrics = files.open_to_append(metrics)
        self._tensorboard = SummaryWriter(str(paths.tensorboard(fingerprint)), purge_step=first_step + 1)
        self._monitor = TrainingMonitor(paths, fingerprint)

    def step(self, metrics: StepMetrics) -> None:
        """Record a step."""
        self._tokens.append((time.monotonic(), metrics.tokens))
        seconds = self._tokens[-1][0] - self._tokens[0][0]
        per_second = sum(tokens for _, tokens in list(self._tokens)[1:]) / seconds
        self._append(metrics, tokens_per_second=round(per_second, 1))
        for name in ("loss", "learning_rate", "grad_norm"):
            self._tensorboard.add_scalar(f"train/{name}", getattr(metrics, name), metrics.step)
        self._tensorboard.add_scalar("train/tokens_per_second", per_second, metrics.step)
        detail = f"loss {metrics.loss:.4f}  lr {metrics.learning_rate:.2e}  {per_second:.0f} tokens/s"
        self._progress.update(metrics.step, detail, log_now=metrics.step in (1, self.total_steps))
        self._written = {
            **self._held_out,
            "stage": "train",
            "step": metrics.step,
            "totalSteps": self.total_steps,
            "loss": metrics.loss,
            "learningRate": metrics.learning_rate,
            "gradNorm": metrics.grad_norm,
            "tokensPerSecond": round(per_second, 1),
            "etaSeconds": round(self._progress.seconds_left or 0),
            "savedStep": self._saved_step,
            "updated": now(),
        }
        files.write_json(self.paths.progress, self._written)
        self._monitor.step(metrics, per_second)
        self._monitor.progress(self._written)

    def held_out(self, metrics: HeldOutMetrics, seconds: float) -> None:
        """Record a measurement of the held-out loss, which took ``seconds``."""
        self._append(metrics)
        self._tensorboard.add_scalar("eval/loss", metrics.eval_loss, metrics.step)
        self._held_out = {"evalLoss": metrics.eval_loss, "evalStep": metrics.step}
        if self._written:
            self._written |= self._held_out
            files.write_json(self.paths.progress, self._written)
            self._monitor.progress(self._written)
        self._monitor.held_out(metrics.step, metrics.eval_loss)
        # Not part of the time in which the tokens of the steps were trained on.
        self._tokens = deque([(at + seconds, tokens) for at, tokens in self._tokens], maxlen=TOKEN_WINDOW)
        log.info(f"held-out loss {metrics.eval_loss:.4f} after step {metrics.step} ({metrics.eval_rows} rows)")

    def saved(self, step: int) -> None:
        """Record that a checkpoint was saved."""
        self._saved_step = step
        self._written = {**self._written, "savedStep": step}
        files.write_json(self.paths.progress, self._written)
        self._monitor.progress(self._written)

    def _append(self, metrics: StepMetrics | HeldOutMetrics, **others: float) -> None:
        self._metrics.write(json.dumps(asdict(metrics) | others) + "\n")
        self._metrics.flush()

    def close(self) -> None:
        self._progress.close()
        self._metrics.close()
        self._tensorboard.close()
        self._monitor.close()


class DryRunLog:
    """Shows the steps of a dry run and records nothing. Stands in for RunLog."""

    def __init__(self, steps: int) -> None:
        self._progress = StageProgress("dry-run step", steps)

    def step(self, metrics: StepMetrics) -> None:
        self._progress.update(metrics.step)

    def saved(self, step: int) -> None:
        pass

    def close(self) -> None:
        self._progress.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the steps recorded in a metrics.jsonl: the fields of ``StepMetrics``."""
    return read_recorded(path)[0]


def read_held_out(path: Path) -> list[dict[str, Any]]:
    """Read the measurements of the held-out loss in a metrics.jsonl: the fields of ``HeldOutMetrics``."""
    return read_recorded(path)[1]


def read_of_manifest(paths: Paths, trained: Manifest) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Read the steps and the measurements of a training that is done; none if the file is not as it was at its end.

    They are shown, and nothing is calculated from them, so a difference is a warning. A manifest that was written by an
    earlier version has no digest of the file.
    """
    file = paths.metrics(trained.fingerprint)
    content = read_content(file)
    recorded = trained.facts.get("metrics")
    if recorded is not None and record_of_bytes(content) != recorded:
        log.warning(f"{file}: not as train wrote it; its losses are not shown")
        return [], []
    return sorted_out(content)


def record_of_bytes(content: bytes) -> dict[str, Any]:
    """The size and digest of a file's content, as a manifest has them."""
    return asdict(FileRecord(len(content), hashlib.sha256(content).hexdigest()))


def read_recorded(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Read the steps and the measurements of the held-out loss."""
    return sorted_out(read_content(path))


def sorted_out(content: bytes) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The steps and the measurements in the content of a metrics.jsonl."""
    lines = lines_of(content)
    return [line for line in lines if _is(StepMetrics, line)], [line for line in lines if _is(HeldOutMetrics, line)]


def read_content(path: Path) -> bytes:
    """Read a metrics.jsonl; empty if there is none.

    Raises UserError for what is not a regular file: a link is not followed, and a FIFO not waited for.
    """
    try:
        return read_bytes(path, MOST_BYTES)
    except JsonNotFound:
        return b""
    except InvalidJson as error:
        raise UserError(str(error), where=str(path), fix="Delete it: it only has the curves of the report.") from None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file with a JSON object per line. Raises UserError as ``read_content`` does."""
    return lines_of(read_content(path))


def lines_of(content: bytes) -> list[dict[str, Any]]:
    """The JSON objects, one a line, up to a line that a killed process left incomplete."""
    lines: list[dict[str, Any]] = []
    for text in content.decode("utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            break
        if not isinstance(line, dict):
            break
        lines.append(line)
    return lines


def is_number(value: Any) -> bool:
    """Whether a value of a line is a number to calculate with: finite, and an integer only if a float can hold it."""
    return isinstance(value, (int, float)) and abs(value) < MOST_VALUE


def _is(kind: type[StepMetrics | HeldOutMetrics], line: dict[str, Any]) -> bool:
    """Whether a line has the fields of ``kind``, all of them finite numbers."""
    return all(is_number(line.get(field.name)) for field in fields(kind))
