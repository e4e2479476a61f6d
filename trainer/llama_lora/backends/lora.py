"""What LoRA is at the first step, the same on every accelerator and for any number of workers."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from typing import Any

import torch

from llama_lora.config import Lora


def lora_config(lora: Lora) -> Any:
    """PEFT's LoraConfig of a run."""
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,  # peft multiplies with it; 0.5 is as good as 16
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
    )


def initialize(parameters: Iterable[tuple[str, torch.nn.Parameter]], seed: int) -> None:
    """Give every LoRA factor A its first values; B is zero already (Hu et al. 2021, 4.1)."""
    for name, parameter in parameters:
        if ".lora_A." in name:
            parameter.data.copy_(initial_a(name.replace(".default.", "."), parameter.shape, seed))


def initial_a(name: str, shape: torch.Size | tuple[int, int], seed: int) -> torch.Tensor:
    """The first values of a factor A, fp32 [r, in], by PEFT's name of it.

    They depend on the name and the seed alone, not on the order of layers or on who holds which part. Uniform within
    1 / sqrt(in), as PEFT's kaiming_uniform_(a=sqrt(5)) is.
    """
    generator = torch.Generator().manual_seed(stable_seed(seed, name))
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(tuple(shape)).uniform_(-bound, bound, generator=generator)


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """Dropout depends on these alone, so a resumed step draws what it would have drawn."""
    return stable_seed(seed, step, rank)


def stable_seed(*parts: Any) -> int:
    """63 bits from the parts, the same in every process and version of Python."""
    digest = hashlib.sha256(" ".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
