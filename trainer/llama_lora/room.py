"""Estimate the room that a stage needs on the volume, for the message of a volume that is full."""

from __future__ import annotations

from pathlib import Path

from genvalues.accelerators.architectures import Architecture, from_config, known, target_names
from genvalues.common.system_errors import amount
from llama_lora.config import RunConfig
from llama_lora.model_files import read_config
from llama_lora.paths import Paths
from llama_lora.stage import Stage

BF16, FP32 = 2, 4  # bytes of a number
# Of each trained parameter a checkpoint has the value and AdamW's two moments, an adapter the value; all in fp32.
CHECKPOINT, ADAPTER = 3 * FP32, FP32
SMALL_LAYERS, SMALL_COPIES = 2, 2  # of the model that is rehearsed: itself and merged


def describe(stage: str, config: RunConfig, paths: Paths) -> str:
    """Say how many bytes the stage needs; empty where it is not known."""
    try:
        size, of = _needed(stage, config, paths)
    except Exception:  # it explains an error, and must not replace it
        return ""
    return f"{stage} needs about {amount(size)} for {of}" if size else ""


def _needed(stage: str, config: RunConfig, paths: Paths) -> tuple[int, str]:
    if stage == "tokenize":
        source = Path(config.model.path) if config.model.path else None
        model = known(config.model.id) if config.model.id else None
        return (size_of(source) if source else BF16 * model.parameters if model else 0), "the model"
    base = Stage(stage, config, paths).upstream_path("tokenize", "model")
    if stage == "merge":
        return size_of(base), "the merged model"
    model = from_config(read_config(base, str(base)))
    if stage == "rehearse":
        return SMALL_COPIES * FP32 * _small_parameters(model), "a model of two layers and its merged copy"
    trained = model.lora_parameters(config.lora.r, target_names(config.lora.target_modules))
    if stage in ("compile", "train"):
        return CHECKPOINT * trained, "each checkpoint"
    return (ADAPTER * trained, "the adapter") if stage == "consolidate" else (0, "")


def _small_parameters(model: Architecture) -> int:
    layers = SMALL_LAYERS * model.layer_linear_parameters
    return model.parameters - model.layers * model.layer_linear_parameters + layers


def size_of(folder: Path) -> int:
    """The bytes of all files in a folder, or of a file."""
    found = folder.rglob("*") if folder.is_dir() else [folder]
    return sum(file.stat().st_size for file in found if file.is_file())
