"""docs/genvalues.md matches the commands' help, and every command and option has help."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from generate_genvalues import REFERENCE, commands, reference, split_help
from genvalues.accelerators.instances import NAMES
from genvalues.cli import genvalues
from genvalues.commands import IN_PODS, MODULES
from genvalues.inputs.check import REQUIRED_COLUMNS as FORMATS

FOUND = {path: command for path, command, _ in commands(genvalues, click.Context(genvalues, info_name="genvalues"))}


def test_the_page_is_up_to_date() -> None:
    assert REFERENCE.read_text(encoding="utf-8") == reference(), "run: make generate"


def test_every_command_has_a_section() -> None:
    assert {path.split()[1] for path in FOUND} == MODULES.keys() >= IN_PODS
    page = REFERENCE.read_text(encoding="utf-8")
    for path in FOUND:
        assert f"\n## {path}\n" in page


@pytest.mark.parametrize("path", FOUND)
def test_a_command_has_a_purpose_and_an_example_of_itself(path: str) -> None:
    text, example = split_help(FOUND[path])
    assert text
    assert f"{path} " in f"{example}\n".replace("\n", " ")


@pytest.mark.parametrize("path", FOUND)
def test_every_option_is_explained(path: str) -> None:
    options = [parameter for parameter in FOUND[path].params if isinstance(parameter, click.Option)]
    assert [option.name for option in options if not option.help] == []


@pytest.mark.parametrize(
    ("shell", "words", "completed"),
    [
        ("bash", "genvalues wri", "plain,write"),
        ("zsh", "genvalues wri", "plain\nwrite"),
        ("fish", "genvalues wri", "plain,write"),
        ("bash", "genvalues write --cha", "plain,--chart"),
    ],
)
def test_shells_complete_commands_and_options(shell: str, words: str, completed: str) -> None:
    program = Path(sys.executable).with_name("genvalues")
    script = run(program, {"_GENVALUES_COMPLETE": f"{shell}_source"})
    assert "_GENVALUES_COMPLETE" in script
    last = words.split()[-1] if shell == "fish" else str(len(words.split()) - 1)
    asked = {"_GENVALUES_COMPLETE": f"{shell}_complete", "COMP_WORDS": words, "COMP_CWORD": last}
    assert run(program, asked).startswith(completed)


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("init --instance ", NAMES),
        ("init --instance ml.trn2", ["ml.trn2.3xlarge", "ml.trn2.48xlarge"]),
        ("init --format ", list(FORMATS)),
        ("init --format ch", ["chat"]),
    ],
)
def test_the_allowed_values_of_options_are_completed(words: str, completed: list[str]) -> None:
    program = Path(sys.executable).with_name("genvalues")
    typed = f"genvalues {words}"
    asked = {"_GENVALUES_COMPLETE": "bash_complete", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    assert run(program, asked).split() == [f"plain,{value}" for value in completed]


def run(program: Path, variables: dict[str, str]) -> str:
    done = subprocess.run([program], env=os.environ | variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
