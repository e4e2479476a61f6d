"""The compile stage on Trainium: neuron_parallel_compile around the train stage's own workers.

Every node runs the program on its own launcher of workers; torchrun joins those for the trial run, which ends on all
nodes at once. Then each node compiles what its workers have traced (what another node compiles is left to it), tells
the others in the run's folder, and waits for them: a PyTorchJob counts as done as soon as one of its pods has ended.
The manifest is written by the first node, when all have told that everything is compiled.

No result of the trial run is real: with NEURON_EXTRACT_GRAPHS_ONLY devices return zeros.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from genvalues.common import files
from genvalues.common.errors import Unavailable, UserError, UserErrors
from genvalues.common.text import duration
from llama_lora import launch
from llama_lora.backends.neuron import cache, tool
from llama_lora.backends.neuron.cache import Module, Use
from llama_lora.backends.neuron.provenance import COMPILER, differences, provenance, versions
from llama_lora.environment import THREADS_ARE_THE_USERS
from llama_lora.stage import Stage

LOOK = 1.0  # seconds between two looks at what the others have told
TAIL = 15  # lines of a failed graph's log that are shown
# A diagnosis of the compiler, [TEN404] or [NCC_INLA001]: it will say the same again. Without one (killed for its
# memory, interrupted) trying again can help.
DIAGNOSIS = re.compile(r"\[[A-Z]{3,}(_[A-Z]+)?\d+\]")


@dataclass(frozen=True)
class NodeReport:
    """What a node tells the others. Modules are neuronxcc-VERSION/MODULE_..., failures the reasons by module."""

    node: str
    trial: str
    provenance: dict[str, Any]
    found: list[str]
    failures: dict[str, str] = field(default_factory=dict)
    broken: str = ""  # why the node's program ended badly, where it did
    facts: dict[str, Any] = field(default_factory=dict)


def compile_graphs(stage: Stage) -> None:
    """On each node: trace and compile, or only collect the graphs (compile.runsOn: cpu), and see to the manifest.

    Raises UserError or Unavailable where a graph did not compile; ends with status 1 where the trial run failed.
    """
    began = time.monotonic()
    cache.set_environment(stage.paths)
    tool.check_installed()
    folder = stage.paths.compile_reports
    with cache.used(stage.paths, stage.name) as use, tempfile.TemporaryDirectory() as messages:
        (folder / "trial.json").unlink(missing_ok=True)  # no trial run ends before every node has come by here
        clear_stale_locks(use)
        use.working()
        only_collect = stage.config.compile.runs_on == "cpu"
        status, said = tool.run(
            "collect" if only_collect else "collect-and-compile",
            launch.launcher_command(stage.name, stage.paths),
            {**compile_environment(stage), launch.MESSAGES: messages},
        )
        if told := launch.messages_in(Path(messages)):
            raise UserErrors(told)
        trial = trial_of(folder)
        if trial is None:
            raise Unavailable(f"compile: the trial run failed on this node (status {status}); why is said above")
        report = node_report(stage, use, trial["trial"], status, said, only_collect)
        files.write_json(folder / f"{trial['trial']}-{use.id}.json", asdict(report))
        settle(stage, use, trial, only_collect)
    print(f"compile: done in {duration(time.monotonic() - began)}", flush=True)


def compile_collected(stage: Stage) -> None:
    """The stage neff: compile, on a CPU node, what compile has collected on the Trainium nodes."""
    collected = stage.upstream("compile").facts
    cache.set_environment(stage.paths)
    tool.check_installed()
    check_compiler(stage, collected["provenance"]["versions"].get(COMPILER))
    traced = [cache.module_named(stage.paths.compile_cache, name) for name in collected["modules"]]
    with cache.used(stage.paths, stage.name) as use:
        clear_stale_locks(use)
        use.working()
        for module in traced:
            if module.has_failed:
                module.log.unlink()  # `--command compile` scans the cache and takes a graph with this file for done
        environment = compile_environment(stage)
        # Without a device the compiler has to be told what it compiles for (AWS Neuron docs of the vLLM plugin, "CPU
        # compilation"; optimum-neuron sets the same variable in utils/instance.py).
        if collected["provenance"]["platform"]:
            environment.setdefault("NEURON_PLATFORM_TARGET_OVERRIDE", collected["provenance"]["platform"])
        _, said = tool.run("compile", [], environment)  # its status counts other runs' graphs too
        wait_for_locked(use, traced)
        failures = failures_of(traced)
    raise_failures(stage, failures, [], len(traced))
    stage.facts = {"graphs": {"found": len(traced)}, **tool.report_facts(said)}
    stage.finish([module.neff for module in traced])


def check_compiler(stage: Stage, collected_with: str | None) -> None:
    """Graphs must be collected and compiled with one version of the compiler (AWS's page on the program).

    Raises UserError where they are not, and takes compile's manifest away, so that they are collected again.
    """
    here = versions().get(COMPILER)
    if here != collected_with:
        stage.paths.manifest("compile").unlink(missing_ok=True)
        raise UserError(
            f"the graphs were collected with {COMPILER} {collected_with}, and here is {here}",
            where="neff",
            fix="`helm upgrade` collects them again, with this image.",
        )


def trial_ended(stage: Stage) -> None:
    """In the worker of rank 0, when the trial run is over on all workers: now every node's report is due."""
    nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    files.write_json(stage.paths.compile_reports / "trial.json", {"trial": uuid.uuid4().hex, "nodes": nodes})


def trial_of(folder: Path) -> dict[str, Any] | None:
    return json_of(folder / "trial.json")


def json_of(file: Path) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content


def compile_environment(stage: Stage) -> dict[str, str]:
    """This process's environment, and where an earlier attempt has left failed graphs the flag to try them again."""
    there = stage.paths.compile_cache
    again = [cache.RETRY] if any(module.has_failed for module in cache.modules(there)) else []
    own = {**os.environ, cache.FLAGS: cache.flags(os.environ, there, *again)}
    if not THREADS_ARE_THE_USERS:  # our own number would look like the user's to the launcher, which shares the cores
        own.pop("OMP_NUM_THREADS", None)
    return own


def clear_stale_locks(use: Use) -> None:
    """Clear what killed compilations have left, where nothing else uses the cache; else leave it alone, and say so."""
    locked = cache.locked_modules(use.cache)
    if not locked:
        return
    print(f"compile: {len(locked)} graphs of the cache are locked; looking for who uses it", flush=True)
    if not use.nobody_else():
        print("compile: the cache is in use, so the locks stay", flush=True)
        return
    status, _ = tool.run("clear-locks", [], {**os.environ})
    if status:
        raise Unavailable(f"compile: clearing the locks of {use.cache} ended with status {status}")


def node_report(stage: Stage, use: Use, trial: str, status: int, said: tool.Summary, only_collect: bool) -> NodeReport:
    """What became of the graphs that this node's workers have traced."""
    traced = sorted(cache.module_named(use.cache, name) for name in said.module_names())
    if not traced and not cache.modules(use.cache):
        raise UserError(
            "the trial run has told of no graph",
            where=cache.FLAGS,
            fix="Leave --log_level away: the graphs are found in the log.",
        )
    if only_collect:
        failures = {module.name: "was not collected" for module in traced if not module.graph.exists()}
    else:
        wait_for_locked(use, traced)
        failures = failures_of(traced)
    return NodeReport(
        node=use.id,
        trial=trial,
        provenance=provenance(stage),
        found=[module.name for module in traced],
        failures=failures,
        broken=f"{tool.PROGRAM} ended with status {status}" if status and not failures else "",
        facts=tool.report_facts(said),
    )


def wait_for_locked(use: Use, traced: list[Module]) -> None:
    """Wait for graphs that other users of the cache compile, as long as there are any."""
    while waiting := [module for module in traced if module.is_locked and not module.is_compiled]:
        if not use.others.look():
            return
        print(f"compile: waiting for {len(waiting)} graphs that others compile", flush=True)
        time.sleep(LOOK)


def failures_of(traced: list[Module]) -> dict[str, str]:
    """Why each graph that has no NEFF has none: the end of its log, or what is known without one."""
    return {module.name: reason_of(module) for module in traced if not module.is_compiled}


def reason_of(module: Module) -> str:
    if module.log.exists():
        lines = module.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-TAIL:])
    return "is locked by a process that is gone" if module.is_locked else "was not compiled, and has no log"


