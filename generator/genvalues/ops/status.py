"""Where a release stands: fetched from Helm and the API, judged by ``stages``, and told in lines, a table or JSON."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from typing import Any, Literal

import yaml

from genvalues.cluster import api as kinds
from genvalues.cluster.api import Api, ApiError, NotAllowed, ServerAway
from genvalues.cluster.objects import INSTANCE, component_of, created, is_over, name_of
from genvalues.cluster.podlog import text_of_line
from genvalues.common.dicts import get
from genvalues.common.errors import EXIT_USER_ERROR, Unavailable, UserError
from genvalues.common.text import one_line
from genvalues.ops.records import Hook, Object, Record, find_record, need_record
from genvalues.ops.stages import ReleaseObjects, StageStatus, devices_of, find, of_job, stages_of, with_pods
from genvalues.settings.base import DNS_NAME

Outcome = Literal["running", "done", "failed", "stopped", "idle"]

FIRST_ANSWER_SECONDS = 10.0  # for what a person waits for
TAIL_LINES = 40
LONGEST_NAME = 53  # of a release, by Helm's rule
RECORD_SECONDS = 30.0  # how old what Helm said may be when no Job has come or gone since
STAGE_FAILED = 1


@dataclass(frozen=True)
class ReleaseStatus:
    """A release and its stages. ``outcome`` is the pipeline's; idle: nothing runs, and nothing will by itself."""

    release: str
    namespace: str
    mode: str
    revision: int
    helm: str  # Helm's word for the release: deployed, failed, pending-install ...
    updated: float
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
    def failing(self) -> StageStatus | None:
        """What ended the pipeline: a stage, else the runner."""
        ended = [stage for stage in self.stages if stage.state in ("failed", "stopped")]
        if ended:
            return ended[0]
        return self.runner if self.runner and self.runner.state in ("failed", "stopped") else None

    @property
    def exit_status(self) -> int:
        """What a command that followed to the end ends with."""
        if self.outcome == "done":
            return 0
        failing = self.failing
        return EXIT_USER_ERROR if failing and failing.exit_status == EXIT_USER_ERROR else STAGE_FAILED

    @property
    def current(self) -> StageStatus | None:
        """The stage that a reader asks for: that which runs, else that which failed, else the last that has begun."""
        for wanted in (("running",), ("failed", "stopped")):
            if found := next((stage for stage in self.stages if stage.state in wanted), None):
                return found
        return next((stage for stage in reversed(self.stages) if stage.is_over), None)


# --- from objects to a status


def judged(record: Record, inner: Record | None, seen: ReleaseObjects, not_read: Sequence[str] = ()) -> ReleaseStatus:
    """The status of a release, of ``record`` and, in mode detached, of what its runner installs (``inner``)."""
    runner = runner_of(record, seen) if record.runner else None
    if record.runner:
        job = find(seen.jobs, record.runner)
        # What an earlier runner installed tells which stages there are, and nothing of this one's.
        is_ours = inner is not None and job is not None and inner.updated >= created(job)
        hooks = inner.hooks if inner else ()
        if not is_ours:
            hooks = tuple(replace(hook, phase="Unknown") for hook in hooks)
    else:
        hooks = record.hooks
    stages = tuple(stages_of(replace(seen, hooks=hooks)))
    outcome = outcome_of(record, stages, runner)
    config = cluster_config(record)
    spent = latest_cost(stages)
    living = [pod for pod in seen.pods if not is_over(pod)]
    chart = get(config, "chart.version", str)
    max_cost = get(spent, "maxCost", float)
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
        chart=chart or "",
        cost=get(spent, "cost", float),
        max_cost=max_cost if max_cost is not None else get(config, "guards.maxCost", float),
        devices=devices_of(living),
        nodes=tuple(sorted({pod["spec"]["nodeName"] for pod in living if pod["spec"].get("nodeName")})),
        not_read=tuple(not_read),
        result=result_of(record) if outcome == "done" else "",
    )
    return replace(status, reason=reason_of(status, record))


def result_of(record: Record) -> str:
    name, claim = parsed(record, "run.yaml").get("name"), get(cluster_config(record), "claim.name", str)
    return f"runs/{name}/merged on the volume of claim {claim}" if name and claim else ""


