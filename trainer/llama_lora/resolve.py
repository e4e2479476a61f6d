"""Pin what the run reads from outside the workspace: hub revisions to commits, files and S3 objects to digests.

Resolved once, kept in resolved.json, so that a rerun of the same config reads the same bytes though `main` has moved.
A local file is looked at again every time: its digest is computed anew only when its size or time has changed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from genvalues.common import files
from genvalues.common.errors import UserError
from llama_lora import hub
from llama_lora.config import Dataset, Model, RunConfig
from llama_lora.paths import Paths

# Of a model's folder or repository. Weights in other formats (Meta's own consolidated.pth among them) would double the
# download and are never read. As fnmatch and the hub's client have it, * takes slashes too.
NOT_TAKEN = [
    *("original/*", "onnx/*", ".git*", ".cache/*", "*.md"),
    *("*.pth", "*.pt", "*.bin", "*.gguf", "*.h5", "*.msgpack", "*.onnx"),
]
DATA_FILES = (".jsonl", ".json", ".csv", ".parquet", ".txt")


@dataclass(frozen=True)
class Source:
    """One pinned thing: ``revision`` is a commit (hub), an ETag (S3) or a SHA-256 (file or folder)."""

    name: str
    revision: str


@dataclass(frozen=True)
class Sources:
    """The base model and the dataset, pinned."""

    model: Source
    dataset: Source

    def identity(self) -> dict[str, str]:
        """What goes into a fingerprint. A file's place is not in it, its content is."""
        return {"model": self.model.revision, "dataset": self.dataset.revision}


def is_file(source: str) -> bool:
    """Whether a dataset source names a file of this machine rather than a hub dataset or S3 object."""
    return not is_s3(source) and source.endswith(DATA_FILES)


def is_s3(source: str) -> bool:
    return source.startswith("s3://")


def kept_sources(config: RunConfig, paths: Paths) -> Sources | None:
    """What is known without asking anybody outside: None where the hub, S3 or a missing file would have to be asked."""
    kept = _kept(paths)
    model = _local(config.model.path, kept.get("model"), _asked_model(config.model))
    source = config.dataset.source
    dataset = _local(source if is_file(source) else "", kept.get("dataset"), _asked_dataset(config.dataset))
    return Sources(_source(model), _source(dataset)) if model and dataset else None


def resolve_sources(config: RunConfig, paths: Paths) -> Sources:
    """Pin model and dataset, asking the hub or S3 only for what was not pinned before; keep the answer.

    Raises UserError where they don't exist or may not be read.
    """
    kept = _kept(paths)
    source = config.dataset.source
    model = _local(config.model.path, kept.get("model"), _asked_model(config.model)) or _ask_model(config.model)
    dataset = _local(source if is_file(source) else "", kept.get("dataset"), _asked_dataset(config.dataset))
    dataset = dataset or _ask_dataset(config.dataset)
    if {"model": model, "dataset": dataset} != kept:
        files.write_json(paths.resolved, {"model": model, "dataset": dataset})
    return Sources(_source(model), _source(dataset))


def _kept(paths: Paths) -> dict[str, Any]:
    try:
        kept: dict[str, Any] = json.loads(paths.resolved.read_text(encoding="utf-8"))
        return kept
    except (OSError, ValueError):
        return {}


def _source(entry: dict[str, Any]) -> Source:
    return Source(entry["name"], entry["revision"])


def _asked_model(model: Model) -> dict[str, str]:
    return {"id": model.id, "revision": model.revision, "path": model.path}


def _asked_dataset(dataset: Dataset) -> dict[str, str]:
    return {"source": dataset.source, "config": dataset.config, "revision": dataset.revision}


def _local(place: str, kept: dict[str, Any] | None, asked: dict[str, str]) -> dict[str, Any] | None:
    """The entry as kept when it still holds; computed anew when it is a file or folder that has changed."""
    entry = kept if kept and kept["asked"] == asked else None
    path = Path(place)
    if not place or not path.exists():
        return entry  # a file that is gone was taken into the workspace when it was pinned
    state = {name: [file.stat().st_size, file.stat().st_mtime_ns] for name, file in _content(path).items()}
    if entry and entry["state"] == state:
        return entry
    digest = hashlib.sha256()
    for name, file in _content(path).items():
        digest.update(f"{name} {files.sha256(file)}\n".encode())
    return {
        "asked": asked,
        "name": path.stem if path.is_file() else path.name,
        "revision": digest.hexdigest(),
        "state": state,
    }


