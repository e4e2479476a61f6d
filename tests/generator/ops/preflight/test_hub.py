"""The checks of the Hub, against a local server that answers as the Hub does (huggingface_hub, utils/_http.py)."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from generator.ops.preflight.conftest import requirements
from genvalues.common import hub as common_hub
from genvalues.common.errors import Unavailable
from genvalues.common.findings import Finding
from genvalues.ops.aws import AwsClients
from genvalues.ops.preflight import hub_checks as hub
from genvalues.ops.preflight import image_checks
from genvalues.ops.preflight.hub_checks import check_hub

MODEL = "/api/models/meta-llama/Meta-Llama-3.1-8B/revision/main"
CONFIG = "/meta-llama/Meta-Llama-3.1-8B/resolve/main/config.json"
DATASET = "/api/datasets/databricks/databricks-dolly-15k/revision/main"
ROWS = "/datasets/databricks/databricks-dolly-15k/resolve/main/rows.jsonl"
TOKEN = "hf_" + "abcdefghij" * 3
GATED = {"sha": "0123456789abcdef", "gated": "manual"}
NO_TOKEN = {"huggingFace": {"tokenSecret": ""}}


class Hub:
    """A fake Hub: status, headers and body by path, and for other paths the 404 of the real one."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, dict[str, str], Any]] = {}
        self.asked: list[tuple[str, str, str]] = []  # method, path, authorization
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None: ...

            def do_GET(self) -> None:
                hub.asked.append((self.command, self.path, self.headers.get("Authorization", "")))
                missing = (404, {"X-Error-Code": "RepoNotFound"}, {})
                status, headers, body = hub.answers.get(self.path, missing)
                content = json.dumps(body).encode()
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(content)

            do_HEAD = do_GET

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def has(self, path: str, status: int = 200, body: Any = None, **headers: str) -> None:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        self.answers[path] = (status, names, body if body is not None else {})


