"""Addresses of images, and where AWS keeps the container that ours is built from."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from genvalues.common.errors import UserError
from genvalues.settings.images import split_image

# AWS's Deep Learning Containers are in one registry per region. The accounts, China's too, as of 2026-08:
# https://aws.github.io/deep-learning-containers/reference/region_availability/. GovCloud's, which that page leaves out:
# sagemaker-core's image_uri_config/huggingface-neuronx.json in aws/sagemaker-python-sdk.
EVERYWHERE = "763104351884"
ACCOUNTS = {
    "af-south-1": "626614931356",
    "ap-east-1": "871362719292",
    "ap-east-2": "975050140332",
    "ap-northeast-1": EVERYWHERE,
    "ap-northeast-2": EVERYWHERE,
    "ap-northeast-3": "364406365360",
    "ap-south-1": EVERYWHERE,
    "ap-south-2": "772153158452",
    "ap-southeast-1": EVERYWHERE,
    "ap-southeast-2": EVERYWHERE,
    "ap-southeast-3": "907027046896",
    "ap-southeast-4": "457447274322",
    "ap-southeast-5": "550225433462",
    "ap-southeast-6": "633930458069",
    "ap-southeast-7": "590183813437",
    "ca-central-1": EVERYWHERE,
    "ca-west-1": "204538143572",
    "cn-north-1": "727897471807",
    "cn-northwest-1": "727897471807",
    "eu-central-1": EVERYWHERE,
    "eu-central-2": "380420809688",
    "eu-north-1": EVERYWHERE,
    "eu-south-1": "692866216735",
    "eu-south-2": "503227376785",
    "eu-west-1": EVERYWHERE,
    "eu-west-2": EVERYWHERE,
    "eu-west-3": EVERYWHERE,
    "il-central-1": "780543022126",
    "me-central-1": "914824155844",
    "me-south-1": "217643126080",
    "mx-central-1": "637423239942",
    "sa-east-1": EVERYWHERE,
    "us-east-1": EVERYWHERE,
    "us-east-2": EVERYWHERE,
    "us-gov-east-1": "446045086412",
    "us-gov-west-1": "442386744353",
    "us-west-1": EVERYWHERE,
    "us-west-2": EVERYWHERE,
}
# Where the same file offers huggingface-pytorch-training-neuronx with transformers 4.55.4. Elsewhere the registry may
# not have it, which only a pull tells.
OFFERED = {
    *("ap-northeast-1", "ap-south-1", "ap-south-2", "ap-southeast-1", "ap-southeast-2", "ap-southeast-4"),
    *("ap-southeast-5", "ap-southeast-7", "ca-west-1", "cn-north-1", "cn-northwest-1", "eu-central-1", "eu-central-2"),
    *("eu-south-2", "eu-west-1", "eu-west-3", "il-central-1", "mx-central-1", "sa-east-1", "us-east-1", "us-east-2"),
    *("us-gov-east-1", "us-gov-west-1", "us-west-2"),
}
REPOSITORY = "huggingface-pytorch-training-neuronx"
TAG = "2.8.0-transformers4.55.4-neuronx-py310-sdk2.26.0-ubuntu22.04"  # as in trainer/Dockerfile; a test compares them

# ACCOUNT.dkr.ecr.REGION.amazonaws.com, its FIPS endpoint, China's, and the dual-stack form:
# https://docs.aws.amazon.com/AmazonECR/latest/userguide/Registries.html
ECR = re.compile(
    r"(?P<account>[0-9]+)\.dkr[.-]ecr(-fips)?\.(?P<region>[a-z]{2,4}(-[a-z]+)+-[0-9]+)"
    r"\.(?P<domain>amazonaws\.com(\.cn)?|on\.aws|on\.amazonwebservices\.com\.cn)"
)
ACCOUNT_DIGITS = 12


@dataclass(frozen=True)
class Image:
    """An image reference, and what ECR knows of it where its registry is one of ECR's."""

    repository: str  # with the registry before it: what a builder is told
    tag: str
    digest: str = ""
    registry: str = ""
    account: str = ""
    region: str = ""

    @property
    def in_ecr(self) -> bool:
        return bool(self.account)

    @property
    def tagged(self) -> str:
        return f"{self.repository}:{self.tag}"

    @property
    def name(self) -> str:
        """The repository's name within its registry."""
        return self.repository.removeprefix(f"{self.registry}/") if self.registry else self.repository

    def at(self, digest: str) -> str:
        """The reference by tag, for people, and by digest, which is what is pulled."""
        return f"{self.tagged}@{digest}"


def parse(reference: str) -> Image:
    repository, tag, digest = split_image(reference)
    registry = repository.partition("/")[0]
    if "/" not in repository or not (registry == "localhost" or set(".:") & set(registry)):
        registry = ""  # Docker's own
    found = ECR.fullmatch(registry)
    if not found or len(found["account"]) != ACCOUNT_DIGITS:
        return Image(repository, tag, digest, registry)
    return Image(repository, tag, digest, registry, found["account"], found["region"])


def mistaken_account(image: Image) -> str:
    """What is wrong with the account of an address that is ECR's but for that; nothing where it is not, or is right."""
    found = ECR.fullmatch(image.registry)
    if not found or len(found["account"]) == ACCOUNT_DIGITS:
        return ""
    return f"the account number {found['account']} has {len(found['account'])} digits, not {ACCOUNT_DIGITS}"


def to_build(reference: str | None, where: str) -> Image:
    """The image to build and push, by its tag. Raises UserError where there is no tag to give it."""
    example = "ACCOUNT.dkr.ecr.REGION.amazonaws.com/llama-lora:0.1.0"
    if not reference:
        raise UserError("missing", where=where, fix=f"Write where the image goes: {example}.")
    image = parse(reference)
    if mistake := mistaken_account(image):
        raise UserError(mistake, where=where, fix="Yours: aws sts get-caller-identity --query Account.")
    if not image.tag:
        raise UserError("names no tag to build", where=where, fix=f"Write REPOSITORY:TAG, such as {example}.")
    if image.tag == "latest":
        raise UserError(":latest is another image tomorrow", where=where, fix="Name a version's tag, such as :0.1.0.")
    return image


def no_such_region(region: str, where: str) -> UserError:
    near = difflib.get_close_matches(region, ACCOUNTS, n=1)
    meant = f"Did you mean {near[0]}? " if near else ""
    what = f"{region} is no region that AWS lists a registry of its Deep Learning Containers for"
    return UserError(what, where=where, fix=f"{meant}Else name the base image yourself: --base IMAGE.")


def base_image(region: str, where: str) -> str:
    """The reference of AWS's container in that region. Raises UserError where it is not offered there."""
    if region not in ACCOUNTS:
        raise no_such_region(region, where)
    if region not in OFFERED:
        fix = f"Take it from another region, which costs the transfer: --base {address('us-west-2')}."
        raise UserError(f"the base image is not offered in {region}", where=where, fix=fix)
    return address(region)


def address(region: str) -> str:
    domain = "amazonaws.com.cn" if region.startswith("cn-") else "amazonaws.com"
    return f"{ACCOUNTS[region]}.dkr.ecr.{region}.{domain}/{REPOSITORY}:{TAG}"
