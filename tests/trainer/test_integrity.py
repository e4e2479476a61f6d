"""A byte that changed on the volume reaches no new manifest; deleting the file and running again mends the run."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from genvalues.common import files
from genvalues.common.errors import UserError
from genvalues.common.json_files import FileRecord
from llama_lora import digests
from llama_lora.digests import Digests
from llama_lora.stage import Stage
from trainer.conftest import Run, llama_lora_here
from trainer.test_training import flip_byte

STAGES = ["tokenize", "compile", "train", "consolidate", "merge", "evaluate"]
WEIGHTS = "models/*/model.safetensors"
TRAIN_ROWS, HELD_OUT_ROWS = "datasets/*/train/*.arrow", "datasets/*/eval/*.arrow"
ADAPTER, MERGED = "runs/run/adapter/adapter_model.safetensors", "runs/run/merged/model.safetensors"
# What each stage reads, and which stage wrote it.
READS = [
    ("rehearse", TRAIN_ROWS, "tokenize"),
    ("rehearse", "models/*/config.json", "tokenize"),
    *[(stage, file, "tokenize") for stage in ("compile", "train", "consolidate") for file in (WEIGHTS, TRAIN_ROWS)],
    *[(stage, "models/*/config.json", "tokenize") for stage in ("compile", "train")],
    ("merge", WEIGHTS, "tokenize"),
    ("merge", "models/*/tokenizer.json", "tokenize"),
    ("merge", TRAIN_ROWS, "tokenize"),
    ("merge", ADAPTER, "consolidate"),
    ("evaluate", WEIGHTS, "tokenize"),
    ("evaluate", HELD_OUT_ROWS, "tokenize"),
    ("evaluate", MERGED, "merge"),
]
LAST_READERS = {pattern: (stage, pattern, made_by) for stage, pattern, made_by in READS}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of a node on which nothing was read yet."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path / f"llama-lora-digests-{os.geteuid()}"


def flip_in_the_middle(file: Path) -> None:
    """Change a byte of the data, not of a header, and keep the size."""
    flip_byte(file, file.stat().st_size * 2 // 3)


def digests_of(run: Run) -> dict[str, dict[str, Any]]:
    return {
        stage: {name: output["sha256"] for name, output in run.manifest(stage)["outputs"].items()}
        for stage in ("tokenize", "consolidate", "merge")
    }


def flip_before(run: Run, stage: str, pattern: str) -> Path:
    """Damage a file that the stage is about to read."""
    file = next(run.workspace.glob(pattern))
    flip_in_the_middle(file)
    shutil.rmtree(run.paths.base_scores, ignore_errors=True)  # with them evaluate does not read the base model
    run.paths.manifest(stage).unlink(missing_ok=True)
    return file


@pytest.mark.parametrize("stage, pattern, made_by", READS, ids=[f"{stage} {file}" for stage, file, _ in READS])
def test_a_flipped_byte_ends_the_stage_that_reads_it(finished_run: Run, stage: str, pattern: str, made_by: str) -> None:
    file = flip_before(finished_run, stage, pattern)
    said = finished_run(stage, status=2)
    (line,) = [line for line in said.splitlines() if str(file) in line]
    assert line.startswith(
        f"{file}: has the expected size but another SHA-256. Delete the file and run the stage again"
    )
    assert f"`llama-lora {made_by} --config ...`" in line
    assert not finished_run.paths.manifest(stage).exists()


@pytest.mark.parametrize("stage, pattern, made_by", LAST_READERS.values(), ids=LAST_READERS)
def test_deleting_the_damaged_file_and_running_again_mends_the_run(
    finished_run: Run, stage: str, pattern: str, made_by: str
) -> None:
    before = digests_of(finished_run)
    file = flip_before(finished_run, stage, pattern)
    finished_run(stage, status=2)
    file.unlink()
    finished_run(made_by)
    finished_run(stage)
    assert digests_of(finished_run) == before
    assert all("skipped" in finished_run(name) for name in STAGES)


def test_only_the_files_that_a_stage_reads_are_compared(finished_run: Run) -> None:
    flip_in_the_middle(next(finished_run.workspace.glob(HELD_OUT_ROWS)))
    for stage in ("consolidate", "merge"):
        finished_run.paths.manifest(stage).unlink()
        finished_run(stage)


UNLISTED = {  # a file that transformers or datasets would read, and a stage that reads its folder
    "models/*/tokenizer.json": ("consolidate", "evaluate", "train"),
    "datasets/*/train/state.json": ("consolidate", "train"),
    "runs/run/adapter/adapter_config.json": ("merge",),
    "runs/run/merged/tokenizer.json": ("evaluate",),
}


@pytest.mark.parametrize("beside", UNLISTED)
def test_a_file_that_no_stage_wrote_is_refused_by_the_stage_that_reads_its_folder(
    finished_run: Run, beside: str
) -> None:
    planted = next(finished_run.workspace.glob(beside)).with_name("added_tokens.json")
    planted.write_text('{"<|other|>": 258}')
    planted.with_name(".nfs0001").write_text("x")
    shutil.rmtree(finished_run.paths.base_scores)  # with them evaluate does not read the base model
    for stage in UNLISTED[beside]:
        finished_run.paths.manifest(stage).rename(finished_run.folder / "kept")
        assert f"{planted}: is not among the files that " in finished_run(stage, status=2)
        (finished_run.folder / "kept").rename(finished_run.paths.manifest(stage))
    planted.unlink()
    for stage in UNLISTED[beside]:
        finished_run.paths.manifest(stage).unlink()
        finished_run(stage)


@pytest.mark.parametrize("shared", ["models/*/config.json", "datasets/*/report.json"])
def test_a_file_that_was_put_into_a_shared_folder_does_not_reach_a_new_manifest(finished_run: Run, shared: str) -> None:
    before = finished_run.manifest("tokenize")["outputs"]
    planted = next(finished_run.workspace.glob(shared)).with_name("added_tokens.json")
    planted.write_text('{"<|other|>": 258}')
    finished_run.paths.manifest("tokenize").unlink()
    assert f"{planted} is not among the files" in finished_run("tokenize")
    assert finished_run.manifest("tokenize")["outputs"].keys() == before.keys() and not planted.exists()


def test_without_verification_sizes_are_compared_only(finished_run: Run) -> None:
    finished_run.config["verify"] = False  # off, as readers of YAML 1.1 understand it
    flip_in_the_middle(next(finished_run.workspace.glob("models/*/tokenizer.json")))
    finished_run.paths.manifest("merge").unlink()
    finished_run("merge")
    assert finished_run.load().verify == "off"


def test_the_setting_is_in_no_fingerprint(finished_run: Run) -> None:
    for verify in ("always", "off"):
        finished_run.config["verify"] = verify
        assert all("skipped" in finished_run(name) for name in STAGES)


def test_a_second_run_does_not_take_over_a_damaged_shared_folder(finished_run: Run) -> None:
    """Its manifest would have the digests of the damaged files."""
    before = digests_of(finished_run)["tokenize"]
    for pattern in (WEIGHTS, TRAIN_ROWS):
        flip_in_the_middle(next(finished_run.workspace.glob(pattern)))
    finished_run.config["name"] = "second"
    said = finished_run("tokenize")
    assert said.count("has the expected size but another SHA-256") == 2 and "is made again" in said
    assert {name: output["sha256"] for name, output in finished_run.manifest("tokenize")["outputs"].items()} == before
    finished_run.config["name"] = "run"
    assert "all match the manifest" in finished_run("verify", "tokenize")


def test_the_contents_of_release_0_1_have_no_digests_and_get_them(finished_run: Run) -> None:
    contents = next(finished_run.workspace.glob("models/*.contents.json"))
    recorded = json.loads(contents.read_text())
    contents.write_text(json.dumps({name: record["bytes"] for name, record in recorded.items()}))
    finished_run.paths.manifest("tokenize").unlink()
    assert "copying" not in finished_run("tokenize")
    assert json.loads(contents.read_text()) == recorded


# --- a damaged checkpoint


@pytest.mark.parametrize("name", ["part-00000.safetensors", "checkpoint.json"])
def test_after_consolidate_found_a_damaged_checkpoint_the_next_run_trains_on_from_the_one_before(
    finished_run: Run, name: str
) -> None:
    before = digests_of(finished_run)
    checkpoint = finished_run.workspace / finished_run.manifest("train")["facts"]["checkpoint"]
    flip_in_the_middle(checkpoint / name)
    finished_run.paths.manifest("consolidate").unlink()
    said = finished_run("consolidate", status=2)
    assert f"{checkpoint / name}: " in said and "the checkpoint was set aside" in said
    assert "To train on from step-000004, run `helm upgrade`, `genvalues local`, or `llama-lora train" in said
    assert json.loads(finished_run("fingerprint", "train"))["upToDate"] is False
    assert checkpoint.with_name("step-000006.damaged").is_dir()

    assert "resuming from" in finished_run("train")
    assert ["skipped" in finished_run(stage) for stage in STAGES[3:]] == [False, True, True]
    assert digests_of(finished_run) == before


def test_if_the_only_checkpoint_is_damaged_the_folder_to_delete_is_named(finished_run: Run) -> None:
    before = digests_of(finished_run)
    checkpoint = finished_run.workspace / finished_run.manifest("train")["facts"]["checkpoint"]
    shutil.rmtree(checkpoint.with_name("step-000004"))
    flip_in_the_middle(checkpoint / "part-00000.safetensors")
    finished_run.paths.manifest("consolidate").unlink()
    assert f"delete {checkpoint.parent} to train from the start" in finished_run("consolidate", status=2)
    assert f"{checkpoint.parent}: no checkpoint is left" in finished_run("train", status=2)
    shutil.rmtree(checkpoint.parent)
    finished_run("train")
    finished_run("consolidate")
    assert digests_of(finished_run) == before


def test_the_tool_names_the_damaged_shard_and_moves_nothing(finished_run: Run) -> None:
    checkpoint = finished_run.workspace / finished_run.manifest("train")["facts"]["checkpoint"]
    flip_in_the_middle(checkpoint / "part-00000.safetensors")
    output = finished_run.folder / "adapter"
    said = llama_lora_here("consolidate", "--checkpoint", str(checkpoint), "--output", str(output), status=2)
    assert f"{checkpoint}/part-00000.safetensors: the shard's digest differs" in said
    assert checkpoint.is_dir() and not output.exists()


@pytest.mark.parametrize(
    "number, damaged", [(errno.EIO, True), (errno.EACCES, False)], ids=["a bad block", "no permission"]
)
def test_only_what_says_something_about_the_content_is_damage(
    finished_run: Run, monkeypatch: pytest.MonkeyPatch, number: int, damaged: bool
) -> None:
    from llama_lora.backends import checkpoints

    def fails(path: Path) -> str:
        raise OSError(number, os.strerror(number))

    folder = (finished_run.workspace / finished_run.manifest("train")["facts"]["checkpoint"]).parent
    monkeypatch.setattr(files, "sha256", fails)
    with pytest.raises(UserError, match="no checkpoint is left" if damaged else "cannot be read: Permission denied"):
        checkpoints.newest_intact(folder, finished_run.manifest("train")["fingerprint"])
    assert len(list(folder.glob("*.damaged"))) == (2 if damaged else 0)


# --- the cache of digests


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read to compute a digest."""
    read: list[Path] = []
    sha256 = files.sha256
    monkeypatch.setattr(files, "sha256", lambda path: read.append(path) or sha256(path))
    return read


