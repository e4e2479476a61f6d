"""Dataset files in S3: parse their URIs, and translate S3 errors into errors that say what the user must change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from genvalues.common.errors import UserError
from genvalues.settings.datasets import FILE_SUFFIXES


def is_s3(source: str) -> bool:
    return source.startswith("s3://")


def s3_parts(uri: str) -> tuple[str, str]:
    """Split s3://BUCKET/KEY into bucket and key. Raises UserError if the key is missing or not of a data file."""
    parts = urlsplit(uri)
    key = parts.path.lstrip("/")
    if not parts.netloc or not key.endswith(FILE_SUFFIXES):
        raise UserError(
            f"{uri} is not the URI of a data file",
            where="dataset.source",
            fix=f"Write s3://BUCKET/KEY with a key that ends in {' '.join(FILE_SUFFIXES)}.",
        )
    return parts.netloc, key


def s3_client() -> Any:
    """An S3 client with the credentials that boto3 finds: in a pod, those of the service account's role."""
    import boto3

    return boto3.client("s3")


@contextmanager
def translate_s3_errors(uri: str) -> Iterator[None]:
    """Within the block, S3 errors that the user must fix become UserErrors. Throttling and network errors pass."""
    from botocore.exceptions import ClientError, NoCredentialsError, ParamValidationError

    try:
        yield
    except NoCredentialsError:
        raise UserError(
            f"no AWS credentials to read {uri}",
            where="dataset.source",
            fix="Give tokenize's service account a role with read access to it.",
        ) from None
    except ParamValidationError:
        raise UserError(f"invalid S3 URI {uri}", where="dataset.source", fix="Write s3://BUCKET/KEY.") from None
    except ClientError as error:
        code = error.response["Error"]["Code"]
        if code in ("412", "PreconditionFailed"):
            raise UserError(
                f"{uri} has been replaced since this run first read it",
                where="dataset.source",
                fix="Delete the run's resolved.json to use the new object, or restore the old one.",
            ) from None
        if code in ("404", "NoSuchKey", "NoSuchBucket", "403", "AccessDenied"):
            raise UserError(
                f"S3 returns {code} for {uri}",
                where="dataset.source",
                fix="Check the bucket, the key and the role's s3:GetObject permission.",
            ) from None
        raise
