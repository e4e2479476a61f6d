"""Whether the run's FSx file system exists or can be created, and whether its network lets nodes in."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence

from genvalues.common.dicts import get
from genvalues.common.findings import Finding, Level
from genvalues.common.text import one_line
from genvalues.ops.aws import AwsAnswer, AwsClients, answer_or_none
from genvalues.ops.preflight.run_requirements import RunRequirements
from genvalues.settings.shared import FSX_TYPES
from genvalues.settings.value_rules import BINARY, fsx_size

# FSx for Lustre user guide: File system access control with Amazon VPC, and Creating a file system fails.
LUSTRE_PORTS = ((988, 988), (1018, 1023))
USABLE = {"AVAILABLE", "UPDATING"}


# --- a file system that the storage class creates


def check_size(requirements: RunRequirements) -> list[Finding]:
    """FSx's rules for size and throughput of kind fsx (FSx API reference, CreateFileSystem). No network access.

    The deployment type of an existing storage class is unknown here; it is assumed to be one with SSDs.
    """
    if requirements.storage_kind != "fsx":
        return []
    subject = "size of the file system"
    size = requirements.text("storage.size")
    deployment = requirements.text("storage.fsx.deploymentType") or "PERSISTENT_2"
    is_scratch_1 = deployment == "SCRATCH_1"
    fits = not gibibytes(size) % 3600 if is_scratch_1 else not fsx_size(size)
    if not fits and gibibytes(size) not in (1200, 2400):
        found = f"{size} is not a valid FSx size: 1200Gi, 2400Gi or a multiple of {3600 if is_scratch_1 else 2400}Gi"
        fix = requirements.set_command("storage.size", fsx_size(size) or "1200Gi")
        return [Finding("error", subject, found, fix)]
    throughput = get(requirements.values, "storage.fsx.perUnitStorageThroughput", int)
    allowed = FSX_TYPES.get(deployment, {}).get("throughputs")
    if requirements.makes_storage_class and allowed and throughput is not None and throughput not in allowed:
        values = ", ".join(map(str, allowed))
        found = f"{throughput} MB/s per TiB is not allowed for {deployment}. Allowed values: {values}"
        fix = requirements.set_command("chartValues.storage.fsx.perUnitStorageThroughput", allowed[1])
        return [Finding("error", subject, found, fix)]
    return [Finding("ok", subject, f"{size}, created on demand in about 10 minutes")]


def gibibytes(size: str) -> float:
    match = re.fullmatch(r"([1-9][0-9]{0,6})(Mi|Gi|Ti)", size)
    return int(match[1]) * BINARY[match[2]] / BINARY["Gi"] if match else 0.0


def check_subnet(clients: AwsClients, requirements: RunRequirements, subject: str) -> list[Finding]:
    look = f"aws ec2 describe-subnets --region {clients.region}"
    subnet = find_subnet(clients, requirements.subnet)
    if not subnet:
        fix = f"{look}   # then chartValues.storage.fsx.subnetId"
        return [Finding("error", subject, f"not found in {clients.region}", fix)]
    free = int(subnet.get("AvailableIpAddressCount") or 0)
    found = f"{subnet.get('AvailabilityZone')}, {subnet.get('CidrBlock')}, {free} free addresses"
    if free < 2:
        return [Finding("error", subject, f"{found}: too few for the file system", look)]
    return [Finding("ok", subject, found)]


def check_subnet_groups(clients: AwsClients, requirements: RunRequirements, _: str) -> list[Finding]:
    subnet = answer_or_none(lambda: find_subnet(clients, requirements.subnet)) or {}
    return check_security_groups(clients, requirements.security_groups, subnet)


def find_subnet(clients: AwsClients, identity: str) -> AwsAnswer:
    """The subnet; empty if there is none of this ID."""
    answer = clients.once(identity, lambda: clients.find("ec2", "describe_subnets", SubnetIds=[identity]))
    return next(iter(answer.get("Subnets") or []), {})


def subnet_of_storage(clients: AwsClients, requirements: RunRequirements) -> AwsAnswer:
    """The subnet of the run's file system; empty if the inputs name neither a file system nor a subnet."""
    identity = requirements.subnet
    if requirements.file_system:
        identity = next(iter(find_file_system(clients, requirements).get("SubnetIds") or []), "")
    return find_subnet(clients, identity) if identity else {}


