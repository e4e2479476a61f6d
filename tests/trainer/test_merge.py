from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from genvalues.common import files
from genvalues.common.errors import UserError
from llama_lora import limits, safetensors_files
from llama_lora.adapter import Delta, read_deltas
from llama_lora.digests import record_of
from llama_lora.safetensors_files import StoredTensor, spans, stored_tensors
from llama_lora.stages.merge import write_merged
from trainer.chat_templates import family_tokenizer
from trainer.conftest import Run, llama_lora_here, make_model


def make_adapter(base: Path, folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    """Make a random adapter with peft."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    config = LoraConfig(
        task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 10, "target_modules": ["q_proj", "v_proj"], **settings}
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    weights = folder / "adapter_model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(weights).items()}, weights)
    return folder


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for shard in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(shard).items()}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"target_modules": "all-linear", "r": 3}])
def test_the_merge_is_bit_identical_to_pefts(
    tmp_path: Path, dtype: str, adapter_dtype: torch.dtype, settings: dict[str, Any]
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = make_model(tmp_path / "base", dtype=dtype, max_shard_size="40KB")
    assert len(list(base.glob("*.safetensors"))) > 1, "the model needs several shards"
    adapter = make_adapter(base, tmp_path / "adapter", adapter_dtype, **settings)
    llama_lora_here("merge", "--base", str(base), "--adapter", str(adapter), "--output", str(tmp_path / "merged"))

    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype)), adapter
    ).merge_and_unload()
    expected, merged, before = theirs.state_dict(), weights_of(tmp_path / "merged"), weights_of(base)
    assert merged.keys() == expected.keys()
    assert all(
        torch.equal(merged[name], expected[name]) and merged[name].dtype == expected[name].dtype for name in merged
    )
    assert any(not torch.equal(merged[name], before[name]) for name in merged)


@pytest.mark.parametrize("shape", [(2048, 2048), (1031, 577)])
@pytest.mark.parametrize("r", [1, 16])
def test_rows_that_are_changed_by_themselves_have_the_bits_of_the_whole_matrix(shape: tuple[int, int], r: int) -> None:
    generator = torch.Generator().manual_seed(r)
    rows, columns = shape
    a, b, weight = (torch.randn(size, generator=generator) for size in ((r, columns), (rows, r), shape))
    weight = weight.bfloat16()
    tensor = StoredTensor("model.safetensors", "BF16", list(shape), 0, weight.nbytes)
    parts = list(spans(weight.nbytes, {"q": tensor}))
    assert len(parts) > 1 and [part.end for part in parts[:-1]] == [part.begin for part in parts[1:]]
    divided = weight.split([(part.end - part.begin) // (2 * columns) for part in parts])
    changed = torch.cat([Delta(a, b, 2.5).added_to(each, part.row) for each, part in zip(divided, parts, strict=True)])
    weight += (b @ a) * 2.5  # as peft
    assert torch.equal(changed, weight)


@pytest.mark.parametrize("verified", [True, False])
def test_what_is_recorded_of_the_merged_files_is_their_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verified: bool
) -> None:
    base = make_model(tmp_path / "base", max_shard_size="40KB")
    deltas = read_deltas(make_adapter(base, tmp_path / "adapter"))
    monkeypatch.setattr(safetensors_files, "SPAN", 500)  # several for each tensor
    recorded = {file: record_of(file) for file in base.iterdir()} if verified else {}
    records = write_merged(base, stored_tensors(base), deltas, tmp_path / "merged", recorded)
    assert records == {name: record_of(tmp_path / "merged" / name) for name in records}
    assert {file.name for file in base.iterdir()} - records.keys() == {"generation_config.json"}


def test_a_damaged_base_model_is_named_also_where_its_sums_are_not_finite(finished_run: Run) -> None:
    [shard] = finished_run.workspace.glob("models/*/model.safetensors")
    tensor = stored_tensors(shard.parent)["model.layers.0.self_attn.q_proj.weight"]
    with shard.open("r+b") as file:
        file.seek(tensor.begin)
        file.write(b"\xff" * 8)
    finished_run.paths.manifest("merge").unlink()
    assert f"{shard}: has the expected size but another SHA-256" in finished_run("merge", status=2)


def test_transformers_loads_the_merged_model_and_generates(whole_run: Run) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(whole_run.paths.merged)
    tokenizer = AutoTokenizer.from_pretrained(whole_run.paths.merged)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What?"}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    assert model.generate(**ids, max_new_tokens=3, pad_token_id=0).shape[1] > ids.input_ids.shape[1]
    assert model.generation_config.max_length == 77, "the generation config was copied"


def test_only_targeted_tensors_change_and_every_other_file_is_copied(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", max_shard_size="40KB")
    adapter = make_adapter(base, tmp_path / "adapter")
    llama_lora_here("merge", "--base", str(base), "--adapter", str(adapter), "--output", str(tmp_path / "merged"))
    before, after = weights_of(base), weights_of(tmp_path / "merged")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{i}.self_attn.{p}.weight" for i in (0, 1) for p in ("q_proj", "v_proj")}
    others = {path.name for path in base.iterdir() if path.suffix != ".safetensors"}
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json", "config.json"} <= others
    for name in others:
        assert (tmp_path / "merged" / name).read_bytes() == (base / name).read_bytes()


def spoil_config(**settings: Any) -> Any:
    def spoil(base: Path, adapter: Path) -> None:
        file = adapter / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))

    return spoil


def spoil_tensors(change: Any) -> Any:
    def spoil(base: Path, adapter: Path) -> None:
        file = adapter / "adapter_model.safetensors"
        save_file(change(load_file(file)), file)

    return spoil


def zero_b(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) if "lora_B" in name else tensor for name, tensor in tensors.items()}


def rename(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.replace("layers.1", "layers.7"): tensor for name, tensor in tensors.items()}


def widen(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.repeat(2, 1) if "lora_B" in name else tensor for name, tensor in tensors.items()}


def lose_b(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if "layers.1.self_attn.v_proj.lora_B" not in name}


def cut_short(base: Path, adapter: Path) -> None:
    shard = next(base.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-10])


def lose_shard(base: Path, adapter: Path) -> None:
    max(base.glob("*.safetensors")).unlink()


MISTAKES = {
    "touches nothing": (spoil_tensors(zero_b), "the adapter changes nothing: every lora_B is zero"),
    "empty": (spoil_tensors(lambda tensors: {}), "the adapter has no LoRA factors"),
    "other layers": (spoil_tensors(rename), "layers.7.self_attn.q_proj.weight not found in the base model"),
    "other shape": (spoil_tensors(widen), "has shape [32, 32] in the base model and [64, 32] in the adapter"),
    "half a pair": (spoil_tensors(lose_b), "v_proj.lora_A.weight has no matching lora_B"),
    "embedding": (
        spoil_tensors(lambda tensors: tensors | {"base_model.model.model.norm.weight": torch.zeros(3)}),
        "contains tensors other than LoRA factors: base_model.model.model.norm.weight",
    ),
    "DoRA": (spoil_config(use_dora=True), "use_dora is set. Only plain LoRA can be merged."),
    "bias": (spoil_config(bias="all"), "bias is 'all'. Only 'none' can be merged."),
    "no rank": (spoil_config(r=None), "r is None. Set the value"),
    "another method": (spoil_config(peft_type="IA3"), "peft_type is IA3. Only LORA can be merged."),
    "no config": (lambda base, adapter: (adapter / "adapter_config.json").unlink(), "adapter_config.json not found"),
    "no weights": (
        lambda base, adapter: (adapter / "adapter_model.safetensors").unlink(),
        "adapter_model.safetensors not found",
    ),
    "torn weights": (
        lambda base, adapter: (adapter / "adapter_model.safetensors").write_bytes(b"x"),
        "not a valid safetensors file",
    ),
    "torn shard": (cut_short, "the file is truncated. Copy"),
    "missing shard": (lose_shard, "not found, but the index lists it"),
    "a base without its config": (lambda base, adapter: (base / "config.json").unlink(), "has no config.json. Pass"),
    "no adapter": (lambda base, adapter: shutil.rmtree(adapter), "--adapter: "),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_an_adapter_that_cannot_be_merged_is_an_error_and_nothing_is_written(tmp_path: Path, mistake: str) -> None:
    base = make_model(tmp_path / "base", max_shard_size="40KB")
    adapter = make_adapter(base, tmp_path / "adapter")
    spoil, message = MISTAKES[mistake]
    spoil(base, adapter)
    output = tmp_path / "merged"
    said = llama_lora_here("merge", "--base", str(base), "--adapter", str(adapter), "--output", str(output), status=2)
    assert message in said
    assert not [path for path in tmp_path.iterdir() if "merged" in path.name]


@pytest.mark.parametrize("tied", [True, False])
def test_factors_of_an_output_layer_are_merged_only_if_it_is_not_tied(tmp_path: Path, tied: bool) -> None:
    """PEFT changes the weight that tied embeddings share, also where the base model stores it twice."""
    base = make_model(tmp_path / "base", tie_word_embeddings=tied)
    if tied:
        weights = weights_of(base)
        head = {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
        save_file(weights | head, base / "model.safetensors", metadata={"format": "pt"})
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    file = adapter / "adapter_model.safetensors"  # without the embeddings, which PEFT saves besides
    save_file({name: tensor for name, tensor in load_file(file).items() if ".lora_" in name}, file)
    arguments = ["--base", str(base), "--adapter", str(adapter), "--output", str(tmp_path / "merged")]
    said = llama_lora_here("merge", *arguments, status=2 if tied else 0)
    if tied:
        assert f"{adapter}: lm_head.weight shares its weights with model.embed_tokens.weight" in said
    else:
        before, merged = weights_of(base)["lm_head.weight"], weights_of(tmp_path / "merged")["lm_head.weight"]
        assert not torch.equal(before, merged)


def test_a_run_whose_adapter_changes_nothing_fails_before_it_writes(finished_run: Run) -> None:
    weights = finished_run.paths.adapter / "adapter_model.safetensors"
    before = files.sha256(finished_run.paths.merged / "model.safetensors")
    save_file(zero_b(load_file(weights)), weights, metadata={"format": "pt"})
    finished_run.config["verify"] = "off"  # else the digest differs
    finished_run.paths.manifest("merge").unlink()
    assert "the adapter changes nothing" in finished_run("merge", status=2)
    assert files.sha256(finished_run.paths.merged / "model.safetensors") == before
    assert not finished_run.paths.manifest("merge").exists()


def qwen_base(folder: Path, *, with_generation_config: bool) -> Path:
    """A base model as Qwen2.5: it stops at <|endoftext|> only, and its chat template ends a turn with <|im_end|>."""
    base = make_model(folder)
    tokenizer = family_tokenizer("qwen2.5-base")
    tokenizer.save_pretrained(base)
    settings = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").unlink()
    if with_generation_config:
        settings["eos_token_id"] = tokenizer.eos_token_id
        files.write_json(base / "generation_config.json", settings)
    else:
        config = json.loads((base / "config.json").read_text())
        files.write_json(base / "config.json", {**config, "eos_token_id": tokenizer.eos_token_id})
    return base


@pytest.mark.parametrize("content", ["{", '{"eos_token_id": "end"}'])
def test_an_error_in_a_generation_config_names_the_file_of_the_base_model(tmp_path: Path, content: str) -> None:
    base = qwen_base(tmp_path / "base", with_generation_config=True)
    (base / "generation_config.json").write_text(content)
    with pytest.raises(UserError) as refused:
        write_merged(base, stored_tensors(base), {}, tmp_path / "partial")
    assert refused.value.where == str(base / "generation_config.json")


@pytest.mark.parametrize("with_generation_config", [True, False])
def test_the_merged_model_stops_at_the_chat_templates_end_of_a_turn(
    tmp_path: Path, with_generation_config: bool
) -> None:
    from transformers import GenerationConfig

    base = qwen_base(tmp_path / "base", with_generation_config=with_generation_config)
    write_merged(base, stored_tensors(base), {}, tmp_path / "merged")
    tokenizer = family_tokenizer("qwen2.5-base")
    merged = GenerationConfig.from_pretrained(tmp_path / "merged")
    assert merged.eos_token_id == tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    written = json.loads((tmp_path / "merged/generation_config.json").read_text())
    assert merged.bos_token_id == 256 and written.get("max_length") == (77 if with_generation_config else None)


def test_a_generation_config_that_has_the_end_of_a_turn_is_copied_as_it_is(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    write_merged(base, stored_tensors(base), {}, tmp_path / "merged")
    copied, original = (tmp_path / name / "generation_config.json" for name in ("merged", "base"))
    assert copied.read_bytes() == original.read_bytes()


def test_a_chat_template_that_does_not_end_costs_merge_its_limit_of_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is a signal, which only the main thread gets."""
    monkeypatch.setattr(limits, "SECONDS", 0.5)
    base = qwen_base(tmp_path / "base", with_generation_config=True)
    loops = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
    (base / "chat_template.jinja").write_text(loops)
    began = time.process_time()
    write_merged(base, stored_tensors(base), {}, tmp_path / "merged")
    assert time.process_time() - began < 10
    copied, original = (tmp_path / name / "generation_config.json" for name in ("merged", "base"))
    assert copied.read_bytes() == original.read_bytes()
