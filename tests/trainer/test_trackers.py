"""Weights & Biases and MLflow, with stand-ins for their libraries: what is logged, and that no failure matters."""

from __future__ import annotations

import importlib.machinery
import logging
import re
import sys
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from genvalues.common import files
from llama_lora import trackers
from llama_lora.monitoring import TrainingMonitor
from llama_lora.runlog import StepMetrics
from llama_lora.trackers import InBackground, run_id, trackers_for
from trainer.conftest import Run


def step(number: int) -> StepMetrics:
    return StepMetrics(
        step=number, loss=2.0 / number, learning_rate=1e-4, grad_norm=0.5, tokens=10, trained_tokens=5, rows_done=number
    )


class FakeWandb(types.ModuleType):
    """Records what ``wandb.init`` gets and what the run logs; may fail or hang in any call."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.inits: list[dict[str, Any]] = []
        self.logged: list[dict[str, Any]] = []
        self.finished = 0
        self.fails_in = ""
        self.hangs_in = ""

    def enter(self, call: str) -> None:
        if self.fails_in == call:
            raise SystemExit(f"{call} failed with hf_abcdefghijkl\nand more")
        if self.hangs_in == call:
            time.sleep(60)

    def Settings(self, **settings: Any) -> dict[str, Any]:
        return settings

    def init(self, **options: Any) -> FakeWandb:
        self.enter("init")
        self.inits.append(options)
        return self

    def define_metric(self, *_: Any, **__: Any) -> None: ...

    def log(self, values: dict[str, Any]) -> None:
        self.enter("log")
        self.logged.append(values)

    def finish(self) -> None:
        self.enter("finish")
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for name in ("WANDB_RUN_ID", "WANDB_PROJECT", "WANDB_NAME", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    return fake


class FakeMlflow(types.ModuleType):
    """A store of one experiment."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.__spec__ = importlib.machinery.ModuleSpec("mlflow", None)
        self.uris: list[str] = []
        self.runs: dict[str, dict[str, Any]] = {}
        self.entities = types.SimpleNamespace(
            Metric=lambda key, value, timestamp, step: (key, value, step), Param=lambda key, value: (key, value)
        )

    def MlflowClient(self, tracking_uri: str) -> FakeMlflow:
        self.uris.append(tracking_uri)
        return self

    def get_experiment_by_name(self, name: str) -> Any:
        return types.SimpleNamespace(experiment_id="7") if self.runs else None

    def create_experiment(self, name: str) -> str:
        return "7"

    def search_runs(self, experiments: list[str], query: str, max_results: int) -> list[Any]:
        return [
            types.SimpleNamespace(info=types.SimpleNamespace(run_id=name))
            for name, run in self.runs.items()
            if f"'{run['tags']['llama-lora.id']}'" in query
        ]

    def create_run(self, experiment_id: str, tags: dict[str, str]) -> Any:
        name = f"run-{len(self.runs)}"
        self.runs[name] = {"tags": tags, "metrics": [], "params": {}, "status": ""}
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=name))

    def update_run(self, run: str, status: str) -> None:
        self.runs[run]["status"] = status

    def log_batch(self, run: str, metrics: Any = (), params: Any = ()) -> None:
        assert len(params) <= 100, "MLflow refuses more"
        assert all(re.fullmatch(r"[/\w.\- ]{1,250}", name) for name, _ in params), "and other names"
        self.runs[run]["metrics"] += metrics
        self.runs[run]["params"] |= dict(params)

    def set_terminated(self, run: str) -> None:
        self.runs[run]["status"] = "FINISHED"


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> FakeMlflow:
    fake = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    return fake


def train(run: Run, steps: range, fingerprint: str = "f1") -> None:
    for tracker in trackers_for(run.paths, run.load(), fingerprint):
        for number in steps:
            tracker.step(step(number), 100.0)
        tracker.held_out(steps[-1], 1.25)
        tracker.close()


def test_none_is_on_by_default(new_run: Callable[..., Run]) -> None:
    run = new_run()
    assert trackers_for(run.paths, run.load(), "f1") == []


def test_wandb_gets_config_and_steps_and_a_resumed_training_continues_its_run(
    new_run: Callable[..., Run], wandb: FakeWandb
) -> None:
    run = new_run()
    run.config["monitoring"] = {"wandb": True}
    train(run, range(1, 3))
    train(run, range(2, 4))
    train(run, range(1, 2), fingerprint="f2")
    first, resumed, other = wandb.inits
    assert first["id"] == resumed["id"] != other["id"] and first["resume"] == "allow"
    assert first["config"]["lora"]["r"] == 4 and first["dir"] == str(run.paths.run)
    assert wandb.logged[0]["step"] == 1 and wandb.logged[0]["train/loss"] == 2.0
    assert wandb.logged[2] == {"step": 2, "eval/loss": 1.25}
    assert wandb.finished == 3


