"""All checks of AWS together: against moto, which simulates a part of AWS, and against errors of every kind."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore import exceptions
from botocore.awsrequest import AWSResponse
from hypothesis import given
from hypothesis import strategies as st
from moto import mock_aws

from generator.ops.preflight.conftest import ACCOUNT, HYPERPOD, REGION, STATIC, own_storage_class, requirements
from genvalues.common.errors import UserError
from genvalues.common.findings import Finding, exit_status
from genvalues.ops import aws
from genvalues.ops.aws import AwsClients
from genvalues.ops.preflight import image_checks
from genvalues.ops.preflight.aws_checks import CHECKS, check_aws
from genvalues.ops.preflight.run_requirements import RunRequirements
from genvalues.ops.preflight.storage_checks import check_file_system_groups

S3 = {"dataset": {"source": "s3://rows/train/rows.jsonl"}}
# Two runs that need every check: one on EC2 that creates a file system, one on HyperPod with an existing one.
EVERY_CHECK = [
    requirements(S3, own_storage_class("subnet-1", "sg-1")),
    requirements(S3, HYPERPOD, STATIC),
]


def by_subject(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.subject: finding for finding in findings}


# --- moto


def answering(monkeypatch: pytest.MonkeyPatch, answers: dict[str, dict[str, Any]]) -> None:
    """Answer these calls (service.Operation), which moto does not support; moto answers all others."""

    def added(client: Any) -> Any:
        for call, answer in answers.items():
            answered = (AWSResponse("", 200, {}, None), answer)
            client.meta.events.register(f"before-call.{call}", lambda answered=answered, **_: answered)
        return client

    original = AwsClients._make
    monkeypatch.setattr(AwsClients, "_make", lambda self, service: added(original(self, service)))


NO_RESERVATION = {"ec2.DescribeCapacityReservations": {"CapacityReservations": []}}
EC2_QUOTA = {"service-quotas.GetServiceQuota": {"Quota": {"Value": 512.0}}}


CONFIGURATION = {"ecr.GetDownloadUrlForLayer": {"downloadUrl": "https://signed.invalid"}}


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """moto, and the configuration of the image that its ECR does not return."""
    labels = {"org.opencontainers.image.title": "llama-lora"}
    monkeypatch.setattr(image_checks, "download", lambda url: {"config": {"Labels": labels}})
    with mock_aws():
        yield


def client(service: str) -> Any:
    return boto3.client(service, region_name=REGION)


def push_image(tag: str = "0.1.0") -> str:
    ecr = client("ecr")
    ecr.create_repository(repositoryName="llama-lora")
    content = {"mediaType": "application/vnd.docker.distribution.manifest.v2+json", "config": {"digest": "sha256:0"}}
    manifest = json.dumps({"schemaVersion": 2, **content, "layers": []})
    pushed = ecr.put_image(repositoryName="llama-lora", imageManifest=manifest, imageTag=tag)
    return str(pushed["image"]["imageId"]["imageDigest"])


def make_network() -> tuple[str, str]:
    ec2 = client("ec2")
    vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
    subnet = ec2.create_subnet(VpcId=vpc, CidrBlock="10.0.1.0/24", AvailabilityZone=f"{REGION}b")["Subnet"]["SubnetId"]
    group = ec2.create_security_group(GroupName="lustre", Description="lustre", VpcId=vpc)["GroupId"]
    itself = [{"GroupId": group}]
    for low, high in ((988, 988), (1018, 1023)):
        permission = {"IpProtocol": "tcp", "FromPort": low, "ToPort": high, "UserIdGroupPairs": itself}
        ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[permission])
    return subnet, group


@pytest.mark.usefixtures("cloud")
def test_an_account_with_everything_has_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    subnet, group = make_network()
    digest = push_image()
    location = {"LocationConstraint": REGION}
    client("s3").create_bucket(Bucket="rows", CreateBucketConfiguration=location)  # type: ignore[arg-type]
    client("s3").put_object(Bucket="rows", Key="train/rows.jsonl", Body=b"{}" * 1000)
    answering(monkeypatch, {**NO_RESERVATION, **EC2_QUOTA, **CONFIGURATION})
    findings = check_aws(requirements(S3, own_storage_class(subnet, group), {"image": {"digest": digest}}))
    assert {finding.level for finding in findings} == {"ok"}, [str(finding) for finding in findings]
    assert [finding.subject for finding in findings] == [
        "AWS credentials",
        "AWS region",
        "quota of trn1.32xlarge",
        "capacity of trn1.32xlarge",
        "zones of trn1.32xlarge",
        "image llama-lora:0.1.0",
        "contents of image llama-lora",
        f"subnet {subnet}",
        f"security groups {group}",
        "s3://rows/train/rows.jsonl",
        "size of the file system",
    ]
    assert findings[0].found.startswith(f"account {ACCOUNT}, arn:aws:")
    assert exit_status(findings) == 0


@pytest.mark.usefixtures("cloud")
def test_an_empty_account_gets_all_errors_at_once_each_with_a_fix(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answering(monkeypatch, {**NO_RESERVATION, "service-quotas.GetServiceQuota": {"Quota": {"Value": 0.0}}})
    findings = check_aws(requirements(S3, own_storage_class("subnet-0123456789abcdef0", "sg-0123456789abcdef0")))
    errors = [finding for finding in findings if finding.level == "error"]
    assert [finding.subject for finding in errors] == [
        "quota of trn1.32xlarge",
        "image llama-lora:0.1.0",
        "subnet subnet-0123456789abcdef0",
        "security groups sg-0123456789abcdef0",
        "s3://rows/train/rows.jsonl",
    ]
    assert all(finding.fix.startswith(("aws ", "genvalues ")) for finding in errors)
    assert exit_status(findings) == 2


@pytest.mark.usefixtures("cloud")
def test_a_file_system_and_a_hyperpod_cluster_of_moto(monkeypatch: pytest.MonkeyPatch) -> None:
    digest = push_image()
    fsx = client("fsx").create_file_system(
        FileSystemType="LUSTRE", StorageCapacity=1200, SubnetIds=["subnet-0123456789abcdef0"]
    )["FileSystem"]
    client("sagemaker").create_cluster(
        ClusterName="pod",
        InstanceGroups=[
            {
                "InstanceCount": 2,
                "InstanceGroupName": "workers",
                "ThreadsPerCore": 1,
                "InstanceType": "ml.trn1.32xlarge",
                "LifeCycleConfig": {"SourceS3Uri": "s3://sagemaker-lifecycle/x", "OnCreate": "on_create.sh"},
                "ExecutionRole": f"arn:aws:iam::{ACCOUNT}:role/hyperpod",
            }
        ],
    )
    quota = {"QuotaName": "ml.trn1.32xlarge for cluster usage", "QuotaCode": "L-X", "Value": 4.0}
    answering(monkeypatch, {"service-quotas.ListServiceQuotas": {"Quotas": [quota]}, **CONFIGURATION})
    identity = {"fileSystemId": fsx["FileSystemId"], "dnsName": fsx.get("DNSName", "")}
    findings = by_subject(
        check_aws(requirements(HYPERPOD, STATIC, {"image": {"digest": digest}, "storage": {"static": identity}}))
    )
    assert findings["quota of ml.trn1.32xlarge"].level == "ok"
    assert findings["HyperPod cluster pod"].found.startswith("is orchestrated by Slurm"), "moto returns no orchestrator"
    assert findings[f"file system {fsx['FileSystemId']}"].found == "is in an unknown state", "moto returns none"
    client("fsx").delete_file_system(FileSystemId=fsx["FileSystemId"])
    gone = by_subject(check_aws(requirements(HYPERPOD, STATIC, {"storage": {"static": identity}})))
    assert gone[f"file system {fsx['FileSystemId']}"].found == "not found in us-west-2"


@pytest.mark.usefixtures("cloud")
def test_a_bucket_in_another_region_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    s3 = boto3.client("s3", region_name="eu-west-1")
    s3.create_bucket(Bucket="rows", CreateBucketConfiguration={"LocationConstraint": "eu-west-1"})
    s3.put_object(Bucket="rows", Key="train/rows.jsonl", Body=b"{}")
    answering(monkeypatch, {**NO_RESERVATION, **EC2_QUOTA})
    found = by_subject(check_aws(requirements(S3)))["s3://rows/train/rows.jsonl"]
    assert found.level == "warning" and "the bucket is in eu-west-1, not in us-west-2" in found.found


# --- credentials


def test_missing_credentials_are_one_finding_and_nothing_else_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    findings = check_aws(requirements())
    assert [str(finding) for finding in findings] == [
        "not checked  AWS credentials: no AWS credentials\n"
        "             fix: aws sso login   # or aws configure, or AWS_PROFILE=NAME",
        "not checked  AWS: quota of trn1.32xlarge, capacity of trn1.32xlarge, zones of trn1.32xlarge, image,"
        " contents of image llama-lora: skipped without credentials, see above",
        "ok           size of the file system: 1200Gi, created on demand in about 10 minutes",
    ]
    assert exit_status(findings) == 1, "unanswered, which does not stop the run"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("ExpiredToken", "the AWS credentials have expired"),
        ("InvalidClientTokenId", "AWS rejects these credentials (InvalidClientTokenId)"),
        ("SignatureDoesNotMatch", "AWS rejects these credentials (SignatureDoesNotMatch)"),
    ],
)
def test_expired_and_invalid_credentials_are_named_as_such(
    code: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing(monkeypatch, code, 403)
    first, unasked, _ = check_aws(requirements())
    assert (first.level, first.subject, first.found, first.unanswered) == (
        "not checked",
        "AWS credentials",
        words,
        True,
    )
    assert first.fix.startswith("aws sso login") and unasked.level == "not checked"


def test_a_missing_profile_is_one_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "absent")
    first, *_ = check_aws(requirements())
    assert first.unanswered and first.found == "The config profile (absent) could not be found"


def test_without_a_region_nothing_is_checked() -> None:
    first, unasked, _ = check_aws(requirements({"image": {"repository": "me/llama-lora"}}))
    assert first.subject == "AWS region" and first.unanswered
    assert unasked.found.endswith("skipped without a region, see above")


def test_an_invalid_region_is_an_error_and_no_call_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AwsClients, "_make", lambda *_: pytest.fail("a call was made"))
    first, unasked, _ = check_aws(requirements(), region="us-wset-2")
    assert first.level == "error" and unasked.level == "not checked"


@pytest.mark.usefixtures("cloud")
def test_an_image_of_another_account_is_mentioned_with_the_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, {**NO_RESERVATION, **EC2_QUOTA})
    other = {"image": {"repository": f"999988887777.dkr.ecr.{REGION}.amazonaws.com/llama-lora"}}
    assert check_aws(requirements(other))[0].found.endswith("; the image is in the registry of account 999988887777")


# --- errors of every kind


def refusing(monkeypatch: pytest.MonkeyPatch, code: str, status: int, message: str = "no") -> None:
    """Answer every call of every service with this error."""
    parsed = {"Error": {"Code": code, "Message": message}, "ResponseMetadata": {"HTTPStatusCode": status}}
    response = AWSResponse("", status, {}, None)
    patch_calls(monkeypatch, lambda **_: (response, parsed))


CLIENTS: dict[str, Any] = {}  # shared, because creating one takes a good part of a second
HANDLER: list[Callable[..., Any]] = []


def patch_calls(monkeypatch: pytest.MonkeyPatch, handler: Callable[..., Any]) -> None:
    def client(self: AwsClients, service: str) -> Any:
        if service not in CLIENTS:
            CLIENTS[service] = self._make(service)
            CLIENTS[service].meta.events.register(f"before-call.{service}", handle)
        return CLIENTS[service]

    def handle(**event: Any) -> Any:
        return HANDLER[0](**event)

    HANDLER[:] = [handler]
    for service in ("sts", "ec2", "ecr", "fsx", "s3", "sagemaker", "service-quotas"):
        client(AwsClients(REGION), service)
    monkeypatch.setattr(AwsClients, "client", client)


CODES = sorted(aws.EXPIRED | aws.WRONG | aws.DENIED | aws.LATER | aws.MISSING)


def check_findings(findings: list[Finding]) -> None:
    assert findings
    for finding in findings:
        assert finding.found and "\n" not in str(finding.found), finding
        assert finding.level == "ok" or finding.fix or finding.subject == "AWS", finding


def check_each_finding(run: RunRequirements) -> None:
    """Run every check, including those that check_aws skips when the credentials are rejected."""
    for check in CHECKS:
        if check.applies(run):
            found = check.findings(AwsClients(REGION), run)
            assert found or check.check is check_file_system_groups, (
                "it has none without a file system, which is a finding already"
            )
            if found:
                check_findings(found)
            assert "hf_abcdefgh" not in "".join(map(str, found))


@given(
    code=st.sampled_from(CODES) | st.text(max_size=30),
    status=st.sampled_from([400, 401, 403, 404, 409, 429, 500, 503]),
    message=st.text(max_size=300),
)
def test_for_any_error_code_of_aws_every_check_has_a_finding_and_nothing_is_raised(
    code: str, status: int, message: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        refusing(patch, code, status, message)
        for run in EVERY_CHECK:
            check_findings(check_aws(run))
            check_each_finding(run)


@pytest.mark.parametrize(
    "error",
    [
        exceptions.EndpointConnectionError(endpoint_url="https://x"),
        exceptions.ConnectTimeoutError(endpoint_url="https://x"),
        exceptions.ReadTimeoutError(endpoint_url="https://x"),
        exceptions.SSLError(endpoint_url="https://x", error="certificate"),
        exceptions.ProxyConnectionError(proxy_url="http://user:password@proxy"),
        exceptions.NoCredentialsError(),
        exceptions.PartialCredentialsError(provider="env", cred_var="AWS_SECRET_ACCESS_KEY"),
        exceptions.UnauthorizedSSOTokenError(),
        exceptions.TokenRetrievalError(provider="sso", error_msg="expired"),
        exceptions.CredentialRetrievalError(provider="process", error_msg="hf_abcdefgh"),
        exceptions.ParamValidationError(report="no"),
        exceptions.BotoCoreError(),
        exceptions.InvalidRegionError(region_name="x y"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_for_any_exception_of_botocore_every_check_has_a_finding(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: Any) -> None:
        raise error

    patch_calls(monkeypatch, fail)
    for run in EVERY_CHECK:
        check_findings(check_aws(run))
        check_each_finding(run)


def test_empty_answers_raise_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers without any of their expected keys."""
    response = AWSResponse("", 200, {}, None)
    patch_calls(monkeypatch, lambda **_: (response, {"ResponseMetadata": {}}))
    for run in EVERY_CHECK:
        check_findings(check_aws(run))


