"""Datasets in S3: parse their URIs, list prefixes, and translate S3 errors into errors that say what the user must
change.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from genvalues.common.errors import UserError
from genvalues.settings.datasets import FILES, before_wildcard, file_format, is_prefix


def s3_parts(uri: str, where: str = "dataset.source") -> tuple[str, str]:
    """Split s3://BUCKET/KEY into bucket and key. Raises UserError if it cannot be a data file, a prefix or a glob."""
    parts = urlsplit(uri, allow_fragments=False)
    key = (parts.path + (f"?{parts.query}" if parts.query else "")).lstrip("/")
    if not parts.netloc or not key or not (file_format(key) or is_prefix(key)):
        raise UserError(
            f"{uri} is not the URI of data in S3",
            where=where,
            fix=f"Write s3://BUCKET/KEY of a file, s3://BUCKET/PREFIX/ or s3://BUCKET/PREFIX/*.jsonl. {FILES}",
        )
    return parts.netloc, key


def list_keys(bucket: str, key: str) -> dict[str, str]:
    """The ETag of each object under a prefix, or under the part of a glob before its first wildcard, by key."""
    pages = s3_client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=before_wildcard(key))
    return {found["Key"]: found["ETag"].strip('"') for page in pages for found in page.get("Contents", [])}


def s3_client() -> Any:
    """An S3 client with the credentials that boto3 finds: in a pod, those of the service account's role."""
    import boto3

    return boto3.client("s3")


@contextmanager
def translate_s3_errors(uri: str, where: str = "dataset.source") -> Iterator[None]:
    """Within the block, S3 errors that the user must fix become UserErrors. Throttling and network errors pass."""
    from botocore.exceptions import ClientError, NoCredentialsError, ParamValidationError

    try:
        yield
    except NoCredentialsError:
        raise UserError(
            f"no AWS credentials to read {uri}",
            where=where,
            fix="Give tokenize's service account a role with read access to it.",
        ) from None
    except ParamValidationError:
        raise UserError(f"invalid S3 URI {uri}", where=where, fix="Write s3://BUCKET/KEY.") from None
    except ClientError as error:
        code = error.response["Error"]["Code"]
        if code in ("412", "PreconditionFailed"):
            raise UserError(
                f"{uri} has been replaced since this run first read it",
                where=where,
                fix="Delete the run's resolved.json to use the new object, or restore the old one.",
            ) from None
        if code in ("404", "NoSuchKey", "NoSuchBucket", "403", "AccessDenied"):
            raise UserError(
                f"S3 returns {code} for {uri}",
                where=where,
                fix="Check the bucket, the key and the role's s3:GetObject permission (for a prefix s3:ListBucket).",
            ) from None
        raise
