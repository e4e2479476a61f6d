"""Values that follow from the instance type where they are left out.

The chart completes its values in the same way and from the same rows: llama-lora.instance.complete in
chart/templates/config/_complete.tpl, and chart/templates/_instances.tpl, which is generated from the rows.
"""

from __future__ import annotations

from typing import Any

from genvalues.accelerators.architectures import known
from genvalues.accelerators.instances import CPU_ROW, NEURON, TRN1, default_backend, row, trainium
from genvalues.accelerators.memory import BF16
from genvalues.common.dicts import get
from genvalues.settings.run import with_own_words
from genvalues.settings.shared import FSX_TYPES, STORAGE_BY_KIND

Values = dict[str, Any]


def completed(values: Values) -> Values:
    """The values with what the instance type means for keys that are null or left out. Invalid values stay.

    Without the resources of compile and train, on which no rule of genvalues depends.
    """
    values = with_own_words(values)
    values = {**values, "backend": values.get("backend") or default_backend(get(values, "instance", str) or "")}
    own = row_of(values)
    values = {**values, "devices": values.get("devices") or own["devices"]}
    values = filled(values, {key: own[key] for key in ("neuron", "sharedMemory")})
    values = filled(values, {"parallelism": layout(values, own)})
    return filled(values, {"storage": storage(values)}) if get(values, "storage", dict) else values


def on_neuron(values: Values) -> bool:
    """Whether compile and train use Neuron devices: backend native has none on Trn1."""
    instance = trainium(get(values, "instance", str) or "")
    return instance is not None and not (instance.generation is TRN1 and get(values, "backend", str) == "native")


def row_of(values: Values) -> Values:
    """The row of the instance type; that of cpu where compile and train have no Neuron device."""
    instance = trainium(get(values, "instance", str) or "")
    return row(instance) if instance and on_neuron(values) else CPU_ROW


def filled(values: Values, missing: Values) -> Values:
    """The values with those of ``missing`` where they are null or left out."""
    result = dict(values)
    for key, value in missing.items():
        here = result.get(key)
        if here is None:
            result[key] = value
        elif isinstance(here, dict) and isinstance(value, dict):
            result[key] = filled(here, value)
    return result


def layout(values: Values, own: Values) -> Values:
    """The processes of a node, and how they divide the work."""
    per_node = get(values, "parallelism.processesPerNode", int) or logical_cores(values, own)
    processes = (get(values, "parallelism.nodes", int) or 1) * per_node
    copies = get(values, "parallelism.dataParallelSize", int)
    size = min(own["tensorParallelSize"], per_node)
    if copies and processes % copies == 0:
        size = processes // copies
    size = get(values, "parallelism.tensorParallelSize", int) or size
    return {
        "processesPerNode": per_node,
        "tensorParallelSize": size,
        "dataParallelSize": max(1, processes // size),
    }


def weights_gib(model_id: str) -> float | None:
    """The size of a known model's weights in bf16."""
    architecture = known(model_id)
    return round(architecture.parameters * BF16 / (1 << 30), 1) if architecture else None


def storage(values: Values) -> Values:
    """What storage keys mean by kind, for a new claim. (On an upgrade the chart keeps those of the claim.)"""
    kind = get(values, "storage.kind", str) or ""
    one_cpu_node = row_of(values) is CPU_ROW and (get(values, "parallelism.nodes", int) or 1) == 1
    throughput = FSX_TYPES.get(get(values, "storage.fsx.deploymentType", str) or "", {}).get("usual")
    return {
        **STORAGE_BY_KIND.get(kind, {}),
        "accessModes": ["ReadWriteOnce"] if kind == "generic" and one_cpu_node else ["ReadWriteMany"],
        "fsx": {"perUnitStorageThroughput": throughput, "fileSystemTypeVersion": "2.15"},
    }


def logical_cores(values: Values, own: Values) -> int:
    """The logical cores of the devices that a node's pod requests, one process each; on CPUs the usual processes."""
    devices = (get(values, "devices", dict) or {}).get(NEURON)
    size = get(values, "neuron.logicalCoreSize", int)
    if "coresPerDevice" not in own or not isinstance(devices, int) or not devices or not size:
        return int(own["processesPerNode"])
    return max(1, devices * own["coresPerDevice"] // size)
