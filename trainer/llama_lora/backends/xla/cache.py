"""The Neuron Persistent Cache in the workspace, which runs share: its path, its content, and its users.

Layout (AWS Neuron docs, "Neuron Persistent Cache"; file names also in optimum-neuron's guide to its cache):

    compile-cache/neuronxcc-VERSION/MODULE_<graph's hash>+<flags' hash>/
        model.hlo_module.pb  compile_flags.json       the graph, as collected
        model.neff  model.done                        compiled
        model.log                                     compilation failed, and is not retried by default
        model.hlo_module.pb.lock                      being compiled, or its compiler was killed

The lock of a killed process remains, and every process that needs the graph waits forever ("Another process must be
compiling"). The tool's `clear-locks` is safe only while no other process uses the cache (docs, "Cache maintenance
commands"). So every user keeps a file here and touches it every few seconds. Only changes of that file count, as seen
by the process that watches it: FSx may be mounted without flock, and the nodes' clocks may differ.
"""

from __future__ import annotations

import contextlib
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
from genvalues.common.json_files import InvalidJson, read_record
from llama_lora.paths import Paths

FLAGS = "NEURON_CC_FLAGS"
URL = "NEURON_COMPILE_CACHE_URL"
RETRY = "--retry_failed_compilation"
# Options of NEURON_CC_FLAGS that libneuronxla reads itself (docs, "Neuron Persistent Cache"), and whether a value
# follows. The compiler never gets them, so they are in no cache key.
OWN_OPTIONS = {
    "--cache_dir": True,
    "--compile_workdir": True,
    "--dump": True,
    "--log_level": True,
    "--no_cache": False,
    RETRY: False,
}
# optimum-neuron parses the folder from NEURON_CC_FLAGS with this expression (utils/cache_utils.py): no dots.
PLAIN_PATH = re.compile(r"[\w/-]+")
CACHE_USER = "LLAMA_LORA_CACHE_USER"  # set for the children of a process that keeps a user file
HEARTBEAT = 10.0  # seconds between touches of a user's file
TIMEOUT = 90.0  # seconds without a change after which a user counts as ended; NFS delays changes by up to 60 s


def set_environment(paths: Paths) -> None:
    """Make this process and its children use the workspace's cache.

    Raises UserError if the environment sets another cache, or if the compiler cannot parse the path.
    """
    os.environ[FLAGS] = flags(os.environ, paths.compile_cache)


def flags(environment: Mapping[str, str], cache: Path, *extra: str) -> str:
    """NEURON_CC_FLAGS of ``environment`` with --cache_dir, which takes precedence over NEURON_COMPILE_CACHE_URL."""
    if not PLAIN_PATH.fullmatch(str(cache)):
        raise UserError(
            "the path of the cache folder contains a character that the Neuron compiler does not support",
            where=str(cache),
            fix="Use a workspace path with only letters, digits, _, - and /.",
        )
    kept, taken = split_options(environment.get(FLAGS, ""), {"--cache_dir": True})
    named = {word.removeprefix("--cache_dir=") for word in taken} - {"--cache_dir"}
    named |= {environment[URL]} if environment.get(URL) else set()
    for other in sorted(named - {str(cache)}):
        raise UserError(
            f"the environment sets another cache than the workspace's: {other}",
            where=f"{FLAGS} or {URL}",
            fix=f"Remove --cache_dir and {URL}: compile and train use {cache}.",
        )
    return shlex.join([*kept, *extra, f"--cache_dir={cache}"])


def compiler_flags(environment: Mapping[str, str]) -> str:
    """The part of NEURON_CC_FLAGS that the compiler gets, and that is in every graph's cache key."""
    return shlex.join(split_options(environment.get(FLAGS, ""), OWN_OPTIONS)[0])


def split_options(flags: str, wanted: Mapping[str, bool]) -> tuple[list[str], list[str]]:
    """Split ``flags`` into the other words and the wanted options (--name=value or --name value)."""
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
    """The folder of one graph in the cache."""

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
    """List all graphs in the cache, of all compiler versions."""
    return sorted(Module(folder) for folder in cache.glob("neuronxcc-*/MODULE_*") if folder.is_dir())


