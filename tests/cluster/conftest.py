from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler.loadscope import LoadScopeScheduling

from cluster.space import HELMS, Space, connect

LONGEST = ["test_a_job_waits_for_its_quota"]  # beginnings of names
# Files whose tests run in one process, one after another: they share a training, Kueue's settings, or an operator.
TOGETHER = {"test_kueue", "test_training", "test_operators"}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "node: wants the node for itself (drains it, restarts its API server ...)")
    config.addinivalue_line("markers", "with_helm(*majors): with these versions of Helm without --all, else with 4")
    config.addinivalue_line("markers", "operator: replaces or stops the operator of PyTorchJobs or of TrainJobs")


class Scheduling(LoadScopeScheduling):
    """Each process takes the next test, or all tests of a file of ``TOGETHER``. (Pytest 9.2 ignores xdist_group.)"""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return file if Path(file).stem in TOGETHER else nodeid


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling:
    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the tests that take longest, so that none is left alone at the end."""
    names = [*LONGEST, ""]
    items.sort(key=lambda item: next(place for place, name in enumerate(names) if item.name.startswith(name)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if report.when != "teardown" and report.failed:  # while the namespaces still exist
        for space in Space.living:
            try:
                report.sections.append((f"namespace {space.name}", space.describe()))
            except Exception as error:  # the API server is stopped
                report.sections.append((f"namespace {space.name}", f"cannot be shown: {error}"))
    return report


@pytest.fixture(scope="session", autouse=True)
def cluster() -> None:
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # a History retries while the server is stopped
    connect()


@pytest.fixture
def new_space(request: pytest.FixtureRequest) -> Iterator[Callable[..., Space]]:
    """Create namespaces, and delete them after the test."""
    spaces: list[Space] = []

    def make(enforce: str = "restricted") -> Space:
        words = re.sub(r"[^a-z0-9]+", "-", request.node.name.removeprefix("test_").lower())[:40].strip("-")
        spaces.append(Space(f"{words}-{secrets.token_hex(2)}", enforce))
        return spaces[-1]

    yield make
    for space in spaces:
        space.remove()


@pytest.fixture
def space(new_space: Callable[..., Space]) -> Space:
    """A namespace with a volume and the claim `work`."""
    made = new_space()
    made.volume.create()
    return made


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "helm" in metafunc.fixturenames:
        mark = metafunc.definition.get_closest_marker("with_helm")
        chosen = mark.args if mark else (4,)
        params = [pytest.param(major, marks=() if major in chosen else pytest.mark.repeat) for major in HELMS]
        metafunc.parametrize("helm", params, ids=lambda major: f"helm{major}", indirect=True)


@pytest.fixture
def helm(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def workload(helm: int) -> str:
    """The API of compile and train: a test with both versions of Helm has both APIs, too."""
    return {3: "pytorchjob", 4: "trainjob"}[helm]
