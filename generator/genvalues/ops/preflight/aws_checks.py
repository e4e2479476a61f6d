"""The checks that ask AWS, side by side, and not for long. What an answer means is in ``judge``."""

from __future__ import annotations

import functools
import shlex
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any, TypeVar

from genvalues.common.errors import Unavailable, UserError
from genvalues.common.findings import Finding
from genvalues.ops.aws import Denied, Missing, NotLoggedIn, default_region, translate_errors
from genvalues.ops.image.registries import ACCOUNTS, mistaken_account
from genvalues.ops.preflight import judge
from genvalues.ops.preflight.judge import Answer
from genvalues.ops.preflight.run_requirements import PUBLIC_ECR, RunRequirements

# A call takes 10 s at most: one try, of which this is the longest wait for a connection and then for each answer.
CONNECT_SECONDS, READ_SECONDS = 4, 6
# The IAM prefix of a service where it is not the service's name in boto3, and the actions that are not the call's name.
PREFIXES = {"service-quotas": "servicequotas"}
ACTIONS = {"HeadObject": "s3:GetObject", "HeadBucket": "s3:ListBucket"}
POLICY = "docs/preflight.md has a policy to paste"

Found = TypeVar("Found")
Another = TypeVar("Another")


class AwsClients:
    """AWS in one region, with clients that are made once and give up soon. Safe to use from several threads."""

    def __init__(self, region: str, now: datetime | None = None) -> None:
        self.region = region
        self.now = now or datetime.now(timezone.utc)  # one for all checks: what is judged by it agrees
        self._session: Any = None
        self._clients: dict[str, Any] = {}
        self._lock = threading.Lock()  # making a client is not for two threads at once (boto3's guide); using one is

    def client(self, service: str) -> Any:
        with self._lock:
            if service not in self._clients:
                self._clients[service] = self._make(service)
            return self._clients[service]

    def _make(self, service: str) -> Any:
        import boto3
        import botocore.session
        from botocore.config import Config

        if self._session is None:
            # As the default, so that the calls that credentials are made by (STS, SSO) are as quick to give up.
            core = botocore.session.get_session()
            limits = Config(
                connect_timeout=CONNECT_SECONDS, read_timeout=READ_SECONDS, retries={"total_max_attempts": 1}
            )
            core.set_default_client_config(limits)
            core.register_component("data_loader", models(core.get_config_variable("data_path")))
            self._session = boto3.session.Session(botocore_session=core)
        return self._session.client(service, region_name=self.region)

    @contextmanager
    def calling(self, service: str, operation: str) -> Iterator[Any]:
        """The client, around a call: raises as ``told`` does, and what was not allowed names the IAM action."""
        needs = action_of(service, operation)
        with translate_errors(f"{service} in {self.region}", needs=needs, look=f"Look at it: aws {service} help."):
            yield self.client(service)

    def ask(self, service: str, operation: str, **parameters: Any) -> dict[str, Any]:
        with self.calling(service, operation) as client:
            answer: dict[str, Any] = getattr(client, operation)(**parameters)
        return answer

    def list(self, service: str, operation: str, key: str, **parameters: Any) -> Iterator[dict[str, Any]]:
        """What is under ``key``, page by page, asked for as it is needed."""
        with self.calling(service, operation) as client:
            for page in client.get_paginator(operation).paginate(**parameters):
                yield from page.get(key) or []


@functools.cache
def models(path: str | None) -> Any:
    """AWS's descriptions of its services, which are large: read once, for several regions."""
    from botocore.loaders import create_loader

    return create_loader(path)


def action_of(service: str, operation: str) -> str:
    """The IAM action that a call needs, as a policy spells it."""
    name = "".join(word.title() for word in operation.split("_"))
    return ACTIONS.get(name, f"{PREFIXES.get(service, service)}:{name}")


Check = Callable[[AwsClients, RunRequirements], list[Finding]]


