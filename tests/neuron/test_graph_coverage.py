"""compile traces all graphs that train needs, including those of saves, the probe, the last step and a resume."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from neuron.conftest import make_neuron_run, say_compiled
from neuron.graphs import graph_set
from trainer.conftest import Run

SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"dropout": 0.1},
    "training": {"maxSteps": 12, "saveSteps": 5, "maxSequenceLength": 64, "warmupRatio": 0.2, "weightDecay": 0.1},
}


def graphs_of(run: Run, stage: str, folder: Path, **environment: str) -> set[str]:
    """The graphs of a stage's workers, run with the command that neuron_parallel_compile gets."""
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "llama_lora.backends.launch", stage, str(run.write_config()), str(run.workspace)]
    ended = subprocess.run(
        command,
        env={**os.environ, "XLA_FLAGS": f"--xla_dump_to={folder} --xla_dump_hlo_as_text", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return graph_set(folder)


@pytest.fixture(scope="module")
def compiled(bf16_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, set[str]]:
    """A run, and the graphs that its compile stage traced."""
    run = make_neuron_run(tmp_path_factory.mktemp("graphs"), bf16_model, 2, 1, **SETTINGS)
    run.config["training"]["maxSteps"] = 1  # graphs do not depend on the number of steps
    traced = graphs_of(run, "compile", run.folder / "dump-compile", NEURON_EXTRACT_GRAPHS_ONLY="1")
    assert not run.paths.rehearsal.exists() and not (run.paths.run / "checkpoints").exists()
    return run, traced


def test_compile_traces_all_graphs_of_train_and_of_a_resumed_train(compiled: tuple[Run, set[str]]) -> None:
    run, traced = compiled
    run.config["training"]["maxSteps"] = 12
    say_compiled(run)
    needed = graphs_of(run, "train", run.folder / "dump-train")
    assert len(needed) > 20 and needed - traced == set()

    run.paths.manifest("train").unlink()
    (last,) = (run.paths.run / "checkpoints").glob("*/step-000012")
    shutil.rmtree(last)
    resumed = graphs_of(run, "train", run.folder / "dump-resumed")
    assert resumed - traced == set()


def test_another_max_sequence_length_needs_other_graphs(compiled: tuple[Run, set[str]], tmp_path: Path) -> None:
    run, traced = compiled
    other = run.copy(tmp_path / "other")
    other.config["training"] |= {"maxSequenceLength": 128, "maxSteps": 3}
    other("tokenize")
    say_compiled(other)
    assert graphs_of(other, "train", other.folder / "dump-train") - traced
