"""Log a training to Weights & Biases and to MLflow, whose own environment variables say where and how.

Each has a thread of its own, and a queue that drops values when it is full. A tracker that fails is one warning: the
training goes on without it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from genvalues.common.dicts import flatten
from genvalues.common.errors import UserError
from genvalues.common.text import one_line, redacted
from llama_lora.config import Monitoring, RunConfig
from llama_lora.paths import Paths

log = logging.getLogger(__name__)

PROJECT = "llama-lora"  # unless WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME says otherwise
QUEUED = 1000  # steps
LAST_WORDS_SECONDS = 10.0  # how long the end of a training waits for what is queued
REQUEST_SECONDS = 10  # of MLflow, whose default is 120 s and 7 attempts
MOST_PARAMETER = 500  # characters of a value in MLflow
NOT_OF_A_NAME = re.compile(r"[^\w. -]")  # of a parameter in MLflow; sources of data may be named with anything
MOST_NAME = 250
MOST_PARAMETERS = 100  # in one request of MLflow

LIBRARIES = {"wandb": "wandb", "mlflow": "mlflow-skinny"}  # module -> package, by the key in the settings


class Step(Protocol):
    """What is logged of an optimizer step: runlog's StepMetrics."""

    @property
    def step(self) -> int: ...

    @property
    def loss(self) -> float: ...

    @property
    def learning_rate(self) -> float: ...

    @property
    def grad_norm(self) -> float: ...


class Tracker(Protocol):
    """Where a training is logged. No method raises or waits, except that ``close`` waits for seconds."""

    def step(self, metrics: Step, tokens_per_second: float) -> None: ...

    def held_out(self, step: int, loss: float) -> None: ...

    def close(self) -> None: ...


