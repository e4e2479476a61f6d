"""See ``base.Backend``."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch.distributed as dist

from genvalues.common.errors import UserErrors
from llama_lora.backends import checkpoints, loop
from llama_lora.backends.base import Adapter, TrainingJob, TrainingResult
from llama_lora.backends.launch import run_workers, worker_command
from llama_lora.backends.native import compiling, rules, shards
from llama_lora.backends.native.devices import Device, open_device
from llama_lora.backends.native.engine import NativeEngine
from llama_lora.backends.provenance import check_compiled
from llama_lora.backends.worker_group import WorkerGroup
from llama_lora.config import RunConfig
from llama_lora.stage import Stage

log = logging.getLogger(__name__)


class NativeBackend:
    """See ``base.Backend``."""

    dry_run_steps = 3  # every graph, and a median time that does not depend on the first step

    def __init__(self) -> None:
        self._cached_before: dict[Path, int] = {}

    def check(self, config: RunConfig, model: Path) -> None:
        """Check the settings against the rules of native, and the model against what the engine calls."""
        if mistakes := rules.check(config, model):
            raise UserErrors(mistakes)

    def compile(self, stage: Stage) -> None:
        if stage.config.device == "cpu":
            log.info("compile: dry run of the first training steps on the CPU; nothing is compiled")
        run_workers(worker_command(stage.name, stage.paths), stage.config)

    def finish_dry_run(self, stage: Stage, result: TrainingResult) -> None:
        compiling.finish(stage, result, self._cached_before)

    def check_compiled(self, stage: Stage) -> None:
        if stage.config.device == "neuron":
            compiling.set_cache(stage.paths)
            check_compiled(stage, compiling.provenance(stage), stage.paths.neff_cache)

    def using_cache(self, stage: Stage) -> AbstractContextManager[object]:
        if stage.config.device == "neuron":
            compiling.set_cache(stage.paths)
            self._cached_before = compiling.cached_files()
        return nullcontext()

    def train(self, job: TrainingJob, finish: Callable[[TrainingResult], None]) -> None:
        device, workers = open_device(job.device)
        loop.run_training(job, self.make_engine(job, device, workers), workers, finish)
        dist.destroy_process_group()

    def make_engine(self, job: TrainingJob, device: Device, workers: WorkerGroup) -> NativeEngine:
        return NativeEngine(job, device, workers, self.compile_backend(job, device))

    def compile_backend(self, job: TrainingJob, device: Device) -> str | None:
        """What torch.compile compiles each decoder layer with; None to compute eagerly."""
        return device.type if device.static_shapes and job.compile.mode == "layers" else None

    def read_adapter(self, checkpoint: Path, base: Path | None) -> Adapter:
        """Read the adapter from the parts of all workers, without a model or a process group."""
        record = checkpoints.verify_checkpoint(checkpoint)
        return shards.read_adapter(checkpoint, record.files)
