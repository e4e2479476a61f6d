"""Check the base image of target native, before anything is installed: python3 trainer/base_image.py '[trainer]'

Writes what is installed there to base.json, which the smoke test reads: the installation must change neither torch nor
any other package that constraints-native.txt does not list, and must break no requirement of the base image's packages.
Prints all problems and exits with status 1.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement

import pins

RECORD = Path(__file__).parents[1] / "base.json"
# TorchNeuron's Pythons: https://awsdocs-neuron.readthedocs-hosted.com/en/latest/release-notes/components/torchneuron.html
PYTHONS = ((3, 12), (3, 14))


def problems(extras: list[str]) -> Iterator[str]:
    """Yield what the base image lacks for these extras, one line each."""
    oldest, newest = PYTHONS
    if not oldest <= sys.version_info[:2] <= newest:
        yield f"python3 is {sys.version.split()[0]}; the image needs 3.{oldest[1]} to 3.{newest[1]}"
    if not extras:
        return
    installed = packages()
    for name, pin in pins.sections(pins.constraints("native"))[pins.BASE].items():
        version = installed.get(name)
        if version is None:
            yield f"{name} is not installed; the image needs {pin.line}"
        elif not Requirement(pin.line).specifier.contains(version, prereleases=True):
            yield f"{name} is {version}; the image needs {pin.line}"
    yield from xla_libraries()


def xla_libraries() -> Iterator[str]:
    # With torch_xla, accelerate trains on XLA devices: it looks for them first
    # (https://github.com/huggingface/accelerate/blob/main/src/accelerate/state.py).
    if importlib.util.find_spec("torch_xla"):
        yield "torch_xla is installed; backend native needs an image without PyTorch/XLA"


def packages() -> dict[str, str]:
    """Map the packages that Python imports to their versions: of several with one name, the first on its path."""
    found: dict[str, str] = {}
    for of in importlib.metadata.distributions():
        if name := of.metadata["Name"]:
            found.setdefault(pins.normalized(name), of.version)
    return found


def unmet_requirements() -> set[str]:
    """The requirements that `pip check` reports, without the versions that are installed instead."""
    command = [sys.executable, "-m", "pip", "check"]
    output = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return {line.partition(", but you have ")[0] for line in output.splitlines() if " require" in line}


def record() -> str:
    return json.dumps({"packages": packages(), "unmet": sorted(unmet_requirements())}, indent=1)


def changes(before: str) -> Iterator[str]:
    """Yield what the installation changed in the base image that ``record`` described."""
    base = json.loads(before)
    pinned = {name for section in pins.sections(pins.constraints("native")).values() for name in section}
    installed = packages()
    for name, version in base["packages"].items():
        if (name not in pinned or name == "torch") and installed.get(name) != version:
            yield f"{name} was {version} in the base image and is {installed.get(name, 'not installed')}"
    for unmet in sorted(unmet_requirements() - set(base["unmet"])):
        yield f"{unmet}: met in the base image, and not by constraints-native.txt"


def main(extras: str) -> int:
    if found := list(problems(pins.extras_of(extras))):
        print(f"The base image does not fit ({len(found)} problems):", *found, sep="\n  ", file=sys.stderr)
        print("docs/image.md says where to find one.", file=sys.stderr)
        return 1
    RECORD.write_text(record(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
