"""Read checkpoints of optimum-neuron 0.4.5 without that library. fixtures/neuron/make.py wrote them with it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from genvalues.common.errors import UserError
from llama_lora.adapter import write_adapter
from llama_lora.backends.xla import shards, torch_files

ARCHIVES = sorted((Path(__file__).parent / "fixtures" / "neuron").glob("*.tar.xz"))
NAMES = [archive.name.removesuffix(".tar.xz") for archive in ARCHIVES]
LAYER = "base_model.model.model.layers.0"
Q_A = f"{LAYER}.self_attn.q_proj.lora_A.weight"
Q_B = f"{LAYER}.self_attn.q_proj.lora_B.weight"


@pytest.fixture(scope="session")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each archive's folder, read-only."""
    folders = {}
    for name, archive in zip(NAMES, ARCHIVES, strict=True):
        folders[name] = tmp_path_factory.mktemp(name)
        with tarfile.open(archive) as file:
            file.extractall(folders[name])
    return folders


@pytest.fixture
def checkpoint_of(unpacked: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a checkpoint that a test may change."""
    return lambda name: shutil.copytree(unpacked[name] / "checkpoint", tmp_path / "checkpoint")


@pytest.fixture
def qv(checkpoint_of: Callable[[str], Path]) -> Path:
    """Two ranks, xser, LoRA on q and v: the default."""
    return checkpoint_of("llama-tp2-qv")


def model_folder(checkpoint: Path) -> Path:
    return checkpoint / "adapter_default" / "adapter_shards" / "model"


def shard(checkpoint: Path, rank: int) -> Path:
    return model_folder(checkpoint) / f"dp_rank_00_tp_rank_{rank:02d}_pp_rank_00.pt"


def tensor_file(checkpoint: Path, rank: int, name: str) -> Path:
    path = shard(checkpoint, rank)
    return path.with_name(f"{path.name}.tensors") / f"tensor_{torch_files.load(path)[name].tid}.pt"


def metadata_file(checkpoint: Path) -> Path:
    return checkpoint / "adapter_default" / "adapter_shards" / "mp_metadata_pp_rank_0.json"


def change(file: Path, how: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensor = torch.load(file, weights_only=True)
    torch.save(how(tensor), file)


def change_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def refusal(checkpoint: Path) -> str:
    with pytest.raises(UserError) as raised:
        shards.read_adapter(checkpoint)
    assert raised.value.where and raised.value.fix, "the error has no place or no fix"
    return str(raised.value)


# Reading.


@pytest.mark.parametrize("name", NAMES)
def test_the_tensors_equal_those_of_optimum_neurons_consolidation(unpacked: dict[str, Path], name: str) -> None:
    adapter = shards.read_adapter(unpacked[name] / "checkpoint")
    expected = load_file(unpacked[name] / "expected" / "adapter_model.safetensors")
    assert adapter.tensors.keys() == expected.keys()
    for tensor_name, tensor in expected.items():
        assert adapter.tensors[tensor_name].dtype == tensor.dtype
        assert torch.equal(adapter.tensors[tensor_name], tensor), tensor_name


@pytest.mark.parametrize("name", NAMES)
def test_the_tensors_equal_those_before_sharding(unpacked: dict[str, Path], name: str) -> None:
    truth = json.loads((unpacked[name] / "truth.json").read_text())["tensors"]
    tensors = shards.read_adapter(unpacked[name] / "checkpoint").tensors
    found = {
        tensor_name: hashlib.sha256(
            f"{tensor.dtype} {list(tensor.shape)} ".encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes()
        ).hexdigest()[:16]
        for tensor_name, tensor in tensors.items()
    }
    assert found == truth


@pytest.mark.parametrize("name", NAMES)
def test_peft_computes_the_loss_of_the_sharded_model(unpacked: dict[str, Path], tmp_path: Path, name: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = shards.read_adapter(unpacked[name] / "checkpoint")
    write_adapter(tmp_path, adapter.tensors, adapter.config)
    truth = json.loads((unpacked[name] / "truth.json").read_text())
    rows = torch.tensor(truth["rows"])
    base = AutoModelForCausalLM.from_pretrained(unpacked[name] / "base", dtype=torch.float32)
    with torch.no_grad():
        without = base(input_ids=rows, labels=rows).loss.item()
        loss = PeftModel.from_pretrained(base, tmp_path).float()(input_ids=rows, labels=rows).loss.item()
    assert loss == pytest.approx(truth["loss"], abs=1e-5)
    assert abs(loss - without) > 1e-2, "the adapter must have an effect"


@pytest.mark.parametrize("name", NAMES)
def test_the_adapter_fits_its_base_model_and_targets_only_its_linear_layers(
    unpacked: dict[str, Path], name: str
) -> None:
    adapter = shards.read_adapter(unpacked[name] / "checkpoint")
    base_config = json.loads((unpacked[name] / "base" / "config.json").read_text())
    shards.check_shapes(adapter, base_config, "here")
    assert set(adapter.config["target_modules"]) <= {
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    }
    assert adapter.config["target_modules"] == sorted(adapter.config["target_modules"])


def test_the_fixtures_cover_every_layout(unpacked: dict[str, Path]) -> None:
    kinds, xser = set(), set()
    for folder in unpacked.values():
        metadata = json.loads(metadata_file(folder / "checkpoint").read_text())
        xser.add(any(model_folder(folder / "checkpoint").glob("*.tensors")))
        for _, kind, settings in shards._transformations(metadata):
            name = settings.get("fused_linear_name") or f"{settings['kv_size_multiplier']} {settings['fuse_qkv']}"
            kinds.add((kind, settings["peft_type"], name))
    assert xser == {True, False}
    fused, grouped = "FusedLinearsSpec", "GQAQKVColumnParallelLinearSpec"
    assert kinds == {
        (fused, None, "gate_up_proj"),
        (fused, "lora", "gate_up_proj"),
        (fused, "lora", "qkv_proj"),
        (grouped, "lora", "2 False"),
        (grouped, "lora", "2 True"),
    }


def test_optimum_neurons_consolidation_fails_for_the_default_targets(unpacked: dict[str, Path]) -> None:
    """One reason to read the shards here; the other is the size of the Neuron libraries."""
    truth = json.loads((unpacked["llama-tp2-qv"] / "truth.json").read_text())
    assert truth["consolidation_of_optimum_neuron"].startswith("KeyError")


@pytest.mark.parametrize(("heads", "kv_heads", "copies"), [(32, 8, 2), (32, 8, 4), (64, 8, 4), (16, 2, 8), (8, 1, 8)])
def test_each_query_head_is_on_a_rank_that_has_its_kv_head(heads: int, kv_heads: int, copies: int) -> None:
    """Rank t has kv head t mod kv_heads, and heads / ranks query heads."""
    order, ranks = shards.query_heads(heads, kv_heads, copies), kv_heads * copies
    assert sorted(order) == list(range(heads))
    for rank in range(ranks):
        for head in order[rank * heads // ranks : (rank + 1) * heads // ranks]:
            assert head // (heads // kv_heads) == rank % kv_heads


def test_o_proj_alone_is_reordered_like_the_query_heads(
    checkpoint_of: Callable[[str], Path], unpacked: dict[str, Path]
) -> None:
    checkpoint = checkpoint_of("llama-tp4-gqa")
    for rank in range(4):
        entries = torch_files.load(shard(checkpoint, rank))
        pieces = shards.Rank(rank, shard(checkpoint, rank), entries)
        torch.save({n: pieces.tensor(n).clone() for n in entries if ".o_proj." in n}, shard(checkpoint, rank))
    change_json(checkpoint / "adapter_default" / "adapter_config.json", target_modules=["o_proj"])
    metadata = json.loads(metadata_file(checkpoint).read_text())
    for _, _, settings in shards._transformations(metadata):
        settings["peft_type"] = None
    metadata_file(checkpoint).write_text(json.dumps(metadata))
    expected = load_file(unpacked["llama-tp4-gqa"] / "expected" / "adapter_model.safetensors")
    tensors = shards.read_adapter(checkpoint).tensors
    assert len(tensors) == 4 and all(torch.equal(tensors[name], expected[name]) for name in tensors)


def test_a_checkpoint_is_detected_by_its_folders(qv: Path, tmp_path: Path) -> None:
    assert shards.is_xla_checkpoint(qv)
    assert not shards.is_xla_checkpoint(tmp_path) and not shards.is_xla_checkpoint(tmp_path / "nowhere")
    assert "adapter_default/adapter_shards not found" in refusal(tmp_path)


# Errors: files.


def test_an_unfinished_save_is_an_error(qv: Path) -> None:
    (model_folder(qv).parent / "done").unlink()
    assert "the save is incomplete" in refusal(qv)


@pytest.mark.parametrize("rank", [0, 2, 3])
def test_an_error_for_a_missing_rank_names_its_file(checkpoint_of: Callable[[str], Path], rank: int) -> None:
    checkpoint = checkpoint_of("llama-tp4-gqa")
    shard(checkpoint, rank).unlink()
    assert f"{shard(checkpoint, rank)}: shard of rank {rank} of 4 not found" in refusal(checkpoint)


def test_a_missing_rank_is_detected_without_the_number_of_ranks_in_the_metadata(
    checkpoint_of: Callable[[str], Path],
) -> None:
    checkpoint = checkpoint_of("llama-tp4-gqa")
    metadata = json.loads(metadata_file(checkpoint).read_text())
    metadata_file(checkpoint).write_text(
        json.dumps(
            {
                "parameters": {name: {"tensor_model_parallel": False} for name in metadata["parameters"]},
                "model_weight_transformation_specs": [],
            }
        )
    )
    shard(checkpoint, 1).unlink()
    assert f"{shard(checkpoint, 1)}: shard of rank 1 of 4 not found" in refusal(checkpoint)


def test_an_error_for_a_missing_tensor_file_names_it(qv: Path) -> None:
    file = tensor_file(qv, 1, Q_B)
    file.unlink()
    assert f"{file}: shard not found" in refusal(qv)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_shards/mp_metadata_pp_rank_0.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "not found"), ("{", "damaged"), ("[]", "expected an object"), ("{}", "")],
)
def test_a_missing_or_damaged_json_file_is_an_error(qv: Path, name: str, content: str | None, message: str) -> None:
    file = qv / "adapter_default" / name
    file.unlink() if content is None else file.write_text(content)
    said = refusal(qv)
    assert str(file) in said and message in said


@pytest.mark.parametrize("which", ["shard", "tensor"])
def test_a_truncated_file_is_an_error(qv: Path, which: str) -> None:
    file = shard(qv, 1) if which == "shard" else tensor_file(qv, 1, Q_B)
    file.write_bytes(file.read_bytes()[:-100])
    assert f"{file}: file is damaged" in refusal(qv)


def test_a_single_wrong_bit_in_a_tensor_file_is_an_error(qv: Path) -> None:
    file = tensor_file(qv, 1, Q_B)
    tensor = torch.load(file, weights_only=True)
    content = bytearray(file.read_bytes())
    at = content.index(tensor.view(torch.uint8).numpy().tobytes())
    content[at] ^= 1
    file.write_bytes(content)
    assert torch.load(file, weights_only=True) is not None, "torch does not detect it"
    assert f"{file}: file is damaged: wrong checksum" in refusal(qv)


def test_a_single_wrong_bit_in_a_shard_is_an_error(checkpoint_of: Callable[[str], Path]) -> None:
    checkpoint = checkpoint_of("granite-tp2-plain")
    file = shard(checkpoint, 1)
    tensor = torch.load(file, weights_only=True)[Q_B]
    content = bytearray(file.read_bytes())
    content[content.index(tensor.view(torch.uint8).numpy().tobytes())] ^= 1
    file.write_bytes(content)
    assert f"{file}: file is damaged: wrong checksum" in refusal(checkpoint)


class Evil:
    """An object that runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["EVIL"],)


