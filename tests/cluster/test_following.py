"""genvalues status, logs, bundle and uninstall on attached and detached runs, with Helm 3 and Helm 4."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chart.manifests import CHART, Values, merged
from cluster.space import EFA, NEURON, PATIENCE, Client, Ended, Space, helm_program, inputs_file, stand_in
from genvalues.cluster.objects import name_of
from trainer.conftest import make_model, write_rows

UNTIL_CONTINUE = "while [ ! -e /workspace/continue ]; do sleep 0.5; done"
BRIEF: Values = {"evaluation": {"enabled": False}}
STAGES = ["preflight", "tokenize", "compile", "train", "consolidate", "merge"]
# Looks like a token: hf_ and four characters are enough to be redacted.
PLANTED = "hf_" + "planted0123"


def values(*more: Values, **scripts: str) -> Values:
    return merged(stand_in(**scripts), BRIEF, *more)


class Genvalues:
    """genvalues with Helm 3 or Helm 4 next to its Python."""

    def __init__(self, space: Space, helm: int, folder: Path) -> None:
        self.space = space
        (folder / "helm").symlink_to(helm_program(helm))
        code = f"import sys; sys.executable = {str(folder / 'python')!r}; from genvalues.cli import main; main()"
        self.command = [sys.executable, "-c", code]

    def start(self, *arguments: str) -> Client:
        client = Client([*self.command, *arguments, "--namespace", self.space.name], dict(os.environ))
        self.space.clients.append(client)
        return client

    def __call__(self, *arguments: str) -> Ended:
        return self.start(*arguments).wait()

    def json(self, *arguments: str) -> dict[str, Any]:
        """The JSON on stdout, whatever the exit status."""
        command = [*self.command, *arguments, "--json", "--namespace", self.space.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
        assert done.stdout, done.stderr
        document: dict[str, Any] = json.loads(done.stdout)
        return document


@pytest.fixture
def genvalues(space: Space, helm: int, tmp_path: Path) -> Iterator[Genvalues]:
    folder = tmp_path / "helm"
    folder.mkdir()
    yield Genvalues(space, helm, folder)


@pytest.fixture
def with_helm_4(space: Space, tmp_path: Path) -> Genvalues:
    folder = tmp_path / "helm"
    folder.mkdir()
    return Genvalues(space, 4, folder)


def states(document: dict[str, Any]) -> dict[str, str]:
    return {stage["name"]: stage["state"] for stage in document["stages"]}


def last_lines(output: str, stage: str) -> list[str]:
    """The last lines, from the reason on; it appears there once more than in the stage's line."""
    lines = output.splitlines()
    return lines[max(number for number, line in enumerate(lines) if line.startswith(f"{stage} failed: ")) :]


def stage(document: dict[str, Any], name: str) -> dict[str, Any]:
    return next(one for one in document["stages"] if one["name"] == name)


def test_status_and_logs_follow_an_attached_run_to_its_end_and_an_upgrade_skips_what_is_up_to_date(
    space: Space, genvalues: Genvalues, helm: int, workload: str
) -> None:
    llama = space.release(helm)
    training = values({"workload": workload}, train=f"echo the first words; {UNTIL_CONTINUE}; echo the last words")
    client = llama.start_install(training)
    trainers = space.wait_for_training("llama")

    before = genvalues.json("status", "llama")
    assert states(before) == dict(zip(STAGES, ["done", "done", "done", "running", "waiting", "waiting"], strict=True))
    assert (before["outcome"], before["mode"], before["exitStatus"]) == ("running", "attached", None)
    train = stage(before, "train")
    assert train["pods"] == sorted(name_of(pod) for pod in trainers) and train["started"]
    assert before["devices"] == {NEURON: 2, EFA: 2} and len(before["nodes"]) == 1
    assert before["notRead"] == []

    watching, reading = genvalues.start("status", "llama", "--watch"), genvalues.start("logs", "llama", "-f")
    space.wait("the workers' first words", lambda: reading.output.count("the first words") == 2)
    space.volume.run("touch continue")
    assert client.wait().status == 0
    read, watched = reading.wait(), watching.wait()
    assert read.status == 0 and read.output.count("the last words") == 2
    assert f"[{train['pods'][0]}] the first words" in read.output
    assert watched.status == 0, watched.output
    lines = watched.output.splitlines()
    assert [line for line in lines if line.startswith("merge: done in ")] and lines[-2].startswith("llama: done")
    assert re.fullmatch(r"merged model: runs/llama/merged on the volume of claim \S+", lines[-1])

    shown = genvalues("status", "llama")
    assert shown.status == 0 and re.search(r"^train +done in ", shown.output, re.MULTILINE), shown.output
    llama.upgrade(training)
    after = genvalues.json("status", "llama")
    assert states(after) == {name: "done" if name == "preflight" else "skipped" for name in STAGES}
    assert (after["outcome"], after["revision"], after["exitStatus"]) == ("done", 2, 0)


