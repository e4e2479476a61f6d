"""The Neuron driver of the cluster's nodes from outside: by the names of their AMIs, which EC2 and SSM know.

Without AWS credentials, the nodes' operating systems tell it, as in the stage preflight.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import partial

from genvalues.accelerators.instances import HYPERPOD
from genvalues.accelerators.neuron_software import driver_of_ami, mismatch
from genvalues.cluster import kinds
from genvalues.cluster import preflight as stage
from genvalues.cluster.api import Api
from genvalues.cluster.config import ClusterConfig
from genvalues.cluster.kinds import Object
from genvalues.cluster.objects import labels_of
from genvalues.common.findings import Finding
from genvalues.ops.aws import AwsClients, answer_or_none, default_region

NODE_GROUP_IMAGE = "eks.amazonaws.com/nodegroup-image"  # label of the nodes of managed node groups: the AMI's id
REGION = "topology.kubernetes.io/region"
INSTANCE = re.compile(r"aws:///[a-z0-9-]+/(i-[0-9a-f]+)")  # spec.providerID of an EC2 node
# https://docs.aws.amazon.com/eks/latest/userguide/retrieve-ami-id.html
RECOMMENDED = "/aws/service/eks/optimized-ami/{version}/amazon-linux-2023/x86_64/neuron/recommended/image_id"


def check_driver_from_outside(api: Api, config: ClusterConfig, runtime: str) -> list[Finding]:
    """What the stage checks, with the drivers of the nodes' AMIs; for a node group without nodes, that of new nodes."""
    if not runtime or stage.NEURON not in config.job.devices:
        return []
    nodes = api.list(kinds.NODES, labels=f"{stage.INSTANCE_TYPE}={config.job.instance}")
    if not nodes:
        return judge_new_nodes(api, config, runtime)
    names = image_names(nodes)
    return stage.check_driver_for(
        runtime, api, config, lambda node: driver_of_ami(names.get(image_of(node), "")) or stage.driver_of(node)
    )


def judge_new_nodes(api: Api, config: ClusterConfig, runtime: str) -> list[Finding]:
    """A warning if the AMI that EKS recommends for new nodes has a driver that refuses the runtime."""
    version = api.discover("version") or {}
    minor = re.match(r"\d+", str(version.get("minor", "")))
    if config.job.instance.startswith(HYPERPOD) or not minor:
        return []
    name = answer_or_none(lambda: recommended_image(f"{version.get('major')}.{minor[0]}")) or ""
    if not (wrong := mismatch(driver_of_ami(name), runtime)):
        return []
    found = f"no node yet; the AMI that EKS recommends, {name}, has driver {driver_of_ami(name)}, which {wrong[0]}"
    return [Finding("warning", stage.DRIVER, f"{found}; {wrong[1]}", stage.OTHER_RUNTIME)]


def recommended_image(version: str) -> str:
    """The name of the AMI that EKS recommends for Neuron. ``version``: of Kubernetes, such as 1.34."""
    region = default_region()
    if not region:
        return ""
    clients = AwsClients(region)
    image = clients.ask("ssm", "get_parameter", Name=RECOMMENDED.format(version=version))["Parameter"]["Value"]
    return names_in(clients, {image}).get(image, "")


def image_of(node: Object) -> str:
    """The key of a node's AMI in image_names: its id, or the instance's id where the node has no label of it."""
    instance = INSTANCE.fullmatch(str(node["spec"].get("providerID", "")))
    return labels_of(node).get(NODE_GROUP_IMAGE) or (instance[1] if instance else "")


def image_names(nodes: Iterable[Object]) -> Mapping[str, str]:
    """Map the AMIs of the nodes, by id of AMI or instance, to their names. Empty without an answer of AWS."""
    by_region: dict[str, set[str]] = {}
    for node in nodes:
        if (region := labels_of(node).get(REGION)) and (image := image_of(node)):
            by_region.setdefault(region, set()).add(image)
    names: dict[str, str] = {}
    for region, keys in by_region.items():
        names |= answer_or_none(partial(names_in, AwsClients(region), keys)) or {}
    return names


def names_in(clients: AwsClients, keys: set[str]) -> dict[str, str]:
    instances = sorted(key for key in keys if key.startswith("i-"))
    images = {key: key for key in keys if not key.startswith("i-")}
    if instances:
        answers = clients.list("ec2", "describe_instances", "Reservations", InstanceIds=instances)
        images |= {one["InstanceId"]: one["ImageId"] for answer in answers for one in answer.get("Instances") or []}
    wanted = [{"Name": "image-id", "Values": sorted(set(images.values()))}]
    answer = clients.ask("ec2", "describe_images", Filters=wanted, IncludeDeprecated=True)
    named = {one["ImageId"]: one.get("Name", "") for one in answer.get("Images") or []}
    return {key: named.get(image, "") for key, image in images.items()}
