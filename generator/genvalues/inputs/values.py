"""Derive the values of the chart from the inputs and the plan."""

from __future__ import annotations

from typing import Any

from genvalues.accelerators.architectures import target_names
from genvalues.accelerators.cpu_memory import Memory, stage_memory
from genvalues.accelerators.instances import HYPERPOD, row, trainium
from genvalues.common.dicts import merge, without_null
from genvalues.planner.planning import Plan, stall_timeout
from genvalues.settings.base import Block
from genvalues.settings.datasets import row_format
from genvalues.settings.images import split_image
from genvalues.settings.inputs import DatasetInputs, Inputs, ModelPath, StorageInputs
from genvalues.settings.run import with_own_words
from genvalues.settings.shared import STORAGE_BY_KIND, HuggingFace

# The cores of the stages that compute with the model on a CPU node, with their memory below.
CPU_REQUEST, CPU_LIMIT = "8", "16"
# Two processes that train two layers with the model's own vocabulary, and a trace of the whole training: an assumption.
REHEARSAL = Memory(40, 64)


def values_from(inputs: Inputs, plan: Plan) -> dict[str, Any]:
    """The values of a run, in the order of the chart's values.yaml. The inputs' chartValues are merged last."""
    instance = trainium(inputs.instance)
    layout, on_hyperpod = plan.layout, inputs.instance.startswith(HYPERPOD)
    evaluation = inputs.evaluation.model_copy(update={"enabled": inputs.evaluates})
    values = {
        "name": inputs.name,
        "instance": inputs.instance,
        "backend": inputs.chosen_backend,
        **({"workload": inputs.workload} if inputs.workload != Inputs.model_fields["workload"].default else {}),
        "image": image(inputs.image),
        "pipeline": {"mode": inputs.mode or ("detached" if instance else "attached")},
        "model": model(inputs.model),
        "dataset": dataset(inputs.dataset),
        "lora": as_values(inputs.lora),
        "training": training(inputs, plan),
        "probe": as_values(inputs.probe),
        "compile": as_values(inputs.compile),
        "guards": guards(inputs, plan),
        "evaluation": as_values(evaluation),
        "parallelism": {
            "nodes": layout.nodes,
            "processesPerNode": layout.processes_per_node,
            "tensorParallelSize": layout.tensor_parallel,
            "dataParallelSize": layout.data_parallel,
            "shardSize": layout.shard_size,
        },
        "rehearse": {"enabled": inputs.rehearses},
        **{key: as_values(block) for key, block in optional_blocks(inputs).items()},
        "verify": inputs.verify,
        "devices": instance.devices if instance else {},
        # The chart's defaults are for the CPU.
        **({key: row(instance)[key] for key in ("neuron", "sharedMemory")} if instance else {}),
        "huggingFace": as_values(inputs.hugging_face or HuggingFace()),
        # HyperPod replaces a failed node, and restarts only the PyTorchJobs that request it.
        "hyperpod": {"autoResume": on_hyperpod and inputs.workload == "pytorchjob", "maxRetries": 1},
        "storage": storage(inputs.storage, "fsx" if instance else "generic"),
    }
    if instance:
        trains = {"resources": instance.resources}
        values["stages"] = {"rehearse": on_cpu_node(REHEARSAL)} if inputs.rehearses else {}
        values["stages"] |= {"compile": trains, "train": trains}
        values["stages"] |= {stage: on_cpu_node(memory) for stage, memory in cpu_memory(inputs, plan).items()}
    return with_own_words(merge(values, inputs.chart_values))


def cpu_memory(inputs: Inputs, plan: Plan) -> dict[str, Memory]:
    """The memory of consolidate, merge and evaluate, which follows the model."""
    return stage_memory(
        plan.model.architecture,
        inputs.lora.r,
        target_names(inputs.lora.target_modules),
        inputs.training.max_sequence_length,
        verifies=inputs.probe.rows > 0,
        samples=inputs.evaluation.samples > 0,
    )


def on_cpu_node(memory: Memory) -> dict[str, Any]:
    """The settings of a stage that computes with the model."""
    cores = {"requests": CPU_REQUEST, "limits": CPU_LIMIT}
    return {"resources": {bound: {"cpu": cores[bound], "memory": gib} for bound, gib in memory.quantities().items()}}


def optional_blocks(inputs: Inputs) -> dict[str, Block]:
    """Blocks of which most runs set nothing: without them, values are shorter."""
    blocks: dict[str, Block] = {"publish": inputs.publish, "monitoring": inputs.monitoring, "kueue": inputs.kueue}
    return {key: block for key, block in blocks.items() if block != type(block)()}


def as_values(block: Block) -> dict[str, Any]:
    """A block as in a values file: whole numbers without a fraction."""
    return block.model_dump(by_alias=True, mode="json")


def training(inputs: Inputs, plan: Plan) -> dict[str, Any]:
    """The training section: the inputs, completed by the plan. globalBatchSize follows from the other batch
    settings.
    """
    layout = plan.layout
    chosen = {
        "attention": plan.attention,
        "activationCheckpointing": layout.checkpointing,
        "perDeviceBatchSize": layout.per_device,
        "gradientAccumulationSteps": layout.accumulation,
    }
    written = as_values(inputs.training)
    del written["globalBatchSize"]
    return written | chosen


def guards(inputs: Inputs, plan: Plan) -> dict[str, Any]:
    """The guards section: the inputs, completed by the price table. On the CPU the default is no stallTimeout."""
    written = as_values(inputs.guards)
    if written["stallTimeout"] is None:
        written["stallTimeout"] = "" if inputs.on_cpu else stall_timeout(inputs).value
    return written | {"pricePerNodeHour": plan.price.dollars if plan.price else None}


def image(reference: str | None) -> dict[str, str]:
    return dict(zip(("repository", "tag", "digest"), split_image(reference or "llama-lora"), strict=True))


def model(wanted: str | ModelPath) -> dict[str, str]:
    if isinstance(wanted, ModelPath):
        return {"id": "", "revision": "", "path": wanted.path}
    hub_id, _, revision = wanted.partition("@")
    return {"id": hub_id, "revision": revision, "path": ""}


def dataset(wanted: DatasetInputs) -> dict[str, Any]:
    """The dataset section. A column with the name of its key is left out: the trainer finds it, or a usual name."""
    written: dict[str, Any] = without_null(as_values(wanted))
    columns = {key: column for key, column in written["columns"].items() if column != key}
    first = {"source": wanted.source, "format": row_format(wanted.format, wanted.source)}
    return first | written | first | {"columns": columns}


def storage(wanted: StorageInputs, kind: str) -> dict[str, Any]:
    if wanted.existing_claim:
        return {"enabled": True, "existingClaim": wanted.existing_claim}
    kind = wanted.kind or kind
    values: dict[str, Any] = {
        "enabled": True,
        "kind": kind,
        "size": wanted.size or STORAGE_BY_KIND[kind]["size"],
        "storageClass": STORAGE_BY_KIND[kind]["storageClass"] if wanted.storage_class is None else wanted.storage_class,
    }
    if wanted.static:
        values["static"] = as_values(wanted.static)
    return values
