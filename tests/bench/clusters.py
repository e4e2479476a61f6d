"""What the chart adds to the stages' own work in the cluster of $KUBECONFIG, with CLUSTER=current."""

from __future__ import annotations

import os
import secrets
from datetime import datetime
from pathlib import Path

from bench.measure import ROUNDS, Bench
from bench.table import Goal, Line, Result

STAGES = ("tokenize", "compile", "train", "consolidate", "merge", "evaluate")


def measure(work: Path) -> dict[str, Result]:
    from chart.manifests import merged
    from cluster.space import Space, connect
    from cluster.test_training import TRAINING, put_inputs

    connect()
    values = merged(TRAINING, {"training": {"maxSteps": 30, "evalSteps": 30}})
    added, unchanged = [], []
    for turn in range(ROUNDS):
        space = Space(f"bench-{secrets.token_hex(2)}")
        try:
            put_inputs(space, work / str(turn))
            release = space.release(helm=4)
            installed = release.install(values, seconds=900)
            own = sum(seconds_of(space.volume.manifest("llama", stage)) for stage in STAGES)
            added.append((installed.seconds - own) / len(STAGES))
            unchanged.append(release.upgrade(values).seconds / len(STAGES))
        finally:
            space.remove()
    return {"cluster-added": Result(added), "cluster-unchanged": Result(unchanged)}


def seconds_of(manifest: dict[str, str]) -> float:
    return (datetime.fromisoformat(manifest["finished"]) - datetime.fromisoformat(manifest["started"])).total_seconds()


GIVEN = os.environ.get("CLUSTER") == "current" and os.environ.get("KUBECONFIG")
BENCHES = [
    Bench(
        [
            Line("cluster-added", "install in a cluster: time beside a stage's work", "s", Goal(3), of_ours=True),
            Line("cluster-unchanged", "unchanged upgrade in a cluster: time a stage", "s", Goal(5), of_ours=True),
        ],
        measure,
        "" if GIVEN else "needs a cluster: make test-cluster CLUSTER=keep prints the KUBECONFIG and CLUSTER to export",
    )
]
