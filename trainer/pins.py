"""Print the packages of constraints.txt by section, for pip --requirement. The image's build runs

    python3 trainer/pins.py '[trainer,neuron]'     the packages of genvalues and of these extras
    python3 trainer/pins.py sdk                    the packages of one section

Needs only Python, because it runs before anything is installed.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

CONSTRAINTS = Path(__file__).with_name("constraints.txt")
ALWAYS = "command"  # the section of an install without extras


def sections(file: Path = CONSTRAINTS) -> dict[str, dict[str, str]]:
    """Map each section to its packages and their versions. Raises ValueError for a line that is not an exact pin."""
    found: dict[str, dict[str, str]] = {}
    names: set[str] = set()
    section = None
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if heading := re.match(r"# \[([a-z]+)\]", line):
            section = found.setdefault(heading[1], {})
        elif line.strip() and not line.startswith("#"):
            pin = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.!+]+)", line)
            if pin is None or section is None or normalized(pin[1]) in names:
                raise ValueError(
                    f"{file.name}:{number}: {line}: write each package once, as NAME==VERSION, in a section"
                )
            names.add(normalized(pin[1]))
            section[pin[1]] = pin[2]
    return found


def normalized(name: str) -> str:
    """Normalize a package's name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def extras_of(text: str) -> list[str]:
    """Split '[trainer,neuron]' into names; '' gives none."""
    return [name.strip() for name in text.strip("[] ").split(",") if name.strip()]


def of_extras(text: str, file: Path = CONSTRAINTS) -> dict[str, str]:
    """The packages of genvalues and of the extras."""
    pinned = sections(file)
    return {name: version for section in (ALWAYS, *extras_of(text)) for name, version in pinned[section].items()}


def main(wanted: str) -> None:
    pinned = sections()
    pins = pinned[wanted] if wanted in pinned else of_extras(wanted)
    print("\n".join(f"{name}=={version}" for name, version in pins.items()))


if __name__ == "__main__":
    main(*sys.argv[1:])
