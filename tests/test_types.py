"""mypy, beside the other tests: it takes one core for half a minute."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_the_types_are_right() -> None:
    command = [sys.executable, "-m", "mypy"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
