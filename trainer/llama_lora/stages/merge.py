"""Base model + adapter -> merged model: each shard copied, and only the targeted tensors patched in it.

Bit-identical to peft's merge_and_unload(), at the memory of the largest tensor instead of the whole model.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from genvalues.common import files
from genvalues.common.errors import UserError
from llama_lora import evaluation
from llama_lora.adapter import Delta, read_deltas
from llama_lora.probe import Probe
from llama_lora.progress import StageProgress, track
from llama_lora.shards import DTYPES, StoredTensor, add_in_place, stored_tensors
from llama_lora.stage import Declaration, Stage
from llama_lora.stages.consolidate import refuse_to_overwrite, verify_loss


def merge(stage: Stage) -> None:
    """The run's base model and adapter -> merged/."""
    base = stage.paths.workspace / stage.upstream("tokenize").facts["model"]
    deltas = read_deltas(stage.paths.adapter)
    tensors = stored_tensors(base)
    check_fits(deltas, tensors, stage.paths.adapter, base)
    recorded = stage.upstream("consolidate").facts["probe"]
    with stage.output(stage.paths.merged) as folder:
        write_merged(base, tensors, deltas, folder)
        probed = Probe(**recorded) if recorded else None
        verify_loss(stage, probed, lambda: evaluation.load_model(folder), stage.paths.merged)
    print(f"{len(deltas)} of {len(tensors)} tensors merged -> {stage.paths.merged}", flush=True)


def merge_adapter(base: Path, adapter: Path, output: Path) -> None:
    """The same for any two folders, outside a run. Refuses to overwrite."""
    refuse_to_overwrite(output)
    for option, folder in {"--base": base, "--adapter": adapter}.items():
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder", where=option, fix="Give the folder it was written to.")
    deltas = read_deltas(adapter)
    tensors = stored_tensors(base)
    check_fits(deltas, tensors, adapter, base)
    with files.whole_folder(output) as folder:
        write_merged(base, tensors, deltas, folder)
    print(f"{len(deltas)} of {len(tensors)} tensors merged -> {output}")


def check_fits(deltas: Mapping[str, Delta], tensors: Mapping[str, StoredTensor], adapter: Path, base: Path) -> None:
    """Raise UserError unless the adapter changes something, and the base has every weight it changes, in its shape."""
    if not deltas or not any(delta.b.any() for delta in deltas.values()):
        raise UserError(
            "the adapter changes nothing: every lora_B is zero" if deltas else "the adapter holds no LoRA factors",
            where=str(adapter),
            fix="Consolidate a checkpoint that has been trained.",
        )
    for name, delta in deltas.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise UserError(f"the base model has no {name}", where=str(adapter), fix=f"Was it trained on {base}?")
        if tensor.shape != delta.shape:
            raise UserError(
                f"{name} is {tensor.shape} in the base model, {delta.shape} in the adapter",
                where=str(adapter),
                fix=f"Was it trained on {base}?",
            )
        if tensor.dtype not in DTYPES:
            raise UserError(
                f"{name} is stored as {tensor.dtype}", where=str(base), fix=f"Give a base in {', '.join(DTYPES)}."
            )


def write_merged(base: Path, tensors: Mapping[str, StoredTensor], deltas: Mapping[str, Delta], folder: Path) -> None:
    """Copy the base model's folder (tokenizer, chat template and generation config with it) and patch the copy."""
    with StageProgress("file", sum(path.is_file() for path in base.rglob("*"))) as progress:

        def copy(source: str, target: str) -> None:
            shutil.copyfile(source, target)
            progress.advance()

        shutil.copytree(base, folder, dirs_exist_ok=True, copy_function=copy)
    for name, delta in track(deltas.items(), "tensor", len(deltas)):
        add_in_place(folder / tensors[name].shard, tensors[name], delta.weight())


STAGE = Declaration(
    name="merge",
    version=1,
    summary="Base model + adapter -> merged model (safetensors, tokenizer, chat template).",
    after=["tokenize", "consolidate"],
    reads=lambda config: {},
    run=merge,
    tool=merge_adapter,
)
