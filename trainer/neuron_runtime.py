"""Install another Neuron runtime into the image: python3 trainer/neuron_runtime.py 2.33.10.0

For nodes whose driver refuses the runtime of the base image (docs/neuron-xla.md#drivers). The packages come from AWS's
apt repository (https://awsdocs-neuron.readthedocs-hosted.com/en/latest/setup/pytorch/index.html) and from no other.
Without a version nothing is done. Prints what failed and exits with status 1.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable
from pathlib import Path

REPOSITORY = "https://apt.repos.neuron.amazonaws.com"
KEY = f"{REPOSITORY}/GPG-PUB-KEY-AMAZON-AWS-NEURON.PUB"
VERSION = re.compile(r"(2\.\d+)\.\d+(\.\d+)?")
OS_RELEASE = Path("etc/os-release")
LIBRARY = Path("opt/aws/neuron/lib/libnrt.so.1")  # a link to libnrt.so.VERSION, which libneuronxla loads

Run = Callable[[list[str]], object]


def install(version: str, run: Run, root: Path = Path("/")) -> str:
    """Install the runtime and the collectives of the same minor version. Returns what is wrong, or an empty string."""
    wanted = VERSION.fullmatch(version)
    if not wanted:
        return f"NEURON_RUNTIME is {version}; write a version of aws-neuronx-runtime-lib, such as 2.33.10.0"
    codename = re.search(r"^VERSION_CODENAME=(\w+)$", (root / OS_RELEASE).read_text(encoding="utf-8"), re.MULTILINE)
    if not codename:
        return f"/{OS_RELEASE} names no VERSION_CODENAME; AWS's repository has packages for Ubuntu"
    with tempfile.TemporaryDirectory() as folder:
        key, sources = Path(folder) / "neuron.asc", Path(folder) / "neuron.list"
        key.write_bytes(urllib.request.urlopen(KEY).read())
        sources.write_text(f"deb [signed-by={key}] {REPOSITORY} {codename[1]} main\n", encoding="utf-8")
        key.chmod(0o644)
        Path(folder).chmod(0o755)  # apt reads the key as its own user
        # The base image may list the same repository without signed-by, which apt refuses beside this one.
        apt = ["apt-get", "-o", f"Dir::Etc::sourcelist={sources}", "-o", "Dir::Etc::sourceparts=-"]
        packages = [f"aws-neuronx-runtime-lib={version}*", f"aws-neuronx-collectives={wanted[1]}.*"]
        run([*apt, "update"])
        run([*apt, "install", "-y", "--no-install-recommends", "--allow-downgrades", *packages])
    found = (root / LIBRARY).resolve().name.removeprefix("libnrt.so.")
    return "" if found == version else f"/{LIBRARY} is version {found}, not {version}"


def main(version: str = "") -> int:
    if not version:
        return 0
    try:
        problem = install(version, lambda command: subprocess.run(command, check=True))
    except (OSError, subprocess.CalledProcessError) as error:
        problem = str(error)
    if problem:
        print(f"The Neuron runtime {version} is not installed: {problem}.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
