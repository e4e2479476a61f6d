"""costs.json, beside progress.json: what the run's nodes have cost, kept while a gate follows a job."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from genvalues.cluster.api import Object
from genvalues.cluster.config import ClusterConfig
from genvalues.cluster.failures import StoppedByGuard
from genvalues.cluster.guards import Ledger, Limit, is_worker, reserve_hours
from genvalues.cluster.objects import name_of
from genvalues.common import files
from genvalues.common.errors import UserError

RAISE = "Raise guards.maxCost and upgrade to go on"
Clock = Callable[[], float]  # seconds since 1970


class Account:
    """What the run's nodes have cost, kept on the volume: gates, jobs and releases come and go."""

    def __init__(
        self, progress: Path, config: ClusterConfig, say: Callable[[str], None], interval: float, clock: Clock
    ) -> None:
        self.file = progress.with_name("costs.json")
        self.limit = Limit(config.guards.max_cost, config.guards.price_per_node_hour)
        self.clock = clock
        self.ledger = self._read()
        self._say = say
        self._interval = interval
        self._written = (float("-inf"), self.ledger.pods.keys())
        self._cannot_write = False

    def see(self, pods: list[Object]) -> None:
        """Count the run's worker pods as they are now."""
        self.ledger = self.ledger.seen([pod for pod in pods if is_worker(pod)], self.clock())
        at, known = self._written
        if self.clock() - at >= self._interval or known != self.ledger.pods.keys():
            self.write()

    def note_stop(self, job: str, why: str) -> None:
        self.ledger = replace(self.ledger, stopped_job=job, stopped_why=why)
        self.write()

    def write(self) -> None:
        """A volume that takes no file is no reason to leave the job alone: the count goes on, for as long as we do."""
        self._written = (self.clock(), self.ledger.pods.keys())
        try:
            files.write_json(self.file, self.ledger.as_json())
        except OSError as error:
            if not self._cannot_write:
                self._say(f"{self.file} cannot be written: {error.strerror}; a gate that is started again counts anew")
            self._cannot_write = True

    def refuse_what_is_spent(self, job: Object) -> None:
        """Raise StoppedByGuard where the job would be ended as soon as it had nodes."""
        hours, reserve = self.ledger.node_hours, reserve_hours(job)
        if self.limit.is_reached(hours, reserve):
            also = f", and to end {name_of(job)} may take {self.limit.cost(reserve):,.2f}"
            raise StoppedByGuard(f"not started: {self.limit.describe(hours)}{also}. {RAISE}")
        if self.ledger.stopped_job:
            self.note_stop("", "")

    def _read(self) -> Ledger:
        try:
            return Ledger.from_json(json.loads(self.file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return Ledger()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            fix = "Put it right, or remove it: then what the run has cost so far is not counted"
            raise UserError("is not what a gate has written", where=str(self.file), fix=fix) from error
