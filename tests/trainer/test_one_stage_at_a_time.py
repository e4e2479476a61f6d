"""Two stages of one run do not write at the same time, nor do two tools with the same output."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from genvalues.common.locks import lock_beside, locked
from llama_lora import stage
from llama_lora.stages import consolidate
from trainer.conftest import LLAMA_LORA, Run, llama_lora_here
from trainer.test_consolidate import checkpoint_of
from trainer.warm import WarmPopen


def start(run: Run, name: str) -> WarmPopen:
    command = [LLAMA_LORA, name, "--config", str(run.write_config()), "--workspace", str(run.workspace)]
    return WarmPopen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def read_to(process: WarmPopen, words: str) -> str:
    """The lines that a process logs up to one with ``words``."""
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if words in line:
            return said
    raise AssertionError(f"it ended without {words!r}:\n{said}")


def test_two_merges_of_one_run_write_once(finished_run: Run) -> None:
    before = finished_run.manifest("merge")["outputs"]
    finished_run.paths.manifest("merge").unlink()
    both = [start(finished_run, "merge") for _ in range(2)]
    said = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sorted(("skipped" in text, "tensors into" in text) for text in said) == [(False, True), (True, False)]
    assert finished_run.manifest("merge")["outputs"] == before


def test_two_trainings_of_one_run_both_succeed(finished_run: Run) -> None:
    """The second waits, and finds all steps done; both have the same files for stack traces."""
    before = finished_run.manifest("train")["outputs"]
    finished_run.paths.manifest("train").unlink()
    with locked(finished_run.paths.lock, "a test"):
        both = [start(finished_run, "train") for _ in range(2)]
        for process in both:
            read_to(process, "waiting for ")
    said = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert finished_run.manifest("train")["outputs"] == before


@pytest.mark.parametrize("name", ["merge", "train"])
def test_a_stage_waits_for_another_and_says_for_which(finished_run: Run, name: str) -> None:
    """Of train, which may run on several nodes, one worker waits."""
    finished_run.paths.manifest(name).unlink()
    with locked(finished_run.paths.lock, "llama-lora evaluate"):
        process = start(finished_run, name)
        assert read_to(process, "waiting for ").count("waiting for llama-lora evaluate (process ") == 1
        assert process.poll() is None and not finished_run.paths.manifest(name).exists()
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert finished_run.paths.manifest(name).exists()


def test_it_waits_for_a_bounded_time(finished_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "MOST_WAIT", 0.3)
    finished_run.paths.manifest("merge").unlink()
    with locked(finished_run.paths.lock, "llama-lora merge"):
        said = finished_run("merge", status=2)
        assert f"{finished_run.paths.lock}: still locked after" in said and "by llama-lora merge (process" in said
        assert "skipped" in finished_run("consolidate"), "what is up to date does not wait"
    finished_run("merge")


def test_other_runs_of_the_workspace_do_not_wait(finished_run: Run) -> None:
    with locked(finished_run.paths.lock, "llama-lora merge"):
        finished_run.config["name"] = "second"
        finished_run("tokenize")


@pytest.mark.parametrize("name", ["merge", "tokenize"])
def test_a_planted_lock_is_not_followed(finished_run: Run, name: str) -> None:
    precious = finished_run.folder / "precious"
    precious.write_text("precious")
    lock = finished_run.paths.lock if name == "merge" else lock_beside(next(finished_run.workspace.glob("models/*@*/")))
    lock.unlink(missing_ok=True)
    lock.symlink_to(precious)
    finished_run.paths.manifest(name).unlink()
    assert f"{lock}: the lock file is a symbolic link" in finished_run(name, status=2)
    assert precious.read_text() == "precious"


def test_two_tools_with_the_same_output_do_not_write_at_the_same_time(
    whole_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consolidate, "MOST_WAIT", 0.3)
    arguments = ["--checkpoint", str(checkpoint_of(whole_run)), "--output", str(tmp_path / "adapter")]
    with locked(lock_beside(tmp_path / "adapter"), "llama-lora merge", remove=True):
        assert "by llama-lora merge (process" in llama_lora_here("consolidate", *arguments, status=2)
    llama_lora_here("consolidate", *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"], "no lock file is left beside a user's folder"
