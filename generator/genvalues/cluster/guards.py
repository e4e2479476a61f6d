"""Limits that end a run early: its cost (guards.maxCost) and a stall (guards.stallTimeout). Pure.

Cost is the time during which the run's worker pods held their nodes, one pod per node, from the pod's start
(status.startTime: accepted by the kubelet, before images are pulled; Kubernetes API reference, PodStatus) to its end.
AWS bills instances, not pods: idle time of a node before and after the pod is not included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from genvalues.cluster.kinds import Object
from genvalues.cluster.objects import (
    COMPONENT,
    container_statuses,
    is_being_deleted,
    is_over,
    labels_of,
    moment,
    name_of,
    phase_of,
    terminations,
)
from genvalues.cluster.workloads import is_suspended, workers_of, workload_of
from genvalues.common.json_files import Finite, as_record
from genvalues.common.text import duration

HOUR = 3600.0


@dataclass(frozen=True)
class PodUsage:
    """A pod that has held a node, from ``since`` to ``until`` (seconds since 1970; still running: the last look)."""

    name: str
    stage: str
    since: Finite
    until: Finite


@dataclass(frozen=True)
class Ledger:
    """Content of costs.json: usage by pod uid over all jobs and gates of the run, and the last job a guard stopped."""

    pods: Mapping[str, PodUsage] = field(default_factory=dict)
    stopped_job: str = ""
    stopped_why: str = ""

    @property
    def node_hours(self) -> float:
        return sum(max(0.0, pod.until - pod.since) for pod in self.pods.values()) / HOUR

    def updated(self, pods: Sequence[Object], now: float) -> Ledger:
        """A ledger that includes the worker pods as they are now. A pod that is gone ended when it was last seen."""
        usage = dict(self.pods)
        for pod in pods:
            since = moment(pod.get("status", {}).get("startTime"))
            if not since:  # not on a node yet
                continue
            uid = pod["metadata"]["uid"]
            until = now
            if is_over(pod):
                known = usage.get(uid)
                ended = max((moment(end.get("finishedAt")) for end in terminations(pod)), default=0.0)
                until = ended or (known.until if known else now)
            usage[uid] = PodUsage(name_of(pod), labels_of(pod).get(COMPONENT, ""), since, until)
        return replace(self, pods=usage)

    def as_json(self) -> dict[str, Any]:
        return {
            "pods": {uid: asdict(pod) for uid, pod in self.pods.items()},
            "stopped": {"job": self.stopped_job, "why": self.stopped_why} if self.stopped_job else None,
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Ledger:
        """Raises InvalidJson for content that ``as_json`` did not produce."""
        read = as_record(content, _LedgerFile)
        stopped = read.stopped or _Stopped("", "")
        return cls(read.pods, stopped.job, stopped.why)


@dataclass(frozen=True)
class _Stopped:
    job: str
    why: str


@dataclass(frozen=True)
class _LedgerFile:
    """What ``Ledger.as_json`` writes."""

    pods: dict[str, PodUsage]
    stopped: _Stopped | None


def reserve_hours(job: Object) -> float:
    """Node hours that stopping the job may still take: its pods save a checkpoint within their grace period."""
    return workers_of(job) * workload_of(job).grace_period(job) / HOUR


@dataclass(frozen=True)
class CostLimit:
    """guards.maxCost and guards.pricePerNodeHour, in dollars."""

    max_cost: float | None
    price: float | None

    def cost(self, node_hours: float) -> float | None:
        return None if self.price is None else node_hours * self.price

    def is_reached(self, node_hours: float, reserve: float) -> bool:
        """Whether the budget left is at most ``reserve``, the node hours that stopping takes."""
        cost = self.cost(node_hours + reserve)
        return cost is not None and self.max_cost is not None and cost >= self.max_cost

    def describe(self, node_hours: float) -> str:
        """``guards.maxCost of $200 is reached (cost so far $199.12: 9.26 node hours at $21.5)``."""
        cost = self.cost(node_hours)
        so_far = f"cost so far ${cost:,.2f}: {node_hours:,.2f} node hours at ${self.price:,.10g}"
        return f"guards.maxCost of ${self.max_cost:,.10g} is reached ({so_far})"

    def as_annotation(self, node_hours: float, updated: str) -> dict[str, Any]:
        cost = self.cost(node_hours)
        return {
            "cost": None if cost is None else round(cost, 2),
            "nodeHours": round(node_hours, 4),
            "pricePerNodeHour": self.price,
            "maxCost": self.max_cost,
            "updated": updated,
        }


@dataclass
class StallTimer:
    """Measures how long a running job has taken no step."""

    _mark: Any = None
    _since: float | None = None

    def seconds(self, job: Object, pods: Sequence[Object], progress: Mapping[str, Any], now: float) -> float:
        """Seconds during which all pods have run, without a restart or a new step; 0 while they do not all run.

        Progress that cannot be read at the moment counts as unchanged.
        """
        if not all_run(job, pods):
            self._mark = self._since = None
            return 0.0
        step = (progress.get("step"), progress.get("updated")) if progress else (self._mark or [None])[0]
        mark = (step, {pod["metadata"]["uid"]: restarts(pod) for pod in pods})
        if self._since is None or mark != self._mark:
            self._mark, self._since = mark, now
        return now - self._since


def all_run(job: Object, pods: Sequence[Object]) -> bool:
    """Whether every worker exists and runs: none is pending, restarting or being deleted."""
    return (
        not is_suspended(job)
        and len(pods) >= workers_of(job)
        and all(
            phase_of(pod) == "Running"
            and not is_being_deleted(pod)
            and all("running" in (status.get("state") or {}) for status in container_statuses(pod))
            for pod in pods
        )
    )


def restarts(pod: Object) -> int:
    return sum(status.get("restartCount", 0) for status in container_statuses(pod))


def describe_stall(seconds: float, progress: Mapping[str, Any]) -> str:
    """``no step for 30 min 00 s while all pods run (guards.stallTimeout); last step: 120 of 1000``."""
    last = f"last step: {progress['step']} of {progress.get('totalSteps')}" if progress else "no step was taken yet"
    return f"no step for {duration(seconds)} while all pods run (guards.stallTimeout); {last}"
