"""The stages among the objects of the rendered chart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from genvalues.cluster.workloads import NAMES
from genvalues.inputs.chart import load

STAGE = "llama-lora/stage"  # annotation: the stage's name
NEEDS_CLUSTER = "llama-lora/needs-cluster"  # annotation of stages that do nothing outside a cluster

Object = dict[str, Any]


def annotation_of(item: Object, name: str) -> str:
    return str((item["metadata"].get("annotations") or {}).get(name, ""))


def is_pipeline_hook(item: Object) -> bool:
    """Whether Helm runs this object as a stage of the pipeline. Cleanup hooks and tests are not stages of it."""
    hooks = annotation_of(item, "helm.sh/hook").replace(" ", "").split(",")
    return bool(annotation_of(item, STAGE)) and bool({"post-install", "post-upgrade"}.intersection(hooks))


def stage_jobs(objects: Sequence[Object]) -> list[Object]:
    """The jobs of the stages in the order in which Helm runs hooks: by weight, then name."""
    jobs = [item for item in objects if is_pipeline_hook(item) and item["kind"] in ("Job", *NAMES)]
    return sorted(
        jobs, key=lambda item: (int(annotation_of(item, "helm.sh/hook-weight") or 0), item["metadata"]["name"])
    )


def stages_to_run(objects: Sequence[Object]) -> list[Object]:
    """The jobs of the stages that run on this computer."""
    return [item for item in stage_jobs(objects) if not annotation_of(item, NEEDS_CLUSTER)]


def skipped_stages(objects: Sequence[Object]) -> list[str]:
    """The names of the stages that need a cluster."""
    jobs = [item for item in stage_jobs(objects) if annotation_of(item, NEEDS_CLUSTER)]
    return list(dict.fromkeys(annotation_of(item, STAGE) for item in jobs))


def config_maps(objects: Sequence[Object]) -> dict[str, dict[str, str]]:
    """The files of every ConfigMap, by its name."""
    return {item["metadata"]["name"]: item.get("data") or {} for item in objects if item["kind"] == "ConfigMap"}


def run_name(objects: Sequence[Object]) -> str:
    """The name of the run, which names its folder, from the run config; empty where there is none."""
    for files in config_maps(objects).values():
        if "run.yaml" in files:
            config = load(files["run.yaml"])
            return str(config.get("name", "")) if isinstance(config, dict) else ""
    return ""
