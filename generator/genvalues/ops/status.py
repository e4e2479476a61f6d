"""The status of a release: fetched from Helm and the API, then decided from that alone."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Literal

from genvalues.cluster import kinds
from genvalues.cluster.api import TRANSPORT_ERRORS, Api, connect
from genvalues.cluster.failures import STAGE_FAILED
from genvalues.cluster.kinds import CHECK_ADDRESS, ApiError, NotAllowed, ServerAway
from genvalues.cluster.objects import (
    INSTANCE,
    component_of,
    created,
    inner_release_of,
    is_over,
    name_of,
    phase_of,
    uid_of,
)
from genvalues.cluster.podlog import text_of_line
from genvalues.cluster.workloads import WORKLOADS
from genvalues.common.dicts import get
from genvalues.common.errors import EXIT_USER_ERROR, Unavailable, UserError
from genvalues.common.reports import document_of
from genvalues.common.text import one_line
from genvalues.ops.records import HelmHook, HelmRecord, Object, find_record, require_record
from genvalues.ops.stages import ReleaseObjects, StageStatus, devices_of, job_status, nodes_of, stages_of, with_pods
from genvalues.settings.base import DNS_NAME

Outcome = Literal["running", "done", "failed", "stopped", "idle"]

FIRST_ANSWER_SECONDS = 10.0  # a user waits for it
TAIL_LINES = 40
LONGEST_NAME = 53  # of a release; Helm's limit
RECORD_SECONDS = 30.0  # maximum age of Helm's record if no Job has been created, ended or deleted since


@dataclass(frozen=True)
class ReleaseStatus:
    """A release and its stages. ``outcome`` is that of the pipeline; idle: nothing runs or will start by itself."""

    release: str
    namespace: str
    mode: str
    revision: int
    helm: str  # Helm's word for the release: deployed, failed, pending-install, ...
    updated: datetime
    outcome: Outcome
    stages: tuple[StageStatus, ...]
    runner: StageStatus | None = None
    reason: str = ""
    chart: str = ""
    cost: float | None = None  # dollars so far, of the run
    max_cost: float | None = None
    devices: dict[str, int] = field(default_factory=dict)  # held now
    nodes: tuple[str, ...] = ()  # on which pods of this release run
    not_read: tuple[str, ...] = ()
    result: str = ""  # where the merged model is, once the pipeline is done

    @property
    def is_over(self) -> bool:
        return self.outcome != "running"

    @property
    def all_stages(self) -> tuple[StageStatus, ...]:
        """The runner, if there is one, and the stages."""
        return (*([self.runner] if self.runner else []), *self.stages)

    @property
    def failing(self) -> StageStatus | None:
        """What ended the pipeline: a stage, else the runner."""
        ended = [stage for stage in (*self.stages, *self.all_stages) if stage.state in ("failed", "stopped")]
        return ended[0] if ended else None

    @property
    def exit_status(self) -> int:
        """The exit status of a command that follows the pipeline to its end."""
        if self.outcome == "done":
            return 0
        failing = self.failing
        return EXIT_USER_ERROR if failing and failing.exit_status == EXIT_USER_ERROR else STAGE_FAILED

    @property
    def current(self) -> StageStatus | None:
        """The stage of interest: the one that runs, else the one that failed, else the last that has ended."""
        for states in (("running",), ("failed", "stopped")):
            if found := next((stage for stage in self.stages if stage.state in states), None):
                return found
        return next((stage for stage in reversed(self.stages) if stage.is_over), None)

    def document(self) -> dict[str, Any]:
        """What --json prints."""
        document: dict[str, Any] = document_of(self)
        return {**document, "exitStatus": self.exit_status if self.is_over else None}


# --- from objects to a status


def release_status(
    record: HelmRecord, inner: HelmRecord | None, objects: ReleaseObjects, not_read: Sequence[str] = ()
) -> ReleaseStatus:
    """The status of a release. ``inner``: in mode detached, the record of the release that the runner installs."""
    runner = runner_status(record, objects) if record.runner else None
    hooks = inner_hooks(record, inner, objects) if record.runner else record.hooks
    stages = stages_of(hooks, objects)
    outcome = outcome_of(record, stages, runner)
    config = record.cluster_config
    spent = latest_cost(stages)
    max_cost = get(spent, "maxCost", float)
    running = [pod for pod in objects.pods if not is_over(pod)]
    status = ReleaseStatus(
        release=record.release,
        namespace=record.namespace,
        mode=record.mode,
        revision=record.revision,
        helm=record.status,
        updated=record.updated,
        outcome=outcome,
        stages=stages,
        runner=runner,
        chart=get(config, "chart.version", str) or "",
        cost=get(spent, "cost", float),
        max_cost=max_cost if max_cost is not None else get(config, "guards.maxCost", float),
        devices=devices_of(running),
        nodes=nodes_of(running),
        not_read=tuple(not_read),
        result=result_of(record) if outcome == "done" else "",
    )
    return replace(status, reason=reason_of(status, record))


def inner_hooks(record: HelmRecord, inner: HelmRecord | None, objects: ReleaseObjects) -> tuple[HelmHook, ...]:
    """The hooks that the runner's release has; none of them has started if an earlier runner installed it."""
    if inner is None:
        return ()
    job = objects.job(record.runner)
    if job is not None and inner.updated.timestamp() >= created(job):
        return inner.hooks
    return tuple(replace(hook, phase="Unknown") for hook in inner.hooks)


