from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from genvalues.common import files
from trainer.conftest import Run, llama_lora_here, write_checkpoint_record


def checkpoint_of(run: Run) -> Path:
    return run.workspace / run.manifest("train")["facts"]["checkpoint"]


def test_plain_peft_loads_the_adapter_and_has_the_loss_of_the_training(whole_run: Run) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = whole_run.workspace / whole_run.manifest("tokenize")["facts"]["model"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), whole_run.paths.adapter)
    saved = load_file(whole_run.paths.adapter / "adapter_model.safetensors")
    loaded = {name.replace(".default.", "."): p for name, p in model.named_parameters() if "lora_" in name}
    assert saved.keys() == loaded.keys() and len(saved) == 2 * 2 * 2
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)
    assert all(tensor.any() for tensor in saved.values())
    config = json.loads((whole_run.paths.adapter / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 8, ["q_proj", "v_proj"])
    assert str(whole_run.folder) not in json.dumps(config), "a path of this machine"


def test_alone_it_gives_what_the_run_gives(whole_run: Run, tmp_path: Path) -> None:
    llama_lora_here("consolidate", "--checkpoint", str(checkpoint_of(whole_run)), "--output", str(tmp_path / "adapter"))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "adapter" / name).read_bytes() == (whole_run.paths.adapter / name).read_bytes()


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("name", ["part-00000.safetensors", "training.json", "adapter_config.json"])
def test_a_missing_file_is_refused_by_name_and_nothing_is_written(finished_run: Run, name: str, alone: bool) -> None:
    checkpoint = checkpoint_of(finished_run)
    (checkpoint / name).unlink()
    output = finished_run.folder / "new"
    if alone:
        said = llama_lora_here("consolidate", "--checkpoint", str(checkpoint), "--output", str(output), status=2)
        kind = "file" if name.endswith(".json") else "shard"
        assert f"{checkpoint / name}: {kind} not found" in said
    else:
        before = files.sha256(finished_run.paths.adapter / "adapter_model.safetensors")
        finished_run.paths.manifest("consolidate").unlink()
        said = finished_run("consolidate", status=2)  # train's output is not whole, so train is not done
        assert "consolidate needs train" in said
        assert files.sha256(finished_run.paths.adapter / "adapter_model.safetensors") == before
    assert not output.exists()


def test_a_shard_of_another_step_is_refused_by_name(finished_run: Run) -> None:
    checkpoint = checkpoint_of(finished_run)
    other = checkpoint.with_name("step-000004") / "part-00000.safetensors"
    (checkpoint / "part-00000.safetensors").write_bytes(other.read_bytes())
    output = finished_run.folder / "new"
    said = llama_lora_here("consolidate", "--checkpoint", str(checkpoint), "--output", str(output), status=2)
    assert (
        f"{checkpoint / 'part-00000.safetensors'}: the shard's digest differs from the one recorded at step 6" in said
    )
    assert not output.exists()


def test_an_adapter_config_of_another_rank_is_refused(finished_run: Run) -> None:
    checkpoint = checkpoint_of(finished_run)
    config, record = checkpoint / "adapter_config.json", checkpoint / "checkpoint.json"
    config.write_text(config.read_text().replace('"r": 4', '"r": 8'))
    listed = json.loads(record.read_text())
    listed["files"]["adapter_config.json"] = {"bytes": config.stat().st_size, "sha256": files.sha256(config)}
    write_checkpoint_record(record, listed)
    said = llama_lora_here(
        "consolidate", "--checkpoint", str(checkpoint), "--output", str(config.parent / "x"), status=2
    )
    assert "adapter_config.json says r = 8" in said


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ("nowhere", "--checkpoint: {} is not a folder"),
        ("empty", "{}: not a checkpoint"),
        ("torn", "{}/checkpoint.json: not found"),
    ],
)
def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path, checkpoint: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "part-00000.safetensors").write_bytes(b"")
    folder = tmp_path / checkpoint
    said = llama_lora_here("consolidate", "--checkpoint", str(folder), "--output", str(tmp_path / "out"), status=2)
    assert message.format(folder) in said and not (tmp_path / "out").exists()


def test_nothing_is_overwritten_and_options_go_together(whole_run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    checkpoint = str(checkpoint_of(whole_run))
    said = llama_lora_here("consolidate", "--checkpoint", checkpoint, "--output", str(tmp_path), status=2)
    assert f"--output: {tmp_path} already exists" in said
    said = llama_lora_here("consolidate", "--checkpoint", checkpoint, "--output", "/proc/x", status=2)
    assert "--output: /proc/x cannot be created: No such file or directory. Pass another folder." in said
    assert "Pass --config run.yaml, or --checkpoint" in llama_lora_here("consolidate", "--output", "x", status=2)
