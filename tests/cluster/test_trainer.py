"""An older Kubeflow Trainer, with the JobSet that it requires. Its tests change the operator of TrainJobs only."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cluster.local import operators
from cluster.space import Space
from cluster.test_operators import runs_the_pipeline_and_reports_failures

pytestmark = [pytest.mark.operator, pytest.mark.repeat]


@pytest.fixture
def older_trainer() -> Iterator[None]:
    try:
        operators.install_trainer("2.0")
        yield
    finally:
        operators.install_trainer("2.2")


def test_an_older_trainer_runs_the_pipeline_and_failures_are_reported(space: Space, older_trainer: None) -> None:
    runs_the_pipeline_and_reports_failures(space, "trainjob")
