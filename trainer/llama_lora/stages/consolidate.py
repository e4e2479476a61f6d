"""Convert a sharded checkpoint to a PEFT adapter, and verify it with the loss that training recorded."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from genvalues.common import files
from genvalues.common.errors import UserError
from genvalues.common.locks import lock_beside, locked
from llama_lora import backends, probe
from llama_lora.adapter import write_adapter
from llama_lora.backends.base import Adapter
from llama_lora.digests import Digests, differences
from llama_lora.model_card import CARD, Facts, base_in, card, facts_of
from llama_lora.probe import ProbeRecord
from llama_lora.stage import MOST_WAIT, Declaration, Stage

log = logging.getLogger(__name__)


def consolidate(stage: Stage) -> None:
    """Convert the checkpoint that train's manifest names to adapter/."""
    checkpoint = trained_checkpoint(stage)
    base = stage.upstream_path("tokenize", "model")
    adapter = read_trained_adapter(stage, checkpoint, base)
    recorded = backends.probe_of(checkpoint)
    verify_probed(stage, recorded, base)
    with stage.output(stage.paths.adapter) as folder:
        write_adapter(folder, adapter.tensors, adapter.config)
        files.write_text(folder / CARD, card(facts_of(stage, "adapter")))
        verify_weights(stage, recorded, base, stage.paths.adapter, adapter=folder)
        stage.facts = {"probe": recorded.as_record() if recorded else None}
    log.info(f"wrote {len(adapter.tensors)} tensors of {checkpoint.name} to {stage.paths.adapter}")


def trained_checkpoint(stage: Stage) -> Path:
    """The checkpoint that train's manifest names. Raises UserError if it is not one of that training.

    A damaged one is renamed, which no other folder may be.
    """
    from llama_lora.backends import checkpoints

    checkpoint = stage.upstream_path("train", "checkpoint")
    folder = stage.paths.checkpoints(stage.upstream_fingerprint("train"))
    if checkpoint not in checkpoints.saved(folder):
        raise stage.wrong_fact("train", "checkpoint", f"which is not a checkpoint {folder}/step-N")
    return checkpoint


def read_trained_adapter(stage: Stage, checkpoint: Path, base: Path) -> Adapter:
    """Read the adapter of a training's last checkpoint.

    A damaged one is set aside: then train is not done, and the next run trains on from the checkpoint before it. Raises
    UserError, which says so.
    """
    from llama_lora.backends import checkpoints

    try:
        check_record(stage, checkpoint)
        return backends.get(stage.config.backend).read_adapter(checkpoint, base)
    except checkpoints.DamagedCheckpoint as damage:
        checkpoints.set_aside(checkpoint, damage)
        fix = how_to_train_on(stage, checkpoint.parent)
        raise UserError(f"{damage.what}; the checkpoint was set aside", where=damage.where, fix=fix) from None


def how_to_train_on(stage: Stage, folder: Path) -> str:
    """What to do after a checkpoint of a training was set aside."""
    from llama_lora.backends import checkpoints

    again = "run `helm upgrade`, `genvalues local`, or `llama-lora train --config ...` and this stage again"
    try:
        found = checkpoints.newest_intact(folder, stage.upstream_fingerprint("train"))
        if found and stage.config.training.load_best_model_at_end:
            checkpoints.check_best(folder, found[1])
    except UserError:
        found = None
    if found is None:
        return f"No other checkpoint can be used: delete {folder} to train from the start, and {again}."
    return f"To train on from {found[0].name}, {again}."


def check_record(stage: Stage, checkpoint: Path) -> None:
    """Raise DamagedCheckpoint unless checkpoint.json, which has the digests of the others, is the one of train."""
    from llama_lora.backends import checkpoints

    recorded = stage.upstream_files("train", checkpoint / checkpoints.RECORD)
    for file, difference in differences(recorded, Digests("always")).items():
        raise checkpoints.DamagedCheckpoint(difference, where=str(file))


def verify_probed(stage: Stage, recorded: ProbeRecord | None, *models: Path) -> None:
    """Verify the files of tokenize that the probe reads, if there is one: the rows, and ``models``."""
    if recorded and stage.config.probe.rows:
        stage.verify_read("tokenize", stage.upstream_path("tokenize", "dataset") / "train", *models)


def verify_weights(
    stage: Stage, recorded: ProbeRecord | None, model: Path, what: Path, adapter: Path | None = None
) -> None:
    """Recompute the recorded probe with a model folder, and an adapter, and log the comparison.

    Raises UserError, naming ``what``, if the model does not have the trained weights.
    """
    from datasets import load_from_disk

    from llama_lora.streaming import StreamedModel

    settings = stage.config.probe
    if recorded is None or not settings.rows:
        reason = "training recorded no probe" if settings.rows else "probe.rows is 0"
        log.info(f"probe: skipped, the weights are not verified ({reason})")
        return
    rows = load_from_disk(str(stage.upstream_path("tokenize", "dataset") / "train"))
    isolated = stage.config.training.isolates_examples
    log.info(probe.verify_loss(recorded, rows, settings, StreamedModel(model, adapter), isolated, what))


def consolidate_checkpoint(checkpoint: Path, output: Path) -> None:
    """Convert any checkpoint folder, outside a run. Raises UserError if ``output`` exists."""
    if not checkpoint.is_dir():
        raise UserError(
            f"{checkpoint} is not a folder", where="--checkpoint", fix="Pass a folder checkpoints/*/step-N."
        )
    with locked_output(output, "llama-lora consolidate"):
        adapter = backends.of_checkpoint(checkpoint).read_adapter(checkpoint, None)
        with files.whole_folder(output) as folder:
            write_adapter(folder, adapter.tensors, adapter.config)
            files.write_text(folder / CARD, card(Facts("adapter", base_model=base_in(adapter.config))))
    log.info(f"wrote {len(adapter.tensors)} tensors of {checkpoint} to {output}")


@contextmanager
def locked_output(output: Path, command: str) -> Iterator[None]:
    """Hold the lock of a tool's output folder. Raises UserError if the folder exists, or another tool writes it."""
    refuse_to_overwrite(output)
    with ExitStack() as held:
        try:
            held.enter_context(locked(lock_beside(output.absolute()), command, MOST_WAIT, remove=True))
        except OSError as error:  # as in /proc, where folders exist and no file can be created
            raise cannot_create(output, error) from None
        refuse_to_overwrite(output)  # another tool may have written it
        yield


def refuse_to_overwrite(output: Path) -> None:
    """Raise UserError if the folder exists and is not empty, or cannot be created."""
    try:
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
        exists = output.exists() and (not output.is_dir() or any(output.iterdir()))
    except OSError as error:
        raise cannot_create(output, error) from None
    if exists:
        raise UserError(f"{output} already exists", where="--output", fix="Pass a new folder, or delete this one.")


def cannot_create(output: Path, error: OSError) -> UserError:
    return UserError(f"{output} cannot be created: {error.strerror}", where="--output", fix="Pass another folder.")


STAGE = Declaration(
    name="consolidate",
    version=1,
    summary="Convert checkpoint shards to a PEFT adapter (safetensors).",
    after=["tokenize", "train"],
    reads=lambda config: {},
    run=consolidate,
    tool=consolidate_checkpoint,
)
