"""Training on the Neuron backend: with any layout it has the CPU's losses, and a checkpoint has the trained weights."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from genvalues.common import files
from llama_lora import backends, probe
from llama_lora.data.batches import make_batch
from llama_lora.losses import loss_sum
from neuron.conftest import in_workers, losses, make_neuron_run, metrics, say_compiled, trained, use
from trainer.conftest import Run, make_model
from trainer.test_training import train_command, wait_for

# The CPU backend's adapter is in fp32, this one in bf16, which has 8 bits: 0.4 % of the change.
AS_ON_THE_CPU = 2e-3
PROVEN = 1e-4  # nats per token: the loss in memory compared with transformers and peft with the saved adapter

LAYOUTS = [(2, 1), (1, 2), (2, 2)]


@pytest.mark.parametrize(("tensor", "data"), LAYOUTS)
def test_the_losses_equal_those_of_the_cpu_backend(
    trained_run: Callable[[int, int], Run], on_cpu: Run, tensor: int, data: int
) -> None:
    run = trained_run(tensor, data)
    assert losses(run) == pytest.approx(losses(on_cpu), abs=AS_ON_THE_CPU)
    assert losses(run)[-1] < losses(run)[0] - 0.02
    norms, expected = ([step["grad_norm"] for step in metrics(each)] for each in (run, on_cpu))
    assert norms == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(("tensor", "data"), LAYOUTS)
def test_transformers_and_peft_have_the_loss_that_was_in_memory(
    trained_run: Callable[[int, int], Run], tmp_path: Path, tensor: int, data: int
) -> None:
    """In fp32, because the CPU's bf16 kernels differ in rounding (1e-4)."""
    import torch
    from datasets import load_from_disk
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = trained_run(tensor, data).copy(tmp_path / "run")
    for stage in ("consolidate", "merge"):
        assert "trained tokens) was" in run(stage)
    facts = run.manifest("tokenize")["facts"]
    recorded = backends.probe_of(run.workspace / run.manifest("train")["facts"]["checkpoint"])
    assert recorded and sum(recorded.tokens) > 100
    rows = load_from_disk(str(run.workspace / facts["dataset"] / "train"))
    base = AutoModelForCausalLM.from_pretrained(run.workspace / facts["model"], dtype=torch.float32)
    untrained = mean_loss(base, rows, recorded)
    plain = mean_loss(PeftModel.from_pretrained(base, run.paths.adapter).eval(), rows, recorded)
    assert abs(plain - recorded.loss) < PROVEN
    assert abs(untrained - recorded.loss) > 100 * PROVEN, "the adapter must have an effect"


def mean_loss(model: Any, rows: Any, recorded: Any) -> float:
    import torch

    cut = [probe.truncate(rows[number], recorded.max_tokens) for number in recorded.rows]
    with torch.no_grad():
        return float(sum(loss_sum(model, make_batch([row])).item() for row in cut)) / sum(recorded.tokens)


def test_the_optimizer_uses_the_scheduled_learning_rate(trained_run: Callable[[int, int], Run]) -> None:
    used = [step["learning_rate"] for step in metrics(trained_run(2, 2))]
    assert used == pytest.approx([5e-3, 1e-2, 8e-3, 6e-3, 4e-3, 2e-3])


def test_replicated_factors_are_equal_and_a_save_fails_if_they_are_not(
    trained_run: Callable[[int, int], Run], tmp_path: Path
) -> None:
    """Each save of trained_run has compared them. Here one worker's replica is changed by 0.5."""
    run = trained_run(2, 1).copy(tmp_path / "run")
    said = in_workers(run, "spoilt_save")
    assert re.search(r"lora_A.* differs by up to 0\.[45]\d* between workers 0 and 1, where it must be equal", said)


def test_gradients_that_a_newer_library_has_summed_are_not_summed_again(bf16_model: Path, tmp_path: Path) -> None:
    run = make_neuron_run(tmp_path / "run", bf16_model, 2, 1)
    undecided, as_it_is, fixed = in_workers(run, "summed_gradients")
    assert undecided == [False, None]
    assert as_it_is[0] is False and fixed[0] is True
    assert as_it_is[1] == fixed[1] > 0


