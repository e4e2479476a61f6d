"""``llama-lora fingerprint``: whether a stage is up to date. Only the trainer knows what each stage reads."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from genvalues.common.errors import EXIT_USER_ERROR, UserError
from genvalues.common.json_files import InvalidJson, as_record, parse_json
from genvalues.common.text import one_line


@dataclass(frozen=True)
class StageState:
    """The output of ``llama-lora fingerprint STAGE``."""

    fingerprint: str | None  # None: a stage that it depends on is not done
    up_to_date: Annotated[bool, Field(alias="upToDate")]
    progress: Path
    manifest: Path


ReadStageState = Callable[[str], StageState]  # takes the stage's name


class TrainerCommandFailed(Exception):
    """``llama-lora fingerprint`` failed for a reason that a retry may resolve."""


def read_stage_state(stage: str, run_config: Path) -> StageState:
    """Run ``llama-lora fingerprint``. Raises UserError if the user must change something, else TrainerCommandFailed."""
    beside = Path(sys.executable).with_name("llama-lora")
    command = str(beside) if beside.exists() else shutil.which("llama-lora")
    if command is None:
        raise UserError("llama-lora not found in PATH", fix="Use the image built from trainer/Dockerfile")
    arguments = [command, "fingerprint", stage, "--config", str(run_config)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    message = done.stderr.strip()
    if done.returncode == EXIT_USER_ERROR:
        raise UserError(message or f"{' '.join(arguments)} ended with status 2")
    if done.returncode != 0:
        raise TrainerCommandFailed(f"{' '.join(arguments)} ended with status {done.returncode}\n{message}")
    return parse_stage_state(stage, done.stdout)


def parse_stage_state(stage: str, text: str) -> StageState:
    """Read what the command printed. Raises TrainerCommandFailed if it is something else."""
    try:
        return as_record(parse_json(text), StageState)
    except InvalidJson as error:
        shown = one_line(text.strip(), width=200)
        raise TrainerCommandFailed(f"llama-lora fingerprint {stage}: invalid output: it {error}: {shown}") from None