@pytest.mark.parametrize("which", ["shard", "tensor"])
def test_code_in_a_shard_is_not_run(qv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    monkeypatch.setenv("EVIL", str(tmp_path / "evil"))
    file = shard(qv, 0) if which == "shard" else tensor_file(qv, 0, Q_A)
    torch.save({Q_A: Evil()}, file)
    assert f"{file}: contains objects other than tensors; not loaded" in refusal(qv)
    assert not (tmp_path / "evil").exists()


def test_a_file_with_other_content_is_an_error(qv: Path) -> None:
    file = tensor_file(qv, 0, Q_A)
    torch.save({"optimizer": torch.zeros(3)}, file)
    assert f"{file}: no tensor for {Q_A}" in refusal(qv)
    torch.save([1, 2], shard(qv, 0))
    assert f"{shard(qv, 0)}: not a mapping of names to tensors" in refusal(qv)


def test_a_shard_under_the_name_of_another_rank_is_an_error(qv: Path) -> None:
    for source in [shard(qv, 0), *(shard(qv, 0).parent / f"{shard(qv, 0).name}.tensors").iterdir()]:
        target = str(source).replace("tp_rank_00", "tp_rank_01")
        shutil.copy(source, target)
    assert f"{shard(qv, 1)}: equals the shard of rank 0, so it is not rank 1's" in refusal(qv)


def test_zeros_on_all_ranks_are_not_taken_for_a_copy(qv: Path) -> None:
    """lora_B is zero before the first step."""
    for rank in (0, 1):
        for name in torch_files.load(shard(qv, rank)):
            if ".lora_B." in name:
                change(tensor_file(qv, rank, name), torch.zeros_like)
    assert not shards.read_adapter(qv).tensors[Q_B].any()


def test_shards_of_two_trainings_in_one_folder_are_an_error(qv: Path) -> None:
    shutil.copy(shard(qv, 1), shard(qv, 2))
    assert "found shards of 3 ranks, but the training had 2" in refusal(qv)
    shard(qv, 2).rename(model_folder(qv) / "dp_rank_00_tp_rank_00_pp_rank_01.pt")
    assert "pipeline parallelism" in refusal(qv)


def test_ranks_with_different_tensors_are_an_error(checkpoint_of: Callable[[str], Path]) -> None:
    checkpoint = checkpoint_of("granite-tp2-plain")
    entries = torch.load(shard(checkpoint, 1), weights_only=True)
    del entries[Q_B]
    torch.save(entries, shard(checkpoint, 1))
    assert f"{shard(checkpoint, 1)}: only one of this shard and rank 0's has {Q_B}" in refusal(checkpoint)


# Errors: values.


def test_a_replicated_factor_that_differs_between_ranks_is_an_error_with_the_difference(qv: Path) -> None:
    """What optimum-neuron 0.4.5 leaves without a correction (docs/neuron-xla.md, defect A)."""
    for name, difference in ((Q_A, 0.25), (Q_A.replace("q_proj", "v_proj"), 0.0625)):

        def drifted(tensor: torch.Tensor, difference: float = difference) -> torch.Tensor:
            tensor[1, 2] = 0.0
            return tensor + difference * (torch.arange(tensor.numel()).view_as(tensor) == 2 + tensor.shape[1])

        change(tensor_file(qv, 0, name), lambda tensor: drifted(tensor, 0.0))
        change(tensor_file(qv, 1, name), drifted)
    said = refusal(qv)
    assert "2 of 4 replicated factors differ between ranks" in said
    assert f"{Q_A}: by 0.25 between ranks 0 and 1" in said


def test_copies_of_a_kv_head_that_differ_are_an_error_with_the_difference(checkpoint_of: Callable[[str], Path]) -> None:
    checkpoint = checkpoint_of("llama-tp4-gqa")
    name = f"{LAYER}.self_attn.qkv_proj.lora_B.weight_k"
    first, copy = (tensor_file(checkpoint, rank, name) for rank in (1, 3))  # kv head 1 is on ranks 1 and 3
    zeros = torch.zeros_like(torch.load(first, weights_only=True))
    torch.save(zeros, first)
    torch.save(zeros + 0.5, copy)
    said = refusal(checkpoint)
    assert f"{LAYER}.self_attn.k_proj.lora_B.weight: by 0.5 between ranks 1 and 3" in said


def test_metadata_without_the_information_which_factors_are_split_are_an_error(qv: Path) -> None:
    """Module.to creates new parameters on an XLA device and drops their attributes: all factors would be rank 0's."""
    metadata = json.loads(metadata_file(qv).read_text())
    parameters = {name: {"tensor_model_parallel": False} for name in metadata["parameters"]}
    metadata_file(qv).write_text(json.dumps({**metadata, "parameters": parameters}))
    assert "replicated factors differ between ranks" in refusal(qv)


def test_values_that_are_not_finite_are_an_error(qv: Path) -> None:
    change(tensor_file(qv, 1, Q_B), lambda tensor: tensor / 0)
    assert f"{Q_B} contains values that are not finite" in refusal(qv)


def test_another_r_is_an_error(qv: Path) -> None:
    change_json(qv / "adapter_default" / "adapter_config.json", r=8)
    assert "has shape [4, 32], but adapter_config.json says r = 8" in refusal(qv)


@pytest.mark.parametrize("how", [torch.Tensor.float, lambda tensor: tensor[1:].clone()])
def test_ranks_with_different_shapes_or_dtypes_are_an_error(
    qv: Path, how: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    change(tensor_file(qv, 1, Q_B), how)
    assert f"{Q_B} is torch" in refusal(qv)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 64, "head_dim": 8}, f"{Q_A} has shape [4, 32], the base model needs [4, 64]"),
        ({"num_key_value_heads": 4}, "v_proj.lora_B.weight has shape [16, 4], the base model needs [32, 4]"),
        ({"num_hidden_layers": 3}, "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight not found"),
        ({"num_hidden_layers": 1}, "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight does not exist"),
    ],
)
def test_an_adapter_of_another_base_model_is_an_error(
    qv: Path, unpacked: dict[str, Path], changes: dict[str, int], message: str
) -> None:
    """Checked with the config.json in the checkpoint, and with the one that the caller passes."""
    base_config = json.loads((unpacked["llama-tp2-qv"] / "base" / "config.json").read_text())
    adapter = shards.read_adapter(qv)
    with pytest.raises(UserError) as raised:
        shards.check_shapes(adapter, {**base_config, **changes}, "given")
    assert message in str(raised.value) and raised.value.where == "given"
    (qv / "base_config.json").write_text(json.dumps({**base_config, **changes}))
    assert message in refusal(qv)


