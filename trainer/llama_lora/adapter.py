"""Read and write a LoRA adapter in PEFT's format: adapter_model.safetensors and adapter_config.json."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genvalues.common import files
from genvalues.common.errors import UserError
from genvalues.common.json_files import InvalidJson, JsonNotFound, read_object
from genvalues.common.text import one_line
from llama_lora.limits import limited
from llama_lora.safetensors_files import DTYPES, is_finite, read_header

if TYPE_CHECKING:
    import torch

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."  # PEFT puts this before the base model's parameter names
FACTOR = re.compile(rf"{re.escape(PREFIX)}.+\.lora_[AB]\.weight")
MOST_ALPHA = 65536  # as lora.alpha
# Keys of PEFT's LoraConfig (0.17 to 0.21) that plain LoRA may have, because they do not change what a factor adds.
# Any other one that is set has PEFT compute something else, read further files or import a module.
PLAIN_KEYS = """
task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode r target_modules
exclude_modules lora_alpha lora_dropout fan_in_fan_out bias use_rslora init_lora_weights layers_to_transform
layers_pattern megatron_core eva_config qalora_group_size runtime_config ensure_weight_tying
"""
PLAIN = frozenset(PLAIN_KEYS.split())
# The others (pissa, olora, corda, loftq, lora_ga) also change the base weights:
# https://huggingface.co/docs/peft/package_reference/lora
INITIALIZATIONS = (None, True, False, "gaussian", "eva", "orthogonal")
CHOICES = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")  # of modules
ALL_LINEAR = "all-linear"  # all but the output layer
CONSOLIDATE = "Pass the output folder of consolidate."
OWN_CONFIG = f"Use the {CONFIG} that was saved with the factors."
TRAIN_LOWER = "Train again with a lower learning rate."


@dataclass(frozen=True)
class Delta:
    """The change of one weight by an adapter: scaling x B A. ``a`` is fp32 [r, in], ``b`` is fp32 [out, r]."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float

    @property
    def shape(self) -> list[int]:
        return [self.b.shape[0], self.a.shape[1]]

    def added_to(self, rows: torch.Tensor, first: int) -> torch.Tensor:
        """Add the delta to ``rows`` [n, in] of the weight, of which the first is row ``first``.

        Product, scaling and sum are fp32, and the sum is rounded once to the weight's dtype, as merge_and_unload() of
        peft does for the whole weight (0.17 to 0.21). In place, because fresh memory costs more than the arithmetic.
        """
        changed = self.b[first : first + len(rows)] @ self.a
        changed *= self.scaling
        changed += rows
        return changed.to(rows.dtype)


