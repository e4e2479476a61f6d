"""What all stages share: the fingerprint of their inputs, the manifest of their outputs, and skipping.

A stage is done when its manifest has the fingerprint of the current config and its outputs exist. The manifest is
written last, so that a stage that was killed is not done.

This module does not import torch: `llama-lora fingerprint` answers in about a second.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import logging
import pkgutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml

from genvalues.common import files
from genvalues.common.errors import UserError, UserErrors
from genvalues.common.json_files import (
    FileRecord,
    InvalidJson,
    JsonNotFound,
    PathInside,
    Sha256,
    Time,
    json_digest,
    read_record,
)
from genvalues.common.locks import locked
from genvalues.common.text import one_line
from llama_lora import neuron_node, stages
from llama_lora.config import RunConfig
from llama_lora.data import resolve
from llama_lora.digests import NOT_FOUND, Digests, differences, files_in, other_size, record_of, unlisted
from llama_lora.paths import Paths

log = logging.getLogger(__name__)

TOLD_AFTER = 2.0  # seconds: shorter verifications are logged with -v only
MOST_WAIT = 600.0  # seconds for another stage of the run; Lustre frees the locks of a lost node within minutes
# What is in each folder that a fact names.
HOLDS = {"model": "config.json", "dataset": "train", "checkpoint": "checkpoint.json"}
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
    """The content of stages/STAGE.json. ``outputs`` are by their path in the workspace."""

    stage: str
    fingerprint: Sha256
    started: Time
    finished: Time
    outputs: dict[PathInside, FileRecord]
    versions: dict[str, str]
    facts: dict[str, Any] = field(default_factory=dict)


class InvalidManifest(Exception):
    """Why a stage is not done, as the rest of a sentence that begins with its manifest: "is missing".

    ``damaged``: there is a file, but it is not a manifest.
    """

    def __init__(self, problem: str, *, damaged: bool = False) -> None:
        self.damaged = damaged
        super().__init__(problem)


class Stage:
    """One stage of one run: its fingerprint, whether it is done, its outputs, and facts for later stages.

    ``digested``: what is known of outputs, so that their digests are not computed again.
    """

    def __init__(
        self, name: str, config: RunConfig, paths: Paths, sources: resolve.ResolvedSources | None = None
    ) -> None:
        self.name = name
        self.config = config
        self.paths = paths
        self.sources = sources or resolve.known_sources(config, paths)
        self.facts: dict[str, Any] = {}
        self.digested: dict[Path, FileRecord] = {}
        self._declaration = declaration(name)
        self.started = now()

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
        return json_digest(read)

    @property
    def manifest(self) -> Manifest | None:
        """The stage's manifest, also of another configuration; None if it does not exist or is not valid."""
        try:
            return self._read_manifest()
        except InvalidJson:
            return None

    def _read_manifest(self) -> Manifest:
        manifest = read_record(self.paths.manifest(self.name), Manifest)
        if manifest.stage != self.name:
            raise InvalidJson(f"is of the stage {one_line(manifest.stage)!r}")
        return manifest

    def current_manifest(self) -> Manifest:
        """The manifest, if it is of the current config. Raises InvalidManifest otherwise."""
        try:
            manifest = self._read_manifest()
        except JsonNotFound:
            raise InvalidManifest("is missing") from None
        except InvalidJson as error:
            raise InvalidManifest(str(error), damaged=True) from None
        if (fingerprint := self.fingerprint) is None:
            raise InvalidManifest(f"cannot be compared: {self.paths.resolved} has no entry for this run's sources")
        if manifest.fingerprint != fingerprint:
            raise InvalidManifest("belongs to another configuration")
        return manifest

    def done_manifest(self) -> Manifest:
        """The manifest, if the stage is done: every output exists with its recorded size. Raises InvalidManifest."""
        manifest = self.current_manifest()
        for name, output in manifest.outputs.items():
            if difference := other_size(self.paths.workspace / name, output.bytes):
                raise InvalidManifest(f"lists {one_line(name, 200)}, which {is_or_has(difference)}")
        return manifest

    def is_done(self) -> bool:
        """Whether the manifest matches the current config and every output exists with its recorded size."""
        try:
            self.done_manifest()
        except InvalidManifest:
            return False
        return True

    def upstream(self, name: str) -> Manifest:
        """Return the manifest of an earlier stage. Raises UserError if that stage is not done."""
        try:
            return self._other(name).done_manifest()
        except InvalidManifest as problem:
            raise UserError(
                f"{self.name} needs {name}, whose manifest {problem}",
                where=str(self.paths.manifest(name)),
                fix=f"Run `llama-lora {name} --config ...` first.",
            ) from None

    def upstream_fingerprint(self, name: str) -> str:
        """The fingerprint of an earlier stage, whose sources have been resolved."""
        fingerprint = self._other(name).fingerprint
        assert fingerprint is not None, "run_stage resolves the sources first"
        return fingerprint

    def upstream_path(self, name: str, fact: str) -> Path:
        """Return a folder that a fact of an earlier stage's manifest names.

        Raises UserError if that stage is not done, or if the fact is not a path in the workspace with what that stage
        wrote.
        """
        value = self.upstream(name).facts.get(fact)
        problem = "which is not a path in the workspace"
        if isinstance(value, str) and value and "\0" not in value and ".." not in Path(value).parts:
            path = self.paths.workspace / value
            if any(root in path.parents for root in self.paths.roots):
                # The tokenize of a small run has written nothing: its facts name what another run or step has made.
                if self.paths.in_a_run or self.upstream_files(name, path / HOLDS[fact]):
                    return path
                problem = f"but {name} wrote no {HOLDS[fact]} there"
        raise self.wrong_fact(name, fact, problem)

    def wrong_fact(self, name: str, fact: str, problem: str) -> UserError:
        """The error about a fact of an earlier stage's manifest."""
        return UserError(
            f"facts.{fact} is {one_line(repr(self.upstream(name).facts.get(fact)))}, {problem}",
            where=str(self.paths.manifest(name)),
            fix=f"Delete the file and run {rerun(name)}.",
        )

    def verify_read(self, name: str, *paths: Path) -> None:
        """Compare the outputs of an earlier stage that are, or are in, ``paths`` with their SHA-256 in its manifest.

        A stage calls it for what it reads, before it reads it. With verify: off it compares nothing. Raises UserErrors
        with one line for each file that differs.
        """
        if self.config.verify == "off":
            return
        recorded = self.upstream_files(name, *paths)
        began = time.monotonic()
        self._refuse_unlisted(name, recorded, paths)
        found = differences(recorded, Digests(self.config.verify))
        refuse_damaged(found, name)
        seconds = time.monotonic() - began
        gigabytes = sum(record.bytes for record in recorded.values()) / 1e9
        level = logging.INFO if seconds > TOLD_AFTER else logging.DEBUG
        log.log(level, f"{self.name}: verified {len(recorded)} files of {name}, {gigabytes:.1f} GB in {seconds:.0f} s")

    def _refuse_unlisted(self, name: str, recorded: Mapping[Path, FileRecord], paths: Sequence[Path]) -> None:
        """Raise UserErrors for files in the folders of ``paths`` that the stage did not write."""
        folders = [path for path in paths if any(path in file.parents for file in recorded)]
        if others := [file for folder in folders for file in unlisted(folder, recorded)]:
            what = f"is not among the files that {name} wrote"
            raise UserErrors([UserError(what, where=str(file), fix="Delete it.") for file in others])

    def upstream_files(self, name: str, *paths: Path) -> dict[Path, FileRecord]:
        """The outputs of an earlier stage that are, or are in, ``paths``, as its manifest records them."""
        outputs = {self.paths.workspace / output: record for output, record in self.upstream(name).outputs.items()}
        return {
            file: record
            for file, record in outputs.items()
            if any(path == file or path in file.parents for path in paths)
        }

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
            started=self.started,
            finished=now(),
            outputs={
                str(file.relative_to(self.paths.workspace)): self.digested.get(file) or record_of(file)
                for output in outputs
                for file in (files_in(output) if output.is_dir() else [output])
            },
            versions=installed_versions(LIBRARIES),
            facts=self.facts,
        )
        files.write_json(self.paths.manifest(self.name), asdict(manifest))

    def _other(self, name: str) -> Stage:
        return Stage(name, self.config, self.paths, self.sources)


