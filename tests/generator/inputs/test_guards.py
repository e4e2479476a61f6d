"""The limits of a run as one writes them: what the chart would refuse is told before, in the inputs' words."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from generator.inputs.messages import tells
from genvalues.common.errors import UserError, UserErrors
from genvalues.inputs.input_options import Sources
from genvalues.inputs.write import checked
from genvalues.planner.estimate import START_HOURS
from genvalues.planner.layout import FROM_INPUTS
from genvalues.settings import value_rules as contradictions
from genvalues.settings.inputs import GuardInputs
from genvalues.settings.shared import DURATION

CHART = Path(__file__).parents[3] / "chart"
TRN1 = CHART.parent / "values/trn1.yaml"


def told(**guards: Any) -> list[str]:
    values = {"instance": "cpu", "guards": guards}
    return [f"{'.'.join(map(str, one.keys[0]))}: {one.what}. {one.fix}" for one in contradictions.guards(values)]


def test_a_limit_on_the_cost_needs_a_price() -> None:
    (found,) = told(maxCost=200, pricePerNodeHour=None, stallTimeout="30m")
    assert tells(found, "guards.maxCost: ... price of a cpu node ... Write guards.pricePerNodeHour")
    assert told(maxCost=200)
    assert told(maxCost=0.5)
    assert not told(maxCost=200, pricePerNodeHour=21.5)
    assert not told(maxCost=None) and not told(pricePerNodeHour=21.5) and not told()


def test_a_limit_that_ending_the_nodes_takes_whole_starts_nothing() -> None:
    (found,) = told(maxCost=0.5, pricePerNodeHour=21.5)
    assert tells(found, "guards.maxCost: $0.5 is too low ... $0.72 ... 1 node")
    assert not told(maxCost=0.73, pricePerNodeHour=21.5)
    longer = {"stages": {"train": {"terminationGracePeriodSeconds": 1200}}}
    (found,) = contradictions.guards({**longer, "guards": {"maxCost": 5, "pricePerNodeHour": 21.5}})
    assert "$7.17" in found.what, "what the workers of this release may take to save"


DURATIONS = {
    **dict.fromkeys(["", "30m", "1h30m", "90s", "1h2m3s", "0h5m"], True),
    **dict.fromkeys(["soon", "30", "30 m", "1.5h", "30m1h", "1d", "-5m", "0m", "0h0m0s", "5ms"], False),
}


@pytest.mark.parametrize(("written", "right"), DURATIONS.items(), ids=repr)
def test_a_time_is_one_or_is_refused(written: str, right: bool) -> None:
    found = told(stallTimeout=written)
    assert (not found) == right
    assert all("Write one like 45m or 1h30m, or '' for none." in message for message in found)


@pytest.mark.parametrize(
    ("sets", "timeout", "warned"),
    [
        ((), "30m", ""),
        (("compile.onMismatch=warn",), "2h", ""),
        (("chartValues.compile.onMismatch=warn",), "2h", ""),
        (("compile.onMismatch=warn", "chartValues.compile.onMismatch=refuse"), "30m", ""),
        (("instance=ml.trn2.48xlarge",), "1h", ""),
        (("instance=ml.trn2.48xlarge", "backend=xla"), "30m", ""),
        (("instance=ml.trn2.48xlarge", "compile.onMismatch=warn"), "2h", ""),
        (("compile.onMismatch=warn", "instance=cpu", "image=null", "nodes=1"), "", ""),
        (("compile.onMismatch=warn", "guards.stallTimeout=3h"), "3h", ""),
        (("compile.onMismatch=warn", "guards.stallTimeout=120m"), "120m", ""),
        (("compile.onMismatch=warn", "guards.stallTimeout=1h59m60s"), "1h59m60s", ""),
        (("compile.onMismatch=warn", "guards.stallTimeout="), "", ""),
        (("guards.stallTimeout=1h59m59s",), "1h59m59s", ""),
        (("compile.onMismatch=warn", "guards.stallTimeout=1h59m59s"), "1h59m59s", "guards.stallTimeout"),
        (("compile.onMismatch=warn", "guards.stallTimeout=30m"), "30m", "guards.stallTimeout"),
        (
            ("chartValues.compile.onMismatch=warn", "chartValues.guards.stallTimeout=30m"),
            *("30m", "chartValues.guards.stallTimeout"),
        ),
    ],
)
def test_a_training_that_may_compile_may_stand_still_for_so_long(
    sets: tuple[str, ...], timeout: str, warned: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made = checked(Sources((TRN1,), sets))
    assert made.values["guards"]["stallTimeout"] == timeout
    lines = [line for line in capsys.readouterr().err.splitlines() if "compile.onMismatch: warn" in line]
    assert [line.split(": ")[:2] for line in lines] == ([["warning", f"--set {warned}={timeout}"]] if warned else [])
    assert all("Write 2h, or leave it out" in line for line in lines)


@pytest.mark.parametrize(
    ("sets", "right"),
    [
        (("guards.stallTimeout=1s",), False),
        (("guards.stallTimeout=1m59s",), False),
        (("compile.onMismatch=warn", "guards.stallTimeout=1m"), False),
        (("chartValues.guards.stallTimeout=1m",), False),
        (("guards.stallTimeout=2m",), True),
        (("guards.stallTimeout=",), True),
        (("guards.stallTimeout=1s", "instance=cpu", "image=null", "nodes=1"), True),
    ],
)
def test_a_time_that_can_only_fail_on_trainium_is_a_mistake(sets: tuple[str, ...], right: bool) -> None:
    if right:
        checked(Sources((TRN1,), sets))
        return
    with pytest.raises(UserError) as told:
        checked(Sources((TRN1,), sets))
    key, timeout = sets[-1].split("=")
    (line,) = str(told.value).splitlines()
    assert tells(line, f"--set {key}={timeout}: {timeout} ends every training before its first step ... Leave it out")


@pytest.mark.parametrize(("timeout", "warned"), [("2m", True), ("17m59s", True), ("18m", False), ("0h18m", False)])
def test_a_time_in_which_no_start_may_fit_is_a_warning(
    timeout: str, warned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    checked(Sources((TRN1,), (f"guards.stallTimeout={timeout}",)))
    lines = [line for line in capsys.readouterr().err.splitlines() if "stallTimeout" in line]
    assert len(lines) == warned
    said = f"warning: --set guards.stallTimeout={timeout}: {timeout} may end the training before its first step ... 18m"
    assert all(tells(line, f"{said} ... Write 30m, or leave it out") for line in lines)
    assert contradictions.seconds(contradictions.STARTING_STALL_TIMEOUT) == 3600 * START_HOURS[1]


def test_a_time_that_is_shorter_than_a_step_is_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    def warned(*sets: str) -> list[str]:
        checked(Sources((TRN1,), ("training.gradientAccumulationSteps=2000", *sets)))
        return [line for line in capsys.readouterr().err.splitlines() if "within a step" in line]

    (said,) = warned()
    assert re.search(r"guards\.stallTimeout: 30m may end the training within a step, .* 3\d minutes", said)
    assert said.endswith("Set a longer time or a smaller batch.")
    assert not warned("guards.stallTimeout=1h") and not warned("guards.stallTimeout=")
    assert not warned("instance=cpu", "image=null", "nodes=1")


def test_the_plan_says_how_long_a_training_may_stand_still_and_why() -> None:
    def chosen(*sets: str) -> list[tuple[Any, str]]:
        choices = checked(Sources((TRN1,), sets)).plan.choices
        return [(choice.value, choice.reason) for choice in choices if choice.key == "guards.stallTimeout"]

    ((plain, _),) = chosen()
    ((compiling, why),) = chosen("compile.onMismatch=warn")
    assert (plain, compiling) == ("30m", "2h") and "compile.onMismatch: warn" in why
    ((native, why),) = chosen("instance=ml.trn2.48xlarge")
    assert native == "1h" and "compiling" in why
    assert chosen("guards.stallTimeout=5h") == [("5h", FROM_INPUTS)]
    assert chosen("guards.stallTimeout=") == [("never", FROM_INPUTS)]
    assert chosen("instance=cpu", "image=null", "nodes=1") == []
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    assert values["guards"]["stallTimeout"] == plain, "the chart's, too"


def test_inputs_and_chart_take_the_same_times() -> None:
    template = (CHART / "templates/_validations.tpl").read_text(encoding="utf-8")
    assert f'regexMatch "^{DURATION}$"' in template


def test_all_of_them_may_be_left_out() -> None:
    guards = GuardInputs()
    assert (guards.max_cost, guards.stall_timeout, guards.price_per_node_hour) == (None, None, None)


def test_limits_are_told_with_all_other_mistakes_each_once() -> None:
    sets = ("guards.maxCost=0.5", "guards.pricePerNodeHour=21.5", "guards.stallTimeout=1s", "training.attention=flash")
    with pytest.raises(UserErrors) as mistakes:
        checked(Sources((TRN1,), sets=(*sets, "training.maxSequenceLength=1000")))
    keys = [str(mistake).partition("=")[0] for mistake in mistakes.value.errors]
    assert keys == ["--set guards.maxCost", "--set guards.stallTimeout", "--set training.attention"]
    with pytest.raises(UserError) as mistake:
        checked(Sources((TRN1,), sets=("guards.stallTimeout=3",)))
    assert "is invalid" in str(mistake.value) and "\n" not in str(mistake.value)
    assert (
        checked(Sources((TRN1,), sets=("guards.maxCost=40", "instance=trn1.32xlarge"))).values["guards"]["maxCost"]
        == 40
    )


def test_a_large_model_may_load_for_longer() -> None:
    times = [contradictions.usual_stall_timeout("xla", f"meta-llama/Llama-3.1-{size}") for size in ("8B", "70B")]
    assert times == ["30m", "146m"]
