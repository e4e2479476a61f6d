"""Instance types: the hardware of each, and the settings that follow from it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from genvalues.accelerators.memory import RESERVED

CPU = "cpu"  # no accelerator: any node, or this computer
NEURON = "aws.amazon.com/neuron"  # Kubernetes resource: whole devices
HYPERPOD = "ml."  # prefix of SageMaker HyperPod's instance types


@dataclass(frozen=True)
class Generation:
    """A generation of Trainium, as compiler, runtime and process groups need to know it."""

    target: str  # the compiler's name
    backend: str  # what trains on it by default
    logical_core_size: int  # NeuronCores that form one logical core
    tensor_parallel: int  # default tensor-parallel size
    groups: tuple[int, ...]  # possible sizes of a process group
    cores: int  # physical NeuronCores per device
    hbm_gib: int  # memory per device
    bf16_tflops: float  # dense peak per device


# Tensor parallel 8 on trn1 and 4 on trn2: examples/training/llama/finetune_llama.sh of optimum-neuron 0.4.5, for
# trn1.32xlarge, trn2.48xlarge and trn2.3xlarge.
# Sizes of groups: Neuron docs of 2.26, tutorial Multi-Layer Perceptron Training (1, 2, 8, 32 on trn1; 1, 4, 16, 64 on
# trn2 with logical cores of two), and NxD Inference features, tensor parallelism (16 on trn1 too). neuronx_distributed
# (parallel_state.get_logic_chosen) says of trn2 that 8 x 8 has no placement, and that 32 x 2 needs one that it
# chooses only with lnc_size, which optimum-neuron never sets.
# A device: Neuron docs, Trainium Architecture (2 NeuronCores, 32 GiB, 190 TFLOPS in bf16) and Trainium2 Architecture
# (8 NeuronCores, 96 GiB, 667 TFLOPS).
# Backend: TorchNeuron supports Trn2 and later (Neuron docs of 2.33, TorchNeuron release notes). Training on PyTorch/XLA
# is not supported since Neuron 2.30 (announcement of May 2026: no support for PyTorch/XLA training).
TRN1 = Generation("trn1", "xla", 1, 8, (1, 2, 8, 16, 32), cores=2, hbm_gib=32, bf16_tflops=190)
TRN2 = Generation("trn2", "native", 2, 4, (1, 4, 16, 64), cores=8, hbm_gib=96, bf16_tflops=667)


@dataclass(frozen=True)
class Instance:
    """A node of an instance type, as Kubernetes sees it."""

    generation: Generation
    neuron_devices: int
    cores: int  # logical NeuronCores (LNC=2 on trn2), one process each
    efa: int
    vcpu: int
    request_cpu: int  # of a node's training pod: below what is allocatable, with room for daemon sets
    request_memory_gib: int
    hyperpod: bool = True  # SageMaker HyperPod has it too, as ml.NAME

    @property
    def groups(self) -> list[int]:
        """Possible sizes of a process group on one node."""
        return [size for size in self.generation.groups if size <= self.cores]

    @property
    def devices(self) -> dict[str, int]:
        """Resource requests of a node's training pod, by Kubernetes resource name."""
        # Whole devices: neurondevice is unsupported since Neuron 2.20, neuroncore splits them.
        devices = {NEURON: self.neuron_devices}
        if self.efa:
            devices["vpc.amazonaws.com/efa"] = self.efa
        return devices

    @property
    def hbm(self) -> int:
        """Bytes of device memory per process: 16 GiB on trn1, 24 GiB on trn2 (two physical cores)."""
        return self.neuron_devices * (self.generation.hbm_gib << 30) // self.cores

    @property
    def flops(self) -> float:
        """Peak FLOP/s per process, dense bf16."""
        return self.neuron_devices * self.generation.bf16_tflops * 1e12 / self.cores

    @property
    def shared_memory(self) -> str:
        """Size of /dev/shm: 1 GiB per process, more than anything in this training path is known to need.

        The container runtime's default of 64 MB is too small for libfabric and the Neuron runtime with 32 processes.
        Without a limit tmpfs can take half of the node's memory, which counts against the pod's.
        """
        return f"{self.cores}Gi"

    @property
    def resources(self) -> dict[str, dict[str, str]]:
        """CPU and memory of a node's training pod."""
        memory = f"{self.request_memory_gib}Gi"
        return {
            "requests": {"cpu": str(self.request_cpu), "memory": memory},
            "limits": {"cpu": str(self.request_cpu), "memory": memory},
        }


