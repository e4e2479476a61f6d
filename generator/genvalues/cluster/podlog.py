"""Follow one container's log across interruptions: an unavailable API server, a container restart."""

from __future__ import annotations

import threading
from collections.abc import Callable

from genvalues.cluster.api import TRANSPORT_ERRORS, Api
from genvalues.cluster.kinds import ApiError, NotAllowed


class PodLog(threading.Thread):
    """Pass each log line once, complete and without its time stamp, to ``take``.

    The thread ends when the pod is deleted, or when ``over`` is set and all lines up to then are read.

    ``tail``: number of existing lines to read (None: all). ``every``: after an interruption read all missed lines;
    otherwise at most ``tail``.
    """

    def __init__(
        self,
        api: Api,
        pod: str,
        container: str,
        take: Callable[[str], None],
        *,
        interval: float,
        tail: int | None,
        every: bool = True,
    ) -> None:
        super().__init__(daemon=True)
        self.pod = pod
        self.over = threading.Event()  # no new lines are expected
        self.refused: NotAllowed | None = None
        self._api = api
        self._container = container
        self._take = take
        self._interval = interval
        self._tail = tail
        self._every = every
        self._last_time = ""

    def run(self) -> None:
        while True:
            is_last = self.over.is_set()
            tail = None if self._every and self._last_time else self._tail
            try:
                for line in self._api.log(self.pod, self._container, tail=tail, follow=not is_last):
                    self._keep(line)
                self.refused = None
            except NotAllowed as error:
                self.refused = error  # may be temporary: a server that has just restarted has not loaded its RBAC rules
            except ApiError as error:
                if error.status == 404:
                    return
            except TRANSPORT_ERRORS:
                pass  # the lines are still available when the API server is back
            if is_last:
                return
            self.over.wait(self._interval)

    def _keep(self, line: str) -> None:
        """Skip lines that were read before an interruption, and the kubelet's own lines, which have no time stamp."""
        written = line.partition(" ")[0]
        if written <= self._last_time or not written[:1].isdigit():
            return
        self._last_time = written
        self._take(text_of_line(line))


def text_of_line(line: str) -> str:
    """A log line without its time stamp, and only the last state of a progress bar that redraws its line."""
    return line.partition(" ")[2].rstrip().rsplit("\r", 1)[-1]
