"""Pin the run's sources: Hub revisions to commits, files and S3 objects to digests.

A source is resolved once and recorded in resolved.json, so that a rerun of the same config reads the same data even if
`main` has moved. A local file is compared on every run: its digest is recomputed if its size or time has changed.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from genvalues.common import files
from genvalues.common.errors import UserError
from genvalues.common.json_files import InvalidJson, JsonNotFound, as_record, read_object
from genvalues.common.text import one_line
from genvalues.settings.dataset_files import exists_here, files_of, s3_keys
from genvalues.settings.datasets import FILES, FORMATS, is_prefix, on_s3
from llama_lora.config import Model, RunConfig
from llama_lora.data.hub_errors import translate_hub_errors
from llama_lora.data.parts import Part, held_out_part, training_parts
from llama_lora.data.s3 import etag_of, list_keys, s3_client, s3_parts
from llama_lora.data.s3_errors import translate_s3_errors
from llama_lora.limits import limited
from llama_lora.model_files import base_files
from llama_lora.paths import Paths

log = logging.getLogger(__name__)


# What to do about errors in listing and reading the files of a dataset.
LISTING_FIXES = {
    errno.EACCES: "Check its permissions.",
    errno.EPERM: "Check its permissions.",
    errno.ENAMETOOLONG: "Write the path of a file or folder.",
    errno.ENOENT: "Name a folder in which no files disappear.",
}


# In the name of a folder of the workspace.
_Component = Annotated[str, Field(pattern=r"^[^/\x00]*$")]


@dataclass(frozen=True)
class _Entry:
    """An entry of resolved.json. ``asked``: the settings of the source. ``state``: size and time of each local file."""

    asked: dict[str, str]
    name: _Component
    revision: _Component
    state: dict[str, list[int]]
    objects: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Recorded:
    sources: dict[str, _Entry]


@dataclass(frozen=True)
class Source:
    """A pinned source: ``revision`` is a commit (Hub), an ETag (S3) or a SHA-256 (file, folder, or several objects).

    ``objects``: of an S3 prefix or glob, the ETag of each key.
    """

    name: str
    revision: str
    objects: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ResolvedSources:
    """The pinned base model and dataset: dataset.source, dataset.additional by name, and dataset.eval if it is set."""

    model: Source
    dataset: Source
    additional: Mapping[str, Source] = field(default_factory=dict)
    held_out: Source | None = None

    def of(self, part: Part) -> Source:
        """The pinned source of a part that is trained on."""
        return self.additional[part.name] if part.name else self.dataset

    def identity(self) -> dict[str, str]:
        """The part that goes into a fingerprint: the content of a source, not its path."""
        others = {f"dataset.additional.{name}": source.revision for name, source in self.additional.items()}
        if self.held_out:
            others["dataset.eval"] = self.held_out.revision
        return {"model": self.model.revision, "dataset": self.dataset.revision, **others}


def known_sources(config: RunConfig, paths: Paths) -> ResolvedSources | None:
    """Return the sources without network access; None if one is not resolved yet, or is a file that does not exist."""
    recorded = _recorded(paths)
    entries = {"model": _known_model(config.model, recorded)}
    for part in _parts(config):
        entries[part.key] = _known_dataset(part, recorded.values())
    known = {key: entry for key, entry in entries.items() if entry}
    return _resolved(known) if known.keys() == entries.keys() else None


def resolve_sources(config: RunConfig, paths: Paths) -> ResolvedSources:
    """Pin the model and the dataset, querying the Hub or S3 only if they are not recorded, and record them.

    Raises UserError if one does not exist or is not readable.
    """
    try:
        recorded = _read_recorded(paths)
    except JsonNotFound:
        recorded = {}
    except InvalidJson as error:
        log.warning(f"{paths.resolved} {error}: the sources are resolved again, a branch to its newest commit")
        recorded = {}
    entries = {"model": _known_model(config.model, recorded) or _look_up_model(config.model)}
    for part in _parts(config):
        entries[part.key] = _known_dataset(part, [*recorded.values(), *entries.values()]) or _look_up_dataset(part)
    if entries != recorded:
        files.write_json(paths.resolved, entries)
    return _resolved(entries)


def dataset_sources(config: RunConfig) -> ResolvedSources:
    """Pin the datasets alone, and record nothing. Raises UserError if one does not exist or is not readable."""
    entries: dict[str, dict[str, Any]] = {"model": {"name": "", "revision": ""}}
    for part in _parts(config):
        entries[part.key] = _known_dataset(part, []) or _look_up_dataset(part)
    return _resolved(entries)


def _parts(config: RunConfig) -> list[Part]:
    held_out = held_out_part(config.dataset)
    return [*training_parts(config.dataset), *([held_out] if held_out else [])]


def _resolved(entries: dict[str, dict[str, Any]]) -> ResolvedSources:
    sources = {
        key: Source(entry["name"], entry["revision"], entry.get("objects", {})) for key, entry in entries.items()
    }
    above = "dataset.additional."
    additional = {key.removeprefix(above): source for key, source in sources.items() if key.startswith(above)}
    return ResolvedSources(sources["model"], sources["dataset"], additional, sources.get("dataset.eval"))


def _recorded(paths: Paths) -> dict[str, Any]:
    """The content of resolved.json; empty if it does not exist or is not valid."""
    try:
        return _read_recorded(paths)
    except InvalidJson:
        return {}


def _read_recorded(paths: Paths) -> dict[str, Any]:
    recorded = read_object(paths.resolved)
    as_record({"sources": recorded}, _Recorded)
    return recorded


def _model_settings(model: Model) -> dict[str, str]:
    return {"id": model.id, "revision": model.revision, "path": model.path}


def _dataset_settings(part: Part) -> dict[str, str]:
    return {"source": part.source, "config": part.config, "revision": part.revision}


def _known_model(model: Model, recorded: dict[str, Any]) -> dict[str, Any] | None:
    path = Path(model.path)
    content = _model_files(path) if model.path and path.exists() else {}
    return _known(path, content, recorded.get("model"), _model_settings(model))


def _known_dataset(part: Part, recorded: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """The entry of a part. Parts of one source, such as two splits of a Hub dataset, are pinned to one commit."""
    settings = _dataset_settings(part)
    entry = next((each for each in recorded if each["asked"] == settings), None)
    where = f"{part.key}.source"
    try:
        with limited("listing its files", part.source, "Name a folder with the data files alone."):
            found = files_of(part.source) if exists_here(part.source) else []
        content = {file.name or _suffix(file.path): file.path for file in found}
        return _known(Path(part.source), content, entry, settings)
    except UserError as error:
        raise UserError(
            f"{one_line(error.where or part.source, 255)} {error.what}", where=where, fix=error.fix
        ) from None
    except OSError as error:
        fix = LISTING_FIXES.get(error.errno or 0)
        if fix is None:
            raise
        name = error.filename or part.source
        shown = one_line(str(name), width=255)
        raise UserError(f"{shown} cannot be read: {error.strerror}", where=where, fix=fix) from None


def _suffix(path: Path) -> str:
    """The name under which the digest covers a single file: empty for the suffixes that release 0.1 knew, whose
    format is in the fingerprint. The same bytes are other rows as .txt.gz than as .jsonl.gz.
    """
    return "" if path.suffix in FORMATS else "".join(path.suffixes[-2:]).lower()


def _known(
    path: Path, content: dict[str, Path], recorded: dict[str, Any] | None, settings: dict[str, str]
) -> dict[str, Any] | None:
    """The recorded entry if it is for these settings; a new one if it is for local files (by name) that changed."""
    entry = recorded if recorded and recorded["asked"] == settings else None
    if not content:
        return entry  # a file that was deleted is in the workspace since it was pinned
    state = {name: [file.stat().st_size, file.stat().st_mtime_ns] for name, file in content.items()}
    if entry and entry["state"] == state:
        return entry
    digest = hashlib.sha256()
    for name, file in content.items():
        digest.update(os.fsencode(f"{name} {files.sha256(file)}\n"))
    return {
        "asked": settings,
        "name": path.stem if path.is_file() else re.sub(r"[^\w.-]+", "-", path.name),
        "revision": digest.hexdigest(),
        "state": state,
    }


def _model_files(path: Path) -> dict[str, Path]:
    """The files that the digest covers, by relative name. A single file's own name is not covered."""
    if path.is_file():
        return {"": path}
    return base_files(path)


