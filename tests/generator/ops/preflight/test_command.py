"""genvalues preflight: its output, its exit status, and which checks it makes."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from genvalues.commands.preflight import preflight
from genvalues.common.findings import Finding, as_json, exit_status, show
from genvalues.inputs.input_options import Sources
from genvalues.inputs.write import checked
from genvalues.ops.preflight import run as module

INPUTS = """\
model: meta-llama/Meta-Llama-3.1-8B
dataset: {source: databricks/databricks-dolly-15k}
instance: ml.trn1.32xlarge
image: 123456789012.dkr.ecr.us-west-2.amazonaws.com/llama-lora:0.1.0
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "finetune.yaml"
    path.write_text(INPUTS)
    return path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(preflight, [*arguments], catch_exceptions=False)


OK = Finding("ok", "a", "b")
ERROR = Finding("error", "c", "d", "e f")
AWAY = Finding("not checked", "g", "h", "i", unanswered=True)
UNSEEN = Finding("not checked", "j", "k", "l")


@pytest.mark.parametrize(
    ("findings", "status"),
    [
        ([], 0),
        ([OK, UNSEEN, Finding("warning", "m", "n", "o")], 0),
        ([OK, AWAY], 1),
        ([AWAY, ERROR], 2),
        ([ERROR], 2),
    ],
)
def test_the_exit_status(findings: list[Finding], status: int) -> None:
    assert exit_status(findings) == status
    assert as_json(findings)["exitStatus"] == status


def test_findings_are_printed_as_in_the_stage(capsys: pytest.CaptureFixture[str]) -> None:
    show([OK, ERROR, UNSEEN])
    assert capsys.readouterr().out.splitlines() == [
        "ok           a: b",
        "error        c: d",
        "             fix: e f",
        "not checked  j: k",
        "             fix: l",
        "1 of 3 findings stop this release; the fixes are above",
    ]


def test_without_a_flag_everything_is_checked_and_with_flags_only_those(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(module, "run_preflight", lambda checked, **options: asked.append(options) or [ERROR])
    for flags in ([], ["--aws"], ["--cluster"], ["--aws", "--cluster"]):
        assert run(str(file), *flags).exit_code == 2
    assert [[one[key] for key in ("aws", "cluster", "hub")] for one in asked] == [
        [True, True, True],
        [True, False, False],
        [False, True, False],
        [True, True, False],
    ]
    run(str(file), "--offline", "--region", "x", "-n", "y", "--kube-context", "z", "--release", "r")
    assert [asked[-1][key] for key in ("offline", "region", "namespace", "context", "release")] == [True, *"xyzr"]


def test_a_container_of_aws_is_an_error_offline(file: Path) -> None:
    container = "763104351884.dkr.ecr.us-west-2.amazonaws.com/pytorch-training-neuronx:2.9.0"
    file.write_text(re.sub(r"(?m)^image: .*$", f"image: {container}", file.read_text()))
    result = run(str(file), "--offline")
    assert result.exit_code == 2
    assert [line.split(":")[0] for line in result.stdout.splitlines() if line.startswith("error")] == [
        "error        image pytorch-training-neuronx"
    ]


def test_offline_is_a_finding_for_every_check(file: Path) -> None:
    result = run(str(file), "--offline")
    lines = result.stdout.splitlines()
    assert result.exit_code == 0
    assert "ok           size of the file system: 1200Gi, created on demand in about 10 minutes" in lines
    unasked = [line for line in lines if line.startswith("not checked")]
    assert len(unasked) == len(lines) - 1 == 17 and all(line.endswith(": --offline") for line in unasked)


def test_json_is_one_document(file: Path) -> None:
    result = run(str(file), "--offline", "--json")
    document = json.loads(result.stdout)
    assert set(document) == {"findings", "exitStatus"} and document["exitStatus"] == result.exit_code == 0
    assert document["findings"][0] == {
        "level": "not checked",
        "subject": "AWS credentials",
        "found": "--offline",
        "fix": "",
        "unanswered": False,
    }


def test_all_checks_without_credentials_hub_and_kubeconfig(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The findings are in the order AWS, Hub, cluster."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    findings = module.run_preflight(checked(Sources((file,))))
    assert [finding.subject.partition(" ")[0] for finding in findings] == [
        *("AWS", "AWS", "size", "model", "dataset", "cluster")
    ]
    assert exit_status(findings) == 1


def test_a_fix_can_be_pasted_whatever_the_name_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "my file.yaml"
    path.write_text(INPUTS)
    found, *_ = module.run_preflight(checked(Sources((path,))), hub=False, cluster=False, region="x")
    assert shlex.split(found.fix, comments=True)[:3] == ["genvalues", "preflight", str(path)]


CPU = "model: {path: %s}\ndataset: {source: %s, format: text}\ninstance: cpu\n"
MOUNTED = "chartValues: {stages: {tokenize: {extraVolumeMounts: {more: {mountPath: /data}}}}}\n"


@pytest.mark.parametrize(
    ("inputs", "unseen"),
    [
        (CPU % (".", "rows.jsonl"), ["model.path", "dataset.source"]),
        (CPU % ("/workspace/m", "rows.jsonl"), ["dataset.source"]),
        (CPU % (".", "/workspace/rows.jsonl"), ["model.path"]),
        (CPU % ("/workspace/m", "/workspace/rows.jsonl"), []),
        (CPU % ("/workspace/../m", "/workspace/rows.jsonl") + MOUNTED, ["model.path"]),
        (CPU % ("/data/m", "/data/sub/rows.jsonl") + MOUNTED, []),
        (CPU % ("/workspace/m", "/v/x.txt") + "chartValues: {workspace: {mountPath: /v}}\n", ["model.path"]),
        (CPU % ("/workspace/m", "s3://our-bucket/x.txt"), []),
        (CPU % ("/workspace/m", "a/b") + "chartValues: {dataset: {source: /home/me/x.jsonl}}\n", ["dataset.source"]),
        ("model: gpt2\ndataset: {source: a/b}\ninstance: cpu\n", []),
    ],
)
def test_a_file_that_no_pod_can_read_is_an_error_even_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inputs: str, unseen: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"text": "a"}\n' * 8)
    Path("cpu.yaml").write_text(inputs)
    for alone in ([], ["--cluster"]):
        result = run("cpu.yaml", "--offline", "--json", *alone)
        errors = [one for one in json.loads(result.stdout)["findings"] if one["level"] == "error"]
        assert [one["subject"] for one in errors] == unseen
        assert result.exit_code == (2 if unseen else 0)
    for one in errors:
        assert "volume" in one["found"]
        command = " ".join(shlex.split(one["fix"], comments=True))
        assert command.startswith("genvalues write cpu.yaml -o values.yaml && genvalues local values.yaml --workspace")


def test_a_mistake_in_the_inputs_comes_first(file: Path) -> None:
    file.write_text(INPUTS.replace("model:", "modle:"))
    done = subprocess.run(
        [sys.executable, "-m", "genvalues.cli", "preflight", str(file)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "modle" in done.stderr and "Traceback" not in done.stderr and not done.stdout


def test_help_imports_neither_boto3_nor_the_kubernetes_client() -> None:
    program = (
        "import sys; sys.argv = ['genvalues', 'preflight', '--help']\n"
        "from genvalues.cli import main\n"
        "try: main()\nfinally: print('imported:', *({'boto3', 'botocore', 'kubernetes', 'pyhelm3'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "imported:"
