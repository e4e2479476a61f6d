"""Record the requirements of every package in trainer/constraints-BACKEND.txt, and its wheels for the image's Pythons.

    python tests/trainer/image_pins.py [native] [xla]

writes image_pins_BACKEND.json beside this file, and the hashes into constraints-native.txt, with data from PyPI. Run it
after a change of these files (it takes minutes: pip downloads the wheels): test_image_pins.py, which needs no network,
fails if a record is out of date. AWS's packages (section sdk) are not on PyPI and not recorded.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
NOT_ON_PYPI = ("sdk",)


class Target(NamedTuple):
    """The Pythons of a base image, and the newest glibc 2.x that a wheel may need there."""

    pythons: tuple[str, ...]
    glibc: int


TARGETS = {
    "native": Target(("3.12", "3.13", "3.14"), 28),  # PyTorch's own wheels need as much
    "xla": Target(("3.10",), 35),  # the Neuron container's Ubuntu 22.04
}


def record_of(backend: str) -> Path:
    return Path(__file__).with_name(f"image_pins_{backend}.json")


def main(*backends: str) -> None:
    sys.path.insert(0, str(ROOT / "trainer"))
    import pins

    for backend in backends or TARGETS:
        file = pins.constraints(backend)
        # A range of the base image's versions is not a pin.
        recorded = {
            name: pin
            for section, found in pins.sections(file).items()
            for name, pin in found.items()
            if section not in NOT_ON_PYPI and pin.specifier.startswith("==")
        }
        record: dict[str, dict[str, Any]] = {}
        hashes: dict[str, set[str]] = {}
        for python in TARGETS[backend].pythons:
            for item in wheels([f"{pin.name}=={pin.version}" for pin in recorded.values()], python, backend):
                name = pins.normalized(item["metadata"]["name"])
                wheel = item["download_info"]["url"].rpartition("/")[2].partition("#")[0]
                hashes.setdefault(name, set()).add(item["download_info"]["archive_info"]["hashes"]["sha256"])
                of = record.setdefault(
                    name,
                    {
                        "version": item["metadata"]["version"],
                        "wheels": {},
                        "python": item["metadata"].get("requires_python", ""),
                        "requires": item["metadata"].get("requires_dist", []),
                    },
                )
                of["wheels"][python] = wheel
        drop_unused_extras(record)
        # One line per package, so that a change of one version is one line of a diff.
        lines = [f"  {json.dumps(name)}: {json.dumps(record[name], ensure_ascii=False)}" for name in sorted(record)]
        record_of(backend).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        if backend == "native":
            write_hashes(file, {pin.name: sorted(hashes[name]) for name, pin in recorded.items()})


def wheels(wanted: list[str], python: str, backend: str) -> list[dict[str, Any]]:
    """pip's report of the wheels that it would install."""
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in range(5, TARGETS[backend].glibc + 1)]
    platforms += ["manylinux1_x86_64", "manylinux2010_x86_64", "manylinux2014_x86_64"]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed", "--no-deps"]
        command += ["--report", str(report), "--target", folder, "--only-binary=:all:", "--python-version", python]
        command += [part for platform in platforms for part in ("--platform", platform)]
        subprocess.run([*command, *wanted], check=True)
        found: list[dict[str, Any]] = json.loads(report.read_text(encoding="utf-8"))["install"]
    return found


def write_hashes(file: Path, hashes: dict[str, list[str]]) -> None:
    """Replace the hashes below each pin."""
    text = re.sub(r" \\\n *--hash=\S+", "", file.read_text(encoding="utf-8"))
    for name, of in hashes.items():
        pattern = rf"^{re.escape(name)}==\S+$"
        text = re.sub(
            pattern,
            lambda pin, of=of: " \\\n    ".join([pin[0], *(f"--hash=sha256:{one}" for one in of)]),
            text,
            flags=re.MULTILINE,
        )
    file.write_text(text, encoding="utf-8")


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
    main(*sys.argv[1:])
