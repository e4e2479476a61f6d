"""A Helm command resumes where an earlier one ended, however it ended, and repeats nothing."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml

from chart.manifests import ROOT, Object, Values, merged
from cluster.space import (
    Client,
    Release,
    Space,
    asking_for_neuron,
    helm_program,
    inputs_file,
    node_labels,
    seconds_of_jobs,
    stand_in,
    uids,
)
from genvalues.cluster.objects import COMPONENT, FINGERPRINT, annotations_of
from genvalues.cluster.workloads import job_of

UNTIL_CONTINUE = "until [ -e /workspace/continue ]; do sleep 0.2; done"
OTHER_RATE: Values = {"training": {"learningRate": 1e-4}}
BRIEF: Values = {"evaluation": {"enabled": False}}
BEFORE_TRAINING, FROM_TRAINING_ON = ["tokenize", "compile"], ["train", "consolidate", "merge"]


def values(*more: Values, **scripts: str) -> Values:
    return merged(stand_in(**scripts), BRIEF, *more)


def manifests(space: Space, stages: list[str]) -> list[Object]:
    """Manifests, which include the time at which the stage ran and the digests of its output."""
    return [space.volume.manifest("llama", stage) for stage in stages]


def wait_for_trainers(space: Space, job: str) -> set[str]:
    """Wait until both pods of a PyTorchJob run; their uids."""
    space.wait(f"{job} has begun", lambda: [pod for pod in space.pods("llama", "train") if job_of(pod) == job])
    pods = space.wait_for_training("llama")
    assert {job_of(pod) for pod in pods} == {job}
    return uids(pods)


def test_upgrade_resumes_at_the_failed_stage_and_two_trainings_never_run_at_once(
    space: Space, helm: int, workload: str
) -> None:
    """A failed stage, an upgrade, an upgrade with another learning rate during training, and a rollback."""
    llama = space.release(helm)
    own: Values = {"workload": workload}
    llama.install(values(own, train="echo no room on the device; exit 2"), status=1)
    before = manifests(space, BEFORE_TRAINING)

    training = values(own, train=UNTIL_CONTINUE)
    client = llama.start_upgrade(training)
    wait_for_trainers(space, "llama-train-2")
    assert manifests(space, BEFORE_TRAINING) == before
    first = annotations_of(job(space, workload, "llama-train-2"))[FINGERPRINT]

    client.kill(signal.SIGINT)  # as described in docs/operations.md
    client = llama.start_upgrade(merged(training, OTHER_RATE))
    wait_for_trainers(space, "llama-train-3")
    assert annotations_of(job(space, workload, "llama-train-3"))[FINGERPRINT] != first
    assert manifests(space, BEFORE_TRAINING) == before

    client.kill(signal.SIGINT)
    rolled_back = llama("rollback", "llama", "2", "--timeout", "5m")
    assert rolled_back.status == 0, rolled_back.output
    assert not space.pods("llama") and not space.list(workload, f"{llama.instance},{COMPONENT}=train")
    assert llama.state == "deployed" and learning_rate(space) == 5e-5

    space.volume.run("touch continue")
    llama.upgrade(training)
    assert llama.state == "deployed"
    assert manifests(space, BEFORE_TRAINING) == before
    assert [each["fingerprint"] for each in manifests(space, ["train"])] == [first]
    assert manifests(space, ["merge"])
    assert space.history.trainings_at_once() == 1


def job(space: Space, workload: str, name: str) -> Object:
    found = space.get(workload, name)
    assert found
    return found


def learning_rate(space: Space) -> float:
    config = space.get("configmap", "llama-config")
    assert config
    return float(yaml.safe_load(config["data"]["run.yaml"])["training"]["learningRate"])


def test_the_documented_commands_resume_after_a_killed_client_and_the_training_continues(
    space: Space, helm: int, workload: str, tmp_path: Path
) -> None:
    llama = space.release(helm)
    training = values({"workload": workload}, train=UNTIL_CONTINUE)
    client = llama.start_install(training)
    trainers = wait_for_trainers(space, "llama-train-1")
    client.kill()
    assert llama.state == "pending-install"
    refused = llama.upgrade(training, status=1)
    assert "another operation" in refused.output

    (tmp_path / "helm").symlink_to(helm_program(helm))
    (tmp_path / "chart").symlink_to(ROOT / "chart")
    (tmp_path / "values.yaml").write_text(yaml.safe_dump(training))
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    going_on = Client(["bash", "-exc", f"cd {tmp_path}\n{documented(llama)}"], environment)
    space.clients.append(going_on)
    goes_on_with(space, trainers, going_on)
    assert llama.state == "deployed"


def documented(llama: Release) -> str:
    """The manual commands in docs/operations.md, preceded by the settings that they use."""
    page = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    settings = page.partition("\n## ")[0]
    by_hand = page.partition("\n## The Helm client was killed")[2].partition("By hand:")[2].partition("\n## ")[0]
    blocks = ["\n".join(re.findall(r"^ {4}(\S.*)", text, re.MULTILINE)) for text in (settings, by_hand)]
    assert "rollback" in blocks[1] and "upgrade" in blocks[1]
    assert "NS=kubeflow R=llama-lora " in blocks[0]
    return f"{blocks[0]}\n".replace("NS=kubeflow R=llama-lora ", f"NS={llama.space.name} R=llama ") + blocks[1]


def goes_on_with(space: Space, trainers: set[str], client: Client) -> None:
    """The next client's gate follows the running training, and the pipeline ends."""
    follows = re.compile("train: following (PyTorchJob|TrainJob) llama-train-1")
    space.wait("a gate that follows", lambda: follows.search(space.log("job/llama-train-gate")))
    space.volume.run("touch continue")
    ended = client.wait()
    assert ended.status == 0, ended.output
    assert uids(space.history.pods(**{COMPONENT: "train"})) == trainers
    assert manifests(space, FROM_TRAINING_ON)