# --- a file system that exists


def check_file_system(clients: AwsClients, requirements: RunRequirements, subject: str) -> list[Finding]:
    look = f"aws fsx describe-file-systems --region {clients.region}"
    file_system = find_file_system(clients, requirements)
    if not file_system:
        fix = f"{look}   # then storage.static"
        return [Finding("error", subject, f"not found in {clients.region}", fix)]
    return judge_file_system(file_system, requirements, subject, look)


def find_file_system(clients: AwsClients, requirements: RunRequirements) -> AwsAnswer:
    identity = requirements.file_system
    answer = clients.once(identity, lambda: clients.find("fsx", "describe_file_systems", FileSystemIds=[identity]))
    return next(iter(answer.get("FileSystems") or []), {})


def judge_file_system(file_system: AwsAnswer, requirements: RunRequirements, subject: str, look: str) -> list[Finding]:
    if file_system.get("FileSystemType") != "LUSTRE":
        return [Finding("error", subject, f"is {file_system.get('FileSystemType')}, not LUSTRE", look)]
    status = file_system.get("Lifecycle") or "in an unknown state"
    if status not in USABLE:
        reason = one_line(str((file_system.get("FailureDetails") or {}).get("Message", "")), 200)
        level: Level = "warning" if status == "CREATING" else "error"
        fix = f"{look} --file-system-ids {requirements.file_system}"
        return [Finding(level, subject, f"is {status}{f': {reason}' if reason else ''}", fix)]
    actual = {
        "dnsName": str(file_system.get("DNSName", "")),
        "mountName": str((file_system.get("LustreConfiguration") or {}).get("MountName", "")),
    }
    written = {key: requirements.text(f"storage.static.{key}") for key in actual}
    if wrong := [key for key in actual if written[key] != actual[key]]:
        fixes = {key: requirements.set_command(f"storage.static.{key}", actual[key]) for key in wrong}
        found = {key: f"its {key} is {actual[key]}, not {written[key]}" for key in wrong}
        return [Finding("error", subject, found[key], fixes[key]) for key in wrong]
    capacity = int(file_system.get("StorageCapacity") or 0)
    size = requirements.text("storage.size")
    if gibibytes(size) > capacity:
        fix = requirements.set_command("storage.size", f"{capacity}Gi")
        return [Finding("warning", subject, f"has {capacity} GiB, but storage.size is {size}", fix)]
    return [Finding("ok", subject, f"{status}, LUSTRE, {capacity} GiB, with this DNS name and mount name")]


def check_file_system_groups(clients: AwsClients, requirements: RunRequirements, subject: str) -> list[Finding]:
    """Whether the file system's security groups let nodes in: a mount hangs if they do not."""
    # check_file_system reports it if the file system cannot be read or used.
    file_system = answer_or_none(lambda: find_file_system(clients, requirements)) or {}
    judged = judge_file_system(file_system, requirements, subject, "")
    interfaces = list(file_system.get("NetworkInterfaceIds") or [])[:1]  # all of its interfaces have the same groups
    if not interfaces or any(finding.level == "error" for finding in judged):
        return []
    answer = clients.ask("ec2", "describe_network_interfaces", NetworkInterfaceIds=interfaces)
    listed = [group for one in answer.get("NetworkInterfaces") or [] for group in one.get("Groups") or []]
    names = [str(group.get("GroupId")) for group in listed]
    if not names:
        return []
    return check_security_groups(clients, names, subnet_of_storage(clients, requirements), exists=True)


# --- security groups


def check_security_groups(
    clients: AwsClients, names: Sequence[str], subnet: AwsAnswer, exists: bool = False
) -> list[Finding]:
    by_id = [{"Name": "group-id", "Values": [*names]}]
    groups = list(clients.list("ec2", "describe_security_groups", "SecurityGroups", Filters=by_id))
    return [judge_security_groups(groups, names, subnet, clients.region, exists)]


