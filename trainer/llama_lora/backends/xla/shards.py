"""Read optimum-neuron's LoRA checkpoints with torch alone: no Neuron library, no base model, one tensor at a time.

    checkpoint-N/adapter_default/
        adapter_config.json                                 PEFT's config
        adapter_shards/done                                 written when every rank has saved
        adapter_shards/mp_metadata_pp_rank_0.json           how parameters are split, and which layers are fused
        adapter_shards/model/dp_rank_00_tp_rank_XX_pp_rank_00.pt
                                           ....pt.tensors/  with xser: tensor_N.pt, referenced by the .pt

Written by optimum-neuron 0.4.5 (peft/peft_model.py, NeuronPeftModel.save_pretrained) through neuronx_distributed
(trainer/checkpoint.py, save_checkpoint) and torch_xla (utils/serialization.py, save). The result equals that of the
library's consolidation (models/training/checkpointing.py) bit for bit, except where that raises a KeyError: for
adapters without gate_proj and up_proj, such as the default (q_proj and v_proj).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from genvalues.accelerators.architectures import LINEAR, target_names
from genvalues.common.errors import UserError
from genvalues.common.json_files import InvalidJson, JsonNotFound, read_object
from llama_lora.adapter import CONFIG, PREFIX, check_kind
from llama_lora.backends.base import Adapter
from llama_lora.backends.xla import torch_files
from llama_lora.backends.xla.rules import architecture_of
from llama_lora.backends.xla.torch_files import COPY_ALL, TRAIN_AGAIN
from llama_lora.progress import track
from llama_lora.safetensors_files import is_finite

ADAPTER = "adapter_default"
SHARDS = "adapter_shards"
DONE = "done"
METADATA = "mp_metadata_pp_rank_0.json"
COUNTS = ("num_attention_heads", "num_key_value_heads", "kv_size_multiplier", "tp_size")  # in the metadata
MOST_HEADS = 65536
BASE_CONFIG = "base_config.json"  # a copy of the base model's config.json, if the trainer saved one
SHARD_NAME = re.compile(r"dp_rank_(\d+)_tp_rank_(\d+)_pp_rank_(\d+)\.pt")


def is_xla_checkpoint(folder: Path) -> bool:
    """Whether optimum-neuron wrote this folder, complete or not."""
    return (folder / ADAPTER / SHARDS).is_dir()


def read_adapter(checkpoint: Path) -> Adapter:
    """Read the adapter of a checkpoint-N folder, with PEFT's names, and check it without the base model.

    Peak memory is the adapter and the shards of one tensor. Raises UserError, naming the file or tensor, for

    - an unfinished save, or a rank's shard that is missing or damaged
    - shapes that do not fit r, or the base model if the checkpoint has a base_config.json
    - values that are not finite
    - replicated factors that differ between ranks: optimum-neuron 0.4.5 does not sum their gradients over the ranks,
      so no rank's values are right
    """
    folder = checkpoint / ADAPTER
    shards = folder / SHARDS
    if not is_xla_checkpoint(checkpoint):
        raise UserError(
            f"{ADAPTER}/{SHARDS} not found", where=str(checkpoint), fix="Pass a folder step-N or checkpoint-N."
        )
    if not (shards / DONE).is_file():
        raise UserError(
            f"the save is incomplete (no {DONE!r} marker)", where=str(shards), fix="Use an older checkpoint."
        )
    config = _adapter_config(folder)
    metadata = _metadata(shards)
    ranks = _open_ranks(shards, metadata)
    try:
        adapter = Adapter(_whole_tensors(ranks, metadata, config, shards), config)
    except UserError:
        raise
    except Exception as error:  # metadata of any content, which only using them checks
        what = f"the metadata do not describe the tensors ({type(error).__name__}: {error})"
        raise UserError(what, where=str(shards / METADATA), fix=TRAIN_AGAIN) from None
    _check_complete(adapter, shards)
    if (base_config := checkpoint / BASE_CONFIG).is_file():
        check_shapes(adapter, load_json(base_config), str(shards))
    return adapter


def _whole_tensors(
    ranks: Sequence[Rank], metadata: Mapping[str, Any], config: Mapping[str, Any], shards: Path
) -> dict[str, torch.Tensor]:
    """Put the ranks' parts of every tensor together."""
    replicas = Replicas()
    readers = _readers(metadata, replicas)
    fingerprints: list[list[bytes]] = [[] for _ in ranks]
    tensors: dict[str, torch.Tensor] = {}
    for name in track(ranks[0].entries, "tensor", len(ranks[0].entries)):
        pieces = [rank.tensor(name) for rank in ranks]
        _check_pieces(name, pieces, ranks, config["r"])
        reader = readers.get(name) or _reader_of_plain(name, metadata, replicas)
        for whole_name, whole in reader(pieces).items():
            tensors[whole_name] = whole
        if not replicas.shared(name):
            for digests, piece in zip(fingerprints, pieces, strict=True):
                digests.append(_digest(piece) if piece.any() else b"")
    replicas.check(shards)
    _check_no_rank_twice(fingerprints, ranks)
    return tensors


