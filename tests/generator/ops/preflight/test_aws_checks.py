"""Each check of AWS by itself, against botocore's Stubber: which calls it makes and how it judges their answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest
from botocore.stub import Stubber

from generator.ops.preflight.conftest import (
    ACCOUNT,
    DIGEST,
    HYPERPOD,
    NOW,
    REGION,
    STATIC,
    own_storage_class,
    requirements,
)
from genvalues import __version__
from genvalues.common.errors import Unavailable
from genvalues.common.findings import Finding
from genvalues.ops.aws import AwsClients
from genvalues.ops.preflight import aws_checks as aws
from genvalues.ops.preflight import image_checks
from genvalues.ops.preflight import instance_checks as instances
from genvalues.ops.preflight import storage_checks as storage
from genvalues.ops.preflight.run_requirements import RunRequirements

Stub = Callable[[str], Stubber]
BY_TYPE = {"Filters": [{"Name": "instance-type", "Values": ["trn1.32xlarge"]}]}


def findings_of(clients: AwsClients, run: RunRequirements, *functions: Callable[..., list[Finding]]) -> list[Finding]:
    """The findings of the checks with these functions, with no answer kept from an earlier call."""
    clients._answers.clear()
    checks = [check for function in functions for check in aws.CHECKS if check.check is function]
    return [finding for check in checks for finding in check.findings(clients, run)]


def one(findings: list[Finding]) -> Finding:
    assert len(findings) == 1, [str(finding) for finding in findings]
    return findings[0]


def quota(value: float) -> dict[str, Any]:
    return {"Quota": {"QuotaCode": "L-2C3B7624", "Value": value}}


def reservation(state: str = "active", **changes: Any) -> dict[str, Any]:
    return {
        "CapacityReservationId": "cr-1",
        "State": state,
        "TotalInstanceCount": 2,
        "AvailableInstanceCount": 1,
        "AvailabilityZone": "us-west-2b",
        **changes,
    }


def capacity(stub: Stub, clients: AwsClients, value: float, *reservations: dict[str, Any]) -> list[Finding]:
    stub("ec2").add_response("describe_capacity_reservations", {"CapacityReservations": [*reservations]}, BY_TYPE)
    expected = {"ServiceCode": "ec2", "QuotaCode": "L-2C3B7624"}
    stub("service-quotas").add_response("get_service_quota", quota(value), expected)
    return on_demand(clients)


def on_demand(clients: AwsClients) -> list[Finding]:
    return findings_of(clients, requirements(), instances.check_ec2_quota, instances.check_capacity)


# --- quota and capacity


def test_the_quota_is_counted_in_vcpu_of_all_nodes(stub: Stub, clients: AwsClients) -> None:
    enough, _ = capacity(stub, clients, 256)
    assert str(enough) == (
        "ok           quota of trn1.32xlarge: 256 vCPU of Running On-Demand Trn instances in us-west-2, 256 needed"
    )


def test_a_quota_that_is_too_small_is_an_error_with_the_command_that_requests_more(
    stub: Stub, clients: AwsClients
) -> None:
    short, _ = capacity(stub, clients, 255)
    assert short.level == "error" and "255 vCPU" in short.found and "256 needed for 2 x trn1.32xlarge" in short.found
    assert short.fix == (
        "aws service-quotas request-service-quota-increase --service-code ec2 --quota-code L-2C3B7624"
        " --desired-value 256 --region us-west-2"
    )


def test_a_quota_that_is_too_small_does_not_stop_nodes_of_a_capacity_block(stub: Stub, clients: AwsClients) -> None:
    block = reservation(ReservationType="capacity-block", EndDate=NOW + timedelta(days=7))
    short, _ = capacity(stub, clients, 0, block)
    assert short.level == "warning"
    for other in (reservation("scheduled", ReservationType="capacity-block"), reservation()):
        assert capacity(stub, clients, 0, other)[0].level == "error"


def test_a_region_without_that_quota_is_not_checked(stub: Stub, clients: AwsClients) -> None:
    stub("ec2").add_response("describe_capacity_reservations", {"CapacityReservations": []}, BY_TYPE)
    stub("service-quotas").add_client_error("get_service_quota", "NoSuchResourceException")
    found, _ = on_demand(clients)
    assert found.level == "not checked" and "us-west-2 has no quota" in found.found and found.fix.startswith("aws ")


def test_without_permission_to_list_reservations_the_quota_is_still_checked(stub: Stub, clients: AwsClients) -> None:
    stub("ec2").add_client_error("describe_capacity_reservations", "UnauthorizedOperation")
    stub("service-quotas").add_response("get_service_quota", quota(512))
    found, unseen = on_demand(clients)
    assert found.level == "ok"
    assert unseen == Finding(
        "not checked",
        "capacity of trn1.32xlarge",
        "these credentials do not allow ec2:DescribeCapacityReservations",
        "AWS_PROFILE=NAME genvalues preflight finetune.yaml --aws   # or allow ec2:DescribeCapacityReservations:"
        " docs/preflight.md has a policy to paste",
    )


@pytest.mark.parametrize(
    ("reservations", "level", "words"),
    [
        ([], "ok", "no reservation: nodes are On-Demand"),
        ([reservation("expired")], "ok", "(capacity reservation cr-1 is expired)"),
        ([reservation()], "ok", "capacity reservation cr-1 is active in us-west-2b: 2 instances, 1 free"),
        ([reservation(InstanceMatchCriteria="targeted")], "ok", "the nodes' launch template must name it"),
        (
            [reservation("scheduled", ReservationType="capacity-block", StartDate=datetime(2030, 1, 2, 11, 30))],
            "warning",
            "capacity block cr-1 starts at 2030-01-02 11:30 UTC",
        ),
        (
            [reservation(ReservationType="capacity-block", EndDate=NOW + timedelta(hours=3))],
            "warning",
            "in 2.5 hours",
        ),
        ([reservation(EndDate=NOW - timedelta(hours=3))], "warning", "in 0.0 hours"),
        ([reservation(ReservationType="capacity-block", EndDate=NOW + timedelta(days=3))], "ok", "its nodes end at"),
    ],
)
def test_reservations(
    stub: Stub, clients: AwsClients, reservations: list[dict[str, Any]], level: str, words: str
) -> None:
    _, *found = capacity(stub, clients, 256, *reservations)
    assert one(found).level == level and words in one(found).found
    assert one(found).fix.startswith("aws ec2 describe-capacity-") or found[0].level == "ok"


def test_fewer_reserved_than_needed_is_a_warning(stub: Stub, clients: AwsClients) -> None:
    _, _, short = capacity(stub, clients, 256, reservation(TotalInstanceCount=1))
    assert short.level == "warning" and short.found.startswith("1 reserved, 2 needed")
    assert "describe-capacity-block-offerings --instance-type trn1.32xlarge --instance-count 2" in short.fix


# --- HyperPod


def group(current: int, target: int = 0, instance: str = "ml.trn1.32xlarge") -> dict[str, Any]:
    return {
        "InstanceGroupName": "workers",
        "InstanceType": instance,
        "CurrentCount": current,
        "TargetCount": target or current,
    }


def cluster(*groups: dict[str, Any], status: str = "InService", **changes: Any) -> dict[str, Any]:
    eks = {"Eks": {"ClusterArn": "arn:aws:eks:us-west-2:123456789012:cluster/x"}}
    arn = f"arn:aws:sagemaker:{REGION}:{ACCOUNT}:cluster/abcdefghijkl"
    return {
        **{"ClusterArn": arn, "ClusterName": "pod", "ClusterStatus": status, "Orchestrator": eks},
        **{"InstanceGroups": [*groups], **changes},
    }


def hyperpod(stub: Stub, clients: AwsClients, value: float | None, *clusters: dict[str, Any]) -> list[Finding]:
    sagemaker = stub("sagemaker")
    summaries = [
        {
            "ClusterArn": one["ClusterArn"],
            "ClusterName": one["ClusterName"],
            "CreationTime": NOW,
            "ClusterStatus": "InService",
        }
        for one in clusters
    ]
    sagemaker.add_response("list_clusters", {"ClusterSummaries": summaries}, {})
    for each in clusters:
        sagemaker.add_response("describe_cluster", each, {"ClusterName": each["ClusterName"]})
    quotas = stub("service-quotas")
    first = {"ServiceCode": "sagemaker", "MaxResults": 100}
    others = [{"QuotaName": f"ml.p5.48xlarge for cluster usage {number}", "Value": 9.0} for number in range(3)]
    quotas.add_response("list_service_quotas", {"Quotas": others, "NextToken": "more"}, first)
    ours = [{"QuotaName": "ml.trn1.32xlarge for cluster usage", "QuotaCode": "L-X", "Value": value}]
    last = {"Quotas": ours if value is not None else []}
    quotas.add_response("list_service_quotas", last, {**first, "NextToken": "more"})
    return findings_of(clients, requirements(HYPERPOD), instances.check_cluster_quota, instances.check_hyperpod)


def test_a_hyperpod_cluster_with_the_nodes_is_ok_and_its_quota_is_found_by_name_on_any_page(
    stub: Stub, clients: AwsClients
) -> None:
    findings = hyperpod(stub, clients, 4, cluster(group(2)))
    assert [str(finding) for finding in findings] == [
        "ok           quota of ml.trn1.32xlarge: 4 ml.trn1.32xlarge for cluster usage in us-west-2, 2 needed",
        "ok           HyperPod cluster pod: InService, 2 of 2 ml.trn1.32xlarge are running, 2 needed",
    ]


def test_a_hyperpod_quota_that_is_too_small_is_an_error_unless_the_nodes_exist(stub: Stub, clients: AwsClients) -> None:
    short, _ = hyperpod(stub, clients, 0, cluster(group(1)))
    assert short.level == "error"
    assert short.fix == (
        "aws service-quotas request-service-quota-increase --service-code sagemaker --quota-code L-X"
        " --desired-value 2 --region us-west-2"
    )
    enough, _ = hyperpod(stub, clients, 0, cluster(group(2)))
    assert enough.level == "ok"
    unknown, _ = hyperpod(stub, clients, None, cluster(group(1)))
    assert unknown.level == "warning" and unknown.fix.startswith("aws service-quotas list-service-quotas")


@pytest.mark.parametrize(
    ("clusters", "level", "words", "fix"),
    [
        ([], "error", "no HyperPod cluster in us-west-2", "aws sagemaker list-clusters --region us-west-2"),
        (
            [cluster(group(4, instance="ml.p5.48xlarge"))],
            "error",
            "has no instance group of ml.trn1.32xlarge (its types: ml.p5.48xlarge)",
            "aws sagemaker update-cluster --cluster-name pod",
        ),
        ([cluster()], "error", "(its types: none)", "aws sagemaker update-cluster"),
        ([cluster(group(1))], "error", "1 of 1 ml.trn1.32xlarge are running, 2 needed", "with InstanceCount 2"),
        (
            [cluster(group(1, target=2), status="Updating")],
            "warning",
            "still scaling",
            "aws sagemaker describe-cluster",
        ),
        ([cluster(group(0, target=2), status="Creating")], "warning", "is Creating", "aws sagemaker describe-cluster"),
        (
            [cluster(group(0), AutoScaling={"Mode": "Enable", "Status": "InService"})],
            "warning",
            "scales on demand",
            "aws sagemaker",
        ),
        (
            [cluster(group(2), status="Failed", FailureMessage="no capacity")],
            "error",
            "is Failed: no capacity",
            "aws sagemaker describe-cluster --cluster-name pod --region us-west-2",
        ),
        ([cluster(group(2), Orchestrator={})], "error", "Slurm; the chart needs EKS", "aws sagemaker describe-cluster"),
        ([cluster(), {**cluster(group(2)), "ClusterName": "other"}], "ok", "2 of 2", ""),
    ],
)
def test_hyperpod_clusters_without_the_nodes(
    stub: Stub, clients: AwsClients, clusters: list[dict[str, Any]], level: str, words: str, fix: str
) -> None:
    found = hyperpod(stub, clients, 4, *clusters)[-1]
    assert found.level == level and words in found.found and fix in found.fix
    assert found.fix or level == "ok"


def test_without_permission_to_list_hyperpod_clusters_the_finding_names_the_action(
    stub: Stub, clients: AwsClients
) -> None:
    stub("sagemaker").add_client_error("list_clusters", "AccessDeniedException")
    found = one(findings_of(clients, requirements(HYPERPOD), instances.check_hyperpod))
    assert found.level == "not checked" and "sagemaker:ListClusters" in found.fix


# --- zones


def offering(stub: Stub, clients: AwsClients, zones: list[str], zone: str = "", *changes: dict[str, Any]) -> Finding:
    ec2 = stub("ec2")
    offers = [{"InstanceType": "trn1.32xlarge", "LocationType": "availability-zone", "Location": one} for one in zones]
    expected = {"LocationType": "availability-zone", **BY_TYPE}
    ec2.add_response("describe_instance_type_offerings", {"InstanceTypeOfferings": offers}, expected)
    if zone:
        subnets = {"Subnets": [{"SubnetId": "subnet-1", "AvailabilityZone": zone}]}
        ec2.add_response("describe_subnets", subnets, {"SubnetIds": ["subnet-1"]})
        changes = (own_storage_class("subnet-1", "sg-1"), *changes)
    return one(findings_of(clients, requirements(*changes), instances.check_zones))


def test_an_instance_type_that_no_zone_offers_is_an_error_with_the_command_for_another_region(
    stub: Stub, clients: AwsClients
) -> None:
    found = offering(stub, clients, [])
    assert found.level == "error" and found.found == "no zone of us-west-2 offers it"
    assert "Name=instance-type,Values=trn1.32xlarge --region us-east-2" in found.fix
    assert offering(stub, clients, [], "", HYPERPOD).level == "warning", "HyperPod's nodes are in an account of AWS"


def test_a_file_system_in_a_zone_without_the_instance_is_a_warning(stub: Stub, clients: AwsClients) -> None:
    assert offering(stub, clients, ["us-west-2b", "us-west-2d"], "us-west-2b").level == "ok"
    found = offering(stub, clients, ["us-west-2d", "us-west-2b"], "us-west-2a")
    assert found.level == "warning"
    assert found.found.startswith(
        "us-west-2b, us-west-2d; not us-west-2a, the zone of the file system's subnet subnet-1"
    )
    assert found.fix.startswith(
        "aws ec2 describe-subnets --filters Name=availability-zone,Values=us-west-2b,us-west-2d"
    )


def test_the_zone_of_an_existing_file_system_is_compared_too(stub: Stub, clients: AwsClients) -> None:
    answer = {"FileSystems": [{"FileSystemId": "fs-0123456789abcdef0", "SubnetIds": ["subnet-0123456789"]}]}
    stub("fsx").add_response("describe_file_systems", answer, {"FileSystemIds": ["fs-0123456789abcdef0"]})
    ec2 = stub("ec2")
    ec2.add_response("describe_instance_type_offerings", {"InstanceTypeOfferings": [{"Location": "us-west-2d"}]})
    subnets = {"Subnets": [{"SubnetId": "subnet-0123456789", "AvailabilityZone": "us-west-2a"}]}
    ec2.add_response("describe_subnets", subnets, {"SubnetIds": ["subnet-0123456789"]})
    assert one(findings_of(clients, requirements(STATIC), instances.check_zones)).level == "warning"


# --- image


def image(stub: Stub, clients: AwsClients, detail: dict[str, Any] | str, *changes: dict[str, Any]) -> Finding:
    wishes = requirements(*changes)
    ecr = stub("ecr")
    which = {"imageDigest": DIGEST} if wishes.image.digest else {"imageTag": "0.1.0"}
    expected = {"registryId": ACCOUNT, "repositoryName": "llama-lora", "imageIds": [which]}
    if isinstance(detail, str):
        ecr.add_client_error("describe_images", detail, expected_params=expected)
    else:
        ecr.add_response("describe_images", {"imageDetails": [detail]}, expected)
    return one(findings_of(clients, wishes, aws.check_image))


PUSHED = {
    "imageDigest": DIGEST,
    "imageTags": ["0.1.0"],
    "imageSizeInBytes": 9_100_000_000,
    "imagePushedAt": datetime(2026, 8, 1),
}


def test_an_image_is_looked_up_by_digest_or_else_by_tag(stub: Stub, clients: AwsClients) -> None:
    found = image(stub, clients, PUSHED)
    assert str(found) == "ok           image llama-lora:0.1.0: pushed 2026-08-01 00:00 UTC, 9.1 GB, by digest"
    by_tag = image(stub, clients, PUSHED, {"image": {"digest": ""}})
    assert by_tag.level == "ok" and by_tag.found.endswith(f"by tag: {DIGEST}")


@pytest.mark.parametrize("code", ["ImageNotFoundException", "RepositoryNotFoundException"])
def test_an_image_that_is_not_pushed_is_an_error_with_the_push_command(
    stub: Stub, clients: AwsClients, code: str
) -> None:
    found = image(stub, clients, code)
    assert found.level == "error" and DIGEST in found.found and found.fix == "genvalues image push finetune.yaml"
    assert "tag 0.1.0" in image(stub, clients, code, {"image": {"digest": ""}}).found


def test_a_moved_tag_is_a_warning_and_an_archived_image_an_error(stub: Stub, clients: AwsClients) -> None:
    moved = image(stub, clients, {**PUSHED, "imageTags": ["0.2.0"]})
    assert moved.level == "warning" and "tag 0.1.0 is another image" in moved.found
    archived = image(stub, clients, {**PUSHED, "imageStatus": "ARCHIVED"})
    assert archived.level == "error" and archived.fix.startswith("aws ecr ")


def test_an_image_in_another_registry_is_not_checked(clients: AwsClients) -> None:
    for repository, words in [
        ("public.ecr.aws/me/llama-lora", "in the public registry public.ecr.aws"),
        ("ghcr.io/me/llama-lora", "not in an ECR registry"),
    ]:
        found = one(findings_of(clients, requirements({"image": {"repository": repository}}), aws.check_image))
        assert found.level == "not checked" and words in found.found
        assert found.fix == f"docker manifest inspect {repository}:0.1.0@{DIGEST}"


def test_an_account_number_with_11_digits_is_an_error(clients: AwsClients) -> None:
    address = {"image": {"repository": f"12345678901.dkr.ecr.{REGION}.amazonaws.com/llama-lora"}}
    found = one(findings_of(clients, requirements(address), aws.check_image))
    assert found.level == "error" and found.found == "the account number 12345678901 has 11 digits, not 12"
    assert found.fix.startswith("aws sts get-caller-identity")


# --- the contents of the image

CONFIG = "sha256:" + "c" * 64
LABELS = {"org.opencontainers.image.title": "llama-lora", "org.opencontainers.image.version": __version__}


def labelled(
    stub: Stub,
    clients: AwsClients,
    monkeypatch: pytest.MonkeyPatch,
    labels: dict[str, str] | None,
    *,
    index: bool = False,
) -> Finding:
    """The finding for an image with these labels; with ``index``, one built for several platforms."""
    repository = {"registryId": ACCOUNT, "repositoryName": "llama-lora"}
    media = {"acceptedMediaTypes": [*image_checks.INDEXES, *image_checks.MANIFESTS]}
    ecr = stub("ecr")

    def answer(manifest: dict[str, Any], digest: str) -> None:
        answered = {"images": [{"imageManifest": json.dumps(manifest)}]}
        ecr.add_response("batch_get_image", answered, {**repository, "imageIds": [{"imageDigest": digest}], **media})

    if index:
        platforms = [("linux", "arm64", "sha256:" + "a" * 64), ("linux", "amd64", "sha256:" + "b" * 64)]
        listed = [
            {"digest": digest, "platform": {"os": system, "architecture": machine}}
            for system, machine, digest in platforms
        ]
        answer({"manifests": listed}, DIGEST)
        answer({"config": {"digest": CONFIG}}, platforms[1][2])
    else:
        answer({"config": {"digest": CONFIG}}, DIGEST)
    url = {"downloadUrl": "https://signed.invalid/secret", "layerDigest": CONFIG}
    ecr.add_response("get_download_url_for_layer", url, {**repository, "layerDigest": CONFIG})
    monkeypatch.setattr(image_checks, "download", lambda url: {"config": {"Labels": labels}})
    return one(findings_of(clients, requirements(), image_checks.check_labels))


@pytest.mark.parametrize("index", [False, True])
def test_an_image_built_from_the_dockerfile_is_ok(
    stub: Stub, clients: AwsClients, monkeypatch: pytest.MonkeyPatch, index: bool
) -> None:
    found = labelled(stub, clients, monkeypatch, LABELS, index=index)
    assert found.level == "ok" and __version__ in found.found and found.subject == "contents of image llama-lora"


@pytest.mark.parametrize("labels", [None, {}, {"org.opencontainers.image.title": "pytorch-training-neuronx"}])
def test_an_image_without_the_dockerfiles_label_is_an_error(
    stub: Stub, clients: AwsClients, monkeypatch: pytest.MonkeyPatch, labels: dict[str, str] | None
) -> None:
    found = labelled(stub, clients, monkeypatch, labels)
    assert found.level == "error" and "not an image of llama-lora" in found.found
    assert found.fix == "genvalues image push finetune.yaml"


def test_an_image_of_another_version_is_a_warning(
    stub: Stub, clients: AwsClients, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = labelled(stub, clients, monkeypatch, {**LABELS, "org.opencontainers.image.version": "0.0.1"})
    assert found.level == "warning" and "0.0.1" in found.found


def test_without_permission_to_pull_the_contents_are_not_checked(stub: Stub, clients: AwsClients) -> None:
    stub("ecr").add_client_error("batch_get_image", "AccessDeniedException")
    found = one(findings_of(clients, requirements(), image_checks.check_labels))
    assert found.level == "not checked" and "ecr:BatchGetImage" in found.found


def test_a_configuration_that_cannot_be_read_is_unanswered_without_its_signed_address(
    stub: Stub, clients: AwsClients, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(url: str, timeout: float) -> None:
        raise OSError(f"{url} did not answer")

    monkeypatch.setattr(image_checks.urllib.request, "urlopen", fail)
    with pytest.raises(Unavailable) as raised:
        image_checks.download("https://signed.invalid/secret")
    assert "secret" not in str(raised.value)


AWS_CONTAINERS = [
    "763104351884.dkr.ecr.us-west-2.amazonaws.com/pytorch-training-neuronx",
    "763104351884.dkr.ecr.eu-central-1.amazonaws.com/huggingface-pytorch-training-neuronx",
    "727897471807.dkr.ecr.cn-north-1.amazonaws.com.cn/pytorch-training-neuronx",
    "public.ecr.aws/neuron/pytorch-training-neuronx",
]


@pytest.mark.parametrize("repository", AWS_CONTAINERS)
def test_a_container_of_aws_is_an_error_without_asking_anybody(repository: str) -> None:
    run = requirements({"image": {"repository": repository, "tag": "2.9.0", "digest": ""}})
    found = one(image_checks.check_image_address(run))
    assert found.level == "error" and "no llama-lora" in found.found
    assert f"genvalues image push finetune.yaml --base {repository}:2.9.0" in found.fix
    assert not [check for check in aws.CHECKS if check.applies(run) and "image" in check.subject(run)], "one finding"


def test_an_image_of_ones_own_is_not_taken_for_one_of_aws() -> None:
    for repository in (
        "public.ecr.aws/me/llama-lora",
        "ghcr.io/me/neuron",
        f"{ACCOUNT}.dkr.ecr.us-west-2.amazonaws.com/x",
    ):
        assert image_checks.check_image_address(requirements({"image": {"repository": repository}})) == []


# --- storage


def file_system(stub: Stub, clients: AwsClients, *changes: dict[str, Any], **answered: Any) -> list[Finding]:
    answer = {
        "FileSystemId": "fs-0123456789abcdef0",
        "FileSystemType": "LUSTRE",
        "Lifecycle": "AVAILABLE",
        "StorageCapacity": 1200,
        "DNSName": f"fs-0123456789abcdef0.fsx.{REGION}.amazonaws.com",
        "LustreConfiguration": {"MountName": "abcdefgh"},
        **answered,
    }
    expected = {"FileSystemIds": ["fs-0123456789abcdef0"]}
    stub("fsx").add_response("describe_file_systems", {"FileSystems": [answer]}, expected)
    run = requirements(STATIC, *changes)
    return findings_of(clients, run, storage.check_file_system, storage.check_file_system_groups)


def test_a_file_system_that_matches_the_inputs_is_ok(stub: Stub, clients: AwsClients) -> None:
    assert one(file_system(stub, clients)).level == "ok"
    assert one(file_system(stub, clients, Lifecycle="UPDATING")).level == "ok"


@pytest.mark.parametrize(
    ("answered", "level", "words", "fix"),
    [
        ({"Lifecycle": "CREATING"}, "warning", "is CREATING", "aws fsx describe-file-systems"),
        (
            {"Lifecycle": "FAILED", "FailureDetails": {"Message": "no addresses"}},
            "error",
            "is FAILED: no addresses",
            "--file-system-ids fs-0123456789abcdef0",
        ),
        ({"FileSystemType": "OPENZFS"}, "error", "is OPENZFS, not LUSTRE", "aws fsx describe-file-systems"),
        (
            {"LustreConfiguration": {"MountName": "zyxw"}},
            "error",
            "its mountName is zyxw, not abcdefgh",
            "genvalues write finetune.yaml -o values.yaml --set storage.static.mountName=zyxw",
        ),
        (
            {"DNSName": "fs-1.example.com"},
            "error",
            f"its dnsName is fs-1.example.com, not fs-0123456789abcdef0.fsx.{REGION}.amazonaws.com",
            "--set storage.static.dnsName=fs-1.example.com",
        ),
    ],
)
def test_a_file_system_that_differs_from_the_inputs(
    stub: Stub, clients: AwsClients, answered: dict[str, Any], level: str, words: str, fix: str
) -> None:
    found = one(file_system(stub, clients, **answered))
    assert (found.level, found.found) == (level, words) and fix in found.fix


def test_the_security_groups_of_an_existing_file_system_must_let_nodes_in(stub: Stub, clients: AwsClients) -> None:
    """The groups are those of its network interfaces. Rules for other addresses than its subnet's may be for nodes."""
    interface = "eni-0123456789abcdef0"
    for inbound, level in [
        ([rule(988, 1023, group="sg-1")], "ok"),
        ([rule(988, 1023, cidr="10.0.2.0/24")], "warning"),
        ([rule(988, 1023, group="sg-of-the-nodes")], "warning"),
        ([rule(988, 988, cidr="10.0.2.0/24")], "error"),
        ([], "error"),
    ]:
        ec2 = stub("ec2")
        groups = [{"Groups": [{"GroupId": "sg-1"}]}]
        expected = {"NetworkInterfaceIds": [interface]}
        ec2.add_response("describe_network_interfaces", {"NetworkInterfaces": groups}, expected)
        ec2.add_response("describe_subnets", {"Subnets": [SUBNET]}, {"SubnetIds": ["subnet-0123456789"]})
        group = {"GroupId": "sg-1", "VpcId": "vpc-1", "IpPermissions": inbound, "IpPermissionsEgress": EVERYWHERE}
        ec2.add_response("describe_security_groups", {"SecurityGroups": [group]})
        answer = {"NetworkInterfaceIds": [interface, interface], "SubnetIds": ["subnet-0123456789"]}
        _, found = file_system(stub, clients, **answer)
        assert (found.level, found.subject) == (level, "security groups sg-1"), inbound
        assert level == "ok" or "aws ec2 authorize-security-group-ingress --group-id sg-1" in found.fix


