"""Asking the trainer whether a stage is done: nothing else knows what the stage reads."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from genvalues.common.errors import EXIT_USER_ERROR, UserError


@dataclass(frozen=True)
class StageState:
    """What ``llama-lora fingerprint STAGE`` says."""

    fingerprint: str | None  # None: a stage it reads from is not done
    up_to_date: bool
    progress: Path
    manifest: Path


Ask = Callable[[str], StageState]  # of a stage


class CannotAsk(Exception):
    """``llama-lora fingerprint`` broke down; worth another try."""


def ask_trainer(stage: str, run_config: Path) -> StageState:
    """Ask the trainer, through its command: the only thing that knows what the stage reads and whether it is done."""
    beside = Path(sys.executable).with_name("llama-lora")
    command = str(beside) if beside.exists() else shutil.which("llama-lora")
    if command is None:
        raise UserError("there is no llama-lora command here", fix="Use the image built from trainer/Dockerfile")
    asked = [command, "fingerprint", stage, "--config", str(run_config)]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    complaint = done.stderr.strip()
    if done.returncode == EXIT_USER_ERROR:
        raise UserError(complaint or f"{' '.join(asked)} ended with status 2")
    if done.returncode != 0:
        raise CannotAsk(f"{' '.join(asked)} ended with status {done.returncode}\n{complaint}")
    return read_state(stage, done.stdout)


def read_state(stage: str, text: str) -> StageState:
    try:
        answer = json.loads(text)
        fingerprint, up_to_date = answer["fingerprint"], answer["upToDate"]
        progress, manifest = Path(answer["progress"]), Path(answer["manifest"])
    except (ValueError, KeyError, TypeError) as error:
        raise CannotAsk(f"llama-lora fingerprint {stage} did not answer as agreed: {text.strip()[:200]}") from error
    return StageState(fingerprint, up_to_date, progress, manifest)
