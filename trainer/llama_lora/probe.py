"""The probe: the loss of a few fixed rows, measured at the last save and recomputed from what is made of it.

Training measures it with the model in memory. consolidate and merge recompute it with transformers on the CPU, where
one decoder layer is in memory at a time, and fail if the losses differ, which detects a wrong shard, a transposed
factor, a wrong scale, or an adapter that has no effect.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from genvalues.common.errors import UserError
from genvalues.common.json_files import Count
from llama_lora import config
from llama_lora.data.tokens import IGNORED
from llama_lora.progress import StageProgress

if TYPE_CHECKING:
    from llama_lora.streaming import StreamedModel

Row = dict[str, Any]


@dataclass(frozen=True)
class ProbeRecord:
    """A measurement: row numbers in the dataset, and for each row its summed loss (nats) and its trained tokens."""

    rows: Annotated[list[Count], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)]
    losses: list[float]
    tokens: list[Annotated[int, Field(ge=1)]]

    def __post_init__(self) -> None:
        if not len(self.rows) == len(self.losses) == len(self.tokens):
            raise ValueError("rows, losses and tokens have different lengths")

    @property
    def loss(self) -> float:
        """The mean loss in nats per trained token."""
        return sum(self.losses) / sum(self.tokens)

    def first(self, count: int) -> ProbeRecord:
        """The measurement of the first ``count`` rows."""
        return ProbeRecord(self.rows[:count], self.max_tokens, self.losses[:count], self.tokens[:count])

    def as_record(self) -> dict[str, Any]:
        """The fields as JSON values, for a checkpoint's record and a manifest's facts."""
        return asdict(self)


def select_rows(dataset: Sequence[Row], settings: config.Probe) -> dict[int, Row]:
    """Select the first rows that have a trained token within ``max_tokens``, truncated to that, by row number."""
    found: dict[int, Row] = {}
    for number in range(len(dataset)):
        if len(found) == settings.rows:
            break
        row = truncate(dataset[number], settings.max_tokens)
        if trained_tokens(row):
            found[number] = row
    return found


def truncate(row: Row, length: int) -> Row:
    """Keep the first ``length`` tokens. Attention is causal, so the remaining losses equal those of the whole row."""
    lengths: list[int] = []
    for example in row["lengths"]:
        if sum(lengths) < length:
            lengths.append(min(example, length - sum(lengths)))
    return {"input_ids": row["input_ids"][:length], "labels": row["labels"][:length], "lengths": lengths}


def trained_tokens(row: Row) -> int:
    """Count the tokens with a loss. The first token of a row has none: nothing precedes it."""
    return sum(label != IGNORED for label in row["labels"][1:])


def measure(dataset: Sequence[Row], settings: config.Probe, loss_of: Callable[[Row], float]) -> ProbeRecord | None:
    """Measure the probe with ``loss_of``, which returns a row's summed loss in nats. None if no row qualifies.

    Raises UserError if a loss is not finite.
    """
    rows = select_rows(dataset, settings)
    if not rows:
        return None
    losses = [loss_of(row) for row in rows.values()]
    if not all(map(math.isfinite, losses)):
        raise UserError(
            f"the loss of the probe is {sum(losses)}", where="training.learningRate", fix="Lower it, and train again."
        )
    return ProbeRecord(list(rows), settings.max_tokens, losses, [trained_tokens(row) for row in rows.values()])


def recompute(recorded: ProbeRecord, dataset: Sequence[Row], model: StreamedModel, isolated: bool) -> ProbeRecord:
    """Measure the rows of a probe with a model folder."""
    from llama_lora.data.batches import make_batch

    rows = [truncate(dataset[number], recorded.max_tokens) for number in recorded.rows]
    passes = model.passes((1, len(row["input_ids"])) for row in rows)
    losses = []
    with StageProgress("probe layer", len(passes) * model.layer_count) as progress:
        for numbers in passes:
            batches = [make_batch([rows[number]], isolated) for number in numbers]
            losses += [summed.item() for summed in model.row_losses(batches, progress.advance)]
    return ProbeRecord(recorded.rows, recorded.max_tokens, losses, recorded.tokens)


def verify_loss(
    recorded: ProbeRecord,
    dataset: Sequence[Row],
    settings: config.Probe,
    model: StreamedModel,
    isolated: bool,
    what: Path,
) -> str:
    """Recompute a probe on at most ``settings.rows`` of its rows, and return the comparison as text.

    Raises UserError if the mean losses differ by more than ``settings.tolerance`` nats per trained token.
    """
    recorded = recorded.first(settings.rows)
    if max(recorded.rows) >= len(dataset):
        raise UserError(
            f"the probe was measured on row {max(recorded.rows)}, but the dataset has {len(dataset)} rows",
            where=str(what),
            fix="Use the run's own dataset, or train again.",
        )
    recomputed = recompute(recorded, dataset, model, isolated)
    difference = abs(recomputed.loss - recorded.loss)
    comparison = (
        f"the loss of {len(recorded.rows)} rows ({sum(recorded.tokens)} trained tokens) was {recorded.loss:.5f} when "
        f"the last checkpoint was saved, and is now {recomputed.loss:.5f}"
    )
    if not difference <= settings.tolerance:
        raise UserError(
            f"these are not the trained weights: {comparison}",
            where=str(what),
            fix=f"Train again, or raise probe.tolerance ({settings.tolerance:g}) if the difference is expected.",
        )
    return f"probe: {comparison}"
