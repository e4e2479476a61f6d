"""Workers of `llama-lora acceptance`: those of train, which also record what their device does in each step.

python -m llama_lora.backends.native.measured CONFIG WORKSPACE KILL_AFTER
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from genvalues.common import files
from llama_lora.backends import worker
from llama_lora.backends.base import Backend, TrainingJob
from llama_lora.backends.loop import Row, StepResult
from llama_lora.backends.native import compiling
from llama_lora.backends.native.backend import NativeBackend
from llama_lora.backends.native.devices import Device
from llama_lora.backends.native.engine import NativeEngine
from llama_lora.backends.worker_group import WorkerGroup
from llama_lora.paths import Paths
from llama_lora.runlog import read_lines
from llama_lora.stage import Stage
from llama_lora.stages.train import train_worker


def measurements(paths: Paths) -> Path:
    """The folder with one file for each worker, and in it one line for each step."""
    return paths.run / "measured"


def read_measurements(paths: Paths) -> list[dict[str, Any]]:
    """The steps of all workers, those of worker 0 first."""
    return [step for file in sorted(measurements(paths).glob("*.jsonl")) for step in read_lines(file)]


class MeasuredEngine(NativeEngine):
    """An engine that waits for each step and records it. All workers kill themselves after step ``kill_after``."""

    kill_after = 0  # from 1; 0: never
    fallbacks: Sequence[str] = ()

    def step(
        self, step: int, micro_batches: Sequence[Sequence[Row | None]], trained_tokens: int, learning_rate: float
    ) -> Callable[[], StepResult]:
        first = not self._steps_taken
        result = super().step(step, micro_batches, trained_tokens, learning_rate)()
        self.workers.barrier()  # every worker has compiled what it needs
        line = {
            "step": step + 1,
            "first": first,
            "fallbacks": list(self.fallbacks),
            "cached": len(compiling.cached_files()),
            "memory": self.device.memory_statistics(),
            "node": os.environ["GROUP_RANK"],
            "worker": self.workers.rank,
        }
        folder = measurements(self.job.paths)
        folder.mkdir(exist_ok=True)
        with files.open_to_append(folder / f"worker-{self.workers.rank:05d}.jsonl") as file:
            file.write(json.dumps(line) + "\n")
        if step + 1 == self.kill_after:
            self.workers.barrier()  # at the same time, or torchrun of a node that waits would lose its store
            os.kill(os.getpid(), signal.SIGKILL)
        return lambda: result

    def _check_fallbacks(self) -> None:
        self.fallbacks = self.device.fallback_operators()  # before they are cleared
        super()._check_fallbacks()


class MeasuredBackend(NativeBackend):
    """Trains with a MeasuredEngine."""

    def __init__(self, kill_after: int) -> None:
        super().__init__()
        self.kill_after = kill_after

    def make_engine(self, job: TrainingJob, device: Device, workers: WorkerGroup) -> MeasuredEngine:
        engine = MeasuredEngine(job, device, workers, self.compile_backend(job, device))
        engine.kill_after = self.kill_after
        return engine


def work(stage: Stage, backend: Backend, kill_after: int) -> None:
    train_worker(stage, MeasuredBackend(kill_after))


def worker_command(paths: Paths, kill_after: int) -> list[str]:
    return [sys.executable, "-m", __name__, str(paths.config), str(paths.workspace), str(kill_after)]


def main(config_file: str, workspace: str, kill_after: str) -> None:
    worker.run("train", config_file, workspace, functools.partial(work, kill_after=int(kill_after)))


if __name__ == "__main__":
    main(*sys.argv[1:])
