"""The values of the chart: the settings of a run, and how the cluster runs it.

``chart/values.schema.json`` and ``chart/values.yaml`` are generated from ``Values``: a field's default is the chart's
default, its description the comment. Kubernetes' own structures are declared as far as
a typo would go unnoticed until a Job cannot make its pods; the API server checks the rest.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, WithJsonSchema

from genvalues.settings.base import DIGEST, DNS_LABEL, DNS_NAME, LARGE, REPOSITORY, RUN_NAME, TAG, Block, Name, optional
from genvalues.settings.datasets import BUCKET
from genvalues.settings.run import (
    TRAIN_GRACE_SECONDS,
    Backend,
    Compile,
    DatasetOptions,
    Evaluation,
    Format,
    Lora,
    Model,
    Monitoring,
    Parallelism,
    Probe,
    Processes,
    Publish,
    Rehearse,
    Source,
    TensorParallelSize,
    Training,
    Verify,
)
from genvalues.settings.shared import (
    ExistingClaim,
    FileSystem,
    GuardOptions,
    HuggingFace,
    Size,
    StallTimeout,
    StorageClass,
    StorageKind,
)

# --- Kubernetes

QUANTITY = r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"
Quantity = Annotated[
    str | float,
    WithJsonSchema({"title": "Quantity", "type": ["string", "number"], "minimum": 0, "pattern": QUANTITY}),
]
PositiveQuantity = Annotated[  # a quantity above 0
    Quantity,
    WithJsonSchema(
        {
            "title": "Quantity",
            "type": ["string", "number"],
            "exclusiveMinimum": 0,
            "pattern": r"^([0-9]*[1-9][0-9]*(\.[0-9]+)?|[0-9]+\.[0-9]*[1-9][0-9]*)(m|k|M|G|T|Ki|Mi|Gi|Ti)?$",
        }
    ),
]
# A relative path without the part .. ; RE2 cannot exclude a word.
PATH_PART = r"([^/.][^/]*|\.([^/.][^/]*)?|\.\.[^/]+)"
RELATIVE_PATH = optional(rf"{PATH_PART}(/+{PATH_PART})*/?")
ENVIRONMENT_NAME = r"^[A-Za-z_][A-Za-z0-9_]*$"
DEVICE = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$"
QUALIFIED_NAME = rf"^({DNS_NAME}/)?[A-Za-z0-9]([-A-Za-z0-9_.]{{0,61}}[A-Za-z0-9])?$"
LABEL_VALUE = r"^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$"
QualifiedName = Annotated[str, Field(pattern=QUALIFIED_NAME)]  # the key of a label or an annotation
Labels = dict[QualifiedName, Annotated[str, Field(pattern=LABEL_VALUE)]]
Annotations = dict[QualifiedName, str]
VolumeName = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")]
Environment = dict[Annotated[str, Field(pattern=ENVIRONMENT_NAME)], str | float | bool]
KubernetesObject = dict[str, Any]


class ResourceList(Block):
    """Resources of one container. Devices do not belong here but in devices."""

    cpu: Quantity | None = Field(None, description="Cores. 500m is half a core.")
    memory: Quantity | None = Field(None, description="Bytes, such as 512Mi or 8Gi.")
    ephemeral_storage: Quantity | None = Field(
        None, alias="ephemeral-storage", description="Disk space of the node, for logs and /tmp."
    )
    hugepages_2mi: Quantity | None = Field(
        None,
        alias="hugepages-2Mi",
        description="Huge pages of 2 MiB. On a node that has none set aside the pod stays Pending.",
    )
    hugepages_1gi: Quantity | None = Field(None, alias="hugepages-1Gi", description="Huge pages of 1 GiB.")


class Resources(Block):
    """Resources of the container."""

    requests: ResourceList | None = Field(None, description="Resources that a node must have free.")
    limits: ResourceList | None = Field(None, description="Resources that the container may use at most.")


class VolumeSource(Block):
    """A volume source that Pod Security `restricted` allows; exactly one key."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1, "maxProperties": 1})

    config_map: KubernetesObject | None = Field(None, description="Files of a ConfigMap.")
    csi: KubernetesObject | None = Field(None, description="A volume of a CSI driver, for the lifetime of the pod.")
    downward_api: KubernetesObject | None = Field(
        None, alias="downwardAPI", description="Files with information about the pod."
    )
    empty_dir: KubernetesObject | None = Field(
        None, description="An empty directory for the lifetime of the pod. {}: on the node's disk."
    )
    ephemeral: KubernetesObject | None = Field(None, description="A claim for the lifetime of the pod.")
    persistent_volume_claim: KubernetesObject | None = Field(None, description="An existing claim: {claimName: ...}.")
    projected: KubernetesObject | None = Field(None, description="Several of these in one directory.")
    secret: KubernetesObject | None = Field(None, description="Files of a Secret: {secretName: ...}.")


