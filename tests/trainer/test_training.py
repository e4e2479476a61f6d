"""The training loop for real, on a tiny Llama: any number of workers, killed and resumed, gives the same losses."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forked import run_forked
from genvalues.common import files
from trainer.conftest import LLAMA_LORA, TWO_PROCESSES, Run, plain_lora_model
from trainer.warm import WarmPopen


def metrics(run: Run) -> list[dict[str, Any]]:
    checkpoint = run.workspace / run.manifest("train")["facts"]["checkpoint"]
    lines = (checkpoint.parent / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def losses(run: Run) -> list[float]:
    return [step["loss"] for step in metrics(run)]


def adapter_digest(run: Run) -> str:
    run("consolidate")
    return files.sha256(run.paths.adapter / "adapter_model.safetensors")


def prepared(run: Run) -> Run:
    run("tokenize")
    run("compile")
    return run


def train_command(run: Run) -> list[str]:
    return [LLAMA_LORA, "train", "--config", str(run.write_config()), "--workspace", str(run.workspace)]


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_training_lowers_the_loss_and_reports_every_step(whole_run: Run) -> None:
    steps = metrics(whole_run)
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5, 6]
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.02
    assert [step["learning_rate"] for step in steps] == pytest.approx([5e-3, 1e-2, 8e-3, 6e-3, 4e-3, 2e-3])
    progress = json.loads(whole_run.paths.progress.read_text())
    assert (progress["step"], progress["totalSteps"], progress["etaSeconds"]) == (6, 6, 0)
    folder = whole_run.workspace / Path(whole_run.manifest("train")["facts"]["checkpoint"]).parent
    assert list((folder / "tensorboard").glob("events.*"))


def test_one_and_two_processes_with_the_same_global_batch_have_the_same_losses(
    new_run: Callable[..., Run], whole_run: Run
) -> None:
    one = prepared(new_run(training={"gradientAccumulationSteps": 4}))
    one("train")
    assert whole_run.config["parallelism"]["processesPerNode"] == 2
    assert losses(one) == pytest.approx(losses(whole_run), abs=1e-4)


def test_the_losses_are_those_of_a_plain_loop_with_transformers_and_peft(whole_run: Run) -> None:
    """Divided by the trained tokens of the whole step, though the micro-batches have unequal numbers of them."""
    import torch
    from datasets import load_from_disk

    from llama_lora.backends.step_plan import StepPlan

    config = whole_run.load()
    facts = whole_run.manifest("tokenize")["facts"]
    rows = load_from_disk(str(whole_run.workspace / facts["dataset"] / "train"))
    model = plain_lora_model(whole_run.workspace / facts["model"], config.lora, config.training.seed).train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, weight_decay=config.training.weight_decay)
    plan, expected, token_counts = StepPlan(len(rows), 2, config.training), [], set()
    for step in range(6):
        total, tokens = torch.zeros(()), 0
        for index in plan.step_rows(step):
            row, begin = rows[index], 0
            token_counts.add(sum(label != -100 for label in row["labels"]))
            for length in row["lengths"]:  # each packed example on its own
                ids = torch.tensor([row["input_ids"][begin : begin + length]])
                labels = torch.tensor([row["labels"][begin : begin + length]])
                logits = model(input_ids=ids).logits
                total = total + torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum")
                tokens += int((labels != -100).sum())
                begin += length
        (total / tokens).backward()
        torch.nn.utils.clip_grad_norm_(trainable, config.training.max_grad_norm)
        optimizer.param_groups[0]["lr"] = plan.learning_rate(step)
        optimizer.step()
        optimizer.zero_grad()
        expected.append((total / tokens).item())
    assert len(token_counts) > 1, "rows with equal token counts would prove nothing"
    assert losses(whole_run) == pytest.approx(expected, abs=1e-4)


def test_a_run_killed_and_resumed_equals_an_uninterrupted_one(new_run: Callable[..., Run]) -> None:
    """With dropout on, and by SIGKILL at a step that no checkpoint has."""
    settings: dict[str, Any] = {
        "lora": {"dropout": 0.1},
        "training": {"maxSteps": 30, "saveSteps": 4},
        "parallelism": TWO_PROCESSES,
    }
    undisturbed = prepared(new_run("undisturbed", **settings))
    undisturbed("train")
    killed = undisturbed.copy(undisturbed.folder.parent / "killed")
    checkpoints = killed.paths.checkpoints(killed.manifest("train")["fingerprint"])
    shutil.rmtree(checkpoints)
    killed.paths.manifest("train").unlink()

    trainer = WarmPopen(train_command(killed), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(lambda: any(checkpoints.glob("step-*")))
    children = list(worker_pids(trainer.pid).values())
    assert len(children) == 2
    trainer.kill()
    trainer.wait()
    wait_for(lambda: not any(is_alive(pid) for pid in children), seconds=10)
    assert not killed.paths.manifest("train").exists()
    (checkpoints / f".step-000008{files.PARTIAL}killed").mkdir()  # as a kill in the middle of a save leaves it
    (checkpoints / f".metrics.jsonl{files.PARTIAL}killed").touch()

    said = killed("train")
    assert re.search(r"resuming from .*step-0000(04|08|12|16|20|24)", said)
    assert losses(killed) == losses(undisturbed)
    assert adapter_digest(killed) == adapter_digest(undisturbed)
    assert not list(checkpoints.glob(f".*{files.PARTIAL}*"))


def worker_pids(launcher: int) -> dict[int, int]:
    """The workers that a launcher has started: process ids by rank."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            name = (entry / "comm").read_text()
            if parent_of(entry) == launcher and name.startswith("worker-"):
                found[int(name.removeprefix("worker-"))] = int(entry.name)
    return found