def expected_shapes(
    base_config: Mapping[str, Any], target_modules: Sequence[str] | str, r: int
) -> dict[str, list[int]]:
    """Map PEFT's name of every LoRA factor of a model to its shape (A [r, in], B [out, r]).

    Raises UserError if config.json lacks a size, or for an unknown module.
    """
    architecture = architecture_of(base_config)
    modules = sorted(target_names(target_modules))
    if unknown := [name for name in modules if name not in LINEAR]:
        raise UserError(
            f"no linear layer {', '.join(unknown)}",
            where="the base model",
            fix=f"Allowed values: {', '.join(LINEAR)}.",
        )
    shapes = {}
    for layer in range(architecture.layers):
        for name in modules:
            inner, outer = architecture.linear(name)
            module = f"{PREFIX}model.layers.{layer}.{LINEAR[name].block}.{name}"
            shapes[f"{module}.lora_A.weight"] = [r, inner]
            shapes[f"{module}.lora_B.weight"] = [outer, r]
    return shapes


def check_shapes(adapter: Adapter, base_config: Mapping[str, Any], where: str) -> None:
    """Raise UserError for the first tensor that is missing, unexpected, or of another shape than the base model's."""
    fix = "Use a checkpoint that was trained on this base model."
    if (layers := architecture_of(base_config).layers) > len(adapter.tensors):  # a number of layers without limit
        raise UserError(f"has {len(adapter.tensors)} tensors, the base model has {layers} layers", where=where, fix=fix)
    expected = expected_shapes(base_config, adapter.config["target_modules"], adapter.config["r"])
    for name, shape in expected.items():
        if name not in adapter.tensors:
            raise UserError(f"{name} not found, which the base model needs", where=where, fix=fix)
        found = list(adapter.tensors[name].shape)
        if found != shape:
            raise UserError(f"{name} has shape {found}, the base model needs {shape}", where=where, fix=fix)
    if more := sorted(adapter.tensors.keys() - expected.keys()):
        raise UserError(f"{more[0]} does not exist in the base model", where=where, fix=fix)


# Reading the tensors: one file per rank.


@dataclass(frozen=True)
class Rank:
    """A rank's shard file: tensors by name, or references to their files."""

    number: int
    path: Path
    entries: dict[str, Any]

    def tensor(self, name: str) -> torch.Tensor:
        """The rank's part of a parameter, memory-mapped from its file."""
        entry, path = self.entries[name], self.path
        if isinstance(entry, torch_files.TensorReference):
            path = path.parent / f"{path.name}.tensors" / f"tensor_{entry.tid}.pt"
            entry = torch_files.load(path)
        if not isinstance(entry, torch.Tensor):
            raise UserError(f"no tensor for {name}", where=str(path), fix=TRAIN_AGAIN)
        return entry


