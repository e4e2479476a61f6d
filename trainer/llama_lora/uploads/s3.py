"""Upload files to S3: in parts with SHA-256 checksums, which S3 verifies; resumable; the manifest last.

S3 shows an object only once its upload is complete, and it refuses a part or an object whose checksum differs:
https://docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity-upload.html. For an object in parts
the checksum is that of the parts' digests. The digest of the whole file is in the object's metadata, under ``sha256``.
"""

from __future__ import annotations

import base64
import hashlib
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from genvalues.common import files as atomic
from genvalues.common.errors import Unavailable, UserError
from genvalues.common.json_files import InvalidJson, read_object
from llama_lora.data.s3 import field, s3_client
from llama_lora.data.s3_errors import Use, translate_s3_errors
from llama_lora.progress import StageProgress
from llama_lora.uploads import File, published_files

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
KEY = "publish.s3.uri"
PART_BYTES = 64 << 20  # S3 takes at most 10,000 parts, so files of up to 640 GB
MOST_MANIFEST = 64 << 20
THREADS = 4  # parts at once: 256 MiB of memory
PART_KEYS = {"PartNumber", "ETag", "ChecksumSHA256"}
ACTIONS = (
    "s3:GetObject, s3:PutObject, s3:DeleteObject, s3:AbortMultipartUpload, s3:ListMultipartUploadParts, and "
    "s3:ListBucket on the bucket"
)
WRITE = Use(
    stage="publish",
    verb="write to",
    form="s3://BUCKET/PREFIX",
    role="Give the publish stage's service account a role (serviceAccount.publishAnnotations).",
    denied=f"Allow {ACTIONS} for the role of the publish stage (serviceAccount.publishAnnotations).",
    missing="Check the bucket's name.",
)


def upload(uri: str, run: str, files: Sequence[File], manifest: bytes, uploads: Path) -> None:
    """Make the objects under ``uri`` those of ``files``, and ``manifest`` the last of them.

    ``uploads`` records the uploads in parts that have begun, for a later call to continue. Raises UserError for what
    the user must change, Unavailable for what a retry may resolve.
    """
    with translate_s3_errors(uri, KEY, WRITE):
        S3Upload(uri, run, uploads).put_all(files, manifest)


