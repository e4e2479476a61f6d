"""Train a small Llama in the cluster."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from chart.manifests import Values, merged
from cluster.local import node
from cluster.space import (
    EFA,
    NEURON,
    PATIENCE,
    SMALL,
    TRAINER_IMAGE,
    Release,
    Space,
    Volume,
    holds,
    image,
    is_stage,
    stages_in_order,
)
from cluster.test_following import Genvalues
from genvalues.cluster.objects import annotations_of, component_of, labels_of, name_of
from genvalues.cluster.workloads import job_of
from genvalues.common import files
from trainer.conftest import make_model, write_rows

STEPS, SAVE_STEPS = 450, 15
TRAINING: Values = merged(
    SMALL,
    image(TRAINER_IMAGE),
    {
        # As cpu, because the node pretends to have devices.
        "instance": "cpu",
        "devices": {NEURON: 2, EFA: 1},
        "parallelism": {"processesPerNode": 1, "tensorParallelSize": 1, "dataParallelSize": 2},
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


def put_inputs(space: Space, folder: Path) -> None:
    """Create the space's volume, with a model and rows that are the same each time."""
    space.volume.create()
    space.volume.copy_in(make_model(folder / "model", initializer_range=0.1), write_rows(folder / "rows.jsonl", 200))


def adapter(space: Space, run: str) -> str:
    """Digest of the run's adapter."""
    return space.volume.run(f"sha256sum < runs/{run}/adapter/adapter_model.safetensors")


# The node keeps the digest of the adapter of an undisturbed training, for the tests that run later.
UNDISTURBED = node.FOLDER / f"adapter-{TRAINER_IMAGE.rpartition(':')[2]}"


def keep_adapter(space: Space) -> None:
    if node.FOLDER.exists():  # not on another cluster
        UNDISTURBED.write_text(adapter(space, "llama"))


def resumed(space: Space, run: str) -> bool:
    """Whether a training was resumed: tensorboard writes a file for each process that trained."""
    return int(space.volume.run(f"ls runs/{run}/checkpoints/*/tensorboard | wc -l")) > 1


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    folder = tmp_path_factory.mktemp("volume")
    space = Space(f"trained-{secrets.token_hex(2)}")
    try:
        put_inputs(space, folder)
        release = space.release(helm=3)
        installed = release.install(TRAINING, seconds=2 * PATIENCE)
        keep_adapter(space)
        yield Trained(space, release, installed.output)
    finally:
        space.remove()


def test_helm_install_trains_a_small_llama_and_the_result_loads_in_transformers(
    trained: Trained, tmp_path: Path
) -> None:
    check_training(trained.space.volume, STEPS, tmp_path)


def check_training(volume: Volume, steps: int, folder: Path) -> None:
    """The loss of the run llama decreased in this many steps, and its merged model, copied into ``folder``, works."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lines = [json.loads(line) for line in volume.run("cat runs/llama/checkpoints/*/metrics.jsonl").splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == steps
    held_out = [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    assert [step for step, _ in held_out] == [0, steps // 3, 2 * (steps // 3), steps]
    assert held_out[-1][1] < held_out[0][1]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10]), "the loss decreases"

    merged_model = AutoModelForCausalLM.from_pretrained(volume.copy_out("runs/llama/merged", folder))
    base_model = AutoModelForCausalLM.from_pretrained(volume.copy_out("model", folder))
    changed = {
        name.split(".")[-2]
        for (name, after), (_, before) in zip(
            merged_model.named_parameters(), base_model.named_parameters(), strict=True
        )
        if not torch.equal(after, before)
    }
    assert changed == {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    tokens = AutoTokenizer.from_pretrained(folder / "merged")("What is 2 + 2?", return_tensors="pt")
    assert merged_model.generate(**tokens, max_new_tokens=2).shape[1] > tokens["input_ids"].shape[1]


def test_train_is_one_pytorchjob_of_two_workers_and_each_stage_left_its_manifest(trained: Trained) -> None:
    jobs = {job["metadata"]["name"]: job for job in trained.space.list("pytorchjobs")}
    assert sorted(jobs) == ["llama-compile-1", "llama-train-1"]
    workers = [pod for pod in trained.space.history.pods() if is_stage(pod, "train")]
    assert sorted(pod["metadata"]["name"] for pod in workers) == ["llama-train-1-worker-0", "llama-train-1-worker-1"]
    for stage in ("tokenize", "compile", "train", "consolidate", "merge", "evaluate"):
        assert trained.space.volume.manifest("llama", stage)["stage"] == stage


def test_pods_that_train_are_not_disrupted_and_have_120_s_to_save(trained: Trained) -> None:
    pods = [pod for pod in trained.space.history.pods() if job_of(pod)]
    assert {component_of(pod) for pod in pods} == {"compile", "train"}
    for pod in pods:
        assert annotations_of(pod)["karpenter.sh/do-not-disrupt"] == "true"
        assert pod["spec"]["terminationGracePeriodSeconds"] == 120


def test_every_stage_ran_in_its_order(trained: Trained) -> None:
    stages_in_order(trained.space.history)


def test_only_compile_and_train_hold_neuron_and_efa_over_the_whole_run(trained: Trained) -> None:
    pods = trained.space.history.pods(**{"app.kubernetes.io/instance": "llama"})
    assert len(pods) >= 12
    for pod in pods:
        trains = labels_of(pod)["app.kubernetes.io/component"] in {"compile", "train"}
        assert (holds(pod, NEURON), holds(pod, EFA)) == ((2, 1) if trains else (0, 0)), pod["metadata"]["name"]


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

    space.wait("no job and no pod of the report", nothing_left)
