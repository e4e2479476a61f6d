"""A run at its cost limit or stalled is stopped: it has saved, its nodes are free, and the reason is reported."""

from __future__ import annotations

import json
import math
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chart.manifests import Object, Values, merged
from cluster.space import TRAINER_IMAGE, Client, Ended, Release, Space, image, stand_in
from cluster.test_training import TRAINING, resumed
from genvalues.cluster.cost_tracker import RAISE_MAX_COST
from genvalues.cluster.objects import COMPONENT, annotations_of, is_over, name_of
from genvalues.cluster.workloads import is_suspended
from trainer.conftest import make_model, write_rows

BRIEF: Values = {"cleanup": {"enabled": False}, "evaluation": {"enabled": False}}
PRICE = 3600.0  # dollars an hour: a dollar for each second of a pod
SAVING = 120  # seconds that the gate reserves for each pod to save and exit: its grace period
UNLIMITED = {"maxCost": 1e6, "pricePerNodeHour": PRICE}


def guarded(values: Values, **guards: Any) -> Values:
    return merged(values, BRIEF, {"guards": {"stallTimeout": "", **guards}})


def gate_log(space: Space) -> list[str]:
    return [line.strip() for line in space.log("job/llama-train-gate", "--tail=-1").splitlines() if line.strip()]


def reason_of(space: Space) -> str:
    """Why the stage failed, from the gate's log."""
    (reason,) = [line for line in gate_log(space) if line.startswith("train failed: ")]
    return reason


def fails(release: Release, ended: Ended) -> None:
    assert ended.status == 1, ended.output
    assert release.state == "failed"
    space = release.space
    assert not space.pods("llama", "train"), "a node is still held"
    assert all(is_suspended(job) for job in trains(space)), "no job may request nodes"


def trains(space: Space) -> list[Object]:
    jobs = space.list("pytorchjobs") + space.list("trainjobs")
    return [job for job in jobs if job["metadata"]["name"].startswith("llama-train-")]


def costs(space: Space) -> list[dict[str, Any]]:
    return list(json.loads(space.volume.read("runs/llama/costs.json"))["pods"].values())


def spent(space: Space) -> float:
    return sum(pod["until"] - pod["since"] for pod in costs(space))


def reach_the_limit(release: Release, client: Client, values: Callable[..., Values], saving: int = SAVING) -> int:
    """End the client during training, and upgrade to a limit that it has reached, with what saving may cost."""
    client.kill(signal.SIGINT)
    limit = math.floor(spent(release.space)) + 2 * saving
    fails(release, release.upgrade(values(maxCost=limit, pricePerNodeHour=PRICE), status=None))
    return limit


def test_a_run_at_its_cost_limit_saves_and_an_upgrade_requests_no_node_until_the_limit_is_raised(
    space: Space,
) -> None:
    """A TrainJob; the real training is a PyTorchJob."""
    llama = space.release(4)
    saving = 300  # the most that a stage may have, so that a slow upgrade ends before the limit itself is reached
    at_stop = {"STAND_IN_AT_STOP": "sleep 3; echo > /workspace/saved-$HOSTNAME"}
    train: Values = {"stages": {"train": {"terminationGracePeriodSeconds": saving, "extraEnv": at_stop}}}

    def values(**guards: Any) -> Values:
        return guarded(merged(stand_in(train="echo training; sleep 600"), train, {"workload": "trainjob"}), **guards)

    client = llama.start_install(values(**UNLIMITED))
    space.wait_for_training("llama")
    cost = space.wait("the cost, as an annotation of the job", lambda: annotation(space, "cost"))
    assert (cost["maxCost"], cost["pricePerNodeHour"]) == (1e6, PRICE) and cost["cost"] > 0
    limit = reach_the_limit(llama, client, values, saving)
    assert spent(space) < limit, "the limit includes the cost of saving"
    reason = reason_of(space)
    reached = rf"guards\.maxCost of \${limit:,} is reached"
    assert re.match(rf"train failed: stopped: {reached} \(cost so far \$[0-9.,]+: ", reason)
    assert RAISE_MAX_COST in reason and "ended with status" not in reason
    saved = space.volume.run("ls /workspace").split()
    hosts = {name.removeprefix("saved-") for name in saved if name.startswith("saved-")}
    assert hosts == {"llama-train-1-node-0-0", "llama-train-1-node-0-1"}
    assert {pod["stage"] for pod in costs(space)} == {"compile", "train"}

    pods = space.history.pods(**{COMPONENT: "train"})
    fails(llama, llama.upgrade(values(maxCost=limit, pricePerNodeHour=PRICE), status=None))
    assert re.search(f"not started: {reached}", reason_of(space))
    assert len(space.history.pods(**{COMPONENT: "train"})) == len(pods), "no pod was created beyond the limit"