@pytest.fixture
def hub_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub with the model and the dataset, both without access control."""
    hub = Hub()
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.has(MODEL, body={"sha": "0123456789abcdef", "gated": False})
    hub.has(CONFIG)
    files = [{"rfilename": name} for name in (".gitattributes", "README.md", "rows.jsonl")]
    hub.has(DATASET, body={"sha": "fedcba9876543210", "siblings": files})
    hub.has(ROWS)
    threading.Thread(target=hub.server.serve_forever, args=(0.02,), daemon=True).start()
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def model(*changes: dict[str, Any]) -> Finding:
    finding, _ = check_hub(requirements(*changes))
    assert TOKEN not in str(finding), "a token is never printed"
    return finding


def test_an_open_model_and_an_open_dataset_are_readable_at_a_commit(hub_server: Hub) -> None:
    assert [str(finding) for finding in check_hub(requirements())] == [
        "ok           model meta-llama/Meta-Llama-3.1-8B: readable, at commit 0123456789ab",
        "ok           dataset databricks/databricks-dolly-15k: readable, at commit fedcba987654",
    ]
    assert {authorization for _, _, authorization in hub_server.asked} == {f"Bearer {TOKEN}"}
    assert ("HEAD", ROWS, f"Bearer {TOKEN}") in hub_server.asked, "the file shows more than the list, which is public"


def test_the_finding_for_a_readable_gated_model_names_the_token_of_the_run(hub_server: Hub) -> None:
    hub_server.has(MODEL, body=GATED)
    found = model()
    assert found.level == "ok" and "gated, and readable, at commit 0123456789ab with this token" in found.found
    assert "the run uses the token of Secret hf-token" in found.found


def test_a_gated_model_and_a_run_without_a_token_is_an_error(hub_server: Hub) -> None:
    hub_server.has(MODEL, body=GATED)
    found = model(NO_TOKEN)
    assert found.level == "error" and "huggingFace.tokenSecret is empty" in found.found
    assert found.fix == "genvalues write finetune.yaml -o values.yaml --set huggingFace.tokenSecret=hf-token"


def test_for_a_gated_model_without_accepted_terms_the_fix_is_the_page_to_accept_them(hub_server: Hub) -> None:
    hub_server.has(MODEL, body=GATED)
    said = "Access to model meta-llama/Meta-Llama-3.1-8B is restricted and you are not in the authorized list."
    hub_server.has(CONFIG, 403, X_Error_Code="GatedRepo", X_Error_Message=said)
    found = model()
    assert found.level == "error" and "has not accepted the terms" in found.found and said in found.found
    assert found.fix.startswith(f"open {hub_server.url}/meta-llama/Meta-Llama-3.1-8B   # and accept the terms")


def test_a_gated_model_without_a_local_token_is_not_checked_unless_the_run_has_no_token_either(
    hub_server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    hub_server.has(MODEL, body=GATED)
    hub_server.has(CONFIG, 401, X_Error_Code="GatedRepo")
    found = model()
    assert found.level == "not checked" and "no token is set here" in found.found
    assert found.fix.startswith("HF_TOKEN=hf_... genvalues preflight finetune.yaml")
    assert model(NO_TOKEN).level == "error"
    assert {authorization for _, _, authorization in hub_server.asked} == {""}


def test_a_missing_model(hub_server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    typo = {"model": {"id": "meta-llama/Meta-Lama-3.1-8B"}}
    found = model(typo)
    assert found.level == "error" and found.found == "not found, or private and not readable with this token"
    assert found.fix == f"open '{hub_server.url}/models?search=Meta-Lama-3.1-8B'"
    monkeypatch.delenv("HF_TOKEN")
    path = "/api/models/meta-llama/Meta-Lama-3.1-8B/revision/main"
    hub_server.has(path, 401, X_Error_Code="RepoNotFound")
    assert model(typo).level == "warning", "it can be private and readable with the Secret's token"
    assert model(typo, NO_TOKEN).level == "error"


def test_a_missing_revision(hub_server: Hub) -> None:
    hub_server.has(MODEL.replace("main", "v9"), 404, X_Error_Code="RevisionNotFound")
    found = model({"model": {"revision": "v9"}})
    assert (found.level, found.found) == ("error", "revision v9 not found")
    assert f"open {hub_server.url}/meta-llama/Meta-Llama-3.1-8B/tree/main" in found.fix


def test_a_revision_with_a_slash_is_one_segment_of_the_url(hub_server: Hub) -> None:
    hub_server.has(MODEL.replace("main", "refs%2Fpr%2F1"), body={})
    hub_server.has(CONFIG.replace("main", "refs%2Fpr%2F1"))
    assert model({"model": {"revision": "refs/pr/1"}}).level == "ok"


def test_a_repository_without_config_json_is_an_error(hub_server: Hub) -> None:
    hub_server.has(CONFIG, 404, X_Error_Code="EntryNotFound")
    found = model()
    assert found.level == "error" and "has no config.json" in found.found


def test_an_invalid_token(hub_server: Hub) -> None:
    hub_server.has(MODEL, 401, X_Error_Message="Invalid credentials in Authorization header")
    found = model()
    assert found.level == "error" and "rejects this token" in found.found and found.fix.startswith("hf auth login")


def test_for_a_fine_grained_token_without_permission_the_finding_quotes_the_hub(hub_server: Hub) -> None:
    said = "Please enable access to public gated repositories in your fine-grained token settings"
    hub_server.has(CONFIG, 403, X_Error_Message=said)
    found = model()
    assert found.level == "error" and said in found.found


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_error_of_the_hub_is_unanswered(hub_server: Hub, status: int) -> None:
    hub_server.has(MODEL, status)
    found = model()
    assert found.level == "not checked" and found.unanswered


def test_a_hub_that_does_not_answer_is_unanswered(monkeypatch: pytest.MonkeyPatch) -> None:
    for endpoint in ("http://127.0.0.1:9", "http://no.such.host.invalid", "nonsense"):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        findings = check_hub(requirements())
        assert [(one.level, one.unanswered) for one in findings] == [("not checked", True)] * 2


STARTS = [b"HTTP/1.1 503 No\r\nX-A: ", b"HTTP/1.1 503 No\r\nContent-Length: 999\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n"]


@pytest.mark.parametrize("start", STARTS, ids=["header", "error", "body"])
def test_no_answer_that_comes_byte_by_byte_is_waited_for(monkeypatch: pytest.MonkeyPatch, start: bytes) -> None:
    """Of the Hub, of the address of an image's configuration, and of AWS."""
    monkeypatch.setattr(common_hub, "SECONDS_IN_ALL", 0.2)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    waited = threading.Event()

    def drip(server: socket.socket) -> None:
        with contextlib.suppress(OSError), server.accept()[0] as connection:
            threading.Thread(target=drip, args=(server,), daemon=True).start()
            connection.sendall(start)
            while not waited.wait(0.05):
                connection.sendall(b"x")

    with socket.create_server(("127.0.0.1", 0)) as server, contextlib.ExitStack() as ends:
        threading.Thread(target=drip, args=(server,), daemon=True).start()
        in_time = threading.Timer(20, waited.set)
        in_time.start()
        ends.callback(in_time.cancel)
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        answer = common_hub.ask(url, "/", "")
        assert "longer than" in answer.problem or (answer.status, start) == (503, STARTS[1]), "whose body is not read"
        with pytest.raises(Unavailable):
            image_checks.download(url)
        with pytest.raises(Unavailable, match="longer than"):
            AwsClients("us-west-2").ask("sts", "get_caller_identity")
        assert not waited.is_set()
        waited.set()