def parent_of(process: Path) -> int:
    return int((process / "stat").read_text().rsplit(")", 1)[1].split()[1])


def test_a_worker_ends_when_its_launcher_is_gone_and_works_under_process_1() -> None:
    """In a pod the launcher is process 1, as is whoever adopts orphans."""
    code = "from llama_lora.backends.worker import die_with_launcher as d; d(); print('works')"

    def start(launcher: int) -> subprocess.CompletedProcess[str]:
        return run_forked([sys.executable, "-c", code], env={**os.environ, "LLAMA_LORA_LAUNCHER": str(launcher)})

    here, elsewhere = start(os.getpid()), start(1)
    assert (here.returncode, here.stdout) == (0, "works\n")
    assert (elsewhere.returncode, elsewhere.stdout) == (1, "") or os.getpid() == 1


def test_a_terminated_launcher_takes_its_workers_with_it(new_run: Callable[..., Run]) -> None:
    run = prepared(new_run(training={"maxSteps": 5000}, parallelism=TWO_PROCESSES))
    trainer = WarmPopen(train_command(run), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(run.paths.progress.exists)
    workers = list(worker_pids(trainer.pid).values())
    trainer.send_signal(signal.SIGTERM)
    assert trainer.wait(timeout=60) == 128 + signal.SIGTERM
    assert workers and not any(is_alive(pid) for pid in workers)


def test_other_workers_go_on_where_the_first_stopped_and_their_result_is_the_one_that_counts(
    new_run: Callable[..., Run],
) -> None:
    """Twice the workers take half the steps: their last checkpoint has a lower number than the first ones' last."""
    run = prepared(new_run(training={"maxSteps": None, "epochs": 20, "gradientAccumulationSteps": 1, "saveSteps": 4}))
    checkpoints = run.paths.checkpoints(json.loads(run("fingerprint", "train"))["fingerprint"])
    trainer = WarmPopen(train_command(run), stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    wait_for(lambda: any(int(path.name[-6:]) > 60 for path in checkpoints.glob("step-*")))
    trainer.kill()
    trainer.wait()
    assert not run.paths.manifest("train").exists(), "too fast to be killed"
    killed_at = max(json.loads(path.read_text())["rows_done"] for path in checkpoints.glob("*/checkpoint.json"))

    run.config["parallelism"] |= TWO_PROCESSES
    run("train")
    facts = run.manifest("train")["facts"]
    record = json.loads((run.workspace / facts["checkpoint"] / "checkpoint.json").read_text())
    assert record["rows_done"] >= 20 * run.rows and record["workers"] == 2
    assert facts["steps"] == int(facts["checkpoint"][-6:]) < 20 * run.rows
    done = [step["rows_done"] for step in metrics(run)]
    assert done == sorted(set(done)) and killed_at in done, "the loss curve has every row once"


def test_a_training_that_fewer_workers_find_at_its_end_is_verified_too(finished_run: Run) -> None:
    """Two workers have consumed 16 rows in 4 of 6 steps; one worker takes 6 steps for 12 rows."""
    newest = finished_run.workspace / finished_run.manifest("train")["facts"]["checkpoint"]
    shutil.rmtree(newest)
    for stage in ("train", "consolidate"):
        finished_run.paths.manifest(stage).unlink()
    finished_run.config["parallelism"] |= {"processesPerNode": 1, "dataParallelSize": 1}
    finished_run("train")
    said = finished_run("consolidate")
    assert "probe: the loss of" in said and "skipped" not in said


def test_two_nodes_train_as_one(new_run: Callable[..., Run], whole_run: Run) -> None:
    """Two launchers that meet by torchrun's variables: of the training operator, and of Kubeflow Trainer."""
    run = whole_run.copy(new_run().folder / "two-nodes")
    shutil.rmtree(run.paths.checkpoints(run.manifest("train")["fingerprint"]))
    run.paths.manifest("train").unlink()
    run.config["parallelism"] = {"nodes": 2, "processesPerNode": 1, "tensorParallelSize": 1, "dataParallelSize": 2}
    environment = {**os.environ, "PET_NNODES": "2:2", "PET_NPROC_PER_NODE": "1", "PET_LOCAL_ADDR": "127.0.0.1"}
    port = str(free_port())
    of_operator = {"PET_RDZV_BACKEND": "c10d", "PET_RDZV_ENDPOINT": f"localhost:{port}"}
    of_trainer = {"PET_NODE_RANK": "1", "PET_MASTER_ADDR": "localhost", "PET_MASTER_PORT": port}
    nodes = [WarmPopen(train_command(run), env=environment | each) for each in (of_operator, of_trainer)]
    assert [node.wait(timeout=120) for node in nodes] == [0, 0]
    assert losses(run) == losses(whole_run)


def free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("localhost", 0))
        port: int = found.getsockname()[1]
        return port


def test_a_worker_that_wants_a_change_ends_the_stage_with_status_2_and_one_message(new_run: Callable[..., Run]) -> None:
    from safetensors.torch import load_file, save_file

    run = prepared(new_run(parallelism=TWO_PROCESSES))
    weights = run.workspace / run.manifest("tokenize")["facts"]["model"] / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"].fill_(float("nan"))
    save_file(tensors, weights, metadata={"format": "pt"})
    run.config["verify"] = "off"  # else the digest differs
    said = run("train", status=2)
    assert said.count("training.learningRate: the loss of step") == 1 and "Lower it" in said
    assert not run.paths.manifest("train").exists()


def test_a_worker_that_dies_is_retried(new_run: Callable[..., Run]) -> None:
    """Status 1, not 2: the user need not change anything."""
    run = prepared(new_run(training={"maxSteps": 5000}))
    trainer = WarmPopen(train_command(run), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(run.paths.progress.exists)
    os.kill(worker_pids(trainer.pid)[0], signal.SIGKILL)
    assert trainer.wait(timeout=60) == 1


@pytest.mark.parametrize(
    ("section", "change", "words"),
    [
        ("lora", {"targetModules": ["q_proj", "query"]}, ["lora.targetModules", "'q_proj'", "'down_proj'"]),
        ("training", {"maxSequenceLength": 1024}, ["training.maxSequenceLength: 1024", "512 or less"]),
        (
            "parallelism",
            {"tensorParallelSize": 4, "dataParallelSize": 1, "processesPerNode": 4},
            ["parallelism.tensorParallelSize: "],
        ),
    ],
)
def test_mistakes_are_found_by_tokenize_already(
    new_run: Callable[..., Run], section: str, change: dict[str, Any], words: list[str]
) -> None:
    """It runs on a CPU node, before any Trainium node is requested."""
    said = new_run(**{section: change})("tokenize", status=2)
    assert all(word in said for word in words), said


def test_mistakes_made_later_are_found_before_a_worker_starts(new_run: Callable[..., Run]) -> None:
    run = new_run()
    run("tokenize")
    run.config["lora"]["targetModules"] = ["query"]
    said = run("compile", status=2)
    assert "lora.targetModules" in said and "training:" not in said

    run.config["lora"]["targetModules"] = ["q_proj"]
    run("compile")
    run.config["parallelism"] |= {"tensorParallelSize": 4, "processesPerNode": 4}
    said = run("train", status=2)
    assert "parallelism.tensorParallelSize: the model's 2 key-value heads" in said and "training:" not in said


def test_the_dry_run_measures_and_leaves_no_checkpoint(whole_run: Run, new_run: Callable[..., Run]) -> None:
    facts = whole_run.manifest("compile")["facts"]
    assert facts["steps"] == 3 and facts["total_steps"] == 6
    assert facts["seconds_per_step"] > 0 and facts["peak_memory_bytes"] > 100 << 20
    run = new_run()
    run("tokenize")
    said = run("compile")
    assert "nothing is compiled" in said and "steps will take about" in said
    assert sorted(path.name for path in run.paths.run.iterdir()) == [
        *("metrics.prom", "resolved.json", "run.yaml", "stages"),
    ]


def test_only_the_newest_checkpoints_are_kept(whole_run: Run) -> None:
    folder = whole_run.paths.checkpoints(whole_run.manifest("train")["fingerprint"])
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-000004", "step-000006"]
    parts = [path.name for path in (folder / "step-000006").glob("*.safetensors")]
    assert parts == ["part-00000.safetensors"], "of two copies of the adapter one is written"


def test_a_checkpoint_of_another_configuration_is_not_resumed(new_run: Callable[..., Run]) -> None:
    run = prepared(new_run())
    run("train")
    run.config["training"]["learningRate"] = 3e-3
    assert "resuming" not in run("train")


def checkpoint_folder(run: Run) -> Path:
    return (run.workspace / run.manifest("train")["facts"]["checkpoint"]).parent


def flip_byte(file: Path, at: int = -1) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", ["a flipped byte", "a missing shard", "a cut record"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_resumed(finished_run: Run, damage: str) -> None:
    before, folder = adapter_digest(finished_run), checkpoint_folder(finished_run)
    newest = folder / "step-000006"
    damaged_file = newest / ("checkpoint.json" if damage == "a cut record" else "part-00000.safetensors")
    if damage == "a flipped byte":
        flip_byte(damaged_file)
    elif damage == "a missing shard":
        damaged_file.unlink()
    else:
        damaged_file.write_text(damaged_file.read_text()[:100])
    finished_run.paths.manifest("train").unlink()
    said = finished_run("train")  # with two workers
    (warning,) = [line for line in said.splitlines() if line.startswith("warning: ")]
    assert f"{newest} is damaged and was renamed to step-000006.damaged ({damaged_file.name}: " in warning
    assert f"resuming from {folder}/step-000004" in said
    assert adapter_digest(finished_run) == before
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-000004", "step-000006"], "two are kept"


def test_without_an_intact_checkpoint_the_folder_to_delete_is_named(finished_run: Run) -> None:
    before, folder = adapter_digest(finished_run), checkpoint_folder(finished_run)
    for shard in folder.glob("step-*/part-00000.safetensors"):
        flip_byte(shard)
    finished_run.paths.manifest("train").unlink()
    for _ in range(2):  # also where they have been set aside before
        said = finished_run("train", status=2)
        assert said.count(f"{folder}: no checkpoint is left that is not damaged. Delete this folder") == 1
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-000004.damaged", "step-000006.damaged"]
    shutil.rmtree(folder)
    assert "training: steps 1 to 6" in finished_run("train")
    assert adapter_digest(finished_run) == before


def test_damaged_checkpoints_are_kept_until_there_are_as_many_intact_ones_as_asked_for(tmp_path: Path) -> None:
    from llama_lora.backends import checkpoints

    def names() -> list[str]:
        return sorted(path.name for path in tmp_path.iterdir())

    for step in (1, 2):
        record = {"fingerprint": "a", "step": step, "rows_done": step, "workers": 1}
        files.write_json(tmp_path / f"step-{step:06d}" / "checkpoint.json", record)
    (tmp_path / "step-000003.damaged").mkdir()
    checkpoints.prune(tmp_path, "a", 3)
    assert names() == ["step-000001", "step-000002", "step-000003.damaged"]
    checkpoints.prune(tmp_path, "a", 2)
    assert names() == ["step-000001", "step-000002"]


def test_the_first_adapter_depends_on_seed_and_layer_alone(tiny_model: Path) -> None:
    """Not on the order of layers or on how many there are: so it is the same wherever a part of it is."""
    from llama_lora.config import Lora

    def first(seed: int, *modules: str) -> dict[str, Any]:
        lora = Lora(r=4, alpha=8, dropout=0.0, target_modules=list(modules))
        model = plain_lora_model(tiny_model, lora, seed)
        return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

    one, more, other = first(1, "v_proj"), first(1, "q_proj", "v_proj"), first(2, "v_proj")
    assert one.keys() < more.keys()
    factors_a = [name for name in one if "lora_A" in name]
    assert all(one[name].equal(more[name]) for name in one)
    assert not any(one[name].equal(other[name]) for name in factors_a)
    assert not one[factors_a[0]].equal(one[factors_a[1]])
    bound = 1 / one[factors_a[0]].shape[1] ** 0.5
    assert all(0.9 * bound < one[name].abs().max() <= bound for name in factors_a)


def test_recomputing_activations_changes_no_loss_and_is_no_other_training(
    new_run: Callable[..., Run], whole_run: Run
) -> None:
    run = prepared(new_run(training={"activationCheckpointing": "full"}, parallelism=TWO_PROCESSES))
    run("train")
    assert losses(run) == pytest.approx(losses(whole_run), abs=1e-6)
    assert run.manifest("train")["fingerprint"] == whole_run.manifest("train")["fingerprint"]


def test_flash_makes_a_packed_row_one_text(new_run: Callable[..., Run], whole_run: Run) -> None:
    """As Neuron's kernel does, so that a rehearsal on the CPU has its losses."""
    run = prepared(new_run(training={"attention": "flash"}, parallelism=TWO_PROCESSES))
    run("train")
    assert all(abs(one - other) > 1e-4 for one, other in zip(losses(run), losses(whole_run), strict=True))
