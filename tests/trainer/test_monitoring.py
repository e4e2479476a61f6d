"""metrics.prom, Pushgateway and OTLP: what they show, and that no server can slow or end a stage."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from base64 import b64decode
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from genvalues.common import files
from genvalues.common.errors import UserError
from llama_lora import config as run_config
from llama_lora import monitoring
from llama_lora.metrics import OF_PROGRESS, StageStatus, as_otlp, as_text, series_of
from llama_lora.monitoring import Metrics, Pusher, TrainingMonitor, collector, headers_of, observed, pushgateway
from llama_lora.paths import Paths
from trainer.conftest import Run

PROGRESS = {
    "stage": "train",
    "step": 5,
    "totalSteps": 10,
    "loss": 1.5,
    "evalLoss": 1.75,
    "learningRate": 1e-4,
    "gradNorm": 0.5,
    "tokensPerSecond": 1000.0,
    "etaSeconds": 60,
    "savedStep": None,
    "updated": "2026-01-01T00:00:00+00:00",
}
STAGES = {"tokenize": StageStatus("done", 12.0), "train": StageStatus("running", 30.5)}


def samples(text: bytes) -> dict[tuple[str, ...], float]:
    """Value by name, run, stage and state."""
    return {
        (sample.name, *(sample.labels[key] for key in ("run", "stage", "state") if key in sample.labels)): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def test_the_text_is_prometheus_own_with_every_series() -> None:
    found = samples(as_text(series_of("one", STAGES, PROGRESS)))
    assert found["llama_lora_train_loss", "one", "train"] == 1.5
    assert found["llama_lora_train_remaining_seconds", "one", "train"] == 60
    assert found["llama_lora_train_updated_timestamp_seconds", "one", "train"] == 1767225600
    assert found["llama_lora_stage_state", "one", "train", "running"] == 1
    assert found["llama_lora_stage_state", "one", "train", "done"] == 0
    assert found["llama_lora_stage_duration_seconds", "one", "tokenize"] == 12
    names = {key[0] for key in found}
    assert {name for key, (name, _, _) in OF_PROGRESS.items() if key != "savedStep"} <= names
    assert "llama_lora_train_saved_step" not in names, "nothing is saved yet"


def test_the_text_has_no_timestamps() -> None:
    """node exporter's textfile collector refuses them."""
    for line in as_text(series_of("one", STAGES, PROGRESS)).decode().splitlines():
        assert line.startswith("#") or len(line.split("} ")[1].split()) == 1, line


@pytest.mark.parametrize(
    "progress",
    [{}, {"step": None, "loss": "x", "updated": 3}, {"step": True, "loss": []}, {"updated": "never"}, {"loss": 1e400}],
)
def test_progress_of_any_content_gives_valid_text(progress: dict[str, Any]) -> None:
    found = samples(as_text(series_of("one", STAGES, progress)))
    assert ("llama_lora_train_step", "one", "train") not in found
    json.dumps(as_otlp(series_of("one", STAGES, progress), 1), allow_nan=False)


# --- servers