# --- time


@contextmanager
def silent_server() -> Iterator[str]:
    """A server that accepts every connection and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        taken: list[socket.socket] = []

        def take() -> None:
            while True:
                try:
                    taken.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=take, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        for one in taken:
            one.close()


def test_a_call_takes_10_seconds_at_most() -> None:
    config = AwsClients(REGION).client("sts").meta.config
    assert config.connect_timeout + config.read_timeout <= 10
    assert config.retries["total_max_attempts"] == 1


def test_if_aws_does_not_answer_all_checks_wait_in_parallel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(aws, "READ_SECONDS", 2)
    with silent_server() as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        AwsClients(REGION).client("ec2")  # loads boto3 before the clock starts
        began = time.monotonic()
        findings = check_aws(requirements(S3))
        took = time.monotonic() - began
    silent = [finding for finding in findings if finding.unanswered]
    assert [finding.level for finding in silent] == ["not checked"] * 7
    assert exit_status(findings) == 1
    assert took < 10, "4 s: credentials first, then all others; one after the other they would take 14 s"


def test_a_question_of_several_checks_is_asked_once() -> None:
    """A second thread waits for the first one's answer, or gets its error."""
    clients, asked = AwsClients(REGION), []

    def ask(answer: str) -> str:
        asked.append(answer)
        time.sleep(0.1)
        if answer == "error":
            raise UserError("denied")
        return answer

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: clients.once("subnet", lambda: ask("answer")), range(4))) == ["answer"] * 4
        failing = [pool.submit(clients.once, "cluster", lambda: ask("error")) for _ in range(4)]
        assert all(isinstance(one.exception(), UserError) for one in failing)
    assert asked == ["answer", "error"]


