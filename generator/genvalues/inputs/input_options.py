"""The options that name the inputs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Sources:
    """FILE, its overlays, --set and --set-string, and the chart whose schema the values must fit."""

    files: tuple[Path, ...]
    sets: tuple[str, ...] = ()
    chart: Path | None = None
    set_strings: tuple[str, ...] = ()

    @property
    def file(self) -> Path:
        """FILE, which names the inputs in messages."""
        return self.files[0]