@pytest.fixture
def an_hour_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that the test has written are settled when their digests are computed: no call sets their ctime back."""
    monkeypatch.setattr(digests, "time", SimpleNamespace(time=lambda: time.time() + 3600))


def old_file(path: Path, content: bytes = b"content") -> Path:
    path.write_bytes(content)
    os.utime(path, (1_700_000_000, 1_700_000_000))
    return path


@pytest.mark.usefixtures("an_hour_later")
def test_a_file_is_read_once_on_a_node_until_it_changes(tmp_path: Path, read: list[Path]) -> None:
    file = old_file(tmp_path / "file")
    for _ in range(2):
        assert Digests("cached").of([file]) == {file: files.sha256(file)}
        del read[-1]  # of the comparison
    assert read == [file]
    before = file.stat().st_ctime_ns
    while file.stat().st_ctime_ns == before:
        old_file(file, b"CONTENT")  # with the same size and time: the inode's own time differs
    Digests("cached").of([file])
    assert read == [file, file]
    Digests("always").of([file])
    assert read == [file, file, file]


def test_a_file_that_was_just_written_is_read_again(tmp_path: Path, read: list[Path]) -> None:
    """A write within the resolution of the file system's clock would not change its time."""
    file = tmp_path / "file"
    file.write_bytes(b"content")
    for _ in range(2):
        Digests("cached").of([file])
    assert read == [file, file]


