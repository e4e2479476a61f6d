"""Uninstall stops what runs and waits for it, whether or not a Helm client is alive; the volume is kept."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from chart.manifests import ROOT, Values, merged
from cluster.space import CLAIM, PATIENCE, STORAGE_CLASS, Release, Space, files_pod, helm_program, image, run, stand_in
from genvalues.cluster.objects import COMPONENT, INSTANCE, labels_of, name_of, why_not_started

UNTIL_CONTINUE = "while [ ! -e /workspace/continue ]; do sleep 0.5; done"
BRIEF: Values = {"evaluation": {"enabled": False}}
DETACHED: Values = {"pipeline": {"mode": "detached"}}
NOT_THERE: Values = image("localhost/none:1")
EVERYTHING = "pods,jobs,pytorchjobs,trainjobs,trainingruntimes,configmaps,secrets,serviceaccounts,roles,rolebindings"


def values(*more: Values, **scripts: str) -> Values:
    return merged(stand_in(**scripts), BRIEF, *more)


def left_of(space: Space) -> list[str]:
    """Objects left of the release, its inner one and Helm's records, including finished pods; without the claim."""
    found = []
    for selector in (f"{INSTANCE} in (llama,llama-run)", "owner=helm"):
        found += space.kubectl("get", EVERYTHING, "-l", selector, "-o", "name").split()
    everywhere = run(["kubectl", "get", "clusterroles,clusterrolebindings", "-o", "name"]).output.split()
    return found + [name for name in everywhere if f"/{space.name}." in name]


def nothing_is_left(space: Space) -> None:
    """Wait, because cleanup's own pod is deleted shortly after its Job, which Helm deletes last."""
    space.wait("nothing left of the release", lambda: not left_of(space))


def stages_after(space: Space, moment: float) -> set[str]:
    """Stages, without the cleanup, that got a pod or a job after ``moment``."""
    made = [labels_of(one.item) for one in space.history.made_since(moment)]
    return {labels[COMPONENT] for labels in made if COMPONENT in labels} - {"cleanup"}


def test_uninstall_during_training_stops_everything_and_a_new_install_resumes(
    space: Space, helm: int, workload: str
) -> None:
    """First with a live client that waits for the training, then with a killed one."""
    llama = space.release(helm)
    training = values({"workload": workload}, train=UNTIL_CONTINUE)
    alive = llama.start_install(training)
    space.wait_for_training("llama")
    compiled = space.volume.manifest("llama", "compile")
    began = uninstall_leaves_only_the_volume(llama)
    assert alive.wait().status != 0
    nothing_is_left(space)
    assert stages_after(space, began) == set(), "the client started no stage before it noticed"

    killed = llama.start_install(training)
    space.wait_for_training("llama")
    assert space.volume.manifest("llama", "compile") == compiled  # includes the time at which it ran
    killed.kill()
    uninstall_leaves_only_the_volume(llama)


def uninstall_leaves_only_the_volume(llama: Release) -> float:
    """Uninstall and check; returns when it began."""
    space, began = llama.space, time.monotonic()
    llama.uninstall()
    nothing_is_left(space)
    assert stages_after(space, began) == set()
    claimed = space.get("pvc", CLAIM)
    assert claimed and claimed["status"]["phase"] == "Bound"
    assert space.volume.exists("runs/llama/stages/compile.json")
    return began


def test_uninstall_of_a_detached_release_removes_the_inner_one_and_lets_the_workers_save(space: Space) -> None:
    """Saving takes 35 s, longer than the default grace period of 30 s."""
    save = {"STAND_IN_AT_STOP": "sleep 35; touch /workspace/saved-by-$HOSTNAME"}
    llama = space.release(3)
    llama.install(values(DETACHED, {"stages": {"train": {"extraEnv": save}}}, train=UNTIL_CONTINUE))
    trainers = space.wait_for_training("llama-run")
    uninstall_leaves_only_the_volume(llama)
    for pod in trainers:
        assert space.volume.exists(f"saved-by-{name_of(pod)}")


