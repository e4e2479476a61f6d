"""progress.json, which the trainer writes while it trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from genvalues.common.text import duration


def read_progress(path: Path) -> dict[str, Any]:
    """The file's content; empty if it does not exist or cannot be read."""
    try:
        progress = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return progress if isinstance(progress, dict) else {}


def describe_progress(progress: dict[str, Any]) -> str:
    """``step 120 of 1000, loss 1.2340, 5,120 tokens/s, 1 h 02 min left``, without the values that are missing."""
    parts = [f"step {progress.get('step')} of {progress.get('totalSteps')}"]
    if (loss := progress.get("loss")) is not None:
        parts.append(f"loss {loss:.4f}")
    if (rate := progress.get("learningRate")) is not None:
        parts.append(f"learning rate {rate:.3g}")
    if (speed := progress.get("tokensPerSecond")) is not None:
        parts.append(f"{speed:,.0f} tokens/s")
    if (left := progress.get("etaSeconds")) is not None:
        parts.append(f"{duration(left)} left")
    return ", ".join(parts)


def describe_checkpoint(progress: dict[str, Any]) -> str:
    """Which checkpoint is kept after a training was stopped; empty without progress."""
    if saved := progress.get("savedStep"):
        return f"the checkpoint at step {saved} is kept"
    return "no checkpoint was saved" if progress else ""
