from __future__ import annotations

from pathlib import Path

import pytest

from chart.manifests import HELMS, VALUES_FILES, Object, render


@pytest.fixture(params=HELMS, ids=lambda major: f"helm{major}")
def helm(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(params=VALUES_FILES, ids=lambda path: path.name.removesuffix("-values.yaml").removesuffix(".yaml"))
def values_file(request: pytest.FixtureRequest) -> Path:
    return Path(request.param)


@pytest.fixture
def objects(values_file: Path, helm: int) -> list[Object]:
    """Everything that one values file renders with one Helm."""
    return render(values_file, helm=helm)
