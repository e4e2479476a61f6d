"""The acceptance run passes on the CPU, and each of its verdicts fails for what it is there to find."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import socket
from collections.abc import Callable
from typing import Any

import pytest

from genvalues.accelerators.native_memory import NativeMemory
from genvalues.common.errors import UserError
from llama_lora import acceptance_checks as checks
from llama_lora.acceptance import CHECKS
from llama_lora.acceptance_checks import Check
from llama_lora.acceptance_trainings import LAUNCHES, SAVE_STEPS, STEPS
from llama_lora.backends.native.engine import NativeEngine
from llama_lora.config import Parallelism
from llama_lora.probe import ProbeRecord
from trainer.conftest import LLAMA_LORA, TWO_PROCESSES, Run, llama_lora, llama_lora_here
from trainer.warm import WarmPopen

pytestmark = pytest.mark.long

NOT_ON_THE_CPU = {"fallbacks", "compiled files", "memory"}
TWO_NODES = {"nodes": 2, "processesPerNode": 1, "dataParallelSize": 2}


@pytest.fixture
def run(new_run: Callable[..., Run]) -> Run:
    """A run that is tokenized."""
    run = new_run(parallelism=TWO_PROCESSES, lora={"dropout": 0.1})
    run.config["backend"] = "native"
    run("tokenize")
    return run


def command(run: Run) -> list[str]:
    return ["acceptance", "--config", str(run.write_config()), "--workspace", str(run.workspace)]


def record(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run.paths.acceptance.read_text(encoding="utf-8"))
    return found


def verdicts(run: Run) -> dict[str, str]:
    return {check["name"]: check["verdict"] for check in record(run)["checks"]}


def files(run: Run) -> dict[str, bytes]:
    """The files of a workspace, without those of the acceptance run."""
    own = (run.paths.acceptance, run.paths.acceptance_trainings)
    return {
        str(path): path.read_bytes()
        for path in run.workspace.rglob("*")
        if path.is_file() and not any(path.is_relative_to(each) for each in own)
    }


def test_every_check_of_the_cpu_passes_and_the_run_is_unchanged(run: Run) -> None:
    before = files(run)
    said = llama_lora(*command(run), popen=WarmPopen)
    skipped = NOT_ON_THE_CPU | {"nodes"}
    assert verdicts(run) == {name: "SKIP" if name in skipped else "PASS" for name in CHECKS}
    for name, verdict in verdicts(run).items():
        assert f"{verdict}  {name}: " in said
    assert record(run)["passed"]
    assert "resuming from" in said, "the killed training"
    assert files(run) == before


def test_two_nodes_take_part(run: Run) -> None:
    run.config["parallelism"] |= TWO_NODES
    environment = {"PET_NNODES": "2", "PET_RDZV_BACKEND": "c10d", "PET_RDZV_ENDPOINT": f"127.0.0.1:{free_ports()}"}
    with (run.folder / "log").open("w") as log:
        start = [LLAMA_LORA, *command(run)]
        nodes = [WarmPopen(start, env={**os.environ, **environment}, stdout=log, stderr=log) for _ in range(2)]
        statuses = [node.wait(timeout=200) for node in nodes]
    assert statuses == [0, 0], (run.folder / "log").read_text(encoding="utf-8")
    assert verdicts(run) == {name: "SKIP" if name in NOT_ON_THE_CPU else "PASS" for name in CHECKS}


def free_ports() -> int:
    """The first of as many free ports as there are launches, below those that the system assigns (32768 on Linux)."""
    while True:
        first = random.randrange(20_000, 32_000)
        try:
            for port in range(first, first + len(LAUNCHES)):
                with socket.socket() as taken:
                    taken.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first


def test_a_training_that_fails_is_a_fail_and_checks_that_need_it_are_skipped(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(*given: Any) -> None:
        raise UserError("planted")

    monkeypatch.setattr(NativeEngine, "step", step)  # in the workers, which are forks
    said = llama_lora(*command(run), status=1, popen=WarmPopen)
    failed = {"loss", "first step"}
    assert verdicts(run) == {name: "FAIL" if name in failed else "SKIP" for name in CHECKS}
    assert "FAIL  loss: planted" in said
    assert not record(run)["passed"]


def test_wrong_results_of_the_workers_are_found(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    row_loss, restore = NativeEngine.row_loss, NativeEngine.restore

    def higher_loss(engine: NativeEngine, row: Any) -> float:
        return 1.02 * row_loss(engine, row)

    def without_momentum(engine: NativeEngine, *given: Any) -> None:
        restore(engine, *given)
        engine.optimizer.state(next(iter(engine.optimizer.parameters)))["exp_avg"].zero_()

    monkeypatch.setattr(NativeEngine, "row_loss", higher_loss)
    monkeypatch.setattr(NativeEngine, "restore", without_momentum)
    llama_lora(*command(run), status=1, popen=WarmPopen)
    assert {name for name, verdict in verdicts(run).items() if verdict == "FAIL"} == {"probe", "resume"}


REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "backend": ({"backend": "xla"}, ["backend", "native"]),
    "device": ({"device": "neuron"}, ["device", "torch_neuronx"]),
    "nodes": ({"parallelism": {**TWO_NODES, "tensorParallelSize": 1}}, ["parallelism.nodes", "PET_NNODES"]),
    "another dataset": ({"dataset": {"source": "other.jsonl", "format": "text"}}, ["tokenize"]),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_run_that_cannot_be_trained_here_is_one_error(what: str, run: Run) -> None:
    changed, words = REFUSED[what]
    run.config |= changed
    said = llama_lora_here(*command(run), status=2)
    assert all(word in said for word in words)
    assert not run.paths.acceptance.exists() and not run.paths.acceptance_trainings.exists()


def test_missing_torch_is_one_error(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "torch is not installed" in llama_lora_here(*command(run), status=2)


# --- a planted failure for each verdict

FALLING = (3.0, 2.9, 2.8)
DIGESTS = {"adapter/a": "1", "exp_avg/a": "2"}
GIB = 2**30


def metrics(*losses: float, norm: float = 2.0) -> list[dict[str, Any]]:
    return [
        {"step": number, "loss": loss, "grad_norm": norm, "trained_tokens": 100}
        for number, loss in enumerate(losses, start=1)
    ]


def probe(loss: float) -> ProbeRecord:
    return ProbeRecord(rows=[0, 1], max_tokens=2048, losses=[loss * 10, loss * 30], tokens=[10, 30])


def fallbacks(*operators: str, first: bool = False) -> dict[str, Any]:
    return {"first": first, "fallbacks": list(operators)}


def cached(*counts: int) -> list[dict[str, Any]]:
    return [{"cached": count} for count in counts]


def resume(
    resumed: tuple[float, ...] = FALLING,
    digests: tuple[dict[str, str], dict[str, str]] = (DIGESTS, DIGESTS),
    first: int = 2,
    whole: tuple[float, ...] = FALLING,
) -> Check:
    return checks.equal_resume(metrics(*whole), metrics(*resumed), digests, first, expected_first=2)


def took_part(nodes: int, workers: int, of: int = 2) -> Check:
    layout = Parallelism(nodes=of, processes_per_node=4, data_parallel_size=of * 4)
    return checks.all_nodes([{"node": n % nodes, "worker": n} for n in range(workers)], layout)


def memory(device: str, allocated: int, peak: int = 10, hbm: int = 24) -> Check:
    """In GiB; the base weights take 4."""
    sizes = dict.fromkeys(NativeMemory.__dataclass_fields__, 0)
    planned = NativeMemory(**{**sizes, "base": 4 * GIB, "activations": (peak - 4) * GIB, "hbm": hbm * GIB})
    return checks.planned_memory(device, allocated * GIB, planned)


STEP = metrics(3.0)[0]


@pytest.mark.parametrize(
    ("expected", "check"),
    [
        ("PASS", checks.falling_loss(metrics(*FALLING), 3)),
        ("FAIL", checks.falling_loss(metrics(*FALLING), 4)),
        ("FAIL", checks.falling_loss(metrics(*reversed(FALLING)), 3)),
        ("FAIL", checks.falling_loss(metrics(3.0, float("nan"), 2.0), 3)),
        ("FAIL", checks.falling_loss([], 0)),
        ("PASS", checks.full_length_probe(probe(2.0), probe(2.01), 0.02)),
        ("FAIL", checks.full_length_probe(probe(2.0), probe(2.03), 0.02)),
        ("FAIL", checks.full_length_probe(probe(float("nan")), probe(2.0), 0.02)),
        ("PASS", checks.first_step(metrics(3.01, norm=2.08)[0], STEP)),
        ("FAIL", checks.first_step(metrics(3.02)[0], STEP)),
        ("FAIL", checks.first_step(metrics(3.0, norm=2.24)[0], STEP)),  # 12 %: replicas counted twice
        ("FAIL", checks.first_step(metrics(3.0, norm=0.0)[0], STEP)),
        ("FAIL", checks.first_step({**STEP, "trained_tokens": 99}, STEP)),
        ("PASS", checks.no_fallbacks("neuron", [fallbacks("aten::x", first=True), fallbacks()])),
        ("FAIL", checks.no_fallbacks("neuron", [fallbacks(first=True), fallbacks("aten::x")])),
        ("SKIP", checks.no_fallbacks("cpu", [])),
        ("PASS", checks.compiled_once("neuron", cached(40, 40, 40))),
        ("FAIL", checks.compiled_once("neuron", cached(40, 40, 41))),
        ("FAIL", checks.compiled_once("neuron", cached(0, 0, 0))),  # the cache is elsewhere
        ("SKIP", checks.compiled_once("cuda", cached(0, 0))),
        ("PASS", resume()),
        ("PASS", resume((9.0, 2.9, 2.8))),  # before the kill
        ("FAIL", resume((3.0, 2.9, 2.8 + 1e-12))),
        ("FAIL", resume(digests=(DIGESTS, {**DIGESTS, "exp_avg/a": "3"}))),
        ("FAIL", resume(digests=(DIGESTS, {**DIGESTS, "c": "4"}))),
        ("FAIL", resume(digests=(DIGESTS, {}))),
        ("FAIL", resume(digests=({}, {}))),
        ("FAIL", resume(first=1)),  # it started again
        ("FAIL", resume((3.0,), whole=(3.0,))),
        ("PASS", took_part(2, 8)),
        ("FAIL", took_part(1, 4)),
        ("FAIL", took_part(2, 7)),
        ("SKIP", took_part(1, 4, of=1)),
        ("PASS", memory("neuron", 9)),
        ("PASS", memory("cuda", 11)),
        ("FAIL", memory("neuron", 12)),
        ("FAIL", memory("neuron", 24, peak=23, hbm=23)),
        ("FAIL", memory("neuron", 0)),  # the device does not count
        ("SKIP", memory("cpu", 0)),
    ],
)
def test_a_verdict(expected: str, check: Check) -> None:
    assert check.verdict == expected, check
    assert check.name in CHECKS


def test_the_kill_is_after_a_save_and_before_the_end() -> None:
    assert SAVE_STEPS + 1 < STEPS
    assert STEPS % SAVE_STEPS == 0
