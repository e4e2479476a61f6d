"""Run neuron_parallel_compile, AWS's program that traces the graphs of a trial run and compiles them in parallel.

Sources: AWS Neuron docs, "PyTorch NeuronX neuron_parallel_compile CLI", and the program
(torch_neuronx/parallel_compile/neuron_parallel_compile.py of torch-neuronx 2.6):

 - Its exit status is 1 if the trial run fails, with any status; otherwise the number of graphs that failed (a shell
   sees the last 8 bits); 0 also if a process of its pool crashed. So the content of the cache decides, not the status.
 - It skips a graph that another process has locked, and leaves it out of the summary.
 - If there is no graph to compile, it exits with 0 and prints no summary.
 - It finds the graphs by the lines "Extracting graphs (PATH)" in the trial run's output.
 - With NEURON_PARALLEL_COMPILE_DUMP_RESULTS=1 it writes the summary to neuron_parallel_compile_results_TIME.json in the
   current folder. That file is read, because other output can come between the lines of the printed summary.
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
ToolCommand = Literal["collect-and-compile", "collect", "compile", "clear-locks"]
EXTRACTED = re.compile(r"Extracting graphs \((?P<graph>[^)]+)\)")
REUSED = re.compile(r"Using a cached neff at (?P<neff>\S+?/model\.neff)")
TOTAL = re.compile(r"Total (?P<what>graphs|successful compilations|failed compilations): (?P<number>\d+)")
TRIAL_FAILED = "There was an error in the training script."
GIB = 2**30
MEMORY_OF_ONE = 64 * GIB  # the program's rule: one compiler per 64 GiB of the machine


@dataclass
class Summary:
    """The program's output, parsed. ``statuses`` and ``seconds`` map the path of a graph's file."""

    extracted: set[str] = field(default_factory=set)
    reused: set[str] = field(default_factory=set)
    statuses: dict[str, bool] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    totals: dict[str, int] = field(default_factory=dict)
    trial_failed: bool = False
    _json: list[str] | None = None

    def read_line(self, line: str) -> None:
        """Parse one line of the output."""
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
        """Parse a report, printed or from the file. Ignores one that is not valid JSON."""
        try:
            report = json.loads(text)["compilation_report"]
            for graph, entry in report.items():
                self.statuses[graph] = entry["status"]
                if "compile_time" in entry:  # torch-neuronx 2.1.2 (Neuron 2.19) and newer
                    self.seconds[graph] = entry["compile_time"]
        except (ValueError, KeyError, TypeError, AttributeError):
            return

    def module_names(self) -> set[str]:
        """The names neuronxcc-VERSION/MODULE_... of all graphs that were traced."""
        return {"/".join(Path(path).parts[-3:-1]) for path in self.extracted | self.reused}


def check_installed() -> str:
    """Return the program's path. Raises UserError if it is not installed."""
    found = shutil.which(PROGRAM)
    if found is None:
        raise UserError(
            f"{PROGRAM} not found; it is part of torch-neuronx",
            where="compile",
            fix="Use the Neuron image (built from trainer/Dockerfile): set image.repository.",
        )
    return found


def run_tool(what: ToolCommand, command: Sequence[str], environment: Mapping[str, str]) -> tuple[int, Summary]:
    """Run the program on ``command``, print its output, and return its exit status and summary.

    A signal ends this process. Then, and if this process is killed, no child process is left.
    """
    arguments = [check_installed(), *(["--command", what] if what != "collect-and-compile" else [])]
    if what in ("collect-and-compile", "compile") and (number := compilers()):
        arguments += ["--num_parallel", str(number)]
    summary = Summary()

    def on_line(name: str, line: str) -> None:
        print(line, flush=True)
        summary.read_line(line)

    with tempfile.TemporaryDirectory() as scratch:
        with_report: dict[str, str] = {**environment, "NEURON_PARALLEL_COMPILE_DUMP_RESULTS": "1"}
        # Ignoring a failed trial run would hide missing graphs.
        with_report.pop("NEURON_IGNORE_TRAINING_SCRIPT_ERROR_AND_COMPILE", None)
        try:
            status = run_together([Command(PROGRAM, (*arguments, *command), with_report, Path(scratch))], on_line)
        except Interrupted as interrupted:
            sys.exit(interrupted.status)
        for report in sorted(Path(scratch).glob("neuron_parallel_compile_results_*.json")):
            summary.read_report(report.read_text(encoding="utf-8"))
    return status, summary


def compilers() -> int | None:
    """The number of compilers that fit in the container's memory; None if the container has no limit."""
    limit = memory_limit()
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if limit is None or limit >= machine:
        return None
    return max(1, limit // MEMORY_OF_ONE)


def memory_limit() -> int | None:
    """The container's memory limit in bytes (cgroup v2 or v1); None if it has none."""
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            return int(Path(file).read_text(encoding="ascii"))
        except (OSError, ValueError):  # another cgroup version, or "max"
            continue
    return None


def report_facts(summary: Summary) -> dict[str, Any]:
    """The part of the summary for a manifest's facts."""
    return {"totals": summary.totals, "secondsOfSlowest": round(max(summary.seconds.values(), default=0.0), 1)}
