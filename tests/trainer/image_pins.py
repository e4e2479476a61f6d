"""Record, for every package in trainer/constraints.txt, the wheel for the image's Python and its requirements.

    python tests/trainer/image_pins.py

writes image_pins.json beside this file, with data from PyPI. Run it after a change of constraints.txt:
test_image_pins.py, which needs no network, fails if it is out of date. AWS's packages (section sdk) are not on PyPI and
not recorded.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RECORD = Path(__file__).with_name("image_pins.json")
PYTHON = "3.10"  # the Neuron container's
GLIBC = 35  # of Ubuntu 22.04, the Neuron container's
NOT_ON_PYPI = "sdk"


def main() -> None:
    sys.path.insert(0, str(ROOT / "trainer"))
    import pins

    pinned = pins.sections()
    wanted = [f"{name}=={version}" for key in pinned if key != NOT_ON_PYPI for name, version in pinned[key].items()]
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in range(5, GLIBC + 1)]
    platforms += ["manylinux1_x86_64", "manylinux2010_x86_64", "manylinux2014_x86_64"]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed", "--no-deps"]
        command += ["--report", str(report), "--target", folder, "--only-binary=:all:", "--python-version", PYTHON]
        command += [part for platform in platforms for part in ("--platform", platform)]
        subprocess.run([*command, *wanted], check=True)
        found = json.loads(report.read_text(encoding="utf-8"))["install"]
    record = {
        pins.normalized(item["metadata"]["name"]): {
            "version": item["metadata"]["version"],
            "wheel": item["download_info"]["url"].rpartition("/")[2].partition("#")[0],
            "python": item["metadata"].get("requires_python", ""),
            "requires": item["metadata"].get("requires_dist", []),
        }
        for item in found
    }
    drop_unused_extras(record)
    # One line per package, so that a change of one version is one line of a diff.
    lines = [f"  {json.dumps(name)}: {json.dumps(record[name], ensure_ascii=False)}" for name in sorted(record)]
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def drop_unused_extras(record: dict[str, dict[str, Any]]) -> None:
    """Drop requirements of extras that nothing here uses: test tools, other frameworks."""
    every = [(ROOT / "pyproject.toml").read_text(encoding="utf-8"), *(str(of["requires"]) for of in record.values())]
    named = {
        extra for listed in re.findall(r"\w\[([\w, -]+)\]", " ".join(every)) for extra in re.split(r",\s*", listed)
    }
    for of in record.values():
        extras = {line: re.findall(r"extra == \"([^\"]+)\"", line) for line in of["requires"]}
        of["requires"] = [line for line, names in extras.items() if not names or set(names) & named]


if __name__ == "__main__":
    main()
