"""The compile stage on Trainium: run neuron_parallel_compile with the workers of the train stage.

Every node runs the program with its launcher of workers. torchrun joins the launchers for the trial run, which ends on
all nodes together. Then each node compiles the graphs that its workers traced (except those another node compiles),
writes a report to the run's folder, and waits for the other nodes: a PyTorchJob counts as done when the first of its
pods ends. The first node writes the manifest once all reports say that everything is compiled.

No result of the trial run is real: with NEURON_EXTRACT_GRAPHS_ONLY devices return zeros.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from genvalues.common import files
from genvalues.common.errors import Unavailable, UserError
from genvalues.common.json_files import InvalidJson, PathInside, as_record, read_record
from genvalues.common.text import duration
from llama_lora.backends import failures as worker_failures
from llama_lora.backends import launch
from llama_lora.backends.provenance import differences
from llama_lora.backends.xla import cache, tool
from llama_lora.backends.xla.cache import CacheUse, Module
from llama_lora.backends.xla.provenance import COMPILER, package_versions, provenance
from llama_lora.environment import THREADS_SET_BY_USER
from llama_lora.stage import Stage, rerun

log = logging.getLogger(__name__)

POLL_INTERVAL = 1.0  # seconds
TAIL = 15  # lines of a failed graph's log in the error message
# A diagnosis of the compiler, such as [TEN404] or [NCC_INLA001]: retrying gives the same result. A failure without one
# (out of memory, interrupted) can succeed when retried.
DIAGNOSIS = re.compile(r"\[[A-Z]{3,}(_[A-Z]+)?\d+\]")


@dataclass(frozen=True)
class Trial:
    """The content of trial.json: written when the trial run of all nodes has ended."""

    trial: Annotated[str, Field(pattern="^[0-9a-f]+$")]
    nodes: int


@dataclass(frozen=True)
class NodeReport:
    """A node's report to the others. Modules are neuronxcc-VERSION/MODULE_...; failures map a module to the reason."""

    node: str
    trial: str
    provenance: dict[str, Any]
    found: list[PathInside]
    failures: dict[str, str] = field(default_factory=dict)
    broken: str = ""  # why the node's program failed without a failed graph
    facts: dict[str, Any] = field(default_factory=dict)


def compile_graphs(stage: Stage) -> None:
    """On each node: trace and compile, or only collect the graphs (compile.runsOn: cpu), and write the manifest.

    Raises UserError or Unavailable if a graph did not compile or the trial run failed.
    """
    began = time.monotonic()
    cache.set_environment(stage.paths)
    tool.check_installed()
    folder = stage.paths.compile_reports
    with cache.using_cache(stage.paths, stage.name) as use, tempfile.TemporaryDirectory() as messages:
        (folder / "trial.json").unlink(missing_ok=True)  # no trial run ends before every node has passed this line
        clear_stale_locks(use)
        use.mark_working()
        only_collect = stage.config.compile.runs_on == "cpu"
        status, summary = tool.run_tool(
            "collect" if only_collect else "collect-and-compile",
            launch.launcher_command(stage.name, stage.paths),
            {**compile_environment(stage), launch.MESSAGES: messages},
        )
        worker_failures.raise_user_and_volume_errors(worker_failures.read(Path(messages)))
        trial = read_trial(folder)
        if trial is None:
            raise Unavailable(f"compile: the trial run failed on this node (status {status}); the log above says why")
        report = node_report(stage, use, trial.trial, status, summary, only_collect)
        files.write_json(folder / f"{trial.trial}-{use.id}.json", asdict(report))
        wait_for_all_nodes(stage, use, trial, only_collect)
    log.info(f"compile: done in {duration(time.monotonic() - began)}")


def compile_collected(stage: Stage) -> None:
    """The stage neff: compile, on a CPU node, the graphs that compile collected on the Trainium nodes."""
    collected = read_collected(stage)
    cache.set_environment(stage.paths)
    tool.check_installed()
    check_compiler(stage, collected.provenance.versions.get(COMPILER))
    traced = [cache.module_named(stage.paths.compile_cache, name) for name in collected.modules]
    with cache.using_cache(stage.paths, stage.name) as use:
        clear_stale_locks(use)
        use.mark_working()
        for module in traced:
            if module.has_failed:
                module.log.unlink()  # `--command compile` scans the cache and skips graphs with a log
        environment = compile_environment(stage)
        # Without a device the compiler needs to know its target (AWS Neuron docs of the vLLM plugin, "CPU compilation";
        # optimum-neuron sets the same variable in utils/instance.py).
        if collected.provenance.platform:
            environment.setdefault("NEURON_PLATFORM_TARGET_OVERRIDE", collected.provenance.platform)
        _, summary = tool.run_tool("compile", [], environment)  # its status covers graphs of other runs too
        wait_for_locked(use, traced)
        failures = failure_reasons(traced)
    raise_failures(stage, failures, [], len(traced))
    stage.facts = {"graphs": {"found": len(traced)}, **tool.report_facts(summary)}
    stage.finish([module.neff for module in traced])


