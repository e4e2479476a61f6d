"""The genvalues command: it starts fast, prints data to stdout and messages to stderr."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from forked import genvalues
from genvalues import cli
from genvalues.common.errors import internal_error, traceback_wanted

INPUTS = "model: gpt2\ndataset: {source: a/b}\ninstance: cpu\n"
HEAVY = ["boto3", "botocore", "kubernetes", "pyhelm3", "torch", "transformers", "datasets"]


@pytest.mark.parametrize(
    ("arguments", "absent"),
    [
        (["--help"], [*HEAVY, "pydantic", "jsonschema"]),
        (["--version"], [*HEAVY, "pydantic", "jsonschema"]),
        (["check", "finetune.yaml"], HEAVY),
    ],
)
def test_a_command_imports_only_what_it_uses(arguments: list[str], absent: list[str], tmp_path: Path) -> None:
    (tmp_path / "finetune.yaml").write_text(INPUTS)
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


def test_values_go_to_stdout_and_messages_to_stderr(tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_text(INPUTS)
    on_stdout = genvalues("write", "f.yaml", "-o", "-", cwd=tmp_path)
    assert (on_stdout.returncode, on_stdout.stderr) == (0, "")
    to_file = genvalues("write", "f.yaml", cwd=tmp_path)
    assert (to_file.returncode, to_file.stdout) == (0, "")
    assert to_file.stderr == "No problems found in f.yaml. Wrote values.yaml.\n"
    assert (tmp_path / "values.yaml").read_text() == on_stdout.stdout
    checked = genvalues("check", "f.yaml", cwd=tmp_path)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "No problems found in f.yaml.\n")


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
def test_a_full_disk_is_reported_as_such_and_not_as_an_internal_error(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_text(INPUTS)
    command = [sys.executable, "-m", "genvalues.cli", *arguments]
    with open("/dev/full", "w") as full:  # noqa: PTH123
        done = subprocess.run(command, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "stdout: cannot be written: No space left on device\n")


def test_an_error_of_the_operating_system_is_one_line_and_not_an_internal_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, status in [(errno.ENOSPC, 1), (errno.EIO, 1), (errno.EACCES, 2), (errno.ENOENT, 1)]:

        def crash(number: int = number) -> int:
            raise OSError(number, os.strerror(number), "/tmp/x")

        monkeypatch.setattr(cli, "run_command", crash)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        (line,) = capsys.readouterr().err.splitlines()
        assert ended.value.code == status, line
        assert line.startswith("/tmp/x: ") and os.strerror(number) in line and "internal" not in line


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        ("--version >&-", 0),
        ("plan f.yaml --offline >&-", 0),
        ("write f.yaml -o - >&-", 0),
        ("check absent.yaml 2>&-", 2),
        ("check absent.yaml >&- 2>&-", 2),
        ("check absent.yaml <&- >&- 2>&-", 2),
        ("check absent.yaml 2</dev/null", 2),  # as in a script that a shell has opened in place of stderr
        ("check absent.yaml 2>/dev/full", 2),
        ("check --nonsense 2>/dev/full", 2),
    ],
)
def test_a_stdout_or_stderr_that_cannot_be_written_does_not_change_the_status(
    arguments: str, status: int, tmp_path: Path
) -> None:
    (tmp_path / "f.yaml").write_text(INPUTS)
    command = ["sh", "-c", f'"{sys.executable}" -m genvalues.cli {arguments}']
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", "")


def test_a_working_directory_that_was_deleted_is_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_text(INPUTS)
    for arguments in ("write ../f.yaml", f"write {tmp_path}/f.yaml"):
        (tmp_path / "gone").mkdir()
        command = ["sh", "-c", f'rmdir "$PWD"; exec "{sys.executable}" -m genvalues.cli {arguments}']
        done = subprocess.run(command, cwd=tmp_path / "gone", capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (2, ""), arguments
        assert done.stderr == "the working directory no longer exists. cd to another folder.\n"


@pytest.mark.parametrize(
    ("fifo", "arguments", "said"),
    [
        ("f.yaml", ["check", "f.yaml"], "f.yaml: cannot be read: not a regular file. Name "),
        ("b.tgz", ["local", "b.tgz", "--workspace", "w"], "b.tgz: cannot be read: not a regular file. Use "),
        (
            "c/values.yaml",
            ["check", "f.yaml", "--chart", "c"],
            "c/values.yaml: cannot be read: not a regular file. Name ",
        ),
        ("chart/Chart.yaml", ["check", "f.yaml"], "No problems found in f.yaml."),
        ("m/config.json", ["check", "f.yaml", "--set", "model.path=m"], "warning: --set model.path=m: cannot read /"),
    ],
)
def test_a_fifo_in_the_place_of_a_file_is_not_waited_for(
    fifo: str, arguments: list[str], said: str, tmp_path: Path
) -> None:
    (tmp_path / "f.yaml").write_text(INPUTS)
    for folder in ("c", "chart", "m"):
        (tmp_path / folder).mkdir()
    (tmp_path / "c/Chart.yaml").write_text("name: llama-lora\n")
    (tmp_path / fifo).unlink(missing_ok=True)
    os.mkfifo(tmp_path / fifo)
    command = [sys.executable, "-m", "genvalues.cli", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert done.stderr.startswith(said) and done.returncode == (2 if "cannot be read" in said else 0), done.stderr


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="needs the files that a process has open")
def test_an_inputs_file_may_be_what_a_shell_has_opened(tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_text(INPUTS)
    for command in ("genvalues.cli check <(cat f.yaml)", "genvalues.cli check /dev/stdin < <(cat f.yaml)"):
        bash = ["bash", "-c", f'"{sys.executable}" -m {command}']
        done = subprocess.run(bash, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0 and done.stderr.startswith("No problems found in /dev/"), done.stderr


def test_an_invalid_command_line_ends_with_status_2() -> None:
    assert [genvalues(*wrong).returncode for wrong in (["write"], ["nothing"], ["local", "x"])] == [2, 2, 2]


def test_a_chart_in_the_current_folder_is_used_only_if_it_is_llama_lora(tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_text("model: gpt2\ndataset: {source: a/b}\ninstance: cpu\nchartValues: {nonsense: 1}\n")
    (tmp_path / "chart").mkdir()
    (tmp_path / "chart" / "Chart.yaml").write_text("name: other\n")
    done = genvalues("check", "f.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert "f.yaml:4:15 chartValues.nonsense: unknown key" in done.stderr
    done = genvalues("check", "f.yaml", "--chart", "nowhere", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("--chart nowhere: ") and "Chart.yaml" in done.stderr


@pytest.mark.parametrize(
    ("files", "where", "what"),
    [
        ({"values.schema.json": "{}"}, "c/values.yaml: ", "No such file or directory"),
        ({"values.yaml": "a: 1"}, "c/values.schema.json: ", "No such file or directory"),
        ({"values.yaml": "a: [", "values.schema.json": "{}"}, "c/values.yaml: ", "while parsing"),
        ({"values.yaml": "- a", "values.schema.json": "{}"}, "c/values.yaml: ", ""),
        ({"values.yaml": "a: 1", "values.schema.json": "{"}, "c/values.schema.json: ", "Expecting"),
        ({"values.yaml": "a: 1", "values.schema.json": '{"type": 5}'}, "c/values.schema.json: ", "JSON schema"),
        ({"values.yaml": "a: 1", "values.schema.json": '{"required": ["b"]}'}, "c: b: ", "required"),
    ],
)
def test_an_incomplete_chart_is_reported_in_one_line(
    files: dict[str, str], where: str, what: str, tmp_path: Path
) -> None:
    (tmp_path / "f.yaml").write_text(INPUTS)
    (tmp_path / "c").mkdir()
    for name, text in {"Chart.yaml": "name: llama-lora\n", **files}.items():
        (tmp_path / "c" / name).write_text(text)
    done = genvalues("check", "f.yaml", "--chart", "c", cwd=tmp_path)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2
    assert line.startswith(where) and what in line


@pytest.mark.parametrize(("option", "shown"), [("-q", False), ("--quiet", False), ("-v", True), ("--verbose", True)])
def test_quiet_and_verbose_change_the_messages_and_neither_data_nor_errors(
    option: str, shown: bool, tmp_path: Path
) -> None:
    (tmp_path / "f.yaml").write_text(INPUTS)
    done = genvalues(option, "check", "f.yaml", cwd=tmp_path)
    assert (done.returncode, "No problems found" in done.stderr) == (0, shown)
    assert genvalues(option, "write", "f.yaml", "-o", "-", cwd=tmp_path).stdout.startswith("# Written by genvalues")
    failed = genvalues(option, "check", "absent.yaml", cwd=tmp_path)
    assert failed.returncode == 2 and failed.stderr.startswith("absent.yaml: ")


def test_an_internal_error_says_how_to_report_it_and_shows_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash() -> None:
        raise KeyError("hf_" + "a" * 34)

    try:
        crash()
    except KeyError as error:
        line = internal_error(error, "genvalues", with_traceback=False)
        assert "internal error: KeyError at test_cli.py:" in line and "GENVALUES_TRACEBACK=1" in line
        assert "\n" not in line
        shown = internal_error(error, "genvalues", with_traceback=True)
        assert shown.startswith("Traceback") and shown.endswith(line)
        assert "hf_aaaa" not in shown
    for arguments, wanted in [(["cluster", "gate"], True), (["-v", "cluster", "gate"], True), (["check", "x"], False)]:
        monkeypatch.setattr(sys, "argv", ["genvalues", *arguments])
        assert traceback_wanted() is wanted
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert traceback_wanted() is True
