from __future__ import annotations

import json
import logging
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from generator.cluster.fake_api import NAMESPACE, FakeApi, serving
from generator.cluster.objects import RUN
from generator.cluster.waiting import STARTED, until
from genvalues.cluster.api import Api, connect
from genvalues.cluster.config import ClusterConfig


@pytest.fixture(autouse=True)
def logger() -> Iterator[None]:
    """genvalues logs at level info; a test's handlers are removed after it."""
    logger = logging.getLogger("genvalues")
    before = (logger.handlers[:], logger.level, logger.propagate)
    logger.setLevel(logging.INFO)
    yield
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.fixture(autouse=True)
def _no_thread_is_left(logger: None) -> Iterator[None]:
    """It would log into the output of a later test, or ask a server that is gone until the end of the run."""
    before = set(threading.enumerate())
    yield
    left, STARTED[:] = [future for future in STARTED if not future.done()], []
    assert not left
    until(lambda: set(threading.enumerate()) <= before, f"the threads of the test to end: {threading.enumerate()}")


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeApi]:
    with serving(tmp_path) as (server, kubeconfig):
        monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
        yield server


@pytest.fixture
def api(fake: FakeApi) -> Api:
    return connect(NAMESPACE, patience=5.0, interval=0.02)


@pytest.fixture
def values() -> dict[str, Any]:
    """cluster.yaml as the chart renders it for one trn1.32xlarge."""
    return {
        "release": "demo",
        "namespace": NAMESPACE,
        "fullname": "demo-llama-lora",
        "revision": 3,
        "run": RUN,
        "chart": {"version": "0.1.0", "appVersion": "0.1.0"},
        "claim": {"name": "demo-workspace", "managed": True},
        "storagePrepare": True,
        "secret": {"name": "hf-token", "key": "token"},
        "job": {
            "nodes": 2,
            "instance": "ml.trn1.32xlarge",
            "devices": {"aws.amazon.com/neuron": 16, "vpc.amazonaws.com/efa": 8},
            "queueName": "",
        },
        "clusterScopedReads": True,
        "train": {"unschedulableTimeoutSeconds": 1800},
    }


@pytest.fixture
def config(values: dict[str, Any]) -> ClusterConfig:
    return ClusterConfig.model_validate(values)


@pytest.fixture
def config_file(values: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_text(json.dumps(values))
    return path


@pytest.fixture
def chart(tmp_path: Path) -> Path:
    """The chart in the image."""
    folder = tmp_path / "chart"
    folder.mkdir()
    (folder / "Chart.yaml").write_text("name: llama-lora\nversion: 0.1.0\nappVersion: 0.1.0\n")
    return folder


class Trainer:
    """Replaces ``llama-lora fingerprint`` by a script that prints the stage's file."""

    def __init__(self, folder: Path) -> None:
        self.answer = folder / "train.json"
        self.progress = folder / "progress.json"
        self.manifest = folder / "manifest.json"
        self.status = folder / "status"
        self.says("f1", up_to_date=False)
        self.ends_with(0)
        command = folder / "llama-lora"
        command.write_text(f'#!/bin/sh\necho "$@" >> {folder}/asked\ncat {folder}/$2.json\nexit $(cat {self.status})\n')
        command.chmod(command.stat().st_mode | stat.S_IXUSR)

    def says(self, fingerprint: str | None, *, up_to_date: bool, of: str = "train") -> None:
        answer = {"stage": of, "fingerprint": fingerprint, "upToDate": up_to_date, "manifest": str(self.manifest)}
        partial = self.answer.with_name("partial")
        partial.write_text(json.dumps({**answer, "progress": str(self.progress)}))
        partial.replace(self.answer.with_name(f"{of}.json"))

    def ends_with(self, status: int) -> None:
        self.status.write_text(str(status))


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setattr("sys.executable", str(folder / "python"))  # the command next to it takes precedence
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return Trainer(folder)
