"""progress.json, which the trainer writes while it trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_progress(path: Path) -> dict[str, Any]:
    try:
        progress = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return progress if isinstance(progress, dict) else {}


def describe_progress(progress: dict[str, Any]) -> str:
    """``step 120 of 1,000, loss 1.234, 5,120 tokens/s, 1 h 02 min left``, as far as it is known."""
    parts = [f"step {progress.get('step')} of {progress.get('totalSteps')}"]
    if (loss := progress.get("loss")) is not None:
        parts.append(f"loss {loss:.4f}")
    if (rate := progress.get("learningRate")) is not None:
        parts.append(f"learning rate {rate:.3g}")
    if (speed := progress.get("tokensPerSecond")) is not None:
        parts.append(f"{speed:,.0f} tokens/s")
    if (left := progress.get("etaSeconds")) is not None:
        hours, minutes = divmod(round(left / 60), 60)
        parts.append(f"{hours} h {minutes:02d} min left" if hours else f"{minutes} min left")
    return ", ".join(parts)
