"""Whether AWS has the instances of a run: quotas, reservations, HyperPod clusters and availability zones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta, timezone
from typing import Any

from genvalues.common.findings import Finding, Level
from genvalues.common.text import number_of, one_line
from genvalues.ops.aws import AwsAnswer, AwsClients, answer_or_none
from genvalues.ops.preflight.run_requirements import RunRequirements
from genvalues.ops.preflight.storage_checks import subnet_of_storage

# Running On-Demand Trn instances, counted in vCPU: the same code in every region with Trainium, according to public
# copies of ListServiceQuotas (awslabs' quota tables and others).
TRN_QUOTA = "L-2C3B7624"
# EC2 begins to terminate a Capacity Block's instances 30 minutes before its end (EC2 user guide, Monitor Capacity
# Blocks using EventBridge).
BLOCK_ENDS_EARLY = timedelta(minutes=30)
SHORT_RESERVATION = timedelta(hours=24)


def check_ec2_quota(clients: AwsClients, requirements: RunRequirements, subject: str) -> list[Finding]:
    """EC2's quota of On-Demand instances, in vCPU. Nodes in a capacity block do not count against it."""
    region, nodes = clients.region, requirements.nodes
    needed = nodes * (requirements.hardware.vcpu if requirements.hardware else 0)
    answer = clients.find("service-quotas", "get_service_quota", ServiceCode="ec2", QuotaCode=TRN_QUOTA)
    value = (answer.get("Quota") or {}).get("Value")
    if value is None:
        look = f"aws service-quotas list-service-quotas --service-code ec2 --region {region}"
        return [Finding("not checked", subject, f"{region} has no quota for Running On-Demand Trn instances", look)]
    found = f"{value:.0f} vCPU of Running On-Demand Trn instances in {region}, {needed} needed"
    if value >= needed:
        return [Finding("ok", subject, found)]
    fix = quota_increase("ec2", TRN_QUOTA, needed, region)
    reservations = answer_or_none(lambda: reservations_of(clients, requirements)) or []
    if instances_in(one for one in reservations if is_active(one) and is_block(one)) >= nodes:
        return [Finding("warning", subject, f"{found} outside the active capacity block, which has the nodes", fix)]
    return [Finding("error", subject, f"{found} for {nodes} x {requirements.ec2_type}", fix)]


def check_cluster_quota(clients: AwsClients, requirements: RunRequirements, subject: str) -> list[Finding]:
    """SageMaker's quota of HyperPod nodes. Nodes that a cluster has already need none: a training plan's have their
    own quota.

    The quota is found by name because its code is not documented. Listing stops there: SageMaker has thousands.
    """
    region, nodes = clients.region, requirements.nodes
    name = f"{requirements.instance} for cluster usage"  # SageMaker HyperPod quotas
    listed = clients.list("service-quotas", "list_service_quotas", "Quotas", ServiceCode="sagemaker", MaxResults=100)
    quota = next((quota for quota in listed if quota.get("QuotaName") == name), {})
    value = quota.get("Value")
    if value is not None and value >= nodes:
        return [Finding("ok", subject, f"{value:.0f} {name} in {region}, {nodes} needed")]
    clusters = answer_or_none(lambda: clusters_of(clients)) or []
    running = max((nodes_in(groups_with(one, requirements.instance), "CurrentCount") for one in clusters), default=0)
    if value is None:
        look = f"aws service-quotas list-service-quotas --service-code sagemaker --region {region}"
        level: Level = "warning" if running < nodes else "ok"
        return [Finding(level, subject, f"{region} has no quota named {name}", look)]
    found = f"{value:.0f} {name} in {region}"
    if running >= nodes:
        return [Finding("ok", subject, f"{found}; a cluster has {running} nodes already")]
    fix = quota_increase("sagemaker", str(quota.get("QuotaCode")), nodes, region)
    return [Finding("error", subject, f"{found}, {nodes} needed", fix)]


def quota_increase(service: str, code: str, value: int, region: str) -> str:
    return (
        f"aws service-quotas request-service-quota-increase --service-code {service} --quota-code {code}"
        f" --desired-value {value} --region {region}"
    )


# --- reservations


def check_capacity(clients: AwsClients, requirements: RunRequirements, subject: str) -> list[Finding]:
    return judge_reservations(reservations_of(clients, requirements), requirements, subject, clients.region, utc_now())


def reservations_of(clients: AwsClients, requirements: RunRequirements) -> list[AwsAnswer]:
    by_type = [{"Name": "instance-type", "Values": [requirements.ec2_type]}]
    return clients.once(
        "reservations",
        lambda: list(clients.list("ec2", "describe_capacity_reservations", "CapacityReservations", Filters=by_type)),
    )


