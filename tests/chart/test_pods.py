"""docs/pods.md lists what compile and train get on every instance type; every cell equals what is rendered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from chart.manifests import CHART, MINIMAL, ROOT, Object, Values, config, merged, pod, pods, render
from genvalues.accelerators.instances import HYPERPOD, TRAINIUM
from genvalues.common.errors import UserError
from genvalues.inputs.input_options import Sources
from genvalues.inputs.write import checked

Row = dict[str, str]
PAGE = (ROOT / "docs/pods.md").read_text(encoding="utf-8")
OF_EVERY_STAGE = {"HOME", "HF_HOME", "PYTHONUNBUFFERED", "LLAMA_LORA_WORKSPACE", "LLAMA_LORA_IMAGE"}
OF_TRAINING = {"LLAMA_LORA_GRACE_SECONDS"}
OF_API_CLIENTS = {"LLAMA_LORA_JOB_UID"}
NEURON, EFA = "aws.amazon.com/neuron", "vpc.amazonaws.com/efa"
NODES = (1, 2, 4)


def tables(text: str) -> list[list[Row]]:
    """The tables of a page: each row as a dict by column title."""
    found: list[list[Row]] = []
    for block in text.split("\n\n"):
        lines = [line for line in block.splitlines() if line.startswith("|")]
        if lines:
            head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
            found.append([dict(zip(head, row, strict=True)) for row in rows])
    return found


RUNS, REFUSED, ENVIRONMENT, FLAGS = tables(PAGE)[:4]
RUN_OF = {(row["instance"], int(row["nodes"])): row for row in RUNS}
REFUSED_OF = {(row["instance"], int(row["nodes"])): row["reason"] for row in REFUSED}


def environment_of(column: str) -> Row:
    """A column of the page's environment table, including its flags."""
    flags = {row["flags"]: row["value"] for row in FLAGS}
    return {row["variable"]: flags.get(row[column], row[column]) for row in ENVIRONMENT if row[column]}


def values_of(instance: str, nodes: int, folder: Path, *sets: str) -> Values:
    """The values that genvalues writes for minimal inputs."""
    file = folder / "finetune.yaml"
    model, dataset = "meta-llama/Meta-Llama-3.1-8B", "{source: databricks/databricks-dolly-15k}"
    file.write_text(
        f"model: {model}\ndataset: {dataset}\ninstance: {instance}\nnodes: {nodes}\nimage: example.com/image:1\n"
    )
    values: Values = checked(Sources((file,), sets, CHART)).values
    return values


def stages(values: Values) -> list[Object]:
    """The objects that the runner of a detached release installs."""
    assert values["pipeline"]["mode"] == "detached"
    return render(config(render(values), "values.yaml"))


def row_of(objects: list[Object], stage: str, instance: str) -> tuple[Row, dict[str, Any]]:
    """The pods of one stage, as a row of the table, and their environment."""
    each = pod(objects, stage)
    job, spec, [container] = each.owner["spec"], each.spec, each.containers
    layout = config(objects, "run.yaml")["parallelism"]
    requests, limits, policy = (
        container["resources"]["requests"],
        container["resources"]["limits"],
        job["elasticPolicy"],
    )
    assert requests == limits, "requests equal limits"
    [shared] = [volume["emptyDir"] for volume in spec["volumes"] if volume["name"] == "shm"]
    assert shared["medium"] == "Memory"
    assert {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}["shm"] == "/dev/shm"
    assert spec["nodeSelector"]["node.kubernetes.io/instance-type"] == instance
    assert job["pytorchReplicaSpecs"]["Worker"]["replicas"] == layout["nodes"]
    assert int(job["nprocPerNode"]) == layout["processesPerNode"]
    host = policy["rdzvHost"].removeprefix(f"{each.owner['metadata']['name']}-")
    environment = {name: value for name, value in each.environment.items() if name not in OF_EVERY_STAGE | OF_TRAINING}
    row = {
        "instance": instance.removeprefix(HYPERPOD),
        "nodes": str(layout["nodes"]),
        "processes": job["nprocPerNode"],
        "TP": str(layout["tensorParallelSize"]),
        "DP": str(layout["dataParallelSize"]),
        "shard": str(layout["shardSize"]),
        "neuron": str(limits.get(NEURON, 0)),
        "efa": str(limits.get(EFA, 0)),
        "cpu": limits["cpu"],
        "memory": limits["memory"],
        "hugepages": str(sum(name.startswith("hugepages") for name in limits)),
        "/dev/shm": shared["sizeLimit"],
        "rendezvous": f"{policy['rdzvBackend']} {host} {policy['minReplicas']}:{policy['maxReplicas']}",
    }
    return row, environment


