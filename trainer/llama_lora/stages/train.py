"""Train the adapter with the workers of all nodes. Resumes from the newest complete checkpoint of the configuration."""

from __future__ import annotations

from dataclasses import asdict

from llama_lora import backends
from llama_lora.backends.base import Backend, TrainingJob, TrainingResult
from llama_lora.backends.launch import run_workers, worker_command
from llama_lora.config import recorded_attention, recorded_backend
from llama_lora.digests import record_of
from llama_lora.stage import Declaration, Stage


def train(stage: Stage) -> None:
    """Check the settings, then run this node's workers."""
    backend = backends.get(stage.config.backend)
    check_settings(stage, backend)
    backend.check_compiled(stage)
    verify_base_and_rows(stage)
    if stage.config.training.eval_steps is not None:
        from llama_lora.backends.held_out import read_rows

        read_rows(stage.upstream_path("tokenize", "dataset"), stage.config.training)
    run_workers(worker_command(stage.name, stage.paths), stage.config)


def check_settings(stage: Stage, backend: Backend) -> None:
    """Check the settings against the model. Raises UserErrors."""
    model = stage.upstream_path("tokenize", "model")
    stage.verify_read("tokenize", model / "config.json")
    backend.check(stage.config, model)


def verify_base_and_rows(stage: Stage) -> None:
    """Verify what the workers of this node are about to read. Raises UserErrors for files that are damaged."""
    dataset = stage.upstream_path("tokenize", "dataset")
    measures = stage.config.training.eval_steps is not None
    rows = [dataset / "train", *([dataset / "eval"] if measures else [])]
    stage.verify_read("tokenize", stage.upstream_path("tokenize", "model"), *rows)


def train_worker(stage: Stage, backend: Backend) -> None:
    """Train to the end, in every worker. The manifest is written once the files of all workers are durable."""

    def finish(result: TrainingResult) -> None:
        assert result.checkpoint is not None, "the last step saves"
        stage.facts = {"checkpoint": str(result.checkpoint.relative_to(stage.paths.workspace)), "steps": result.steps}
        assert stage.fingerprint is not None
        metrics = stage.paths.metrics(stage.fingerprint)
        if metrics.exists():  # not an output: a training is not repeated because its curves are gone
            stage.facts["metrics"] = asdict(record_of(metrics))
        if result.held_out:
            stage.facts |= {"held_out": asdict(result.held_out), "stopped_early": result.steps < result.total_steps}
        stage.finish([result.checkpoint])

    backend.train(training_job(stage), finish)


def training_job(stage: Stage, dry_run: int | None = None) -> TrainingJob:
    """Build the workers' job from the config and the outputs of tokenize."""
    assert stage.fingerprint is not None
    return TrainingJob(
        model=stage.upstream_path("tokenize", "model"),
        base_name=stage.config.model.id or None,
        dataset=stage.upstream_path("tokenize", "dataset"),
        lora=stage.config.lora,
        training=stage.config.training,
        parallelism=stage.config.parallelism,
        compile=stage.config.compile,
        device=stage.config.device,
        probe=stage.config.probe,
        fingerprint=stage.fingerprint,
        paths=stage.paths,
        dry_run=dry_run,
    )


STAGE = Declaration(
    name="train",
    version=3,
    summary="Train with LoRA on all workers; writes checkpoints, progress and metrics.",
    after=["tokenize"],
    needs=["compile"],
    reads=lambda config: {
        "backend": recorded_backend(config),
        "lora": config.lora.as_keys(),
        "training": config.training.settings_of_result(
            exclude={"save_steps", "save_total_limit", "activation_checkpointing"}  # affect only memory and time
        )
        | {"attention": recorded_attention(config)},
    },
    run=train,
    worker=train_worker,
)
