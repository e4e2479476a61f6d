"""Stop what still runs of a release, and wait until its pods are gone, so that nobody pays for a forgotten node.

Hooks are not owned by the release: Helm leaves their objects alone when it uninstalls or rolls back. So this runs as a
hook before that; and before an install, for leftovers of the same names (an ``uninstall --no-hooks``).
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable

from . import api as kinds
from .api import Api, Object
from .objects import COMPONENT, INSTANCE, STAGE, annotations_of, component_of, is_finished, is_over, labels_of, name_of

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
    interval: float = 1.0,
    run_helm: Callable[[list[str], float], None] = helm,
) -> None:
    """Return when nothing of ``release`` runs; raise StillRunning, with what does, at the deadline."""
    ends = time.monotonic() + timeout
    runners = [job for job in jobs_of(api, release) if component_of(job) == "runner"]
    # A detached release runs its stages as another release (the runner's), which is ours to take down only then.
    releases = [release, f"{release}-run"] if runners else [release]
    for runner in runners:
        if not is_finished(runner):
            say(f"stopping the runner {name_of(runner)}")  # before the stages: it would start the next one
            api.patch(kinds.JOBS, name_of(runner), {"spec": {"suspend": True}})
    wait_for(lambda: running_pods(api, release, "runner"), ends, interval)
    quiet = 0
    while quiet < QUIET_LOOKS:
        left = [what for each in releases for what in stop_stages(api, each, say)]
        quiet = 0 if left else quiet + 1
        if left and time.monotonic() >= ends:
            raise StillRunning(describe(left, api.namespace))
        time.sleep(interval)
    if runners:
        inner = ["uninstall", releases[-1], "--namespace", api.namespace, "--no-hooks", "--ignore-not-found"]
        say(f"helm {' '.join(inner)}")
        run_helm(inner, max(1.0, ends - time.monotonic()))
        for runner in runners:
            api.delete(kinds.JOBS, name_of(runner))  # last: it tells a cleanup that is started again what to take down
    say(f"nothing of {release} runs")


def jobs_of(api: Api, release: str) -> list[Object]:
    """The release's hook Jobs and its runner; never a cleanup, which may be the one that asks."""
    jobs = api.list(kinds.JOBS, labels=f"{INSTANCE}={release}")
    return [job for job in jobs if component_of(job) == "runner" or is_stage(job)]


def is_stage(item: Object) -> bool:
    return STAGE in annotations_of(item) and component_of(item) not in {"cleanup", "runner"}


def stop_stages(api: Api, release: str, say: Callable[[str], None]) -> list[str]:
    """Take every stage of ``release`` one step nearer to its end; what is still there, as kubectl names it."""
    left = []
    for job in filter(is_stage, jobs_of(api, release)):
        left.append(f"job/{name_of(job)}")
        if is_finished(job) or job["spec"].get("suspend"):  # a suspended Job has no pods, and no deadline
            api.delete(kinds.JOBS, name_of(job))
        elif job["spec"].get("activeDeadlineSeconds") != 1:
            # Never deleted while it runs: Helm 3 takes that for success and goes on to the next stage, Helm 4 hangs.
            say(f"stopping {left[-1]}")
            api.patch(kinds.JOBS, name_of(job), {"spec": {"activeDeadlineSeconds": 1}})
    for job in filter(is_stage, api.list(kinds.PYTORCH_JOBS, labels=f"{INSTANCE}={release}")):
        left.append(f"pytorchjob/{name_of(job)}")
        if not job["metadata"].get("deletionTimestamp"):
            say(f"deleting {left[-1]}")
            # Foreground: the operator makes no new pods while the old ones end.
            api.delete(kinds.PYTORCH_JOBS, name_of(job), propagation="Foreground")
    return left + running_pods(api, release)


def running_pods(api: Api, release: str, component: str = "") -> list[str]:
    """The release's pods that have not ended, of Jobs and PyTorchJobs; a cleanup's own apart."""
    selector = f"{INSTANCE}={release}" + (f",{COMPONENT}={component}" if component else "")
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
