"""The acceptance run: what a new device, SDK or image must show before a training is worth its price.

It trains a few steps at full length with the run's own model, layout and rows, by the workers of train, and compares
them with what is expected (acceptance_checks.py). Nothing of the run itself is changed.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from genvalues.accelerators.architectures import Architecture, from_config, target_names
from genvalues.accelerators.memory import Step
from genvalues.accelerators.native_memory import NativeMemory, native_memory
from genvalues.common import files
from genvalues.common.errors import UserError, write_errors_as_user_errors
from llama_lora import acceptance_checks as checks
from llama_lora import backends, probe
from llama_lora.acceptance_checks import Check
from llama_lora.backends.base import TrainingJob
from llama_lora.config import RunConfig
from llama_lora.layout_trace import CORE_MEMORY
from llama_lora.paths import Paths
from llama_lora.runlog import read_metrics
from llama_lora.small_run import first_rows, other_stage, write_rows, write_tokenized
from llama_lora.stage import LIBRARIES, Stage, installed_versions, now
from llama_lora.stages.train import training_job

log = logging.getLogger(__name__)

STEPS, SAVE_STEPS = 6, 3
PROBE_ROWS = 2
LAUNCHES = ("whole", "killed", "resumed", "first", "first-cpu")
ENDPOINT = "PET_RDZV_ENDPOINT"  # HOST[:PORT], set by the training operator on every node
DEFAULT_PORT = 29400  # torch/distributed/elastic/rendezvous/c10d_rendezvous_backend.py


def acceptance(config: RunConfig, paths: Paths) -> Iterator[Check]:
    """Yield each check when its trainings are done, and then write acceptance.json into the run's folder.

    Raises UserError before any training if the run cannot be trained here. Every node of the run calls this.
    """
    stage = Stage("train", config, paths)
    check_run(stage)
    began = time.monotonic()
    trainings, found = Trainings(stage), []
    for name, check in CHECKS.items():
        try:
            found.append(check(trainings))
        except TrainingFailed as error:
            found.append(Check(name, "FAIL", str(error), "no error"))
        except NotTrained as error:
            found.append(checks.skipped(name, str(error)))
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
    tokenized = stage.upstream("tokenize")
    from llama_lora.backends.native import compiling, devices

    devices.check_installed(config.device)
    backends.get(config.backend).check(config, stage.paths.workspace / tokenized.facts["model"])
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


# --- trainings


class TrainingFailed(Exception):
    """A training ended with an error."""


class NotTrained(Exception):
    """A training that a check needs has failed before."""


@dataclass(frozen=True)
class Training:
    """One training of the acceptance run: its stage, its metrics.jsonl, and what its workers measured."""

    stage: Stage
    metrics: list[dict[str, Any]]
    measured: list[dict[str, Any]]

    @property
    def checkpoint(self) -> Path:
        """The last one."""
        from llama_lora.backends import checkpoints

        assert self.stage.fingerprint is not None
        return checkpoints.complete(self.stage.paths.checkpoints(self.stage.fingerprint), self.stage.fingerprint)[-1]


class Trainings:
    """The trainings of an acceptance run by name, each taken when a check needs it.

    - whole: STEPS steps with the run's settings, on the same rows in each step
    - resumed: the same, but killed one step after a save, and resumed
    - first, first-cpu: one step that the CPU can repeat, on the device and on the CPU
    """

    def __init__(self, run: Stage) -> None:
        self.run = run
        self.config = run.config
        tokenized = run.upstream("tokenize").facts
        self.model = run.paths.workspace / tokenized["model"]
        self.rows = run.paths.workspace / tokenized["dataset"] / "train"
        self._taken: dict[str, Training | None] = {}  # None: failed

    def __getitem__(self, name: str) -> Training:
        """Raises TrainingFailed the first time, and NotTrained again, if the training fails."""
        if name not in self._taken:
            self._taken[name] = None
            self._taken[name] = self._take(name)
        taken = self._taken[name]
        if taken is None:
            raise NotTrained(f"needs the training {name}, which failed")
        return taken

    def _take(self, name: str) -> Training:
        from llama_lora.backends.native.measured import read_measurements

        config = settings(self.config) if name in ("whole", "resumed") else first_step_settings(self.config)
        stage = self._prepare(name, config.model_copy(update={"device": "cpu"}) if name == "first-cpu" else config)
        if name == "resumed":
            try:
                launch(stage, "killed", kill_after=SAVE_STEPS + 1)
            except TrainingFailed as failed:
                log.debug(f"acceptance: {failed}")  # check_resume compares where the training resumes
        launch(stage, name)
        assert stage.fingerprint is not None
        return Training(stage, read_metrics(stage.paths.metrics(stage.fingerprint)), read_measurements(stage.paths))

    def _prepare(self, name: str, config: RunConfig) -> Stage:
        """Make the folder of a training, on as many rows as one step takes.

        Every node does this, with the same content, before any worker starts.
        """
        from datasets import load_from_disk

        paths = Paths(self.run.paths.acceptance_trainings, name)
        shutil.rmtree(paths.run / "checkpoints", ignore_errors=True)
        training = config.training
        copies = config.parallelism.data_parallel_size
        count = training.per_device_batch_size * training.gradient_accumulation_steps * copies
        rows = paths.datasets / f"{self.rows.parent.name}-{training.max_sequence_length}-{count}"
        if not rows.exists():
            chosen = first_rows(load_from_disk(str(self.rows)), count, training.max_sequence_length)
            paths.datasets.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(dir=paths.datasets) as own:
                write_rows(chosen, Path(own, "rows"))
                with suppress(OSError):  # another node was faster
                    Path(own, "rows").rename(rows)
        config = config.model_copy(update={"name": name})
        tokenized = write_tokenized(config, paths, self.run.paths.resolved, self.model, rows)
        return other_stage(tokenized, "train")


def settings(config: RunConfig) -> RunConfig:
    """The run's settings for STEPS steps, with the same learning rate whatever their number."""
    training = config.training
    changed = {
        "max_steps": STEPS,
        "save_steps": SAVE_STEPS,
        "save_total_limit": STEPS,
        "gradient_accumulation_steps": min(2, training.gradient_accumulation_steps),
        "lr_scheduler": "constant",
        "warmup_ratio": 0.0,
    }
    probed = {"rows": PROBE_ROWS, "max_tokens": training.max_sequence_length}
    return config.model_copy(
        update={
            "training": training.model_copy(update=changed),
            "probe": config.probe.model_copy(update=probed),
            "compile": config.compile.model_copy(update={"on_fallback": "warn"}),  # a check reports them
        }
    )