def runner_status(record: HelmRecord, objects: ReleaseObjects) -> StageStatus:
    """The status of the runner's Job, which is not a hook, as that of a stage."""
    manifest = next(item for item in record.resources if item["kind"] == "Job" and name_of(item) == record.runner)
    status = job_status("runner", HelmHook(manifest, (), "Running"), objects)
    job = objects.job(record.runner)
    if job is None:
        return replace(status, state="stopped", reason=f"job {record.runner} not found")
    if status.state == "running" and job["spec"].get("suspend"):
        return replace(status, state="stopped", reason="stopped by a cleanup")
    return with_pods(status, objects.pods_of(job))


def outcome_of(record: HelmRecord, stages: Sequence[StageStatus], runner: StageStatus | None) -> Outcome:
    if runner is not None:
        if runner.state in ("running", "waiting"):
            return "running"
        return runner.state if runner.state in ("failed", "stopped") else "done"
    states = {stage.state for stage in stages}
    for outcome in ("failed", "running", "stopped"):
        if outcome in states:
            return outcome
    if stages and states <= {"done", "skipped"}:
        return "done"
    return "running" if record.is_pending else "idle"


def reason_of(status: ReleaseStatus, record: HelmRecord) -> str:
    """What the stages alone do not show, e.g. that nothing will start by itself."""
    failing = status.failing
    if status.outcome in ("failed", "stopped") and failing:
        return f"{failing.name} {failing.state}: {failing.reason}"
    if status.mode == "attached" and status.outcome == "running":
        if all(stage.state != "running" for stage in status.stages):
            return f"no stage runs now (the release is {status.helm}); if its Helm client was killed: genvalues install"
        if not record.is_pending:
            return f"no Helm client follows (the release is {status.helm}); genvalues install resumes following"
    if status.outcome == "idle":
        return f"nothing runs or will start by itself (the release is {status.helm}): genvalues install starts it"
    return ""


def result_of(record: HelmRecord) -> str:
    name = record.config("run.yaml").get("name")
    return f"runs/{name}/merged on the volume of claim {record.claim}" if name else ""


def latest_cost(stages: Sequence[StageStatus]) -> dict[str, Any]:
    """The cost of the run, which each gate writes: the newest one."""
    costs = [stage.cost for stage in stages if stage.cost]
    return max(costs, key=lambda cost: str(cost.get("updated", "")), default={})


# --- fetching