def test_the_page_lists_every_instance_and_number_of_nodes_once() -> None:
    every = {(name, nodes) for name in TRAINIUM for nodes in NODES}
    assert RUN_OF.keys() | REFUSED_OF.keys() == every
    assert len(RUNS) + len(REFUSED) == len(every)


@pytest.mark.parametrize("prefix", ["", HYPERPOD])
@pytest.mark.parametrize(("name", "nodes"), RUN_OF)
def test_every_cell_equals_what_compile_and_train_get(name: str, nodes: int, prefix: str, tmp_path: Path) -> None:
    if prefix and not TRAINIUM[name].hyperpod:
        pytest.skip("not an instance type of HyperPod")
    wanted = dict(RUN_OF[name, nodes])
    environment = environment_of(wanted.pop("environment"))
    objects = stages(values_of(prefix + name, nodes, tmp_path))
    for stage in ("compile", "train"):
        assert row_of(objects, stage, prefix + name) == (wanted, environment)
    for each in pods(objects):
        if not each.trains:
            assert not {variable["variable"] for variable in ENVIRONMENT} & each.environment.keys(), each.stage


@pytest.mark.parametrize("prefix", ["", HYPERPOD])
@pytest.mark.parametrize(("name", "nodes"), REFUSED_OF)
def test_the_others_are_rejected_with_the_reason(name: str, nodes: int, prefix: str, tmp_path: Path) -> None:
    if prefix and not TRAINIUM[name].hyperpod:
        pytest.skip("not an instance type of HyperPod")
    with pytest.raises(UserError) as refused:
        values_of(prefix + name, nodes, tmp_path)
    fix = f"Use nodes: 1, or {prefix}trn1.32xlarge or {prefix}trn2.48xlarge."
    assert str(refused.value).endswith(f"nodes: {prefix}{REFUSED_OF[name, nodes]}. {fix}")


@pytest.mark.parametrize(("name", "column"), [("trn1n.32xlarge", "trn1 CPU"), ("ml.trn2.48xlarge", "trn2 CPU")])
def test_a_cpu_pod_that_compiles_gets_the_target(name: str, column: str, tmp_path: Path) -> None:
    objects = stages(values_of(name, 2, tmp_path, "backend=xla", "compile.runsOn=cpu"))
    each = pod(objects, "neff")
    environment = {name: value for name, value in each.environment.items() if name not in OF_EVERY_STAGE}
    assert environment == environment_of(column)
    # The same cache with the same keys, which include the flags.
    for variable in ("NEURON_COMPILE_CACHE_URL", "NEURON_CC_FLAGS"):
        assert {pod(objects, stage).environment[variable] for stage in ("compile", "train")} == {environment[variable]}


