"""Render the chart with Helm 3 or 4, and find objects in the result."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from helm_binaries import helm_binary

ROOT = Path(__file__).parents[2]
CHART = ROOT / "chart"
CI_FILES = sorted(CHART.glob("ci/*-values.yaml"))
VALUES_FILES = CI_FILES + sorted(ROOT.glob("values/*.values.yaml"))

Object = dict[str, Any]
Values = dict[str, Any]

# Minimal values.
MINIMAL: Values = {"model": {"id": "org/model"}, "dataset": {"source": "org/rows", "format": "text"}}

SHARED: Path | None = None  # a folder of renderings, for pytest's processes (conftest.py)


class Refused(Exception):
    """Helm rejects the values; the message is Helm's."""


def run_helm(major: int, *arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [str(helm_binary(major)), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def render(
    values: Path | Values,
    *,
    helm: int = 4,
    release: str = "llama",
    namespace: str = "research",
    upgrade: bool = False,
    chart: Path = CHART,
    api_versions: tuple[str, ...] = (),
) -> list[Object]:
    """The objects in Helm's order. Cached, so they must not be changed. ``api_versions``: served in addition."""
    text = values.read_text() if isinstance(values, Path) else json.dumps(values)
    outcome = _render(text, helm, release, namespace, upgrade, chart, api_versions)
    if isinstance(outcome, str):
        raise Refused(outcome)
    return outcome


@cache
def _render(values: str, *options: Any) -> list[Object] | str:
    """The objects, or Helm's message. What another process of pytest rendered is read from its file."""
    if SHARED is None:
        return _render_now(values, *options)
    file = SHARED / f"{hashlib.sha256(repr((values, *options)).encode()).hexdigest()}.json"
    if not file.exists():
        outcome = _render_now(values, *options)
        with tempfile.NamedTemporaryFile("w", dir=SHARED, delete=False) as partial:
            json.dump(outcome, partial)
        Path(partial.name).replace(file)
        return outcome
    return json.loads(file.read_text())  # type: ignore[no-any-return]


def _render_now(
    values: str, helm: int, release: str, namespace: str, upgrade: bool, chart: Path, api_versions: tuple[str, ...]
) -> list[Object] | str:
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(values)
        file.flush()
        arguments = ["template", release, chart, "--namespace", namespace, "--values", file.name]
        served = [f"--api-versions={version}" for version in api_versions]
        done = run_helm(helm, *arguments, *(["--is-upgrade"] if upgrade else []), *served)
    if done.returncode != 0:
        return done.stderr
    return [item for item in yaml.load_all(done.stdout, Loader=UniqueKeyLoader) if item]


def together(table: Iterable[Values]) -> list[Values]:
    """A few values that contain all of the table: one rendering says of many what is wrong with them."""
    found: list[Values] = []
    for values in table:
        wanted = merged(MINIMAL, {"instance": "cpu"}, values)
        for number, others in enumerate(found):
            if merged(others, wanted) == merged(wanted, others):
                found[number] = merged(others, wanted)
                break
        else:
            found.append(wanted)
    return found


def refusal(values: Values, helm: int = 4, **options: Any) -> str:
    """Helm's message."""
    try:
        render(merged(MINIMAL, values), helm=helm, **options)
    except Refused as refused:
        return str(refused)
    raise AssertionError(f"Helm {helm} accepts {values}")


def refused_with(words: str, values: Values, groups: list[Values]) -> bool:
    """Whether Helm 4 refuses these values with these words, beside others or alone."""
    group = next(each for each in groups if merged(each, values) == each)
    return words in refusal(group) or words in refusal(values)


class UniqueKeyLoader(yaml.CSafeLoader):
    """Reject a key that a template writes twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = {key for key in keys if keys.count(key) > 1}
        assert not twice, f"{twice} written twice{node.start_mark}"
        return super().construct_mapping(node, deep)


def merged(*layers: Values) -> Values:
    """Merge values, as Helm does with several -f."""
    result: Values = {}
    for layer in layers:
        for key, value in layer.items():
            under = result.get(key)
            result[key] = merged(under, value) if isinstance(under, dict) and isinstance(value, dict) else value
    return result


class Pod(NamedTuple):
    """A pod template and the object that owns it; for `helm test` both are the pod."""

    owner: Object
    template: Object

    @property
    def stage(self) -> str:
        return str(annotation(self.owner, "llama-lora/stage"))

    @property
    def spec(self) -> Object:
        return self.template["spec"]

    @property
    def containers(self) -> list[Object]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    @property
    def environment(self) -> dict[str, Any]:
        return {entry["name"]: entry.get("value") for container in self.containers for entry in container["env"]}

    @property
    def trains(self) -> bool:
        return self.owner["kind"] in {"PyTorchJob", "TrainingRuntime"}


def pods(objects: list[Object]) -> Iterator[Pod]:
    for item in objects:
        if item["kind"] == "Job":
            yield Pod(item, item["spec"]["template"])
        elif item["kind"] == "Pod":
            yield Pod(item, item)
        elif item["kind"] == "PyTorchJob":
            for replica in item["spec"]["pytorchReplicaSpecs"].values():
                yield Pod(item, replica["template"])
        elif item["kind"] == "TrainingRuntime":
            for replicated in item["spec"]["template"]["spec"]["replicatedJobs"]:
                yield Pod(item, replicated["template"]["spec"]["template"])
        else:
            assert "template" not in item.get("spec", {}), f"{item['kind']} makes pods that no test here knows"


def pod(objects: list[Object], stage: str) -> Pod:
    [found] = [pod for pod in pods(objects) if pod.stage == stage]
    return found


def one(objects: list[Object], kind: str, name: str | None = None) -> Object:
    [found] = [item for item in objects if item["kind"] == kind and name in (None, item["metadata"]["name"])]
    return found


def annotation(item: Object, key: str) -> str | None:
    return item["metadata"].get("annotations", {}).get(key)


def hooks(item: Object) -> set[str]:
    return set(filter(None, (annotation(item, "helm.sh/hook") or "").split(",")))


def weight(item: Object) -> int:
    return int(annotation(item, "helm.sh/hook-weight") or 0)


def stages(objects: list[Object]) -> list[Object]:
    """The hooks that Helm runs after an install, in order. The runtime of a TrainJob is part of its stage."""
    found = (item for item in objects if "post-install" in hooks(item) and item["kind"] != "TrainingRuntime")
    return sorted(found, key=weight)


def workloads(objects: list[Object]) -> list[Object]:
    """What compile and train run as."""
    return [item for item in objects if item["kind"] in {"PyTorchJob", "TrainJob"}]


class HelmLoader(yaml.CSafeLoader):
    """Read 5e-05 as a number, as Helm does, which reads the values of a runner."""


HelmLoader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"-?\d+e[-+]\d+$"), list("-0123456789"))


def config(objects: list[Object], key: str) -> Any:
    [found] = [item for item in objects if item["kind"] == "ConfigMap"]
    return yaml.load(found["data"][key], Loader=HelmLoader if key == "values.yaml" else yaml.CSafeLoader)
