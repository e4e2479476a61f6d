"""The publish stage: what is uploaded is what the manifests say, all of it or nothing that looks complete."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from genvalues.common.errors import Unavailable, UserError
from llama_lora import uploads
from llama_lora.uploads import File, hub, s3
from trainer.conftest import Run
from trainer.fake_hub_writes import FakeHub
from trainer.fake_s3 import CUT, FakeS3

PART = 1000
URI = "s3://bucket/runs/one"


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeS3]:
    fake = FakeS3()
    for name, value in fake.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(s3, "PART_BYTES", PART)
    monkeypatch.setattr("boto3.DEFAULT_SESSION", None)  # with the credentials of another test
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.0)
    yield fake
    fake.server.shutdown()
    fake.server.server_close()


@pytest.fixture
def hub_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """The Hub for this process, whose huggingface_hub has read its variables already."""
    from huggingface_hub import constants

    fake = FakeHub()
    monkeypatch.setattr(constants, "ENDPOINT", fake.url)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", fake.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    template = fake.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)  # 0.x
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    yield fake
    fake.server.shutdown()
    fake.server.server_close()


def file(folder: Path, name: str, content: bytes) -> File:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return File(name, path, len(content), hashlib.sha256(content).hexdigest(), "merge")


@pytest.fixture
def files(tmp_path: Path) -> list[File]:
    folder = tmp_path / "files"
    return [
        file(folder, "merged/model.safetensors", bytes(range(250)) * 22),  # six parts
        file(folder, "merged/config.json", b"{}"),
        file(folder, "README.md", b"# card\n"),
    ]


def put(files: list[File], tmp_path: Path, run: str = "one") -> bytes:
    manifest = uploads.manifest_of(run, "f1", files)
    s3.upload(URI, run, files, manifest, tmp_path / "begun.json")
    return manifest


# --- S3


def test_every_object_has_its_content_and_digest_and_the_manifest_comes_last(
    bucket: FakeS3, files: list[File], tmp_path: Path
) -> None:
    manifest = put(files, tmp_path)
    for each in files:
        stored = bucket.objects[f"runs/one/{each.name}"]
        assert stored.content == each.path.read_bytes()
        assert stored.metadata["sha256"] == each.sha256
    assert bucket.objects["runs/one/manifest.json"].content == manifest
    assert json.loads(manifest)["files"]["merged/config.json"] == {"bytes": 2, "sha256": files[1].sha256}
    assert bucket.sent("PUT")[-1] == "runs/one/manifest.json"
    assert not bucket.uploads and not json.loads((tmp_path / "begun.json").read_text())


def test_what_is_there_is_not_sent_again(bucket: FakeS3, files: list[File], tmp_path: Path) -> None:
    put(files, tmp_path)
    bucket.requests.clear()
    put(files, tmp_path)
    assert not bucket.sent("PUT") and not bucket.sent("POST") and not bucket.sent("DELETE")


def test_a_changed_file_is_replaced_and_meanwhile_there_is_no_manifest(
    bucket: FakeS3, files: list[File], tmp_path: Path
) -> None:
    put(files, tmp_path)
    changed = [*files[:2], file(tmp_path / "files", "README.md", b"# other card\n")]
    seen: list[bool] = []

    def watch(method: str, key: str, query: dict[str, str]) -> None:
        if method == "PUT" and key.endswith("README.md"):
            seen.append("runs/one/manifest.json" in bucket.objects)

    bucket.fault = watch
    bucket.requests.clear()
    put(changed, tmp_path)
    assert seen == [False]
    assert bucket.sent("PUT") == ["runs/one/README.md", "runs/one/manifest.json"]


@pytest.mark.parametrize("place", [0, 1])
def test_a_file_that_is_not_as_its_manifest_says_is_never_an_object(
    bucket: FakeS3, files: list[File], tmp_path: Path, place: int
) -> None:
    broken = files[place]
    content = bytearray(broken.path.read_bytes())
    content[-1] ^= 1
    broken.path.write_bytes(content)
    with pytest.raises(UserError, match="SHA-256") as refused:
        put(files, tmp_path)
    assert refused.value.where == str(broken.path) and "stage merge" in refused.value.fix
    assert f"runs/one/{broken.name}" not in bucket.objects
    assert "runs/one/manifest.json" not in bucket.objects
    assert not bucket.uploads, "parts of an incomplete upload cost money"


def test_bytes_that_change_on_the_way_are_refused(
    bucket: FakeS3, files: list[File], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve = bucket.serve
    monkeypatch.setattr(bucket, "serve", lambda m, k, q, body, h: serve(m, k, q, body[:-1] + b"?" if body else body, h))
    with pytest.raises(Unavailable, match="BadDigest"):
        put(files[1:2], tmp_path)
    assert not bucket.objects


@pytest.mark.parametrize(
    ("code", "status", "words"),
    [
        ("AccessDenied", 403, "s3:PutObject"),
        ("ExpiredToken", 400, "Renew the credentials"),
        ("NoSuchBucket", 404, "bucket's name"),
        ("SignatureDoesNotMatch", 403, "credentials"),
    ],
)
def test_what_the_user_must_change_is_told(
    bucket: FakeS3, files: list[File], tmp_path: Path, code: str, status: int, words: str
) -> None:
    bucket.fault = lambda method, *_: (status, code) if method == "PUT" else None
    with pytest.raises(UserError) as refused:
        put(files, tmp_path)
    assert refused.value.where == "publish.s3.uri"
    assert code in refused.value.what and words in refused.value.fix


@pytest.mark.parametrize("fault", [(500, "InternalError"), (503, "SlowDown"), CUT])
def test_a_passing_fault_is_retried_and_a_lasting_one_is_one_line(
    bucket: FakeS3, files: list[File], tmp_path: Path, fault: tuple[int, str]
) -> None:
    failures = iter([fault, fault])
    bucket.fault = lambda method, *_: next(failures, None) if method == "PUT" else None
    put(files, tmp_path)
    assert "runs/one/manifest.json" in bucket.objects
    bucket.objects.clear()
    bucket.fault = lambda method, *_: fault if method == "PUT" else None
    with pytest.raises(Unavailable) as away:
        put(files, tmp_path)
    assert "\n" not in str(away.value)
    assert not bucket.objects


def test_without_credentials_the_service_account_is_named(
    bucket: FakeS3, files: list[File], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(UserError, match="no AWS credentials") as refused:
        put(files, tmp_path)
    assert "serviceAccount.publishAnnotations" in refused.value.fix


UPLOAD = """
import sys, hashlib, pathlib
from llama_lora.uploads import File, manifest_of, s3
s3.PART_BYTES, s3.THREADS = 1000, 1
path = pathlib.Path(sys.argv[1])
files = [File("model.safetensors", path, path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest(), "merge")]
s3.upload("s3://bucket/runs/one", "one", files, manifest_of("one", "f1", files), pathlib.Path(sys.argv[2]))
"""


def test_a_killed_upload_leaves_no_object_and_continues(bucket: FakeS3, files: list[File], tmp_path: Path) -> None:
    arrived, released = threading.Event(), threading.Event()

    def hold(method: str, key: str, query: dict[str, str]) -> tuple[int, str] | None:
        if query.get("partNumber") == "4":
            arrived.set()
            released.wait(30)
            return CUT
        return None

    bucket.fault = hold
    command = [sys.executable, "-c", UPLOAD, str(files[0].path), str(tmp_path / "begun.json")]
    process = subprocess.Popen(command, env={**os.environ, **bucket.environment})
    assert arrived.wait(30)
    process.send_signal(signal.SIGKILL)
    process.wait()
    released.set()
    assert not bucket.objects, "nothing that looks complete"
    [(_, _, parts)] = bucket.uploads.values()
    assert sorted(parts) == [1, 2, 3]
    bucket.fault = lambda *_: None
    bucket.requests.clear()
    subprocess.run(command, env={**os.environ, **bucket.environment}, check=True, timeout=60)
    assert [query["partNumber"] for method, _, query in bucket.requests if "partNumber" in query] == ["4", "5", "6"]
    assert bucket.objects["runs/one/model.safetensors"].content == files[0].path.read_bytes()
    assert not bucket.uploads


def test_credentials_that_expire_on_the_way_lose_no_part(bucket: FakeS3, files: list[File], tmp_path: Path) -> None:
    bucket.fault = lambda method, key, query: (400, "ExpiredToken") if query.get("partNumber") == "5" else None
    with pytest.raises(UserError, match="ExpiredToken"):
        put(files, tmp_path)
    assert not bucket.objects
    bucket.fault = lambda *_: None
    sent = sum(len(parts) for _, _, parts in bucket.uploads.values())
    bucket.requests.clear()
    put(files, tmp_path)
    assert sent >= 3 and len([1 for _, _, query in bucket.requests if "partNumber" in query]) == 6 - sent


def test_an_upload_of_other_bytes_is_ended_and_begun_again(bucket: FakeS3, files: list[File], tmp_path: Path) -> None:
    bucket.fault = lambda method, key, query: (403, "AccessDenied") if query.get("partNumber") == "6" else None
    with pytest.raises(UserError):
        put(files, tmp_path)
    assert len(bucket.uploads) == 1
    bucket.fault = lambda *_: None
    other = file(tmp_path / "files", "merged/model.safetensors", bytes(range(250)) * 23)
    put([other, *files[1:]], tmp_path)
    assert not bucket.uploads
    stored = bucket.objects["runs/one/merged/model.safetensors"]
    assert (stored.content, stored.metadata["sha256"]) == (other.path.read_bytes(), other.sha256)


def test_an_upload_that_s3_has_forgotten_is_begun_again(bucket: FakeS3, files: list[File], tmp_path: Path) -> None:
    bucket.fault = lambda method, key, query: (403, "AccessDenied") if query.get("partNumber") == "6" else None
    with pytest.raises(UserError):
        put(files, tmp_path)
    bucket.fault = lambda *_: None
    bucket.uploads.clear()
    put(files, tmp_path)
    assert bucket.objects["runs/one/merged/model.safetensors"].metadata["sha256"] == files[0].sha256


@pytest.mark.parametrize("content", [b"[]", b'{"files": 1}', b"\xff", b"[" * 100_000])
def test_the_manifest_of_someone_else_is_not_replaced(
    bucket: FakeS3, files: list[File], tmp_path: Path, content: bytes
) -> None:
    put(files, tmp_path)
    before = dict(bucket.objects)
    with pytest.raises(UserError, match="run 'one'"):
        put(files, tmp_path, run="two")
    checksum = s3.in_base64(hashlib.sha256(content).digest())
    bucket.objects["runs/one/manifest.json"] = before["runs/one/manifest.json"]._replace(
        content=content, checksum=checksum
    )
    with pytest.raises(UserError, match="did not write") as refused:
        put(files, tmp_path)
    assert refused.value.where == "publish.s3.uri"


def test_a_manifest_that_is_cut_off_on_the_way_is_not_that_of_someone_else(
    bucket: FakeS3, files: list[File], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(files, tmp_path)
    serve = bucket.serve

    def cut(method: str, *request: Any) -> tuple[int, bytes, dict[str, str]]:
        status, body, headers = serve(method, *request)
        return (status, body[:10], {**headers, "Connection": "close"}) if method == "GET" else (status, body, headers)

    monkeypatch.setattr(bucket, "serve", cut)
    with pytest.raises(Unavailable, match="S3 does not answer"):
        put(files, tmp_path)


@pytest.mark.parametrize(("method", "asked", "name"), [("POST", "uploads", "UploadId"), ("PUT", "partNumber", "ETag")])
def test_an_answer_without_what_s3_always_sends_is_one_line(
    bucket: FakeS3,
    files: list[File],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    asked: str,
    name: str,
) -> None:
    serve = bucket.serve

    def bare(sent: str, key: str, query: dict[str, str], *others: Any) -> tuple[int, bytes, dict[str, str]]:
        status, body, headers = serve(sent, key, query, *others)
        return (status, b"<R></R>", {}) if (sent, asked in query) == (method, True) else (status, body, headers)

    monkeypatch.setattr(bucket, "serve", bare)
    with pytest.raises(UserError, match=f"is not S3: its answer has no {name}"):
        put(files, tmp_path)
    assert not bucket.objects


# --- the Hub


def to_hub(files: list[File], run: str = "one", private: bool = True) -> str:
    manifest = uploads.manifest_of(run, "f1", files)
    return hub.upload("publish.hub.merged", "org/model", run, files, manifest, private=private)


@pytest.fixture
def hub_files(tmp_path: Path) -> list[File]:
    folder = tmp_path / "hub-files"
    return [file(folder, "model.safetensors", b"weights"), file(folder, "README.md", b"---\ntags: [a]\n---\n# card\n")]


def test_a_new_repository_is_private_and_gets_everything_in_one_commit(
    hub_server: FakeHub, hub_files: list[File]
) -> None:
    to_hub(hub_files)
    stored = hub_server.repositories["org/model"]
    assert {name: stored[name] for name in ("model.safetensors", "README.md")} == {
        each.name: each.path.read_bytes() for each in hub_files
    }
    assert json.loads(stored["llama-lora.json"])["run"] == "one"
    assert hub_server.private["org/model"] and hub_server.commits == 1
    to_hub(hub_files)
    assert hub_server.commits == 1, "nothing has changed"


def test_an_update_replaces_what_changed_and_deletes_what_is_gone(
    hub_server: FakeHub, hub_files: list[File], tmp_path: Path
) -> None:
    to_hub([*hub_files, file(tmp_path, "old.json", b"{}")])
    hub_server.repositories["org/model"]["mine.txt"] = b"added by a person"
    hub_server.requests.clear()
    to_hub([file(tmp_path / "new", "model.safetensors", b"other weights"), hub_files[1]])
    stored = hub_server.repositories["org/model"]
    assert stored["model.safetensors"] == b"other weights" and "old.json" not in stored
    assert stored["mine.txt"] == b"added by a person"
    assert hub_server.commits == 2 and len(hub_server.sent("PUT", "/large/")) == 1


def test_content_of_someone_else_is_not_overwritten(hub_server: FakeHub, hub_files: list[File]) -> None:
    hub_server.repositories["org/model"] = {".gitattributes": b"", "model.safetensors": b"precious"}
    hub_server.private["org/model"] = True
    with pytest.raises(UserError, match=r"model\.safetensors") as refused:
        to_hub(hub_files)
    assert refused.value.where == "publish.hub.merged"
    del hub_server.repositories["org/model"]["model.safetensors"]
    to_hub(hub_files)
    with pytest.raises(UserError, match="run 'one'"):
        to_hub(hub_files, run="two")


def test_a_public_repository_needs_private_false(hub_server: FakeHub, hub_files: list[File]) -> None:
    hub_server.repositories["org/model"] = {".gitattributes": b""}
    hub_server.private["org/model"] = False
    with pytest.raises(UserError, match="is public"):
        to_hub(hub_files)
    to_hub(hub_files, private=False)
    assert hub_server.commits == 1


def test_nothing_is_committed_if_a_file_is_not_as_its_manifest_says(hub_server: FakeHub, hub_files: list[File]) -> None:
    hub_files[0].path.write_bytes(b"weightZ")
    with pytest.raises(UserError, match="SHA-256"):
        to_hub(hub_files)
    assert hub_server.commits == 0 and not hub_server.large


@pytest.mark.parametrize(
    ("status", "part", "error", "where"),
    [
        (401, "/api/models", UserError, "publish.hub.tokenSecret"),
        (403, "/commit/", UserError, "publish.hub.tokenSecret"),
        (403, "/api/repos/create", UserError, "publish.hub.tokenSecret"),
        (500, "/commit/", Unavailable, ""),
        (412, "/commit/", Unavailable, ""),
        (0, "/commit/", Unavailable, ""),
        (503, "/large/", Unavailable, ""),
    ],
)
def test_what_the_hub_refuses_ends_with_one_line_and_no_commit(
    hub_server: FakeHub, hub_files: list[File], status: int, part: str, error: type[Exception], where: str
) -> None:
    hub_server.fault = lambda method, path: status if part in path else None
    with pytest.raises(error) as refused:
        to_hub(hub_files)
    assert getattr(refused.value, "where", "") == where
    assert "\n" not in str(refused.value)
    assert hub_server.commits == 0
    hub_server.fault = lambda *_: None
    to_hub(hub_files)
    assert hub_server.commits == 1
    if part == "/commit/":
        assert len(hub_server.sent("PUT", "/large/")) == 1, "what the Hub has is not sent again"


@pytest.mark.parametrize("part", ["/api/models/", "/preupload/", "/objects/batch", "/commit/"])
def test_an_answer_without_content_is_one_line(hub_server: FakeHub, hub_files: list[File], part: str) -> None:
    hub_server.fault = lambda method, path: 200 if part in path else None
    with pytest.raises(Unavailable) as away:
        to_hub(hub_files)
    assert "org/model" in str(away.value) and "\n" not in str(away.value)


def test_a_hub_that_does_not_answer_ends_the_upload(
    hub_server: FakeHub, hub_files: list[File], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "MOST_SILENCE", 0.3)
    answers = threading.Event()
    hub_server.fault = lambda method, path: 500 if "/commit/" in path and not answers.wait(20) else None
    began = time.monotonic()
    with pytest.raises(Unavailable, match="org/model"):
        to_hub(hub_files)
    answers.set()
    assert time.monotonic() - began < 15 and hub_server.commits == 0


def test_an_upload_that_goes_on_for_longer_is_not_ended(
    hub_server: FakeHub, hub_files: list[File], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is for silence: here every answer takes half of it, and all of them several times as long."""
    monkeypatch.setattr(hub, "MOST_SILENCE", 1.0)
    slow = threading.Event()
    hub_server.fault = lambda *_: 500 if slow.wait(0.3) else None  # time.sleep is patched
    began = time.monotonic()
    to_hub(hub_files)
    assert time.monotonic() - began > 1.0 and hub_server.commits == 1


