"""What AWS's answers mean for a run: pure functions over the dicts that boto3 returns."""

from __future__ import annotations

import difflib
import ipaddress
import re
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from typing import Any

from genvalues.common.findings import Finding, Level
from genvalues.common.text import dotted, one_line
from genvalues.inputs.check import unseen_by_pods
from genvalues.ops.registries import Image
from genvalues.ops.preflight.run_requirements import RunRequirements
from genvalues.settings.value_rules import fsx_size

Answer = Mapping[str, Any]

# Running On-Demand Trn instances, counted in vCPU: the code under which Service Quotas lists it in every region with
# Trainium (several public records of ListServiceQuotas, such as awslabs' quota tables, agree).
TRN_QUOTA = "L-2C3B7624"
# Capacity Blocks: 40 minutes before the end EC2 announces that it begins to terminate in 10 (EC2 user guide, Monitor
# Capacity Blocks using EventBridge).
BLOCK_ENDS_EARLY = timedelta(minutes=30)
SHORT_BLOCK = timedelta(hours=24)
# FSx for Lustre user guide: File system access control with Amazon VPC, and Creating a file system fails.
LUSTRE_PORTS = ((988, 988), (1018, 1023))
# FSx API reference, CreateFileSystemLustreConfiguration: MB/s per TiB of an SSD file system.
THROUGHPUTS = {"PERSISTENT_2": (125, 250, 500, 1000), "PERSISTENT_1": (50, 100, 200)}
USABLE_FILE_SYSTEM = {"AVAILABLE", "UPDATING"}


def judge_identity(answer: Answer, wanted: RunRequirements) -> Finding:
    """Of STS GetCallerIdentity. An image of another account is usual where one account builds for several; or these are
    the wrong credentials, whose quotas and reservations are not the run's."""
    account, registry = str(answer.get("Account", "?")), wanted.image.account
    other = f"; the image is in account {registry}'s registry" if registry not in {"", account} else ""
    return Finding("ok", "AWS credentials", f"account {account}, {answer.get('Arn', '?')}{other}")


def judge_region(named: Sequence[tuple[str, str]], known: Collection[str], file: str) -> Finding:
    """``named``: who names a region, and which, the first of them being used; ``known``: AWS's regions."""
    if not named:
        fix = f"genvalues preflight {file} --region us-west-2   # or: aws configure set region us-west-2"
        found = "none is set, and no address of the inputs names one"
        return Finding("not checked", "AWS region", found, fix, unanswered=True)
    who, region = named[0]
    if region not in known:
        near = (difflib.get_close_matches(region, known, n=1) or ["us-west-2"])[0]
        fix = f"genvalues preflight {file} --region {near}   # a region newer than this boto3: pip install -U boto3"
        return Finding("error", "AWS region", f"{one_line(region)} (by {who}) is no region of AWS", fix)
    others = [(other, its) for other, its in named[1:] if its != region]
    if others:
        said = ", ".join(f"{its} by {other}" for other, its in others)
        fix = f"genvalues preflight {file} --region {region}   # with image, storage and AWS_REGION of that one region"
        return Finding("warning", "AWS region", f"{region} by {who}, but {said}; checked in {region}", fix)
    return Finding("ok", "AWS region", f"{region} (by {who})")


# --- instances


def vcpu_needed(wanted: RunRequirements) -> int:
    return wanted.nodes * (wanted.hardware.vcpu if wanted.hardware else 0)


def judge_quota(quota: Answer | None, wanted: RunRequirements, region: str, in_blocks: int) -> Finding:
    """Of Service Quotas GetServiceQuota; ``in_blocks`` nodes are reserved in active capacity blocks."""
    subject = f"quota of {wanted.ec2_type}"
    needed = vcpu_needed(wanted)
    value = number(quota, "Value")
    if value is None:
        look = f"aws service-quotas list-service-quotas --service-code ec2 --region {region}"
        return Finding("not checked", subject, f"{region} has no quota of Running On-Demand Trn instances", look)
    of = f"{value:.0f} vCPU of Running On-Demand Trn instances in {region}"
    if value >= needed:
        return Finding("ok", subject, f"{of}, {needed} needed")
    raise_it = increase("ec2", TRN_QUOTA, needed, region)
    if in_blocks >= wanted.nodes:
        return Finding("warning", subject, f"{of}, {needed} needed outside of the capacity block there is", raise_it)
    return Finding("error", subject, f"{of}, {needed} needed: {count(wanted.nodes, wanted.ec2_type)}", raise_it)