def test_target_modules_that_differ_from_the_saved_ones_are_an_error(qv: Path) -> None:
    change_json(qv / "adapter_default" / "adapter_config.json", target_modules=["q_proj", "k_proj", "v_proj"])
    assert "has LoRA on q_proj, v_proj, but adapter_config.json lists k_proj, q_proj, v_proj" in refusal(qv)


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"peft_type": "IA3"}, {"bias": "all"}])
def test_an_adapter_that_is_not_plain_lora_is_an_error(qv: Path, changes: dict[str, Any]) -> None:
    change_json(qv / "adapter_default" / "adapter_config.json", **changes)
    assert f"{next(iter(changes))} is" in refusal(qv)


def test_the_expected_shapes_are_those_of_pefts_models() -> None:
    """Compared with the factors that PEFT creates for each unsharded model."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    for model_type, more in (("llama", {}), ("llama", {"head_dim": 8}), ("qwen3", {"head_dim": 32}), ("granite", {})):
        config = AutoConfig.for_model(model_type, **sizes, **heads, **more)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
            model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
        made = {n.replace(".default.", "."): list(p.shape) for n, p in model.named_parameters() if "lora_" in n}
        assert shards.expected_shapes(config.to_dict(), "all-linear", 4) == made
    with pytest.raises(UserError, match="no linear layer wte"):
        shards.expected_shapes(config.to_dict(), ["wte"], 4)


# Memory.

MEASURE = """
import sys
from pathlib import Path
from llama_lora.backends.xla import shards, torch_files

