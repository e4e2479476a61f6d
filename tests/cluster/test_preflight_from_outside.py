"""genvalues preflight reports before an install, from outside, what the chart's preflight reports in its pod."""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from chart.manifests import Values, merged
from cluster.space import CLAIM, EFA, NEURON, Ended, Space, run
from cluster.test_preflight import PROMISED_SECONDS, STOPS, TOKEN, lines, look
from genvalues.cluster.preflight import DRIVER
from genvalues.common.findings import Finding

OK_DEVICES = [
    f"ok {NEURON}: 1 on each of 1 nodes of type ml.trn1.32xlarge",
    f"ok {EFA}: 1 on each of 1 nodes of type ml.trn1.32xlarge",
]
MANAGED: Values = {
    "storage": {
        "existingClaim": "",
        "kind": "generic",
        "size": "1Gi",
        "storageClass": "",
        "accessModes": ["ReadWriteMany"],
    }
}


def test_before_the_first_install_a_claim_that_install_creates_is_ok(new_space: Callable[..., Space]) -> None:
    space = new_space("baseline")
    space.kubectl("create", "secret", "generic", "hf-token", "--from-literal=token=x")
    values = merged(STOPS, TOKEN, MANAGED, {"storage": {"prepare": {"enabled": True}}})
    first = [
        "ok training operator: installed, and reconciles PyTorchJobs",
        "ok claim llama-workspace: does not exist yet: install creates it",
        "ok storage class: folder, the default",
        f"ok namespace {space.name}: enforces Pod Security baseline, which allows storage-prepare to run as root",
        "ok secret hf-token: has key token",
        *OK_DEVICES,
    ]
    assert lines(look(space.name, values)) == first
    named = merged(values, {"storage": {"storageClass": "none-of-this-name"}})
    [error] = [finding for finding in look(space.name, named) if finding.level == "error"]
    assert error.subject == "storage class none-of-this-name"
    space.release().install(values, status=1)
    after = lines(look(space.name, values))
    assert "ok claim llama-workspace: Bound 1Gi" in after and set(first) - set(after) == {first[1], first[2]}


def test_a_missing_namespace_is_an_error_and_is_not_created(space: Space) -> None:
    name = f"missing-{secrets.token_hex(3)}"
    findings = {finding.subject: finding for finding in look(name, merged(STOPS, TOKEN, MANAGED))}
    assert (findings[f"namespace {name}"].level, findings[f"namespace {name}"].fix) == (
        "error",
        f"kubectl create namespace {name}",
    )
    assert findings["secret hf-token"].fix == (
        f"kubectl -n {name} create secret generic hf-token --from-file=token=/dev/stdin"
    )
    assert findings["training operator"].level == "not checked" and findings[NEURON].level == "ok"
    assert run(["kubectl", "get", "namespace", name]).status != 0


def test_for_a_user_without_permissions_nothing_is_checked_and_the_permissions_are_named(
    space: Space, tmp_path: Path
) -> None:
    space.volume.create()
    findings = as_user_without_permissions(space, tmp_path, lambda: look(space.name, merged(STOPS, TOKEN)))
    unseen = {finding.subject: finding.found for finding in findings if finding.level == "not checked"}
    assert {finding.level for finding in findings} == {"not checked"}
    assert set(unseen) == {"training operator", "storage", "Hugging Face token", "devices", "quota"}
    assert all("cannot" in found for found in unseen.values()), unseen
    assert space.list("pytorchjobs") == []


def as_user_without_permissions(space: Space, folder: Path, do: Callable[[], list[Finding]]) -> list[Finding]:
    space.kubectl("create", "serviceaccount", "no-permissions")
    token = space.kubectl("create", "token", "no-permissions").strip()
    kubeconfig = json.loads(run(["kubectl", "config", "view", "--raw", "--minify", "-o", "json"]).output)
    for user in kubeconfig["users"]:
        user["user"] = {"token": token}
    path = folder / "kubeconfig"
    path.write_text(json.dumps(kubeconfig))
    before = os.environ["KUBECONFIG"]
    os.environ["KUBECONFIG"] = str(path)
    try:
        return do()
    finally:
        os.environ["KUBECONFIG"] = before


def genvalues(*arguments: str, **environment: str) -> Ended:
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "genvalues.cli", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return Ended(done.returncode, done.stdout, time.monotonic() - began)


def test_the_command_ends_with_2_for_an_error_0_without_one_and_1_without_an_answer(
    new_space: Callable[..., Space], tmp_path: Path
) -> None:
    space = new_space("baseline")
    space.volume.create()
    inputs: dict[str, Any] = {
        "name": "llama",
        "model": "meta-llama/Meta-Llama-3.1-8B",
        "dataset": {"source": "databricks/databricks-dolly-15k"},
        "instance": "ml.trn1.32xlarge",
        "image": "123456789012.dkr.ecr.us-west-2.amazonaws.com/llama-lora:0.1.0",
        "storage": {"existingClaim": CLAIM},
    }
    file = tmp_path / "finetune.yaml"
    file.write_text(yaml.safe_dump(inputs))
    command = ["preflight", str(file), "--cluster", "-n", space.name]
    space.wait("the claim", lambda: (space.get("pvc", CLAIM) or {}).get("status", {}).get("phase") == "Bound")
    missing = genvalues(*command)
    assert missing.status == 2 and "error        secret hf-token" in missing.output
    assert f"fix: kubectl -n {space.name} create secret generic hf-token" in missing.output
    assert re.fullmatch(r"1 of \d findings stop this release; the fixes are above", missing.output.splitlines()[-1])
    space.kubectl("create", "secret", "generic", "hf-token", "--from-literal=token=x")
    right = genvalues(*command, "--json")
    assert right.status == 0
    document = json.loads(right.output)
    other = {finding["subject"]: finding["level"] for finding in document["findings"] if finding["level"] != "ok"}
    assert other == {DRIVER: "not checked"}, document  # the node's AMI has no name

    kubeconfig = json.loads(run(["kubectl", "config", "view", "--raw", "--minify", "-o", "json"]).output)
    kubeconfig["clusters"][0]["cluster"]["server"] = "https://127.0.0.1:9"
    elsewhere = tmp_path / "kubeconfig"
    elsewhere.write_text(json.dumps(kubeconfig))
    away = genvalues(*command, KUBECONFIG=str(elsewhere))
    assert away.status == 1 and away.output.startswith("not checked  cluster: the API server does not answer")
    assert away.seconds < PROMISED_SECONDS