class ReleaseWatcher:
    """Reads the state of one release, repeatedly if needed. What cannot have changed is not fetched again."""

    def __init__(self, server: Api, release: str, context: str | None) -> None:
        self.server = server
        self.release = release
        self.context = context
        self._records: tuple[HelmRecord, HelmRecord | None] | None = None
        self._records_of: object = None
        self._records_at = float("-inf")
        self._logs: dict[tuple[str, str], list[str]] = {}  # of pods that have ended, by uid and phase

    @property
    def selector(self) -> str:
        """The labels of the release's objects, and of those that its runner installs."""
        return f"{INSTANCE} in ({self.release},{inner_release_of(self.release)})"

    def status(self) -> ReleaseStatus:
        """The status now. Raises UserError for no such release or a missing right, Unavailable for no API server."""
        with api_errors_as_user_errors(self.server.namespace):
            objects, not_read = self.objects()
            record, inner = self.records(objects)
            return release_status(record, inner, objects, not_read)

    def record(self) -> HelmRecord:
        """Helm's record of the release. Raises as ``status`` does.

        Asks the API server for its version first, which every user may read: Helm waits forever, and silently, for a
        server that never answers.
        """
        try:
            self.server.discover("version")
        except ServerAway:
            with api_errors_as_user_errors(self.server.namespace):
                raise
        except ApiError:  # an answer: Helm may have rights that we do not have
            pass
        return require_record(self.release, self.server.namespace, self.context)

    def objects(self) -> tuple[ReleaseObjects, list[str]]:
        """The release's objects, and what could not be read."""
        not_read: list[str] = []

        def optional(kind: kinds.Kind, labels: str = "") -> list[Object]:
            try:
                return self.server.list(kind, labels=labels)
            except NotAllowed as error:
                not_read.append(error.message)
                return []

        jobs = self.server.list(kinds.JOBS, labels=self.selector)
        workloads = self.workloads()
        pods = optional(kinds.PODS, self.selector)
        events = optional(kinds.EVENTS)
        try:
            logs = {name_of(pod): self.log_tail(pod) for pod in pods if is_over(pod)}
        except NotAllowed as error:
            not_read.append(error.message)
            logs = {}
        return ReleaseObjects(jobs, workloads, pods, events, logs), not_read

    def workloads(self) -> list[Object]:
        """The jobs of compile and train. Raises NotAllowed if those of the release's workload may not be listed."""
        found = []
        for workload in WORKLOADS:
            try:
                found += self.server.list(workload.kind, labels=self.selector)
            except NotAllowed:
                if workload.setting == (get(self.record().cluster_config, "workload", str) or WORKLOADS[0].setting):
                    raise
        return found

    def log_tail(self, pod: Object) -> list[str]:
        """The last lines of a pod that has ended."""
        key = (uid_of(pod), phase_of(pod))
        if key not in self._logs:
            container = pod["spec"]["containers"][0]["name"] if pod["spec"].get("containers") else component_of(pod)
            try:
                lines = self.server.log(name_of(pod), container, tail=TAIL_LINES, follow=False)
                self._logs[key] = [text_of_line(line) for line in lines]
            except NotAllowed:
                raise
            except (ApiError, *TRANSPORT_ERRORS):  # deleted meanwhile, or a kubelet that does not answer
                return []
        return self._logs[key]

    def records(self, objects: ReleaseObjects) -> tuple[HelmRecord, HelmRecord | None]:
        """Helm's records, read again if a Job was created, ended or deleted, or after RECORD_SECONDS."""
        state = [
            (uid_of(item), item.get("status", {}).get("conditions")) for item in [*objects.jobs, *objects.workloads]
        ]
        is_old = time.monotonic() - self._records_at > RECORD_SECONDS
        if self._records is None or state != self._records_of or is_old:
            record = require_record(self.release, self.server.namespace, self.context)
            inner_name = inner_release_of(self.release)
            inner = find_record(inner_name, self.server.namespace, self.context) if record.runner else None
            self._records, self._records_of, self._records_at = (record, inner), state, time.monotonic()
        return self._records


@contextmanager
def api_errors_as_user_errors(namespace: str) -> Iterator[None]:
    """Raise a refused request as UserError (status 2), and a server that does not answer as Unavailable (status 1)."""
    try:
        yield
    except ServerAway as error:
        raise Unavailable(f"{error.message}. Try: kubectl cluster-info") from None
    except ApiError as error:
        fix = FIXES.get(error.status, f"{CHECK_ADDRESS}.")
        raise UserError(error.message, where=f"namespace {namespace}", fix=fix) from None


# By the HTTP status of a refused request.
FIXES = {
    401: "Log in to the cluster again (on EKS: check the AWS credentials), or choose another one with --kube-context.",
    403: "Ask the cluster's administrator for the right, or choose another cluster with --kube-context.",
}


def watch_release(release: str, namespace: str | None, context: str | None) -> ReleaseWatcher:
    """Connect to the cluster and the namespace that Helm would choose. Raises UserError for an invalid name."""
    if len(release) > LONGEST_NAME or not re.fullmatch(DNS_NAME, release):
        fix = f"Use at most {LONGEST_NAME} characters of a-z, 0-9, hyphens and dots; `helm list` shows the names."
        raise UserError(f'"{one_line(release)}" is not a valid release name', fix=fix)
    server = connect(namespace, context=context, patience=FIRST_ANSWER_SECONDS, interval=1.0)
    return ReleaseWatcher(server, release, context)
