"""A LoRA adapter on disk, as PEFT writes it: adapter_model.safetensors and adapter_config.json."""

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
PREFIX = "base_model.model."  # what PEFT puts before the base model's own names


@dataclass(frozen=True)
class Delta:
    """What an adapter adds to one weight: scaling x B A. ``a`` is [r, in], ``b`` is [out, r]."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float

    @property
    def shape(self) -> list[int]:
        return [self.b.shape[0], self.a.shape[1]]

    def weight(self) -> torch.Tensor:
        """The delta, fp32 [out, in], computed as peft 0.17 does in merge_and_unload()."""
        return (self.b.float() @ self.a.float()) * self.scaling


def write_adapter(folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    """Write an adapter that plain peft loads."""
    from safetensors.torch import save_file

    save_file(dict(tensors), folder / WEIGHTS, metadata={"format": "pt"})
    files.write_json(folder / CONFIG, config)


def read_deltas(folder: Path) -> dict[str, Delta]:
    """Base weight name -> what the adapter adds to it.

    Raises UserError for a folder that holds no LoRA adapter, or one of a kind that this does not merge.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except FileNotFoundError as error:
        missing = Path(error.filename or folder / WEIGHTS).name
        raise UserError(
            f"has no {missing}", where=str(folder), fix="Give a folder that consolidate has written."
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
            raise UserError(f"has {name} without its lora_B", where=str(folder / WEIGHTS))
        target = name.removeprefix(PREFIX).replace(".lora_A.weight", ".weight")
        scale = config["r"] ** 0.5 if config.get("use_rslora") else config["r"]
        deltas[target] = Delta(a, b, config["lora_alpha"] / scale)
    if len(deltas) * 2 != len(tensors):
        other = sorted(name for name in tensors if ".lora_A." not in name and ".lora_B." not in name)
        raise UserError(f"holds more than LoRA factors: {', '.join(other[:3])}", where=str(folder / WEIGHTS))
    return deltas


def check_kind(config: Mapping[str, Any], folder: Path) -> None:
    """Refuse what is not plain LoRA on linear layers, by the setting that makes it so."""
    where = str(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        raise UserError(f"peft_type is {config.get('peft_type')}", where=where, fix="Only LORA can be merged.")
    wanted = {"bias": "none", "fan_in_fan_out": False}
    for key, value in wanted.items():
        if config.get(key, value) != value:
            raise UserError(f"{key} is {config[key]!r}", where=where, fix=f"Only {value!r} can be merged.")
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), (int, float)) or config[key] <= 0:
            raise UserError(f"{key} is {config.get(key)!r}", where=where, fix="Write the number it was trained with.")
    for key in ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "layer_replication", "lora_bias"):
        if config.get(key):
            raise UserError(f"{key} is set", where=where, fix="Only plain LoRA can be merged.")
