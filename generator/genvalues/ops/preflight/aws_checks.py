"""The checks of AWS: credentials and region first, then in parallel all that apply to the run.

Each check asks about one subject and judges the answer. One that gets no answer is "not checked"; the others go on.
"""

from __future__ import annotations

import difflib
import functools
import shlex
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

from genvalues.common.errors import Unavailable
from genvalues.common.findings import Finding
from genvalues.common.text import one_line
from genvalues.ops.aws import NO_ANSWER, AwsClients, Denied, Missing, NotLoggedIn, answer_or_none, default_region
from genvalues.ops.preflight import image_checks
from genvalues.ops.preflight import instance_checks as instances
from genvalues.ops.preflight import storage_checks as storage
from genvalues.ops.preflight.instance_checks import utc_text
from genvalues.ops.preflight.run_requirements import RunRequirements
from genvalues.ops.registries import ACCOUNTS, PUBLIC_ECR, invalid_account, is_aws_container
from genvalues.settings.dataset_files import s3_keys
from genvalues.settings.datasets import before_wildcard, is_prefix

MOST_LISTED = 1000  # objects of an S3 prefix


def check_aws(requirements: RunRequirements, region: str | None = None, offline: bool = False) -> list[Finding]:
    """All findings about AWS. ``region`` is that of --region.

    Without credentials or a region nothing is checked. That is not an error: the run does not use this machine's
    credentials.
    """
    checks = [check for check in CHECKS if check.applies(requirements)]
    subjects = [check.subject(requirements) for check in checks]
    size = storage.check_size(requirements)
    if not checks:
        return size or [Finding("ok", "AWS", f"nothing to check for instance {requirements.instance}")]
    if offline:
        all_subjects = ["AWS credentials", "AWS region", *subjects]
        return [*(Finding("not checked", subject, "--offline") for subject in all_subjects), *size]
    try:
        named = requirements.regions(region, default_region())
        regions = judge_region(named, known_regions(), requirements)
        if regions.level not in {"ok", "warning"}:
            return [regions, skipped(subjects, "a region"), *size]
        clients = AwsClients(named[0][1])
        identity = check_identity(clients, requirements)
    except NotLoggedIn as error:
        return [unanswered("AWS credentials", requirements, error), skipped(subjects, "credentials"), *size]
    except NO_ANSWER as error:
        identity = unanswered("AWS credentials", requirements, error)
    with ThreadPoolExecutor(len(checks)) as pool:
        found = list(pool.map(lambda check: check.findings(clients, requirements), checks))
    return [identity, regions, *(finding for findings in found for finding in findings), *size]


def skipped(subjects: Sequence[str], missing: str) -> Finding:
    """One finding for all checks that need what is missing."""
    return Finding("not checked", "AWS", f"{', '.join(subjects)}: skipped without {missing}, see above")


def unanswered(subject: str, requirements: RunRequirements, error: Exception) -> Finding:
    """The finding for a check whose call failed."""
    again = requirements.preflight_command("--aws")
    if isinstance(error, NotLoggedIn):
        log_in = "aws sso login   # or aws configure, or AWS_PROFILE=NAME"
        return Finding("not checked", subject, error.what, log_in, unanswered=True)
    if isinstance(error, Denied):
        fix = f"AWS_PROFILE=NAME {again}   # or allow {error.action}: docs/preflight.md has a policy to paste"
        return Finding("not checked", subject, f"these credentials do not allow {error.action}", fix)
    if isinstance(error, Missing):
        return Finding("not checked", subject, "not found in AWS", again)
    return Finding("not checked", subject, str(error), again, unanswered=isinstance(error, Unavailable))


def check_identity(clients: AwsClients, requirements: RunRequirements) -> Finding:
    """The account of the credentials. If it differs from the image's, either accounts share a registry, or these are
    the wrong credentials and all other findings are about the wrong account."""
    answer = clients.ask("sts", "get_caller_identity")
    account, registry = str(answer.get("Account", "?")), requirements.image.account
    other = f"; the image is in the registry of account {registry}" if registry not in {"", account} else ""
    return Finding("ok", "AWS credentials", f"account {account}, {answer.get('Arn', '?')}{other}")


@functools.cache
def known_regions() -> frozenset[str]:
    """The regions that this botocore lists, and those of AWS's containers, which may be newer."""
    import boto3

    session = boto3.session.Session()
    partitions = session.get_available_partitions()
    listed = (region for one in partitions for region in session.get_available_regions("ec2", one))
    return frozenset([*ACCOUNTS, *listed])


