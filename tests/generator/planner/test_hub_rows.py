"""`genvalues plan` asks the Hub for a dataset's row count; the layout does not depend on the answer."""

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
from genvalues.settings.inputs import DatasetInputs

FILE = Path(__file__).parents[3] / "values/trn1.yaml"  # databricks/databricks-dolly-15k, packed
DOLLY = {"config": "default", "split": "train", "num_rows": 15011, "num_bytes_memory": 12_325_014}


def answered(splits: list[dict[str, Any]]) -> Answer:
    return Answer(200, body=json.dumps({"size": {"splits": splits}}).encode())


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The requests to a dataset viewer that has counted Dolly."""
    urls: list[str] = []

    def ask(endpoint: str, path: str, token: str) -> Answer:
        urls.append(endpoint + path)
        return answered([DOLLY, {**DOLLY, "split": "test", "num_rows": 7}])

    monkeypatch.setattr(hub, "ask", ask)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    return urls


def test_hours_are_estimated_for_a_dataset_of_the_hub(asked: list[str]) -> None:
    unlimited = Sources((FILE,), ("evaluation.maxHours=0",))
    plan = planned(unlimited, live=False, offline=False, region=None)
    assert asked == ["https://datasets-server.huggingface.co/size?dataset=databricks%2Fdatabricks-dolly-15k"]
    # 98 % of the bytes, 3 to 6 per token, 2048 tokens per row, 12 rows per step
    assert plan.work.steps == (82, 164)
    assert plan.estimate and plan.estimate.training_hours
    unknown = checked(unlimited).plan.estimate
    assert unknown and plan.estimate.cpu_node_hours["evaluate"][1] < unknown.cpu_node_hours["evaluate"][1] / 5


def test_plan_and_write_choose_the_same(asked: list[str]) -> None:
    plan = planned(Sources((FILE,)), live=False, offline=False, region=None)
    written = checked(Sources((FILE,))).plan
    assert (plan.layout, plan.choices, plan.rejected) == (written.layout, written.choices, written.rejected)
    assert written.work.steps is None


def test_the_plan_is_made_once_with_one_price(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert "--set guards.maxCost=5: $5 may stop the run before it finishes" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["lora.rank=3", "nodes=two"])
def test_inputs_with_a_mistake_cause_no_request(asked: list[str], wrong: str) -> None:
    with pytest.raises(UserError):
        planned(Sources((FILE,), (wrong,)), live=False, offline=False, region=None)
    assert asked == []


@pytest.mark.parametrize(
    "sets", [("model.path=/workspace/m",), ("instance=cpu", "image=null"), ("dataset.source=s3://rows/a.jsonl",)]
)
def test_rows_are_not_requested_where_no_hours_depend_on_them(asked: list[str], sets: tuple[str, ...]) -> None:
    planned(Sources((FILE,), sets), live=False, offline=False, region=None)
    assert asked == []


def test_check_and_write_do_not_request_rows(asked: list[str]) -> None:
    checked(Sources((FILE,)))
    assert asked == []


def test_offline_rows_are_not_requested(asked: list[str]) -> None:
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
def test_the_viewers_count_is_used(
    monkeypatch: pytest.MonkeyPatch, splits: list[dict[str, Any]], config: str | None, counted: dataset.Examples | None
) -> None:
    monkeypatch.setattr(hub, "ask", lambda endpoint, path, token: answered(splits))
    assert dataset.on_hub("a/b", config, "train") == counted


@pytest.mark.parametrize("answer", [Answer(0, problem="away"), Answer(404), Answer(200, body=b"<html>")])
def test_without_an_answer_the_row_count_is_unknown(monkeypatch: pytest.MonkeyPatch, answer: Answer) -> None:
    monkeypatch.setattr(hub, "ask", lambda endpoint, path, token: answer)
    assert dataset.on_hub("a/b", None, "train") is None


def test_parts_and_weights_of_the_hubs_sources_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {("a/b", "train"): dataset.Examples(1000, 9000), ("a/c", "test"): dataset.Examples(100, 500)}
    monkeypatch.setattr(dataset, "on_hub", lambda name, config, split: sizes.get((name, split)))
    wanted: dict[str, Any] = {"source": "a/b", "split": "train[:10%]"}
    assert dataset.of_hub(DatasetInputs.model_validate(wanted)) == dataset.Examples(100, 900)
    wanted["additional"] = {"more": {"source": "a/c", "split": "test", "weight": 3}}
    assert dataset.of_hub(DatasetInputs.model_validate(wanted)) == dataset.Examples(400, 2400)
    wanted["additional"]["unknown"] = {"source": "a/d"}
    assert dataset.of_hub(DatasetInputs.model_validate(wanted)) is None
