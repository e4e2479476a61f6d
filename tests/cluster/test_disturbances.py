"""Lost workers, restarted operators, a preemption and a drained node do not change the result of a training.

A PyTorchJob and a TrainJob train the same run side by side, and are disturbed together.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from chart.manifests import Values, merged
from cluster.local.operators import NAMESPACES
from cluster.space import PATIENCE, Client, Release, Space, asking_for_neuron, node_of, run, skipping, uids
from cluster.test_kueue import Queues
from cluster.test_training import TRAINING, UNDISTURBED, adapter, keep_adapter, put_inputs, resumed

pytestmark = pytest.mark.node
WORKLOADS = {"pytorchjob": 3, "trainjob": 4}  # with its version of Helm
QUEUED: Values = {"kueue": {"queueName": "research"}}


class Disturbed(NamedTuple):
    """Releases whose trainings have been disturbed; their runs have their names."""

    space: Space
    releases: dict[str, Release]


def values(workload: str) -> Values:
    return merged(TRAINING, QUEUED, {"workload": workload})


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disturbed]:
    space = Space(f"disturbed-{secrets.token_hex(2)}")
    queues = Queues(space, of_a_worker=4)  # for both trainings
    try:
        queues.local_queue("research")
        put_inputs(space, tmp_path_factory.mktemp("volume"))
        if not UNDISTURBED.exists():
            space.release().install(TRAINING, seconds=2 * PATIENCE)
            keep_adapter(space)
        releases = {workload: space.release(helm, workload) for workload, helm in WORKLOADS.items()}
        clients = {name: release.start_install(values(name)) for name, release in releases.items()}
        lose_workers_and_operators(space, clients)
        preempt(queues, clients)
        drain_the_node(space, clients)
        for client in clients.values():
            ended = client.wait(2 * PATIENCE)
            assert ended.status == 0, ended.output
        yield Disturbed(space, releases)
    finally:
        space.remove()
        queues.remove()


def lose_workers_and_operators(space: Space, clients: dict[str, Client]) -> None:
    before = {name: wait_for_a_checkpoint(space, name, 1) for name in clients}
    for name in clients:
        space.kubectl("delete", "pod", sorted(pods(space, name))[1], "--grace-period=5", "--wait=false")
    for namespace in NAMESPACES:
        run(["kubectl", "-n", namespace, "delete", "pods", "--all", "--wait=false"])
    for name, lost in before.items():
        space.wait(f"a worker of {name} in the place of the lost one", lambda n=name, o=lost: workers(space, n) - o)


def preempt(queues: Queues, clients: dict[str, Client]) -> None:
    """Another job takes the whole quota for a moment."""
    before = {name: wait_for_a_checkpoint(queues.space, name, 2) for name in clients}
    queues.occupy("research", 100)
    for name, evicted in before.items():
        queues.space.wait(f"no worker of {name}", lambda n=name, o=evicted: not o & workers(queues.space, n))
    queues.leave()


def drain_the_node(space: Space, clients: dict[str, Client]) -> None:
    """It is the only node: workers, gates and operators are evicted, and wait until it is schedulable again.

    Without the webhooks of JobSet, the evicted pods of the TrainJob stay as objects: kubectl would wait for them.
    """
    before = {name: wait_for_a_checkpoint(space, name, 3) for name in clients}
    node = node_of(space.pods("pytorchjob", "train")[0])
    try:
        run(["kubectl", "drain", node, "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=15s"])
        for name, evicted in before.items():
            space.wait(f"no worker of {name}", lambda n=name, o=evicted: not o & workers(space, n))
        assert all(client.is_alive() for client in clients.values())
    finally:
        run(["kubectl", "uncordon", node])


def pods(space: Space, release: str) -> list[str]:
    return [pod["metadata"]["name"] for pod in space.pods(release, "train")]


def workers(space: Space, release: str) -> set[str]:
    return uids(space.pods(release, "train"))


def wait_for_a_checkpoint(space: Space, name: str, session: int) -> set[str]:
    """Wait until the training's process of this session (the first one, one that resumed) has saved; its workers."""
    pods = space.wait_for_training(name)
    folder = f"runs/{name}/checkpoints/*"
    saved = f"[ $(ls {folder}/tensorboard 2>/dev/null | wc -l) -ge {session} ] && ls -d {folder}/step-* | tail -1"

    def last() -> str:
        return space.volume.run(f"{saved} || true").strip()

    first = space.wait(f"a checkpoint of {name}", last, interval=0.2)
    if session > 1:
        space.wait(f"another checkpoint of {name}", lambda: last() not in ("", first), interval=0.2)
    assert not space.volume.exists(f"runs/{name}/stages/train.json"), "too fast to be disturbed: raise STEPS"
    return uids(pods)


@pytest.mark.parametrize("workload", WORKLOADS)
def test_lost_workers_restarted_operators_a_preemption_and_a_drained_node_change_nothing_in_the_result(
    disturbed: Disturbed, workload: str
) -> None:
    assert resumed(disturbed.space, workload)
    assert adapter(disturbed.space, workload) == UNDISTURBED.read_text()


@pytest.mark.parametrize("workload", [pytest.param("pytorchjob", marks=pytest.mark.repeat), "trainjob"])
def test_an_unchanged_upgrade_skips_every_stage_in_seconds_and_requests_no_neuron(
    disturbed: Disturbed, workload: str
) -> None:
    """With the real image, whose commands must not import torch to skip a stage."""
    began = time.monotonic()
    took = skipping(disturbed.space, lambda: disturbed.releases[workload].upgrade(values(workload)))
    assert asking_for_neuron(disturbed.space, began) == set()
    assert len(took) == 7
    assert {stage: seconds for stage, seconds in took.items() if seconds > 10} == {}  # 2 to 6 measured
