"""What the report shows of a run, read from its workspace."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from genvalues.common.dicts import flatten, get
from genvalues.common.json_files import InvalidJson, check_own_digest, read_object
from llama_lora.paths import Paths
from llama_lora.runlog import read_of_manifest
from llama_lora.small_run import other_stage
from llama_lora.stage import LIBRARIES, Manifest, Stage, installed_versions, now
from llama_lora.verdict import Verdict

STAGES = ("tokenize", "rehearse", "compile", "neff", "train", "consolidate", "merge")  # before evaluate
IMAGE = "LLAMA_LORA_IMAGE"


@dataclass(frozen=True)
class StageTime:
    """When a stage ran, in seconds since 1970."""

    name: str
    started: float
    finished: float

    @property
    def seconds(self) -> float:
        return self.finished - self.started


@dataclass(frozen=True)
class Facts:
    """Everything on the page. Times are in seconds since 1970.

    ``metrics`` and ``held_out`` are lines of metrics.jsonl, ``data`` is the data report.
    ``node_hours`` are those of compile and train, ``price`` is that of one in dollars; None: unknown.
    """

    name: str
    on_cpu: bool
    written: float
    verdict: Verdict
    scores: Mapping[str, Mapping[str, float]]  # loss and perplexity of base and merged
    samples: Sequence[Mapping[str, str]]
    notes: Sequence[str] = ()  # why there are fewer rows or samples than the settings ask for
    metrics: Sequence[Mapping[str, Any]] = ()
    held_out: Sequence[Mapping[str, Any]] = ()
    training: Mapping[str, Any] = field(default_factory=dict)  # the facts of train's manifest
    stages: Sequence[StageTime] = ()
    node_hours: float | None = None
    price: float | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)  # SHA-256 of the files of adapter and merged


def collect(
    stage: Stage,
    verdict: Verdict,
    scores: Mapping[str, Mapping[str, float]],
    samples: Sequence[Mapping[str, str]],
    notes: Sequence[str],
    base_scores: str,
) -> Facts:
    """Read what the stages before evaluate have written. ``base_scores``: where those of the base model are from."""
    manifests = {name: manifest for name in STAGES if (manifest := current_manifest(stage, name))}
    trained = stage.upstream("train")
    metrics, held_out = read_of_manifest(stage.paths, trained)
    hours, price = node_hours(stage.paths)
    finished = now()
    times = {name: (each.started, each.finished) for name, each in manifests.items()}
    return Facts(
        name=stage.config.name,
        on_cpu=stage.config.device == "cpu",
        written=_seconds(finished),
        verdict=verdict,
        scores=scores,
        samples=samples,
        notes=notes,
        metrics=metrics,
        held_out=held_out,
        training=trained.facts,
        stages=[
            StageTime(name, _seconds(started), _seconds(ended))
            for name, (started, ended) in (times | {stage.name: (stage.started, finished)}).items()
        ],
        node_hours=hours,
        price=price,
        data=data_report(stage.upstream_path("tokenize", "dataset") / "report.json"),
        settings=flatten(stage.config.as_keys()),
        sources={**sources_of(stage), "scores of the base model": base_scores},
        versions=installed_versions(LIBRARIES),
        fingerprints={name: each.fingerprint for name, each in manifests.items()},
        digests={
            name: output.sha256
            for each in ("consolidate", "merge")
            if each in manifests
            for name, output in manifests[each].outputs.items()
        },
    )


def current_manifest(stage: Stage, name: str) -> Manifest | None:
    """The manifest of another stage of the run, if it is of the current configuration."""
    other = other_stage(stage, name)
    manifest = other.manifest
    return manifest if manifest and manifest.fingerprint == other.fingerprint else None


def node_hours(paths: Paths) -> tuple[float | None, float | None]:
    """The node hours that costs.json counts, and the price of one; None where it does not exist or is not valid."""
    try:
        costs = read_object(paths.run / "costs.json")
        check_own_digest(costs, required=False)  # release 0.1 wrote none
    except InvalidJson:
        return None, None
    spans = []
    for pod in (get(costs, "pods", dict) or {}).values():
        since, until = get(pod, "since", float), get(pod, "until", float)
        if since is None or until is None or not math.isfinite(until - since):
            return None, None
        spans.append(until - since)
    return sum(spans) / 3600, get(costs, "pricePerNodeHour", float)


def data_report(path: Path) -> dict[str, Any]:
    """The data report; empty if it cannot be read."""
    try:
        return read_object(path)
    except InvalidJson:
        return {}


def sources_of(stage: Stage) -> dict[str, str]:
    """The model, the datasets and the image, with their pinned versions."""
    sources = stage.sources
    assert sources is not None, "tokenize has resolved them"
    named = {"base model": sources.model, "dataset": sources.dataset, **sources.additional}
    if sources.held_out:
        named["held-out rows"] = sources.held_out
    found = {title: f"{source.name} @ {source.revision}" for title, source in named.items()}
    image = os.environ.get(IMAGE)
    return found | ({"image": image} if image else {})


def _seconds(time: str) -> float:
    return datetime.fromisoformat(time).timestamp()
