"""A base model from a stranger: only the files that are named, no links, no other weights than those in the folder."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from genvalues.common import files
from genvalues.common.errors import UserError
from llama_lora import evaluation, library_versions, model_files
from llama_lora.config import Model
from llama_lora.data import resolve
from llama_lora.data.rendering import RenderedExample, Segment
from llama_lora.data.snapshot import take_snapshot
from llama_lora.data.tokens import ExampleTokenizer
from llama_lora.stages.tokenize import load_tokenizer
from llama_lora.streaming import StreamedModel
from trainer.conftest import Run, byte_tokenizer, llama_lora_here, make_model
from trainer.test_merge import make_adapter, weights_of
from trainer.test_snapshot import write_gguf


def snapshot(base: Path, models: Path, name: str = "m") -> Path:
    return take_snapshot(Model(path=str(base)), resolve.Source(name, "1"), models)


def refusal(base: Path, models: Path) -> str:
    with pytest.raises(UserError) as error:
        snapshot(base, models)
    assert error.value.where and error.value.fix and "\n" not in str(error.value)
    assert not (models / "m@1").exists(), "a model was kept"
    return str(error.value)


def change_json(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**content, **changes}))


def names_in(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_model(tmp_path / "base")


# --- which files


def test_a_snapshot_has_the_files_that_are_named_and_no_others(base: Path, tmp_path: Path) -> None:
    before = names_in(base)
    extra = [
        *("README.md", ".gitattributes", "original/consolidated.00.pth", "original/config.json", "onnx/model.onnx"),
        *("pytorch_model.bin", "model.fp16.safetensors", "consolidated.safetensors", "training_args.bin"),
        *("modeling_x.py", "custom_generate/generate.py", "trainer_state.json", "nested/tokenizer.json", ".git/HEAD"),
    ]
    extra.append(os.fsdecode(b"LICENSE\xff"))
    own = ["LICENSE", "LICENSE.txt", "special_tokens_map.json", "additional_chat_templates/tools.jinja"]
    for name in [*extra, *own]:
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text("{}")
    assert names_in(snapshot(base, tmp_path / "models")) == {*before, *own}


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_a_base_model_with_an_adapter_is_refused_by_name(base: Path, tmp_path: Path, name: str) -> None:
    """transformers follows its base_model_name_or_path: another model would be trained."""
    (base / name).write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "other")}))
    said = refusal(base, tmp_path / "models")
    assert name in said and "not a base model" in said and "llama-lora merge" in said


def test_an_adapter_that_was_put_into_a_snapshot_later_is_refused_by_every_stage(finished_run: Run) -> None:
    model = finished_run.workspace / finished_run.manifest("tokenize")["facts"]["model"]
    (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/other"}))
    shutil.rmtree(finished_run.paths.base_scores)  # with them evaluate does not read the base model
    for stage in ("evaluate", "merge", "consolidate"):
        finished_run.paths.manifest(stage).unlink()
        assert "adapter_config.json" in finished_run(stage, status=2)
    finished_run.config["training"]["maxSequenceLength"] = 64
    assert "adapter_config.json is not among the files" in finished_run("tokenize")
    assert not (model / "adapter_config.json").exists()  # the snapshot was made again


def test_a_gguf_file_is_read_without_the_files_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "gguf" / "model.gguf"
    file.parent.mkdir()
    write_gguf(file, begin=False)
    other = make_model(tmp_path / "other")
    (file.parent / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(other)}))
    (file.parent / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ 'planted' }}"}))
    folder = snapshot(file, tmp_path / "models")
    assert "planted" not in library_versions.load_tokenizer(folder).get_chat_template()
    assert (load_file(folder / "model.safetensors")["model.embed_tokens.weight"] == 1).all()


def test_only_pickled_weights_are_refused_with_the_way_to_convert_them(base: Path, tmp_path: Path) -> None:
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    assert "no *.safetensors weights" in refusal(base, tmp_path / "models")


# --- links and other files that are not files


def test_a_link_in_a_base_model_is_refused_by_name(base: Path, tmp_path: Path) -> None:
    outside = shutil.copyfile(base / "model.safetensors", tmp_path / "outside.safetensors")
    for name in ("model.safetensors", "tokenizer_config.json", "config.json"):
        link = shutil.copytree(base, tmp_path / f"with-{name}") / name
        link.unlink()
        link.symlink_to(outside if name.startswith("model") else base / name)
        said = refusal(link.parent, tmp_path / "models")
        assert str(link) in said and "symbolic link" in said
        with pytest.raises(UserError, match="symbolic link"):
            resolve._model_files(link.parent)


def test_a_linked_folder_is_not_followed_into_the_snapshot_or_the_merged_model(base: Path, tmp_path: Path) -> None:
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "key.jinja").write_text("secret")
    (base / "more").symlink_to(tmp_path / "secrets")
    (base / "additional_chat_templates").symlink_to(tmp_path / "secrets")
    assert "additional_chat_templates" in refusal(base, tmp_path / "models")
    (base / "additional_chat_templates").unlink()
    assert "key.jinja" not in {Path(name).name for name in names_in(snapshot(base, tmp_path / "models"))}
    adapter = make_adapter(base, tmp_path / "adapter")
    llama_lora_here("merge", "--base", str(base), "--adapter", str(adapter), "--output", str(tmp_path / "merged"))
    assert not (tmp_path / "merged" / "more").exists()


def test_the_hub_clients_cache_is_followed_and_nothing_else_is(base: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--org--thing"
    cached = repository / "snapshots" / ("a" * 40)
    cached.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(base.iterdir())):
        shutil.copyfile(file, repository / "blobs" / f"{number:064x}")
        (cached / file.name).symlink_to(f"../../blobs/{number:064x}")
    folder = snapshot(cached, tmp_path / "models")
    assert weights_of(folder).keys() == weights_of(base).keys() and not any(
        file.is_symlink() for file in folder.iterdir()
    )
    adapter = make_adapter(base, tmp_path / "adapter")
    llama_lora_here("merge", "--base", str(cached), "--adapter", str(adapter), "--output", str(tmp_path / "merged"))
    assert not any(file.is_symlink() for file in (tmp_path / "merged").iterdir())
    for target in (base / "config.json", "../../refs/main", "../../../models--org--other/blobs/x"):
        (cached / "config.json").unlink()
        (cached / "config.json").symlink_to(target)
        assert "symbolic link" in refusal(cached, tmp_path / "new")


def test_a_fifo_a_folder_and_a_socket_are_refused_and_do_not_wait(base: Path, tmp_path: Path) -> None:
    def with_socket(path: Path) -> None:
        os.chdir(path.parent)  # a socket's path is short
        socket.socket(socket.AF_UNIX).bind(path.name)

    here = Path.cwd()
    for kind in (os.mkfifo, os.mkdir, with_socket):
        file = base / "generation_config.json"
        shutil.rmtree(file) if file.is_dir() else file.unlink()
        kind(file)
        os.chdir(here)
        assert "not a regular file" in refusal(base, tmp_path / "models")


# --- the index and the weights


@pytest.mark.parametrize(
    "shard",
    ["../other/x.safetensors", "/etc/passwd", "sub/x.safetensors", "", 7, None, ["a"], "weights.bin", "-x.safetensors"],
)  # fmt: skip
def test_an_index_names_plain_files_of_its_own_folder(tmp_path: Path, shard: Any) -> None:
    base = make_model(tmp_path / "base", max_shard_size="40KB")
    index = base / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    change_json(index, weight_map={**weight_map, "model.norm.weight": shard})
    said = refusal(base, tmp_path / "models")
    assert str(index) in said and "model.norm.weight" in said


def test_a_tensor_that_is_not_where_the_index_says_is_refused(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", max_shard_size="40KB")
    index = base / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    other = next(shard for shard in weight_map.values() if shard != weight_map["model.norm.weight"])
    change_json(index, weight_map={**weight_map, "model.norm.weight": other})
    assert "model.norm.weight not found, but the index lists it" in refusal(base, tmp_path / "models")


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", max_shard_size="40KB")
    index = base / "model.safetensors.index.json"
    save_file({"model.norm.weight": torch.ones(32)}, base / "more.safetensors")
    weight_map = json.loads(index.read_text())["weight_map"]
    change_json(index, weight_map={**weight_map, "x": "more.safetensors"})
    assert "model.norm.weight is also in" in refusal(base, tmp_path / "models")


def test_of_an_index_and_a_single_file_the_snapshot_has_what_transformers_loads(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", max_shard_size="40KB")
    whole = {name: torch.zeros_like(tensor) for name, tensor in weights_of(base).items()}
    save_file(whole, base / "model.safetensors", metadata={"format": "pt"})
    folder = snapshot(base, tmp_path / "models")
    assert {name for name in names_in(folder) if "safetensors" in name} == {"model.safetensors"}
    assert not any(parameter.any() for parameter in evaluation.load_model(folder).parameters())
    for load in (evaluation.load_model, StreamedModel):
        with pytest.raises(UserError, match="has both"):
            load(base)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 64}, ["has shape", "config.json needs"]),
        ({"num_hidden_layers": 3}, ["lacks weights", "model.layers.2"]),
        ({"num_hidden_layers": 1}, ["model.layers.1.", "of a layer that its config.json does not have"]),
        ({"num_hidden_layers": 10**9}, ["num_hidden_layers", "only 21 weights"]),
        ({"num_attention_heads": 0}, ["transformers does not support"]),
        ({"hidden_size": "wide"}, ["transformers does not support"]),
        ({"model_type": "evil", "auto_map": {"AutoConfig": "evil.E"}}, ["auto_map", "not run"]),
        ({"transformers_weights": "../other/model.safetensors"}, ["transformers_weights"]),
    ],
)  # fmt: skip
def test_a_config_of_another_architecture_than_the_weights_is_refused(
    base: Path, tmp_path: Path, changes: dict[str, Any], words: list[str]
) -> None:
    change_json(base / "config.json", **changes)
    said = refusal(base, tmp_path / "models")
    assert not [word for word in words if word not in said], said


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "rope_scaling.factor 0,"),
        ({"rope_parameters": {"rope_type": "linear", "factor": -1.5}}, "rope_parameters.factor -1.5,"),
        ({"rope_parameters": {"sliding": {"rope_theta": 0}}}, "rope_parameters.sliding.rope_theta 0,"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 1e-300}}, "rope_scaling.factor 1e-300,"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1, 0]}}, "rope_scaling.short_factor 0,"),
        ({"rope_theta": "10000"}, "rope_theta '10000',"),
        ({"rms_norm_eps": True}, "rms_norm_eps True,"),
        ({"initializer_range": -1}, "initializer_range -1,"),
    ],
)  # fmt: skip
def test_a_number_of_a_config_that_makes_nan_is_refused_by_its_key(
    base: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    change_json(base / "config.json", **changes)
    said = refusal(base, tmp_path / "models")
    assert f"config.json of {base} has {words} which must be a positive number" in said


@pytest.mark.parametrize("content", ["[]", "null", '"text"', "{" * 100_000, "{", "", '{"a": NaN}'])
def test_a_config_or_index_of_any_content_is_one_line(tmp_path: Path, content: str) -> None:
    for name in ("config.json", "model.safetensors.index.json"):
        base = make_model(tmp_path / name / str(len(content)), max_shard_size="40KB")
        (base / name).write_text(content)
        assert name in refusal(base, tmp_path / "models")


def test_a_model_is_loaded_from_its_folder_alone(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its configs name: no network, no other folder."""
    other = make_model(tmp_path / "other", hidden_size=48, num_attention_heads=3, num_key_value_heads=3)
    change_json(base / "config.json", _name_or_path=str(other), attn_implementation="evil/kernel@main")
    change_json(
        base / "tokenizer_config.json",
        name_or_path=str(other),
        tokenizer_file=str(other / "tokenizer.json"),
        fast_tokenizer_files=["tokenizer.json", "../other/tokenizer.4.0.0.json"],
    )
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["planted"] = 999
    for name in ("tokenizer.json", "tokenizer.4.0.0.json"):
        (other / name).write_text(json.dumps(tokenizer))

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    folder = snapshot(base, tmp_path / "models")
    assert "planted" not in library_versions.load_tokenizer(folder).get_vocab()
    loaded, stored = evaluation.load_model(folder).state_dict(), weights_of(base)
    assert loaded.keys() == stored.keys() and all(torch.equal(loaded[name], stored[name]) for name in stored)