def test_a_file_that_was_just_written_is_read_again_with_an_old_time(tmp_path: Path, read: list[Path]) -> None:
    """cp -p, tar and rsync set the time of the content: only that of the inode says that it was written just now."""
    file = old_file(tmp_path / "file")
    for _ in range(2):
        Digests("cached").of([file])
    assert read == [file, file]


@pytest.mark.usefixtures("an_hour_later")
def test_a_cache_that_others_can_write_is_not_believed(tmp_path: Path, own_cache: Path) -> None:
    file = old_file(tmp_path / "file")
    right = Digests("cached").of([file])
    cache = own_cache / "digests.json"
    assert (own_cache.stat().st_mode & 0o777, cache.stat().st_mode & 0o777) == (0o700, 0o600)
    forged = json.loads(cache.read_text())
    forged["digests"] = dict.fromkeys(forged["digests"], "0" * 64)
    cache.write_text(json.dumps(forged))
    assert Digests("cached").of([file]) == {file: "0" * 64}, "else the rest proves nothing"
    for path, mode in [(own_cache, 0o777), (cache, 0o666)]:
        safe = path.stat().st_mode
        path.chmod(mode)
        assert Digests("cached").of([file]) == right
        cache.write_text(json.dumps(forged))
        path.chmod(safe)
    own_cache.rename(tmp_path / "elsewhere")
    own_cache.symlink_to(tmp_path / "elsewhere")
    assert Digests("cached").of([file]) == right
    assert Digests("cached").of([file]) == right
    if os.geteuid() == 0:
        own_cache.unlink()
        (tmp_path / "elsewhere").rename(own_cache)
        cache.write_text(json.dumps(forged))
        os.chown(cache, 65534, 65534)
        assert Digests("cached").of([file]) == right


