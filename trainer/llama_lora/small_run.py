"""A run of a small model with the settings of another run: its architecture, tokenizer and first rows."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from genvalues.accelerators.architectures import UnknownArchitecture, from_config
from genvalues.common import files
from genvalues.common.errors import UserError
from llama_lora import library_versions
from llama_lora.config import Monitoring, Parallelism, Publish, RunConfig
from llama_lora.data.row_checks import Row, trained_window
from llama_lora.data.tokens import IGNORED
from llama_lora.paths import Paths
from llama_lora.safetensors_files import DTYPES, stored_tensors
from llama_lora.stage import Stage

log = logging.getLogger(__name__)

LAYERS, HIDDEN, INTERMEDIATE, HEADS = 2, 64, 128, 4
ROWS = 16
ROW_TOKENS = 256  # more take minutes with a vocabulary of 128,256, and lead through no other code
STEPS, SAVE_STEPS = 3, 2
NO_EVALUATION = {"eval_steps": None, "load_best_model_at_end": False, "early_stopping_patience": None}
WORKERS = 2


def small_config(config: RunConfig) -> RunConfig:
    """The run's settings, for a few steps of two workers on the CPU with backend native.

    Two workers share layers if the run uses tensor parallelism, the base weights if it shards them, and train on
    different rows otherwise, as with backend xla, which has rules of its own for tensor parallelism.
    """
    layout, training = config.parallelism, config.training
    tensor = min(WORKERS, layout.tensor_parallel_size) if config.backend == "native" else 1
    data = WORKERS // tensor
    parallelism = Parallelism(
        nodes=1,
        processes_per_node=WORKERS,
        tensor_parallel_size=tensor,
        data_parallel_size=data,
        shard_size=min(data, layout.shard_size),
    )
    return config.model_copy(
        update={
            "backend": "native",
            "device": "cpu",
            "parallelism": parallelism,
            "training": training.model_copy(
                update={
                    "max_steps": STEPS,
                    "save_steps": SAVE_STEPS,
                    "save_total_limit": STEPS,
                    "attention": "isolated" if training.isolates_examples else training.attention,
                    **NO_EVALUATION,
                    "per_device_batch_size": min(2, training.per_device_batch_size),
                    "gradient_accumulation_steps": min(2, training.gradient_accumulation_steps),
                }
            ),
            "probe": config.probe.model_copy(update={"rows": 2}),
            "publish": Publish(),
            "monitoring": Monitoring(),
        }
    )


def small_model_config(config: dict[str, Any]) -> dict[str, Any]:
    """Shrink the content of a config.json. Vocabulary, positions, rope, head size, biases, tying and scalings stay.

    Key-value heads stay fewer than heads, or as many. Raises UserError if it is not the config of a Llama-like decoder.
    """
    try:
        architecture = from_config(config)
    except UnknownArchitecture as error:
        raise UserError(
            f"config.json {error}, so no small model can be made of it",
            where="model",
            fix="Set rehearse.enabled: false to train without a rehearsal.",
        ) from None
    grouped = architecture.kv_heads < architecture.heads
    small = {
        **config,
        "num_hidden_layers": LAYERS,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_attention_heads": HEADS,
        "num_key_value_heads": min(architecture.kv_heads, HEADS // 2 if grouped else HEADS),
        "head_dim": architecture.head,
    }
    if isinstance(small.get("layer_types"), list):
        small["layer_types"] = small["layer_types"][:LAYERS]
    return small


def make_small_model(model: Path, folder: Path) -> None:
    """Write a model folder with random weights in the model's dtype, and the model's tokenizer and other files."""
    import torch

    config = small_model_config(json.loads((model / "config.json").read_text(encoding="utf-8")))
    dtypes = {tensor.dtype for tensor in stored_tensors(model).values()} & DTYPES.keys()
    folder.mkdir(parents=True)
    files.write_json(folder / "config.json", config)
    torch.manual_seed(0)
    small = library_versions.new_model(
        library_versions.load_config(folder), dtype=getattr(torch, DTYPES[max(dtypes, default="F32")])
    )
    small.save_pretrained(folder)
    for file in model.iterdir():
        if file.is_file() and file.name != "config.json" and ".safetensors" not in file.name:
            shutil.copyfile(file, folder / file.name)
    files.write_json(folder / "config.json", config)  # save_pretrained writes it as transformers spells it


def first_rows(rows: Sequence[Row], count: int = ROWS, tokens: int = ROW_TOKENS) -> list[Row]:
    """The first rows with a trained token, each cut to ``tokens``. Raises UserError if there are none."""
    found: list[Row] = []
    for number in range(len(rows)):
        row = rows[number]
        if any(label != IGNORED for label in row["labels"][1:]):
            found.append(trained_window(row, tokens))
            if len(found) == count:
                return found
    if not found:
        raise UserError(
            "no row has a token to train on",
            where="dataset",
            fix="Check dataset.format and dataset.columns, or raise training.maxSequenceLength.",
        )
    return found


def make_small_run(stage: Stage, model: Path, rows: Sequence[Row]) -> Stage:
    """Make the small run's folder with tokenize done, as its stage ``tokenize``; the caller deletes the folder."""
    config = small_config(stage.config)
    paths = Paths(stage.paths.small_run, config.name)
    make_small_model(model, paths.models / "small")
    write_rows(rows, paths.datasets / "small")
    return write_tokenized(config, paths, stage.paths.resolved, paths.models / "small", paths.datasets / "small")


def write_rows(rows: Sequence[Row], folder: Path) -> None:
    """Write rows as a dataset that workers read."""
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    Dataset.from_list(list(rows)).save_to_disk(folder / "train")


def write_tokenized(config: RunConfig, paths: Paths, resolved: Path, model: Path, dataset: Path) -> Stage:
    """Write the files of a run whose tokenize has made ``model`` and ``dataset``; its stage ``tokenize``."""
    files.write_text(paths.config, yaml.safe_dump(config.as_keys(), sort_keys=False))
    files.write_bytes(paths.resolved, resolved.read_bytes())
    tokenized = Stage("tokenize", config, paths)
    tokenized.facts = {"model": str(model), "dataset": str(dataset)}  # absolute, which joins with any workspace
    tokenized.finish([])
    return tokenized


def other_stage(stage: Stage, name: str) -> Stage:
    """Another stage of the same run."""
    return Stage(name, stage.config, stage.paths, replace(stage.sources) if stage.sources else None)
