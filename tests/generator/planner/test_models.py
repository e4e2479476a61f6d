"""Where a model's sizes are found: the table, a folder, the cache, the Hub (a server on this computer)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from genvalues.accelerators.architectures import table
from genvalues.planner import models

CONFIG = table()["llama-3.2-1b"]["config"]
TOKEN = "-".join(["hf", "not", "a", "token"])


class Hub:
    """Answers by path, and records its requests."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, bytes]] = {}
        self.asked: list[tuple[str, str | None]] = []

    def has(self, path: str, body: Any, status: int = 200) -> None:
        self.answers[path] = (status, body if isinstance(body, bytes) else json.dumps(body).encode())


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    made = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            made.asked.append((self.path, self.headers.get("Authorization")))
            status, body = made.answers.get(self.path, (404, b""))
            self.send_response(status)
            if 300 < status < 400:
                self.send_header("Location", body.decode())
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    yield made
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_model_of_the_table_needs_no_request(hub: Hub) -> None:
    assert models.on_hub("meta-llama/Llama-3.1-8B", "main", offline=False).architecture
    assert hub.asked == []


def test_another_model_is_requested_once_for_each_revision(hub: Hub) -> None:
    for revision in ("main", "v1"):
        hub.has(f"/some/body/resolve/{revision}/config.json", CONFIG)
    found = [models.on_hub("some/body", revision, offline=False) for revision in ("", "main", "v1", "v1")]
    assert {each.architecture for each in found} == {models.from_config(CONFIG)}
    assert [path for path, _ in hub.asked] == [f"/some/body/resolve/{each}/config.json" for each in ("main", "v1")]
    assert models.on_hub("some/body", "", offline=True).architecture, "from the cache"
    assert models.on_hub("some/other", "", offline=True).architecture is None
    assert len(hub.asked) == 2


def test_offline_there_is_no_request(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "offline" in models.on_hub("some/body", "", offline=False).unknown
    assert hub.asked == []


@pytest.mark.parametrize("status", [302, 307, 308])
@pytest.mark.parametrize("stored", ["HF_TOKEN", "file"])
def test_the_token_goes_only_to_the_hub_and_is_never_printed(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stored: str, status: int
) -> None:
    if stored == "file":
        (tmp_path / "hf").mkdir()
        (tmp_path / "hf/token").write_text(f"{TOKEN}\n")
    else:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.has("/gated/model/resolve/main/config.json", b"/api/resolve-cache", status=status)
    hub.has("/api/resolve-cache", CONFIG)
    assert models.on_hub("gated/model", "", offline=False).architecture
    assert hub.asked == [
        (path, f"Bearer {TOKEN}") for path in ("/gated/model/resolve/main/config.json", "/api/resolve-cache")
    ]
    elsewhere = os.environ["HF_ENDPOINT"].replace("127.0.0.1", "localhost") + "/elsewhere"
    hub.has("/other/model/resolve/main/config.json", elsewhere.encode(), status=status)
    assert "status 3" in models.on_hub("other/model", "", offline=False).unknown
    assert "/elsewhere" not in [path for path, _ in hub.asked]
    hub.has("/closed/model/resolve/main/config.json", b"no", status=403)
    refused = models.on_hub("closed/model", "", offline=False)
    assert "accept the model's terms" in refused.unknown
    assert TOKEN not in repr(refused)
    assert not any(TOKEN in file.read_text() for file in (tmp_path / "cache").rglob("*.json"))


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (401, b"", "requires a token"),
        (404, b"", "has no such model or revision"),
        (500, b"", "status 500"),
        (200, b"{", "is not valid JSON"),
        (200, b"\xff\xfe", "not text"),
        (200, b" " * (models.MOST_BYTES + 1), "more than 1 MiB"),
        (200, b"[1]", "no valid num_attention_heads"),
        (200, b'{"model_type": "gpt2"}', "model_type gpt2"),
        (200, b"[" * 100_000, "JSON"),
    ],
)
def test_other_answers_of_the_hub_are_a_short_reason(hub: Hub, status: int, body: bytes, said: str) -> None:
    hub.has("/some/body/resolve/main/config.json", body, status)
    found = models.on_hub("some/body", "", offline=False)
    assert found.architecture is None
    assert said in found.unknown
    assert "\n" not in found.unknown


def test_a_hub_that_cannot_be_reached_is_the_reason(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached" in models.on_hub("some/body", "", offline=False).unknown
    monkeypatch.setenv("HF_ENDPOINT", "nonsense")
    assert "cannot be reached" in models.on_hub("some/body", "", offline=False).unknown


def test_a_cache_that_cannot_be_written_is_ignored(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    hub.has("/some/body/resolve/main/config.json", CONFIG)
    assert models.on_hub("some/body", "", offline=False).architecture


def test_a_damaged_cache_is_replaced(hub: Hub) -> None:
    hub.has("/some/body/resolve/main/config.json", CONFIG)
    file = models.cache_file("some/body", "main")
    file.parent.mkdir(parents=True)
    file.write_text("{")
    assert models.on_hub("some/body", "", offline=False).architecture
    assert json.loads(file.read_text()) == CONFIG


def test_a_local_folder_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert models.at_path(str(tmp_path), here=True).architecture == models.from_config(CONFIG)
    assert "cannot read" in models.at_path("/workspace/models/mine", here=False).unknown
    assert "cannot read" in models.at_path(str(tmp_path / "none"), here=True).unknown


def test_a_cache_file_stays_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, revision in (("a/b", "main"), ("..", "../../x"), ("a/b", "refs/pr/1")):
        assert models.cache_file(name, revision).resolve().parent == tmp_path / "llama-lora/models"
    assert models.cache_file("a/b", "main") != models.cache_file("a/b", "v1")
