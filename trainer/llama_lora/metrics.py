"""Progress and metrics of a run as series, in the formats of Prometheus and of OpenTelemetry. Pure functions.

Names and units follow https://prometheus.io/docs/practices/naming/. Every series has the labels run and stage.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

State = Literal["running", "done", "failed", "stopped"]
STATES: tuple[State, ...] = ("running", "done", "failed", "stopped")
SCOPE = "llama-lora"


@dataclass(frozen=True)
class StageStatus:
    """What a stage does or did last, and for how long."""

    state: State
    seconds: float


@dataclass(frozen=True)
class Series:
    """A gauge with its samples: labels and value."""

    name: str
    description: str
    unit: str  # UCUM, as OpenTelemetry has it
    samples: Sequence[tuple[Mapping[str, str], float]]


# Keys of progress.json -> name, description, unit.
OF_PROGRESS = {
    "step": ("llama_lora_train_step", "Optimizer steps taken.", "{step}"),
    "totalSteps": ("llama_lora_train_planned_steps", "Optimizer steps of the whole training.", "{step}"),
    "savedStep": ("llama_lora_train_saved_step", "Step of the newest checkpoint.", "{step}"),
    "loss": ("llama_lora_train_loss", "Loss of the last step, in nats per trained token.", "1"),
    "evalLoss": ("llama_lora_train_eval_loss", "Held-out loss measured last, in nats per trained token.", "1"),
    "learningRate": ("llama_lora_train_learning_rate", "Learning rate of the last step.", "1"),
    "gradNorm": ("llama_lora_train_gradient_norm", "Norm of the gradient of the last step, before clipping.", "1"),
    "tokensPerSecond": ("llama_lora_train_tokens_per_second", "Tokens per second over the last steps.", "{token}/s"),
    "etaSeconds": ("llama_lora_train_remaining_seconds", "Estimated time to the last step.", "s"),
}


def series_of(run: str, stages: Mapping[str, StageStatus], progress: Mapping[str, Any]) -> list[Series]:
    """The series of a run: the state and the duration of each stage, and the content of progress.json."""
    states = [
        ({"run": run, "stage": stage, "state": state}, float(status.state == state))
        for stage, status in stages.items()
        for state in STATES
    ]
    durations = [({"run": run, "stage": stage}, status.seconds) for stage, status in stages.items()]
    found = [
        Series("llama_lora_stage_state", "1 for the state that the stage is in.", "1", states),
        Series("llama_lora_stage_duration_seconds", "How long the stage has run, or ran.", "s", durations),
    ]
    labels = {"run": run, "stage": "train"}
    for key, (name, description, unit) in OF_PROGRESS.items():
        value = progress.get(key)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            found.append(Series(name, description, unit, [(labels, float(value))]))
    if (updated := seconds_of(progress.get("updated"))) is not None:
        name, description = "llama_lora_train_updated_timestamp_seconds", "Time of the last step."
        found.append(Series(name, description, "s", [(labels, updated)]))
    return [each for each in found if each.samples]


def seconds_of(moment: Any) -> float | None:
    """Seconds since 1970 of an ISO 8601 time; None if it is not one."""
    try:
        return datetime.fromisoformat(moment).timestamp()
    except (TypeError, ValueError, OverflowError):
        return None


class Collected:
    """The series for a registry of prometheus_client."""

    def __init__(self, series: Iterable[Series]) -> None:
        self.series = series

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import GaugeMetricFamily

        for each in self.series:
            names = list(each.samples[0][0])
            family = GaugeMetricFamily(each.name, each.description, labels=names)
            for labels, value in each.samples:
                family.add_metric(list(labels.values()), value)
            yield family


def registry_of(series: Iterable[Series]) -> Any:
    from prometheus_client import CollectorRegistry

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Collected(series))
    return registry


def as_text(series: Iterable[Series]) -> bytes:
    """Prometheus' text format, without timestamps, as node exporter's textfile collector requires."""
    from prometheus_client import generate_latest

    return generate_latest(registry_of(series))


def as_otlp(series: Iterable[Series], time_ns: int) -> dict[str, Any]:
    """The body of an OTLP/HTTP request in its JSON encoding.

    https://opentelemetry.io/docs/specs/otlp/#json-protobuf-encoding. Written here because the exporters of the
    OpenTelemetry SDK need a newer protobuf than the Neuron SDK 2.26 of backend xla allows.
    """

    def attributes(labels: Mapping[str, str]) -> list[dict[str, Any]]:
        return [{"key": key, "value": {"stringValue": value}} for key, value in labels.items()]

    metrics = [
        {
            "name": each.name,
            "description": each.description,
            "unit": each.unit,
            "gauge": {
                "dataPoints": [
                    {"attributes": attributes(labels), "timeUnixNano": str(time_ns), "asDouble": value}
                    for labels, value in each.samples
                    if math.isfinite(value)
                ]
            },
        }
        for each in series
    ]
    resource = {"attributes": attributes({"service.name": SCOPE})}
    return {
        "resourceMetrics": [{"resource": resource, "scopeMetrics": [{"scope": {"name": SCOPE}, "metrics": metrics}]}]
    }