def judge_cluster_quota(quota: Answer | None, wanted: RunRequirements, region: str, standing: int) -> Finding:
    """Of Service Quotas ListServiceQuotas; ``standing`` nodes of the type are in a HyperPod cluster already."""
    subject = f"quota of {wanted.instance}"
    value = number(quota, "Value")
    if quota is None or value is None:
        look = f"aws service-quotas list-service-quotas --service-code sagemaker --region {region}"
        found = f"{region} has no quota named {cluster_quota(wanted)}"
        return Finding("warning" if standing < wanted.nodes else "ok", subject, found, look)
    of = f"{value:.0f} {cluster_quota(wanted)} in {region}"
    if value >= wanted.nodes:
        return Finding("ok", subject, f"{of}, {wanted.nodes} needed")
    raise_it = increase("sagemaker", str(quota.get("QuotaCode")), wanted.nodes, region)
    if standing >= wanted.nodes:  # of a training plan, which has quotas of its own
        return Finding("ok", subject, f"{of}; the cluster has its {standing} already")
    return Finding("error", subject, f"{of}, {wanted.nodes} needed", raise_it)


def cluster_quota(wanted: RunRequirements) -> str:
    """The name that Service Quotas gives it (SageMaker HyperPod quotas)."""
    return f"{wanted.instance} for cluster usage"


def increase(service: str, code: str, value: int, region: str) -> str:
    return (
        f"aws service-quotas request-service-quota-increase --service-code {service} --quota-code {code}"
        f" --desired-value {value} --region {region}"
    )


def judge_offering(offerings: Sequence[Answer], subnet: Answer | None, wanted: RunRequirements, region: str) -> Finding:
    """Of EC2 DescribeInstanceTypeOfferings by zone; ``subnet``: the file system's, where the inputs name one."""
    subject = f"zones of {wanted.ec2_type}"
    zones = sorted({str(offering.get("Location", "")) for offering in offerings} - {""})
    filters = f"--filters Name=instance-type,Values={wanted.ec2_type}"
    look = f"aws ec2 describe-instance-type-offerings --location-type availability-zone {filters} --region"
    # HyperPod's nodes are in an account of AWS's own, whose offer may be another.
    level: Level = "warning" if wanted.on_hyperpod else "error"
    if not zones:
        elsewhere = "us-east-2" if region == "us-west-2" else "us-west-2"
        fix = f"{look} {elsewhere}   # and other regions, then --region"
        return Finding(level, subject, f"no zone of {region} offers it", fix)
    zone = str((subnet or {}).get("AvailabilityZone", ""))
    if zone and zone not in zones:
        found = f"{', '.join(zones)}; not {zone}, where the file system's subnet {(subnet or {}).get('SubnetId')} is"
        fix = f"aws ec2 describe-subnets --filters Name=availability-zone,Values={','.join(zones)} --region {region}"
        return Finding("warning", subject, f"{found}: traffic between zones is slower, and is paid for", fix)
    return Finding("ok", subject, ", ".join(zones) + (f"; the file system's subnet is in {zone}" if zone else ""))


def active(reservations: Iterable[Answer]) -> list[Answer]:
    return [reservation for reservation in reservations if reservation.get("State") == "active"]


def is_block(reservation: Answer) -> bool:
    return reservation.get("ReservationType") == "capacity-block"


def instances_in(reservations: Iterable[Answer]) -> int:
    return sum(int(reservation.get("TotalInstanceCount") or 0) for reservation in reservations)


