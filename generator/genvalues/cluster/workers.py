"""The worker pods of one job: how their containers ended, and the last lines of their logs.

Both are recorded while the pods run, because the operator deletes the pods of a failed job at once.
"""

from __future__ import annotations

import threading
import time
from collections import deque

from genvalues.cluster import kinds
from genvalues.cluster.api import TRANSPORT_ERRORS, Api
from genvalues.cluster.kinds import ApiError, Object
from genvalues.cluster.objects import ContainerExit, ends_of, is_over, name_of, started_container
from genvalues.cluster.podlog import PodLog
from genvalues.common.errors import EXIT_USER_ERROR, EXIT_VOLUME

TAIL_LINES = 40
LINE_LENGTH = 500
TERMINATED = 128 + 15  # exit status of a worker that was stopped by SIGTERM


class LogTail:
    """The last lines of one pod's log, across restarts of its container."""

    def __init__(self, api: Api, pod: str, container: str, interval: float) -> None:
        self.pod = pod
        self.lines: deque[str] = deque(maxlen=TAIL_LINES)
        self.log = PodLog(api, pod, container, self.keep, interval=interval, tail=TAIL_LINES, every=False)

    def keep(self, text: str) -> None:
        self.lines.append(text[:LINE_LENGTH])


class Workers:
    """Observes the pods with the label ``selector`` from start() to close()."""

    def __init__(self, api: Api, selector: str, interval: float) -> None:
        self.ends: list[ContainerExit] = []
        self._tails: dict[str, LogTail] = {}  # by pod uid
        self._api = api
        self._selector = selector
        self._interval = interval
        self._closed = threading.Event()
        self._lock = threading.Lock()

    def start(self) -> None:
        threading.Thread(target=self._watch, daemon=True).start()

    def close(self, patience: float) -> None:
        """Stop observing; wait up to ``patience`` seconds until the logs are read to their end."""
        self._closed.set()
        deadline = time.monotonic() + patience
        with self._lock:
            tails = list(self._tails.values())
        for tail in tails:
            tail.log.over.set()
        for tail in tails:
            tail.log.join(max(0.0, deadline - time.monotonic()))

    def observe(self, pod: Object) -> None:
        """Record the state of a pod. States may arrive in any order."""
        with self._lock:
            self.ends += [end for end in ends_of(pod) if end not in self.ends]
            uid = pod["metadata"]["uid"]
            if uid not in self._tails and (container := started_container(pod)) and not self._closed.is_set():
                self._tails[uid] = LogTail(self._api, name_of(pod), container, self._interval)
                self._tails[uid].log.start()
            if uid in self._tails and is_over(pod):
                self._tails[uid].log.over.set()

    def first_failure(self) -> ContainerExit | None:
        """The exit that most likely caused the others: status 2, else 75, else the earliest that is no success or 143.

        A node whose volume fails pauses before it ends, so the others end before it.
        """

        def rank(end: ContainerExit) -> tuple[bool, bool, bool, str]:
            return end.code != EXIT_USER_ERROR, end.code != EXIT_VOLUME, end.code == TERMINATED, end.finished

        return min((end for end in self.ends if end.code != 0), key=rank, default=None)

    def tail(self) -> tuple[str, list[str]]:
        """The pod whose log explains the failure, and the last lines of that log."""
        cause = self.first_failure()
        with self._lock:
            tails = list(self._tails.values())
        of_cause = [tail for tail in tails if cause and tail.pod == cause.pod and tail.lines]
        for tail in [*of_cause, *tails]:
            if tail.lines:
                return tail.pod, list(tail.lines)
        return "", []

    def _watch(self) -> None:
        while not self._closed.is_set():
            try:
                for pod in self._api.watch(kinds.PODS, labels=self._selector):
                    self.observe(pod)
            except (ApiError, *TRANSPORT_ERRORS):
                pass  # a lasting problem is reported by the gate's own requests
            self._closed.wait(self._interval)