def judge_reservations(
    reservations: Sequence[AwsAnswer], requirements: RunRequirements, subject: str, region: str, now: datetime
) -> list[Finding]:
    """Judge EC2's capacity reservations of the type. Having none is no fault: nodes are On-Demand then."""
    of_type = f"--filters Name=instance-type,Values={requirements.ec2_type}"
    look = f"aws ec2 describe-capacity-reservations {of_type} --region {region}"
    offers = (
        f"aws ec2 describe-capacity-block-offerings --instance-type {requirements.ec2_type}"
        f" --instance-count {requirements.nodes} --capacity-duration-hours 24 --region {region}"
    )
    if active := [one for one in reservations if is_active(one)]:
        findings = [judge_active(reservation, subject, offers, now) for reservation in active]
        if (reserved := instances_in(active)) < requirements.nodes:
            found = f"{reserved} reserved, {requirements.nodes} needed: the rest must come On-Demand"
            findings.append(Finding("warning", subject, found, offers))
        return findings
    if coming := [one for one in reservations if one.get("State") in {"scheduled", "payment-pending", "pending"}]:
        starts = (f"{reservation_name(one)} starts at {utc_text(one.get('StartDate'))}" for one in coming)
        return [Finding("warning", subject, f"{start}: no nodes before that", look) for start in starts]
    over = [one for one in reservations if one.get("State") in {"expired", "payment-failed", "failed", "cancelled"}]
    last = f" ({reservation_name(over[-1])} is {over[-1].get('State')})" if over else ""
    found = f"no reservation{last}: nodes are On-Demand and can be unavailable"
    return [Finding("ok", subject, found, offers)]


def judge_active(reservation: AwsAnswer, subject: str, offers: str, now: datetime) -> Finding:
    free, total = reservation.get("AvailableInstanceCount", 0), reservation.get("TotalInstanceCount", 0)
    where = reservation.get("AvailabilityZone", "")
    found = f"{reservation_name(reservation)} is active in {where}: {number_of(total, 'instance')}, {free} free"
    if reservation.get("InstanceMatchCriteria") == "targeted":
        found += "; the nodes' launch template must name it"
    ends = reservation.get("EndDate")
    if not isinstance(ends, datetime):
        return Finding("ok", subject, found)
    last = with_zone(ends) - (BLOCK_ENDS_EARLY if is_block(reservation) else timedelta())
    found += f"; its nodes end at {utc_text(last)}"
    if last - now < SHORT_RESERVATION:
        left = max(0.0, (last - now) / timedelta(hours=1))
        return Finding("warning", subject, f"{found}, in {left:.1f} hours", offers)
    return Finding("ok", subject, found)


def is_active(reservation: AwsAnswer) -> bool:
    return reservation.get("State") == "active"


def is_block(reservation: AwsAnswer) -> bool:
    return reservation.get("ReservationType") == "capacity-block"


def instances_in(reservations: Iterable[AwsAnswer]) -> int:
    return sum(int(reservation.get("TotalInstanceCount") or 0) for reservation in reservations)


def reservation_name(reservation: AwsAnswer) -> str:
    kind = "capacity block" if is_block(reservation) else "capacity reservation"
    return f"{kind} {reservation.get('CapacityReservationId', '?')}"


def utc_now() -> datetime:
    return datetime.now(timezone.utc)


def with_zone(when: datetime) -> datetime:
    return when if when.tzinfo else when.replace(tzinfo=timezone.utc)