def test_genvalues_install_resumes_after_it_was_killed_and_the_training_continues(space: Space, tmp_path: Path) -> None:
    llama = space.release(4)
    inputs = inputs_file(tmp_path, values(train=UNTIL_CONTINUE), mode="attached")
    install = [str(Path(sys.executable).with_name("genvalues")), "install", str(inputs), "--namespace", space.name]
    client = Client(install, dict(os.environ))
    space.clients.append(client)
    trainers = wait_for_trainers(space, "llama-train-1")
    client.kill()
    assert llama.state == "pending-install"

    again = Client(install, dict(os.environ))
    space.clients.append(again)
    goes_on_with(space, trainers, again)
    assert llama.state == "deployed"


@pytest.mark.with_helm(3)
def test_two_installs_at_once_run_one_training_and_one_is_refused(space: Space, helm: int, workload: str) -> None:
    llama = space.release(helm)
    training = values({"workload": workload}, train=UNTIL_CONTINUE)
    clients = [llama.start_install(training) for _ in range(2)]
    space.wait("the end of one of two installs", lambda: any(not client.is_alive() for client in clients))
    [refused] = [client for client in clients if not client.is_alive()]
    [other] = [client for client in clients if client is not refused]
    ended = refused.wait()
    assert ended.status != 0
    assert re.search("exists|re-use|in use|another operation", ended.output), ended.output
    wait_for_trainers(space, "llama-train-1")
    space.volume.run("touch continue")
    ended = other.wait()
    assert ended.status == 0, ended.output
    assert llama.state == "deployed" and manifests(space, FROM_TRAINING_ON)
    assert space.history.trainings_at_once() == 1


def test_an_unchanged_upgrade_requests_no_neuron_and_a_new_learning_rate_only_trains(space: Space) -> None:
    """The unchanged upgrade works without a node for train. A new learning rate affects only train and later stages."""
    llama = space.release(4)
    own_label = f"tests.llama-lora/{space.name}"
    on_own_nodes = {"stages": {stage: {"nodeSelector": {own_label: "yes"}} for stage in ("compile", "train")}}
    with node_labels({own_label: "yes"}):
        llama.install(values(on_own_nodes))
    before, after = manifests(space, BEFORE_TRAINING), manifests(space, FROM_TRAINING_ON)
    assert all(own_label in pod["spec"]["nodeSelector"] for pod in space.history.pods(**{COMPONENT: "train"}))

    began = time.monotonic()
    llama.upgrade(values(on_own_nodes))
    assert manifests(space, BEFORE_TRAINING) + manifests(space, FROM_TRAINING_ON) == before + after
    assert asking_for_neuron(space, began) == set()
    stages = seconds_of_jobs(space, began).keys()
    assert stages == {"preflight", "tokenize", "compile-gate", "train-gate", "consolidate", "merge"}

    began = time.monotonic()
    llama.upgrade(values(OTHER_RATE))
    assert asking_for_neuron(space, began) == {"train"}
    assert manifests(space, BEFORE_TRAINING) == before
    now = manifests(space, FROM_TRAINING_ON)
    assert not {each["fingerprint"] for each in after} & {each["fingerprint"] for each in now}