# --- the stage


def test_the_stage_uploads_the_run_and_is_skipped_then(finished_run: Run, bucket: FakeS3, monkeypatch: Any) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", 64 << 20)
    finished_run.config["publish"] = {"s3": {"uri": URI}}
    merged = finished_run.manifest("merge")
    finished_run("publish")
    names = {key.removeprefix("runs/one/") for key in bucket.objects}
    assert {"adapter/adapter_model.safetensors", "adapter/README.md", "merged/README.md", "merged/config.json"} <= names
    assert {"report.html", "manifest.json"} <= names
    [weights] = [name for name in merged["outputs"] if name.endswith("/model.safetensors")]
    stored = bucket.objects["runs/one/merged/model.safetensors"]
    assert hashlib.sha256(stored.content).hexdigest() == merged["outputs"][weights]["sha256"]
    card = bucket.objects["runs/one/merged/README.md"].content.decode()
    assert "Held-out loss on" in card, "the final card has the results"
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "transformers"
    assert "Held-out loss on" not in (finished_run.paths.merged / "README.md").read_text(), (
        "merge comes before evaluate"
    )
    finished_run("verify", "merge")
    finished_run("verify", "publish")
    bucket.requests.clear()
    assert "skipped" in finished_run("publish")
    assert not bucket.requests