def memory(what):  # VmRSS: current; VmHWM: peak of this process (ru_maxrss starts with its parent's)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))

shards.read_adapter(Path(sys.argv[2]))  # a small one first: exclude imports and the memory of torch
before = memory("VmRSS")
adapter = shards.read_adapter(Path(sys.argv[1]))
print(memory("VmHWM") - before, sum(tensor.nbytes for tensor in adapter.tensors.values()))
"""


def test_reading_takes_little_more_memory_than_the_adapters_size(
    qv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_large(tmp_path / "large", qv, monkeypatch, layers=64)
    ended = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "large"), str(qv)],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"},  # so that freed memory is not counted
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    grown, size = (int(number) for number in ended.stdout.split())
    assert size > 100e6
    assert grown < 1.25 * size, f"{grown / 1e6:.0f} MB for an adapter of {size / 1e6:.0f} MB"


def write_large(target: Path, small: Path, monkeypatch: pytest.MonkeyPatch, layers: int) -> None:
    """A two-rank xser checkpoint with LoRA of r = 64 on q_proj of a model of hidden size 8192."""
    serialization = types.ModuleType("torch_xla.utils.serialization")
    reference = type("TensorReference", (), {"__module__": serialization.__name__})
    serialization.TensorReference = reference  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_xla", types.ModuleType("torch_xla"))
    monkeypatch.setitem(sys.modules, "torch_xla.utils", types.ModuleType("torch_xla.utils"))
    monkeypatch.setitem(sys.modules, serialization.__name__, serialization)
    model_folder(target).mkdir(parents=True)
    (model_folder(target).parent / "done").touch()
    config = json.loads((small / "adapter_default" / "adapter_config.json").read_text())
    (target / "adapter_default" / "adapter_config.json").write_text(
        json.dumps({**config, "r": 64, "target_modules": ["q_proj"]})
    )
    parameters = {}
    for rank in (0, 1):
        tensors = shard(target, rank).with_name(f"{shard(target, rank).name}.tensors")
        tensors.mkdir()
        references = {}
        for layer in range(layers):
            for factor, shape in (("lora_A", (64, 8192)), ("lora_B", (4096, 64))):
                module = f"base_model.model.model.layers.{layer}.self_attn.q_proj.{factor}"
                value = torch.full(shape, layer + (rank + 1 if factor == "lora_B" else 0), dtype=torch.bfloat16)
                torch.save(value, tensors / f"tensor_{len(references)}.pt")
                references[f"{module}.weight"] = reference()
                references[f"{module}.weight"].tid = len(references) - 1
                cut = {"tensor_model_parallel": True, "partition_dim": 0, "num_partitions": 2}
                parameters[f"{module}.default.weight"] = cut if factor == "lora_B" else {"tensor_model_parallel": False}
        torch.save(references, shard(target, rank))
    metadata_file(target).write_text(json.dumps({"parameters": parameters, "model_weight_transformation_specs": []}))