@dataclass(frozen=True)
class CollectedWith:
    versions: dict[str, str]
    platform: str


@dataclass(frozen=True)
class Collected:
    """What neff reads of the facts of compile."""

    provenance: CollectedWith
    modules: list[PathInside]


def read_collected(stage: Stage) -> Collected:
    """Read which graphs compile has collected. Raises UserError if its manifest has none."""
    try:
        return as_record(stage.upstream("compile").facts, Collected)
    except InvalidJson as error:
        file = str(stage.paths.manifest("compile"))
        raise UserError(f"facts: {error}", where=file, fix=f"Delete the file and run {rerun('compile')}.") from None


def check_compiler(stage: Stage, collected_with: str | None) -> None:
    """Check that graphs are compiled with the compiler version that collected them (AWS's page on the program).

    Otherwise delete compile's manifest, so that they are collected again, and raise UserError.
    """
    here = package_versions().get(COMPILER)
    if here != collected_with:
        stage.paths.manifest("compile").unlink(missing_ok=True)
        raise UserError(
            f"the graphs were collected with {COMPILER} {collected_with}, but this image has {here}",
            where="neff",
            fix="Run `helm upgrade`: it collects them again with this image.",
        )


def record_trial_end(stage: Stage) -> None:
    """Record the end of the trial run, in the worker of rank 0: from now on every node must write its report."""
    nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    files.write_json(stage.paths.compile_reports / "trial.json", {"trial": uuid.uuid4().hex, "nodes": nodes})


def read_trial(folder: Path) -> Trial | None:
    """Read the end of the trial run; None if it has not ended."""
    try:
        return read_record(folder / "trial.json", Trial)
    except InvalidJson:
        return None


def compile_environment(stage: Stage) -> dict[str, str]:
    """This process's environment, with the flag to retry failed graphs if an earlier attempt left some."""
    folder = stage.paths.compile_cache
    retry = [cache.RETRY] if any(module.has_failed for module in cache.modules(folder)) else []
    environment = {**os.environ, cache.FLAGS: cache.flags(os.environ, folder, *retry)}
    if not THREADS_SET_BY_USER:  # the launcher divides the cores among its workers only if it is not set
        environment.pop("OMP_NUM_THREADS", None)
    return environment


def clear_stale_locks(use: CacheUse) -> None:
    """Clear the locks of killed compilations, unless another process uses the cache."""
    locked = cache.locked_modules(use.cache)
    if not locked:
        return
    log.info(f"compile: {len(locked)} graphs in the cache are locked; checking for other users of the cache")
    if not use.locks_are_stale():
        log.info("compile: the cache is in use, keeping the locks")
        return
    status, _ = tool.run_tool("clear-locks", [], {**os.environ})
    if status:
        raise Unavailable(f"compile: clearing the locks of {use.cache} failed with status {status}")


def node_report(
    stage: Stage, use: CacheUse, trial: str, status: int, summary: tool.Summary, only_collect: bool
) -> NodeReport:
    """Report the state of the graphs that this node's workers traced."""
    traced = sorted(cache.module_named(use.cache, name) for name in summary.module_names())
    if not traced and not cache.modules(use.cache):
        raise UserError(
            "the trial run produced no graphs",
            where=cache.FLAGS,
            fix="Remove --log_level: graphs are detected from the log.",
        )
    if only_collect:
        failures = {module.name: "was not collected" for module in traced if not module.graph.exists()}
    else:
        wait_for_locked(use, traced)
        failures = failure_reasons(traced)
    return NodeReport(
        node=use.id,
        trial=trial,
        provenance=provenance(stage),
        found=[module.name for module in traced],
        failures=failures,
        broken=f"{tool.PROGRAM} ended with status {status}" if status and not failures else "",
        facts=tool.report_facts(summary),
    )


def wait_for_locked(use: CacheUse, traced: list[Module]) -> None:
    """Wait for graphs that other users of the cache compile, as long as there are other users."""
    while waiting := [module for module in traced if module.is_locked and not module.is_compiled]:
        if not use.others.alive():
            return
        log.info(f"compile: waiting for {len(waiting)} graphs that other processes compile")
        time.sleep(POLL_INTERVAL)