def judge_reservations(
    reservations: Sequence[Answer], wanted: RunRequirements, region: str, now: datetime
) -> list[Finding]:
    """Of EC2 DescribeCapacityReservations for the type. Without any, nodes come On-Demand: that is no fault."""
    subject = f"capacity of {wanted.ec2_type}"
    by_type = f"--filters Name=instance-type,Values={wanted.ec2_type}"
    look = f"aws ec2 describe-capacity-reservations {by_type} --region {region}"
    offers = (
        f"aws ec2 describe-capacity-block-offerings --instance-type {wanted.ec2_type} --instance-count {wanted.nodes}"
        f" --capacity-duration-hours 24 --region {region}"
    )
    there = active(reservations)
    if there:
        findings = [judge_end(reservation, wanted, offers, now) for reservation in there]
        if (reserved := instances_in(there)) < wanted.nodes:
            found = f"{reserved} reserved, {wanted.nodes} needed: the others are On-Demand"
            findings.append(Finding("warning", subject, found, offers))
        return findings
    coming = [one for one in reservations if one.get("State") in {"scheduled", "payment-pending", "pending"}]
    if coming:
        return [
            Finding("warning", subject, f"{name_of(one)} begins {moment(one.get('StartDate'))}: no node before", look)
            for one in coming
        ]
    gone = [one for one in reservations if one.get("State") in {"expired", "payment-failed", "failed", "cancelled"}]
    was = f" ({name_of(gone[-1])} is {gone[-1].get('State')})" if gone else ""
    return [Finding("ok", subject, f"no reservation{was}: nodes are On-Demand, which may have none left", offers)]


def judge_end(reservation: Answer, wanted: RunRequirements, offers: str, now: datetime) -> Finding:
    subject = f"capacity of {wanted.ec2_type}"
    free, total = reservation.get("AvailableInstanceCount", 0), reservation.get("TotalInstanceCount", 0)
    zone = reservation.get("AvailabilityZone", "")
    found = f"{name_of(reservation)} is active in {zone}: {count(total, 'instance')}, {free} free"
    if reservation.get("InstanceMatchCriteria") == "targeted":
        found += "; the nodes' launch template must name it"
    ends = reservation.get("EndDate")
    if not isinstance(ends, datetime):
        return Finding("ok", subject, found)
    last = aware(ends) - (BLOCK_ENDS_EARLY if is_block(reservation) else timedelta())
    found += f"; its nodes go at {moment(last)}"
    if last - now < SHORT_BLOCK:
        left = max(0.0, (last - now) / timedelta(hours=1))
        return Finding("warning", subject, f"{found}, in {left:.1f} hours", offers)
    return Finding("ok", subject, found)


def name_of(reservation: Answer) -> str:
    kind = "capacity block" if is_block(reservation) else "capacity reservation"
    return f"{kind} {reservation.get('CapacityReservationId', '?')}"


def aware(when: datetime) -> datetime:
    return when if when.tzinfo else when.replace(tzinfo=timezone.utc)


def moment(when: Any) -> str:
    return (
        aware(when).astimezone(timezone.utc).strftime("%Y-%m-%d %H:%M UTC") if isinstance(when, datetime) else "later"
    )


def groups_of(cluster: Answer, instance: str) -> list[Answer]:
    return [group for group in cluster.get("InstanceGroups") or [] if group.get("InstanceType") == instance]


def nodes_in(groups: Iterable[Answer], key: str) -> int:
    return sum(int(group.get(key) or 0) for group in groups)


def standing_nodes(clusters: Iterable[Answer], instance: str) -> int:
    """The most nodes of the type in one cluster."""
    return max((nodes_in(groups_of(cluster, instance), "CurrentCount") for cluster in clusters), default=0)


def judge_hyperpod(clusters: Sequence[Answer], wanted: RunRequirements, region: str) -> Finding:
    """Of SageMaker DescribeCluster, each HyperPod cluster of the region: one that has the nodes is enough."""
    if not clusters:
        fix = f"aws sagemaker list-clusters --region {region}   # in the right region; or instance: {wanted.ec2_type}"
        return Finding("error", "HyperPod", f"there is no HyperPod cluster in {region}", fix)
    findings = [judge_cluster(cluster, wanted, region) for cluster in clusters]
    order = ["ok", "warning", "error", "not checked"]
    return min(findings, key=lambda finding: order.index(finding.level))


