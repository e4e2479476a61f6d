"""Run all stages of the chart on this computer, one after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from genvalues.common import helm
from genvalues.common.dicts import merge
from genvalues.common.errors import UserError
from genvalues.common.process import Command, Interrupted, Process, run_together
from genvalues.common.text import has_surrogate
from genvalues.inputs.chart import NAME, need_chart
from genvalues.inputs.input_options import Sources
from genvalues.ops.local.chart_stages import Object, run_name, skipped_stages, stages_to_run
from genvalues.ops.local.containers import LocalStage, Machine, python_folder
from genvalues.ops.local.forks import Forks
from genvalues.ops.local.local_values import values_to_run
from genvalues.ops.local.screen import Outcome, Screen, StageOutput
from genvalues.ops.local.workspace_lock import locked
from genvalues.settings.dataset_files import CHAINED, is_chained

RELEASE = "llama-lora"  # the chart needs a release name; values.name names the run


def run_locally(sources: Sources, workspace: Path, *, on_cpu: bool = False) -> int:
    """Run all stages of an inputs file, a values file, or a bundle's values; return 0 or the failing stage's status.

    ``on_cpu`` runs values for Trainium on the CPU, as one process.
    """
    what = ""
    if has_surrogate(str(workspace.resolve())):  # such as a byte of Latin-1: no YAML and JSON could name it
        what = "its path is not UTF-8"
    elif is_chained(workspace.resolve()):
        what = CHAINED
    if what:
        raise UserError(what, where=f"--workspace {workspace}", fix="Use a folder with another name.")
    try:
        objects = rendered_objects(sources, on_cpu)
        with locked(workspace) as lock:
            machine = Machine(workspace.resolve(), objects, relay_progress=Screen.is_terminal())
            stages = [machine.stage(item) for item in stages_to_run(objects)]
            screen = Screen()
            screen.show_skipped(skipped_stages(objects))
            with Forks(python_folder() / "llama-lora", lock) as forks:
                status = run_local_stages(stages, machine.logs, screen, forks.start)
        if status == 0:
            screen.show_next_steps(workspace / "runs" / run_name(objects))
        return status
    except KeyboardInterrupt:  # not while a stage runs: then the signal stops the stage
        return 130


def rendered_objects(sources: Sources, on_cpu: bool) -> list[Object]:
    """The objects of the chart, rendered in mode attached, as the runner in a cluster renders them."""
    chart = need_chart(sources.chart)
    values = values_to_run(sources, chart, on_cpu)
    objects = helm.render(chart, RELEASE, merge(values, {"pipeline": {"mode": "attached"}}))
    if not stages_to_run(objects):
        raise UserError(
            "no stage of this chart runs on this computer",
            where=str(chart),
            fix=f"Name the folder of the chart {NAME}.",
        )
    return objects


def run_local_stages(
    stages: Sequence[LocalStage], logs: Path, screen: Screen, start: Callable[[Command], Process]
) -> int:
    """Run the stages until one fails; return its status, or 0."""
    outcomes = [Outcome(stage.name) for stage in stages]
    status = 0
    for stage, outcome in zip(stages, outcomes, strict=True):
        began = time.monotonic()
        with screen.stage(stage.name, logs / f"{stage.name}.log") as output:
            try:
                status = run_local_stage(stage, output, start)
                outcome.result = f"failed with status {status}" if status else "done"
            except Interrupted as interrupted:
                status = interrupted.status
                output.tail.clear()
                outcome.result = f"stopped by {interrupted}"
        outcome.seconds = time.monotonic() - began
        if status:
            break
    screen.show_table(outcomes)
    if status:
        screen.show_failure(outcome, output)
    return status


def run_local_stage(stage: LocalStage, output: StageOutput, start: Callable[[Command], Process]) -> int:
    """Run the groups of a stage until one fails; return its status, or 0."""
    for group in stage.groups:

        def on_line(name: str, line: str, several: bool = len(group) > 1) -> None:
            output.write(line, prefix=f"[{name}] " if several else "")

        if status := run_together(group, on_line, start):
            return status
    return 0
