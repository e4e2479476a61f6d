"""Detached mode: the Helm client that runs in the cluster, so that nobody's laptop has to stay open.

Installs the chart of the image as the release RELEASE-run in attached mode. Started again (its pod was lost, or
``helm upgrade`` made a new one), it stops older runners, takes over from the Helm client that died (recovery),
and goes on: finished stages are skipped, and the new gate follows the training that runs, or stops it when its
configuration has changed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import yaml

from genvalues.cluster import api as kinds
from genvalues.cluster.api import Api, Object
from genvalues.cluster.cleanup import is_stage, runners_of, stop_runners
from genvalues.cluster.config import ClusterConfig
from genvalues.cluster.objects import (
    COMPONENT,
    INSTANCE,
    condition,
    created,
    is_over,
    name_of,
    owners_of,
)
from genvalues.cluster.recovery import AtWork, take_over
from genvalues.common.errors import EXIT_USER_ERROR, UserError
from genvalues.common.helm import run_helm

# Helm's --timeout is per hook, and each stage has its own deadline: this one is never to be the first.
HELM_TIMEOUT = "720h"
STAGE_FAILED, TRY_AGAIN = 1, 3  # see genvalues.cluster


def check_values(path: Path) -> None:
    """The chart renders them for the inner release; detached ones would install a runner that installs a runner."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"is not YAML: {' '.join(str(error).split())}", where=str(path)) from error
    mode = values["pipeline"].get("mode") if isinstance(values, dict) and "pipeline" in values else None
    if mode != "attached":
        raise UserError(f"pipeline.mode is {mode}", where=str(path), fix="The inner release's is attached")


def check_chart(path: Path, config: ClusterConfig) -> None:
    """The image's chart is the one that was installed.

    Told by its versions only: no template can see the templates, so a Helm client cannot write a digest of them into
    the release.
    """
    where = path / "Chart.yaml"
    try:
        chart = yaml.safe_load(where.read_text(encoding="utf-8"))
    except OSError as error:
        fix = "Use the image built from trainer/Dockerfile"
        raise UserError(f"cannot be read: {error.strerror}", where=str(where), fix=fix) from error
    installed = config.chart
    if (chart["version"], chart["appVersion"]) != (installed.version, installed.app_version):
        raise UserError(
            f"the image's chart is {chart['version']} (appVersion {chart['appVersion']}), "
            f"the installed one {installed.version} (appVersion {installed.app_version})",
            where=str(where),
            fix="Set image.tag or image.digest to the image built with this chart, or install the image's chart",
        )


def run(
    api: Api,
    config: ClusterConfig,
    chart: Path,
    values: Path,
    own_job: str,
    say: Callable[[str], None],
    *,
    interval: float = 5.0,
    run_helm: Callable[[list[str]], int] = run_helm,
) -> int:
    """Run the pipeline to its end; its exit status."""
    check_values(values)
    check_chart(chart, config)
    release = f"{config.release}-run"
    stop_older_runners(api, config.release, own_job, say, interval)
    try:
        take_over(api, release, say, interval)
    except AtWork as problem:  # a runner on a node that the cluster has lost sight of; it must end some time
        say(f"pipeline: {problem}")
        return TRY_AGAIN
    failed_before = [job["metadata"]["uid"] for job in failed_stages(api, release)]
    arguments = ["upgrade", "--install", release, str(chart), "--namespace", config.namespace]
    # Its notes would tell the reader of this log to uninstall the inner release.
    status = run_helm([*arguments, "--values", str(values), "--timeout", HELM_TIMEOUT, "--hide-notes"])
    if status == 0:
        say("pipeline: done")
        return 0
    failed = [job for job in failed_stages(api, release) if job["metadata"]["uid"] not in failed_before]
    if not failed:
        say(f"pipeline: helm ended with status {status}, and no stage has failed")
        return TRY_AGAIN
    for job in failed:
        say(f"pipeline: {name_of(job)} failed: {(condition(job, 'Failed') or {}).get('message', '')}")
    return EXIT_USER_ERROR if any(map(ended_by_user_error, failed)) else STAGE_FAILED


def failed_stages(api: Api, release: str) -> list[Object]:
    jobs = api.list(kinds.JOBS, labels=f"{INSTANCE}={release}")
    return [job for job in jobs if is_stage(job) and condition(job, "Failed")]


def stop_older_runners(api: Api, release: str, own_job: str, say: Callable[[str], None], interval: float) -> None:
    """Two would install the same release. ``helm upgrade`` deletes the older one, but makes this one first."""

    def of_others() -> list[str]:
        pods = api.list(kinds.PODS, labels=f"{INSTANCE}={release},{COMPONENT}=runner")
        others = [pod for pod in pods if own_job not in owners_of(pod)]
        return [name_of(pod) for pod in others if not is_over(pod)]

    runners = runners_of(api, release)
    mine = [created(job) for job in runners if name_of(job) == own_job]
    stop_runners(api, [job for job in runners if mine and created(job) < mine[0]], say)
    if waited_for := of_others():
        say(f"pipeline: waiting for {', '.join(waited_for)} to end")
    while of_others():
        time.sleep(interval)


def ended_by_user_error(job: Object) -> bool:
    """The stage's podFailurePolicy fails its Job at once, and names the status in the condition."""
    failed = condition(job, "Failed") or {}
    matched = f"exit code {EXIT_USER_ERROR} " in failed.get("message", "")
    return failed.get("reason") == "PodFailurePolicy" and matched
