"""The faults that a run survives: each is done to real processes, from a seed, and the result is compared with that of
an undisturbed run. ``make test-faults`` runs the whole table, ``make test-long`` a tenth of it.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pytest
import run_demo
from huggingface_hub import file_download

from genvalues.common import files
from genvalues.common.process import processes
from trainer.conftest import LLAMA_LORA, TWO_PROCESSES, Run, make_model, make_run, write_rows
from trainer.test_full_volume import can_mount, fill, give_up_roots_rights, half_written, volume
from trainer.test_resolve import FakeHub
from trainer.warm import WarmPopen

STAGES = ("tokenize", "rehearse", "compile", "train", "consolidate", "merge", "evaluate")
OUTPUTS = {"adapter": "adapter_model.safetensors", "merged": "model.safetensors", "evaluation": "eval.json"}
OK, FAILED, USER_ERROR, VOLUME, STOPPED = 0, 1, 2, 75, 143
MOST_SECONDS = 120.0  # that any command may take
TRAINING = {"maxSteps": 12, "saveSteps": 3, "gradientAccumulationSteps": 1}


@dataclass
class World:
    """What all faults share: an undisturbed run, its copies after each stage, and how long its stages take."""

    folder: Path
    seconds: dict[str, float] = field(default_factory=dict)
    copies: int = 0

    @cached_property
    def undisturbed(self) -> Run:
        """A run with every stage done. A copy of it before each stage is kept."""
        model = make_model(self.folder / "model")
        run = make_run(self.folder / "undisturbed", model, parallelism=TWO_PROCESSES, training=TRAINING)
        for stage in STAGES:
            run.copy(self.folder / f"before-{stage}")
            began = time.monotonic()
            expect(command(run, stage), OK)
            self.seconds[stage] = time.monotonic() - began
        return run

    def before(self, stage: str) -> Run:
        """A run of its own in which the stages before ``stage`` are done."""
        name = self.undisturbed.config["name"]
        assert name
        return Run(self.folder / f"before-{stage}", self.undisturbed.config).copy(self.new_folder())

    def new_folder(self) -> Path:
        self.copies += 1
        return self.folder / f"case-{self.copies}"

    @cached_property
    def result(self) -> dict[str, Any]:
        return result(self.undisturbed)

    @cached_property
    def demo_settings(self) -> dict[str, object]:
        rows = write_rows(self.folder / "demo-rows.jsonl")
        rows.write_text(rows.read_text().replace('"q":', '"question":').replace('"a":', '"answer":'))
        return {
            "model.path": make_model(self.folder / "demo-model", dtype="bfloat16"),
            "dataset.source": rows,
            "dataset.evalFraction": 0.1,
            "training.maxSteps": 12,
            "training.saveSteps": 3,
            "training.maxSequenceLength": 128,
            "evaluation.maxRows": 4,
            "evaluation.maxNewTokens": 4,
        }

    def demo_command(self, workspace: Path) -> list[str]:
        return run_demo.local_command(run_demo.HERE / "finetune.yaml", self.demo_settings, workspace)

    @cached_property
    def undisturbed_demo(self) -> dict[str, Any]:
        """The result of `genvalues local` without a fault."""
        workspace = self.folder / "undisturbed-demo"
        began = time.monotonic()
        expect(local(self.demo_command(workspace)), OK)
        self.seconds["genvalues local"] = time.monotonic() - began
        return demo_result(workspace)


def result(run: Run) -> dict[str, Any]:
    """What a run is for: adapter, merged model and evaluation."""
    return {name: files.sha256(run.paths.run / name / file) for name, file in OUTPUTS.items()}


def demo_result(workspace: Path) -> dict[str, Any]:
    return {name: files.sha256(workspace / "runs" / "demo" / name / file) for name, file in OUTPUTS.items()}


# --- commands


@dataclass(frozen=True)
class Ended:
    """How a command ended, and what it printed."""

    status: int
    output: str

    @property
    def last(self) -> str:
        lines = [line for line in self.output.splitlines() if line.strip()]
        return lines[-1] if lines else ""


def started(arguments: list[str], environment: dict[str, str] | None = None, **options: Any) -> subprocess.Popen[str]:
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", WarmPopen)  # of what it starts, too: the fork keeps it
        return WarmPopen(
            arguments, env={**os.environ, **(environment or {})}, start_new_session=True, **streams, **options
        )


def ended(process: subprocess.Popen[str], seconds: float = MOST_SECONDS) -> Ended:
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        kill(tree(process.pid))
        raise AssertionError(f"the command has not ended after {seconds:.0f} s") from None
    return Ended(process.returncode, output)


def stage_arguments(run: Run, stage: str) -> list[str]:
    return [LLAMA_LORA, stage, "--config", str(run.write_config()), "--workspace", str(run.workspace)]


def command(run: Run, stage: str, **environment: str) -> Ended:
    return ended(started(stage_arguments(run, stage), environment))


def local(arguments: list[str]) -> Ended:
    return ended(started(arguments), 300)


def expect(end: Ended, *statuses: int) -> Ended:
    """Fail unless a command ended with one of the statuses, with one line and no traceback where it failed."""
    assert end.status in statuses, f"status {end.status}, expected {statuses}:\n{end.output[-3000:]}"
    assert "Traceback" not in end.output and "internal error" not in end.output, end.output[-3000:]
    assert end.status == OK or end.last, "no message"
    return end


def finish(run: Run, first: str) -> None:
    """Run the stages from ``first`` on to the end."""
    for stage in STAGES[STAGES.index(first) :]:
        expect(command(run, stage), OK)


def same_result(world: World, run: Run, first: str) -> None:
    """Finish the run; it must have the result of the undisturbed one, and nothing half-written."""
    finish(run, first)
    assert result(run) == world.result, "another result than that of the undisturbed run"
    assert not half_written(run), half_written(run)


def tree(root: int) -> list[int]:
    """A process and its descendants."""
    children: dict[int, list[int]] = {}
    for pid, parent in processes():
        children.setdefault(parent, []).append(pid)
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def kill(pids: list[int], number: int = signal.SIGKILL) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def killed_at(process: subprocess.Popen[str], seconds: float, chance: random.Random) -> None:
    """After some seconds kill all processes of a command, the first of them, or any one; wait for their end."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    found = tree(process.pid)
    kill(chance.choice([found, found[:1], [chance.choice(found)]]))
    ended(process)
    deadline = time.monotonic() + 30
    while any(pid in dict(processes()) for pid in found):
        assert time.monotonic() < deadline, "processes are left 30 s after the kill"
        time.sleep(0.05)


