"""The Neuron Persistent Cache on the volume, which runs share: where it is, what is in it, and who uses it.

Layout (AWS Neuron docs, "Neuron Persistent Cache"; file names also in optimum-neuron's guide to its cache):

    compile-cache/neuronxcc-VERSION/MODULE_<graph's hash>+<flags' hash>/
        model.hlo_module.pb  compile_flags.json       the graph, as collected
        model.neff  model.done                        compiled
        model.log                                     its compilation failed; that is remembered
        model.hlo_module.pb.lock                      somebody compiles it, or was killed while doing so

A lock whose process was killed stays, and whoever needs that graph waits for ever ("Another process must be
compiling"). The tool's own `clear-locks` is right only when nothing else uses the cache (docs, "Cache maintenance
commands"). So every user keeps a file of its own here and touches it every few seconds. Only changes of such a file
count, seen by whoever watches it: FSx may be mounted without flock, and the nodes' clocks need not agree.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genvalues.common import files
from genvalues.common.errors import UserError
from llama_lora.paths import Paths

FLAGS = "NEURON_CC_FLAGS"
URL = "NEURON_COMPILE_CACHE_URL"
RETRY = "--retry_failed_compilation"
# Options of NEURON_CC_FLAGS that libneuronxla takes for itself (docs, "Neuron Persistent Cache"), with whether a value
# follows: the compiler never sees them, so they are in no cache key.
OWN_OPTIONS = {
    "--cache_dir": True,
    "--compile_workdir": True,
    "--dump": True,
    "--log_level": True,
    "--no_cache": False,
    RETRY: False,
}
# optimum-neuron reads the folder out of NEURON_CC_FLAGS with such an expression (utils/cache_utils.py): no dots.
PLAIN_PATH = re.compile(r"[\w/-]+")
HELD = "LLAMA_LORA_CACHE_USER"  # tells a child that its parent keeps the user file
BEAT = 10.0  # seconds between two touches of a user's file
PATIENCE = 90.0  # a file that has not changed for so long has no living user; NFS shows a change after up to 60 s


def set_environment(paths: Paths) -> None:
    """Have this process and its children use the workspace's cache.

    Raises UserError where the environment names another one, or where the compiler could not read the path.
    """
    os.environ[FLAGS] = flags(os.environ, paths.compile_cache)


def flags(environment: Mapping[str, str], cache: Path, *extra: str) -> str:
    """NEURON_CC_FLAGS of ``environment`` with our cache: --cache_dir wins over NEURON_COMPILE_CACHE_URL."""
    if not PLAIN_PATH.fullmatch(str(cache)):
        raise UserError(
            "the Neuron compiler takes no cache folder with dots or special characters in its path",
            where=str(cache),
            fix="Choose a workspace whose path has letters, digits, _, - and / only.",
        )
    kept, taken = split_options(environment.get(FLAGS, ""), {"--cache_dir": True})
    named = {word.removeprefix("--cache_dir=") for word in taken} - {"--cache_dir"}
    named |= {environment[URL]} if environment.get(URL) else set()
    for other in sorted(named - {str(cache)}):
        raise UserError(
            f"the environment names another cache than the workspace's, {other}",
            where=f"{FLAGS} or {URL}",
            fix=f"Leave --cache_dir and {URL} away: compile and train use {cache}.",
        )
    return shlex.join([*kept, *extra, f"--cache_dir={cache}"])


def compiler_flags(environment: Mapping[str, str]) -> str:
    """What of NEURON_CC_FLAGS reaches the compiler, and so is in every graph's cache key."""
    return shlex.join(split_options(environment.get(FLAGS, ""), OWN_OPTIONS)[0])


def split_options(flags: str, wanted: Mapping[str, bool]) -> tuple[list[str], list[str]]:
    """The words of ``flags`` without the wanted options, and those options, as --name=value or --name value."""
    kept: list[str] = []
    taken: list[str] = []
    words = iter(shlex.split(flags))
    for word in words:
        name, equals, _ = word.partition("=")
        if name not in wanted:
            kept.append(word)
            continue
        taken.append(word)
        if wanted[name] and not equals:
            taken += [next(words, "")]
    return kept, taken


@dataclass(frozen=True, order=True)
class Module:
    """One graph's folder in the cache."""

    folder: Path

    @property
    def name(self) -> str:
        """neuronxcc-VERSION/MODULE_..."""
        return f"{self.folder.parent.name}/{self.folder.name}"

    @property
    def graph(self) -> Path:
        return self.folder / "model.hlo_module.pb"

    @property
    def neff(self) -> Path:
        return self.folder / "model.neff"

    @property
    def log(self) -> Path:
        return self.folder / "model.log"

    @property
    def is_compiled(self) -> bool:
        return (self.folder / "model.done").exists() and self.neff.exists()

    @property
    def has_failed(self) -> bool:
        return self.log.exists() and not self.is_compiled

    @property
    def is_locked(self) -> bool:
        return any(self.folder.glob("*.lock"))


