"""Read and write a LoRA adapter in PEFT's format: adapter_model.safetensors and adapter_config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genvalues.common import files
from genvalues.common.errors import UserError

if TYPE_CHECKING:
    import torch

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."  # PEFT puts this before the base model's parameter names


@dataclass(frozen=True)
class Delta:
    """The change of one weight by an adapter: scaling x B A. ``a`` is [r, in], ``b`` is [out, r]."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float

    @property
    def shape(self) -> list[int]:
        return [self.b.shape[0], self.a.shape[1]]

    def weight(self) -> torch.Tensor:
        """Compute the delta, fp32 [out, in], as merge_and_unload() of peft does (0.17 to 0.21)."""
        return (self.b.float() @ self.a.float()) * self.scaling


def write_adapter(folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    """Write an adapter that PEFT can load."""
    from safetensors.torch import save_file

    save_file(dict(tensors), folder / WEIGHTS, metadata={"format": "pt"})
    files.write_json(folder / CONFIG, config)


def read_deltas(folder: Path) -> dict[str, Delta]:
    """Map each base weight's name to its delta.

    Raises UserError if the folder has no LoRA adapter, or one of an unsupported kind.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except FileNotFoundError as error:
        missing = Path(error.filename or folder / WEIGHTS).name
        raise UserError(
            f"{missing} not found", where=str(folder), fix="Pass the output folder of consolidate."
        ) from None
    except (ValueError, SafetensorError) as error:
        raise UserError(f"cannot be read: {error}", where=str(folder)) from None
    check_kind(config, folder)
    deltas = {}
    for name, a in tensors.items():
        if ".lora_A." not in name:
            continue
        b = tensors.get(name.replace(".lora_A.", ".lora_B."))
        if b is None:
            raise UserError(f"{name} has no matching lora_B", where=str(folder / WEIGHTS))
        target = name.removeprefix(PREFIX).replace(".lora_A.weight", ".weight")
        scale = config["r"] ** 0.5 if config.get("use_rslora") else config["r"]
        deltas[target] = Delta(a, b, config["lora_alpha"] / scale)
    if len(deltas) * 2 != len(tensors):
        other = sorted(name for name in tensors if ".lora_A." not in name and ".lora_B." not in name)
        raise UserError(
            f"contains tensors other than LoRA factors: {', '.join(other[:3])}", where=str(folder / WEIGHTS)
        )
    return deltas


def check_kind(config: Mapping[str, Any], folder: Path) -> None:
    """Raise UserError, naming the setting, unless the adapter is plain LoRA on linear layers."""
    where = str(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        raise UserError(f"peft_type is {config.get('peft_type')}", where=where, fix="Only LORA can be merged.")
    required = {"bias": "none", "fan_in_fan_out": False}
    for key, value in required.items():
        if config.get(key, value) != value:
            raise UserError(f"{key} is {config[key]!r}", where=where, fix=f"Only {value!r} can be merged.")
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), (int, float)) or config[key] <= 0:
            raise UserError(f"{key} is {config.get(key)!r}", where=where, fix="Set the value used in training.")
    for key in ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "layer_replication", "lora_bias"):
        if config.get(key):
            raise UserError(f"{key} is set", where=where, fix="Only plain LoRA can be merged.")