def _open_ranks(shards: Path, metadata: Mapping[str, Any]) -> list[Rank]:
    """Open the shard of every tensor-parallel rank, in order. Raises UserError if one is missing or there are more."""
    paths: dict[int, Path] = {}
    for path in sorted((shards / "model").glob("*.pt")):
        found = SHARD_NAME.fullmatch(path.name)
        if found is None:
            continue  # .pt.info.pt: shapes only
        data, tensor, pipeline = (int(number) for number in found.groups())
        if pipeline:
            raise UserError(
                "pipeline parallelism is not supported", where=str(path), fix="Train with tensor parallelism only."
            )
        if data == 0:
            paths[tensor] = path
    size = _tensor_parallel_size(metadata, shards)
    if size is None:
        size = max(paths, default=0) + 1
    for number in range(size):
        if number not in paths:
            missing = shards / "model" / f"dp_rank_00_tp_rank_{number:02d}_pp_rank_00.pt"
            raise UserError(
                f"shard of rank {number} of {size} not found",
                where=str(missing),
                fix=COPY_ALL,
            )
    if len(paths) > size:
        raise UserError(
            f"found shards of {len(paths)} ranks, but the training had {size}: the folder mixes two checkpoints",
            where=str(shards / "model"),
            fix=TRAIN_AGAIN,
        )
    ranks = []
    for number in range(size):
        entries = torch_files.load(paths[number])
        if not isinstance(entries, dict) or not entries or not all(isinstance(name, str) for name in entries):
            raise UserError("not a mapping of names to tensors", where=str(paths[number]), fix=TRAIN_AGAIN)
        ranks.append(Rank(number, paths[number], entries))
        if other := sorted(entries.keys() ^ ranks[0].entries.keys()):
            raise UserError(
                f"only one of this shard and rank 0's has {other[0]}", where=str(paths[number]), fix=TRAIN_AGAIN
            )
    return ranks


def _tensor_parallel_size(metadata: Mapping[str, Any], shards: Path) -> int | None:
    """The number of ranks in the metadata of split parameters and transformations; None if there are none."""
    sizes = {
        parameter["num_partitions"]
        for parameter in metadata["parameters"].values()
        if parameter.get("tensor_model_parallel") and parameter.get("num_partitions", -1) > 0
    }
    sizes |= {spec["tp_size"] for _, _, spec in _transformations(metadata) if "tp_size" in spec}
    if len(sizes) > 1:
        raise UserError(
            f"the metadata have several tensor-parallel sizes: {sorted(sizes)}", where=str(shards), fix=TRAIN_AGAIN
        )
    return sizes.pop() if sizes else None


def load_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of a checkpoint. Raises UserError."""
    try:
        return read_object(path)
    except JsonNotFound:
        raise UserError("file not found", where=str(path), fix=COPY_ALL) from None
    except InvalidJson as problem:
        raise UserError(f"file is damaged: it {problem}", where=str(path), fix=TRAIN_AGAIN) from None


def _metadata(shards: Path) -> dict[str, Any]:
    path = shards / METADATA
    metadata = load_json(path)
    try:
        for parameter in metadata["parameters"].values():
            parameter["tensor_model_parallel"]
            parameter.get("num_partitions", -1) > 0  # noqa: B015 - raises if it is not a number
        for _, _, settings in _transformations(metadata):
            if any(settings.get(name, 1) > MOST_HEADS for name in COUNTS):
                raise ValueError("more heads or workers than any model has")
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError("not metadata of optimum-neuron 0.4.5", where=str(path), fix=TRAIN_AGAIN) from None
    return metadata


def _transformations(metadata: Mapping[str, Any]) -> Iterable[tuple[str, str, dict[str, Any]]]:
    """Yield (module, kind, settings) of each transformation of the base model's layers."""
    for module in metadata["model_weight_transformation_specs"]:
        for kind, settings in module["specs"]:
            yield module["module_fully_qualified_name"], kind, settings


