"""merge and consolidate as tools: numbers, shapes and byte ranges that do not fit end with status 2 and no output."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from genvalues.common import files
from genvalues.common.errors import UserError
from llama_lora import limits
from llama_lora.adapter import adapts
from llama_lora.backends.native import regions, shards
from llama_lora.safetensors_files import read_header, stored_tensors
from llama_lora.stages import merge as merge_stage
from trainer.conftest import Run, llama_lora_here, make_model, write_checkpoint_record
from trainer.test_consolidate import checkpoint_of
from trainer.test_merge import make_adapter
from trainer.untrusted import write_header

Q = "base_model.model.model.layers.1.self_attn.q_proj"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_model(tmp_path / "base")


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return make_adapter(base, tmp_path / "adapter")


def merge_is_refused(base: Path, adapter: Path) -> str:
    output = base.parent / "merged"
    said = llama_lora_here("merge", "--base", str(base), "--adapter", str(adapter), "--output", str(output), status=2)
    assert len(said.strip().splitlines()) == 1, said
    assert not [path for path in base.parent.iterdir() if path.is_dir() and "merged" in path.name]
    return said


def consolidate_is_refused(checkpoint: Path, tmp_path: Path) -> str:
    command = ("consolidate", "--checkpoint", str(checkpoint), "--output", str(tmp_path / "consolidated"))
    said = llama_lora_here(*command, status=2)
    assert len(said.strip().splitlines()) == 1, said
    assert not [path for path in tmp_path.iterdir() if path.is_dir() and "consolidated" in path.name]
    return said


# --- the adapter's config


@pytest.mark.parametrize("key", ["r", "lora_alpha"])
@pytest.mark.parametrize(
    "value", ["NaN", "Infinity", "-Infinity", "true", "1e400", "-1", "0", '"8"', "null", "[4]", "1e308"]
)
def test_a_rank_or_alpha_that_is_no_sensible_number_is_refused(base: Path, adapter: Path, key: str, value: str) -> None:
    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, key: "HERE"}).replace('"HERE"', value))
    assert "adapter_config.json" in merge_is_refused(base, adapter)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"r": 8}, ["has shape [4, 32]", "r = 8"]),
        ({"r": 10**30}, ["r = 1000"]),
        ({"init_lora_weights": "pissa"}, ["init_lora_weights", "base weights"]),
        ({"use_rslora": "yes"}, ["use_rslora"]),
        ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, ["no factor of k_proj"]),
        ({"target_modules": ["q_proj"]}, ["v_proj", "does not list"]),
        ({"target_modules": [1]}, ["target_modules"]),
        ({"target_modules": 5}, ["target_modules is not a list of names"]),
        ({"target_modules": {"q_proj": 1}}, ["target_modules is not a list of names"]),
        ({"target_modules": None}, ["target_modules is not a list of names"]),
        ({"target_modules": r".*layers\.0\..*"}, ["layers.1.self_attn.q_proj", "does not list"]),
        ({"target_modules": "q_proj"}, ["does not list"]),  # a pattern of the whole name
        ({"target_modules": "(q_proj"}, ["'(q_proj' is not a valid pattern"]),
        ({"target_modules": ".*_proj", "layers_to_transform": [0, 1]}, ["cannot be combined"]),
        ({"exclude_modules": ["q_proj"]}, ["q_proj", "exclude_modules"]),
        ({"exclude_modules": r"model\.layers\.1\..*"}, ["layers.1.self_attn.q_proj", "exclude_modules"]),
        ({"exclude_modules": 5}, ["exclude_modules is not"]),
        ({"layers_to_transform": [0]}, ["layers.1.self_attn.q_proj", "layers_to_transform"]),
        ({"layers_to_transform": 1}, ["layers.0.self_attn.q_proj", "layers_to_transform"]),
        ({"layers_to_transform": "x"}, ["layers_to_transform is not a list of numbers"]),
        ({"layers_to_transform": [0, 1], "layers_pattern": "blocks"}, ["layers.0.self_attn.q_proj", "layers_pattern"]),
        ({"layers_to_transform": [0, 1], "layers_pattern": ["("]}, ["is not a valid pattern"]),
        ({"layers_pattern": "layers"}, ["layers_to_transform is not"]),
        ({"megatron_config": {"a": 1}, "megatron_core": "os"}, ["megatron_config is set"]),
        ({"corda_config": {"cache_file": "/x"}}, ["corda_config is set"]),
        ({"a_key_of_a_later_peft": "on"}, ["a_key_of_a_later_peft is set"]),
    ],
)  # fmt: skip
def test_a_config_that_does_not_fit_its_factors_or_means_more_than_lora_is_refused(
    base: Path, adapter: Path, changes: dict[str, Any], words: list[str]
) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    said = merge_is_refused(base, adapter)
    assert not [word for word in words if word not in said], said


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": r"(([a-z0-9_]+\.?)+)+\d"},
        {"exclude_modules": r"(([a-z0-9_]+\.?)+)+\d"},
        {"layers_to_transform": [0, 1], "layers_pattern": [r"((([a-z0-9_]+\.?)+)+)+!"]},
        {"target_modules": "(?:a|b)" * 100_000},
    ],
    ids=["target", "exclude", "layers", "long"],
)
def test_a_pattern_that_takes_too_long_is_refused(
    base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    monkeypatch.setattr(limits, "SECONDS", 0.1)
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    assert "adapter_config.json (target_modules, " in (said := merge_is_refused(base, adapter)), said
    assert "takes more than 0.1 seconds" in said


# --- the adapter's factors


def change_factors(adapter: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = change(load_file(file))
    file.unlink()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


def with_value(value: float) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[f"{Q}.lora_A.weight"][1, 2] = value
        return tensors

    return change


FACTORS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], list[str]]] = {
    "nan": (with_value(math.nan), [f"{Q}.lora_A.weight", "not finite"]),
    "inf": (with_value(math.inf), [f"{Q}.lora_A.weight", "not finite"]),
    "overflow": (
        lambda tensors: {name: tensor * 1e30 for name, tensor in tensors.items()},
        ["plus its delta", "not finite"],
    ),
    "a layer without factors": (
        lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.startswith(Q)},
        ["no factors of model.layers.1.self_attn.q_proj.weight", "3 of 4"],
    ),
    "more than the base has": (
        lambda tensors: tensors | {name.replace("layers.1", "layers.2"): tensors[name].clone() for name in tensors},
        ["layers.2", "not found in the base model"],
    ),
    "vectors": (lambda tensors: {name: tensor.flatten() for name, tensor in tensors.items()}, ["has shape [128]"]),
    "integers": (lambda tensors: {name: tensor.long() for name, tensor in tensors.items()}, ["has dtype I64"]),
    "without prefix": (
        lambda tensors: {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()},
        ["other than LoRA factors"],
    ),
    "twice": (
        lambda tensors: tensors | {f"base_model.model.{name}": tensor.clone() for name, tensor in tensors.items()},
        ["not found in the base model"],
    ),
}


@pytest.mark.parametrize("name", FACTORS)
def test_factors_that_cannot_be_added_are_refused(base: Path, adapter: Path, name: str) -> None:
    change, words = FACTORS[name]
    change_factors(adapter, change)
    said = merge_is_refused(base, adapter)
    assert not [word for word in words if word not in said], said


def test_an_adapter_of_chosen_layers_is_merged(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", layers_to_transform=[1])
    llama_lora_here("merge", "--base", str(base), "--adapter", str(adapter), "--output", str(tmp_path / "merged"))
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "merged/model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.1.self_attn.{name}_proj.weight" for name in "qv"}


CHOICES: list[dict[str, Any]] = [
    *(
        {"target_modules": targets}
        for targets in (["q_proj"], ["model.layers.0.self_attn.q_proj"], ["proj"], "ALL-linear")
    ),
    *({"target_modules": targets} for targets in (r".*\.0\..*(q|v)_proj", r".*layers\.1", "q_proj")),
    *({"exclude_modules": excluded} for excluded in (["q_proj"], [], "", r".*layers\.1\..*", ["layers.1"], None)),
    *({"layers_to_transform": layers} for layers in (0, [0], [1, 7], [], None)),
    *({"layers_to_transform": [1], "layers_pattern": pattern} for pattern in ("layers", ["h", "layers"], "h", [], "")),
    {"layers_to_transform": [1], "target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"]},
]


@pytest.mark.parametrize("changes", CHOICES, ids=map(str, CHOICES))
def test_the_modules_that_a_config_chooses_are_those_that_peft_adapts(base: Path, changes: dict[str, Any]) -> None:
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel
    from transformers import AutoModelForCausalLM

    settings = {"target_modules": ["q_proj", "v_proj"], **changes}
    model = AutoModelForCausalLM.from_pretrained(base)
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    ours = {name for name in linear if adapts(settings, name)}
    try:
        theirs = LoraModel(model, LoraConfig(**settings), "default").targeted_module_names
    except ValueError:  # it adapts none
        theirs = []
    assert ours == set(theirs)


@pytest.mark.parametrize("settings", [{"target_modules": r".*layers\.1\..*q_proj"}, {"exclude_modules": r".*\.0\..*"}])
def test_an_adapter_of_modules_that_a_pattern_chooses_is_merged(
    base: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", **settings)
    llama_lora_here("merge", "--base", str(base), "--adapter", str(adapter), "--output", str(tmp_path / "merged"))
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "merged/model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("layers.1.self_attn" in name for name in changed)


def test_a_merged_model_with_other_tensors_than_the_base_is_refused(
    base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the base model is replaced while it is copied."""
    before = merge_stage.stored_tensors

    def changed(folder: Path) -> Any:
        found = dict(before(folder))
        if folder != base:
            found.pop("model.norm.weight")
        return found

    monkeypatch.setattr(merge_stage, "stored_tensors", changed)
    assert "model.norm.weight of the merged model" in merge_is_refused(base, adapter)