def judge_cluster(cluster: Answer, wanted: RunRequirements, region: str) -> Finding:
    name, status = cluster.get("ClusterName", "?"), cluster.get("ClusterStatus", "?")
    subject = f"HyperPod cluster {name}"
    describe = f"aws sagemaker describe-cluster --cluster-name {name} --region {region}"
    groups = groups_of(cluster, wanted.instance)
    if not groups:
        others = cluster.get("InstanceGroups") or []
        types = sorted({str(group.get("InstanceType")) for group in others})
        found = f"has no instance group of {wanted.instance} (it has: {', '.join(types) or 'none'})"
        update = f"aws sagemaker update-cluster --cluster-name {name} --instance-groups ... --region {region}"
        return Finding("error", subject, found, f"{update}   # {describe} shows the present ones")
    if not (cluster.get("Orchestrator") or {}).get("Eks"):
        return Finding("error", subject, "is run by Slurm; the chart needs one that is run by EKS", describe)
    if status in {"Failed", "Deleting", "RollingBack", "Creating"}:
        level: Level = "warning" if status == "Creating" else "error"
        why = f": {one_line(str(cluster['FailureMessage']), 200)}" if cluster.get("FailureMessage") else ""
        return Finding(level, subject, f"is {status}{why}", describe)
    current, target = nodes_in(groups, "CurrentCount"), nodes_in(groups, "TargetCount")
    found = f"{status}, {current} of {target} {wanted.instance} are there, {wanted.nodes} needed"
    if current >= wanted.nodes:
        return Finding("ok", subject, found)
    if target >= wanted.nodes or (cluster.get("AutoScaling") or {}).get("Mode") == "Enable":
        return Finding("warning", subject, f"{found}: it is still growing, or does when asked", describe)
    group = groups[0].get("InstanceGroupName", "?")
    fix = f"aws sagemaker update-cluster --cluster-name {name} --instance-groups ... --region {region}"
    return Finding("error", subject, found, f"{fix}   # group {group} with InstanceCount {wanted.nodes}")


def with_nodes_there(findings: Sequence[Finding], cluster: Sequence[Finding], wanted: RunRequirements) -> list[Finding]:
    """The findings about AWS, given those about the cluster: where its nodes are there already, with their devices, no
    quota and no zone stops the run. They may be another account's, or of a training plan."""
    enough = any(finding.level == "ok" and finding.subject in wanted.devices for finding in cluster)
    enough = enough and not any(finding.subject == f"nodes {wanted.instance}" for finding in cluster)
    about_nodes = ("quota of ", "zones of ", "HyperPod")
    return [
        Finding("warning", finding.subject, f"{finding.found}; the cluster has its nodes all the same", finding.fix)
        if enough and finding.level == "error" and finding.subject.startswith(about_nodes)
        else finding
        for finding in findings
    ]


# --- image


def judge_image(answer: Answer | None, image: Image, wanted: RunRequirements) -> Finding:
    """Of ECR DescribeImages, by digest where there is one; None: ECR has no such repository or image."""
    subject = f"image {image.name}{f':{image.tag}' if image.tag else ''}"
    push = f"genvalues image push {wanted.file}"
    details = ((answer or {}).get("imageDetails") or [None])[0]
    if details is None:
        by = image.digest or f"tag {image.tag}"
        return Finding("error", subject, f"{image.registry} has no {image.name} with {by}", push)
    if details.get("imageStatus") == "ARCHIVED":
        archive = "aws ecr update-image-storage-class --target-storage-class STANDARD"
        fix = f"{archive} --repository-name {image.name} --image-id imageDigest={details.get('imageDigest')}"
        return Finding("error", subject, "is archived: nobody can pull it", f"{fix} --region {image.region}")
    gigabytes = int(details.get("imageSizeInBytes") or 0) / 1e9
    pushed = f"pushed {moment(details.get('imagePushedAt'))}, {gigabytes:.1f} GB"
    if image.digest and image.tag and image.tag not in (details.get("imageTags") or []):
        return Finding("warning", subject, f"{pushed}; the digest is pulled, and tag {image.tag} is another now", push)
    if image.digest:
        return Finding("ok", subject, f"{pushed}, by digest")
    return Finding("ok", subject, f"{pushed}, by tag: {details.get('imageDigest', '')}")


