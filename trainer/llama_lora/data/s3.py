"""S3: the client, the URIs of datasets, and the objects under a prefix."""

from __future__ import annotations

import os
from typing import Any
from urllib.parse import urlsplit

from genvalues.common.errors import UserError
from genvalues.settings.datasets import FILES, before_wildcard, file_format, is_prefix
from llama_lora.data.s3_errors import ENDPOINT, InvalidSettings

ATTEMPTS = 5  # of a request, with pauses between them


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
    return {field(found, "Key"): etag_of(found) for page in pages for found in page.get("Contents", [])}


def etag_of(found: dict[str, Any]) -> str:
    """The ETag of an object."""
    return str(field(found, "ETag")).strip('"')


def field(answer: dict[str, Any], name: str) -> Any:
    """A field of an answer. Raises InvalidSettings without it: another server answers at the endpoint."""
    try:
        return answer[name]
    except KeyError:
        where = os.environ.get(ENDPOINT, "the endpoint")
        raise InvalidSettings(f"{where} is not S3: its answer has no {name}") from None


def s3_client() -> Any:
    """An S3 client with the credentials that boto3 finds: in a pod, those of the service account's role.

    It retries throttling and failing connections.
    """
    import boto3
    from botocore.config import Config

    retries = {"mode": "standard", "max_attempts": ATTEMPTS}
    try:
        return boto3.client("s3", config=Config(retries=retries, connect_timeout=10, read_timeout=60))
    except ValueError as error:
        raise InvalidSettings(str(error)) from None