def _adapter_config(folder: Path) -> dict[str, Any]:
    """Read adapter_config.json and sort the target modules (the library writes a set)."""
    config = load_json(folder / CONFIG)
    check_kind(config, folder)
    targets = config.get("target_modules")
    if not isinstance(targets, list) or not targets:
        raise UserError(f"target_modules is {targets!r}", where=str(folder / CONFIG), fix=TRAIN_AGAIN)
    return {**config, "target_modules": sorted(targets), "inference_mode": True}


# Readers: one per saved name. A reader converts the ranks' pieces of a parameter to the base model's tensors.

Reader = Callable[[list[torch.Tensor]], dict[str, torch.Tensor]]


@dataclass
class Replicas:
    """Compares replicated tensors between ranks, and collects the differences."""

    compared: set[str] = field(default_factory=set)
    differences: list[tuple[float, str, int, int]] = field(default_factory=list)
    groups: int = 0

    def shared(self, name: str) -> bool:
        """Whether all ranks hold the same values of this parameter."""
        return name in self.compared

    def same(self, name: str, pieces: Sequence[torch.Tensor], ranks: Sequence[int] | None = None) -> torch.Tensor:
        """Return a copy of the first piece, and record how the others differ from it."""
        self.groups += 1
        if ranks is None:
            self.compared.add(name)
            ranks = range(len(pieces))
        for rank, piece in zip(ranks[1:], pieces[1:], strict=True):
            if not torch.equal(piece, pieces[0]):
                difference = (piece.float() - pieces[0].float()).abs().max().item()
                self.differences.append((difference, name, ranks[0], rank))
        return pieces[0].clone()

    def check(self, shards: Path) -> None:
        """Raise UserError with the largest difference, if there are any."""
        if not self.differences:
            return
        largest, name, first, second = max(self.differences)
        differing = len({name for _, name, _, _ in self.differences})
        raise UserError(
            f"{differing} of {self.groups} replicated factors differ between ranks, most of all {name}: "
            f"by {largest:.6g} between ranks {first} and {second}. "
            "The training did not keep them equal, so no rank's values are right",
            where=str(shards),
            fix="Train again with this image: optimum-neuron 0.4.5 alone does not sum their gradients.",
        )


def _readers(metadata: Mapping[str, Any], replicas: Replicas) -> dict[str, Reader]:
    """Readers of the parameters that were fused or permuted when the model was split, by saved name."""
    readers: dict[str, Reader] = {}
    for module, kind, settings in _transformations(metadata):
        if kind == "FusedLinearsSpec":
            readers |= _fused(module, settings, replicas)
        elif kind == "GQAQKVColumnParallelLinearSpec":
            readers |= _grouped_queries(module, settings, replicas)
        else:
            raise UserError(
                f"unknown transformation {kind} of {module}", where="the checkpoint's metadata", fix=TRAIN_AGAIN
            )
    return readers


def _reader_of_plain(name: str, metadata: Mapping[str, Any], replicas: Replicas) -> Reader:
    """The reader of an untransformed parameter, which is split along one dimension or replicated."""
    adapted = re.sub(r"\.(lora_[AB])\.", r".\1.default.", name)  # in the metadata the name includes the adapter's
    parameter = metadata["parameters"].get(adapted)
    if parameter is None or not re.fullmatch(r".*\.lora_[AB]\.weight", name):
        raise UserError(
            f"{name} is not a LoRA factor of a linear layer",
            where="the checkpoint",
            fix="Only plain LoRA is supported.",
        )
    if parameter["tensor_model_parallel"]:
        return lambda pieces: {name: torch.cat(pieces, dim=parameter["partition_dim"])}
    return lambda pieces: {name: replicas.same(name, pieces)}


