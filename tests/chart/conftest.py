from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from chart import manifests
from chart.manifests import VALUES_FILES, Object, config, render


@pytest.fixture(scope="session", autouse=True)
def shared_renderings(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Renderings are for all processes of this session."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        manifests.SHARED = tmp_path_factory.getbasetemp().parent / "renderings"
        manifests.SHARED.mkdir(exist_ok=True)


@pytest.fixture(params=[4, pytest.param(3, marks=pytest.mark.repeat)], ids=lambda major: f"helm{major}")
def helm(request: pytest.FixtureRequest) -> int:
    """Helm 4 in `make test`, and Helm 3 in `make test-all`.

    What `make test` shows of Helm 3: it renders every values file as Helm 4 does (test_packaging.py), and refuses
    values with the same words (test_refusals.py).
    """
    return int(request.param)


def is_detached(path: Path) -> bool:
    return bool(yaml.safe_load(path.read_text()).get("pipeline", {}).get("mode") == "detached")


# A detached release has a runner and no stages, so its inner release is tested too.
RENDERINGS = {path.name.removesuffix("-values.yaml").removesuffix(".yaml"): (path, False) for path in VALUES_FILES}
RENDERINGS |= {f"{name}-inner": (path, True) for name, (path, _) in RENDERINGS.items() if is_detached(path)}


@pytest.fixture(params=RENDERINGS.values(), ids=RENDERINGS)
def values_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, inner = request.param
    if not inner:
        return Path(path)
    file = tmp_path_factory.mktemp("inner") / path.name
    file.write_text(yaml.safe_dump(config(render(path), "values.yaml")))
    return file


@pytest.fixture
def objects(values_file: Path, helm: int) -> list[Object]:
    """The objects of one values file, rendered with one Helm."""
    return render(values_file, helm=helm)
