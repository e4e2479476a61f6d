"""The Neuron backend's rules (genvalues.accelerators.neuron_rules), applied to a run config and a config.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from genvalues.accelerators import neuron_rules
from genvalues.accelerators.architectures import Architecture, UnknownArchitecture, from_config, target_names
from genvalues.accelerators.instances import TRAINIUM, TRN1, TRN2
from genvalues.common.errors import UserError
from genvalues.common.problems import Problem
from genvalues.common.text import dotted
from llama_lora.config import RunConfig


def check(config: RunConfig, model_config: Mapping[str, Any], platform: str | None = None) -> list[UserError]:
    """Every setting that cannot be trained, with what to write instead.

    ``platform`` is trn1 or trn2, None where it is not known.
    """
    try:
        architecture = architecture_of(model_config)
    except UserError as error:
        return [error]
    return [_error(problem) for problem in problems(config, architecture, platform)]


def problems(config: RunConfig, architecture: Architecture, platform: str | None = None) -> Iterator[Problem]:
    """See ``check``."""
    if unsupported := list(neuron_rules.model_problems(architecture)):
        yield from unsupported  # the other rules apply to supported models
        return
    layout, training = config.parallelism, config.training
    # More processes on a node than the largest trn1 has cores.
    largest_trn1 = max(instance.cores for instance in TRAINIUM.values() if instance.generation is TRN1)
    if platform is None and layout.processes_per_node > largest_trn1:
        platform = TRN2.target
    targets, size = target_names(config.lora.target_modules), layout.tensor_parallel_size
    sizes = tensor_parallel_sizes(config, architecture, platform)
    yield from neuron_rules.target_problems(targets)
    yield from neuron_rules.query_key_value_problems(architecture, targets, size, sizes)
    yield from neuron_rules.size_problems(architecture, size, platform, sizes)
    yield from neuron_rules.length_problems(architecture, training.max_sequence_length, training.attention, size)
    yield from neuron_rules.process_problems(
        layout.nodes, layout.processes_per_node, layout.tensor_parallel_size, layout.data_parallel_size
    )
    yield from neuron_rules.shard_problems(config.backend, layout.shard_size, layout.data_parallel_size)


def warnings(config: RunConfig) -> list[str]:
    """What works, but may not be intended."""
    layout, training = config.parallelism, config.training
    found = neuron_rules.packed_flash_problems(training.attention, training.packing, config.dataset.format)
    warned = [str(_error(problem)) for problem in found]
    if layout.processes_per_node % layout.tensor_parallel_size:
        warned.append(
            f"parallelism.tensorParallelSize: the {layout.processes_per_node} processes of a node are not divisible by "
            f"{layout.tensor_parallel_size}, so some groups span two nodes and exchange activations over the network"
        )
    return warned


def architecture_of(model_config: Mapping[str, Any]) -> Architecture:
    """The architecture of a config.json. Raises UserError for a missing or invalid size."""
    try:
        return from_config(model_config)
    except UnknownArchitecture as error:
        fix = f"Use one of {neuron_rules.supported_models()}."
        raise UserError(f"config.json {error}", where="model", fix=fix) from None


def tensor_parallel_sizes(config: RunConfig, architecture: Architecture, platform: str | None = None) -> list[int]:
    """The sizes that divide the run's processes and over which the model can be split."""
    processes = config.parallelism.nodes * config.parallelism.processes_per_node
    divisors = [size for size in range(1, processes + 1) if processes % size == 0]
    return neuron_rules.possible_sizes(architecture, divisors, platform)


def _error(problem: Problem) -> UserError:
    return UserError(problem.what, where=dotted(problem.keys[0]), fix=problem.fix)
