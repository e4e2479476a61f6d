"""Print the packages of a constraints file by section, for pip --requirement. The image's build runs

    python3 trainer/pins.py native '[trainer]'        the packages of genvalues and of these extras, with their hashes
    python3 trainer/pins.py xla '[trainer-xla,xla]'
    python3 trainer/pins.py xla sdk                   the packages of one section

Needs only Python, because it runs before anything is installed.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import NamedTuple

# The extras of llama-lora in the image of each backend.
EXTRAS = {"native": "[trainer]", "xla": "[trainer-xla,xla]"}
ALWAYS = ("build", "command")  # the sections of an install without extras
BASE = "base"  # what the base image must have; never installed
PIN = re.compile(r"([A-Za-z0-9._-]+)(==[A-Za-z0-9.!+]+)((?: +--hash=sha256:[0-9a-f]{64})*)")
RANGE = re.compile(r"([A-Za-z0-9._-]+)([<>=]=?[A-Za-z0-9.]+(?:,[<>]=?[A-Za-z0-9.]+)*)()")


class Pin(NamedTuple):
    """A package of a constraints file. ``specifier`` is ==VERSION; in the section base it may be a range."""

    name: str
    specifier: str
    hashes: tuple[str, ...] = ()

    @property
    def version(self) -> str:
        return self.specifier.removeprefix("==")

    @property
    def line(self) -> str:
        return " ".join([f"{self.name}{self.specifier}", *self.hashes])


def constraints(backend: str) -> Path:
    return Path(__file__).with_name(f"constraints-{backend}.txt")


def sections(file: Path) -> dict[str, dict[str, Pin]]:
    """Map each section to its packages by normalized name. Raises ValueError for a line that is not an exact pin."""
    found: dict[str, dict[str, Pin]] = {}
    section = ""
    # A package's hashes follow it on continued lines.
    for line in file.read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
        if heading := re.match(r"# \[([a-z-]+)\]", line):
            section = heading[1]
            found[section] = {}
        elif line.strip() and not line.startswith("#"):
            pin = PIN.fullmatch(line.rstrip()) or (RANGE.fullmatch(line) if section == BASE else None)
            name = normalized(pin[1]) if pin else ""
            if pin is None or not section or any(name in pins for pins in found.values()):
                raise ValueError(f"{file.name}: {line}: write each package once, as NAME==VERSION, in a section")
            found[section][name] = Pin(pin[1], pin[2], tuple(pin[3].split()))
    return found


def normalized(name: str) -> str:
    """Normalize a package's name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def extras_of(text: str) -> list[str]:
    """Split '[trainer-xla,xla]' into names; '' gives none."""
    return [name.strip() for name in text.strip("[] ").split(",") if name.strip()]


def main(backend: str, wanted: str) -> None:
    pinned = sections(constraints(backend))
    always = [name for name in ALWAYS if name in pinned]
    names = [wanted] if wanted in pinned else [*always, *extras_of(wanted)]
    print("\n".join(pin.line for name in names for pin in pinned[name].values()))


if __name__ == "__main__":
    main(*sys.argv[1:])
