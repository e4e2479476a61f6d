"""Fetch report.html of a release from the volume, which only pods can read.

A Job of the release's image mounts the volume read-only and prints the file to its log. Its pod is the one of
`helm test`, with another command. That needs no rights beyond those of installing the chart and following its logs.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import re
import secrets
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from genvalues.cluster import kinds
from genvalues.cluster.api import Api
from genvalues.cluster.kinds import ApiError
from genvalues.cluster.objects import COMPONENT, STAGE, annotations_of, ends_of, is_over, latest_warning, name_of
from genvalues.cluster.podlog import text_of_line
from genvalues.common.dicts import get
from genvalues.common.errors import Unavailable, UserError, write_errors_as_user_errors
from genvalues.common.files import place_of, write_named
from genvalues.common.json_files import InvalidJson, read_bytes, read_object
from genvalues.common.log_file import MOST_BYTES, InvalidLog, content_of
from genvalues.common.text import one_line
from genvalues.ops.records import HelmRecord, Object
from genvalues.ops.stages import why_pending
from genvalues.ops.status import ReleaseWatcher, api_errors_as_user_errors
from genvalues.settings.base import RUN_NAME

log = logging.getLogger(__name__)

COMMAND = ["llama-lora", "report", "--config", "/etc/llama-lora/run.yaml"]
WAIT_SECONDS = 180.0  # for the pod to start, read and end
INTERVAL = 1.0
LONGEST_NAME = 63  # of a run, as the values' schema has it
KEPT_SECONDS = 300  # the Job, if this command is killed before it deletes it


def fetch_report(watcher: ReleaseWatcher, output: Path) -> dict[str, Any]:
    """Write the report of a release to ``output``, and return what --json prints.

    Raises UserError if there is no report, Unavailable if the pod does not start in time, and as the watcher does.
    """
    with write_errors_as_user_errors(f"-o {output}"):
        place_of(output)
    job = report_job(watcher.record())
    server, name = watcher.server, name_of(job)
    with api_errors_as_user_errors(server.namespace):
        server.create(kinds.JOBS, job)
        log.info("Reading the report in a pod of job %s, for at most %d s.", name, WAIT_SECONDS)
        try:
            lines = read_log(server, name)
        finally:
            with suppress(ApiError):
                server.delete(kinds.JOBS, name)
    try:
        return write(content_of(lines), output)
    except InvalidLog as error:
        raise Unavailable(f"the log of {name} {error}. Repeat the command") from None


def local_report(workspace: Path, run: str, output: Path | None) -> dict[str, Any]:
    """The same of a run in a workspace on this computer; without ``output`` only checks the file and says where it is.

    Raises UserError if there is no report, or if it is not what evaluate's manifest lists.
    """
    if len(run) > LONGEST_NAME or not re.fullmatch(RUN_NAME, run):
        what = f'"{one_line(run)}" is not a valid run name'
        raise UserError(what, fix=f"Name a folder in {workspace / 'runs'}.")
    file = workspace / "runs" / run / "report.html"
    try:
        manifest = read_object(file.parent / "stages" / "evaluate.json")
        content = read_bytes(file, MOST_BYTES)
    except InvalidJson as error:
        raise UserError(f"no report: {error}", where=str(file), fix="Let the run end: genvalues local FILE.") from None
    recorded = (get(manifest, "outputs", dict) or {}).get(str(file.relative_to(workspace)))
    if get(recorded, "sha256", str) != hashlib.sha256(content).hexdigest():
        what = "has another SHA-256 than evaluate's manifest lists"
        raise UserError(what, where=str(file), fix="Delete the file, and run the pipeline again.")
    if output is None:
        return described(content, file)
    return write(content, output)


def write(content: bytes, output: Path) -> dict[str, Any]:
    with write_errors_as_user_errors(f"-o {output}"):
        write_named(output, content)
    return described(content, output)


def described(content: bytes, file: Path) -> dict[str, Any]:
    return {"file": str(file), "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def report_job(record: HelmRecord) -> Object:
    """The Job that prints the report. Raises UserError if the release does not have the pod of `helm test`."""
    pods = [hook.manifest for hook in record.hooks if hook.kind == "Pod" and "test" in hook.events]
    if not pods:
        fix = "Upgrade it with the chart of this version of genvalues."
        raise UserError("the release has no pod of `helm test`", where=record.release, fix=fix)
    pod = copy.deepcopy(pods[0])
    labels = {**pod["metadata"]["labels"], COMPONENT: "report"}
    annotations = {
        key: value for key, value in annotations_of(pod).items() if not key.startswith("helm.sh/") and key != STAGE
    }
    spec = {key: value for key, value in pod["spec"].items() if key != "activeDeadlineSeconds"}
    spec["containers"][0] |= {"name": "report", "command": COMMAND}
    name = f"{name_of(pod).removesuffix('-verify')[:46]}-report-{secrets.token_hex(4)}"
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "namespace": record.namespace, "labels": labels},
        "spec": {
            "backoffLimit": 0,
            "activeDeadlineSeconds": int(WAIT_SECONDS),
            "ttlSecondsAfterFinished": KEPT_SECONDS,
            "template": {"metadata": {"labels": labels, "annotations": annotations}, "spec": spec},
        },
    }


def read_log(server: Api, job: str) -> list[str]:
    """The log of the Job's pod, once it has ended. Raises UserError with its last line if it failed."""
    until = time.monotonic() + WAIT_SECONDS
    pods: Sequence[Object] = []
    while time.monotonic() < until:
        pods = server.list(kinds.PODS, labels=f"job-name={job}")
        ended = next(filter(is_over, pods), None)
        if ended is not None:
            lines = [text_of_line(line) for line in server.log(name_of(ended), "report", tail=None, follow=False)]
            if any(end.code for end in ends_of(ended)) or get(ended, "status.phase", str) == "Failed":
                last = next((line for line in reversed(lines) if line), "its log is empty")
                raise UserError(last, where=f"pod {name_of(ended)}")
            return lines
        time.sleep(INTERVAL)
    events = server.list(kinds.EVENTS, fields=f"involvedObject.name={job}")  # such as that of a full quota
    reason = next(filter(None, map(why_pending, pods)), "") or latest_warning(events)
    raise Unavailable(
        f"the pod of job {job} has not ended within {WAIT_SECONDS:.0f} s{f': {reason}' if reason else ''}"
    )
