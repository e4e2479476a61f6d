"""Run each side of a line in a process of its own, by turns, and measure it."""

from __future__ import annotations

import importlib
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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from bench.table import Goal, Line, Result

ROOT = Path(__file__).parents[2]
SMALL = bool(os.environ.get("SMALL"))  # small inputs and one round: does every line work?
ROUNDS = 1 if SMALL else 3
NAMED = ("torch", "transformers", "tokenizers", "datasets", "peft", "trl")
TIMES = (1, 4, 16)  # the work, where the cost of growing work is measured
LINEAR = Goal(1.15)  # as a share of linear growth: the noise of a machine is some percent

Measured = dict[str, Any]  # wall: seconds; peak: resident MiB, of the largest of its processes; what it told


class Libraries(NamedTuple):
    """An environment that make sets up, and a folder of packages beside it."""

    environment: str
    beside: str = ""

    @property
    def python(self) -> str:
        return str(ROOT / self.environment / "bin/python")

    @property
    def paths(self) -> list[str]:
        return [str(ROOT / path) for path in (self.beside, "tests", "tests/demo", "generator", "trainer") if path]

    @property
    def lacking(self) -> str:
        missing = [path for path in self if path and not (ROOT / path).is_dir()]
        return f"peer not installed: {missing[0]} not found, which make bench sets up" if missing else ""


NEWEST, XLA = Libraries(".venv"), Libraries(".venv-xla")
TRL_NEWEST, TRL_024 = Libraries(".venv", ".venv-bench/trl-newest"), Libraries(".venv-xla", ".venv-bench/trl-0.24")


@dataclass(frozen=True)
class Bench:
    """Lines that are measured together, in a folder for their files; ``lacking``: what they need and is not here."""

    lines: Sequence[Line]
    measure: Callable[[Path], dict[str, Result]]
    lacking: str = ""


def command(*arguments: str | Path, libraries: Libraries = NEWEST) -> Measured:
    """Run a program, or a module (`-m`) with the Python of ``libraries``. Raises SystemExit if it fails."""
    given = [*([libraries.python] if arguments[0] == "-m" else []), *map(str, arguments)]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(libraries.paths), "HF_HUB_OFFLINE": "1"}
    os.sync()  # what the process before wrote is not written while this one is measured
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        began = time.perf_counter()
        process = subprocess.Popen(given, stdout=out, stderr=err, env=variables, cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
        measured = {"wall": time.perf_counter() - began, "peak": usage.ru_maxrss / 1024}
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        if status:
            raise SystemExit(f"{' '.join(given)} ended with {process.returncode}:\n{err.read()[-4000:]}")
        said = out.read().strip()
    last = said.rpartition("\n")[2]
    told = last if last.startswith("{") else said  # JSON in one line after what libraries print, or nothing else
    return {**measured, **(json.loads(told) if told.startswith("{") else {})}


def call(function: Callable[..., Any], *arguments: Any, libraries: Libraries = NEWEST) -> Measured:
    """Call a function of a module of this folder in a process of its own. It tells what it returns, a dict."""
    given = json.dumps(arguments, default=str)
    return command("-m", "bench.measure", function.__module__, function.__name__, given, libraries=libraries)


def processes(
    functions: Mapping[str, Callable[..., Any]], *arguments: Any, libraries: Libraries
) -> dict[str, Callable[[Path], Measured]]:
    """Sides for ``alternate`` of functions with the same arguments, and an output folder as the last."""

    def side(function: Callable[..., Any]) -> Callable[[Path], Measured]:
        return lambda output: call(function, *arguments, output, libraries=libraries)

    return {name: side(function) for name, function in functions.items()}


def serve(module: str, function: str, given: str) -> None:
    """The other end of ``call``: print what the function returns, and the versions of the libraries that it used."""
    told = getattr(importlib.import_module(module), function)(*json.loads(given)) or {}
    versions = {name: importlib.metadata.version(name) for name in NAMED if name in sys.modules}
    print("\n" + json.dumps({**told, "versions": versions}))


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


def compared(found: Mapping[str, list[Measured]], key: str, ours: str, theirs: str, scale: float = 1) -> Result:
    """Compare ``key`` of two sides of ``alternate``; theirs times ``scale``."""
    versions = {**found[ours][0].get("versions", {}), **found[theirs][0].get("versions", {})}
    return Result([each[key] for each in found[ours]], [scale * each[key] for each in found[theirs]], versions)


def growth(name: str, work: str, unit: str, make: Callable[..., Any], do: Callable[..., Any], once: int) -> Bench:
    """NAME-growth-4 and -16. ``make(folder, size)`` makes the input, ``do(folder, size, output)`` tells its seconds."""

    def measure(folder: Path) -> dict[str, Result]:
        for times in TIMES:
            call(make, folder, times * once)
        return grown(name, alternate(folder, {str(n): lambda to, n=n: call(do, folder, n * once, to) for n in TIMES}))

    return Bench(growth_lines(name, work, unit, once), measure)


def growth_lines(name: str, work: str, unit: str, once: int) -> list[Line]:
    what = {n: f"{work}: {n * once:,} {unit} against {n} times the time of {once:,}" for n in TIMES[1:]}
    return [Line(f"{name}-growth-{n}", what[n], "s", LINEAR, "linear growth") for n in TIMES[1:]]


def grown(name: str, found: Mapping[str, list[Measured]]) -> dict[str, Result]:
    """The sides of growth's lines, from rounds named 1, 4 and 16."""
    return {f"{name}-growth-{n}": compared(found, "seconds", str(n), "1", n) for n in TIMES[1:]}


def run(bench: Bench) -> dict[str, Result]:
    """Measure the lines of a bench."""
    began, before = time.monotonic(), busy_seconds() - sum(os.times()[:4])
    with tempfile.TemporaryDirectory(prefix="llama-lora-bench-") as folder:
        found = bench.measure(Path(folder))
    others = max(0.0, (busy_seconds() - sum(os.times()[:4]) - before) / (time.monotonic() - began))
    about = {"machine": machine(), "date": time.strftime("%Y-%m-%d"), "others": round(others, 2)}
    return {name: replace(result, **about) for name, result in found.items()}


def busy_seconds() -> float:
    """Core-seconds that the processes of this machine have taken; 0 where that is unknown."""
    stat = Path("/proc/stat")
    ticks = stat.read_text(encoding="ascii").split()[1:4] if stat.exists() else []
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


def machine() -> str:
    """Cores, processor, memory and Python."""
    cpus = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*: (.*)$", cpus.read_text(encoding="utf-8") if cpus.exists() else "", re.MULTILINE)
    cores = f"{os.cpu_count()} cores" + (f" of {model[1]}" if model else "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{cores}, {memory:.0f} GiB, Python {platform.python_version()}"


if __name__ == "__main__":
    serve(*sys.argv[1:])