class VolumeMount(Block):
    """Where a volume is mounted."""

    # A colon is refused by the API server; at least one character that is none of / and . means: not the root.
    mount_path: str = Field(
        pattern=r"^/[^:]*[^/.:][^:]*$", description="Absolute path, not / and not used by another volume."
    )
    read_only: bool | None = Field(None, description="Mount read-only.")
    sub_path: str | None = Field(
        None,
        pattern=RELATIVE_PATH,
        description="A directory of the volume to mount instead of its root: a relative path without ..",
    )


class Toleration(Block):
    """A taint to tolerate."""

    model_config = ConfigDict(
        json_schema_extra={
            "allOf": [
                {
                    "if": {"required": ["operator"], "properties": {"operator": {"enum": ["Exists"]}}},
                    "then": {"properties": {"value": {"maxLength": 0}}},
                    "else": {"required": ["key"], "properties": {"key": {"type": "string"}}},
                },
                {
                    "if": {"required": ["tolerationSeconds"], "properties": {"tolerationSeconds": {"type": "integer"}}},
                    "then": {"required": ["effect"], "properties": {"effect": {"enum": ["NoExecute"]}}},
                },
            ]
        }
    )

    key: str | None = Field(
        None, pattern=QUALIFIED_NAME, description="Key of the taint. Not set, with operator Exists: every taint."
    )
    operator: Literal["Exists", "Equal", "Lt", "Gt"] | None = Field(
        None, description="Exists: any value. Equal (the default): this value."
    )
    value: str | None = Field(None, description="Value of the taint. Not with operator Exists.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        None, description="Effect of the taint. Not set: every effect."
    )
    toleration_seconds: int | None = Field(None, description="How long to tolerate a taint of effect NoExecute.")


class NodeSelectorTerms(Block):
    """Nodes that match one of these terms."""

    node_selector_terms: list[KubernetesObject] = Field(min_length=1, description="Terms, of which one must match.")


Weight = Annotated[int, Field(ge=1, le=100, description="How much it counts among the preferred terms.")]


class PreferredNodes(Block):
    """Nodes to prefer."""

    weight: Weight
    preference: KubernetesObject = Field(description="A term that they match.")


class PreferredPods(Block):
    """Pods to prefer to be close to, or apart from."""

    weight: Weight
    pod_affinity_term: KubernetesObject = Field(description="A pod affinity term that they match.")


class NodeAffinity(Block):
    """Which nodes to run on."""

    required: NodeSelectorTerms | None = Field(
        None, alias="requiredDuringSchedulingIgnoredDuringExecution", description="Required: nodeSelectorTerms."
    )
    preferred: list[PreferredNodes] | None = Field(
        None, alias="preferredDuringSchedulingIgnoredDuringExecution", description="Preferred, each with a weight."
    )


class PodAffinity(Block):
    """Which pods to be close to, or apart from."""

    required: list[KubernetesObject] | None = Field(
        None, alias="requiredDuringSchedulingIgnoredDuringExecution", description="Required: pod affinity terms."
    )
    preferred: list[PreferredPods] | None = Field(
        None,
        alias="preferredDuringSchedulingIgnoredDuringExecution",
        description="Preferred, each with a weight.",
    )


class Affinity(Block):
    """Affinity of the pods."""

    node_affinity: NodeAffinity | None = Field(None, description="Which nodes to run on.")
    pod_affinity: PodAffinity | None = Field(None, description="Which pods to be close to.")
    pod_anti_affinity: PodAffinity | None = Field(None, description="Which pods to be apart from.")


class TopologySpread(Block):
    """How to spread the pods over the domains of a topology."""

    max_skew: int = Field(ge=1, description="By how many pods two domains may differ.")
    topology_key: str = Field(pattern=QUALIFIED_NAME, description="Label of the nodes that names their domain.")
    when_unsatisfiable: Literal["DoNotSchedule", "ScheduleAnyway"] = Field(description="Whether it is required.")
    label_selector: KubernetesObject | None = Field(None, description="The pods to count.")
    match_label_keys: list[str] | None = Field(None, description="Labels whose value in this pod selects the pods.")
    min_domains: int | None = Field(None, ge=1, description="At least this many domains.")
    node_affinity_policy: Literal["Honor", "Ignore"] | None = Field(None, description="Whether affinity counts.")
    node_taints_policy: Literal["Honor", "Ignore"] | None = Field(None, description="Whether taints count.")


class SecretKey(Block):
    """One key of a Secret."""

    name: str = Field(pattern=f"^{DNS_NAME}$", max_length=253, description="Name of the Secret.")
    key: str = Field(pattern=r"^[-._a-zA-Z0-9]+$", max_length=253, description="Key in the Secret.")
    optional: bool | None = Field(None, description="Start without the variable if the Secret or the key is missing.")


