"""AWS through boto3, with the credentials that boto3 finds. Every command reports its errors in the same words."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

from genvalues.common.errors import Unavailable, UserError
from genvalues.common.hub import within_time
from genvalues.common.text import one_line, redacted

AwsAnswer = Mapping[str, Any]  # what boto3 returns for a call, or a part of it
Found = TypeVar("Found")

# A call takes at most 10 s: one attempt, with these limits for connecting and for each read.
CONNECT_SECONDS, READ_SECONDS = 4, 6
# The IAM prefix of a service where it differs from boto3's name, and actions that differ from the operation's name.
IAM_PREFIXES = {"service-quotas": "servicequotas"}
IAM_ACTIONS = {"HeadObject": "s3:GetObject", "HeadBucket": "s3:ListBucket", "ListObjectsV2": "s3:ListBucket"}

EXPIRED = {"ExpiredToken", "ExpiredTokenException", "RequestExpired"}
WRONG = {
    *("UnrecognizedClientException", "InvalidClientTokenId", "InvalidSignatureException", "SignatureDoesNotMatch"),
    *("AuthFailure", "IncompleteSignature", "IncompleteSignatureException", "InvalidAccessKeyId"),
}
# 403 is the only code of a response without a body (S3 HeadObject).
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
CHECK_THE_IMAGE = "Check image: it must be ACCOUNT.dkr.ecr.REGION.amazonaws.com/NAME:TAG, in lower case."


class NotLoggedIn(UserError):
    """There are no credentials, or AWS rejects them."""


class Denied(UserError):
    """The credentials are valid but not allowed to make the call. ``action`` is the IAM action, if known."""

    action = ""


class Missing(Exception):
    """AWS has no resource of that name."""


NO_ANSWER = (UserError, Unavailable, Missing)  # what a call raises, see translate_aws_errors


class AwsClients:
    """boto3 clients for one region, each created once, with short timeouts. Safe to use from several threads.

    ``where`` is the place that errors name; when empty, they name the service and the region.
    """

    def __init__(self, region: str, where: str = "") -> None:
        self.region = region
        self.where = where
        self._session: Any = None
        self._clients: dict[str, Any] = {}
        self._answers: dict[str, Future[Any]] = {}
        self._lock = threading.RLock()  # boto3's guide: using a client is thread-safe, creating one is not

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
            # Limits are set on the session so that they also hold for the calls that fetch credentials (STS, SSO).
            core = botocore.session.get_session()
            limits = Config(
                connect_timeout=CONNECT_SECONDS, read_timeout=READ_SECONDS, retries={"total_max_attempts": 1}
            )
            core.set_default_client_config(limits)
            core.register_component("data_loader", service_models(core.get_config_variable("data_path")))
            self._session = boto3.session.Session(botocore_session=core)
        return self._session.client(service, region_name=self.region)

    @contextmanager
    def calling(self, service: str, operation: str) -> Iterator[Any]:
        """Yield the client for one call. Raises as ``translate_aws_errors`` does; ``Denied`` names the IAM action."""
        where = self.where or f"{service} in {self.region}"
        fix = CHECK_THE_IMAGE if service == "ecr" else f"See aws {service} help."
        with translate_aws_errors(where, action_of(service, operation), fix):
            yield self.client(service)

    def ask(self, service: str, operation: str, **parameters: Any) -> dict[str, Any]:
        with self.calling(service, operation) as client:
            answer: dict[str, Any] = within_time(lambda: getattr(client, operation)(**parameters))
        return answer

    def find(self, service: str, operation: str, **parameters: Any) -> dict[str, Any]:
        """The answer, or an empty one if AWS has no resource of that name."""
        try:
            return self.ask(service, operation, **parameters)
        except Missing:
            return {}

    def list(self, service: str, operation: str, key: str, **parameters: Any) -> Iterator[dict[str, Any]]:
        """The items under ``key`` of all pages. A page is requested when its first item is needed."""
        with self.calling(service, operation) as client:
            pages = iter(client.get_paginator(operation).paginate(**parameters))
            while (page := within_time(lambda: next(pages, None))) is not None:
                yield from page.get(key) or []

    def once(self, question: str, ask: Callable[[], Found]) -> Found:
        """Ask a question once for all threads: later calls get the same answer, or raise the same error."""
        with self._lock:
            is_first = question not in self._answers
            answer = self._answers.setdefault(question, Future())
        if is_first:
            try:
                answer.set_result(ask())
            except BaseException as error:
                answer.set_exception(error)
        found: Found = answer.result()
        return found


def answer_or_none(ask: Callable[[], Found]) -> Found | None:
    """The answer, or None if the call fails. For details of a finding that is useful without them."""
    try:
        return ask()
    except NO_ANSWER:
        return None


@functools.cache
def service_models(path: str | None) -> Any:
    """The loader of AWS's service descriptions. They are large, so all regions share one."""
    from botocore.loaders import create_loader

    return create_loader(path)


