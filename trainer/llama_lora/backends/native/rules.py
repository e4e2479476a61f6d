"""The rules of native (genvalues.accelerators.native_rules), applied to a run config and a model folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from genvalues.accelerators import native_rules
from genvalues.accelerators.architectures import Architecture, UnknownArchitecture, from_config
from genvalues.accelerators.neuron_rules import process_problems, shard_problems
from genvalues.common.errors import UserError
from genvalues.common.problems import Problem, key_paths
from genvalues.common.text import dotted, one_line
from llama_lora import library_versions
from llama_lora.config import RunConfig
from llama_lora.model_files import read_model_json


class Structure(NamedTuple):
    """What the engine must know of a model: the names of its linear layers, and whether it has the parts it calls."""

    linear_layers: list[str]
    fits: bool


def check(config: RunConfig, model: Path) -> list[UserError]:
    """Every setting that cannot be trained, with what to write instead."""
    try:
        architecture = from_config(read_model_json(model / "config.json"))
    except UnknownArchitecture as error:
        return [UserError(f"config.json {error}", where="model", fix="Use a Llama, or another causal language model.")]
    structure = structure_of(model)
    found = [*problems(config, architecture, structure)]
    return [UserError(problem.what, where=dotted(problem.keys[0]), fix=problem.fix) for problem in found]


def problems(config: RunConfig, architecture: Architecture, structure: Structure) -> Iterator[Problem]:
    """See ``check``."""
    if config.device != "cpu" or architecture.supported:  # on the CPU, other models with the parts of a Llama train too
        yield from native_rules.model_problems(architecture, config.training.attention)
    elif not structure.fits:
        what = f"the engine needs a decoder with the parts of a Llama; {architecture.model_type} has others"
        yield Problem(native_rules.MODEL, what, "Use a Llama, Qwen3 or Granite.")
    targets = config.lora.target_modules
    for name in [] if targets == "all-linear" else targets:
        if name not in structure.linear_layers:
            fix = f"Allowed values: {', '.join(structure.linear_layers)}."
            yield Problem(key_paths("lora.targetModules"), f"the model has no linear layer {name!r}", fix)
    layout = config.parallelism
    sizes = [size for size in range(1, layout.processes_per_node + 1) if layout.processes_per_node % size == 0]
    yield from native_rules.size_problems(architecture, layout.tensor_parallel_size, sizes)
    training = config.training
    yield from native_rules.length_problems(
        training.max_sequence_length, training.attention, config.device, architecture
    )
    yield from process_problems(
        layout.nodes, layout.processes_per_node, layout.tensor_parallel_size, layout.data_parallel_size
    )
    yield from shard_problems(config.backend, layout.shard_size, layout.data_parallel_size)


def structure_of(path: Path) -> Structure:
    """Build the model without weights. Its output layer is no LoRA target."""
    try:
        model = library_versions.empty_model(library_versions.load_config(path))
    except Exception as error:  # of any kind, for a config.json with wrong values
        what = one_line(f"{type(error).__name__}: {error}", 200)
        raise UserError(f"transformers cannot build the model: {what}", where=str(path / "config.json")) from None
    output = model.get_output_embeddings()
    linear = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not output
    }
    decoder = getattr(model, "model", None)
    parts = all(hasattr(decoder, name) for name in ("embed_tokens", "layers", "norm")) and hasattr(model, "lm_head")
    scales_logits = any(getattr(model.config, name, None) for name in ("final_logit_softcapping", "logit_scale"))
    return Structure(sorted(linear), parts and not scales_logits)