def test_a_model_with_tied_embeddings_is_complete(tmp_path: Path) -> None:
    folder = snapshot(make_model(tmp_path / "base", tie_word_embeddings=True), tmp_path / "models")
    model = evaluation.load_model(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_unused_tensors_that_are_of_no_further_layer_are_allowed(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", tie_word_embeddings=True)
    weights = load_file(base / "model.safetensors")
    frequencies = {f"model.layers.{number}.self_attn.rotary_emb.inv_freq": torch.ones(4) for number in (0, 1)}
    head = {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    save_file(weights | frequencies | head, base / "model.safetensors", metadata={"format": "pt"})
    snapshot(base, tmp_path / "models")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_output_layer_that_differs_from_the_embeddings_that_it_is_tied_to_is_refused(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    """transformers 5 loads both. Here it would be trained and scored as tied."""
    base = make_model(tmp_path / "base", tie_word_embeddings=True)
    weights = load_file(base / "model.safetensors")
    head = weights["model.embed_tokens.weight"].to(dtype, copy=True)
    head[-1, -1] += 1
    save_file(weights | {"lm_head.weight": head}, base / "model.safetensors", metadata={"format": "pt"})
    said = refusal(base, tmp_path / "models")
    assert "lm_head.weight of" in said and "model.embed_tokens.weight" in said
    assert "Set tie_word_embeddings to false" in said
    change_json(base / "config.json", tie_word_embeddings=False)
    assert weights_of(snapshot(base, tmp_path / "models")).keys() == {*weights, "lm_head.weight"}


def test_a_file_that_was_put_into_a_snapshot_later_does_not_get_into_the_merged_model(finished_run: Run) -> None:
    model = finished_run.workspace / finished_run.manifest("tokenize")["facts"]["model"]
    (model / "chat_template.json").write_text('{"chat_template": "planted"}')
    finished_run.paths.manifest("merge").unlink()
    assert f"{model / 'chat_template.json'}: is not among the files" in finished_run("merge", status=2)


def test_a_model_without_all_its_weights_is_not_loaded_with_random_ones(base: Path) -> None:
    weights = load_file(base / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    for load in (evaluation.load_model, StreamedModel):
        with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight"):
            load(base)


# --- the tokenizer


def growing(kind: str) -> dict[str, Any]:
    """Changes of a tokenizer.json that have it make millions of characters or tokens of one text."""

    def replaced(by: str, pattern: str = "String") -> dict[str, Any]:
        return {"type": "Replace", "pattern": {pattern: "a" if pattern == "String" else ""}, "content": by}

    charsmap = (4).to_bytes(4, "little") + bytes(4) + b"x" * 1000 + b"\0"
    special = {"id": "</s>", "ids": [1] * 10_000, "tokens": ["</s>"] * 10_000}
    around = [{"SpecialToken": {"id": "</s>", "type_id": 0}}] * 100 + [{"Sequence": {"id": "A", "type_id": 0}}]
    post = {"type": "TemplateProcessing", "single": around, "pair": [], "special_tokens": {"</s>": special}}
    return {
        "long": {"normalizer": replaced("a" * 1_000_000)},
        "without a type": {"normalizer": {"pattern": {"String": "a"}, "content": "a" * 1000}},
        "chained": {"normalizer": {"type": "Sequence", "normalizers": [replaced("aa")] * 40}},
        "between": {"normalizer": {"type": "Sequence", "normalizers": [replaced("x", "Regex")] * 40}},
        "prepend": {"normalizer": {"type": "Prepend", "prepend": "x" * 1000}},
        "charsmap": {
            "normalizer": {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()}
        },
        "pre-tokenizers": {
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}] * 40,
            }
        },
        "decoder": {"decoder": {"type": "Sequence", "decoders": [replaced("aa")] * 40}},
        "tokens": {"post_processor": post},
    }[kind]


@pytest.mark.parametrize(
    "kind",
    ["long", "without a type", "chained", "between", "prepend", "charsmap", "pre-tokenizers", "decoder", "tokens"],
)
def test_a_tokenizer_that_makes_texts_much_longer_is_refused(tmp_path: Path, kind: str) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    load_tokenizer(tmp_path)
    change_json(tmp_path / "tokenizer.json", **growing(kind))
    with pytest.raises(UserError, match="the most is") as error:
        load_tokenizer(tmp_path)
    assert error.value.where == str(tmp_path / "tokenizer.json") and error.value.fix


def test_a_tokenizer_of_sentencepiece_is_refused_for_its_map_of_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers makes a tokenizer.json of a tokenizer.model, which has the same map."""
    tokenizer = byte_tokenizer()
    described = json.loads(tokenizer.backend_tokenizer.to_str()) | growing("long")
    monkeypatch.setattr(type(tokenizer), "from_pretrained", lambda *_, **__: tokenizer)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: tokenizer)
    tokenizer.backend_tokenizer.normalizer = Tokenizer.from_str(json.dumps(described)).normalizer
    with pytest.raises(UserError, match="the most is"):
        load_tokenizer(tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_a_regular_expression_of_a_tokenizer_that_gives_up_is_an_error_of_the_model(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    split = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}
    change_json(tmp_path / "tokenizer.json", pre_tokenizer=split)
    example = RenderedExample((Segment("x" * 30, trained=True),), begins=False)
    with pytest.raises(UserError, match=r"the tokenizer fails: .*retry-limit") as error:
        ExampleTokenizer(load_tokenizer(tmp_path)).tokenize([example])
    assert error.value.where == "model" and error.value.fix


# --- paths


@pytest.mark.parametrize("name", ["..", "../other", "a/b", "/tmp/x", "", "a\n", ".hidden", "-x", "x" * 64, "a\0b"])
def test_the_name_of_a_run_is_the_name_of_a_folder(new_run: Callable[..., Run], tmp_path: Path, name: str) -> None:
    run = new_run()
    run.config["name"] = name
    before = {path for path in tmp_path.rglob("*") if path.name != "run.yaml"}
    command = ["tokenize", "--config", str(run.write_config()), "--workspace", str(run.workspace)]
    assert "name" in llama_lora_here(*command, status=2)
    assert {path for path in tmp_path.rglob("*") if path.name != "run.yaml"} == before


@pytest.mark.parametrize("option", ["workspace", "base", "adapter", "output"])
def test_a_folder_whose_path_is_not_utf_8_is_refused_before_anything_is_written(
    new_run: Callable[..., Run], tmp_path: Path, option: str
) -> None:
    folder = tmp_path / os.fsdecode(b"a\xff")
    if option == "workspace":
        command = ["tokenize", "--config", str(new_run().write_config()), "--workspace", str(folder)]
    else:
        given = {each: str(folder if each == option else tmp_path) for each in ("base", "adapter", "output")}
        command = ["merge", *(word for each in given.items() for word in (f"--{each[0]}", each[1]))]
    assert f"--{option}: {tmp_path}/a" in (said := llama_lora_here(*command, status=2)) and "not UTF-8" in said
    assert not folder.exists()


def test_a_workspace_whose_path_contains_two_colons_is_refused_before_anything_is_written(
    new_run: Callable[..., Run], tmp_path: Path
) -> None:
    folder = tmp_path / "a::b"
    command = ["tokenize", "--config", str(new_run().write_config()), "--workspace", str(folder)]
    assert f"--workspace: its path contains ::, which the library datasets cannot open: {folder}. Rename" in (
        llama_lora_here(*command, status=2)
    )
    assert not folder.exists()


@pytest.mark.parametrize(
    "folder", ["runs", "models", "datasets", "base-scores", "runs/run", "runs/run/stages", "runs/run/merged"]
)
def test_a_linked_folder_of_a_run_is_refused_before_anything_is_written(
    new_run: Callable[..., Run], tmp_path: Path, folder: str
) -> None:
    run = new_run()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (run.workspace / folder).parent.mkdir(parents=True)
    (run.workspace / folder).symlink_to(elsewhere)
    said = run("tokenize", status=2)
    assert f"{run.workspace / folder}: is a symbolic link" in said
    assert not list(elsewhere.iterdir())


def test_a_checkpoint_that_is_a_link_is_refused(finished_run: Run, tmp_path: Path) -> None:
    checkpoint = finished_run.workspace / finished_run.manifest("train")["facts"]["checkpoint"]
    shutil.copytree(checkpoint, tmp_path / "elsewhere")
    checkpoint.with_name("step-000001").symlink_to(tmp_path / "elsewhere")
    finished_run.paths.manifest("train").unlink()
    assert f"{checkpoint.with_name('step-000001')}: is a symbolic link" in finished_run("train", status=2)


def test_no_output_is_written_through_a_link(finished_run: Run, tmp_path: Path) -> None:
    """A pod on the same volume can put links where a run writes next."""
    precious = tmp_path / "precious"
    paths, fingerprint = finished_run.paths, finished_run.manifest("train")["fingerprint"]
    (paths.worker_stacks("train", 0)).parent.mkdir(exist_ok=True)
    outputs = [
        *(paths.config, paths.resolved, paths.progress, paths.report, paths.prometheus, paths.metrics(fingerprint)),
        *(paths.worker_stacks("train", 0), *(paths.manifest(stage) for stage in ("train", "merge", "evaluate"))),
    ]
    for output in outputs:
        output.unlink(missing_ok=True)
        output.symlink_to(precious)
    precious.write_text("mine")
    for stage in ("train", "consolidate", "merge", "evaluate"):
        command = [stage, "--config", str(finished_run.write_config()), "--workspace", str(finished_run.workspace)]
        with contextlib.suppress(AssertionError):  # refused, which is as good
            llama_lora_here(*command) if stage != "train" else finished_run(stage)
        assert precious.read_text() == "mine", stage


def test_the_allowed_names_are_those_of_the_page() -> None:
    page = (Path(__file__).parents[2] / "docs/security.md").read_text(encoding="utf-8")
    for name in (*model_files.KEPT, model_files.WEIGHTS, model_files.INDEX):
        assert f"`{name}`" in page, name


def test_the_place_of_leftovers_may_have_files_and_links(finished_run: Run, tmp_path: Path) -> None:
    """What a killed process left is deleted first; a link there is deleted, and what it leads to is not."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("x")
    paths = finished_run.paths
    checkpoints = paths.checkpoints(finished_run.manifest("train")["fingerprint"])
    for folder in (paths.adapter, checkpoints / "step-000006"):
        folder.with_name(f".{folder.name}{files.PARTIAL}1").symlink_to(precious)
        folder.with_name(f".{folder.name}{files.PARTIAL}2").write_text("x")
    (checkpoints / "step-000006" / "training.json").write_text("x")
    for stage in ("train", "consolidate"):
        finished_run.paths.manifest(stage).unlink()
    finished_run("train")
    finished_run("consolidate")
    assert (precious / "file").exists()
    assert not list(paths.run.rglob(f".*{files.PARTIAL}*"))


@pytest.mark.parametrize("name", ["stages", "stacks"])
def test_a_file_in_the_place_of_a_folder_is_an_error_of_the_user(finished_run: Run, name: str) -> None:
    folder = finished_run.paths.run / name
    finished_run.paths.manifest("train").unlink()
    if folder.exists():
        shutil.rmtree(folder)
    folder.write_text("x")
    said = finished_run("train" if name == "stacks" else "tokenize", status=2)
    assert f"{folder}: " in said and "Remove the file" in said