def test_a_file_system_smaller_than_storage_size_is_a_warning(stub: Stub, clients: AwsClients) -> None:
    found = one(file_system(stub, clients, {"storage": {"size": "2400Gi"}}))
    assert found.level == "warning" and found.fix.endswith("--set storage.size=1200Gi")


def test_a_missing_file_system_is_an_error(stub: Stub, clients: AwsClients) -> None:
    stub("fsx").add_client_error("describe_file_systems", "FileSystemNotFound")
    found = one(findings_of(clients, requirements(STATIC), storage.check_file_system))
    assert found.level == "error" and found.fix.startswith("aws fsx describe-file-systems --region us-west-2")


@pytest.mark.parametrize(
    ("size", "deployment", "fits"),
    [
        *[(size, "", True) for size in ("1200Gi", "2400Gi", "4800Gi", "24000Gi")],
        *[(size, "", False) for size in ("100Gi", "1300Gi", "3600Gi", "2401Gi", "1Ti")],
        *[("3600Gi", "SCRATCH_1", True), ("4800Gi", "SCRATCH_1", False), ("7200Gi", "SCRATCH_1", True)],
    ],
)
def test_fsx_sizes_are_1200_2400_and_multiples(size: str, deployment: str, fits: bool) -> None:
    found = one(storage.check_size(requirements({"storage": {"size": size, "fsx": {"deploymentType": deployment}}})))
    assert (found.level == "ok") is fits
    assert fits or "--set storage.size=" in found.fix


