"""helmfile.yaml.gotmpl: an environment for each values file, with time for training."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from chart.manifests import MINIMAL, ROOT, one, pod, render

ENVIRONMENTS = ["cpu", "trn1", "trn1-2node", "trn1n", "trn2"]
DAY = 24 * 60 * 60


def helmfile(environment: str) -> tuple[Any, Any]:
    """Both YAML documents, with their two templates rendered."""
    text = (ROOT / "helmfile.yaml.gotmpl").read_text()
    text = text.replace("{{ .Environment.Name }}", environment)
    text = text.replace('{{ env "NAMESPACE" | default "llama-lora" }}', "llama-lora")
    assert not re.search(r"\{\{", text)
    first, second = yaml.safe_load_all(text)
    return first, second


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_each_environment_installs_the_chart_with_its_own_values(environment: str) -> None:
    environments, rest = helmfile(environment)
    assert list(environments["environments"]) == ENVIRONMENTS
    [release] = rest["releases"]
    assert (ROOT / release["chart"]).resolve() == ROOT / "chart"
    assert [(ROOT / values).is_file() for values in release["values"]] == [True]


def test_helm_waits_as_long_as_training_takes_and_keeps_failed_objects() -> None:
    _, rest = helmfile("trn1")
    defaults = rest["helmDefaults"]
    assert defaults["timeout"] >= 2 * DAY
    assert defaults["atomic"] is defaults["cleanupOnFail"] is defaults["wait"] is False


def test_destroy_waits_as_long_as_cleanup_may_take() -> None:
    _, rest = helmfile("trn1")
    cleanup = one(render(MINIMAL), "Job", "llama-cleanup")
    allowed = pod([cleanup], "cleanup").containers[0]["command"][-1]  # the deadline to which its pod extends the Job's
    assert rest["helmDefaults"]["deleteWait"], "without it, helmfile passes no timeout"
    assert rest["helmDefaults"]["deleteTimeout"] > int(allowed)
