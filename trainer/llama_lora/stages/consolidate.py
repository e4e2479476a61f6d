"""Sharded checkpoint -> a PEFT adapter, proven by the loss that training recorded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from genvalues.common import files
from genvalues.common.errors import UserError
from llama_lora import backends, evaluation, probe
from llama_lora.adapter import write_adapter
from llama_lora.probe import Probe
from llama_lora.stage import Declaration, Stage


def consolidate(stage: Stage) -> None:
    """The checkpoint that train has named in its manifest -> adapter/."""
    checkpoint = stage.paths.workspace / stage.upstream("train").facts["checkpoint"]
    base = stage.paths.workspace / stage.upstream("tokenize").facts["model"]
    adapter = backends.get(stage.config.backend).read_adapter(checkpoint, base)
    probed = backends.probe_of(checkpoint)
    with stage.output(stage.paths.adapter) as folder:
        write_adapter(folder, adapter.tensors, adapter.config)
        verify_loss(stage, probed, lambda: evaluation.load_model(base, adapter=folder), stage.paths.adapter)
        stage.facts = {"probe": probed.as_record() if probed else None}
    print(f"{len(adapter.tensors)} tensors of {checkpoint.name} -> {stage.paths.adapter}", flush=True)


def verify_loss(stage: Stage, recorded: Probe | None, load: Callable[[], Any], what: Path) -> None:
    """Recompute the probe's loss with the model that ``load`` gives, and say how they compare.

    Raises UserError where ``what`` is not what was trained.
    """
    from datasets import load_from_disk

    settings = stage.config.probe
    if recorded is None or not settings.rows:
        asked = "the training recorded none" if settings.rows else "probe.rows is 0"
        print(f"probe: none, so whether these are the weights that were trained is not proven ({asked})", flush=True)
        return
    rows = load_from_disk(str(stage.paths.workspace / stage.upstream("tokenize").facts["dataset"] / "train"))
    isolated = stage.config.training.attention == "eager"
    print(probe.verify_loss(recorded, rows, settings, load(), isolated, what), flush=True)


def consolidate_checkpoint(checkpoint: Path, output: Path) -> None:
    """The same for any checkpoint folder, outside a run. Refuses to overwrite."""
    refuse_to_overwrite(output)
    if not checkpoint.is_dir():
        raise UserError(f"{checkpoint} is no folder", where="--checkpoint", fix="Give a folder checkpoints/*/step-N.")
    adapter = backends.of_checkpoint(checkpoint).read_adapter(checkpoint, None)
    with files.whole_folder(output) as folder:
        write_adapter(folder, adapter.tensors, adapter.config)
    print(f"{len(adapter.tensors)} tensors of {checkpoint} -> {output}")


def refuse_to_overwrite(output: Path) -> None:
    """Raise UserError if the folder is there already and not empty, or cannot be made."""
    try:
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
        taken = output.exists() and (not output.is_dir() or any(output.iterdir()))
    except OSError as error:
        raise UserError(f"{output} cannot be made: {error.strerror}", where="--output", fix="Give another.") from None
    if taken:
        raise UserError(f"{output} is there already", where="--output", fix="Give a new folder, or remove that one.")


STAGE = Declaration(
    name="consolidate",
    version=1,
    summary="Checkpoint shards -> a PEFT adapter (safetensors).",
    after=["tokenize", "train"],
    reads=lambda config: {},
    run=consolidate,
    tool=consolidate_checkpoint,
)
