"""What the chart adds to the stages' own work in a cluster: CLUSTER=current and KUBECONFIG, as for `make test-cluster`."""

from __future__ import annotations

import os
import secrets
from datetime import datetime
from pathlib import Path

from bench.measure import ROUNDS, Bench, Sides
from bench.table import Goal, Line

STAGES = ("tokenize", "compile", "train", "consolidate", "merge", "evaluate")
STEPS = 30


def measure(work: Path) -> dict[str, Sides]:
    from chart.manifests import merged
    from cluster.space import Space, connect
    from cluster.test_training import TRAINING, put_inputs

    connect()
    values = merged(TRAINING, {"training": {"maxSteps": STEPS, "evalSteps": STEPS}})
    added, unchanged = [], []
    for turn in range(ROUNDS):
        space = Space(f"bench-{secrets.token_hex(2)}")
        try:
            put_inputs(space, work / str(turn))
            release = space.release(helm=4)
            installed = release.install(values, seconds=900)
            manifests = [space.volume.manifest("llama", stage) for stage in STAGES]
            own = sum((time_of(each, "finished") - time_of(each, "started")).total_seconds() for each in manifests)
            added.append((installed.seconds - own) / len(STAGES))
            unchanged.append(release.upgrade(values).seconds / len(STAGES))
        finally:
            space.remove()
    return {"cluster-added": Sides(added), "cluster-unchanged": Sides(unchanged)}


def time_of(manifest: dict[str, str], key: str) -> datetime:
    return datetime.fromisoformat(manifest[key])


def lacks_cluster() -> str:
    given = os.environ.get("CLUSTER") == "current" and os.environ.get("KUBECONFIG")
    return "" if given else "needs a cluster: make test-cluster CLUSTER=keep, and then its CLUSTER and KUBECONFIG"


BENCHES = [
    Bench(
        [
            Line("cluster-added", "install in a cluster: time beside the stages' own work, a stage", "s", Goal(3), of_ours=True),
            Line("cluster-unchanged", "upgrade that changes nothing in a cluster, a stage", "s", Goal(5), of_ours=True),
        ],
        measure,
        lacks_cluster,
    )
]
