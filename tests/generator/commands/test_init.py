"""genvalues init and genvalues schema: a user's first commands."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from forked import genvalues
from genvalues import cli
from genvalues.settings.inputs import SCHEMA

ROOT = Path(__file__).parents[3]
KEYS = set(json.loads(SCHEMA.read_text())["properties"])
COMMENTED = re.compile(rf"^( *)# ((?:{'|'.join(KEYS)}|columns|evalFraction): .*)$", re.M)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_without_a_terminal_it_writes_what_check_accepts_and_check_warns_of_the_placeholder() -> None:
    done = genvalues("init")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert done.stderr == "Wrote finetune.yaml. Next: genvalues check finetune.yaml\n"
    checked = genvalues("check", "finetune.yaml")
    assert checked.returncode == 0, checked.stderr
    (warning, right) = checked.stderr.splitlines()
    assert re.match(r"warning: finetune\.yaml:\d+:1 image: .*123456789012", warning)
    assert right == "No problems found in finetune.yaml."
    mine = genvalues("check", "finetune.yaml", "--set", "image=ghcr.io/me/llama-lora:1.0")
    assert mine.stderr == "No problems found in finetune.yaml.\n"


@pytest.mark.parametrize(
    ("instance", "format_"),
    [
        ("cpu", "text"),
        ("ml.trn1.32xlarge", "instruction"),
        ("trn1.2xlarge", "prompt-completion"),
        ("trn2.48xlarge", "chat"),
    ],
)
def test_every_commented_out_key_can_be_uncommented_unchanged(instance: str, format_: str) -> None:
    image = ["--image", "ghcr.io/me/llama-lora:1.0"]
    assert genvalues("init", "--dataset", "a/b", "--format", format_, "--instance", instance, *image).returncode == 0
    text = Path("finetune.yaml").read_text()
    keys = KEYS - ({"cpu"} if instance != "cpu" else set())
    assert len(COMMENTED.findall(text)) > 8
    everything = COMMENTED.sub(r"\1\2", text)
    assert yaml.safe_load(everything).keys() == keys
    Path("everything.yaml").write_text(everything)
    for file in ("finetune.yaml", "everything.yaml"):
        written = genvalues("write", file, "-o", f"{file}.values")
        assert (written.returncode, written.stderr) == (0, f"No problems found in {file}. Wrote {file}.values.\n")
    left_out, taken_in = (Path(f"{file}.yaml.values").read_text() for file in ("finetune", "everything"))
    assert yaml.safe_load(left_out) == yaml.safe_load(taken_in), "the comments show the defaults"


def test_flags_are_written_and_columns_are_those_of_the_format() -> None:
    flags = {
        "--name": "mine",
        "--model": "meta-llama/Llama-3.2-1B@main",
        "--dataset": "s3://bucket/rows.jsonl",
        "--format": "chat",
        "--instance": "trn1.32xlarge",
        "--nodes": "2",
        "--image": "ghcr.io/me/llama-lora:1.0",
    }
    given = [word for flag in flags.items() for word in flag]
    Path("deep/er").mkdir(parents=True)
    assert genvalues("init", "deep/er/mine.yaml", *given).returncode == 0
    inputs = yaml.safe_load(Path("deep/er/mine.yaml").read_text())
    assert (inputs["name"], inputs["nodes"], inputs["instance"]) == ("mine", 2, "trn1.32xlarge")
    assert inputs["dataset"] == {"source": "s3://bucket/rows.jsonl", "format": "chat"}
    assert "  # columns: {messages: messages}\n" in Path("deep/er/mine.yaml").read_text()


def test_every_invalid_option_is_reported_at_once_and_nothing_is_written() -> None:
    done = genvalues(
        *("init", "--model", "a/b/c", "--instance", "p5.48xlarge", "--nodes", "0", "--format", "chad"),
        *("--name", "A_b", "--image", "llama-lora", "--dataset", "rows.tsv"),
    )
    assert done.returncode == 2
    told = done.stderr.splitlines()
    assert [line.split(":")[0] for line in told if line.startswith("--")] == [
        "--name A_b",
        "--model a/b/c",
        "--format chad",
        "--instance p5.48xlarge",
        "--nodes 0",
    ]
    assert len(told) == 5  # rules that span keys are checked once the instance is valid
    done = genvalues("init", "--image", "llama-lora", "--dataset", "rows.tsv")
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["--dataset rows.tsv", "--image llama-lora"]
    assert not list(Path().iterdir())


@pytest.mark.parametrize("force", [False, True])
def test_an_existing_file_is_overwritten_only_with_force(force: bool) -> None:
    Path("finetune.yaml").write_text("mine: 1\n")
    done = genvalues("init", *(["--force"] if force else []))
    assert done.returncode == (0 if force else 2)
    if not force:
        assert done.stderr.startswith("finetune.yaml: ") and "--force" in done.stderr
    assert (Path("finetune.yaml").read_text() == "mine: 1\n") is not force


def test_a_path_that_cannot_be_written_is_reported_in_one_line() -> None:
    Path("file").touch()
    for place, said in [
        (".", "is a directory"),
        ("no/such/f.yaml", "no/such/f.yaml: cannot be written: no such folder: no/such."),
        ("file/f.yaml", "cannot be written: "),
        ("/dev/null", "/dev/null: "),
    ]:
        done = genvalues("init", place, "--force" if place != "/dev/null" else "--yes")
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert said in line
    assert [path.name for path in Path().iterdir()] == ["file"]


def test_links_and_modes_are_kept_and_a_read_only_file_is_refused_even_with_force() -> None:
    Path("real.yaml").write_text("mine: 1\n")
    Path("real.yaml").chmod(0o640)
    Path("finetune.yaml").symlink_to("real.yaml")
    assert genvalues("init", "--force").returncode == 0
    assert Path("finetune.yaml").is_symlink() and Path("real.yaml").read_text() != "mine: 1\n"
    assert Path("real.yaml").stat().st_mode & 0o777 == 0o640
    Path("real.yaml").chmod(0o444)
    done = genvalues("init", "--force", "--model", "bad model")
    assert done.returncode == 2
    assert done.stderr.startswith("finetune.yaml: cannot be written: the existing file is read-only (mode 444).")
    Path("loop").symlink_to("loop")
    done = genvalues("init", "loop")
    assert (done.returncode, Path("loop").is_symlink()) == (2, True), done.stderr


def on_a_terminal(answers: str, *arguments: str) -> tuple[int, str]:
    """Answer the prompts; return the status and what the terminal showed."""
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # whoever started the tests may have ignored it
        os.execv(sys.executable, [sys.executable, "-m", "genvalues.cli", "init", *arguments])
    shown = b""
    asked = not answers
    while True:
        if not asked and b"]:" in shown:  # the first prompt: the command is ready for a signal
            time.sleep(0.5)  # CPython misses a signal between printing a prompt and reading
            os.write(terminal, answers.encode())
            asked = True
        assert select.select([terminal], [], [], 30)[0], f"nothing more for 30 s after: {shown.decode()}"
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # the child closed its side
            break
        if not piece:
            break
        shown += piece
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), shown.decode()


def test_on_a_terminal_it_prompts_for_options_that_are_not_given() -> None:
    status, shown = on_a_terminal("a/b\nchat\ntrn1.32xlarge\n2\nme/llama-lora:1\nmine\n", "--model", "c/d")
    assert status == 0, shown
    assert "Model" not in shown and "Dataset" in shown
    inputs = yaml.safe_load(Path("finetune.yaml").read_text())
    assert (inputs["model"], inputs["dataset"]) == ("c/d", {"source": "a/b", "format": "chat"})
    assert (inputs["nodes"], inputs["image"], inputs["name"]) == (2, "me/llama-lora:1", "mine")


def test_an_invalid_answer_is_reported_at_once_and_prompted_for_again() -> None:
    wrong = "bad model\nc/d\nrows.tsv\na/b\nchad\nchat\np5\ntrn1.32xlarge\n"
    wrong += "0\ntwo\n2\nllama-lora\nme/llama-lora:1\nA_b\nmine\n"
    status, shown = on_a_terminal(wrong)
    assert status == 0, shown
    assert shown.count("Model (") == shown.count("Instance type") == shown.count("Name of the run [") == 2
    assert shown.count("Nodes [") == 3
    first, _, rest = shown.partition("Dataset (")
    assert "Error: " in first and '"bad model"' in first, "before the next question"
    assert "--model" not in shown
    assert "Error: " in rest and "rows.tsv" in rest
    inputs = yaml.safe_load(Path("finetune.yaml").read_text())
    assert (inputs["model"], inputs["dataset"]) == ("c/d", {"source": "a/b", "format": "chat"})
    assert (inputs["nodes"], inputs["image"], inputs["name"]) == (2, "me/llama-lora:1", "mine")


def test_answers_that_conflict_are_prompted_for_again_and_the_others_kept() -> None:
    Path("rows.jsonl").write_text("{}\n")
    status, shown = on_a_terminal("c/d\nrows.jsonl\nchat\ntrn1.32xlarge\n1\nme/a:1\nmine\na/b\n")
    assert status == 0, shown
    assert "--dataset rows.jsonl: " in shown
    assert (shown.count("Model ("), shown.count("Dataset (")) == (1, 2)
    assert yaml.safe_load(Path("finetune.yaml").read_text())["dataset"] == {"source": "a/b", "format": "chat"}


def test_an_existing_file_and_an_invalid_option_are_reported_before_any_prompt() -> None:
    status, shown = on_a_terminal("", "--model", "bad model")
    assert status == 2 and "--model bad model: " in shown and "Dataset" not in shown
    Path("finetune.yaml").touch()
    status, shown = on_a_terminal("")
    assert status == 2 and "finetune.yaml: " in shown and "--force" in shown
    assert "Model" not in shown


def test_on_the_cpu_it_prompts_for_neither_nodes_nor_image_and_with_yes_for_nothing() -> None:
    status, shown = on_a_terminal("c/d\na/b\ntext\ncpu\nmine\n")
    assert status == 0, shown
    assert "Nodes" not in shown and "Image" not in shown
    status, shown = on_a_terminal("", "other.yaml", "--yes")
    assert status == 0 and "Model" not in shown


def test_ctrl_c_at_a_prompt_ends_with_130_and_writes_nothing() -> None:
    status, shown = on_a_terminal("\x03")
    assert status == 130
    assert "Traceback" not in shown
    assert not list(Path().iterdir())


def test_editors_find_the_schema_from_where_the_file_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from genvalues.inputs.template import Answers, template_text

    assert "\n# yaml-language-server: $schema=inputs.schema.json\n" in template_text(Answers(), Path("finetune.yaml"))
    here = ROOT / "values" / "mine.yaml"
    (line,) = re.findall(r"^# yaml-language-server: \$schema=(.*)$", template_text(Answers(), here), re.M)
    assert line == "../generator/genvalues/settings/inputs.schema.json"
    assert (here.parent / line).resolve() == SCHEMA.resolve()


def test_schema_prints_the_committed_files() -> None:
    inputs, values = genvalues("schema"), genvalues("schema", "--values", "--chart", str(ROOT / "chart"))
    assert (inputs.returncode, inputs.stderr, values.returncode, values.stderr) == (0, "", 0, "")
    assert inputs.stdout == SCHEMA.read_text()
    assert values.stdout == (ROOT / "chart" / "values.schema.json").read_text()
    neither = genvalues("schema", "--chart", "c")
    assert (neither.returncode, neither.stdout) == (2, "")
    assert neither.stderr.startswith("--chart c: ") and "--values" in neither.stderr
    lost = genvalues("schema", "--values", "--chart", "nowhere")
    assert lost.returncode == 2 and lost.stdout == ""


def test_a_reader_that_closes_stdout_is_not_an_internal_error() -> None:
    script = f"{sys.executable} -m genvalues.cli schema | head -c 10 > head; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout in ("0\n", "1\n", "141\n")
    assert Path("head").read_text() == SCHEMA.read_text()[:10]


def test_the_entry_point_is_there() -> None:
    assert callable(cli.main)
