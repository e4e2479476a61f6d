"""helmfile.yaml.gotmpl, run by helmfile with Helm 3 and Helm 4."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from chart.manifests import CHART, ROOT, Values, merged
from cluster.local import binaries
from cluster.space import SMALL, STAND_IN_IMAGE, Ended, Space, files_pod, helm_program, image, run, succeeded, uids
from genvalues.cluster.objects import COMPONENT, INSTANCE, name_of

RELEASE = "llama-lora"
ENVIRONMENTS = ["cpu", "trn1", "trn1-2node", "trn1n", "trn2"]
# Overrides the environment's values: an existing image, requests for a small node, and no stage that runs as root.
HERE: Values = merged(
    image(STAND_IN_IMAGE),
    {key: SMALL[key] for key in ("stageDefaults", "stages")},
    {"storage": {"prepare": {"enabled": False}}, "evaluation": {"enabled": False}},
)


class Helmfile:
    """helmfile, run in the repository, with a Helm without plugins that records its arguments."""

    def __init__(self, folder: Path, helm: int, namespace: str) -> None:
        self._calls = folder / "calls"
        self._variables = [f"NAMESPACE={namespace}", f"HELM_DATA_HOME={folder}", f"HELM_PLUGINS={folder}/none"]
        self._helm = folder / "helm"
        self._helm.write_text(f'#!/bin/sh\necho "$@" >> {self._calls}\nexec {helm_program(helm)} "$@"\n')
        self._helm.chmod(0o755)

    def __call__(self, environment: str, *arguments: str, variables: tuple[str, ...] = ()) -> Ended:
        self._calls.write_text("")
        settings = ["env", "--chdir", str(ROOT), *self._variables, *variables]
        program = [str(binaries.program("helmfile")), "--helm-binary", str(self._helm), "--no-color"]
        return run([*settings, *program, "--environment", environment, *arguments])

    @property
    def calls(self) -> list[str]:
        return self._calls.read_text().splitlines()


@pytest.fixture
def helmfile(tmp_path: Path, helm: int) -> Callable[[str], Helmfile]:
    """Creates a Helmfile for a namespace."""
    return lambda namespace: Helmfile(tmp_path, helm, namespace)


@pytest.mark.with_helm(3)
def test_template_renders_each_environment_with_its_values_and_no_network(
    helmfile: Callable[[str], Helmfile], helm: int
) -> None:
    program = helmfile("somewhere")
    for environment in ENVIRONMENTS:
        away = ("KUBECONFIG=/dev/null", "HTTPS_PROXY=http://127.0.0.1:9", "HTTP_PROXY=http://127.0.0.1:9")
        ended = program(environment, "template", variables=away)
        assert ended.status == 0, ended.output
        assert {call.split()[0] for call in program.calls} == {
            "version",
            "template",
        }  # neither repositories nor dependencies
        values = ROOT / "values" / f"{environment}.values.yaml"
        arguments = ["template", RELEASE, str(CHART), "--namespace", "somewhere", "--values", str(values)]
        rendered = run([str(helm_program(helm)), *arguments]).output
        assert list(yaml.safe_load_all(ended.output)) == list(yaml.safe_load_all(rendered))


@pytest.mark.with_helm(3)
def test_apply_needs_the_plugin_a_second_sync_resumes_after_a_failed_stage_and_destroy_keeps_the_volume(
    new_space: Callable[..., Space], helmfile: Callable[[str], Helmfile], helm: int, tmp_path: Path
) -> None:
    space = new_space()
    release = space.release(helm, RELEASE)
    program = helmfile(space.name)
    without_the_plugin = program("cpu", "apply")
    assert without_the_plugin.status != 0 and 'unknown command "diff"' in without_the_plugin.output
    assert release.state == "none"

    def sync(name: str, values: Values) -> Ended:
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(values))
        return program("cpu", "sync", "--values", str(file))

    ended = sync("failing", merged(HERE, {"stages": {"consolidate": {"extraEnv": {"STAND_IN": "exit 2"}}}}))
    assert ended.status != 0 and f"{RELEASE}-consolidate" in ended.output, ended.output
    assert release.state == "failed"
    [upgrade] = [call for call in program.calls if call.startswith("upgrade ")]
    assert "--install" in upgrade and "--timeout 172800s" in upgrade  # long enough for training
    trained = space.history.pods(**{COMPONENT: "train"})
    assert len(trained) == 1

    ended = sync("mended", HERE)
    assert ended.status == 0, ended.output
    assert release.state == "deployed"
    ended_well = {name_of(job) for job in space.list("jobs", f"{INSTANCE}={RELEASE}") if succeeded(job)}
    assert {f"{RELEASE}-{stage}" for stage in ("train-gate", "consolidate", "merge")} <= ended_well
    assert uids(space.history.pods(**{COMPONENT: "train"})) == uids(trained)  # not repeated

    ended = program("cpu", "destroy")
    assert ended.status == 0, ended.output
    [uninstall] = [call for call in program.calls if call.startswith("delete ")]
    assert "--timeout 600s" in uninstall  # long enough for the cleanup hook
    assert release.state == "none" and space.pods(RELEASE) == []
    space.apply(files_pod(space.volume.POD, f"{RELEASE}-workspace"))
    assert space.volume.exists(f"runs/{RELEASE}/stages/merge.json")
