"""What every stage has in common: a fingerprint of what it reads, a manifest of what it wrote, and skipping.

A stage is done when its manifest carries the fingerprint the current config gives and its outputs are there. The
manifest is written last, so a stage killed at any moment is simply not done.

Nothing here imports torch: `llama-lora fingerprint` answers in about a second.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.metadata
import json
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from genvalues.common import files
from genvalues.common.errors import UserError, UserErrors
from llama_lora import resolve, stages
from llama_lora.config import RunConfig
from llama_lora.paths import Paths

if TYPE_CHECKING:
    from llama_lora.backends.base import Backend

MISSING = "is missing"


@dataclass(frozen=True)
class Declaration:
    """What a stage module says of itself, as its ``STAGE``.

    ``version`` is raised by hand when the same inputs come to give another output. ``reads`` is the slice of the
    config the output depends on; ``after`` names the stages whose output it reads; ``needs`` those that must be done
    before without being read. ``run`` does the work in a run; ``tool``, where there is one, does it on folders alone,
    and its parameters become the command's options. ``worker`` is what each worker of a distributed stage runs.
    """

    name: str
    version: int
    summary: str
    reads: Callable[[RunConfig], Mapping[str, Any]]
    run: Callable[[Stage], None]
    after: Sequence[str] = ()
    needs: Sequence[str] = ()
    tool: Callable[..., None] | None = None
    worker: Callable[[Stage, Backend], None] | None = None
    reads_sources: bool = False  # whether it reads the model and dataset from outside the workspace


def names() -> list[str]:
    """The stages there are: a module of ``llama_lora.stages`` each."""
    return sorted(module.name for module in pkgutil.iter_modules(stages.__path__))


def declaration(name: str) -> Declaration:
    """The ``STAGE`` of a stage's module."""
    found: Declaration = importlib.import_module(f"{stages.__name__}.{name}").STAGE
    return found


@dataclass
class Manifest:
    """stages/STAGE.json. ``outputs`` maps a file, relative to the workspace, to its bytes and sha256."""

    stage: str
    fingerprint: str
    started: str
    finished: str
    outputs: dict[str, dict[str, Any]]
    versions: dict[str, str]
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Manifest | None:
        """The manifest at ``path``; None where there is none or it is not one."""
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None


class Stage:
    """One stage of one run: whether it is done, where its outputs go, what it leaves to the stages after it."""

    def __init__(self, name: str, config: RunConfig, paths: Paths, sources: resolve.Sources | None = None) -> None:
        self.name = name
        self.config = config
        self.paths = paths
        self.sources = sources or resolve.kept_sources(config, paths)
        self.facts: dict[str, Any] = {}
        self._declaration = declaration(name)
        self._started = now()

    @property
    def fingerprint(self) -> str | None:
        """Hex SHA-256 of what the stage reads; None while the hub's or a file's version is not resolved yet.

        Not in it: image, node and process counts, logging, how often is saved (DESIGN 3).
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
        """Whether the manifest is the current config's and every output is still there with its size."""
        manifest, fingerprint = self.manifest, self.fingerprint
        if manifest is None or fingerprint is None or manifest.fingerprint != fingerprint:
            return False
        return all(_size(self.paths.workspace / name) == output["bytes"] for name, output in manifest.outputs.items())

    def upstream(self, name: str) -> Manifest:
        """The manifest of a stage before this one. Raises UserError (status 2) where that stage is not done."""
        other = self._other(name)
        manifest = other.manifest
        if manifest is None or not other.is_done():
            found = "belongs to another configuration" if manifest else "is missing"
            raise UserError(
                f"{self.name} needs {name}, whose manifest {found}",
                where=str(self.paths.manifest(name)),
                fix=f"Run `llama-lora {name} --config ...` first.",
            )
        return manifest

    def check_upstream(self) -> None:
        """Raise UserError for the first stage before this one that is not done."""
        for name in [*self._declaration.after, *self._declaration.needs]:
            self.upstream(name)

    @contextlib.contextmanager
    def output(self, path: Path, *, beside: Sequence[Path] = ()) -> Iterator[Path]:
        """A folder beside ``path`` to fill; renamed into place, and the manifest written, when the block ends well.

        ``beside`` names files that the block writes elsewhere; they are outputs too.
        """
        self.paths.manifest(self.name).unlink(missing_ok=True)  # what stood there is about to go
        with files.whole_folder(path) as partial:
            yield partial
        self.finish([path, *beside])

    def finish(self, outputs: Sequence[Path]) -> None:
        """Write the manifest over what is in ``outputs`` (files, or folders with all that is in them)."""
        fingerprint = self.fingerprint
        assert fingerprint is not None, "a stage that has run has resolved its sources"
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
            versions=library_versions(),
            facts=self.facts,
        )
        files.write_json(self.paths.manifest(self.name), manifest.__dict__)

    def _other(self, name: str) -> Stage:
        return Stage(name, self.config, self.paths, self.sources)


def run(name: str, config: RunConfig, paths: Paths) -> None:
    """Run a stage, or say that it is done already."""
    stage = Stage(name, config, paths)
    if stage._declaration.reads_sources:
        stage.sources = resolve.resolve_sources(config, paths)
    if stage.is_done():
        print(f"{name}: nothing changed, skipped ({stage.paths.manifest(name)})", flush=True)
        return
    stage.check_upstream()
    files.write_text(paths.config, yaml.safe_dump(config.as_keys(), sort_keys=False))
    stage._declaration.run(stage)


def verify(name: str, config: RunConfig, paths: Paths) -> str:
    """Read all that a stage wrote, and compare it with its manifest; what was compared, in a line. Writes nothing.

    Raises UserErrors, one for each file that is not as written. ``is_done`` looks at sizes alone, to be quick: a file
    with other bytes of the same number has to go before the stage makes it again.
    """
    stage = Stage(name, config, paths)
    manifest = stage.manifest
    again = f"`helm upgrade`, or `llama-lora {name} --config ...`"
    if manifest is None or manifest.fingerprint != stage.fingerprint:
        found = "belongs to another configuration" if manifest else "is missing"
        raise UserError(
            f"the manifest of {name} {found}", where=str(paths.manifest(name)), fix=f"Run the stage first: {again}."
        )
    mistakes = []
    for output, written in manifest.outputs.items():
        file = paths.workspace / output
        if difference := _difference(file, written["bytes"], written["sha256"]):
            fix = "Make it again" if difference == MISSING else "Delete it and make it again"
            mistakes.append(UserError(difference, where=str(file), fix=f"{fix}: {again}."))
    if mistakes:
        raise UserErrors(mistakes)
    megabytes = sum(written["bytes"] for written in manifest.outputs.values()) / 1e6
    return f"{name}: {len(manifest.outputs)} files, {megabytes:.3g} MB, all as written"


def library_versions() -> dict[str, str]:
    """Versions of the libraries an output depends on, for the record."""
    versions = {}
    for name in ("llama-lora", "torch", "transformers", "peft", "accelerate", "datasets", "optimum-neuron"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def now() -> str:
    """The time, ISO 8601, UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _files_in(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _difference(file: Path, size: int, sha256: str) -> str:
    """What is wrong with a file, or nothing."""
    found = _size(file)
    if found is None:
        return MISSING
    if found != size:
        return f"has {found} bytes, {size} were written"
    try:
        return "" if files.sha256(file) == sha256 else "has its size, but not the bytes that were written (SHA-256)"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
