"""Merge the adapter into the base model: copy each shard, and change the targeted tensors on the way.

Each byte is read and written once; in a run, both sides are digested in the same pass. The result is bit-identical to
peft's merge_and_unload(). Memory is the adapter and a few MiB for each core, whatever the model.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from genvalues.common import files
from genvalues.common.errors import UserError
from genvalues.common.json_files import FileRecord, InvalidJson, as_record, read_object
from llama_lora import library_versions
from llama_lora.adapter import CONFIG, Delta, adapted, read_adapter_config, read_deltas
from llama_lora.data.row_checks import record_stop_tokens
from llama_lora.digests import OTHER_CONTENT
from llama_lora.model_card import CARD, Facts, base_in, card, facts_of, license_in
from llama_lora.model_files import CONFIG as MODEL_CONFIG
from llama_lora.model_files import GENERATION_CONFIG, base_files, has_tokenizer, read_model_json, regular_file
from llama_lora.probe import ProbeRecord
from llama_lora.progress import StageProgress
from llama_lora.safetensors_files import DTYPES, StoredTensor, copy_changed, is_same, stored_tensors
from llama_lora.stage import Declaration, Stage, refuse_damaged, rerun
from llama_lora.stages.consolidate import locked_output, verify_probed, verify_weights

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


def merge(stage: Stage) -> None:
    """Merge the run's base model and adapter into merged/."""
    base = stage.upstream_path("tokenize", "model")
    stage.verify_read("consolidate", stage.paths.adapter)
    deltas = read_deltas(stage.paths.adapter)
    with damage_reported_first(stage, base):
        tensors = stored_tensors(base)
        check_fits(deltas, tensors, stage.paths.adapter, base)
    recorded = recorded_probe(stage)
    verify_probed(stage, recorded)
    digests = stage.upstream_files("tokenize", base) if stage.config.verify != "off" else {}
    with stage.output(stage.paths.merged) as folder:
        with damage_reported_first(stage, base):
            records = write_merged(base, tensors, deltas, folder, digests)
        stage.digested = {stage.paths.merged / name: record for name, record in records.items()}
        files.write_text(folder / CARD, card(facts_of(stage, "merged")))
        verify_weights(stage, recorded, folder, stage.paths.merged)
    log.info(f"merged {len(deltas)} of {len(tensors)} tensors into {stage.paths.merged}")


@contextmanager
def damage_reported_first(stage: Stage, base: Path) -> Iterator[None]:
    """Report a damaged file of the base model rather than an error that may follow from it: the message says more."""
    try:
        yield
    except UserError:
        stage.verify_read("tokenize", base)
        raise


def recorded_probe(stage: Stage) -> ProbeRecord | None:
    """The probe in consolidate's manifest; None if training recorded none. Raises UserError if it is not valid."""
    probe = stage.upstream("consolidate").facts.get("probe")
    try:
        return as_record(probe, ProbeRecord) if probe is not None else None
    except InvalidJson as error:
        file = str(stage.paths.manifest("consolidate"))
        fix = f"Delete the file and run {rerun('consolidate')}."
        raise UserError(f"facts.probe {error}", where=file, fix=fix) from None


def merge_adapter(base: Path, adapter: Path, output: Path) -> None:
    """Merge any base model and adapter folder, outside a run. Raises UserError if ``output`` exists."""
    for option, folder in {"--base": base, "--adapter": adapter}.items():
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder", where=option, fix="Pass an existing folder.")
    if not (base / MODEL_CONFIG).is_file():
        fix = "Pass a folder with a whole model in the Hugging Face format."
        raise UserError(f"{base} has no {MODEL_CONFIG}", where="--base", fix=fix)
    with locked_output(output, "llama-lora merge"):
        deltas = read_deltas(adapter)
        tensors = stored_tensors(base)
        check_fits(deltas, tensors, adapter, base)
        with files.whole_folder(output) as folder:
            write_merged(base, tensors, deltas, folder)
            facts = Facts("merged", base_model=base_in(read_object(adapter / CONFIG)), license=license_in(base / CARD))
            files.write_text(folder / CARD, card(facts))
    log.info(f"merged {len(deltas)} of {len(tensors)} tensors into {output}")


def check_fits(deltas: Mapping[str, Delta], tensors: Mapping[str, StoredTensor], adapter: Path, base: Path) -> None:
    """Raise UserError unless the adapter changes a weight and the base model has all its weights in their shapes."""
    if not deltas or not any(delta.b.any() for delta in deltas.values()):
        raise UserError(
            "the adapter changes nothing: every lora_B is zero" if deltas else "the adapter has no LoRA factors",
            where=str(adapter),
            fix="Consolidate a checkpoint of a training that took steps.",
        )
    for name, delta in deltas.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise UserError(f"{name} not found in the base model", where=str(adapter), fix=f"Was it trained on {base}?")
        if tensor.shape != delta.shape:
            raise UserError(
                f"{name} has shape {tensor.shape} in the base model and {delta.shape} in the adapter",
                where=str(adapter),
                fix=f"Was it trained on {base}?",
            )
        if tensor.dtype not in DTYPES:
            raise UserError(
                f"{name} has dtype {tensor.dtype}", where=str(base), fix=f"Use a base model in {', '.join(DTYPES)}."
            )
    check_shared(deltas, tensors, adapter, base)
    config, kinds = read_adapter_config(adapter), {without_numbers(name) for name in deltas}
    others = [name for name in tensors.keys() - deltas.keys() if without_numbers(name) in kinds]
    chosen = adapted(config, (name.removesuffix(".weight") for name in others), adapter / CONFIG)
    if absent := sorted(name for name in others if name.removesuffix(".weight") in chosen):
        raise UserError(
            f"has no factors of {absent[0]}, but of the same layer elsewhere ({len(deltas)} of "
            f"{len(deltas) + len(absent)} layers)",
            where=str(adapter),
            fix=f"Was it trained on {base}?",
        )


