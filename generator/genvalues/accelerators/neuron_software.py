"""Releases of AWS's Neuron software: which driver of a node works with which runtime of an image.

The driver (aws-neuronx-dkms) belongs to the node, the runtime (aws-neuronx-runtime-lib, libnrt.so) to the image. If
they do not work together, ``nrt_init`` fails in every worker.

Sources: "Component Release Notes for Neuron Runtime" of Neuron 2.26 to 2.33
(https://awsdocs-neuron.readthedocs-hosted.com/en/latest/release-notes/components/runtime.html) and the CHANGELOG of
https://github.com/awslabs/amazon-eks-ami up to v20260714.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

Version = tuple[int, int]  # major and minor: 2.28.19.0 is (2, 28)


@dataclass(frozen=True)
class NeuronRelease:
    """A release of the Neuron SDK and the versions that it contains."""

    sdk: str
    date: str
    driver: str
    runtime: str


RELEASES = (
    NeuronRelease("2.26", "2025-09-18", "2.24.7.0", "2.28.19.0"),
    NeuronRelease("2.27", "2025-12-19", "2.25.4.0", "2.29.40.0"),
    NeuronRelease("2.28", "2026-02-26", "2.26.5.0", "2.30.50.0"),
    NeuronRelease("2.29", "2026-04-09", "2.27.4.0", "2.31.24.0"),
    NeuronRelease("2.30", "2026-05-21", "2.28.0.0", "2.32.31.0"),
    NeuronRelease("2.31", "2026-07-07", "2.29.0.0", "2.33.10.0"),
    NeuronRelease("2.32", "2026-08-17", "2.30.2.0", "2.34.10.0"),
    NeuronRelease("2.33", "2026-10-19", "2.31.7.0", "2.35.30.0"),
)

# Known issue of the driver in Neuron 2.31: "Neuron Driver 2.29 requires Neuron Runtime Library 2.33 or later".
STRICT_DRIVER: Version = (2, 29)
ITS_RUNTIME: Version = (2, 33)
# Known issue of the runtime in Neuron 2.30: "Neuron Runtime Library 2.32 is not backward-compatible with Neuron Driver
# 2.26 or earlier". Whether a later runtime is, AWS does not say.
STRICT_RUNTIME: Version = (2, 32)
ITS_DRIVER: Version = (2, 27)

# EKS's AMIs for Neuron (AL2023): the first with each driver, and the release of Amazon Linux 2023 that it is built
# from, which the node reports as osImage. If AMIs with two drivers share a release, the first that only the newer has.
EKS_AMIS = (
    ("20250920", "20250915", "2.24"),
    ("20260107", "20260105", "2.25"),
    ("20260304", "20260302", "2.26"),
    ("20260409", "20260406", "2.27"),
    ("20260610", "20260608", "2.28"),
    ("20260714", "20260710", "2.29"),
)
LAST_LENIENT_AMI = "v20260625"  # the last one with a driver that accepts any older runtime


def version_of(text: str) -> Version | None:
    """Major and minor of a version such as 2.31.24.0-0b044f4ce; None if it is none."""
    found = re.match(r"(\d+)\.(\d+)(?![\d])", text.strip())
    return (int(found[1]), int(found[2])) if found else None


def release_of_sdk(sdk: str) -> NeuronRelease | None:
    """The release of an SDK version such as 2.26.1."""
    wanted = version_of(sdk)
    return next((release for release in RELEASES if version_of(release.sdk) == wanted), None)


def latest(drivers: Iterable[tuple[str, str]]) -> str:
    """The driver of the latest date; empty if there is none. ``drivers``: each with its date."""
    return max(drivers, default=("", ""))[1]


def driver_of_node(os_image: str) -> str:
    """The driver of an EKS node for Neuron, by what it reports as osImage; empty if unknown.

    ``os_image``: such as "Amazon Linux 2023.12.20260710". HyperPod and custom AMIs can have another driver.
    """
    found = re.fullmatch(r"Amazon Linux 2023\.\d+\.(\d{8})(\.\d+)?", os_image.strip())
    return latest((date, driver) for _, date, driver in EKS_AMIS if found and date <= found[1])


def driver_of_ami(name: str) -> str:
    """The driver of an EKS AMI for Neuron, by its name; empty for other AMIs, and for older ones.

    ``name``: such as amazon-eks-node-al2023-x86_64-neuron-1.34-v20260714.
    """
    found = re.fullmatch(r"amazon-eks-node-al2023-x86_64-neuron-\d+\.\d+-v(\d{8})", name)
    return latest((date, driver) for date, _, driver in EKS_AMIS if found and date <= found[1])


def mismatch(driver: str, runtime: str) -> tuple[str, str] | None:
    """What is wrong with a pair of driver and runtime, and which pair works; None if nothing is known to be wrong."""
    of_driver, of_runtime = version_of(driver), version_of(runtime)
    if of_driver is None or of_runtime is None:
        return None
    if of_driver >= STRICT_DRIVER and of_runtime < ITS_RUNTIME:
        what = f"needs Neuron runtime {dotted(ITS_RUNTIME)} or newer, and the image has {runtime}"
        works = f"runtime {runtime} works with driver {dotted(before(STRICT_DRIVER))} and older"
        return what, f"{works} (EKS AMI {LAST_LENIENT_AMI} and older)"
    if of_runtime == STRICT_RUNTIME and of_driver < ITS_DRIVER:
        what = f"is too old for the image's Neuron runtime {runtime}, which needs {dotted(ITS_DRIVER)} or newer"
        return what, f"runtime {runtime} works with drivers {dotted(ITS_DRIVER)} and {dotted(before(STRICT_DRIVER))}"
    return None


def dotted(version: Version) -> str:
    return ".".join(map(str, version))


def before(version: Version) -> Version:
    return version[0], version[1] - 1