@pytest.mark.parametrize("instance", ["trn1.32xlarge", "trn1n.32xlarge"])
@pytest.mark.parametrize("nodes", [1, 2])
def test_generated_values_match_the_reference_configuration(instance: str, nodes: int, tmp_path: Path) -> None:
    """32 processes per node, TP 8 x DP 4 (x nodes), bf16, accumulation 3, r 16, alpha 16, dropout 0.05, q and v."""
    objects = stages(values_of(instance, nodes, tmp_path))
    run = config(objects, "run.yaml")
    assert (run["backend"], run["device"]) == ("xla", "neuron")
    assert run["parallelism"] == {
        "nodes": nodes,
        "processesPerNode": 32,
        "tensorParallelSize": 8,
        "dataParallelSize": 4 * nodes,
        "shardSize": 1,
    }
    assert run["lora"] == {"r": 16, "alpha": 16, "dropout": 0.05, "targetModules": ["q_proj", "v_proj"]}
    training = run["training"]
    assert (training["gradientAccumulationSteps"], training["activationCheckpointing"]) == (3, "selective")
    for stage in ("compile", "train"):
        each = pod(objects, stage)
        assert each.owner["spec"]["nprocPerNode"] == "32", "one process for each core"
        devices = {NEURON: 16, EFA: {"trn1.32xlarge": 8, "trn1n.32xlarge": 16}[instance]}
        assert each.containers[0]["resources"]["limits"].items() >= devices.items()
        # bf16 is not a setting: the backend loads the weights in bf16, and Neuron removed the variables that cast.
        assert not {name for name in each.environment if "BF16" in name}
    assert not {"dtype", "bf16"} & {*run, *training, *run["lora"]}


def test_the_users_environment_takes_precedence(helm: int, tmp_path: Path) -> None:
    extra = {
        "extraEnv": {"NEURON_CC_FLAGS": "--model-type=transformer -O1", "MALLOC_ARENA_MAX": 8, "FI_LOG_LEVEL": "warn"}
    }
    values = merged(values_of("trn1.32xlarge", 1, tmp_path), {"stages": {"compile": extra, "train": extra}})
    objects = render(config(render(values, helm=helm), "values.yaml"), helm=helm)
    wanted = environment_of("trn1 one") | {name: str(value) for name, value in extra["extraEnv"].items()}
    for stage in ("compile", "train"):
        environment = pod(objects, stage).environment
        assert {
            name: value for name, value in environment.items() if name not in OF_EVERY_STAGE | OF_TRAINING
        } == wanted
    runtime_only = {"NEURON_RT_LOG_LEVEL": "INFO", "NEURON_RT_EXEC_TIMEOUT": 900}
    assert render(merged(values, {"stages": {"train": {"extraEnv": runtime_only}}}), helm=helm), (
        "it does not change the graph"
    )


def test_huge_pages_can_be_requested(tmp_path: Path) -> None:
    """Not requested by default: on nodes without preallocated huge pages the pod would stay Pending."""
    pages = {"resources": {bound: {"hugepages-2Mi": "5120Mi"} for bound in ("requests", "limits")}}
    objects = stages(merged(values_of("trn1.32xlarge", 2, tmp_path), {"stages": {"train": pages}}))
    for bound in ("requests", "limits"):
        assert pod(objects, "train").containers[0]["resources"][bound]["hugepages-2Mi"] == "5120Mi"
        assert "hugepages-2Mi" not in pod(objects, "compile").containers[0]["resources"][bound]


@pytest.mark.parametrize(("nodes", "column"), [(1, "trn2 xla one"), (2, "trn2 xla several")])
def test_backend_xla_on_trn2_gets_what_it_got_before_backend_native(nodes: int, column: str, tmp_path: Path) -> None:
    objects = stages(values_of("ml.trn2.48xlarge", nodes, tmp_path, "backend=xla"))
    for stage in ("compile", "train"):
        environment = pod(objects, stage).environment
        assert environment_of(column) == {
            name: value for name, value in environment.items() if name not in OF_EVERY_STAGE | OF_TRAINING
        }


def test_a_cpu_sets_none_of_it(helm: int) -> None:
    for each in pods(render(MINIMAL, helm=helm)):
        own = OF_TRAINING if each.trains else set()
        assert each.environment.keys() - OF_API_CLIENTS == OF_EVERY_STAGE | own
