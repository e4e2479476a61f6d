"""Pin the run's sources: Hub revisions to commits, files and S3 objects to digests.

A source is resolved once and recorded in resolved.json, so that a rerun of the same config reads the same data even if
`main` has moved. A local file is compared on every run: its digest is recomputed if its size or time has changed.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from genvalues.common import files
from genvalues.common.errors import UserError
from genvalues.settings.datasets import is_file
from llama_lora.config import Dataset, Model, RunConfig
from llama_lora.data.hub_errors import translate_hub_errors
from llama_lora.data.s3 import is_s3, s3_client, s3_parts, translate_s3_errors
from llama_lora.paths import Paths

# Files of a model folder or repository that are not copied. Weights in other formats (such as Meta's consolidated.pth)
# would double the download and are never read. In fnmatch and in the Hub's client, * matches slashes too.
IGNORED_FILES = [
    *("original/*", "onnx/*", ".git*", ".cache/*", "*.md"),
    *("*.pth", "*.pt", "*.bin", "*.gguf", "*.h5", "*.msgpack", "*.onnx"),
]


@dataclass(frozen=True)
class Source:
    """A pinned source: ``revision`` is a commit (Hub), an ETag (S3) or a SHA-256 (file or folder)."""

    name: str
    revision: str


@dataclass(frozen=True)
class ResolvedSources:
    """The pinned base model and dataset."""

    model: Source
    dataset: Source

    def identity(self) -> dict[str, str]:
        """The part that goes into a fingerprint: the content of a source, not its path."""
        return {"model": self.model.revision, "dataset": self.dataset.revision}


def known_sources(config: RunConfig, paths: Paths) -> ResolvedSources | None:
    """Return the sources without network access; None if one is not resolved yet, or is a file that does not exist."""
    recorded = _recorded(paths)
    model = _known_model(config.model, recorded)
    dataset = _known_dataset(config.dataset, recorded)
    return ResolvedSources(_source(model), _source(dataset)) if model and dataset else None


def resolve_sources(config: RunConfig, paths: Paths) -> ResolvedSources:
    """Pin the model and the dataset, querying the Hub or S3 only if they are not recorded, and record them.

    Raises UserError if one does not exist or is not readable.
    """
    recorded = _recorded(paths)
    model = _known_model(config.model, recorded) or _look_up_model(config.model)
    dataset = _known_dataset(config.dataset, recorded) or _look_up_dataset(config.dataset)
    if {"model": model, "dataset": dataset} != recorded:
        files.write_json(paths.resolved, {"model": model, "dataset": dataset})
    return ResolvedSources(_source(model), _source(dataset))


def snapshot_files(folder: Path) -> dict[str, Path]:
    """The files of a model folder that are copied to the workspace, by relative name."""
    named = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
    return {name: file for name, file in named.items() if not any(fnmatch(name, pattern) for pattern in IGNORED_FILES)}


def _recorded(paths: Paths) -> dict[str, Any]:
    try:
        recorded: dict[str, Any] = json.loads(paths.resolved.read_text(encoding="utf-8"))
        return recorded
    except (OSError, ValueError):
        return {}


def _source(entry: dict[str, Any]) -> Source:
    return Source(entry["name"], entry["revision"])


def _model_settings(model: Model) -> dict[str, str]:
    return {"id": model.id, "revision": model.revision, "path": model.path}


def _dataset_settings(dataset: Dataset) -> dict[str, str]:
    return {"source": dataset.source, "config": dataset.config, "revision": dataset.revision}


def _known_model(model: Model, recorded: dict[str, Any]) -> dict[str, Any] | None:
    return _known(model.path, recorded.get("model"), _model_settings(model))


def _known_dataset(dataset: Dataset, recorded: dict[str, Any]) -> dict[str, Any] | None:
    path = dataset.source if is_file(dataset.source) else ""
    return _known(path, recorded.get("dataset"), _dataset_settings(dataset))


def _known(path_text: str, recorded: dict[str, Any] | None, settings: dict[str, str]) -> dict[str, Any] | None:
    """The recorded entry if it is for these settings; a new one if it is for a local file or folder that changed."""
    entry = recorded if recorded and recorded["asked"] == settings else None
    path = Path(path_text)
    if not path_text or not path.exists():
        return entry  # a file that was deleted is in the workspace since it was pinned
    content = _content(path)
    state = {name: [file.stat().st_size, file.stat().st_mtime_ns] for name, file in content.items()}
    if entry and entry["state"] == state:
        return entry
    digest = hashlib.sha256()
    for name, file in content.items():
        digest.update(f"{name} {files.sha256(file)}\n".encode())
    return {
        "asked": settings,
        "name": path.stem if path.is_file() else path.name,
        "revision": digest.hexdigest(),
        "state": state,
    }


def _content(path: Path) -> dict[str, Path]:
    """The files that the digest covers, by relative name. A single file's own name is not covered."""
    if path.is_file():
        return {"": path}
    return snapshot_files(path)


def _look_up_model(model: Model) -> dict[str, Any]:
    if model.path:
        raise UserError(
            f"{model.path} not found",
            where="model.path",
            fix="Write the path of a folder in the Hugging Face format, or of a GGUF file.",
        )
    from huggingface_hub import HfApi

    with translate_hub_errors("model.id", model.id):
        commit = HfApi().model_info(model.id, revision=model.revision or None).sha
    name = model.id.replace("/", "--")
    return {"asked": _model_settings(model), "name": name, "revision": commit, "state": {}}


def _look_up_dataset(dataset: Dataset) -> dict[str, Any]:
    name = re.sub(r"[^\w.-]+", "--", dataset.source)
    return {"asked": _dataset_settings(dataset), "name": name, "revision": _dataset_revision(dataset), "state": {}}


def _dataset_revision(dataset: Dataset) -> str | None:
    if is_s3(dataset.source):
        bucket, key = s3_parts(dataset.source)
        with translate_s3_errors(dataset.source):
            etag: str = s3_client().head_object(Bucket=bucket, Key=key)["ETag"]
            return etag.strip('"')
    if is_file(dataset.source):
        raise UserError(
            f"{dataset.source} not found",
            where="dataset.source",
            fix="Write the path of a file that the tokenize stage can read, a Hub id or an s3:// URI.",
        )
    from huggingface_hub import HfApi

    with translate_hub_errors("dataset.source", dataset.source, dataset=True):
        commit: str | None = HfApi().dataset_info(dataset.source, revision=dataset.revision or None).sha
    return commit