def _content(path: Path) -> dict[str, Path]:
    """The files that count, by their name in ``path``; a file's own name does not."""
    if path.is_file():
        return {"": path}
    return taken_files(path)


def taken_files(folder: Path) -> dict[str, Path]:
    """The files of a model folder that are taken into the workspace, by their relative names."""
    named = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
    return {name: file for name, file in named.items() if not any(fnmatch(name, pattern) for pattern in NOT_TAKEN)}


def _ask_model(model: Model) -> dict[str, Any]:
    asked = _asked_model(model)
    if model.path:
        raise UserError(
            f"{model.path} does not exist here",
            where="model.path",
            fix="Write a folder in the Hugging Face format, or a GGUF file.",
        )
    from huggingface_hub import HfApi

    with hub.translate_errors("model.id", model.id):
        commit = HfApi().model_info(model.id, revision=model.revision or None).sha
    return {"asked": asked, "name": model.id.replace("/", "--"), "revision": commit, "state": {}}


def _ask_dataset(dataset: Dataset) -> dict[str, Any]:
    asked = _asked_dataset(dataset)
    name = re.sub(r"[^\w.-]+", "--", dataset.source)
    if is_s3(dataset.source):
        return {"asked": asked, "name": name, "revision": _ask_s3(dataset.source), "state": {}}
    if is_file(dataset.source):
        raise UserError(
            f"{dataset.source} does not exist here",
            where="dataset.source",
            fix="Write the path of a file that the tokenize stage can see, a hub id or an s3:// URI.",
        )
    from huggingface_hub import HfApi

    with hub.translate_errors("dataset.source", dataset.source, dataset=True):
        commit = HfApi().dataset_info(dataset.source, revision=dataset.revision or None).sha
    return {"asked": asked, "name": name, "revision": commit, "state": {}}


def _ask_s3(uri: str) -> str:
    bucket, key = s3_parts(uri)
    with s3_told(uri):
        return s3_client().head_object(Bucket=bucket, Key=key)["ETag"].strip('"')


def s3_client() -> Any:
    """S3, by the credentials boto3 finds: in a pod, those of the service account's role."""
    import boto3

    return boto3.client("s3")


@contextmanager
def s3_told(uri: str) -> Iterator[None]:
    """Around a call to S3: its refusals become UserErrors. Throttling and network trouble are let through: retried."""
    from botocore.exceptions import ClientError, NoCredentialsError, ParamValidationError

    try:
        yield
    except NoCredentialsError:
        raise UserError(
            f"no AWS credentials to read {uri}",
            where="dataset.source",
            fix="Give tokenize's service account a role that may read it.",
        ) from None
    except ParamValidationError:
        raise UserError(f"{uri} is no S3 address", where="dataset.source", fix="Write s3://BUCKET/KEY.") from None
    except ClientError as error:
        code = error.response["Error"]["Code"]
        if code in ("412", "PreconditionFailed"):
            raise UserError(
                f"{uri} has been replaced since this run first read it",
                where="dataset.source",
                fix="Remove the run's resolved.json to take the new one, or put the old one back.",
            ) from None
        if code in ("404", "NoSuchKey", "NoSuchBucket", "403", "AccessDenied"):
            raise UserError(
                f"S3 answers {code} for {uri}",
                where="dataset.source",
                fix="Check the bucket, the key and the role's s3:GetObject.",
            ) from None
        raise


def s3_parts(uri: str) -> tuple[str, str]:
    """s3://BUCKET/KEY -> BUCKET, KEY. Raises UserError where the key is missing or no data file."""
    parts = urlsplit(uri)
    key = parts.path.lstrip("/")
    if not parts.netloc or not key.endswith(DATA_FILES):
        raise UserError(
            f"{uri} names no data file",
            where="dataset.source",
            fix=f"Write s3://BUCKET/KEY with a key that ends in {' '.join(DATA_FILES)}.",
        )
    return parts.netloc, key
