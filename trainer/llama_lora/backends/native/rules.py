"""The rules of native (genvalues.accelerators.native_rules), applied to a run config and a model folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

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

PARTS = ("model.embed_tokens.", "model.layers.", "model.norm.", "lm_head.")  # of a Llama: how its parameters are named
# The key of config.json that limits what a token attends to in a layer of this type (layer_types).
WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}


class Structure(NamedTuple):
    """What the engine must know of a model.

    ``linear_layers``: their names. ``misfit``: why the engine cannot compute the model; empty if it can.
    ``window``: the longest row in which every token attends to all before it; None for any. ``recurrent``: the types of
    layers that are no attention, which no mask keeps from carrying one packed example into the next.
    """

    linear_layers: list[str]
    misfit: str
    window: int | None
    recurrent: list[str]


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
        yield from native_rules.model_problems(architecture)
    else:
        if structure.misfit:
            yield Problem(native_rules.MODEL, structure.misfit, "Use a Llama, Qwen3 or Granite.")
        yield from native_rules.weight_problems(architecture)
    training = config.training
    if structure.recurrent and training.packing and training.isolates_examples:
        what = f"{structure.recurrent[0]} layers carry each packed example into the next in its row"
        yield Problem(key_paths("training.packing"), what, "Write packing: false to keep them apart.")
    targets = config.lora.target_modules
    for name in [] if targets == "all-linear" else targets:
        if name not in structure.linear_layers:
            fix = f"Allowed values: {', '.join(structure.linear_layers)}."
            yield Problem(key_paths("lora.targetModules"), f"the model has no linear layer {name!r}", fix)
    layout = config.parallelism
    sizes = [size for size in range(1, layout.processes_per_node + 1) if layout.processes_per_node % size == 0]
    yield from native_rules.size_problems(architecture, layout.tensor_parallel_size, sizes)
    yield from native_rules.length_problems(
        training.max_sequence_length,
        training.attention,
        config.device,
        replace(architecture, sliding_window=structure.window),  # of transformers, whose classes have defaults
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
    types = getattr(model.config, "layer_types", None) or []
    recurrent = {each for each in types if each != "full_attention" and each not in WINDOWS}
    return Structure(sorted(linear), misfit_of(model), window_of(model.config), sorted(recurrent))


def misfit_of(model: Any) -> str:
    """See ``Structure``."""
    config, decoder = model.config, getattr(model, "model", None)
    parts = all(hasattr(decoder, name) for name in ("embed_tokens", "layers", "norm")) and hasattr(model, "lm_head")
    others = any(not name.startswith(PARTS) for name, _ in model.named_parameters())
    if not parts or others or any(getattr(config, name, None) for name in ("final_logit_softcapping", "logit_scale")):
        return f"the engine needs a decoder with the parts of a Llama; {config.model_type} has others"
    if not model._supports_sdpa:  # of the class in transformers: softcapped scores and attention sinks, for example
        return f"the engine computes attention with PyTorch's SDPA, which {type(model).__name__} does not support"
    return ""


def window_of(config: Any) -> int | None:
    """See ``Structure``. A key that the class of the config does not declare has no effect, as in a Llama's."""
    types = config.layer_types if hasattr(type(config), "layer_types") else None  # None: all layers are alike
    windows = [
        getattr(config, key)
        for layer_type, key in WINDOWS.items()
        if hasattr(type(config), key) and (types is None or layer_type in types)
    ]
    return min((window for window in windows if window is not None), default=None)
