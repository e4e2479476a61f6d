"""costs.json, next to progress.json: node usage of the run, updated while a gate follows a job."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from genvalues.cluster.config import ClusterConfig
from genvalues.cluster.failures import StoppedByGuard
from genvalues.cluster.guards import CostLimit, Ledger, reserve_hours
from genvalues.cluster.kinds import Object
from genvalues.cluster.objects import name_of
from genvalues.cluster.workloads import is_worker
from genvalues.common import files
from genvalues.common.errors import UserError
from genvalues.common.json_files import (
    InvalidJson,
    JsonNotFound,
    JsonUnreadable,
    check_own_digest,
    read_object,
    with_own_digest,
)
from genvalues.common.system_errors import VOLUME_FIXES

log = logging.getLogger(__name__)

RAISE_MAX_COST = "Raise guards.maxCost, then upgrade to resume"
Clock = Callable[[], float]  # seconds since 1970


class CostTracker:
    """Node usage of a run, kept on the volume because gates, jobs and releases are replaced during a run.

    ``interval``: seconds between two writes. Raises UserError if costs.json is not valid.
    """

    def __init__(self, progress: Path, config: ClusterConfig, interval: float, clock: Clock) -> None:
        self.file = progress.with_name("costs.json")
        self.limit = CostLimit(config.guards.max_cost, config.guards.price_per_node_hour)
        self.clock = clock
        self.ledger = self._read()
        self._interval = interval
        self._written = (float("-inf"), self.ledger.pods.keys())
        self._failure_logged = False

    def update(self, pods: list[Object]) -> None:
        """Count the run's worker pods as they are now."""
        self.ledger = self.ledger.updated([pod for pod in pods if is_worker(pod)], self.clock())
        at, known = self._written
        if self.clock() - at >= self._interval or known != self.ledger.pods.keys():
            self.write()

    def record_stop(self, job: str, why: str) -> None:
        self.ledger = replace(self.ledger, stopped_job=job, stopped_why=why)
        self.write()

    def write(self) -> None:
        """Write costs.json. A failure is logged once and does not stop the job: counting continues in memory."""
        self._written = (self.clock(), self.ledger.pods.keys())
        try:
            content = {**self.ledger.as_json(), "pricePerNodeHour": self.limit.price}
            files.write_json(self.file, with_own_digest(content))
        except OSError as error:
            if not self._failure_logged:
                log.warning(
                    "cannot write %s: %s. If this gate restarts, the cost since the last write is not counted",
                    self.file,
                    error.strerror,
                )
            self._failure_logged = True

    def check_budget(self, job: Object) -> None:
        """Raise StoppedByGuard if the job would be stopped as soon as it had nodes."""
        hours, reserve = self.ledger.node_hours, reserve_hours(job)
        if self.limit.is_reached(hours, reserve):
            also = f", and stopping {name_of(job)} may cost ${self.limit.cost(reserve):,.2f}"
            raise StoppedByGuard(f"not started: {self.limit.describe(hours)}{also}. {RAISE_MAX_COST}")
        if self.ledger.stopped_job:
            self.record_stop("", "")

    def _read(self) -> Ledger:
        try:
            content = read_object(self.file)
            check_own_digest(content, required=False)  # release 0.1 wrote none
            return Ledger.from_json(content)
        except JsonNotFound:
            return Ledger()
        except InvalidJson as error:
            if isinstance(error, JsonUnreadable) and error.errno in VOLUME_FIXES:  # may pass: the gate is retried
                raise OSError(error.errno, str(error), str(self.file)) from None
            fix = "Repair or delete the file. After deletion the run's cost so far is not counted"
            raise UserError(f"not a valid cost file: it {error}", where=str(self.file), fix=fix) from None
