"""Show rows of a run's dataset with the trainer's libraries: `genvalues preview`."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

from genvalues.common.errors import EXIT_USER_ERROR, UserError
from genvalues.inputs.input_options import Sources
from genvalues.inputs.write import checked
from genvalues.ops.trace import LIBRARIES, write_config

TRAINER = "llama_lora.cli"


def show_rows(sources: Sources, rows: int) -> int:
    """Run the trainer's preview on checked inputs; its output is this command's. Returns the exit status.

    Raises UserErrors with every mistake in the inputs, and UserError if the trainer is not installed.
    """
    command = preview_command()
    found = checked(sources, offline=True)
    with tempfile.TemporaryDirectory(prefix="genvalues-preview-") as folder:
        config = write_config(found.values, Path(folder))
        sys.stdout.flush()
        done = subprocess.run([*command, "--config", str(config), "--rows", str(rows)], check=False)
    return done.returncode if done.returncode in (0, EXIT_USER_ERROR) else 1


def preview_command() -> list[str]:
    """Raises UserError if the trainer's libraries are not installed."""
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"preview needs {' and '.join(missing)}, which this environment does not have",
            fix="Install the package with its extra `trainer`, or run genvalues in the image.",
        )
    return [sys.executable, "-m", TRAINER, "preview"]
