"""What all stages share: the fingerprint of their inputs, the manifest of their outputs, and skipping.

A stage is done when its manifest has the fingerprint of the current config and its outputs exist. The manifest is
written last, so that a stage that was killed is not done.

This module does not import torch: `llama-lora fingerprint` answers in about a second.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.metadata
import json
import logging
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml

from genvalues.common import files
from genvalues.common.errors import UserError, UserErrors
from llama_lora import stages
from llama_lora.config import RunConfig
from llama_lora.data import resolve
from llama_lora.paths import Paths

log = logging.getLogger(__name__)

MISSING = "not found"
LIBRARIES = ("llama-lora", "torch", "transformers", "peft", "accelerate", "datasets", "optimum-neuron")


@dataclass(frozen=True)
class Declaration:
    """The ``STAGE`` of a stage's module.

    - ``version``: raised by hand when the same inputs give a different output
    - ``reads``: the slice of the config that the output depends on
    - ``after``: the stages whose output it reads
    - ``needs``: stages that must be done first, but whose output it does not read
    - ``run``: does the work of the stage in a run
    - ``tool``: does the same on folders, outside a run; its parameters become options of the command
    - ``worker``: what each worker of a distributed stage runs, with its backend
    - ``reads_sources``: whether it reads the model and the dataset from outside the workspace
    """

    name: str
    version: int
    summary: str
    reads: Callable[[RunConfig], Mapping[str, Any]]
    run: Callable[[Stage], None]
    after: Sequence[str] = ()
    needs: Sequence[str] = ()
    tool: Callable[..., None] | None = None
    worker: Callable[[Stage, Any], None] | None = None  # Any: backends.base knows Stage
    reads_sources: bool = False


def names() -> list[str]:
    """List the stages: the modules of ``llama_lora.stages``."""
    return sorted(module.name for module in pkgutil.iter_modules(stages.__path__))


def declaration(name: str) -> Declaration:
    """Import a stage's module and return its ``STAGE``."""
    found: Declaration = importlib.import_module(f"{stages.__name__}.{name}").STAGE
    return found


@dataclass
class Manifest:
    """The content of stages/STAGE.json. ``outputs`` maps a path in the workspace to its bytes and sha256."""

    stage: str
    fingerprint: str
    started: str
    finished: str
    outputs: dict[str, dict[str, Any]]
    versions: dict[str, str]
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Manifest | None:
        """Read a manifest; None if the file does not exist or is not a valid manifest."""
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None


class Stage:
    """One stage of one run: its fingerprint, whether it is done, its outputs, and facts for later stages."""

    def __init__(
        self, name: str, config: RunConfig, paths: Paths, sources: resolve.ResolvedSources | None = None
    ) -> None:
        self.name = name
        self.config = config
        self.paths = paths
        self.sources = sources or resolve.known_sources(config, paths)
        self.facts: dict[str, Any] = {}
        self._declaration = declaration(name)
        self._started = now()

    @property
    def fingerprint(self) -> str | None:
        """The hex SHA-256 of the stage's inputs; None while a source it depends on is not resolved.

        The image, the number of nodes and processes, logging and how often to save are not part of it.
        """
        if self._declaration.reads_sources and self.sources is None:
            return None
        upstream = {name: self._other(name).fingerprint for name in self._declaration.after}
        if None in upstream.values():
            return None
        read = {
            "stage": self.name,
            "version": self._declaration.version,
            "config": self._declaration.reads(self.config),
            "sources": self.sources.identity() if self._declaration.reads_sources and self.sources else None,
            "after": upstream,
        }
        return hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()

    @property
    def manifest(self) -> Manifest | None:
        return Manifest.read(self.paths.manifest(self.name))

    def is_done(self) -> bool:
        """Whether the manifest matches the current config and every output exists with its recorded size."""
        manifest, fingerprint = self.manifest, self.fingerprint
        if manifest is None or fingerprint is None or manifest.fingerprint != fingerprint:
            return False
        return all(_size(self.paths.workspace / name) == output["bytes"] for name, output in manifest.outputs.items())

    def upstream(self, name: str) -> Manifest:
        """Return the manifest of an earlier stage. Raises UserError if that stage is not done."""
        other = self._other(name)
        manifest = other.manifest
        if manifest is None or not other.is_done():
            raise UserError(
                f"{self.name} needs {name}, whose manifest {_problem(manifest)}",
                where=str(self.paths.manifest(name)),
                fix=f"Run `llama-lora {name} --config ...` first.",
            )
        return manifest

    def check_upstream(self) -> None:
        """Raise UserError for the first required stage that is not done."""
        for name in [*self._declaration.after, *self._declaration.needs]:
            self.upstream(name)

    @contextlib.contextmanager
    def output(self, path: Path, *, beside: Sequence[Path] = ()) -> Iterator[Path]:
        """Yield a temporary folder; if the block succeeds, rename it to ``path`` and write the manifest.

        ``beside`` lists files outside ``path`` that the block writes and that are outputs too.
        """
        self.paths.manifest(self.name).unlink(missing_ok=True)  # its outputs are about to be replaced
        with files.whole_folder(path) as partial:
            yield partial
        self.finish([path, *beside])

    def finish(self, outputs: Sequence[Path]) -> None:
        """Write the manifest for ``outputs``, which are files or folders."""
        fingerprint = self.fingerprint
        assert fingerprint is not None, "run_stage resolves the sources first"
        manifest = Manifest(
            stage=self.name,
            fingerprint=fingerprint,
            started=self._started,
            finished=now(),
            outputs={
                str(file.relative_to(self.paths.workspace)): {
                    "bytes": file.stat().st_size,
                    "sha256": files.sha256(file),
                }
                for output in outputs
                for file in _files_in(output)
            },
            versions=installed_versions(LIBRARIES),
            facts=self.facts,
        )
        files.write_json(self.paths.manifest(self.name), manifest.__dict__)

    def _other(self, name: str) -> Stage:
        return Stage(name, self.config, self.paths, self.sources)