# Every Trainium type, from the AWS instance pages. The names are those of botocore: InstanceType of EC2, and
# ClusterInstanceType of SageMaker for HyperPod. trn1.32xlarge has about 119 vCPU and 460 GiB allocatable on EKS; the
# requests of the others are in proportion.
TRAINIUM = {
    "trn1.2xlarge": Instance(TRN1, 1, 2, 0, 8, request_cpu=6, request_memory_gib=26, hyperpod=False),
    "trn1.32xlarge": Instance(TRN1, 16, 32, 8, 128, request_cpu=112, request_memory_gib=440),
    "trn1n.32xlarge": Instance(TRN1, 16, 32, 16, 128, request_cpu=112, request_memory_gib=440),
    "trn2.3xlarge": Instance(TRN2, 1, 4, 1, 12, request_cpu=10, request_memory_gib=110),
    "trn2.48xlarge": Instance(TRN2, 16, 64, 16, 192, request_cpu=168, request_memory_gib=1760),
    "trn2u.48xlarge": Instance(TRN2, 16, 64, 16, 192, request_cpu=168, request_memory_gib=1760, hyperpod=False),
}
ON_HYPERPOD = {HYPERPOD + name: instance for name, instance in TRAINIUM.items() if instance.hyperpod}
NAMES = [CPU, *TRAINIUM, *ON_HYPERPOD]
# How the instance types with an accelerator begin (EC2's families of accelerated computing). Those that are not in
# TRAINIUM are refused; once AWS has named Trainium3's, write their rows above. All others train on their CPUs.
ACCELERATED = r"^(ml\.)?(trn|inf|p|gr?|dl|vt|f)[0-9]"
SUPPORTED = "Trainium 1 and 2 are supported, Trainium 3 when AWS has named its instance types"

# What cpu means, for keys of the values that are left out: small models on any node.
CPU_PROCESSES = 2
CPU_ROW: dict[str, Any] = {
    "backend": "native",
    "devices": {},
    "processesPerNode": CPU_PROCESSES,
    "tensorParallelSize": 1,
    "resources": {"requests": {"cpu": "500m", "memory": "2Gi"}, "limits": {"cpu": "8", "memory": "16Gi"}},
    "sharedMemory": "2Gi",
    "neuron": {"target": "trn1", "logicalCoreSize": 1},
}


def trainium(name: str) -> Instance | None:
    """The Trainium instance of that name, with or without HyperPod's prefix; None for cpu."""
    return TRAINIUM.get(name) or ON_HYPERPOD.get(name)


def of_same_service(name: str) -> dict[str, Instance]:
    """The Trainium types of the service of an instance type, EC2 or HyperPod, by their names there."""
    return ON_HYPERPOD if name.startswith(HYPERPOD) else TRAINIUM


def unsupported(name: str) -> str | None:
    """Why an instance type with an accelerator is not supported; None for cpu, CPU types and those of TRAINIUM."""
    if trainium(name) or not re.match(ACCELERATED, name):
        return None
    if name.removeprefix(HYPERPOD) in TRAINIUM:
        return "not an instance type of SageMaker HyperPod"
    if re.match(r"^(ml\.)?trn[12]", name):
        return "not an instance type of AWS"
    return f"not supported: {SUPPORTED}"


def row(instance: Instance) -> dict[str, Any]:
    """What an instance type means for keys of the values that are left out, and what it has at most."""
    generation = instance.generation
    return {
        "backend": generation.backend,
        "devices": instance.devices,
        "coresPerDevice": generation.cores,
        "processesPerNode": instance.cores,
        "tensorParallelSize": min(instance.cores, generation.tensor_parallel),
        "groups": instance.groups,
        "usableGib": instance.hbm * (1 - RESERVED) / (1 << 30),  # of a core's memory, for tensors
        "severalNodes": instance.neuron_devices > 1,
        "resources": instance.resources,
        "sharedMemory": instance.shared_memory,
        "neuron": {"target": generation.target, "logicalCoreSize": generation.logical_core_size},
    }


def table() -> dict[str, dict[str, Any]]:
    """The rows of all types by name, for the chart."""
    return {CPU: CPU_ROW, **{name: row(instance) for name, instance in {**TRAINIUM, **ON_HYPERPOD}.items()}}


def default_backend(name: str) -> str:
    """The backend that trains on an instance type unless the inputs name another."""
    instance = trainium(name)
    return instance.generation.backend if instance else "native"


def refusal(name: str, nodes: int) -> str | None:
    """Why an instance type cannot be used for a job of so many nodes; None if it can.

    Neuron docs, How to prepare trn1.32xlarge for multi-node execution: every node needs EFA, which smaller sizes lack.
    The tutorials for several nodes use all cores of the largest size; there is none for trn2.3xlarge, which has EFA.
    """
    instance = trainium(name)
    if instance is None or nodes == 1:
        return None
    if not instance.efa:
        return f"{name} has no EFA and cannot be one of {nodes} nodes"
    if instance.neuron_devices == 1:
        return f"{name} has one device; Neuron supports jobs of several nodes only with 16 devices per node"
    return None
