"""ECR, by boto3 and the credentials it finds: the repository, and the password that a builder logs in with."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from genvalues.errors import Unavailable, UserError
from genvalues.image.registries import Image
from genvalues.wording import one_line, redacted

EXPIRED = {"ExpiredToken", "ExpiredTokenException", "RequestExpired"}
WRONG = {
    *("UnrecognizedClientException", "InvalidClientTokenId", "InvalidSignatureException", "SignatureDoesNotMatch"),
    *("AuthFailure", "IncompleteSignature"),
}
DENIED = {"AccessDenied", "AccessDeniedException", "UnauthorizedOperation", "OptInRequired", "NotAuthorized"}
LATER = {"ThrottlingException", "ServerException", "InternalFailure", "ServiceUnavailable", "TooManyRequestsException"}

LOG_IN = "Log in: aws configure, aws sso login, or AWS_PROFILE=NAME."
LOG_IN_AGAIN = "Log in again: aws sso login, or new keys."


def client(service: str, region: str) -> Any:
    """The one place that makes one."""
    import boto3

    with told(f"AWS in {region}"):
        return boto3.session.Session().client(service, region_name=region)


def default_region() -> str | None:
    """What AWS_REGION, AWS_DEFAULT_REGION or the profile says."""
    import os

    import boto3

    with told("AWS"):
        return os.environ.get("AWS_REGION") or boto3.session.Session().region_name


def ensure_repository(image: Image) -> bool:
    """Have the image's repository; whether it was made now.

    A new one scans what is pushed and keeps its tags: a tag that a run names is never another image. Raises UserError
    where that tag is taken already, before anything is built for it.
    """
    ecr = client("ecr", image.region)
    try:
        with told(image.tagged, needs="ecr:DescribeRepositories"):
            answer = ecr.describe_repositories(registryId=image.account, repositoryNames=[image.name])
    except Denied:
        check_account(image)
        raise
    except Missing:
        check_account(image)
        with told(image.tagged, needs="ecr:CreateRepository"):
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
        with told(image.tagged, needs="ecr:DescribeImages"):
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
    with told("AWS"):
        own = client("sts", image.region).get_caller_identity()["Account"]
    if own != image.account:
        what = f"account {image.account} shows no repository {image.name} to these credentials, which are {own}'s"
        fix = f"Write {own} in image:, or use that account's credentials: AWS_PROFILE=NAME."
        raise UserError(what, where=image.tagged, fix=fix)


def password(region: str) -> str:
    """For user AWS; 12 hours good, for every registry of the region that the credentials may use."""
    with told(f"ECR in {region}", needs="ecr:GetAuthorizationToken"):
        answer = client("ecr", region).get_authorization_token()
    user, _, secret = base64.b64decode(answer["authorizationData"][0]["authorizationToken"]).decode().partition(":")
    if user != "AWS" or not secret:
        raise UserError("answered with no password", where=f"ECR in {region}", fix="Try again.")
    return secret


class Denied(UserError):
    """The credentials are right, and are not allowed this."""


class Missing(Exception):
    """ECR has no such repository or image."""


@contextmanager
def told(where: str, needs: str = "") -> Iterator[None]:
    """Around a call to AWS: its errors as UserErrors, what is not there as Missing, what may pass as Unavailable."""
    from botocore import exceptions

    try:
        yield
    except exceptions.ClientError as error:
        code = error.response.get("Error", {}).get("Code", "")
        if code in ("RepositoryNotFoundException", "ImageNotFoundException"):
            raise Missing from None
        raise refusal(code, error.response["Error"].get("Message", ""), where, needs) from None
    except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError) as error:
        what = "no AWS credentials" if isinstance(error, exceptions.NoCredentialsError) else one_line(str(error))
        raise UserError(what, where=where, fix=LOG_IN) from None
    except (exceptions.SSOError, exceptions.TokenRetrievalError, exceptions.CredentialRetrievalError) as error:
        raise UserError(one_line(redacted(str(error)), 200), where=where, fix=LOG_IN_AGAIN) from None
    except exceptions.ParamValidationError as error:
        fix = "Write ACCOUNT.dkr.ecr.REGION.amazonaws.com/NAME:TAG, in small letters."
        raise UserError(f"ECR takes no such name: {one_line(str(error), 200)}", where=where, fix=fix) from None
    except (exceptions.HTTPClientError, exceptions.ConnectionError) as error:
        raise Unavailable(f"{where}: AWS does not answer: {one_line(str(error), 200)}. Look at the network.") from None
    except exceptions.BotoCoreError as error:
        raise UserError(one_line(redacted(str(error)), 200), where=where, fix=LOG_IN) from None


def refusal(code: str, message: str, where: str, needs: str) -> Exception:
    """What ECR or STS says no with, as one line."""
    said = one_line(redacted(message), 200)
    if code in EXPIRED:
        return UserError("the AWS credentials have expired", where=where, fix=LOG_IN_AGAIN)
    if code in WRONG:
        return UserError(f"AWS does not know these credentials ({code})", where=where, fix=LOG_IN)
    if code in DENIED:
        allow = f"Have {needs} allowed for them" if needs else "Have that allowed for them"
        what = f"not allowed to these credentials: {said}"
        return Denied(what, where=where, fix=f"{allow}, or use others: AWS_PROFILE=NAME.")
    if code in LATER:
        return Unavailable(f"{where}: AWS answers {code}: {said}. Try again.")
    return UserError(f"AWS answers {code}: {said}", where=where, fix="Look at the address in image:.")
