"""Detached mode: the Helm client that runs in the cluster, so that nobody's laptop has to stay open.

Installs the chart of the image as the release RELEASE-run in attached mode. Started again (its pod was lost), it waits
for the stage that still runs, clears the record of the Helm client that died, and goes on: finished stages are skipped.
"""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from genvalues.errors import EXIT_USER_ERROR, UserError

from . import api as kinds
from .api import Api, Object
from .cleanup import is_stage
from .config import ClusterConfig
from .objects import INSTANCE, condition, is_finished, labels_of, name_of

PENDING = "status in (pending-install,pending-upgrade,pending-rollback)"
# Helm's --timeout is per hook, and each stage has its own deadline: this one is never to be the first.
HELM_TIMEOUT = "720h"
STAGE_FAILED = 1


def inner_release(config: ClusterConfig) -> str:
    return f"{config.release}-run"


def inner_values(values: dict[str, Any], config: ClusterConfig) -> dict[str, Any]:
    """The same run, attached, on the claim that the outer release made; no object has the outer one's name."""
    inner = copy.deepcopy(values)
    inner["name"] = inner.get("name") or config.release  # else the run's folder would be named after the inner release
    if inner.get("fullnameOverride"):
        inner["fullnameOverride"] += "-run"
    inner.setdefault("pipeline", {})["mode"] = "attached"
    inner.setdefault("storage", {}).update(enabled=False, existingClaim=config.claim.name)
    return inner


def read_values(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"is not YAML: {' '.join(str(error).split())}", where=str(path)) from error
    if not isinstance(values, dict):
        raise UserError("must be a mapping: the chart's values", where=str(path))
    return values


def helm(arguments: list[str], text: str) -> int:
    """Helm, with ``text`` as its input and our own output; stopped when we are.

    Not pyhelm3: it holds the output back until the end, which is hours away, and stops only the shell around Helm.
    """
    command = shutil.which("helm")
    if command is None:
        raise UserError("there is no helm command here", fix="Use the image built from trainer/Dockerfile")
    with subprocess.Popen([command, *arguments], stdin=subprocess.PIPE, text=True) as process:
        try:
            process.communicate(text)
        finally:
            if process.poll() is None:
                process.terminate()  # Helm marks the release as failed and leaves the stage's Job running
                process.wait()
    return process.returncode


def run(
    api: Api,
    config: ClusterConfig,
    chart: Path,
    values: dict[str, Any],
    say: Callable[[str], None],
    *,
    interval: float = 5.0,
    run_helm: Callable[[list[str], str], int] = helm,
) -> int:
    """Run the pipeline to its end; its exit status."""
    release = inner_release(config)
    wait_for_living_stages(api, release, say, interval)
    clear_pending(api, release, say)
    arguments = ["upgrade", "--install", release, str(chart), "--namespace", config.namespace]
    status = run_helm(
        [*arguments, "--values", "-", "--timeout", HELM_TIMEOUT], json.dumps(inner_values(values, config))
    )
    if status == 0:
        say("pipeline: done")
        return 0
    failed = [job for job in stage_jobs(api, release) if condition(job, "Failed")]
    for job in failed:
        say(f"pipeline: {name_of(job)} failed: {(condition(job, 'Failed') or {}).get('message', '')}")
    return EXIT_USER_ERROR if any(map(ended_by_user_error, failed)) else STAGE_FAILED


def stage_jobs(api: Api, release: str) -> list[Object]:
    return [job for job in api.list(kinds.JOBS, labels=f"{INSTANCE}={release}") if is_stage(job)]


def wait_for_living_stages(api: Api, release: str, say: Callable[[str], None], interval: float) -> None:
    """Helm would delete a running stage's Job to make it anew, or start the next stage beside it."""
    told: list[str] = []
    while living := [name_of(job) for job in stage_jobs(api, release) if not is_finished(job)]:
        if living != told:
            say(f"pipeline: waiting for {', '.join(living)}, which an earlier runner started")
            told = living
        time.sleep(interval)


def clear_pending(api: Api, release: str, say: Callable[[str], None]) -> None:
    """Delete the records that a killed Helm client left: with one, every later Helm command refuses to work."""
    for record in api.list(kinds.SECRETS, labels=f"owner=helm,name={release},{PENDING}"):
        status = labels_of(record).get("status")
        say(f"pipeline: clearing {name_of(record)} ({status}), left by a runner that was killed")
        api.delete(kinds.SECRETS, name_of(record))


def ended_by_user_error(job: Object) -> bool:
    """The stage's podFailurePolicy fails its Job at once on exit status 2."""
    return (condition(job, "Failed") or {}).get("reason") == "PodFailurePolicy"
