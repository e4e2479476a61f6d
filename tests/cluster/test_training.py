"""Train a small Llama in the cluster; interruptions of the training do not change its result."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from chart.manifests import Values, merged
from cluster.local.operators import NAMESPACE as OPERATORS_NAMESPACE
from cluster.space import (
    EFA,
    NEURON,
    SMALL,
    TRAINER_IMAGE,
    Client,
    Release,
    Space,
    asking_for_neuron,
    holds,
    image,
    is_stage,
    node_of,
    run,
    skipping,
    stages_in_order,
    uids,
)
from cluster.test_following import Genvalues
from genvalues.cluster.objects import labels_of, name_of
from genvalues.common import files
from trainer.conftest import make_model, write_rows

pytestmark = pytest.mark.training
OPERATORS = "control-plane=kubeflow-training-operator"
STEPS, SAVE_STEPS = 450, 15
TRAINING: Values = merged(
    SMALL,
    image(TRAINER_IMAGE),
    {
        "dataset": {"evalFraction": 0.1},
        "lora": {"r": 4, "alpha": 8, "dropout": 0.1, "targetModules": "all-linear"},
        "training": {
            "maxSequenceLength": 128,
            "gradientAccumulationSteps": 1,
            "epochs": 100,
            "maxSteps": STEPS,
            "learningRate": 1e-2,
            "saveSteps": SAVE_STEPS,
            "evalSteps": STEPS // 3,
        },
        "evaluation": {"maxRows": 8, "samples": 1, "maxNewTokens": 8},
        "stageDefaults": {"extraEnv": {"OMP_NUM_THREADS": 1}},  # two workers may share two cores
    },
)


class Trained(NamedTuple):
    """A release whose pipeline has run once without interruption."""

    space: Space
    release: Release
    install_log: str


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    folder = tmp_path_factory.mktemp("volume")
    space = Space(f"trained-{secrets.token_hex(2)}")
    try:
        space.volume.create()
        space.volume.copy_in(
            make_model(folder / "model", initializer_range=0.1), write_rows(folder / "rows.jsonl", 200)
        )
        release = space.release(helm=3)
        yield Trained(space, release, release.install(TRAINING, seconds=900).output)
    finally:
        space.remove()


def test_helm_install_trains_a_small_llama_and_the_result_loads_in_transformers(
    trained: Trained, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    volume = trained.space.volume
    lines = [json.loads(line) for line in volume.run("cat runs/llama/checkpoints/*/metrics.jsonl").splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == STEPS
    held_out = [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    assert [step for step, _ in held_out] == [0, STEPS // 3, 2 * (STEPS // 3), STEPS]
    assert held_out[-1][1] < held_out[0][1]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10]), "the loss decreases"

    merged_model = AutoModelForCausalLM.from_pretrained(volume.copy_out("runs/llama/merged", tmp_path))
    base_model = AutoModelForCausalLM.from_pretrained(volume.copy_out("model", tmp_path))
    changed = {
        name.split(".")[-2]
        for (name, after), (_, before) in zip(
            merged_model.named_parameters(), base_model.named_parameters(), strict=True
        )
        if not torch.equal(after, before)
    }
    assert changed == {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    tokens = AutoTokenizer.from_pretrained(tmp_path / "merged")("What is 2 + 2?", return_tensors="pt")
    assert merged_model.generate(**tokens, max_new_tokens=2).shape[1] > tokens["input_ids"].shape[1]


def test_train_is_one_pytorchjob_of_two_workers_and_each_stage_left_its_manifest(trained: Trained) -> None:
    jobs = {job["metadata"]["name"]: job for job in trained.space.list("pytorchjobs")}
    assert sorted(jobs) == ["llama-compile-1", "llama-train-1"]
    workers = [pod for pod in trained.space.history.pods() if is_stage(pod, "train")]
    assert sorted(pod["metadata"]["name"] for pod in workers) == ["llama-train-1-worker-0", "llama-train-1-worker-1"]
    for stage in ("tokenize", "compile", "train", "consolidate", "merge", "evaluate"):
        assert trained.space.volume.manifest("llama", stage)["stage"] == stage


def test_every_stage_ran_in_its_order(trained: Trained) -> None:
    stages_in_order(trained.space.history)


def test_only_compile_and_train_hold_neuron_and_efa_over_the_whole_run(trained: Trained) -> None:
    pods = trained.space.history.pods(**{"app.kubernetes.io/instance": "llama"})
    assert len(pods) >= 12
    for pod in pods:
        trains = labels_of(pod)["app.kubernetes.io/component"] in {"compile", "train"}
        assert (holds(pod, NEURON), holds(pod, EFA)) == ((8, 4) if trains else (0, 0)), pod["metadata"]["name"]


def test_helm_test_checks_the_merged_model_and_reports_what_is_wrong(trained: Trained) -> None:
    tested = trained.release("test", "llama", "--logs")
    assert tested.status == 0, tested.output
    assert "merge: " in tested.output and "all match the manifest" in tested.output
    volume = trained.space.volume
    volume.run(
        "cp -p runs/llama/merged/model.safetensors spare && printf X | dd of=runs/llama/merged/model.safetensors"
        " bs=1 seek=20000 conv=notrunc 2>/dev/null"
    )
    try:
        damaged = trained.release("test", "llama", "--logs")
    finally:
        volume.run("mv spare runs/llama/merged/model.safetensors")
    assert damaged.status != 0
    assert "merged/model.safetensors" in damaged.output and "SHA-256" in damaged.output


def test_genvalues_report_fetches_the_page_and_leaves_nothing_in_the_cluster(trained: Trained, tmp_path: Path) -> None:
    space, page = trained.space, tmp_path / "report.html"
    (tmp_path / "helm").mkdir()
    genvalues = Genvalues(space, 3, tmp_path / "helm")
    before = {kind: {name_of(item) for item in space.list(kind)} for kind in ("jobs", "pods")}
    ended = genvalues("report", "llama", "-o", str(page))
    assert ended.status == 0, ended.output
    output = space.volume.manifest("llama", "evaluate")["outputs"]["runs/llama/report.html"]
    assert files.sha256(page) == output["sha256"] and page.stat().st_size == output["bytes"]
    assert "held-out loss is" in page.read_text(encoding="utf-8")

    def nothing_left() -> bool:
        return all({name_of(item) for item in space.list(kind)} <= names for kind, names in before.items())

    space.wait("no job and no pod of the report", nothing_left, 60)


def test_an_unchanged_upgrade_skips_every_stage_in_5_s_and_requests_no_neuron(trained: Trained) -> None:
    """With the real image, whose commands must not import torch to skip a stage."""
    began = time.monotonic()
    took = skipping(trained.space, lambda: trained.release.upgrade(TRAINING))
    assert asking_for_neuron(trained.space, began) == set()
    assert len(took) == 7
    assert {stage: seconds for stage, seconds in took.items() if seconds > 5} == {}


@pytest.mark.node
def test_a_lost_worker_and_a_restarted_operator_change_nothing_in_the_result(trained: Trained) -> None:
    space = trained.space
    client = start_training(trained, "disturbed")
    before, operator = uids(space.pods("llama", "train")), operators()
    space.kubectl("delete", "pod", worker(space, 1), "--grace-period=5", "--wait=false")
    run(
        [
            "kubectl",
            "-n",
            OPERATORS_NAMESPACE,
            "delete",
            "pod",
            "-l",
            OPERATORS,
            "--wait=false",
        ]
    )
    space.wait("a worker in the place of the lost one", lambda: uids(space.pods("llama", "train")) - before, 120)
    assert client.wait(400).status == 0, client.output
    assert operator and not operator & operators()
    assert resumed(space, "disturbed")
    assert adapter(space, "disturbed") == adapter(space, "llama")


@pytest.mark.node
def test_a_drained_node_changes_nothing_in_the_result(trained: Trained) -> None:
    """It is the only node: worker, gate and operator pods are evicted, and wait until it is schedulable again."""
    space = trained.space
    client = start_training(trained, "drained")
    node = node_of(space.pods("llama", "train")[0])
    before = uids(space.pods("llama", "train"))
    try:
        run(["kubectl", "drain", node, "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=90s"])
        space.wait("no worker", lambda: not before & uids(space.pods("llama", "train")), 60)
        assert client.is_alive(), client.output
    finally:
        run(["kubectl", "uncordon", node])
    assert client.wait(500).status == 0, client.output
    assert resumed(space, "drained")
    assert adapter(space, "drained") == adapter(space, "llama")


def start_training(trained: Trained, name: str) -> Client:
    """Start the same training as a run of another name; return between its first checkpoint and its end."""
    client = trained.release.start_upgrade(merged(TRAINING, {"name": name}))
    trained.space.wait_for_training("llama", seconds=240)
    trained.space.wait(
        f"a checkpoint of {name}",
        lambda: trained.space.volume.run(f"ls runs/{name}/checkpoints/*/ | grep step- || true"),
        120,
        0.1,
    )
    assert not trained.space.volume.exists(f"runs/{name}/stages/train.json"), "too fast to be interrupted: raise STEPS"
    return client


def operators() -> set[str]:
    command = ["kubectl", "-n", OPERATORS_NAMESPACE, "get", "pods", "-l", OPERATORS, "-o", "name"]
    return set(run(command).output.split())


def worker(space: Space, number: int) -> str:
    [name] = [n for pod in space.pods("llama", "train") if (n := pod["metadata"]["name"]).endswith(f"-worker-{number}")]
    return str(name)


def resumed(space: Space, name: str) -> bool:
    """Whether a training was resumed: tensorboard writes a file for each process that trained."""
    return int(space.volume.run(f"ls runs/{name}/checkpoints/*/tensorboard | wc -l")) > 1


def adapter(space: Space, name: str) -> str:
    """Digest of the run's adapter."""
    return space.volume.run(f"sha256sum < runs/{name}/adapter/adapter_model.safetensors")
