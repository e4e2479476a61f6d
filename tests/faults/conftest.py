from __future__ import annotations

from collections.abc import Iterator

import pytest

from faults.table import World


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    yield World(tmp_path_factory.mktemp("faults"))