def first_step_settings(config: RunConfig) -> RunConfig:
    """One step of one micro-batch, without dropout, whose masks differ between devices."""
    config = settings(config)
    one = {"max_steps": 1, "gradient_accumulation_steps": 1}
    return config.model_copy(
        update={
            "training": config.training.model_copy(update=one),
            "lora": config.lora.model_copy(update={"dropout": 0.0}),
            "probe": config.probe.model_copy(update={"rows": 0}),
        }
    )


def launch(stage: Stage, name: str, kill_after: int = 0) -> None:
    """Run this node's workers. See ``backends.native.measured``. Raises TrainingFailed."""
    from torch.distributed.elastic.rendezvous import RendezvousError

    from llama_lora.backends.launch import run_workers
    from llama_lora.backends.native.measured import measurements, worker_command

    log.info(f"acceptance: training {name} on {stage.config.device}")
    shutil.rmtree(measurements(stage.paths), ignore_errors=True)
    try:
        with own_rendezvous(LAUNCHES.index(name)):
            run_workers(worker_command(stage.paths, kill_after), stage.config)
    except UserError as error:
        raise TrainingFailed(str(error)) from None
    except RendezvousError as error:
        raise TrainingFailed(f"the nodes did not meet: {error}") from None
    except SystemExit as end:
        if end.code != 1:  # a signal ended this process's workers
            raise
        raise TrainingFailed(f"the workers of the training {name} failed; their output is above") from None


@contextmanager
def own_rendezvous(number: int) -> Iterator[None]:
    """Have the nodes meet at a port of their own in each training: PET_RDZV_ENDPOINT's plus ``number``.

    At the same port a fast node would connect to the store of the training before, which its host is about to close.
    """
    endpoint = os.environ.get(ENDPOINT)
    if endpoint is None:
        yield
        return
    host, _, port = endpoint.rpartition(":") if ":" in endpoint else (endpoint, "", DEFAULT_PORT)
    os.environ[ENDPOINT] = f"{host}:{int(port) + number}"
    try:
        yield
    finally:
        os.environ[ENDPOINT] = endpoint


# --- checks


def check_probe(trainings: Trainings) -> Check:
    """Recompute the probe on this node with transformers and PEFT, from the base model and the saved adapter."""
    from datasets import load_from_disk

    from llama_lora import evaluation
    from llama_lora.adapter import write_adapter

    whole = trainings["whole"]
    config = whole.stage.config
    recorded = backends.probe_of(whole.checkpoint)
    if recorded is None:
        raise TrainingFailed("the training whole recorded no probe")
    adapter = backends.get(config.backend).read_adapter(whole.checkpoint, None)
    with tempfile.TemporaryDirectory() as folder:
        write_adapter(Path(folder), adapter.tensors, adapter.config)
        model = evaluation.load_model(trainings.model, adapter=Path(folder))
    rows = load_from_disk(str(Path(whole.stage.upstream("tokenize").facts["dataset"], "train")))
    recomputed = probe.recompute(recorded, rows, model, config.training.attention == "isolated")
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


CHECKS: Mapping[str, Callable[[Trainings], Check]] = {
    "loss": lambda trainings: checks.falling_loss(trainings["whole"].metrics, STEPS),
    "probe": check_probe,
    "nodes": lambda trainings: checks.all_nodes(trainings["whole"].measured, trainings.config.parallelism),
    "memory": check_memory,
    "resume": check_resume,
    "fallbacks": lambda trainings: checks.no_fallbacks(
        trainings.config.device, [*trainings["whole"].measured, *trainings["resumed"].measured]
    ),
    "compiled files": lambda trainings: checks.compiled_once(
        trainings.config.device, [*trainings["whole"].measured, *trainings["resumed"].measured]
    ),
    "first step": lambda trainings: checks.first_step(trainings["first"].metrics[0], trainings["first-cpu"].metrics[0]),
}
