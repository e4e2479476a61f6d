"""The kinds of objects that genvalues reads and writes, and what the API server answers when it refuses.

Without the Kubernetes client, whose import takes a third of a second: `genvalues local` needs none.
"""

from __future__ import annotations

from typing import Any, NamedTuple

Object = dict[str, Any]


class Kind(NamedTuple):
    api: str
    plural: str
    namespaced: bool = True

    def __str__(self) -> str:
        """The name used in RBAC rules and by kubectl: pods, jobs.batch."""
        group = self.api.split("/")[1] if self.api.startswith("apis/") else ""
        return f"{self.plural}.{group}" if group else self.plural


PODS = Kind("api/v1", "pods")
EVENTS = Kind("api/v1", "events")
SECRETS = Kind("api/v1", "secrets")
CONFIG_MAPS = Kind("api/v1", "configmaps")
CLAIMS = Kind("api/v1", "persistentvolumeclaims")
QUOTAS = Kind("api/v1", "resourcequotas")
NODES = Kind("api/v1", "nodes", namespaced=False)
NAMESPACES = Kind("api/v1", "namespaces", namespaced=False)
JOBS = Kind("apis/batch/v1", "jobs")
STORAGE_CLASSES = Kind("apis/storage.k8s.io/v1", "storageclasses", namespaced=False)
PYTORCH_JOBS = Kind("apis/kubeflow.org/v1", "pytorchjobs")
TRAIN_JOBS = Kind("apis/trainer.kubeflow.org/v1alpha1", "trainjobs")
TRAINING_RUNTIMES = Kind("apis/trainer.kubeflow.org/v1alpha1", "trainingruntimes")


CHECK_ADDRESS = "Check the server's address in the kubeconfig: a proxy or a login page may answer"


class ApiError(Exception):
    """The API server rejected a request. ``status`` is the HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        self.status = status
        self.message = message
        super().__init__(message)


class NotAllowed(ApiError):
    """The request is not authenticated (401) or not allowed by RBAC (403)."""


class ServerAway(ApiError):
    """The API server stayed unavailable for the whole retry time."""
