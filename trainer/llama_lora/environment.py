"""Environment variables that libraries read at import: log levels and thread counts. Import this before torch."""

from __future__ import annotations

import os
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

VERBOSITY = "LLAMA_LORA_VERBOSITY"  # how -v (1) and -q (-1) reach the workers


def verbosity() -> int:
    """The verbosity for genvalues.common.log, from the environment; 0 if it is no number."""
    try:
        return int(os.environ.get(VERBOSITY, "0"))
    except ValueError:
        return 0


def available_cores() -> int:
    """The number of cores this process may use: a container's CPU limit (cgroup v2 or v1), not the node's cores."""
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
        except (OSError, ValueError):  # another cgroup version, or "max" (no limit)
            continue
        if quota != "-1":
            cores = min(cores, max(1, limit))
    return cores


def is_first_node() -> bool:
    """Whether this machine is the first of those that run the stage together, by torchrun's PET_* variables.

    It is the node of rank 0, or the host of the rendezvous: with c10d torchrun ranks the nodes by their names, and the
    training operator's rendezvous is at the pod whose name sorts first. A stage without these variables runs alone.
    """
    if rank := os.environ.get("PET_NODE_RANK"):
        return rank == "0"
    endpoint = os.environ.get("PET_RDZV_ENDPOINT", "localhost")
    host = endpoint[1:].partition("]")[0] if endpoint.startswith("[") else endpoint.partition(":")[0]
    return host == "localhost" or is_own_name(host) or is_own_address(host)


def is_own_name(host: str) -> bool:
    """Whether a host name is this machine's, with or without its domain. Asks no name server."""
    return host.partition(".")[0].lower() == socket.gethostname().partition(".")[0].lower()


def is_own_address(host: str) -> bool:
    """Whether an IP address is one of this machine's."""
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, host)
            with socket.socket(family, socket.SOCK_DGRAM) as own:
                own.bind((host, 0))  # fails for the address of another machine
        except OSError:
            continue
        return True
    return False


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process may still take: of the container's limit (cgroup v2 or v1) and of the machine.

    None where neither is known. Page cache counts as available: the kernel frees it. ``root`` is for tests.
    """
    found = []
    try:
        used = int((root / "proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
        for line in (root / "proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    except (OSError, ValueError, IndexError):  # not Linux
        return None
    for file in ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # another cgroup version, or "max" (no limit)
            found.append(int((root / file).read_text(encoding="ascii")) - used)
    return min(found, default=None)


def share_threads(workers: int) -> None:
    """Divide the cores among the worker processes, unless the user has set OMP_NUM_THREADS.

    torchrun's own default of 1 thread per worker leaves cores idle.
    """
    if not THREADS_SET_BY_USER:
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


THREADS_SET_BY_USER = "OMP_NUM_THREADS" in os.environ
os.environ.setdefault("OMP_NUM_THREADS", str(available_cores()))
# Without it: "module name tiny@1a2b is not a valid identifier" each time a model is loaded.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads take the cores of other workers
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # c10d warns of host names that do not resolve
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # avoids a warning after every fork
os.environ.setdefault("NXD_LOG_LEVEL", "warning")  # neuronx_distributed logs every group and save otherwise
for library in ("torch", "transformers", "peft", "neuronx_distributed", "optimum", "torch_xla"):
    warnings.filterwarnings("ignore", module=library)