def judge_region(named: Sequence[tuple[str, str]], known: Collection[str], requirements: RunRequirements) -> Finding:
    """``named``: the sources that name a region, each with its region, the first of which is used; ``known``: all."""
    subject = "AWS region"
    if not named:
        fix = f"{requirements.preflight_command('--region us-west-2')}   # or: aws configure set region us-west-2"
        found = "not set, and no address in the inputs names one"
        return Finding("not checked", subject, found, fix, unanswered=True)
    source, region = named[0]
    if region not in known:
        near = (difflib.get_close_matches(region, known, n=1) or ["us-west-2"])[0]
        newer = "for a region newer than this boto3: pip install -U boto3"
        fix = f"{requirements.preflight_command('--region', near)}   # {newer}"
        return Finding("error", subject, f"{one_line(region)} (from {source}) is not an AWS region", fix)
    if others := [f"{another} from {other}" for other, another in named[1:] if another != region]:
        fix = (
            f"{requirements.preflight_command('--region', region)}   # with image, storage and AWS_REGION in one region"
        )
        found = f"{region} from {source}, but {', '.join(others)}; checked in {region}"
        return Finding("warning", subject, found, fix)
    return Finding("ok", subject, f"{region} (from {source})")


def check_image(clients: AwsClients, requirements: RunRequirements, _: str) -> list[Finding]:
    image = requirements.image
    subject = f"image {image.name}{f':{image.tag}' if image.tag else ''}"
    if mistake := invalid_account(image):
        return [Finding("error", subject, mistake, "aws sts get-caller-identity --query Account   # then image:")]
    if not image.in_ecr:
        found = f"in the public registry {PUBLIC_ECR}" if image.registry == PUBLIC_ECR else "not in an ECR registry"
        look = f"docker manifest inspect {shlex.quote(image.at(image.digest) if image.digest else image.tagged)}"
        return [Finding("not checked", subject, found, look)]
    registry = clients if image.region == clients.region else AwsClients(image.region)
    answer = registry.find("ecr", "describe_images", imageIds=[image.ecr_id], **image.ecr_repository)
    push = f"genvalues image push {requirements.file}"
    if not (details := answer.get("imageDetails")):
        wanted = image.digest or f"tag {image.tag}"
        return [Finding("error", subject, f"{image.registry} has no {image.name} with {wanted}", push)]
    [detail, *_] = details
    if detail.get("imageStatus") == "ARCHIVED":
        restore = "aws ecr update-image-storage-class --target-storage-class STANDARD"
        fix = f"{restore} --repository-name {image.name} --image-id imageDigest={detail.get('imageDigest')}"
        return [Finding("error", subject, "archived, so it cannot be pulled", f"{fix} --region {image.region}")]
    size = int(detail.get("imageSizeInBytes") or 0) / 1e9
    pushed = f"pushed {utc_text(detail.get('imagePushedAt'))}, {size:.1f} GB"
    if not image.digest:
        return [Finding("ok", subject, f"{pushed}, by tag: {detail.get('imageDigest', '')}")]
    if image.tag and image.tag not in (detail.get("imageTags") or []):
        found = f"{pushed}; the run pulls it by digest, but tag {image.tag} is another image now"
        return [Finding("warning", subject, found, push)]
    return [Finding("ok", subject, f"{pushed}, by digest")]


def check_s3_object(clients: AwsClients, requirements: RunRequirements, subject: str) -> list[Finding]:
    """The dataset's objects, as these credentials see them. The stage tokenize reads them with another role."""
    bucket, key = requirements.s3_source or ("", "")
    role = tokenize_role(requirements)
    try:
        size = size_in_s3(clients, bucket, key)
    except Denied as error:
        found = (
            f"not allowed for these credentials ({error.action}), or not found, which S3 says only with s3:ListBucket"
        )
        return [Finding("not checked", subject, f"{found}; {role}", f"aws s3 ls {shlex.quote(subject)}")]
    except Missing:
        size, missing = 0, "no such bucket or object"
    else:
        missing = "is empty, or has no data file"
    if not size:
        folder = subject.removesuffix(key.rpartition("/")[2])
        return [Finding("error", subject, missing, f"aws s3 ls {shlex.quote(folder)}")]
    found = f"{size / 1e6:.1f} MB, readable with these credentials ({role})"
    elsewhere = bucket_region(clients, bucket)
    if elsewhere not in {"", clients.region}:
        copy = f"aws s3 cp {shlex.quote(subject)} {shlex.quote(f's3://BUCKET-IN-{clients.region}/{key}')}"
        fix = f"{copy} --region {clients.region}   # then dataset.source"
        found = f"{found}; the bucket is in {elsewhere}, not in {clients.region}"
        return [Finding("warning", subject, found, fix)]
    return [Finding("ok", subject, found)]


