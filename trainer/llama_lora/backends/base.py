"""What a backend is, and what goes into and comes out of one. The stages know these names, and no accelerator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from llama_lora import config
from llama_lora.paths import Paths

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TrainingJob:
    """What a worker needs to train. ``dry_run`` is the number of steps of a dry run, or None for the real training."""

    model: Path
    base_name: str | None  # the hub's name of the model, where it has one
    dataset: Path
    lora: config.Lora
    training: config.Training
    parallelism: config.Parallelism
    probe: config.Probe
    fingerprint: str
    paths: Paths
    dry_run: int | None = None


@dataclass(frozen=True)
class TrainingResult:
    """How a training or dry run went, over all workers. Losses are nats per trained token.

    ``seconds_per_step`` is the median; ``peak_memory_bytes`` the peak resident memory of the largest worker.
    """

    steps: int
    total_steps: int
    seconds_per_step: float | None
    peak_memory_bytes: int
    first_loss: float | None
    last_loss: float | None
    checkpoint: Path | None


@dataclass(frozen=True)
class Adapter:
    """A consolidated LoRA adapter: PEFT's tensor names and its adapter_config.json."""

    tensors: dict[str, torch.Tensor]
    config: dict[str, Any]


class Backend(Protocol):
    """One accelerator: what it can train, training itself, and the format of its checkpoints."""

    def check(self, config: config.RunConfig, model: Path) -> None:
        """Raise UserErrors for settings this model cannot be trained with, before any worker starts."""

    def train(self, job: TrainingJob, finish: Callable[[TrainingResult], None]) -> None:
        """Run in every worker under torchrun: train to the end, resuming from the newest complete checkpoint.

        When every worker's files are durable, rank 0 calls ``finish``; no worker returns before that.
        A dry run leaves nothing behind.
        """

    def read_adapter(self, checkpoint: Path, base: Path | None) -> Adapter:
        """The adapter in a sharded checkpoint.

        Raises UserError naming a shard that is missing or does not belong, or, where the ``base`` model's folder is
        given, a factor that does not fit it.
        """
