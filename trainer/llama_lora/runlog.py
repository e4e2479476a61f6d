"""What a training says while it runs: a line in the log, progress.json, metrics.jsonl and TensorBoard."""

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
from llama_lora.paths import Paths
from llama_lora.stage import now

SECONDS_BETWEEN_LINES = 5


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step, over all workers. ``step`` counts from 1; ``loss`` is nats per trained token."""

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    trained_tokens: int
    rows_done: int  # since the beginning of the training


def check_loss(metrics: StepMetrics) -> None:
    """Raise UserError when training has blown up: going on would only cost."""
    if not (math.isfinite(metrics.loss) and math.isfinite(metrics.grad_norm)):
        raise UserError(
            f"the loss of step {metrics.step} is {metrics.loss} (gradient norm {metrics.grad_norm})",
            where="training.learningRate",
            fix=f"Lower it (it is {metrics.learning_rate:g}), or look at the rows in the data report.",
        )


class RunLog:
    """Writes the steps of one training. Only the worker of rank 0 has one."""

    def __init__(self, paths: Paths, fingerprint: str, total_steps: int, first_step: int, rows_done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.paths = paths
        self.total_steps = total_steps
        self._times: deque[tuple[float, int]] = deque([(time.monotonic(), 0)], maxlen=50)
        self._last_line = 0.0
        self._progress: dict[str, Any] = {}
        self._saved_step = first_step or None  # what is resumed from
        metrics = paths.metrics(fingerprint)
        paths.progress.unlink(missing_ok=True)  # another training's
        for file in (metrics, paths.progress):
            for leftover in file.parent.glob(f".{file.name}{files.PARTIAL}*"):  # a kill's
                leftover.unlink()
        # Steps after the checkpoint are done, and recorded, again.
        kept = [step for step in read_metrics(metrics) if step["rows_done"] <= rows_done]
        files.write_text(metrics, "".join(json.dumps(line) + "\n" for line in kept))
        self._metrics = metrics.open("a", encoding="utf-8")
        self._tensorboard = SummaryWriter(str(paths.tensorboard(fingerprint)), purge_step=first_step + 1)

    def step(self, metrics: StepMetrics) -> None:
        """Record a step everywhere; a line in the log at most every few seconds."""
        self._times.append((time.monotonic(), metrics.tokens))
        seconds = self._times[-1][0] - self._times[0][0]
        per_second = sum(tokens for _, tokens in list(self._times)[1:]) / seconds
        eta = (self.total_steps - metrics.step) * seconds / (len(self._times) - 1)
        self._metrics.write(json.dumps(asdict(metrics)) + "\n")
        self._metrics.flush()
        for name in ("loss", "learning_rate", "grad_norm"):
            self._tensorboard.add_scalar(f"train/{name}", getattr(metrics, name), metrics.step)
        self._tensorboard.add_scalar("train/tokens_per_second", per_second, metrics.step)
        self._progress = {
            "stage": "train",
            "step": metrics.step,
            "totalSteps": self.total_steps,
            "loss": metrics.loss,
            "learningRate": metrics.learning_rate,
            "tokensPerSecond": round(per_second, 1),
            "etaSeconds": round(eta),
            "savedStep": self._saved_step,
            "updated": now(),
        }
        files.write_json(self.paths.progress, self._progress)
        if metrics.step in (1, self.total_steps) or time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            print(
                f"step {metrics.step}/{self.total_steps}  loss {metrics.loss:.4f}  lr {metrics.learning_rate:.2e}  "
                f"{per_second:.0f} tokens/s  ETA {duration(eta)}",
                flush=True,
            )

    def saved(self, step: int) -> None:
        """Record that a checkpoint is there."""
        self._saved_step = step
        files.write_json(self.paths.progress, {**self._progress, "savedStep": step})

    def close(self) -> None:
        self._metrics.close()
        self._tensorboard.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The steps recorded in a metrics.jsonl; a line that a killed process left half written ends the list."""
    steps: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                steps.append(json.loads(line))
            except ValueError:
                break
    return steps


def duration(seconds: float) -> str:
    """Seconds as people say them: 48 s, 12 min 5 s, 3 h 20 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
