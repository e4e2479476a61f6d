"""What a stage with workers checks on a Trainium node before anything of Neuron is imported, with fake files."""

from __future__ import annotations

import logging
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from genvalues.common.errors import UserError
from llama_lora import neuron_node, stage
from llama_lora.config import RunConfig
from trainer.conftest import Run


class Node:
    """The files of a node, as its container sees them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for folder in ("sys/module/neuron", "opt/aws/neuron/lib", "dev/infiniband", "proc/self"):
            (root / folder).mkdir(parents=True)
        self.driver("2.28.0.0")
        self.runtime("2.28.23.0")
        for device in range(16):
            (root / f"dev/neuron{device}").touch()
        (root / "dev/infiniband/uverbs0").touch()

    def driver(self, version: str) -> None:
        (self.root / "sys/module/neuron/version").write_text(f"{version}\n")

    def runtime(self, version: str) -> None:
        library = self.root / "opt/aws/neuron/lib/libnrt.so.1"
        library.unlink(missing_ok=True)
        (library.parent / f"libnrt.so.{version}").touch()
        library.symlink_to(f"libnrt.so.{version}")

    def remove(self, pattern: str) -> None:
        for file in self.root.glob(pattern):
            file.unlink()

    def replace_by_folder(self, device: str) -> None:
        """Make a device that cannot be opened for writing, whoever runs this test."""
        (self.root / device).unlink()
        (self.root / device).mkdir()


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    monkeypatch.delenv("FI_PROVIDER", raising=False)
    return Node(tmp_path / "node")


@pytest.fixture
def run(new_run: Callable[..., Run]) -> Run:
    return new_run()


@pytest.fixture
def on_neuron(run: Run) -> RunConfig:
    run.config["device"] = "neuron"
    return run.load()


def said(config: RunConfig, node: Node) -> str:
    with pytest.raises(UserError) as raised:
        neuron_node.check(config, node.root)
    assert raised.value.status == 2
    return str(raised.value)


def limit_locked_memory(monkeypatch: pytest.MonkeyPatch, soft: int) -> None:
    monkeypatch.setenv("FI_PROVIDER", "efa")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, resource.RLIM_INFINITY))


def test_a_node_that_fits_logs_its_driver_and_runtime(
    on_neuron: RunConfig, node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        neuron_node.check(on_neuron, node.root)
    assert "driver 2.28.0.0" in caplog.text and "runtime 2.28.23.0" in caplog.text


@pytest.mark.parametrize(("driver", "runtime"), [("2.29.0.0", "2.28.23.0"), ("2.31.8.0", "2.32.31.0")])
def test_a_driver_that_refuses_the_images_runtime_ends_with_the_pair_that_works(
    on_neuron: RunConfig, node: Node, driver: str, runtime: str
) -> None:
    node.driver(driver)
    node.runtime(runtime)
    message = said(on_neuron, node)
    assert f"driver {driver}" in message and runtime in message
    assert "driver 2.28 and older" in message and "--neuron-runtime 2.33" in message and "docs/neuron-xla.md" in message


def test_a_newer_runtime_in_the_image_makes_the_driver_fit(on_neuron: RunConfig, node: Node) -> None:
    node.driver("2.31.8.0")
    node.runtime("2.33.10.0")
    neuron_node.check(on_neuron, node.root)


def test_an_unknown_runtime_is_left_to_neuron(on_neuron: RunConfig, node: Node) -> None:
    node.driver("2.31.8.0")
    node.remove("opt/aws/neuron/lib/*")
    neuron_node.check(on_neuron, node.root)


def test_a_node_without_a_driver_is_one_error(on_neuron: RunConfig, node: Node) -> None:
    node.remove("sys/module/neuron/version")
    node.remove("dev/neuron*")
    assert "no Neuron driver" in said(on_neuron, node)


def test_a_container_without_devices_is_an_error(on_neuron: RunConfig, node: Node) -> None:
    node.remove("dev/neuron*")
    assert "no /dev/neuron*" in said(on_neuron, node)


def test_every_device_must_open(on_neuron: RunConfig, node: Node) -> None:
    node.replace_by_folder("dev/neuron15")
    assert "cannot open /dev/neuron15: Is a directory" in said(on_neuron, node)
    node.replace_by_folder("dev/neuron3")
    assert "/dev/neuron15 and 1 more" in said(on_neuron, node)


def test_efa_is_checked_only_where_the_chart_sets_it(
    on_neuron: RunConfig, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.remove("dev/infiniband/uverbs*")
    neuron_node.check(on_neuron, node.root)
    limit_locked_memory(monkeypatch, resource.RLIM_INFINITY)
    assert "no EFA device" in said(on_neuron, node)


def test_an_efa_device_that_does_not_open_is_an_error(
    on_neuron: RunConfig, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_locked_memory(monkeypatch, resource.RLIM_INFINITY)
    node.replace_by_folder("dev/infiniband/uverbs0")
    assert "cannot open /dev/infiniband/uverbs0" in said(on_neuron, node)


def test_too_little_locked_memory_for_efa_is_an_error(
    on_neuron: RunConfig, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_locked_memory(monkeypatch, 64 << 10)
    assert "RLIMIT_MEMLOCK" in said(on_neuron, node) and "LimitMEMLOCK" in said(on_neuron, node)
    (node.root / "proc/self/status").write_text("Name:\tpython\nCapEff:\t0000000000004000\n")  # CAP_IPC_LOCK
    neuron_node.check(on_neuron, node.root)


def test_a_limit_that_may_suffice_is_a_warning(
    on_neuron: RunConfig, node: Node, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    limit_locked_memory(monkeypatch, 8 << 20)
    neuron_node.check(on_neuron, node.root)
    assert "RLIMIT_MEMLOCK" in caplog.text and "8192 KiB" in caplog.text


def test_all_mistakes_are_reported_at_once(on_neuron: RunConfig, node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.driver("2.29.0.0")
    node.replace_by_folder("dev/neuron0")
    node.remove("dev/infiniband/uverbs*")
    limit_locked_memory(monkeypatch, 64 << 10)
    assert len(said(on_neuron, node).splitlines()) == 4


def test_on_another_device_nothing_is_checked(run: Run, tmp_path: Path) -> None:
    neuron_node.check(run.load(), tmp_path)


@pytest.mark.parametrize("name", ["compile", "train"])
def test_a_stage_with_workers_checks_its_node_first(
    run: Run, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Before it reads what tokenize wrote, which there is none of here, and before it loads a library of Neuron."""
    run.config["device"] = "neuron"
    checked: list[Any] = []

    def refuse(config: RunConfig, root: Path = tmp_path) -> None:
        checked.append(config.device)
        raise UserError("does not fit")

    monkeypatch.setattr(neuron_node, "check", refuse)
    with pytest.raises(UserError, match="does not fit"):
        stage.run_stage(name, run.load(), run.paths)
    assert checked == ["neuron"]


def test_a_stage_on_a_node_without_driver_ends_with_status_2(run: Run) -> None:
    if Path("/sys/module/neuron/version").exists():
        pytest.skip("this node has a driver")
    run.config["device"] = "neuron"
    assert "no Neuron driver" in run("train", status=2)
