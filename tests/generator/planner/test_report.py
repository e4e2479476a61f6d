"""The plan as text and JSON, and the command that prints it."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from genvalues.commands.plan import plan as command
from genvalues.common.errors import UserError
from genvalues.inputs.input_options import Sources
from genvalues.ops.live_plan import planned
from genvalues.planner import report
from genvalues.planner.planning import Plan
from genvalues.planner.trace import Trace

ROOT = Path(__file__).parents[3]
TRN1 = ROOT / "values/trn1.yaml"
DOCUMENTED = (ROOT / "docs/plan.md").read_text(encoding="utf-8")


def made(*sets: str, file: Path = TRN1, **options: Any) -> Plan:
    return planned(Sources((file,), sets), **({"live": False, "offline": True, "region": None} | options))


def keys(value: Any, prefix: str = "") -> set[str]:
    """Every key of a JSON document, dotted; lists by their items."""
    if isinstance(value, list):
        return set().union(*(keys(item, prefix) for item in value)) if value else set()
    if not isinstance(value, dict):
        return set()
    found = set()
    for name, inner in value.items():
        dotted = f"{prefix}.{name}" if prefix else name
        found |= {dotted} | keys(inner, dotted)
    return found


def test_every_key_of_the_json_is_documented() -> None:
    told = set(re.findall(r"^\| `([A-Za-z0-9.]+)` \|", DOCUMENTED.partition("## The JSON")[2], re.MULTILINE))
    known = ("training.maxSteps=100", "guards.pricePerNodeHour=25")
    shown = keys(report.as_json(made(*known, "compile.runsOn=cpu")))
    shown |= keys(report.as_json(made(*known, file=ROOT / "values/trn2.yaml")))
    shown |= {f"trace.{field}" for field in Trace._fields}
    named = {key for key in shown if not key.startswith("estimate.cpuNodeHours.")}
    assert told == named, "docs/plan.md, The JSON"


@pytest.mark.parametrize("environment", ["trn1", "trn1-2node", "trn2", "cpu"])
def test_text_and_json_have_the_same_content(environment: str) -> None:
    found = made(file=ROOT / f"values/{environment}.yaml")
    shown, text = report.as_json(found), report.as_text(found)
    assert json.loads(json.dumps(shown, allow_nan=False)) == shown
    flat = " ".join(text.split())
    for choice in shown["choices"]:
        assert re.search(rf"{re.escape(choice['key'])} {choice['value']} ", flat), choice["key"]
        assert " ".join(choice["reason"].split())[:30] in flat
    for other in shown["rejected"]:
        assert f"{other['key']} {other['value']} {other['reason'][:30]}" in flat
    assert (shown["memory"] is None) == ("Memory per core" not in text) == (environment == "cpu")
    for each in shown["assumptions"]:
        assert each["assumed"][1:] in flat
    work = shown["work"]
    assert work["steps"] is None or f"steps {report.numbers(work['steps'])} {work['reason']}" in flat
    assert work["tokens"] is None or f"tokens {report.numbers(work['tokens'])} " in flat
    assert work["steps"] or f"steps unknown {work['reason']}" in flat
    price = shown["price"]
    told = f"price per node-hour ${price['dollars']:.2f}" if price else f"cost unknown {shown['priceUnknown']}"
    assert told in flat


def test_known_steps_and_price_are_shown_without_hours() -> None:
    """On the CPU, and for a model of unknown architecture."""
    given = ("training.maxSteps=100", "guards.pricePerNodeHour=2")
    for found in (made(*given, file=ROOT / "values/cpu.yaml"), made(*given, "model.path=/workspace/m")):
        assert found.estimate is None
        lines = [" ".join(line.split()) for line in report.as_text(found).splitlines()]
        assert "steps 100 training.maxSteps 100" in lines
        tokens = 100 * found.work.global_batch * found.work.length
        assert any(line.startswith(f"tokens {tokens:,} {found.work.global_batch} rows") for line in lines)
        assert "price per node-hour $2.00 guards.pricePerNodeHour" in lines
        assert not any(line.startswith(("hours to compile", "cost")) for line in lines)


def test_one_is_singular(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("a line\n")
    file = tmp_path / "finetune.yaml"
    file.write_text(
        "model: HuggingFaceTB/SmolLM2-135M\ndataset: {source: rows.txt, evalFraction: 0}\ninstance: cpu\n"
        "cpu: {processes: 1}\ntraining: {packing: false, epochs: 1}\n"
    )
    one, more = report.as_text(made(file=file)), report.as_text(made("training.epochs=1.5", file=file))
    assert "1 row, 1 epoch\n" in one and "1 row of " in one
    assert "1 row, 1.5 epochs\n" in more
    (tmp_path / "rows.txt").write_text("a line\n" * 1200)
    assert "1,200 rows, 1 epoch\n" in report.as_text(made(file=file))


def test_plain_text_has_no_boxes_no_colour_and_no_long_lines() -> None:
    text = report.as_text(made("training.maxSteps=100"))
    assert text.isascii()
    assert "\x1b" not in text
    assert max(len(line) for line in text.splitlines()) <= 120
    assert not any(line != line.rstrip() for line in text.splitlines())


def test_dollars_follow_the_price_in_the_inputs() -> None:
    steps = "training.maxSteps=400"
    shown = report.as_json(made(steps, "guards.pricePerNodeHour=25"))
    assert shown["price"]["dollars"] == 25
    assert shown["estimate"]["dollars"] == pytest.approx(
        [25 * each for each in shown["estimate"]["trainiumNodeHours"]], rel=1e-4
    )
    unknown = report.as_json(made(steps))
    assert unknown["price"] is unknown["estimate"]["dollars"] is None
    assert "set guards.pricePerNodeHour" in unknown["priceUnknown"]
    on_ec2 = report.as_json(made(steps, "instance=trn1.32xlarge"))
    assert (on_ec2["price"]["dollars"], on_ec2["price"]["region"]) == (21.5, "us-west-2")
    assert report.as_json(made("instance=trn2.48xlarge", region="us-east-2"))["price"]["dollars"] == 35.76


def test_with_unknown_steps_the_cost_is_per_million_tokens() -> None:
    found = made("guards.pricePerNodeHour=25")
    shown = report.as_json(found)
    assert shown["work"]["steps"] is shown["estimate"]["trainHours"] is shown["estimate"]["dollars"] is None
    assert shown["estimate"]["dollarsPerMillionTokens"][0] > 0
    assert "row count is unknown" in shown["work"]["reason"]
    assert "cost per million tokens" in report.as_text(found)


def test_a_local_files_rows_are_counted_on_the_cpu(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("a line\n" * 100)
    file = tmp_path / "finetune.yaml"
    file.write_text(
        "model: HuggingFaceTB/SmolLM2-135M\ndataset: {source: rows.txt, evalFraction: 0}\ninstance: cpu\n"
        "training: {packing: false}\n"
    )
    assert report.as_json(made(file=file))["work"]["steps"] == [17, 17]


def test_options_that_conflict_or_are_invalid(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"--live: .*--offline"):
        made(live=True)
    with pytest.raises(UserError, match="--region: 'moon' is not an AWS region"):
        made(region="moon")
    with pytest.raises(UserError, match="needs a region"):
        made("image=me/llama-lora:1", live=True, offline=False)
    asked = []

    def price(instance: str, region: str) -> Any:
        from genvalues.planner.prices import Price

        asked.append((instance, region))
        return Price(30.0, "AWS Pricing API, on demand", region, "today")

    monkeypatch.setattr("genvalues.ops.live_plan.live_price", price)
    assert made("guards.pricePerNodeHour=1", live=True, offline=False).price.dollars == 30  # type: ignore[union-attr]
    made(live=True, offline=False, region="eu-west-1")
    assert asked == [("ml.trn1.32xlarge", "us-west-2"), ("ml.trn1.32xlarge", "eu-west-1")]


def test_the_command_prints_text_to_a_pipe_and_json_when_asked() -> None:
    runner = CliRunner()
    plain = runner.invoke(command, [str(TRN1), "--offline"])
    assert plain.exit_code == 0
    assert plain.stdout == report.as_text(made())
    shown = runner.invoke(command, [str(TRN1), "--offline", "--json", "--set", "nodes=2"])
    assert json.loads(shown.stdout)["layout"]["nodes"] == 2


def test_a_terminal_gets_tables() -> None:
    """A terminal of 80 columns shows every first cell, and no line is wider."""
    master, slave = pty.openpty()
    code = "from genvalues.commands.plan import plan; plan()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(TRN1), "--offline"],
        stdout=slave,
        stderr=subprocess.PIPE,
        env={**os.environ, "COLUMNS": "80", "TERM": "xterm"},
    )
    os.close(slave)
    shown = b""
    try:
        while part := os.read(master, 65536):
            shown += part
    except OSError:  # the other end is closed
        pass
    assert process.wait(timeout=60) == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", shown.decode())
    assert "\u2500" in text, "a rule"
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    for table in report.tables(made()):
        assert table.title in text
        for cells in table.lines:
            assert cells[0].split()[0] in text


def test_check_and_write_print_no_plan_and_import_neither_rich_nor_boto3() -> None:
    code = (
        "import json, sys; from pathlib import Path; from genvalues.inputs.input_options import Sources; "
        "from genvalues.inputs.write import checked; checked(Sources((Path(sys.argv[1]),))); "
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(TRN1)], capture_output=True, text=True, check=True)
    assert not {"rich", "boto3", "botocore", "requests", "torch", "transformers"} & set(json.loads(done.stdout))


def test_a_step_with_more_rows_than_the_file_is_noted_at_its_key(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("a line\n" * 5)
    file = tmp_path / "finetune.yaml"
    file.write_text(
        "model: HuggingFaceTB/SmolLM2-135M\ndataset: {source: rows.txt, evalFraction: 0}\ninstance: cpu\n"
        "training: {packing: false, gradientAccumulationSteps: 4}\n"
    )
    (note,) = made(file=file).notes
    assert note.key == ("training", "gradientAccumulationSteps")
    assert note.text.startswith("A step takes 8 rows and the dataset has 5") and "3 rows of padding" in note.text
    (note,) = made("training.maxSteps=9", file=file).notes
    assert "rows repeat" in note.text
    assert made("training.gradientAccumulationSteps=2", file=file).notes == ()


def test_a_small_dataset_is_a_warning_at_a_key_of_the_inputs_in_a_full_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.txt").write_text("a line\n" * 3)
    file = tmp_path / "finetune.yaml"

    def warned(*sets: str, dataset: str = "rows.txt", cpu: str = "cpu: {processes: 4}\n") -> str:
        file.write_text(
            f"model: HuggingFaceTB/SmolLM2-135M\ndataset: {{source: {dataset}, evalFraction: 0}}\ninstance: cpu\n"
            f"training: {{packing: false}}\n{cpu}"
        )
        made(*sets, file=file)
        return capsys.readouterr().err

    usual = warned()
    assert usual.startswith(f"warning: {file}:5:7 cpu.processes: A step takes 4 rows and the dataset has 3: ")
    assert "1 row of padding" in usual and usual.endswith("Use fewer processes or more data.\n")
    assert "2 rows of padding" in warned("cpu.processes=5")
    nodes = warned("nodes=2", "cpu.processes=2")
    assert nodes.startswith("warning: --set nodes=2: A step") and nodes.endswith("Use fewer nodes or more data.\n")
    (tmp_path / "one.txt").write_text("a line\n")
    usual = warned(dataset="one.txt", cpu="")
    assert usual.startswith(f"warning: {file}:2:11 dataset.source: A step takes 2 rows and the dataset has 1: ")
    assert usual.endswith("use more data.\n")


def test_a_limit_below_the_estimate_is_noted() -> None:
    given = ("training.maxSteps=400", "guards.pricePerNodeHour=25")
    (note,) = made(*given, "guards.maxCost=20").notes
    assert note.key == ("guards", "maxCost")
    assert "may stop the run before it finishes" in note.text
    assert made(*given, "guards.maxCost=2000").notes == ()


def test_steps_and_tokens_are_whole_numbers() -> None:
    work = report.as_json(made("training.maxSteps=1234567"))["work"]
    assert work["steps"] == [1234567, 1234567]
    assert all(type(each) is int for each in (*work["steps"], *work["tokens"]))


def test_a_hyperpod_run_shows_its_cost_on_ec2() -> None:
    found = made("training.maxSteps=400")
    shown = report.as_json(found)
    hours = shown["estimate"]["trainiumNodeHours"]
    assert shown["estimate"]["dollarsAtEc2Price"] == pytest.approx([21.5 * each for each in hours], rel=1e-4)
    assert shown["price"] is shown["estimate"]["dollars"] is None
    assert "cost on EC2" in report.as_text(found)
    assert shown["priceOnEc2"]["dollars"] == 21.5
    priced = report.as_json(made("training.maxSteps=400", "guards.pricePerNodeHour=25"))
    assert priced["estimate"]["dollarsAtEc2Price"] is priced["priceOnEc2"] is None


def test_every_price_is_that_of_the_region(monkeypatch: pytest.MonkeyPatch) -> None:
    """values/trn1.yaml has its image in us-west-2."""
    rows = {"us-west-2": {"trn1.32xlarge": [20.0, "a"]}, "us-east-2": {"trn1.32xlarge": [30.0, "a"]}}
    monkeypatch.setattr("genvalues.planner.prices.table", lambda: {"regions": rows, "dated": "2026-01-01"})
    for region, dollars in ((None, 20), ("us-east-2", 30)):
        of_ec2 = made("training.maxSteps=400", "instance=trn1.32xlarge", region=region)
        assert of_ec2.price and (of_ec2.price.dollars, of_ec2.price.region) == (dollars, region or "us-west-2")
        assert of_ec2.price.region in report.as_text(of_ec2)
        found = made("training.maxSteps=400", region=region)
        assert found.estimate and found.dollars_on_ec2
        assert found.dollars_on_ec2[0] == pytest.approx(dollars * found.estimate.trainium_node_hours[0])  # type: ignore[index]
        assert f"${dollars}.00 for trn1.32xlarge in {region or 'us-west-2'}" in found.price_unknown
        line = next(line for line in report.as_text(found).splitlines() if "cost on EC2" in line)
        assert f"in {region or 'us-west-2'}; HyperPod's differs" in line
    elsewhere = made("training.maxSteps=400", region="eu-west-1")
    assert elsewhere.price_on_ec2 is elsewhere.dollars_on_ec2 is None
    assert "no price known for ml.trn1.32xlarge in eu-west-1" in report.as_text(elsewhere)


def test_a_local_model_whose_config_cannot_be_read_is_a_warning(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    file = tmp_path / "finetune.yaml"

    def notes(path: Path | str) -> list[str]:
        file.write_text(f"model: {{path: {path}}}\ndataset: {{source: a/b}}\ninstance: cpu\n")
        return [note.text for note in made(file=file).notes if note.warns]

    (told,) = notes(model)
    assert "cannot read" in told and "(FileNotFoundError)" in told and "cannot load this model" in told
    (model / "config.json").write_text("{")
    assert "(JSONDecodeError)" in notes(model)[0]
    assert made("chartValues.workspace=null", file=file).notes, "the chart's default"
    (model / "config.json").write_text('{"model_type": "gpt2"}')
    assert notes(model) == notes("/workspace/models/mine") == []


def test_a_gguf_file_is_a_supported_model_and_no_warning(tmp_path: Path) -> None:
    file, model = tmp_path / "finetune.yaml", tmp_path / "model.Q4_1.gguf"
    model.write_bytes(b"GGUF")
    file.write_text(f"model: {{path: {model}}}\ndataset: {{source: a/b}}\ninstance: cpu\n")
    assert [note.text for note in made(file=file).notes if note.warns] == []


def test_a_file_of_rows_that_is_missing_or_empty_is_a_mistake_on_the_cpu(tmp_path: Path) -> None:
    file, rows = tmp_path / "finetune.yaml", tmp_path / "rows.txt"
    for source in (str(rows), "rows.txt"):
        rows.unlink(missing_ok=True)
        file.write_text(f"model: HuggingFaceTB/SmolLM2-135M\ndataset: {{source: {source}}}\ninstance: cpu\n")
        with pytest.raises(UserError, match=r"dataset\.source: no such file or folder: "):
            made(file=file)
        rows.write_text("")
        with pytest.raises(UserError, match=r"dataset\.source: the file is empty: "):
            made(file=file)
    made("dataset.source=/workspace/rows.txt", file=file)
    mounts = "{extraVolumes: {a: {emptyDir: {}}}, extraVolumeMounts: {a: {mountPath: /a}}}"
    file.write_text(file.read_text() + f"chartValues: {{stageDefaults: {mounts}}}\n")
    made("dataset.source=/a/rows.txt", file=file)
