"""What the instance type fills in where the values leave it out, and that genvalues and the chart agree on it."""

from __future__ import annotations

import itertools
import re

import pytest
import yaml

from chart.manifests import CHART, MINIMAL, Values, config, merged, pod, render
from genvalues.accelerators.instances import ACCELERATED, NAMES, TRAINIUM, trainium, unsupported
from genvalues.inputs.chart import on_top_of_defaults
from genvalues.settings.value_rules import contradictions

RESOURCES = {"requests": {"cpu": "500m", "memory": "2Gi"}, "limits": {"cpu": "8", "memory": "16Gi"}}
# What the chart's defaults were before the instance type filled them in.
BEFORE: Values = {
    "backend": "native",
    "parallelism": {"nodes": 1, "processesPerNode": 2, "tensorParallelSize": 1, "dataParallelSize": 2, "shardSize": 1},
    "devices": {},
    "neuron": {"target": "trn1", "logicalCoreSize": 1},
    "sharedMemory": "2Gi",
    "stages": {"compile": {"resources": RESOURCES}, "train": {"resources": RESOURCES}},
}


@pytest.mark.parametrize("name", NAMES)
def test_the_instance_type_alone_is_enough(name: str, helm: int) -> None:
    objects = render(merged(MINIMAL, {"instance": name}), helm=helm)
    run, train, instance = config(objects, "run.yaml"), pod(objects, "train"), trainium(name)
    [limits] = [each["resources"]["limits"] for each in train.containers]
    [shared] = [volume["emptyDir"]["sizeLimit"] for volume in train.spec["volumes"] if volume["name"] == "shm"]
    layout = run["parallelism"]
    assert layout["processesPerNode"] == layout["tensorParallelSize"] * layout["dataParallelSize"]
    assert config(objects, "cluster.yaml")["job"]["devices"] == (instance.devices if instance else {})
    if instance is None:
        assert (run["backend"], layout["processesPerNode"], shared) == ("native", 2, "2Gi")
        assert [each["resources"] for each in train.containers] == [RESOURCES]
        return
    assert (run["backend"], run["device"]) == (instance.generation.backend, "neuron")
    assert layout["processesPerNode"] == instance.cores
    assert layout["tensorParallelSize"] in instance.groups
    assert shared == instance.shared_memory
    assert limits == {**instance.resources["limits"], **instance.devices}
    if instance.generation.target == "trn2":
        assert train.environment["NEURON_LOGICAL_NC_CONFIG"] == "2"


def test_a_node_of_trn1_has_the_reference_layout(helm: int) -> None:
    values = {"instance": "ml.trn1.32xlarge", "parallelism": {"nodes": 2}}
    layout = config(render(merged(MINIMAL, values), helm=helm), "run.yaml")["parallelism"]
    assert (layout["processesPerNode"], layout["tensorParallelSize"], layout["dataParallelSize"]) == (32, 8, 8)


def test_values_before_the_instance_type_filled_them_in_mean_the_same(values_file: object, helm: int) -> None:
    """Values that write every key, as genvalues does, and all of CPUs: or an upgrade would train again."""
    values = yaml.safe_load(values_file.read_text())  # type: ignore[attr-defined]
    if trainium(values.get("instance", "cpu")) and values.keys() < BEFORE.keys():
        pytest.skip("leaves out what the instance type now fills in")
    run = config(render(values_file, helm=helm), "run.yaml")  # type: ignore[arg-type]
    assert run["parallelism"] == merged(BEFORE, values)["parallelism"]
    assert run["backend"] == {"cpu": "native", "neuron": "xla"}.get(*[merged(BEFORE, values)["backend"]] * 2)


def test_an_upgrade_that_keeps_the_old_defaults_means_the_same(helm: int) -> None:
    """`helm upgrade --reuse-values` passes the defaults of the old chart."""
    assert render(merged(MINIMAL, BEFORE), helm=helm) == render(MINIMAL, helm=helm)


LAYOUTS: list[Values] = [
    {},
    {"nodes": 2},
    {"processesPerNode": 32},
    {"tensorParallelSize": 2},
    {"dataParallelSize": 1},
    {"dataParallelSize": 2},
    {"dataParallelSize": 32},
    {"processesPerNode": 4, "tensorParallelSize": 2},
    {"nodes": 2, "dataParallelSize": 4},
]
OTHERS: list[Values] = [
    {},
    {"backend": "native"},
    {"backend": "xla"},
    {"devices": {"aws.amazon.com/neuron": 1}},
    {"neuron": {"logicalCoreSize": 1}},
    {"sharedMemory": "5Gi"},
]


COMPLETED = ["cpu", "m7i.4xlarge", "trn1.32xlarge", "ml.trn2.48xlarge", "trn2.3xlarge"]


