"""The gate of a stage that runs as a PyTorchJob or TrainJob: it releases the job, follows an earlier one, or skips the
stage.

Helm waits for Jobs only. So the chart creates the job of the stage suspended, and the gate runs as a Job after it:

 1. The stage is up to date and no worker of it runs: the suspended job is deleted, and no Trainium node is requested.
 2. A job with the same fingerprint still runs, of an earlier revision or another release: the gate follows it and
    deletes the new one. Also if the stage is up to date: a worker may hang after another has written the manifest.
 3. Otherwise the gate waits until no other job writes to the run's folder or holds its nodes, releases the new job and
    follows it.

The gate can be killed and restarted at any point: a released job is annotated with the fingerprint it was released for.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from genvalues.cluster import kinds
from genvalues.cluster.api import Api
from genvalues.cluster.config import ClusterConfig
from genvalues.cluster.cost_tracker import Clock, CostTracker
from genvalues.cluster.decision import decide, is_ours, outdated_jobs_of_other_stages
from genvalues.cluster.failures import StoppedByGuard
from genvalues.cluster.follower import TIMINGS, GateTimings, JobFollower
from genvalues.cluster.kinds import NotAllowed, Object
from genvalues.cluster.objects import RUN, component_of, is_over, name_of
from genvalues.cluster.queueing import release
from genvalues.cluster.succession import followed_to_its_end
from genvalues.cluster.trainer_client import ReadStageState, StageState
from genvalues.cluster.workloads import WORKLOADS, Workload, is_finished, is_released, job_of, workload_for
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
    *,
    has_successor: Callable[[Api], bool] = lambda api: True,
) -> str:
    """Return when the stage is done, with how it ended. Raises StageFailed or UserError otherwise.

    ``own`` is the job of this revision. If the gate ends before the job that it follows, and no other gate follows it
    (``has_successor``), the job is stopped.
    """
    workload = workload_for(config.workload)

    def ours() -> list[Object]:
        jobs = jobs_of_run(api, config, workload)
        return [job for job in jobs if component_of(job) == stage and is_ours(job, config.release)]

    with followed_to_its_end(api, workload, ours, has_successor):
        return run_stage(api, config, workload, stage, own, read_state, timings, clock)


def run_stage(
    api: Api,
    config: ClusterConfig,
    workload: Workload,
    stage: str,
    own: str,
    read_state: ReadStageState,
    timings: GateTimings,
    clock: Clock,
) -> str:
    """Skip the stage, or follow its job to its end, which may be released first."""
    state = read_state(stage)
    if state.fingerprint is None:
        fix = "Run the pipeline from the start: helm upgrade. Stages that are up to date are skipped"
        raise UserError(f"stage {stage} cannot run: a stage that it depends on is not done", fix=fix)
    jobs = jobs_of_run(api, config, workload)
    pods = api.list(kinds.PODS, labels=f"{RUN}={config.run}")
    busy = {job_of(pod) for pod in pods if not is_over(pod)}
    decision = decide([job for job in jobs if component_of(job) == stage], own, config.release, state, busy)
    stop = list(decision.stop)
    if decision.release:
        refuse_jobs_of_other_workloads(api, config, workload)
        stop += outdated_jobs_of_other_stages(jobs, stage, config.release, read_state)
    for name in stop:
        log.info("%s: deleting %s %s: it has finished or runs with another configuration", stage, workload.name, name)
        workload.stop(api, name)
    for name in decision.delete:
        workload.delete(api, name)
    is_skipped = state.up_to_date and not decision.follow
    costs = None if is_skipped else CostTracker(state.progress, config, timings.progress, clock)
    if stop or decision.release:
        wait_for_pods(api, config.run, stage, stop, decision.follow, timings, costs)
    if costs is None:
        log_manifest(state)
        log.info("%s: %s", stage, manifests.SKIPPED)
        return manifests.SKIPPED
    if not decision.follow:
        if costs.ledger.stopped_job:  # the gate that stopped it was lost before it could report the reason
            raise StoppedByGuard(costs.ledger.stopped_why)
        upgrade = f"helm upgrade {config.release} CHART -n {config.namespace} --reset-then-reuse-values"
        raise UserError(
            f"{workload.name} {own} of stage {stage} not found, and no earlier one is running",
            fix=f"Create it again: {upgrade}",
        )
    job = next(job for job in jobs if name_of(job) == decision.follow)
    if decision.release:
        costs.check_budget(job)
    follower = JobFollower(api, config, stage, workload, decision.follow, read_state, timings, costs)
    follower.start(state)  # before the release, so that no pod state is missed
    if decision.release:
        release(api, workload, job, state.fingerprint, config.job.queue_name)
    log.info("%s: %s %s", stage, "released" if decision.release else "following", follower.title)
    follower.follow(state)
    log_manifest(state)
    log.info("%s: done", stage)
    return f"done by {follower.title}"


def jobs_of_run(api: Api, config: ClusterConfig, workload: Workload) -> list[Object]:
    """The jobs that use the run's folder, of any stage and release."""
    return api.list(workload.kind, labels=f"{RUN}={config.run}")


def log_manifest(state: StageState) -> None:
    """Log the manifest here too: the log of the stage's own pods is lost when an autoscaler removes their nodes."""
    if line := manifests.line_of(state.manifest):
        log.info("%s", line)


def refuse_jobs_of_other_workloads(api: Api, config: ClusterConfig, own: Workload) -> None:
    """Raise UserError if a job of another workload still trains or compiles in the run's folder.

    Without the right to list such jobs, the gate still waits for their pods.
    """
    for other in WORKLOADS:
        if other is own:
            continue
        try:
            jobs = jobs_of_run(api, config, other)
        except NotAllowed:
            continue
        names = " ".join(name_of(job) for job in jobs if is_released(job) and not is_finished(job))
        if names:
            delete = f"kubectl -n {api.namespace} delete {other.setting} {names} --cascade=foreground"
            raise UserError(
                f"{other.name} {names} uses the run folder, and workload is now {own.setting}",
                where="workload",
                fix=f"Set workload to {other.setting} to follow it, or stop it, which saves a checkpoint: {delete}",
            )


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
        job = job_of(pod) or follow
        return job != follow and not is_over(pod) and (job in stopped or component_of(pod) == stage)

    deadline = time.monotonic() + timings.pods_gone
    while pods := [name_of(pod) for pod in list_pods() if is_waited_for(pod)]:
        if time.monotonic() >= deadline:
            names = " ".join(pods)
            raise UserError(
                f"pods of an earlier job are still running after {timings.pods_gone:.0f} s: {names}",
                fix=f"Check their nodes. If a node is lost: kubectl -n {api.namespace} delete pod --force {names}",
            )
        time.sleep(timings.interval)
