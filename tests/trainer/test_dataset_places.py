"""Where rows come from: folders, globs, saved datasets, S3 prefixes, the Hub, and several of them."""

from __future__ import annotations

import errno
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
from botocore.response import StreamingBody
from botocore.stub import Stubber

from genvalues.common.errors import Unavailable, UserError, UserErrors
from genvalues.settings.dataset_files import DataFile
from llama_lora import limits
from llama_lora.config import Dataset, RunConfig
from llama_lora.data import dataset_readers, resolve, s3
from llama_lora.data.dataset_readers import read_held_out, read_rows
from llama_lora.data.parts import held_out_part, training_parts
from llama_lora.data.resolve import ResolvedSources, Source
from llama_lora.data.rows import BadRows, Row
from llama_lora.paths import Paths
from trainer.conftest import Run

PINNED = Source("rows", "0" * 40)


def dataset_of(source: str | Path, **settings: Any) -> Dataset:
    return Dataset.model_validate({"source": str(source), "format": "text", **settings})


def rows(dataset: Dataset, sources: ResolvedSources | None = None, bad_rows: BadRows | None = None) -> list[Row]:
    others = dict.fromkeys(dataset.additional, PINNED)
    found = bad_rows or BadRows(skip=dataset.on_bad_row == "skip")
    read = list(read_rows(dataset, sources or ResolvedSources(PINNED, PINNED, others), found))
    if bad_rows is None:
        found.raise_errors()
    return read


def texts(source: str | Path, **settings: Any) -> list[str]:
    return [row.values["text"] for row in rows(dataset_of(source, **settings))]


def write(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


# --- folders, globs, splits


def test_a_folder_gives_the_rows_of_its_data_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", "3")
    write(tmp_path / "a/x.JSONL", "1", "2")
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "dataset_infos.json").write_text("{}")
    write(tmp_path / ".cache/c.jsonl", "hidden")
    (tmp_path / "_SUCCESS.txt").write_text("done")
    assert texts(tmp_path) == texts(f"{tmp_path}/") == ["1", "2", "3"]
    with pytest.raises(UserError, match="no data file"):
        (tmp_path / "empty").mkdir()
        texts(tmp_path / "empty")


def test_a_glob_gives_the_files_that_match(tmp_path: Path) -> None:
    for name in ("test-1.jsonl", "test-2.jsonl", "deep/er/test-3.jsonl", "other.jsonl"):
        write(tmp_path / name, name)
    (tmp_path / "test-1.md").write_text("about")
    assert texts(f"{tmp_path}/test-*") == ["test-1.jsonl", "test-2.jsonl"], "named files, whatever their split"
    assert texts(f"{tmp_path}/**/test-*.jsonl") == ["deep/er/test-3.jsonl", "test-1.jsonl", "test-2.jsonl"]
    write(tmp_path / "a[1].jsonl", "brackets")
    assert texts(tmp_path / "a[1].jsonl") == ["brackets"], "what exists is no glob"


def test_test_files_of_a_folder_are_never_trained_on(tmp_path: Path) -> None:
    for name in ("train.jsonl", "test.jsonl", "dev/part-0.jsonl", "more.jsonl", "training-data/a.jsonl"):
        write(tmp_path / name, name)
    assert texts(tmp_path) == ["more.jsonl", "train.jsonl", "training-data/a.jsonl"]
    assert texts(tmp_path, split="test") == ["test.jsonl"]
    assert texts(tmp_path, split="dev") == texts(tmp_path, split="validation") == ["dev/part-0.jsonl"]
    assert texts(tmp_path, split="test+validation") == ["test.jsonl", "dev/part-0.jsonl"]


def test_data_that_was_deleted_after_it_was_pinned_is_told(tmp_path: Path) -> None:
    for gone in (tmp_path / "a.jsonl", f"{tmp_path}/*.jsonl"):
        with pytest.raises(UserError, match="not found") as error:
            texts(gone)
        assert error.value.where == "dataset.source"


