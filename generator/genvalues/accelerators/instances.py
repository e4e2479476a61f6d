"""Instance types: what each has, and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass

CPU = "cpu"  # no accelerator: any node, or this computer
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

    @property
    def groups(self) -> list[int]:
        """Possible sizes of a process group on one node."""
        return [size for size in self.generation.groups if size <= self.cores]

    @property
    def devices(self) -> dict[str, int]:
        """Resource requests of a node's training pod, by Kubernetes resource name."""
        # Whole devices: neurondevice is unsupported since Neuron 2.20, neuroncore splits them.
        devices = {"aws.amazon.com/neuron": self.neuron_devices}
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


# Every Trainium type, from the AWS instance pages. trn1.32xlarge has about 119 vCPU and 460 GiB allocatable on EKS; the
# requests of the others are in proportion.
TRAINIUM = {
    "trn1.2xlarge": Instance(TRN1, 1, 2, 0, 8, request_cpu=6, request_memory_gib=26),
    "trn1.32xlarge": Instance(TRN1, 16, 32, 8, 128, request_cpu=112, request_memory_gib=440),
    "trn1n.32xlarge": Instance(TRN1, 16, 32, 16, 128, request_cpu=112, request_memory_gib=440),
    "trn2.3xlarge": Instance(TRN2, 1, 4, 1, 12, request_cpu=10, request_memory_gib=110),
    "trn2.48xlarge": Instance(TRN2, 16, 64, 16, 192, request_cpu=168, request_memory_gib=1760),
    "trn2u.48xlarge": Instance(TRN2, 16, 64, 16, 192, request_cpu=168, request_memory_gib=1760),
}
# Generations whose instance types AWS has not named yet (botocore 1.44.8, November 2026), by how the names begin. Once
# it has, write their rows above and remove the line here.
UNNAMED = {"trn3": "Trainium3"}
NAMES = [CPU, *TRAINIUM, *(HYPERPOD + name for name in TRAINIUM)]


def trainium(name: str) -> Instance | None:
    """The Trainium instance of that name, with or without HyperPod's prefix; None for cpu."""
    return TRAINIUM.get(name.removeprefix(HYPERPOD))


def unnamed_generation(name: str) -> str | None:
    """The generation of an instance type whose names are not known yet; None for all other names."""
    plain = name.removeprefix(HYPERPOD)
    return next((generation for beginning, generation in UNNAMED.items() if plain.startswith(beginning)), None)


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
