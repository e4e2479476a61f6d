"""Read the run config: the settings of a run, which the chart renders into a ConfigMap (genvalues.settings.run)."""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import ValidationError

from genvalues.common.errors import UserError, UserErrors
from genvalues.common.text import one_line
from genvalues.settings.run import (
    EVALUATES,
    OLDER_ATTENTION,
    OLDER_BACKENDS,
    ActivationCheckpointing,
    Compile,
    Dataset,
    DeviceType,
    Evaluation,
    Lora,
    Model,
    Monitoring,
    Parallelism,
    Probe,
    Publish,
    RunConfig,
    Training,
    Verify,
)

__all__ = [
    "EVALUATES",
    "ActivationCheckpointing",
    "Compile",
    "Dataset",
    "DeviceType",
    "Evaluation",
    "Lora",
    "Model",
    "Monitoring",
    "Parallelism",
    "Probe",
    "Publish",
    "RunConfig",
    "Training",
    "Verify",
    "load",
]

# xla runs keep the words of release 0.1 in fingerprints and records, so that an upgrade repeats none of their stages.
XLA_BACKEND = {new: old for old, new in OLDER_BACKENDS.items()}["xla"]
XLA_ATTENTION = {new: old for old, new in OLDER_ATTENTION.items()}


def recorded_backend(config: RunConfig) -> str:
    """The backend as fingerprints record it."""
    return XLA_BACKEND if config.backend == "xla" else config.backend


def recorded_attention(config: RunConfig) -> str:
    """training.attention as fingerprints record it."""
    attention = config.training.attention
    return XLA_ATTENTION[attention] if config.backend == "xla" else attention


def load(path: Path) -> RunConfig:
    """Read and check a run config file.

    Raises UserErrors with one line per mistake, or UserError where the file cannot be read.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the file: {error.strerror}", where=str(path), fix="Pass --config FILE.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that does not exist, no UTF-8
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        problem = one_line(getattr(error, "problem", None) or str(error), 200)
        raise UserError(f"not valid YAML: {problem}", where=where) from None
    if not isinstance(content, dict):
        raise UserError("must contain keys and values", where=str(path), fix="The chart renders one as a ConfigMap.")
    try:
        return RunConfig.model_validate(content)
    except ValidationError as error:
        raise UserErrors(
            [
                UserError(mistake["msg"], where=f"{path} {'.'.join(str(part) for part in mistake['loc'])}")
                for mistake in error.errors()
            ]
        ) from None
