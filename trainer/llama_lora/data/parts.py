"""The sources of a dataset, each with the settings that apply to it."""

from __future__ import annotations

from dataclasses import dataclass

from genvalues.settings.datasets import OPTIONAL_COLUMNS, REQUIRED_COLUMNS
from llama_lora.config import Dataset


@dataclass(frozen=True)
class Part:
    """One source of rows. ``key`` is where its settings are; ``name`` is its name in dataset.additional, else empty.

    ``columns``: key of the format -> column, for the columns that are named.
    """

    key: str
    name: str
    source: str
    config: str
    revision: str
    split: str
    format: str
    columns: dict[str, str]
    weight: float = 1.0

    @property
    def read_columns(self) -> set[str]:
        """The columns that the format reads, named or by default. Of nested keys (data.question) the first."""
        keys = [*REQUIRED_COLUMNS[self.format], *OPTIONAL_COLUMNS.get(self.format, [])]
        names = [self.columns.get(key, key) for key in keys]
        return {*names, *(name.partition(".")[0] for name in names)}


def training_parts(dataset: Dataset) -> list[Part]:
    """dataset.source, then each of dataset.additional."""
    first = Part(
        "dataset",
        "",
        dataset.source,
        dataset.config,
        dataset.revision,
        dataset.split,
        dataset.format,
        dataset.columns.named(),
        dataset.weight,
    )
    return [
        first,
        *(
            Part(
                f"dataset.additional.{name}",
                name,
                other.source,
                other.config,
                other.revision,
                other.split,
                other.format or dataset.format,
                other.columns.named(),
                other.weight,
            )
            for name, other in sorted(dataset.additional.items())
        ),
    ]


def held_out_part(dataset: Dataset) -> Part | None:
    """The source of dataset.eval, whose rows have the format and columns of dataset.source; None if it is not set.

    Without a source of its own it is a split of dataset.source.
    """
    held_out = dataset.eval
    if not held_out.source and not held_out.split:
        return None
    same = not held_out.source
    return Part(
        "dataset.eval",
        "",
        held_out.source or dataset.source,
        held_out.config or (dataset.config if same else ""),
        held_out.revision or (dataset.revision if same else ""),
        held_out.split,
        dataset.format,
        dataset.columns.named(),
    )