def check_aws(wanted: RunRequirements, region: str | None = None, offline: bool = False) -> list[Finding]:
    """All findings about AWS; ``region`` is the one that the user names.

    Without credentials nothing is checked, which stops nothing: the release itself asks AWS for nothing from here.
    """
    checks = applicable(wanted)
    size = check_size(wanted)
    if not checks:
        return size or [Finding("ok", "AWS", f"nothing to check at AWS: instance {wanted.instance}")]
    if offline:
        subjects = ["AWS credentials", "AWS region", *checks]
        return [*(Finding("not checked", subject, "--offline") for subject in subjects), *size]
    try:
        named = wanted.regions(region, default_region())
        regions = judge.judge_region(named, known_regions(), wanted.file)
        if regions.level not in {"ok", "warning"}:
            return [regions, unasked(checks, "a region"), *size]
        asking = AwsClients(named[0][1])
        who = judge.judge_identity(asking.ask("sts", "get_caller_identity"), wanted)
    except NotLoggedIn as error:
        return [unanswered("AWS credentials", wanted, error), unasked(checks, "credentials"), *size]
    except UNANSWERED as error:
        who = unanswered("AWS credentials", wanted, error)
    with ThreadPoolExecutor(len(checks)) as pool:
        found = pool.map(lambda subject: guarded(subject, checks[subject], asking, wanted), checks)
        return [who, regions, *(finding for some in found for finding in some), *size]


def applicable(wanted: RunRequirements) -> dict[str, Check]:
    """The checks that this run gives a reason for, by what they are about."""
    checks: dict[str, Check] = {}
    if wanted.hardware:
        checks[f"quota and capacity of {wanted.instance}"] = check_hyperpod if wanted.on_hyperpod else check_capacity
        checks[f"zones of {wanted.ec2_type}"] = check_offering
    if wanted.hardware or wanted.image_is_ecrs:
        checks["image"] = check_image
    if wanted.file_system:
        checks[f"file system {wanted.file_system}"] = check_file_system
    if wanted.subnet:
        checks["subnet and security groups"] = check_network
    if wanted.s3_source:
        checks[wanted.text("dataset.source")] = check_object
    return checks


def unasked(checks: dict[str, Check], without: str) -> Finding:
    """Not a line for each: they all want the same thing first."""
    return Finding("not checked", "AWS", f"{', '.join(checks)}: not without {without}, see above")


@functools.cache
def known_regions() -> frozenset[str]:
    """What this botocore lists, in every partition; and the regions of AWS's containers, which may be newer."""
    import boto3

    session = boto3.session.Session()
    partitions = session.get_available_partitions()
    listed = (region for one in partitions for region in session.get_available_regions("ec2", one))
    return frozenset([*ACCOUNTS, *listed])


def guarded(subject: str, check: Check, asking: AwsClients, wanted: RunRequirements) -> list[Finding]:
    """A check that may not look, or gets no answer, is not checked; the others go on."""
    findings, problems = attempt(subject, wanted, lambda: check(asking, wanted))
    return problems if findings is None else findings


def attempt(subject: str, wanted: RunRequirements, ask: Callable[[], Found]) -> tuple[Found | None, list[Finding]]:
    """What was answered, or the finding that it was not."""
    try:
        return ask(), []
    except UNANSWERED as error:
        return None, [unanswered(subject, wanted, error)]


UNANSWERED = (UserError, Unavailable, Missing)  # what ``told`` raises


def unanswered(subject: str, wanted: RunRequirements, error: Exception) -> Finding:
    preflight = f"genvalues preflight {wanted.file} --aws"
    if isinstance(error, NotLoggedIn):
        log_in = "aws sso login   # or: aws configure; or AWS_PROFILE=NAME for others"
        return Finding("not checked", subject, error.what, log_in, unanswered=True)
    if isinstance(error, Denied):
        fix = f"AWS_PROFILE=NAME {preflight}   # or have {error.needs} allowed: {POLICY}"
        return Finding("not checked", subject, f"these credentials are not allowed {error.needs}", fix)
    if isinstance(error, Missing):
        return Finding("not checked", subject, "AWS knows nothing of this name", preflight)
    return Finding("not checked", subject, str(error), preflight, unanswered=isinstance(error, Unavailable))


def or_none(ask: Callable[[], Found]) -> Found | None:
    """None where AWS has nothing of that name."""
    try:
        return ask()
    except Missing:
        return None


def side_by_side(one: Callable[[], Found], other: Callable[[], Another]) -> tuple[Found, Another]:
    with ThreadPoolExecutor(1) as pool:
        beside = pool.submit(one)
        answer = other()
        return beside.result(), answer


# --- the checks