def test_the_charts_claim_is_kept_by_uninstall_and_used_again(
    new_space: Callable[..., Space],
) -> None:
    """Uninstall while a stage that is a Job runs, and again after the pipeline and `helm test`."""
    space = new_space()
    own = {
        "storage": {
            "enabled": True,
            "existingClaim": "",
            "kind": "generic",
            "storageClass": STORAGE_CLASS,
            "size": "1Gi",
        }
    }
    llama = space.release(4)
    client = llama.start_install(values(own, tokenize="echo kept > /workspace/mine; sleep 600"))
    space.wait("tokenize", lambda: [p for p in space.pods("llama", "tokenize") if p["status"]["phase"] == "Running"])
    began = time.monotonic()
    llama.uninstall()
    nothing_is_left(space)
    assert client.wait().status != 0
    nothing_is_left(space)
    assert stages_after(space, began) == set()
    claimed = space.get("pvc", "llama-workspace")
    assert claimed and claimed["status"]["phase"] == "Bound"

    llama.install(values(own))
    assert llama("test", "llama").status == 0
    llama.uninstall()
    nothing_is_left(space)
    now = space.get("pvc", "llama-workspace")
    assert now and now["metadata"]["uid"] == claimed["metadata"]["uid"]
    space.apply(files_pod("look", "llama-workspace"))
    space.kubectl("wait", "--for=condition=Ready", "pod/look", f"--timeout={PATIENCE:.0f}s")
    there = space.kubectl("exec", "look", "--", "ls", "mine", "runs/llama/merge-output/done")
    assert there.split() == ["mine", "runs/llama/merge-output/done"]


@pytest.mark.slow
def test_with_an_image_that_cannot_be_pulled_uninstall_fails_and_the_documented_commands_remove_everything(
    new_space: Callable[..., Space], tmp_path: Path
) -> None:
    """A first install, and upgrades to such an image during training, attached and detached."""
    first, attached, detached = (new_space().release(helm) for helm in (3, 3, 4))
    for llama in (first, attached, detached):
        llama.space.volume.create()

    installing = first.start_install(merged(values(), NOT_THERE))
    training = attached.start_install(values(train=UNTIL_CONTINUE))
    detached.install(values(DETACHED, train=UNTIL_CONTINUE))
    attached.space.wait_for_training("llama")
    training.kill(signal.SIGINT)
    upgrading = attached.start_upgrade(merged(values(train=UNTIL_CONTINUE), NOT_THERE))
    detached.space.wait_for_training("llama-run")
    detached.upgrade(values(DETACHED, NOT_THERE, train=UNTIL_CONTINUE))
    for llama in (first, attached, detached):
        llama.space.wait(
            "a pod without its image", lambda llama=llama: any(map(why_not_started, llama.space.pods("llama")))
        )
    installing.kill()
    upgrading.kill()

    uninstalls = [llama.start("uninstall", "llama", "--timeout", "3m") for llama in (first, attached, detached)]
    for uninstall in uninstalls:
        ended = uninstall.wait()
        assert ended.status != 0, ended.output
    attached.space.wait_for_training("llama")
    detached.space.wait_for_training("llama-run")

    commands = {first: documented(first), attached: noted(attached), detached: noted(detached)}
    for llama, lines in commands.items():
        assert f"helm -n {llama.space.name} uninstall llama --no-hooks" in lines or "uninstall $R --no-hooks" in lines
        (tmp_path / "helm").unlink(missing_ok=True)
        (tmp_path / "helm").symlink_to(helm_program(llama.helm))
        done = run(["env", f"PATH={tmp_path}:{os.environ['PATH']}", "bash", "-exc", lines])
        assert done.status == 0, done.output
        nothing_is_left(llama.space)
        assert llama.space.get("pvc", CLAIM)


def noted(llama: Release) -> str:
    """The commands in the release's notes for this case."""
    notes = llama("get", "notes", "llama").output.partition("If the image cannot be pulled")[2]
    return "\n".join(re.findall(r"^ {2}(\S.*)", notes, re.M))


def documented(llama: Release) -> str:
    """The commands in docs/operations.md, preceded by the settings that they use."""
    page = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    settings = page.partition("\n## ")[0]
    section = page.partition("\n## The image cannot be pulled")[2].partition("\n## ")[0]
    blocks = ["\n".join(re.findall(r"^ {4}(\S.*)", text, re.M)) for text in (settings, section)]
    return f"{blocks[0]}\n".replace("NS=kubeflow R=llama-lora ", f"NS={llama.space.name} R=llama ") + blocks[1]
