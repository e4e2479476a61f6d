"""Record a training while it runs: progress bar or log lines, progress.json, metrics.jsonl and TensorBoard."""

from __future__ import annotations

import json
import math
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from genvalues.common import files
from genvalues.common.errors import UserError
from llama_lora.monitoring import TrainingMonitor
from llama_lora.paths import Paths
from llama_lora.progress import StageProgress
from llama_lora.stage import now

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
        self._saved_step = first_step or None  # the checkpoint that training resumes from
        metrics = paths.metrics(fingerprint)
        paths.progress.unlink(missing_ok=True)  # of an earlier training
        for file in (metrics, paths.progress):
            for leftover in file.parent.glob(f".{file.name}{files.PARTIAL}*"):  # of a killed process
                leftover.unlink()
        # Steps after the checkpoint are trained, and recorded, again.
        kept = [step for step in read_metrics(metrics) if step["rows_done"] <= rows_done]
        files.write_text(metrics, "".join(json.dumps(line) + "\n" for line in kept))
        self._metrics = metrics.open("a", encoding="utf-8")
        self._tensorboard = SummaryWriter(str(paths.tensorboard(fingerprint)), purge_step=first_step + 1)
        self._monitor = TrainingMonitor(paths, fingerprint)

    def step(self, metrics: StepMetrics) -> None:
        """Record a step."""
        self._tokens.append((time.monotonic(), metrics.tokens))
        seconds = self._tokens[-1][0] - self._tokens[0][0]
        per_second = sum(tokens for _, tokens in list(self._tokens)[1:]) / seconds
        self._metrics.write(json.dumps(asdict(metrics)) + "\n")
        self._metrics.flush()
        for name in ("loss", "learning_rate", "grad_norm"):
            self._tensorboard.add_scalar(f"train/{name}", getattr(metrics, name), metrics.step)
        self._tensorboard.add_scalar("train/tokens_per_second", per_second, metrics.step)
        detail = f"loss {metrics.loss:.4f}  lr {metrics.learning_rate:.2e}  {per_second:.0f} tokens/s"
        self._progress.update(metrics.step, detail, log_now=metrics.step in (1, self.total_steps))
        self._written = {
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

    def saved(self, step: int) -> None:
        """Record that a checkpoint was saved."""
        self._saved_step = step
        self._written = {**self._written, "savedStep": step}
        files.write_json(self.paths.progress, self._written)
        self._monitor.progress(self._written)

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
    """Read the steps recorded in a metrics.jsonl, up to a line that a killed process left incomplete."""
    steps: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                steps.append(json.loads(line))
            except ValueError:
                break
    return steps
