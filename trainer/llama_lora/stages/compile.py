"""Run a few steps of the training first: to compile its graphs on Trainium, or as a dry run on the CPU.

On the CPU nothing is compiled. The dry run checks batch, memory and loss, and measures the time per step.

On Trainium neuron_parallel_compile runs the same workers (backends/neuron/compiling.py). Results of that run are not
real, so the manifest records the graphs only.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from genvalues.common.text import duration
from llama_lora import backends
from llama_lora.backends.base import Backend, TrainingResult
from llama_lora.backends.launch import run_workers, worker_command
from llama_lora.backends.neuron.graphs import graph_settings, world_size
from llama_lora.config import RunConfig, recorded_backend
from llama_lora.stage import Declaration, Stage
from llama_lora.stages.train import training_job

log = logging.getLogger(__name__)

STEPS = 10  # AWS recommends "about 10": they cover every graph of a run


def compile(stage: Stage) -> None:
    """Run the workers of train for a few steps in a scratch folder."""
    tokenized = stage.upstream("tokenize").facts
    backend = backends.get(stage.config.backend)
    backend.check(stage.config, stage.paths.workspace / tokenized["model"])
    if stage.config.backend == "xla":
        from llama_lora.backends.neuron import compiling

        compiling.compile_graphs(stage)
        return
    log.info("compile: dry run of the first training steps on the CPU; nothing is compiled")
    run_workers(worker_command(stage.name, stage.paths), stage.config)


def compile_worker(stage: Stage, backend: Backend) -> None:
    """Run the first training steps, in every worker. Only the job's ``dry_run`` differs from train."""

    def finish(result: TrainingResult) -> None:
        assert result.seconds_per_step is not None
        stage.facts = {name: value for name, value in asdict(result).items() if name != "checkpoint"}
        stage.finish([])
        log.info(
            f"dry run: {result.steps} steps, loss {result.first_loss:.4f} -> {result.last_loss:.4f}, "
            f"{result.seconds_per_step:.2f} s per step, {result.peak_memory_bytes / 2**30:.1f} GiB per worker; "
            f"{result.total_steps} steps will take about {duration(result.total_steps * result.seconds_per_step)}"
        )

    def finish_trial(result: TrainingResult) -> None:
        from llama_lora.backends.neuron import compiling

        compiling.record_trial_end(stage)

    backend.train(training_job(stage, dry_run=STEPS), finish_trial if stage.config.backend == "xla" else finish)


def reads(config: RunConfig) -> Mapping[str, Any]:
    """The settings that the dry run depends on (CPU), or that change a graph (Trainium).

    Graphs depend on the number of workers, because their collectives contain the groups of workers; so does this
    fingerprint, unlike those of other stages. The model's config.json is covered by tokenize's fingerprint.
    """
    if config.backend == "xla":
        graphs = graph_settings(config, {}, world_size(config))
        return {"backend": recorded_backend(config), "graphs": graphs, "on": config.compile.runs_on}
    return {
        "backend": recorded_backend(config),
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
