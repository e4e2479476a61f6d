from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from genvalues.common.errors import UserError
from llama_lora.backends.step_plan import StepPlan
from llama_lora.config import Training


def training(**changes: Any) -> Training:
    settings: dict[str, Any] = {
        "max_sequence_length": 128,
        "packing": True,
        "per_device_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "epochs": 1,
        "max_steps": None,
        "learning_rate": 1e-3,
        "lr_scheduler": "linear",
        "warmup_ratio": 0.1,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "save_steps": 10,
        "save_total_limit": 2,
        "seed": 42,
    }
    return Training(**{**settings, **changes})


sizes = st.integers(1, 4)


@given(rows=st.integers(1, 50), batch=sizes, accumulation=sizes, workers=sizes, epochs=st.sampled_from([0.5, 1, 2, 3]))
def test_every_row_is_trained_on_once_per_epoch_with_any_number_of_workers(
    rows: int, batch: int, accumulation: int, workers: int, epochs: float
) -> None:
    settings = training(per_device_batch_size=batch, gradient_accumulation_steps=accumulation, epochs=epochs)
    plan = StepPlan(rows, workers, settings)
    trained = []
    for step in range(plan.total_steps):
        of_workers = [plan.worker_rows(step, worker) for worker in range(workers)]
        assert all(len(micro) == batch for worker in of_workers for micro in worker)
        assert all(len(worker) == accumulation for worker in of_workers)
        step_rows = [row for worker in of_workers for micro in worker for row in micro if row is not None]
        assert sorted(step_rows) == sorted(row for row in plan.step_rows(step) if row is not None)
        trained += step_rows
    assert len(trained) == max(1, round(rows * epochs))
    if epochs >= 1:
        assert (
            max(trained.count(row) for row in range(rows)) == min(trained.count(row) for row in range(rows)) == epochs
        )


@given(rows=st.integers(1, 50), shape=st.sampled_from([(1, 4), (2, 2), (4, 1)]))
def test_a_step_has_the_same_rows_with_any_number_of_workers(rows: int, shape: tuple[int, int]) -> None:
    accumulation, workers = shape
    plan = StepPlan(rows, workers, training(gradient_accumulation_steps=accumulation))
    alone = StepPlan(rows, 1, training(gradient_accumulation_steps=4))
    assert plan.total_steps == alone.total_steps
    assert all(plan.step_rows(step) == alone.step_rows(step) for step in range(plan.total_steps))


def test_rows_repeat_as_often_as_max_steps_needs() -> None:
    plan = StepPlan(3, 1, training(max_steps=7))
    assert [row for step in range(7) for row in plan.step_rows(step)].count(None) == 0
    assert plan.total_steps == 7


def test_epochs_differ_in_order_and_a_seed_reproduces_them() -> None:
    plan = StepPlan(20, 1, training(epochs=2))
    order = [plan.step_rows(step)[0] for step in range(40)]
    assert order[:20] != order[20:]
    assert order == [StepPlan(20, 1, training(epochs=2)).step_rows(step)[0] for step in range(40)]
    assert order != [StepPlan(20, 1, training(epochs=2, seed=7)).step_rows(step)[0] for step in range(40)]


@pytest.mark.parametrize("scheduler", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.1])
def test_the_learning_rate_equals_that_of_transformers(scheduler: str, warmup_ratio: float) -> None:
    from transformers import get_scheduler

    plan = StepPlan(40, 1, training(lr_scheduler=scheduler, warmup_ratio=warmup_ratio))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    name = "constant_with_warmup" if scheduler == "constant" else scheduler
    theirs = get_scheduler(name, optimizer, num_warmup_steps=round(40 * warmup_ratio), num_training_steps=40)
    for step in range(40):
        if step or not warmup_ratio:  # the first step of theirs is at 0
            assert plan.learning_rate(step) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("scheduler", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 100])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.03, 0.99])
def test_every_step_learns(scheduler: str, steps: int, warmup_ratio: float) -> None:
    plan = StepPlan(40, 1, training(lr_scheduler=scheduler, warmup_ratio=warmup_ratio, max_steps=steps))
    rates = [plan.learning_rate(step) for step in range(steps)]
    assert all(0 < rate <= plan.training.learning_rate for rate in rates)
    plan.check_learns()


def test_a_run_whose_steps_are_all_at_rate_0_is_refused() -> None:
    with pytest.raises(UserError) as caught:
        StepPlan(40, 1, training(learning_rate=1e-50)).check_learns()
    assert caught.value.where == "training.learningRate" and "nothing would be trained" in caught.value.what


def test_another_number_of_workers_resumes_at_the_same_row() -> None:
    two = StepPlan(40, 2, training())
    rows_done = 5 * two.global_batch
    one = StepPlan(40, 1, training())
    assert one.step_after(rows_done) == 10
    assert one.step_rows(one.step_after(rows_done))[0] == two.step_rows(5)[0]


def test_a_plan_of_at_least_n_steps_repeats_rows_and_does_not_shorten_a_longer_plan() -> None:
    short = StepPlan(3, 2, training(max_steps=1)).of_at_least(10)
    assert short.total_steps == 10 and all(row is not None for step in range(10) for row in short.step_rows(step))
    assert short.learning_rate(9) > 0
    assert StepPlan(3, 2, training(max_steps=12)).of_at_least(10).total_steps == 12