# --- headers


def entry(shape: Any = (2, 2), offsets: Any = (0, 16), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HEADERS: dict[str, tuple[Any, list[str]]] = {
    "a list": ([], ["not an object"]),
    "a number": (7, ["not an object"]),
    "null": (None, ["not an object"]),
    "cut off": (b'{"a": {', ["not valid JSON"]),
    "not UTF-8": (b'{"\xff": 1}', ["not valid JSON"]),
    "nested": (b'{"a":' * 100_000, ["not valid JSON"]),
    "NaN": (b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 16]}}', ["not valid JSON"]),
    "a name twice": (
        b'{"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}, "a": {"dtype": "F32", "shape": [2, 2], '
        b'"data_offsets": [0, 16]}}',
        ["'a' twice"],
    ),
    "a key twice": (b'{"a": {"dtype": "F32", "dtype": "F16", "shape": [2, 2], "data_offsets": [0, 16]}}', ["twice"]),
    "text as an entry": ({"a": "F32"}, ["a does not have exactly"]),
    "a missing key": ({"a": {"dtype": "F32", "shape": [2, 2]}}, ["a does not have exactly"]),
    "another key": ({"a": {**entry(), "scale": 2}}, ["a does not have exactly"]),
    "metadata": ({"a": entry(), "__metadata__": {"format": 1}}, ["__metadata__"]),
    "unknown dtype": ({"a": entry(dtype="F31")}, ["unknown dtype"]),
    "dtype of another length": ({"a": entry(dtype="F16")}, ["has 16 bytes"]),
    "shape of another length": ({"a": entry(shape=[2, 3])}, ["has 16 bytes"]),
    "negative shape": ({"a": entry(shape=[-2, -2])}, ["invalid shape"]),
    "fraction": ({"a": entry(shape=[2.0, 2])}, ["invalid shape"]),
    "boolean shape": ({"a": entry(shape=[True, 4])}, ["invalid shape"]),
    "huge shape": ({"a": entry(shape=[2**62, 4])}, ["invalid shape"]),
    "shape as text": ({"a": entry(shape="22")}, ["invalid shape"]),
    "negative offset": ({"a": entry(offsets=[-16, 0])}, ["invalid data_offsets"]),
    "end before begin": ({"a": entry(offsets=[16, 0])}, ["invalid data_offsets"]),
    "three offsets": ({"a": entry(offsets=[0, 8, 16])}, ["invalid data_offsets"]),
    "fractions of bytes": ({"a": entry(offsets=[0, 16.0])}, ["invalid data_offsets"]),
    "the same bytes": ({"a": entry(), "b": entry()}, ["b overlaps a"]),
    "overlapping bytes": ({"a": entry(), "b": entry([2], [8, 16])}, ["b overlaps a"]),
    "bytes of none before": ({"a": entry([2], [8, 16])}, ["8 bytes before a"]),
    "bytes of none between": ({"a": entry([1], [0, 4]), "b": entry([2], [8, 16])}, ["4 bytes between a and b"]),
    "bytes of none after": ({"a": entry([1], [0, 4])}, ["12 bytes at its end"]),
    "bytes beyond the end": ({"a": entry([4, 4], [0, 64])}, ["truncated"]),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_does_not_describe_its_file_is_refused(tmp_path: Path, name: str) -> None:
    header, words = HEADERS[name]
    file = write_header(tmp_path / "model.safetensors", header, bytes(16))
    with pytest.raises(UserError) as error:
        stored_tensors(tmp_path)
    said = str(error.value)
    assert error.value.where == str(file) and "\n" not in said
    assert not [word for word in words if word not in said], said


