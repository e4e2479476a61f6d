from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from generator.cluster.fake_api import FakeApi, serving
from generator.ops.release.fake_helm import FakeHelm
from genvalues.common import log
from genvalues.ops import follow, install, logs, status


@pytest.fixture
def helm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHelm:
    """A stand-in for Helm in the folder of the Python program, where find_helm looks first."""
    monkeypatch.setattr("sys.executable", str(tmp_path / "helm-bin" / "python"))
    return FakeHelm(tmp_path / "helm-bin")


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeApi]:
    with serving(tmp_path) as (server, kubeconfig):
        monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
        yield server


@pytest.fixture(autouse=True)
def logging_to_stderr() -> Iterator[None]:
    """As cli.main configures it, also for tests that call no command."""
    logger = logging.getLogger("genvalues")
    before = (logger.handlers[:], logger.level, logger.propagate)
    log.configure()
    yield
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KUBECONFIG", "KUBERNETES_SERVICE_HOST", "HELM_NAMESPACE", "HELM_KUBECONTEXT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for module, name, seconds in [
        (install, "INTERVAL", 0.02),
        (install, "FIRST_ANSWER_SECONDS", 0.1),
        (status, "FIRST_ANSWER_SECONDS", 0.1),
        (follow, "INTERVAL", 0.02),
        (logs, "INTERVAL", 0.02),
        (logs, "STAGE_SECONDS", 0.05),
    ]:
        monkeypatch.setattr(module, name, seconds)
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