def judge_security_groups(
    groups: Sequence[AwsAnswer], names: Sequence[str], subnet: AwsAnswer, region: str, exists: bool = False
) -> Finding:
    """Judge whether Lustre's ports are open between the nodes and the file system.

    A rule opens a port if its source is one of the file system's groups (nodes can be in one too) or a range that
    contains the subnet's. A rule for another group may be for the nodes, whose groups are unknown here. So may a rule
    for another range if the file system ``exists``: FSx creates none that cannot reach itself.
    """
    subject = f"security groups {', '.join(names)}"
    look = f"aws ec2 describe-security-groups --region {region}"
    found = {str(group.get("GroupId")): group for group in groups}
    if missing := [name for name in names if name not in found]:
        fix = f"{look}   # then chartValues.storage.fsx.securityGroupIds"
        return Finding("error", subject, f"{', '.join(missing)} not found in {region}", fix)
    network = subnet.get("VpcId")
    if network and (others := [name for name, group in found.items() if group.get("VpcId") != network]):
        reason = f"{', '.join(others)} is not in the subnet's VPC {network}"
        return Finding("error", subject, reason, f"{look} --filters Name=vpc-id,Values={network}")
    cidr = str(subnet.get("CidrBlock", ""))
    rules = {
        direction: [rule for group in groups for rule in group.get(key) or []]
        for direction, key in (("ingress", "IpPermissions"), ("egress", "IpPermissionsEgress"))
    }
    problems = [(way, ports) for way in rules for ports in closed_ports(rules[way], set(found), cidr)]
    if not problems:
        return Finding("ok", subject, "TCP 988 and 1018-1023 are open for the group itself or the subnet's addresses")
    ports = ", ".join(f"{ports} {way}" for way, ports in problems)
    fix = "; ".join(authorize(names[0], way, ports, region) for way, ports in problems)
    if not any(closed_ports(rules[way], None, "" if exists else cidr) for way in rules):
        return Finding("warning", subject, f"TCP {ports} is open for other sources only, which may be the nodes", fix)
    return Finding("error", subject, f"TCP {ports} is closed, which Lustre needs between nodes and file system", fix)


def closed_ports(rules: Sequence[AwsAnswer], sources: set[str] | None, cidr: str) -> list[str]:
    """The ranges of Lustre's ports that no rule opens.

    ``sources``: the groups that count as a source; None counts any. ``cidr``: the range that a source range must
    contain; empty accepts any.
    """
    open_ports = [ports_of(rule) for rule in rules if has_source(rule, sources, cidr)]
    return [
        str(low) if low == high else f"{low}-{high}"
        for low, high in LUSTRE_PORTS
        if not all(any(port in ports for ports in open_ports) for port in range(low, high + 1))
    ]


def ports_of(rule: AwsAnswer) -> range:
    """The TCP ports of a rule. Protocol -1 is all protocols and ports; 6 is TCP."""
    protocol = str(rule.get("IpProtocol"))
    if protocol == "-1":
        return range(0, 65536)
    if protocol not in {"tcp", "6"}:
        return range(0)
    return range(int(rule.get("FromPort", 0)), int(rule.get("ToPort", 65535)) + 1)


def has_source(rule: AwsAnswer, sources: set[str] | None, cidr: str) -> bool:
    groups = {str(pair.get("GroupId")) for pair in rule.get("UserIdGroupPairs") or []}
    if sources is None and (groups or rule.get("PrefixListIds")):
        return True
    if sources is not None and groups & sources:
        return True
    return any(contains(str(one.get("CidrIp", "")), cidr) for one in rule.get("IpRanges") or [])


def contains(wide: str, narrow: str) -> bool:
    try:
        network = ipaddress.IPv4Network(wide, strict=False)
        return not narrow or ipaddress.IPv4Network(narrow, strict=False).subnet_of(network)
    except ValueError:
        return False


def authorize(group: str, direction: str, ports: str, region: str) -> str:
    """The command that opens ports of a group for the group itself."""
    if direction == "ingress":
        permission = f"--protocol tcp --port {ports} --source-group {group}"
    else:
        low, _, high = ports.partition("-")
        permission = f"IpProtocol=tcp,FromPort={low},ToPort={high or low},UserIdGroupPairs=[{{GroupId={group}}}]"
        permission = f"--ip-permissions '{permission}'"
    return f"aws ec2 authorize-security-group-{direction} --group-id {group} {permission} --region {region}"