class Client(Protocol):
    """A library that logs values of a step. Anything may be raised."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def check_installed(monitoring: Monitoring) -> None:
    """Raise UserError if a tracker that is on has no library here."""
    for key in chosen(monitoring):
        if importlib.util.find_spec(key) is None:
            raise UserError(
                f"{LIBRARIES[key]} is not installed",
                where=f"monitoring.{key}",
                fix=f"Add {LIBRARIES[key]} to the image (docs/image.md), or set monitoring.{key}: false.",
            )


def chosen(monitoring: Monitoring) -> list[str]:
    return [key for key, on in {"wandb": monitoring.wandb, "mlflow": monitoring.mlflow}.items() if on]


def trackers_for(paths: Paths, config: RunConfig, fingerprint: str) -> list[Tracker]:
    """The trackers that are on, for the worker of rank 0. A training that resumes continues its run in each."""
    connect: dict[str, Callable[[], Client]] = {
        "wandb": lambda: WandbClient(paths, config, run_id(config.name, fingerprint)),
        "mlflow": lambda: MlflowClient(config, run_id(config.name, fingerprint)),
    }
    return [InBackground(key, connect[key]) for key in chosen(config.monitoring)]


def run_id(run: str, fingerprint: str) -> str:
    """The id of a training in a tracker: the same after a restart, another after a change of the configuration."""
    return hashlib.sha256(f"{run} {fingerprint}".encode()).hexdigest()[:16]


def settings_of(config: RunConfig) -> dict[str, Any]:
    """The run config, without what has no effect on the training."""
    return {key: value for key, value in config.as_keys().items() if key not in ("publish", "monitoring")}


class InBackground:
    """A tracker that passes values to a client from a thread."""

    def __init__(self, name: str, connect: Callable[[], Client]) -> None:
        self._name = name
        self._queue: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(QUEUED)
        self._warned = False
        self._emptied = False
        self._thread = threading.Thread(target=self._run, args=[connect], daemon=True, name=f"log to {name}")
        self._thread.start()

    def step(self, metrics: Step, tokens_per_second: float) -> None:
        values = {
            "train/loss": metrics.loss,
            "train/learning_rate": metrics.learning_rate,
            "train/grad_norm": metrics.grad_norm,
            "train/tokens_per_second": tokens_per_second,
        }
        self._put(metrics.step, values)

    def held_out(self, step: int, loss: float) -> None:
        self._put(step, {"eval/loss": loss})

    def close(self) -> None:
        """Log what is queued, within LAST_WORDS_SECONDS."""
        try:
            self._queue.put(None, timeout=LAST_WORDS_SECONDS)
        except queue.Full:
            return
        self._thread.join(LAST_WORDS_SECONDS)
        if self._thread.is_alive():
            self._warn(f"did not finish within {LAST_WORDS_SECONDS:.0f} s; its last values may be missing")

    def _put(self, step: int, values: dict[str, float]) -> None:
        try:
            self._queue.put_nowait((step, values))
        except queue.Full:
            self._warn("does not keep up; steps are missing there")

    def _run(self, connect: Callable[[], Client]) -> None:
        try:
            client = connect()
            for item in iter(self._queue.get, None):
                client.log(*item)
            self._emptied = True
            client.close()
        except BaseException as error:  # whatever a library does; SystemExit too
            self._warn(f"failed, and the training is not logged there: {redacted(str(error)) or type(error).__name__}")
            while not self._emptied:  # a queue that is full would be a second warning
                self._emptied = self._queue.get() is None

    def _warn(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            log.warning(f"monitoring.{self._name}: {one_line(what, 300)}")


class WandbClient:
    """A run in Weights & Biases. Offline runs (WANDB_MODE=offline) are in the run's folder, for `wandb sync`."""

    def __init__(self, paths: Paths, config: RunConfig, run_id: str) -> None:
        os.environ.setdefault("WANDB_INIT_TIMEOUT", "30")  # seconds; the default is 90
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", str(int(LAST_WORDS_SECONDS)))  # the default is none
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=os.environ.get("WANDB_RUN_ID", run_id),
            name=os.environ.get("WANDB_NAME", config.name),
            resume="allow",
            config=settings_of(config),
            dir=os.environ.get("WANDB_DIR", str(paths.run)),
            settings=wandb.Settings(console="off", silent=True, disable_git=True, save_code=False),
        )
        # Steps after a checkpoint are trained again, and W&B's own step count only rises.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


class MlflowClient:
    """A run on the server of MLFLOW_TRACKING_URI, which the chart requires."""

    def __init__(self, config: RunConfig, run_id: str) -> None:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(REQUEST_SECONDS))
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        import mlflow

        self._client = mlflow.MlflowClient(tracking_uri=os.environ["MLFLOW_TRACKING_URI"])
        self._metric = mlflow.entities.Metric
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(name)
        tags = {"llama-lora.id": run_id, "mlflow.runName": config.name}
        found = self._client.search_runs([experiment_id], f"tags.`llama-lora.id` = '{run_id}'", max_results=1)
        self._id = found[0].info.run_id if found else self._new_run(experiment_id, tags, config)
        self._client.update_run(self._id, "RUNNING")

    def _new_run(self, experiment_id: str, tags: Mapping[str, str], config: RunConfig) -> str:
        import mlflow

        made: str = self._client.create_run(experiment_id, tags=dict(tags)).info.run_id
        settings = flatten(settings_of(config)).items()
        values = {NOT_OF_A_NAME.sub("_", key)[:MOST_NAME]: str(value)[:MOST_PARAMETER] for key, value in settings}
        params = [mlflow.entities.Param(key, value) for key, value in values.items()]
        for start in range(0, len(params), MOST_PARAMETERS):
            self._client.log_batch(made, params=params[start : start + MOST_PARAMETERS])
        return made

    def log(self, step: int, values: Mapping[str, float]) -> None:
        now = time.time_ns() // 1_000_000
        metrics = [self._metric(key, value, now, step) for key, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self._id)
