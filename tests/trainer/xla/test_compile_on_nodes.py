"""The compile stage on several nodes, and where the graphs are compiled by another stage, neff."""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from genvalues.common.process import processes
from llama_lora.backends.xla import compiling
from trainer.test_training import free_port, wait_for
from trainer.xla.neuron_run import NeuronRun, recorded


def start_nodes(run: NeuronRun, of_second: dict[str, str] | None = None) -> list[subprocess.Popen[str]]:
    """Two nodes, whose graphs take a second each, so that neither is done when the other begins."""
    joined = {
        "PET_NNODES": "2",
        "PET_NPROC_PER_NODE": "1",
        "PET_RDZV_BACKEND": "c10d",
        "PET_RDZV_ENDPOINT": f"localhost:{free_port()}",
        "PET_RDZV_ID": "test",
        "PET_LOCAL_ADDR": "localhost",
    }
    return [run.start(**{"STANDIN_SECONDS": "1", **joined, **more}) for more in ({}, of_second or {})]


def commands_below(pid: int) -> list[str]:
    """The command lines of a process's children and theirs."""
    found, below, parents = [], {pid}, dict(processes())
    while below:
        below = {child for child, parent in parents.items() if parent in below}
        for child in below:
            with contextlib.suppress(OSError):
                found.append(Path(f"/proc/{child}/cmdline").read_text().replace("\0", " "))
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
