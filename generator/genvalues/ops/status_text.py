"""The status of a release and of its stages in words."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timezone

from genvalues.cluster.objects import inner_release_of
from genvalues.cluster.progress import describe_progress
from genvalues.common.dicts import get
from genvalues.common.reports import aligned
from genvalues.common.text import duration, number_of
from genvalues.ops.stages import StageStatus
from genvalues.ops.status import ReleaseStatus


def status_lines(status: ReleaseStatus) -> list[str]:
    """The release, its stages as a table, and what is held, missing or failed."""
    now = datetime.now(timezone.utc)
    inner = f", runs its stages as {inner_release_of(status.release)}" if status.mode == "detached" else ""
    head = f"{status.release} in {status.namespace}: {status.outcome}"
    head += f" (revision {status.revision}, Helm: {status.helm}, {status.mode}{inner})"
    rows = [("stage", "state", "started (UTC)", "")]
    for stage in status.all_stages:
        started = stage.started.strftime("%Y-%m-%d %H:%M:%S") if stage.started else ""
        without_reason = replace(stage, reason="")  # closing_lines has it
        rows.append((stage.name, describe_state(stage, now), started, ", ".join(details(without_reason))))
    lines = [head, "", *aligned(rows), ""]
    if status.mode == "detached" and not status.stages:
        lines.append(f"The stages are known as soon as the runner has installed {inner_release_of(status.release)}.")
    return lines + closing_lines(status)


def closing_lines(status: ReleaseStatus) -> list[str]:
    """What follows the stages; if one failed, last its reason and the end of its log."""
    lines = [f"merged model: {status.result}"] if status.result else []
    if cost := describe_cost(status.cost, status.max_cost):
        lines.append(f"cost: {cost}")
    if status.devices:
        held = ", ".join(f"{count} {resource}" for resource, count in sorted(status.devices.items()))
        lines.append(f"held now: {held}, on {', '.join(status.nodes)}")
    lines += [f"not read: {what}" for what in status.not_read]
    failing = status.failing
    if failing is None:
        return [*lines, *([status.reason] if status.reason else [])]
    lines.append(f"{failing.name} {failing.state}: {failing.reason}")
    if failing.tail:
        lines.append(f"last {len(failing.tail)} lines of {failing.tail_of or 'its log'}:")
        lines += [f"  {line}" for line in failing.tail]
    return lines


def final_lines(status: ReleaseStatus) -> list[str]:
    """The outcome after following, then ``closing_lines``."""
    head = f"{status.release}: {status.outcome}"
    if status.outcome == "done" and any(stage.started for stage in status.stages):
        states = [stage.state for stage in status.stages]
        head += f", {number_of(states.count('done'), 'stage')} run"
        head += f", {states.count('skipped')} skipped (up to date)" if "skipped" in states else ""
    return [head, *closing_lines(status)]


def describe(stage: StageStatus, now: datetime) -> str:
    """One stage in one line: ``train: running for 12 min 03 s, step 120 of 1,000, loss 1.2340, ...``."""
    return ", ".join([f"{stage.name}: {describe_state(stage, now)}", *details(stage)])


def describe_state(stage: StageStatus, now: datetime) -> str:
    if stage.state == "skipped":
        return "skipped (up to date)"
    if stage.started is None:
        return stage.state
    joint = {"running": "for", "done": "in"}.get(stage.state, "after")
    return f"{stage.state} {joint} {duration(((stage.ended or now) - stage.started).total_seconds())}"


def details(stage: StageStatus) -> list[str]:
    parts = [describe_progress(stage.progress or {})]
    parts.append(describe_cost(get(stage.cost, "cost", float), get(stage.cost, "maxCost", float)))
    if stage.restarts:
        parts.append(number_of(stage.restarts, "restart"))
    if stage.nodes and stage.devices:
        parts.append(f"holds {number_of(len(stage.nodes), 'node')}")
    return [part for part in (*parts, stage.note, stage.reason) if part]


def describe_cost(cost: float | None, limit: float | None) -> str:
    if cost is None:
        return ""
    return f"${cost:,.2f} so far" + (f" of at most ${limit:,.2f}" if limit is not None else "")
