"""What an instance type has, and what follows from it: the one place that knows an instance type."""

from __future__ import annotations

from dataclasses import dataclass

CPU = "cpu"  # no accelerator: any node, or this computer
HYPERPOD = "ml."  # what SageMaker HyperPod puts before an instance type's name
WIDEST_TENSOR_PARALLEL = 8  # Llama 3's key/value heads: wider would copy them


@dataclass(frozen=True)
class Instance:
    """One node of an instance type, as Kubernetes sees it."""

    neuron_devices: int
    cores: int  # NeuronCores a process can have: the logical ones (LNC=2 on trn2), one process each
    efa: int
    vcpu: int
    memory_gib: int
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
    def resources(self) -> dict[str, dict[str, str]]:
        """CPU and memory of the training pod of a node."""
        memory = f"{self.request_memory_gib}Gi"
        return {
            "requests": {"cpu": str(self.request_cpu), "memory": memory},
            "limits": {"cpu": str(self.request_cpu), "memory": memory},
        }


@dataclass(frozen=True)
class Parallelism:
    """How a job's processes divide the work: nodes x processes a node = tensor parallel x data parallel."""

    nodes: int
    processes_per_node: int
    tensor_parallel: int
    data_parallel: int


# Every Trainium type, those too that refusal() says no to, after the AWS instance pages.
# trn1.32xlarge has about 119 vCPU and 460 GiB allocatable on EKS, the others are in proportion.
TRAINIUM = {
    "trn1.2xlarge": Instance(1, 2, 0, 8, 32, request_cpu=6, request_memory_gib=26),
    "trn1.32xlarge": Instance(16, 32, 8, 128, 512, request_cpu=112, request_memory_gib=440),
    "trn1n.32xlarge": Instance(16, 32, 16, 128, 512, request_cpu=112, request_memory_gib=440),
    "trn2.3xlarge": Instance(1, 4, 1, 12, 128, request_cpu=10, request_memory_gib=110),
    "trn2.48xlarge": Instance(16, 64, 16, 192, 2048, request_cpu=168, request_memory_gib=1760),
    "trn2u.48xlarge": Instance(16, 64, 16, 192, 2048, request_cpu=168, request_memory_gib=1760),
}
NAMES = [CPU, *TRAINIUM, *(HYPERPOD + name for name in TRAINIUM)]


def trainium(name: str) -> Instance | None:
    """The Trainium instance of that name, with or without HyperPod's prefix; None for cpu."""
    return TRAINIUM.get(name.removeprefix(HYPERPOD))


def is_process_group(size: int) -> bool:
    """Whether Neuron can make a group of so many processes, one a core (FIELD-NOTES: the core counts it may use)."""
    return size in (1, 2, 8, 16) or size % 32 == 0


def refusal(name: str, nodes: int) -> tuple[str, str] | None:
    """Why so many nodes of an instance cannot be trained on: the key to change, and the reason; None if they can."""
    instance = trainium(name)
    if instance is None:
        return None
    if not is_process_group(instance.cores):
        groups = "1, 2, 8, 16 or a multiple of 32"
        return "instance", f"{name} has {instance.cores} cores, and Neuron has process groups of {groups} only"
    if nodes > 1 and not instance.efa:
        return "nodes", f"{name} has no EFA and cannot be one of {nodes} nodes"
    return None


def parallelism(name: str, nodes: int, cpu_processes: int) -> Parallelism:
    """One process a core on Trainium, tensor parallel as wide as it helps; on the CPU, data parallel only."""
    instance = trainium(name)
    processes = instance.cores if instance else cpu_processes
    tensor_parallel = min(instance.cores, WIDEST_TENSOR_PARALLEL) if instance else 1
    return Parallelism(nodes, processes, tensor_parallel, nodes * processes // tensor_parallel)
