"""The device that a worker trains on, and the process groups of its collectives.

Sources for the device "neuron": AWS Neuron documentation 2.33, "Distributed training with TorchNeuron", "Environment
variables" and "Memory management" (https://awsdocs-neuron.readthedocs-hosted.com/en/latest/torch/index.html).
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from genvalues.common.errors import UserError
from llama_lora import environment
from llama_lora.backends.worker_group import WorkerGroup
from llama_lora.config import DeviceType

COLLECTIVES = {"cpu": "gloo", "cuda": "nccl", "neuron": "neuron"}  # the process group's backend of each device
NEURON_LIBRARY = "torch_neuronx"


@dataclass(frozen=True)
class Device:
    """A worker's device. It has no index: each process sees its own one only, or has selected it."""

    type: DeviceType

    @property
    def torch(self) -> torch.device:
        return torch.device(self.type)

    @property
    def static_shapes(self) -> bool:
        """Whether each new shape costs a compilation, so that every batch must have the same shape."""
        return self.type == "neuron"

    @property
    def steps_in_flight(self) -> int:
        """How many steps the host may start before it waits for a result."""
        return 0 if self.type == "cpu" else 1

    def memory_statistics(self) -> dict[str, int]:
        """Peak bytes of device memory, allocated and reserved; empty on the CPU."""
        if self.type == "cpu":
            return {}
        module: Any = getattr(torch, self.type)
        return {"allocated": module.max_memory_allocated(), "reserved": module.max_memory_reserved()}

    def fallback_operators(self) -> list[str]:
        """The operators that ran on the CPU because the device has none, since they were last cleared."""
        if self.type != "neuron":
            return []
        return sorted(str(name) for name in importlib.import_module(NEURON_LIBRARY).get_fallback_ops())

    def clear_fallback_operators(self) -> None:
        if self.type == "neuron":
            importlib.import_module(NEURON_LIBRARY).clear_op_tracking()


def check_installed(device: DeviceType) -> None:
    """Raise UserError if the libraries of a device are missing, or one that must not be beside them is installed."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "PyTorch finds no CUDA device", where="device", fix="Run on a node with one, or set device: cpu."
        )
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device == "cuda" and torch.cuda.device_count() < processes:
        raise UserError(
            f"{processes} processes, but PyTorch finds {torch.cuda.device_count()} CUDA devices on this node",
            where="parallelism.processesPerNode",
            fix="Write the number of devices.",
        )
    if device != "neuron":
        return
    if importlib.util.find_spec(NEURON_LIBRARY) is None:
        raise UserError(
            f"{NEURON_LIBRARY} is not installed",
            where="device",
            fix="Use an image of the target native (docs/image.md) on a Trn2 node.",
        )
    if importlib.util.find_spec("torch_xla") is not None:
        raise UserError(
            "torch_xla is installed beside TorchNeuron; libraries then use XLA, which cannot train on it",
            where="device",
            fix="Use an image without torch_xla (docs/image.md).",
        )


def open_device(device: DeviceType) -> tuple[Device, WorkerGroup]:
    """Join the workers' process groups and select the device.

    The device is not touched before ``init_process_group``: TorchNeuron assigns a core to each process there. Control
    data (flags, counts, digests) has a gloo group of its own, because each new shape of a collective on the device is
    a graph to compile.
    """
    check_installed(device)
    if device == "neuron":
        importlib.import_module(NEURON_LIBRARY)  # registers the device and its collectives
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    with environment.stdout_discarded():
        dist.init_process_group(COLLECTIVES[device])
        control = None if COLLECTIVES[device] == "gloo" else dist.new_group(backend="gloo")
    return Device(device), WorkerGroup(control)