def test_the_users_variables_are_not_overridden(
    new_run: Callable[..., Run], wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("WANDB_RUN_ID", "abc")
    run = new_run()
    run.config["monitoring"] = {"wandb": True}
    train(run, range(1, 2))
    assert (wandb.inits[0]["project"], wandb.inits[0]["id"]) == ("mine", "abc")


def test_mlflow_gets_parameters_and_metrics_and_a_resumed_training_continues_its_run(
    new_run: Callable[..., Run], mlflow: FakeMlflow
) -> None:
    run = new_run()
    run.config["monitoring"] = {"mlflow": True}
    train(run, range(1, 3))
    train(run, range(3, 4))
    train(run, range(1, 2), fingerprint="f2")
    first, other = mlflow.runs.values()
    assert [metric for metric in first["metrics"] if metric[0] == "train/loss"] == [
        ("train/loss", 2.0, 1),
        ("train/loss", 1.0, 2),
        ("train/loss", 2 / 3, 3),
    ]
    assert ("eval/loss", 1.25, 2) in first["metrics"]
    assert first["params"]["lora.r"] == "4" and first["status"] == "FINISHED"
    assert first["tags"]["llama-lora.id"] == run_id("run", "f1") != other["tags"]["llama-lora.id"]
    assert mlflow.uris[0] == "http://mlflow:5000"


def test_mlflow_gets_the_settings_of_a_source_whose_name_it_would_refuse(
    new_run: Callable[..., Run], mlflow: FakeMlflow
) -> None:
    run = new_run()
    run.config["monitoring"] = {"mlflow": True}
    run.config["dataset"]["additional"] = {"replay (50 %): old": {"source": "org/old", "weight": 0.5}}
    train(run, range(1, 3))
    [logged] = mlflow.runs.values()
    assert logged["params"]["dataset.additional.replay _50 ___ old.weight"] == "0.5"
    assert len(logged["metrics"]) == 9 and logged["status"] == "FINISHED"


@pytest.mark.parametrize("call", ["init", "log", "finish"])
def test_a_failure_is_one_warning_without_a_token(
    new_run: Callable[..., Run], wandb: FakeWandb, call: str, caplog: pytest.LogCaptureFixture
) -> None:
    wandb.fails_in = call
    run = new_run()
    run.config["monitoring"] = {"wandb": True}
    [tracker] = trackers_for(run.paths, run.load(), "f1")
    for number in range(1, 10 if call == "finish" else 3 * trackers.QUEUED):
        tracker.step(step(number), 1.0)
        if number == 1:
            time.sleep(0.1)
    tracker.close()
    [warning] = [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]
    assert warning.startswith("monitoring.wandb: ") and f"{call} failed" in warning
    assert "hf_abcdef" not in warning and "\n" not in warning


@pytest.mark.parametrize("call", ["init", "log", "finish"])
def test_one_that_hangs_costs_seconds_at_the_end_and_nothing_before(
    new_run: Callable[..., Run],
    wandb: FakeWandb,
    call: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trackers, "LAST_WORDS_SECONDS", 0.3)
    wandb.hangs_in = call
    run = new_run()
    run.config["monitoring"] = {"wandb": True}
    [tracker] = trackers_for(run.paths, run.load(), "f1")
    began = time.monotonic()
    for number in range(1, 3 * trackers.QUEUED):
        tracker.step(step(number), 1.0)
    assert time.monotonic() - began < 2
    tracker.close()
    assert time.monotonic() - began < 4
    assert len([one for one in caplog.records if one.levelno == logging.WARNING]) == 1


def test_values_arrive_in_order_from_one_thread() -> None:
    seen: list[tuple[int, int]] = []

    class Client:
        def log(self, number: int, values: Any) -> None:
            seen.append((number, threading.get_ident()))

        def close(self) -> None: ...

    tracker = InBackground("wandb", Client)
    for number in range(1, 500):
        tracker.step(step(number), 1.0)
    tracker.close()
    assert [number for number, _ in seen] == list(range(1, 500))
    assert {thread for _, thread in seen} != {threading.get_ident()} and len({thread for _, thread in seen}) == 1


def test_the_first_stage_says_that_a_library_is_missing(
    new_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "wandb" else object())
    run = new_run()
    run.config["monitoring"] = {"wandb": True}
    said = run("tokenize", status=2)
    assert "monitoring.wandb: wandb is not installed" in said and "docs/image.md" in said


def test_the_log_of_a_training_reaches_the_trackers(
    new_run: Callable[..., Run], wandb: FakeWandb, tmp_path: Path
) -> None:
    run = new_run()
    run.config["monitoring"] = {"wandb": True}
    files.write_text(run.paths.config, run.write_config().read_text())
    monitor = TrainingMonitor(run.paths, "f1")
    monitor.step(step(1), 10.0)
    monitor.close()
    assert [values["step"] for values in wandb.logged] == [1]
