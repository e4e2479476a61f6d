"""Stop everything of a release that still runs, and wait until its pods are gone, so that no node costs money unseen.

Helm does not own hooks: an uninstall or a rollback leaves their objects in place. So cleanup runs as a hook before
both. It also runs before an install, for objects that an ``uninstall --no-hooks`` has left.
"""

from __future__ import annotations

import logging
import os
import subprocess
import time
from collections.abc import Callable

from genvalues.cluster import kinds
from genvalues.cluster.api import Api
from genvalues.cluster.helm_records import INNER_ENVIRONMENT, delete_from_secrets
from genvalues.cluster.kinds import NotAllowed, Object
from genvalues.cluster.objects import (
    COMPONENT,
    INSTANCE,
    RUN,
    RUNNER,
    STAGE,
    STOPPED_BY_US,
    annotations_of,
    component_of,
    inner_release_of,
    is_being_deleted,
    is_finished,
    is_over,
    labels_of,
    name_of,
)
from genvalues.cluster.workloads import NAMES, WORKLOADS, Workload
from genvalues.common.helm import find_helm

log = logging.getLogger(__name__)

# A live Helm client creates the next stage's Job a moment after the last one has ended, so look this often.
QUIET_LOOKS = 3
JOB_KINDS = {"Job", *NAMES}


class StillRunning(Exception):
    """Something still runs at the deadline."""


