"""The order of the stages, and how each is started."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from chart.manifests import (
    CHART,
    MINIMAL,
    Object,
    Pod,
    annotation,
    config,
    hooks,
    merged,
    one,
    pod,
    pods,
    render,
    stages,
    weight,
    workloads,
)
from genvalues.cluster.queueing import NOT_RELEASED, PREBUILT
from genvalues.cluster.workloads import workload_of

WEIGHTS = {
    "preflight": 0,
    "storage-prepare": 5,
    "tokenize": 10,
    "rehearse": 15,
    "compile": 20,
    "compile-gate": 21,
    "neff": 25,
    "train": 30,
    "train-gate": 31,
    "consolidate": 40,
    "merge": 50,
    "evaluate": 60,
    "publish": 70,
}
OPTIONAL = {"storage-prepare", "rehearse", "neff", "evaluate", "publish"}
NEEDS_CLUSTER = {"preflight", "storage-prepare", "compile-gate", "train-gate", "cleanup", "runner"}
TRAINER = {"tokenize", "rehearse", "compile", "neff", "train", "consolidate", "merge", "evaluate", "publish"}
DEVICES = {"aws.amazon.com/neuron": 16, "vpc.amazonaws.com/efa": 8}
TRAINIUM = merged(
    MINIMAL,
    {
        "instance": "ml.trn1.32xlarge",
        "backend": "xla",
        "devices": DEVICES,
        "parallelism": {"nodes": 2, "processesPerNode": 32, "tensorParallelSize": 8, "dataParallelSize": 8},
    },
)


def is_detached(objects: list[Object]) -> bool:
    return any(annotation(item, "llama-lora/stage") == "runner" for item in objects)


def test_stages_are_hooks_in_strict_order(objects: list[Object]) -> None:
    if is_detached(objects):
        return  # the inner release has the stages
    found = [(annotation(item, "llama-lora/stage"), weight(item)) for item in stages(objects)]
    weights = [weight for _, weight in found]
    assert weights == sorted(set(weights)), found
    assert dict(found).items() <= WEIGHTS.items()
    assert WEIGHTS.keys() - dict(found).keys() <= OPTIONAL
    assert all(hooks(item) == {"post-install", "post-upgrade"} for item in stages(objects))


def test_compile_and_train_are_suspended_until_the_gate_at_the_next_weight(objects: list[Object]) -> None:
    jobs = workloads(objects)
    assert [annotation(job, "llama-lora/stage") for job in jobs] == (
        [] if is_detached(objects) else ["compile", "train"]
    )
    for job in jobs:
        stage = annotation(job, "llama-lora/stage")
        gate = pod(objects, f"{stage}-gate")
        assert workload_of(job).is_suspended(job)
        assert weight(gate.owner) == weight(job) + 1
        command = gate.containers[0]["command"]
        assert command[:3] == ["genvalues", "cluster", "gate"]
        assert command[command.index("--stage") + 1] == stage
        assert command[command.index("--job") + 1] == job["metadata"]["name"]


@pytest.mark.parametrize("workload", ["pytorchjob", "trainjob"])
def test_a_later_helm_command_neither_deletes_a_job_nor_reuses_its_name(tmp_path: Path, workload: str) -> None:
    def jobs(objects: list[Object]) -> dict[str, Object]:
        return {str(annotation(item, "llama-lora/stage")): item for item in workloads(objects)}

    values = merged(MINIMAL, {"workload": workload})
    first = jobs(render(values))
    later_objects = render(values, chart=chart_at_revision(1234, tmp_path))
    later = jobs(later_objects)
    for stage in ("compile", "train"):
        assert first[stage]["metadata"]["name"] == f"llama-{stage}-1"
        assert later[stage]["metadata"]["name"] == f"llama-{stage}-1234"
        first_worker = f"llama-{stage}-1234-" + ("worker-0" if workload == "pytorchjob" else "node-0-0.")
        assert first_worker in json.dumps(later[stage])
        assert f"llama-{stage}-1234" in pod(later_objects, f"{stage}-gate").containers[0]["command"]
        assert annotation(first[stage], "helm.sh/hook-delete-policy") == "hook-failed"


def chart_at_revision(revision: int, folder: Path) -> Path:
    """Render another revision; `helm template` renders only revision 1."""
    chart = folder / "chart"
    shutil.copytree(CHART, chart)
    for template in chart.rglob("*.*"):
        if template.suffix in {".tpl", ".yaml", ".txt"}:
            text = re.sub(r"(\.root)?\.Release\.Revision", str(revision), template.read_text())
            template.write_text(text)
    return chart


def test_an_upgrade_renders_what_an_install_does(values_file: Path, helm: int) -> None:
    assert render(values_file, helm=helm, upgrade=True) == render(values_file, helm=helm)


def test_stage_jobs_are_replaced_and_their_log_is_printed_on_failure(objects: list[Object]) -> None:
    for job in stages(objects):
        if job["kind"] == "Job":
            assert annotation(job, "helm.sh/hook-delete-policy") == "before-hook-creation"
            assert annotation(job, "helm.sh/hook-output-log-policy") == "hook-failed"


def test_no_stage_hook_uses_features_that_break_helm(objects: list[Object]) -> None:
    for item in objects:
        assert "ttlSecondsAfterFinished" not in item.get("spec", {}), "hangs Helm 4"
        if hooks(item):
            assert item["kind"] != "PersistentVolumeClaim", "deleted on reinstall"


def test_workers_only_with_c10d_at_the_first_worker(objects: list[Object]) -> None:
    for job in (item for item in objects if item["kind"] == "PyTorchJob"):
        spec = job["spec"]
        assert list(spec["pytorchReplicaSpecs"]) == ["Worker"], (
            "a Master adds an init container that Pod Security rejects"
        )
        nodes = spec["pytorchReplicaSpecs"]["Worker"]["replicas"]
        assert spec["elasticPolicy"] == {
            "rdzvBackend": "c10d",
            "rdzvHost": f"{job['metadata']['name']}-worker-0",
            "minReplicas": nodes,
            "maxReplicas": nodes,
        }
        assert spec["nprocPerNode"] == str(config(objects, "run.yaml")["parallelism"]["processesPerNode"])
        assert nodes == config(objects, "cluster.yaml")["job"]["nodes"]
        assert spec["runPolicy"]["cleanPodPolicy"] == "None", "the first worker's success would kill the others"
        assert spec["pytorchReplicaSpecs"]["Worker"]["restartPolicy"] == "OnFailure"
        assert "restartPolicy" not in spec["pytorchReplicaSpecs"]["Worker"]["template"]["spec"], "the operator warns"
        [container] = spec["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
        assert container["name"] == "pytorch", "the operator looks for a container of this name"


def test_a_trainjob_has_its_own_runtime_and_the_rendezvous_of_a_pytorchjob(helm: int) -> None:
    spread = {"parallelism": {"nodes": 2, "processesPerNode": 4, "dataParallelSize": 8}}
    limits = {"stages": {"train": {"backoffLimit": 2, "activeDeadlineSeconds": 3600}}}
    objects = render(merged(MINIMAL, spread, limits, {"workload": "trainjob"}), helm=helm)
    job, runtime = one(objects, "TrainJob", "llama-train-1"), one(objects, "TrainingRuntime", "llama-train-1")
    reference = {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": "llama-train-1"}
    assert job["spec"]["runtimeRef"] == reference
    assert hooks(runtime) == hooks(job) and weight(runtime) < weight(job), "Trainer refuses a TrainJob without it"
    assert annotation(runtime, "helm.sh/hook-delete-policy") == "hook-failed"
    assert runtime["metadata"]["labels"]["trainer.kubeflow.org/framework"] == "torch"
    assert runtime["spec"]["mlPolicy"] == {"numNodes": 2, "torch": {}}, "2.0.0 and 2.2.0 have these fields"
    [node] = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    assert node["name"] == "node" and node["replicas"] == 1
    assert node["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    assert node["template"]["spec"]["activeDeadlineSeconds"] == 3600
    assert node["template"]["spec"]["backoffLimit"] == 5
    assert node["template"]["spec"]["podReplacementPolicy"] == "Failed", "two pods would have one host name"
    worker = node["template"]["spec"]["template"]["spec"]
    assert worker["restartPolicy"] == "OnFailure" and [one["name"] for one in worker["containers"]] == ["node"]
    assert job["spec"]["trainer"] == {
        "numNodes": 2,
        "numProcPerNode": 4,
        "env": [
            {"name": "PET_RDZV_BACKEND", "value": "c10d"},
            {"name": "PET_RDZV_ENDPOINT", "value": "llama-train-1-node-0-0.llama-train-1"},
        ],
    }
    [pytorch] = pod(render(merged(MINIMAL, spread, limits), helm=helm), "train").containers
    assert {**worker["containers"][0], "name": "pytorch"} == pytorch


@pytest.mark.parametrize("workload", ["pytorchjob", "trainjob"])
@pytest.mark.parametrize(("nodes", "limit"), [(1, 0), (1, 3), (2, 1), (4, 3)])
def test_each_worker_has_its_retries_although_the_operator_counts_all_together(
    nodes: int, limit: int, workload: str
) -> None:
    parallelism = {"nodes": nodes, "dataParallelSize": 4 * nodes}
    of_train = {"workload": workload, "stages": {"train": {"backoffLimit": limit}}}
    objects = render(merged(TRAINIUM, {"parallelism": parallelism}, of_train))
    job = next(job for job in workloads(objects) if annotation(job, "llama-lora/stage") == "train")
    if workload == "pytorchjob":
        counted = job["spec"]["runPolicy"]["backoffLimit"]
    else:
        runtime = one(objects, "TrainingRuntime", job["metadata"]["name"])
        counted = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["backoffLimit"]
    assert counted > limit * nodes, "not reached before every worker's last retry"
    assert workload_of(job).retries(job) == limit, "the gate's limit for each worker"
    assert workload_of(job).grace_period(job) == 120, "the time whose cost the gate reserves"


def own_command(container: Object) -> list[str]:
    """The command without the shell that looks for it first, in preflight and the runner."""
    command: list[str] = container["command"]
    return command[3:] if command[:2] == ["sh", "-c"] else command


@pytest.mark.parametrize(("mode", "stage"), [("attached", "preflight"), ("detached", "runner")])
def test_the_first_pod_of_another_image_says_that_it_is_not_llama_loras(mode: str, stage: str, tmp_path: Path) -> None:
    """AWS's own container has no genvalues. Run here with the container's command and an empty PATH but for sh."""
    other = {"repository": "763104351884.dkr.ecr.us-west-2.amazonaws.com/pytorch-training-neuronx", "tag": "2.9.0"}
    values = merged(MINIMAL, {"pipeline": {"mode": mode}, "image": other})
    [container] = pod(render(values), stage).containers
    ended = subprocess.run(
        container["command"],
        env={"PATH": str(tmp_path)},
        executable="/bin/sh",
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2, "final, so Kubernetes does not retry it"
    assert "pytorch-training-neuronx:2.9.0 has no genvalues" in ended.stderr and "genvalues image push" in ended.stderr

    program = tmp_path / "genvalues"
    program.write_text('#!/bin/sh\necho $$ "$@"\n')
    program.chmod(0o755)
    started = subprocess.Popen(
        container["command"], env={"PATH": str(tmp_path)}, executable="/bin/sh", stdout=subprocess.PIPE, text=True
    )
    said = started.communicate()[0].split()
    assert said[0] == str(started.pid), "it replaces the shell, so it gets the signals"
    assert said[1:] == own_command(container)[1:]


def test_status_2_is_final_and_a_lost_node_does_not_count_as_a_retry(objects: list[Object]) -> None:
    for job in (item for item in objects if item["kind"] == "Job"):
        final, lost = job["spec"]["podFailurePolicy"]["rules"]
        [container] = job["spec"]["template"]["spec"]["containers"]
        assert final["action"] == "FailJob"
        assert final["onExitCodes"]["containerName"] == container["name"]
        assert final["onExitCodes"]["operator"] == "In"
        assert final["onPodConditions"] == [], "required by older Kubernetes versions"
        command = own_command(container)
        follows = command[:2] == ["genvalues", "cluster"] and command[2] != "preflight"
        assert final["onExitCodes"]["values"] == ([1, 2] if follows else [2])
        assert lost == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
        assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never", "required by podFailurePolicy"
        assert "backoffLimit" in job["spec"]


def test_neuron_and_efa_only_in_compile_and_train(objects: list[Object]) -> None:
    devices = config(objects, "cluster.yaml")["job"]["devices"]
    for each in pods(objects):
        for container in each.containers:
            for bound in ("requests", "limits"):
                asked = {name: count for name, count in container["resources"][bound].items() if "/" in name}
                assert asked == (devices if each.trains else {}), f"{each.stage} {bound}"
        if not each.trains:
            assert "node.kubernetes.io/instance-type" not in each.spec.get("nodeSelector", {})


def test_compile_and_train_have_the_same_topology(helm: int) -> None:
    objects = render(TRAINIUM, helm=helm)
    compile_, train = ({**pod(objects, stage).owner["spec"]} for stage in ("compile", "train"))
    for spec in (compile_, train):
        assert spec.pop("elasticPolicy")["maxReplicas"] == 2
        [container] = spec["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
        assert container["resources"]["limits"].items() >= DEVICES.items()
    assert compile_["nprocPerNode"] == train["nprocPerNode"] == "32"


def test_training_pods_get_a_grace_period_shared_memory_and_no_disruption(
    objects: list[Object], values_file: Path
) -> None:
    for each in pods(objects):
        shared = [volume["name"] for volume in each.spec["volumes"] if volume.get("emptyDir", {}).get("medium")]
        do_not_disrupt = each.template["metadata"].get("annotations", {}).get("karpenter.sh/do-not-disrupt")
        if each.trains:
            changed = values_file.name == "everything-values.yaml" and each.stage == "compile"
            assert each.spec["terminationGracePeriodSeconds"] == (45 if changed else 120)
            [mount] = [mount for mount in each.containers[0]["volumeMounts"] if mount["mountPath"] == "/dev/shm"]
            assert shared == [mount["name"]]
            overridden = values_file.name == "everything-values.yaml" and each.stage == "train"
            assert do_not_disrupt == ("false" if overridden else "true")
        else:
            assert ("terminationGracePeriodSeconds" in each.spec) == (values_file.name == "everything-values.yaml")
            assert not shared
            assert do_not_disrupt is None


def test_training_pods_select_their_nodes_and_tolerate_their_taints() -> None:
    spec = pod(render(TRAINIUM), "train").spec
    assert spec["nodeSelector"] == {"node.kubernetes.io/instance-type": "ml.trn1.32xlarge"}
    assert spec["tolerations"] == [{"key": key, "operator": "Exists", "effect": "NoSchedule"} for key in DEVICES]
    assert "nodeSelector" not in pod(render(MINIMAL), "train").spec


def test_hyperpod_auto_resume_sets_the_annotations_that_hyperpod_reads() -> None:
    objects = render(merged(TRAINIUM, {"hyperpod": {"autoResume": True, "maxRetries": 3}}))
    for stage in ("compile", "train"):
        each = pod(objects, stage)
        assert annotation(each.owner, "sagemaker.amazonaws.com/enable-job-auto-resume") == "true"
        assert annotation(each.owner, "sagemaker.amazonaws.com/job-max-retry-count") == "3"
        assert each.spec["nodeSelector"]["sagemaker.amazonaws.com/node-health-status"] == "Schedulable"
    assert "sagemaker" not in str(render(TRAINIUM))


def test_a_gate_is_started_again_however_few_retries_and_seconds_the_stages_have() -> None:
    objects = render(merged(MINIMAL, {"stageDefaults": {"backoffLimit": 0, "activeDeadlineSeconds": 60}}))
    for stage in ("compile", "train"):
        gate = pod(objects, f"{stage}-gate").owner["spec"]
        assert gate["backoffLimit"] == 30, "without it nothing enforces guards.maxCost and guards.stallTimeout"
        assert "activeDeadlineSeconds" not in gate
        assert {"type": "DisruptionTarget", "status": "True"} in gate["podFailurePolicy"]["rules"][1]["onPodConditions"]


QUEUE = "kueue.x-k8s.io/queue-name"


@pytest.mark.parametrize("workload", ["pytorchjob", "trainjob"])
def test_the_queue_is_passed_to_the_gate_and_the_job_is_held_until_its_release(workload: str) -> None:
    kueue = {"queueName": "research", "priorityClass": "high"}
    objects = render(merged(TRAINIUM, {"kueue": kueue, "workload": workload}))
    assert config(objects, "cluster.yaml")["job"]["queueName"] == "research"
    for job in workloads(objects):
        held = PREBUILT if workload == "trainjob" else QUEUE
        assert job["metadata"]["labels"][held] == NOT_RELEASED, "Kueue would start it before the gate releases it"
        assert job["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] == "high"


@pytest.mark.parametrize(
    ("served", "expected"),
    [((), None), (("kueue.x-k8s.io/v1beta1",), NOT_RELEASED), (("kueue.x-k8s.io/v1beta2",), NOT_RELEASED)],
)
def test_where_kueue_is_installed_its_default_queue_gets_no_job_before_the_release(
    served: tuple[str, ...], expected: str | None
) -> None:
    for job in workloads(render(TRAINIUM, api_versions=served)):
        assert job["metadata"]["labels"].get(QUEUE) == expected


def test_only_stages_of_the_trainer_on_cpus_are_in_the_queue_for_cpus() -> None:
    objects = render(merged(TRAINIUM, {"kueue": {"cpuQueueName": "cpus"}, "rehearse": {"enabled": True}}))
    queued = {each.stage for each in pods(objects) if each.owner["metadata"]["labels"].get(QUEUE) == "cpus"}
    assert queued == {"tokenize", "rehearse", "consolidate", "merge", "evaluate"}
    assert not any(QUEUE in each.template["metadata"]["labels"] for each in pods(objects))


def test_each_stage_runs_its_command(objects: list[Object]) -> None:
    for each in pods(objects):
        [container] = each.containers
        assert annotation(each.owner, "llama-lora/needs-cluster") == ("true" if each.stage in NEEDS_CLUSTER else None)
        assert each.owner["metadata"]["labels"]["app.kubernetes.io/component"] == each.stage
        if each.stage == "verify":
            assert container["command"] == ["llama-lora", "verify", "merge", "--config", "/etc/llama-lora/run.yaml"]
        elif each.stage in TRAINER:
            assert container["command"] == ["llama-lora", each.stage, "--config", "/etc/llama-lora/run.yaml"]
        elif each.stage != "storage-prepare":
            assert own_command(container)[:2] == ["genvalues", "cluster"]
        fixed = {"PyTorchJob": "pytorch", "TrainingRuntime": "node"}
        assert container["name"] == fixed.get(each.owner["kind"], each.stage)


def test_every_stage_mounts_the_workspace_and_can_otherwise_write_only_to_tmp(objects: list[Object]) -> None:
    mount_path = render_mount_path(objects)
    for each in pods(objects):
        [container] = each.containers
        mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
        assert mounts.keys() <= {volume["name"] for volume in each.spec["volumes"]}
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert mounts["tmp"]["mountPath"] == "/tmp"
        assert each.environment["LLAMA_LORA_WORKSPACE"] == mount_path
        assert each.environment["LLAMA_LORA_IMAGE"] == container["image"]
        assert each.environment["HOME"] == "/tmp"
        assert each.environment["HF_HOME"] == "/tmp/huggingface"
        assert each.environment["PYTHONUNBUFFERED"] == "1"
        names = [entry["name"] for entry in container["env"]]
        assert len(names) == len(set(names))
        mounts_workspace = each.stage in TRAINER | {"storage-prepare", "compile-gate", "train-gate", "verify"}
        assert ("workspace" in mounts) == mounts_workspace, each.stage
        assert ("config" in mounts) == (each.stage not in {"storage-prepare", "cleanup"}), each.stage
        if mounts_workspace:
            assert mounts["workspace"]["mountPath"] == mount_path


def render_mount_path(objects: list[Object]) -> str:
    return str(next(pods(objects)).environment["LLAMA_LORA_WORKSPACE"])


def test_preflight_starts_without_the_claim_and_the_secret(objects: list[Object]) -> None:
    for each in pods(objects):
        if each.stage in {"preflight", "cleanup", "runner"}:
            used = str([volume for volume in each.spec["volumes"] if volume["name"] in {"tmp", "config", "workspace"}])
            assert "persistentVolumeClaim" not in used
            assert "secretKeyRef" not in str(each.spec)


def test_cleanup_runs_before_install_delete_and_rollback_and_has_a_deadline(objects: list[Object]) -> None:
    cleanups = [each for each in pods(objects) if each.stage == "cleanup"]
    stop_before = sorted(sorted(hooks(each.owner)) for each in cleanups)
    # The inner release has no cleanup; that of the outer release stops both.
    assert stop_before == [["pre-delete", "pre-rollback"], ["pre-install"]] or (not cleanups and is_inner(objects))
    for cleanup in cleanups:
        command = cleanup.containers[0]["command"]
        assert command[:3] == ["genvalues", "cluster", "cleanup"]
        assert command[command.index("--own-job") + 1] == cleanup.owner["metadata"]["name"]
        assert command[command.index("--run") + 1] == config(objects, "cluster.yaml")["run"]
        assert [v["name"] for v in cleanup.spec["volumes"] if v["name"] in {"config", "workspace"}] == []
        account = cleanup.spec["serviceAccountName"]
        rbac = [item for item in objects if item["metadata"]["name"] == account and item["kind"] != "Job"]
        if rbac:
            assert sorted(item["kind"] for item in rbac) == ["Role", "RoleBinding", "ServiceAccount"]
        for item in rbac:
            assert hooks(item) == {"pre-install", "pre-delete", "pre-rollback"}, "an earlier revision may not have it"
            assert weight(item) == -20 < weight(cleanup.owner)
            assert annotation(item, "helm.sh/hook-delete-policy") == "before-hook-creation,hook-succeeded"


def is_inner(objects: list[Object]) -> bool:
    return not any(item["kind"] in ("ServiceAccount", "PersistentVolumeClaim") for item in objects)


def cleanup_before(hook: str) -> Pod:
    [found] = [each for each in pods(render(MINIMAL)) if each.stage == "cleanup" and hook in hooks(each.owner)]
    return found


def test_uninstall_with_an_image_that_cannot_be_pulled_ends_within_150_seconds() -> None:
    assert cleanup_before("pre-delete").owner["spec"]["activeDeadlineSeconds"] <= 130


def test_the_first_install_allows_time_to_pull_a_large_image() -> None:
    assert cleanup_before("pre-install").owner["spec"]["activeDeadlineSeconds"] >= 600


def test_cleanup_waits_longer_than_the_grace_period_and_its_job_longer_than_cleanup() -> None:
    for hook in ("pre-install", "pre-delete"):
        cleanup = cleanup_before(hook)
        command = cleanup.containers[0]["command"]
        own = int(command[command.index("--timeout-seconds") + 1])
        of_job = int(command[command.index("--own-job") + 2])
        assert pod(render(MINIMAL), "train").spec["terminationGracePeriodSeconds"] < own
        assert cleanup.owner["spec"]["activeDeadlineSeconds"] + own < of_job


def test_the_deadline_of_preflight_is_short() -> None:
    assert pod(render(MINIMAL), "preflight").owner["spec"]["activeDeadlineSeconds"] <= 600


def test_evaluate_and_storage_prepare_can_be_turned_off() -> None:
    off = {"evaluation": {"enabled": False}, "storage": {"prepare": {"enabled": False}}}
    found = {annotation(item, "llama-lora/stage") for item in stages(render(merged(MINIMAL, off)))}
    assert found == WEIGHTS.keys() - OPTIONAL


def test_a_detached_release_has_storage_config_rbac_and_a_runner(helm: int) -> None:
    detached = merged(TRAINIUM, {"pipeline": {"mode": "detached"}})
    objects = render(detached, helm=helm)
    assert sorted(each.stage for each in pods(objects)) == ["cleanup", "cleanup", "runner", "verify"]
    runner = pod(objects, "runner")
    command = runner.containers[0]["command"]
    assert command[command.index("--own-job") + 1] == runner.owner["metadata"]["name"]
    assert not hooks(runner.owner), "helm install would wait for it"
    assert runner.owner["metadata"]["name"] == "llama-runner-1"
    assert one(objects, "PersistentVolumeClaim")["metadata"]["name"] == "llama-workspace"
    accounts = {item["metadata"]["name"] for item in objects if item["kind"] == "ServiceAccount"}
    assert accounts == {f"llama-{name}" for name in ("stage", "tokenize", "preflight", "gate", "cleanup", "runner")}


def test_the_inner_release_has_the_stages_without_storage_and_rbac(helm: int) -> None:
    changes = {"pipeline": {"mode": "detached"}, "fullnameOverride": "other", "compile": {"runsOn": "cpu"}}
    detached = merged(TRAINIUM, changes, {"rehearse": {"enabled": True}, "publish": {"s3": {"uri": "s3://bucket/a"}}})
    outer = render(detached, helm=helm)
    inner = render(config(outer, "values.yaml"), helm=helm, release="llama-run")
    attached = render(merged(detached, {"pipeline": {"mode": "attached"}}), helm=helm)

    assert {item["kind"] for item in inner} == {"ConfigMap", "Job", "PyTorchJob", "Pod"}
    assert [annotation(item, "llama-lora/stage") for item in stages(inner)] == list(WEIGHTS)
    accounts = {item["metadata"]["name"] for item in outer if item["kind"] == "ServiceAccount"}
    assert {each.spec["serviceAccountName"] for each in pods(inner)} <= accounts
    assert config(inner, "run.yaml") == config(attached, "run.yaml")
    assert config(inner, "cluster.yaml")["claim"] == {"name": "llama-workspace", "managed": False}
    names = [{(item["kind"], item["metadata"]["name"]) for item in objects} for objects in (outer, inner)]
    assert not names[0] & names[1]


def test_with_compile_on_cpu_neff_compiles_the_collected_graphs_before_training(helm: int) -> None:
    on_cpu = merged(TRAINIUM, {"compile": {"runsOn": "cpu"}, "stages": {"neff": {"nodeSelector": {"pool": "big"}}}})
    neff = pod(render(on_cpu, helm=helm), "neff")
    assert WEIGHTS["compile-gate"] < weight(neff.owner) < WEIGHTS["train"]
    [container] = neff.containers
    assert container["command"][:2] == ["llama-lora", "neff"] and not neff.trains
    assert neff.spec["nodeSelector"] == {"pool": "big"}
    environment = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert environment["NEURON_PLATFORM_TARGET_OVERRIDE"] == "trn1", "there is no device to detect the target from"
    for values in (TRAINIUM, merged(MINIMAL, {"compile": {"runsOn": "cpu"}})):
        assert not any(each.stage == "neff" for each in pods(render(values, helm=helm)))