def utc_text(when: Any) -> str:
    if not isinstance(when, datetime):
        return "an unknown time"
    return with_zone(when).astimezone(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


# --- HyperPod


def check_hyperpod(clients: AwsClients, requirements: RunRequirements, subject: str) -> list[Finding]:
    """The best finding of all HyperPod clusters in the region: one that has the nodes is enough."""
    region = clients.region
    clusters = clusters_of(clients)
    if not clusters:
        look = f"aws sagemaker list-clusters --region {region}"
        fix = f"{look}   # try other regions; or set instance: {requirements.ec2_type}"
        return [Finding("error", subject, f"no HyperPod cluster in {region}", fix)]
    findings = [judge_cluster(cluster, requirements, region) for cluster in clusters]
    best_first = ["ok", "warning", "error"]
    return [min(findings, key=lambda finding: best_first.index(finding.level))]


def clusters_of(clients: AwsClients) -> list[AwsAnswer]:
    def describe() -> list[AwsAnswer]:
        names = [one["ClusterName"] for one in clients.list("sagemaker", "list_clusters", "ClusterSummaries")]
        found = [clients.find("sagemaker", "describe_cluster", ClusterName=name) for name in names]
        return [cluster for cluster in found if cluster]

    return clients.once("clusters", describe)


def judge_cluster(cluster: AwsAnswer, requirements: RunRequirements, region: str) -> Finding:
    name, status = cluster.get("ClusterName", "?"), cluster.get("ClusterStatus", "?")
    subject = f"HyperPod cluster {name}"
    describe = f"aws sagemaker describe-cluster --cluster-name {name} --region {region}"
    update = f"aws sagemaker update-cluster --cluster-name {name} --instance-groups ... --region {region}"
    groups = groups_with(cluster, requirements.instance)
    if not groups:
        types = sorted({str(group.get("InstanceType")) for group in cluster.get("InstanceGroups") or []})
        found = f"has no instance group of {requirements.instance} (its types: {', '.join(types) or 'none'})"
        return Finding("error", subject, found, f"{update}   # {describe} shows the present groups")
    if not (cluster.get("Orchestrator") or {}).get("Eks"):
        return Finding("error", subject, "is orchestrated by Slurm; the chart needs EKS", describe)
    if status in {"Failed", "Deleting", "RollingBack", "Creating"}:
        level: Level = "warning" if status == "Creating" else "error"
        reason = f": {one_line(str(cluster['FailureMessage']), 200)}" if cluster.get("FailureMessage") else ""
        return Finding(level, subject, f"is {status}{reason}", describe)
    current, target = nodes_in(groups, "CurrentCount"), nodes_in(groups, "TargetCount")
    found = f"{status}, {current} of {target} {requirements.instance} are running, {requirements.nodes} needed"
    if current >= requirements.nodes:
        return Finding("ok", subject, found)
    if target >= requirements.nodes or (cluster.get("AutoScaling") or {}).get("Mode") == "Enable":
        return Finding("warning", subject, f"{found}: it is still scaling, or scales on demand", describe)
    group = groups[0].get("InstanceGroupName", "?")
    return Finding("error", subject, found, f"{update}   # group {group} with InstanceCount {requirements.nodes}")


def groups_with(cluster: AwsAnswer, instance: str) -> list[AwsAnswer]:
    return [group for group in cluster.get("InstanceGroups") or [] if group.get("InstanceType") == instance]


def nodes_in(groups: Iterable[AwsAnswer], key: str) -> int:
    return sum(int(group.get(key) or 0) for group in groups)


# --- availability zones


def check_zones(clients: AwsClients, requirements: RunRequirements, subject: str) -> list[Finding]:
    """The zones that offer the type, and whether the file system's subnet is in one of them."""
    region = clients.region
    by_type = [{"Name": "instance-type", "Values": [requirements.ec2_type]}]
    where = {"LocationType": "availability-zone", "Filters": by_type}
    offerings = clients.list("ec2", "describe_instance_type_offerings", "InstanceTypeOfferings", **where)
    zones = sorted({str(offering.get("Location", "")) for offering in offerings} - {""})
    if not zones:
        # HyperPod's nodes are in an account of AWS, to which other zones may be open.
        level: Level = "warning" if requirements.on_hyperpod else "error"
        elsewhere = "us-east-2" if region == "us-west-2" else "us-west-2"
        of_type = f"--filters Name=instance-type,Values={requirements.ec2_type}"
        look = f"aws ec2 describe-instance-type-offerings --location-type availability-zone {of_type}"
        fix = f"{look} --region {elsewhere}   # try other regions, then --region"
        return [Finding(level, subject, f"no zone of {region} offers it", fix)]
    # The check of the storage reports it if the subnet cannot be read.
    subnet = answer_or_none(lambda: subnet_of_storage(clients, requirements)) or {}
    zone = str(subnet.get("AvailabilityZone", ""))
    if zone and zone not in zones:
        found = (
            f"{', '.join(zones)}; not {zone}, the zone of the file system's subnet {subnet.get('SubnetId')}:"
            " traffic between zones is slower and costs money"
        )
        fix = f"aws ec2 describe-subnets --filters Name=availability-zone,Values={','.join(zones)} --region {region}"
        return [Finding("warning", subject, found, fix)]
    return [Finding("ok", subject, ", ".join(zones) + (f"; the file system's subnet is in {zone}" if zone else ""))]


def soften_for_existing_nodes(
    findings: Sequence[Finding], cluster: Sequence[Finding], requirements: RunRequirements
) -> list[Finding]:
    """The findings about AWS, with errors about quotas, zones and HyperPod as warnings if the cluster has the nodes
    already: they may belong to another account or to a training plan."""
    has_devices = any(finding.level == "ok" and finding.subject in requirements.devices for finding in cluster)
    if not has_devices or any(finding.subject == f"nodes {requirements.instance}" for finding in cluster):
        return list(findings)
    about_nodes = ("quota of ", "zones of ", "HyperPod")
    return [
        Finding("warning", finding.subject, f"{finding.found}; the cluster has the nodes already", finding.fix)
        if finding.level == "error" and finding.subject.startswith(about_nodes)
        else finding
        for finding in findings
    ]
