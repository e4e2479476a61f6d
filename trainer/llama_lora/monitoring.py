"""Show others how a run is doing: metrics.prom on the volume, a Pushgateway, an OpenTelemetry collector, trackers.

Nothing here may slow or end a stage: what leaves this process does so in a thread of its own, with short timeouts, and
the first failure of each target is one warning.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from genvalues.common import files
from genvalues.common.errors import UserError, VolumeError
from genvalues.common.json_files import InvalidJson, read_object
from genvalues.common.manifests import SKIPPED
from genvalues.common.text import one_line, redacted
from llama_lora import config as run_config
from llama_lora import environment
from llama_lora.backends.stopping import EXIT_STOPPED
from llama_lora.metrics import Series, StageStatus, State, as_otlp, as_text, registry_of, seconds_of, series_of
from llama_lora.paths import Paths
from llama_lora.trackers import Step, Tracker, check_installed, trackers_for

log = logging.getLogger(__name__)

SECONDS_BETWEEN_FILES = 1.0
SECONDS_BETWEEN_PUSHES = 10.0
REQUEST_SECONDS = 5.0
LAST_PUSH_SECONDS = 5.0  # how long the end of a stage waits for it
TERMINATION_LOG = Path("/dev/termination-log")  # of a container: `kubectl describe pod` shows its text


class Metrics:
    """The metrics of one run, as one of its stages writes them."""

    def __init__(self, paths: Paths, config: run_config.RunConfig, stage: str) -> None:
        self.paths = paths
        self.stage = stage
        self._began = time.monotonic()
        self._written_at = float("-inf")
        self._pusher = Pusher(targets_of(config))
        self._warned = False

    @cached_property
    def _others(self) -> dict[str, StageStatus]:
        """Read when the first metrics are written: a stage that is skipped writes none."""
        return {name: status for name, status in finished_stages(self.paths).items() if name != self.stage}

    def write(self, state: State, progress: Mapping[str, Any], *, now: bool = True) -> None:
        """Write the file, and have the series pushed; unless ``now``, only if the last time is a second ago."""
        moment = time.monotonic()
        if not now and moment - self._written_at < SECONDS_BETWEEN_FILES:
            return
        self._written_at = moment
        try:
            stages = {**self._others, self.stage: StageStatus(state, moment - self._began)}
            series = series_of(self.paths.run_name, stages, progress)
            self._pusher.push(series)  # first: a full volume must not hide that the stage failed
            files.write_bytes(self.paths.prometheus, as_text(series))
        except Exception as error:  # a full volume, or an image without prometheus_client
            if not self._warned:
                log.warning(f"cannot write {self.paths.prometheus}: {one_line(str(error), 200)}")
            self._warned = True

    def close(self) -> None:
        self._pusher.close()


def finished_stages(paths: Paths) -> dict[str, StageStatus]:
    """The stages that have a manifest, and how long they took."""
    found = {}
    for file in sorted(paths.manifest("x").parent.glob("*.json")):
        with suppress(InvalidJson):
            manifest = read_object(file)
            started, finished = seconds_of(manifest.get("started")), seconds_of(manifest.get("finished"))
            if started is not None and finished is not None:
                found[file.stem] = StageStatus("done", finished - started)
    return found


def read_progress(paths: Paths) -> dict[str, Any]:
    try:
        return read_object(paths.progress)
    except InvalidJson:
        return {}


class TrainingMonitor:
    """What RunLog tells of a training, for the worker of rank 0."""

    def __init__(self, paths: Paths, fingerprint: str) -> None:
        self._metrics: Metrics | None = None
        self._trackers: list[Tracker] = []
        self._progress: Mapping[str, Any] = {}
        if paths.config.exists():  # written by the stage; tests of the loop have none
            config = run_config.load(paths.config)
            self._metrics = Metrics(paths, config, "train")
            self._trackers = trackers_for(paths, config, fingerprint)

    def step(self, metrics: Step, tokens_per_second: float) -> None:
        for tracker in self._trackers:
            tracker.step(metrics, tokens_per_second)

    def held_out(self, step: int, loss: float) -> None:
        for tracker in self._trackers:
            tracker.held_out(step, loss)

    def progress(self, progress: Mapping[str, Any]) -> None:
        """The content of progress.json has changed."""
        self._progress = progress
        if self._metrics:
            self._metrics.write("running", progress, now=False)

    def close(self) -> None:
        if self._metrics:
            self._metrics.write("running", self._progress)
            self._metrics.close()
        for tracker in self._trackers:
            tracker.close()


@contextmanager
def observed(name: str, config: run_config.RunConfig, paths: Paths) -> Iterator[Callable[[], None]]:
    """Record the state of a stage while the block runs it: the block calls what this yields when work begins.

    A stage that is skipped records nothing; of several nodes that run it together, only the first writes metrics.
    Raises UserError if the image lacks a tracker's library.
    """
    check_installed(config.monitoring)
    metrics = Metrics(paths, config, name) if environment.is_first_node() else None
    state: State | None = None

    def begin() -> None:
        nonlocal state
        state = "running"
        if metrics:
            metrics.write(state, read_progress(paths))

    try:
        yield begin
        leave_message(f"{name} done" if state else SKIPPED)
        state = "done" if state else None
    except SystemExit as end:
        state = "stopped" if end.code == EXIT_STOPPED else "failed"
        raise
    except BaseException as error:
        state = "failed"
        if isinstance(error, (UserError, VolumeError)):
            leave_message(str(error))
        raise
    finally:
        if metrics:
            if state:
                metrics.write(state, read_progress(paths))
            metrics.close()


def leave_message(text: str) -> None:
    """Leave the first line of a message for Kubernetes, in a container."""
    if TERMINATION_LOG.exists():
        with suppress(OSError):
            TERMINATION_LOG.write_text(one_line(redacted(text).strip().partition("\n")[0], 1000), encoding="utf-8")


# --- targets

Target = Callable[[Sequence[Series]], None]


def targets_of(config: run_config.RunConfig) -> dict[str, Target]:
    """What pushes series, by the setting that names it."""
    monitoring = config.monitoring
    found: dict[str, Target] = {}
    if monitoring.pushgateway:
        found["monitoring.pushgateway"] = pushgateway(monitoring.pushgateway, config.name)
    if monitoring.otlp_endpoint:
        found["monitoring.otlpEndpoint"] = collector(monitoring.otlp_endpoint)
    return found


def pushgateway(url: str, run: str) -> Target:
    """Replace the run's group in a Pushgateway."""
    user, password = os.environ.get("PUSHGATEWAY_USERNAME"), os.environ.get("PUSHGATEWAY_PASSWORD")

    def handler(**request: Any) -> Callable[[], None]:
        from prometheus_client.exposition import basic_auth_handler, default_handler

        return basic_auth_handler(**request, username=user, password=password) if user else default_handler(**request)

    def push(series: Sequence[Series]) -> None:
        from prometheus_client import push_to_gateway

        # The gateway adds the labels of the group.
        push_to_gateway(url, "llama-lora", registry_of(series), {"run": run}, REQUEST_SECONDS, handler)

    return push


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: it would take the headers with credentials to another server."""

    def redirect_request(self, *_: Any) -> None:
        return None


def collector(endpoint: str) -> Target:
    """Send to an OpenTelemetry collector, with the headers of $OTEL_EXPORTER_OTLP_HEADERS."""
    opener = urllib.request.build_opener(NoRedirect)
    headers = {"Content-Type": "application/json", **headers_of(os.environ.get("OTEL_EXPORTER_OTLP_HEADERS", ""))}

    def push(series: Sequence[Series]) -> None:
        body = json.dumps(as_otlp(series, time.time_ns())).encode()
        request = urllib.request.Request(f"{endpoint.rstrip('/')}/v1/metrics", body, headers)
        opener.open(request, timeout=REQUEST_SECONDS).close()

    return push


def headers_of(text: str) -> dict[str, str]:
    """Parse key=value,key=value with percent-encoded values, as the OpenTelemetry specification has it."""
    pairs = (pair.partition("=") for pair in text.split(",") if "=" in pair)
    return {unquote(key).strip(): unquote(value).strip() for key, _, value in pairs}  # of a Secret made with echo


class Pusher:
    """Pushes the latest series to each target. A target that hangs delays no other."""

    def __init__(self, targets: Mapping[str, Target]) -> None:
        self._threads = [PushThread(name, target) for name, target in targets.items()]

    def push(self, series: Sequence[Series]) -> None:
        for thread in self._threads:
            thread.push(series)

    def close(self) -> None:
        """Push what is left, within LAST_PUSH_SECONDS."""
        for thread in self._threads:
            thread.ask_to_end()
        deadline = time.monotonic() + LAST_PUSH_SECONDS
        for thread in self._threads:
            thread.wait_until(deadline)


class PushThread(threading.Thread):
    """Pushes the latest series to one target. Older ones that are not pushed yet are dropped."""

    def __init__(self, target_name: str, target: Target) -> None:
        super().__init__(daemon=True, name=f"push metrics to {target_name}")
        self._target_name = target_name
        self._target = target
        self._latest: Sequence[Series] | None = None
        self._changed = threading.Condition()
        self._closing = False
        self._failed = False

    def push(self, series: Sequence[Series]) -> None:
        if self.ident is None:  # not started
            self.start()
        with self._changed:
            self._latest = series
            self._changed.notify()

    def ask_to_end(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()

    def wait_until(self, deadline: float) -> None:
        if self.ident is None:
            return
        self.join(max(0.0, deadline - time.monotonic()))
        if self.is_alive() and not self._failed:  # a server that sends a byte now and then has no timeout
            what = f"the last metrics were not accepted within {LAST_PUSH_SECONDS:.0f} s"
            log.warning(f"{self._target_name}: {what}")

    def run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._latest is not None or self._closing)
                series, self._latest = self._latest, None
            if series is None:
                return
            try:
                self._target(series)
            except Exception as error:  # whatever a server does
                if not self._failed:
                    reason = one_line(redacted(str(error)) or type(error).__name__, 200)
                    log.warning(f"{self._target_name}: metrics were not accepted: {reason}")
                self._failed = True
            with self._changed:
                self._changed.wait_for(lambda: self._closing, SECONDS_BETWEEN_PUSHES)
