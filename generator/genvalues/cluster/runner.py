"""Mode detached: the Helm client that runs in the cluster, so that no laptop has to stay connected.

It installs the image's chart as the release RELEASE-run in mode attached. When it restarts, because its pod was lost or
``helm upgrade`` created a new one, it stops older runners, takes over from the Helm client that was killed (recovery),
and resumes: stages that are up to date are skipped, and the new gate follows the running training, or stops it if its
configuration has changed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from genvalues.cluster import kinds
from genvalues.cluster.api import Api
from genvalues.cluster.cleanup import is_stage, runners_of, stop_runners
from genvalues.cluster.config import ClusterConfig, read_yaml
from genvalues.cluster.events import events_of_release
from genvalues.cluster.failures import RETRY, STAGE_FAILED
from genvalues.cluster.helm_records import INNER_ENVIRONMENT, OF_INNER_RELEASE, move_to_config_maps
from genvalues.cluster.kinds import Object
from genvalues.cluster.objects import (
    COMPONENT,
    INSTANCE,
    RUNNER,
    condition,
    created,
    inner_release_of,
    is_over,
    name_of,
    owners_of,
)
from genvalues.cluster.recovery import OperationInProgress, take_over, uids
from genvalues.common.errors import EXIT_USER_ERROR, UserError
from genvalues.common.helm import run_helm

log = logging.getLogger(__name__)

# Helm's --timeout applies to each hook. Each stage has its own deadline, which must be reached first.
HELM_TIMEOUT = "720h"


def run_inner_helm(arguments: list[str]) -> int:
    return run_helm(arguments, environment=INNER_ENVIRONMENT)


def check_values(path: Path) -> None:
    """Raise UserError unless the values install the stages: in mode detached they would install another runner."""
    values = read_yaml(path)
    mode = values["pipeline"].get("mode") if isinstance(values, dict) and "pipeline" in values else None
    if mode != "attached":
        raise UserError(f"pipeline.mode is {mode}", where=str(path), fix="Set it to attached for the inner release")


def check_chart(path: Path, config: ClusterConfig) -> None:
    """Raise UserError if the version of the image's chart differs from the installed chart's.

    Only versions are compared: templates cannot read other templates, so a release contains no digest of them.
    """
    where = path / "Chart.yaml"
    chart = read_yaml(where, fix="Use the image built from trainer/Dockerfile")
    installed = config.chart
    if (chart["version"], chart["appVersion"]) != (installed.version, installed.app_version):
        raise UserError(
            f"the chart in the image is {chart['version']} (appVersion {chart['appVersion']}), "
            f"the installed chart is {installed.version} (appVersion {installed.app_version})",
            where=str(where),
            fix="Set image.tag or image.digest to the image built with this chart, or install the image's chart",
        )


def run(
    api: Api,
    config: ClusterConfig,
    chart: Path,
    values: Path,
    own_job: str,
    *,
    interval: float = 5.0,
    run_helm: Callable[[list[str]], int] = run_inner_helm,
) -> int:
    """Run the pipeline to its end and return its exit status."""
    check_values(values)
    check_chart(chart, config)
    release = inner_release_of(config.release)
    stop_older_runners(api, config.release, own_job, interval)
    move_to_config_maps(api, release)
    try:
        take_over(api, release, interval, OF_INNER_RELEASE)
    except OperationInProgress as problem:  # e.g. a runner on a lost node, which ends at some point: retry
        log.warning("pipeline: %s", problem)
        return RETRY
    before = uids(stages_of(api, release))
    arguments = ["upgrade", "--install", release, str(chart), "--namespace", config.namespace]
    # Without the chart's notes, which would tell readers of this log to uninstall the inner release.
    with events_of_release(api, release, interval):
        status = run_helm([*arguments, "--values", str(values), "--timeout", HELM_TIMEOUT, "--hide-notes"])
    if status == 0:
        log.info("pipeline: done")
        return 0
    made = [job for job in stages_of(api, release) if job["metadata"]["uid"] not in before]
    failed = [job for job in made if condition(job, "Failed")]
    if not failed:
        log.warning("pipeline: helm ended with status %s, but no stage has failed", status)
        return RETRY
    for job in failed:
        log.info("pipeline: %s failed: %s", name_of(job), (condition(job, "Failed") or {}).get("message", ""))
    return EXIT_USER_ERROR if any(map(ended_by_user_error, failed)) else STAGE_FAILED


def stages_of(api: Api, release: str) -> list[Object]:
    return list(filter(is_stage, api.list(kinds.JOBS, labels=f"{INSTANCE}={release}")))


def stop_older_runners(api: Api, release: str, own_job: str, interval: float) -> None:
    """Stop older runners and wait for their pods, because two would install the same release.

    ``helm upgrade`` deletes the older runner, but only after it has created this one.
    """

    def pods_of_others() -> list[str]:
        pods = api.list(kinds.PODS, labels=f"{INSTANCE}={release},{COMPONENT}={RUNNER}")
        others = [pod for pod in pods if own_job not in owners_of(pod)]
        return [name_of(pod) for pod in others if not is_over(pod)]

    runners = runners_of(api, release)
    mine = [created(job) for job in runners if name_of(job) == own_job]
    stop_runners(api, [job for job in runners if mine and created(job) < mine[0]])
    if waited_for := pods_of_others():
        log.info("pipeline: waiting for %s to end", ", ".join(waited_for))
    while pods_of_others():
        time.sleep(interval)


def ended_by_user_error(job: Object) -> bool:
    """Whether a stage's container ended with status 2. Its podFailurePolicy names the status in the condition."""
    failed = condition(job, "Failed") or {}
    matched = f"exit code {EXIT_USER_ERROR} " in failed.get("message", "")
    return failed.get("reason") == "PodFailurePolicy" and matched
