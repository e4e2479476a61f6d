"""Fingerprints, manifests and skipping: what `helm upgrade` relies on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from genvalues.common import files
from genvalues.common.errors import UserError
from genvalues.common.manifests import manifests_in
from llama_lora import backends, stage
from llama_lora.config import RunConfig
from llama_lora.data import resolve
from llama_lora.paths import Paths
from llama_lora.stages.train import training_job
from trainer.conftest import LLAMA_LORA, Run, llama_lora
from trainer.warm import WarmPopen

ORDER = ["tokenize", "compile", "train", "consolidate", "merge", "evaluate"]


def fingerprints(run: Run) -> dict[str, str | None]:
    config = run.load()
    return {name: stage.Stage(name, config, run.paths).fingerprint for name in ORDER}


def changed(before: dict[str, str | None], after: dict[str, str | None]) -> list[str]:
    return [name for name in ORDER if before[name] != after[name]]


@pytest.mark.parametrize(
    ("section", "change", "reruns"),
    [
        ("training", {"learningRate": 2e-2}, ["train", "consolidate", "merge", "evaluate"]),
        ("training", {"maxSteps": 7}, ["train", "consolidate", "merge", "evaluate"]),
        ("training", {"seed": 7}, ORDER),
        ("training", {"maxSequenceLength": 64}, ORDER),
        ("lora", {"r": 8}, ORDER[1:]),
        ("dataset", {"evalFraction": 0.2}, ORDER),
        ("evaluation", {"samples": 1}, ["evaluate"]),
        ("training", {"saveSteps": 1, "saveTotalLimit": 1}, []),
        ("parallelism", {"processesPerNode": 2, "dataParallelSize": 2}, []),
        ("lora", {"targetModules": ["v_proj", "q_proj"]}, []),
    ],
)
def test_a_change_reruns_what_reads_it_and_what_follows(
    new_run: Callable[..., Run], section: str, change: dict[str, Any], reruns: list[str]
) -> None:
    run = new_run()
    before = fingerprints(run)
    assert None not in before.values()
    run.config[section] = {**run.config[section], **change}
    assert changed(before, fingerprints(run)) == reruns


# Recorded when the rows of tokenize and the learning rate of train changed (versions 2 and 3), which repeats every
# stage of release 0.1.0, whose run configs have the older words: {stage: [eager, flash]}.
RECORDED = {
    "compile": ["da20315a734f4df4", "a9fb3c86f6b34c8a"],
    "neff": ["1ae2d1639edfcc10", "cf1b097039708696"],
    "train": ["9bc083d5e954a087", "c8dd5bd9136665ef"],
    "merge": ["19501eee6d47fd39", "696090e22c036c90"],
}


@pytest.mark.parametrize("backend", ["neuron", "xla"])
def test_the_older_words_of_an_xla_run_repeat_no_stage(backend: str) -> None:
    sources = resolve.ResolvedSources(resolve.Source("org/model", "0" * 40), resolve.Source("org/rows", "1" * 40))
    for number, words in enumerate((["eager", "isolated"], ["flash", "causal"])):
        for attention in words:
            config = RunConfig.model_validate(
                {
                    "name": "a",
                    "backend": backend,
                    "model": {"id": "org/model"},
                    "dataset": {"source": "org/rows", "format": "instruction"},
                    "training": {"attention": attention},
                    "parallelism": {
                        "nodes": 1,
                        "processesPerNode": 32,
                        "tensorParallelSize": 8,
                        "dataParallelSize": 4,
                    },
                }
            )
            found = {name: fingerprint_of(name, config, sources) for name in RECORDED}
            assert found == {name: recorded[number] for name, recorded in RECORDED.items()}


def fingerprint_of(name: str, config: RunConfig, sources: resolve.ResolvedSources) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resolve, "known_sources", lambda config, paths: sources)
        found = stage.Stage(name, config, Paths(Path("/workspace"), config.name)).fingerprint
    assert found is not None
    return found[:16]


def test_the_content_of_a_source_counts_and_not_its_place(new_run: Callable[..., Run]) -> None:
    run = new_run()
    before = fingerprints(run)
    rows = Path(run.config["dataset"]["source"])
    moved = rows.rename(rows.with_name("moved.jsonl"))
    run.config["dataset"]["source"] = str(moved)
    assert changed(before, fingerprints(run)) == []
    moved.write_text(moved.read_text() + '{"q": "More?", "a": "More."}\n')
    assert changed(before, fingerprints(run)) == ORDER


def test_the_same_bytes_are_other_rows_in_another_kind_of_file(new_run: Callable[..., Run]) -> None:
    run = new_run()
    before = fingerprints(run)
    rows = Path(run.config["dataset"]["source"])
    run.config["dataset"]["source"] = str(rows.rename(rows.with_suffix(".txt")))
    assert changed(before, fingerprints(run)) == ORDER


def test_files_of_a_model_that_are_not_taken_do_not_count(new_run: Callable[..., Run], tmp_path: Path) -> None:
    run = new_run()
    model = tmp_path / "model"
    shutil.copytree(run.config["model"]["path"], model)
    run.config["model"]["path"] = str(model)
    before = fingerprints(run)
    for name in ("README.md", ".git/index", "original/consolidated.00.pth", "onnx/model.onnx"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("not read by anybody")
    assert changed(before, fingerprints(run)) == []
    run("tokenize")
    taken = {path.name for path in next(run.workspace.glob("models/model@*/")).iterdir()}
    assert not taken & {"README.md", ".git", "original", "onnx"} and "model.safetensors" in taken


def test_an_unchanged_file_is_not_read_again(new_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_run()
    run("tokenize")
    monkeypatch.setattr(files, "sha256", lambda path: pytest.fail(f"read {path}"))
    assert fingerprints(run)["tokenize"] == run.manifest("tokenize")["fingerprint"]


def test_a_source_that_is_gone_is_still_the_one_that_was_taken(new_run: Callable[..., Run]) -> None:
    run = new_run()
    run("tokenize")
    Path(run.config["dataset"]["source"]).unlink()
    assert "skipped" in run("tokenize")


def test_a_second_run_skips_every_stage_in_seconds_and_writes_nothing(finished_run: Run) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished_run.workspace.rglob("*") if path.is_file()}
    options = ["--config", str(finished_run.write_config()), "--workspace", str(finished_run.workspace)]
    for name in ORDER:
        began = seconds_of_children()
        said = llama_lora(name, *options)  # as a process, as a pod does
        assert seconds_of_children() - began < 2, "torch was imported, or something was read again"
        assert "nothing changed, skipped" in said
        told = manifests_in(said)  # for `genvalues bundle`, which sees logs and no volume
        assert {of: manifest["fingerprint"] for of, manifest in told.items()} == {
            name: finished_run.manifest(name)["fingerprint"]
        }
    assert {path: path.stat().st_mtime_ns for path in finished_run.workspace.rglob("*") if path.is_file()} == before


def seconds_of_children() -> float:
    """CPU time, which other work on the same cores does not change much."""
    used = os.times()
    return used.children_user + used.children_system


def test_a_changed_learning_rate_reruns_train_and_what_follows(finished_run: Run) -> None:
    finished_run.config["training"]["learningRate"] = 3e-3
    assert ["skipped" in finished_run(name) for name in ORDER] == [True, True, False, False, False, False]


def test_going_back_to_the_former_learning_rate_trains_no_step_again(finished_run: Run) -> None:
    finished_run.config["training"]["learningRate"] = 3e-3
    finished_run("train")
    finished_run.config["training"]["learningRate"] = 1e-2
    assert "resuming from" in (said := finished_run("train")) and "step 6/6" not in said


@pytest.mark.parametrize("lost", ["models/*/model.safetensors", "datasets/*/train/*.arrow", "datasets/*/report.json"])
def test_a_lost_file_of_a_shared_folder_is_made_again(finished_run: Run, lost: str) -> None:
    file = next(finished_run.workspace.glob(lost))
    before = file.read_bytes()
    file.unlink()
    finished_run("tokenize")
    assert file.read_bytes() == before
    assert all("skipped" in finished_run(name) for name in ORDER)


@pytest.mark.parametrize("name", ["merge", "evaluate"])
def test_a_lost_output_is_made_again(finished_run: Run, name: str) -> None:
    output = finished_run.workspace / next(iter(finished_run.manifest(name)["outputs"]))
    before = output.read_bytes()
    output.write_bytes(b"")
    assert json.loads(finished_run("fingerprint", name))["upToDate"] is False
    finished_run(name)
    assert len(output.read_bytes()) == len(before)


def test_a_kill_between_two_outputs_leaves_no_manifest(finished_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from llama_lora.report import page

    finished_run.config["evaluation"]["samples"] = 1
    monkeypatch.setattr(page, "page", lambda facts: 1 / 0)
    assert "ZeroDivisionError" in finished_run("evaluate", status=1)
    monkeypatch.setattr(page, "page", lambda facts: "")
    monkeypatch.setattr(files, "write_bytes", lambda path, *_, **__: 1 / 0 if path.suffix == ".html" else None)
    assert "ZeroDivisionError" in finished_run("evaluate", status=1)
    assert not finished_run.paths.manifest("evaluate").exists()


def test_two_runs_that_want_the_same_model_and_dataset_at_once_make_them_once(new_run: Callable[..., Run]) -> None:
    one = new_run()
    two = Run(one.folder, {**one.config, "name": "two"})
    arguments = ["--workspace", str(one.workspace), "--config"]
    command = [LLAMA_LORA, "tokenize", *arguments]
    configs = [one.write_config().rename(one.folder / "one.yaml"), two.write_config()]
    both = [WarmPopen([*command, str(config)], stderr=subprocess.PIPE, text=True) for config in configs]
    said = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum("copying the model" in text for text in said) == 1
    assert one.manifest("tokenize")["outputs"] == two.manifest("tokenize")["outputs"]


@pytest.mark.parametrize("name", ORDER[1:])
def test_a_stage_whose_upstream_is_not_done_ends_with_status_2(new_run: Callable[..., Run], name: str) -> None:
    run = new_run()
    said = run(name, status=2)
    assert "whose manifest is missing. Run `llama-lora" in said
    assert not run.paths.manifest(name).exists()


def test_fingerprint_answers_what_the_gate_asks(new_run: Callable[..., Run]) -> None:
    run = new_run()
    answer = json.loads(run("fingerprint", "train"))
    assert answer == {
        "stage": "train",
        "fingerprint": fingerprints(run)["train"],
        "upToDate": False,
        "manifest": str(run.paths.manifest("train")),
        "progress": str(run.paths.progress),
    }
    run.config["model"] = {"id": "meta-llama/Meta-Llama-3.1-8B"}  # not resolved yet, and not asked for
    assert json.loads(run("fingerprint", "train"))["fingerprint"] is None


def test_verify_says_in_a_line_what_it_checked_and_writes_nothing(whole_run: Run) -> None:
    def found() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in whole_run.workspace.rglob("*")}

    before = found()
    for name in ORDER:
        outputs = whole_run.manifest(name)["outputs"]
        megabytes = sum(output["bytes"] for output in outputs.values()) / 1e6
        said = whole_run("verify", name)
        assert said == f"{name}: {len(outputs)} files, {megabytes:.3g} MB, all match the manifest\n"
    assert found() == before


def test_verify_reads_a_volume_that_cannot_be_written(new_run: Callable[..., Run]) -> None:
    run = new_run()
    assert "runs/run/stages/merge.json: the manifest of merge is missing. Run" in run("verify", "merge", status=2)
    assert not run.workspace.exists()


def test_verify_needs_the_current_configs_manifest(finished_run: Run) -> None:
    finished_run.config["lora"]["r"] = 8
    said = finished_run("verify", "merge", status=2)
    assert said.startswith(f"{finished_run.paths.manifest('merge')}: the manifest of merge belongs to another config")
    assert "Run the stage first: `helm upgrade`, or `llama-lora merge --config ...`." in said
    finished_run.paths.manifest("merge").write_text("{")
    assert "cut off" in finished_run("verify", "merge", status=2)
    finished_run.paths.manifest("merge").unlink()
    assert "the manifest of merge is missing" in finished_run("verify", "merge", status=2)


def test_verify_tells_every_file_that_is_not_as_written_and_its_fix_mends_it(finished_run: Run) -> None:
    merged = finished_run.paths.merged
    (merged / "config.json").unlink()
    (merged / "tokenizer.json").write_bytes(b"{}")
    weights = merged / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)

    missing, other_bytes, other_size = sorted(finished_run("verify", "merge", status=2).splitlines())
    again = "un the stage again: `helm upgrade`, or `llama-lora merge --config ...`."
    assert missing == f"{merged}/config.json: not found. R{again}"
    assert other_bytes.startswith(f"{weights}: has the expected size but another SHA-256. Delete")
    assert other_size.startswith(f"{merged}/tokenizer.json: has 2 bytes, ")
    assert all(line.endswith(f"Delete the file and r{again}") for line in (other_bytes, other_size))

    weights.unlink()
    finished_run("merge")
    assert "all match the manifest" in finished_run("verify", "merge")


def test_verify_tells_a_file_that_cannot_be_read(finished_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files, "sha256", refused)
    assert "cannot be read: Permission denied. Delete" in finished_run("verify", "merge", status=2)


def test_a_stage_killed_while_it_writes_leaves_nothing_that_looks_finished(new_run: Callable[..., Run]) -> None:
    run = new_run()
    merge = stage.Stage("merge", run.load(), run.paths)
    merged = run.paths.merged
    with pytest.raises(KeyboardInterrupt), merge.output(merged) as folder:
        (folder / "half.safetensors").write_text("half")
        raise KeyboardInterrupt
    assert not merged.exists() and merge.manifest is None
    leftover = merged.parent / f".{merged.name}{files.PARTIAL}killed"  # as SIGKILL leaves it
    leftover.mkdir()
    with merge.output(merged) as folder:
        (folder / "whole.safetensors").write_text("whole")
    assert sorted(path.name for path in merged.iterdir()) == ["whole.safetensors"]
    assert not leftover.exists()


@pytest.mark.parametrize("name", ["tokenize", "train"])
def test_what_a_killed_stage_left_of_a_record_is_removed(finished_run: Run, name: str) -> None:
    """A kill can hit any record while it is synced to the disk. What other programs write is not touched."""
    paths = finished_run.paths
    records = [paths.config, paths.resolved, paths.prometheus, paths.progress, paths.report, paths.manifest("merge")]
    records += [
        folder.with_name(f"{folder.name}.contents.json") for folder in paths.datasets.iterdir() if folder.is_dir()
    ]
    leftovers = [file.with_name(f".{file.name}{files.PARTIAL}killed") for file in records]
    of_the_gate = paths.run / f".costs.json{files.PARTIAL}gate"
    for leftover in [*leftovers, of_the_gate]:
        leftover.write_text("{")
    paths.manifest(name).unlink()
    finished_run(name)
    of_tokenize = [leftover for leftover in leftovers if leftover.parent == paths.datasets]
    assert [each for each in leftovers if each.exists()] == ([] if name == "tokenize" else of_tokenize)
    assert of_the_gate.exists()


def test_a_write_whose_temporary_file_is_taken_for_a_leftover_is_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "run.yaml"
    chmod = Path.chmod
    taken: list[Path] = []

    def take_and_chmod(path: Path, mode: int) -> None:
        if not taken:
            taken.append(path)
            files.remove_leftovers(file)
        chmod(path, mode)

    monkeypatch.setattr(Path, "chmod", take_and_chmod)
    files.write_text(file, "content")
    assert taken and file.read_text() == "content" and list(tmp_path.iterdir()) == [file]


def test_manifests_name_every_output_with_its_digest(whole_run: Run) -> None:
    for name in ORDER:
        manifest = whole_run.manifest(name)
        assert manifest["outputs"] or name == "compile"
        for output, recorded in manifest["outputs"].items():
            file = whole_run.workspace / output
            assert recorded == {"bytes": file.stat().st_size, "sha256": files.sha256(file)}
        assert {"torch", "transformers", "peft"} <= set(manifest["versions"])


def test_outputs_can_be_read_by_whom_the_umask_lets_read(whole_run: Run) -> None:
    for path in whole_run.workspace.rglob("*"):
        assert path.stat().st_mode & 0o666 == 0o666 & ~files.current_umask(), path


def test_files_are_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    files.write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        files.write_json(file, {"a": object()})
    with pytest.raises(UnicodeEncodeError):
        files.write_text(file, "\ud800")
    assert json.loads(file.read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_run_config_with_mistakes_is_refused_with_all_of_them(new_run: Callable[..., Run]) -> None:
    run = new_run()
    run.config["lora"] = {"rank": 8, "alpha": -1, "dropout": 0.0, "targetModules": ["q_proj"]}
    said = run("tokenize", status=2)
    assert "lora.rank: Extra inputs" in said and "lora.alpha: Input should be" in said


def test_an_image_without_the_neuron_libraries_says_so(new_run: Callable[..., Run]) -> None:
    run = new_run()
    run.config["backend"] = "neuron"
    run("tokenize")
    job = training_job(stage.Stage("train", run.load(), run.paths))
    with pytest.raises(UserError, match="is not installed; backend xla needs it"):
        backends.get("neuron").train(job, lambda result: None)


def test_user_errors_name_place_and_fix() -> None:
    assert str(UserError("unknown key.", where="a.yaml:1:2 lora.rank", fix="Did you mean lora.r?")) == (
        "a.yaml:1:2 lora.rank: unknown key. Did you mean lora.r?"
    )


def test_a_workspace_that_cannot_be_written_is_told(new_run: Callable[..., Run]) -> None:
    run = new_run()
    run.workspace.write_text("a file")
    assert f"--workspace {run.workspace}: cannot be written" in run("tokenize", status=2)
