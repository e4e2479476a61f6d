"""Before the long run, a few steps of it: on Trainium to compile its graphs, on the CPU as a dry run.

The CPU compiles nothing and says so. What it proves is that batch, memory and loss are sane; what it measures is the
time a step takes, for the estimate.

On Trainium the same workers are run by neuron_parallel_compile (backends/neuron/compiling.py). There no result is real,
so that none is recorded: the manifest is about graphs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from genvalues.common.text import duration
from llama_lora import backends
from llama_lora.backends.base import Backend, TrainingResult
from llama_lora.config import RunConfig
from llama_lora.graphs import graph_settings, world_size
from llama_lora.launch import run_workers, worker_command
from llama_lora.stage import Declaration, Stage
from llama_lora.stages.train import training_job

STEPS = 10  # AWS: "about 10"; every graph of a run is seen by then


def compile(stage: Stage) -> None:
    """Run the train stage's own workers for a few steps in a scratch place, and keep what came of it."""
    tokenized = stage.upstream("tokenize").facts
    backend = backends.get(stage.config.backend)
    backend.check(stage.config, stage.paths.workspace / tokenized["model"])
    if stage.config.backend == "neuron":
        from llama_lora.backends.neuron import compiling

        compiling.compile_graphs(stage)
        return
    print("a dry run of the first training steps on the CPU; nothing is compiled", flush=True)
    run_workers(worker_command(stage.name, stage.paths), stage.config)


def compile_worker(stage: Stage, backend: Backend) -> None:
    """In every worker: the first steps of the training. What makes it short is in the job; all else is train's."""

    def finish(result: TrainingResult) -> None:
        assert result.seconds_per_step is not None
        stage.facts = {name: value for name, value in asdict(result).items() if name != "checkpoint"}
        stage.finish([])
        print(
            f"dry run: {result.steps} steps, loss {result.first_loss:.4f} -> {result.last_loss:.4f}, "
            f"{result.seconds_per_step:.2f} s a step, {result.peak_memory_bytes / 2**30:.1f} GiB a worker; "
            f"{result.total_steps} steps will take about {duration(result.total_steps * result.seconds_per_step)}",
            flush=True,
        )

    def finish_trial(result: TrainingResult) -> None:
        from llama_lora.backends.neuron import compiling

        compiling.trial_ended(stage)

    backend.train(training_job(stage, dry_run=STEPS), finish_trial if stage.config.backend == "neuron" else finish)


def reads(config: RunConfig) -> Mapping[str, Any]:
    """On the CPU what the dry run measures; on Trainium what changes a graph.

    Unlike other stages', the fingerprint then depends on the number of workers: groups of them are written into the
    graphs' collectives. The model's config.json is tokenize's output, which counts by its fingerprint.
    """
    if config.backend == "neuron":
        graphs = graph_settings(config, {}, world_size(config))
        return {"backend": config.backend, "graphs": graphs, "on": config.compile.runs_on}
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
    summary="A few training steps in a scratch place: compiles the graphs on Trainium, a dry run on the CPU.",
    after=["tokenize"],
    reads=reads,
    run=compile,
    worker=compile_worker,
)