class ObjectReference(Block):
    """A Secret or a ConfigMap."""

    name: str = Field(pattern=f"^{DNS_NAME}$", max_length=253, description="Its name.")
    optional: bool | None = Field(None, description="Start without its variables if it is missing.")


class EnvironmentSource(Block):
    """All keys of a Secret or a ConfigMap as variables; exactly one of secretRef and configMapRef."""

    secret_ref: ObjectReference | None = Field(None, description="A Secret: {name: ...}.")
    config_map_ref: ObjectReference | None = Field(None, description="A ConfigMap: {name: ...}.")
    prefix: str | None = Field(None, pattern=ENVIRONMENT_NAME, description="Put before each variable's name.")


class SeccompProfile(Block):
    """Seccomp profile of the pods. Unconfined is refused, as by Pod Security `restricted`."""

    type: Literal["RuntimeDefault", "Localhost"] = Field(description="The runtime's profile, or a file of the node.")
    localhost_profile: str | None = Field(
        None,
        pattern=RELATIVE_PATH,
        description="With Localhost: the profile's path below the kubelet's seccomp directory, relative and without ..",
    )


class StageSettings(Block):
    """Pods of one stage. A key that is not set here is taken from stageDefaults."""

    resources: Resources | None = None
    node_selector: Labels | None = Field(
        None, description="Labels of the nodes to run on. compile and train also select their instance type."
    )
    tolerations: list[Toleration] | None = Field(
        None, description="Taints to tolerate. compile and train also tolerate those of their devices."
    )
    affinity: Affinity | None = Field(None, description="Affinity of the pods.")
    topology_spread_constraints: list[TopologySpread] | None = Field(
        None, description="How to spread the pods, such as the workers of train over nodes."
    )
    scheduler_name: Name | None = Field(None, description="Scheduler of the pods. Empty: the cluster's default.")
    priority_class_name: Name | None = Field(
        None, description="PriorityClass of the pods. Empty: the cluster's default."
    )
    service_account_name: Name | None = Field(
        None,
        description="An existing service account of this stage, instead of the chart's. Not in stageDefaults: stages "
        "have different permissions. preflight, gate, cleanup and runner need those of the chart's account.",
    )
    extra_env: Environment | None = Field(
        None, description="Environment variables, NAME: value. A number such as 1.10 in quotes. No secrets."
    )
    extra_env_secrets: dict[Annotated[str, Field(pattern=ENVIRONMENT_NAME)], SecretKey] | None = Field(
        None,
        description="Variables from keys of Secrets, such as WANDB_API_KEY: {name: wandb, key: api-key}. Only stages "
        "of the trainer get them, not those with permissions in the cluster.",
    )
    extra_env_from: dict[str, EnvironmentSource] | None = Field(
        None,
        description="All keys of Secrets or ConfigMaps as variables, NAME: {secretRef: {name: ...}}. Who may write "
        "it can run code in the pod (LD_PRELOAD): prefer extraEnvSecrets. Only stages of the trainer get them.",
    )
    extra_volumes: dict[VolumeName, VolumeSource] | None = Field(
        None, description="Volumes, NAME: {volume source}, such as scratch: {emptyDir: {}}."
    )
    extra_volume_mounts: dict[VolumeName, VolumeMount] | None = Field(
        None, description="Mounts of these volumes, NAME: {mountPath: ..., readOnly: true}."
    )
    pod_labels: Labels | None = Field(None, description="Labels of the pods. Those of the chart take precedence.")
    pod_annotations: Annotations | None = Field(None, description="Annotations of the pods.")
    job_labels: Labels | None = Field(
        None, description="Labels of the stage's Job, or of the job of compile and train; not of its pods."
    )
    supplemental_groups: list[Annotated[int, Field(ge=1, le=4294967294)]] | None = Field(
        None, description="Further groups of the user, for volumes that belong to them."
    )
    seccomp_profile: SeccompProfile | None = Field(None, description="Seccomp profile. Not set: RuntimeDefault.")
    capabilities: dict[Annotated[str, Field(pattern=r"^[A-Z][A-Z0-9_]*$")], bool] | None = Field(
        None,
        description="Linux capabilities to add, NAME: true; all others are dropped. Pod Security `restricted` allows "
        "only NET_BIND_SERVICE.",
    )
    termination_grace_period_seconds: int | None = Field(
        None,
        ge=1,
        le=86400,
        description="How long a pod may take to end. Not set: 30. compile and train, which have their own, save a "
        "checkpoint in this time: 30 to 300, and 20 less than cleanup.timeoutSeconds.",
    )
    backoff_limit: int | None = Field(
        None,
        ge=0,
        le=100,
        description="Retries of a failed pod. Exit status 2 (the user must change something) is never retried.",
    )
    active_deadline_seconds: int | None = Field(
        None,
        ge=1,
        description="Fail the stage after this many seconds. Gates and the runner have none, because they end with "
        "what they follow; cleanup has its own (cleanup.timeoutSeconds).",
    )


