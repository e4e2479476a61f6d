"""What the libraries read from the environment, set before they are imported: quiet logs, and threads."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def available_cores() -> int:
    """Cores this process may use: a container's CPU limit (cgroup v2 or v1), not the 128 of the node around it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for quota_file, period_file in (
        ("/sys/fs/cgroup/cpu.max", None),
        ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us"),
    ):
        try:
            quota, _, period = Path(quota_file).read_text(encoding="ascii").strip().partition(" ")
            if period_file:
                period = Path(period_file).read_text(encoding="ascii")
            limit = int(quota) // int(period)
        except (OSError, ValueError):  # not this version of cgroups, or "max": no limit
            continue
        if quota != "-1":
            cores = min(cores, max(1, limit))
    return cores


def share_threads(workers: int) -> None:
    """Give each of ``workers`` processes its share of the cores (torchrun's own 1 leaves cores idle).

    A number the user has set is left alone: it is a worker's, as torchrun has it.
    """
    if not THREADS_ARE_THE_USERS:
        os.environ["OMP_NUM_THREADS"] = str(max(1, available_cores() // workers))


@contextmanager
def stdout_discarded() -> Iterator[None]:
    """Discard what C++ code writes to stdout: gloo reports every connection there, and no setting turns that off."""
    sys.stdout.flush()
    stdout = os.dup(1)
    try:
        with open(os.devnull, "w") as nowhere:  # noqa: PTH123
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


THREADS_ARE_THE_USERS = "OMP_NUM_THREADS" in os.environ
os.environ.setdefault("OMP_NUM_THREADS", str(available_cores()))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # "module name tiny@1a2b is not a valid identifier", a load
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin take the cores of the other workers
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # c10d warns of host names that do not resolve
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else a warning after every fork
os.environ.setdefault("NXD_LOG_LEVEL", "warning")  # else neuronx_distributed tells of every group and save
for library in ("torch", "transformers", "peft", "neuronx_distributed", "optimum", "torch_xla"):
    warnings.filterwarnings("ignore", module=library)
