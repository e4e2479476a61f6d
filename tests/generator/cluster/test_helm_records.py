"""Helm's records of the inner release, as Helm itself reads them."""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

import pytest

from generator.cluster.fake_api import NAMESPACE, FakeApi
from generator.cluster.objects import helm_record
from genvalues.cluster.api import Api
from genvalues.cluster.helm_records import INNER_ENVIRONMENT, OF_INNER_RELEASE, move_to_config_maps
from genvalues.cluster.recovery import take_over
from helm_binaries import helm_binary


def history(helm: int) -> list[tuple[int, str, str]]:
    """Revision, status and description of each record."""
    done = subprocess.run(
        [str(helm_binary(helm)), "history", "demo-run", "--namespace", NAMESPACE, "--output", "json"],
        env={**os.environ, **INNER_ENVIRONMENT},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return [(row["revision"], row["status"], row["description"]) for row in rows]


@pytest.mark.parametrize("helm", [3, 4])
def test_helm_reads_the_records_that_were_moved_and_marked_as_failed(fake: FakeApi, api: Api, helm: int) -> None:
    fake.version = {"major": "1", "minor": "34", "gitVersion": "v1.34.0"}
    for revision, status in ((11, "superseded"), (12, "pending-upgrade")):
        fake.add("secrets", helm_record(status, revision=revision, release="demo-run"))
    move_to_config_maps(api, "demo-run")
    assert history(helm) == [(11, "superseded", "Preparing"), (12, "pending-upgrade", "Preparing")]
    take_over(api, "demo-run", 0.02, OF_INNER_RELEASE)
    assert history(helm) == [(11, "superseded", "Preparing"), (12, "failed", "the Helm client was killed")]
