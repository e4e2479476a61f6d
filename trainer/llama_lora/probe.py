"""The proof of the weights: the loss of a few fixed rows at the last save, and again from what was made of it.

Training records it with the model in memory. Consolidate and merge recompute it with plain transformers on the CPU, and
refuse a result that is off: a shard of another rank, a transposed factor, a wrong scale, the base model alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from genvalues.common.errors import UserError
from llama_lora import config
from llama_lora.data.rendering import IGNORED
from llama_lora.progress import track

Row = dict[str, Any]


@dataclass(frozen=True)
class Probe:
    """``losses`` are nats summed over each row's ``tokens`` trained tokens; ``rows`` are numbers in the dataset."""

    rows: list[int]
    max_tokens: int
    losses: list[float]
    tokens: list[int]

    @property
    def loss(self) -> float:
        """Mean nats per trained token."""
        return sum(self.losses) / sum(self.tokens)

    def first(self, count: int) -> Probe:
        """The same over fewer rows."""
        return Probe(self.rows[:count], self.max_tokens, self.losses[:count], self.tokens[:count])

    def as_record(self) -> dict[str, Any]:
        """For a checkpoint's record and a manifest's facts: what Probe(**...) takes."""
        return asdict(self)


def chosen(dataset: Sequence[Row], settings: config.Probe) -> dict[int, Row]:
    """The first rows that have something to learn within ``max_tokens``, cut there, by their number."""
    found: dict[int, Row] = {}
    for number in range(len(dataset)):
        if len(found) == settings.rows:
            break
        row = cut(dataset[number], settings.max_tokens)
        if trained_tokens(row):
            found[number] = row
    return found


def cut(row: Row, length: int) -> Row:
    """A row's first ``length`` tokens. What a token sees is before it, so the losses left are as in the whole row."""
    lengths: list[int] = []
    for example in row["lengths"]:
        if sum(lengths) < length:
            lengths.append(min(example, length - sum(lengths)))
    return {"input_ids": row["input_ids"][:length], "labels": row["labels"][:length], "lengths": lengths}


def trained_tokens(row: Row) -> int:
    """How many tokens of a row carry a loss: the first of a row has none before it to be told from."""
    return sum(label != IGNORED for label in row["labels"][1:])


def measured(dataset: Sequence[Row], settings: config.Probe, loss_of: Callable[[Row], float]) -> Probe | None:
    """What a model says to the rows; None where there are none. ``loss_of`` gives a row's summed loss in nats."""
    rows = chosen(dataset, settings)
    if not rows:
        return None
    losses = [loss_of(row) for row in rows.values()]
    return Probe(list(rows), settings.max_tokens, losses, [trained_tokens(row) for row in rows.values()])


def verify_loss(
    recorded: Probe, dataset: Sequence[Row], settings: config.Probe, model: Any, isolated: bool, what: Path
) -> str:
    """Recompute a probe with a plain model, and say so. At most ``settings.rows`` of the rows are looked at.

    Raises UserError where the mean loss is off by more than ``settings.tolerance`` nats per trained token.
    """
    import torch

    from llama_lora.data.batches import batch
    from llama_lora.losses import loss_sum

    recorded = recorded.first(settings.rows)
    losses = []
    with torch.no_grad():
        for number in track(recorded.rows, "probe row", len(recorded.rows)):
            row = cut(dataset[number], recorded.max_tokens)
            losses.append(loss_sum(model, batch([row], isolated)).item())
    again = Probe(recorded.rows, recorded.max_tokens, losses, recorded.tokens)
    difference = abs(again.loss - recorded.loss)
    compared = (
        f"the loss of {len(losses)} rows ({sum(recorded.tokens)} trained tokens) was {recorded.loss:.5f} when the last "
        f"checkpoint was saved, and is {again.loss:.5f} with this"
    )
    if not difference <= settings.tolerance:
        raise UserError(
            f"these are not the weights that were trained: {compared}",
            where=str(what),
            fix=f"Train again, or raise probe.tolerance ({settings.tolerance:g}) if you know why they differ.",
        )
    return f"probe: {compared}"
