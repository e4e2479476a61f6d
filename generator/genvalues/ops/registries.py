"""Image addresses, AWS's registries of the base images, and the calls to ECR that a push needs."""

from __future__ import annotations

import base64
import difflib
from dataclasses import dataclass

from genvalues.common.errors import UserError
from genvalues.ops.aws import AwsClients, Denied, Missing
from genvalues.settings.images import ECR, split_image

# Where to find a base image of backend native. It has no default: AWS's pages alone know the repository and its tags.
NATIVE_BASE = (
    "Add --base IMAGE, AWS's TorchNeuron training container of Neuron SDK 2.33 or newer. Its tags: "
    "https://awsdocs-neuron.readthedocs-hosted.com/en/latest/setup/pytorch/dlc.html and https://gallery.ecr.aws/neuron."
)

# The base image of backend xla. AWS's Deep Learning Containers are in one registry per region, in most regions under
# one account (as of 2026-08):
# https://aws.github.io/deep-learning-containers/reference/region_availability/. That page omits GovCloud, whose
# accounts are from sagemaker-core's image_uri_config/huggingface-neuronx.json in aws/sagemaker-python-sdk.
DEFAULT_ACCOUNT = "763104351884"
DEFAULT_ACCOUNT_REGIONS = (
    *("ap-northeast-1", "ap-northeast-2", "ap-south-1", "ap-southeast-1", "ap-southeast-2", "ca-central-1"),
    *("eu-central-1", "eu-north-1", "eu-west-1", "eu-west-2", "eu-west-3", "sa-east-1", "us-east-1", "us-east-2"),
    *("us-west-1", "us-west-2"),
)
ACCOUNTS = {
    **dict.fromkeys(DEFAULT_ACCOUNT_REGIONS, DEFAULT_ACCOUNT),
    **{"af-south-1": "626614931356", "ap-east-1": "871362719292", "ap-east-2": "975050140332"},
    **{"ap-northeast-3": "364406365360", "ap-south-2": "772153158452", "ap-southeast-3": "907027046896"},
    **{"ap-southeast-4": "457447274322", "ap-southeast-5": "550225433462", "ap-southeast-6": "633930458069"},
    **{"ap-southeast-7": "590183813437", "ca-west-1": "204538143572", "cn-north-1": "727897471807"},
    **{"cn-northwest-1": "727897471807", "eu-central-2": "380420809688", "eu-south-1": "692866216735"},
    **{"eu-south-2": "503227376785", "il-central-1": "780543022126", "me-central-1": "914824155844"},
    **{"me-south-1": "217643126080", "mx-central-1": "637423239942", "us-gov-east-1": "446045086412"},
    **{"us-gov-west-1": "442386744353"},
}
# The regions for which the same file lists huggingface-pytorch-training-neuronx with transformers 4.55.4. In other
# regions the registry may lack it; only a pull shows that.
OFFERED = {
    *("ap-northeast-1", "ap-south-1", "ap-south-2", "ap-southeast-1", "ap-southeast-2", "ap-southeast-4"),
    *("ap-southeast-5", "ap-southeast-7", "ca-west-1", "cn-north-1", "cn-northwest-1", "eu-central-1", "eu-central-2"),
    *("eu-south-2", "eu-west-1", "eu-west-3", "il-central-1", "mx-central-1", "sa-east-1", "us-east-1", "us-east-2"),
    *("us-gov-east-1", "us-gov-west-1", "us-west-2"),
}
PUBLIC_ECR, PUBLIC_ALIASES = "public.ecr.aws", ("neuron", "deep-learning-containers")
REPOSITORY = "huggingface-pytorch-training-neuronx"
TAG = "2.8.0-transformers4.55.4-neuronx-py310-sdk2.26.0-ubuntu22.04"  # as in trainer/Dockerfile; a test compares them

ACCOUNT_DIGITS = 12
EXAMPLE = "ACCOUNT.dkr.ecr.REGION.amazonaws.com/llama-lora:0.1.0"


@dataclass(frozen=True)
class ImageReference:
    """An image reference in parts. ``account`` and ``region`` are set if its registry is one of ECR."""

    repository: str  # includes the registry
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

    @property
    def ecr_repository(self) -> dict[str, str]:
        """The parameters that name the repository in a call to ECR."""
        return {"registryId": self.account, "repositoryName": self.name}

    @property
    def ecr_id(self) -> dict[str, str]:
        return {"imageDigest": self.digest} if self.digest else {"imageTag": self.tag}

    def at(self, digest: str) -> str:
        """The reference with both the tag, for people, and the digest, which is what gets pulled."""
        return f"{self.tagged}@{digest}"


def parse_image(reference: str) -> ImageReference:
    repository, tag, digest = split_image(reference)
    registry = repository.partition("/")[0]
    if "/" not in repository or not (registry == "localhost" or set(".:") & set(registry)):
        registry = ""  # Docker Hub
    found = ECR.fullmatch(registry)
    if not found or len(found["account"]) != ACCOUNT_DIGITS:
        return ImageReference(repository, tag, digest, registry)
    return ImageReference(repository, tag, digest, registry, found["account"], found["region"])


