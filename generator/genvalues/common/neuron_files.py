"""The versions of Neuron software on this machine, read from files: nothing is imported, and no device is opened."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path("/")
DRIVER = Path("sys/module/neuron/version")  # libnrt reads the same file; a container sees its node's
LIBRARIES = Path("opt/aws/neuron/lib")  # libnrt.so -> libnrt.so.1 -> libnrt.so.2.31.24.0
LIBRARY = re.compile(r"libnrt\.so\.(\d+\.\d+\.\d+(?:\.\d+)?)")
PACKAGES = Path("var/lib/dpkg/status")
PACKAGE = "aws-neuronx-runtime-lib"
MOST_LINKS = 4


def driver_version(root: Path = ROOT) -> str:
    """The version of the loaded Neuron driver, such as 2.28.0.0; empty if none is loaded."""
    try:
        return (root / DRIVER).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def runtime_version(root: Path = ROOT) -> str:
    """The version of the installed Neuron runtime, such as 2.28.19.0; empty if none is found.

    It is in the name of the file that libnrt.so.1 points to, or else in dpkg's list of packages.
    """
    return version_of_library(root / LIBRARIES) or version_of_package(root / PACKAGES)


def version_of_library(folder: Path) -> str:
    name = "libnrt.so.1"
    for _ in range(MOST_LINKS):
        if found := LIBRARY.fullmatch(name):
            return found[1] if (folder / name).exists() else ""
        try:
            name = (folder / name).readlink().name
        except OSError:
            return ""
    return ""


def version_of_package(status: Path) -> str:
    """The version of the runtime's package in dpkg's status file, without the revision."""
    try:
        text = status.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    for entry in text.split("\n\n"):
        fields = dict(re.findall(r"^([A-Za-z-]+): (.*)$", entry, re.MULTILINE))
        if fields.get("Package") == PACKAGE and fields.get("Status", "").endswith(" installed"):
            return fields.get("Version", "").partition("-")[0]
    return ""