def run_stage(name: str, config: RunConfig, paths: Paths) -> None:
    """Run a stage, or skip it if it is done."""
    stage = Stage(name, config, paths)
    if stage._declaration.reads_sources:
        stage.sources = resolve.resolve_sources(config, paths)
    if stage.is_done():
        log.info(f"{name}: nothing changed, skipped ({stage.paths.manifest(name)})")  # `genvalues status` reads this
        return
    log.debug(f"{name}: fingerprint {stage.fingerprint}")
    stage.check_upstream()
    files.write_text(paths.config, yaml.safe_dump(config.as_keys(), sort_keys=False))
    stage._declaration.run(stage)


def verify_outputs(name: str, config: RunConfig, paths: Paths) -> str:
    """Compare the size and digest of every output with the manifest, and return a summary. Writes nothing.

    Raises UserErrors with one line per file that differs. ``is_done`` compares sizes only, to be fast: a file with
    the right size and wrong content must be deleted before the stage writes it again.
    """
    stage = Stage(name, config, paths)
    manifest = stage.manifest
    rerun = f"`helm upgrade`, or `llama-lora {name} --config ...`"
    if manifest is None or manifest.fingerprint != stage.fingerprint:
        raise UserError(
            f"the manifest of {name} {_problem(manifest)}",
            where=str(paths.manifest(name)),
            fix=f"Run the stage first: {rerun}.",
        )
    mistakes = []
    for output, written in manifest.outputs.items():
        file = paths.workspace / output
        if difference := _difference(file, written["bytes"], written["sha256"]):
            fix = "Run the stage again" if difference == MISSING else "Delete the file and run the stage again"
            mistakes.append(UserError(difference, where=str(file), fix=f"{fix}: {rerun}."))
    if mistakes:
        raise UserErrors(mistakes)
    megabytes = sum(written["bytes"] for written in manifest.outputs.values()) / 1e6
    return f"{name}: {len(manifest.outputs)} files, {megabytes:.3g} MB, all match the manifest"


def installed_versions(packages: Sequence[str]) -> dict[str, str]:
    """The versions of the packages that are installed."""
    versions = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def now() -> str:
    """The current time: ISO 8601, UTC, in seconds."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _problem(manifest: Manifest | None) -> str:
    return "belongs to another configuration" if manifest else "is missing"


def _files_in(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _difference(file: Path, size: int, sha256: str) -> str:
    """Describe how a file differs from its record; empty if it does not."""
    found = _size(file)
    if found is None:
        return MISSING
    if found != size:
        return f"has {found} bytes, expected {size}"
    try:
        return "" if files.sha256(file) == sha256 else "has the expected size but another SHA-256"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
