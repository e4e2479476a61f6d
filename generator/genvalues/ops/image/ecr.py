"""ECR, by boto3 and the credentials it finds: the repository, and the password that a builder logs in with."""

from __future__ import annotations

import base64
from typing import Any

from genvalues.common.errors import UserError
from genvalues.ops.aws import Denied, Missing, client, default_region, translate_errors
from genvalues.ops.image.registries import Image

__all__ = ["default_region", "ensure_repository", "password"]


def ensure_repository(image: Image) -> bool:
    """Have the image's repository; whether it was made now.

    A new one scans what is pushed and keeps its tags: a tag that a run names is never another image. Raises UserError
    where that tag is taken already, before anything is built for it.
    """
    ecr = client("ecr", image.region)
    try:
        with translate_errors(image.tagged, needs="ecr:DescribeRepositories"):
            answer = ecr.describe_repositories(registryId=image.account, repositoryNames=[image.name])
    except Denied:
        check_account(image)
        raise
    except Missing:
        check_account(image)
        with translate_errors(image.tagged, needs="ecr:CreateRepository"):
            ecr.create_repository(
                repositoryName=image.name,
                imageTagMutability="IMMUTABLE",
                imageScanningConfiguration={"scanOnPush": True},
            )
        return True
    if answer["repositories"][0].get("imageTagMutability") == "IMMUTABLE":
        check_tag_is_free(ecr, image)
    return False


def check_tag_is_free(ecr: Any, image: Image) -> None:
    """Raises UserError where the tag is taken: by an earlier push, whose image can be used as it is."""
    try:
        with translate_errors(image.tagged, needs="ecr:DescribeImages"):
            found = ecr.describe_images(
                registryId=image.account, repositoryName=image.name, imageIds=[{"imageTag": image.tag}]
            )
    except Missing:
        return
    there = image.at(found["imageDetails"][0]["imageDigest"])
    fix = f"To use it write image: {there}. For another image write a new tag."
    raise UserError("is pushed already, and its repository keeps tags as they are", where=image.tagged, fix=fix)


def check_account(image: Image) -> None:
    """Raises UserError where the address is another account's: it is an example's, or the profile is the wrong one."""
    with translate_errors("AWS"):
        own = client("sts", image.region).get_caller_identity()["Account"]
    if own != image.account:
        what = f"account {image.account} shows no repository {image.name} to these credentials, which are {own}'s"
        fix = f"Write {own} in image:, or use that account's credentials: AWS_PROFILE=NAME."
        raise UserError(what, where=image.tagged, fix=fix)


def password(region: str) -> str:
    """For user AWS; 12 hours good, for every registry of the region that the credentials may use."""
    with translate_errors(f"ECR in {region}", needs="ecr:GetAuthorizationToken"):
        answer = client("ecr", region).get_authorization_token()
    user, _, secret = base64.b64decode(answer["authorizationData"][0]["authorizationToken"]).decode().partition(":")
    if user != "AWS" or not secret:
        raise UserError("answered with no password", where=f"ECR in {region}", fix="Try again.")
    return secret
