"""cluster.yaml: what the chart tells these commands about the release."""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from genvalues.common.errors import UserError, UserErrors


class Section(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="forbid", frozen=True)


class Claim(Section):
    name: str = Field(min_length=1)
    managed: bool  # made by this release, not storage.existingClaim


class TokenSecret(Section):
    name: str = Field(min_length=1)
    key: str = Field(min_length=1)


class Job(Section):
    nodes: int = Field(ge=1)
    instance: str
    devices: dict[str, int] = {}  # per node
    queue_name: str = ""  # Kueue's local queue


class Train(Section):
    unschedulable_timeout_seconds: float = Field(default=1800, gt=0)


class Guards(Section):
    max_cost: float | None = Field(default=None, gt=0)  # dollars, of the whole run
    price_per_node_hour: float | None = Field(default=None, gt=0)  # dollars
    stall_timeout_seconds: float = Field(default=0, ge=0)  # 0: none


class Chart(Section):
    version: str
    app_version: str


class ClusterConfig(Section):
    release: str = Field(min_length=1)
    namespace: str = Field(min_length=1)
    fullname: str = Field(min_length=1)
    revision: int
    run: str = Field(min_length=1)  # the value of the label RUN
    chart: Chart
    claim: Claim
    storage_prepare: bool  # whether the release has that stage, whose pod runs as root
    secret: TokenSecret | None = None
    job: Job
    cluster_scoped_reads: bool
    train: Train = Train()
    guards: Guards = Guards()


def load(path: Path) -> ClusterConfig:
    """Read and check ``path``; every mistake in it in one UserError."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        fix = "Give the cluster.yaml that the chart puts at /etc/llama-lora/cluster.yaml"
        raise UserError(f"cannot be read: {error.strerror}", where=str(path), fix=fix) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"is not YAML: {' '.join(str(error).split())}", where=str(path)) from error
    if not isinstance(values, dict):
        raise UserError("must be a mapping with release, namespace, claim, job ...", where=str(path))
    try:
        return ClusterConfig.model_validate(values)
    except ValidationError as invalid:
        mistakes = [
            UserError(f"{'.'.join(map(str, mistake['loc']))}: {mistake['msg']}", where=str(path))
            for mistake in invalid.errors()
        ]
        raise UserErrors(mistakes) from invalid
