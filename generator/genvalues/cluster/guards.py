"""What ends a run before it is done: what it has cost, and that it stands still. Pure; the gate looks and acts.

The cost is counted by the time in which the run's worker pods held their nodes, one pod a node, from the pod's start
(status.startTime: the kubelet has taken it, images are not pulled yet; Kubernetes API reference, PodStatus) to its end.
AWS bills instances, not pods: a node that idles before or after is not in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from genvalues.cluster.api import Object
from genvalues.cluster.objects import (
    COMPONENT,
    JOB_NAME,
    container_statuses,
    is_over,
    is_suspended,
    labels_of,
    moment,
    name_of,
    phase_of,
    workers_of,
)

HOUR = 3600.0
DEFAULT_GRACE_PERIOD = 30.0  # Kubernetes' own


@dataclass(frozen=True)
class Held:
    """A pod that has held a node. Times are seconds since 1970; ``until`` is when that was last so."""

    name: str
    stage: str
    since: float
    until: float


@dataclass(frozen=True)
class Ledger:
    """What the run's pods have held so far, by uid, over all its jobs and gates; and the last job a guard has ended."""

    pods: Mapping[str, Held] = field(default_factory=dict)
    stopped_job: str = ""
    stopped_why: str = ""

    @property
    def node_hours(self) -> float:
        return sum(max(0.0, pod.until - pod.since) for pod in self.pods.values()) / HOUR

    def seen(self, pods: Sequence[Object], now: float) -> Ledger:
        """With what the run's worker pods are now. One that is gone has held its node until it was last seen."""
        held = dict(self.pods)
        for pod in pods:
            since = moment(pod.get("status", {}).get("startTime"))
            if not since:  # on no node yet
                continue
            uid = pod["metadata"]["uid"]
            until = now
            if is_over(pod):
                known = held.get(uid)
                until = ended_at(pod) or (known.until if known else now)
            held[uid] = Held(name_of(pod), labels_of(pod).get(COMPONENT, ""), since, until)
        return replace(self, pods=held)

    def as_json(self) -> dict[str, Any]:
        return {
            "pods": {uid: asdict(pod) for uid, pod in self.pods.items()},
            "stopped": {"job": self.stopped_job, "why": self.stopped_why} if self.stopped_job else None,
        }

    @classmethod
    def from_json(cls, read: dict[str, Any]) -> Ledger:
        """Raises ValueError, KeyError, TypeError or AttributeError for what ``as_json`` has not made."""
        pods = {uid: held_of(pod) for uid, pod in read["pods"].items()}
        stopped = read["stopped"] or {"job": "", "why": ""}
        return cls(pods, str(stopped["job"]), str(stopped["why"]))


def held_of(read: dict[str, Any]) -> Held:
    """A pod of costs.json; raises as ``Ledger.from_json`` for what is none: a sum of what is no time is no cost."""
    since, until = float(read["since"]), float(read["until"])
    if not (math.isfinite(since) and math.isfinite(until)):  # JSON as Python reads it has NaN, too
        raise ValueError(f"no times: {since}, {until}")
    return Held(**{**read, "since": since, "until": until})


def ended_at(pod: Object) -> float:
    """When the last of its containers ended, in seconds since 1970; 0 where the pod does not say."""
    ends = [(status.get("state") or {}).get("terminated") or {} for status in container_statuses(pod)]
    return max((moment(end.get("finishedAt")) for end in ends), default=0.0)


def is_worker(pod: Object) -> bool:
    """A pod that the training operator has made: the run's others hold no Trainium node."""
    return JOB_NAME in labels_of(pod)


def reserve_hours(job: Object) -> float:
    """Node hours that ending the job now takes at most: its pods save for as long as their grace period."""
    template = job["spec"]["pytorchReplicaSpecs"]["Worker"].get("template", {}).get("spec", {})
    return workers_of(job) * float(template.get("terminationGracePeriodSeconds", DEFAULT_GRACE_PERIOD)) / HOUR


@dataclass(frozen=True)
class Limit:
    """guards.maxCost and guards.pricePerNodeHour, in dollars."""

    max_cost: float | None
    price: float | None

    def cost(self, node_hours: float) -> float | None:
        return None if self.price is None else node_hours * self.price

    def is_reached(self, node_hours: float, reserve: float) -> bool:
        """Whether no more than ``reserve`` node hours, which ending takes, are left to spend."""
        cost = self.cost(node_hours + reserve)
        return cost is not None and self.max_cost is not None and cost >= self.max_cost

    def describe(self, node_hours: float) -> str:
        """``guards.maxCost 200 dollars is reached (cost so far 199.12: 9.26 node hours at 21.5)``."""
        return f"guards.maxCost {self.max_cost:,.10g} dollars is reached ({self.describe_cost(node_hours)})"

    def describe_cost(self, node_hours: float) -> str:
        cost = self.cost(node_hours)
        return f"cost so far {cost:,.2f}: {node_hours:,.2f} node hours at {self.price:,.10g}"

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
class Standstill:
    """Since when a job that could take steps has taken none."""

    _mark: Any = None
    _since: float | None = None

    def seconds(self, job: Object, pods: Sequence[Object], progress: Mapping[str, Any], now: float) -> float:
        """How long all its pods have run, the same ones, without a new step; 0 where they do not all run.

        Progress that cannot be read at the moment counts as that of before.
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
    """All workers are there and run: none waits for a node, is being restarted, or has been told to end."""
    return (
        not is_suspended(job)
        and len(pods) >= workers_of(job)
        and all(
            phase_of(pod) == "Running"
            and "deletionTimestamp" not in pod["metadata"]
            and all("running" in (status.get("state") or {}) for status in container_statuses(pod))
            for pod in pods
        )
    )


def restarts(pod: Object) -> int:
    return sum(status.get("restartCount", 0) for status in container_statuses(pod))


def describe_duration(seconds: float) -> str:
    """``30 min``, ``1 h 30 min``, ``45 s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [f"{number} {unit}" for number, unit in ((hours, "h"), (minutes, "min"), (rest, "s")) if number]
    return " ".join(parts[:2]) or "0 s"


def describe_standstill(seconds: float, progress: Mapping[str, Any]) -> str:
    """``no step for 30 min, guards.stallTimeout; the last was step 120 of 1000``."""
    last = f"the last was step {progress['step']} of {progress.get('totalSteps')}" if progress else "none was taken yet"
    return f"no step for {describe_duration(seconds)}, while all pods run (guards.stallTimeout); {last}"


def describe_checkpoint(progress: Mapping[str, Any]) -> str:
    """What is kept of a training that was ended, by its progress; nothing where that does not say."""
    if saved := progress.get("savedStep"):
        return f"the checkpoint at step {saved} is kept"
    return "no checkpoint was saved" if progress else ""
