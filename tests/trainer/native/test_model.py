"""The loss of the engine: that of transformers' own Trainer with peft, of examples alone, and of whole logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from genvalues.common.errors import UserError
from llama_lora.backends.lora import initialize_lora, lora_config
from llama_lora.backends.native import engine as engines
from llama_lora.backends.native import model as native_model
from llama_lora.backends.native.devices import open_device
from llama_lora.backends.native.engine import NativeEngine
from llama_lora.backends.native.host import attention, example_lengths
from llama_lora.backends.native.model import make_batch
from llama_lora.data.tokens import IGNORED
from trainer.conftest import make_model
from trainer.native.workers import Trained, in_workers, job, rows_of_step, train

STEPS, ROWS, RATE = 6, 4, 1e-2


def plain_rows(step: int) -> list[dict[str, Any]]:
    """Rows of one example each: Trainer knows no packed rows."""
    return [{**row, "lengths": [len(row["input_ids"])]} for row in rows_of_step(step)]


def train_with_trainer(model: Path, folder: Path) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step of transformers' Trainer on the same rows, learning rate and adapter."""
    from datasets import Dataset
    from peft import get_peft_model
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    given = job(folder, model)
    peft_model = get_peft_model(AutoModelForCausalLM.from_pretrained(model), lora_config(given.lora))
    initialize_lora(peft_model.named_parameters(), given.training.seed)
    rows = [row for step in range(STEPS) for row in plain_rows(step)]
    keys = ("input_ids", "labels")

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    logged: list[tuple[float, float]] = []

    class Log(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "grad_norm" in logs:
                logged.append((logs["loss"], logs["grad_norm"]))

    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=ROWS,
        max_steps=STEPS,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        weight_decay=given.training.weight_decay,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    dataset = Dataset.from_list([{key: row[key] for key in keys} for row in rows])
    collate = lambda batch: {key: torch.tensor([each[key] for each in batch]) for key in keys}  # noqa: E731
    trainer = InOrder(peft_model, arguments, train_dataset=dataset, data_collator=collate, callbacks=[Log()])
    trainer.train()
    return logged


def train_plainly(given: Any) -> Trained:
    from trainer.native.workers import take_steps, whole_adapter

    engine = NativeEngine(given, *open_device("cpu"))
    return Trained(take_steps(engine, 0, STEPS, plain_rows), whole_adapter(engine))


def test_losses_and_norms_are_those_of_transformers_trainer(model: Path, tmp_path: Path) -> None:
    expected = in_workers(1, train_with_trainer, model, tmp_path)
    steps = in_workers(1, train_plainly, job(tmp_path, model)).steps
    assert len(expected) == len(steps) == STEPS
    for (loss, norm), step in zip(expected, steps, strict=True):
        assert abs(step.loss - loss) < 1e-5
        assert abs(step.grad_norm / norm - 1) < 1e-4


@pytest.mark.parametrize("settings", [{}, {"dropout": 0.1}, {"target_modules": ["q_proj", "down_proj"]}], ids=str)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_host_computes_what_the_libraries_modules_do(
    dtype: str, settings: Any, model: Path, bf16_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same losses and adapter, dropout included, of packed rows."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    given = job(tmp_path, {"fp32": model, "bf16": bf16_model}[dtype], **settings)
    ours = in_workers(1, train, given, steps=3)
    monkeypatch.setattr(engines, "compute_on_host", lambda lm: None)
    monkeypatch.setattr(native_model, "attention", sdpa_attention_forward)
    theirs = in_workers(1, train, given, steps=3)
    loss, norm = {"fp32": (1e-5, 1e-4), "bf16": (1e-2, 2e-2)}[dtype]
    for one, other in zip(ours.steps, theirs.steps, strict=True):
        assert one.loss == pytest.approx(other.loss, abs=loss)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=norm)
    if dtype == "fp32":
        for name, values in ours.adapter.items():
            torch.testing.assert_close(values, theirs.adapter[name], rtol=0, atol=1e-4)


def test_rows_of_a_batch_are_cut_where_their_examples_begin() -> None:
    rows = [{"input_ids": [1] * 9, "labels": [1] * 9, "lengths": lengths} for lengths in ([4, 1, 4], [9], [1, 8])]
    mask = make_batch(rows, 12, isolated=True).attention_mask
    assert mask is not None
    assert example_lengths(mask) == [[4, 1, 4, 3], [9, 3], [1, 8, 3]]


def losses_of(given: Any, rows: list[dict[str, Any]]) -> list[float]:
    engine = NativeEngine(given, *open_device("cpu"))
    return [engine.row_loss(row) for row in rows]


def test_a_model_that_computes_masks_of_its_own_is_refused() -> None:
    """As a Doge does, from its values; no class of transformers says so before."""
    tokens, scores = torch.rand(1, 2, 4, 8), torch.zeros(1, 2, 4, 4)
    with pytest.raises(UserError, match="model: Identity computes an attention mask of its own") as error:
        attention(torch.nn.Identity(), tokens, tokens, tokens, scores)
    assert error.value.fix


def test_a_packed_row_has_the_loss_of_its_examples(model: Path, tmp_path: Path) -> None:
    (row,) = rows_of_step(0, count=1)
    examples, start = [], 0
    for length in row["lengths"]:
        part = {key: row[key][start : start + length] for key in ("input_ids", "labels")}
        examples.append({**part, "lengths": [length]})
        start += length
    packed, *alone = in_workers(1, losses_of, job(tmp_path, model), [row, *examples])
    assert abs(packed - sum(alone)) < 1e-3
    causal, *_ = in_workers(1, losses_of, job(tmp_path, model, attention="causal"), [row])
    assert abs(causal - packed) > 1e-2  # examples see those before them


@pytest.mark.parametrize("kind", ["llama", "granite", "qwen3"])
@pytest.mark.parametrize("attention", ["causal", "isolated"])
def test_the_loss_is_that_of_the_models_own_logits(kind: str, attention: str, tmp_path: Path) -> None:
    folder = another_model(tmp_path / kind, kind)
    row = plain_rows(0)[0]
    (loss,) = in_workers(1, losses_of, job(tmp_path, folder, attention=attention), [row])
    assert abs(loss - in_workers(1, loss_of_whole_logits, folder, row)) < 1e-4 * loss


def another_model(folder: Path, kind: str) -> Path:
    if kind == "llama":
        return make_model(folder, num_key_value_heads=4)
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        **{"vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512},
    }
    special = {"granite": {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22}}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **sizes, **special.get(kind, {"head_dim": 8}))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def loss_of_whole_logits(model: Path, row: dict[str, Any]) -> float:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model)(input_ids=torch.tensor([row["input_ids"]])).logits
    labels = torch.tensor(row["labels"][1:])
    return float(torch.nn.functional.cross_entropy(logits[0, :-1].float(), labels, reduction="sum"))


