"""Run a few steps of the training first: to compile its graphs on Trainium, or as a dry run on the CPU.

How graphs are compiled, and what is recorded: backends/native/compiling.py and backends/xla/compiling.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama_lora import backends
from llama_lora.backends.base import Backend
from llama_lora.backends.native import graphs as native_graphs
from llama_lora.backends.xla.graphs import graph_settings, world_size
from llama_lora.config import RunConfig, recorded_backend
from llama_lora.stage import Declaration, Stage
from llama_lora.stages.train import check_settings, training_job, verify_base_and_rows


def compile(stage: Stage) -> None:
    """Run the workers of train for a few steps in a scratch folder."""
    backend = backends.get(stage.config.backend)
    check_settings(stage, backend)
    verify_base_and_rows(stage)
    backend.compile(stage)


def compile_worker(stage: Stage, backend: Backend) -> None:
    """Run the first training steps, in every worker. Only the job's ``dry_run`` differs from train."""
    job = training_job(stage, dry_run=backend.dry_run_steps)
    backend.train(job, lambda result: backend.finish_dry_run(stage, result))


def reads(config: RunConfig) -> Mapping[str, Any]:
    """The settings that the dry run depends on (CPU), or that change a graph (Trainium).

    Graphs depend on the number of workers, because their collectives contain the groups of workers; so does this
    fingerprint, unlike those of other stages. The model's config.json is covered by tokenize's fingerprint.
    """
    if config.backend == "xla":
        graphs = graph_settings(config, {}, world_size(config))
        return {"backend": recorded_backend(config), "graphs": graphs, "on": config.compile.runs_on}
    if config.device == "neuron":
        return {"backend": config.backend, "graphs": native_graphs.graph_settings(config)}
    return {
        "backend": config.backend,
        "lora": config.lora.as_keys(),
        "training": config.training.model_dump(
            include={"max_sequence_length", "per_device_batch_size", "gradient_accumulation_steps"}
        ),
    }


STAGE = Declaration(
    name="compile",
    version=1,
    summary="Run a few training steps: to compile the graphs on Trainium, as a dry run on the CPU.",
    after=["tokenize"],
    reads=reads,
    run=compile,
    worker=compile_worker,
)
