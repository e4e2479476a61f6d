"""The sections of constraints.txt. In the image's build:

python3 trainer/pins.py '[trainer,neuron]'     the packages of genvalues and of these extras, for pip --requirement
python3 trainer/pins.py sdk                    the packages of one section

With nothing but Python: it runs before anything is installed.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

CONSTRAINTS = Path(__file__).with_name("constraints.txt")
ALWAYS = "command"  # the section of what a plain install brings


def sections(file: Path = CONSTRAINTS) -> dict[str, dict[str, str]]:
    """Of each section its packages and their versions. Raises ValueError at a line that is no exact pin."""
    found: dict[str, dict[str, str]] = {}
    names: set[str] = set()
    section = None
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if heading := re.match(r"# \[([a-z]+)\]", line):
            section = found.setdefault(heading[1], {})
        elif line.strip() and not line.startswith("#"):
            pin = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.!+]+)", line)
            if pin is None or section is None or normal(pin[1]) in names:
                raise ValueError(f"{file.name}:{number}: {line}: write each package once, NAME==VERSION, in a section")
            names.add(normal(pin[1]))
            section[pin[1]] = pin[2]
    return found


def normal(name: str) -> str:
    """A package's name as the index has it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def extras_of(text: str) -> list[str]:
    """'[trainer,neuron]' or '' -> their names."""
    return [name.strip() for name in text.strip("[] ").split(",") if name.strip()]


def of_extras(text: str, file: Path = CONSTRAINTS) -> dict[str, str]:
    """The packages that pip adds for genvalues and these extras."""
    there = sections(file)
    return {name: version for section in (ALWAYS, *extras_of(text)) for name, version in there[section].items()}


def main(wanted: str) -> None:
    there = sections()
    pins = there[wanted] if wanted in there else of_extras(wanted)
    print("\n".join(f"{name}=={version}" for name, version in pins.items()))


if __name__ == "__main__":
    main(*sys.argv[1:])
