"""The compile stage on Trainium, without one: everything but the compiler, which is a stand-in (standin/)."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from genvalues.common.errors import UserError
from llama_lora import stage
from llama_lora.backends import launch
from llama_lora.backends.provenance import differences
from llama_lora.backends.xla import cache, compiling, provenance, tool
from llama_lora.backends.xla.backend import XlaBackend
from llama_lora.backends.xla.graphs import graph_settings
from llama_lora.paths import Paths
from trainer.conftest import LLAMA_LORA, Run, llama_lora_here
from trainer.warm import WarmPopen

STANDIN = Path(__file__).parent / "standin"
ALONE = {"NEURON_CC_FLAGS": "", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}


def launcher_of_one_worker(stage: str, paths: Paths) -> list[str]:
    """What stands in for torchrun, and is the launcher whose end a worker watches for."""
    return ["sh", "-c", f'{launch.LAUNCHER}=$$ "$@" & wait $!', "worker", *launch.worker_command(stage, paths)]


def unique() -> str:
    return str(time.time_ns())


class NeuronRun:
    """A run with backend neuron whose compiler and backend are the stand-ins."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.log = run.folder / "calls.jsonl"
        run("tokenize")

    def environment(self, **more: str) -> dict[str, str]:
        return {
            "PATH": os.pathsep.join([str(STANDIN), str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": os.pathsep.join([str(STANDIN), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "STANDIN_LOG": str(self.log),
            **more,
        }

    def as_process(self, name: str = "compile", status: int = 0, **environment: str) -> str:
        """Run a stage in a process of its own, with workers that torchrun starts; its output."""
        process = self.start(name, **environment)
        said, _ = process.communicate()
        assert process.returncode == status and "Traceback" not in said, said
        return said

    def __call__(self, name: str = "compile", status: int = 0, **environment: str) -> str:
        """The same in this process, with one worker that no torchrun starts: seconds less."""
        with pytest.MonkeyPatch.context() as patch:
            for variable, value in {**self.environment(**environment), **ALONE, "MASTER_PORT": unique()}.items():
                patch.setenv(variable, value)
            patch.setattr(launch, "launcher_command", launcher_of_one_worker)
            return llama_lora_here(*self.command(name)[1:], status=status)

    def start(self, name: str = "compile", torchrun: bool = True, **environment: str) -> subprocess.Popen[str]:
        """Start a stage in a process of its own, with workers that torchrun starts, or with one that it does not."""
        with pytest.MonkeyPatch.context() as patch:
            if not torchrun:
                patch.setattr(launch, "launcher_command", launcher_of_one_worker)
                environment |= {**ALONE, "MASTER_PORT": unique()}
            return WarmPopen(
                self.command(name),
                env={**os.environ, **self.environment(**environment)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def command(self, name: str) -> list[str]:
        return [LLAMA_LORA, name, "--config", str(self.run.write_config()), "--workspace", str(self.run.workspace)]

    @property
    def calls(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    @property
    def commands(self) -> list[str]:
        return [call["command"] for call in self.calls]

    @property
    def modules(self) -> list[cache.Module]:
        return cache.modules(self.run.paths.compile_cache)

    @property
    def facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = self.run.manifest("compile")["facts"]
        return facts

    def stage(self, name: str) -> stage.Stage:
        return stage.Stage(name, self.run.load(), self.run.paths)

    def is_done(self, name: str = "compile") -> bool:
        return self.stage(name).is_done()


@pytest.fixture
def neuron(new_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> Callable[..., NeuronRun]:
    monkeypatch.setattr(XlaBackend, "check", lambda self, config, model: None)
    monkeypatch.setattr(cache, "HEARTBEAT", 0.2)
    monkeypatch.setattr(cache, "TIMEOUT", 2.0)

    def make(name: str = "run", **changes: Any) -> NeuronRun:
        run = new_run(name, **changes)
        run.config["backend"] = "neuron"
        return NeuronRun(run)

    return make


# --- the stage as a whole


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


# --- several nodes


def start_nodes(run: NeuronRun, of_second: dict[str, str] | None = None) -> list[subprocess.Popen[str]]:
    """Two nodes, whose graphs take a second each, so that neither is done when the other begins."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    joined = {
        "PET_NNODES": "2",
        "PET_NPROC_PER_NODE": "1",
        "PET_RDZV_BACKEND": "c10d",
        "PET_RDZV_ENDPOINT": f"localhost:{port}",
        "PET_RDZV_ID": "test",
        "PET_LOCAL_ADDR": "localhost",
    }
    return [run.start(**{"STANDIN_SECONDS": "1", **joined, **more}) for more in ({}, of_second or {})]


def commands_below(pid: int) -> list[str]:
    """The command lines of a process's children and theirs."""
    found, parents = [], {pid}
    processes = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            processes[int(entry.name)] = (parent, (entry / "cmdline").read_text().replace("\0", " "))
    while parents:
        children = {child for child, (parent, _) in processes.items() if parent in parents}
        found += [processes[child][1] for child in children]
        parents = children
    return found


def trial_run_below(pid: int) -> list[str]:
    """The commands of a node's trial run, without the programs that were told to start it."""
    launchers = [command for command in commands_below(pid) if "llama_lora.backends.launch" in command]
    return [command for command in launchers if "neuron_parallel_compile" not in command]


def outputs(nodes: list[subprocess.Popen[str]]) -> list[str]:
    texts = [""] * len(nodes)

    def read(index: int) -> None:
        texts[index] = nodes[index].communicate(timeout=120)[0]

    threads = [threading.Thread(target=read, args=(index,)) for index in range(len(nodes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return texts


@pytest.fixture
def two_nodes(neuron: Callable[..., NeuronRun]) -> Iterator[NeuronRun]:
    yield neuron(parallelism={"nodes": 2, "dataParallelSize": 2})


def test_the_manifest_appears_when_every_node_has_compiled(two_nodes: NeuronRun) -> None:
    reports = two_nodes.run.paths.compile_reports
    reports.mkdir(parents=True)
    stale = {"node": "0", "trial": "old", "provenance": {}, "found": ["a/b"], "failures": {"a/b": "[TEN404]"}}
    (reports / "old-0.json").write_text(json.dumps(stale))
    nodes = start_nodes(two_nodes)
    seen = []
    while any(node.poll() is None for node in nodes):
        if two_nodes.run.paths.manifest("compile").exists():
            seen.append([module.is_compiled for module in two_nodes.modules])
        time.sleep(0.02)
    texts = outputs(nodes)
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(texts)
    assert all(all(compiled) for compiled in seen)
    assert two_nodes.facts["graphs"]["found"] == 3 and len(two_nodes.facts["nodes"]) == 2
    assert sum("graphs: 3 found" in text for text in texts) == 1, "one of them writes it"
    assert sum(len(node["totals"]) > 0 for node in two_nodes.facts["nodes"]) >= 1
    assert not list(reports.glob("*.json"))


def test_what_fails_on_one_node_fails_all_of_them(two_nodes: NeuronRun) -> None:
    """Else the pod of the other would count as the whole job's success, and could never be joined again."""
    nodes = start_nodes(two_nodes, {"STANDIN_STATUS": "9"})
    texts = outputs(nodes)
    assert [node.returncode for node in nodes] == [1, 1], "\n".join(texts)
    assert all("neuron_parallel_compile ended with status 9" in text for text in texts)
    assert not two_nodes.is_done()


def test_nodes_don_t_wait_for_one_that_is_gone(two_nodes: NeuronRun) -> None:
    """Killed while it compiles: before, torchrun itself would wait for its agent, for 5 minutes."""
    nodes = start_nodes(two_nodes, {"STANDIN_SECONDS": "60"})
    wait_for((two_nodes.run.paths.compile_reports / "trial.json").exists)
    wait_for(lambda: not trial_run_below(nodes[1].pid))
    nodes[1].kill()
    text = nodes[0].communicate(timeout=300)[0]
    assert nodes[0].returncode == 1, text
    assert not two_nodes.is_done()


def test_nodes_with_different_environments_are_refused(two_nodes: NeuronRun) -> None:
    texts = outputs(start_nodes(two_nodes, {"NEURON_FUSE_SOFTMAX": "1"}))
    assert any('environment.NEURON_FUSE_SOFTMAX: not set -> "1"' in text or '"1" -> not set' in text for text in texts)
    assert not two_nodes.is_done()


# --- collected on Trainium, compiled elsewhere


def test_with_compile_on_cpu_the_graphs_are_collected_by_compile_and_compiled_by_neff(
    neuron: Callable[..., NeuronRun],
) -> None:
    run = neuron()
    run.run.config["compile"] = {"runsOn": "cpu"}
    run()
    assert run.commands == ["collect"] and run.facts["graphs"] == {"found": 3}
    assert not any(module.is_compiled for module in run.modules)
    said = run("neff", status=2, STANDIN_FAIL="step")
    assert "1 of 3 graphs did not compile" in said and not run.is_done("neff")
    run("neff")
    assert run.commands == ["collect", "compile", "compile"]
    assert all(module.is_compiled for module in run.modules) and run.is_done("neff")
    assert "skipped" in run("neff")
    run.run.config["training"]["maxSequenceLength"] = 64
    assert not run.is_done("neff")


def test_neff_has_nothing_to_do_where_compile_compiles(neuron: Callable[..., NeuronRun]) -> None:
    run = neuron()
    run()
    assert "neff: nothing to do" in run("neff", status=2)


def test_neff_refuses_graphs_of_another_compiler_and_the_next_upgrade_collects_them_again(
    neuron: Callable[..., NeuronRun],
) -> None:
    run = neuron()
    run.run.config["compile"] = {"runsOn": "cpu"}
    run()
    recorded(run, lambda then: then["versions"].update({"neuronx-cc": "2.20"}))
    assert "collected with neuronx-cc 2.20" in run("neff", status=2)
    assert not run.is_done()


def test_neff_compiles_its_own_graphs_whatever_becomes_of_other_runs(neuron: Callable[..., NeuronRun]) -> None:
    """`--command compile` takes every graph of the cache, and its status counts them all."""
    run = neuron()
    run.run.config["compile"] = {"runsOn": "cpu"}
    run()
    run("neff", STANDIN_STATUS="7")
    assert run.is_done("neff")


def test_workers_share_the_cores_under_the_program_as_without_it(
    neuron: Callable[..., NeuronRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number that llama_lora.environment sets must not come to the launcher as if the user had set it."""
    monkeypatch.setenv("OMP_NUM_THREADS", "119")
    own = neuron().stage("compile")
    for users, kept in ((False, None), (True, "119")):
        monkeypatch.setattr(compiling, "THREADS_SET_BY_USER", users)
        assert compiling.compile_environment(own).get("OMP_NUM_THREADS") == kept


def test_neff_tells_the_compiler_what_was_traced_for(neuron: Callable[..., NeuronRun]) -> None:
    run = neuron()
    run.run.config["compile"] = {"runsOn": "cpu"}
    run()
    manifest = run.run.manifest("compile")
    manifest["facts"]["provenance"]["platform"] = "trn1"
    run.run.paths.manifest("compile").write_text(json.dumps(manifest))
    run("neff")
    assert run.calls[1]["target"] == "trn1"


# --- provenance


def settings(run: Run) -> dict[str, Any]:
    model = {"hidden_size": 32, "transformers_version": "1"}
    return graph_settings(run.load(), model, 2)


CHANGES_GRAPHS: list[tuple[str, dict[str, Any], str]] = [
    ("training", {"perDeviceBatchSize": 2}, "training.perDeviceBatchSize: 1 -> 2"),
    ("training", {"maxSequenceLength": 64}, "training.maxSequenceLength: 128 -> 64"),
    ("training", {"attention": "flash"}, 'training.attention: "eager" -> "flash"'),
    ("training", {"activationCheckpointing": "full"}, 'training.activationCheckpointing: "selective" -> "full"'),
    ("training", {"packing": False}, "training.packing: true -> false"),
    ("training", {"weightDecay": 0.0}, "training.weightDecay: true -> false"),
    ("training", {"gradientAccumulationSteps": 1}, "training.accumulates: true -> false"),
    ("lora", {"r": 8}, "lora.r: 4 -> 8"),
    ("lora", {"targetModules": ["q_proj"]}, 'lora.targetModules: ["q_proj", "v_proj"] -> ["q_proj"]'),
    ("lora", {"dropout": 0.1}, "lora.dropout: false -> true"),
    ("probe", {"rows": 4}, "probe.rows: 8 -> 4"),
    ("probe", {"maxTokens": 64}, "probe.maxTokens: 512 -> 64"),
]
CHANGES_NO_GRAPH: list[tuple[str, dict[str, Any]]] = [
    ("training", {"learningRate": 2e-2}),
    ("training", {"maxSteps": 7}),
    ("training", {"epochs": 2}),
    ("training", {"weightDecay": 0.02}),
    ("training", {"gradientAccumulationSteps": 3}),
    ("training", {"saveSteps": 1, "saveTotalLimit": 1}),
    ("training", {"evalSteps": 5, "evalRows": 3, "loadBestModelAtEnd": True, "earlyStoppingPatience": 2}),
    ("lora", {"alpha": 16}),
    ("probe", {"tolerance": 0.5}),
    ("compile", {"onMismatch": "warn"}),
    ("evaluation", {"samples": 1}),
]


@pytest.mark.parametrize(("section", "change", "difference"), CHANGES_GRAPHS)
def test_a_setting_that_changes_a_graph_is_in_the_settings_and_in_the_fingerprint(
    new_run: Callable[..., Run], section: str, change: dict[str, Any], difference: str
) -> None:
    before, after, then, now = changed(new_run(), section, change)
    assert difference in differences(before, after)
    assert then != now


@pytest.mark.parametrize(("section", "change"), CHANGES_NO_GRAPH)
def test_a_setting_that_changes_no_graph_is_in_neither(
    new_run: Callable[..., Run], section: str, change: dict[str, Any]
) -> None:
    before, after, then, now = changed(new_run(), section, change)
    assert before == after and then == now


def test_the_held_out_loss_has_a_graph_of_its_own_only_without_a_probe(new_run: Callable[..., Run]) -> None:
    run = new_run()
    run.config["probe"] = {"rows": 0}
    before, after, then, now = changed(run, "training", {"evalSteps": 5})
    assert before != after and after["heldOutLoss"] is True and then != now


def test_of_a_norm_it_only_counts_whether_it_is_1(new_run: Callable[..., Run]) -> None:
    before, after, then, now = changed(new_run(), "training", {"maxGradNorm": 0.5})
    assert differences(before, after) == ["training.maxGradNormIs1: true -> false"] and then != now
    other = new_run("other", training={"maxGradNorm": 0.4})
    before, after, then, now = changed(other, "training", {"maxGradNorm": 0.5})
    assert before == after and then == now


def test_alpha_that_equals_r_is_a_graph_of_its_own(new_run: Callable[..., Run]) -> None:
    before, after, then, now = changed(new_run(), "lora", {"alpha": 4})
    assert differences(before, after) == ["lora.alphaIsR: false -> true"] and then != now


@pytest.mark.parametrize(
    "change",
    [
        {"processesPerNode": 4, "dataParallelSize": 4},
        {"nodes": 2, "dataParallelSize": 4},
        {"tensorParallelSize": 2, "dataParallelSize": 1},
    ],
)
def test_the_parallelism_changes_the_fingerprint_of_compile_on_trainium_alone(
    new_run: Callable[..., Run], change: dict[str, Any]
) -> None:
    run = new_run(parallelism={"processesPerNode": 2, "dataParallelSize": 2})
    _, _, then, now = changed(run, "parallelism", change)
    assert then != now
    on_cpu = new_run(parallelism={"processesPerNode": 2, "dataParallelSize": 2})
    _, _, then, now = changed(on_cpu, "parallelism", change, backend="cpu")
    assert then == now


def changed(
    run: Run, section: str, change: dict[str, Any], backend: str = "neuron"
) -> tuple[dict[str, Any], dict[str, Any], Any, Any]:
    """Graph settings, and the slice of the config that compile reads, before and after a change."""
    run.config["backend"] = backend
    reads = stage.declaration("compile").reads
    before, then = settings(run), reads(run.load())
    run.config[section] = {**run.config.get(section, {}), **change}
    return before, settings(run), then, reads(run.load())


def test_the_fingerprint_of_compile_is_told_without_torch(neuron: Callable[..., NeuronRun]) -> None:
    """The gate asks for it in a small pod, again and again."""
    run = neuron()
    arguments = ["fingerprint", "compile", "--config", str(run.run.write_config())]
    code = f"""
import sys
from llama_lora.cli import main
main({[*arguments, "--workspace", str(run.run.workspace)]!r}, standalone_mode=False)
assert "torch" not in sys.modules
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout
    assert json.loads(said)["fingerprint"] == run.stage("compile").fingerprint


def test_the_models_own_settings_and_the_number_of_workers_count(new_run: Callable[..., Run]) -> None:
    config = new_run().load()
    first = graph_settings(config, {"hidden_size": 32, "_name_or_path": "a"}, 2)
    assert first == graph_settings(config, {"hidden_size": 32, "_name_or_path": "b"}, 2)
    differing = differences(first, graph_settings(config, {"hidden_size": 64}, 4))
    assert differing == ["model.hidden_size: 32 -> 64", "parallelism.workers: 2 -> 4"]


@pytest.fixture
def compiled(neuron: Callable[..., NeuronRun]) -> NeuronRun:
    """A run whose manifest says that its graphs are compiled, for what this process would trace."""
    run = neuron()
    done = run.stage("compile")
    done.facts = {"provenance": provenance.provenance(done)}
    done.finish([])
    return run


def recorded(run: NeuronRun, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = run.run.manifest("compile")
    change(manifest["facts"]["provenance"])
    run.run.paths.manifest("compile").write_text(json.dumps(manifest))


def test_training_may_start_on_the_cache_that_was_made_for_it(neuron: Callable[..., NeuronRun]) -> None:
    run = neuron()
    run()
    provenance.check_provenance(run.stage("train"))


def test_training_refuses_a_cache_of_another_compiler_and_the_next_upgrade_compiles(compiled: NeuronRun) -> None:
    recorded(compiled, lambda then: then["versions"].update({"neuronx-cc": "2.20"}))
    with pytest.raises(UserError) as refused:
        provenance.check_provenance(compiled.stage("train"))
    assert 'versions.neuronx-cc: "2.20" -> not set' in str(refused.value)
    assert "helm upgrade" in refused.value.fix
    assert not compiled.is_done(), "else helm upgrade would skip it"


def test_training_refuses_a_manifest_that_does_not_say_what_was_compiled(compiled: NeuronRun) -> None:
    manifest = compiled.run.manifest("compile")
    compiled.run.paths.manifest("compile").write_text(json.dumps({**manifest, "facts": {}}))
    with pytest.raises(UserError, match=r"settings\.lora\.r: not set -> 4"):
        provenance.check_provenance(compiled.stage("train"))


def test_training_refuses_another_environment_and_says_where_to_set_it(
    compiled: NeuronRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEURON_CC_FLAGS", "--cache_dir=/elsewhere --retry_failed_compilation --optlevel=1")
    with pytest.raises(UserError) as refused:
        provenance.check_provenance(compiled.stage("train"))
    assert 'environment.NEURON_CC_FLAGS: "" -> "--optlevel=1"' in str(refused.value)
    assert "stageDefaults.extraEnv" in refused.value.fix
    assert compiled.is_done(), "compiling again would not help"


def test_training_goes_on_where_onMismatch_is_warn_and_says_so(
    compiled: NeuronRun, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded(compiled, lambda then: then["settings"]["lora"].update({"r": 99}))
    compiled.run.config["compile"] = {"onMismatch": "warn"}
    provenance.check_provenance(compiled.stage("train"))
    said = capsys.readouterr().err
    assert "warning: " in said and "settings.lora.r: 99 -> 4" in said
    assert compiled.is_done()


def test_training_with_compile_on_cpu_wants_neff_done(neuron: Callable[..., NeuronRun]) -> None:
    run = neuron()
    run.run.config["compile"] = {"runsOn": "cpu"}
    run()
    with pytest.raises(UserError, match="train needs neff"):
        provenance.check_provenance(run.stage("train"))
    run("neff")
    provenance.check_provenance(run.stage("train"))


# --- flags


@pytest.mark.parametrize(
    ("set_by_user", "expected"),
    [
        ("", "--cache_dir=/w/compile-cache"),
        ("--model-type transformer -O 1", "--model-type transformer -O 1 --cache_dir=/w/compile-cache"),
        ("--cache_dir=/w/compile-cache --optlevel=2", "--optlevel=2 --cache_dir=/w/compile-cache"),
        ("--cache_dir /w/compile-cache --optlevel=2", "--optlevel=2 --cache_dir=/w/compile-cache"),
    ],
)
def test_the_cache_is_the_workspaces_and_the_users_flags_stay(set_by_user: str, expected: str) -> None:
    assert cache.flags({"NEURON_CC_FLAGS": set_by_user}, Path("/w/compile-cache")) == expected


@pytest.mark.parametrize(
    "environment",
    [{"NEURON_CC_FLAGS": "--cache_dir /elsewhere"}, {"NEURON_COMPILE_CACHE_URL": "s3://bucket/cache"}],
)
def test_another_cache_is_refused(environment: dict[str, str]) -> None:
    with pytest.raises(UserError, match="sets another cache"):
        cache.flags(environment, Path("/w/compile-cache"))


def test_a_cache_path_that_the_compiler_cannot_read_is_refused() -> None:
    with pytest.raises(UserError, match="contains a character that the Neuron compiler does not support"):
        cache.flags({}, Path("/w/v1.0/compile-cache"))


def test_the_flags_that_a_graphs_key_has_are_those_of_the_compiler() -> None:
    given = "-O 1 --cache_dir /w/c --log_level=INFO --retry_failed_compilation --no_cache --model-type=transformer"
    assert cache.compiler_flags({"NEURON_CC_FLAGS": given}) == "-O 1 --model-type=transformer"


# --- what the program says


DOCUMENTED = """\
INFO ||NEURON_CACHE||: Compile cache path: /var/tmp/neuron-compile-cache
INFO ||NEURON_CC_WRAPPER||: Extracting graphs (/c/neuronxcc-2.0.0.22266a0+a69f71e55/MODULE_197+abb26765/model.hlo.pb) \
for ahead-of-time parallel compilation. No compilation was done.
INFO ||NEURON_CC_WRAPPER||: Using a cached neff at /c/neuronxcc-2.0.0.22266a0+a69f71e55/MODULE_5+abb26765/model.neff. \
Exiting with a successfully compiled graph.
INFO: 2023-08-24 20:21:11.000895:  161136  INFO ||NEURON_PARALLEL_COMPILE||: {
INFO:     "compilation_summary": {
INFO:         "true": 1,
INFO:         "false": 1
INFO:     },
INFO:     "compilation_report": {
INFO:         "/c/neuronxcc-2.0.0.22266a0+a69f71e55/MODULE_197+abb26765/model.hlo.pb": {
INFO:             "status": true,
INFO:             "retry": 0
INFO:         },
INFO:         "/c/neuronxcc-2.0.0.22266a0+a69f71e55/MODULE_161+abb26765/model.hlo.pb": {
INFO:             "status": false,
INFO:             "retry": 1
INFO:         }
INFO:     }
INFO: }
INFO: 2023-08-24 20:21:11.000895:  161136  INFO ||NEURON_PARALLEL_COMPILE||: Total graphs: 2
INFO: 2023-08-24 20:21:11.000895:  161136  INFO ||NEURON_PARALLEL_COMPILE||: Total successful compilations: 1
INFO: 2023-08-24 20:21:11.000895:  161136  INFO ||NEURON_PARALLEL_COMPILE||: Total failed compilations: 1
"""
NEWER = """\
2025-01-17 01:16:07.000981:  32201  INFO ||NEURON_PARALLEL_COMPILE||: {
    "compilation_summary": {
        "true": 1
    },
    "compilation_report": {
        "/c/neuronxcc-2.16.372.0+4a9b2326/MODULE_999+3cc9a3cb/model.hlo_module.pb": {
            "status": true,
            "retry": 0,
            "compile_time": 9.770226240158081
        }
    },
    "start_time": 1737076558.7,
    "compilation_time": 9.8
}
2025-01-17 01:16:07.000981:  32201  INFO ||NEURON_PARALLEL_COMPILE||: Total graphs: 1
2025-01-17 01:16:07.000981:  32201  INFO ||NEURON_PARALLEL_COMPILE||: Total successful compilations: 1
2025-01-17 01:16:07.000981:  32201  INFO ||NEURON_PARALLEL_COMPILE||: Total failed compilations: 0
"""


def read(text: str) -> tool.Summary:
    summary = tool.Summary()
    for line in text.splitlines():
        summary.read_line(line)
    return summary


def test_the_documented_summary_is_read() -> None:
    summary = read(DOCUMENTED)
    version = "neuronxcc-2.0.0.22266a0+a69f71e55"
    assert summary.module_names() == {f"{version}/MODULE_197+abb26765", f"{version}/MODULE_5+abb26765"}
    assert sorted(summary.statuses.values()) == [False, True]
    assert summary.totals == {"graphs": 2, "successful compilations": 1, "failed compilations": 1}
    assert not summary.trial_failed


def test_the_summary_of_newer_versions_is_read_with_its_times() -> None:
    summary = read(NEWER)
    assert list(summary.statuses.values()) == [True] and list(summary.seconds.values()) == [9.770226240158081]
    assert summary.totals["graphs"] == 1


def test_a_printed_report_that_is_torn_apart_says_nothing_and_the_file_does() -> None:
    torn = NEWER.replace('            "retry": 0,', "Compiler status PASS\n")
    summary = read(torn)
    assert summary.statuses == {} and summary.totals["graphs"] == 1
    summary.read_report('{"compilation_report": {"/c/v/m/model.hlo_module.pb": {"status": false, "retry": 0}}}')
    assert summary.statuses == {"/c/v/m/model.hlo_module.pb": False}


def test_a_container_gets_as_many_compilers_as_fit_in_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 512 * 2**30 // 4096}.__getitem__)
    for limit, expected in ((460 * tool.GIB, 7), (16 * tool.GIB, 1), (600 * tool.GIB, None), (None, None)):
        monkeypatch.setattr(tool, "memory_limit", lambda limit=limit: limit)
        assert tool.compilers() == expected


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)