def invalid_account(image: ImageReference) -> str:
    """What is wrong with the account number of an ECR address; empty for a valid one and for other registries."""
    found = ECR.fullmatch(image.registry)
    if not found or len(found["account"]) == ACCOUNT_DIGITS:
        return ""
    return f"the account number {found['account']} has {len(found['account'])} digits, not {ACCOUNT_DIGITS}"


def is_aws_container(image: ImageReference) -> bool:
    """Whether an address is in a registry of AWS's own containers. Nobody else can push there."""
    public = image.registry == PUBLIC_ECR and image.name.partition("/")[0] in PUBLIC_ALIASES
    return public or image.account in ACCOUNTS.values()


def image_to_build(reference: str | None, where: str) -> ImageReference:
    """The image to build and push. Raises UserError if the reference has no usable tag."""
    if not reference:
        raise UserError("missing", where=where, fix=f"Write the address to push to: {EXAMPLE}.")
    image = parse_image(reference)
    if mistake := invalid_account(image):
        raise UserError(mistake, where=where, fix="To see yours: aws sts get-caller-identity --query Account.")
    if not image.tag:
        raise UserError("has no tag", where=where, fix=f"Write REPOSITORY:TAG, such as {EXAMPLE}.")
    if image.tag == "latest":
        what = ":latest can change between stages"
        raise UserError(what, where=where, fix="Write the tag of a version, such as :0.1.0.")
    return image


def base_image(region: str, where: str) -> str:
    """The address of backend xla's container in a region. Raises UserError if it is not available there."""
    if region not in ACCOUNTS:
        near = difflib.get_close_matches(region, ACCOUNTS, n=1)
        meant = f"Did you mean {near[0]}? " if near else ""
        what = f"{region} is not a region with AWS Deep Learning Containers"
        raise UserError(what, where=where, fix=f"{meant}Otherwise name the base image: --base IMAGE.")
    if region not in OFFERED:
        fix = f"Use another region's image (the transfer costs money): --base {base_address('us-west-2')}."
        raise UserError(f"the base image is not available in {region}", where=where, fix=fix)
    return base_address(region)


def base_address(region: str) -> str:
    domain = "amazonaws.com.cn" if region.startswith("cn-") else "amazonaws.com"
    return f"{ACCOUNTS[region]}.dkr.ecr.{region}.{domain}/{REPOSITORY}:{TAG}"


def ensure_repository(image: ImageReference) -> bool:
    """Create the image's ECR repository unless it exists. Returns whether it was created.

    A new repository scans images on push, and its tags are immutable: the tag that a run names never changes. Raises
    UserError if that tag exists already.
    """
    aws = AwsClients(image.region, where=image.tagged)
    try:
        answer = aws.ask("ecr", "describe_repositories", registryId=image.account, repositoryNames=[image.name])
    except (Denied, Missing) as error:
        check_account(aws, image)
        if isinstance(error, Denied):
            raise
        settings = {"imageTagMutability": "IMMUTABLE", "imageScanningConfiguration": {"scanOnPush": True}}
        aws.ask("ecr", "create_repository", repositoryName=image.name, **settings)
        return True
    if answer["repositories"][0].get("imageTagMutability") == "IMMUTABLE":
        check_tag_is_free(aws, image)
    return False


def check_tag_is_free(aws: AwsClients, image: ImageReference) -> None:
    answer = aws.find("ecr", "describe_images", imageIds=[{"imageTag": image.tag}], **image.ecr_repository)
    for existing in answer.get("imageDetails") or []:
        what = "the tag exists already, and the repository's tags are immutable"
        fix = f"To use that image, write image: {image.at(existing['imageDigest'])}. To push another, write a new tag."
        raise UserError(what, where=image.tagged, fix=fix)


def check_account(aws: AwsClients, image: ImageReference) -> None:
    """Raise UserError if the address has another account than the credentials: a copied example, or a wrong profile."""
    own = aws.ask("sts", "get_caller_identity")["Account"]
    if own != image.account:
        what = f"cannot see repository {image.name} of account {image.account} with credentials of account {own}"
        fix = f"Write {own} in image:, or use the credentials of {image.account}: AWS_PROFILE=NAME."
        raise UserError(what, where=image.tagged, fix=fix)


def login_password(region: str) -> str:
    """The password of user AWS for the ECR registries of a region. Valid for 12 hours."""
    answer = AwsClients(region, where=f"ECR in {region}").ask("ecr", "get_authorization_token")
    user, _, secret = base64.b64decode(answer["authorizationData"][0]["authorizationToken"]).decode().partition(":")
    if user != "AWS" or not secret:
        raise UserError("returned no password", where=f"ECR in {region}", fix="Try again.")
    return secret