@pytest.mark.parametrize("name", ["the same bytes", "overlapping bytes", "a list", "negative shape", "a name twice"])
def test_merge_reads_the_headers_of_base_and_adapter_as_strictly(base: Path, adapter: Path, name: str) -> None:
    header, words = HEADERS[name]
    for file in (adapter / "adapter_model.safetensors", base / "model.safetensors"):
        before = file.read_bytes()
        write_header(file, header, bytes(16))
        said = merge_is_refused(base, adapter)
        assert str(file) in said and words[0] in said
        file.write_bytes(before)


@pytest.mark.parametrize("content", [b"", b"1234567", struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 99) + b"{}"])
def test_a_file_shorter_than_its_header_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="not a valid safetensors file"):
        stored_tensors(tmp_path)


def test_a_header_beyond_the_limit_of_safetensors_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", 200_000_000))
        opened.truncate(300_000_000)  # a file with a hole
    with pytest.raises(UserError, match="the most is 100000000"):
        stored_tensors(tmp_path)


def test_what_safetensors_writes_is_read_as_safetensors_reads_it(tmp_path: Path) -> None:
    tensors = {
        "scalar": torch.tensor(1.0),
        "empty": torch.empty(0, 3),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "bf16": torch.ones(3, 3, dtype=torch.bfloat16),
        "fp8": torch.ones(4).to(torch.float8_e4m3fn),
        "bool": torch.tensor([True, False]),
        "complex": torch.ones(2, dtype=torch.complex64),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    header = read_header(tmp_path / "model.safetensors")
    assert header.metadata == {"format": "pt"} and header.tensors.keys() == tensors.keys()
    with safe_open(tmp_path / "model.safetensors", framework="pt") as opened:
        for name, tensor in header.tensors.items():
            view = opened.get_slice(name)
            assert (tensor.dtype, tensor.shape) == (view.get_dtype(), view.get_shape())


# --- parts of a native checkpoint


def region(offset: tuple[int, ...], shape: tuple[int, ...]) -> regions.Region:
    return regions.Region(offset, shape)


@pytest.mark.parametrize(
    ("parts", "covers"),
    [
        ([region((0, 0), (4, 4))], True),
        ([region((0, 0), (2, 4)), region((2, 0), (2, 4))], True),
        ([region((0, 0), (2, 2)), region((2, 0), (2, 2)), region((0, 2), (4, 2))], True),
        ([region((0, 0), (2, 4))], False),
        ([region((0, 0), (4, 4)), region((0, 0), (4, 4))], False),
        ([region((0, 0), (2, 4)), region((1, 0), (2, 4))], False),  # as many elements as the whole
        ([region((0, 0), (2, 4)), region((0, 0), (2, 4))], False),
        ([], False),
    ],
)
def test_parts_cover_a_tensor_exactly_once(parts: list[regions.Region], covers: bool) -> None:
    assert regions.covers_once(parts, (4, 4)) == covers


def change_part(checkpoint: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> None:
    """Change the first part of a checkpoint, and its record as if the trainer had written it."""
    file = checkpoint / "part-00000.safetensors"
    with safe_open(file, framework="pt") as opened:
        described = json.loads(opened.metadata()["parts"])
    tensors = load_file(file)
    change(described, tensors)
    file.unlink()
    save_file(tensors, file, metadata={"parts": json.dumps(described)})
    record = json.loads((checkpoint / "checkpoint.json").read_text())
    record["files"][file.name] = {"bytes": file.stat().st_size, "sha256": files.sha256(file)}
    write_checkpoint_record(checkpoint / "checkpoint.json", record)


def set_nan(described: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    tensors[sorted(name for name in tensors if name.startswith("adapter/"))[0]][0, 0] = math.nan


def set_offset(value: Any) -> Callable[[dict[str, Any], dict[str, torch.Tensor]], None]:
    def change(described: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        described[min(described)]["offset"] = value

    return change


def set_shape(value: Any) -> Callable[[dict[str, Any], dict[str, torch.Tensor]], None]:
    def change(described: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        described[min(described)]["shape"] = value

    return change


def drop_b(described: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if "lora_B" in name and name.startswith("adapter/")]:
        del tensors[name]


PARTS: dict[str, tuple[Callable[[dict[str, Any], dict[str, torch.Tensor]], None], str]] = {
    "nan": (set_nan, "not finite"),
    "offset beyond": (set_offset([10**9, 0]), "not within its whole shape"),
    "negative offset": (set_offset([-1, 0]), "not a part of a checkpoint"),
    "offset as text": (set_offset("00"), "not a part of a checkpoint"),
    "offset of one number": (set_offset([0]), "not within its whole shape"),
    "huge shape": (set_shape([2**40, 2**40]), "does not have the part"),
    "boolean shape": (set_shape([True, True]), "not a part of a checkpoint"),
    "not described": (lambda described, tensors: described.clear(), "not a part of a checkpoint"),
    "only one factor": (drop_b, "LoRA factors"),
}


@pytest.mark.parametrize("name", PARTS)
def test_a_part_of_a_checkpoint_that_does_not_fit_is_refused(finished_run: Run, tmp_path: Path, name: str) -> None:
    change, words = PARTS[name]
    checkpoint = checkpoint_of(finished_run)
    change_part(checkpoint, change)
    assert words in consolidate_is_refused(checkpoint, tmp_path)


@pytest.mark.parametrize("value", ["NaN", "true", "-1", "1e400", '"4"', "null"])
def test_a_rank_of_a_checkpoint_that_is_no_number_is_refused(finished_run: Run, tmp_path: Path, value: str) -> None:
    checkpoint = checkpoint_of(finished_run)
    config, record = checkpoint / "adapter_config.json", checkpoint / "checkpoint.json"
    config.write_text(config.read_text().replace('"r": 4', f'"r": {value}'))
    listed = json.loads(record.read_text())
    listed["files"]["adapter_config.json"] = {"bytes": config.stat().st_size, "sha256": files.sha256(config)}
    write_checkpoint_record(record, listed)
    assert "adapter_config.json" in consolidate_is_refused(checkpoint, tmp_path)


def test_only_files_in_the_checkpoint_are_read_as_its_parts(tmp_path: Path) -> None:
    (tmp_path / "step").mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "part-00000.safetensors")
    listed = ["../part-00000.safetensors", str(tmp_path / "part-00000.safetensors"), "sub/part-00000.safetensors"]
    assert shards.stored_parts(tmp_path / "step", listed).parts == {}