@pytest.mark.parametrize("instance", COMPLETED)
def test_genvalues_and_the_chart_complete_values_alike(instance: str, pytestconfig: pytest.Config) -> None:
    """Each combination with one of the instance types; with ``--all``, with each of them."""
    compared = 0
    combinations = list(itertools.product(LAYOUTS, OTHERS))
    if not pytestconfig.getoption("all"):
        combinations = combinations[COMPLETED.index(instance) :: len(COMPLETED)]
    for layout, other in combinations:
        values = merged(MINIMAL, {"instance": instance, "parallelism": layout}, other)
        ours = on_top_of_defaults(CHART, values)
        if list(contradictions(ours)):
            continue
        objects = render(values)
        run, train = config(objects, "run.yaml"), pod(objects, "train")
        compared += 1
        assert run["parallelism"] == ours["parallelism"], values
        assert run["backend"] == ours["backend"]
        assert config(objects, "cluster.yaml")["job"]["devices"] == ours["devices"]
        [shared] = [volume["emptyDir"]["sizeLimit"] for volume in train.spec["volumes"] if volume["name"] == "shm"]
        assert shared == ours["sharedMemory"]
        size = train.environment.get("NEURON_LOGICAL_NC_CONFIG", str(ours["neuron"]["logicalCoreSize"]))
        assert size == str(ours["neuron"]["logicalCoreSize"])
    assert compared


def test_copies_that_are_written_leave_the_rest_to_tensor_parallelism(helm: int) -> None:
    """With 32 processes and 32 copies, tensorParallelSize was 1 when it was left out."""
    values = {"instance": "trn1.32xlarge", "parallelism": {"processesPerNode": 32, "dataParallelSize": 32}}
    assert config(render(merged(MINIMAL, values), helm=helm), "run.yaml")["parallelism"]["tensorParallelSize"] == 1


def test_everything_that_the_instance_type_says_can_be_overridden(helm: int) -> None:
    values: Values = {
        "instance": "trn1.32xlarge",
        "parallelism": {"tensorParallelSize": 16},
        "devices": {"aws.amazon.com/neuron": 16},
        "sharedMemory": "40Gi",
        "stages": {"train": {"resources": {"limits": {"memory": "450Gi"}, "requests": {"cpu": 100}}}},
    }
    objects = render(merged(MINIMAL, values), helm=helm)
    assert config(objects, "run.yaml")["parallelism"]["dataParallelSize"] == 2
    [train] = pod(objects, "train").containers
    neuron = {"aws.amazon.com/neuron": 16}
    assert train["resources"]["limits"] == {"cpu": "112", "memory": "450Gi", **neuron}, "no EFA: it was left out"
    assert train["resources"]["requests"] == {"cpu": "100", "memory": "440Gi", **neuron}


def test_a_bound_that_is_left_out_follows_the_one_that_is_written(helm: int) -> None:
    of_train = {"limits": {"memory": "100Gi"}, "requests": {"cpu": 120}}
    values = {"instance": "trn1.32xlarge", "stages": {"train": {"resources": of_train}}}
    [train] = pod(render(merged(MINIMAL, values), helm=helm), "train").containers
    assert train["resources"]["requests"]["memory"] == "100Gi", "the usual 440Gi are more than the limit"
    assert train["resources"]["limits"]["cpu"] == "120"


def test_a_limit_of_train_set_to_null_is_no_limit(helm: int) -> None:
    values = {"stages": {"train": {"resources": {"limits": {"cpu": None}}}, "compile": None}}
    objects = render(merged(MINIMAL, values), helm=helm)
    assert pod(objects, "train").containers[0]["resources"] == {
        "requests": RESOURCES["requests"],
        "limits": {"memory": "16Gi", "cpu": "1"},  # of stageDefaults
    }
    assert pod(objects, "compile").containers[0]["resources"] == RESOURCES


def test_the_table_holds_the_names_that_aws_has() -> None:
    session = pytest.importorskip("botocore.session", reason="a plain `pip install .` has no botocore").get_session()
    of_ec2 = set(session.get_service_model("ec2").shape_for("InstanceType").enum)
    of_hyperpod = set(session.get_service_model("sagemaker").shape_for("ClusterInstanceType").enum)
    assert {name for name in of_ec2 if name.startswith("trn")} == TRAINIUM.keys()
    assert {name for name in of_hyperpod if name.startswith("ml.trn")} == {n for n in NAMES if n.startswith("ml.")}
    for name in of_ec2 | of_hyperpod:
        family = name.removeprefix("ml.").partition(".")[0]
        accelerated = re.match(r"(trn|inf|p|gr?|dl|vt|f)[0-9]", family) is not None
        assert bool(re.match(ACCELERATED, name)) == accelerated
        assert (unsupported(name) is None) == (name in NAMES or not accelerated), name


def test_the_values_of_the_readme_install_without_genvalues(helm: int) -> None:
    [block] = re.findall(r"^```yaml\n(.*?)^```$", (CHART / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert len(block.splitlines()) == 8
    values = yaml.safe_load(block)
    assert list(contradictions(on_top_of_defaults(CHART, values))) == []
    objects = render(config(render(values, helm=helm), "values.yaml"), helm=helm)
    train = pod(objects, "train")
    assert train.owner["spec"]["nprocPerNode"] == "32"
    assert train.containers[0]["resources"]["limits"]["memory"] == "440Gi"
    assert config(objects, "run.yaml")["parallelism"]["tensorParallelSize"] == 8
