"""genvalues local, with small charts whose stages are shell scripts, rendered by Helm."""

from __future__ import annotations

import json
import os
import pty
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

from forked import ForkedPopen, genvalues
from genvalues.common.process import GRACE, Command, run_together
from genvalues.common.progress_bar import MARK, RELAY
from genvalues.ops.local.containers import with_local_paths

ROOT = Path(__file__).parents[3]
TOKEN = "hf_" + "QwErTyUiOpAsDfGhJkLzXcVbNm123456"
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
    """A container that runs a shell script."""
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
    """A folder with a chart, values and a workspace, and the command that runs them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.workspace = folder / "workspace"
        self.started: list[subprocess.Popen[str]] = []
        (folder / "values.yaml").write_text("name: my-run\npipeline: {mode: detached}\n")
        # Only processes that a stage started have it in their command line.
        self.marker = f"31{os.getpid()}{time.monotonic_ns() % 10**9}"

    def chart(self, *objects: dict[str, Any], raw: str = "", config: str = "") -> None:
        templates = self.folder / "chart" / "templates"
        templates.mkdir(parents=True, exist_ok=True)
        (self.folder / "chart" / "Chart.yaml").write_text("apiVersion: v2\nname: throw-away\nversion: 0.1.0\n")
        run = f"{config}source: /workspace/rows.jsonl\nelsewhere: /tmp/rows.jsonl\n"
        metadata = {"name": "config"}
        config_map = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"run.yaml": run}}
        text = yaml.safe_dump_all([config_map, *objects]).replace("SLEEP", f"sleep {self.marker}")
        (templates / "all.yaml").write_text(f"{text}\n{raw}")

    def start(self, **environment: str) -> subprocess.Popen[str]:
        process = ForkedPopen(
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
        """The processes of stages that still run."""
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


needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_stages_run_in_the_order_of_their_weights_and_skipped_ones_are_named(laptop: Laptop) -> None:
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
    assert "Skipped (need a cluster): gate\n" in out
    table = out.splitlines()[-5:]
    assert table[0].split() == ["stage", "result", "time"]
    assert all(re.fullmatch(r"(first|ninth|tenth|last) +done +\d+ s", line.rstrip()) for line in table[1:])
    assert (laptop.workspace / ".local/logs/ninth.log").read_text() == "I am ninth\n"


def test_the_first_failing_stage_ends_the_run_with_its_status_and_its_last_lines(laptop: Laptop) -> None:
    laptop.chart(
        job("good", 1, "true"),
        job("bad", 2, "for i in $(seq 50); do echo line $i; done; exit 7"),
        job("next", 3, "echo no"),
    )
    status, out, err = laptop.run()
    assert status == 7
    lines = err.splitlines()
    assert lines[0] == f"bad: failed with status 7. Log: {laptop.workspace}/.local/logs/bad.log"
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
        f"{place}/a b|{place}/.local/tmp/tmp|"
        f"--dir={place}/cache:/workspaces/other:s3://b/workspace/c|attached llama-lora",
        f"source: {place}/rows.jsonl",
        "elsewhere: /tmp/rows.jsonl",  # all stages share the config: no stage's own folder
        str(place),
    ]
    assert (place / ".local/tmp/tmp/here").exists()


def test_a_workspace_name_may_contain_yaml_syntax(laptop: Laptop) -> None:
    laptop.workspace = laptop.folder / "a #b: c"
    laptop.chart(job("paths", 1, "cat '/etc/llama-lora/run.yaml'"))
    status, out, err = laptop.run()
    assert status == 0, err
    config = yaml.safe_load("\n".join(line for line in out.splitlines() if line.startswith(("source:", "elsewhere:"))))
    assert config["source"] == f"{laptop.workspace}/rows.jsonl"


def test_a_token_reaches_only_a_stage_with_its_secret_and_torchrun_variables_reach_none(laptop: Laptop) -> None:
    env = [{"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "s", "key": "token"}}}]
    script = 'echo "$0 ${#HF_TOKEN} letters, rank ${RANK:-none}, ${PET_NNODES:-none}"'
    laptop.chart(job("download", 1, script, env=env), job("evaluate", 2, script))
    _, out, _ = laptop.run(HF_TOKEN="12345", RANK="7", PET_NNODES="4:4")
    assert [line.split(" ", 1)[1] for line in out.splitlines() if "letters" in line] == [
        "5 letters, rank none, none",
        "0 letters, rank none, none",
    ]


def test_a_chart_without_a_stage_to_run_is_an_error(laptop: Laptop) -> None:
    laptop.chart()
    status, out, err = laptop.run()
    assert (status, out) == (2, "") and "no stage" in err


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


def test_a_command_that_is_not_installed_is_reported_before_any_stage_runs(laptop: Laptop) -> None:
    absent = job("absent", 2, "")
    absent["spec"]["template"]["spec"]["containers"][0]["command"] = ["no-such-command"]
    laptop.chart(job("first", 1, "echo no"), absent)
    status, out, err = laptop.run()
    assert (status, out) == (2, "")
    assert "stage absent" in err and "no-such-command" in err and "`make setup`" in err


def test_workers_run_in_parallel_with_the_variables_that_the_operator_sets(laptop: Laptop) -> None:
    # Each waits for the other, so they never end if they run one after the other.
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
def test_a_failing_worker_stops_the_others_and_status_2_wins(laptop: Laptop) -> None:
    script = "if mkdir /workspace/one 2>/dev/null; then SLEEP; else sleep 0.3; exit 2; fi"
    laptop.chart(pytorchjob("train", 1, script, workers=3))
    assert laptop.run()[0] == 2
    assert laptop.sleeping() == []


def test_status_2_of_any_worker_is_the_status_of_the_stage_whichever_ended_first(laptop: Laptop) -> None:
    waits = "touch /workspace/waits; trap 'exit 2' TERM; while true; do sleep 0.05; done"
    fails = "while ! [ -e /workspace/waits ]; do sleep 0.05; done; sleep 0.2; exit 1"
    laptop.chart(
        pytorchjob("train", 1, f"if mkdir /workspace/one 2>/dev/null; then {waits}; else {fails}; fi", workers=2)
    )
    assert laptop.run()[0] == 2


ORPHANS = (
    "SLEEP & setsid SLEEP & (setsid sh -c 'trap \"\" TERM; SLEEP; SLEEP' &) ; "  # this one ignores SIGTERM
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


STUBBORN = "trap '' TERM; while true; do SLEEP; done"


@needs_proc
def test_a_stopped_stage_has_the_time_to_end_that_its_pod_has(laptop: Laptop) -> None:
    """A training saves a checkpoint in it. Here it is shorter than the usual 10 s, so that the test is quick."""
    stubborn = job("stubborn", 1, STUBBORN)
    stubborn["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] = 1
    laptop.chart(stubborn)
    process = laptop.start()
    laptop.wait_for_sleeping(1)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143 and laptop.sleeping() == []
    assert 1 <= time.monotonic() - began < 8


@needs_proc
def test_a_second_ctrl_c_does_not_wait(laptop: Laptop) -> None:
    stubborn = job("stubborn", 1, STUBBORN)
    stubborn["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] = 120
    laptop.chart(stubborn)
    process = laptop.start()
    laptop.wait_for_sleeping(1)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130 and laptop.sleeping() == []


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
def test_a_workspace_has_one_run_at_a_time_and_the_next_after_that_one_was_killed(laptop: Laptop) -> None:
    laptop.chart(job("endless", 1, "test -e /workspace/done || SLEEP"))
    process = laptop.start()
    laptop.wait_for_sleeping(1)
    status, out, err = laptop.run()
    assert (status, out) == (2, "")
    assert err.startswith(f"--workspace workspace: another `genvalues local` (process {process.pid}) is running")
    process.kill()
    laptop.wait_for_sleeping(0)
    (laptop.workspace / "done").touch()
    time.sleep(1)  # for the supervisor to end, too
    assert laptop.run()[0] == 0


@needs_proc
def test_a_workspace_is_locked_until_the_last_process_of_a_killed_run_ends(laptop: Laptop) -> None:
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
    assert time.monotonic() - began > 5, "the run did not wait for the process that ignores SIGTERM"
    assert laptop.sleeping() == []


def test_a_chart_that_does_not_render_is_reported_in_helms_words(laptop: Laptop) -> None:
    laptop.chart(raw='{{ fail "training.tensorParallel 6 does not divide 32" }}')
    status, out, err = laptop.run()
    assert (status, out) == (2, "")
    assert "training.tensorParallel 6 does not divide 32" in err
    assert "Traceback" not in err


def test_a_missing_helm_and_one_without_a_version_are_reported_with_a_fix(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from genvalues.common import helm

    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Exception, match=r"helm.*`make setup`"):
        helm.find_helm()
    (tmp_path / "helm").write_text("#!/bin/sh\necho unreleased\n")
    (tmp_path / "helm").chmod(0o755)
    with pytest.raises(Exception, match="version"):
        helm.render(tmp_path, "x", {})


@pytest.mark.parametrize("content", ["", "- a\n", "a: [", None])
def test_values_that_cannot_be_read_are_reported_in_one_line(laptop: Laptop, content: str | None) -> None:
    laptop.chart()
    (laptop.folder / "values.yaml").unlink()
    if content is not None:
        (laptop.folder / "values.yaml").write_text(content)
    status, out, err = laptop.run()
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith("values.yaml")
    assert not laptop.workspace.exists()


BOMB = "\n".join(["l0: &l0 {x: 1}", *(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]" for n in range(1, 11))])
DEEP = "\n".join(["l0: &l0 {x: 1}", *(f"l{n}: &l{n} [*l{n - 1}]" for n in range(1, 2000))])


@pytest.mark.parametrize(
    ("content", "where", "what"),
    [
        (BOMB, "6:5", "more than 100,000 keys and values, with aliases expanded. Use "),
        (BOMB.replace("[", "{<<: [").replace("]", "]}"), "6:14", "more than 100,000 keys and values"),
        (DEEP, "50:6", "more than 50 levels deep, with aliases expanded. Use "),
        ("global: &g\n  a: *g\n", "2:6", "an alias inside its own anchor. Write "),
        ("a: &g {<<: [*g]}\n", "1:13", "an alias inside its own anchor. Write "),
    ],
)
def test_aliases_without_end_are_refused_in_one_line(tmp_path: Path, content: str, where: str, what: str) -> None:
    (line,) = errors_with_our_chart(tmp_path, content)
    assert line.startswith(f"my file.yaml:{where}: {what}")


def test_values_may_have_aliases_as_helm_allows_them() -> None:
    from genvalues.ops.local.local_values import parsed_values

    text = "a: &a {x: 1}\nb: *a\nc: {<<: *a, z: on}\nd: [*a, *a]\n"
    block = {"x": 1}
    assert parsed_values(text, "f.yaml") == {"a": block, "b": block, "c": {"x": 1, "z": True}, "d": [block, block]}


def errors_with_our_chart(folder: Path, text: str, *more: str) -> list[str]:
    """The error lines for a file that cannot run with the chart of this repository."""
    (folder / "my file.yaml").write_text(text)
    done = genvalues("local", "my file.yaml", "--workspace", "w", *more, cwd=folder)
    assert (done.returncode, done.stdout, (folder / "w").exists()) == (2, "", False), done.stderr
    return done.stderr.splitlines()


@pytest.mark.parametrize("arguments", [[], ["--cpu"], ["--set", "training.maxSteps=2"]])
@pytest.mark.parametrize(
    ("wrong", "where"),
    [("nodez: 3\n", "my file.yaml:5:1 nodez: "), ("lora: {r: two}\n", "my file.yaml:5:8 lora.r: ")],
)
def test_an_error_in_an_inputs_file_is_reported_as_check_reports_it(
    tmp_path: Path, wrong: str, where: str, arguments: list[str]
) -> None:
    text = f"model: gpt2\ndataset: {{source: a/b}}\ninstance: cpu\ncpu: {{processes: 2}}\n{wrong}"
    (line,) = errors_with_our_chart(tmp_path, text, *arguments)
    assert line.startswith(where)


def test_inputs_options_are_refused_for_a_values_file_and_a_bundle(laptop: Laptop) -> None:
    values = (ROOT / "values" / "cpu.values.yaml").read_text()
    (line,) = errors_with_our_chart(laptop.folder, values, "--set", "lora.r=8")
    assert "values file of the chart, not an inputs file" in line
    (laptop.folder / "b.tar.gz").touch()
    done = genvalues("local", "b.tar.gz", "--workspace", "w", "--set", "lora.r=8", cwd=laptop.folder)
    assert done.returncode == 2
    assert done.stderr.startswith("b.tar.gz: ") and "--set" in done.stderr


def test_an_inputs_file_gives_the_values_that_write_gives(tmp_path: Path) -> None:
    from genvalues.inputs.input_options import Sources
    from genvalues.ops.local.local_values import read_values, values_to_run

    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "f.yaml").write_text("model: gpt2\ndataset: {source: rows.jsonl, format: text}\ninstance: cpu\n")
    (tmp_path / "over.yaml").write_text("lora: {r: 4}\n")
    written = genvalues("write", "f.yaml", "-f", "over.yaml", "--set", "name=mine", cwd=tmp_path)
    assert written.returncode == 0, written.stderr
    sources = Sources((tmp_path / "f.yaml", tmp_path / "over.yaml"), ("name=mine",))
    found = values_to_run(sources, ROOT / "chart", on_cpu=False)
    assert found == read_values(tmp_path / "values.yaml") and found["lora"]["r"] == 4


def test_what_the_charts_schema_refuses_is_reported_line_by_line_with_the_files_name(tmp_path: Path) -> None:
    values = (ROOT / "values" / "cpu.values.yaml").read_text()
    wrong = values.replace("mode: attached", "mode: sideways").replace("maxCost: null", "maxKost: 3")
    first, second = errors_with_our_chart(tmp_path, wrong)
    assert first.startswith("my file.yaml: pipeline.mode: ") and "sideways" in first and "attached" in first
    assert second.startswith("my file.yaml: guards.maxKost: ")


@pytest.mark.parametrize(
    ("values", "where"),
    [
        ("lora: {r: PASTED}", 'lora.r: must be an integer, not "hf_..."'),
        (
            "stages: {train: {extraEnv: {HF_TOKEN: [PASTED]}}}",
            "stages.train.extraEnv.HF_TOKEN: must be a string, a number or true or false, not the value",
        ),
        (f"lora: {{r: {'long ' * 10}PASTED}}", "lora.r: must be an integer, not"),
        ("PASTED: 1", "hf_...: unknown key"),
    ],
)
def test_a_token_in_a_values_file_is_not_repeated(tmp_path: Path, values: str, where: str) -> None:
    (line,) = errors_with_our_chart(tmp_path, f"backend: native\n{values.replace('PASTED', TOKEN)}\n")
    assert line.startswith(f"my file.yaml: {where}") and "qwerty" not in line.lower()


def test_a_token_in_an_error_of_helm_is_not_repeated(laptop: Laptop) -> None:
    laptop.chart(raw=f'{{{{ fail "{TOKEN} is not the name of a Secret" }}}}')
    status, _, err = laptop.run()
    assert status == 2 and "hf_... is not the name of a Secret" in err and "qwerty" not in err.lower()


def test_a_final_line_break_is_refused_in_a_key_and_a_value_as_helm_refuses_it(tmp_path: Path) -> None:
    values = 'backend: native\nimage: {tag: "v1\\n"}\ncommonLabels: {"a\\n": b, c: d}\n'
    tag, label = sorted(errors_with_our_chart(tmp_path, values), reverse=True)
    assert tag.startswith(r"my file.yaml: image.tag: 'v1\n' does not match '^([A-Z") and ")?$'" in tag
    assert (
        label.startswith(r"my file.yaml: commonLabels: 'a\n' does not match any of the regexes: ")
        and "\\Z" not in label
    )


def test_a_workspace_that_is_a_file_is_reported(laptop: Laptop) -> None:
    laptop.chart(job("one", 1, "true"))
    laptop.workspace.write_text("")
    status, out, err = laptop.run()
    assert (status, out) == (2, "")
    assert err.startswith("--workspace workspace: cannot be used: Not a directory. ")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (b"caf\xe9", "caf?: its path is not UTF-8."),
        (b"a::b", "a::b: its path contains ::, which the library datasets cannot open."),
    ],
)
def test_a_workspace_whose_path_the_stages_cannot_open_is_reported(laptop: Laptop, name: bytes, said: str) -> None:
    laptop.chart(job("one", 1, "true"))
    laptop.workspace = laptop.folder / os.fsdecode(name)
    status, out, err = laptop.run()
    assert (status, out) == (2, "") and not laptop.workspace.exists()
    assert err == f"--workspace {said} Use a folder with another name.\n"


def test_progress_bars_and_broken_bytes_become_lines(tmp_path: Path) -> None:
    lines: list[str] = []
    script = r"printf ' 10%%\r 50%%\r100%%\nbroken \377 byte\r\nno newline'"
    command = Command("x", ("sh", "-c", script), dict(os.environ), tmp_path)
    assert run_together([command], lambda name, line: lines.append(line)) == 0
    assert lines == ["100%", "broken \ufffd byte", "no newline"]


def test_only_whole_mounted_paths_are_replaced_and_the_longest_wins() -> None:
    folders = {"/w": Path("/a"), "/w/b": Path("/c")}
    assert with_local_paths("/w/b/x /w/bb -o=/w, x/w /ww '/w'", folders) == "/c/x /a/bb -o=/a, x/w /ww '/a'"


@pytest.mark.parametrize("workload", ["pytorchjob", "trainjob"])
def test_the_trainers_own_stages_are_what_a_rendered_chart_runs(workload: str) -> None:
    """Each stage of this repository's chart that runs here runs a command of the trainer, with the run config."""
    from genvalues.common import helm
    from genvalues.ops.local.chart_stages import skipped_stages, stages_to_run
    from genvalues.ops.local.containers import Machine

    root = Path(__file__).parents[3]
    values = yaml.safe_load((root / "values/cpu.values.yaml").read_text())
    more = {"publish": {"s3": {"uri": "s3://bucket/a"}}, "workload": workload}
    objects = helm.render(root / "chart", "x", {**values, **more})
    assert set(skipped_stages(objects)) == {"preflight", "storage-prepare", "compile-gate", "train-gate"}
    with tempfile.TemporaryDirectory() as folder:
        machine = Machine(Path(folder), objects)
        stages = [machine.stage(item) for item in stages_to_run(objects)]
        names = ["tokenize", "compile", "train", "consolidate", "merge", "evaluate", "publish"]
        assert [stage.name for stage in stages] == names
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
            rendezvous = command.environment.get("PET_RDZV_ENDPOINT", "")
            assert rendezvous.startswith("localhost:") is (each.name in ("compile", "train")), "of no cluster"
            assert "LLAMA_LORA_IMAGE" not in command.environment, "no process of this computer runs the image"
            assert command.grace == (120 if each.name in ("compile", "train") else GRACE)
            assert command.environment["HOME"].startswith(f"{folder}/.local/tmp/tmp"), "one HF_HOME for all"
        assert json.loads(json.dumps(yaml.safe_load(Path(config).read_text())))["backend"] == "native"


