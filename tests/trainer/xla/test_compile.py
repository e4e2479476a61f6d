"""The compile stage on Trainium, without one, and the locks of the cache that it shares."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from llama_lora.backends.xla import cache
from trainer.conftest import Run
from trainer.test_training import wait_for
from trainer.xla.neuron_run import NeuronRun


def test_compile_runs_the_train_stages_own_workers_in_the_program_and_records_graphs_alone(
    neuron: Callable[..., NeuronRun],
) -> None:
    run = neuron(parallelism={"processesPerNode": 2, "dataParallelSize": 2})
    said = run.as_process()
    (call,) = run.calls
    assert call["command"] == "collect-and-compile"
    assert call["run"][1:4] == ["-m", "llama_lora.backends.launch", "compile"]
    assert run.facts["graphs"] == {"found": 3, "compiled": 3, "failed": 0, "fromCache": 0}
    manifest = run.run.manifest("compile")
    assert sorted(manifest["outputs"]) == sorted(
        str(module.neff.relative_to(run.run.workspace)) for module in run.modules
    )
    # What devices return in a trial run is garbage.
    assert "0.123" not in json.dumps(manifest) and "0.12" not in said and "loss" not in json.dumps(manifest)
    assert not list(run.run.paths.compile_users.iterdir()), "nobody uses the cache any more"
    assert "skipped" in run() and len(run.calls) == 1


def test_a_graph_that_was_cleaned_from_the_cache_is_compiled_again(neuron: Callable[..., NeuronRun]) -> None:
    run = neuron()
    run()
    shutil.rmtree(run.modules[0].folder)
    assert not run.is_done()
    run()
    assert run.facts["graphs"] == {"found": 3, "compiled": 1, "failed": 0, "fromCache": 2}


def test_a_workers_user_error_passes_through_the_program_once(neuron: Callable[..., NeuronRun]) -> None:
    run = neuron(parallelism={"processesPerNode": 2, "dataParallelSize": 2})
    said = run.as_process(status=2, STANDIN_USER_ERROR="1")
    assert said.count("training.maxSequenceLength: is more than the model knows. Set it to 64") == 1
    assert not run.is_done()


def test_a_trial_run_that_crashes_is_tried_again(neuron: Callable[..., NeuronRun]) -> None:
    run = neuron()
    run.run.paths.compile_reports.mkdir(parents=True)
    earlier = {"trial": "an earlier one", "nodes": 1}
    (run.run.paths.compile_reports / "trial.json").write_text(json.dumps(earlier))
    said = run.as_process(status=1, STANDIN_CRASH="0")
    assert "the device is gone" in said and "the trial run failed on this node" in said
    assert not run.is_done()
    run()
    assert run.facts["graphs"]["found"] == 3


def test_without_the_program_one_message_says_what_is_missing(neuron: Callable[..., NeuronRun]) -> None:
    run = neuron()
    said = run(status=2, PATH=os.environ["PATH"])
    assert said.strip().splitlines()[-1].startswith("compile: neuron_parallel_compile not found")


def test_failed_graphs_are_one_message_with_the_end_of_their_log_and_a_rerun_tries_them_again(
    neuron: Callable[..., NeuronRun],
) -> None:
    run = neuron()
    said = run(status=2, STANDIN_FAIL="probe")
    message = said[said.index("1 of 3 graphs did not compile") :]
    assert "[TEN404] Internal tensorizer error" in message and message.count("Compiling\n") == 14
    assert "model.log: 1 of 3 graphs" in said
    assert not run.is_done()
    assert "--retry_failed_compilation" not in run.calls[0]["flags"]
    run()
    assert "--retry_failed_compilation" in run.calls[1]["flags"]
    assert run.facts["graphs"] == {"found": 3, "compiled": 1, "failed": 0, "fromCache": 2}


def test_a_compiler_that_was_killed_is_tried_again_by_itself(neuron: Callable[..., NeuronRun]) -> None:
    run = neuron()
    said = run(status=1, STANDIN_FAIL="step,save", STANDIN_REASON="neuronx-cc died with signal 9")
    assert "2 of 3 graphs did not compile" in said and "died with signal 9" in said


def test_the_programs_status_does_not_hide_that_a_graph_has_no_neff(neuron: Callable[..., NeuronRun]) -> None:
    """256 failures are status 0 to a shell, and so is a crash in its pool."""
    assert "1 of 3 graphs did not compile" in neuron()(status=2, STANDIN_FAIL="save", STANDIN_STATUS="0")


def test_a_program_that_ends_badly_without_a_failed_graph_is_not_believed(neuron: Callable[..., NeuronRun]) -> None:
    run = neuron()
    assert "neuron_parallel_compile ended with status 9" in run(status=1, STANDIN_STATUS="9")
    assert not run.is_done()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_compile_leaves_no_process_and_a_rerun_starts_clean(
    neuron: Callable[..., NeuronRun], how: signal.Signals
) -> None:
    run = neuron()
    killed = run.start(torchrun=False, STANDIN_SECONDS="60")
    wait_for(lambda: any(module.is_locked for module in run.modules))
    (call,) = run.calls
    killed.send_signal(how)
    assert killed.wait(timeout=20) == (-how if how == signal.SIGKILL else 128 + how)
    wait_for(lambda: not Path(f"/proc/{call['pid']}").exists(), 20)
    assert not run.is_done() and any(module.is_locked for module in run.modules)
    said = run()
    assert run.commands == ["collect-and-compile", "clear-locks", "collect-and-compile"], said
    assert run.facts["graphs"] == {"found": 3, "compiled": 3, "failed": 0, "fromCache": 0}


def test_a_compile_killed_in_its_trial_run_takes_the_workers_along(neuron: Callable[..., NeuronRun]) -> None:
    """torchrun gives each of them a session of its own, which no signal to a group reaches."""
    run = neuron()
    worker = run.run.paths.run / "worker"
    killed = run.start(STANDIN_SLEEP="1")
    wait_for(lambda: worker.exists() and bool(worker.read_text()))
    killed.kill()
    wait_for(lambda: not Path(f"/proc/{worker.read_text()}").exists(), 20)
    run()
    assert run.facts["graphs"]["found"] == 3


# --- locks


def test_locks_stay_while_another_run_uses_the_cache(neuron: Callable[..., NeuronRun]) -> None:
    run, other = neuron(), neuron("other", lora={"r": 8})
    shutil.rmtree(other.run.workspace / "compile-cache", ignore_errors=True)
    run.run.paths.compile_cache.mkdir(parents=True)
    (other.run.workspace / "compile-cache").symlink_to(run.run.paths.compile_cache)
    compiling = other.start(torchrun=False, STANDIN_SECONDS="4")
    try:
        wait_for(lambda: any(module.is_locked for module in run.modules))
        said = run()
        assert "the cache is in use, keeping the locks" in said
        assert "clear-locks" not in run.commands
        output, _ = compiling.communicate(timeout=300)
        assert compiling.returncode == 0, output
    finally:
        compiling.kill()


def test_locks_are_only_cleared_when_every_other_user_is_known_to_be_gone(
    new_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "HEARTBEAT", 0.05)
    monkeypatch.setattr(cache, "TIMEOUT", 0.6)
    paths = new_run().paths
    gone = paths.compile_users / "0-gone.json"
    with cache.using_cache(paths, "compile") as use:
        assert use.locks_are_stale()
        gone.write_text(json.dumps({"id": "0", "run": "x", "stage": "train", "state": "working"}))
        began = time.monotonic()
        assert use.locks_are_stale() and time.monotonic() - began > 0.5, "it could have been alive"
        assert not gone.exists()
        with cache.using_cache(paths, "train"):
            assert not use.locks_are_stale()


def test_of_the_nodes_of_a_stage_that_start_together_the_first_answers_for_all(
    new_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "HEARTBEAT", 0.05)
    paths = new_run().paths
    with cache.using_cache(paths, "compile") as first, cache.using_cache(paths, "compile") as second:
        assert first.locks_are_stale() and not second.locks_are_stale()
        assert first.other_nodes() == 1
        second.mark_working()
        assert not first.locks_are_stale(), "a node that has begun may hold locks"


def test_the_first_worker_of_a_training_node_counts_as_a_user(
    new_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = new_run().paths
    with cache.using_cache(paths, "compile") as use:
        for local_rank, held, counts in (("0", False, 1), ("1", False, 0), ("0", True, 0)):
            monkeypatch.setenv("LOCAL_RANK", local_rank)
            with monkeypatch.context() as patch:
                if not held:  # by the launcher, as compile's is
                    patch.delenv(cache.CACHE_USER)
                with cache.using_cache_as_worker(paths, "train"):
                    assert len(use.others.alive()) == counts
        assert not use.others.alive()