def check_capacity(asking: AwsClients, wanted: RunRequirements) -> list[Finding]:
    """The quota of On-Demand instances, and what is reserved: either may do without the other's answer."""
    (quota, unknown), (reservations, unseen) = side_by_side(
        lambda: attempt(f"quota of {wanted.ec2_type}", wanted, lambda: find_quota(asking)),
        lambda: attempt(f"capacity of {wanted.ec2_type}", wanted, lambda: reservations_of(asking, wanted)),
    )
    blocks = [one for one in judge.active(reservations or []) if judge.is_block(one)]
    in_blocks = judge.instances_in(blocks)
    return [
        *(unknown or [judge.judge_quota(quota, wanted, asking.region, in_blocks)]),
        *(unseen or judge.judge_reservations(reservations or [], wanted, asking.region, asking.now)),
    ]


def find_quota(asking: AwsClients) -> Answer | None:
    code = judge.TRN_QUOTA
    answer = or_none(lambda: asking.ask("service-quotas", "get_service_quota", ServiceCode="ec2", QuotaCode=code))
    return (answer or {}).get("Quota")


def reservations_of(asking: AwsClients, wanted: RunRequirements) -> list[Answer]:
    by_type = [{"Name": "instance-type", "Values": [wanted.ec2_type]}]
    return list(asking.list("ec2", "describe_capacity_reservations", "CapacityReservations", Filters=by_type))


def check_hyperpod(asking: AwsClients, wanted: RunRequirements) -> list[Finding]:
    """The clusters, and SageMaker's quota, which one that has its nodes does not need."""
    (quota, unknown), (clusters, unseen) = side_by_side(
        lambda: attempt(f"quota of {wanted.instance}", wanted, lambda: find_cluster_quota(asking, wanted)),
        lambda: attempt("HyperPod", wanted, lambda: clusters_of(asking)),
    )
    standing = judge.standing_nodes(clusters or [], wanted.instance)
    return [
        *(unknown or [judge.judge_cluster_quota(quota, wanted, asking.region, standing)]),
        *(unseen or [judge.judge_hyperpod(clusters or [], wanted, asking.region)]),
    ]


def clusters_of(asking: AwsClients) -> list[Answer]:
    names = [one["ClusterName"] for one in asking.list("sagemaker", "list_clusters", "ClusterSummaries")]
    found = [or_none(lambda: asking.ask("sagemaker", "describe_cluster", ClusterName=name)) for name in names]  # noqa: B023
    return [cluster for cluster in found if cluster]


def find_cluster_quota(asking: AwsClients, wanted: RunRequirements) -> Answer | None:
    """By its name: its code is nowhere documented. SageMaker has thousands, so that it stops where it is found."""
    listed = asking.list("service-quotas", "list_service_quotas", "Quotas", ServiceCode="sagemaker", MaxResults=100)
    return next((quota for quota in listed if quota.get("QuotaName") == judge.cluster_quota(wanted)), None)


def check_offering(asking: AwsClients, wanted: RunRequirements) -> list[Finding]:
    offerings = list(
        asking.list(
            "ec2",
            "describe_instance_type_offerings",
            "InstanceTypeOfferings",
            LocationType="availability-zone",
            Filters=[{"Name": "instance-type", "Values": [wanted.ec2_type]}],
        )
    )
    try:
        subnet = subnet_of_storage(asking, wanted)
    except (UserError, Unavailable):  # said by the check of the storage itself
        subnet = None
    return [judge.judge_offering(offerings, subnet, wanted, asking.region)]


def subnet_of_storage(asking: AwsClients, wanted: RunRequirements) -> Answer | None:
    identity = wanted.subnet
    if wanted.file_system and (there := next(iter(file_systems_of(asking, wanted)), None)):
        identity = next(iter(there.get("SubnetIds") or []), "")
    return find_subnet(asking, identity) if identity else None


def find_subnet(asking: AwsClients, identity: str) -> Answer | None:
    answer = or_none(lambda: asking.ask("ec2", "describe_subnets", SubnetIds=[identity]))
    return next(iter((answer or {}).get("Subnets") or []), None)


def file_systems_of(asking: AwsClients, wanted: RunRequirements) -> list[Answer]:
    answer = or_none(lambda: asking.ask("fsx", "describe_file_systems", FileSystemIds=[wanted.file_system]))
    return list((answer or {}).get("FileSystems") or [])


