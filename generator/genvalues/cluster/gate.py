"""The gate of a stage that runs as a PyTorchJob: it releases the job, follows an earlier one, or skips the stage.

Helm waits for Jobs, not for PyTorchJobs. So the chart creates the PyTorchJob suspended, and the gate runs as a Job
after it:

 1. The stage is up to date: the suspended job is deleted, and no Trainium node is requested.
 2. A job with the same fingerprint still runs, of an earlier revision or another release: the gate follows it and
    deletes the new one.
 3. Otherwise the gate waits until no other job writes to the run's folder or holds its nodes, releases the new job and
    follows it.

The gate can be killed and restarted at any point: a released job is annotated with the fingerprint it was released for.
"""

from __future__ import annotations

import logging
import time

from genvalues.cluster import api as kinds
from genvalues.cluster.api import Api, Object
from genvalues.cluster.config import ClusterConfig
from genvalues.cluster.cost_tracker import Clock, CostTracker
from genvalues.cluster.decision import decide, outdated_jobs_of_other_stages
from genvalues.cluster.failures import StoppedByGuard
from genvalues.cluster.follower import TIMINGS, GateTimings, JobFollower
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
from genvalues.cluster.trainer_client import ReadStageState, StageState
from genvalues.common import manifests
from genvalues.common.errors import UserError

log = logging.getLogger(__name__)


def gate(
    api: Api,
    config: ClusterConfig,
    stage: str,
    own: str,
    read_state: ReadStageState,
    timings: GateTimings = TIMINGS,
    clock: Clock = time.time,
) -> str:
    """Return when the stage is done, with how it ended. Raises StageFailed or UserError otherwise.

    ``own`` is the PyTorchJob of this revision.
    """
    state = read_state(stage)
    if state.fingerprint is None:
        fix = "Run the pipeline from the start: helm upgrade. Stages that are up to date are skipped"
        raise UserError(f"stage {stage} cannot run: a stage that it depends on is not done", fix=fix)
    jobs = api.list(kinds.PYTORCH_JOBS, labels=f"{RUN}={config.run}")  # of any release
    decision = decide([job for job in jobs if component_of(job) == stage], own, config.release, state)
    stop = list(decision.stop)
    if decision.release:
        stop += outdated_jobs_of_other_stages(jobs, stage, config.release, read_state)
    for name in stop:
        log.info("%s: deleting PyTorchJob %s: it has finished or runs with another configuration", stage, name)
        api.stop_pytorch_job(name)
    for name in decision.delete:
        api.delete(kinds.PYTORCH_JOBS, name)
    costs = None if state.up_to_date else CostTracker(state.progress, config, timings.progress, clock)
    if stop or decision.release:
        wait_for_pods(api, config.run, stage, stop, decision.follow, timings, costs)
    if costs is None:
        log_manifest(state)
        log.info("%s: %s", stage, manifests.SKIPPED)
        return manifests.SKIPPED
    if not decision.follow:
        if costs.ledger.stopped_job == own:  # the gate that stopped it was lost before it could report the reason
            raise StoppedByGuard(costs.ledger.stopped_why)
        upgrade = f"helm upgrade {config.release} CHART -n {config.namespace} --reset-then-reuse-values"
        raise UserError(
            f"PyTorchJob {own} of stage {stage} not found, and no earlier one is running",
            fix=f"Create it again: {upgrade}",
        )
    if decision.release:
        costs.check_budget(next(job for job in jobs if name_of(job) == own))
    follower = JobFollower(api, config, stage, decision.follow, read_state, timings, costs)
    follower.start(state)  # before the release, so that no pod state is missed
    if decision.release:
        release(api, own, state.fingerprint, config.job.queue_name)
    log.info("%s: %s PyTorchJob %s", stage, "released" if decision.release else "following", decision.follow)
    follower.follow(state)
    log_manifest(state)
    log.info("%s: done", stage)
    return f"done by PyTorchJob {decision.follow}"


def log_manifest(state: StageState) -> None:
    """Log the manifest here too: the log of the stage's own pods is lost when an autoscaler removes their nodes."""
    if line := manifests.line_of(state.manifest):
        log.info("%s", line)


def release(api: Api, name: str, fingerprint: str, queue: str) -> None:
    """Unsuspend the job; with Kueue, add it to the queue instead, and Kueue unsuspends it."""
    patch: Object = {"metadata": {"annotations": {FINGERPRINT: fingerprint}}}
    if queue:
        patch["metadata"]["labels"] = {QUEUE_NAME: queue}
    else:
        patch["spec"] = {"runPolicy": {"suspend": False}}
    api.patch(kinds.PYTORCH_JOBS, name, patch)


def wait_for_pods(
    api: Api,
    run: str,
    stage: str,
    stopped: list[str],
    follow: str,
    timings: GateTimings,
    costs: CostTracker | None,
) -> None:
    """Wait until the pods of this stage and of the stopped jobs have ended, except those of the job to follow.

    Pods of this stage are waited for even if their job is deleted already: a worker takes up to 120 s to save a
    checkpoint and exit. The time that the pods hold their nodes is counted. Raises UserError after
    ``timings.pods_gone`` seconds.
    """

    def list_pods() -> list[Object]:
        pods = api.list(kinds.PODS, labels=f"{RUN}={run}")
        if costs:
            costs.update(pods)
        return pods

    def is_waited_for(pod: Object) -> bool:
        job = labels_of(pod).get(JOB_NAME, follow)
        return job != follow and not is_over(pod) and (job in stopped or component_of(pod) == stage)

    deadline = time.monotonic() + timings.pods_gone
    while pods := [name_of(pod) for pod in list_pods() if is_waited_for(pod)]:
        if time.monotonic() >= deadline:
            names = " ".join(pods)
            raise UserError(
                f"pods of an earlier PyTorchJob are still running after {timings.pods_gone:.0f} s: {names}",
                fix=f"Check their nodes. If a node is lost: kubectl -n {api.namespace} delete pod --force {names}",
            )
        time.sleep(timings.interval)