def outcome_of(record: Record, stages: Sequence[StageStatus], runner: StageStatus | None) -> Outcome:
    states = {stage.state for stage in stages}
    if runner is not None:
        if runner.state == "running" or runner.state == "waiting":
            return "running"
        return runner.state if runner.state in ("failed", "stopped") else "done"
    if "failed" in states:
        return "failed"
    if "running" in states:
        return "running"
    if "stopped" in states:
        return "stopped"
    if stages and states <= {"done", "skipped"}:
        return "done"
    return "running" if record.is_pending else "idle"


def reason_of(status: ReleaseStatus, record: Record) -> str:
    """What a reader must know besides the stages, or nothing."""
    failing = status.failing
    if status.outcome in ("failed", "stopped") and failing:
        return f"{failing.name} {failing.state}: {failing.reason}"
    running = [stage for stage in status.stages if stage.state == "running"]
    if status.mode == "attached" and status.outcome == "running":
        if not running:
            return f"between two stages, or its Helm client is gone: the release is {status.helm}"
        if not record.is_pending:
            return f"no Helm client follows (the release is {status.helm}): genvalues install takes it up"
    if status.outcome == "idle":
        return f"nothing runs, and nothing will by itself (the release is {status.helm}): genvalues install starts it"
    return ""


def runner_of(record: Record, seen: ReleaseObjects) -> StageStatus:
    """The runner's Job, an ordinary object of the release, told as if it were a stage."""
    manifest = next(item for item in record.resources if item["kind"] == "Job" and name_of(item) == record.runner)
    status = of_job("runner", Hook(manifest, (), "Running"), seen)
    job = find(seen.jobs, record.runner)
    if job is None:
        return replace(status, state="stopped", reason=f"job {record.runner} is gone")
    if status.state == "running" and job["spec"].get("suspend"):
        return replace(status, state="stopped", reason="stopped by a cleanup")
    uid = job["metadata"]["uid"]
    owned = [pod for pod in seen.pods if any(one["uid"] == uid for one in pod["metadata"].get("ownerReferences") or [])]
    return with_pods(status, owned)


def cluster_config(record: Record) -> dict[str, Any]:
    """cluster.yaml, with which the chart tells about the release."""
    return parsed(record, "cluster.yaml")


def parsed(record: Record, file: str) -> dict[str, Any]:
    try:
        found = yaml.safe_load(record.config(file))
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def latest_cost(stages: Sequence[StageStatus]) -> dict[str, Any]:
    """Each gate writes the run's cost so far: the newest counts."""
    costs = [stage.cost for stage in stages if stage.cost]
    return max(costs, key=lambda cost: str(cost.get("updated", "")), default={})


# --- fetching