def resources(cpu: str, memory: str, limit_cpu: str, limit_memory: str) -> Resources:
    return Resources(
        requests=ResourceList(cpu=cpu, memory=memory), limits=ResourceList(cpu=limit_cpu, memory=limit_memory)
    )


def cores(cpu: str, limit: str) -> Resources:
    """The resources of a stage whose memory follows the model."""
    return Resources(requests=ResourceList(cpu=cpu), limits=ResourceList(cpu=limit))


# --- blocks of the values that no stage reads


class DatasetValues(DatasetOptions):
    # Empty in the chart's own defaults; its templates refuse an empty one with an example.
    source: Source = ""
    format: Format | Literal[""] = ""


class Image(Block):
    """The image of every pod. It contains both commands, llama-lora and genvalues. There is no public image: build it
    from trainer/Dockerfile.
    """

    repository: str = Field(
        "llama-lora", pattern=f"^{REPOSITORY}$", description="Registry and name, without tag and digest."
    )
    tag: str = Field("", pattern=optional(TAG), description="Tag. Empty: the chart's appVersion.")
    digest: str = Field("", pattern=optional(DIGEST), description="sha256:... Overrides the tag.")
    pull_policy: Literal["Always", "IfNotPresent", "Never"] = Field(
        "IfNotPresent", description="When to pull the image."
    )
    pull_secrets: dict[str, bool] = Field(
        {}, description="Secrets of type kubernetes.io/dockerconfigjson to pull the image with, NAME: true."
    )


class Pipeline(Block):
    """How the stages run."""

    mode: Literal["attached", "detached"] = Field(
        "attached",
        description="attached: the stages are hooks of this release and the Helm client waits for them; its "
        "--timeout must be as long as the longest stage (train), such as --timeout 48h. detached: one runner Job "
        "installs this chart again, attached, from inside the cluster; helm returns in seconds.",
    )
    unschedulable_timeout_seconds: int = Field(
        1800,
        ge=1,
        le=LARGE,
        description="Fail compile or train when one of its pods has been unschedulable for this long. Time suspended "
        "by Kueue does not count.",
    )


class Guards(GuardOptions):
    stall_timeout: StallTimeout = "30m"


class ParallelismValues(Parallelism):
    """How the work is divided: nodes * processesPerNode must equal tensorParallelSize * dataParallelSize. Null, or left
    out: by instance, one process for each logical core of its devices.
    """

    processes_per_node: Processes | None = Field(  # type: ignore[assignment]
        None,
        description="Training processes on each node. Null: by instance (trn1.32xlarge 32, trn2.48xlarge 64, cpu 2).",
    )
    tensor_parallel_size: TensorParallelSize | None = Field(  # type: ignore[assignment]
        None,
        description="Processes that split each layer of one copy of the model. Null: what dataParallelSize leaves, "
        "else by instance (trn1.32xlarge 8, trn2 4, cpu 1).",
    )
    data_parallel_size: Annotated[int, Field(ge=1, le=1048576)] | None = Field(  # type: ignore[assignment]
        None, description="Copies of the model, over all nodes. Null: as many as the processes make."
    )


class NeuronSettings(Block):
    """What compiler and runtime must know of a Trainium instance type."""

    target: Literal["trn1", "trn2"] | None = Field(
        None, description="Compiler target: trn1 (trn1, trn1n) or trn2 (trn2, trn2u). Null: by instance."
    )
    logical_core_size: Annotated[int, Field(ge=1, le=2)] | None = Field(
        None,
        description="Physical NeuronCores per logical core: 1 on trn1, 1 or (usually) 2 on trn2. Null: by instance.",
    )


class HyperPod(Block):
    """SageMaker HyperPod."""

    auto_resume: bool = Field(
        False, description="Job auto-resume for compile and train, on nodes that HyperPod reports as healthy."
    )
    max_retries: int = Field(1, ge=0, le=100, description="How often HyperPod restarts a job on replaced nodes.")


Workload = Annotated[
    Literal["pytorchjob", "trainjob"],
    Field(
        description="The object that compile and train run as. pytorchjob: of the Kubeflow training operator, Trainer "
        "v1, which HyperPod has. trainjob: of Kubeflow Trainer v2."
    ),
]


class Kueue(Block):
    """Kueue admission. compile and train are put into their queue when the stage is released, not before."""

    queue_name: Name = Field(
        "", description="LocalQueue of compile and train. Empty: none, or the namespace's LocalQueue default."
    )
    cpu_queue_name: Name = Field(
        "",
        description="LocalQueue of the stages of the trainer on CPU nodes. Empty: none, or the namespace's LocalQueue "
        "default, which Kueue gives every Job without a queue.",
    )
    priority_class: Name = Field("", description="WorkloadPriorityClass of compile and train. Empty: none.")