# --- the faults


def killed_stage(stage: str, world: World, chance: random.Random) -> None:
    run = world.before(stage)
    moment = chance.uniform(0, 1.1 * world.seconds[stage])
    killed_at(started(stage_arguments(run, stage)), moment, chance)
    same_result(world, run, stage)


def stopped_stage(stage: str, world: World, chance: random.Random) -> None:
    run = world.before(stage)
    process = started(stage_arguments(run, stage))
    with suppress(subprocess.TimeoutExpired):
        process.wait(chance.uniform(0.3, 1.1 * world.seconds[stage]))
    process.send_signal(signal.SIGTERM)
    end = ended(process)
    assert end.status in (OK, STOPPED, -signal.SIGTERM), end
    assert "Traceback" not in end.output, end.output
    same_result(world, run, stage)


def killed_local(world: World, chance: random.Random) -> None:
    expected = world.undisturbed_demo
    workspace = world.new_folder() / "workspace"
    for _ in range(chance.randint(1, 3)):
        killed_at(started(world.demo_command(workspace)), chance.uniform(0, world.seconds["genvalues local"]), chance)
    expect(local(world.demo_command(workspace)), OK)
    assert demo_result(workspace) == expected


def full_volume(stage: str, world: World, chance: random.Random) -> None:
    """A volume with any number of bytes left. Where none can be mounted, a limit of the size of a file."""
    run = world.before(stage)
    if not can_mount():
        size = chance.randrange(1, 64 << 10)
        limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
        end = ended(started(stage_arguments(run, stage), preexec_fn=limit))
        expect(end, OK, VOLUME)
        same_result(world, run, stage)
        return
    moved = run.folder / "moved"
    run.workspace.mkdir(exist_ok=True)
    run.workspace.rename(moved)
    with volume(run.workspace, "size=64m"):
        shutil.copytree(moved, run.workspace, dirs_exist_ok=True)
        filler = fill(run.workspace, chance.randrange(0, 200 << 10))
        end = expect(command(run, stage), OK, VOLUME)
        if end.status == VOLUME:
            assert "No space left on device" in end.last and "are free there" in end.last, end.last
            assert not half_written(run), half_written(run)
        filler.unlink()
        same_result(world, run, stage)


