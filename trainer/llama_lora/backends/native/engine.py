"""One worker's engine: a step, a probe row, save and restore. See ``loop.Engine``."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from genvalues.common.errors import UserError
from llama_lora import library_versions
from llama_lora.backends.base import TrainingJob
from llama_lora.backends.checkpoints import CheckpointRecord
from llama_lora.backends.loop import Row, StepResult
from llama_lora.backends.lora import dropout_seed
from llama_lora.backends.native import layout as layouts
from llama_lora.backends.native import shards
from llama_lora.backends.native.devices import Device
from llama_lora.backends.native.host import compute_on_host
from llama_lora.backends.native.model import (
    LoraModel,
    ModelBatch,
    adapter_parameters,
    build_model,
    make_batch,
    materialize,
    move_buffers,
    to_device,
)
from llama_lora.backends.native.optimizer import LocalAdamW, clip, squared_norm
from llama_lora.backends.native.regions import StoredWeights
from llama_lora.backends.worker_group import WorkerGroup
from llama_lora.config import ActivationCheckpointing
from llama_lora.safetensors_files import DTYPES

log = logging.getLogger(__name__)


class NativeEngine:
    """See ``loop.Engine``. ``compile_backend`` compiles each decoder layer with it; None computes eagerly."""

    def __init__(
        self, job: TrainingJob, device: Device, workers: WorkerGroup, compile_backend: str | None = None
    ) -> None:
        self.job, self.device, self.workers = job, device, workers
        self.static = device.static_shapes or compile_backend is not None
        self.layout = layouts.make_layout(device.type, job.parallelism)
        self.data_rank, self.data_size = self.layout.data_rank, self.layout.data_size
        self.steps_in_flight, self.rehearses = device.steps_in_flight, self.static
        self.load(compile_backend)
        self.root.train()
        self.optimizer = LocalAdamW(adapter_parameters(self.root), device.torch, job.training.weight_decay)
        self._steps_taken = 0
        if self.static:  # the probe's graphs are compiled before the first step, so that no later step waits for them
            self._summed_loss([None])

    def load(self, compile_backend: str | None) -> None:
        """Build the model and read this worker's part of the base weights."""
        weights = StoredWeights.of_model(self.job.model)
        config = library_versions.load_config(self.job.model)
        self.divide(build_model(config, self.job.lora, weights_dtype(weights, self.device)), compile_backend)
        materialize(self.root, self.device.torch, weights, self.job.training.seed)

    def divide(self, model: LoraModel, compile_backend: str | None) -> None:
        """Take this worker's part of a model whose parameters are on the meta device."""
        self.root, self.peft_config = model
        move_buffers(self.root, self.device.torch)
        if self.device.type == "cpu" and not self.static and self.layout.tensor_size == 1:
            compute_on_host(self.root.lm)
        recompute = recomputation(self.job.training.activation_checkpointing, self.device)
        layouts.parallelize(self.root, self.layout, recompute, compile_backend)

    def step(
        self, step: int, micro_batches: Sequence[Sequence[Row | None]], trained_tokens: int, learning_rate: float
    ) -> Callable[[], StepResult]:
        torch.manual_seed(dropout_seed(self.job.training.seed, step, self.data_rank))
        loss = self._backward(micro_batches, trained_tokens)
        gradients = self.optimizer.gradients()
        if not self.layout.sharded:
            self._sum_over_copies(gradients)
        loss, norm = self._loss_and_norm(loss, gradients)
        clip(gradients, norm, self.job.training.max_grad_norm)
        self.optimizer.step(gradients, self._scalar(learning_rate))
        self._check_fallbacks()
        rate = self.optimizer.learning_rate
        return lambda: StepResult(loss.item(), norm.item(), float(rate))

    def row_loss(self, *rows: Row | None) -> float:
        return float(self._summed_loss(rows).item())

    def save(self, folder: Path) -> None:
        shards.save_parts(folder, self.optimizer, adapter_config(self.peft_config, self.job.base_name), self.workers)

    def restore(self, checkpoint: Path, record: CheckpointRecord) -> None:
        shards.load_parts(checkpoint, record.files, self.optimizer)

    def _backward(self, micro_batches: Sequence[Sequence[Row | None]], trained_tokens: int) -> torch.Tensor:
        """Sum the gradients of the micro-batches, and return this worker's share of the step's loss."""
        loss = torch.zeros((), device=self.device.torch)
        tokens = self._scalar(float(trained_tokens))  # a number would be a new graph
        for index, micro_batch in enumerate(micro_batches):
            self._sum_gradients(is_last=index == len(micro_batches) - 1)
            micro_loss = self.root(self._batch(micro_batch)) / tokens
            micro_loss.backward()
            loss += micro_loss.detach()
        return loss

    def _scalar(self, value: float) -> torch.Tensor:
        return torch.tensor(value, dtype=torch.float64 if self.device.type == "cpu" else torch.float32).to(
            self.device.torch
        )

    def _batch(self, rows: Sequence[Row | None]) -> ModelBatch:
        return to_device(self._host_batch(rows), self.device.torch)

    def _host_batch(self, rows: Sequence[Row | None]) -> ModelBatch:
        length = self.job.training.max_sequence_length if self.static else None
        return make_batch(rows, length, isolated=self.job.training.isolates_examples)

    def _summed_loss(self, rows: Sequence[Row | None]) -> torch.Tensor:
        """The summed loss without dropout. The batch has the shape of a training batch where shapes are static."""
        padding = [None] * (self.job.training.per_device_batch_size - len(rows)) if self.static else []
        self.root.eval()
        with torch.no_grad():
            loss: torch.Tensor = self.root(self._batch([*rows, *padding]))
        self.root.train()
        return loss

    def _sum_gradients(self, is_last: bool) -> None:
        """Have FSDP sum gradients over the workers in the last micro-batch only."""
        if isinstance(self.root, FSDPModule):
            self.root.set_requires_gradient_sync(is_last)

    def _sum_over_copies(self, gradients: list[torch.Tensor]) -> None:
        """Sum the gradients over the copies of the model, in place, in one collective."""
        if self.data_size == 1:
            return
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat, group=self.layout.mesh.get_group(layouts.DATA))
        for gradient, summed in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))

    def _loss_and_norm(self, loss: torch.Tensor, gradients: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The step's loss and the norm of its whole gradient, over all workers, in one collective of two numbers."""
        square = squared_norm(self.optimizer.parameters.values(), gradients, self.workers.size)
        both = torch.stack([loss / self.layout.tensor_size, square])  # a tensor group computes the same loss
        dist.all_reduce(both)
        return both[0], both[1].sqrt()

    def _check_fallbacks(self) -> None:
        """Raise UserError, or warn, if an operator ran on the CPU after the first step."""
        if self._steps_taken:
            report_fallbacks(self.device.fallback_operators(), self.job.compile.on_fallback)
        self.device.clear_fallback_operators()  # those of the first step may prepare the device
        self._steps_taken += 1


def weights_dtype(weights: StoredWeights, device: Device) -> torch.dtype:
    """The dtype of the base weights: bf16 on an accelerator, as stored on the CPU."""
    if device.type != "cpu":
        return torch.bfloat16
    stored = next(iter(weights.dtypes.values()))
    dtype: torch.dtype = getattr(torch, DTYPES[stored])
    return dtype


def recomputation(wanted: ActivationCheckpointing, device: Device) -> ActivationCheckpointing:
    """What to recompute. On the CPU attention stores no scores, so that recomputing it (selective) only costs time."""
    return "none" if wanted == "selective" and device.type == "cpu" else wanted


def report_fallbacks(operators: list[str], on_fallback: str) -> None:
    """Raise UserError, or warn, if operators ran on the CPU."""
    if not operators:
        return
    what = f"the device has no implementation of {', '.join(operators)}: they ran on the CPU, which is slow"
    if on_fallback == "refuse":
        fix = "Use an image with a newer Neuron SDK, or set compile.onFallback: warn to train slowly."
        raise UserError(what, where="compile.onFallback", fix=fix)
    log.warning(what)


def adapter_config(peft_config: Any, base_name: str | None) -> dict[str, Any]:
    """The content of PEFT's adapter_config.json, with sets sorted so that runs give the same file."""
    config: dict[str, Any] = json.loads(json.dumps(peft_config.to_dict(), default=sorted))
    # The Hub id, not the path in this workspace: AutoPeftModel loads the base model by it.
    return {**config, "base_model_name_or_path": base_name, "inference_mode": True}