def _look_up_model(model: Model) -> dict[str, Any]:
    if model.path:
        raise UserError(
            f"{one_line(model.path, 255)} not found",
            where="model.path",
            fix="Write the path of a folder in the Hugging Face format, or of a GGUF file.",
        )
    from huggingface_hub import HfApi

    with translate_hub_errors("model.id", model.id):
        info = HfApi().model_info(model.id, revision=model.revision or None)
        commit = _commit(info)
    name = model.id.replace("/", "--")
    entry = {"asked": _model_settings(model), "name": name, "revision": commit, "state": {}}
    license_id = info.card_data.get("license") if info.card_data else None  # for the model card
    return entry | ({"license": license_id} if isinstance(license_id, str) else {})


def _look_up_dataset(part: Part) -> dict[str, Any]:
    where = f"{part.key}.source"
    name = re.sub(r"[^\w.-]+", "--", part.source)
    entry = {"asked": _dataset_settings(part), "name": name, "state": {}}
    if on_s3(part.source):
        return {**entry, **_look_up_s3(part.source, where)}
    if exists_here(part.source):
        raise UserError(
            f"{one_line(part.source, 255)} not found",
            where=where,
            fix="Write the path of a file, folder or glob that the tokenize stage can read, a Hub id or an s3:// URI.",
        )
    from huggingface_hub import HfApi

    with translate_hub_errors(where, part.source, dataset=True):
        return {**entry, "revision": _commit(HfApi().dataset_info(part.source, revision=part.revision or None))}


def _look_up_s3(uri: str, where: str) -> dict[str, Any]:
    bucket, key = s3_parts(uri, where)
    with translate_s3_errors(uri, where):
        if not is_prefix(key):
            return {"revision": etag_of(s3_client().head_object(Bucket=bucket, Key=key))}
        listed = list_keys(bucket, key)
    objects = {name: listed[name] for name in s3_keys(key, listed)}
    if not objects:
        raise UserError(
            f"{uri} has no data file among {len(listed)} objects", where=where, fix=f"Check the prefix. {FILES}"
        )
    digest = hashlib.sha256("".join(f"{name} {etag}\n" for name, etag in objects.items()).encode())
    return {"revision": digest.hexdigest(), "objects": objects}


def _commit(info: Any) -> str:
    """The commit of a repository. Raises ValueError if the Hub names none."""
    if not isinstance(info.sha, str) or not re.fullmatch("[0-9a-f]+", info.sha):
        raise ValueError(f"{one_line(str(info.sha))} is not a commit")
    return info.sha
