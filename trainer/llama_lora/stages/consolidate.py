"""Convert a sharded checkpoint to a PEFT adapter, and verify it with the loss that training recorded."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from genvalues.common import files
from genvalues.common.errors import UserError
from llama_lora import backends, evaluation, probe
from llama_lora.adapter import write_adapter
from llama_lora.model_card import CARD, Facts, base_in, card, facts_of
from llama_lora.probe import ProbeRecord
from llama_lora.stage import Declaration, Stage

log = logging.getLogger(__name__)


def consolidate(stage: Stage) -> None:
    """Convert the checkpoint that train's manifest names to adapter/."""
    checkpoint = stage.paths.workspace / stage.upstream("train").facts["checkpoint"]
    base = stage.paths.workspace / stage.upstream("tokenize").facts["model"]
    adapter = backends.get(stage.config.backend).read_adapter(checkpoint, base)
    recorded = backends.probe_of(checkpoint)
    with stage.output(stage.paths.adapter) as folder:
        write_adapter(folder, adapter.tensors, adapter.config)
        files.write_text(folder / CARD, card(facts_of(stage, "adapter")))
        verify_weights(stage, recorded, lambda: evaluation.load_model(base, adapter=folder), stage.paths.adapter)
        stage.facts = {"probe": recorded.as_record() if recorded else None}
    log.info(f"wrote {len(adapter.tensors)} tensors of {checkpoint.name} to {stage.paths.adapter}")


def verify_weights(stage: Stage, recorded: ProbeRecord | None, load: Callable[[], Any], what: Path) -> None:
    """Recompute the recorded probe with the model that ``load`` returns, and log the comparison.

    Raises UserError, naming ``what``, if the model does not have the trained weights.
    """
    from datasets import load_from_disk

    settings = stage.config.probe
    if recorded is None or not settings.rows:
        reason = "training recorded no probe" if settings.rows else "probe.rows is 0"
        log.info(f"probe: skipped, the weights are not verified ({reason})")
        return
    rows = load_from_disk(str(stage.paths.workspace / stage.upstream("tokenize").facts["dataset"] / "train"))
    isolated = stage.config.training.attention == "isolated"
    log.info(probe.verify_loss(recorded, rows, settings, load(), isolated, what))


def consolidate_checkpoint(checkpoint: Path, output: Path) -> None:
    """Convert any checkpoint folder, outside a run. Raises UserError if ``output`` exists."""
    refuse_to_overwrite(output)
    if not checkpoint.is_dir():
        raise UserError(
            f"{checkpoint} is not a folder", where="--checkpoint", fix="Pass a folder checkpoints/*/step-N."
        )
    adapter = backends.of_checkpoint(checkpoint).read_adapter(checkpoint, None)
    with files.whole_folder(output) as folder:
        write_adapter(folder, adapter.tensors, adapter.config)
        files.write_text(folder / CARD, card(Facts("adapter", base_model=base_in(adapter.config))))
    log.info(f"wrote {len(adapter.tensors)} tensors of {checkpoint} to {output}")


def refuse_to_overwrite(output: Path) -> None:
    """Raise UserError if the folder exists and is not empty, or cannot be created."""
    try:
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
        exists = output.exists() and (not output.is_dir() or any(output.iterdir()))
    except OSError as error:
        raise UserError(
            f"{output} cannot be created: {error.strerror}", where="--output", fix="Pass another folder."
        ) from None
    if exists:
        raise UserError(f"{output} already exists", where="--output", fix="Pass a new folder, or delete this one.")


STAGE = Declaration(
    name="consolidate",
    version=1,
    summary="Convert checkpoint shards to a PEFT adapter (safetensors).",
    after=["tokenize", "train"],
    reads=lambda config: {},
    run=consolidate,
    tool=consolidate_checkpoint,
)