def test_a_throughput_that_the_deployment_type_does_not_offer_is_an_error() -> None:
    own = own_storage_class("subnet-1", "sg-1")
    for throughput, level in ((250, "ok"), (200, "error")):
        change = {"storage": {"fsx": {"deploymentType": "PERSISTENT_2", "perUnitStorageThroughput": throughput}}}
        found = one(storage.check_size(requirements(own, change)))
        assert found.level == level
        assert level == "ok" or found.fix.endswith("--set chartValues.storage.fsx.perUnitStorageThroughput=250")
    assert one(storage.check_size(requirements({"storage": {"fsx": None}}))).level == "ok", "the chart's defaults"


SUBNET = {
    "SubnetId": "subnet-1",
    "VpcId": "vpc-1",
    "AvailabilityZone": "us-west-2b",
    "CidrBlock": "10.0.1.0/24",
    "AvailableIpAddressCount": 200,
}
EVERYWHERE = [{"IpProtocol": "-1", "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}]


def rule(low: int, high: int, *, group: str = "", cidr: str = "", protocol: str = "tcp") -> dict[str, Any]:
    return {
        **{"IpProtocol": protocol, "FromPort": low, "ToPort": high},
        "UserIdGroupPairs": [{"GroupId": group}] if group else [],
        "IpRanges": [{"CidrIp": cidr}] if cidr else [],
    }


def network(
    stub: Stub,
    clients: AwsClients,
    inbound: list[dict[str, Any]],
    egress: list[dict[str, Any]] = EVERYWHERE,
    **changes: Any,
) -> list[Finding]:
    ec2 = stub("ec2")
    ec2.add_response("describe_subnets", {"Subnets": [SUBNET]}, {"SubnetIds": ["subnet-1"]})
    security_group = {
        **{"GroupId": "sg-1", "VpcId": "vpc-1", "IpPermissions": inbound, "IpPermissionsEgress": egress},
        **changes,
    }
    expected = {"Filters": [{"Name": "group-id", "Values": ["sg-1"]}]}
    ec2.add_response("describe_security_groups", {"SecurityGroups": [security_group]}, expected)
    return findings_of(
        clients, requirements(own_storage_class("subnet-1", "sg-1")), storage.check_subnet, storage.check_subnet_groups
    )


@pytest.mark.parametrize(
    "inbound",
    [
        [rule(988, 988, group="sg-1"), rule(1018, 1023, group="sg-1")],
        [rule(988, 1023, cidr="10.0.0.0/16")],
        [rule(0, 65535, cidr="0.0.0.0/0", protocol="6")],
        [{"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": "sg-1"}]}],
        [rule(988, 988, group="sg-1"), rule(1018, 1020, group="sg-1"), rule(1021, 1023, cidr="10.0.1.0/24")],
    ],
)
def test_lustre_ports_can_be_open_for_the_group_itself_or_for_the_subnet(
    stub: Stub, clients: AwsClients, inbound: list[dict[str, Any]]
) -> None:
    subnet, groups = network(stub, clients, inbound)
    assert subnet.level == groups.level == "ok"
    assert subnet.found == "us-west-2b, 10.0.1.0/24, 200 free addresses"