def module_named(cache: Path, name: str) -> Module:
    return Module(cache / name)


def modules(cache: Path) -> list[Module]:
    """Every graph in the cache, of every compiler version."""
    return sorted(Module(folder) for folder in cache.glob("neuronxcc-*/MODULE_*") if folder.is_dir())


def locked_modules(cache: Path) -> list[Module]:
    return [module for module in modules(cache) if module.is_locked]


class Others:
    """The other users of the cache, as seen by one that watches them."""

    def __init__(self, own: Path) -> None:
        self._own = own
        self._first: dict[Path, int] = {}
        self._last: dict[Path, tuple[int, float]] = {}

    def look(self) -> dict[Path, dict[str, Any]]:
        """Those that may be alive: their files are new to us, or have changed within PATIENCE seconds of watching.

        The files of the others are removed.
        """
        found, now = {}, time.monotonic()
        for file in sorted(self._own.parent.glob("*.json")):
            if file == self._own:
                continue
            try:
                changed = file.stat().st_mtime_ns
                user = json.loads(file.read_text(encoding="utf-8"))
            except (OSError, ValueError):  # it has just ended
                continue
            self._first.setdefault(file, changed)
            if file not in self._last or self._last[file][0] != changed:
                self._last[file] = (changed, now)
            if now - self._last[file][1] > PATIENCE:
                file.unlink(missing_ok=True)
                continue
            found[file] = user
        return found

    def has_moved(self, file: Path) -> bool:
        """Whether a file has changed since it was first seen, so that its user is certainly alive."""
        return file in self._last and self._last[file][0] != self._first[file]


class Use:
    """One process's use of the cache: its file, touched until ``end``."""

    def __init__(self, paths: Paths, stage: str) -> None:
        self.id = f"{time.time_ns():x}-{uuid.uuid4().hex[:8]}"
        self.run, self.stage = paths.run_name, stage
        self.cache = paths.compile_cache
        self.file = paths.compile_users / f"{self.id}.json"
        self.others = Others(self.file)
        self._ended = threading.Event()
        self._write("starting")
        self._beats = threading.Thread(target=self._beat, daemon=True)
        self._beats.start()

    def working(self) -> None:
        """From now on there may be locks of ours."""
        self._write("working")

    def colleagues(self) -> int:
        """How many other processes of the same stage of the same run may be alive: its other nodes."""
        return sum((user["run"], user["stage"]) == (self.run, self.stage) for user in self.others.look().values())

    def end(self) -> None:
        self._ended.set()
        self._beats.join()
        self.file.unlink(missing_ok=True)

    def nobody_else(self) -> bool:
        """Wait until it is clear whether locks in the cache are stale: nothing that could hold one is alive.

        Nodes of this stage that only start hold none: they wait for this one before they trace. The first of them
        answers for all.
        """
        while True:
            blocking = {
                file: user
                for file, user in self.others.look().items()
                if not (self._is_starting_colleague(user) and user["id"] > self.id)
            }
            if not blocking:
                return True
            if any(self.others.has_moved(file) for file in blocking):
                return False
            time.sleep(BEAT / 10)

    def _is_starting_colleague(self, user: dict[str, Any]) -> bool:
        return (user["run"], user["stage"], user["state"]) == (self.run, self.stage, "starting")

    def _write(self, state: str) -> None:
        user = {"id": self.id, "run": self.run, "stage": self.stage, "state": state, "host": socket.gethostname()}
        files.write_json(self.file, user)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            with contextlib.suppress(OSError):  # a volume that is slow for a moment, or a file that was given up
                os.utime(self.file)


@contextlib.contextmanager
def used(paths: Paths, stage: str) -> Iterator[Use]:
    """Be a user of the cache while the block runs; its children are not users of their own."""
    use = Use(paths, stage)
    os.environ[HELD] = use.id
    try:
        yield use
    finally:
        os.environ.pop(HELD, None)
        use.end()


def used_by_worker(paths: Paths, stage: str) -> contextlib.AbstractContextManager[Any]:
    """The same for a worker: the first of each node stands for all of it, where its launcher does not."""
    if os.environ.get("LOCAL_RANK") != "0" or HELD in os.environ:
        return contextlib.nullcontext()
    return used(paths, stage)
