"""`helm test`: one pod that verifies the merged model, for the outer and the inner release."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from chart.manifests import CHART, MINIMAL, Object, annotation, config, hooks, merged, pod, render, run_helm
from genvalues.ops.local.chart_stages import is_pipeline_hook


def test_helm_test_runs_one_pod_that_nothing_else_runs(objects: list[Object]) -> None:
    [verify] = [item for item in objects if "test" in hooks(item)]
    assert annotation(verify, "llama-lora/stage") == "verify"
    assert hooks(verify) == {"test"}
    assert verify["kind"] == "Pod", "`helm test --logs` shows those of pods alone, and fails over a Job"
    assert annotation(verify, "helm.sh/hook-delete-policy") == "before-hook-creation", "its log is read afterwards"
    assert annotation(verify, "helm.sh/hook-output-log-policy") == "hook-failed"
    assert verify["spec"]["restartPolicy"] == "Never", "Helm waits for a pod that restarts until its --timeout"
    assert not is_pipeline_hook(verify), "`genvalues local` would run it"


def test_it_is_read_only(objects: list[Object]) -> None:
    verify = pod(objects, "verify")
    mounts = {mount["name"]: mount for mount in verify.containers[0]["volumeMounts"]}
    assert mounts["workspace"]["readOnly"] is True
    assert mounts["config"]["readOnly"] is True
    assert verify.spec["automountServiceAccountToken"] is False
    read_only = [each for each in objects if each["kind"] == "Job" and "'name': 'workspace', 'readOnly'" in str(each)]
    assert not read_only, "the stages write"


def test_outer_and_inner_release_test_the_same_run_on_the_same_volume(helm: int) -> None:
    detached = merged(MINIMAL, {"pipeline": {"mode": "detached"}})
    outer = render(detached, helm=helm)
    inner = render(config(outer, "values.yaml"), helm=helm, release="llama-run")
    attached = render(MINIMAL, helm=helm)
    for objects, name in [(outer, "llama"), (inner, "llama-run"), (attached, "llama")]:
        verify = pod(objects, "verify")
        assert verify.owner["metadata"]["name"] == f"{name}-verify"
        volumes = {volume["name"]: volume for volume in verify.spec["volumes"]}
        [mounted] = [item for item in objects if item["kind"] == "ConfigMap"]
        assert volumes["config"]["configMap"]["name"] == mounted["metadata"]["name"]
        assert volumes["workspace"]["persistentVolumeClaim"]["claimName"] == "llama-workspace"
        assert config(objects, "run.yaml") == config(attached, "run.yaml")
        assert verify.containers[0]["command"] == pod(attached, "verify").containers[0]["command"]


def test_user_annotations_do_not_disable_it(helm: int) -> None:
    annotations = {"helm.sh/hook": "post-install", "llama-lora/stage": "merge", "note": "kept"}
    verify = pod(render(merged(MINIMAL, {"stages": {"verify": {"podAnnotations": annotations}}}), helm=helm), "verify")
    assert hooks(verify.owner) == {"test"}
    assert annotation(verify.owner, "note") == "kept"


def test_the_package_contains_and_renders_it(helm: int, tmp_path: Path) -> None:
    done = run_helm(helm, "package", CHART, "--destination", tmp_path)
    assert done.returncode == 0, done.stderr
    [package] = tmp_path.glob("llama-lora-*.tgz")
    with tarfile.open(package) as files:
        assert "llama-lora/templates/tests/verify.yaml" in files.getnames()
    assert pod(render(MINIMAL, helm=helm, chart=package), "verify")


def test_its_command_exists_in_the_trainer() -> None:
    cli = pytest.importorskip("llama_lora.cli", reason="a plain `pip install .` has no trainer")
    command = pod(render(MINIMAL), "verify").containers[0]["command"]
    assert command[0] == "llama-lora"
    _, verify, rest = cli.main.resolve_command(None, command[1:])
    assert verify.make_context("verify", rest).params["name"] == "merge"