@pytest.mark.parametrize(
    ("inbound", "ports"),
    [
        ([], ["988", "1018-1023"]),
        ([rule(988, 988, group="sg-1")], ["1018-1023"]),
        ([rule(988, 988, group="sg-1"), rule(1018, 1022, group="sg-1")], ["1018-1023"]),
        ([rule(1018, 1023, group="sg-1"), rule(988, 988, group="sg-1", protocol="udp")], ["988"]),
        ([rule(988, 1023, cidr="10.0.1.0/25")], ["988", "1018-1023"]),
    ],
)
def test_a_closed_lustre_port_is_an_error_with_the_command_that_opens_it(
    stub: Stub, clients: AwsClients, inbound: list[dict[str, Any]], ports: list[str]
) -> None:
    _, found = network(stub, clients, inbound)
    assert found.level == "error"
    assert found.fix == "; ".join(
        f"aws ec2 authorize-security-group-ingress --group-id sg-1 --protocol tcp --port {port} --source-group sg-1"
        f" --region us-west-2"
        for port in ports
    )


def test_ports_open_for_another_group_are_a_warning_and_closed_egress_is_an_error(
    stub: Stub, clients: AwsClients
) -> None:
    _, other = network(stub, clients, [rule(988, 1023, group="sg-of-the-nodes")])
    assert other.level == "warning" and "may be the nodes" in other.found
    _, outbound = network(stub, clients, [rule(988, 1023, group="sg-1")], egress=[])
    assert outbound.level == "error" and "aws ec2 authorize-security-group-egress --group-id sg-1" in outbound.fix


