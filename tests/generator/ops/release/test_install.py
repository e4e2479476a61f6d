"""genvalues install, with a stand-in for Helm and a fake API server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from generator.cluster.fake_api import FakeApi
from generator.cluster.objects import content_of, helm_record, job, pytorch_job
from generator.cluster.waiting import PATIENCE, until
from generator.ops.release.fake_helm import PYTHON, FakeHelm
from genvalues import cli

ROOT = Path(__file__).parents[4]
ON_CPU = "name: demo\nmodel: gpt2\ndataset: {source: a/b}\ninstance: cpu\n"
ON_TRAINIUM = "name: demo\nmodel: gpt2\ndataset: {source: a/b}\ninstance: trn1.32xlarge\nimage: i:1\n"
RECORD = "sh.helm.release.v1.demo.v1"


@pytest.fixture(autouse=True)
def inputs(here: None) -> None:
    Path("f.yaml").write_text(ON_CPU)


def genvalues(*arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["genvalues", *arguments])
        cli.main()
    return int(ended.value.code or 0)


def install(*arguments: str) -> int:
    """Without preflight and following, which test_following_install tests."""
    return genvalues("install", "f.yaml", "--no-follow", "--skip-preflight", *arguments)


@pytest.mark.parametrize(
    ("inputs", "sets", "timeout"),
    [
        (ON_CPU, [], "48h"),
        (ON_CPU, ["--set", "mode=detached"], "15m"),
        (ON_TRAINIUM, [], "15m"),
        (ON_TRAINIUM, ["--set", "chartValues.pipeline.mode=attached"], "48h"),
    ],
)
def test_helm_gets_the_values_of_write_and_the_timeout_of_the_mode(
    fake: FakeApi, helm: FakeHelm, inputs: str, sets: list[str], timeout: str
) -> None:
    Path("f.yaml").write_text(inputs)
    assert install(*sets, "-n", "team-a") == 0
    values = Path(helm.asked[5])
    start = ["upgrade", "--install", "demo", str(ROOT / "chart"), "-f", str(values)]
    assert helm.asked == [*start, "--namespace", "team-a", "--timeout", timeout]
    assert not values.exists(), "it was a temporary file"
    assert genvalues("write", "f.yaml", *sets) == 0
    assert (helm.folder / "values.yaml").read_text() == Path("values.yaml").read_text()


def test_release_and_chart_are_those_of_the_command_line(fake: FakeApi, helm: FakeHelm) -> None:
    Path("ours").symlink_to(ROOT / "chart")
    assert install("--release", "other.one", "--chart", "ours", "-n", "x") == 0
    assert helm.asked[2:4] == ["other.one", str(ROOT / "chart")], "Helm could take a relative path for a repository"


def test_requests_go_to_the_cluster_and_namespace_that_helm_uses(
    fake: FakeApi, helm: FakeHelm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kubeconfig = json.loads((tmp_path / "kubeconfig").read_text())
    (there,) = kubeconfig["contexts"]
    kubeconfig["contexts"] = [
        {"name": "fake", "context": {**there["context"], "namespace": "of-the-context"}},
        {"name": "away", "context": {**there["context"], "cluster": "away"}},
    ]
    kubeconfig["clusters"].append({"name": "away", "cluster": {"server": "http://127.0.0.1:1"}})
    kubeconfig["current-context"] = "away"
    (tmp_path / "kubeconfig").write_text(json.dumps(kubeconfig))
    assert install("--kube-context", "fake") == 0
    assert helm.asked[6:10] == ["--namespace", "of-the-context", "--kube-context", "fake"]
    assert fake.paths == ["/api/v1/namespaces/of-the-context/secrets"]
    monkeypatch.setenv("HELM_KUBECONTEXT", "fake")  # Helm's own variables
    monkeypatch.setenv("HELM_NAMESPACE", "of-the-environment")
    assert install() == 0
    assert helm.asked[6:10] == ["--namespace", "of-the-environment", "--kube-context", "fake"]
    assert fake.paths[1:] == ["/api/v1/namespaces/of-the-environment/secrets"]


@pytest.mark.parametrize(("of_helm", "ours"), [(1, 1), (2, 1), (127, 1)])
def test_helms_output_is_shown_if_it_fails_and_its_failure_is_status_1(
    fake: FakeApi, helm: FakeHelm, capfd: pytest.CaptureFixture[str], of_helm: int, ours: int
) -> None:
    helm.ends_with(of_helm)
    assert install("-n", "x") == ours
    out, err = capfd.readouterr()
    told, *of_stderr_and_stdout = err.splitlines()
    assert out == ""
    assert "Running: helm upgrade --install demo " in told.splitlines()[0]
    assert of_stderr_and_stdout == ["Error:", "NOTES"]


def test_helms_errors_are_shown_without_the_secrets_in_them(
    fake: FakeApi, helm: FakeHelm, capfd: pytest.CaptureFixture[str]
) -> None:
    helm.ends_with(1)
    helm.says(' cannot pull https://me:pass-w0rd@h/x of arn:aws:iam::123456789012:role/r\npassword: "s3cr3t"\nends')
    assert install("-n", "x") == 1
    err = capfd.readouterr().err
    assert "Error: cannot pull https://(redacted)@h/x of arn:aws:iam::123456789012:role/r\n" in err
    assert "pass-w0rd" not in err and "s3cr3t" not in err and "\nends" in err


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("attached", "genvalues status demo --namespace x"),
        ("detached", "genvalues status demo --watch --namespace x"),
    ],
)
def test_helms_notes_are_not_shown_and_the_next_command_is(
    fake: FakeApi, helm: FakeHelm, capfd: pytest.CaptureFixture[str], mode: str, said: str
) -> None:
    assert install("--set", f"mode={mode}", "-n", "x") == 0
    out, err = capfd.readouterr()
    _, of_stderr, last = err.splitlines()
    assert (out, of_stderr) == ("", "Error:"), "what Helm warns about on stderr comes through"
    assert last.endswith(said)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "nodes=none"], "--set nodes=none: must be an integer"),
        (["--release", "A_"], '--release: "A_" is not a valid release name. Set --release to at most 53 char'),
        (["--release", ""], '--release: "" is not a valid release name. Set --release to at most 53 char'),
        (["--release", "x" * 54], "is not a valid release name. Set --release to at most 53 char"),
        (
            ["--set", "mode=detached", "--release", "x" * 50],
            "is not a valid release name. Set --release to at most 49 char",
        ),
        (
            ["--set", "chartValues.name=A_b"],
            'f.yaml: name: "A_b" is not a valid release name. Set --release to at most',
        ),
        (["--chart", "nowhere"], "--chart nowhere: not a chart: Chart.yaml not found"),
    ],
)
def test_an_invalid_argument_is_one_line_before_any_request(
    fake: FakeApi, helm: FakeHelm, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert install(*arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not fake.paths and not helm.asked


def test_a_missing_chart_helm_or_cluster_is_one_line_with_its_fix(
    helm: FakeHelm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def told() -> str:
        assert install() == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert told().startswith("no usable kubeconfig: ") and not helm.asked
    monkeypatch.setenv("KUBECONFIG", "bad")
    for text in ("[", "- a", "a", "contexts: 3\ncurrent-context: a", "current-context: a"):
        Path("bad").write_text(text)
        assert told().startswith("no usable kubeconfig: ")
    with monkeypatch.context() as without:
        without.setattr("genvalues.inputs.chart.BESIDE_THE_SOURCES", Path("nowhere"))
        assert told().startswith("no chart found.") and "--chart DIR" in told()
    (helm.folder / "helm").unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert told().startswith("helm not found. Run `make setup`, or install Helm")


def test_a_helm_that_cannot_be_run_is_one_line(
    fake: FakeApi, helm: FakeHelm, capsys: pytest.CaptureFixture[str]
) -> None:
    (helm.folder / "helm").write_text("of another machine")
    assert install("-n", "x") == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"{helm.folder}/helm cannot be run: Exec format error. ")


def test_a_cluster_that_does_not_answer_is_one_line_and_status_1(
    fake: FakeApi, helm: FakeHelm, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.away = True
    assert install("-n", "x") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("the API server does not answer: ") and line.endswith(". Try: kubectl cluster-info")
    assert not helm.asked


def test_a_missing_right_is_one_line(fake: FakeApi, helm: FakeHelm, capsys: pytest.CaptureFixture[str]) -> None:
    fake.forbidden.add(("list", "secrets"))
    assert install("-n", "x") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("namespace x: ") and 'cannot list resource "secrets"' in line and "--kube-context" in line


def test_jobs_of_a_release_that_is_not_pending_are_not_changed(fake: FakeApi, helm: FakeHelm) -> None:
    """A client that a signal stopped leaves a failed release and a running Job, which Helm replaces."""
    fake.add("secrets", helm_record("failed"))
    fake.add("secrets", helm_record("pending-upgrade", release="other"))
    fake.add("jobs", job("demo-train-gate", "train-gate"))
    before = dict(fake.objects)
    assert install("-n", "x") == 0
    assert fake.objects == before
    assert fake.requests == [("list", "secrets")]


def test_a_pending_release_is_taken_over_before_helm_runs(
    fake: FakeApi, helm: FakeHelm, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add("secrets", helm_record("pending-install"))
    fake.add("jobs", job("demo-train-gate", "train-gate"))
    fake.add("pytorchjobs", pytorch_job("demo-train-1", fingerprint="f0"))
    before = fake.get("pytorchjobs", "demo-train-1")
    asked_then: list[list[str]] = []

    def gate_ends(gate: dict[str, Any]) -> None:
        asked_then.append(helm.asked)
        fake.set_condition("jobs", gate["metadata"]["name"], "Failed", reason="DeadlineExceeded")

    fake.after.append(("patch", "jobs", gate_ends))
    too_late = threading.Timer(PATIENCE, fake.set_condition, ("jobs", "demo-train-gate", "Complete"))
    too_late.start()
    fake.after.append(("update", "secrets", lambda record: asked_then.append(helm.asked)))
    assert install("-n", "x") == 0
    too_late.cancel()
    assert asked_then == [[], []] and helm.asked[2] == "demo"
    assert fake.get("pytorchjobs", "demo-train-1") == before
    assert content_of(fake.objects["secrets", RECORD])["info"]["status"] == "failed"
    assert [line.split()[0] for line in capsys.readouterr().err.splitlines()] == [
        "stopping",  # the gate
        "waiting",
        "demo",  # is pending-install
        "No",
        "Error:",  # of the stand-in, which always says so
        "demo:",  # done
    ]


def test_another_active_helm_client_is_one_line_and_helm_is_not_run(
    fake: FakeApi, helm: FakeHelm, capsys: pytest.CaptureFixture[str]
) -> None:
    record = fake.add("secrets", helm_record("pending-install"))
    fake.add("jobs", job("demo-train-gate", "train-gate"))

    def its_client_ends(gate: dict[str, Any]) -> None:
        fake.set_condition("jobs", gate["metadata"]["name"], "Failed", reason="DeadlineExceeded")
        fake.merge("secrets", record["metadata"]["name"], {"metadata": {"labels": {"status": "failed"}}})

    fake.after.append(("patch", "jobs", its_client_ends))
    assert install("-n", "x") == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("another Helm client is working on release demo. Wait ")
    assert not helm.asked


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_stops_helm_and_is_one_line(fake: FakeApi, helm: FakeHelm, number: int, status: int) -> None:
    (helm.folder / "sleep").touch()
    code = f"import sys; sys.executable = {sys.executable!r}; from genvalues.cli import main; main()"
    command = [PYTHON, "-c", code, "install", "f.yaml", "-n", "x", "--no-follow", "--skip-preflight"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            until(lambda: helm.asked)
            os.kill(process.pid, number)  # to genvalues only; Ctrl-C in a terminal goes to Helm, too
            _, err = process.communicate(timeout=PATIENCE)
        finally:
            (helm.folder / "sleep").unlink()
    assert process.returncode == status
    assert (helm.folder / "stopped").exists()
    _, of_helm, told = err.splitlines()
    assert of_helm == "Error:"
    assert told.startswith("warning: Stopped. ") and "the same command" in told
    assert not Path(helm.asked[5]).exists()


def test_install_is_listed_and_imports_no_kubernetes_client_before_its_inputs_are_valid() -> None:
    code = (
        "import sys; from genvalues.cli import main; sys.argv = ['genvalues', *sys.argv[1:]]\n"
        "try: main()\nfinally: print('imported:', 'kubernetes' in sys.modules)"
    )
    Path("f.yaml").write_text("model: 3")
    done = subprocess.run([PYTHON, "-c", code, "install", "f.yaml"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "imported: False\n")
    done = subprocess.run([PYTHON, "-c", code, "--help"], capture_output=True, text=True, check=False)
    assert "\n  install " in done.stdout


def test_a_null_of_chart_values_is_the_charts_default(
    fake: FakeApi, helm: FakeHelm, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("f.yaml").write_text(ON_TRAINIUM)
    assert install("--set", "chartValues.pipeline=null", "-n", "team-a") == 0
    assert helm.asked[helm.asked.index("--timeout") + 1] == "48h", "attached"
    assert install("--set", "chartValues.name=null") == 2
    assert "f.yaml: name" in capsys.readouterr().err