def size_in_s3(clients: AwsClients, bucket: str, key: str) -> int:
    """The bytes of an object, or of the data files among the first objects under a prefix or a glob."""
    if not is_prefix(key):
        return int(clients.ask("s3", "head_object", Bucket=bucket, Key=key).get("ContentLength") or 0)
    listed = clients.list("s3", "list_objects_v2", "Contents", Bucket=bucket, Prefix=before_wildcard(key))
    sizes = {each["Key"]: int(each["Size"]) for each in islice(listed, MOST_LISTED)}
    return sum(sizes[name] for name in s3_keys(key, sizes))


def bucket_region(clients: AwsClients, bucket: str) -> str:
    """The bucket's region; empty if S3 does not return it."""
    answer = answer_or_none(lambda: clients.ask("s3", "head_bucket", Bucket=bucket)) or {}
    headers = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    return str(answer.get("BucketRegion") or headers.get("x-amz-bucket-region") or "")


def tokenize_role(requirements: RunRequirements) -> str:
    annotations = (requirements.values.get("serviceAccount") or {}).get("annotations") or {}
    if role := annotations.get("eks.amazonaws.com/role-arn"):
        return f"the stage tokenize uses {role}"
    return "the stage tokenize uses the role of its service account (EKS Pod Identity) or of its node"


@dataclass(frozen=True)
class AwsCheck:
    """One check: what it is about, whether a run needs it, and the function that asks and judges."""

    subject: Callable[[RunRequirements], str]
    applies: Callable[[RunRequirements], object]
    check: Callable[[AwsClients, RunRequirements, str], list[Finding]]

    def findings(self, clients: AwsClients, requirements: RunRequirements) -> list[Finding]:
        subject = self.subject(requirements)
        try:
            return self.check(clients, requirements, subject)
        except NO_ANSWER as error:
            return [unanswered(subject, requirements, error)]


def on_ec2(run: RunRequirements) -> bool:
    return run.hardware is not None and not run.on_hyperpod


def on_hyperpod(run: RunRequirements) -> bool:
    return run.hardware is not None and run.on_hyperpod


def is_checked_image(run: RunRequirements) -> bool:
    """A container of AWS is an error already (image_checks)."""
    return bool(run.hardware or run.image_in_ecr) and not is_aws_container(run.image)


# In the order of the output.
CHECKS = (
    AwsCheck(lambda run: f"quota of {run.ec2_type}", on_ec2, instances.check_ec2_quota),
    AwsCheck(lambda run: f"capacity of {run.ec2_type}", on_ec2, instances.check_capacity),
    AwsCheck(lambda run: f"quota of {run.instance}", on_hyperpod, instances.check_cluster_quota),
    AwsCheck(lambda run: "HyperPod", on_hyperpod, instances.check_hyperpod),
    AwsCheck(lambda run: f"zones of {run.ec2_type}", lambda run: run.hardware, instances.check_zones),
    AwsCheck(lambda run: "image", is_checked_image, check_image),
    AwsCheck(
        lambda run: f"contents of image {run.image.name}", lambda run: run.own_image_in_ecr, image_checks.check_labels
    ),
    AwsCheck(lambda run: f"file system {run.file_system}", lambda run: run.file_system, storage.check_file_system),
    AwsCheck(
        lambda run: f"security groups of {run.file_system}",
        lambda run: run.file_system,
        storage.check_file_system_groups,
    ),
    AwsCheck(lambda run: f"subnet {run.subnet}", lambda run: run.subnet, storage.check_subnet),
    AwsCheck(
        lambda run: f"security groups {', '.join(run.security_groups)}",
        lambda run: run.subnet and run.security_groups,
        storage.check_subnet_groups,
    ),
    AwsCheck(lambda run: run.dataset, lambda run: run.s3_source, check_s3_object),
)