class Server:
    """Records requests; ``answer`` decides the status, or takes its time."""

    def __init__(self, answer: Callable[[], int] = lambda: 200, headers: dict[str, str] | None = None) -> None:
        self.requests: list[tuple[str, str, dict[str, str], bytes]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None: ...

            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                server.requests.append((self.command, self.path, dict(self.headers), body))
                self.send_response(answer())
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.end_headers()

            do_GET = do_PUT = do_POST = handle_any

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def silent() -> Iterator[str]:
    """The URL of a server that accepts connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_pushgateway_gets_the_group_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PUSHGATEWAY_USERNAME", "me")
    monkeypatch.setenv("PUSHGATEWAY_PASSWORD", "secret:1")
    server = Server()
    pushgateway(server.url, "one")(series_of("one", STAGES, PROGRESS))
    [(method, path, headers, body)] = server.requests
    assert (method, path) == ("PUT", "/metrics/job/llama-lora/run/one")
    assert b64decode(headers["Authorization"].removeprefix("Basic ")) == b"me:secret:1"
    assert samples(body)["llama_lora_train_step", "one", "train"] == 5


def test_a_collector_gets_otlp_with_the_headers_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20abc, x-tenant=1")
    server = Server()
    collector(f"{server.url}/base/")(series_of("one", STAGES, PROGRESS))
    [(method, path, headers, body)] = server.requests
    assert (method, path) == ("POST", "/base/v1/metrics")
    assert headers["Authorization"] == "Bearer abc" and headers["X-Tenant"] == "1"
    assert headers["Content-Type"] == "application/json"
    [resource] = json.loads(body)["resourceMetrics"]
    [scope] = resource["scopeMetrics"]
    [loss] = [metric for metric in scope["metrics"] if metric["name"] == "llama_lora_train_loss"]
    [point] = loss["gauge"]["dataPoints"]
    assert point["asDouble"] == 1.5 and int(point["timeUnixNano"]) > 1e18
    assert {each["key"]: each["value"]["stringValue"] for each in point["attributes"]} == {
        "run": "one",
        "stage": "train",
    }


def test_headers_of_any_text() -> None:
    assert headers_of("") == {} and headers_of("x") == {} and headers_of("a=b=c,,=") == {"a": "b=c", "": ""}
    assert headers_of("a=Bearer%20b%0A") == {"a": "Bearer b"}, "http.client quotes a header with a line break"


@pytest.mark.parametrize("make", [collector, lambda url: pushgateway(url, "one")])
def test_a_redirect_is_not_followed(make: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take the credentials elsewhere."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20abc")
    elsewhere = Server()
    for status in (301, 302, 303, 307):
        server = Server(lambda status=status: status, {"Location": elsewhere.url})
        with pytest.raises(OSError):
            make(server.url)(series_of("one", STAGES, PROGRESS))
    assert not elsewhere.requests


def test_a_server_that_is_silent_costs_the_stage_nothing(
    silent: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(monitoring, "REQUEST_SECONDS", 0.2)
    monkeypatch.setattr(monitoring, "SECONDS_BETWEEN_PUSHES", 0.01)
    pusher = Pusher({"monitoring.otlpEndpoint": collector(silent)})
    series = series_of("one", STAGES, PROGRESS)
    began = time.monotonic()
    for _ in range(10_000):
        pusher.push(series)
    assert time.monotonic() - began < 2
    time.sleep(0.6)
    pusher.close()
    assert time.monotonic() - began < 8
    assert len([one for one in caplog.records if one.levelno == logging.WARNING]) == 1


def test_the_end_of_a_stage_waits_for_a_push_only_so_long(
    silent: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(monitoring, "LAST_PUSH_SECONDS", 0.2)
    pusher = Pusher({"monitoring.otlpEndpoint": collector(silent)})
    pusher.push(series_of("one", STAGES, PROGRESS))
    began = time.monotonic()
    pusher.close()
    assert time.monotonic() - began < 2
    [warning] = [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]
    assert warning.startswith("monitoring.otlpEndpoint: ")


def test_a_failing_target_is_one_warning_and_the_other_is_served(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(monitoring, "SECONDS_BETWEEN_PUSHES", 0.0)
    broken, works = Server(lambda: 500), Server()
    pusher = Pusher({"a": collector(broken.url), "b": collector(works.url)})
    for count in range(1, 4):
        pusher.push(series_of("one", STAGES, PROGRESS))
        while len(works.requests) < count:
            time.sleep(0.01)
    pusher.close()
    [warning] = [one.getMessage() for one in caplog.records if one.getMessage().startswith(("a:", "b:"))]
    assert warning == "a: metrics were not accepted: HTTP Error 500: Internal Server Error"


def test_a_target_that_hangs_delays_no_other(silent: str) -> None:
    works = Server()
    pusher = Pusher({"hangs": collector(silent), "works": collector(works.url)})
    began = time.monotonic()
    pusher.push(series_of("one", STAGES, PROGRESS))
    while not works.requests:
        time.sleep(0.01)
    assert time.monotonic() - began < monitoring.REQUEST_SECONDS - 1


def test_the_last_series_of_a_stage_is_pushed(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server()
    pusher = Pusher({"a": pushgateway(server.url, "one")})
    for step in range(100):
        pusher.push(series_of("one", {}, {"step": step}))
    pusher.close()
    assert len(server.requests) <= 3
    assert samples(server.requests[-1][3])["llama_lora_train_step", "one", "train"] == 99


# --- a run


def configured(run: Run, **settings: Any) -> tuple[run_config.RunConfig, Paths]:
    run.config["monitoring"] = settings
    return run.load(), run.paths


def test_every_stage_writes_its_state(new_run: Callable[..., Run]) -> None:
    run = new_run()
    run("tokenize")
    found = samples(run.paths.prometheus.read_bytes())
    assert found["llama_lora_stage_state", "run", "tokenize", "done"] == 1
    run("merge", status=2)
    found = samples(run.paths.prometheus.read_bytes())
    assert found["llama_lora_stage_state", "run", "merge", "failed"] == 1
    assert found["llama_lora_stage_state", "run", "tokenize", "done"] == 1
    assert not [file.name for file in run.paths.run.iterdir() if files.PARTIAL in file.name]


def test_a_stage_that_is_skipped_records_nothing(finished_run: Run) -> None:
    before = finished_run.paths.prometheus.read_bytes()
    assert "skipped" in finished_run("merge")
    assert finished_run.paths.prometheus.read_bytes() == before


def test_a_training_writes_its_progress(whole_run: Run) -> None:
    found = samples(whole_run.paths.prometheus.read_bytes())
    assert found["llama_lora_train_step", "run", "train"] == 6
    assert found["llama_lora_train_saved_step", "run", "train"] == 6
    assert ("llama_lora_train_gradient_norm", "run", "train") in found
    assert {key[2] for key in found if key[0] == "llama_lora_stage_duration_seconds"} >= {"tokenize", "train", "merge"}


def test_a_monitor_writes_at_most_once_a_second_and_at_the_end(new_run: Callable[..., Run]) -> None:
    run = new_run()
    _, paths = configured(run)
    files.write_text(paths.config, run.write_config().read_text())
    monitor = TrainingMonitor(paths, "f1")
    monitor.progress({**PROGRESS, "step": 1})
    monitor.progress({**PROGRESS, "step": 2})
    assert samples(paths.prometheus.read_bytes())["llama_lora_train_step", "run", "train"] == 1
    monitor.close()
    assert samples(paths.prometheus.read_bytes())["llama_lora_train_step", "run", "train"] == 2


def test_a_file_that_cannot_be_written_is_one_warning_and_the_state_is_pushed_all_the_same(
    new_run: Callable[..., Run], caplog: pytest.LogCaptureFixture
) -> None:
    server = Server()
    config, paths = configured(new_run(), pushgateway=server.url)
    paths.prometheus.mkdir(parents=True)
    metrics = Metrics(paths, config, "merge")
    metrics.write("running", {})
    metrics.write("failed", {})
    metrics.close()
    assert len([one for one in caplog.records if "metrics.prom" in one.getMessage()]) == 1
    assert samples(server.requests[-1][3])["llama_lora_stage_state", "run", "merge", "failed"] == 1


def test_the_outcome_is_left_for_kubernetes(
    new_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = tmp_path / "termination-log"
    message.touch()
    monkeypatch.setattr(monitoring, "TERMINATION_LOG", message)
    run = new_run()
    run("tokenize")
    assert message.read_text() == "tokenize done"
    run("tokenize")
    assert message.read_text() == "nothing changed, skipped"
    with pytest.raises(UserError), observed("merge", run.load(), run.paths):
        raise UserError("the first line\nthe second, with hf_abcdefghijkl")
    assert message.read_text() == "the first line"


def test_a_stopped_stage_is_not_a_failed_one(new_run: Callable[..., Run]) -> None:
    server = Server()
    config, paths = configured(new_run(), pushgateway=server.url)
    for code, state in ((143, "stopped"), (1, "failed")):
        with pytest.raises(SystemExit), observed("train", config, paths):
            raise SystemExit(code)
        assert samples(paths.prometheus.read_bytes())["llama_lora_stage_state", "run", "train", state] == 1


# What torchrun's variables are on the nodes: of the training operator with a machine called run-train-worker-0, and of
# Kubeflow Trainer.
NODES: dict[str, tuple[dict[str, str], bool]] = {
    "one-node": ({}, True),
    "worker-0": ({"PET_RDZV_ENDPOINT": "run-train-worker-0:29400"}, True),
    "worker-0-with-domain": ({"PET_RDZV_ENDPOINT": "Run-Train-Worker-0.ns.svc"}, True),
    "worker-1": ({"PET_RDZV_ENDPOINT": "run-train-worker-1:29400"}, False),
    "worker-10": ({"PET_RDZV_ENDPOINT": "run-train-worker-00:29400"}, False),
    "this-computer": ({"PET_RDZV_ENDPOINT": "localhost:29400"}, True),
    "own-address": ({"PET_RDZV_ENDPOINT": "127.0.0.1:29400"}, True),
    "own-address-6": ({"PET_RDZV_ENDPOINT": "[::1]:29400"}, True),
    "other-address": ({"PET_RDZV_ENDPOINT": "192.0.2.7:29400"}, False),  # RFC 5737: of no machine
    "rank-0": ({"PET_NODE_RANK": "0", "PET_MASTER_ADDR": "run-node-0-0"}, True),
    "rank-1": ({"PET_NODE_RANK": "1", "PET_MASTER_ADDR": "run-node-0-0"}, False),
}


@pytest.mark.parametrize("node", NODES)
def test_of_several_nodes_the_first_one_writes(
    new_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, node: str
) -> None:
    variables, is_first = NODES[node]
    monkeypatch.setattr(socket, "gethostname", lambda: "run-train-worker-0")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    server = Server()
    config, paths = configured(new_run(), otlpEndpoint=server.url)
    with observed("train", config, paths) as begin:
        begin()
    assert paths.prometheus.exists() == bool(server.requests) == is_first


def test_a_stage_ends_as_it_would_without_the_servers(new_run: Callable[..., Run], silent: str) -> None:
    run = new_run()
    run.config["monitoring"] = {"pushgateway": "http://127.0.0.1:9", "otlpEndpoint": silent}
    began = time.monotonic()
    run("tokenize")
    assert time.monotonic() - began < 30
    assert run.paths.manifest("tokenize").exists()