def run_stage(name: str, config: RunConfig, paths: Paths, begin: Callable[[], None] = lambda: None) -> None:
    """Run a stage, or skip it if it is done. Only one stage of a run writes at a time; another waits for it.

    ``begin`` is called if it is not skipped.
    Raises UserError if another is still running after MOST_WAIT.
    """
    stage = Stage(name, config, paths)
    with contextlib.ExitStack() as held:
        if stage._declaration.worker is None and not stage.is_done():
            held.enter_context(lock_run(stage))
        if stage._declaration.reads_sources:
            stage.sources = resolve.resolve_sources(config, paths)
        if stage.is_done():
            log.info(f"{name}: nothing changed, skipped ({paths.manifest(name)})")  # `genvalues status` reads this
            return
        log.debug(f"{name}: fingerprint {stage.fingerprint}")
        begin()
        if stage._declaration.worker is not None:
            neuron_node.check(config)
        warn_of_damage(stage)
        stage.check_upstream()
        files.write_text(paths.config, yaml.safe_dump(config.as_keys(), sort_keys=False))
        stage._declaration.run(stage)


@contextlib.contextmanager
def lock_run(stage: Stage) -> Iterator[None]:
    """Hold the run's lock while a stage writes, and first delete what killed stages have left half-written.

    A stage with workers is started once on each node, so there it is the worker of rank 0 that holds the lock: when it
    starts, every node has written its config.
    """
    paths = stage.paths
    with locked(paths.lock, f"llama-lora {stage.name}", MOST_WAIT):
        records = (paths.config, paths.resolved, paths.progress, paths.prometheus, paths.report, paths.begun_uploads)
        for file in (*records, *map(paths.manifest, names())):
            files.remove_leftovers(file)
        yield


