"""See ``base.Backend``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from genvalues.common.errors import UserError, UserErrors
from llama_lora.backends import checkpoints, loop
from llama_lora.backends.base import Adapter, TrainingJob, TrainingResult
from llama_lora.backends.native import shards
from llama_lora.backends.native.devices import open_device
from llama_lora.backends.native.engine import NativeEngine
from llama_lora.config import RunConfig


class NativeBackend:
    """See ``base.Backend``."""

    def check(self, config: RunConfig, model: Path) -> None:
        """Check target modules, parallelism and sequence length against the model."""
        mistakes = []
        linear, context = describe_model(model)
        targets = config.lora.target_modules
        for name in [] if targets == "all-linear" else targets:
            if name not in linear:
                where, fix = "lora.targetModules", f"Allowed values: {', '.join(linear)}."
                mistakes.append(UserError(f"the model has no linear layer {name!r}", where=where, fix=fix))
        length = config.training.max_sequence_length
        if length > context:
            where, fix = "training.maxSequenceLength", f"Set it to {context} or less."
            mistakes.append(UserError(f"{length} exceeds the model's {context} positions", where=where, fix=fix))
        if mistakes:
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


def describe_model(path: Path) -> tuple[list[str], int]:
    """Return the names of the linear layers that LoRA can target, and the context length. Loads no weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    output = model.get_output_embeddings()
    linear = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not output
    }
    return sorted(linear), config.max_position_embeddings
