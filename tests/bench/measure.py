"""Run each side of a line in a process of its own, by turns, and measure it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bench.table import Line, Result

ROOT = Path(__file__).parents[2]
SMALL = bool(os.environ.get("SMALL"))  # small inputs and one round: does every line work?
ROUNDS = 1 if SMALL else 3
NAMED = ("torch", "transformers", "tokenizers", "datasets", "peft", "trl", "optimum-neuron")


class Libraries(NamedTuple):
    """The Python of an environment that make sets up, and a folder of packages beside it."""

    environment: str
    beside: str = ""

    def python(self) -> str:
        return str(ROOT / self.environment / "bin" / "python")

    def variables(self) -> dict[str, str]:
        paths = [*([str(ROOT / self.beside)] if self.beside else []), *(str(ROOT / name) for name in SOURCES)]
        return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}


SOURCES = ("tests", "tests/demo", "generator", "trainer")
NEWEST, XLA = Libraries(".venv"), Libraries(".venv-xla")
TRL_NEWEST, TRL_024 = Libraries(".venv", ".venv-bench/trl-newest"), Libraries(".venv-xla", ".venv-bench/trl-0.24")


class Measured(NamedTuple):
    """A process: wall seconds, peak resident MiB (of the largest of its processes), and what it told."""

    seconds: float
    peak: float
    told: dict[str, Any] = {}


class Sides(NamedTuple):
    """A line's values of each round, and the versions of the libraries."""

    ours: list[float]
    theirs: list[float] = []
    versions: Mapping[str, str] = {}


@dataclass(frozen=True)
class Bench:
    """Lines that are measured together, in a folder for their files; ``lacks`` says what is missing to run them."""

    lines: Sequence[Line]
    measure: Callable[[Path], dict[str, Sides]]
    lacks: Callable[[], str] = lambda: ""


def command(*arguments: str | Path, libraries: Libraries = NEWEST) -> Measured:
    """Run a program, or a module with `-m` by the Python of ``libraries``. Raises SystemExit if it fails."""
    given = [libraries.python(), *map(str, arguments)] if str(arguments[0]) == "-m" else list(map(str, arguments))
    os.sync()  # what the process before wrote is not written while this one is measured
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        began = time.perf_counter()
        process = subprocess.Popen(given, stdout=out, stderr=err, env=libraries.variables(), cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        if status:
            raise SystemExit(f"{' '.join(given)} ended with {process.returncode}:\n{err.read().decode()[-4000:]}")
        said = out.read().decode().strip()
    told = said if said.startswith("{") else said.rpartition("\n")[2]
    return Measured(seconds, usage.ru_maxrss / 1024, json.loads(told) if told.startswith("{") else {})


def call(module: str, function: str, *arguments: Any, libraries: Libraries = NEWEST) -> Measured:
    """Call a function of a module of this folder in a process of its own."""
    given = json.dumps([str(each) if isinstance(each, Path) else each for each in arguments])
    return command("-m", module, function, given, libraries=libraries)


def serve(functions: Mapping[str, Any]) -> None:
    """The other end of ``call``: print what the function returns, and the versions of the libraries that it used."""
    function, given = sys.argv[1:]
    told = functions[function](*json.loads(given)) or {}
    used = [name for name in NAMED if name.replace("-", ".") in sys.modules]
    print(json.dumps({**told, "versions": {name: importlib.metadata.version(name) for name in used}}))


def alternate(
    work: Path, sides: Mapping[str, Callable[[Path], Measured]], rounds: int = ROUNDS
) -> dict[str, list[Measured]]:
    """Run all sides ``rounds`` times, every second time in reverse order. Each gets an output folder, deleted after."""
    found: dict[str, list[Measured]] = {name: [] for name in sides}
    for turn in range(rounds):
        for name in list(sides)[:: -1 if turn % 2 else 1]:
            output = work / f"output-{name}"
            found[name].append(sides[name](output))
            shutil.rmtree(output, ignore_errors=True)
    return found


def compared(
    found: Mapping[str, list[Measured]], of: Callable[[Measured], float], ours: str = "ours", theirs: str = ""
) -> Sides:
    """A line's sides from the rounds of ``alternate``."""
    versions: dict[str, str] = {}
    for side in filter(None, (ours, theirs)):
        versions |= found[side][0].told.get("versions", {})
    return Sides([of(each) for each in found[ours]], [of(each) for each in found[theirs]] if theirs else [], versions)


def inner(measured: Measured) -> float:
    """Seconds that the process measured itself, without imports."""
    return float(measured.told["seconds"])


def wall(measured: Measured) -> float:
    return measured.seconds


def peak(measured: Measured) -> float:
    return measured.peak


def run(bench: Bench) -> dict[str, Result]:
    """Measure the lines of a bench."""
    began, busy_before, own_before = time.monotonic(), busy_seconds(), own_seconds()
    with tempfile.TemporaryDirectory(prefix="llama-lora-bench-") as folder:
        found = bench.measure(Path(folder))
    others = (busy_seconds() - busy_before - own_seconds() + own_before) / (time.monotonic() - began)
    today = time.strftime("%Y-%m-%d")
    return {
        name: Result(ours, theirs, dict(versions), machine(), today, max(0.0, round(others, 2)))
        for name, (ours, theirs, versions) in found.items()
    }


def busy_seconds() -> float:
    """Core-seconds that all processes of the machine have taken; 0 where that is unknown."""
    try:
        user, nice, system = Path("/proc/stat").read_text(encoding="ascii").split()[1:4]
    except (OSError, ValueError):
        return 0.0
    return (int(user) + int(nice) + int(system)) / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    """Core-seconds of this process and of its ended children."""
    return sum(os.times()[:4])


def machine() -> str:
    """Cores, processor, memory and Python."""
    model = None
    with suppress(OSError):
        model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = f"{os.cpu_count()} cores" + (f" of {model[1]}" if model else "")
    return f"{cores}, {memory:.0f} GiB, Python {platform.python_version()}"
