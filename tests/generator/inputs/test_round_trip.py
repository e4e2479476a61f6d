"""What genvalues writes: the chart takes it, it is always the same, it explains itself, and an edit of it is safe."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings

from chart.manifests import run_helm
from forked import genvalues
from generator.inputs.test_values import CHART, ISSUE, ON_TRAINIUM, right_inputs, written
from genvalues.common.errors import UserError
from genvalues.inputs import chart
from genvalues.inputs.generated_file import difference, is_as_written, with_digest
from genvalues.inputs.input_options import Sources
from genvalues.inputs.write import checked, write_values
from genvalues.inputs.yaml_text import dump

ROOT = Path(__file__).parents[3]
SCHEMA_LINE = re.compile(r"^# yaml-language-server: \$schema=(\S+)$", re.M)
CPU = "model: gpt2\ndataset: {source: a/b}\ninstance: cpu\n"


def many_right_inputs(count: int) -> list[dict[str, Any]]:
    """Inputs in which nothing is wrong, the same each time."""
    found: list[dict[str, Any]] = []

    @settings(
        max_examples=count,
        phases=[Phase.generate],
        derandomize=True,
        database=None,
        suppress_health_check=[*HealthCheck],
    )
    @given(wanted=right_inputs())
    def collect(wanted: dict[str, Any]) -> None:
        found.append(wanted)

    collect()
    return found


def test_right_inputs_give_values_that_helm_takes(round_trips: int, tmp_path: Path) -> None:
    """Helm's schema check and the templates' own; half of them by Helm 3, half by Helm 4."""
    inputs = many_right_inputs(round_trips)
    assert len(inputs) >= round_trips
    assert len({json.dumps(each, sort_keys=True) for each in inputs}) > round_trips * 0.9

    def taken(number: int) -> str:
        file, values = tmp_path / f"{number}.yaml", tmp_path / f"{number}.values.yaml"
        file.write_text(dump(inputs[number]))
        write_values(values, written(Sources((file,), (), CHART), values), [file], force=False)
        done = run_helm(3 + number % 2, "template", "llama", CHART, "--values", values)
        file.unlink()
        values.unlink()
        return "" if done.returncode == 0 else f"{inputs[number]}: {done.stderr}"

    with ThreadPoolExecutor(2) as pool, contextlib.redirect_stderr(io.StringIO()):  # the warnings
        refused = [said for said in pool.map(taken, range(len(inputs))) if said]
    assert refused == []


@pytest.mark.parametrize(
    ("environment", "stage"),
    [
        ({"NEURON_CC_FLAGS": "--model-type=transformer"}, "train"),
        ({"NEURON_CC_FLAGS": "--cache_dir=/tmp/x"}, None),
        ({"NEURON_COMPILE_CACHE_URL": "s3://a/b"}, "compile"),
        ({"NEURON_LOGICAL_NC_CONFIG": 2}, None),
        ({"XLA_USE_BF16": True}, "neff"),
        ({"XLA_FLAGS": "x"}, "compile"),
        ({"LLAMA_LORA_WORKSPACE": "/x"}, "merge"),
        ({"NEURON_CC_FLAGS": "-O1", "NEURON_FUSE_SOFTMAX": 1}, None),
        ({"NEURON_RT_LOG_LEVEL": "INFO"}, "train"),
        ({"OMP_NUM_THREADS": 4}, "train"),
    ],
)
@pytest.mark.parametrize("instance", ["trn1.32xlarge", "cpu"])
def test_what_the_chart_refuses_in_an_environment_is_told_before_and_nothing_else(
    environment: dict[str, Any], stage: str | None, instance: str, tmp_path: Path
) -> None:
    where = {"stages": {stage: {"extraEnv": environment}}} if stage else {"stageDefaults": {"extraEnv": environment}}
    file, values = tmp_path / "f.yaml", tmp_path / "values.yaml"
    file.write_text(ON_TRAINIUM % ("text", instance))
    values.write_text(dump(checked(Sources((file,), (), CHART)).values))
    beside = tmp_path / "beside.yaml"
    beside.write_text(dump(where))
    by_helm = run_helm(4, "template", "llama", CHART, "--values", values, "--values", beside)
    file.write_text(file.read_text() + dump({"chartValues": where}))
    ours = genvalues("check", str(file), "--chart", str(CHART))
    assert (ours.returncode, by_helm.returncode) in ((0, 0), (2, 1)), ours.stderr + by_helm.stderr
    if ours.returncode:
        (name,) = {name for name in environment if name in by_helm.stderr} or {""}
        assert f"extraEnv.{name}: " in ours.stderr


def test_that_both_stages_have_it_alike_is_right(tmp_path: Path) -> None:
    same = {"extraEnv": {"NEURON_CC_FLAGS": "--model-type=transformer"}}
    file = tmp_path / "f.yaml"
    file.write_text(
        ON_TRAINIUM % ("text", "trn1.32xlarge") + dump({"chartValues": {"stages": {"compile": same, "train": same}}})
    )
    assert checked(Sources((file,), (), CHART)).values["stages"]["train"]["extraEnv"] == same["extraEnv"]


# --- the same bytes


def test_the_same_inputs_give_the_same_bytes_whatever_the_hash_seed_and_the_folder(tmp_path: Path) -> None:
    found = set()
    for number, place in enumerate(("one", "two/deep")):
        folder = tmp_path / place
        folder.mkdir(parents=True)
        (folder / "finetune.yaml").write_text(ISSUE)
        (folder / "over.yaml").write_text("lora: {r: 8}\nchartValues: {kueue: {queueName: q}}\n")
        options = ["-f", str(folder / "over.yaml"), "--set", "training.seed=7", "--chart", str(CHART)]
        output = folder / "values.yaml"
        arguments = ["write", str(folder / "finetune.yaml"), *options, "-o", str(output), "--force"]
        started = [sys.executable, "-m", "genvalues.cli", *arguments]
        subprocess.run(started, env={**os.environ, "PYTHONHASHSEED": str(number + 1), "LC_ALL": "C"}, check=True)
        found.add(output.read_bytes())
        for cwd in (folder, tmp_path, Path("/")):
            output.unlink()
            done = genvalues(*arguments, cwd=cwd)
            assert done.returncode == 0, done.stderr
            found.add(output.read_bytes())
    assert len(found) == 1
    (text,) = found
    assert str(tmp_path).encode() not in text and str(ROOT).encode() not in text


def test_a_checkout_elsewhere_gives_the_same_bytes(tmp_path: Path) -> None:
    found = []
    for place in ("one", "two/deep"):
        tree = tmp_path / place
        (tree / "values").mkdir(parents=True)
        (tree / "chart").mkdir()
        for name in ("Chart.yaml", "values.yaml", "values.schema.json"):
            (tree / "chart" / name).write_bytes((CHART / name).read_bytes())
        (tree / "values" / "mine.yaml").write_text(CPU)
        done = genvalues("write", "values/mine.yaml", "-o", "values/mine.values.yaml", cwd=tree)
        assert done.returncode == 0, done.stderr
        found.append((tree / "values" / "mine.values.yaml").read_text())
    assert found[0] == found[1]
    assert SCHEMA_LINE.search(found[0])[1] == "../chart/values.schema.json"  # type: ignore[index]


# --- what it says of itself


@pytest.mark.parametrize("name", [path.name for path in sorted((ROOT / "values").glob("*.values.yaml"))])
def test_a_committed_file_says_what_it_is_and_its_schema_takes_it(name: str) -> None:
    file = ROOT / "values" / name
    text = file.read_text()
    assert is_as_written(text)
    schema = file.parent / SCHEMA_LINE.search(text)[1]  # type: ignore[index]
    assert schema.resolve() == (CHART / "values.schema.json").resolve()
    values = chart.on_top_of_defaults(CHART, yaml.safe_load(text))
    jsonschema.Draft7Validator(json.loads(schema.read_text())).validate(values)
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if re.match(r"[A-Za-z]+:", line):
            assert re.fullmatch(r"# [^#]{3,110}[.]", lines[number - 1]), f"{line} is not explained"
            assert lines[number - 2] == ""


def test_where_no_chart_is_near_the_schema_is_looked_for_beside_and_the_file_says_how(tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_text(CPU)
    assert genvalues("write", "f.yaml", "--chart", str(CHART), cwd=tmp_path).returncode == 0
    text = (tmp_path / "values.yaml").read_text()
    assert SCHEMA_LINE.search(text)[1] == "values.schema.json"  # type: ignore[index]
    (command,) = re.findall(r"^# For editors: genvalues (.*) > (\S+) \(beside this file\)$", text, re.M)
    printed = genvalues(*command[0].split(), "--chart", str(CHART))
    assert (printed.stdout, command[1]) == ((CHART / "values.schema.json").read_text(), "values.schema.json")


# --- an edited file


def put(tmp_path: Path, text: str) -> Path:
    (tmp_path / "f.yaml").write_text(CPU)
    output = tmp_path / "values.yaml"
    output.write_text(text)
    return output


def test_what_genvalues_wrote_is_overwritten_without_a_word(tmp_path: Path) -> None:
    output = put(tmp_path, "")
    output.unlink()
    assert genvalues("write", "f.yaml", cwd=tmp_path).returncode == 0
    first = output.read_text()
    done = genvalues("write", "f.yaml", "--set", "lora.r=8", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "No problems found in f.yaml. Wrote values.yaml.\n")
    assert output.read_text() != first
    output.write_bytes(b"\xef\xbb\xbf" + output.read_text().replace("\n", "\r\n").encode())  # as git and editors do
    assert genvalues("write", "f.yaml", cwd=tmp_path).returncode == 0
    assert output.read_text() == first


@pytest.mark.parametrize(
    ("edit", "said", "shown"),
    [
        (lambda text: text.replace("r: 16", "r: 64"), "was edited after genvalues wrote it", "-  r: 64\n+  r: 16"),
        (lambda text: text + "extra: 1\n", "was edited after genvalues wrote it", "-extra: 1"),
        (lambda text: text.replace("# How the stages run.", "# ours"), "was edited", "-# ours\n+# How the stages run."),
        (lambda text: re.sub("# digest: .*\n", "", text), "was not written by genvalues", "+# digest: "),
        (lambda text: re.sub("# digest: .*\n", "# digest: " + "0" * 16 + "\n", text), "was edited", "-# digest: 000"),
        (lambda text: "mine: 1\n", "was not written by genvalues", "-mine: 1"),
        (lambda text: "mine: caf\udce9\n", "was not written by genvalues", "-mine: caf?"),
    ],
)
def test_what_somebody_edited_or_wrote_is_kept_shown_as_a_diff_and_overwritten_by_force(
    edit: Any, said: str, shown: str, tmp_path: Path
) -> None:
    output = put(tmp_path, "")
    output.unlink()
    assert genvalues("write", "f.yaml", cwd=tmp_path).returncode == 0
    right = output.read_text()
    edited = edit(right).encode(errors="surrogateescape")
    output.write_bytes(edited)
    done = genvalues("write", "f.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert output.read_bytes() == edited
    *diff, line = done.stderr.splitlines()
    assert line.startswith(f"-o values.yaml: {said}") and line.endswith("--force.")
    assert diff[0].startswith("--- values.yaml (current)") and diff[1].startswith("+++ ")
    assert shown in "\n".join(diff)
    assert len(diff) <= 61
    forced = genvalues("write", "f.yaml", "--force", cwd=tmp_path)
    assert (forced.returncode, output.read_text()) == (0, right)


def test_a_diff_shows_no_secret() -> None:
    token, key = "hf_" + "QwErTyUiOpAsDfGh", "-----BE" + "GIN PRIVATE KEY-----\nQwErTyUiOp\n-----END PRIVATE KEY-----"
    there = f"a: {token}\nstages:\n  train:\n    extraEnv:\n      WANDB_API_KEY: QwErTyUiOp\n      x: |\n{key}\n"
    shown = difference(there, "a: 1\n", "values.yaml")
    assert "QwEr" not in shown
    assert "WANDB_API_KEY: ..." in shown and "-a: hf_..." in shown


@pytest.mark.parametrize("place", ["/dev/null", "pipe"])
def test_what_is_no_file_is_not_replaced_by_one(place: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "f.yaml").write_text(CPU)
    done = genvalues("write", "f.yaml", "-o", place, "--force", cwd=tmp_path)
    said = f"-o {place}: not a regular file. Write -o values.yaml, or -o - for stdout.\n"
    assert (done.returncode, done.stderr) == (2, said)
    assert not (tmp_path / place).is_file()


def test_a_folder_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_text(CPU)
    done = genvalues("write", "f.yaml", "-o", "no/such/values.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("-o no/such/values.yaml: cannot be written: no such folder: no/such. ")
    assert not (tmp_path / "no").exists()


def test_a_link_stays_one_and_what_it_leads_to_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_text(CPU)
    (tmp_path / "there").mkdir()
    link, real = tmp_path / "values.yaml", tmp_path / "there" / "real.yaml"
    link.symlink_to("there/real.yaml")
    assert genvalues("write", "f.yaml", cwd=tmp_path).returncode == 0
    first = real.read_text()
    assert link.is_symlink()
    real.chmod(0o640)
    assert genvalues("write", "f.yaml", "--set", "lora.r=8", cwd=tmp_path).returncode == 0
    assert link.is_symlink() and real.read_text() != first
    assert real.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("options", [[], ["--force"]])
def test_a_file_that_is_read_only_is_not_replaced(options: list[str], tmp_path: Path) -> None:
    output = put(tmp_path, with_digest(["written"], "a: 1\n"))
    output.chmod(0o444)
    done = genvalues("write", "f.yaml", *options, cwd=tmp_path)
    assert (done.returncode, output.stat().st_mode & 0o777) == (2, 0o444)
    assert done.stderr.startswith("-o values.yaml: cannot be written: the existing file is read-only (mode 444).")
    assert output.read_text() == with_digest(["written"], "a: 1\n")


def test_neither_the_inputs_nor_an_overlay_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_text(CPU)
    (tmp_path / "over.yaml").write_text("lora: {r: 8}\n")
    for place in ("f.yaml", "over.yaml"):
        done = genvalues("write", "f.yaml", "-f", "over.yaml", "-o", place, "--force", cwd=tmp_path)
        assert (done.returncode, done.stderr.split(". ")[0]) == (2, f"-o {place}: is the inputs file itself")
    assert (tmp_path / "over.yaml").read_text() == "lora: {r: 8}\n"


def test_a_disk_that_is_full_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = put(tmp_path, with_digest(["written"], "a: 1\n"))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        write_values(output, "new\n", [tmp_path / "f.yaml"], force=False)
    assert output.read_text() == with_digest(["written"], "a: 1\n")
    assert {path.name for path in tmp_path.iterdir()} == {"f.yaml", "values.yaml"}
