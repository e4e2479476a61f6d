"""Run the trace of the real layout, and compare its memory with that of a core."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from genvalues.accelerators.instances import TRAINIUM
from genvalues.common.errors import UserError, UserErrors
from genvalues.common.process import Command, Interrupted, run_together

log = logging.getLogger(__name__)

WHERE = "rehearse: trace"
TRACER = "llama_lora.backends.native.trace"
FIX_PROBLEM = "Report it with the log of the stage, or set rehearse.enabled: false to train without a rehearsal."
# Every instance type of backend native has the same: 24 GiB.
CORE_MEMORY = min(instance.hbm for instance in TRAINIUM.values() if instance.generation.backend == "native")


def trace(config: Path, model: Path) -> dict[str, Any]:
    """Trace the run of a config file with the model of a folder, in another process; the summary.

    Raises UserError if it cannot be traced or does not fit.
    """
    lines: list[str] = []
    command = Command("trace", tuple(tracer_command(config, model)), dict(os.environ), config.parent)
    try:
        status = run_together([command], lambda name, line: lines.append(line))
    except Interrupted as interrupted:
        sys.exit(interrupted.status)
    summary = read_summary(lines)
    if status or summary is None:
        for line in lines:
            log.info(line)
        reason = next((line for line in reversed(lines) if line.strip()), "it has no output")
        raise UserError(f"the trace ended with status {status}: {reason}", where=WHERE, fix=FIX_PROBLEM)
    check_summary(summary)
    log.info(
        f"traced {summary['world']} workers: at most {summary['bytes']['peak'] / 2**30:.1f} GiB of a core's "
        f"{CORE_MEMORY / 2**30:.0f} GiB, {summary['graphs']} graphs, {len(summary['operators'])} operators"
    )
    return summary


def tracer_command(config: Path, model: Path) -> list[str]:
    """The command of the trace. The last line of its output is a JSON object."""
    return [sys.executable, "-m", TRACER, "--config", str(config), "--model", str(model / "config.json")]


def read_summary(lines: Sequence[str]) -> dict[str, Any] | None:
    """The last line that is a JSON object; warnings can follow it."""
    for line in reversed(lines):
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            return found
    return None


def check_summary(summary: Mapping[str, Any]) -> None:
    """Raise UserErrors for every problem of the trace, and if a worker needs more memory than a core has."""
    errors = [UserError(problem, where=WHERE, fix=FIX_PROBLEM) for problem in summary["problems"]]
    peak = summary["bytes"]["peak"]
    if peak > CORE_MEMORY:
        errors.append(
            UserError(
                f"a worker needs {peak / 2**30:.1f} GiB, and a core has {CORE_MEMORY / 2**30:.0f} GiB",
                where="parallelism.shardSize",
                fix="Raise it, or tensorParallelSize, or set training.activationCheckpointing: full, or lower "
                "training.perDeviceBatchSize or maxSequenceLength.",
            )
        )
    if errors:
        raise UserErrors(errors)
