"""Where inputs come from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Sources:
    """FILE and the overlays after it, then --set and --set-string; the chart that the values are checked against."""

    files: tuple[Path, ...]
    sets: tuple[str, ...] = ()
    chart: Path | None = None
    set_strings: tuple[str, ...] = ()

    @property
    def file(self) -> Path:
        """FILE, by which the others are called."""
        return self.files[0]

    @property
    def are_right(self) -> str:
        """What a command says that has found no mistake in them."""
        *others, last = map(str, self.files)
        return f"{', '.join(others)} and {last} are right" if others else f"{last} is right"