DAMAGES = ("flip", "cut", "empty", "missing", "link", "folder", "forbidden")
# A file, and the first stage that reads it after it was written.
FILES = {
    "models/*/model.safetensors": "train",
    "models/*/config.json": "compile",
    "models/*/tokenizer.json": "evaluate",
    "datasets/*/train/*.arrow": "train",
    "datasets/*/eval/*.arrow": "evaluate",
    "runs/run/stages/tokenize.json": "compile",
    "runs/run/stages/train.json": "consolidate",
    "runs/run/resolved.json": "train",
    "runs/run/checkpoints/*/step-000012/part-00000.safetensors": "consolidate",
    "runs/run/checkpoints/*/step-000012/checkpoint.json": "consolidate",
    "runs/run/checkpoints/*/step-000012/training.json": "consolidate",
    "runs/run/adapter/adapter_model.safetensors": "merge",
    "runs/run/adapter/adapter_config.json": "merge",
    "runs/run/merged/model.safetensors": "evaluate",
    "runs/run/merged/config.json": "evaluate",
}


def damaged_file(how: str, pattern: str, world: World, chance: random.Random) -> None:
    """The stages that read the file refuse it, or make the same result without it. Never another result."""
    stage = FILES[pattern]
    run = world.before(stage)
    file = chance.choice(sorted(run.workspace.glob(pattern)))
    damage(file, how, chance)
    options: dict[str, Any] = {"preexec_fn": give_up_roots_rights} if how == "forbidden" else {}
    for each in STAGES[STAGES.index(stage) :]:
        end = ended(started(stage_arguments(run, each), **options))
        expect(end, OK, USER_ERROR)
        if end.status == USER_ERROR:
            assert len(end.last) < 2000
            return
    assert result(run) == world.result, f"{how} of {file.name}: another result, and every stage ended with 0"


def damage(file: Path, how: str, chance: random.Random) -> None:
    content = file.read_bytes()
    if how == "flip":
        at = chance.randrange(len(content))
        file.write_bytes(content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1 :])
    elif how == "cut":
        file.write_bytes(content[: chance.randrange(1, len(content))])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "forbidden":
        file.chmod(0)
    else:
        file.unlink()
        if how == "link":
            other = file.with_name("elsewhere")
            other.write_bytes(content[::-1])
            file.symlink_to(other.name)
        elif how == "folder":
            file.mkdir()


class FaultyHub(FakeHub):
    """The Hub, which first answers with a fault."""

    def __init__(self, folder: Path, fault: str, good_answers: int) -> None:
        self.fault, self.good_answers = fault, good_answers
        super().__init__(folder)

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        if self.fault and len(self.asked) > self.good_answers:
            if self.fault == "hang":
                time.sleep(600)
            if self.fault == "401":
                return 401, {"X-Error-Message": "Invalid credentials in Authorization header"}, b""
            return int(self.fault), {"Retry-After": "1"}, b""
        return super().answer(path)


