"""The ``Backend`` protocol, its inputs and its results. The stages depend on these and on no accelerator."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from llama_lora import config
from llama_lora.paths import Paths

if TYPE_CHECKING:
    import torch

    from llama_lora.backends.held_out import HeldOutState
    from llama_lora.stage import Stage


@dataclass(frozen=True)
class TrainingJob:
    """The input of a worker. ``dry_run`` is the number of steps of a dry run; None for the real training."""

    model: Path
    base_name: str | None  # the model's Hub id, if it has one
    dataset: Path
    lora: config.Lora
    training: config.Training
    parallelism: config.Parallelism
    compile: config.Compile
    device: config.DeviceType
    probe: config.Probe
    fingerprint: str
    paths: Paths
    dry_run: int | None = None


@dataclass(frozen=True)
class TrainingResult:
    """The result of a training or dry run over all workers. Losses are in nats per trained token.

    ``seconds_per_step`` is the median. ``peak_memory_bytes`` is the peak resident memory of the largest worker.
    ``held_out`` is set if the training measured the held-out loss.
    """

    steps: int
    total_steps: int
    seconds_per_step: float | None
    peak_memory_bytes: int
    first_loss: float | None
    last_loss: float | None
    checkpoint: Path | None
    held_out: HeldOutState | None = None


@dataclass(frozen=True)
class Adapter:
    """A consolidated LoRA adapter: tensors by PEFT's names, and the content of adapter_config.json."""

    tensors: dict[str, torch.Tensor]
    config: dict[str, Any]


class Backend(Protocol):
    """An accelerator: its limits, compiling and training for it, and its checkpoint format."""

    dry_run_steps: int  # that the compile stage takes

    def check(self, config: config.RunConfig, model: Path) -> None:
        """Raise UserErrors for settings that the model cannot be trained with. Called before any worker starts."""

    def compile(self, stage: Stage) -> None:
        """Do the compile stage on this node: run the workers of train for a few steps."""

    def finish_dry_run(self, stage: Stage, result: TrainingResult) -> None:
        """Finish compile, or this node's part of it, in the worker of rank 0 after a dry run."""

    def check_compiled(self, stage: Stage) -> None:
        """Raise UserError if train would need other graphs than compile has made. Called before any worker starts."""

    def using_cache(self, stage: Stage) -> AbstractContextManager[object]:
        """Use the workspace's graph cache in a worker, before it imports the accelerator's libraries."""

    def train(self, job: TrainingJob, finish: Callable[[TrainingResult], None]) -> None:
        """Train to the end, in every worker under torchrun. Resumes from the newest complete checkpoint.

        When the files of all workers are durable, rank 0 calls ``finish``; no worker returns earlier.
        A dry run deletes its files.
        """

    def read_adapter(self, checkpoint: Path, base: Path | None) -> Adapter:
        """Read the adapter from a sharded checkpoint.

        Raises UserError, naming the file, if a shard is missing or belongs to another checkpoint, or, if ``base`` (the
        base model's folder) is given, if a factor does not fit it.
        """