class Workspace(Block):
    """The volume in the pods."""

    mount_path: str = Field(
        "/workspace",
        pattern=r"^(/[A-Za-z0-9_-]+)+$",
        description="Mount path in every pod: letters, digits, - and _ only, because the Neuron compiler accepts no "
        "other characters in the path of its cache.",
    )


class SecurityContext(Block):
    """The user of every stage except storage-prepare."""

    run_as_user: int = Field(1000, ge=1, le=4294967294, description="User ID, not root.")
    run_as_group: int = Field(1000, ge=1, le=4294967294, description="Group ID.")


class ServiceAccount(Block):
    """The service accounts of the tokenize stage, which reads s3:// datasets, and of the publish stage, which writes to
    publish.s3.uri. With EKS Pod Identity, associate the service accounts RELEASE-tokenize and RELEASE-publish instead.
    """

    annotations: Annotations = Field(
        {},
        description="Annotations of tokenize's, for IRSA eks.amazonaws.com/role-arn: arn:aws:iam::ACCOUNT:role/NAME.",
    )
    publish_annotations: Annotations = Field({}, description="Annotations of publish's, for a role that may write.")


class Rbac(Block):
    """Service accounts and roles."""

    create: bool = Field(
        True,
        description="Create them. false: they exist, named namePrefix-preflight, -gate, -stage, -tokenize, -publish, "
        "-cleanup and -runner.",
    )
    name_prefix: str = Field(
        "",
        pattern=r"^([a-z]([-a-z0-9]*[a-z0-9])?)?$",
        max_length=50,
        description="Prefix of their names. Empty: that of every other object.",
    )
    cluster_scoped_reads: bool = Field(
        False,
        description="Create a ClusterRole, with which the stage preflight reads nodes and storage classes. Without it "
        'these findings say "not checked"; genvalues preflight reads them with your permissions.',
    )


class CapacityReservation(Block):
    """A capacity reservation or a Capacity Block for the nodes of compile and train: selects the nodes that a node
    provisioner has launched into it, by their labels. docs/pods.md has an example for each.
    """

    provisioner: Literal["", "karpenter", "auto-mode", "node-group", "hyperpod"] = Field(
        "",
        description="What launches the nodes: karpenter (1.6 or newer), auto-mode (EKS Auto Mode), node-group (an EKS "
        "managed node group) or hyperpod (an instance group with a training plan). Empty: no reservation.",
    )
    type: Literal["", "default", "capacity-block"] = Field(
        "", description="default: an On-Demand Capacity Reservation. capacity-block: a Capacity Block. Empty: either."
    )
    id: str = Field(
        "",
        pattern=r"^(cr-[0-9a-f]{8,40})?$",
        description="Its id, with karpenter and auto-mode. Empty: any that the node class selects.",
    )
    group: str = Field(
        "",
        pattern=LABEL_VALUE,
        description="Name of the node group, or of HyperPod's instance group.",
    )


class NetworkPolicies(Block):
    """NetworkPolicies for the pods of the run, for clusters whose network plugin enforces them. Nothing connects to the
    pods, except the workers of compile and train to each other, on every port. Out of the pods: DNS; tokenize and
    publish everywhere; preflight, gates, cleanup and runner to the API server; monitored stages to the ports of
    monitoring.
    """

    enabled: bool = Field(False, description="Create them.")
    api_server_ports: Annotated[list[Annotated[int, Field(ge=1, le=65535)]], Field(min_length=1)] = Field(
        [443, 6443],
        description="Ports of the API server. The policy allows them to any address, because many network plugins do "
        "not compare that of the API server's Service.",
    )
    train_ports: list[Annotated[int, Field(ge=1, le=65535)]] = Field(
        [], description="Further ports that train may connect to, such as that of an MLflow server."
    )


class Cleanup(Block):
    """The hook that stops running stages before uninstall and rollback, and waits until their pods are gone."""

    enabled: bool = Field(True, description="Run it. false: uninstall leaves training running.")
    timeout_seconds: int = Field(
        180,
        ge=TRAIN_GRACE_SECONDS + 20,
        le=3600,
        description="How long it waits, from the start of its pod. A train pod may take 120 s to save a checkpoint "
        "(stages.train.terminationGracePeriodSeconds). "
        "A cleanup pod that cannot start is given up after 130 s.",
    )


# FSx API reference, TagKey and TagValue; without the comma and the = that the CSI driver's extraTags divides tags by.
FSX_TAG_NAME = r"^[A-Za-z0-9_.:/+@ -]{1,128}$"
FSX_TAG_VALUE = r"^[A-Za-z0-9_.:/+@ -]{0,256}$"
FSX_S3_PATH = rf"s3://{BUCKET}(/[^,\s]*)?"


