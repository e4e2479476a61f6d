"""Environment variables: those that libraries read at import, such as log levels and thread counts (import this before
torch), and those that an error of a library is about."""

from __future__ import annotations

import os
import re
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from genvalues.common.text import redacted

VERBOSITY = "LLAMA_LORA_VERBOSITY"  # how -v (1) and -q (-1) reach the workers


def verbosity() -> int:
    """The verbosity for genvalues.common.log, from the environment; 0 if it is not a number."""
    try:
        return int(os.environ.get(VERBOSITY, "0"))
    except ValueError:
        return 0


def variables_in(text: str, *prefixes: str) -> list[str]:
    """The environment variables with one of these prefixes whose values a library quotes in a message."""
    return sorted(
        name
        for name, value in os.environ.items()
        if name.startswith(prefixes) and len(value) > 1 and re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text)
    )


def proxy_variables() -> list[str]:
    """The environment variables that are set and name a proxy."""
    names = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")
    return [name for name in names if os.environ.get(name)]


def without_passwords(text: str) -> str:
    """The text without the users, passwords and tokens of URLs, and with other tokens redacted."""
    return redacted(re.sub(r"//[^/\s]*@", "//", text))


def available_cores(root: Path = Path("/")) -> int:
    """The number of whole cores this process may use, at least 1: a container's CPU limit, not the node's cores.

    ``root`` is for tests.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in cgroup_folders("cpu", root):
        with suppress(OSError, ValueError):  # no limit here: no file of this version, or "max"
            quota, period = map(int, (folder / "cpu.max").read_text(encoding="ascii").split())
            cores = min(cores, quota // period)
        with suppress(OSError, ValueError):
            quota = int((folder / "cpu.cfs_quota_us").read_text(encoding="ascii"))
            period = int((folder / "cpu.cfs_period_us").read_text(encoding="ascii"))
            cores = min(cores, quota // period) if quota > 0 else cores  # -1: no limit
    return max(1, cores)


def cgroup_folders(controller: str, root: Path = Path("/")) -> Iterator[Path]:
    """The folders of this process's cgroup (v2 or v1) and of those around it, whose limits hold for it too.

    A container without a cgroup namespace sees the node's path of its cgroup, but has only this cgroup, as the root.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = ["0::/", f"1:{controller}:/"]
    for line in lines:
        _, controllers, path = line.split(":", 2)  # man 7 cgroups; v2 has no controllers
        if controllers and controller not in controllers.split(","):
            continue
        for name in {controllers, controllers and controller}:  # v1: /sys/fs/cgroup/cpu,cpuacct or .../cpu; v2: neither
            mount = root / "sys/fs/cgroup" / name
            inner = mount / path.lstrip("/")
            yield from (folder for folder in (inner, *inner.parents) if folder.is_relative_to(mount))


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
    for folder in cgroup_folders("memory", root):
        for name in ("memory.max", "memory.limit_in_bytes"):
            with suppress(OSError, ValueError):  # another cgroup version, or "max" (no limit)
                found.append(int((folder / name).read_text(encoding="ascii")) - used)
    return min(found, default=None)


def share_threads(workers: int) -> None:
    """Divide the cores among the worker processes, unless the user has set OMP_NUM_THREADS.

    torchrun's own default of 1 thread per worker leaves cores idle.
    """
    if not THREADS_SET_BY_USER:
        os.environ["OMP_NUM_THREADS"] = str(max(1, available_cores() // workers))


def limit_spinning() -> None:
    """Let threads spin for a moment before they sleep, unless the user has decided.

    Threads that spin take the cores of other processes, and threads that sleep at once wake late for the next operator.
    libgomp's default is 300,000 spins. Measured: docs/benchmarks.md, "Threads that wait".
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


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
os.environ.setdefault("RAYON_NUM_THREADS", os.environ["OMP_NUM_THREADS"])  # of tokenizers: it counts the node's cores
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # of NumPy, which multiplies nothing here: no idle threads
# Without it: "module name tiny@1a2b is not a valid identifier" each time a model is loaded.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
limit_spinning()
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # c10d warns of host names that do not resolve
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # avoids a warning after every fork
os.environ.setdefault("NXD_LOG_LEVEL", "warning")  # neuronx_distributed logs every group and save otherwise
for library in ("torch", "transformers", "peft", "neuronx_distributed", "optimum", "torch_xla"):
    warnings.filterwarnings("ignore", module=library)
