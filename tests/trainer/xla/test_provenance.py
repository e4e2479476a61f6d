"""What the graphs of a cache are compiled for: what changes it, and that a training uses no other cache."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from genvalues.common.errors import UserError
from llama_lora import stage
from llama_lora.backends.provenance import differences
from llama_lora.backends.xla import provenance
from llama_lora.backends.xla.graphs import graph_settings
from trainer.conftest import Run
from trainer.xla.neuron_run import NeuronRun, recorded


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