def test_a_group_in_another_vpc_a_missing_group_and_a_missing_subnet_are_errors(
    stub: Stub, clients: AwsClients
) -> None:
    _, stranger = network(stub, clients, [rule(988, 1023, group="sg-1")], VpcId="vpc-2")
    assert stranger.level == "error" and "sg-1 is not in the subnet's VPC vpc-1" in stranger.found
    _, absent = network(stub, clients, [], GroupId="sg-2")
    assert absent.level == "error" and "sg-1 not found in us-west-2" in absent.found
    ec2 = stub("ec2")
    ec2.add_client_error("describe_subnets", "InvalidSubnetID.NotFound")
    ec2.add_response("describe_security_groups", {"SecurityGroups": []})
    subnet, _ = findings_of(
        clients, requirements(own_storage_class("subnet-1", "sg-1")), storage.check_subnet, storage.check_subnet_groups
    )
    assert subnet.level == "error" and subnet.fix.startswith("aws ec2 describe-subnets --region us-west-2")


def test_a_subnet_without_free_addresses_is_an_error(stub: Stub, clients: AwsClients) -> None:
    stub("ec2").add_response("describe_subnets", {"Subnets": [{**SUBNET, "AvailableIpAddressCount": 1}]})
    found = one(findings_of(clients, requirements(own_storage_class("subnet-1")), storage.check_subnet))
    assert found.level == "error" and "1 free addresses" in found.found