def write_adapter(folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    """Write an adapter that PEFT can load."""
    from safetensors.torch import save_file

    save_file(dict(tensors), folder / WEIGHTS, metadata={"format": "pt"})
    files.write_json(folder / CONFIG, config)


def read_deltas(folder: Path) -> dict[str, Delta]:
    """Map each base weight's name to its delta.

    Raises UserError if the folder has no LoRA adapter, one of an unsupported kind, or one whose files do not fit each
    other or have values that are not finite.
    """
    from safetensors.torch import load_file

    config = read_adapter_config(folder)
    weights = folder / WEIGHTS
    if not weights.exists():
        raise UserError(f"{WEIGHTS} not found", where=str(folder), fix=CONSOLIDATE)
    header = read_header(weights).tensors
    if other := sorted(name for name in header if not FACTOR.fullmatch(name)):
        raise UserError(f"contains tensors other than LoRA factors: {', '.join(other[:3])}", where=str(weights))
    check_targets(header, config, weights)
    r = config["r"]
    scaling = config["lora_alpha"] / (r**0.5 if config.get("use_rslora") else r)
    for name, factor in header.items():
        if factor.dtype not in DTYPES:
            raise UserError(f"{name} has dtype {factor.dtype}", where=str(weights), fix=f"Use {', '.join(DTYPES)}.")
        if len(factor.shape) != 2 or factor.shape[0 if ".lora_A." in name else 1] != r:
            raise UserError(f"{name} has shape {factor.shape}, but {CONFIG} says r = {r}", where=str(weights))
        if (other_name := other_factor(name)) not in header:
            kind = "lora_B" if ".lora_A." in name else "lora_A"
            raise UserError(f"{name} has no matching {kind} ({other_name})", where=str(weights))
    tensors = {name: tensor.float() for name, tensor in load_file(weights).items()}
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise UserError(f"{name} contains values that are not finite", where=str(weights), fix=TRAIN_LOWER)
    return {
        name.removeprefix(PREFIX).replace(".lora_A.weight", ".weight"): Delta(a, tensors[other_factor(name)], scaling)
        for name, a in tensors.items()
        if ".lora_A." in name
    }


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Read adapter_config.json. Raises UserError unless it is one of plain LoRA."""
    try:
        config = read_object(folder / CONFIG)
    except JsonNotFound:
        raise UserError(f"{CONFIG} not found", where=str(folder), fix=CONSOLIDATE) from None
    except InvalidJson as problem:
        raise UserError(f"{CONFIG} {problem}", where=str(folder)) from None
    check_kind(config, folder)
    return config


def other_factor(name: str) -> str:
    """The name of the factor B of an A, or the reverse."""
    first, kind, second = name.rpartition(".lora_A.") if ".lora_A." in name else name.rpartition(".lora_B.")
    return f"{first}{'.lora_B.' if kind == '.lora_A.' else '.lora_A.'}{second}"


def check_targets(names: Iterable[str], config: Mapping[str, Any], file: Path) -> None:
    """Raise UserError unless the factors are those of modules that PEFT adapts: it ignores the others."""
    targets = config["target_modules"] if isinstance(config["target_modules"], list) else []
    modules = {name.removeprefix(PREFIX).partition(".lora_")[0] for name in names}
    if not modules:
        return
    if unused := {each for each in targets if not any(is_one_of(module, [each]) for module in modules)}:
        what = f"has no factor of {min(unused)}, which {CONFIG} lists in target_modules"
        raise UserError(what, where=str(file), fix=OWN_CONFIG)
    if ignored := modules - adapted(config, modules, file):
        keys = [key for key in CHOICES if config.get(key)]
        what = f"has factors of {min(ignored)}, which {CONFIG} does not list or excludes ({', '.join(keys)})"
        raise UserError(what, where=str(file), fix=OWN_CONFIG)


def adapted(config: Mapping[str, Any], modules: Iterable[str], file: Path) -> set[str]:
    """Those of the modules that PEFT adapts by the config of this file. Raises UserError if choosing takes too long."""
    with limited_patterns(file):
        return {module for module in modules if adapts(config, module)}


def limited_patterns(where: Path) -> AbstractContextManager[None]:
    """Limit the time of the block: a regular expression can take years."""
    return limited(f"choosing modules by {CONFIG} ({', '.join(CHOICES)})", str(where), OWN_CONFIG)


def adapts(config: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT adapts the module of this full name.

    The rules are those of peft.tuners.tuners_utils.check_target_module_exists (0.17 to 0.21).
    """
    targets, excluded = config["target_modules"], config.get("exclude_modules")
    if excluded and (re.fullmatch(excluded, module) if isinstance(excluded, str) else is_one_of(module, excluded)):
        return False
    if not isinstance(targets, str):
        return module in targets or (is_one_of(module, targets) and is_in_chosen_layer(config, module))
    if targets.lower() == ALL_LINEAR:
        return module != "lm_head"
    return re.fullmatch(targets, module) is not None


def is_one_of(module: str, names: Iterable[str]) -> bool:
    """Whether a module's full name is one of ``names``, or ends with "." and one of them."""
    return any(module == name or module.endswith(f".{name}") for name in names)


def is_in_chosen_layer(config: Mapping[str, Any], module: str) -> bool:
    """Whether layers_to_transform has the first number in a module's name, or there is no such choice."""
    chosen = config.get("layers_to_transform")
    if chosen is None or chosen == []:
        return True
    numbers = {str(number) for number in ([chosen] if isinstance(chosen, int) else chosen)}
    matches = (re.match(pattern, module) for pattern in layer_patterns(config))
    first = next((match for match in matches if match), None)
    return first is not None and first["idx"] in numbers


def layer_patterns(config: Mapping[str, Any]) -> list[str]:
    """The patterns of a layer's number in a module's name, as PEFT makes them of layers_pattern."""
    names = config.get("layers_pattern") or []
    patterns = [rf"(?:^|.*?\.){name}\.(?P<idx>\d+)\." for name in ([names] if isinstance(names, str) else names)]
    return patterns or [r".*?\.[^.]*\.(?P<idx>\d+)\."]


def check_kind(config: Mapping[str, Any], folder: Path) -> None:
    """Raise UserError, naming the setting, unless the adapter is plain LoRA on linear layers."""
    where = str(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        raise UserError(f"peft_type is {config.get('peft_type')}", where=where, fix="Only LORA can be merged.")
    required = {"bias": "none", "fan_in_fan_out": False}
    for key, value in required.items():
        if config.get(key, value) != value:
            raise UserError(f"{key} is {config[key]!r}", where=where, fix=f"Only {value!r} can be merged.")
    r, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(r, int) or isinstance(r, bool) or r <= 0:
        raise UserError(f"r is {r!r}", where=where, fix="Set the value used in training.")
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not 0 < alpha <= MOST_ALPHA:
        raise UserError(f"lora_alpha is {alpha!r}", where=where, fix="Set the value used in training.")
    if not isinstance(config.get("use_rslora", False), bool):
        raise UserError(f"use_rslora is {config['use_rslora']!r}", where=where, fix="Allowed values: true, false.")
    check_choices(config, where)
    for key in sorted(config.keys() - PLAIN):
        if config[key]:
            raise UserError(f"{key} is set", where=where, fix="Only plain LoRA can be merged.")
    if (initial := config.get("init_lora_weights")) not in INITIALIZATIONS:
        raise UserError(
            f"init_lora_weights is {initial!r}, which also changes the base weights",
            where=where,
            fix="Convert it to plain LoRA first (PEFT: path_initial_model_for_weight_conversion).",
        )


def check_choices(config: Mapping[str, Any], where: str) -> None:
    """Raise UserError unless the settings that choose modules have values that PEFT accepts."""
    fix = "Set the value used in training."
    for key in ("target_modules", "exclude_modules", "layers_pattern"):
        value = config.get(key)
        if value is None and key != "target_modules":
            continue
        if not isinstance(value, str) and not (
            isinstance(value, list) and all(isinstance(name, str) and name for name in value)
        ):
            raise UserError(f"{key} is not a list of names, nor a pattern", where=where, fix=fix)
    layers = config.get("layers_to_transform")
    numbers = layers if isinstance(layers, list) else [] if layers is None else [layers]
    if any(not isinstance(number, int) or isinstance(number, bool) for number in numbers):
        raise UserError("layers_to_transform is not a list of numbers", where=where, fix=fix)
    patterned, pattern = isinstance(config["target_modules"], str), config.get("layers_pattern")
    if patterned and (layers is not None or pattern is not None):
        what = "layers_to_transform and layers_pattern cannot be combined with a pattern in target_modules"
        raise UserError(what, where=where, fix=fix)
    if pattern and layers is None:
        raise UserError("layers_pattern is set, and layers_to_transform is not", where=where, fix=fix)
    patterns = [each for key in ("target_modules", "exclude_modules") if isinstance(each := config.get(key), str)]
    for each in [*patterns, *layer_patterns(config)]:
        try:
            with limited_patterns(Path(where)):
                re.compile(each)
        except (re.error, OverflowError, RecursionError) as error:
            raise UserError(f"{one_line(each)!r} is not a valid pattern: {error}", where=where, fix=fix) from None