def check_image(asking: AwsClients, wanted: RunRequirements) -> list[Finding]:
    image = wanted.image
    subject = f"image {image.name}{f':{image.tag}' if image.tag else ''}"
    if mistake := mistaken_account(image):
        fix = "aws sts get-caller-identity --query Account   # then image:"
        return [Finding("error", subject, mistake, fix)]
    if not image.in_ecr:
        where = "public.ecr.aws, which anybody can pull from" if image.registry == PUBLIC_ECR else "no registry of ECR"
        look = f"docker manifest inspect {shlex.quote(image.at(image.digest) if image.digest else image.tagged)}"
        return [Finding("not checked", subject, f"its address is {where}", look)]
    which = {"imageDigest": image.digest} if image.digest else {"imageTag": image.tag}
    parameters = {"registryId": image.account, "repositoryName": image.name, "imageIds": [which]}
    there = asking if image.region == asking.region else AwsClients(image.region)
    answer = or_none(lambda: there.ask("ecr", "describe_images", **parameters))
    return [judge.judge_image(answer, image, wanted)]


def check_file_system(asking: AwsClients, wanted: RunRequirements) -> list[Finding]:
    """The file system that exists, and whether its security groups let nodes in: a mount that they don't hangs."""
    there = file_systems_of(asking, wanted)
    findings = judge.judge_file_system(there, wanted, asking.region)
    if not there or any(finding.level == "error" for finding in findings):
        return findings

    def groups(asking: AwsClients, wanted: RunRequirements) -> list[Finding]:
        interfaces = list(there[0].get("NetworkInterfaceIds") or [])[:1]  # all of a file system's have the same groups
        subnets = list(there[0].get("SubnetIds") or [])
        if not interfaces:
            return []
        answer = asking.ask("ec2", "describe_network_interfaces", NetworkInterfaceIds=interfaces)
        listed = [group for one in answer.get("NetworkInterfaces") or [] for group in one.get("Groups") or []]
        names = [str(group.get("GroupId")) for group in listed]
        subnet = find_subnet(asking, subnets[0]) if subnets else None
        return (
            judge.judge_security_groups(groups_of(asking, names), names, subnet, asking.region, exists=True)
            if names
            else []
        )

    return [*findings, *guarded(f"security groups of {wanted.file_system}", groups, asking, wanted)]


def groups_of(asking: AwsClients, names: list[str]) -> list[Answer]:
    """Those of them that there are."""
    by_id = [{"Name": "group-id", "Values": names}]
    return list(asking.list("ec2", "describe_security_groups", "SecurityGroups", Filters=by_id))


def check_size(wanted: RunRequirements) -> list[Finding]:
    """Asks nobody."""
    return judge.judge_size(wanted) if wanted.storage_kind == "fsx" else []


def check_network(asking: AwsClients, wanted: RunRequirements) -> list[Finding]:
    """The subnet and the groups that a file system made on demand gets."""
    subnet, denied = attempt(f"subnet {wanted.subnet}", wanted, lambda: find_subnet(asking, wanted.subnet))
    findings = denied or [judge.judge_subnet(subnet, wanted, asking.region)]

    names = wanted.security_groups
    if not names:
        return findings

    def groups(asking: AwsClients, wanted: RunRequirements) -> list[Finding]:
        return judge.judge_security_groups(groups_of(asking, names), names, subnet, asking.region)

    subject = f"security groups {', '.join(names)}"
    return [*findings, *guarded(subject, groups, asking, wanted)]


def check_object(asking: AwsClients, wanted: RunRequirements) -> list[Finding]:
    bucket, key = wanted.s3_source or ("", "")
    try:
        head = or_none(lambda: asking.ask("s3", "head_object", Bucket=bucket, Key=key))
    except Denied as error:
        look = f"aws s3 ls {shlex.quote(wanted.text('dataset.source'))}"
        found = (
            f"access denied to these credentials ({error.needs}), or it is not there, which S3 tells only with"
            f" s3:ListBucket; {judge.their_role(wanted)}"
        )
        return [Finding("not checked", wanted.text("dataset.source"), found, look)]
    return [judge.judge_object(head, bucket_region(asking, bucket), wanted, asking.region)]


def bucket_region(asking: AwsClients, bucket: str) -> str:
    """Where the bucket is, if S3 says it: empty is no answer."""
    try:
        answer = asking.ask("s3", "head_bucket", Bucket=bucket)
    except (UserError, Unavailable, Missing):
        return ""
    headers = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    return str(answer.get("BucketRegion") or headers.get("x-amz-bucket-region") or "")