# --- dataset

S3 = {"dataset": {"source": "s3://bucket/a b/rows.jsonl"}}


def dataset(stub: Stub, clients: AwsClients, head: dict[str, Any] | str, where: str = REGION) -> Finding:
    s3 = stub("s3")
    if isinstance(head, str):
        s3.add_client_error("head_object", head, http_status_code=int(head) if head.isdigit() else 400)
    else:
        s3.add_response("head_object", head, {"Bucket": "bucket", "Key": "a b/rows.jsonl"})
    s3.add_response("head_bucket", {"BucketRegion": where}, {"Bucket": "bucket"})
    return one(findings_of(clients, requirements(S3), aws.check_s3_object))


def test_a_readable_dataset_in_s3(stub: Stub, clients: AwsClients) -> None:
    found = dataset(stub, clients, {"ContentLength": 1_500_000})
    assert found.level == "ok" and found.found.startswith("1.5 MB, readable with these credentials")


@pytest.mark.parametrize(
    ("head", "where", "level", "words"),
    [
        ("404", REGION, "error", "no such bucket or object"),
        ("403", REGION, "not checked", "not allowed for these credentials (s3:GetObject), or not found"),
        ({"ContentLength": 0}, REGION, "error", "is empty"),
        ({"ContentLength": 1}, "eu-west-1", "warning", "the bucket is in eu-west-1, not in us-west-2"),
    ],
)
def test_a_dataset_in_s3_with_a_problem(
    stub: Stub, clients: AwsClients, head: dict[str, Any] | str, where: str, level: str, words: str
) -> None:
    found = dataset(stub, clients, head, where)
    assert found.level == level and words in found.found
    assert found.fix.startswith("aws s3 ") and "'s3://bucket/a b/" in found.fix


