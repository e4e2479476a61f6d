"""genvalues local, with throw-away charts whose stages are small scripts, rendered by the real Helm."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from genvalues.common.process import Command, run_together
from genvalues.ops.local import translated

ROOT = Path(__file__).parents[3]
POD_VOLUMES = [
    {"name": "workspace", "persistentVolumeClaim": {"claimName": "w"}},
    {"name": "config", "configMap": {"name": "config"}},
    {"name": "tmp", "emptyDir": {}},
]
MOUNTS = [
    {"name": "workspace", "mountPath": "/workspace"},
    {"name": "config", "mountPath": "/etc/llama-lora"},
    {"name": "tmp", "mountPath": "/tmp"},
]


def container(script: str, *arguments: str, **more: Any) -> dict[str, Any]:
    """A container that runs a shell script, {name} put in by its caller."""
    return {"name": "main", "command": ["sh", "-c", script, "sh"], "args": [*arguments], "volumeMounts": MOUNTS, **more}


def stage(name: str, weight: int, spec: dict[str, Any], kind: str = "Job", **annotations: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": kind,
        "metadata": {
            "name": f"x-{name}",
            "annotations": {
                "helm.sh/hook": "post-install,post-upgrade",
                "helm.sh/hook-weight": str(weight),
                "llama-lora/stage": name,
                **{key.replace("__", "/"): value for key, value in annotations.items()},
            },
        },
        "spec": spec,
    }


def job(name: str, weight: int, script: str, *arguments: str, **more: Any) -> dict[str, Any]:
    pod = {"containers": [container(script, *arguments, **more)], "volumes": POD_VOLUMES}
    return stage(name, weight, {"template": {"spec": pod}})


def pytorchjob(name: str, weight: int, script: str, workers: int) -> dict[str, Any]:
    pod = {"containers": [container(script)], "volumes": POD_VOLUMES}
    worker = {"replicas": workers, "template": {"spec": pod}}
    spec = {"nprocPerNode": "3", "pytorchReplicaSpecs": {"Worker": worker}}
    return stage(name, weight, spec, kind="PyTorchJob")


class Laptop:
    """A folder with a chart, values and a workspace, and the command to run them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.workspace = folder / "workspace"
        self.started: list[subprocess.Popen[str]] = []
        (folder / "values.yaml").write_text("name: my-run\npipeline: {mode: detached}\n")
        # In no command line of ours: what still runs with it in its own was started by a stage.
        self.marker = f"31{os.getpid()}{time.monotonic_ns() % 10**9}"

    def chart(self, *objects: dict[str, Any], raw: str = "") -> None:
        templates = self.folder / "chart" / "templates"
        templates.mkdir(parents=True, exist_ok=True)
        (self.folder / "chart" / "Chart.yaml").write_text("apiVersion: v2\nname: throw-away\nversion: 0.1.0\n")
        config = {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": "config"},
            "data": {"run.yaml": "source: /workspace/rows.jsonl\nelsewhere: /tmp/rows.jsonl\n"},
        }
        text = yaml.safe_dump_all([config, *objects]).replace("SLEEP", f"sleep {self.marker}")
        (templates / "all.yaml").write_text(f"{text}\n{raw}")

    def start(self, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "genvalues.cli",
                "local",
                "values.yaml",
                "--workspace",
                self.workspace.name,
                "--chart",
                "chart",
            ],
            cwd=self.folder,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def run(self, **environment: str) -> tuple[int, str, str]:
        process = self.start(**environment)
        out, err = process.communicate(timeout=90)
        return process.returncode, out, err

    def sleeping(self) -> list[int]:
        """The stages' processes that still run."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(OSError):
                    if f"sleep\0{self.marker}\0".encode() == (entry / "cmdline").read_bytes():
                        found.append(int(entry.name))
        return found

    def wait_for_sleeping(self, count: int, seconds: float = 40) -> None:
        deadline = time.monotonic() + seconds
        while len(self.sleeping()) != count:
            assert time.monotonic() < deadline, f"{len(self.sleeping())} processes sleep after {seconds} s, not {count}"
            time.sleep(0.05)


@pytest.fixture
def laptop(tmp_path: Path) -> Iterator[Laptop]:
    laptop = Laptop(tmp_path)
    yield laptop
    for process in laptop.started:
        with suppress(ProcessLookupError):
            process.kill()
        process.communicate()
    for pid in laptop.sleeping():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def test_stages_run_in_the_order_of_their_weights_and_what_needs_a_cluster_is_named(laptop: Laptop) -> None:
    laptop.chart(
        job("last", 50, "echo I am last"),
        job("first", -5, "echo I am first"),
        job("tenth", 10, "echo I am tenth"),
        job("ninth", 9, "echo I am ninth"),
        stage("gate", 21, {"template": {"spec": {"containers": []}}}, **{"llama-lora__needs-cluster": "true"}),
        stage("cleanup", 0, {}, **{"helm.sh__hook": "pre-delete", "llama-lora__needs-cluster": "true"}),
    )
    status, out, err = laptop.run()
    assert (status, err) == (0, "")
    said = [line for line in out.splitlines() if line.startswith(("I am", "---"))]
    assert said == [
        "--- first", "I am first", "--- ninth", "I am ninth", "--- tenth", "I am tenth", "--- last", "I am last",
    ]  # fmt: skip
    assert "Left out, for want of a cluster: gate\n" in out
    table = out.splitlines()[-5:]
    assert table[0].split() == ["stage", "result", "time"]
    assert all(re.fullmatch(r"(first|ninth|tenth|last) +done +\d+\.\d s", line.rstrip()) for line in table[1:])
    assert (laptop.workspace / ".local/logs/ninth.log").read_text() == "I am ninth\n"


def test_the_first_failing_stage_ends_it_with_its_status_and_its_last_lines(laptop: Laptop) -> None:
    laptop.chart(
        job("good", 1, "true"),
        job("bad", 2, "for i in $(seq 50); do echo line $i; done; exit 7"),
        job("next", 3, "echo no"),
    )
    status, out, err = laptop.run()
    assert status == 7
    lines = err.splitlines()
    assert lines[0] == f"bad: failed with status 7. Its log: {laptop.workspace}/.local/logs/bad.log"
    assert [line.strip() for line in lines[1:]] == [f"line {i}" for i in range(31, 51)]
    assert "--- next" not in out
    assert re.search(r"^good +done.*\nbad +failed with status 7.*\nnext +not run", out, re.M)


def test_a_stage_killed_by_a_signal_is_a_failure(laptop: Laptop) -> None:
    laptop.chart(job("killed", 1, "kill -9 $$"))
    assert laptop.run()[0] == 137


def test_init_containers_run_first_and_a_failing_one_stops_the_stage(laptop: Laptop) -> None:
    both = job("both", 1, "echo main")
    both["spec"]["template"]["spec"]["initContainers"] = [container("echo one"), container("echo two")]
    failing = job("failing", 2, "echo never")
    failing["spec"]["template"]["spec"]["initContainers"] = [container("exit 2")]
    laptop.chart(both, failing)
    status, out, _ = laptop.run()
    assert status == 2
    assert "one\ntwo\nmain\n" in out
    assert "never" not in out


def test_mounted_paths_are_the_workspaces_folders(laptop: Laptop) -> None:
    script = 'echo "$1|$HOME|$CACHE|$MODE"; cat /etc/llama-lora/run.yaml; touch "$HOME/here"; pwd'
    env = [
        {"name": "HOME", "value": "/tmp"},
        {"name": "CACHE", "value": "--dir=/workspace/cache:/workspaces/other:s3://b/workspace/c"},
        {"name": "MODE", "value": "{{ .Values.pipeline.mode }} {{ .Release.Name }}"},
    ]
    laptop.chart(job("paths", 1, script, "/workspace/a b", env=env))
    status, out, err = laptop.run()
    assert status == 0, err
    place = laptop.workspace
    assert out.splitlines()[1:5] == [
        f"{place}/a b|{place}/.local/tmp/paths/tmp|"
        f"--dir={place}/cache:/workspaces/other:s3://b/workspace/c|attached llama-lora",
        f"source: {place}/rows.jsonl",
        "elsewhere: /tmp/rows.jsonl",  # the config is shared by stages: no one stage's scratch folder
        str(place),
    ]
    assert (place / ".local/tmp/paths/tmp/here").exists()


def test_a_workspace_may_be_called_what_yaml_takes_for_its_own(laptop: Laptop) -> None:
    laptop.workspace = laptop.folder / "a #b: c"
    laptop.chart(job("paths", 1, "cat '/etc/llama-lora/run.yaml'"))
    status, out, err = laptop.run()
    assert status == 0, err
    config = yaml.safe_load("\n".join(line for line in out.splitlines() if line.startswith(("source:", "elsewhere:"))))
    assert config["source"] == f"{laptop.workspace}/rows.jsonl"


def test_a_token_reaches_only_a_stage_that_has_its_secret_and_another_torchruns_settings_none(laptop: Laptop) -> None:
    env = [{"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "s", "key": "token"}}}]
    script = 'echo "$0 ${#HF_TOKEN} letters, rank ${RANK:-none}, ${PET_NNODES:-none}"'
    laptop.chart(job("download", 1, script, env=env), job("evaluate", 2, script))
    _, out, _ = laptop.run(HF_TOKEN="12345", RANK="7", PET_NNODES="4:4")
    assert [line.split(" ", 1)[1] for line in out.splitlines() if "letters" in line] == [
        "5 letters, rank none, none",
        "0 letters, rank none, none",
    ]


def test_a_chart_in_which_nothing_runs_here_is_told(laptop: Laptop) -> None:
    laptop.chart()
    status, out, err = laptop.run()
    assert (status, out) == (2, "") and "has no stage that runs here" in err


def test_a_token_comes_from_the_users_environment_and_is_written_nowhere(laptop: Laptop) -> None:
    env = [{"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "s", "key": "token"}}}]
    laptop.chart(job("download", 1, 'echo "${#HF_TOKEN} letters"', env=env))
    assert "0 letters" in laptop.run(HF_TOKEN="")[1]
    status, out, _ = laptop.run(HF_TOKEN="hf_secretsecret")
    assert (status, "15 letters" in out) == (0, True)
    written = [path.read_bytes() for path in laptop.workspace.rglob("*") if path.is_file()]
    assert written
    assert not any(b"hf_secretsecret" in content for content in written)


def test_commands_are_found_beside_this_python_first(laptop: Laptop) -> None:
    python = job("python", 1, "")
    python["spec"]["template"]["spec"]["containers"][0].update(
        command=["python", "-c", "import sys, shutil; print(sys.executable, shutil.which('python'))"], args=[]
    )
    laptop.chart(python)
    status, out, _ = laptop.run(PATH="/usr/bin:/bin")
    beside = Path(sys.executable).with_name("python")
    assert (status, f"{beside} {beside}" in out) == (0, True)


def test_a_command_that_is_not_installed_is_told_before_any_stage_runs(laptop: Laptop) -> None:
    absent = job("absent", 2, "")
    absent["spec"]["template"]["spec"]["containers"][0]["command"] = ["no-such-command"]
    laptop.chart(job("first", 1, "echo no"), absent)
    status, out, err = laptop.run()
    assert (status, out) == (2, "")
    assert err.startswith(
        "the stage absent needs the command no-such-command, which is not installed. Run `make setup`"
    )


def test_workers_run_side_by_side_with_what_the_operator_sets(laptop: Laptop) -> None:
    # Each waits for the other: one after the other would never end.
    script = (
        "env | grep ^PET_ | sort | tr '\\n' ' '; echo; "
        "if mkdir /workspace/one 2>/dev/null; then while ! [ -d /workspace/two ]; do sleep 0.05; done; "
        "else mkdir /workspace/two; fi"
    )
    laptop.chart(pytorchjob("train", 1, script, workers=2))
    status, out, err = laptop.run()
    assert status == 0, err
    lines = sorted(line for line in out.splitlines() if line.startswith("[worker-"))
    assert [line.partition("]")[0] for line in lines] == ["[worker-0", "[worker-1"]
    settings = [line.partition("] ")[2] for line in lines]
    assert settings[0] == settings[1]
    assert re.fullmatch(
        r"PET_LOCAL_ADDR=127.0.0.1 PET_NNODES=2:2 PET_NPROC_PER_NODE=3 PET_RDZV_BACKEND=c10d "
        r"PET_RDZV_ENDPOINT=localhost:\d+ ?",
        settings[0],
    )


@needs_proc
def test_one_failing_worker_stops_the_others_and_status_2_counts_most(laptop: Laptop) -> None:
    script = "if mkdir /workspace/one 2>/dev/null; then SLEEP; else sleep 0.3; exit 2; fi"
    laptop.chart(pytorchjob("train", 1, script, workers=3))
    assert laptop.run()[0] == 2
    assert laptop.sleeping() == []


def test_status_2_of_any_worker_is_the_stages_whoever_ended_first(laptop: Laptop) -> None:
    waits = "touch /workspace/waits; trap 'exit 2' TERM; while true; do sleep 0.05; done"
    fails = "while ! [ -e /workspace/waits ]; do sleep 0.05; done; sleep 0.2; exit 1"
    laptop.chart(
        pytorchjob("train", 1, f"if mkdir /workspace/one 2>/dev/null; then {waits}; else {fails}; fi", workers=2)
    )
    assert laptop.run()[0] == 2


ORPHANS = (
    "SLEEP & setsid SLEEP & (setsid sh -c 'trap \"\" TERM; SLEEP; SLEEP' &) ; "  # one that SIGTERM does not end
    "SLEEP; SLEEP"
)


@needs_proc
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_every_process_of_the_stage(laptop: Laptop, number: signal.Signals, status: int) -> None:
    laptop.chart(job("endless", 1, ORPHANS), job("next", 2, "echo no"))
    process = laptop.start()
    laptop.wait_for_sleeping(4)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert laptop.sleeping() == []
    assert process.returncode == status
    assert "--- next" not in out
    assert f"endless: stopped by {number.name}" in err


@needs_proc
def test_no_process_outlives_a_killed_genvalues(laptop: Laptop) -> None:
    laptop.chart(pytorchjob("endless", 1, ORPHANS, workers=2))
    process = laptop.start()
    laptop.wait_for_sleeping(8)
    process.kill()
    laptop.wait_for_sleeping(0)


@needs_proc
def test_a_stage_that_ends_leaves_nothing_behind(laptop: Laptop) -> None:
    laptop.chart(job("careless", 1, "(setsid SLEEP &) ; SLEEP & exit 0"), job("next", 2, "echo and so on"))
    status, out, _ = laptop.run()
    assert (status, laptop.sleeping(), "and so on" in out) == (0, [], True)


@needs_proc
def test_a_workspace_has_one_run_at_a_time_and_the_next_one_when_that_is_gone(laptop: Laptop) -> None:
    laptop.chart(job("endless", 1, "test -e /workspace/done || SLEEP"))
    process = laptop.start()
    laptop.wait_for_sleeping(1)
    status, out, err = laptop.run()
    assert (status, out) == (2, "")
    assert err == (
        f"--workspace workspace: another `genvalues local` (process {process.pid}) is at work here. "
        "Wait for its end, stop it, or use another folder.\n"
    )
    process.kill()
    laptop.wait_for_sleeping(0)
    (laptop.workspace / "done").touch()
    time.sleep(1)  # for the supervisor to follow
    assert laptop.run()[0] == 0


@needs_proc
def test_a_workspace_is_taken_until_the_last_process_of_a_killed_run_is_gone(laptop: Laptop) -> None:
    stubborn = "test -e /workspace/done || { trap '' TERM; while true; do SLEEP; done; }"
    laptop.chart(job("stubborn", 1, stubborn), job("next", 2, "echo on it goes"))
    process = laptop.start()
    laptop.wait_for_sleeping(1)
    process.kill()
    process.wait()
    (laptop.workspace / "done").touch()
    began = time.monotonic()
    status, out, _ = laptop.run()
    assert (status, "on it goes" in out) == (0, True)
    assert time.monotonic() - began > 5, "it did not wait for the process that ignores SIGTERM"
    assert laptop.sleeping() == []


def test_helms_own_words_tell_why_a_chart_does_not_render(laptop: Laptop) -> None:
    laptop.chart(raw='{{ fail "training.tensorParallel 6 does not divide 32" }}')
    status, out, err = laptop.run()
    assert (status, out) == (2, "")
    assert "chart: Helm cannot render the chart:" in err
    assert "training.tensorParallel 6 does not divide 32" in err
    assert "Traceback" not in err


def test_no_helm_is_told_with_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from genvalues.common import helm

    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Exception, match=r"helm is not to be found\. Run `make setup`"):
        helm.find_helm()
    (tmp_path / "helm").write_text("#!/bin/sh\necho unreleased\n")
    (tmp_path / "helm").chmod(0o755)
    with pytest.raises(Exception, match="does not say its version"):
        helm.render(tmp_path, "x", {})


@pytest.mark.parametrize("content", ["", "- a\n", "a: [", None])
def test_values_that_cannot_be_read_are_told_in_a_line(laptop: Laptop, content: str | None) -> None:
    laptop.chart()
    (laptop.folder / "values.yaml").unlink()
    if content is not None:
        (laptop.folder / "values.yaml").write_text(content)
    status, out, err = laptop.run()
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith("values.yaml")
    assert not laptop.workspace.exists()


def of_our_chart(folder: Path, text: str, *more: str) -> list[str]:
    """What is said of a file that is not to be run with the chart of this repository."""
    (folder / "my file.yaml").write_text(text)
    command = [sys.executable, "-m", "genvalues.cli", "local", "my file.yaml", "--workspace", "w", *more]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=90)
    assert (done.returncode, done.stdout, (folder / "w").exists()) == (2, "", False), done.stderr
    return done.stderr.splitlines()


@pytest.mark.parametrize(
    ("more", "arguments"), [("", []), ("", ["--cpu"]), ("nodez: 3\n", []), ("dataset: {source: gone.jsonl}\n", [])]
)
def test_an_inputs_file_is_told_as_one_with_the_command_that_makes_values_of_it(
    tmp_path: Path, more: str, arguments: list[str]
) -> None:
    """Also one with a mistake, which that command tells."""
    dataset = "" if "dataset" in more else "dataset: {source: a/b}\n"
    text = f"model: gpt2\n{dataset}instance: cpu\ncpu: {{processes: 2}}\n{more}"
    assert of_our_chart(tmp_path, text, *arguments) == [
        "my file.yaml: this is an inputs file, and no values file. "
        "First: genvalues write 'my file.yaml' -o values.yaml, then give values.yaml."
    ]


def test_values_that_the_chart_s_schema_refuses_are_told_line_by_line_with_the_file_s_name(tmp_path: Path) -> None:
    values = (ROOT / "values" / "cpu.values.yaml").read_text()
    wrong = values.replace("mode: attached", "mode: sideways").replace("maxCost: null", "maxKost: 3")
    first, second = of_our_chart(tmp_path, wrong)
    assert first.startswith("my file.yaml: pipeline.mode: 'sideways' is not one of ")
    assert second.startswith("my file.yaml: guards.maxKost: unknown key")


def test_a_workspace_that_is_a_file_is_told_with_what_to_do(laptop: Laptop) -> None:
    laptop.chart(job("one", 1, "true"))
    laptop.workspace.write_text("")
    status, out, err = laptop.run()
    assert (status, out) == (2, "")
    assert err == (
        "--workspace workspace: cannot be used: Not a directory. "
        "Name a folder that you may write to, or one that is not there yet.\n"
    )


def test_progress_bars_and_broken_bytes_become_lines(tmp_path: Path) -> None:
    lines: list[str] = []
    script = r"printf ' 10%%\r 50%%\r100%%\nbroken \377 byte\r\nno newline'"
    command = Command("x", ("sh", "-c", script), dict(os.environ), tmp_path)
    assert run_together([command], lambda name, line: lines.append(line)) == 0
    assert lines == ["100%", "broken \ufffd byte", "no newline"]


def test_longest_mounted_path_counts_and_only_whole_ones() -> None:
    folders = {"/w": Path("/a"), "/w/b": Path("/c"), "/": Path("/root")}
    del folders["/"]
    assert translated("/w/b/x /w/bb -o=/w, x/w /ww '/w'", folders) == "/c/x /a/bb -o=/a, x/w /ww '/a'"


def test_the_trainers_own_stages_are_what_a_rendered_chart_runs() -> None:
    """The chart of this repository: each stage that runs here runs a command of the trainer, by its run config."""
    from genvalues.common import helm
    from genvalues.ops.local import Local, left_out, stages_of

    root = Path(__file__).parents[3]
    objects = helm.render(root / "chart", "x", yaml.safe_load((root / "values/cpu.values.yaml").read_text()))
    assert set(left_out(objects)) == {"preflight", "storage-prepare", "compile-gate", "train-gate"}
    with tempfile.TemporaryDirectory() as folder:
        stages = stages_of(objects, Local(Path(folder), objects))
        assert [stage.name for stage in stages] == ["tokenize", "compile", "train", "consolidate", "merge", "evaluate"]
        for each in stages:
            ((command,),) = each.groups
            config = f"{folder}/.local/config/run.yaml"
            assert [Path(command.arguments[0]).name, *command.arguments[1:]] == [
                "llama-lora",
                each.name,
                "--config",
                config,
            ]
            assert command.environment["LLAMA_LORA_WORKSPACE"] == folder
            assert command.environment["HOME"].startswith(f"{folder}/.local/tmp/{each.name}")
        assert json.loads(json.dumps(yaml.safe_load(Path(config).read_text())))["backend"] == "cpu"