def locked_modules(cache: Path) -> list[Module]:
    return [module for module in modules(cache) if module.is_locked]


@dataclass(frozen=True)
class User:
    """What is read of a user's file."""

    id: str
    run: str
    stage: str
    state: str


class OtherUsers:
    """The other users of the cache, watched through their files."""

    def __init__(self, own: Path) -> None:
        self._own = own
        self._first: dict[Path, int] = {}
        self._last: dict[Path, tuple[int, float]] = {}

    def alive(self) -> dict[Path, User]:
        """The users that may be running: their files are new, or have changed within TIMEOUT seconds of watching.

        Files of users that have ended are deleted.
        """
        found, now = {}, time.monotonic()
        for file in sorted(self._own.parent.glob("*.json")):
            if file == self._own:
                continue
            try:
                changed = file.stat().st_mtime_ns
                user = read_record(file, User)
            except (OSError, InvalidJson):  # the user has just ended
                continue
            self._first.setdefault(file, changed)
            if file not in self._last or self._last[file][0] != changed:
                self._last[file] = (changed, now)
            if now - self._last[file][1] > TIMEOUT:
                file.unlink(missing_ok=True)
                continue
            found[file] = user
        return found

    def has_moved(self, file: Path) -> bool:
        """Whether a file has changed since it was first seen, which proves that its user is running."""
        return file in self._last and self._last[file][0] != self._first[file]


class CacheUse:
    """This process's use of the cache: a file that is touched until ``end``."""

    def __init__(self, paths: Paths, stage: str) -> None:
        self.id = f"{time.time_ns():x}-{uuid.uuid4().hex[:8]}"
        self.run, self.stage = paths.run_name, stage
        self.cache = paths.compile_cache
        self.file = paths.compile_users / f"{self.id}.json"
        self.others = OtherUsers(self.file)
        self._ended = threading.Event()
        self._write("starting")
        self._toucher = threading.Thread(target=self._touch, daemon=True)
        self._toucher.start()

    def mark_working(self) -> None:
        """Record that this process may hold locks from now on."""
        self._write("working")

    def other_nodes(self) -> int:
        """Count the other processes of this stage and run that may be running: its other nodes."""
        return sum((user.run, user.stage) == (self.run, self.stage) for user in self.others.alive().values())

    def end(self) -> None:
        self._ended.set()
        self._toucher.join()
        self.file.unlink(missing_ok=True)

    def locks_are_stale(self) -> bool:
        """Wait until it is certain whether locks are stale, which means that no process that could hold one is running.

        Nodes of this stage that are starting hold none: they wait for each other before they trace. The first of
        them decides for all.
        """
        while True:
            blocking = {
                file: user
                for file, user in self.others.alive().items()
                if not (self._is_starting_node(user) and user.id > self.id)
            }
            if not blocking:
                return True
            if any(self.others.has_moved(file) for file in blocking):
                return False
            time.sleep(HEARTBEAT / 10)

    def _is_starting_node(self, user: User) -> bool:
        return (user.run, user.stage, user.state) == (self.run, self.stage, "starting")

    def _write(self, state: str) -> None:
        user = {"id": self.id, "run": self.run, "stage": self.stage, "state": state, "host": socket.gethostname()}
        files.write_json(self.file, user)

    def _touch(self) -> None:
        while not self._ended.wait(HEARTBEAT):
            with contextlib.suppress(OSError):  # a slow volume, or a file that another user deleted
                os.utime(self.file)


@contextlib.contextmanager
def using_cache(paths: Paths, stage: str) -> Iterator[CacheUse]:
    """Register as a user of the cache within the block. Child processes do not register."""
    use = CacheUse(paths, stage)
    os.environ[CACHE_USER] = use.id
    try:
        yield use
    finally:
        os.environ.pop(CACHE_USER, None)
        use.end()


def using_cache_as_worker(paths: Paths, stage: str) -> contextlib.AbstractContextManager[Any]:
    """The same for a worker: the first worker of each node registers, unless its launcher has."""
    if os.environ.get("LOCAL_RANK") != "0" or CACHE_USER in os.environ:
        return contextlib.nullcontext()
    return using_cache(paths, stage)