class Watcher:
    """Looks at one release, again and again if need be; what cannot have changed is not fetched twice."""

    def __init__(self, server: Api, release: str, context: str | None) -> None:
        self.server = server
        self.release = release
        self.context = context
        self._records: tuple[Record | None, Record | None] = (None, None)
        self._records_of: object = None
        self._records_at = float("-inf")
        self._logs: dict[tuple[str, str], list[str]] = {}  # of pods that have ended, by uid and phase

    def look(self) -> ReleaseStatus:
        """The status now. Raises UserError for no such release or a missing right, Unavailable for no API server."""
        with told_in_a_line(self.server.namespace):
            seen, not_read = self.fetch()
            record, inner = self.records(seen)
            return judged(record, inner, seen, not_read)

    def need_record(self) -> Record:
        """Helm's record of the release, by itself. Raises as ``look`` does.

        The API server is asked first, for what every user may read: Helm waits for one that never answers without an
        end and without a word.
        """
        try:
            self.server.discover("version")
        except ServerAway:
            with told_in_a_line(self.server.namespace):
                raise
        except ApiError:  # an answer: Helm may be allowed what we are not
            pass
        return need_record(self.release, self.server.namespace, self.context)

    def fetch(self) -> tuple[ReleaseObjects, list[str]]:
        not_read: list[str] = []

        def optional(kind: kinds.Kind, labels: str = "") -> list[Object]:
            try:
                return self.server.list(kind, labels=labels)
            except NotAllowed as error:
                not_read.append(error.message)
                return []

        of_release = f"{INSTANCE} in ({self.release},{self.release}-run)"
        jobs = self.server.list(kinds.JOBS, labels=of_release)
        pytorch_jobs = self.server.list(kinds.PYTORCH_JOBS, labels=of_release)
        pods = optional(kinds.PODS, of_release)
        events = optional(kinds.EVENTS)
        ended = [pod for pod in pods if is_over(pod)]
        try:
            logs = {name_of(pod): self.log(pod) for pod in ended}
        except NotAllowed as error:
            not_read.append(error.message)
            logs = {}
        return ReleaseObjects((), jobs, pytorch_jobs, pods, events, logs), not_read

    def log(self, pod: Object) -> list[str]:
        """The last lines of a pod that has ended."""
        key = (pod["metadata"]["uid"], pod["status"]["phase"])
        if key not in self._logs:
            container = pod["spec"]["containers"][0]["name"] if pod["spec"].get("containers") else component_of(pod)
            try:
                lines = self.server.log(name_of(pod), container, tail=TAIL_LINES, follow=False)
                self._logs[key] = [text_of_line(line) for line in lines]
            except NotAllowed:
                raise
            except (ApiError, *kinds.TRANSPORT_ERRORS):  # gone meanwhile, or a kubelet that does not answer
                return []
        return self._logs[key]

    def records(self, seen: ReleaseObjects) -> tuple[Record, Record | None]:
        """Helm's, read anew when a Job has come, ended or gone, and now and then."""
        state = [
            (item["metadata"]["uid"], item.get("status", {}).get("conditions"))
            for item in [*seen.jobs, *seen.pytorch_jobs]
        ]
        record, inner = self._records
        if record is None or state != self._records_of or time.monotonic() - self._records_at > RECORD_SECONDS:
            record = need_record(self.release, self.server.namespace, self.context)
            inner_name = f"{self.release}-run"
            inner = find_record(inner_name, self.server.namespace, self.context) if record.runner else None
            self._records, self._records_of, self._records_at = (record, inner), state, time.monotonic()
        return record, inner


@contextmanager
def told_in_a_line(namespace: str) -> Iterator[None]:
    """What the API refuses as a UserError (status 2), no API server as Unavailable (status 1)."""
    try:
        yield
    except ServerAway as error:
        raise Unavailable(f"{error.message}. Look: kubectl cluster-info") from None
    except ApiError as error:
        fix = "Ask the cluster's administrator for it, or name another cluster with --kube-context."
        raise UserError(error.message, where=f"namespace {namespace}", fix=fix) from None


def watcher(
    release: str, namespace: str | None, context: str | None, say: Callable[[str], None] = lambda line: None
) -> Watcher:
    """Of a release on the cluster and in the namespace that Helm would choose."""
    if len(release) > LONGEST_NAME or not re.fullmatch(DNS_NAME, release):
        fix = f"Names have at most {LONGEST_NAME} of a-z, 0-9, hyphens and dots: helm list"
        raise UserError(f'"{one_line(release)}" is no name of a release', fix=fix)
    server = kinds.connect(namespace, context=context, patience=FIRST_ANSWER_SECONDS, interval=1.0)
    return Watcher(server, release, context)


# --- telling


def headline(status: ReleaseStatus) -> str:
    inner = f", runs its stages as {status.release}-run" if status.mode == "detached" else ""
    return (
        f"{status.release} in {status.namespace}: {status.outcome}"
        f" (revision {status.revision}, Helm: {status.helm}, {status.mode}{inner})"
    )


def describe(stage: StageStatus, now: float) -> str:
    """One stage in one line: ``train: running for 12 min 03 s, step 120 of 1,000, loss 1.234, ...``."""
    return f"{stage.name}: {state_words(stage, now)}{''.join(f', {part}' for part in details(stage))}"


def state_words(stage: StageStatus, now: float) -> str:
    if stage.state == "skipped":
        return "skipped (up to date)"
    if stage.started is None:
        return stage.state
    took = duration((stage.ended or now) - stage.started)
    joint = {"running": "for", "done": "in"}.get(stage.state, "after")
    return f"{stage.state} {joint} {took}"


def details(stage: StageStatus) -> list[str]:
    parts = progress_words(stage.progress) if stage.progress else []
    if stage.cost and (money := cost_words(stage.cost.get("cost"), stage.cost.get("maxCost"))):
        parts.append(money)
    if stage.restarts:
        parts.append(f"{stage.restarts} restart{'s' if stage.restarts > 1 else ''}")
    if stage.nodes and stage.devices:
        parts.append(f"holds {len(stage.nodes)} node{'s' if len(stage.nodes) > 1 else ''}")
    if stage.note:
        parts.append(stage.note)
    if stage.reason:
        parts.append(stage.reason)
    return parts


