"""What the chart tells the programs: the ConfigMap, the environment, the notes, the settings of each stage."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from chart.manifests import (
    CHART,
    MINIMAL,
    Object,
    Values,
    annotation,
    config,
    merged,
    one,
    pod,
    pods,
    render,
    run_helm,
    stages,
    workloads,
)
from genvalues.cluster.config import load as load_cluster_config
from genvalues.cluster.workloads import workload_of
from genvalues.common.helm import read_answers_with_libyaml
from genvalues.common.rendered_yaml import load_rendered
from genvalues.settings.by_instance import completed
from genvalues.settings.run import RunConfig

SECTIONS = [
    *("backend", "model", "dataset", "lora", "training", "probe", "compile", "evaluation", "parallelism", "rehearse"),
    *("verify", "publish", "monitoring"),
]
SETTINGS: Values = {
    "resources": {"requests": {"cpu": "2"}, "limits": {"memory": "7Gi", "cpu": 2.5}},
    "nodeSelector": {"pool": "a"},
    "tolerations": [{"key": "dedicated", "operator": "Exists"}],
    "affinity": {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}},
    "topologySpreadConstraints": [{"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"}],
    "schedulerName": "volcano",
    "supplementalGroups": [3000],
    "seccompProfile": {"type": "Localhost", "localhostProfile": "a.json"},
    "capabilities": {"NET_BIND_SERVICE": True, "IPC_LOCK": False},
    "terminationGracePeriodSeconds": 60,
    "jobLabels": {"team": "7", "app.kubernetes.io/component": "mine"},
    "priorityClassName": "urgent",
    "extraEnv": {"OMP_NUM_THREADS": 4, "LARGE": 12345678, "TEXT": "a: b # c", "OFF": False},
    "extraVolumes": {"on": {"emptyDir": {}}},
    "extraVolumeMounts": {"on": {"mountPath": "/scratch"}},
    "podLabels": {"cost-center": "", "app.kubernetes.io/component": "mine"},
    "podAnnotations": {"note": "true"},
    "backoffLimit": 0,
    "activeDeadlineSeconds": 3600,
}
WATCHERS = {"gate", "runner"}
TRAINIUM: Values = {"instance": "trn1.32xlarge", "backend": "xla", "devices": {"aws.amazon.com/neuron": 16}}
STAGES_OF: dict[str, Values] = {
    "least": {"storage": {"prepare": {"enabled": False}}, "evaluation": {"enabled": False}},
    "most": merged(
        TRAINIUM,
        {
            "compile": {"runsOn": "cpu"},
            "rehearse": {"enabled": True},
            "publish": {"s3": {"uri": "s3://bucket/a"}},
        },
    ),
}
KEY_OF_STAGE = {"storage-prepare": "storagePrepare", "compile-gate": "gate", "train-gate": "gate"}


def test_the_cluster_config_is_what_genvalues_cluster_reads(objects: list[Object], tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(one(objects, "ConfigMap")["data"]["cluster.yaml"])
    read = load_cluster_config(file)
    assert (read.release, read.namespace, read.revision) == ("llama", "research", 1)
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (read.chart.version, read.chart.app_version) == (chart["version"], chart["appVersion"])
    for each in pods(objects):
        for metadata in (each.owner["metadata"], each.template["metadata"]):
            assert metadata["labels"]["llama-lora/run"] == read.run, "what gate and cleanup find jobs and pods by"
    for job in workloads(objects):
        assert job["metadata"]["name"].startswith(read.fullname)
        assert workload_of(job).setting == read.workload


@pytest.mark.parametrize(
    ("written", "seconds"),
    [("30m", 1800), ("1h30m", 5400), ("90s", 90), ("1h2m3s", 3723), ("100h", 360000), ("0h5m", 300), ("", 0)],
)
def test_guards_come_to_the_gate_as_numbers(written: str, seconds: int, tmp_path: Path, helm: int) -> None:
    guards = {"maxCost": 200, "pricePerNodeHour": 21.5, "stallTimeout": written}
    rendered = render(merged(MINIMAL, {"guards": guards}), helm=helm)
    file = tmp_path / "cluster.yaml"
    file.write_text(one(rendered, "ConfigMap")["data"]["cluster.yaml"])
    read = load_cluster_config(file).guards
    assert (read.max_cost, read.price_per_node_hour, read.stall_timeout_seconds) == (200, 21.5, seconds)


def test_without_guards_there_is_no_limit_on_cost_and_half_an_hour_to_stand_still(tmp_path: Path, helm: int) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(one(render(MINIMAL, helm=helm), "ConfigMap")["data"]["cluster.yaml"])
    read = load_cluster_config(file).guards
    assert (read.max_cost, read.price_per_node_hour, read.stall_timeout_seconds) == (None, None, 1800)


def test_the_gate_can_write_where_it_counts_the_cost(objects: list[Object]) -> None:
    for stage in ("compile-gate", "train-gate"):
        gate = next((each for each in pods(objects) if each.stage == stage), None)
        if gate is None:  # a detached release: its runner's has them
            continue
        (mount,) = [one for one in gate.containers[0]["volumeMounts"] if one["name"] == "workspace"]
        assert not mount.get("readOnly")


def test_workers_have_the_grace_period_that_the_trainer_saves_in(objects: list[Object]) -> None:
    for each in pods(objects):
        known = each.environment.get("LLAMA_LORA_GRACE_SECONDS")
        assert known == (str(each.spec["terminationGracePeriodSeconds"]) if each.trains else None)


def test_without_the_chart_the_trainer_saves_in_the_charts_default() -> None:
    stopping = pytest.importorskip("llama_lora.backends.stopping", reason="a plain `pip install .` has no trainer")
    for stage in ("compile", "train"):
        assert pod(render(MINIMAL), stage).spec["terminationGracePeriodSeconds"] == stopping.grace_period()


def test_the_run_config_is_what_the_trainer_reads(objects: list[Object], tmp_path: Path) -> None:
    trainer = pytest.importorskip("llama_lora.config", reason="a plain `pip install .` has no trainer")
    file = tmp_path / "run.yaml"
    file.write_text(one(objects, "ConfigMap")["data"]["run.yaml"])
    assert trainer.load(file).name


def test_text_that_helm_does_not_quote_is_text_for_every_reader_of_a_release(tmp_path: Path, helm: int) -> None:
    """``=`` and ``<<``, which have meanings in YAML 1.1."""
    trainer = pytest.importorskip("llama_lora.config", reason="a plain `pip install .` has no trainer")
    strange: Values = {
        "dataset": {"format": "instruction", "columns": {"output": "=", "instruction": "<<"}},
        "stageDefaults": {"podAnnotations": {"a": "=", "b": "<<"}},
    }
    values = tmp_path / "values.yaml"
    values.write_text(json.dumps(merged(MINIMAL, strange)))
    read_answers_with_libyaml()
    loader = importlib.import_module("pyhelm3.models").SafeLoader
    objects = [*yaml.load_all(run_helm(helm, "template", "llama", CHART, "-f", values).stdout, Loader=loader)]
    assert pod(objects, "merge").template["metadata"]["annotations"] == {"a": "=", "b": "<<"}
    run = tmp_path / "run.yaml"
    run.write_text(one(objects, "ConfigMap")["data"]["run.yaml"])
    columns = trainer.load(run).dataset.columns
    assert (columns.output, columns.instruction) == ("=", "<<")
    assert load_rendered("a: =\nb: <<\n<<: 1\n") == {"a": "=", "b": "<<", "<<": 1}


def test_the_run_config_is_the_values_own_sections(values_file: Path, helm: int) -> None:
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    values = merged(defaults, yaml.safe_load(values_file.read_text()))
    run = config(render(values_file, helm=helm), "run.yaml")
    assert run.pop("name") == (values["name"] or "llama")
    assert run.pop("device") == ("cpu" if values["instance"] == "cpu" else "neuron")
    values = completed(values)
    assert run == {section: values[section] for section in SECTIONS}


@pytest.mark.parametrize(
    ("written", "key", "read"),
    [
        ({"backend": "cpu"}, "backend", "native"),
        ({"training": {"attention": "eager"}}, "training.attention", "isolated"),
        ({"training": {"attention": "flash"}}, "training.attention", "causal"),
        ({"compile": {"mode": False}}, "compile.mode", "off"),  # YAML 1.1's off
        ({"compile": {"mode": "off"}}, "compile.mode", "off"),
        ({"verify": False}, "verify", "off"),
        ({"verify": "off"}, "verify", "off"),
    ],
)
def test_other_words_for_a_value_reach_the_stages_as_its_own(written: Values, key: str, read: str, helm: int) -> None:
    run = config(render(merged(MINIMAL, written), helm=helm), "run.yaml")
    for part in key.split("."):
        run = run[part]
    assert run == read


@pytest.mark.parametrize(
    ("instance", "backend", "device"),
    [
        ("cpu", "native", "cpu"),
        ("cpu", None, "cpu"),
        ("m7i.4xlarge", None, "cpu"),
        ("trn1.2xlarge", None, "neuron"),
        ("ml.trn2.3xlarge", None, "neuron"),
        ("ml.trn2.48xlarge", "native", "neuron"),
        ("trn2u.48xlarge", "xla", "neuron"),
        ("ml.trn1.32xlarge", "neuron", "neuron"),
        ("ml.trn1.32xlarge", "cpu", "cpu"),  # as before backend native: any node, small models
    ],
)
def test_the_device_follows_from_the_instance_type(instance: str, backend: str | None, device: str, helm: int) -> None:
    values = {"instance": instance, "backend": backend}
    run = config(render(merged(MINIMAL, values), helm=helm), "run.yaml")
    assert RunConfig.model_validate(run).device == device


def test_small_numbers_stay_numbers_for_every_yaml_reader(helm: int) -> None:
    numbers = {"learningRate": 1e-7, "weightDecay": 5e-5, "maxGradNorm": 1.5e-6, "warmupRatio": 0.001, "epochs": 1}
    values = {"training": {**numbers, "maxSteps": 1_000_000_000, "seed": 4294967295}}
    training = config(render(merged(MINIMAL, values), helm=helm), "run.yaml")["training"]
    for key, number in numbers.items():
        assert training[key] == number and not isinstance(training[key], str), key
    assert training["maxSteps"] == 1_000_000_000 and isinstance(training["maxSteps"], int)
    assert training["seed"] == 4294967295 and isinstance(training["seed"], int)


def test_text_that_looks_like_a_number_stays_text(helm: int) -> None:
    dataset = {"revision": "1e5", "config": "2024", "split": "true", "columns": {"text": "1e-5"}}
    run = config(render(merged(MINIMAL, {"dataset": dataset}), helm=helm), "run.yaml")
    assert run["dataset"].items() >= dataset.items()


def test_a_run_is_named_after_its_release_unless_it_is_named(helm: int) -> None:
    assert config(render(MINIMAL, helm=helm), "run.yaml")["name"] == "llama"
    assert config(render(merged(MINIMAL, {"name": "mine"}), helm=helm), "run.yaml")["name"] == "mine"


@pytest.mark.parametrize("where", ["stageDefaults", "stages"])
@pytest.mark.parametrize("mode", ["attached", "detached"])
def test_settings_reach_every_stage(where: str, mode: str, helm: int) -> None:
    keys = yaml.safe_load((CHART / "values.yaml").read_text())["stages"]
    del keys["neff"]  # of Trainium alone; its compilers request more than the limits here
    own_resources = {key for key, stage in keys.items() if "resources" in stage}
    without_deadline = {key: value for key, value in SETTINGS.items() if key != "activeDeadlineSeconds"}
    own = {key: without_deadline if key in WATCHERS else SETTINGS for key in keys}
    values: Values = {where: SETTINGS if where == "stageDefaults" else own}
    optional = {"rehearse": {"enabled": True}, "publish": {"s3": {"uri": "s3://bucket/a"}}}
    objects = render(merged(MINIMAL, values, {"pipeline": {"mode": mode}}, optional), helm=helm)
    seen = set()
    for each in pods(objects):
        key = KEY_OF_STAGE.get(each.stage, each.stage)
        seen.add(key)
        metadata, spec, [container] = each.template["metadata"], each.spec, each.containers
        assert spec["nodeSelector"] == SETTINGS["nodeSelector"]
        assert spec["tolerations"] == SETTINGS["tolerations"]
        assert spec["affinity"] == SETTINGS["affinity"]
        assert spec["topologySpreadConstraints"] == SETTINGS["topologySpreadConstraints"]
        assert (spec["schedulerName"], spec["priorityClassName"]) == ("volcano", "urgent")
        assert spec["securityContext"]["supplementalGroups"] == [3000]
        assert spec["securityContext"]["seccompProfile"] == SETTINGS["seccompProfile"]
        root = ["CHOWN"] if each.stage == "storage-prepare" else []
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": [*root, "NET_BIND_SERVICE"]}
        saves = where == "stageDefaults" and key in {"compile", "train"}
        assert spec["terminationGracePeriodSeconds"] == (120 if saves else 60)
        if each.owner["kind"] != "Pod":
            assert each.owner["metadata"]["labels"]["team"] == "7" and "team" not in metadata["labels"]
            assert each.owner["metadata"]["labels"]["app.kubernetes.io/component"] == each.stage
        wanted = {"OMP_NUM_THREADS": "4", "LARGE": "12345678", "TEXT": "a: b # c", "OFF": "false"}
        assert each.environment.items() >= wanted.items()
        assert {"name": "on", "emptyDir": {}} in spec["volumes"]
        assert {"name": "on", "mountPath": "/scratch"} in container["volumeMounts"]
        assert metadata["labels"]["cost-center"] == ""
        assert metadata["labels"]["app.kubernetes.io/component"] == each.stage, "what the gate finds its pods by"
        assert metadata["annotations"]["note"] == "true"
        if where == "stages" or key not in own_resources:
            assert container["resources"]["limits"] == {"cpu": "2.5", "memory": "7Gi"}
            assert container["resources"]["requests"]["cpu"] == "2"
        of_job = each.owner["spec"].get("runPolicy", each.owner["spec"])
        if each.owner["kind"] != "Pod":
            retries = keys[key].get("backoffLimit", 0) if where == "stageDefaults" else 0
            assert of_job["backoffLimit"] == (1 if "runPolicy" in each.owner["spec"] else retries), "a 0 is not nothing"
        has_own_deadline = each.stage == "cleanup" or (
            where == "stageDefaults" and "activeDeadlineSeconds" in keys[key]
        )
        if key in WATCHERS:
            assert "activeDeadlineSeconds" not in of_job, "it ends with what it follows"
        elif not has_own_deadline:
            assert of_job["activeDeadlineSeconds"] == 3600
    assert seen == (keys.keys() - {"runner"} if mode == "attached" else {"cleanup", "runner", "verify"})


def test_a_stages_own_settings_win_key_by_key(helm: int) -> None:
    values = {
        "stageDefaults": {"nodeSelector": {"pool": "a", "zone": "b"}, "tolerations": [{"operator": "Exists"}]},
        "stages": {"merge": {"nodeSelector": {"pool": "c"}, "tolerations": [], "backoffLimit": 0}},
    }
    objects = render(merged(MINIMAL, values), helm=helm)
    merge, evaluate = pod(objects, "merge"), pod(objects, "evaluate")
    assert merge.spec["nodeSelector"] == {"pool": "c", "zone": "b"}
    assert "tolerations" not in merge.spec
    assert merge.owner["spec"]["backoffLimit"] == 0
    assert evaluate.spec["nodeSelector"] == {"pool": "a", "zone": "b"}
    assert evaluate.spec["tolerations"] == [{"operator": "Exists"}]
    assert evaluate.owner["spec"]["backoffLimit"] == 3


def test_pull_secrets_that_are_on_reach_every_pod(helm: int) -> None:
    objects = render(merged(MINIMAL, {"image": {"pullSecrets": {"a": True, "b": False}}}), helm=helm)
    assert {str(each.spec["imagePullSecrets"]) for each in pods(objects)} == {str([{"name": "a"}])}
    off = render(merged(MINIMAL, {"image": {"pullSecrets": {"a": False}}}), helm=helm)
    assert {each.spec.get("imagePullSecrets") for each in pods(off)} == {None}


@pytest.mark.parametrize("mode", ["attached", "detached"])
def test_the_notes_say_how_to_follow_where_the_result_is_and_how_to_uninstall(
    mode: str, helm: int, tmp_path: Path
) -> None:
    text = notes(merged(MINIMAL, {"pipeline": {"mode": mode}, "rehearse": {"enabled": True}}), helm, tmp_path)
    for promised in [
        "org/model on org/rows",
        "kubectl -n research logs -f job/llama-" + ("train-gate" if mode == "attached" else "runner-1"),
        "claim llama-workspace, below runs/llama:",
        "merged/",
        "adapter/",
        "report.html",
        "helm -n research test llama --logs",
        "helm -n research uninstall llama --timeout",
        "helm -n research uninstall llama --no-hooks",
        "app.kubernetes.io/component in (cleanup,verify)'",
        "preflight, storage-prepare, tokenize, rehearse, compile, train, consolidate, merge, evaluate",
    ]:
        assert promised in text, text
    assert ("--timeout 48h" in text) == (mode == "attached"), "Helm waits 5 minutes for a stage, if not told otherwise"
    assert ("llama-run" in text) == (mode == "detached")
    by_hand = [line for line in text.splitlines() if "delete" in line and "jobs -l" in line]
    assert by_hand and all(line.endswith(" --cascade=foreground") for line in by_hand), "the next line comes too early"


@pytest.mark.parametrize("mode", ["attached", "detached"])
def test_the_notes_name_every_stage_that_the_values_run_in_its_order(mode: str, tmp_path: Path) -> None:
    for number, values in enumerate(STAGES_OF.values()):
        (folder := tmp_path / str(number)).mkdir()
        run = [str(annotation(item, "llama-lora/stage")) for item in stages(render(merged(MINIMAL, values)))]
        named = ", ".join(stage for stage in run if not stage.endswith("-gate"))
        text = notes(merged(MINIMAL, values, {"pipeline": {"mode": mode}}), 4, folder)
        assert re.search(rf"order:\s{named}\.", text), f"{named}\n{text}"


def notes(values: Values, helm: int, folder: Path) -> str:
    """`helm template` renders the notes and drops them: here as the data of a ConfigMap."""
    chart = folder / "chart"
    shutil.copytree(CHART, chart)
    text = (chart / "templates/NOTES.txt").read_text()
    (chart / "templates/_notes.tpl").write_text('{{- define "notes" }}' + text + "{{ end }}")
    (chart / "templates/zz-notes.yaml").write_text(
        'apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: notes\ndata:\n  notes: {{ include "notes" . | toJson }}\n'
    )
    return str(one(render(values, helm=helm, chart=chart), "ConfigMap", "notes")["data"]["notes"])


def test_every_stage_object_says_which_stage_it_is(objects: list[Object]) -> None:
    for each in pods(objects):
        assert annotation(each.owner, "llama-lora/stage")


COMPUTE_WITH_THE_MODEL = ("consolidate", "merge", "evaluate")


def memory_of(values: Values, helm: int) -> dict[str, tuple[str, str]]:
    """Request and limit of each stage that computes with the model on a CPU node."""
    objects = render(values, helm=helm)
    found = {}
    for stage in COMPUTE_WITH_THE_MODEL:
        resources = pod(objects, stage).containers[0]["resources"]
        found[stage] = (resources["requests"]["memory"], resources["limits"]["memory"])
    return found


def test_memory_follows_the_model_where_the_values_have_none(helm: int) -> None:
    def of(**model: str) -> dict[str, tuple[str, str]]:
        written = {"id": "", "path": "", "revision": "", **model}
        return memory_of(merged(MINIMAL, {"model": written}), helm)

    assert of(id="meta-llama/Llama-3.1-8B") == {
        "consolidate": ("5Gi", "8Gi"),
        "merge": ("5Gi", "8Gi"),
        "evaluate": ("21Gi", "32Gi"),
    }
    for request, limit in of(id="meta-llama/Llama-3.1-70B").values():
        assert 5 <= int(request.removesuffix("Gi")) < int(limit.removesuffix("Gi")) < 24
    assert (
        of(id="mine/unknown")
        == of(path="/workspace/models/x")
        == dict(zip(COMPUTE_WITH_THE_MODEL, [("2Gi", "12Gi"), ("2Gi", "12Gi"), ("2Gi", "16Gi")], strict=True))
    )


def test_memory_that_is_set_is_kept_and_the_other_bound_is_not_beyond_it(helm: int) -> None:
    def of(**resources: object) -> tuple[str, str]:
        model = {"id": "meta-llama/Llama-3.1-8B", "path": ""}
        return memory_of(merged(MINIMAL, {"model": model, "stages": {"merge": {"resources": resources}}}), helm)[
            "merge"
        ]

    assert of(requests={"memory": "40Gi"}, limits={"memory": "64Gi"}) == ("40Gi", "64Gi")
    assert of(requests={"memory": "40Gi"}) == ("40Gi", "40Gi") and of(limits={"memory": "3Gi"}) == ("3Gi", "3Gi")
    assert of(requests={"memory": "6Gi"}) == ("6Gi", "8Gi") and of(limits={"memory": "64Gi"}) == ("5Gi", "64Gi")
    assert of(requests={"memory": None}, limits=None) == ("5Gi", "8Gi")