def test_an_invalid_endpoint_names_the_variable_that_sets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "foo")
    findings = check_aws(requirements(S3))
    assert any(finding.found.endswith("Invalid endpoint: foo. Check AWS_ENDPOINT_URL.") for finding in findings)


# --- offline, and cpu


def test_offline_is_a_finding_for_every_check_and_no_call_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AwsClients, "_make", lambda *_: pytest.fail("a call was made"))
    findings = check_aws(requirements(S3), offline=True)
    *unasked, size = findings
    assert {(finding.level, finding.found) for finding in unasked} == {("not checked", "--offline")}
    assert len(unasked) == 8 and size.level == "ok"
    assert exit_status(findings) == 0


def test_the_cpu_needs_no_aws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AwsClients, "_make", lambda *_: pytest.fail("a call was made"))
    on_cpu = {"instance": "cpu", "image": {"repository": "llama-lora"}, "storage": {"kind": "generic"}}
    for offline in (False, True):
        [found] = check_aws(requirements(on_cpu), offline=offline)
        assert str(found) == "ok           AWS: nothing to check for instance cpu"


# --- docs/preflight.md


def test_the_policy_to_paste_allows_the_calls_that_are_made_and_nothing_else() -> None:
    root = Path(__file__).parents[4]
    page = (root / "docs/preflight.md").read_text(encoding="utf-8")
    policy = json.loads(page[page.index('    {\n      "Version"') : page.index("## The Hub")])
    allowed = {action for statement in policy["Statement"] for action in statement["Action"]}
    modules = (root / "generator/genvalues/ops/preflight").glob("*.py")
    source = "".join(module.read_text(encoding="utf-8") for module in modules)
    calls = re.findall(r'\(\s*"([a-z0-9-]+)",\s*"((?:get|list|describe|head|batch_get)_[a-z_]+)"', source)
    asked = {aws.action_of(*call) for call in calls} - {"sts:GetCallerIdentity"}
    assert len(calls) >= 13 and allowed == asked
    for action in allowed:
        assert f"`{action}`" in page, "in the table"