class Fsx(Block):
    """kind fsx: the storage class of the FSx for Lustre CSI driver. Its parameters cannot change once it exists."""

    create_storage_class: bool = Field(
        False, description="Create a storage class from the following keys instead of using storageClass."
    )
    subnet_id: str = Field("", pattern=r"^(subnet-[0-9a-f]{8,40})?$", description="Subnet of the Trainium nodes.")
    security_group_ids: list[Annotated[str, Field(pattern=r"^sg-[0-9a-f]{8,40}$")]] = Field(
        [],
        description="Security groups that allow ports 988 and 1018-1023 between the nodes and the file system.",
    )
    deployment_type: Literal["SCRATCH_1", "SCRATCH_2", "PERSISTENT_1", "PERSISTENT_2"] = Field(
        "PERSISTENT_2", description="Deployment type."
    )
    per_unit_storage_throughput: Literal[50, 100, 125, 200, 250, 500, 1000] | None = Field(
        None,
        description="Throughput in MB/s per TiB: 50, 100 or 200 of PERSISTENT_1, 125, 250, 500 or 1000 of "
        "PERSISTENT_2, none of the SCRATCH types. Null: 200 and 250.",
    )
    file_system_type_version: Literal["", "2.10", "2.12", "2.15"] | None = Field(
        None,
        description="Lustre version. Null: 2.15, and on an upgrade what the storage class has, because its parameters "
        "cannot change (with Argo CD, which does not see the cluster, write the old value). Empty: the default of FSx.",
    )
    data_compression_type: Literal["", "NONE", "LZ4"] = Field(
        "", description="Compression of the data. Empty: the default of FSx, NONE."
    )
    kms_key_id: str = Field(
        "",
        pattern=r"^[A-Za-z0-9:/_-]*$",
        max_length=2048,
        description="KMS key of the PERSISTENT types, its ID or ARN. Empty: the key that FSx manages.",
    )
    tags: dict[Annotated[str, Field(pattern=FSX_TAG_NAME)], Annotated[str, Field(pattern=FSX_TAG_VALUE)]] = Field(
        {}, description="Tags of the file system, NAME: VALUE."
    )
    s3_import_path: str = Field(
        "",
        pattern=optional(FSX_S3_PATH),
        description="s3://BUCKET/PREFIX whose objects are the file system's first files. Only the SCRATCH types and "
        "PERSISTENT_1: the FSx CSI driver makes no data repository association, which PERSISTENT_2 requires.",
    )
    s3_export_path: str = Field(
        "",
        pattern=optional(FSX_S3_PATH),
        description="s3://BUCKET/PREFIX, in the bucket of s3ImportPath, that FSx can export files to. Empty: a new "
        "prefix.",
    )
    auto_import_policy: Literal["", "NONE", "NEW", "NEW_CHANGED", "NEW_CHANGED_DELETED"] = Field(
        "",
        description="Which later changes of s3ImportPath appear in the file system. Empty: the default of FSx, NONE.",
    )


class PrepareStorage(Block):
    """One Job, as root, that gives the volume's root directory to securityContext's user: fsGroup has no effect on FSx.
    Pod Security `restricted` forbids it: there, disable it and change the owner once by other means.
    """

    enabled: bool = Field(True, description="Run it.")


class Storage(Block):
    """The volume that all stages share. helm uninstall never deletes it."""

    enabled: bool = Field(True, description="Create a claim. false: existingClaim names the claim to use.")
    existing_claim: ExistingClaim = ""
    kind: StorageKind = "fsx"
    size: Annotated[Size, Field(description="")] | None = Field(
        None,
        description="Size of the claim. FSx: 1200Gi, 2400Gi or a multiple of 2400Gi (SCRATCH_1: 3600Gi). Null: 1200Gi "
        "of the FSx kinds, 100Gi of generic, and on an upgrade what the claim has.",
    )
    storage_class: StorageClass | None = Field(
        None,
        description="Storage class of the claim. Empty (kind generic only): the cluster's default class. Null: "
        "fsx-sc of kind fsx, else empty, and on an upgrade what the claim has.",
    )
    access_modes: (
        Annotated[
            list[Literal["ReadWriteMany", "ReadWriteOnce", "ReadWriteOncePod"]],
            Field(
                min_length=1,
                json_schema_extra={
                    "uniqueItems": True,
                    "if": {"contains": {"enum": ["ReadWriteOncePod"]}},
                    "then": {"maxItems": 1},
                },
            ),
        ]
        | None
    ) = Field(
        None,
        description="Access modes of the claim. More than one node, or Trainium nodes beside CPU nodes, require "
        "ReadWriteMany. ReadWriteOncePod stands alone. Null: [ReadWriteOnce] for kind generic with one CPU node, else "
        "[ReadWriteMany]; on an upgrade what the claim has. Without ReadWriteMany, pods that mount the volume have an "
        "affinity to each other's node, unless an affinity is set.",
    )
    mount_options: list[str] = Field(
        ["flock"], description="Mount options of kind fsx (with createStorageClass) and fsx-static."
    )
    fsx: Fsx = Fsx()
    static: FileSystem = FileSystem()
    prepare: PrepareStorage = PrepareStorage()
    global_values: KubernetesObject | None = Field(
        None, alias="global", description="Helm's own key; the chart ignores it."
    )


