"""Output of ``genvalues local``: the stages' lines, a progress bar on a terminal, a table, and what to look at next."""

from __future__ import annotations

import logging
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from genvalues.common import files, manifests
from genvalues.common.progress_bar import ProgressBar, relayed
from genvalues.common.text import duration

log = logging.getLogger(__name__)

TAIL = 20  # last lines of a failed stage's log, shown again at the end


@dataclass
class Outcome:
    """How a stage ended, and after how many seconds."""

    stage: str
    result: str = "not run"
    seconds: float = 0.0


class StageOutput:
    """The output of one stage: lines to stdout and to its log file, progress to the bar."""

    def __init__(self, file: IO[str], path: Path, bar: ProgressBar) -> None:
        self.path = path
        self.tail: deque[str] = deque(maxlen=TAIL)
        self._file = file
        self._bar = bar

    def write(self, line: str, prefix: str = "") -> None:
        if update := relayed(line):
            self._bar.show(update)
            if update.log:
                self._log(f"{prefix}{update}")
            return
        text = f"{prefix}{line}"
        self._log(text)
        if not manifests.LINE.match(line):  # JSON for programs, which find it in the workspace too
            self.tail.append(text)
            print(text, flush=True)

    def _log(self, text: str) -> None:
        self._file.write(f"{text}\n")
        self._file.flush()


class Screen:
    """stdout, which may be a terminal."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, markup=False, soft_wrap=True)

    @staticmethod
    def is_terminal() -> bool:
        return sys.stdout is not None and sys.stdout.isatty()

    def show_skipped(self, stages: Sequence[str]) -> None:
        if stages:
            self._console.print(f"Skipped (need a cluster): {', '.join(stages)}")

    @contextmanager
    def stage(self, name: str, log_file: Path) -> Iterator[StageOutput]:
        """Show the header of a stage, and take its output until the block ends."""
        if self.is_terminal():
            self._console.rule(Text(name, style="bold"), align="left")
        else:
            self._console.print(f"--- {name}")
        log_file.parent.mkdir(parents=True, exist_ok=True)
        bar = ProgressBar(on_stderr=False)
        with files.open_to_append(log_file, empty=True) as file:
            try:
                yield StageOutput(file, log_file, bar)
            finally:
                bar.close()

    def show_table(self, outcomes: Sequence[Outcome]) -> None:
        table = Table(box=box.SIMPLE_HEAD if self.is_terminal() else None, pad_edge=False)
        table.add_column("stage")
        table.add_column("result")
        table.add_column("time", justify="right")
        for outcome in outcomes:
            seconds = "" if outcome.result == "not run" else duration(outcome.seconds)
            table.add_row(outcome.stage, outcome.result, seconds)
        self._console.print(table)

    def show_failure(self, outcome: Outcome, output: StageOutput) -> None:
        """Show on stderr which stage failed, where its log is, and its last lines."""
        print(f"{outcome.stage}: {outcome.result}. Log: {output.path}", file=sys.stderr)
        for line in output.tail:
            print(f"  {line}", file=sys.stderr)

    def show_next_steps(self, run: Path) -> None:
        for line in next_steps(run):
            log.info("%s", line)


def next_steps(run: Path) -> list[str]:
    """What to look at after a run, given its folder: the report, the model, and a command that tries the model."""
    report, merged, adapter = run / "report.html", run / "merged", run / "adapter"
    lines = []
    if report.exists():
        lines.append(f"  report  {report}")
    if merged.exists():
        beside = f" (adapter for PEFT: {adapter})" if adapter.exists() else ""
        ask = f"pipeline('text-generation', '{merged}')('Once upon a time')"
        lines.append(f"  model   {merged}{beside}")
        lines.append(f'  try it  {python()} -c "from transformers import pipeline; print({ask})"')
    return ["Next:", *lines] if lines else []


def python() -> str:
    """This Python, as short as it can be written in the current folder."""
    executable = Path(sys.executable)
    return str(executable.relative_to(Path.cwd()) if executable.is_relative_to(Path.cwd()) else executable)
