"""Show rows of a run's dataset with the trainer's libraries: `genvalues preview`."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from genvalues.common.errors import EXIT_USER_ERROR
from genvalues.inputs.input_options import Sources
from genvalues.inputs.write import checked
from genvalues.ops.trace import require_trainer, write_config

TRAINER = "llama_lora.cli"


def show_rows(sources: Sources, rows: int) -> int:
    """Run the trainer's preview on checked inputs; its output is this command's. Returns the exit status.

    Raises UserErrors with every mistake in the inputs, and UserError if the trainer is not installed.
    """
    require_trainer("preview needs")
    found = checked(sources, offline=True)
    with tempfile.TemporaryDirectory(prefix="genvalues-preview-") as folder:
        config = write_config(found.values, Path(folder))
        sys.stdout.flush()
        command = [sys.executable, "-m", TRAINER, "preview", "--config", str(config), "--rows", str(rows)]
        done = subprocess.run(command, check=False)
    return done.returncode if done.returncode in (0, EXIT_USER_ERROR) else 1
