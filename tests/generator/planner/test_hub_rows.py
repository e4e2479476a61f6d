"""`genvalues plan` asks the Hub how many rows a dataset has; what is chosen does not depend on the answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from genvalues.common import hub
from genvalues.common.errors import UserError
from genvalues.common.hub import Answer
from genvalues.inputs.input_options import Sources
from genvalues.inputs.write import checked
from genvalues.ops.live_plan import planned
from genvalues.planner import choices, dataset
from genvalues.planner.prices import Price

FILE = Path(__file__).parents[3] / "values/trn1.yaml"  # databricks/databricks-dolly-15k, packed
DOLLY = {"config": "default", "split": "train", "num_rows": 15011, "num_bytes_memory": 12_325_014}


def answered(splits: list[dict[str, Any]]) -> Answer:
    return Answer(200, body=json.dumps({"size": {"splits": splits}}).encode())


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The dataset viewer has counted Dolly; what it is asked."""
    urls: list[str] = []

    def ask(endpoint: str, path: str, token: str) -> Answer:
        urls.append(endpoint + path)
        return answered([DOLLY, {**DOLLY, "split": "test", "num_rows": 7}])

    monkeypatch.setattr(hub, "ask", ask)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    return urls


def test_the_hours_of_a_dataset_of_the_hub_are_estimated(asked: list[str]) -> None:
    plan = planned(Sources((FILE,)), live=False, offline=False, region=None)
    assert asked == ["https://datasets-server.huggingface.co/size?dataset=databricks%2Fdatabricks-dolly-15k"]
    # 98 % of the bytes, 3 to 6 to a token, 2048 tokens to a row, 12 rows to a step
    assert plan.work.steps == (82, 164)
    assert plan.estimate and plan.estimate.training_hours
    unknown = checked(Sources((FILE,))).plan.estimate
    assert unknown and plan.estimate.cpu_node_hours["evaluate"][1] < unknown.cpu_node_hours["evaluate"][1] / 5


def test_what_is_chosen_is_what_write_writes(asked: list[str]) -> None:
    plan = planned(Sources((FILE,)), live=False, offline=False, region=None)
    written = checked(Sources((FILE,))).plan
    assert (plan.layout, plan.choices, plan.rejected) == (written.layout, written.choices, written.rejected)
    assert written.work.steps is None


def test_a_plan_is_made_once_by_one_price(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    plans, prices = [], []

    def choose(*arguments: Any) -> Any:
        plans.append(arguments)
        return choices.choose(*arguments)

    def live_price(instance: str, region: str) -> Price:
        prices.append(instance)
        return Price(20.0, "AWS Pricing API, on demand", region, "today")

    monkeypatch.setattr("genvalues.planner.planning.choose", choose)
    monkeypatch.setattr("genvalues.ops.live_plan.live_price", live_price)
    assert planned(Sources((FILE,)), live=True, offline=False, region=None).work.steps == (82, 164)
    assert (len(plans), len(prices), len(asked)) == (1, 1, 1)


def test_a_limit_below_the_estimate_from_the_hubs_rows_is_a_warning_too(
    asked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    sets = ("guards.pricePerNodeHour=25", "guards.maxCost=5")
    planned(Sources((FILE,), sets), live=False, offline=False, region=None)
    assert "--set guards.maxCost=5: 5 dollars may stop the run before its end" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["lora.rank=3", "nodes=two"])
def test_nobody_is_asked_about_inputs_with_a_mistake(asked: list[str], wrong: str) -> None:
    with pytest.raises(UserError):
        planned(Sources((FILE,), (wrong,)), live=False, offline=False, region=None)
    assert asked == []


@pytest.mark.parametrize(
    "sets", [("model.path=/workspace/m",), ("instance=cpu", "image=null"), ("dataset.source=s3://rows/a.jsonl",)]
)
def test_nobody_is_asked_for_rows_from_which_no_hours_follow(asked: list[str], sets: tuple[str, ...]) -> None:
    planned(Sources((FILE,), sets), live=False, offline=False, region=None)
    assert asked == []


def test_neither_check_nor_write_asks_for_rows(asked: list[str]) -> None:
    checked(Sources((FILE,)))
    assert asked == []


def test_offline_nobody_is_asked(asked: list[str]) -> None:
    plan = planned(Sources((FILE,)), live=False, offline=True, region=None)
    assert asked == []
    assert plan.work.steps is None


@pytest.mark.parametrize(
    ("splits", "config", "counted"),
    [
        ([DOLLY], None, dataset.Examples(15011, 12_325_014)),
        ([{**DOLLY, "estimated_num_rows": 20000}], None, dataset.Examples(20000, 12_325_014)),
        ([DOLLY, {**DOLLY, "config": "other", "num_rows": 3}], "other", dataset.Examples(3, 12_325_014)),
        ([DOLLY, {**DOLLY, "config": "other"}], None, None),
        ([{**DOLLY, "num_rows": None}], None, None),
        ([], None, None),
    ],
)
def test_what_the_viewer_has_counted(
    monkeypatch: pytest.MonkeyPatch, splits: list[dict[str, Any]], config: str | None, counted: dataset.Examples | None
) -> None:
    monkeypatch.setattr(hub, "ask", lambda endpoint, path, token: answered(splits))
    assert dataset.on_hub("a/b", config, "train") == counted


@pytest.mark.parametrize("answer", [Answer(0, problem="away"), Answer(404), Answer(200, body=b"<html>")])
def test_a_viewer_that_does_not_answer_counts_nothing(monkeypatch: pytest.MonkeyPatch, answer: Answer) -> None:
    monkeypatch.setattr(hub, "ask", lambda endpoint, path, token: answer)
    assert dataset.on_hub("a/b", None, "train") is None