def test_a_link_to_a_file_that_does_not_exist_is_told_and_other_links_are_read(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere.jsonl", "1")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.jsonl").symlink_to(tmp_path / "elsewhere.jsonl")
    assert texts(tmp_path / "data") == ["1"]
    (tmp_path / "data/b.jsonl").symlink_to(tmp_path / "gone.jsonl")
    for source in (tmp_path / "data", f"{tmp_path}/data/*.jsonl"):
        with pytest.raises(UserError, match="link to a file that does not exist") as error:
            texts(source)
        assert error.value.where.endswith("b.jsonl") and error.value.fix


def test_a_source_that_cannot_be_read_is_told_at_its_key(
    new_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run(dataset={"source": f"/{'a' * 300}/rows.jsonl"})
    assert run("tokenize", status=2).startswith("dataset.source: /aaa")
    run = new_run()
    rows = Path(run.config["dataset"]["source"])

    def refuse(path: Path) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(resolve.files, "sha256", refuse)  # root may read everything
    run.config["dataset"]["source"], run.config["model"] = str(rows), {"id": "org/model"}
    with pytest.raises(UserError, match="Permission denied") as error:
        resolve.known_sources(run.load(), run.paths)
    assert error.value.where == "dataset.source" and rows.name in error.value.what and error.value.fix


def test_a_source_whose_files_have_no_end_or_disappear_is_told_at_its_key(
    new_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "SECONDS", 0.5)
    for name in "ab":  # a glob follows links, so there are 2^40 paths
        (tmp_path / "data" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "data" / name).symlink_to(".")
    run = new_run(dataset={"source": f"{tmp_path}/data/**/*.jsonl"})
    said = run("tokenize", status=2)
    assert said.startswith(f"dataset.source: {tmp_path}/data/**/*.jsonl listing its files takes more than 0.5 seconds")
    monkeypatch.setattr(resolve, "files_of", lambda _: [DataFile("a", tmp_path / "gone.jsonl")])  # as in /proc
    said = run("tokenize", status=2)
    assert (
        said.startswith(f"dataset.source: {tmp_path}/gone.jsonl cannot be read: No such file") and said.count("\n") == 1
    )


def test_a_file_whose_name_is_not_utf_8_is_read(new_run: Callable[..., Run], tmp_path: Path) -> None:
    write(tmp_path / "data" / os.fsdecode(b"a\xff.jsonl"), *"123")
    table = pyarrow.table({"text": ["4"]})
    with (tmp_path / "data" / os.fsdecode(b"b\xff.parquet")).open("wb") as file:
        pyarrow.parquet.write_table(table, file)
    assert texts(tmp_path / "data") == ["1", "2", "3", "4"]
    run = new_run(dataset={"source": str(tmp_path / "data"), "format": "text", "columns": {}})
    run.config["evaluation"]["enabled"] = False
    run("tokenize")
    run("tokenize")
    (tmp_path / "data" / os.fsdecode(b"a\xff.jsonl")).write_bytes(b"{")
    assert "invalid JSON" in run("tokenize", status=2)


def test_a_folder_with_a_test_split_only_is_told(tmp_path: Path) -> None:
    write(tmp_path / "test.jsonl", "x")
    with pytest.raises(UserError, match=r"has no split 'train'. Set one of: test") as error:
        texts(tmp_path)
    assert error.value.where == "dataset.split"
    write(tmp_path / "test.jsonl", "x")
    with pytest.raises(UserError, match=r"has no split 'test'. Set one of: train"):
        texts(tmp_path / "test.jsonl", split="test")
    assert texts(tmp_path / "test.jsonl") == ["x"], "a file that is named is trained on"


@pytest.mark.parametrize(
    "split",
    [
        "train[:10%]",
        "train[50%:]",
        "train[-3:]",
        "train[5:7]",
        "train[:3]+train[9:]",
        "train[-50%:-10%]",
        "train[:99]",
        "train[20:]",
    ],
)
def test_a_part_of_a_split_is_that_of_datasets(tmp_path: Path, split: str) -> None:
    numbers = [str(number) for number in range(27)]
    write(tmp_path / "data/a.jsonl", *numbers[:15])
    write(tmp_path / "data/b.jsonl", *numbers[15:])
    paths = [str(tmp_path / "data" / name) for name in ("a.jsonl", "b.jsonl")]
    theirs = datasets.load_dataset("json", data_files=paths, split=split, cache_dir=str(tmp_path / "cache"))
    assert texts(tmp_path / "data", split=split) == list(theirs["text"])


def test_a_saved_dataset_is_read(tmp_path: Path) -> None:
    def of(*values: str) -> Any:
        return datasets.Dataset.from_dict({"text": list(values), "score": [float("nan")] * len(values)})

    of("1", "2").save_to_disk(str(tmp_path / "one"))
    assert texts(tmp_path / "one") == ["1", "2"]
    of(*"abc").select([2, 0]).save_to_disk(str(tmp_path / "chosen"))
    assert rows(dataset_of(tmp_path / "chosen"))[0] == Row(
        f"{tmp_path / 'chosen'} train row 1", {"text": "c", "score": None}
    )
    datasets.DatasetDict({"train": of("1", "2"), "test": of("3")}).save_to_disk(str(tmp_path / "splits"))
    assert texts(tmp_path / "splits") == ["1", "2"]
    assert texts(tmp_path / "splits", split="test+train[1:]") == ["3", "2"]
    (tmp_path / "one" / "state.json").write_text("{}")
    with pytest.raises(UserError):
        texts(tmp_path / "one")


@pytest.mark.parametrize("name", ["good::v2", "file:good::v2"])
def test_a_saved_dataset_is_never_read_from_the_folder_before_two_colons(tmp_path: Path, name: str) -> None:
    for folder, text in (("good", "other"), (name, "right")):
        datasets.Dataset.from_dict({"text": [text]}).save_to_disk(str(tmp_path / "saved"))
        (tmp_path / "saved").rename(tmp_path / folder)
    with pytest.raises(UserError, match="its path contains ::") as error:
        texts(tmp_path / name)
    assert error.value.where == "dataset.source"


@pytest.mark.parametrize("name", ["file:rows", "data:rows", "local:rows"])
def test_a_saved_dataset_may_have_the_name_of_a_protocol(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    datasets.Dataset.from_dict({"text": ["right"]}).save_to_disk(str(tmp_path / name))
    assert texts(Path(name)) == ["right"]


# --- bad rows


def test_after_a_bad_row_no_other_is_prepared_in_vain_and_all_sources_are_searched(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", "1", "2")
    first.write_text(first.read_text() + "x\n" + json.dumps({"text": "3"}))
    second = write(tmp_path / "b.jsonl", "4")
    second.write_text(second.read_text() + "y\n")
    dataset = dataset_of(first, additional={"more": {"source": str(second)}})
    sources = ResolvedSources(PINNED, PINNED, {"more": PINNED})
    bad_rows = BadRows()
    seen = [row.values["text"] for row in read_rows(dataset, sources, bad_rows)]
    with pytest.raises(UserErrors) as error:
        bad_rows.raise_errors()
    assert seen == ["1", "2"]
    assert [each.where for each in error.value.errors] == [f"{first}:3:1", f"{second}:2:1", "dataset.onBadRow"]
    skipping = dataset.model_copy(update={"on_bad_row": "skip"})
    assert [row.values["text"] for row in rows(skipping)] == ["1", "2", "3", "4"]


def test_counting_the_rows_of_a_split_reports_no_bad_row_twice(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "1", "2", "3", "4")
    path.write_text("x\n" + path.read_text())
    with pytest.raises(UserErrors) as error:
        texts(path, split="train[:50%]")
    assert [each.where for each in error.value.errors] == [f"{path}:1:1", "dataset.onBadRow"]
    skipped = BadRows(skip=True)
    found = rows(dataset_of(path, split="train[:50%]"), bad_rows=skipped)
    assert ([row.values["text"] for row in found], skipped.number) == (["1", "2"], 1)


# --- several sources


def test_additional_sources_have_their_own_settings_and_rows_say_their_source(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", "1")
    write(tmp_path / "b.jsonl", "2", "3")
    other = {"source": str(tmp_path / "b.jsonl"), "split": "train[1:]", "format": "chat", "weight": 0.5}
    dataset = dataset_of(
        tmp_path / "a.jsonl", additional={"replay": other, "again": {"source": str(tmp_path / "a.jsonl")}}
    )
    assert [(row.source, row.values["text"]) for row in rows(dataset)] == [("", "1"), ("again", "1"), ("replay", "3")]
    parts = training_parts(dataset)
    assert [(part.key, part.format, part.weight) for part in parts] == [
        ("dataset", "text", 1),
        ("dataset.additional.again", "text", 1),
        ("dataset.additional.replay", "chat", 0.5),
    ]
    assert parts[2].read_columns == {"messages", "system", "tools"}


def test_held_out_rows_come_from_their_source_or_from_a_split_of_the_dataset(tmp_path: Path) -> None:
    write(tmp_path / "data/train.jsonl", "1")
    write(tmp_path / "data/test.jsonl", "2")
    write(tmp_path / "other.jsonl", "3")
    sources = ResolvedSources(PINNED, PINNED, {}, PINNED)

    def held_out(**eval_: str) -> list[str]:
        dataset = dataset_of(tmp_path / "data", eval=eval_)
        return [row.values["text"] for row in read_held_out(dataset, sources, BadRows())]

    assert held_out() == []
    assert held_out(split="test") == ["2"]
    assert held_out(source=str(tmp_path / "other.jsonl")) == ["3"]
    assert held_out(source=str(tmp_path / "data"), split="test") == ["2"]
    hub = dataset_of("org/rows", config="en", revision="v1", eval={"split": "test"})
    part = held_out_part(hub)
    assert part and (part.source, part.config, part.revision, part.split) == ("org/rows", "en", "v1", "test")
    part = held_out_part(dataset_of("org/rows", config="en", revision="v1", eval={"source": "org/other"}))
    assert part and (part.source, part.config, part.revision, part.split) == ("org/other", "", "", "")


def resolved(run: Run) -> ResolvedSources:
    return resolve.resolve_sources(config_of(run), run.paths)


def config_of(run: Run) -> RunConfig:
    run.paths.run.mkdir(parents=True, exist_ok=True)
    return run.load()


def test_every_source_is_pinned_and_a_change_of_any_is_another_identity(
    new_run: Callable[..., Run], tmp_path: Path
) -> None:
    write(tmp_path / "more/a.jsonl", "1")
    write(tmp_path / "held-out.jsonl", "2")
    run = new_run()
    alone = resolved(run).identity()
    assert alone.keys() == {"model", "dataset"}, "an upgrade repeats no stage of a run with one source"
    run.config["dataset"] |= {
        "additional": {"more": {"source": str(tmp_path / "more")}},
        "eval": {"source": str(tmp_path / "held-out.jsonl")},
    }
    assert resolve.known_sources(config_of(run), run.paths) is not None, "files need no look-up"
    found = resolved(run)
    assert resolve.known_sources(config_of(run), run.paths) == found
    assert found.identity() | alone == found.identity()
    assert found.identity().keys() - alone.keys() == {"dataset.additional.more", "dataset.eval"}
    write(tmp_path / "more/b.jsonl", "3")
    assert resolved(run).additional["more"] != found.additional["more"]
    write(tmp_path / "held-out.jsonl", "2", "4")
    assert resolved(run).held_out != found.held_out


def test_a_compressed_file_with_another_format_is_another_source(new_run: Callable[..., Run], tmp_path: Path) -> None:
    run, digests = new_run(), set()
    for name in ("a.jsonl.gz", "a.txt.gz", "a.jsonl.zst"):
        (tmp_path / name).write_bytes(b"same")
        run.config["dataset"]["source"] = str(tmp_path / name)
        digests.add(resolved(run).dataset.revision)
    assert len(digests) == 3


def test_what_exists_is_never_called_a_hub_id(
    new_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda *_: pytest.fail("asked the Hub"))
    run = new_run()
    write(tmp_path / "org/rows/a.jsonl", "1")
    run.config["dataset"]["source"] = "org/rows"
    assert len(resolved(run).dataset.revision) == 64 and texts("org/rows") == ["1"]
    (tmp_path / "rows").write_text("x")
    run.config["dataset"]["source"] = "rows"
    with pytest.raises(UserError, match="rows has an unsupported file format") as error:
        resolved(run)
    assert error.value.where == "dataset.source"
    for gone in (f"{tmp_path}/none/", f"{tmp_path}/none", "./none", f"{tmp_path}/*.jsonl", "./a\nb\0.jsonl"):
        run.config["dataset"]["source"] = gone
        with pytest.raises(UserError, match="not found") as error:
            resolved(run)
        assert error.value.where == "dataset.source" and str(error.value).isprintable()


# --- S3


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stubber]:
    import boto3

    client = boto3.client("s3", region_name="us-west-2", aws_access_key_id="x", aws_secret_access_key="x")
    for module in (s3, resolve, dataset_readers):
        monkeypatch.setattr(module, "s3_client", lambda: client)
    with Stubber(client) as stubber:
        yield stubber


def list_of(**etags: str) -> dict[str, Any]:
    return {"Contents": [{"Key": key, "ETag": f'"{etag}"'} for key, etag in etags.items()], "IsTruncated": False}


@pytest.mark.parametrize("pattern", ["data/", "data/*.jsonl"])
def test_an_s3_prefix_is_read_as_it_was_when_it_was_pinned(
    new_run: Callable[..., Run], bucket: Stubber, pattern: str
) -> None:
    run = new_run()
    run.config["dataset"] |= {"source": f"s3://bucket/{pattern}", "split": "train"}
    listed = {"data/a.jsonl": "1", "data/b.jsonl": "2", "data/_SUCCESS": "3", "data/": "4"}
    if pattern.endswith("/"):
        listed["data/test/c.jsonl"] = "5"
    bucket.add_response("list_objects_v2", list_of(**listed), {"Bucket": "bucket", "Prefix": "data/"})
    sources = resolved(run)
    assert resolved(run) == sources, "listed once"
    for key, etag in (("data/a.jsonl", "1"), ("data/b.jsonl", "2")):
        body = json.dumps({"q": key}).encode()
        answer = {"Body": StreamingBody(io.BytesIO(body), len(body))}
        bucket.add_response("get_object", answer, {"Bucket": "bucket", "Key": key, "IfMatch": etag})
    found = rows(config_of(run).dataset, sources)
    assert [(row.place, row.values["q"]) for row in found] == [
        ("s3://bucket/data/a.jsonl:1", "data/a.jsonl"),
        ("s3://bucket/data/b.jsonl:1", "data/b.jsonl"),
    ]
    bucket.assert_no_pending_responses()
    bucket.add_client_error("get_object", "PreconditionFailed", http_status_code=412)
    with pytest.raises(UserError, match=r"s3://bucket/data/a.jsonl has been replaced since"):
        rows(config_of(run).dataset, sources)


def test_an_s3_prefix_without_data_or_that_must_not_be_listed_is_told(
    new_run: Callable[..., Run], bucket: Stubber
) -> None:
    run = new_run()
    run.config["dataset"] |= {"eval": {"source": "s3://bucket/data/"}}
    bucket.add_response("list_objects_v2", list_of(**{"data/README.md": "1"}))
    with pytest.raises(UserError, match="no data file among 1 objects") as error:
        resolved(run)
    assert error.value.where == "dataset.eval.source"
    bucket.add_client_error("list_objects_v2", "AccessDenied")
    with pytest.raises(UserError, match="s3:ListBucket"):
        resolved(run)


# --- the Hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """`datasets` with one dataset org/rows; ``rows`` and ``split`` may be changed, ``error`` is raised instead."""
    there: dict[str, Any] = {"configs": ["default"], "splits": ["train", "test"], "error": None, "asked": []}
    there["rows"] = datasets.Dataset.from_dict({"text": ["1", "2"]})

    def answer(key: str) -> Callable[..., Any]:
        def ask(name: str, *arguments: Any, **options: Any) -> Any:
            there["asked"].append((key, *arguments, options))
            if there["error"]:
                raise there["error"]
            return there[key]

        return ask

    monkeypatch.setattr(datasets, "get_dataset_config_names", answer("configs"))
    monkeypatch.setattr(datasets, "get_dataset_split_names", answer("splits"))
    monkeypatch.setattr(datasets, "load_dataset", answer("rows"))
    return there


def test_hub_rows_are_read_at_the_pinned_commit(hub: dict[str, Any]) -> None:
    dataset = dataset_of("org/rows", split="train[:10%]+test")
    assert [row.place for row in rows(dataset)] == [f"org/rows train[:10%]+test row {n}" for n in (1, 2)]
    options = hub["asked"][-1][-1]
    assert options == {"split": "train[:10%]+test", "revision": PINNED.revision}
    with pytest.raises(UserError, match=r"no split 'dev'. Set one of: train, test") as error:
        texts("org/rows", split="train+dev[:5]")
    assert error.value.where == "dataset.split"
    hub["splits"] = ["test"]
    with pytest.raises(UserError, match=r"no split 'train'. Set one of: test"):
        texts("org/rows")
    hub["configs"] = ["en", "de"]
    with pytest.raises(UserError, match=r"several configs. Set one of: en, de") as error:
        texts("org/rows")
    assert error.value.where == "dataset.config"


def test_hub_bytes_and_nan_are_cleaned_and_images_are_not_decoded(hub: dict[str, Any]) -> None:
    features = datasets.Features(
        {"text": datasets.Value("binary"), "score": datasets.Value("float64"), "image": datasets.Image()}
    )
    image = {"bytes": b"\xff\xd8", "path": "a.jpg"}
    data = {"text": ["é".encode(), b"\xff"], "score": [float("nan")] * 2, "image": [image] * 2}
    hub["rows"] = datasets.Dataset.from_dict(data, features=features)
    bad_rows = BadRows(skip=True)
    (row,) = rows(dataset_of("org/rows"), bad_rows=bad_rows)
    assert (row.values["text"], row.values["score"]) == ("é", None)
    assert "row 2: column text contains bytes that are not UTF-8" in str(bad_rows.first[0])


def raised_from(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def mixed_schemas(tmp_path: Path, kind: str) -> Exception:
    """The error of `datasets` itself for files with different columns."""
    (tmp_path / "a.json").write_text('{"text": "1"}\n')
    (tmp_path / "b.json").write_text('{"other": 1, "columns": 2}\n')
    (tmp_path / "a.csv").write_text("a,b\n1,2\n")
    (tmp_path / "b.csv").write_text("a,c\n1,2\n")
    paths = [str(tmp_path / f"{name}.{kind}") for name in "ab"]
    with pytest.raises(datasets.exceptions.DatasetGenerationError) as error:
        datasets.load.load_dataset(kind, data_files=paths, cache_dir=str(tmp_path / "cache"))
    return error.value


def test_a_failure_of_datasets_is_a_user_error_with_what_to_do(hub: dict[str, Any], tmp_path: Path) -> None:
    missing = datasets.exceptions.DataFilesNotFoundError("No (supported) data files found in org/rows")
    told = {
        "dataset.revision: org/rows is read by a Python script": RuntimeError(
            "Dataset scripts are no longer supported, but found rows.py"
        ),
        "dataset.source: `datasets` cannot read org/rows: its files have different columns": mixed_schemas(
            tmp_path, "json"
        ),
        "dataset.source: `datasets` cannot read org/rows: its files have different": mixed_schemas(tmp_path, "csv"),
        "dataset.source: `datasets` cannot read org/rows: a file is missing": missing,
        "dataset.source: `datasets` cannot read org/rows: ArrowInvalid: JSON parse error": raised_from(
            datasets.exceptions.DatasetGenerationError("An error occurred"), pyarrow.ArrowInvalid("JSON parse error")
        ),
        "dataset.source: `datasets` cannot read org/rows: ValueError: BuilderConfig": ValueError("BuilderConfig 'x'"),
    }
    for message, error in told.items():
        hub["error"] = error
        with pytest.raises(UserError) as found:
            texts("org/rows")
        assert str(found.value).startswith(message) and found.value.fix


def test_a_failure_of_the_network_or_the_disk_is_not_the_users(hub: dict[str, Any]) -> None:
    hub["error"] = raised_from(
        datasets.exceptions.DatasetGenerationError("An error occurred"), ConnectionError("reset")
    )
    with pytest.raises(Unavailable):
        texts("org/rows")
    full = OSError(errno.ENOSPC, "No space left on device")
    hub["error"] = raised_from(datasets.exceptions.DatasetGenerationError("An error occurred"), full)
    with pytest.raises(datasets.exceptions.DatasetGenerationError):
        texts("org/rows")


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The Parquet branch of wikicorpus, as the Hub lays it out; what was downloaded."""
    files = ["raw_en/train/0000.parquet", "raw_en/train/0001.parquet", "raw_en/partial-test/0000.parquet"]
    files.append("raw_ca/train/0000.parquet")
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table({"text": [file]}), tmp_path / file)
    asked: list[str] = []

    class Api:
        def list_repo_files(self, name: str, *, revision: str, repo_type: str) -> list[str]:
            assert (name, revision, repo_type) == ("wikicorpus", PINNED.revision, "dataset")
            return [".gitattributes", *reversed(files)]

    def download(name: str, file: str, *, revision: str, repo_type: str) -> str:
        assert (name, revision, repo_type) == ("wikicorpus", PINNED.revision, "dataset")
        asked.append(file)
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked


def test_the_parquet_revision_of_a_script_based_dataset_is_read(hub: dict[str, Any], exported: list[str]) -> None:
    """wikicorpus: without a revision the error names the one to set, and that revision is read."""
    hub["error"] = RuntimeError("Dataset scripts are no longer supported, but found wikicorpus.py")
    with pytest.raises(UserError, match="refs/convert/parquet") as error:
        texts("wikicorpus", config="raw_en")
    assert error.value.where == "dataset.revision"
    settings = {"config": "raw_en", "revision": "refs/convert/parquet"}
    assert texts("wikicorpus", **settings) == ["raw_en/train/0000.parquet", "raw_en/train/0001.parquet"]
    assert texts("wikicorpus", split="train[1:]+partial-test", **settings) == [
        "raw_en/train/0001.parquet",
        "raw_en/partial-test/0000.parquet",
    ]
    assert "raw_ca/train/0000.parquet" not in exported
    with pytest.raises(UserError, match=r"Set one of: raw_ca, raw_en") as error:
        texts("wikicorpus", revision="refs/convert/parquet")
    assert error.value.where == "dataset.config"
    with pytest.raises(UserError, match=r"no split 'test'. Set one of: partial-test, train"):
        texts("wikicorpus", split="test", **settings)


def test_two_splits_of_a_hub_dataset_are_pinned_to_one_commit(
    new_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Api:
        commits = iter(["a" * 40, "b" * 40, "c" * 40])

        def dataset_info(self, name: str, revision: str | None) -> Any:
            return type("Info", (), {"sha": next(Api.commits)})

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    run = new_run()
    run.config["dataset"] |= {"source": "org/rows", "eval": {"split": "test"}}
    found = resolved(run)
    assert found.held_out and found.held_out.revision == found.dataset.revision == "a" * 40
    run.config["dataset"]["additional"] = {"again": {"source": "org/rows", "split": "test"}}
    assert resolved(run).additional["again"].revision == "a" * 40
    run.config["dataset"]["additional"] = {"again": {"source": "org/other"}}
    assert resolved(run).additional["again"].revision == "b" * 40


def test_two_sources_are_tokenized_together(new_run: Callable[..., Run], tmp_path: Path) -> None:
    run = new_run()
    more = tmp_path / "more.ndjson"
    more.write_text(json.dumps({"q": "More?", "a": "Yes."}) + "\n")
    run.config["dataset"]["additional"] = {"more": {"source": str(more), "columns": run.config["dataset"]["columns"]}}
    assert "rows: 41 read" in run("tokenize")
    assert Paths(run.workspace, "run").resolved.exists()
