"""Records on the volume, of any content: made again, or refused in a line that says what is wrong with the file."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from damage import spoiled
from genvalues.common.errors import UserError
from genvalues.common.json_files import InvalidJson, as_record
from llama_lora import config as run_config
from llama_lora.backends import checkpoints
from llama_lora.data import resolve, shared_folders
from llama_lora.digests import files_in, record_of
from llama_lora.probe import ProbeRecord
from llama_lora.stage import Stage, verify_outputs
from llama_lora.stages.train import verify_base_and_rows
from trainer.conftest import Run

DEEP = "[" * 1_000_000
# Contents of a whole file, and what a message says about it.
CONTENTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "a list": (b"[]", "contains a list"),
    "null": (b"null", "contains null"),
    "a string": (b'"a"', "contains a string"),
    "a number": (b"5", "contains a number"),
    "another object": (b"{}", "has no valid"),
    "cut off": (b'{"stage": "tokenize", "outp', "cut off"),
    "not text": (b"\x00\xff\xfe", "is not"),
    "nested a million deep": (DEEP.encode(), "nested too deeply"),
    "an object nested deep": (b'{"a":' * 5000 + b"1" + b"}" * 5000, "nested too deeply"),
    "a huge number": (b'{"stage": ' + b"9" * 10_000 + b"}", "not valid JSON"),
    "NaN": (b'{"stage": NaN}', "NaN"),
}
# Put in the place of every value in a valid file.
VALUES: list[Any] = [None, True, -1, 10**30, 1e308, "a", "", "../../etc/passwd", [], ["a"], {}, {"a": 1}]


# --- manifests


@pytest.mark.parametrize("kind", CONTENTS)
def test_a_stage_says_what_is_wrong_with_the_manifest_it_needs(finished_run: Run, kind: str) -> None:
    content, words = CONTENTS[kind]
    manifest = finished_run.paths.manifest("consolidate")
    manifest.write_bytes(content)
    finished_run.paths.manifest("merge").unlink()
    said = finished_run("merge", status=2)
    assert said.startswith(f"{manifest}: merge needs consolidate, whose manifest ") and words in said
    assert "belongs to another configuration" not in said and len(said.splitlines()) == 1
    assert words in finished_run("verify", "consolidate", status=2)
    assert json.loads(finished_run("fingerprint", "consolidate"))["upToDate"] is False


def test_a_damaged_manifest_is_written_again_and_said(finished_run: Run) -> None:
    before = finished_run.manifest("merge")["outputs"]
    finished_run.paths.manifest("merge").write_bytes(b'{"stage": ')
    said = finished_run("merge")
    assert f"merge runs again: {finished_run.paths.manifest('merge')} is not valid JSON" in said
    assert finished_run.manifest("merge")["outputs"] == before


@pytest.mark.parametrize("time", ["yesterday", "0001-01-01T00:00:00", ""])
def test_a_manifest_with_another_time_is_written_again(finished_run: Run, time: str) -> None:
    """evaluate calculates with the times of all stages."""
    file = finished_run.paths.manifest("merge")
    file.write_text(json.dumps({**finished_run.manifest("merge"), "finished": time}))
    finished_run.paths.manifest("evaluate").unlink()
    assert "has no valid 'finished'" in finished_run("evaluate", status=2)
    finished_run("merge")
    finished_run("evaluate")


def write_report(run: Run) -> None:
    """evaluate, with the least to calculate."""
    run.config["evaluation"] |= {"maxRows": 1, "samples": 0}
    run.paths.manifest("evaluate").unlink()
    run("evaluate")


@pytest.mark.parametrize("held_out", ["x", 5, [1], {"best_step": "x"}, {"best_step": None}])
def test_a_report_is_written_whatever_train_measured(finished_run: Run, held_out: Any) -> None:
    facts = {**finished_run.manifest("train")["facts"], "held_out": held_out}
    finished_run.paths.manifest("train").write_text(json.dumps({**finished_run.manifest("train"), "facts": facts}))
    write_report(finished_run)


COSTS = [
    {"pods": {"a": {"since": 10**400, "until": 0}}},
    {"pods": {"a": {"since": 0, "until": 1}}, "pricePerNodeHour": 10**400},
]


@pytest.mark.parametrize("costs", COSTS)
def test_a_report_is_written_whatever_the_run_cost(finished_run: Run, costs: Any) -> None:
    (finished_run.paths.run / "costs.json").write_text(json.dumps(costs))
    write_report(finished_run)


# --- metrics.jsonl


def metrics_of(run: Run) -> Path:
    return run.paths.metrics(run.manifest("train")["fingerprint"])


def test_an_edited_loss_reaches_neither_the_card_nor_the_report(finished_run: Run) -> None:
    file = metrics_of(finished_run)
    card = finished_run.paths.adapter / "README.md"
    assert "Training loss" in card.read_text() and "<svg" in finished_run.paths.report.read_text()
    first, *others = file.read_text().splitlines()
    file.write_text("\n".join([json.dumps({**json.loads(first), "loss": 9.75}), *others]) + "\n")
    for stage in ("consolidate", "evaluate"):
        finished_run.paths.manifest(stage).unlink()
        assert f"{file}: not as train wrote it" in finished_run(stage)
    assert "Training loss" not in card.read_text()
    assert "9.75" not in finished_run.paths.report.read_text()
    assert "skipped" in finished_run("train"), "only the curves are gone"


@pytest.mark.parametrize("key", ["loss", "step", "tokens_per_second"])
def test_a_number_that_no_float_holds_is_not_a_metric(finished_run: Run, key: str) -> None:
    manifest = finished_run.manifest("train")
    del manifest["facts"]["metrics"]  # of a version that recorded no digest: the file is read as it is
    finished_run.paths.manifest("train").write_text(json.dumps(manifest))
    file = metrics_of(finished_run)
    first, *others = file.read_text().splitlines()
    file.write_text("\n".join([json.dumps({**json.loads(first), key: 10**400}), *others]) + "\n")
    for stage in ("consolidate", "merge", "evaluate"):
        finished_run.paths.manifest(stage).unlink()
        finished_run(stage)


def test_metrics_are_no_link_and_no_fifo(finished_run: Run) -> None:
    file = metrics_of(finished_run)
    finished_run.paths.manifest("consolidate").unlink()
    file.unlink()
    file.symlink_to("/dev/zero")
    assert f"{file}: is a symbolic link" in finished_run("consolidate", status=2)
    file.unlink()
    os.mkfifo(file)
    assert f"{file}: is not a regular file" in finished_run("consolidate", status=2)
    file.unlink()
    finished_run("consolidate")


def test_every_state_of_a_manifest_has_its_own_word(finished_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = finished_run.paths.manifest("train")
    content = manifest.read_bytes()

    def problem() -> str:
        with pytest.raises(UserError) as refused:
            Stage("consolidate", finished_run.load(), finished_run.paths).upstream("train")
        return refused.value.what.removeprefix("consolidate needs train, whose manifest ")

    manifest.unlink()
    assert problem() == "is missing"
    manifest.mkdir()
    assert problem() == "is not a regular file"
    manifest.rmdir()
    manifest.symlink_to(finished_run.folder / "run.yaml")
    assert problem() == "is a symbolic link"
    manifest.unlink()
    os.mkfifo(manifest)
    assert problem() == "is not a regular file"
    manifest.unlink()
    manifest.write_bytes(content[:200])
    assert "cut off" in problem()
    manifest.write_bytes(content.replace(b'"stage": "train"', b'"stage": "merge"'))
    assert problem() == "is of the stage 'merge'"
    manifest.write_bytes(content)
    opened = os.open

    def without_permission(path: Any, *arguments: Any, **options: Any) -> int:
        if path == manifest:
            raise PermissionError(13, "Permission denied")
        return opened(path, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", without_permission)
        assert problem() == "cannot be read: Permission denied"
    shard = finished_run.workspace / max(json.loads(content)["outputs"])
    shard.write_bytes(shard.read_bytes() + b"more")
    assert f"lists {shard.relative_to(finished_run.workspace)}, which has" in problem()
    shard.unlink()
    assert problem() == f"lists {shard.relative_to(finished_run.workspace)}, which is not found"
    finished_run.config["training"]["learningRate"] = 3e-3
    assert problem() == "belongs to another configuration"
    finished_run.config["training"]["learningRate"] = 1e-2
    finished_run.paths.resolved.unlink()
    finished_run.config["model"] = {"id": "some/model"}
    assert "resolved.json has no entry for this run's sources" in problem()


@pytest.mark.parametrize("name", ["tokenize", "train", "consolidate", "evaluate"])
def test_wrong_values_in_a_manifest_are_no_traceback(finished_run: Run, name: str) -> None:
    manifest, config = finished_run.manifest(name), finished_run.load()
    first = dict(list(manifest["outputs"].items())[:1])
    done = refused = 0
    for content in spoiled({**manifest, "outputs": first, "versions": {"torch": "2"}}, VALUES):
        finished_run.paths.manifest(name).write_text(json.dumps(content))
        if Stage(name, config, finished_run.paths).is_done():
            done += 1
            verify_outputs(name, config, finished_run.paths)
        else:
            refused += 1
            with pytest.raises(UserError):
                verify_outputs(name, config, finished_run.paths)
    assert done > 10 and refused > 50


NO_PATHS: list[Any] = [
    *(None, 5, [], {}, "", ".", "..", "../../etc/passwd", "/etc/passwd", "models/../../x", "a\0b"),
    "a" * 100_000 + "/..",
]


@pytest.mark.parametrize("value", NO_PATHS, ids=range(len(NO_PATHS)))
def test_a_manifest_names_paths_in_the_workspace_only(finished_run: Run, value: Any) -> None:
    for made_by, fact, stage in (
        ("tokenize", "model", "merge"),
        ("tokenize", "dataset", "evaluate"),
        ("train", "checkpoint", "consolidate"),
    ):
        manifest, own = finished_run.manifest(made_by), finished_run.paths.manifest(stage)
        file = finished_run.paths.manifest(made_by)
        file.write_text(json.dumps({**manifest, "facts": {**manifest["facts"], fact: value}}))
        before = own.read_bytes()
        own.unlink()
        said = finished_run(stage, status=2)
        assert said.startswith(f"{file}: facts.{fact} is ") and "is not a path in the workspace" in said
        assert f"Delete the file and run `helm upgrade`, or `llama-lora {made_by}" in said and len(said) < 500
        file.write_text(json.dumps(manifest))
        own.write_bytes(before)


@pytest.mark.parametrize(
    "made_by, fact, stage",
    [("tokenize", "dataset", "evaluate"), ("tokenize", "dataset", "train"), ("train", "checkpoint", "consolidate")],
)
def test_a_folder_without_what_a_stage_reads_is_refused(finished_run: Run, made_by: str, fact: str, stage: str) -> None:
    """Of the workspace, and with files that the same or another stage wrote."""
    facts = finished_run.manifest("tokenize")["facts"]
    manifest = finished_run.manifest(made_by)
    checkpoint = Path(finished_run.manifest("train")["facts"]["checkpoint"])
    unlisted = [str(checkpoint.with_name("step-000004")), f"{facts['dataset']}/eval", facts["model"]]
    finished_run.paths.manifest(stage).unlink()
    before = files_in(finished_run.workspace)
    for value in ("models", "runs/run", "runs/run/adapter", *unlisted):
        changed = {**manifest, "facts": {**manifest["facts"], fact: value}}
        finished_run.paths.manifest(made_by).write_text(json.dumps(changed))
        said = finished_run(stage, status=2) if stage != "train" else refusal_of_train(finished_run)
        assert f"facts.{fact} is {value!r}, but {made_by} wrote no " in said
        assert f"Delete the file and run `helm upgrade`, or `llama-lora {made_by}" in said
    assert files_in(finished_run.workspace) == before


def refusal_of_train(run: Run) -> str:
    with pytest.raises(UserError) as refused:
        verify_base_and_rows(Stage("train", run.load(), run.paths))
    return str(refused.value)


@pytest.mark.parametrize("folder", ["runs/precious", "runs/run/checkpoints/0123456789abcdef/step-000002"])
def test_consolidate_renames_nothing_but_a_checkpoint_of_that_training(finished_run: Run, folder: str) -> None:
    checkpoint = finished_run.workspace / folder
    checkpoint.mkdir(parents=True)
    (checkpoint / "checkpoint.json").write_text("precious")
    manifest = finished_run.manifest("train")
    manifest["facts"]["checkpoint"] = folder
    manifest["outputs"][f"{folder}/checkpoint.json"] = asdict(record_of(checkpoint / "checkpoint.json"))
    finished_run.paths.manifest("train").write_text(json.dumps(manifest))
    finished_run.paths.manifest("consolidate").unlink()
    said = finished_run("consolidate", status=2)
    assert f"facts.checkpoint is {folder!r}, which is not a checkpoint {finished_run.paths.run}/checkpoints/" in said
    assert (checkpoint / "checkpoint.json").read_text() == "precious"


@pytest.mark.parametrize("name", ["/etc/passwd", "../outside", "a/../../b", "", "a\0b"])
def test_outputs_outside_of_the_workspace_are_not_looked_at(finished_run: Run, name: str) -> None:
    manifest = finished_run.manifest("merge")
    manifest["outputs"][name] = {"bytes": 1, "sha256": "0" * 64}
    finished_run.paths.manifest("merge").write_text(json.dumps(manifest))
    assert "is not a path inside" in finished_run("verify", "merge", status=2)
    assert json.loads(finished_run("fingerprint", "merge"))["upToDate"] is False


def test_a_probe_of_any_content_is_refused_in_a_line(finished_run: Run) -> None:
    manifest = finished_run.manifest("consolidate")
    right = manifest["facts"]["probe"]
    finished_run.paths.manifest("merge").unlink()
    for wrong in (5, [], {}, {**right, "rows": [10_000], "losses": [1.0], "tokens": [1]}, {**right, "tokens": []}):
        manifest["facts"]["probe"] = wrong
        finished_run.paths.manifest("consolidate").write_text(json.dumps(manifest))
        lines = finished_run("merge", status=2).splitlines()
        [line] = [line for line in lines if " verified " not in line]  # a busy computer takes seconds, and says so
        assert "probe" in line
    refused = 0
    for probe in spoiled(right, VALUES):
        try:
            as_record(probe, ProbeRecord)
        except InvalidJson:
            refused += 1
    assert refused > 50


# --- resolved.json, contents.json, checkpoint.json


@pytest.mark.parametrize("kind", CONTENTS)
def test_resolved_sources_of_any_content_are_made_again(finished_run: Run, kind: str) -> None:
    before = json.loads(finished_run.paths.resolved.read_text())
    content, words = CONTENTS[kind]
    finished_run.paths.resolved.write_bytes(content)
    assert json.loads(finished_run("fingerprint", "merge"))["upToDate"], "local files are resolved without the record"
    said = finished_run("tokenize")
    assert "skipped" in said and (words in said or kind == "another object")
    assert json.loads(finished_run.paths.resolved.read_text()) == before


def test_wrong_values_in_resolved_sources_are_no_traceback(finished_run: Run) -> None:
    config, paths = finished_run.load(), finished_run.paths
    sources = resolve.resolve_sources(config, paths)
    for content in spoiled(json.loads(paths.resolved.read_text()), VALUES):
        paths.resolved.write_text(json.dumps(content))
        for found in (resolve.known_sources(config, paths), resolve.resolve_sources(config, paths)):
            assert found is not None
            for source in (found.model, found.dataset):
                assert "/" not in f"{source.name}{source.revision}"
    paths.resolved.unlink()
    assert resolve.resolve_sources(config, paths) == sources


def test_resolved_sources_cannot_choose_a_folder_outside_of_the_workspace(new_run: Callable[..., Run]) -> None:
    run = new_run()
    run("fingerprint", "tokenize")
    run("tokenize")
    recorded = json.loads(run.paths.resolved.read_text())
    recorded["model"] |= {"name": "../../outside"}
    run.paths.resolved.write_text(json.dumps(recorded))
    run.paths.manifest("tokenize").unlink()
    assert "resolved again" in run("tokenize")
    assert (
        not list(run.folder.glob("outside*")) and json.loads(run.paths.resolved.read_text())["model"]["name"] == "tiny"
    )


@pytest.mark.parametrize("kind", CONTENTS)
def test_contents_of_any_content_make_the_folder_again(tmp_path: Path, kind: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/file").write_text("content")
    (tmp_path / "folder.contents.json").write_bytes(CONTENTS[kind][0])
    with shared_folders.make_once(tmp_path / "folder") as missing:
        assert missing
    with shared_folders.make_once(tmp_path / "folder") as missing:
        assert not missing
    right = json.loads((tmp_path / "folder.contents.json").read_text())
    for content in spoiled(right, VALUES):
        (tmp_path / "folder.contents.json").write_text(json.dumps(content))
        assert shared_folders.is_whole(tmp_path / "folder", "always") in (True, False)


@pytest.mark.parametrize("kind", CONTENTS)
def test_a_checkpoint_with_a_record_of_any_content_is_set_aside(tmp_path: Path, kind: str) -> None:
    (tmp_path / "step-000001").mkdir()
    (tmp_path / "step-000001/checkpoint.json").write_bytes(CONTENTS[kind][0])
    assert checkpoints.complete(tmp_path, "a") == []
    with pytest.raises(UserError, match="no checkpoint is left"):
        checkpoints.newest_intact(tmp_path, "a")
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001.damaged"]


def test_a_position_that_changed_in_a_checkpoint_record_is_damage(finished_run: Run) -> None:
    """A training that resumes there would leave out rows, or train on them twice."""
    newest = finished_run.workspace / finished_run.manifest("train")["facts"]["checkpoint"]
    record = json.loads((newest / "checkpoint.json").read_text())
    for changed in ({"rows_done": record["rows_done"] - 1}, {"rows_done": 10**18}, {"step": 5}, {"workers": 3}):
        (newest / "checkpoint.json").write_text(json.dumps(record | changed))
        with pytest.raises(checkpoints.DamagedCheckpoint, match="another SHA-256"):
            checkpoints.verify_checkpoint(newest)
    found = checkpoints.newest_intact(newest.parent, record["fingerprint"])
    assert found and found[0].name == "step-000004"
    assert newest.with_name("step-000006.damaged").is_dir()


def test_a_file_with_the_name_of_a_checkpoint_is_none(finished_run: Run) -> None:
    newest = finished_run.workspace / finished_run.manifest("train")["facts"]["checkpoint"]
    newest.with_name("step-000099").write_text("x")
    fingerprint = finished_run.manifest("train")["fingerprint"]
    found = checkpoints.newest_intact(newest.parent, fingerprint)
    assert found and found[0] == newest


def test_wrong_values_in_a_checkpoint_record_are_damage(finished_run: Run) -> None:
    checkpoint = finished_run.workspace / finished_run.manifest("train")["facts"]["checkpoint"]
    file = checkpoint / "checkpoint.json"
    right = json.loads(file.read_text())
    del right["sha256"]  # as release 0.1 wrote it: else all of these have another digest
    damaged = 0
    for content in spoiled(copy.deepcopy(right), VALUES):
        file.write_text(json.dumps(content))
        checkpoints.complete(checkpoint.parent, right["fingerprint"])
        try:
            record = checkpoints.verify_checkpoint(checkpoint)
        except checkpoints.DamagedCheckpoint as damage:
            damaged += 1
            assert str(checkpoint) in damage.where
        else:
            assert all((checkpoint / name).is_file() for name in record.files)
    assert damaged > 100


def test_a_data_report_of_any_content_is_refused_in_a_line(finished_run: Run) -> None:
    finished_run.config["verify"] = "off"
    report = next(finished_run.workspace.glob("datasets/*/report.json"))
    size = report.stat().st_size
    finished_run.paths.manifest("tokenize").unlink()
    for content, words in {
        "[" * size: "is not valid JSON",
        '{"rows_read": []}'.ljust(size): "is not a data report",
    }.items():
        report.write_text(content)
        assert f"{report}: {words}" in finished_run("tokenize", status=2)


def test_the_report_of_a_run_leaves_out_a_data_report_of_another_content(finished_run: Run) -> None:
    finished_run.config["verify"] = "off"
    report = next(finished_run.workspace.glob("datasets/*/report.json"))
    report.write_text('{"rows_read": []}'.ljust(report.stat().st_size))
    write_report(finished_run)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a: [1, 2\nb: 3\n", "run.yaml:2:2: not valid YAML"),
        (b"[" * 20_000, "not valid YAML"),
        (b"name: 2024-99-99\n", "not valid YAML: month"),
        (b"name: \xff\n", "not valid YAML: 'utf-8'"),
        (b"- a\n", "must contain keys"),
        (b"name: !!bool zz\n", "not valid YAML: 'zz'"),
        (b"name: !!int ''\n", "not valid YAML"),
        (b"name: !!timestamp x\n", "not valid YAML"),
        (b"#" * (2 << 20), "the most is"),
    ],
    ids=["syntax", "deep", "date", "not UTF-8", "list", "bool", "int", "timestamp", "large"],
)
def test_a_run_config_of_any_content_is_refused_in_one_line(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        run_config.load(file)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("name: a\nbackend: cpu\nname: b\n", "run.yaml:3:1: not valid YAML: duplicate key name, first in line 1"),
        ("lora:\n  r: 8\n  alpha: 1\n  r: 9\n", "run.yaml:4:3: not valid YAML: duplicate key r, first in line 2"),
        ("lora: {r: 8, r: 9}\n", "run.yaml:1:14: not valid YAML: duplicate key r, first in line 1"),
    ],
)
def test_a_duplicate_key_in_a_run_config_is_refused(tmp_path: Path, content: str, words: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(content)
    with pytest.raises(UserError) as caught:
        run_config.load(file)
    assert f"{words}. Keep one of the two" in str(caught.value)


def test_a_run_config_is_a_regular_file_or_a_link_to_one(finished_run: Run, tmp_path: Path) -> None:
    (tmp_path / "link.yaml").symlink_to(finished_run.write_config())  # as in a mounted ConfigMap
    assert run_config.load(tmp_path / "link.yaml") == finished_run.load()
    os.mkfifo(tmp_path / "fifo")
    for path, words in {
        tmp_path / "fifo": "not a regular",
        Path("/dev/zero"): "not a regular",
        tmp_path / "no": "not found",
    }.items():
        with pytest.raises(UserError, match=words) as caught:
            run_config.load(path)
        assert caught.value.where == str(path) and caught.value.fix
