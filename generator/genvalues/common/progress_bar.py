"""Progress as one bar on a terminal, as lines in a log, or passed on to a parent process that draws the bar.

Only one process may draw on a terminal. ``genvalues local`` captures the output of the stages it starts, so it draws
their bars: it sets RELAY in their environment, and they write each update as one marked line, which it takes out again.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from genvalues.common.text import duration

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

RELAY = "LLAMA_LORA_RELAY_PROGRESS"  # environment variable, set by a parent process that draws the bar
MARK = "\x1fprogress "  # begins a relayed line; text does not start with the ASCII unit separator
STDERR = 2


@dataclass(frozen=True)
class ProgressUpdate:
    """``done`` of ``total`` units, such as rows or steps; ``total`` is None where it is unknown.

    ``log`` says that a line in the log is due. ``finished`` removes the bar.
    """

    unit: str
    done: int
    total: int | None = None
    seconds_left: float | None = None
    detail: str = ""
    log: bool = False
    finished: bool = False

    def __str__(self) -> str:
        """``step 12/90  loss 2.3456  ETA 3 min 05 s``."""
        count = f"{self.unit} {self.done:,}" if self.total is None else f"{self.unit} {self.done}/{self.total}"
        eta = "" if self.seconds_left is None else f"ETA {duration(self.seconds_left)}"
        return "  ".join(part for part in (count, self.detail, eta) if part)


def is_relayed() -> bool:
    """Whether a parent process draws the bar."""
    return bool(os.environ.get(RELAY))


def relay(update: ProgressUpdate) -> None:
    """Write an update for the parent process, in one write, so that lines of other processes do not split it."""
    os.write(STDERR, f"{MARK}{json.dumps(asdict(update))}\n".encode())


def relayed(line: str) -> ProgressUpdate | None:
    """The update in a line of a child process's output; None for any other line."""
    if not line.startswith(MARK):
        return None
    try:
        return ProgressUpdate(**json.loads(line.removeprefix(MARK)))
    except (ValueError, TypeError):  # cut short
        return None


class ProgressBar:
    """A bar at the bottom of a terminal, shown between the first update and the one that is finished.

    It is drawn on stdout, or on stderr. While it is shown, what this process prints to either appears above it.
    """

    def __init__(self, *, on_stderr: bool) -> None:
        self._on_stderr = on_stderr
        self._shown: tuple[RichProgress, TaskID] | None = None

    def show(self, update: ProgressUpdate) -> None:
        if update.finished:
            self.close()
            return
        progress, task = self._shown or self._start(update)
        eta = "" if update.seconds_left is None else f"ETA {duration(update.seconds_left)}"
        count = f"{update.done:,}" if update.total is None else f"{update.done}/{update.total}"
        progress.update(
            task,
            description=update.unit,
            completed=update.done,
            total=update.total,
            count=count,
            eta=eta,
            detail=update.detail,
        )

    def close(self) -> None:
        if self._shown:
            self._shown[0].stop()
            self._shown = None

    def _start(self, update: ProgressUpdate) -> tuple[RichProgress, TaskID]:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.table import Column

        console = Console(stderr=self._on_stderr)
        rest_of_line = Column(ratio=1, no_wrap=True, overflow="ellipsis")
        progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[eta]}"),
            TextColumn("{task.fields[detail]}", markup=False, table_column=rest_of_line),
            console=console,
            transient=True,
            expand=True,
            refresh_per_second=4,
            redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),
        )
        progress.start()
        console.show_cursor()  # a killed process could not show it again
        task = progress.add_task(update.unit, total=update.total, count="", eta="", detail="")
        self._shown = (progress, task)
        return self._shown