def helm(arguments: list[str], seconds: float) -> None:
    """Run helm on the inner release for at most ``seconds``. Raises StillRunning if it fails."""
    command = f"helm {' '.join(arguments)}"
    try:
        done = subprocess.run(
            [find_helm(), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            check=False,
            env={**os.environ, **INNER_ENVIRONMENT},
        )
    except subprocess.TimeoutExpired as expired:
        raise StillRunning(f"still running at the deadline: {command}") from expired
    if done.returncode != 0:
        raise StillRunning(f"{command} ended with status {done.returncode}: {done.stdout.strip()}")


def cleanup(
    api: Api,
    release: str,
    timeout: float,
    *,
    workload: Workload,
    run: str = "",
    interval: float = 1.0,
    run_helm: Callable[[list[str], float], None] = helm,
) -> None:
    """Return when nothing of ``release`` runs. Raises StillRunning, naming what runs, after ``timeout`` seconds.

    ``run`` is the value of the label llama-lora/run.
    """
    deadline = time.monotonic() + timeout
    runners = runners_of(api, release)
    stop_runners(api, runners)  # before the stages, because a runner would start the next one
    wait_for(lambda: running_pods(api, f"{INSTANCE}={release},{COMPONENT}={RUNNER}"), deadline, interval)
    # The stages of a detached release belong to its inner release. If an upgrade to mode attached has removed the
    # runner, only objects that use this run's folder are known to be ours.
    inner = inner_release_of(release)
    selectors = [f"{INSTANCE}={release}"]
    if runners:
        selectors.append(f"{INSTANCE}={inner}")
    elif run:
        selectors.append(f"{INSTANCE}={inner},{RUN}={run}")
    quiet = 0
    while quiet < QUIET_LOOKS:
        left = [what for selector in selectors for what in stop_stages(api, selector, workload)]
        quiet = 0 if left else quiet + 1
        if left and time.monotonic() >= deadline:
            names = " ".join(left)
            raise StillRunning(
                f"still running at the deadline: {names}. Check: kubectl -n {api.namespace} describe {names}"
            )
        time.sleep(interval)
    if runners:
        uninstall(api, inner, deadline, run_helm)
        for runner in runners:
            api.delete(kinds.JOBS, name_of(runner))  # last, so that a restarted cleanup finds the inner release
    log.info("nothing of %s is running", release)


def uninstall(api: Api, inner: str, deadline: float, run_helm: Callable[[list[str], float], None]) -> None:
    """Uninstall the release that a runner has installed.

    A rollback to mode attached has that mode's role, which has no right to. Then the release stays, without stages.
    """
    try:
        api.list(kinds.CONFIG_MAPS, labels=f"owner=helm,name={inner}")
    except NotAllowed as refused:
        log.info("release %s is not uninstalled: %s", inner, refused.message)
        return
    arguments = ["uninstall", inner, "--namespace", api.namespace, "--no-hooks", "--ignore-not-found"]
    log.info("running: helm %s", " ".join(arguments))
    run_helm(arguments, max(1.0, deadline - time.monotonic()))
    delete_from_secrets(api, inner)  # of an earlier version of the chart, whose runner has not run since
    for left_behind in api.list(kinds.CONFIG_MAPS, labels=f"{INSTANCE}={inner}"):
        api.delete(kinds.CONFIG_MAPS, name_of(left_behind))


def runners_of(api: Api, release: str) -> list[Object]:
    jobs = api.list(kinds.JOBS, labels=f"{INSTANCE}={release}")
    return [job for job in jobs if component_of(job) == RUNNER]


def stop_runners(api: Api, runners: list[Object]) -> None:
    """Suspend the runners. They are not deleted, so that a cleanup that restarts still finds them."""
    for runner in runners:
        if not is_finished(runner):
            log.info("stopping job/%s", name_of(runner))
            api.patch(kinds.JOBS, name_of(runner), {"spec": {"suspend": True}})


def is_stage(item: Object) -> bool:
    """Whether the object belongs to a stage. A cleanup does not: it may be the caller."""
    return STAGE in annotations_of(item) and component_of(item) not in {"cleanup", RUNNER}


def stop_stages(api: Api, selector: str, own: Workload) -> list[str]:
    """Move every selected stage one step closer to its end. Return what is left, in kubectl's TYPE/NAME form."""
    left = []
    for job in filter(is_stage, api.list(kinds.JOBS, labels=selector)):
        left.append(f"job/{name_of(job)}")
        if is_finished(job) or job["spec"].get("suspend"):  # a suspended Job has no pods and no deadline
            api.delete(kinds.JOBS, name_of(job))
        else:
            fail_job(api, job)
    for workload in WORKLOADS:
        try:
            left += stop_jobs(api, selector, workload)
        except NotAllowed:  # of an earlier revision with another workload; its pods are waited for
            if workload is own:
                raise
    for pod in filter(is_stage, api.list(kinds.PODS, labels=selector)):  # the pod of `helm test`, which has no owner
        left.append(f"pod/{name_of(pod)}")
        api.delete(kinds.PODS, name_of(pod))
    return left + running_pods(api, selector)


def stop_jobs(api: Api, selector: str, workload: Workload) -> list[str]:
    left = []
    for job in filter(is_stage, api.list(workload.kind, labels=selector)):
        left.append(f"{workload.setting}/{name_of(job)}")
        if not is_being_deleted(job):
            log.info("deleting %s", left[-1])
            workload.stop(api, name_of(job))
    return left + workload.delete_leftovers(api, selector)


def fail_job(api: Api, job: Object) -> None:
    """Make a running Job fail. If it were deleted, Helm 3 would start the next stage, and Helm 4 would hang."""
    if job["spec"].get("activeDeadlineSeconds") != STOPPED_BY_US:
        log.info("stopping job/%s", name_of(job))
        api.patch(kinds.JOBS, name_of(job), {"spec": {"activeDeadlineSeconds": STOPPED_BY_US}})


def running_pods(api: Api, selector: str) -> list[str]:
    """The selected pods of Jobs and of compile and train that have not ended, without those of a cleanup."""
    return [
        f"pod/{name_of(pod)}"
        for pod in api.list(kinds.PODS, labels=selector)
        if not is_over(pod)
        and labels_of(pod).get(COMPONENT) != "cleanup"
        and any(owner["kind"] in JOB_KINDS for owner in pod["metadata"].get("ownerReferences") or [])
    ]


def wait_for(what_is_left: Callable[[], list[str]], deadline: float, interval: float) -> None:
    while left := what_is_left():
        if time.monotonic() >= deadline:
            raise StillRunning(f"still running at the deadline: {' '.join(left)}")
        time.sleep(interval)
