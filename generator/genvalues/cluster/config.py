"""cluster.yaml: what the chart passes to these commands about the release."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from genvalues.common.errors import UserError, UserErrors
from genvalues.common.rendered_yaml import load_rendered


class ConfigBlock(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="forbid", frozen=True)


class WorkspaceClaim(ConfigBlock):
    name: str = Field(min_length=1)
    managed: bool  # created by this release, not storage.existingClaim


class SecretReference(ConfigBlock):
    name: str = Field(min_length=1)
    key: str = ""  # empty: any key may be missing


class JobNodes(ConfigBlock):
    nodes: int = Field(ge=1)
    instance: str
    devices: dict[str, int] = {}  # per node, by resource name
    queue_name: str = ""  # Kueue LocalQueue
    cpu_queue_name: str = ""  # that of the stages on CPU nodes
    priority_class: str = ""  # Kueue WorkloadPriorityClass


class TrainLimits(ConfigBlock):
    unschedulable_timeout_seconds: float = Field(default=1800, gt=0)


class GuardLimits(ConfigBlock):
    max_cost: float | None = Field(default=None, gt=0)  # dollars, for the whole run
    price_per_node_hour: float | None = Field(default=None, gt=0)  # dollars
    stall_timeout_seconds: float = Field(default=0, ge=0)  # 0: no limit


class ChartVersions(ConfigBlock):
    version: str
    app_version: str


class ClusterConfig(ConfigBlock):
    release: str = Field(min_length=1)
    namespace: str = Field(min_length=1)
    fullname: str = Field(min_length=1)
    revision: int
    run: str = Field(min_length=1)  # value of the label llama-lora/run
    workload: Literal["pytorchjob", "trainjob"] = "pytorchjob"
    chart: ChartVersions
    claim: WorkspaceClaim
    storage_prepare: bool  # whether the release has the stage storage-prepare, whose pod runs as root
    secret: SecretReference | None = None  # with the token
    other_secrets: list[SecretReference] = []
    job: JobNodes
    cluster_scoped_reads: bool
    train: TrainLimits = TrainLimits()
    guards: GuardLimits = GuardLimits()


def load(path: Path) -> ClusterConfig:
    """Read and validate ``path``. Raises UserError with every problem in it."""
    values = read_yaml(path, fix="Pass the file that the chart mounts at /etc/llama-lora/cluster.yaml")
    if not isinstance(values, dict):
        raise UserError("must be a mapping with the keys release, namespace, claim, job ...", where=str(path))
    try:
        return ClusterConfig.model_validate(values)
    except ValidationError as invalid:
        problems = [
            UserError(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}", where=str(path))
            for problem in invalid.errors()
        ]
        raise UserErrors(problems) from invalid


def read_yaml(path: Path, fix: str = "") -> Any:
    """The parsed content of a YAML file. Raises UserError; ``fix`` is for a file that cannot be read."""
    try:
        return load_rendered(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path), fix=fix) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"invalid YAML: {' '.join(str(error).split())}", where=str(path)) from error
