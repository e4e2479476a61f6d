"""Stop what still runs of a release, and wait until its pods are gone, so that nobody pays for a forgotten node.

Hooks are not owned by the release: Helm leaves their objects alone when it uninstalls or rolls back. So this runs as a
hook before that; and before an install, for leftovers of the same names (an ``uninstall --no-hooks``).
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable

from genvalues.cluster import api as kinds
from genvalues.cluster.api import Api, Object
from genvalues.cluster.objects import (
    COMPONENT,
    INSTANCE,
    RUN,
    STAGE,
    annotations_of,
    component_of,
    is_finished,
    is_over,
    labels_of,
    name_of,
)

# A live Helm client creates the next stage's Job a moment after the last one's end: nothing must be there this often.
QUIET_LOOKS = 3


class StillRunning(Exception):
    """The deadline came first."""


def helm(arguments: list[str], seconds: float) -> None:
    command = shutil.which("helm")
    if command is None:
        raise StillRunning(f"there is no helm here to run: helm {' '.join(arguments)}")
    try:
        done = subprocess.run(
            [command, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as expired:
        raise StillRunning(f"helm {' '.join(arguments)} has not ended at the deadline") from expired
    if done.returncode != 0:
        raise StillRunning(f"helm {' '.join(arguments)} ended with status {done.returncode}: {done.stdout.strip()}")


def cleanup(
    api: Api,
    release: str,
    timeout: float,
    say: Callable[[str], None],
    *,
    run: str = "",
    interval: float = 1.0,
    run_helm: Callable[[list[str], float], None] = helm,
) -> None:
    """Return when nothing of ``release`` runs; raise StillRunning, with what does, at the deadline."""
    ends = time.monotonic() + timeout
    runners = runners_of(api, release)
    stop_runners(api, runners, say)  # before the stages: they would start the next one
    wait_for(lambda: running_pods(api, f"{INSTANCE}={release},{COMPONENT}=runner"), ends, interval)
    # A detached release runs its stages as another release (the runner's). Without a runner, which an upgrade to mode
    # attached takes away, only what works in this run's folder is known to be ours.
    inner = f"{release}-run"
    selectors = [f"{INSTANCE}={release}"]
    if runners:
        selectors.append(f"{INSTANCE}={inner}")
    elif run:
        selectors.append(f"{INSTANCE}={inner},{RUN}={run}")
    quiet = 0
    while quiet < QUIET_LOOKS:
        left = [what for selector in selectors for what in stop_stages(api, selector, say)]
        quiet = 0 if left else quiet + 1
        if left and time.monotonic() >= ends:
            raise StillRunning(describe(left, api.namespace))
        time.sleep(interval)
    if runners:
        arguments = ["uninstall", inner, "--namespace", api.namespace, "--no-hooks", "--ignore-not-found"]
        say(f"helm {' '.join(arguments)}")
        run_helm(arguments, max(1.0, ends - time.monotonic()))
        for runner in runners:
            api.delete(kinds.JOBS, name_of(runner))  # last: it tells a cleanup that is started again what to take down
    say(f"nothing of {release} runs")


def runners_of(api: Api, release: str) -> list[Object]:
    jobs = api.list(kinds.JOBS, labels=f"{INSTANCE}={release}")
    return [job for job in jobs if component_of(job) == "runner"]


def stop_runners(api: Api, runners: list[Object], say: Callable[[str], None]) -> None:
    """Suspended, not deleted: a command that is started again still finds them."""
    for runner in runners:
        if not is_finished(runner):
            say(f"stopping the runner {name_of(runner)}")
            api.patch(kinds.JOBS, name_of(runner), {"spec": {"suspend": True}})


def is_stage(item: Object) -> bool:
    """Never a cleanup, which may be the one that asks."""
    return STAGE in annotations_of(item) and component_of(item) not in {"cleanup", "runner"}


def stop_stages(api: Api, selector: str, say: Callable[[str], None]) -> list[str]:
    """Take every selected stage one step nearer to its end; what is still there, as kubectl names it."""
    left = []
    for job in filter(is_stage, api.list(kinds.JOBS, labels=selector)):
        left.append(f"job/{name_of(job)}")
        if is_finished(job) or job["spec"].get("suspend"):  # a suspended Job has no pods, and no deadline
            api.delete(kinds.JOBS, name_of(job))
        else:
            fail_job(api, job, say)
    for job in filter(is_stage, api.list(kinds.PYTORCH_JOBS, labels=selector)):
        left.append(f"pytorchjob/{name_of(job)}")
        if not job["metadata"].get("deletionTimestamp"):
            say(f"deleting {left[-1]}")
            # Foreground: the operator makes no new pods while the old ones end.
            api.delete(kinds.PYTORCH_JOBS, name_of(job), propagation="Foreground")
    for pod in filter(is_stage, api.list(kinds.PODS, labels=selector)):  # of `helm test`: nothing owns it
        left.append(f"pod/{name_of(pod)}")
        api.delete(kinds.PODS, name_of(pod))
    return left + running_pods(api, selector)


def fail_job(api: Api, job: Object, say: Callable[[str], None]) -> None:
    """A running Job is never deleted: Helm 3 takes that for success and goes on to the next stage, Helm 4 hangs."""
    if job["spec"].get("activeDeadlineSeconds") != 1:
        say(f"stopping job/{name_of(job)}")
        api.patch(kinds.JOBS, name_of(job), {"spec": {"activeDeadlineSeconds": 1}})


def running_pods(api: Api, selector: str) -> list[str]:
    """Selected pods that have not ended, of Jobs and PyTorchJobs; a cleanup's own apart."""
    return [
        f"pod/{name_of(pod)}"
        for pod in api.list(kinds.PODS, labels=selector)
        if not is_over(pod)
        and labels_of(pod).get(COMPONENT) != "cleanup"
        and any(owner["kind"] in {"Job", "PyTorchJob"} for owner in pod["metadata"].get("ownerReferences") or [])
    ]


def wait_for(what_is_left: Callable[[], list[str]], ends: float, interval: float) -> None:
    while left := what_is_left():
        if time.monotonic() >= ends:
            raise StillRunning(" ".join(left))
        time.sleep(interval)


def describe(left: list[str], namespace: str) -> str:
    return f"still there at the deadline: {' '.join(left)}. Look: kubectl -n {namespace} describe {' '.join(left)}"