def check_shared(deltas: Mapping[str, Delta], tensors: Mapping[str, StoredTensor], adapter: Path, base: Path) -> None:
    """Raise UserError if the adapter changes one of the tensors as which the base model stores tied embeddings.

    PEFT changes the weight that both share. transformers 5 loads tensors that differ as two weights.
    """
    if read_model_json(regular_file(base, MODEL_CONFIG)).get("tie_word_embeddings") is False:
        return
    for name in sorted(name for name in deltas if without_numbers(name) == name):  # of no layer
        for other, tensor in tensors.items():
            if other != name and is_same(base, tensors[name], tensor):
                what = f"{name} shares its weights with {other} (tied embeddings)"
                fix = "Merge it with PEFT, or train only layers of the decoder."
                raise UserError(what, where=str(adapter), fix=fix)


def without_numbers(name: str) -> str:
    """What the tensors of the same name in all layers have in common."""
    return re.sub(r"\.\d+\.", ".N.", name)


def check_merged(tensors: Mapping[str, StoredTensor], folder: Path) -> None:
    """Raise UserError unless the merged model has the tensors of the base model, each in its place."""
    found = stored_tensors(folder)
    if found != tensors:
        differing = sorted(name for name in {*found, *tensors} if found.get(name) != tensors.get(name))
        raise UserError(
            f"{differing[0]} of the merged model is not stored as in the base model",
            where=str(folder),
            fix="Did another process change the base model? Merge again.",
        )


def write_merged(
    base: Path,
    tensors: Mapping[str, StoredTensor],
    deltas: Mapping[str, Delta],
    folder: Path,
    recorded: Mapping[Path, FileRecord] | None = None,
) -> dict[str, FileRecord]:
    """Copy the base model's folder, including tokenizer and configs, and add the deltas on the way.

    What is copied is compared with the digests in ``recorded``, if there are any. Raises UserErrors for a file that
    differs. The copy's generation config gets the tokens that answers were trained to end with, if it lacks them.
    Returns what a manifest records of the copied files; nothing if ``recorded`` is None, so that no digest is needed.
    """
    copied = base_files(base)
    if unknown := sorted(name for name, file in copied.items() if recorded and file not in recorded):
        what = "is not among the files that tokenize wrote"
        raise UserError(what, where=str(base / unknown[0]), fix="Delete it, or start a new run.")

    def add_delta(name: str, rows: torch.Tensor, first: int) -> torch.Tensor:
        return deltas[name].added_to(rows, first)

    records: dict[str, FileRecord] = {}
    copied_bytes = 0

    def copy(name: str) -> None:
        nonlocal copied_bytes
        file = copied[name]
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        targets = {target: tensors[target] for target in deltas if tensors[target].shard == name}
        read = written = hashlib.sha256()  # one digest until the first change
        for before, after in copy_changed(file, folder / name, targets, add_delta):
            if recorded is not None:
                if after is not before and written is read:
                    written = read.copy()
                read.update(before)
                if written is not read:
                    written.update(after)
            copied_bytes += len(after)
            progress.update(copied_bytes >> 20)
        if recorded and read.hexdigest() != recorded[file].sha256:
            refuse_damaged({file: OTHER_CONTENT}, "tokenize")
        if recorded is not None:
            records[name] = FileRecord((folder / name).stat().st_size, written.hexdigest())

    shards = {tensor.shard for tensor in tensors.values()}
    total = sum(file.stat().st_size for file in copied.values())
    with StageProgress("MiB", total >> 20) as progress, ThreadPoolExecutor(1) as beside:
        for name in (name for name in copied if name not in shards):
            copy(name)
        if has_tokenizer(folder):
            beside.submit(library_versions.import_tokenizers)  # for seconds, while the weights are copied
        for name in sorted(shards):
            copy(name)
    check_merged(tensors, folder)
    record_stop_tokens(folder, base)
    records.pop(GENERATION_CONFIG, None)  # may have changed
    return records


STAGE = Declaration(
    name="merge",
    version=1,
    summary="Merge base model and adapter into one model (safetensors, tokenizer, chat template).",
    after=["tokenize", "consolidate"],
    reads=lambda config: {},
    run=merge,
    tool=merge_adapter,
)
