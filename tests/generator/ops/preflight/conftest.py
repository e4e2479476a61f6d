from __future__ import annotations

import os
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from botocore.stub import Stubber

from genvalues.common.dicts import merge
from genvalues.ops.aws import AwsClients
from genvalues.ops.preflight import instance_checks
from genvalues.ops.preflight.run_requirements import RunRequirements

REGION, ACCOUNT = "us-west-2", "123456789012"
NOW = datetime(2026, 11, 24, 12, tzinfo=timezone.utc)
DIGEST = "sha256:" + "0123456789abcdef" * 4
VALUES: dict[str, Any] = {
    "name": "llama-lora",
    "instance": "trn1.32xlarge",
    "parallelism": {"nodes": 2},
    "image": {
        "repository": f"{ACCOUNT}.dkr.ecr.{REGION}.amazonaws.com/llama-lora",
        "tag": "0.1.0",
        "digest": DIGEST,
    },
    "model": {"id": "meta-llama/Meta-Llama-3.1-8B", "revision": "", "path": ""},
    "dataset": {"source": "databricks/databricks-dolly-15k", "revision": ""},
    "huggingFace": {"tokenSecret": "hf-token", "tokenKey": "token"},
    "storage": {"enabled": True, "kind": "fsx", "size": "1200Gi", "storageClass": "fsx-sc"},
}
HYPERPOD = {"instance": "ml.trn1.32xlarge"}
STATIC = {
    "storage": {
        "kind": "fsx-static",
        "static": {
            "fileSystemId": "fs-0123456789abcdef0",
            "dnsName": f"fs-0123456789abcdef0.fsx.{REGION}.amazonaws.com",
            "mountName": "abcdefgh",
        },
    }
}


def requirements(*changes: dict[str, Any]) -> RunRequirements:
    values = VALUES
    for change in changes:
        values = merge(values, change)
    return RunRequirements("finetune.yaml", values)


def own_storage_class(subnet: str, *groups: str) -> dict[str, Any]:
    return {"storage": {"fsx": {"createStorageClass": True, "subnetId": subnet, "securityGroupIds": [*groups]}}}


@pytest.fixture(autouse=True)
def clean_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invalid credentials, and none of this machine's settings, tokens or clusters."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "HF_", "KUBE"))]:
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")


@pytest.fixture
def clients(monkeypatch: pytest.MonkeyPatch) -> AwsClients:
    monkeypatch.setattr(instance_checks, "utc_now", lambda: NOW)
    return AwsClients(REGION)


@pytest.fixture
def stub(clients: AwsClients) -> Callable[[str], Stubber]:
    """The stubber of a service's client: calls must come in the order in which a test adds their answers."""

    made: dict[str, Stubber] = {}

    def of(service: str) -> Stubber:
        if service not in made:
            made[service] = Stubber(clients.client(service))
            made[service].activate()
        return made[service]

    return of