def test_redirects_are_followed_with_the_token_within_the_hub_only(hub_server: Hub) -> None:
    other_host = Hub()
    threading.Thread(target=other_host.server.serve_forever, args=(0.02,), daemon=True).start()
    hub_server.has(MODEL, 307, Location="/api/models/new/name/revision/main")
    hub_server.has("/api/models/new/name/revision/main", body=GATED)
    hub_server.has(CONFIG, 302, Location=f"{other_host.url}/file-store/config.json")
    assert model().level == "ok", "a redirect to the file store means readable"
    assert ("GET", "/api/models/new/name/revision/main", f"Bearer {TOKEN}") in hub_server.asked
    assert other_host.asked == []
    other_host.server.shutdown()
    other_host.server.server_close()


def test_a_redirect_loop_ends(hub_server: Hub) -> None:
    hub_server.has(MODEL, 307, Location=MODEL)
    assert model().found == "the Hub does not answer: too many redirects"


def test_the_token_is_the_one_that_huggingface_hub_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub.token_of_environment() == ""
    home = tmp_path / "home"
    home.mkdir()
    (home / "token").write_text("hf_fromhome\n")
    monkeypatch.setenv("HF_HOME", str(home))
    assert hub.token_of_environment() == "hf_fromhome"
    (tmp_path / "elsewhere").write_text("hf_elsewhere")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "elsewhere"))
    assert hub.token_of_environment() == "hf_elsewhere"
    monkeypatch.setenv("HF_TOKEN", " hf_given ")
    assert hub.token_of_environment() == "hf_given"


def test_a_token_that_is_invalid_in_a_header_is_a_finding(hub_server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_\N{SNOWMAN}")
    finding, _ = check_hub(requirements())
    assert finding.level == "not checked" and "SNOWMAN" not in str(finding)


def test_nothing_is_requested_for_a_model_and_dataset_outside_the_hub(hub_server: Hub) -> None:
    local = {"model": {"id": "", "path": "/workspace/model"}, "dataset": {"source": "/workspace/rows.jsonl"}}
    [found] = check_hub(requirements(local))
    assert found.level == "ok" and "nothing to check" in found.found
    for source in ("s3://bucket/rows.jsonl", "/workspace/rows.jsonl"):
        [only] = check_hub(requirements({"dataset": {"source": source}}))
        assert only.subject.startswith("model ")


def test_offline_makes_no_request(hub_server: Hub) -> None:
    assert {finding.found for finding in check_hub(requirements(), offline=True)} == {"--offline"}
    assert hub_server.asked == []


def test_every_source_of_rows_on_the_hub_is_checked() -> None:
    more = {"more": {"source": "org/more", "revision": "refs/convert/parquet"}, "file": {"source": "/workspace/a.csv"}}
    found = hub.repositories(requirements({"dataset": {"additional": more, "eval": {"source": "org/held-out"}}}))
    assert [str(each) for each in found if each.kind == "dataset"] == [
        "dataset databricks/databricks-dolly-15k",
        "dataset org/more@refs/convert/parquet",
        "dataset org/held-out",
    ]
    assert found[2].api.endswith("/revision/refs%2Fconvert%2Fparquet")
