"""Translate errors of S3 and boto3, in reading and in publishing, into errors that say what the user must change."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from genvalues.common.errors import Unavailable, UserError
from genvalues.common.text import one_line
from llama_lora.environment import proxy_variables, variables_in, without_passwords

ENDPOINT = "AWS_ENDPOINT_URL"
WEB_IDENTITY = "AWS_WEB_IDENTITY_TOKEN_FILE"


class InvalidSettings(Exception):
    """A setting that boto3 takes from the environment or the AWS config file is not valid."""


class Use(NamedTuple):
    """What a stage uses S3 for, as errors name it, and what to do where it has no credentials or no rights."""

    stage: str
    verb: str
    form: str  # of the URI
    role: str
    denied: str
    missing: str


_PLACE = "Check the bucket, the key and the role's s3:GetObject permission (for a prefix s3:ListBucket)."
READ = Use(
    stage="tokenize",
    verb="read",
    form="s3://BUCKET/KEY",
    role="Give tokenize's service account a role with read access to it.",
    denied=_PLACE,
    missing=_PLACE,  # S3 returns 403 for an object that does not exist if the role may not list the bucket
)

RENEW = "Renew the credentials, then run the stage again."
CREDENTIALS = "Check the AWS credentials of the {stage} stage."
REGION = "Set AWS_REGION to the bucket's region in stages.{stage}.extraEnv, and check AWS_ENDPOINT_URL if it is set."
# What to do about codes of S3 and STS that a retry does not change. HEAD has only the number.
FIXES = {
    "AccessDenied": "{denied}",
    "403": "{denied}",
    "AllAccessDisabled": "Check the bucket.",
    "InvalidAccessKeyId": CREDENTIALS,
    "SignatureDoesNotMatch": CREDENTIALS,
    "ExpiredToken": RENEW,
    "ExpiredTokenException": RENEW,
    "InvalidToken": RENEW,
    "404": "{missing}",
    "NoSuchKey": "{missing}",
    "NoSuchBucket": "{missing}",
    "InvalidBucketName": "{missing}",
    "301": REGION,
    "PermanentRedirect": REGION,
    "AuthorizationHeaderMalformed": REGION,
    "RequestTimeTooSkewed": "Set the clock of the node: it differs from that of S3.",
    "EntityTooLarge": "The file is too large for S3.",
    "KMS.AccessDeniedException": "Allow kms:GenerateDataKey and kms:Decrypt with the bucket's key.",
}
# Codes that a retry can change although their status is one of the client's errors (4xx).
PASSING = {
    *("RequestTimeout", "RequestTimeoutException", "SlowDown", "Throttling", "ThrottlingException"),
    *("BadDigest", "IncompleteBody", "InvalidPart", "NoSuchUpload", "XAmzContentSHA256Mismatch"),
    *("KMS.ThrottlingException", "IDPCommunicationError"),
}
PASSING_STATUS = {408, 409, 429}


@contextmanager
def translate_s3_errors(uri: str, where: str, use: Use = READ) -> Iterator[None]:
    """Around making a client and calling it: errors that the user must fix become UserErrors at ``where``, others of
    S3 Unavailable. Errors of files pass."""
    from botocore import exceptions
    from botocore.parsers import ResponseParserError

    try:
        yield
    except exceptions.NoCredentialsError:
        raise UserError(f"no AWS credentials to {use.verb} {uri}", where=where, fix=use.role) from None
    except exceptions.ParamValidationError:
        raise UserError(f"invalid S3 URI {uri}", where=where, fix=f"Write {use.form}.") from None
    except exceptions.ClientError as error:
        raise _error_of_code(error, uri, where, use) from None
    except RecursionError:  # botocore follows a redirect, to the same place
        raise UserError(f"S3 redirects {uri} endlessly", where=where, fix=REGION.format(stage=use.stage)) from None
    except (exceptions.HTTPClientError, exceptions.ConnectionError) as error:
        raise _error_of_request(error, uri, where) from None
    except (
        exceptions.CredentialRetrievalError,  # of a pod's agent, which may start later than the pod
        exceptions.MetadataRetrievalError,
        exceptions.IncompleteReadError,
        exceptions.ChecksumError,
        exceptions.FlexibleChecksumError,
        ResponseParserError,
    ) as error:
        raise _no_answer(error, uri) from None
    except (exceptions.BotoCoreError, InvalidSettings) as error:
        raise _settings_error(error, where) from None
    except OSError as error:
        if error.filename is None or str(error.filename) != os.environ.get(WEB_IDENTITY):
            raise
        what = f"{one_line(str(error.filename), 255)} cannot be read: {error.strerror}"
        raise UserError(f"{WEB_IDENTITY}: {what}", where=where, fix=f"Correct {WEB_IDENTITY}, or unset it.") from None


def _settings_error(error: Exception, where: str) -> UserError:
    """The error for one of boto3 about its settings. It names the variables whose values boto3 quotes."""
    text = str(error)
    names = " and ".join(variables_in(text, "AWS_")) or "the AWS_ environment variables and the AWS config file"
    return UserError(f"boto3: {one_line(without_passwords(text), 300)}", where=where, fix=f"Check {names}.")


def _error_of_code(error: Any, uri: str, where: str, use: Use) -> Exception:
    code = one_line(str(error.response.get("Error", {}).get("Code", "")))
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if code in ("412", "PreconditionFailed"):
        return UserError(
            f"{uri} has been replaced since this run first read it",
            where=where,
            fix="Delete the run's resolved.json to use the new object, or restore the old one.",
        )
    what = f"S3 returns {code} to {error.operation_name} for {uri}"
    if code in FIXES:
        fix = FIXES[code].format(stage=use.stage, denied=use.denied, missing=use.missing)
        return UserError(what, where=where, fix=fix)
    if not 400 <= status < 500 or code in PASSING or status in PASSING_STATUS:
        return Unavailable(f"{what}, also when asked again.")
    fix = "Check the credentials (they may have expired), AWS_REGION, and AWS_ENDPOINT_URL if it is set."
    return UserError(what, where=where, fix=fix)


def _error_of_request(error: Any, uri: str, where: str) -> Exception:
    """The error for one of sending a request. Its text may hold a header or a proxy's password, so it is not shown."""
    from botocore.exceptions import ProxyConnectionError, SSLError

    cause = error.kwargs.get("error")
    proxies = " and ".join(proxy_variables()) or "the proxy"
    if isinstance(error, ProxyConnectionError):
        return Unavailable(f"{uri}: the proxy does not answer. Check {proxies}.")
    if isinstance(error, SSLError) and re.search(r"CERTIFICATE|\[Errno", str(cause)):  # unknown, or no file with them
        what = f"no TLS connection for {uri}: {one_line(str(cause), 300)}"
        return UserError(what, where=where, fix="Set AWS_CA_BUNDLE to a file with the certificates of its authority.")
    if not isinstance(cause, ValueError):
        return _no_answer(error, uri)
    if "header" in str(cause):
        what = "the AWS credentials have a character that HTTP does not allow, such as a line break"
        fix = "Check AWS_ACCESS_KEY_ID and AWS_SESSION_TOKEN."
    else:
        what, fix = "the URL of the proxy is not valid", f"Check {proxies}."
    return UserError(f"no request for {uri} can be sent: {what}", where=where, fix=fix)


def _no_answer(error: Exception, uri: str) -> Unavailable:
    return Unavailable(f"{uri}: S3 does not answer: {one_line(without_passwords(str(error)), 300)}. Check the network.")