@pytest.mark.usefixtures("an_hour_later")
@pytest.mark.parametrize("content", ["", "[]", '{"format": 1, "digests": {"a": 5}}', "[" * 100_000, '{"format": 2}'])
def test_a_damaged_cache_is_made_again(tmp_path: Path, own_cache: Path, read: list[Path], content: str) -> None:
    file = old_file(tmp_path / "file")
    own_cache.mkdir(mode=0o700)
    (own_cache / "digests.json").write_text(content)
    for _ in range(2):
        Digests("cached").of([file])
    assert read == [file]


@pytest.mark.usefixtures("an_hour_later")
def test_the_cache_keeps_a_bounded_number_of_digests(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "MOST_ENTRIES", 3)
    found = [old_file(tmp_path / f"file-{number}") for number in range(5)]
    for file in found:
        Digests("cached").of([file])
    assert len(json.loads((own_cache / "digests.json").read_text())["digests"]) == 3


@pytest.mark.usefixtures("an_hour_later")
def test_a_disk_that_cannot_be_written_costs_only_the_cache(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = old_file(tmp_path / "file")

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "write_bytes", full)
    assert Digests("cached").of([file]) == {file: files.sha256(file)}


@pytest.mark.usefixtures("an_hour_later")
def test_a_stage_reads_what_the_node_has_read_before_only_with_always(finished_run: Run, read: list[Path]) -> None:
    def base_files_read() -> int:
        stage = Stage("evaluate", finished_run.load(), finished_run.paths)
        del read[:]
        stage.verify_read("tokenize", stage.upstream_path("tokenize", "model"))
        return len(read)

    count = base_files_read()
    assert count >= 4 and base_files_read() == 0
    finished_run.config["verify"] = "always"
    assert base_files_read() == count
    finished_run.config["verify"] = "off"
    assert base_files_read() == 0


def test_every_difference_has_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = old_file(tmp_path / "file")
    record = FileRecord(7, files.sha256(file))

    def difference(path: Path = file) -> str:
        return digests.differences({path: record}, Digests("always")).get(path, "")

    assert difference() == ""
    assert difference(tmp_path / "other") == "not found"
    assert difference(file / "below") == "not found"
    file.write_bytes(b"longer than that")
    assert difference() == "has 16 bytes, expected 7"
    file.write_bytes(b"CONTENT")
    assert difference() == "has the expected size but another SHA-256"


def test_training_on_several_nodes_verifies_on_each(new_run: Callable[..., Run]) -> None:
    """The launcher, of which there is one on each node, does it before its workers start."""
    from llama_lora.stages import train

    run = new_run()
    run("tokenize")
    flip_in_the_middle(next(run.workspace.glob(WEIGHTS)))
    with pytest.raises(UserError, match="another SHA-256"):
        train.verify_base_and_rows(Stage("train", run.load(), run.paths))
