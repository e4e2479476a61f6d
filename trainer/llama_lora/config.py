"""Read the run config: the settings of a run, which the chart renders into a ConfigMap (genvalues.settings.run)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from genvalues.common.errors import UserError, UserErrors
from genvalues.common.json_files import InvalidJson, read_bytes
from genvalues.common.rendered_yaml import RenderedLoader
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
MOST_BYTES = 1 << 20  # what a ConfigMap can hold
XLA_ATTENTION = {new: old for old, new in OLDER_ATTENTION.items()}


def recorded_backend(config: RunConfig) -> str:
    """The backend as fingerprints record it."""
    return XLA_BACKEND if config.backend == "xla" else config.backend


def recorded_attention(config: RunConfig) -> str:
    """training.attention as fingerprints record it."""
    attention = config.training.attention
    return XLA_ATTENTION.get(attention, attention) if config.backend == "xla" else attention


# What PyYAML raises for text that it cannot read: also errors of any kind for values that do not fit their tag.
# ValueError is that of text that is not UTF-8, too.
INVALID_YAML = (
    yaml.YAMLError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


class UniqueKeys(RenderedLoader):
    """A loader of what Helm rendered, which refuses a second value of a key instead of taking it."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: dict[tuple[str, str], yaml.ScalarNode] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and (first := keys.setdefault((key.tag, key.value), key)) is not key:
                problem = f"duplicate key {key.value}, first in line {first.start_mark.line + 1}. Keep one of the two"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
        return super().construct_mapping(node, deep)


def load(path: Path) -> RunConfig:
    """Read and check a run config file.

    Raises UserErrors with one line per mistake, or UserError where the file cannot be read.
    """
    try:
        file = Path(os.path.realpath(path))  # the files of a mounted ConfigMap are links
        content = yaml.load(read_bytes(file, MOST_BYTES).decode("utf-8"), Loader=UniqueKeys)
    except InvalidJson as error:
        raise UserError(str(error), where=str(path), fix="Pass --config FILE.") from None
    except INVALID_YAML as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        problem = one_line(getattr(error, "problem", None) or str(error) or type(error).__name__, 200)
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