def test_the_stage_needs_a_destination(finished_run: Run) -> None:
    assert "publish.s3.uri" in finished_run("publish", status=2)


def test_a_report_that_is_not_made_is_no_upload(finished_run: Run, bucket: FakeS3) -> None:
    """The settings refuse it too; a manifest without files would look like a complete upload."""
    finished_run.config["evaluation"]["enabled"] = False
    finished_run.config["publish"] = {"s3": {"uri": URI, "artifacts": ["report"]}}
    assert "publish.s3.artifacts" in finished_run("publish", status=2)
    assert not bucket.objects


def test_a_flipped_byte_ends_the_stage_with_status_2(finished_run: Run, bucket: FakeS3) -> None:
    finished_run.config["publish"] = {"s3": {"uri": URI}}
    weights = finished_run.paths.merged / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    said = finished_run("publish", status=2)
    assert str(weights) in said and "SHA-256" in said
    assert "runs/one/manifest.json" not in bucket.objects


def test_a_lasting_fault_ends_the_stage_with_status_1_and_one_line(finished_run: Run, bucket: FakeS3) -> None:
    finished_run.config["publish"] = {"s3": {"uri": URI}}
    bucket.fault = lambda method, *_: (500, "InternalError") if method == "PUT" else None
    said = finished_run("publish", status=1)
    assert "InternalError" in said and "Traceback" not in said