def progress_words(progress: Mapping[str, Any]) -> list[str]:
    """As far as it is known, and is what it should be: an annotation may be anybody's."""
    parts = []
    step, total = number(progress, "step"), number(progress, "totalSteps")
    if step is not None:
        parts.append(f"step {step:,.0f}" + (f" of {total:,.0f}" if total is not None else ""))
    if (loss := number(progress, "loss")) is not None:
        parts.append(f"loss {loss:.4f}")
    if (speed := number(progress, "tokensPerSecond")) is not None:
        parts.append(f"{speed:,.0f} tokens/s")
    if (left := number(progress, "etaSeconds")) is not None:
        parts.append(f"{duration(left)} left")
    return parts


def number(of: Mapping[str, Any], key: str) -> float | None:
    value = of.get(key)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def cost_words(cost: Any, limit: Any) -> str:
    if not isinstance(cost, (int, float)):
        return ""
    return f"${cost:,.2f} so far" + (f" of at most ${limit:,.2f}" if isinstance(limit, (int, float)) else "")


def duration(seconds: float) -> str:
    seconds = max(0.0, seconds)
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {seconds % 60:02.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def failure_lines(status: ReleaseStatus) -> list[str]:
    """The reason, and the log's tail last."""
    failing = status.failing
    if failing is None:
        return []
    lines = [f"{failing.name} {failing.state}: {failing.reason}"]
    if failing.tail:
        lines.append(f"last {len(failing.tail)} lines of {failing.tail_of or 'its log'}:")
        lines += [f"  {line}" for line in failing.tail]
    return lines


def closing_lines(status: ReleaseStatus) -> list[str]:
    """What is said below the stages."""
    lines = [f"the merged model: {status.result}"] if status.result else []
    if money := cost_words(status.cost, status.max_cost):
        lines.append(f"cost: {money}")
    if status.devices:
        held = ", ".join(f"{count} {resource}" for resource, count in sorted(status.devices.items()))
        lines.append(f"held now: {held}, on {', '.join(status.nodes)}")
    lines += [f"not read: {what}" for what in status.not_read]
    failure = failure_lines(status)
    if not failure and status.reason:
        lines.append(status.reason)
    return lines + failure


def print_status(status: ReleaseStatus) -> None:
    """For people, on stdout."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False, soft_wrap=not Console().is_terminal)
    console.print(headline(status))
    now = time.time()
    table = Table(box=box.SIMPLE_HEAD if console.is_terminal else None, pad_edge=False)
    for column in ("stage", "state", "began (UTC)"):
        table.add_column(column, no_wrap=True)
    table.add_column("")
    rows = [*([status.runner] if status.runner else []), *status.stages]
    for stage in rows:
        told = replace(stage, reason="")  # it is told below, whole
        table.add_row(stage.name, state_words(stage, now), clock(stage.started), ", ".join(details(told)))
    console.print(table)
    if status.mode == "detached" and not status.stages:
        console.print(f"Its stages are known as soon as the runner has installed {status.release}-run.")
    for line in closing_lines(status):
        console.print(line)


def clock(seconds: float | None) -> str:
    return "" if seconds is None else datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M:%S")


def as_json(status: ReleaseStatus) -> dict[str, Any]:
    """The document that --json prints: keys in camelCase, times in ISO 8601, every key always."""
    document = camel_case(asdict(status))
    document["updated"] = iso(status.updated)
    stages = [*status.stages, *([status.runner] if status.runner else [])]
    documents = [*document["stages"], *([document["runner"]] if status.runner else [])]
    for stage, of_stage in zip(stages, documents, strict=True):
        of_stage["started"], of_stage["ended"] = iso(stage.started), iso(stage.ended)
    document["exitStatus"] = None if status.outcome == "running" else status.exit_status
    return document


def iso(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


DATA = ("devices", "progress", "cost")  # whose keys are not ours


def camel_case(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [camel_case(one) for one in value]
    if not isinstance(value, dict):
        return value
    return {camel(key): inner if key in DATA else camel_case(inner) for key, inner in value.items()}


def camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(part.title() for part in rest)
