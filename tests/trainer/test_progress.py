"""The progress of a stage: a bar on a terminal, lines in a log, updates for a parent process that draws the bar."""

from __future__ import annotations

import logging
import os
import pty
import re
import subprocess
import sys
import time

import pytest

from genvalues.common.progress_bar import RELAY, ProgressUpdate, relayed
from llama_lora import progress

SCRIPT = """
import time
from genvalues.common import log
from llama_lora.progress import StageProgress
log.configure()
with StageProgress("step", 4) as shown:
    for step in range(1, 5):
        time.sleep(0.3)
        shown.update(step, f"loss {9 - step}.5", log_now=step == 4)
print("after")
"""


def run(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, env=os.environ | environment
    )


def on_a_terminal() -> str:
    """What the script writes when stdout and stderr are a terminal."""
    leader, follower = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=follower, stderr=follower) as process:
        os.close(follower)
        written = b""
        while True:
            try:
                piece = os.read(leader, 65536)
            except OSError:  # EIO: the process has closed it
                break
            if not piece:
                break
            written += piece
        os.close(leader)
    assert process.returncode == 0, written
    return written.decode()


def test_in_a_log_progress_is_lines_with_count_detail_and_eta() -> None:
    done = run()
    assert done.stdout == "after\n"
    assert done.stderr == "step 4/4  loss 5.5  ETA 0 s\n", "only the line that was asked for was due"


def test_on_a_terminal_progress_is_a_bar_with_eta_and_the_cursor_stays() -> None:
    shown = on_a_terminal()
    assert "━" in shown and "2/4" in shown and "loss 7.5" in shown and re.search(r"ETA \d s", shown)
    assert shown.rstrip().endswith("after")
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l")


def test_a_parent_gets_every_update_and_knows_which_are_for_its_log() -> None:
    lines = run(**{RELAY: "1"}).stderr.splitlines()
    updates = [update for line in lines if (update := relayed(line))]
    assert len(updates) == len(lines)
    assert [update.done for update in updates] == [1, 2, 3, 4, 4]
    assert [update.log for update in updates] == [False, False, False, True, False]
    assert updates[-1].finished and not updates[0].finished
    assert str(updates[3]) == "step 4/4  loss 5.5  ETA 0 s"


@pytest.mark.parametrize("line", ["step 1/2", "\x1fprogress ", '\x1fprogress {"unit": "ro', '\x1fprogress {"x": 1}'])
def test_other_lines_and_lines_cut_short_are_no_updates(line: str) -> None:
    assert relayed(line) is None


def test_without_a_total_the_count_alone_is_shown() -> None:
    assert str(ProgressUpdate("row", 12345)) == "row 12,345"


def test_a_line_is_written_at_most_every_few_seconds(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    logger = logging.getLogger("llama_lora")  # as at the start of a process: log.configure() ends propagation
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(logger, "handlers", [])
    with caplog.at_level("INFO", "llama_lora"):
        for _ in progress.track(range(100), "row", 100):
            now += 1
    assert [record.getMessage() for record in caplog.records][:2] == [
        "row 10/100  ETA 1 min 30 s",
        "row 20/100  ETA 1 min 20 s",
    ]
    assert len(caplog.records) == 10