# --- storage


def judge_file_system(file_systems: Sequence[Answer], wanted: RunRequirements, region: str) -> list[Finding]:
    """Of FSx DescribeFileSystems, for kind fsx-static."""
    identity = wanted.file_system
    subject = f"file system {identity}"
    look = f"aws fsx describe-file-systems --region {region}"
    there = next(iter(file_systems), None)
    if there is None:
        return [Finding("error", subject, f"there is none of this id in {region}", f"{look}   # then storage.static")]
    describe = f"{look} --file-system-ids {identity}"
    if there.get("FileSystemType") != "LUSTRE":
        return [Finding("error", subject, f"is {there.get('FileSystemType')}, not LUSTRE", look)]
    status = there.get("Lifecycle") or "in no known state"
    if status not in USABLE_FILE_SYSTEM:
        why = one_line(str((there.get("FailureDetails") or {}).get("Message", "")), 200)
        level: Level = "warning" if status == "CREATING" else "error"
        return [Finding(level, subject, f"is {status}{f': {why}' if why else ''}", describe)]
    mount = str((there.get("LustreConfiguration") or {}).get("MountName", ""))
    wrong = [
        different(subject, key, wanted.text(f"storage.static.{key}"), answered, wanted)
        for key, answered in (("dnsName", str(there.get("DNSName", ""))), ("mountName", mount))
        if wanted.text(f"storage.static.{key}") != answered
    ]
    if wrong:
        return wrong
    capacity = int(there.get("StorageCapacity") or 0)
    asked = gibibytes(wanted.text("storage.size"))
    if asked > capacity:
        fix = f"genvalues write {wanted.file} -o values.yaml --set storage.size={capacity}Gi"
        found = f"has {capacity} GiB, and storage.size says {wanted.text('storage.size')}"
        return [Finding("warning", subject, found, fix)]
    return [Finding("ok", subject, f"{status}, LUSTRE, {capacity} GiB, with this DNS and mount name")]


def different(subject: str, key: str, written: str, answered: str, wanted: RunRequirements) -> Finding:
    fix = f"genvalues write {wanted.file} -o values.yaml --set storage.static.{key}={answered}"
    return Finding("error", subject, f"its {key} is {answered}, not {written}", fix)


def gibibytes(size: str) -> float:
    match = re.fullmatch(r"([1-9][0-9]{0,6})(Mi|Gi|Ti)", size)
    return int(match[1]) * {"Mi": 1 / 1024, "Gi": 1.0, "Ti": 1024.0}[match[2]] if match else 0.0


def judge_size(wanted: RunRequirements) -> list[Finding]:
    """FSx's own rules of size and throughput, for kind fsx (FSx API reference, CreateFileSystem).

    Which deployment type an existing storage class makes is not known here: it is taken for one with SSDs.
    """
    subject = "size of the file system"
    size = wanted.text("storage.size")
    deployment = wanted.text("storage.fsx.deploymentType") or "PERSISTENT_2"
    write = f"genvalues write {wanted.file} -o values.yaml --set"
    fits = gibibytes(size) in (1200, 2400) or (
        not gibibytes(size) % 3600 if deployment == "SCRATCH_1" else not fsx_size(size)
    )
    if not fits:
        multiples = "3600" if deployment == "SCRATCH_1" else "2400"
        better = fsx_size(size) or "1200Gi"
        found = f"{size} is none that FSx makes: 1200Gi, 2400Gi or a multiple of {multiples}Gi"
        return [Finding("error", subject, found, f"{write} storage.size={better}")]
    throughput = wanted.values.get("storage", {}).get("fsx", {}).get("perUnitStorageThroughput")
    allowed = THROUGHPUTS.get(deployment)
    if wanted.makes_storage_class and allowed and throughput is not None and throughput not in allowed:
        found = f"{deployment} has no {throughput} MB/s per TiB, but {', '.join(map(str, allowed))}"
        key = "chartValues.storage.fsx.perUnitStorageThroughput"
        return [Finding("error", subject, found, f"{write} {key}={allowed[1]}")]
    return [Finding("ok", subject, f"{size}, made on demand in about 10 minutes")]


