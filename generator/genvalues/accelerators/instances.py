"""What an instance type has, and what follows from it: the one place that knows an instance type."""

from __future__ import annotations

from dataclasses import dataclass

CPU = "cpu"  # no accelerator: any node, or this computer
HYPERPOD = "ml."  # what SageMaker HyperPod puts before an instance type's name


@dataclass(frozen=True)
class Generation:
    """One generation of Trainium: what compiler, runtime and process groups have to know of it."""

    target: str  # the compiler's name for it
    logical_core_size: int  # NeuronCores that a process has as one
    tensor_parallel: int  # how wide where nothing else is asked for
    groups: tuple[int, ...]  # how many processes of a node can be a group
    cores: int  # physical NeuronCores of a device
    hbm_gib: int  # memory of a device
    bf16_tflops: float  # of a device, dense: what its matrix engines can do at best


# Tensor parallel 8 on trn1 and 4 on trn2: examples/training/llama/finetune_llama.sh of optimum-neuron 0.4.5, for
# trn1.32xlarge, trn2.48xlarge and trn2.3xlarge.
# Sizes of groups: Neuron docs of 2.26, tutorial Multi-Layer Perceptron Training (1, 2, 8, 32 on trn1; 1, 4, 16, 64 on
# trn2 with logical cores of two), and NxD Inference features, tensor parallelism (16 on trn1 too). neuronx_distributed
# (parallel_state.get_logic_chosen) says of trn2 that nothing places 8 x 8, and that 32 x 2 needs what it only chooses
# when told lnc_size, which optimum-neuron never does.
# A device: Neuron docs, Trainium Architecture (2 NeuronCores, 32 GiB, 190 TFLOPS in bf16) and Trainium2 Architecture
# (8 NeuronCores, 96 GiB, 667 TFLOPS).
TRN1 = Generation("trn1", 1, 8, (1, 2, 8, 16, 32), cores=2, hbm_gib=32, bf16_tflops=190)
TRN2 = Generation("trn2", 2, 4, (1, 4, 16, 64), cores=8, hbm_gib=96, bf16_tflops=667)


@dataclass(frozen=True)
class Instance:
    """One node of an instance type, as Kubernetes sees it."""

    generation: Generation
    neuron_devices: int
    cores: int  # NeuronCores a process can have: the logical ones (LNC=2 on trn2), one process each
    efa: int
    vcpu: int
    request_cpu: int  # for the one training pod of a node: below what is allocatable, with room for daemon sets
    request_memory_gib: int

    @property
    def devices(self) -> dict[str, int]:
        """What the training pod of a node asks for, by Kubernetes resource name."""
        # Not neurondevice (unsupported since Neuron 2.20) and not neuroncore: whole devices.
        devices = {"aws.amazon.com/neuron": self.neuron_devices}
        if self.efa:
            devices["vpc.amazonaws.com/efa"] = self.efa
        return devices

    @property
    def hbm(self) -> int:
        """Bytes of device memory for each process: 16 GiB on trn1, 24 GiB on trn2 (a logical core of two)."""
        return self.neuron_devices * (self.generation.hbm_gib << 30) // self.cores

    @property
    def flops(self) -> float:
        """Operations a second that each process's core can do at best, dense bf16."""
        return self.neuron_devices * self.generation.bf16_tflops * 1e12 / self.cores

    @property
    def shared_memory(self) -> str:
        """/dev/shm: 1 GiB for each process, of which nothing in this training path is known to need as much.

        The runtime's own 64 MB are too little for libfabric's and the Neuron runtime's exchange between 32 processes;
        half of the node's memory, which a tmpfs without a limit gets, would count against the training's.
        """
        return f"{self.cores}Gi"

    @property
    def resources(self) -> dict[str, dict[str, str]]:
        """CPU and memory of the training pod of a node."""
        memory = f"{self.request_memory_gib}Gi"
        return {
            "requests": {"cpu": str(self.request_cpu), "memory": memory},
            "limits": {"cpu": str(self.request_cpu), "memory": memory},
        }


# Every Trainium type, those too that refusal() says no to, after the AWS instance pages.
# trn1.32xlarge has about 119 vCPU and 460 GiB allocatable on EKS, the others are in proportion.
TRAINIUM = {
    "trn1.2xlarge": Instance(TRN1, 1, 2, 0, 8, request_cpu=6, request_memory_gib=26),
    "trn1.32xlarge": Instance(TRN1, 16, 32, 8, 128, request_cpu=112, request_memory_gib=440),
    "trn1n.32xlarge": Instance(TRN1, 16, 32, 16, 128, request_cpu=112, request_memory_gib=440),
    "trn2.3xlarge": Instance(TRN2, 1, 4, 1, 12, request_cpu=10, request_memory_gib=110),
    "trn2.48xlarge": Instance(TRN2, 16, 64, 16, 192, request_cpu=168, request_memory_gib=1760),
    "trn2u.48xlarge": Instance(TRN2, 16, 64, 16, 192, request_cpu=168, request_memory_gib=1760),
}
NAMES = [CPU, *TRAINIUM, *(HYPERPOD + name for name in TRAINIUM)]


def trainium(name: str) -> Instance | None:
    """The Trainium instance of that name, with or without HyperPod's prefix; None for cpu."""
    return TRAINIUM.get(name.removeprefix(HYPERPOD))


def refusal(name: str, nodes: int) -> str | None:
    """Why an instance cannot be one of so many nodes of a job; None if it can.

    Neuron docs, How to prepare trn1.32xlarge for multi-node execution: EFA on every node, which smaller sizes lack; and
    the tutorials for several nodes use all cores of the largest size. Of trn2.3xlarge, which has EFA, there is none.
    """
    instance = trainium(name)
    if instance is None or nodes == 1:
        return None
    if not instance.efa:
        return f"{name} has no EFA and cannot be one of {nodes} nodes"
    if instance.neuron_devices == 1:
        return f"{name} has one device, and Neuron has jobs of several nodes with 16 devices each only"
    return None