def test_an_s3_prefix_is_listed(stub: Stub, clients: AwsClients) -> None:
    prefix = requirements({"dataset": {"source": "s3://bucket/rows/"}})
    for contents, level, words in (
        ([{"Key": "rows/a.jsonl.gz", "Size": 2_000_000}, {"Key": "rows/README.md", "Size": 9_000_000}], "ok", "2.0 MB"),
        ([{"Key": "rows/README.md", "Size": 9}], "error", "no data file"),
    ):
        s3 = stub("s3")
        s3.add_response("list_objects_v2", {"Contents": contents}, {"Bucket": "bucket", "Prefix": "rows/"})
        if level == "ok":
            s3.add_response("head_bucket", {"BucketRegion": REGION}, {"Bucket": "bucket"})
        found = one(findings_of(clients, prefix, aws.check_s3_object))
        assert found.level == level and words in found.found
    stub("s3").add_client_error("list_objects_v2", "AccessDenied", http_status_code=403)
    found = one(findings_of(clients, prefix, aws.check_s3_object))
    assert found.level == "not checked" and "s3:ListBucket" in found.found


def test_the_role_of_the_service_account_is_named() -> None:
    role = {"serviceAccount": {"annotations": {"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/reader"}}}
    assert "arn:aws:iam::1:role/reader" in aws.tokenize_role(requirements(role))