def test_the_status_of_a_detached_run_before_during_and_after_it(space: Space, with_helm_4: Genvalues) -> None:
    settings: Values = {"workload": "trainjob", "pipeline": {"mode": "detached"}}
    space.release(4).install(values(settings, train=UNTIL_CONTINUE))
    early = with_helm_4.json("status", "llama")
    assert (early["mode"], early["outcome"], early["runner"]["state"]) == ("detached", "running", "running")
    watching = with_helm_4.start("status", "llama", "--watch")
    space.wait_for_training("llama-run")
    during = with_helm_4.json("status", "llama")
    assert states(during)["train"] == "running" and states(during)["merge"] == "waiting"
    assert [line for line in with_helm_4("logs", "llama", "train-gate").output.splitlines() if "released" in line]
    space.volume.run("touch continue")
    watched = watching.wait()
    assert watched.status == 0, watched.output
    after = with_helm_4.json("status", "llama")
    assert set(states(after).values()) == {"done"} and after["runner"]["state"] == "done"
    refused = with_helm_4("uninstall", "llama-run", "--yes")
    assert refused.status == 2 and "genvalues uninstall llama --namespace" in refused.output


@pytest.mark.parametrize("mode", [pytest.param("attached", marks=pytest.mark.repeat), "detached"])
def test_a_failed_stage_is_reported_with_its_reason_and_the_end_of_its_log(
    space: Space, with_helm_4: Genvalues, mode: str
) -> None:
    llama = space.release(4)
    settings: Values = {"pipeline": {"mode": mode}, "stages": {"compile": {"backoffLimit": 0}}}
    status = 1 if mode == "attached" else 0
    llama.install(values(settings, tokenize="echo rows.jsonl has no column q; exit 2"), status=status)
    watched = with_helm_4("status", "llama", "--watch")
    assert watched.status == 2, watched.output
    reason, tail_of, *tail = last_lines(watched.output, "tokenize")
    assert "ended with status 2" in reason and tail_of.startswith("last ")
    assert tail[-1].strip() == "rows.jsonl has no column q"

    llama.upgrade(values(settings, compile="echo the compiler is out of memory; exit 7"), status=status)
    watched = with_helm_4("status", "llama", "--watch")
    assert watched.status == 1, watched.output
    reason, tail_of, *tail = last_lines(watched.output, "compile")
    assert "ended with status 7" in reason
    assert re.fullmatch(r"last \d+ lines of llama(-run)?-compile-\d-worker-[01]:", tail_of)
    assert tail[-1].strip() == "the compiler is out of memory"
    failed = with_helm_4.json("status", "llama")
    assert states(failed)["compile"] == "failed" and states(failed)["train"] == "waiting"
    assert failed["outcome"] == "failed" and stage(failed, "compile")["tail"][-1] == "the compiler is out of memory"
    log = with_helm_4("logs", "llama", "compile")
    assert log.status == 0 and "the compiler is out of memory" in log.output


def inputs(folder: Path, *more: Values, **scripts: str) -> Path:
    return inputs_file(folder, values(*more, **scripts), mode="detached")


