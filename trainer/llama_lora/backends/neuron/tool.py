"""neuron_parallel_compile, AWS's program that traces a trial run's graphs and compiles them side by side.

AWS Neuron docs, "PyTorch NeuronX neuron_parallel_compile CLI"; and, for what that page does not say, the program itself
(torch_neuronx/parallel_compile/neuron_parallel_compile.py of torch-neuronx 2.6):

 - its exit status is 1 when the trial run fails, whatever that run's own status was; else the number of graphs that
   failed (of which a shell sees the last 8 bits); 0 also when a process of its pool has crashed. So what counts here
   is what the cache holds afterwards.
 - a graph that is locked by another process is left to it, and not in the summary.
 - without a graph to compile it ends with 0 and without a summary.
 - it finds the graphs in the trial run's output, by the lines "Extracting graphs (PATH)".
 - NEURON_PARALLEL_COMPILE_DUMP_RESULTS=1 writes the summary into neuron_parallel_compile_results_TIME.json, in the
   current folder: read from there, because output of its processes can come between the lines of the printed one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from genvalues.common.errors import UserError
from genvalues.common.process import Command, Interrupted, run_together

PROGRAM = "neuron_parallel_compile"
What = Literal["collect-and-compile", "collect", "compile", "clear-locks"]
EXTRACTED = re.compile(r"Extracting graphs \((?P<graph>[^)]+)\)")
REUSED = re.compile(r"Using a cached neff at (?P<neff>\S+?/model\.neff)")
TOTAL = re.compile(r"Total (?P<what>graphs|successful compilations|failed compilations): (?P<number>\d+)")
TRIAL_FAILED = "There was an error in the training script."
GIB = 2**30
MEMORY_OF_ONE = 64 * GIB  # the program's own rule: a compiler for each 64 GiB of the machine


@dataclass
class Summary:
    """What the program said. ``statuses`` and ``seconds`` are by the path of a graph's file."""

    extracted: set[str] = field(default_factory=set)
    reused: set[str] = field(default_factory=set)
    statuses: dict[str, bool] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    totals: dict[str, int] = field(default_factory=dict)
    trial_failed: bool = False
    _json: list[str] | None = None

    def read_line(self, line: str) -> None:
        """Take in one line of its output."""
        for match in EXTRACTED.finditer(line):
            self.extracted.add(match["graph"])
        for match in REUSED.finditer(line):
            self.reused.add(match["neff"])
        for match in TOTAL.finditer(line):
            self.totals[match["what"]] = int(match["number"])
        self.trial_failed |= TRIAL_FAILED in line
        if re.search(r"\|\|NEURON_PARALLEL_COMPILE\|\|: *\{$", line.rstrip()):
            self._json = ["{"]
        elif self._json is not None:
            text = line.removeprefix("INFO: ").rstrip()
            self._json.append(text)
            if text == "}":
                self.read_report("\n".join(self._json))
                self._json = None

    def read_report(self, text: str) -> None:
        """Take in a report, as printed or from the file; one that was torn apart says nothing."""
        try:
            report = json.loads(text)["compilation_report"]
            for graph, entry in report.items():
                self.statuses[graph] = entry["status"]
                if "compile_time" in entry:  # torch-neuronx 2.1.2 (Neuron 2.19) and newer
                    self.seconds[graph] = entry["compile_time"]
        except (ValueError, KeyError, TypeError, AttributeError):
            return

    def module_names(self) -> set[str]:
        """neuronxcc-VERSION/MODULE_... of every graph that was traced."""
        return {"/".join(Path(path).parts[-3:-1]) for path in self.extracted | self.reused}


def check_installed() -> str:
    """Where the program is. Raises UserError where it is not."""
    found = shutil.which(PROGRAM)
    if found is None:
        raise UserError(
            f"{PROGRAM} is not installed; it comes with torch-neuronx",
            where="compile",
            fix="Use the Neuron image: image.repository of a build from trainer/Dockerfile.",
        )
    return found


def run(what: What, command: Sequence[str], environment: Mapping[str, str]) -> tuple[int, Summary]:
    """Run the program on ``command`` to its end, its output streamed; its exit status and what it said.

    Ends this process as a signal asks; nothing of it is left then, nor when this process is killed.
    """
    arguments = [check_installed(), *(["--command", what] if what != "collect-and-compile" else [])]
    if what in ("collect-and-compile", "compile") and (number := compilers()):
        arguments += ["--num_parallel", str(number)]
    summary = Summary()

    def on_line(name: str, line: str) -> None:
        print(line, flush=True)
        summary.read_line(line)

    with tempfile.TemporaryDirectory() as scratch:
        own: dict[str, str] = {**environment, "NEURON_PARALLEL_COMPILE_DUMP_RESULTS": "1"}
        # Ignoring a trial run that failed would hide that graphs are missing.
        own.pop("NEURON_IGNORE_TRAINING_SCRIPT_ERROR_AND_COMPILE", None)
        try:
            status = run_together([Command(PROGRAM, (*arguments, *command), own, Path(scratch))], on_line)
        except Interrupted as interrupted:
            sys.exit(interrupted.status)
        for report in sorted(Path(scratch).glob("neuron_parallel_compile_results_*.json")):
            summary.read_report(report.read_text(encoding="utf-8"))
    return status, summary


def compilers() -> int | None:
    """How many compilers fit in this container; None where it has the machine's memory, which the program sees."""
    limit = memory_limit()
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if limit is None or limit >= machine:
        return None
    return max(1, limit // MEMORY_OF_ONE)


def memory_limit() -> int | None:
    """The container's memory limit in bytes (cgroup v2 or v1), where it has one."""
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            return int(Path(file).read_text(encoding="ascii"))
        except (OSError, ValueError):  # not this version, or "max"
            continue
    return None


def report_facts(summary: Summary) -> dict[str, Any]:
    """What of the summary goes into a manifest."""
    return {"totals": summary.totals, "secondsOfSlowest": round(max(summary.seconds.values(), default=0.0), 1)}