# --- region


@pytest.mark.parametrize(
    ("asked", "configured", "changes", "level", "used", "words"),
    [
        (None, None, {}, "ok", REGION, "us-west-2 (from the image's address)"),
        ("us-west-2", "us-west-2", {}, "ok", REGION, "(from --region)"),
        (None, "eu-west-1", {}, "warning", REGION, "but eu-west-1 from AWS_REGION or the profile"),
        (
            "us-east-1",
            None,
            {},
            "warning",
            "us-east-1",
            "us-east-1 from --region, but us-west-2 from the image's address",
        ),
        (None, "us-east-1", {"image": {"repository": "me/x"}}, "ok", "us-east-1", "(from AWS_REGION or the profile)"),
        (None, None, {"image": {"repository": "me/x"}, **STATIC}, "ok", REGION, "(from the file system's address)"),
        ("us-wset-2", None, {}, "error", "us-wset-2", "us-wset-2 (from --region) is not an AWS region"),
        (None, None, {"image": {"repository": "me/x"}}, "not checked", None, "not set"),
    ],
)
def test_the_region_and_its_source(
    asked: str | None, configured: str | None, changes: dict[str, Any], level: str, used: str | None, words: str
) -> None:
    run = requirements(changes)
    named = run.regions(asked, configured)
    found = aws.judge_region(named, aws.known_regions(), run)
    assert found.level == level and words in found.found
    assert (named[0][1] if named else None) == used
    assert level == "ok" or found.fix.startswith("genvalues preflight finetune.yaml --region ")
    assert asked != "us-wset-2" or "--region us-west-2" in found.fix


def test_errors_about_quotas_are_warnings_if_the_cluster_has_the_nodes() -> None:
    devices = requirements({"devices": {"aws.amazon.com/neuron": 16}})
    short = [Finding("error", f"{what} of trn1.32xlarge", "x", "y") for what in ("quota", "zones")]
    other = Finding("error", "image llama-lora", "x", "y")
    present = Finding("ok", "aws.amazon.com/neuron", "16 on each of 2 nodes")
    softened = instances.soften_for_existing_nodes([*short, other], [present], devices)
    assert [finding.level for finding in softened] == ["warning", "warning", "error"]
    assert softened[0] == Finding("warning", "quota of trn1.32xlarge", "x; the cluster has the nodes already", "y")
    too_few = Finding("error", "nodes trn1.32xlarge", "1 of 1 are ready and schedulable, 2 needed")
    for cluster in ([present, too_few], [], [Finding("not checked", "aws.amazon.com/neuron", "x")]):
        assert instances.soften_for_existing_nodes(short, cluster, devices) == short


def test_only_the_checks_that_apply_are_made() -> None:
    def subjects(run: RunRequirements) -> list[str]:
        return [check.subject(run) for check in aws.CHECKS if check.applies(run)]

    assert subjects(requirements()) == [
        *(f"{what} of trn1.32xlarge" for what in ("quota", "capacity", "zones")),
        "image",
        "contents of image llama-lora",
    ]
    assert "file system fs-0123456789abcdef0" in subjects(requirements(STATIC))
    assert "file system fs-0123456789abcdef0" not in subjects(
        requirements(STATIC, {"storage": {"existingClaim": "work"}})
    )
    assert "subnet subnet-1" in subjects(requirements(own_storage_class("subnet-1")))
    assert "s3://bucket/a b/rows.jsonl" in subjects(requirements(S3))
    on_cpu = {"instance": "cpu", "image": {"repository": "llama-lora"}, "storage": {"kind": "generic"}}
    assert subjects(requirements(on_cpu)) == []
    assert subjects(requirements(on_cpu, S3)) == ["s3://bucket/a b/rows.jsonl"]