def test_install_follows_a_detached_run_and_ctrl_c_stops_only_the_following(
    space: Space, with_helm_4: Genvalues, tmp_path: Path
) -> None:
    following = with_helm_4.start("install", str(inputs(tmp_path, train=UNTIL_CONTINUE)), "--chart", str(CHART))
    space.wait("the training in the output", lambda: "train: running" in following.output)
    assert "claim work: Bound" in following.output, "what preflight has found"
    following.kill(signal.SIGINT)
    again = f"genvalues status llama --watch --namespace {space.name}"
    assert following.process.returncode == 130 and following.output.rstrip().endswith(again)

    watching = with_helm_4.start("status", "llama", "--watch")
    space.volume.run("touch continue")
    assert watching.wait().status == 0

    broken = inputs(tmp_path, {"dataset": {"evalFraction": 0.1}}, tokenize="echo no column q; exit 2")
    ended = with_helm_4("install", str(broken), "--chart", str(CHART), "--skip-preflight")
    assert ended.status == 2, ended.output
    assert last_lines(ended.output, "tokenize")[-1].strip() == "no column q"


def test_an_unknown_release_is_one_line_that_names_the_existing_ones(space: Space, with_helm_4: Genvalues) -> None:
    ended = with_helm_4("status", "llama")
    assert ended.status == 2 and "It has no releases" in ended.output
    assert len(ended.output.splitlines()) == 1


def test_uninstall_stops_the_training_and_reports_what_is_kept(space: Space, with_helm_4: Genvalues) -> None:
    llama = space.release(4)
    client = llama.start_install(values(train=UNTIL_CONTINUE))
    space.wait_for_training("llama")
    ended = with_helm_4("uninstall", "llama")
    assert ended.status == 0, ended.output
    assert "Will be stopped: train" in ended.output and "claim work, 1Gi" in ended.output
    assert f"kubectl -n {space.name} delete pvc work" in ended.output
    assert llama.state == "none" and not space.pods("llama", "train")
    assert space.get("pvc", "work")
    client.wait()


@pytest.mark.slow
def test_a_bundle_contains_no_token_and_can_be_replayed_locally(
    space: Space, with_helm_4: Genvalues, tmp_path: Path
) -> None:
    settings: Values = {"training": {"maxSequenceLength": 128, "maxSteps": 2, "saveSteps": 1}}
    llama = space.release(4)
    llama.install(values(settings, tokenize=f"echo HF_TOKEN={PLANTED}"))
    space.kubectl("annotate", "job", "llama-merge", f"note={PLANTED}")
    packed = tmp_path / "report.tar.gz"
    ended = with_helm_4("bundle", "llama", "-o", str(packed))
    assert ended.status == 0 and packed.stat().st_mode & 0o777 == 0o600, ended.output
    with tarfile.open(packed) as tar:
        files = {member.name: tar.extractfile(member).read().decode() for member in tar if member.isreg()}  # type: ignore[union-attr]
    assert not [name for name, text in files.items() if PLANTED in text or "planted" in text]
    assert "(redacted)" in next(text for name, text in files.items() if re.search(r"logs/llama-tokenize-.*log", name))
    assert json.loads(files["bundle/status.json"])["outcome"] == "done"
    assert files["bundle/not-read.txt"] == ""
    assert json.loads(files["bundle/about.json"])["kubernetes"].startswith("v1.")

    workspace = tmp_path / "workspace"
    workspace.mkdir()
    make_model(workspace / "model")
    write_rows(workspace / "rows.jsonl")
    genvalues = Path(sys.executable).with_name("genvalues")
    command = [str(genvalues), "local", str(packed), "--workspace", str(workspace), "--cpu"]
    began = time.monotonic()
    replayed = subprocess.run(command, capture_output=True, text=True, check=False, timeout=2 * PATIENCE)
    assert replayed.returncode == 0, f"{time.monotonic() - began:.0f} s\n{replayed.stdout}\n{replayed.stderr}"
    assert (workspace / "runs/llama/merged/model.safetensors").exists()
