"""Steps of the native engine on a model of any size with random weights, without files of weights."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llama_lora.backends.base import TrainingJob
from llama_lora.backends.native.devices import open_device
from llama_lora.backends.native.engine import NativeEngine, weights_dtype
from llama_lora.backends.native.model import build_model, materialize
from llama_lora.backends.native.regions import Region, StoredWeights
from llama_lora.config import ActivationCheckpointing, DeviceType, Training
from trainer.native.workers import job

STEPS, LENGTH = 10, 2048
LEARNING_RATE = 1e-3
# https://huggingface.co/meta-llama/Llama-3.1-8B/blob/main/config.json
LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
# To try the code on a CPU: the same, small.
TINY = LLAMA_8B | {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@dataclass(frozen=True)
class Measured:
    """``tokens_per_second`` is that of the median step; ``allocated`` the peak in bytes, 0 on the CPU."""

    losses: list[float]
    tokens_per_second: float
    allocated: int


class RandomWeights(StoredWeights):
    """Stands in for a model's files: norms are 1, other weights have transformers' initializer_range."""

    def read_into(self, target: torch.Tensor, name: str, region: Region) -> None:
        if name.endswith("norm.weight"):
            target.fill_(1.0)
        else:
            target.normal_(0.0, 0.02)


class RandomEngine(NativeEngine):
    """An engine whose model folder has only a config.json."""

    def load(self, compile_backend: str | None) -> None:
        from transformers import AutoConfig

        weights = RandomWeights(self.job.model, dtypes={"weight": "BF16"})
        config = AutoConfig.from_pretrained(self.job.model)
        self.divide(build_model(config, self.job.lora, weights_dtype(weights, self.device)), compile_backend)
        torch.manual_seed(0)
        materialize(self.root, self.device.torch, weights, self.job.training.seed)


def random_job(
    folder: Path,
    shape: dict[str, Any],
    device: DeviceType,
    recompute: ActivationCheckpointing = "selective",
    length: int = LENGTH,
) -> TrainingJob:
    """A job of one process: LoRA r 16 on all linear layers, one row of causal attention in a step."""
    (folder / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    made = job(folder, folder, device=device, r=16, alpha=32, dropout=0.0)
    settings: dict[str, Any] = {
        "max_sequence_length": length,
        "attention": "causal",
        "activation_checkpointing": recompute,
        "gradient_accumulation_steps": 1,
    }
    return replace(made, training=Training(**settings))


def row(job: TrainingJob, shape: dict[str, Any]) -> dict[str, Any]:
    """Random tokens, all with loss."""
    length = job.training.max_sequence_length
    ids = torch.randint(0, shape["vocab_size"], (length,), generator=torch.Generator().manual_seed(1)).tolist()
    return {"input_ids": ids, "labels": ids, "lengths": [length]}


def measure(job: TrainingJob, shape: dict[str, Any]) -> Measured:
    """Take STEPS steps on one row, in this process."""
    device, workers = open_device(job.device)
    engine = RandomEngine(job, device, workers)
    rows = [row(job, shape)]
    tokens = job.training.max_sequence_length
    losses: list[float] = []
    seconds = timed(lambda step: losses.append(engine.step(step, [rows], tokens - 1, LEARNING_RATE)().loss))
    return Measured(losses, tokens / statistics.median(seconds), device.memory_statistics().get("allocated", 0))


def timed(take: Callable[[int], None]) -> list[float]:
    """The seconds of each step but the first, which loads kernels. ``take`` waits for its result."""
    seconds = []
    for step in range(STEPS):
        began = time.perf_counter()
        take(step)
        seconds.append(time.perf_counter() - began)
    return seconds[1:]
