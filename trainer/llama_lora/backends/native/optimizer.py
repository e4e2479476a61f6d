"""AdamW on this worker's part of the adapter, and the norm of a gradient that is spread over workers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from llama_lora.backends.loop import ADAM_BETAS, ADAM_EPSILON
from llama_lora.backends.native.regions import local_tensor

MOMENTS = ("exp_avg", "exp_avg_sq")


class LocalAdamW:
    """torch's AdamW over the local parts of parameters.

    It is elementwise, so each worker updates what it holds. Local parts are plain tensors: torch's fast path for many
    tensors (foreach) does not take DTensors beside tensors. On a compiling device the step count and the learning rate
    are tensors there (capturable); as Python numbers they would be constants, and every step a new graph.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], device: torch.device, weight_decay: float) -> None:
        self.parameters = parameters
        self.local = {name: local_tensor(parameter) for name, parameter in parameters.items()}
        self.on_device = device.type != "cpu"
        self.adamw = torch.optim.AdamW(
            self.local.values(),
            lr=0.0,
            betas=ADAM_BETAS,
            eps=ADAM_EPSILON,
            weight_decay=weight_decay,
            capturable=self.on_device,
        )
        if self.on_device:  # not as an argument: AdamW reads that back from the device, to check it
            self.adamw.param_groups[0]["lr"] = torch.zeros((), device=device)
        for tensor in self.local.values():  # as AdamW does at its first step; a checkpoint can then be read into it
            step = torch.zeros((), dtype=torch.float32, device=device)
            self.adamw.state[tensor] = {"step": step, **{key: torch.zeros_like(tensor) for key in MOMENTS}}

    def gradients(self) -> list[torch.Tensor]:
        """The local gradients, in the order of the parameters."""
        return [local_gradient(parameter) for parameter in self.parameters.values()]

    def step(self, gradients: Iterable[torch.Tensor], learning_rate: torch.Tensor) -> None:
        """Take a step with local gradients, and clear them."""
        group = self.adamw.param_groups[0]
        if self.on_device:
            group["lr"].copy_(learning_rate)
        else:
            group["lr"] = learning_rate.item()
        for tensor, gradient in zip(self.local.values(), gradients, strict=True):
            tensor.grad = gradient
        self.adamw.step()
        for tensor, parameter in zip(self.local.values(), self.parameters.values(), strict=True):
            tensor.grad = parameter.grad = None

    @property
    def learning_rate(self) -> torch.Tensor | float:
        """The rate of the last step, on the device: reading it waits for the step."""
        rate: torch.Tensor | float = self.adamw.param_groups[0]["lr"]
        return rate.clone() if isinstance(rate, torch.Tensor) else rate

    @property
    def steps(self) -> int:
        """The steps taken: AdamW counts them for its bias correction."""
        return int(self.state(next(iter(self.local)))["step"])

    @steps.setter
    def steps(self, number: int) -> None:
        for name in self.local:
            self.state(name)["step"].copy_(torch.tensor(float(number)))

    def state(self, name: str) -> dict[str, Any]:
        """AdamW's state of a parameter: step, and both moments of its local part."""
        return self.adamw.state[self.local[name]]


def local_gradient(parameter: nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None, "every step computes a gradient for every adapter parameter"
    return local_tensor(parameter.grad)


def copies(parameter: torch.Tensor, world: int) -> float:
    """How many of ``world`` workers hold the same local part of a parameter."""
    parts = 1
    if isinstance(parameter, DTensor):
        for dimension, placement in enumerate(parameter.placements):
            # Not is_shard(): FSDP over tensor parallel makes placements that are neither Shard nor Replicate.
            if not placement.is_replicate():
                parts *= parameter.device_mesh.size(dimension)
    return world / parts


def squared_norm(parameters: Iterable[nn.Parameter], gradients: Iterable[torch.Tensor], world: int) -> torch.Tensor:
    """This worker's share of the squared norm of the whole gradient, fp32: the sum over all workers is the square."""
    total: torch.Tensor | None = None
    for parameter, gradient in zip(parameters, gradients, strict=True):
        part = gradient.float().square().sum() / copies(parameter, world)
        total = part if total is None else total + part
    assert total is not None
    return total


def clip(gradients: Iterable[torch.Tensor], norm: torch.Tensor, limit: float) -> None:
    """Scale gradients in place so that their norm is at most ``limit``, as torch.nn.utils.clip_grad_norm_ does."""
    scale = torch.clamp(limit / (norm + 1e-6), max=1.0)
    for gradient in gradients:
        gradient.mul_(scale)