def settle(stage: Stage, use: Use, trial: Mapping[str, Any], only_collect: bool) -> None:
    """Wait until every node has told how it went; then all end alike, the first of them with the manifest.

    Reports of another trial don't count. Raises Unavailable where a node is gone: torchrun needs all of them again.
    """
    while True:
        if is_settled(stage, trial):
            return
        reports = read_reports(stage.paths.compile_reports, trial["trial"])
        if len(reports) >= trial["nodes"]:
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
        if use.colleagues() + 1 < trial["nodes"] and not is_settled(stage, trial):
            raise Unavailable("compile: another node has ended before its graphs were compiled; all start again")
        time.sleep(LOOK)


def is_settled(stage: Stage, trial: Mapping[str, Any]) -> bool:
    """Whether the first node has written the manifest; asked again once it may have ended since."""
    manifest = stage.manifest
    return manifest is not None and manifest.facts.get("trial") == trial["trial"]


def read_reports(folder: Path, trial: str) -> list[NodeReport]:
    """The reports of a trial, by node."""
    contents = [json_of(file) for file in sorted(folder.glob(f"{trial}-*.json"))]
    return sorted((NodeReport(**content) for content in contents if content), key=lambda report: report.node)


def raise_failures(stage: Stage, failures: Mapping[str, str], broken: list[str], found: int) -> None:
    """One message for all of them; status 2 where the compiler has a diagnosis, else 1, which is tried again."""
    if failures:
        diagnosed = [name for name, reason in failures.items() if DIAGNOSIS.search(reason)]
        name = min(diagnosed or failures)
        log = cache.module_named(stage.paths.compile_cache, name).log
        what = f"{len(failures)} of {found} graphs did not compile. {name} ends with:\n{failures[name]}\n"
        if diagnosed:
            raise UserError(
                what,
                where=str(log),
                fix="Change what the graph is made of (docs/neuron.md), or use another image; a rerun tries it again.",
            )
        raise Unavailable(f"{log}: {what}A rerun tries them again; killed compilers want more memory.")
    if broken:
        raise Unavailable(f"compile: {'; '.join(sorted(set(broken)))}")


def check_nodes_agree(reports: list[NodeReport]) -> None:
    """Raises UserError where the nodes trace for different things."""
    for report in reports[1:]:
        if differing := differences(reports[0].provenance, report.provenance):
            raise UserError(
                "the nodes differ:\n  " + "\n  ".join(differing) + "\n",
                where="compile",
                fix="Give every node the same image, environment and instance type.",
            )


def write_manifest(stage: Stage, reports: list[NodeReport], only_collect: bool) -> None:
    """What was found and compiled, and for what. Outputs are the NEFFs: without them the stage is not done."""
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
    told = ", ".join(f"{number} {what}" for what, number in graphs.items())
    print(f"compile: graphs: {told}", flush=True)
