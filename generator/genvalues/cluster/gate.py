"""The gate of a stage that runs as a PyTorchJob: releases the job, or an earlier one, or none, and ends as it ends.

Helm waits for Jobs, not for PyTorchJobs. So the chart creates the PyTorchJob suspended, and this runs as a Job after
it:

 1. the stage's manifest is up to date: the suspended job is deleted; no Trainium node was ever asked for;
 2. a job with the same fingerprint still runs, of an earlier revision or another release: that one is followed, the new
    one deleted;
 3. else the new one is released and followed, when nothing else writes in the run's folder or holds its nodes any more.

Killed and started again at any point, it goes on: what was released is marked with the fingerprint it was released for.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from genvalues.cluster import api as kinds
from genvalues.cluster.api import Api, Object
from genvalues.cluster.config import ClusterConfig
from genvalues.cluster.cost_tracker import Account, Clock
from genvalues.cluster.decision import in_the_way, plan
from genvalues.cluster.failures import StoppedByGuard
from genvalues.cluster.follower import PACE, Follower, Pace
from genvalues.cluster.objects import (
    FINGERPRINT,
    JOB_NAME,
    QUEUE_NAME,
    RUN,
    component_of,
    is_over,
    labels_of,
    name_of,
)
from genvalues.cluster.trainer_client import Ask, StageState
from genvalues.common import manifests
from genvalues.common.errors import UserError


def gate(
    api: Api,
    config: ClusterConfig,
    stage: str,
    own: str,
    ask: Ask,
    say: Callable[[str], None],
    pace: Pace = PACE,
    clock: Clock = time.time,
) -> None:
    """Return when the stage is done; raise StageFailed or UserError when it is not."""
    state = ask(stage)
    if state.fingerprint is None:
        fix = "Run the pipeline from the start: helm upgrade; finished stages are skipped"
        raise UserError(f"stage {stage} cannot run: a stage it reads from is not done", fix=fix)
    jobs = api.list(kinds.PYTORCH_JOBS, labels=f"{RUN}={config.run}")  # of whatever release
    decided = plan([job for job in jobs if component_of(job) == stage], own, config.release, state)
    stop = decided.stop + (in_the_way(jobs, stage, config.release, ask) if decided.release else [])
    for name in stop:
        say(f"{stage}: making way: PyTorchJob {name}, which is over or runs for another configuration")
        # Foreground: the job stays, and makes no new pods, until the old ones have ended.
        api.delete(kinds.PYTORCH_JOBS, name, propagation="Foreground")
    for name in decided.delete:
        api.delete(kinds.PYTORCH_JOBS, name)
    account = None if state.up_to_date else Account(state.progress, config, say, pace.progress, clock)
    if stop or decided.release:
        wait_for_pods(api, config.run, stage, stop, decided.follow, pace, account)
    if state.up_to_date:
        tell_manifest(state, say)
        say(f"{stage}: up to date, nothing to run")
        return
    assert account is not None
    if not decided.follow:
        if account.ledger.stopped_job == own:  # by a gate that was lost before it could say so
            raise StoppedByGuard(account.ledger.stopped_why)
        fix = f"Start it again: helm upgrade {config.release} CHART -n {config.namespace} --reuse-values"
        raise UserError(f"PyTorchJob {own} of stage {stage} is not there, and no earlier one runs", fix=fix)
    if decided.release:
        account.refuse_what_is_spent(next(job for job in jobs if name_of(job) == own))
    follower = Follower(api, config, stage, decided.follow, ask, say, pace, account)
    follower.start(state)  # before the release: nothing of what its pods say is missed
    if decided.release:
        release(api, own, state.fingerprint, config.job.queue_name)
    say(f"{stage}: {'released' if decided.release else 'following'} PyTorchJob {decided.follow}")
    follower.follow(state)
    tell_manifest(state, say)
    say(f"{stage}: done")


def tell_manifest(state: StageState, say: Callable[[str], None]) -> None:
    """The stage's own pods, which say so too, are gone with the Trainium nodes that an autoscaler takes back."""
    if line := manifests.line_of(state.manifest):
        say(line)


def release(api: Api, name: str, fingerprint: str, queue: str) -> None:
    """Let the job run; with Kueue, let it queue, and Kueue let it run."""
    patch: Object = {"metadata": {"annotations": {FINGERPRINT: fingerprint}}}
    if queue:
        patch["metadata"]["labels"] = {QUEUE_NAME: queue}
    else:
        patch["spec"] = {"runPolicy": {"suspend": False}}
    api.patch(kinds.PYTORCH_JOBS, name, patch)


def wait_for_pods(
    api: Api, run: str, stage: str, stopped: list[str], follow: str, pace: Pace, account: Account | None
) -> None:
    """Until no pod of this stage and run works any more, but those of the job to follow, nor one of a stopped job.

    Of this stage whatever its job, because that may be gone already: a worker may take 120 s to save and end. What they
    hold until then is counted.
    """

    def look() -> list[Object]:
        pods = api.list(kinds.PODS, labels=f"{RUN}={run}")
        if account:
            account.see(pods)
        return pods

    def is_waited_for(pod: Object) -> bool:
        job = labels_of(pod).get(JOB_NAME, follow)
        return job != follow and not is_over(pod) and (job in stopped or component_of(pod) == stage)

    ends = time.monotonic() + pace.pods_gone
    while pods := [name_of(pod) for pod in look() if is_waited_for(pod)]:
        if time.monotonic() >= ends:
            names = " ".join(pods)
            fix = f"Look at their nodes; if those are lost: kubectl -n {api.namespace} delete pod --force {names}"
            raise UserError(f"pods of an earlier PyTorchJob still run after {pace.pods_gone:.0f} s: {names}", fix=fix)
        time.sleep(pace.interval)