def test_a_run_killed_and_resumed_equals_an_uninterrupted_one(bf16_model: Path, tmp_path: Path) -> None:
    """With dropout, tensor and data parallelism; killed at a step without a checkpoint; equal bit for bit."""
    settings: dict[str, Any] = {"lora": {"dropout": 0.1}, "training": {"maxSteps": 12, "saveSteps": 3}}
    undisturbed = make_neuron_run(tmp_path / "undisturbed", bf16_model, 2, 2, **settings)
    killed = undisturbed.copy(tmp_path / "killed")
    trained(undisturbed)

    say_compiled(killed)
    checkpoints = killed.paths.checkpoints(json.loads(killed("fingerprint", "train"))["fingerprint"])
    trainer = subprocess.Popen(train_command(killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for((checkpoints / "step-000006").is_dir, seconds=300)
    wait_for(lambda: len((checkpoints / "metrics.jsonl").read_text().splitlines()) > 6, seconds=60)
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    assert not killed.paths.manifest("train").exists()

    said = killed("train")
    assert re.search(r"resuming from .*step-00000[69]", said)
    assert losses(killed) == losses(undisturbed)
    for run in (undisturbed, killed):
        run("consolidate")
    digests = {files.sha256(run.paths.adapter / "adapter_model.safetensors") for run in (undisturbed, killed)}
    assert len(digests) == 1


def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one(bf16_model: Path, tmp_path: Path) -> None:
    """With a step in flight, at a step that would not be saved otherwise."""
    settings: dict[str, Any] = {"lora": {"dropout": 0.1}, "training": {"maxSteps": 12, "saveSteps": 100}}
    undisturbed = make_neuron_run(tmp_path / "undisturbed", bf16_model, 2, 1, **settings)
    stopped = undisturbed.copy(tmp_path / "stopped")
    trained(undisturbed)

    say_compiled(stopped)
    checkpoints = stopped.paths.checkpoints(json.loads(stopped("fingerprint", "train"))["fingerprint"])
    trainer = subprocess.Popen(train_command(stopped), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(stopped.paths.progress.exists, seconds=300)
    trainer.send_signal(signal.SIGTERM)
    said, _ = trainer.communicate(timeout=200)
    assert trainer.returncode == 143, said
    assert not stopped.paths.manifest("train").exists()
    (saved,) = checkpoints.glob("step-*")
    assert "step-000012" > saved.name > "step-000000"
    assert len(metrics(stopped)) == int(saved.name[-6:]), "the step in flight is read back before the save"

    assert saved.name in stopped("train")
    assert losses(stopped) == losses(undisturbed)
    for run in (undisturbed, stopped):
        run("consolidate")
    assert len({files.sha256(run.paths.adapter / "adapter_model.safetensors") for run in (undisturbed, stopped)}) == 1


def test_another_topology_resumes_from_the_weights_with_a_warning(
    trained_run: Callable[[int, int], Run], tmp_path: Path
) -> None:
    run = trained_run(2, 1).copy(tmp_path / "run")
    run.paths.manifest("train").unlink()
    checkpoints = run.paths.checkpoints(json.loads(run("fingerprint", "train"))["fingerprint"])
    shutil.rmtree(checkpoints / "step-000006")
    use(run, 1, 2)
    said = trained(run)
    assert "step-000004 was saved by 2 workers with tensorParallelSize 2; now there are 2 with 1" in said
    assert "a new optimizer state" in said
    before, after = losses(trained_run(2, 1)), losses(run)
    assert after[:4] == before[:4]
    assert after[4] == pytest.approx((before[4] + before[5]) / 2, abs=0.03), (
        "the same weights, and twice the rows per step"
    )
    assert after[4] < before[0] - 0.1
    run("consolidate")


@pytest.mark.parametrize("kind", ["llama", "qwen3", "granite"])
def test_positions_far_into_a_row_equal_those_of_the_base_model(tmp_path: Path, kind: str) -> None:
    """optimum-neuron rounds the rotary frequencies to bf16, so an angle at position 1023 is off by more than 1."""
    import torch
    from transformers import AutoModelForCausalLM

    wide = {"head_dim": 64, "hidden_size": 256, "num_attention_heads": 4, "max_position_embeddings": 2048}
    model = make_other_model(tmp_path / "model", kind, **wide, initializer_range=0.2)
    run = make_neuron_run(tmp_path / "run", model, 2, 1, training={"maxSequenceLength": 1024})
    found = in_workers(run, "buffers_and_long_row")
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    expected = {name: buffer for name, buffer in plain.named_buffers() if name.endswith("inv_freq")}
    assert len(expected) == len(found["frequencies"]) == 1
    (frequencies,) = expected.values()
    ((dtype, numbers),) = found["frequencies"].values()
    assert dtype == "torch.float32" and numbers == pytest.approx(frequencies.tolist(), rel=1e-6)
    with torch.no_grad():
        loss = loss_sum(plain, make_batch([found["row"]])).item()
    assert found["loss"] / 512 == pytest.approx(loss / 512, abs=0.03), "512 tokens, in bf16 against fp32"


@pytest.mark.parametrize("attention", ["eager", "flash", "isolatedFlash"])
def test_only_attention_with_a_mask_isolates_packed_examples(
    bf16_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attention: str
) -> None:
    """With a mask, an example's loss does not depend on the other examples of its row; with flash it does."""
    monkeypatch.setenv("NEURON_CPU_SHIM_FLASH_ANY", "1")  # rows of 2048 tokens would take long here
    run = make_neuron_run(tmp_path / "run", bf16_model, 2, 1)
    run.config["training"]["attention"] = attention
    pairs = in_workers(run, "row_losses")
    assert len(pairs) > 1 and all(alone > 0 for alone, _ in pairs)
    changed = [alone != with_others for alone, with_others in pairs]
    assert changed == ([False] * len(pairs) if attention != "flash" else [False] + [True] * (len(pairs) - 1))


def test_recomputing_the_attention_or_whole_layers_changes_no_gradient(bf16_model: Path, tmp_path: Path) -> None:
    run = make_neuron_run(tmp_path / "run", bf16_model, 2, 1)
    found = {}
    for wanted in ("none", "selective", "full"):
        run.config["training"]["activationCheckpointing"] = wanted
        found[wanted] = in_workers(run, "gradients")
    assert all(norm > 0 for norm, _ in found["none"].values()), "the gradients must not be 0"
    assert found["selective"] == found["none"]
    for name, (norm, _) in found["full"].items():  # recomputing whole layers changes the rounding in bf16
        assert norm == pytest.approx(found["none"][name][0], rel=0.01)


def test_the_flash_kernel_with_a_mask_has_the_gradients_of_eager_attention(bf16_model: Path, tmp_path: Path) -> None:
    run = make_neuron_run(tmp_path / "run", bf16_model, 2, 1)
    found = []
    for wanted in ("isolated", "isolatedFlash"):
        run.config["training"]["attention"] = wanted
        found.append({name: norm for name, (norm, _) in in_workers(run, "gradients").items()})
    assert all(norm > 0 for norm in found[0].values())
    assert found[1] == pytest.approx(found[0], rel=0.03), "in bf16, rounded in another order"


MODELS: dict[str, dict[str, Any]] = {
    "fewer key/value heads than cores": {"num_key_value_heads": 2},
    "tied embeddings": {"tie_word_embeddings": True},
}


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_every_linear_layer_of_a_llama_on_four_cores(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = make_model(
        tmp_path / "model",
        "bfloat16",
        **{
            "vocab_size": 264,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            **changes,
        },
    )
    check_training(tmp_path, model)


@pytest.mark.parametrize("kind", ["qwen3", "granite"])
def test_every_linear_layer_of_other_models_that_can_be_trained(tmp_path: Path, kind: str) -> None:
    check_training(tmp_path, make_other_model(tmp_path / "model", kind))


def check_training(folder: Path, model: Path) -> None:
    """Train on all linear layers and four cores; compare the first gradients with the CPU's, and the saved loss."""
    run = make_neuron_run(folder / "run", model, 4, 1, lora={"targetModules": "all-linear"})
    on_cpu = make_neuron_run(folder / "cpu", model, 1, 1, lora={"targetModules": "all-linear"})
    on_cpu.config["backend"] = "cpu"
    for each in (run, on_cpu):
        each.config["training"] |= {"maxSteps": 3, "gradientAccumulationSteps": 1}
        trained(each)
    first, expected = metrics(run)[0], metrics(on_cpu)[0]
    assert first["loss"] == pytest.approx(expected["loss"], abs=AS_ON_THE_CPU)
    assert first["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.1), "fused layers share their factor A"
    said = run("consolidate")
    found = re.search(r"was (\S+) when .* is now (\S+)", said)
    assert found and abs(float(found[1]) - float(found[2])) < 10 * PROVEN, said


def make_other_model(folder: Path, kind: str, **changes: Any) -> Path:
    """A tiny random model of an architecture that optimum-neuron trains, in bf16."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from trainer.conftest import byte_tokenizer

    torch.manual_seed(0)
    settings = {
        "vocab_size": 264,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "bos_token_id": 256,
        "eos_token_id": 258,
        "tie_word_embeddings": False,
        **({"logits_scaling": 2.0} if kind == "granite" else {}),
    }
    config = AutoConfig.for_model(kind, **{**settings, **changes})
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
