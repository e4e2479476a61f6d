"""The trainings of the acceptance run: few steps, in folders of their own, by the workers of train."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genvalues.common.errors import UserError
from llama_lora.config import Monitoring, RunConfig
from llama_lora.paths import Paths
from llama_lora.runlog import read_metrics
from llama_lora.small_run import NO_EVALUATION, first_rows, other_stage, write_rows, write_tokenized
from llama_lora.stage import Stage

log = logging.getLogger(__name__)

STEPS, SAVE_STEPS = 6, 3
PROBE_ROWS = 2
LAUNCHES = ("whole", "killed", "resumed", "first", "first-cpu")
ENDPOINT = "PET_RDZV_ENDPOINT"  # HOST[:PORT], set by the training operator on every node
DEFAULT_PORT = 29400  # torch/distributed/elastic/rendezvous/c10d_rendezvous_backend.py


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
        self.model = run.upstream_path("tokenize", "model")
        self.rows = run.upstream_path("tokenize", "dataset") / "train"
        self._taken: dict[str, Training | None] = {}  # None: failed

    def __getitem__(self, name: str) -> Training:
        """Raises UserError if the training fails, and NotTrained when it is asked for again."""
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
            except UserError as killed:
                log.debug(f"acceptance: {killed}")  # a check compares where the training resumes
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
        **NO_EVALUATION,
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
            "monitoring": Monitoring(),
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
    """Run this node's workers. See ``backends.native.measured``. Raises UserError if they fail."""
    from llama_lora.backends.failures import WorkersFailed
    from llama_lora.backends.launch import run_workers
    from llama_lora.backends.native.measured import measurements, worker_command

    log.info(f"acceptance: training {name} on {stage.config.device}")
    shutil.rmtree(measurements(stage.paths), ignore_errors=True)
    try:
        with own_rendezvous(LAUNCHES.index(name)):
            run_workers(worker_command(stage.paths, kill_after), stage.config)
    except WorkersFailed as error:
        raise UserError(f"the training {name} failed: {error}") from None


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
