"""LoRA at the first step: the same on every accelerator and for any number of workers."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from typing import Any

import torch

from llama_lora.config import Lora


def lora_config(lora: Lora) -> Any:
    """Build PEFT's LoraConfig."""
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,  # annotated as int in peft, but a factor: fractions work
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
    )


def initialize_lora(parameters: Iterable[tuple[str, torch.nn.Parameter]], seed: int) -> None:
    """Initialize every LoRA factor A. B is zero already (Hu et al. 2021, section 4.1)."""
    for name, parameter in parameters:
        if ".lora_A." in name:
            parameter.data.copy_(initial_a(name.replace(".default.", "."), parameter.shape, seed))


def initial_a(name: str, shape: torch.Size | tuple[int, int], seed: int) -> torch.Tensor:
    """The initial values of a factor A, fp32 [r, in], by its PEFT name.

    They depend only on name and seed, not on the order of layers or the distribution over workers. Uniform within
    1 / sqrt(in), as PEFT's kaiming_uniform_(a=sqrt(5)).
    """
    generator = torch.Generator().manual_seed(stable_seed(seed, name))
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(tuple(shape)).uniform_(-bound, bound, generator=generator)


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """The seed of the dropout in a step. It depends on nothing else, so that a resumed step repeats its dropout."""
    return stable_seed(seed, step, rank)


def stable_seed(*parts: Any) -> int:
    """Hash the parts to 63 bits: the same in every process and Python version."""
    digest = hashlib.sha256(" ".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