def action_of(service: str, operation: str) -> str:
    """The IAM action that a call needs, as a policy names it."""
    name = "".join(word.title() for word in operation.split("_"))
    return IAM_ACTIONS.get(name, f"{IAM_PREFIXES.get(service, service)}:{name}")


def default_region() -> str | None:
    """The region of AWS_REGION, AWS_DEFAULT_REGION or the profile."""
    import boto3

    with translate_aws_errors("AWS"):
        return os.environ.get("AWS_REGION") or boto3.session.Session().region_name


@contextmanager
def translate_aws_errors(where: str, action: str = "", fix: str = LOG_IN) -> Iterator[None]:
    """Around a call to AWS: raise botocore's errors as UserError, Missing, or Unavailable if a retry may help.

    ``action`` is the IAM action that the call needs, ``fix`` the fix of errors that are not about credentials.
    """
    from botocore import exceptions

    try:
        yield
    except exceptions.ClientError as error:
        found = error.response.get("Error", {})
        code = str(found.get("Code", ""))
        if code in MISSING:
            raise Missing from None
        raise error_of_code(code, str(found.get("Message", "")), where, action, fix) from None
    except exceptions.NoCredentialsError:
        raise NotLoggedIn("no AWS credentials", where=where, fix=LOG_IN) from None
    except (exceptions.PartialCredentialsError, exceptions.ProfileNotFound, exceptions.ConfigParseError) as error:
        raise NotLoggedIn(one_line(redacted(str(error)), 200), where=where, fix=LOG_IN) from None
    except (exceptions.SSOError, exceptions.TokenRetrievalError, exceptions.CredentialRetrievalError) as error:
        raise NotLoggedIn(one_line(redacted(str(error)), 200), where=where, fix=LOG_IN_AGAIN) from None
    except exceptions.ParamValidationError as error:
        raise UserError(f"invalid request: {one_line(str(error), 200)}", where=where, fix=fix) from None
    except (exceptions.HTTPClientError, exceptions.ConnectionError, TimeoutError) as error:
        raise Unavailable(f"{where}: AWS does not answer: {one_line(str(error), 200)}. Check the network.") from None
    except exceptions.BotoCoreError as error:
        raise UserError(one_line(redacted(str(error)), 200), where=where, fix=LOG_IN) from None
    except ValueError as error:  # botocore raises a plain ValueError for an endpoint that is not a URL
        if not str(error).startswith("Invalid endpoint"):
            raise
        raise UserError(one_line(str(error), 200), where=where, fix="Check AWS_ENDPOINT_URL.") from None


def error_of_code(code: str, message: str, where: str, action: str, fix: str) -> Exception:
    """The error to raise for an error code of AWS."""
    reason, code = one_line(redacted(message), 200), one_line(code)
    if code in EXPIRED:
        return NotLoggedIn("the AWS credentials have expired", where=where, fix=LOG_IN_AGAIN)
    if code in WRONG:
        return NotLoggedIn(f"AWS rejects these credentials ({code})", where=where, fix=LOG_IN)
    if code in DENIED:
        fix = f"Allow {action or 'the call'} for them, or use other credentials: AWS_PROFILE=NAME."
        denied = Denied(f"not allowed for these credentials: {reason}", where=where, fix=fix)
        denied.action = action
        return denied
    if code in LATER:
        return Unavailable(f"{where}: AWS answers {code}: {reason}. Try again.")
    return UserError(f"AWS answers {code}: {reason}", where=where, fix=fix)
