"""progress.json, which the trainer writes while it trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from genvalues.cluster.objects import moment
from genvalues.common.dicts import get
from genvalues.common.json_files import Count, Finite, InvalidJson, as_record, read_object
from genvalues.common.text import duration

MOST_BYTES = 64 << 10


@dataclass(frozen=True)
class Progress:
    """What this package reads of progress.json, with its keys."""

    stage: str
    step: Count
    totalSteps: Count
    updated: str
    loss: Finite | None = None
    learningRate: Finite | None = None
    tokensPerSecond: Finite | None = None
    etaSeconds: Finite | None = None
    savedStep: Count | None = None
    evalLoss: Finite | None = None

    def __post_init__(self) -> None:
        try:
            moment(self.updated)
        except OverflowError as error:
            raise ValueError(str(error)) from None


def read_progress(path: Path) -> dict[str, Any]:
    """The file's content; empty if it does not exist or is not valid, because the trainer writes it at each step."""
    try:
        content = read_object(path, MOST_BYTES)
        known = asdict(as_record(content, Progress))
    except InvalidJson:
        return {}
    return {**content, **{key: value for key, value in known.items() if key in content}}


SHOWN = {
    "loss": "loss {:.4f}",
    "evalLoss": "held-out loss {:.4f}",
    "learningRate": "learning rate {:.3g}",
    "tokensPerSecond": "{:,.0f} tokens/s",
}


def describe_progress(progress: Mapping[str, Any]) -> str:
    """``step 120 of 1,000, loss 1.2340, 5,120 tokens/s, 1 h 02 min left``.

    Without values that are missing or not numbers: users may have changed the annotation.
    """
    step, total, left = (get(progress, key, float) for key in ("step", "totalSteps", "etaSeconds"))
    parts = [] if step is None else [f"step {step:,.0f}" + (f" of {total:,.0f}" if total is not None else "")]
    parts += [text.format(value) for key, text in SHOWN.items() if (value := get(progress, key, float)) is not None]
    return ", ".join(parts if left is None else [*parts, f"{duration(left)} left"])


def describe_checkpoint(progress: dict[str, Any]) -> str:
    """Which checkpoint is kept after a training was stopped; empty without progress."""
    if saved := progress.get("savedStep"):
        return f"the checkpoint at step {saved} is kept"
    return "no checkpoint was saved" if progress else ""
