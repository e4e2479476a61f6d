"""What comes from outside: the hub (a stand-in that answers as it does), S3 (botocore's stubber), GGUF."""

from __future__ import annotations

import contextlib
import io
import json
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from botocore.response import StreamingBody
from botocore.stub import Stubber

from genvalues.common.errors import UserError
from llama_lora.config import Model
from llama_lora.data import resolve
from llama_lora.data.hub_errors import check_hub_variables, limit_waits
from llama_lora.data.snapshot import take_snapshot
from llama_lora.library_versions import hub_connection_errors
from llama_lora.uploads.hub import upload
from trainer.conftest import Run, make_model

COMMITS = ["a" * 40, "b" * 40]
NO_ENDPOINT = "http://127.0.0.1:9"  # the discard port: nothing listens there


class FakeHub:
    """A model or dataset repository ``org/thing``, whose main branch moves, as the Hub serves it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.commit = COMMITS[0]
        self.refusal: tuple[int, str, str] | None = None  # status, error code, message; for files only, or "all:"
        self.asked: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                hub.asked.append(self.path)
                status, headers, body = hub.answer(self.path)
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        return {"HF_ENDPOINT": f"http://127.0.0.1:{self.server.server_port}", "HF_HUB_DISABLE_XET": "1"}

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        metadata = path.startswith("/api/")
        if self.refusal and (self.refusal[1].startswith("all:") or not metadata):
            status, code, message = self.refusal
            return status, {"X-Error-Code": code.removeprefix("all:"), "X-Error-Message": message}, b""
        if "/tree/" in path:  # asked by huggingface_hub 2.x, not by 0.x
            listed = [
                {
                    "type": "file",
                    "path": file.relative_to(self.folder).as_posix(),
                    "size": file.stat().st_size,
                    "oid": "0",
                }
                for file in sorted(self.folder.rglob("*"))
                if file.is_file()
            ]
            return 200, {"Content-Type": "application/json"}, json.dumps(listed).encode()
        if metadata:
            names = [{"rfilename": file.name} for file in sorted(self.folder.iterdir())]
            answer = {"id": "org/thing", "modelId": "org/thing", "sha": self.commit, "siblings": names, "tags": []}
            return 200, {"Content-Type": "application/json"}, json.dumps(answer).encode()
        file = self.folder / path.split("/resolve/", 1)[1].partition("/")[2]
        if not file.is_file():
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        body = file.read_bytes()
        return 200, {"X-Repo-Commit": self.commit, "ETag": f'"{abs(hash(body))}"'}, body


@pytest.fixture
def hub(tiny_model: Path) -> Iterator[FakeHub]:
    fake = FakeHub(tiny_model)
    yield fake
    fake.server.shutdown()


def of_hub(run: Run) -> Run:
    run.config["model"] = {"id": "org/thing", "revision": "main"}
    return run


def test_a_hub_model_is_pinned_to_a_commit_once_and_a_rerun_asks_nobody(
    new_run: Callable[..., Run], hub: FakeHub
) -> None:
    run = of_hub(new_run())
    run("tokenize", **hub.environment)
    assert json.loads(run.paths.resolved.read_text())["model"]["revision"] == COMMITS[0]
    assert run.manifest("tokenize")["facts"]["model"] == f"models/org--thing@{COMMITS[0][:12]}"
    assert any(COMMITS[0] in path and "model.safetensors" in path for path in hub.asked), "not downloaded by commit"
    hub.commit = COMMITS[1]
    assert "skipped" in run("tokenize", HF_ENDPOINT=NO_ENDPOINT)
    run.config["training"]["maxSequenceLength"] = 64
    run("tokenize", HF_ENDPOINT=NO_ENDPOINT)
    assert run.manifest("tokenize")["facts"]["model"].endswith(COMMITS[0][:12])


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        ((403, "GatedRepo", "restricted"), "org/thing is gated"),
        ((404, "all:RepoNotFound", "no"), "model.id: org/thing not found on the Hugging Face Hub, or private"),
        ((404, "all:RevisionNotFound", "no"), "model.id: org/thing has no such revision"),
        ((401, "all:", "Invalid credentials in Authorization header"), "the Hugging Face Hub rejects the token"),
        (
            (403, "", "enable access to public gated repositories"),
            "huggingFace.tokenSecret: the token has no permission to read org",
        ),
    ],
)
def test_what_the_hub_refuses_is_told_with_its_fix(
    new_run: Callable[..., Run], hub: FakeHub, refusal: tuple[int, str, str], message: str
) -> None:
    run = of_hub(new_run())
    hub.refusal = refusal
    assert message in run("tokenize", status=2, **hub.environment)
    assert not list(run.workspace.glob("models/org*"))


def test_a_hub_that_does_not_answer_is_tried_again(new_run: Callable[..., Run]) -> None:
    """Not status 2: there is nothing the user has to change."""
    run = of_hub(new_run())
    said = run("tokenize", status=1, HF_ENDPOINT=NO_ENDPOINT)
    assert said.count("\n") == 1 and "cannot be reached" in said


@pytest.mark.parametrize(
    "answer",
    [
        (200, {}, b"<html>Sign in to the network</html>"),
        (200, {"Content-Type": "application/json"}, b"{}"),
        (200, {"Content-Type": "application/json"}, b"[]"),
        (200, {"Content-Type": "application/json"}, b'{"id": "org/thing", "sha": null}'),
        (200, {"Content-Encoding": "gzip"}, b"this is not compressed"),
        (302, {"Location": "/api/models/org/thing"}, b""),
    ],
)
def test_an_answer_of_another_server_than_the_hub_is_one_line(
    new_run: Callable[..., Run], hub: FakeHub, answer: tuple[int, dict[str, str], bytes]
) -> None:
    hub.answer = lambda path: answer  # type: ignore[method-assign]
    run = of_hub(new_run())
    said = run("tokenize", status=1, **hub.environment)
    assert said.splitlines()[-1].startswith("org/thing: ") and "the Hugging Face Hub" in said
    assert "internal error" not in said and not run.paths.resolved.exists()


def test_a_time_to_wait_that_no_clock_has_is_one_line(new_run: Callable[..., Run], hub: FakeHub) -> None:
    answer = hub.answer
    hub.answer = lambda path: answer(path) if path.startswith("/api/") else (429, {"Retry-After": "9" * 14}, b"")  # type: ignore[method-assign]
    said = of_hub(new_run())("tokenize", status=1, **hub.environment)
    assert said.splitlines()[-1].startswith("org/thing: ") and "internal error" not in said


def test_waits_are_limited_in_every_session_also_after_a_connection_that_failed() -> None:
    """huggingface_hub makes a new session then, and one for each thread in 0.x."""
    import huggingface_hub.utils

    renew = getattr(huggingface_hub.utils, "close_session", None) or huggingface_hub.utils.reset_sessions
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"

        def ask() -> None:
            with contextlib.suppress(hub_connection_errors()):
                huggingface_hub.utils.get_session().get(url, timeout=None)

        limit_waits(0.2)
        renew()
        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(20)
        assert not asking.is_alive()
    limit_waits()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HF_ENDPOINT", "not a url"),
        ("HF_ENDPOINT", "127.0.0.1:9"),
        ("HF_ENDPOINT", "http://127.0.0.1:99999"),
        ("HF_TOKEN", "hf_secret\N{LATIN SMALL LETTER E WITH ACUTE}"),
        ("HTTPS_PROXY", "::secret::"),
        ("HTTPS_PROXY", "foo://user:secret@host"),
        ("HTTPS_PROXY", "http://["),
        ("SSL_CERT_FILE", "/none"),
    ],
)
def test_an_environment_variable_that_no_request_to_the_hub_can_use_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    import huggingface_hub.utils

    if name == "SSL_CERT_FILE":
        if not hasattr(huggingface_hub.utils, "close_session"):
            pytest.skip("requests reads no SSL_CERT_FILE")
        huggingface_hub.utils.close_session()
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as in_reading:
        resolve._look_up_model(Model(id="org/thing"))
    with pytest.raises(UserError) as in_publishing:
        upload("publish.hub.merged", "org/thing", "run", [], b"", private=True)
    for error in (in_reading, in_publishing):
        assert error.value.where == name and error.value.fix
        assert "secret" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("proxy", ["http://user:secret@127.0.0.1:9", "127.0.0.1:9"])
def test_a_proxy_with_or_without_a_scheme_is_accepted(monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    check_hub_variables()


def test_a_script_based_dataset_names_the_parquet_revision_which_is_read(
    new_run: Callable[..., Run], hub: FakeHub, tmp_path: Path
) -> None:
    """As wikicorpus on the Hub: the error is that of `datasets` itself, which must not be retried."""
    import pyarrow
    import pyarrow.parquet

    run = new_run()
    run.config["dataset"] |= {"source": "org/thing", "config": "raw_en", "format": "text", "columns": {}}
    hub.folder = tmp_path / "script"
    hub.folder.mkdir()
    (hub.folder / "thing.py").write_text("raise SystemExit('a script of a dataset must not run')")

    def tokenize(status: int) -> str:  # a process: `datasets` takes HF_ENDPOINT when it is imported
        return run("tokenize", status=status, HF_HOME=str(tmp_path / "hub"), **hub.environment)

    said = tokenize(status=2)
    assert said.splitlines()[-1].startswith("dataset.revision: org/thing is read by a Python script")
    assert "refs/convert/parquet" in said
    hub.folder = tmp_path / "parquet"
    (hub.folder / "raw_en/train").mkdir(parents=True)
    table = pyarrow.table({"text": [f"Article {n}." for n in range(50)]})
    pyarrow.parquet.write_table(table, hub.folder / "raw_en/train/0000.parquet")
    run.config["dataset"]["revision"] = "refs/convert/parquet"
    assert "rows: 50 read" in tokenize(status=0)
    assert any("/revision/refs%2Fconvert%2Fparquet" in path for path in hub.asked), "not pinned"
    assert any(f"{COMMITS[0]}/raw_en/train/0000.parquet" in path for path in hub.asked)


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stubber]:
    import boto3

    client = boto3.client("s3", region_name="us-west-2", aws_access_key_id="x", aws_secret_access_key="x")
    monkeypatch.setattr(resolve, "s3_client", lambda: client)
    monkeypatch.setattr("llama_lora.data.dataset_readers.s3_client", lambda: client)
    with Stubber(client) as stubber:
        yield stubber


PLACE = {"Bucket": "bucket", "Key": "rows.jsonl"}


def of_s3(run: Run) -> bytes:
    rows = Path(run.config["dataset"]["source"]).read_bytes()
    run.config["dataset"]["source"] = "s3://bucket/rows.jsonl"
    return rows


def test_an_s3_object_is_read_as_it_was_when_it_was_pinned(new_run: Callable[..., Run], s3: Stubber) -> None:
    run = new_run()
    rows = of_s3(run)
    s3.add_response("head_object", {"ETag": '"one"'}, PLACE)
    body = StreamingBody(io.BytesIO(rows), len(rows))
    s3.add_response("get_object", {"Body": body}, {**PLACE, "IfMatch": "one"})
    assert "rows: 40 read" in run("tokenize")
    s3.assert_no_pending_responses()
    run.config["training"]["maxSequenceLength"] = 64
    s3.add_client_error("get_object", "PreconditionFailed", http_status_code=412)
    assert "s3://bucket/rows.jsonl has been replaced since" in run("tokenize", status=2)


@pytest.mark.parametrize("code", ["404", "AccessDenied", "NoSuchBucket"])
def test_what_s3_refuses_is_told(new_run: Callable[..., Run], s3: Stubber, code: str) -> None:
    run = new_run()
    of_s3(run)
    s3.add_client_error("head_object", code)
    assert f"dataset.source: S3 returns {code} to HeadObject for s3://bucket/rows.jsonl." in run("tokenize", status=2)


def test_a_bucket_that_cannot_be_is_told(new_run: Callable[..., Run], s3: Stubber) -> None:
    run = new_run()
    s3.deactivate()  # botocore itself refuses it, before it asks anybody
    run.config["dataset"]["source"] = "s3://My_Bucket!/rows.jsonl"
    assert "dataset.source: invalid S3 URI s3://My_Bucket!/rows.jsonl" in run("tokenize", status=2)


def spoil_weights(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    save_file({name: t for name, t in weights.items() if "layers.1.mlp" not in name}, folder / "model.safetensors")


def spoil_type(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "alpaca9", "architectures": None}))


SPOILT = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "has no *.safetensors weights"),
    "torn weights": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 9),
        "not a valid safetensors file",
    ),
    "weights of half the layers": (spoil_weights, "lacks weights: model.layers.1.mlp.down_proj.weight"),
    "unknown architecture": (spoil_type, "as a causal language model"),
    "no tokenizer": (
        lambda folder: [file.unlink() for file in folder.glob("*token*")],
        "has no tokenizer",
    ),
}


@pytest.mark.parametrize("mistake", SPOILT)
def test_a_model_that_cannot_be_used_is_refused_before_anything_is_kept(tmp_path: Path, mistake: str) -> None:
    spoil, message = SPOILT[mistake]
    folder = make_model(tmp_path / "model")
    spoil(folder)
    with pytest.raises(UserError, match=r"has|lacks|not") as error:
        take_snapshot(Model(path=str(folder)), resolve.Source("m", "1"), tmp_path / "models")
    assert message in str(error.value)
    assert not (tmp_path / "models" / "m@1").exists()


def test_a_torn_gguf_file_and_a_place_that_is_not_there_are_told(tmp_path: Path) -> None:
    torn = tmp_path / "torn.gguf"
    torn.write_bytes(b"GGUF\x03\x00\x00\x00" + b"\xff" * 40)
    with pytest.raises(UserError, match="transformers cannot read it"):
        take_snapshot(Model(path=str(torn)), resolve.Source("m", "1"), tmp_path / "models")
