"""The command itself: quick to start, data on stdout, talk on stderr."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from genvalues.cli import not_written

HEAVY = ["boto3", "botocore", "kubernetes", "pyhelm3", "torch", "transformers", "datasets"]


def genvalues(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "genvalues.cli", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("arguments", "absent"),
    [
        (["--help"], [*HEAVY, "pydantic", "jsonschema"]),
        (["--version"], [*HEAVY, "pydantic", "jsonschema"]),
        (["check", "finetune.yaml"], HEAVY),
    ],
)
def test_nothing_is_imported_that_a_command_does_not_use(
    arguments: list[str], absent: list[str], tmp_path: Path
) -> None:
    (tmp_path / "finetune.yaml").write_text("model: gpt2\ndataset: {source: a/b}\ninstance: cpu\n")
    script = (
        "import sys\nfrom genvalues.cli import main\n"
        f"sys.argv = ['genvalues', *{arguments}]\n"
        "try:\n    main()\nfinally:\n"
        f"    print('imported:', *(name for name in {absent} if name in sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "imported:"


def test_the_version_is_the_distributions() -> None:
    from importlib.metadata import version

    assert genvalues("--version").stdout == f"genvalues {version('llama-lora')}\n"


def test_every_command_is_listed_with_its_help() -> None:
    done = genvalues("--help")
    assert done.returncode == 0, done.stderr
    for command in ("check", "cluster", "local", "write"):
        assert f"\n  {command} " in done.stdout
    assert "Example:" in genvalues("write", "--help").stdout


def test_values_go_to_stdout_and_talk_to_stderr(tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_text("model: gpt2\ndataset: {source: a/b}\ninstance: cpu\n")
    on_stdout = genvalues("write", "f.yaml", "-o", "-", cwd=tmp_path)
    assert (on_stdout.returncode, on_stdout.stderr) == (0, "")
    to_file = genvalues("write", "f.yaml", cwd=tmp_path)
    assert (to_file.returncode, to_file.stdout) == (0, "")
    assert to_file.stderr == "f.yaml is right. Wrote values.yaml.\n"
    assert (tmp_path / "values.yaml").read_text() == on_stdout.stdout
    checked = genvalues("check", "f.yaml", cwd=tmp_path)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "f.yaml is right.\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["write", "f.yaml", "-o", "-"],
        ["plan", "f.yaml", "--offline"],
        ["plan", "f.yaml", "--json"],
        ["schema"],
    ],
)
def test_a_full_disk_is_told_as_one_and_is_no_defect(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_text("model: gpt2\ndataset: {source: a/b}\ninstance: cpu\n")
    command = [sys.executable, "-m", "genvalues.cli", *arguments]
    with open("/dev/full", "w") as full:  # noqa: PTH123
        done = subprocess.run(command, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "stdout: cannot be written: No space left on device\n")


def test_a_full_disk_elsewhere_is_told_too_and_another_error_is_still_a_defect() -> None:
    def raised(number: int, *file: str) -> OSError:
        try:
            raise OSError(number, os.strerror(number), *file)
        except OSError as error:
            return error

    assert not_written(raised(errno.ENOSPC, "/tmp/x")) == "/tmp/x: cannot be written: No space left on device"
    assert not_written(raised(errno.ENOSPC)) == "stdout, or a file: cannot be written: No space left on device"
    assert not_written(raised(errno.EIO)) == ""


def test_a_closed_stdout_takes_nothing_away() -> None:
    command = f'"{sys.executable}" -m genvalues.cli --version >&-'
    done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_wrong_command_line_ends_with_status_2() -> None:
    assert [genvalues(*wrong).returncode for wrong in (["write"], ["nothing"], ["local", "x"])] == [2, 2, 2]


def test_the_chart_beside_is_used_only_if_it_is_ours(tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_text("model: gpt2\ndataset: {source: a/b}\ninstance: cpu\nchartValues: {nonsense: 1}\n")
    (tmp_path / "chart").mkdir()
    (tmp_path / "chart" / "Chart.yaml").write_text("name: other\n")
    done = genvalues("check", "f.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert "f.yaml:4:15 chartValues.nonsense: unknown key" in done.stderr
    done = genvalues("check", "f.yaml", "--chart", "nowhere", cwd=tmp_path)
    told = "--chart nowhere: not a chart: Chart.yaml not found. Name the directory of the chart llama-lora.\n"
    assert (done.returncode, done.stderr) == (2, told)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"values.schema.json": "{}"}, "c/values.yaml: cannot be read: No such file or directory."),
        ({"values.yaml": "a: 1"}, "c/values.schema.json: cannot be read: No such file or directory."),
        ({"values.yaml": "a: [", "values.schema.json": "{}"}, "c/values.yaml: cannot be read: while parsing"),
        ({"values.yaml": "- a", "values.schema.json": "{}"}, "c/values.yaml: must contain keys and values."),
        ({"values.yaml": "a: 1", "values.schema.json": "{"}, "c/values.schema.json: cannot be read: Expecting"),
        (
            {"values.yaml": "a: 1", "values.schema.json": '{"type": 5}'},
            "c/values.schema.json: not a valid JSON schema: 5 is",
        ),
        (
            {"values.yaml": "a: 1", "values.schema.json": '{"required": ["b"]}'},
            "c: b: is required.",
        ),
    ],
)
def test_a_chart_that_is_not_whole_is_told_in_a_line(files: dict[str, str], said: str, tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_text("model: gpt2\ndataset: {source: a/b}\ninstance: cpu\n")
    (tmp_path / "c").mkdir()
    for name, text in {"Chart.yaml": "name: llama-lora\n", **files}.items():
        (tmp_path / "c" / name).write_text(text)
    done = genvalues("check", "f.yaml", "--chart", "c", cwd=tmp_path)
    (line,) = done.stderr.splitlines()
    assert (done.returncode, line[: len(said)]) == (2, said)