HUB_FAULTS = {"429": FAILED, "500": FAILED, "503": FAILED, "hang": FAILED, "401": USER_ERROR}


def faulty_hub(fault: str, world: World, chance: random.Random) -> None:
    """The status says whether a retry helps. When the Hub answers again, the result is the usual one."""
    file_download._ETAG_RETRY_TIMEOUT = (
        2  # for six tries in the commands, which are forks: 60 s, and no variable sets it
    )
    run = make_run(world.new_folder(), world.folder, training=TRAINING)
    hub = FaultyHub(Path(world.undisturbed.config["model"]["path"]), fault, chance.choice([0, 1, 3, 6]))
    run.config["model"] = {"id": "org/thing", "revision": "main"}
    environment = {**hub.environment, "HF_HUB_ETAG_TIMEOUT": "2", "HF_HUB_DOWNLOAD_TIMEOUT": "2", "HF_TOKEN": "hf_x"}
    try:
        end = expect(command(run, "tokenize", **environment), HUB_FAULTS[fault])
        assert "Hub" in end.last or "hub" in end.last, end.last
        assert "hf_x" not in end.output
        hub.fault = ""
        expect(command(run, "tokenize", **environment), OK)
        (model,) = folders(run.workspace / "models")
        assert files.sha256(model / "model.safetensors") == files.sha256(hub.folder / "model.safetensors")
        assert not half_written(run), half_written(run)
    finally:
        hub.server.shutdown()


def side_by_side(pipelines: int, world: World, chance: random.Random) -> None:
    """Pipelines of one workspace, which share model and dataset, started within a moment of each other."""
    first = make_run(world.new_folder(), world.folder / "model", parallelism=TWO_PROCESSES, training=TRAINING)
    shutil.copyfile(world.undisturbed.config["dataset"]["source"], first.config["dataset"]["source"])
    delays = [chance.uniform(0, 2) for _ in range(pipelines)]

    def pipeline(number: int) -> dict[str, Any]:
        time.sleep(delays[number])
        folder = first.folder / f"config-{number}"
        folder.mkdir()
        run = Run(folder, {**first.config, "name": f"run-{number}"})
        (folder / "workspace").symlink_to(first.workspace)
        for stage in STAGES:
            expect(ended(started(stage_arguments(run, stage)), 600), OK)
        return result(run)

    _ = world.undisturbed
    first.workspace.mkdir()
    with ThreadPoolExecutor(pipelines) as threads:
        results = list(threads.map(pipeline, range(pipelines)))
    assert all(each == world.result for each in results)
    for shared in ("models", "datasets"):
        assert len(folders(first.workspace / shared)) == 1


def folders(path: Path) -> list[Path]:
    return [each for each in path.iterdir() if each.is_dir() and each.name[0] != "."]


def two_locals(world: World, chance: random.Random) -> None:
    """The second is refused, and changes nothing of the first."""
    expected = world.undisturbed_demo
    workspace = world.new_folder() / "workspace"
    first = started(world.demo_command(workspace))
    time.sleep(chance.uniform(0, world.seconds["genvalues local"] / 2))
    second = started(world.demo_command(workspace))
    ends = [ended(first, 300), ended(second, 300)]
    assert sorted(end.status for end in ends) == [OK, USER_ERROR], ends
    refused = next(end for end in ends if end.status == USER_ERROR)
    assert "another `genvalues local`" in refused.last, refused
    assert demo_result(workspace) == expected


# --- the table


@dataclass(frozen=True)
class Fault:
    """A row of the table: what is done ``cases`` times, what happens, and what the user does."""

    name: str
    happens: str
    do: str
    cases: tuple[tuple[str, Callable[[World, random.Random], None]], ...]
    slow: bool = False  # a case takes more than 10 s


def of_stages(work: Callable[..., None], count: int, stages: tuple[str, ...] = STAGES) -> Any:
    return tuple((f"{stage} {number}", partial(work, stage)) for stage in stages for number in range(count))