UPDATES = "; ".join(
    f"printf '{MARK}%s\\n' '"
    + json.dumps({"unit": "step", "done": done, "total": 3, "log": done == 2})
    + "' >&2; sleep 0.4"
    for done in (1, 2, 3)
)


def on_a_terminal(laptop: Laptop) -> str:
    """What genvalues local shows on a terminal."""
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "genvalues.cli", "local", "values.yaml", "--workspace", "w", "--chart", "chart"]
    with subprocess.Popen(command, cwd=laptop.folder, stdin=follower, stdout=follower, stderr=follower) as process:
        os.close(follower)
        shown = b""
        with suppress(OSError):  # EIO: the process has ended
            while piece := os.read(leader, 65536):
                shown += piece
        os.close(leader)
    assert process.returncode == 0, shown
    return shown.decode()


def test_on_a_terminal_a_stages_progress_is_one_bar_and_its_lines_stand_above(laptop: Laptop) -> None:
    manifest = 'train: manifest {"stage":"train"}'
    laptop.chart(job("train", 1, f"{UPDATES}; echo all lines; echo '{manifest}'"))
    shown = on_a_terminal(laptop)
    assert "━" in shown and "2/3" in shown and "all lines" in shown
    assert MARK not in shown and "manifest {" not in shown
    log = (laptop.folder / "w/.local/logs/train.log").read_text()
    assert log == f"step 2/3\nall lines\n{manifest}\n"


def test_in_a_log_a_stage_writes_its_own_progress_and_its_manifest_is_not_shown(laptop: Laptop) -> None:
    laptop.chart(job("train", 1, f'echo "relay ${{{RELAY}:-none}}"; echo \'train: manifest {{"stage":"train"}}\''))
    status, out, err = laptop.run(**{RELAY: "1"})
    assert (status, err) == (0, "")
    assert "relay none\n" in out and "manifest" not in out


def test_a_run_ends_with_the_report_the_model_and_a_command_that_tries_it(laptop: Laptop) -> None:
    make = "mkdir -p /workspace/runs/r/merged /workspace/runs/r/adapter; touch /workspace/runs/r/report.html"
    laptop.chart(job("all", 1, make), config="name: r\n")
    status, _, err = laptop.run()
    assert status == 0
    assert err.splitlines()[0] == "Next:"
    assert all(f"workspace/runs/r/{name}" in err for name in ("report.html", "merged", "adapter"))
    assert "from transformers import pipeline" in err
