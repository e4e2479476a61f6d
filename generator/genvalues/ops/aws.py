"""AWS, by boto3 and the credentials it finds. Its errors are told in a line, in one way for every command."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from genvalues.common.errors import Unavailable, UserError
from genvalues.common.text import one_line, redacted

EXPIRED = {"ExpiredToken", "ExpiredTokenException", "RequestExpired"}
WRONG = {
    *("UnrecognizedClientException", "InvalidClientTokenId", "InvalidSignatureException", "SignatureDoesNotMatch"),
    *("AuthFailure", "IncompleteSignature", "IncompleteSignatureException", "InvalidAccessKeyId"),
}
# 403: all that an answer without a body says (S3's HeadObject).
DENIED = {
    *("AccessDenied", "AccessDeniedException", "UnauthorizedOperation", "OptInRequired", "NotAuthorized"),
    *("AuthorizationError", "403"),
}
LATER = {
    *("ThrottlingException", "Throttling", "TooManyRequestsException", "RequestLimitExceeded", "SlowDown"),
    *("ServerException", "InternalFailure", "InternalError", "InternalServerError", "ServiceException"),
    *("InternalErrorException", "ServiceUnavailable", "Unavailable", "503", "500"),
}
MISSING = {
    *("RepositoryNotFoundException", "ImageNotFoundException"),  # ECR
    *("FileSystemNotFound", "NoSuchResourceException", "ResourceNotFound"),  # FSx, Service Quotas, SageMaker
    *("InvalidSubnetID.NotFound", "InvalidGroup.NotFound", "InvalidGroupId.NotFound"),  # EC2
    *("NoSuchKey", "NoSuchBucket", "NotFound", "404"),  # S3
}

LOG_IN = "Log in: aws configure, aws sso login, or AWS_PROFILE=NAME."
LOG_IN_AGAIN = "Log in again: aws sso login, or new keys."
LOOK_AT_THE_ADDRESS = "Look at the address in image:."


class NotLoggedIn(UserError):
    """No credentials, or none that AWS takes (any more)."""


class Denied(UserError):
    """The credentials are right, and are not allowed this: ``needs`` is the IAM action, where it is known."""

    needs = ""


class Missing(Exception):
    """AWS has nothing of that name."""


def client(service: str, region: str) -> Any:
    """For one call after the other; genvalues.ops.preflight.aws_checks makes its own, which are quick to give up."""
    import boto3

    with translate_errors(f"AWS in {region}"):
        return boto3.session.Session().client(service, region_name=region)


def default_region() -> str | None:
    """What AWS_REGION, AWS_DEFAULT_REGION or the profile says."""
    import os

    import boto3

    with translate_errors("AWS"):
        return os.environ.get("AWS_REGION") or boto3.session.Session().region_name


@contextmanager
def translate_errors(where: str, needs: str = "", look: str = LOOK_AT_THE_ADDRESS) -> Iterator[None]:
    """Around a call to AWS: its errors as UserErrors, what is not there as Missing, what may pass as Unavailable.

    ``needs`` is the IAM action of the call, ``look`` the fix of what AWS refuses for a reason of its own.
    """
    from botocore import exceptions

    try:
        yield
    except exceptions.ClientError as error:
        found = error.response.get("Error", {})
        code = str(found.get("Code", ""))
        if code in MISSING:
            raise Missing from None
        raise refusal(code, str(found.get("Message", "")), where, needs, look) from None
    except exceptions.NoCredentialsError:
        raise NotLoggedIn("no AWS credentials", where=where, fix=LOG_IN) from None
    except (exceptions.PartialCredentialsError, exceptions.ProfileNotFound, exceptions.ConfigParseError) as error:
        raise NotLoggedIn(one_line(redacted(str(error)), 200), where=where, fix=LOG_IN) from None
    except (exceptions.SSOError, exceptions.TokenRetrievalError, exceptions.CredentialRetrievalError) as error:
        raise NotLoggedIn(one_line(redacted(str(error)), 200), where=where, fix=LOG_IN_AGAIN) from None
    except exceptions.ParamValidationError as error:
        fix = "Write ACCOUNT.dkr.ecr.REGION.amazonaws.com/NAME:TAG, in small letters."
        raise UserError(f"ECR takes no such name: {one_line(str(error), 200)}", where=where, fix=fix) from None
    except (exceptions.HTTPClientError, exceptions.ConnectionError) as error:
        raise Unavailable(f"{where}: AWS does not answer: {one_line(str(error), 200)}. Look at the network.") from None
    except exceptions.BotoCoreError as error:
        raise UserError(one_line(redacted(str(error)), 200), where=where, fix=LOG_IN) from None
    except ValueError as error:  # of botocore's own: no error of its classes
        if not str(error).startswith("Invalid endpoint"):
            raise
        raise UserError(one_line(str(error), 200), where=where, fix="Look at AWS_ENDPOINT_URL.") from None


def refusal(code: str, message: str, where: str, needs: str, look: str = LOOK_AT_THE_ADDRESS) -> Exception:
    """What AWS says no with, as one line."""
    said, code = one_line(redacted(message), 200), one_line(code)
    if code in EXPIRED:
        return NotLoggedIn("the AWS credentials have expired", where=where, fix=LOG_IN_AGAIN)
    if code in WRONG:
        return NotLoggedIn(f"AWS does not know these credentials ({code})", where=where, fix=LOG_IN)
    if code in DENIED:
        allow = f"Have {needs} allowed for them" if needs else "Have that allowed for them"
        what = f"not allowed to these credentials: {said}"
        denied = Denied(what, where=where, fix=f"{allow}, or use others: AWS_PROFILE=NAME.")
        denied.needs = needs
        return denied
    if code in LATER:
        return Unavailable(f"{where}: AWS answers {code}: {said}. Try again.")
    return UserError(f"AWS answers {code}: {said}", where=where, fix=look)