class Stages(Block):
    """Settings of each stage, which take the same keys as stageDefaults. The defaults fit small models on CPUs; compile
    and train take what a node of the instance type offers (about 119 vCPU and 460 GiB of a trn1.32xlarge are
    allocatable).
    """

    preflight: StageSettings = Field(
        StageSettings(active_deadline_seconds=600),  # an image that cannot be pulled must not wait for Helm's --timeout
        description="Checks that the cluster has what the pipeline needs. Mounts nothing.",
    )
    storage_prepare: StageSettings = Field(
        StageSettings(active_deadline_seconds=2400),  # creating an FSx file system takes about 10 minutes
        description="Gives the volume's root directory to securityContext's user, once, as root.",
    )
    tokenize: StageSettings = Field(
        StageSettings(resources=resources("500m", "2Gi", "4", "8Gi")),
        description="Downloads model and dataset; renders, tokenizes and packs the rows.",
    )
    rehearse: StageSettings = Field(
        StageSettings(resources=resources("500m", "2Gi", "4", "8Gi")),
        description="Only with rehearse.enabled. Rehearses the run on a small model, with two processes on a CPU.",
    )
    compile: StageSettings = Field(
        StageSettings(resources=None, termination_grace_period_seconds=TRAIN_GRACE_SECONDS),
        description="Compiles what train will run, on the nodes that train. On the CPU: ten trial steps. resources: "
        "null stands for those of the instance type; a quantity that is written overrides one of them.",
    )
    neff: StageSettings = Field(
        StageSettings(resources=resources("8", "64Gi", "32", "128Gi")),
        description="Only with backend xla and compile.runsOn: cpu. Compiles the collected graphs on a CPU node, with "
        "one compiler per 64Gi of the memory limit.",
    )
    train: StageSettings = Field(
        StageSettings(resources=None, termination_grace_period_seconds=TRAIN_GRACE_SECONDS),
        description="Trains, on the Trainium nodes. resources as of compile. On nodes with huge pages set aside, add "
        "hugepages-2Mi: 5120Mi to requests and limits.",
    )
    gate: StageSettings = Field(
        StageSettings(backoff_limit=30),
        description="Releases compile and train, follows them, and ends as they end. One after each. Without retries "
        "left it stops the job, because nothing else enforces guards.",
    )
    consolidate: StageSettings = Field(
        StageSettings(resources=cores("500m", "4")),
        description="Consolidates checkpoint shards into a PEFT adapter. Memory that is not set follows model.id if "
        "the chart knows the model (5Gi for Llama 3.1 8B); others request 2Gi (docs/pods.md).",
    )
    merge: StageSettings = Field(
        StageSettings(resources=cores("500m", "4")),
        description="Merges the adapter into the base model. Memory as of consolidate.",
    )
    evaluate: StageSettings = Field(
        StageSettings(resources=cores("500m", "8")),
        description="Held-out loss and sample answers of the base and the merged model. Memory as of consolidate, with "
        "the whole model up to 14B (21Gi for Llama 3.1 8B): without it there are no answers.",
    )
    publish: StageSettings = Field(
        StageSettings(resources=resources("500m", "2Gi", "4", "4Gi")),
        description="Only with publish.s3.uri or publish.hub. Uploads the adapter, the merged model and the report.",
    )
    verify: StageSettings = Field(
        StageSettings(),
        description="The pod of `helm test`, which verifies the files of the merged model. Never retried.",
    )
    cleanup: StageSettings = Field(StageSettings(), description="The cleanup hook; see cleanup.")
    runner: StageSettings = Field(
        StageSettings(), description="Mode detached: installs the stages from inside the cluster."
    )


class ObjectMetadata(Block):
    """Metadata of an object."""

    model_config = ConfigDict(extra="allow")

    name: str | None = Field(None, description="Its name. Left out: NAME.")
    namespace: str | None = Field(None, description="Its namespace. Left out: the release's.")
    labels: dict[str, str] | None = Field(None, description="Its labels, besides the chart's.")
    annotations: dict[str, str] | None = Field(None, description="Its annotations.")


class ExtraObject(Block):
    """A further object of the release."""

    model_config = ConfigDict(extra="allow")

    api_version: str | None = Field(None, description="Such as v1, or apps/v1.")
    kind: str | None = Field(None, description="Its kind; not Secret, and no List.")
    metadata: ObjectMetadata | None = Field(None, description="Its metadata.")