def test_a_batch_of_fixed_length_has_all_positions() -> None:
    rows = [rows_of_step(0, count=1)[0], None]
    batch = make_batch(rows, 64, isolated=True)
    assert batch.input_ids.shape == (2, 64)
    assert batch.positions is None
    assert batch.targets.shape == (128,)
    assert batch.attention_mask is not None
    assert bool(batch.attention_mask.any(-1).all())  # a row of the mask without True would give NaN
    assert bool((batch.targets[64:] == IGNORED).all())


def test_a_batch_of_free_length_has_the_labelled_positions() -> None:
    (row,) = rows_of_step(0, count=1)
    batch = make_batch([row], None, isolated=False)
    assert batch.attention_mask is None
    assert batch.positions is not None
    assert len(batch.positions) == sum(label != IGNORED for label in row["labels"][1:])
    assert bool((batch.targets != IGNORED).all())


def test_a_step_of_a_worker_without_rows_adds_nothing(model: Path, tmp_path: Path) -> None:
    """The last step of a training can have fewer rows than workers."""
    results = in_workers(2, last_step, job(tmp_path, model, data_parallel_size=2))
    alone = in_workers(1, last_step, job(tmp_path, model))
    assert results.loss == pytest.approx(alone.loss, abs=1e-6)
    assert results.grad_norm == pytest.approx(alone.grad_norm, rel=1e-5)


def last_step(given: Any) -> Any:
    engine = NativeEngine(given, *open_device("cpu"))
    (row,) = rows_of_step(0, count=1)
    trained = sum(label != IGNORED for label in row["labels"][1:])
    return engine.step(0, [[row if engine.data_rank == 0 else None]], trained, RATE)()


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    tied = make_model(tmp_path / "tied", tie_word_embeddings=True, num_key_value_heads=4)
    reference = in_workers(1, train, job(tmp_path, tied), steps=2)
    for parallelism in ({"data_parallel_size": 2, "shard_size": 2}, {"tensor_parallel_size": 2}):
        trained = in_workers(2, train, job(tmp_path, tied, **parallelism), steps=2)
        assert trained.steps[1].loss == pytest.approx(reference.steps[1].loss, abs=1e-5)
    (loss,) = in_workers(1, losses_of, job(tmp_path, tied), [plain_rows(0)[0]])
    assert abs(loss - in_workers(1, loss_of_whole_logits, tied, plain_rows(0)[0])) < 1e-4 * loss