def judge_subnet(subnet: Answer | None, wanted: RunRequirements, region: str) -> Finding:
    """Of EC2 DescribeSubnets; None: there is none of this id."""
    subject = f"subnet {wanted.subnet}"
    look = f"aws ec2 describe-subnets --region {region}"
    if subnet is None:
        fix = f"{look}   # then chartValues.storage.fsx.subnetId"
        return Finding("error", subject, f"there is none of this id in {region}", fix)
    free = int(subnet.get("AvailableIpAddressCount") or 0)
    found = f"{subnet.get('AvailabilityZone')}, {subnet.get('CidrBlock')}, {free} addresses free"
    if free < 2:
        return Finding("error", subject, f"{found}: none for the file system", look)
    return Finding("ok", subject, found)


def judge_security_groups(
    groups: Sequence[Answer], asked: Sequence[str], subnet: Answer | None, region: str, exists: bool = False
) -> list[Finding]:
    """Of EC2 DescribeSecurityGroups: Lustre's ports open between the nodes and the file system.

    A rule counts that names one of the file system's own groups (which nodes can have too) or addresses that hold its
    subnet's. One that names another group may be the nodes', which is not known here; so may one for other addresses,
    of a file system that ``exists``, and so can talk to itself.
    """
    subject = f"security groups {', '.join(asked)}"
    look = f"aws ec2 describe-security-groups --region {region}"
    there = {str(group.get("GroupId")): group for group in groups}
    if missing := [group for group in asked if group not in there]:
        fix = f"{look}   # then chartValues.storage.fsx.securityGroupIds"
        return [Finding("error", subject, f"there is no {', '.join(missing)} in {region}", fix)]
    network = (subnet or {}).get("VpcId")
    if network and (strangers := [name for name, group in there.items() if group.get("VpcId") != network]):
        found = f"{', '.join(strangers)} is of another VPC than the subnet's {network}"
        return [Finding("error", subject, found, f"{look} --filters Name=vpc-id,Values={network}")]
    cidr = str((subnet or {}).get("CidrBlock", ""))
    ways = {
        way: [rule for group in groups for rule in group.get(key) or []]
        for way, key in (("", "IpPermissions"), (" outbound", "IpPermissionsEgress"))
    }
    problems = [f"{ports}{way}" for way, rules in ways.items() for ports in closed(rules, set(there), cidr)]
    if not problems:
        found = "TCP 988 and 1018-1023 are open, from the group itself or the subnet's addresses"
        return [Finding("ok", subject, found)]
    fix = "; ".join(authorize(asked[0], problem, region) for problem in problems)
    if not any(closed(rules, None, "" if exists else cidr) for rules in ways.values()):
        found = f"TCP {', '.join(problems)} open for others alone, who may be the nodes"
        return [Finding("warning", subject, found, fix)]
    return [Finding("error", subject, f"TCP {', '.join(problems)} closed between nodes and file system (Lustre)", fix)]


def closed(rules: Sequence[Answer], own: set[str] | None, cidr: str) -> list[str]:
    """The ranges of Lustre's ports that no rule opens. ``own``: the groups that count as a source; None: any.
    ``cidr``: the addresses that must be among a source's; empty: any will do."""
    open_ports = [ports_of(rule) for rule in rules if has_source(rule, own, cidr)]
    return [
        str(low) if low == high else f"{low}-{high}"
        for low, high in LUSTRE_PORTS
        if not all(any(port in ports for ports in open_ports) for port in range(low, high + 1))
    ]


