"""Whether this node can run the image on Trainium: its driver, devices and limits.

The first act of a stage with workers on device neuron, before a Neuron library is imported: without it a mismatch shows
only after minutes, as a message of the Neuron runtime in every worker.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import resource
from collections.abc import Iterator
from pathlib import Path

from genvalues.accelerators.neuron_software import ITS_RUNTIME, dotted, mismatch
from genvalues.common.errors import UserError, UserErrors
from genvalues.common.neuron_files import DRIVER, ROOT, driver_version, runtime_version
from llama_lora.config import RunConfig

log = logging.getLogger(__name__)

NODE = "this node"
OTHER_PAIR = (
    f"Use such nodes, or build the image with a newer runtime: genvalues image push --neuron-runtime "
    f"{dotted(ITS_RUNTIME)}.10.0 (docs/neuron-xla.md#drivers)."
)
EFA = "efa"  # the value of FI_PROVIDER, which the chart sets for several nodes
# EFA registers memory. The kernel counts it against RLIMIT_MEMLOCK (ib_umem_get) unless the process has CAP_IPC_LOCK.
# Linux's own default was 64 KiB until 5.15, less than one queue of libfabric; since 5.16 it is 8 MiB.
LEAST_MEMLOCK, ENOUGH_MEMLOCK = 1 << 20, 1 << 30  # bytes: below the first an error, below the second a warning
RAISE_MEMLOCK = "Set LimitMEMLOCK=infinity in a systemd drop-in of containerd on the nodes."
CAP_IPC_LOCK = 14  # linux/capability.h


def check(config: RunConfig, root: Path = ROOT) -> None:
    """Raise UserErrors if this node cannot run the image on device neuron; other devices are not checked.

    ``root``: the folder that /dev, /sys and /opt are in.
    """
    if config.device != "neuron":
        return
    if mistakes := [*driver_mistakes(root), *device_mistakes(root), *network_mistakes(root)]:
        raise UserErrors(mistakes)


def driver_mistakes(root: Path) -> Iterator[UserError]:
    driver, runtime = driver_version(root), runtime_version(root)
    log.info(f"Neuron driver {driver or 'unknown'}, Neuron runtime {runtime or 'unknown'}")
    if not driver and not devices(root / "dev"):
        what = f"no Neuron driver is loaded (/{DRIVER} not found)"
        yield UserError(what, where=NODE, fix="Use nodes of a Trainium type with an AMI for Neuron.")
    elif found := mismatch(driver, runtime):
        what, works = found
        fix = f"{works[0].upper()}{works[1:]}. {OTHER_PAIR}"
        yield UserError(f"Neuron driver {driver} {what}", where=NODE, fix=fix)


def device_mistakes(root: Path) -> Iterator[UserError]:
    """The devices that the device plugin gave to this container: each must be readable and writable."""
    found = devices(root / "dev")
    if not found and driver_version(root):
        what = "the container has no /dev/neuron*"
        yield UserError(what, where=NODE, fix="Request aws.amazon.com/neuron in devices; the device plugin must run.")
    refused = {device.name: reason for device in found if (reason := cannot_open(device))}
    if refused:
        name, reason = next(iter(refused.items()))
        more = f" and {len(refused) - 1} more" if len(refused) > 1 else ""
        fix = "Restart the Neuron device plugin on the node; with securityContext.runAsUser, the devices need mode 666."
        yield UserError(f"cannot open /dev/{name}{more}: {reason}", where=NODE, fix=fix)


def network_mistakes(root: Path) -> Iterator[UserError]:
    """What EFA needs. Only of several nodes: on one no traffic leaves the node."""
    if os.environ.get("FI_PROVIDER") != EFA:
        return
    adapters = sorted((root / "dev/infiniband").glob("uverbs*"))
    if not adapters:
        fix = "Request vpc.amazonaws.com/efa in devices; the nodes need EFA interfaces and the EFA device plugin."
        yield UserError("the container has no EFA device (/dev/infiniband/uverbs*)", where=NODE, fix=fix)
    for adapter in adapters:
        if reason := cannot_open(adapter):
            fix = "Restart the EFA device plugin on the node."
            yield UserError(f"cannot open /dev/infiniband/{adapter.name}: {reason}", where=NODE, fix=fix)
            break
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit == resource.RLIM_INFINITY or limit >= ENOUGH_MEMLOCK or may_lock_memory(root):
        return
    what = f"locked memory (RLIMIT_MEMLOCK) is limited to {limit >> 10} KiB"
    if limit >= LEAST_MEMLOCK:
        log.warning(f"{what}. If EFA reports that it cannot allocate memory, raise it: {RAISE_MEMLOCK}")
        return
    yield UserError(f"{what}, and EFA needs more", where=NODE, fix=RAISE_MEMLOCK)


def devices(folder: Path) -> list[Path]:
    return sorted(device for device in folder.glob("neuron*") if re.fullmatch(r"neuron\d+", device.name))


def cannot_open(device: Path) -> str:
    """Why the device cannot be opened; empty if it can. A device that is in use can be opened, too."""
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return "" if error.errno == errno.EBUSY else error.strerror or str(error)
    return ""


def may_lock_memory(root: Path) -> bool:
    """Whether this process has CAP_IPC_LOCK, with which no limit holds."""
    try:
        effective = re.search(r"^CapEff:\s*([0-9a-f]+)$", (root / "proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return False
    return bool(effective and int(effective[1], 16) >> CAP_IPC_LOCK & 1)
