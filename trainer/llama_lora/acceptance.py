"""The acceptance run: what a new device, SDK or image must show before a training is worth its price.

It trains a few steps at full length with the run's own model, layout and rows, by the workers of train, and compares
them with what is expected (acceptance_checks.py). Nothing of the run itself is changed.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from genvalues.accelerators.architectures import Architecture, from_config, target_names
from genvalues.accelerators.memory import Step
from genvalues.accelerators.native_memory import NativeMemory, native_memory
from genvalues.common import files
from genvalues.common.errors import UserError, write_errors_as_user_errors
from llama_lora import acceptance_checks as checks
from llama_lora import backends, neuron_node, probe
from llama_lora.acceptance_checks import Check
from llama_lora.acceptance_trainings import SAVE_STEPS, STEPS, NotTrained, Training, Trainings
from llama_lora.backends.base import TrainingJob
from llama_lora.config import RunConfig
from llama_lora.layout_trace import CORE_MEMORY
from llama_lora.paths import Paths
from llama_lora.stage import LIBRARIES, Stage, installed_versions, now
from llama_lora.stages.train import training_job


def acceptance(config: RunConfig, paths: Paths) -> Iterator[Check]:
    """Yield each check when its trainings are done, and then write acceptance.json into the run's folder.

    Raises UserError before any training if the run cannot be trained here. Every node of the run calls this.
    """
    stage = Stage("train", config, paths)
    check_run(stage)
    began = time.monotonic()
    trainings, found = Trainings(stage), []
    for name in CHECKS:
        found.append(outcome(name, trainings))
        yield found[-1]
    record = {
        "passed": checks.passed(found),
        "checks": [asdict(check) for check in found],
        "device": config.device,
        "config": config.as_keys(),
        "versions": installed_versions((*LIBRARIES, "torch-neuronx", "neuronx-cc")),
        "seconds": round(time.monotonic() - began),
        "finished": now(),
    }
    files.write_json(paths.acceptance, record)


def check_run(stage: Stage) -> None:
    """Raise UserError if the run cannot be trained on this node."""
    config = stage.config
    if config.backend != "native":
        raise UserError("the acceptance run needs backend native", where="backend", fix="Write backend: native.")
    model = stage.upstream_path("tokenize", "model")
    from llama_lora.backends.native import compiling, devices

    devices.check_installed(config.device)
    neuron_node.check(config)
    backends.get(config.backend).check(config, model)
    nodes = int(os.environ.get("PET_NNODES", "1").rpartition(":")[2])
    if nodes != config.parallelism.nodes:
        raise UserError(
            f"PET_NNODES is {nodes}, but parallelism.nodes is {config.parallelism.nodes}",
            where="parallelism.nodes",
            fix="Run the command on every node with torchrun's variables PET_NNODES, PET_RDZV_BACKEND and "
            "PET_RDZV_ENDPOINT, or write the number of nodes.",
        )
    if config.device == "neuron":
        compiling.set_cache(stage.paths)  # the graphs are those of the run
    with write_errors_as_user_errors(str(stage.paths.acceptance_trainings), "Make the volume writable."):
        stage.paths.acceptance_trainings.mkdir(exist_ok=True)


def outcome(name: str, trainings: Trainings) -> Check:
    """Do a check. It fails if one of its trainings fails, and is skipped if that has failed in an earlier check."""
    try:
        return CHECKS[name](trainings)
    except UserError as error:
        return Check(name, "FAIL", str(error), "no error")
    except NotTrained as error:
        return checks.skipped(name, str(error))


def check_probe(trainings: Trainings) -> Check:
    """Recompute the probe on this node with transformers and PEFT, from the base model and the saved adapter."""
    from datasets import load_from_disk

    from llama_lora.adapter import write_adapter
    from llama_lora.streaming import StreamedModel

    whole = trainings["whole"]
    config = whole.stage.config
    recorded = backends.probe_of(whole.checkpoint)
    if recorded is None:
        raise UserError("the last checkpoint of the training whole has no probe")
    adapter = backends.get(config.backend).read_adapter(whole.checkpoint, None)
    with tempfile.TemporaryDirectory() as folder:
        write_adapter(Path(folder), adapter.tensors, adapter.config)
        model = StreamedModel(trainings.model, Path(folder))
        rows = load_from_disk(str(whole.stage.upstream_path("tokenize", "dataset") / "train"))
        recomputed = probe.recompute(recorded, rows, model, config.training.isolates_examples)
    return checks.full_length_probe(recorded, recomputed, config.probe.tolerance)


def check_resume(trainings: Trainings) -> Check:
    """Compare the last checkpoints; the resumed workers must have started after the save."""
    whole, resumed = trainings["whole"], trainings["resumed"]
    first = min((step["step"] for step in resumed.measured), default=0)
    return checks.equal_resume(
        whole.metrics, resumed.metrics, (digests(whole), digests(resumed)), first, expected_first=SAVE_STEPS + 1
    )


def digests(training: Training) -> dict[str, str]:
    """The SHA-256 of each tensor of the last checkpoint. The files have no fixed order of their metadata."""
    from llama_lora.backends import checkpoints
    from llama_lora.backends.native import shards

    stored = shards.stored_parts(training.checkpoint, checkpoints.verify_checkpoint(training.checkpoint).files)
    return {name: shards.digest(stored.read(name)) for name in stored.parts}


def check_memory(trainings: Trainings) -> Check:
    whole = trainings["whole"]
    model = from_config(json.loads((trainings.model / "config.json").read_text(encoding="utf-8")))
    allocated = max((step["memory"].get("allocated", 0) for step in whole.measured), default=0)
    return checks.planned_memory(trainings.config.device, allocated, planned_memory(training_job(whole.stage), model))


def planned_memory(job: TrainingJob, model: Architecture) -> NativeMemory:
    """The memory of one worker as `genvalues plan` computes it."""
    training, layout = job.training, job.parallelism
    step = Step(
        length=training.max_sequence_length,
        rows=training.per_device_batch_size,
        attention=training.attention,
        checkpointing=training.activation_checkpointing,
        r=job.lora.r,
        targets=tuple(target_names(job.lora.target_modules)),
        dropout=job.lora.dropout > 0,
    )
    accumulates = training.gradient_accumulation_steps > 1
    size, shard = layout.tensor_parallel_size, layout.shard_size
    return native_memory(model, step, size, shard, CORE_MEMORY, accumulates=accumulates)


def steps_of_both(trainings: Trainings) -> list[dict[str, Any]]:
    return [*trainings["whole"].measured, *trainings["resumed"].measured]


CHECKS: Mapping[str, Callable[[Trainings], Check]] = {
    "loss": lambda run: checks.falling_loss(run["whole"].metrics, STEPS),
    "probe": check_probe,
    "nodes": lambda run: checks.all_nodes(run["whole"].measured, run.config.parallelism),
    "memory": check_memory,
    "resume": check_resume,
    "fallbacks": lambda run: checks.no_fallbacks(run.config.device, steps_of_both(run)),
    "compiled files": lambda run: checks.compiled_once(run.config.device, steps_of_both(run)),
    "first step": lambda run: checks.first_step(run["first"].metrics[0], run["first-cpu"].metrics[0]),
}