def annotation(space: Space, name: str) -> dict[str, Any]:
    jobs = trains(space)
    found: dict[str, Any] = json.loads(annotations_of(jobs[0]).get(f"llama-lora/{name}", "{}")) if jobs else {}
    return found


def test_a_training_that_stands_still_is_ended_and_says_since_which_step(space: Space) -> None:
    """Its pods run, and take no step after the third. Compile, which takes none at all, is left alone."""
    llama = space.release(4)
    progress = '{"stage": "train", "step": %d, "totalSteps": 9, "savedStep": 2, "updated": "%s"}'
    train = (
        'case "$HOSTNAME" in *-worker-0) for step in 1 2 3; do sleep 5; '
        f"printf '{progress}' $step \"$(date -u +%Y-%m-%dT%H:%M:%S+00:00)\" > /workspace/next; "
        "mv /workspace/next /workspace/runs/llama/progress.json; done;; esac; sleep 600"
    )
    values = guarded(stand_in(compile="sleep 25", train=train), stallTimeout="15s")
    fails(llama, llama.install(values, status=None))
    reason = reason_of(space)
    assert re.match(r"train failed: stopped: no step for (1[5-9]|2\d) s .*\(guards\.stallTimeout\); ", reason)
    assert "3 of 9; the checkpoint at step 2 is kept" in reason
    assert "/workspace/runs/llama/stacks" in reason


@pytest.fixture
def real(space: Space, tmp_path: Path) -> Space:
    """A space with a small model and its rows on the volume."""
    model = make_model(tmp_path / "model", initializer_range=0.1)
    space.volume.copy_in(model, write_rows(tmp_path / "rows.jsonl", 200))
    return space


def training(**guards: Any) -> Values:
    """Long enough to be stopped midway, and without a regular checkpoint."""
    longer = {"training": {"maxSteps": 100_000, "saveSteps": 100_000, "learningRate": 1e-4}}
    return guarded(merged(TRAINING, image(TRAINER_IMAGE), longer), **guards)


def step_of(space: Space) -> int:
    """The last step of the run, which another process may be writing at the moment."""
    return int(json.loads(space.volume.run("cat runs/llama/progress.json || echo {}")).get("step") or 0)


@pytest.mark.slow
def test_a_real_training_saves_at_its_limit_resumes_when_it_is_raised_and_writes_its_stack_traces_when_it_hangs(
    real: Space,
) -> None:
    """It hangs because one worker is stopped by SIGSTOP, as if its device had failed: the other waits for it in a
    collective."""
    llama = real.release(3)
    client = llama.start_install(training(**UNLIMITED))
    real.wait("a step", lambda: step_of(real), interval=2.0)
    first_cost = spent(real)
    reach_the_limit(llama, client, training)
    reason = reason_of(real)
    kept = re.search(r"the checkpoint at step ([0-9]+) is kept", reason)
    assert kept, reason
    step = int(kept[1])
    assert real.volume.run("ls -d runs/llama/checkpoints/*/step-*").split()[-1].endswith(f"step-{step:06d}")
    assert not real.volume.exists("runs/llama/stages/train.json")

    client = llama.start_upgrade(training(**UNLIMITED, stallTimeout="90s"))  # longer than its start
    workers = real.wait_for_training("llama")
    real.wait("a step after those saved", lambda: step_of(real) > step, interval=2.0)
    assert f"step-{step:06d}" in real.log(name_of(workers[0]))
    assert resumed(real, "llama")
    assert annotation(real, "cost")["cost"] > first_cost, "the cost of the first job counts"

    [name] = [name for pod in workers if (name := name_of(pod)).endswith("-1")]
    stop = (
        "for folder in /proc/[0-9]*; do "
        "grep -aq [l]lama_lora.backends.worker $folder/cmdline 2>/dev/null && kill -STOP ${folder#/proc/}; done; true"
    )
    real.kubectl("exec", name, "--", "sh", "-c", stop)
    fails(llama, client.wait())
    assert re.search(r"no step for [12] min \d+ s", reason_of(real))
    waiting = real.volume.read("runs/llama/stacks/train-rank-0.txt")
    assert "all_reduce" in waiting and "loop.py" in waiting
    assert all(is_over(pod) for pod in real.list("pods", f"{COMPONENT}=train"))