def warn_of_damage(stage: Stage) -> None:
    """Log why a stage runs whose manifest is not valid."""
    try:
        stage.current_manifest()
    except InvalidManifest as problem:
        if problem.damaged:
            log.warning(f"{stage.name} runs again: {stage.paths.manifest(stage.name)} {problem}")


def verify_outputs(name: str, config: RunConfig, paths: Paths) -> str:
    """Compare the size and digest of every output with the manifest, and return a summary. Writes nothing.

    Raises UserErrors with one line per file that differs. ``is_done`` compares sizes only, to be fast: a file with
    the right size and wrong content must be deleted before the stage writes it again.
    """
    stage = Stage(name, config, paths)
    try:
        manifest = stage.current_manifest()
    except InvalidManifest as problem:
        raise UserError(
            f"the manifest of {name} {problem}",
            where=str(paths.manifest(name)),
            fix=f"Run the stage first: {rerun(name)}.",
        ) from None
    recorded = {paths.workspace / output: record for output, record in manifest.outputs.items()}
    refuse_damaged(differences(recorded, Digests("always")), name)
    megabytes = sum(record.bytes for record in recorded.values()) / 1e6
    return f"{name}: {len(recorded)} files, {megabytes:.3g} MB, all match the manifest"


def refuse_damaged(found: Mapping[Path, str], name: str) -> None:
    """Raise UserErrors for files of a stage that differ from its manifest, if there are any."""
    mistakes = []
    for file, difference in found.items():
        fix = "Run the stage again" if difference == NOT_FOUND else "Delete the file and run the stage again"
        mistakes.append(UserError(difference, where=str(file), fix=f"{fix}: {rerun(name)}."))
    if mistakes:
        raise UserErrors(mistakes)


def rerun(name: str) -> str:
    """What to type to run a stage of a run again."""
    return f"`helm upgrade`, or `llama-lora {name} --config ...`"


def is_or_has(difference: str) -> str:
    """A difference of a file as the rest of a sentence: "is not found", "has 3 bytes, expected 4"."""
    return f"is {difference}" if difference == NOT_FOUND else difference


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
