"""One container's log, followed through what breaks a stream off: an API server that is away, a restart in place."""

from __future__ import annotations

import threading
from collections.abc import Callable

from genvalues.cluster import api as kinds
from genvalues.cluster.api import Api, ApiError, NotAllowed


class PodLog(threading.Thread):
    """Each line once and whole, without its time, to ``take``; until the pod is gone, or ``over`` is set and what there
    is then has been read.

    ``tail``: of the lines that are there already, how many (None: all). ``every``: none that comes later is left out
    then, however many a break has held back; without it never more than ``tail`` are asked for.
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
        self.over = threading.Event()  # nothing new will come
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
            last_look = self.over.is_set()
            tail = None if self._every and self._last_time else self._tail
            try:
                for line in self._api.log(self.pod, self._container, tail=tail, follow=not last_look):
                    self._keep(line)
                self.refused = None
            except NotAllowed as error:
                self.refused = error  # for now, perhaps: a server that has just come back has not read its RBAC rules
            except ApiError as error:
                if error.status == 404:
                    return
            except kinds.TRANSPORT_ERRORS:
                pass  # the API server is away; the lines are still there when it is back
            if last_look:
                return
            self.over.wait(self._interval)

    def _keep(self, line: str) -> None:
        """What was seen before the stream broke off comes again and is left out."""
        written = line.partition(" ")[0]
        if written <= self._last_time or not written[:1].isdigit():  # the kubelet's own words have no time
            return
        self._last_time = written
        self._take(text_of_line(line))


def text_of_line(line: str) -> str:
    """A line of a log without the time in front; of a progress bar, which draws its line again, the last state."""
    return line.partition(" ")[2].rstrip().rsplit("\r", 1)[-1]
