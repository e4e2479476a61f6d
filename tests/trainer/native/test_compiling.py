"""What native's compile stage records on Trainium, and what train compares. The device itself is not here."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from genvalues.common.errors import UserError
from llama_lora.backends.base import TrainingResult
from llama_lora.backends.native import compiling
from llama_lora.backends.native.backend import NativeBackend
from llama_lora.stage import Stage
from trainer.conftest import Run

RESULT = TrainingResult(3, 40, 1.5, 2 << 30, 2.0, 1.9, None)


@pytest.fixture
def on_neuron(new_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run whose device is said to be a Neuron core, after tokenize."""
    run = new_run()
    run("tokenize")
    run.config["device"] = "neuron"
    monkeypatch.delenv(compiling.CACHE, raising=False)
    monkeypatch.setattr(compiling, "installed_versions", lambda names: {"torch-neuronx": "2.14.3.0.1"})
    return run


def compiled(run: Run, **files: bytes) -> dict[str, Any]:
    """Compile's manifest after a dry run that has written ``files`` to a cache with one file."""
    backend, stage = NativeBackend(), Stage("compile", run.load(), run.paths)
    old = run.paths.neff_cache / "ab" / "old.neff"
    old.parent.mkdir(parents=True, exist_ok=True)
    old.write_bytes(b"old")
    with backend.using_cache(stage):
        for name, content in files.items():
            (run.paths.neff_cache / "ab" / name.replace("_", ".")).write_bytes(content)
        backend.finish_dry_run(stage, RESULT)
    return run.manifest("compile")


def test_the_files_that_it_adds_to_the_cache_are_its_outputs(on_neuron: Run) -> None:
    manifest = compiled(on_neuron, new_neff=b"123", new_lock=b"")
    assert list(manifest["outputs"]) == ["neff-cache/ab/new.neff"]
    assert manifest["facts"]["cache"] == {"files": 2, "added": 1, "addedBytes": 3}
    assert manifest["facts"]["seconds_per_step"] == 1.5
    assert manifest["facts"]["provenance"]["versions"] == {"torch-neuronx": "2.14.3.0.1"}
    stage = Stage("compile", on_neuron.load(), on_neuron.paths)
    assert stage.is_done()
    (on_neuron.paths.neff_cache / "ab" / "new.neff").unlink()
    assert not stage.is_done()


def test_a_setting_that_changes_a_graph_compiles_again(on_neuron: Run) -> None:
    compiled(on_neuron)
    assert Stage("compile", on_neuron.load(), on_neuron.paths).is_done()
    on_neuron.config["training"]["learningRate"] = 0.5
    assert Stage("compile", on_neuron.load(), on_neuron.paths).is_done()
    on_neuron.config["parallelism"]["shardSize"] = 2
    assert not Stage("compile", on_neuron.load(), on_neuron.paths).is_done()


def test_train_refuses_graphs_of_another_version(on_neuron: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled(on_neuron)
    train = Stage("train", on_neuron.load(), on_neuron.paths)
    NativeBackend().check_compiled(train)
    monkeypatch.setattr(compiling, "installed_versions", lambda names: {"torch-neuronx": "2.15"})
    with pytest.raises(UserError, match=r'versions.torch-neuronx: "2.14.3.0.1" -> "2.15"'):
        NativeBackend().check_compiled(train)
    assert not on_neuron.paths.manifest("compile").exists()  # so that an upgrade compiles


def test_a_variable_that_changes_graphs_is_compared(on_neuron: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled(on_neuron)
    monkeypatch.setenv("NEURON_CC_FLAGS", "--auto-cast=all")
    with pytest.raises(UserError, match=r"(?s)environment.NEURON_CC_FLAGS: not set -> .*extraEnv"):
        NativeBackend().check_compiled(Stage("train", on_neuron.load(), on_neuron.paths))


def test_the_workspaces_cache_is_used_unless_another_is_set(
    on_neuron: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiling.set_cache(on_neuron.paths)
    assert os.environ[compiling.CACHE] == str(on_neuron.paths.neff_cache)
    monkeypatch.setenv(compiling.CACHE, str(tmp_path))
    compiling.set_cache(on_neuron.paths)
    assert os.environ[compiling.CACHE] == str(tmp_path)