def _fused(module: str, settings: Mapping[str, Any], replicas: Replicas) -> dict[str, Reader]:
    """Readers of gate_up_proj (and of qkv_proj with fuse_qkv and as many kv heads as heads): one A, concatenated Bs.

    As FusedLinearsSpec._lora_to_original_weights. Every rank has its part of the first B, then of the second.
    """
    fused, names = settings["fused_linear_name"], settings["linear_names"]
    if settings["fuse_axis"] not in (0, "column"):
        raise UserError(f"{module}.{fused} is fused by rows, which is not supported", where="the checkpoint's metadata")
    rows = [size // settings["tp_size"] for size in settings["original_dims"]]

    def second(pieces: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        parts = [_split(piece, rows, f"{module}.{fused}.lora_B") for piece in pieces]
        return {
            f"{module}.{name}.lora_B.weight": torch.cat(of_name)
            for name, of_name in zip(names, zip(*parts, strict=True), strict=True)
        }

    saved = f"{module}.{fused}.lora_A.weight"
    return {
        saved: partial(_for_each, replicas, saved, [f"{module}.{name}.lora_A.weight" for name in names]),
        f"{module}.{fused}.lora_B.weight": second,
    }


def _grouped_queries(module: str, settings: Mapping[str, Any], replicas: Replicas) -> dict[str, Reader]:
    """Readers of qkv_proj with more ranks than kv heads, which replicates kv heads and reorders query heads.

    As GQAQKVColumnParallelLinearSpec._lora_to_original_weights. o_proj's columns are in the order of the query heads.
    """
    fused, query, key, value, output = (
        settings[f"{kind}_projection_name"] for kind in ("gqa_qkv", "query", "key", "value", "output")
    )
    copies, ranks = settings["kv_size_multiplier"], settings["tp_size"]
    order = query_heads(settings["num_attention_heads"], settings["num_key_value_heads"], copies)
    back = torch.argsort(torch.tensor(order))
    q_rows, kv_rows = settings["q_output_size_per_partition"], settings["kv_output_size_per_partition"]

    def heads(pieces: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        whole = torch.cat(list(pieces))
        by_head = whole.view(len(order), -1, whole.shape[1])
        return {f"{module}.{query}.lora_B.weight": by_head[back].view(whole.shape)}

    def first_copy(name: str, pieces: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        holders = ranks // copies  # the number of ranks that together hold one copy of all kv heads
        parts = [
            replicas.same(f"{module}.{name}.lora_B.weight", pieces[rank::holders], range(rank, ranks, holders))
            for rank in range(holders)
        ]
        return {f"{module}.{name}.lora_B.weight": torch.cat(parts)}

    def all_three(pieces: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        parts = [_split(piece, [q_rows, kv_rows, kv_rows], f"{module}.{fused}.lora_B") for piece in pieces]
        of_query, of_key, of_value = zip(*parts, strict=True)
        return heads(of_query) | first_copy(key, of_key) | first_copy(value, of_value)

    def columns(pieces: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        whole = torch.cat(list(pieces), dim=1)
        by_head = whole.view(whole.shape[0], len(order), -1)
        return {f"{module}.{output}.lora_A.weight": by_head[:, back].view(whole.shape)}

    saved = f"{module}.{fused}.lora_A.weight"
    names = [f"{module}.{name}.lora_A.weight" for name in (query, key, value)]
    return {
        saved: partial(_for_each, replicas, saved, names),
        f"{module}.{fused}.lora_B.weight_q": heads,
        f"{module}.{fused}.lora_B.weight_k": partial(first_copy, key),
        f"{module}.{fused}.lora_B.weight_v": partial(first_copy, value),
        f"{module}.{fused}.lora_B.weight_qkv": all_three,
        f"{module}.{output}.lora_A.weight": columns,
    }


def query_heads(heads: int, kv_heads: int, copies: int) -> list[int]:
    """List the model's query heads in the order of the ranks.

    The ranks hold all kv heads, then all of them again, ``copies`` times. Each copy serves an equal
    share of its queries.
    """
    queries = heads // kv_heads
    share = queries // copies
    return [
        kv_head * queries + copy * share + query
        for copy in range(copies)
        for kv_head in range(kv_heads)
        for query in range(share)
    ]


def _for_each(
    replicas: Replicas, saved: str, names: Sequence[str], pieces: Sequence[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Copy one replicated factor to several layers."""
    shared = replicas.same(saved, pieces)
    return {name: shared.clone() for name in names}


def _split(piece: torch.Tensor, rows: Sequence[int], name: str) -> Sequence[torch.Tensor]:
    if piece.shape[0] != sum(rows):
        raise UserError(
            f"{name} has {piece.shape[0]} rows on a rank, expected {sum(rows)} from the metadata",
            where="the checkpoint",
            fix=TRAIN_AGAIN,
        )
    parts: Sequence[torch.Tensor] = torch.split(piece, list(rows))
    return parts


# Checks.


def _check_pieces(name: str, pieces: Sequence[torch.Tensor], ranks: Sequence[Rank], r: int) -> None:
    """Check that ranks have the same dtype and shape, that the LoRA rank is r, and that all values are finite."""
    first = pieces[0]
    for rank, piece in zip(ranks, pieces, strict=True):
        if piece.dtype != first.dtype or piece.shape != first.shape:
            raise UserError(
                f"{name} is {piece.dtype} {list(piece.shape)} on rank {rank.number}, "
                f"and {first.dtype} {list(first.shape)} on rank 0",
                where=str(rank.path),
                fix=TRAIN_AGAIN,
            )
        if not piece.is_floating_point() or not is_finite(piece):
            raise UserError(
                f"{name} contains values that are not finite",
                where=str(rank.path),
                fix="Train again with a lower learning rate.",
            )
    dimension = 0 if ".lora_A." in name else 1
    if first.dim() != 2 or first.shape[dimension] != r:
        raise UserError(
            f"{name} has shape {list(first.shape)}, but {CONFIG} says r = {r}",
            where=str(ranks[0].path),
            fix=TRAIN_AGAIN,
        )


def _digest(piece: torch.Tensor) -> bytes:
    return hashlib.sha256(piece.contiguous().view(torch.uint8).numpy().data).digest()


def _check_no_rank_twice(fingerprints: Sequence[Sequence[bytes]], ranks: Sequence[Rank]) -> None:
    """Detect a rank's file under another rank's name: all its split parts are equal. Zeros are ignored."""
    seen: dict[tuple[bytes, ...], Rank] = {}
    for rank, digests in zip(ranks, fingerprints, strict=True):
        if not any(digests):
            continue
        if (same := seen.setdefault(tuple(digests), rank)) is not rank:
            raise UserError(
                f"equals the shard of rank {same.number}, so it is not rank {rank.number}'s",
                where=str(rank.path),
                fix=COPY_ALL,
            )


def _check_complete(adapter: Adapter, shards: Path) -> None:
    """Check that every layer has both factors, and that the layers are those of the target modules."""
    found = set()
    for name in adapter.tensors:
        other = name.replace(".lora_A.", ".lora_B.") if ".lora_A." in name else name.replace(".lora_B.", ".lora_A.")
        if other not in adapter.tensors:
            raise UserError(f"{name} has no matching {other}", where=str(shards), fix=TRAIN_AGAIN)
        found.add(name.split(".lora_")[0].rsplit(".", 1)[-1])
    targets = adapter.config["target_modules"]
    if found != set(targets):
        raise UserError(
            f"has LoRA on {', '.join(sorted(found))}, but {CONFIG} lists {', '.join(targets)}",
            where=str(shards),
            fix=TRAIN_AGAIN,
        )
