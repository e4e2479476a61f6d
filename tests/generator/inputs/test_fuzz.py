"""Spoilt inputs files, 200 or (make test-all) 10,000: never a traceback or half an output, and status 2 for a mistake.

Each case is made of its number alone: ``spoilt(4711)`` is the same file on every machine.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from generator.inputs.messages import ENDS_WITH_A_FIX
from genvalues import cli
from genvalues.inputs import chart
from genvalues.inputs.generated_file import is_as_written
from genvalues.inputs.template import Answers, template_text

ROOT = Path(__file__).parents[3]
ON_CPU = """\
model: {path: ./models/llama}
dataset: {source: data/rows.jsonl, columns: {output: answer}}
instance: cpu
nodes: 2
cpu: {processes: 2}
storage: {kind: generic, size: 1Ti, storageClass: ""}
chartValues: {stages: {train: {extraEnv: {OMP_NUM_THREADS: 4}}}}
"""
REAL = [
    *(path.read_bytes() for path in sorted((ROOT / "values").glob("*.yaml")) if ".values." not in path.name),
    (ROOT / "tests" / "demo" / "finetune.yaml").read_bytes(),
    template_text(Answers(image="a/b:1"), Path("finetune.yaml")).encode(),
    ON_CPU.encode(),
]
OVERLAYS = [
    b"",
    b"{}\n",
    b"lora: {r: 8, targetModules: all-linear}\ntraining: {maxSteps: 10}\n",
    b"instance: cpu\nhuggingFace: null\nlora:\n",
]
SETS = [
    "lora.r=8",
    "training.learningRate=5e-5,nodes=1",
    "lora.targetModules={q_proj,v_proj}",
    "a[0].b=c",
    r"a\.b=x\,y",
]
WORDS = (  # noqa: SIM905
    "null ~ yes on off true 0 -1 1e999 .nan .inf -.inf 0x1F 0o17 007 1_000 1:30 2024-01-01 [] {} [[]] {a: {}} & * ! | "
    "> &a *a !!int !!binary !!python/object/apply:os.system <<: --- ... %YAML ? : - # , ' \" ` @ ${HOME} {{.Values}} "
    "hf_abcdefgh ml.trn2.48xlarge cpu s3://b/k.csv ../../etc/passwd /workspace/x x: q_proj all-linear 1200Gi é 漢 😀"
).split()
BYTES = [
    b"\0",
    b"\t",
    b"\r",
    b"\x85",
    b"\xff",
    b"\xfe\xff",
    b"\xef\xbb\xbf",
    b"\xc3",
    b"\xed\xa0\x80",
    b"\x7f",
    b"\\",
    b"\n\n",
]
TOKEN = re.compile(rb"[A-Za-z0-9_.@/-]+")


@dataclass(frozen=True)
class Case:
    """What a command gets."""

    file: bytes
    overlay: bytes | None
    sets: tuple[str, ...]

    @property
    def arguments(self) -> list[str]:
        overlay = ["-f", "overlay.yaml"] if self.overlay is not None else []
        return ["write", "f.yaml", *overlay, *(word for text in self.sets for word in ("--set", text))]


def spoilt(number: int) -> Case:
    """The case of that number: a real inputs file with one to four things wrong, perhaps overlay and --set too."""
    draw = random.Random(number)
    file = draw.choice(REAL)
    for _ in range(draw.randint(1, 4)):
        file = draw.choice([spoil_bytes, spoil_token, spoil_token, spoil_lines, spoil_structure, spoil_structure])(
            file, draw
        )
    overlay = draw.choice(OVERLAYS) if draw.random() < 0.2 else None
    if overlay and draw.random() < 0.5:
        overlay = draw.choice([spoil_bytes, spoil_token, spoil_structure])(overlay, draw)
    sets: tuple[str, ...] = ()
    if draw.random() < 0.2:
        text = spoil_bytes(draw.choice(SETS).encode(), draw) if draw.random() < 0.7 else draw.choice(SETS).encode()
        sets = (text.replace(b"\0", b"").decode("utf-8", errors="surrogateescape"),)  # as Python has arguments
    return Case(file, overlay, sets)


def spoil_bytes(text: bytes, draw: random.Random) -> bytes:
    at, length = draw.randint(0, len(text)), draw.randint(0, 12)
    what = draw.choice([b"", draw.choice(BYTES), draw.randbytes(draw.randint(1, 4)), text[at : at + length] * 2])
    return text[:at] + what + text[at + draw.choice([0, length]) :]


def spoil_token(text: bytes, draw: random.Random) -> bytes:
    tokens = list(TOKEN.finditer(text))
    if not tokens:
        return text
    token = draw.choice(tokens)
    other = draw.choice(
        [draw.choice(WORDS).encode(), draw.choice(tokens)[0], token[0][:-1], token[0] * 2, token[0].upper()]
    )
    return text[: token.start()] + other + text[token.end() :]


def spoil_lines(text: bytes, draw: random.Random) -> bytes:
    lines = text.splitlines(keepends=True) or [b"\n"]
    at = draw.randrange(len(lines))
    other = draw.choice(draw.choice(REAL).splitlines(keepends=True))
    changed = draw.choice(
        [b"", lines[at] * 2, b" " + lines[at], b"\t" + lines[at], lines[at].lstrip(), other, lines[at].strip()]
    )
    if draw.random() < 0.2:
        draw.shuffle(lines)
    return b"".join([*lines[:at], changed, *lines[at + 1 :]])


def spoil_structure(text: bytes, draw: random.Random) -> bytes:
    """Of what is YAML at all: a key renamed, dropped, moved, or with a value of another kind."""
    try:
        data = yaml.load(text, Loader=chart.LOADER)
    except (yaml.YAMLError, ValueError, TypeError, IndexError):  # of PyYAML's own reader
        return text
    blocks = list(blocks_in(data))
    if not blocks:
        return text
    block = draw.choice(blocks)
    key = draw.choice(list(block))
    values: list[Any] = [
        None,
        0,
        -1,
        10**30,
        1.5,
        "",
        "x" * 2000,
        [],
        {},
        [block[key]],
        {"a": block[key]},
        True,
        "\ud7ff",
    ]
    change = draw.randrange(4)
    if change == 0:
        block[key] = draw.choice(values)
    elif change == 1:
        block[draw.choice(WORDS)] = block.pop(key)
    elif change == 2:
        draw.choice(blocks)[key] = block.pop(key)
    else:
        del block[key]
    try:
        return yaml.safe_dump(data, allow_unicode=draw.random() < 0.5, sort_keys=False).encode()
    except RecursionError:  # a block was moved into itself
        return text


def blocks_in(value: Any) -> Iterator[dict[Any, Any]]:
    if isinstance(value, dict) and value:
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from blocks_in(inner)


def put(case: Case, folder: Path) -> None:
    (folder / "f.yaml").write_bytes(case.file)
    (folder / "overlay.yaml").write_bytes(case.overlay or b"")


def prepared(folder: Path) -> None:
    (folder / "models" / "llama").mkdir(parents=True)
    (folder / "data").mkdir()
    (folder / "data" / "rows.jsonl").write_text("{}\n")


def judge(number: int, status: int, out: str, err: str, folder: Path, before: bytes | None) -> None:
    """``before``: what values.yaml was."""
    case = f"spoilt({number}): {err}"
    assert status in (0, 2), case
    assert out == "", case
    assert "Traceback" not in err and "internal error" not in err, case
    assert err.endswith("\n") and len(err) > 10, case
    if status == 2:
        assert all(re.search(ENDS_WITH_A_FIX, line) for line in err.splitlines()), case
    there = {path.name for path in folder.iterdir()} - {"f.yaml", "overlay.yaml", "models", "data"}
    assert there <= {"values.yaml"}, case
    values = folder / "values.yaml"
    after = values.read_bytes() if values.exists() else None
    if status == 0:
        assert after is not None and is_as_written(after.decode()), case
        assert yaml.load(after, Loader=chart.LOADER)["instance"], case
    else:
        assert after == before, case


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The chart's files, which no case changes, are read once."""
    monkeypatch.setattr(chart, "part", functools.cache(chart.part))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("part", range(4))