def ports_of(rule: Answer) -> range:
    """-1 is every protocol, and then every port; else protocol tcp (or its number)."""
    protocol = str(rule.get("IpProtocol"))
    if protocol == "-1":
        return range(0, 65536)
    if protocol not in {"tcp", "6"}:
        return range(0)
    return range(int(rule.get("FromPort", 0)), int(rule.get("ToPort", 65535)) + 1)


def has_source(rule: Answer, own: set[str] | None, cidr: str) -> bool:
    groups = {str(pair.get("GroupId")) for pair in rule.get("UserIdGroupPairs") or []}
    if own is None and (groups or rule.get("PrefixListIds")):
        return True
    if own is not None and groups & own:
        return True
    return any(holds(str(one.get("CidrIp", "")), cidr) for one in rule.get("IpRanges") or [])


def holds(wide: str, narrow: str) -> bool:
    try:
        network = ipaddress.IPv4Network(wide, strict=False)
        return not narrow or ipaddress.IPv4Network(narrow, strict=False).subnet_of(network)
    except ValueError:
        return False


def authorize(group: str, problem: str, region: str) -> str:
    ports, _, outbound = problem.partition(" ")
    way = "egress" if outbound else "ingress"
    if outbound:
        permission = f"IpProtocol=tcp,FromPort={ports.split('-')[0]},ToPort={ports.split('-')[-1]}"
        what = f"--ip-permissions '{permission},UserIdGroupPairs=[{{GroupId={group}}}]'"
    else:
        what = f"--protocol tcp --port {ports} --source-group {group}"
    return f"aws ec2 authorize-security-group-{way} --group-id {group} {what} --region {region}"


# --- model and dataset


def judge_files(wanted: RunRequirements) -> list[Finding]:
    """Model and dataset that are files here, where `genvalues local` finds them and no pod does."""
    run_here = f"genvalues write {wanted.file} -o values.yaml && genvalues local values.yaml --workspace ./workspace"
    return [
        Finding("error", dotted(found.keys[0]), found.what, f"{run_here}   # {found.fix.partition('; ')[2]}")
        for found in unseen_by_pods(wanted.values)
    ]


def judge_object(head: Answer | None, bucket_region: str, wanted: RunRequirements, region: str) -> Finding:
    """Of S3 HeadObject; None: there is no such object. The stage reads it with a role of its own."""
    subject = wanted.text("dataset.source")
    _, key = wanted.s3_source or ("", "")
    look = f"aws s3 ls {shlex.quote(subject.removesuffix(key.rpartition('/')[2]))}"
    if head is None:
        return Finding("error", subject, "there is no such bucket or object", look)
    size = int(head.get("ContentLength") or 0)
    if not size:
        return Finding("error", subject, "is empty", look)
    found = f"{size / 1e6:.1f} MB, readable with these credentials ({their_role(wanted)})"
    if bucket_region and bucket_region != region:
        copy = f"aws s3 cp {shlex.quote(subject)} {shlex.quote(f's3://BUCKET-IN-{region}/{key}')}"
        fix = f"{copy} --region {region}   # then dataset.source"
        return Finding("warning", subject, f"{found}; its bucket is in {bucket_region}, not in {region}", fix)
    return Finding("ok", subject, found)


def their_role(wanted: RunRequirements) -> str:
    annotations = (wanted.values.get("serviceAccount") or {}).get("annotations") or {}
    role = annotations.get("eks.amazonaws.com/role-arn")
    if role:
        return f"the stage tokenize has {role}"
    return "the stage tokenize has the role of its service account, by EKS Pod Identity, or the node's"


# --- small things


def number(answer: Answer | None, key: str) -> float | None:
    value = (answer or {}).get(key)
    return float(value) if isinstance(value, (int, float)) else None


def count(number: Any, what: str) -> str:
    return f"{number} x {what}" if what[:3] == "trn" else f"{number} {what}{'' if number == 1 else 's'}"
