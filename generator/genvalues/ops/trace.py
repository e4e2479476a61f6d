"""Trace a run's engine with the trainer's libraries: `genvalues plan --trace`."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from genvalues.common.errors import EXIT_USER_ERROR, UserError, UserErrors
from genvalues.inputs.write import Checked
from genvalues.planner.planning import Plan
from genvalues.planner.trace import InvalidTrace, Trace, parse
from genvalues.settings.run import RunConfig

OPTION = "--trace"
TRACER = "llama_lora.backends.native.trace"
LIBRARIES = ("llama_lora", "torch")


class TraceFailed(Exception):
    """The tracer failed for a reason that is not in the inputs."""


def with_trace(found: Checked) -> Plan:
    """The plan of checked inputs with the trace of exactly this run. Raises UserError where there is nothing to trace.

    The tracer needs the sizes of the model, but no weights and no device.
    """
    plan = found.plan
    if plan.backend != "native" or found.inputs.on_cpu:
        raise UserError(
            f"traces backend native on Trainium; this run has backend {plan.backend} on {plan.instance}",
            where=OPTION,
            fix="Remove it, or use a Trn2 instance.",
        )
    if plan.model.config is None or plan.memory is None:
        raise UserError(
            f"needs the architecture of {plan.model.name}, which is unknown: {plan.model.unknown}",
            where=OPTION,
            fix="Write a model id of the Hub.",
        )
    with tempfile.TemporaryDirectory(prefix="genvalues-trace-") as folder:
        config = write_run(found.values, plan.model.config, Path(folder))
        return plan._replace(trace=run_tracer(tracer_command(config)))


def write_run(values: dict[str, Any], model: Any, folder: Path) -> Path:
    """Write run.yaml, the run config of these values, and beside it the config.json that it names as its model."""
    (folder / "config.json").write_text(json.dumps(model), encoding="utf-8")
    return write_config(values, folder, device="neuron", model={"path": str(folder)})


def write_config(values: dict[str, Any], folder: Path, **changes: Any) -> Path:
    """Write run.yaml, the run config of these values with some blocks changed."""
    keys = {RunConfig.key_of(name) for name in RunConfig.model_fields}
    blocks = {key: value for key, value in values.items() if key in keys}
    config = RunConfig.model_validate({**blocks, **changes})
    file = folder / "run.yaml"
    file.write_text(json.dumps(config.as_keys()), encoding="utf-8")  # JSON is YAML
    return file


def tracer_command(config: Path) -> list[str]:
    """Raises UserError if the trainer's libraries are not installed."""
    require_trainer("needs", OPTION)
    return [sys.executable, "-m", TRACER, "--config", str(config)]


def require_trainer(needs: str, where: str = "") -> None:
    """Raise UserError if the trainer's libraries are not installed. ``needs``: the beginning of the message."""
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"{needs} {' and '.join(missing)}, which this environment does not have",
            where=where,
            fix="Install the package with its extra `trainer`, or run genvalues in the image.",
        )


def run_tracer(command: Sequence[str]) -> Trace:
    """Run the tracer; its messages go to stderr. Raises UserError if it ends with status 2, else TraceFailed."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode == EXIT_USER_ERROR:
        raise UserError("the run cannot be traced", where=OPTION, fix="See the error above.")
    if done.returncode != 0:
        raise TraceFailed(f"the tracer ended with status {done.returncode}; its error is above")
    try:
        return parse(done.stdout)
    except InvalidTrace as error:
        raise TraceFailed(f"the tracer's output is invalid: {error}") from None


def refuse_problems(trace: Trace) -> None:
    """Raise UserErrors if the trace found something that ends the run."""
    if trace.problems:
        raise UserErrors([UserError(problem, where=OPTION) for problem in trace.problems])