class S3Upload:
    def __init__(self, uri: str, run: str, uploads: Path, client: Any = None) -> None:
        parts = urlsplit(uri)
        self.uri = uri.rstrip("/")
        self.run = run
        self.bucket, self.prefix = parts.netloc, parts.path.strip("/")
        self.client = client or s3_client()
        self.begun = Begun(uploads)

    def put_all(self, files: Sequence[File], manifest: bytes) -> None:
        before = self.read_manifest()
        missing = [file for file in files if not self.has(file)]
        if before == manifest and not missing:
            log.info(f"{self.uri}: {len(files)} files are there already")
            return
        if before is not None and missing:  # it lists what is about to be replaced
            self.client.delete_object(Bucket=self.bucket, Key=self.key(MANIFEST))
        with StageProgress("MB", sum(file.bytes for file in missing) // 10**6) as progress:
            for file in missing:
                self.put(file, progress)
        for file in missing:
            if not self.has(file):
                raise Unavailable(f"{self.uri}/{file.name}: S3 does not return what was uploaded.")
        self.put_bytes(MANIFEST, manifest, hashlib.sha256(manifest).hexdigest())
        log.info(f"{self.uri}: uploaded {len(missing)} files, {len(files) - len(missing)} were there already")

    def key(self, name: str) -> str:
        return f"{self.prefix}/{name}"

    def read_manifest(self) -> bytes | None:
        """The manifest that is there; None if there is none. Raises UserError if it is not one of this run."""
        try:
            found = self.client.get_object(Bucket=self.bucket, Key=self.key(MANIFEST))
        except self.client.exceptions.ClientError as error:
            if code_of(error) in ("NoSuchKey", "404"):
                return None
            raise
        body = found["Body"]
        content: bytes = body.read(MOST_MANIFEST) + body.read(1)  # the second read fails if the first was cut off
        published_files(content, self.run, KEY, self.uri)
        return content

    def has(self, file: File) -> bool:
        """Whether the object is there with the file's size and digest."""
        try:
            found = self.client.head_object(Bucket=self.bucket, Key=self.key(file.name), ChecksumMode="ENABLED")
        except self.client.exceptions.ClientError as error:
            if code_of(error) in ("404", "NoSuchKey", "NotFound"):
                return False
            raise
        same = field(found, "ContentLength") == file.bytes and found.get("Metadata", {}).get("sha256") == file.sha256
        whole = found.get("ChecksumSHA256", "")
        return same and (("-" in whole) or whole == in_base64(bytes.fromhex(file.sha256)))

    def put(self, file: File, progress: StageProgress) -> None:
        if file.bytes > PART_BYTES:
            self.put_in_parts(file, progress)
            return
        with file.opened() as source:
            content = source.read(PART_BYTES + 1)
        file.check(len(content), hashlib.sha256(content).hexdigest())
        self.put_bytes(file.name, content, file.sha256)
        progress.advance(len(content) // 10**6)

    def put_bytes(self, name: str, content: bytes, sha256: str) -> None:
        self.client.put_object(
            Bucket=self.bucket,
            Key=self.key(name),
            Body=content,
            ChecksumSHA256=in_base64(bytes.fromhex(sha256)),
            Metadata={"sha256": sha256},
        )

    def put_in_parts(self, file: File, progress: StageProgress) -> None:
        """Upload a large file, or the parts of it that are missing. The object appears when all parts are there.

        The file is read once; if it is not as its manifest says, the upload is aborted.
        """
        key = self.key(file.name)
        upload_id, there = self.resume(file)
        digest, size = hashlib.sha256(), 0
        digests: list[bytes] = []
        parts: list[dict[str, Any]] = []
        with file.opened() as source, ThreadPoolExecutor(THREADS) as pool:
            running: deque[Future[dict[str, Any]]] = deque()
            try:
                while piece := source.read(PART_BYTES):
                    number = len(digests) + 1
                    digest.update(piece)
                    size += len(piece)
                    digests.append(hashlib.sha256(piece).digest())
                    checksum = in_base64(digests[-1])
                    known = there.get(number)
                    if known and known["ChecksumSHA256"] == checksum:
                        parts.append(known)
                        progress.advance(len(piece) // 10**6)
                        continue
                    running.append(pool.submit(self.put_part, key, upload_id, number, piece, checksum))
                    if len(running) >= THREADS:
                        parts.append(running.popleft().result())
                        progress.advance(PART_BYTES // 10**6)
                parts += [each.result() for each in running]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        try:
            file.check(size, digest.hexdigest())
        except UserError:
            self.abort(file.name, upload_id)
            raise
        whole = f"{in_base64(hashlib.sha256(b''.join(digests)).digest())}-{len(digests)}"
        answer = self.client.complete_multipart_upload(
            Bucket=self.bucket,
            Key=key,
            UploadId=upload_id,
            MultipartUpload={"Parts": sorted(parts, key=lambda part: int(part["PartNumber"]))},
        )
        if answer.get("ChecksumSHA256") != whole:
            self.client.delete_object(Bucket=self.bucket, Key=key)
            raise Unavailable(f"{self.uri}/{file.name}: S3 has another checksum than what was sent.")
        self.begun.forget(key)

    def put_part(self, key: str, upload_id: str, number: int, piece: bytes, checksum: str) -> dict[str, Any]:
        answer = self.client.upload_part(
            Bucket=self.bucket, Key=key, UploadId=upload_id, PartNumber=number, Body=piece, ChecksumSHA256=checksum
        )
        return {"PartNumber": number, "ETag": field(answer, "ETag"), "ChecksumSHA256": checksum}

    def resume(self, file: File) -> tuple[str, dict[int, dict[str, Any]]]:
        """The upload of this file that has begun, with its parts by number, or a new one. One of other bytes ends."""
        key = self.key(file.name)
        if begun := self.begun.get(key):
            *of, upload_id = begun
            if of != [file.sha256, PART_BYTES]:
                self.abort(file.name, upload_id)
            else:
                try:
                    return upload_id, dict(self.parts(key, upload_id))
                except self.client.exceptions.ClientError as error:
                    if code_of(error) not in ("NoSuchUpload", "404"):
                        raise
        made = self.client.create_multipart_upload(
            Bucket=self.bucket, Key=key, ChecksumAlgorithm="SHA256", Metadata={"sha256": file.sha256}
        )
        upload_id = field(made, "UploadId")
        self.begun.record(key, file.sha256, PART_BYTES, upload_id)
        return upload_id, {}

    def parts(self, key: str, upload_id: str) -> Iterator[tuple[int, dict[str, Any]]]:
        """The parts that S3 has, by number, as complete_multipart_upload takes them."""
        pages = self.client.get_paginator("list_parts").paginate(Bucket=self.bucket, Key=key, UploadId=upload_id)
        for page in pages:
            for part in page.get("Parts", []):
                if part.keys() >= PART_KEYS:
                    yield part["PartNumber"], {name: part[name] for name in PART_KEYS}

    def abort(self, name: str, upload_id: str) -> None:
        try:
            self.client.abort_multipart_upload(Bucket=self.bucket, Key=self.key(name), UploadId=upload_id)
        except self.client.exceptions.ClientError as error:
            if code_of(error) not in ("NoSuchUpload", "404"):
                raise
        self.begun.forget(self.key(name))


class Begun:
    """The uploads in parts that have begun, in a file on the volume: a killed stage continues them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._content: dict[str, Any] = read_object(path)
        except InvalidJson:
            self._content = {}

    def get(self, key: str) -> tuple[str, int, str] | None:
        """The file's digest, the size of its parts, and the id of the upload."""
        try:
            one = self._content[key]
            return str(one["sha256"]), int(one["partBytes"]), str(one["uploadId"])
        except (KeyError, TypeError, ValueError):
            return None

    def record(self, key: str, sha256: str, part_bytes: int, upload_id: str) -> None:
        self._content[key] = {"sha256": sha256, "partBytes": part_bytes, "uploadId": upload_id}
        atomic.write_json(self.path, self._content)

    def forget(self, key: str) -> None:
        if self._content.pop(key, None):
            atomic.write_json(self.path, self._content)


def in_base64(digest: bytes) -> str:
    return base64.b64encode(digest).decode()


def code_of(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))
