"""See ``base.Backend``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from genvalues.common.errors import UserErrors
from llama_lora.backends import checkpoints, loop
from llama_lora.backends.base import Adapter, TrainingJob, TrainingResult
from llama_lora.backends.native import rules, shards
from llama_lora.backends.native.devices import open_device
from llama_lora.backends.native.engine import NativeEngine
from llama_lora.config import RunConfig


class NativeBackend:
    """See ``base.Backend``."""

    def check(self, config: RunConfig, model: Path) -> None:
        """Check the settings against the rules of native, and the model against what the engine calls."""
        if mistakes := rules.check(config, model):
            raise UserErrors(mistakes)

    def train(self, job: TrainingJob, finish: Callable[[TrainingResult], None]) -> None:
        device, workers = open_device(job.device)
        compile_backend = device.type if device.static_shapes and job.compile.mode == "layers" else None
        loop.run_training(job, NativeEngine(job, device, workers, compile_backend), workers, finish)
        dist.destroy_process_group()

    def read_adapter(self, checkpoint: Path, base: Path | None) -> Adapter:
        """Read the adapter from the parts of all workers, without a model or a process group."""
        record = checkpoints.verify_checkpoint(checkpoint)
        return shards.read_adapter(checkpoint, record.files)