class Values(Block):
    """Values of the chart llama-lora.

    `genvalues write finetune.yaml -o values.yaml` writes such a file from a short, checked inputs file and fits the
    layout to the model. Required: model.id or model.path, dataset.source, dataset.format. null stands for what the
    instance type says: devices, processes, tensor parallelism, memory. Helm refuses unknown keys. docs/values.md has
    the same as tables, with the limits of each key.
    """

    name: str = Field(
        "",
        pattern=optional(RUN_NAME),
        max_length=63,
        description="Name of the run: its results are in WORKSPACE/runs/NAME on the volume. Empty: the release's name.",
    )
    name_override: str = Field(
        "",
        pattern=optional(DNS_LABEL),
        max_length=63,
        description="The label app.kubernetes.io/name of every object. Empty: the chart's name.",
    )
    fullname_override: str = Field(
        "",
        pattern=r"^([a-z]([-a-z0-9]*[a-z0-9])?)?$",
        max_length=38,
        description="Prefix of every object's name; at most 38 characters, because the names of worker pods are host "
        "names. Empty: the release's name (shortened, with a hash, when it is long).",
    )
    instance: str = Field(
        "cpu",
        pattern=r"^(cpu|(ml\.)?[a-z0-9-]+\.[a-z0-9-]+)$",
        description="cpu, or the instance type of the nodes that compile and train, as in their label "
        "node.kubernetes.io/instance-type (HyperPod: with ml.).",
    )
    backend: Backend | None = Field(
        None,
        description="native: PyTorch on CPUs, and by TorchNeuron on Trn2 and later. xla: optimum-neuron on PyTorch/XLA "
        "for Trn1, and for Trn2 with images of Neuron SDK 2.29 or older. Null: by instance, xla on trn1, else native. "
        "cpu and neuron are their older names.",
    )
    workload: Workload = "pytorchjob"
    image: Image = Image()
    pipeline: Pipeline = Pipeline()
    model: Model = Model()
    dataset: DatasetValues = DatasetValues()
    lora: Lora = Lora()
    training: Training = Training()
    probe: Probe = Probe()
    compile: Compile = Compile()
    guards: Guards = Guards()
    evaluation: Evaluation = Evaluation()
    parallelism: ParallelismValues = ParallelismValues()
    rehearse: Rehearse = Rehearse()
    publish: Publish = Publish()
    monitoring: Monitoring = Monitoring()
    verify: Verify = "cached"
    devices: dict[Annotated[str, Field(pattern=DEVICE)], Annotated[int, Field(ge=1)]] | None = Field(
        None,
        description="Devices of one node, requested by compile and train only, RESOURCE: COUNT. Each is also "
        "tolerated as a taint (NoSchedule). Null or {}: by instance, for trn1.32xlarge {aws.amazon.com/neuron: 16, "
        "vpc.amazonaws.com/efa: 8}.",
    )
    neuron: NeuronSettings = NeuronSettings()
    shared_memory: PositiveQuantity | None = Field(
        None,
        description="Size of /dev/shm in the pods of compile and train: about 1Gi per process. It counts against the "
        "pod's memory limit. Null: by instance (trn1.32xlarge 32Gi, cpu 2Gi).",
    )
    hugging_face: HuggingFace = HuggingFace()
    hyperpod: HyperPod = HyperPod()
    kueue: Kueue = Kueue()
    capacity_reservation: CapacityReservation = CapacityReservation()
    workspace: Workspace = Workspace()
    security_context: SecurityContext = SecurityContext()
    service_account: ServiceAccount = ServiceAccount()
    rbac: Rbac = Rbac()
    cleanup: Cleanup = Cleanup()
    storage: Storage = Storage()
    network_policy: NetworkPolicies = NetworkPolicies()
    common_labels: Labels = Field(
        {}, description="Labels of every object and pod, such as cost-center: ml. Those of the chart take precedence."
    )
    extra_objects: dict[str, ExtraObject] = Field(
        {},
        description="Further objects of the release, NAME: {apiVersion: ..., kind: ..., ...}, as templates: "
        '{{ .Release.Name }} and {{ include "llama-lora.fullname" . }} are replaced. NAME is the default of '
        "metadata.name. No Secrets.",
    )
    stage_defaults: StageSettings = Field(
        StageSettings(
            resources=resources("100m", "256Mi", "1", "1Gi"),
            node_selector={},
            tolerations=[],
            affinity=Affinity(),
            topology_spread_constraints=[],
            scheduler_name="",
            priority_class_name="",
            service_account_name="",
            extra_env={},
            extra_env_secrets={},
            extra_env_from={},
            extra_volumes={},
            extra_volume_mounts={},
            pod_labels={},
            pod_annotations={},
            job_labels={},
            supplemental_groups=[],
            seccomp_profile=None,
            capabilities={},
            termination_grace_period_seconds=None,
            backoff_limit=3,
            active_deadline_seconds=None,
        ),
        description="Settings of every stage. A stage's own settings override them key by key.",
    )
    stages: Stages = Stages()
    global_values: KubernetesObject | None = Field(
        None, alias="global", description="Helm's own key; the chart ignores it."
    )
