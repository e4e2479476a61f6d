"""Which of several failed workers is reported."""

from __future__ import annotations

from typing import Any

import pytest

from genvalues.cluster.objects import ContainerExit
from genvalues.cluster.workers import Workers


@pytest.mark.parametrize(
    ("codes", "cause"),
    [
        ((1, 1), "worker-0"),
        ((143, 1), "worker-1"),
        ((1, 2), "worker-1"),
        ((1, 75), "worker-1"),
        ((75, 2), "worker-1"),
        ((0, 143), "worker-1"),
    ],
)
def test_the_first_failure_is_the_one_that_caused_the_others(codes: tuple[int, ...], cause: str) -> None:
    """A node whose volume is full (75) pauses before it ends; the others lose the connection to it before."""
    api: Any = None
    workers = Workers(api, "job", interval=1.0)
    for number, code in enumerate(codes):
        workers.ends.append(ContainerExit(f"worker-{number}", code, "Error", f"2026-11-29T10:00:0{number}Z"))
    failure = workers.first_failure()
    assert failure is not None and failure.pod == cause