def failure_reasons(traced: list[Module]) -> dict[str, str]:
    """Map each graph without a NEFF to the end of its log, or to what is known without a log."""
    return {module.name: failure_reason(module) for module in traced if not module.is_compiled}


def failure_reason(module: Module) -> str:
    if module.log.exists():
        lines = module.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-TAIL:])
    return "locked by a process that has ended" if module.is_locked else "not compiled, and no log"


def wait_for_all_nodes(stage: Stage, use: CacheUse, trial: Trial, only_collect: bool) -> None:
    """Wait for the reports of all nodes; all nodes then end alike, and the first writes the manifest.

    Reports of another trial are ignored. Raises Unavailable if a node has ended: torchrun needs all nodes again.
    """
    while True:
        if is_manifest_written(stage, trial):
            return
        reports = read_reports(stage.paths.compile_reports, trial.trial)
        if len(reports) >= trial.nodes:
            raise_failures(
                stage,
                {name: reason for report in reports for name, reason in report.failures.items()},
                [report.broken for report in reports if report.broken],
                len({name for report in reports for name in report.found}),
            )
            check_nodes_agree(reports)
            if reports[0].node == use.id:
                write_manifest(stage, reports, only_collect)
                return
        if use.other_nodes() + 1 < trial.nodes and not is_manifest_written(stage, trial):
            raise Unavailable("compile: another node ended before its graphs were compiled; all nodes start again")
        time.sleep(POLL_INTERVAL)


def is_manifest_written(stage: Stage, trial: Trial) -> bool:
    """Whether the first node has written the manifest of this trial."""
    manifest = stage.manifest
    return manifest is not None and manifest.facts.get("trial") == trial.trial


def read_reports(folder: Path, trial: str) -> list[NodeReport]:
    """Read the reports of a trial, sorted by node."""
    reports = []
    for file in folder.glob(f"{trial}-*.json"):
        with suppress(InvalidJson):  # written by another node, and not visible yet
            reports.append(read_record(file, NodeReport))
    return sorted(reports, key=lambda report: report.node)


def raise_failures(stage: Stage, failures: Mapping[str, str], broken: list[str], found: int) -> None:
    """Raise one error for all failures: UserError if the compiler has a diagnosis, else Unavailable (retried)."""
    if failures:
        diagnosed = [name for name, reason in failures.items() if DIAGNOSIS.search(reason)]
        name = min(diagnosed or failures)
        log_file = cache.module_named(stage.paths.compile_cache, name).log
        what = f"{len(failures)} of {found} graphs did not compile. The log of {name} ends with:\n{failures[name]}\n"
        if diagnosed:
            raise UserError(
                what,
                where=str(log_file),
                fix="Change a setting of the graph (docs/neuron-xla.md), or use another image. A rerun retries.",
            )
        raise Unavailable(f"{log_file}: {what}A rerun retries them. A compiler that was killed needs more memory.")
    if broken:
        raise Unavailable(f"compile: {'; '.join(sorted(set(broken)))}")


def check_nodes_agree(reports: list[NodeReport]) -> None:
    """Raise UserError if the nodes' graphs depend on different settings, versions or environments."""
    for report in reports[1:]:
        if differing := differences(reports[0].provenance, report.provenance):
            raise UserError(
                "the nodes differ:\n  " + "\n  ".join(differing) + "\n",
                where="compile",
                fix="Use the same image, environment and instance type on every node.",
            )


def write_manifest(stage: Stage, reports: list[NodeReport], only_collect: bool) -> None:
    """Write the manifest. Its outputs are the NEFFs (or graphs): without them the stage is not done."""
    found = sorted({name for report in reports for name in report.found})
    modules = [cache.module_named(stage.paths.compile_cache, name) for name in found]
    compiled = sum(report.facts["totals"].get("successful compilations", 0) for report in reports)
    graphs = {"found": len(found)}
    if not only_collect:
        graphs |= {"compiled": compiled, "failed": 0, "fromCache": max(0, len(found) - compiled)}
    stage.facts = {
        "trial": reports[0].trial,
        "graphs": graphs,
        "modules": found,
        "provenance": reports[0].provenance,
        "nodes": [report.facts for report in reports],
    }
    stage.finish([module.graph if only_collect else module.neff for module in modules])
    for file in stage.paths.compile_reports.glob("*.json"):
        file.unlink(missing_ok=True)
    log.info("compile: graphs: " + ", ".join(f"{number} {what}" for what, number in graphs.items()))
