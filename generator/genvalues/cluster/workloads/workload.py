"""What the gate, cleanup and the commands for operators need to know of the API that compile and train run as."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from genvalues.cluster.kinds import Kind, Object
from genvalues.cluster.objects import condition

if TYPE_CHECKING:  # genvalues local needs no Kubernetes client
    from genvalues.cluster.api import Api

DEFAULT_GRACE_PERIOD = 30.0  # seconds, the Kubernetes default


class Workload(ABC):
    """An API whose objects, the jobs, run one worker pod on each node. The methods take and return plain objects."""

    setting: ClassVar[str]  # value of the setting workload
    name: ClassVar[str]  # the kind's name
    kind: ClassVar[Kind]
    job_label: ClassVar[str]  # label of a worker pod: the name of its job
    success: ClassVar[str]  # type of the condition of a job that is done
    integration: ClassVar[str]  # in Kueue's configuration, integrations.frameworks
    operator: ClassVar[str]  # who creates the pods

    @abstractmethod
    def is_suspended(self, job: Object) -> bool: ...

    @abstractmethod
    def unsuspended(self) -> Object:
        """The patch that lets a suspended job start."""

    @abstractmethod
    def workers(self, job: Object) -> int:
        """The number of worker pods."""

    @abstractmethod
    def processes(self, job: Object) -> int:
        """The number of training processes in each of them."""

    @abstractmethod
    def retries(self, job: Object) -> int:
        """How often the container of one worker may fail."""

    @abstractmethod
    def grace_period(self, job: Object) -> float:
        """Seconds that a worker has to save a checkpoint when it is stopped."""

    @abstractmethod
    def started(self, job: Object) -> float:
        """When the job was last released, in seconds since 1970; 0 before."""

    @abstractmethod
    def worker_template(self, job: Object, rendered: Sequence[Object]) -> Object:
        """The pod template of a worker. ``rendered``: the objects of the chart."""

    def enforce_deadline(self, api: Api, job: Object) -> None:  # noqa: B027 - most APIs enforce it themselves
        """Have the API's controller end a job that is past its activeDeadlineSeconds."""

    def stop(self, api: Api, name: str) -> None:
        """Request foreground deletion: the job stays, and creates no new pods, until its pods have ended."""
        api.delete(self.kind, name, propagation="Foreground")

    def delete(self, api: Api, name: str) -> None:
        """Delete a job that has no pods."""
        api.delete(self.kind, name)

    def delete_leftovers(self, api: Api, selector: str) -> list[str]:
        """Delete the selected objects that belong to jobs. Return those that are left, in kubectl's TYPE/NAME form."""
        return []

    def succeeded(self, job: Object) -> Object | None:
        """The condition that says so."""
        return condition(job, self.success)

    def failed(self, job: Object) -> Object | None:
        """The condition that says so. The job does not start again."""
        return condition(job, "Failed")

    def is_finished(self, job: Object) -> bool:
        return bool(self.succeeded(job) or self.failed(job))