FAULTS = (
    Fault(
        "a stage is killed: all of its processes, the first, or any one",
        "the next run continues from the last checkpoint or repeats the stage; the result is bit-identical",
        "nothing in a cluster; on a computer start it again",
        of_stages(killed_stage, 4),
    ),
    Fault(
        "a stage gets SIGTERM, as from an eviction or a drained node",
        "a training saves within 110 s and ends with 143, other stages end at once; the result is bit-identical",
        "nothing in a cluster; on a computer start it again",
        of_stages(stopped_stage, 2),
    ),
    Fault(
        "`genvalues local` is killed, up to three times",
        "no process is left; the next run continues; the result is bit-identical",
        "start it again",
        tuple((str(number), killed_local) for number in range(6)),
        slow=True,
    ),
    Fault(
        "the volume is full",
        "one line with what is needed and what is free, status 75, nothing half-written; then the same result",
        "make room or enlarge the volume",
        of_stages(full_volume, 3),
    ),
    *(
        Fault(
            f"a file of the run is damaged: {words}",
            "it is made again, an older checkpoint is used, or status 2 names the file; never another result",
            "what the message says: restore the file, or delete it and run again",
            tuple((pattern, partial(damaged_file, how, pattern)) for pattern in FILES),
        )
        for how, words in {
            "flip": "a flipped bit",
            "cut": "cut off",
            "empty": "empty",
            "missing": "missing",
            "link": "a symbolic link in its place",
            "folder": "a folder in its place",
            "forbidden": "mode 000",
        }.items()
    ),
    Fault(
        "the Hub answers 429, 500 or 503, hangs, or the token is revoked",
        "status 1, retried; status 2 for the token; nothing half-written",
        "nothing; for the token create a new one",
        tuple((f"{fault} {number}", partial(faulty_hub, fault)) for fault in HUB_FAULTS for number in range(2)),
        slow=True,
    ),
    Fault(
        "pipelines side by side in one workspace",
        "model and dataset are made once; all results are equal",
        "nothing",
        (("3 pipelines", partial(side_by_side, 3)), ("10 pipelines", partial(side_by_side, 10))),
        slow=True,
    ),
    Fault(
        "two `genvalues local` on one workspace",
        "the second is refused with status 2",
        "wait, or use another folder",
        tuple((str(number), two_locals) for number in range(3)),
        slow=True,
    ),
)

# What needs a cluster: `make test-cluster` runs these.
CLUSTER = (
    ("the API server restarts", "the pipeline goes on", "test_detached.py", "outage_of_the_api_server"),
    ("the operators restart", "the result is equal", "test_disturbances.py", "restarted_operators"),
    ("a worker is lost", "the training resumes; the result is equal", "test_disturbances.py", "lost_workers"),
    ("the node is drained", "it saves and resumes; the result is equal", "test_disturbances.py", "drained_node"),
    ("Kueue preempts the job", "it saves and resumes; the result is equal", "test_disturbances.py", "a_preemption"),
    ("the Helm client is killed", "the next follows the running training", "test_recovery.py", "killed_client"),
    ("two installs at once", "one is refused; one training runs", "test_recovery.py", "two_installs"),
    ("the Hub's token is revoked", "the stage fails at once, without a retry", "test_failures.py", "revoked_token"),
    ("a volume is full", "the stage is retried, after a pause", "test_failures.py", "status_75_of_a_volume"),
    ("a runner's pod is lost", "a new one follows the training", "test_detached.py", "without_the_client"),
    ("a training stands still", "the gate ends it and keeps stack traces", "test_guards.py", "stands_still"),
)


def cases() -> Iterator[tuple[Fault, str, Callable[[World, random.Random], None]]]:
    """Every case of the table."""
    for fault in FAULTS:
        for name, work in fault.cases:
            yield fault, name, work


def chance_of(seed: str, fault: Fault, name: str) -> random.Random:
    return random.Random(f"{seed} {fault.name} {name}")