def test_no_spoilt_file_makes_a_traceback_or_a_half_written_output(
    part: int, fuzz_cases: int, quick: None, tmp_path: Path
) -> None:
    prepared(tmp_path)
    statuses: dict[int, int] = {0: 0, 2: 0}
    before: bytes | None = None
    for number in range(part, fuzz_cases, 4):
        case = spoilt(number)
        put(case, tmp_path)
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = run(case.arguments)
        judge(number, status, out.getvalue(), err.getvalue(), tmp_path, before)
        statuses[status] += 1
        if number % 3 == 0:
            (tmp_path / "values.yaml").unlink(missing_ok=True)
        before = (tmp_path / "values.yaml").read_bytes() if (tmp_path / "values.yaml").exists() else None
    assert min(statuses.values()) > fuzz_cases / 4 / 20, "neither all right nor all wrong"


def run(arguments: list[str]) -> int:
    was = sys.argv
    sys.argv = ["genvalues", *arguments]
    try:
        cli.main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    finally:
        sys.argv = was
    return 0


def test_nor_does_one_through_the_command_as_it_is_installed(fuzz_cases: int, tmp_path: Path) -> None:
    def through_a_process(number: int) -> None:
        folder = tmp_path / str(number)
        prepared(folder)
        case = spoilt(number)
        put(case, folder)
        arguments = [os.fsencode(word) for word in case.arguments]
        command: list[str | bytes] = [sys.executable, "-m", "genvalues.cli", *arguments]
        done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        judge(number, done.returncode, done.stdout.decode(), done.stderr.decode(), folder, None)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(through_a_process, range(fuzz_cases, fuzz_cases + fuzz_cases // 100)))


def test_a_case_is_the_same_every_time() -> None:
    assert [spoilt(number) for number in range(50)] == [spoilt(number) for number in range(50)]
    assert len({spoilt(number).file for number in range(200)}) > 190
