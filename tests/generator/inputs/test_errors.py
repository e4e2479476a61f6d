"""What a user who made mistakes is told."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from generator.inputs.messages import ENDS_WITH_A_FIX, assert_told, tells
from genvalues import cli
from genvalues.common.dicts import merge
from genvalues.settings.schemas import inputs_schema

RIGHT = """\
name: llama-lora
model: meta-llama/Meta-Llama-3.1-8B
dataset:
  source: databricks/databricks-dolly-15k
  format: instruction
  columns: {instruction: instruction, input: context, output: response}
  evalFraction: 0.02
instance: ml.trn1.32xlarge
nodes: 1
lora: {r: 16, alpha: 16, dropout: 0.05, targetModules: [q_proj, v_proj]}
training:
  maxSequenceLength: 2048
  packing: true
  learningRate: 5e-5
  maxSteps: null
evaluation: {maxRows: 256, samples: 4, maxNewTokens: 128}
storage: {kind: fsx, size: 1200Gi, storageClass: fsx-sc}
huggingFace: {tokenSecret: hf-token, tokenKey: token}
image: 111122223333.dkr.ecr.us-west-2.amazonaws.com/llama-lora:0.1.0
mode: detached
chartValues: {kueue: {queueName: trainium}}
"""

MANY_MISTAKES = """\
name: Llama_LoRA
modle: meta-llama/Meta-Llama-3.1-8B
dataset:
  source: ./data.jsonl
  format: text
  columns: {prompt: question}
  evalFraction: 1
instance: ml.trn1.32xlarge
nodes: two
cpu: {processes: 2}
lora:
  rank: 16
  alpha: 16
  alpha: 32
  dropout: 1.5
  targetModules: [gate_proj, k, v_proj, v_proj]
training:
  learning_rate: 5e-5
  packing: on
  learningRate: .nan
  epochs: 0
  lrScheduler: linearr
epochs: 3
storage: {kind: fsx, size: 1300Gi}
huggingFace: {tokenSecret: hf_abcdefghijklmnopqrstuvwxyz}
image: llama-lora:latest
"""

SCHEMA_NOW = inputs_schema()
TOP = f"(keys: {', '.join(SCHEMA_NOW['properties'])})"
WHAT_IS_SAID = f"""\
finetune.yaml:1:1 name: "Llama_LoRA" ... a-z, 0-9 and hyphens
finetune.yaml:1:1 model: missing ... id@revision
finetune.yaml:2:1 modle: unknown key. Did you mean model? {TOP}
finetune.yaml:4:3 dataset.source: ./data.jsonl ... ml.trn1.32xlarge ... s3:// ... /workspace
finetune.yaml:6:13 dataset.columns.prompt: format text ... (columns: text)
finetune.yaml:7:3 dataset.evalFraction: must be less than 1, not 1
finetune.yaml:9:1 nodes: must be an integer or null, not "two"
finetune.yaml:10:1 cpu: ... instance: cpu ... ml.trn1.32xlarge. Remove it.
finetune.yaml:12:3 lora.rank: unknown key. Did you mean lora.r? (keys: r, alpha, dropout, targetModules)
finetune.yaml:14:3 lora.alpha: duplicate key ... line 13
finetune.yaml:15:3 lora.dropout: must be less than 1, not 1.5
finetune.yaml:16:3 lora.targetModules: duplicate ... v_proj
finetune.yaml:16:3 lora.targetModules: gate_proj ... up_proj ... Add up_proj or remove gate_proj
finetune.yaml:16:30 lora.targetModules[1]: "k" is not allowed. Did you mean k_proj? ... q_proj, k_proj, v_proj, o_proj
finetune.yaml:18:3 training.learning_rate: unknown key. Did you mean training.learningRate? (keys: maxSequenceLength
finetune.yaml:19:3 training.packing: must be true or false, not "on"
finetune.yaml:20:17 training.learningRate: .nan is not a finite number ... 5e-5
finetune.yaml:21:3 training.epochs: must be more than 0, not 0
finetune.yaml:22:3 training.lrScheduler: "linearr" is not allowed. Did you mean linear? ... linear, cosine, constant
finetune.yaml:23:1 epochs: unknown key. Did you mean training.epochs? {TOP}
finetune.yaml:24:22 storage.size: ... 1300Gi ... 2400Gi
finetune.yaml:25:15 huggingFace.tokenSecret: is not a valid Kubernetes name ... Never write the token
finetune.yaml:26:1 image: ... latest ... digest
--set training.maxSteps=x: must be an integer or null, not "x"
--set lora.foo: ... key=value ... --set lora.r=8
"""


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def genvalues(*arguments: str) -> int:
    """The command's status; anything but an exit is a traceback, and fails the test."""
    before = sys.argv
    sys.argv = ["genvalues", *arguments]
    try:
        cli.main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    finally:
        sys.argv = before
    return 0


def test_every_mistake_is_told_at_once_with_place_and_fix(capsys: pytest.CaptureFixture[str]) -> None:
    Path("finetune.yaml").write_text(MANY_MISTAKES)
    status = genvalues("write", "finetune.yaml", "--set", "training.maxSteps=x", "--set", "lora.foo")
    assert status == 2
    assert_told(capsys.readouterr().err, WHAT_IS_SAID)
    assert not Path("values.yaml").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "f.yaml: the file is empty. Write at least model, dataset and instance."),
        (b"# nothing\n", "f.yaml: the file is empty. Write at least model, dataset and instance."),
        (b"- a\n- b\n", "f.yaml:1:1: the file must be a mapping, not a list. Write lines of the form key: value."),
        (b"word", "f.yaml:1:1: the file must be a mapping, not a single value. Write lines of the form key: value."),
        (b"a:\n\tb: 1\n", "f.yaml:2:1: a tab, which YAML does not allow for indentation. Write spaces instead."),
        (b"a:\t1\n", "f.yaml:1:3: a tab, which YAML does not allow for indentation. Write spaces instead."),
        (b"---\n", "f.yaml: the file is empty. Write at least model, dataset and instance."),
        (b"a: [1, 2\nb: 3\n", "f.yaml:2:2: not valid YAML: while parsing a flow sequence, expected ',' or ']'"),
        (b"a: caf\xe9\n", "f.yaml:1:7: not UTF-8 text. Save the file as UTF-8."),
        (b"a: 1\n---\nb: 1\n", "f.yaml:2:1: not valid YAML: a second document starts here. Remove"),
        (
            b"a: 1\nb: 'x\nc: 1\n\n\n",
            "f.yaml:2:4: not valid YAML: while scanning a quoted scalar, found unexpected end",
        ),
        (b"a: 1\nb: {x: 1\n\n\n", "f.yaml:2:4: not valid YAML: while parsing a flow mapping, expected ',' or '}'"),
        (
            b"a: 1\nb = 2\nc: 1\n",
            "f.yaml:2:1: not valid YAML: while scanning a simple key, could not find expected ':'",
        ),
        (b"a:\n   b: 1\n  c: 1\n", "f.yaml:3:3: not valid YAML: while parsing a block mapping, expected <block end>"),
        (b'a: 1\nb: "x\\U00110000"\n', "f.yaml:2:6: not valid YAML: an escape is not a valid character"),
        (b"a: \x07\n", "f.yaml:1:4: the character U+0007 is not allowed in YAML. Remove it."),
        (b'a: "\\UFFFFFFFF"\n', "f.yaml:1:5: not valid YAML: an escape is not a valid character"),
        (b"a: " + b"[" * 20000 + b"]" * 20000, "f.yaml:1:53: more than 50 levels deep"),
        (b"a: 1\n" * 100000, "f.yaml: larger than 256 KiB. An inputs file is smaller"),
        (b"#" * 10_000_000, "f.yaml: larger than 256 KiB. An inputs file is smaller"),
        (b"model: a/b\0", "f.yaml:1:11: the character U+0000 is not allowed in YAML. Remove it."),
        (RIGHT.encode("utf-16"), "f.yaml:1:1: not UTF-8 text. Save the file as UTF-8."),
        (RIGHT.encode() + b"d\xe9: x\n", "f.yaml:22:2: not UTF-8 text. Save the file as UTF-8."),
        (b"%YAML 3.0\n---\na: 1\n", "f.yaml:1:1: not valid YAML: found incompatible YAML document (version 1.* is re"),
    ],
)
def test_a_file_that_is_no_inputs_file_gets_one_clear_line(
    content: bytes, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("f.yaml").write_bytes(content)
    assert genvalues("check", "f.yaml") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert tells(line, said)
    assert re.search(ENDS_WITH_A_FIX, line), line


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("lora: {r: 1e400}", "f.yaml:22:11 lora.r: 1e400 is not a finite number. Write a number such as 16 or 5e-5."),
        ("lora: {r: .inf}", "f.yaml:22:11 lora.r: .inf is not a finite number. Write a number such as 16 or 5e-5."),
        (
            f"lora: {{r: {'9' * 5000}}}",
            "f.yaml:22:11 lora.r: a number of 5000 digits is too large. Write a number such as 16 or 5e-5.",
        ),
        ("lora: {r: 2024-01-01}", 'f.yaml:22:8 lora.r: must be an integer, not "2024-01-01". (Rank'),
        (
            'lora: {r: "\\ud800"}',
            "f.yaml:22:11 lora.r: contains a lone surrogate. Remove the escape.",
        ),
        ("lora: {r: !!set {1}}", "f.yaml:22:11 lora.r: the tag !!set is not supported. Remove it."),
        (
            "lora: {<<: {r: 8}}",
            "f.yaml:22:8 lora: the merge key << is not supported. Write out the keys it stands for.",
        ),
        ("lora: {r: &x 8}", "f.yaml:22:11 lora.r: the anchor &x is not supported. Remove &x."),
        ("lora: {r: *x}", "f.yaml:22:11 lora.r: the alias *x is not supported. Write the value"),
        ("lora: {&x r: 8}", "f.yaml:22:8 lora.r: the anchor &x is not supported. Remove &x."),
        ("lora: {*x : 8}", "f.yaml:22:8 lora: the alias *x is not supported. Write the value"),
        ("lora: &x", "f.yaml:22:7 lora: the anchor &x is not supported. Remove &x."),
        ("lora: {r: yes}", 'f.yaml:22:8 lora.r: must be an integer, not "yes". (Rank'),
        ("lora: {r: 1_000}", 'f.yaml:22:8 lora.r: must be an integer, not "1_000". (Rank'),
        ("lora: {r: 1:30}", 'f.yaml:22:8 lora.r: must be an integer, not "1:30". (Rank'),
        ("lora: {1: 2}", "f.yaml:22:8 lora: a key must be a string, not 1. Write key: value, the key a name."),
        (
            "lora:",
            "f.yaml:22:1 lora: must be a mapping, not null. ... keys: r, alpha, dropout, targetModules)",
        ),
    ],
)
def test_a_value_that_yaml_makes_strange_is_told_in_its_place(
    line: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("f.yaml").write_text(
        "\n".join(kept for kept in [*RIGHT.splitlines(), "", line] if not kept.startswith("lora: {r: 16"))
    )
    assert genvalues("check", "f.yaml") == 2
    assert any(tells(line, said) for line in capsys.readouterr().err.splitlines())


ANCHORS = """\
name: &x foo
model: &m
  path: *x
dataset: &d {source: &s a/b, <<: *m, format: &x texts}
instance: *undefined
lora: &l {targetModules: [&q q_proj, *q, *q], rank: *r}
training: !!map &t {epochs: &e zero}
nodes: &n two
"""


def test_anchors_and_aliases_are_told_each_in_its_place_and_hide_no_other_mistake(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("f.yaml").write_text(ANCHORS)
    assert genvalues("check", "f.yaml") == 2
    assert [": ".join(line.split(". ")[0].split(": ")[:2]) for line in capsys.readouterr().err.splitlines()] == [
        "f.yaml:1:7 name: the anchor &x is not supported",
        "f.yaml:2:8 model: the anchor &m is not supported",
        "f.yaml:3:9 model.path: the alias *x is not supported",
        "f.yaml:4:10 dataset: the anchor &d is not supported",
        "f.yaml:4:22 dataset.source: the anchor &s is not supported",
        "f.yaml:4:30 dataset: the merge key << is not supported",
        'f.yaml:4:38 dataset.format: "texts" is not allowed',
        "f.yaml:4:46 dataset.format: the anchor &x is not supported",
        "f.yaml:5:11 instance: the alias *undefined is not supported",
        "f.yaml:6:7 lora: the anchor &l is not supported",
        "f.yaml:6:27 lora.targetModules[0]: the anchor &q is not supported",
        "f.yaml:6:38 lora.targetModules[1]: the alias *q is not supported",
        "f.yaml:6:42 lora.targetModules[2]: the alias *q is not supported",
        "f.yaml:6:47 lora.rank: unknown key",
        "f.yaml:6:53 lora.rank: the alias *r is not supported",
        "f.yaml:7:11 training: the anchor &t is not supported",
        'f.yaml:7:21 training.epochs: must be a number, not "zero"',
        "f.yaml:7:29 training.epochs: the anchor &e is not supported",
        'f.yaml:8:1 nodes: must be an integer or null, not "two"',
        "f.yaml:8:8 nodes: the anchor &n is not supported",
    ]


def test_a_file_of_aliases_of_aliases_is_not_followed(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [f"l{number}: &l{number} [{', '.join([f'*l{number - 1}'] * 9)}]" for number in range(1, 60)]
    Path("f.yaml").write_text("\n".join([RIGHT, *lines]))
    started = time.monotonic()
    assert genvalues("check", "f.yaml") == 2
    assert time.monotonic() - started < 10
    assert "f.yaml:23:10 l1[0]: the alias *l0 is not supported. " in capsys.readouterr().err


def test_a_mistake_in_a_set_is_told_beside_a_file_that_cannot_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty.yaml").write_text("")
    Path("syntax.yaml").write_text("a: [\n")
    Path("latin.yaml").write_bytes(b"a: caf\xe9\n")
    sets = ("--set-string", "x", "--set", "lora", "--set", "lora.rank=3,lora.r=x", "--set", "lora.r=1e999")
    for name, where in (
        *[("absent.yaml", ""), (".", ""), ("empty.yaml", ""), ("syntax.yaml", ":2:1")],
        *[("latin.yaml", ":1:7")],
    ):
        assert genvalues("check", name, *sets) == 2
        assert [line.split(": ")[0] for line in capsys.readouterr().err.splitlines()] == [
            name + where,
            "--set lora",
            "--set lora.rank=3",
            "--set lora.r=1e999",
            "--set-string x",
        ]
    assert genvalues("check", "absent.yaml", "-f", "syntax.yaml", *sets[:2]) == 2
    assert [line.split(": ")[0] for line in capsys.readouterr().err.splitlines()] == [
        *("absent.yaml", "syntax.yaml:2:1", "--set-string x"),
    ]


def test_a_byte_order_mark_and_windows_line_ends_are_no_mistake_and_move_no_place(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("f.yaml").write_bytes(b"\xef\xbb\xbf" + RIGHT.replace("\n", "\r\n").encode())
    assert genvalues("check", "f.yaml") == 0
    Path("f.yaml").write_bytes(b"\xef\xbb\xbf" + RIGHT.replace("name", "nome").replace("\n", "\r\n").encode())
    capsys.readouterr()
    assert genvalues("check", "f.yaml") == 2
    assert capsys.readouterr().err.startswith("f.yaml:1:1 nome: unknown key. Did you mean name? ")


@pytest.mark.parametrize("line", ["a: 1", "{number}: 1", "k{number}: 1", "k{number}: .nan", "? [{number}]"])
def test_a_file_of_mistakes_is_told_in_time_and_not_without_end(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("f.yaml").write_text("".join(f"{line.replace('{number}', str(number))}\n" for number in range(4000)))
    started = time.monotonic()
    assert genvalues("check", "f.yaml") == 2
    assert time.monotonic() - started < 20
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 201
    assert told[-1] == "further errors are not shown. Fix these first."


def test_a_files_name_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a\n\x1b[31mb.yaml").write_text("nodes: 1\n")
    assert (genvalues("check", "a\nb.yaml"), genvalues("check", "a\n\x1b[31mb.yaml")) == (2, 2)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[0] for line in lines] == [
        "a?b.yaml",
        *(f"a??[31mb.yaml:1:1 {key}" for key in ("model", "dataset", "instance")),
    ]


def test_an_outputs_name_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    Path("f.yaml").write_text(RIGHT)
    Path("a\nb").mkdir()
    assert [genvalues("write", "f.yaml", "-o", name) for name in ("no\nfolder/x", "a\nb", "a\nb.yaml")] == [2, 2, 0]
    folder, directory, written = capsys.readouterr().err.splitlines()
    assert folder.startswith("-o no?folder/x: cannot be written: no such folder")
    assert directory == "-o a?b: is a directory. Write -o a?b/values.yaml."
    assert written.endswith("Wrote a?b.yaml.")


def test_a_folder_or_no_file_gets_one_clear_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert (genvalues("check", "."), genvalues("check", "absent.yaml")) == (2, 2)
    assert_told(capsys.readouterr().err, ".: is a directory. ... file\nabsent.yaml: no such file. ... file")


RIGHT_ON_CPU = """\
model: {path: ./models/llama}
dataset: {source: data/rows.jsonl, columns: {output: answer}}
instance: cpu
cpu: {processes: 2}
evaluation: {maxRows: 64}
storage: {kind: generic, size: 1Ti, storageClass: ""}
chartValues: {stages: {train: {extraEnv: {OMP_NUM_THREADS: 4}}}}
"""


def files_for_cpu() -> None:
    Path("models/llama").mkdir(parents=True, exist_ok=True)
    Path("data").mkdir(exist_ok=True)
    Path("data/rows.jsonl").write_text('{"instruction": "a", "answer": "b"}\n')


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('model: {path: "x\\0y"}', 'model.path: "x?y" is not a valid path: a NUL byte'),
        ('model: {path: "/x\\0y"}', 'model.path: "/x?y" is not a valid path: a NUL byte'),
        ('dataset: {source: "a\\0.jsonl"}', 'dataset.source: "a?.jsonl" is not a valid path: a NUL byte'),
        (f"model: {{path: {'x' * 1000}}}", "or a name of more than 255 bytes. Write the path of the file or folder."),
        (f"model: {{path: /a/{'é' * 128}}}", "or a name of more than 255 bytes. Write the path of the file or folder."),
        ("model: {path: loop/x}", "model.path: no such file or folder: "),
        ("dataset: {source: data/rows.jsonl/x.jsonl}", "dataset.source: no such file or folder: "),
    ],
)
def test_what_is_no_path_is_told_in_a_line(line: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    files_for_cpu()
    Path("loop").symlink_to("loop")
    kept = [other for other in RIGHT_ON_CPU.splitlines() if not other.startswith(line.partition(":")[0])]
    Path("f.yaml").write_text("\n".join([*kept, line, ""]))
    assert genvalues("check", "f.yaml") == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert said in told


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            "lora: {targetModules: [up_proj, [gate_proj]]}",
            ["targetModules[1]: a list is not", "up_proj without gate_proj"],
        ),
        (
            "lora: {targetModules: [all-linear, q_proj]}",
            ["lora.targetModules: all-linear is not a list item. Write all-linear without brackets."],
        ),
        ("lora.r: 8", ["mine.yaml:1:1 lora.r: unknown key. Write lora: {r: ...}. (keys: name, "]),
        ("storage.static.dnsName: x", ["unknown key. Write storage: {static: {dnsName: ...}}. (keys: "]),
        ("lora: {id: 8}", ["mine.yaml:1:8 lora.id: unknown key. (keys: r, alpha, "]),
        ("lora.x: 8", ["mine.yaml:1:1 lora.x: unknown key. Did you mean lora? (keys: "]),
        (
            "model: {id: a/b, pth: x}",
            [
                "model.id: unknown key. Write model: ID@REVISION for a model of the Hub",
                "model.pth: unknown key. Did you mean model.path? (keys: path)",
                "model.path: missing. (Folder",
            ],
        ),
        (
            "lora: {targetModules: [3]}",
            ["lora.targetModules[0]: 3 is not allowed. Allowed values: q_proj, k_proj, v_proj,"],
        ),
        (
            f"lora: {{r: 0x{'f' * 90}, alpha: -{'9' * 40}}}",
            [
                "mine.yaml:1:8 lora.r: must be at most 1024, not a number of 109 digits. (Rank",
                "lora.alpha: must be more than 0, not a number of 40 digits. (Scaling",
            ],
        ),
        (
            f"chartValues: {{training: {{seed: {'9' * 300}}}}}",
            [f"chartValues.training.seed: {'9' * 57}... is greater than the maximum of 4294967295. (the schema of "],
        ),
        ("instance: 5", ["mine.yaml:1:1 instance: 5 is not allowed. Allowed values: cpu, trn1.2xlarge,"]),
        ("lora: {r: 0.5}", ["mine.yaml:1:8 lora.r: must be an integer, not 0.5. (Rank"]),
        (
            "dataset: org/rows",
            ['must be a mapping, not "org/rows". (What to train on; keys: source, format, config, rev'],
        ),
        (
            "dataset: {revision: -x}",
            ['revision: "-x" is invalid. (Branch, tag or commit of a Hub'],
        ),
        (
            "storage: {kind: fsx-static, static: {fileSystemId: fs-1}}",
            ["static.dnsName", "such as fs-0123", "static.mountName"],
        ),
    ],
)
def test_one_mistake_is_told_once_with_what_to_write_instead(
    changes: str, said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("f.yaml").write_text(RIGHT)
    Path("mine.yaml").write_text(changes)
    assert genvalues("check", "f.yaml", "-f", "mine.yaml") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(said), lines
    assert all(any(words in line for line in lines) for words in said), lines


def keys_of(block: dict[str, Any], schema: dict[str, Any], above: str = "") -> Iterator[str]:
    """Every key of the inputs, with dots."""
    for branch in [block, *block.get("anyOf", [])]:
        named = schema["$defs"][branch["$ref"].rpartition("/")[2]] if "$ref" in branch else branch
        for name, inner in named.get("properties", {}).items():
            yield f"{above}{name}"
            yield from keys_of(inner, schema, f"{above}{name}.")


@pytest.mark.parametrize(
    "wrong",
    [
        "[[]]",
        '"x\\n"',
        "-1",
        "{}",
        "null",
        *(pytest.param(each, marks=pytest.mark.repeat) for each in ("[]", '"?\\n"', '""', "true")),
    ],
)
def test_whatever_is_wrong_with_a_key_its_line_ends_with_what_to_write(
    wrong: str, capsys: pytest.CaptureFixture[str]
) -> None:
    schema = inputs_schema()
    right, wrong_value = yaml.safe_load(RIGHT), yaml.safe_load(wrong)
    for key in keys_of(schema, schema):
        value = wrong_value
        for part in reversed(key.split(".")):
            value = {part: value}
        Path("f.yaml").write_text(json.dumps(merge(right, value)))
        status = genvalues("check", "f.yaml")
        told = capsys.readouterr().err.splitlines()
        assert told
        for line in told if status else []:
            assert re.search(ENDS_WITH_A_FIX, line), line


TOKEN = "hf_" + "QwErTyUiOpAsDfGhJkLzXcVbNm123456"
ACCESS_KEY = "AK" + "IA" + "QWERTYUIOPASDFGH"
PRIVATE_KEY = "-----BE" + "GIN PRIVATE KEY-----\\nQwErTyUiOp"  # \n: as YAML writes it


@pytest.mark.parametrize(
    "line",
    [
        f"huggingFace: {{tokenSecret: {TOKEN}}}",
        f"huggingFace: {{tokenSecret: hf-token, tokenKey: '{TOKEN} '}}",
        f"huggingFace: {TOKEN}",
        "huggingFace: api_org_QwErTyUiOp",
        f"huggingFace: {{{TOKEN}: 1}}",
        f"token: {TOKEN}",
        f"name: {TOKEN}",
        f"chartValues: {{stages: {{train: {{extraEnv: {{HF_TOKEN: {TOKEN}}}}}}}}}",
        f"name: [{TOKEN}",
        f"name: *{TOKEN}",
        f"--set huggingFace.tokenSecret={TOKEN}",
        "--set huggingFace.tokenSecret=api_org_QwErTyUiOp",
        f"--set name={TOKEN}",
        f"--set {TOKEN}",
        "--set chartValues.stages.train.extraEnv.WANDB_API_KEY=QwErTyUiOp",
        "chartValues: {stageDefaults: {extraEnv: {db_password: QwErTyUiOp}}}",
        f"chartValues: {{stages: {{train: {{extraEnv: {{REGION: {ACCESS_KEY}}}, podLabels: 5}}}}}}",
        f'name: "{PRIVATE_KEY}"',
        f'model: {{path: "{PRIVATE_KEY}\\n-----END PRIVATE KEY-----"}}',
        f'--set dataset.config="{PRIVATE_KEY}"',
        f'chartValues: {{kueue: "{PRIVATE_KEY}"}}',
        f'"{PRIVATE_KEY}": 1',
        "chartValues: {serviceAccount: {annotations: {x: ghp_QwErTyUiOpAsDfGhJkLzXcVbNm123456}}}",
    ],
)
def test_a_pasted_token_is_refused_and_never_printed(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    is_set = line.startswith("--set ")
    key = line.partition(":")[0]
    kept = [other for other in RIGHT.splitlines() if is_set or not other.startswith(f"{key}:")]
    Path("f.yaml").write_text("\n".join([*kept, "" if is_set else line, ""]))
    assert genvalues("write", "f.yaml", *(line.split(" ", 1) if is_set else [])) == 2
    out, err = capsys.readouterr()
    assert err
    assert "qwerty" not in (out + err).lower()
    assert not Path("values.yaml").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"image": None},
            "f.yaml:1:1 image: missing. ml.trn1.32xlarge requires the image that you built, with tag or digest.",
        ),
        ({"image": "repo/llama-lora"}, "has no tag or digest"),
        ({"image": "localhost:5000/llama-lora"}, "has no tag or digest"),
        ({"image": "repo/llama-lora@sha256:..."}, "is not an image reference"),
        ({"instance": "trn1.2xlarge", "nodes": "2"}, "trn1.2xlarge has no EFA and cannot be one of 2 nodes"),
        ({"instance": "p5.48xlarge"}, "not supported: Trainium 1 and 2"),
        ({"model": "{path: ./llama}"}, "./llama is a path on this machine"),
        ({"model": "{path: /home/me/llama}"}, "/home/me/llama is a path on this machine"),
        ({"model": "{path: /workspace/../etc/llama}"}, "is a path on this machine"),
        ({"model": "./llama"}, "is not a Hub id; write {path: ...} for a folder or file"),
        ({"model": "a/b/c"}, "is not a Hub id"),
        ({"model": '"a/b\\n"'}, 'model: "a/b?" is not a Hub id'),
        ({"lora": "{targetModules: q_proj}"}, 'must be a list, not "q_proj". Write [q_proj].'),
        ({"name": '"llama\\n"'}, 'name: "llama?" is invalid'),
        ({"huggingFace": '{tokenSecret: "api-org-token\\n"}'}, "Never write the token itself"),
        ({"storage": "{existingClaim: mine, size: 1200Gi}"}, "storage.size: cannot be combined with existingClaim"),
        ({"storage": "{kind: fsx-static}"}, "fsx-static requires {fileSystemId, dnsName, mountName}"),
        ({"storage": "{size: 100Gi}"}, "Use 1200Gi (1200Gi, 2400Gi or a multiple of 2400Gi)"),
        ({"storage": "{size: 75Ti}"}, "storage.size: FSx for Lustre has no size of 75Ti. Use 76800Gi"),
        ({"storage": "{size: 1228800Mi}"}, "Use 1200Gi"),
        ({"storage": '{storageClass: ""}'}, "storage.storageClass: FSx for Lustre has no default storage class"),
        ({"model": "llama.gguf"}, 'model: "llama.gguf" looks like a file. Write {path:'),
        ({"chartValues": "{stages: {trian: {}}}"}, "chartValues.stages"),
        (
            {"chartValues": '{dataset: {additional: {x: {source: a/b, weight: "-1"}}}}'},
            "chartValues.dataset.additional.x.weight: -1.0 is less than or equal to the minimum of 0",
        ),
        ({"chartValues": "{model: null}"}, "f.yaml:21:15 chartValues.model.id: no model is set"),
    ],
)
def test_rules_that_span_keys(changes: dict[str, str | None], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    kept = [line for line in RIGHT.splitlines() if line.partition(":")[0] not in changes]
    Path("f.yaml").write_text("\n".join([*kept, *(f"{key}: {value}" for key, value in changes.items() if value), ""]))
    assert genvalues("check", "f.yaml") == 2
    assert said in capsys.readouterr().err


def test_a_text_file_has_no_columns_and_a_file_no_revision(capsys: pytest.CaptureFixture[str]) -> None:
    Path("f.yaml").write_text(
        "model: gpt2\ninstance: cpu\n"
        "dataset: {source: /workspace/a.txt, format: chat, revision: main, evalFraction: 0}\n"
        "evaluation: {enabled: true}\n"
    )
    assert genvalues("check", "f.yaml") == 2
    assert capsys.readouterr().err.splitlines() == [
        "f.yaml:3:37 dataset.format: a .txt file has no columns for chat. Write format: text.",
        "f.yaml:3:51 dataset.revision: applies to Hub datasets only, and this is a file. Remove it.",
        "f.yaml:4:14 evaluation.enabled: evaluation is enabled, but no rows are held out. "
        "Raise dataset.evalFraction above 0, or set dataset.eval.",
    ]


def test_a_path_in_a_folder_whose_name_is_not_utf_8_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(os.fsdecode(b"caf\xe9"))
    (folder / "m").mkdir(parents=True)
    (folder / "rows.jsonl").write_text('{"text": "a"}\n')
    (folder / "f.yaml").write_text("model: {path: m}\ninstance: cpu\ndataset: {source: rows.jsonl, format: text}\n")
    assert genvalues("check", str(folder / "f.yaml")) == 2
    assert_told(
        capsys.readouterr().err,
        "caf?/f.yaml:1:9 model.path: ... caf?/m is in a folder whose name is not UTF-8. Rename the folder, or move\n"
        "caf?/f.yaml:3:11 dataset.source: ... caf?/rows.jsonl is in a folder whose name is not UTF-8",
    )


def test_a_saved_dataset_that_the_stages_cannot_open_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a::b").mkdir()
    Path("a::b/state.json").write_text("{}")
    Path("f.yaml").write_text("model: gpt2\ninstance: cpu\ndataset: {source: a::b/}\n")
    assert genvalues("check", "f.yaml") == 2
    assert_told(capsys.readouterr().err, "f.yaml:3:11 dataset.source: its path contains ::, which the library datasets")


def test_a_relative_path_that_is_not_there_is_told_before_anything_runs(capsys: pytest.CaptureFixture[str]) -> None:
    Path("f.yaml").write_text("model: gpt2\ninstance: cpu\ndataset: {source: rows.jsonl}\n")
    assert genvalues("check", "f.yaml") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert tells(line, f"f.yaml:3:11 dataset.source: no such file or folder: {Path.cwd() / 'rows.jsonl'}. Write")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("s3://bucket/rows", "is not data in S3. Write s3://bucket/key of a file, s3://bucket/prefix/ or a glob. "),
        ("s3://bucket/rows.csv.xz", "is not data in S3. "),
        ("s3://bucket/rows?x=.csv", "is not data in S3. "),
        ("s3://bucket", "is not data in S3. "),
        ("rows.csv.bz2", "has an unsupported file format. (supported files: .jsonl .ndjson .json .csv .tsv .parquet"),
        ("rows.parquet.gz", "has an unsupported file format. "),
        ("data/rows.XLSX", "has an unsupported file format. "),
        ("https://example.com/rows", "is a web address, which the stages do not read. "),
    ],
)
def test_a_source_that_the_trainer_does_not_read_is_refused(
    source: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("f.yaml").write_text(f"model: gpt2\ninstance: cpu\ndataset: {{source: '{source}'}}\n")
    assert genvalues("check", "f.yaml") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f'f.yaml:3:11 dataset.source: "{source}" {said}' in line


@pytest.mark.parametrize(
    "source",
    [
        *("squad", "org/set-v1.0", "org/rows.v2", "s3://bucket/a/rows.jsonl", "s3://bucket/a/ROWS.CSV.GZ"),
        *("s3://bucket/a/", "s3://bucket/a/*.jsonl", "/workspace/a.csv", "/workspace/A.NDJSON"),
        *("/workspace/a.tsv.zst", "/workspace/a/", "/workspace/a", "/workspace/a/*.parquet"),
        *("rows.jsonl", "ROWS.JSONL.GZ", "folder", "folder/", "./folder", "org/rows", "folder/*.jsonl", "saved"),
    ],
)
def test_a_source_that_the_trainer_reads_is_right(source: str) -> None:
    for name in ("rows.jsonl", "ROWS.JSONL.GZ", "folder/a.jsonl", "org/rows/a.csv", "saved/state.json"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("{}\n")
    Path("f.yaml").write_text(f"model: gpt2\ninstance: cpu\ndataset: {{source: '{source}'}}\n")
    assert genvalues("check", "f.yaml") == 0


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("rows", "has an unsupported file format. (supported files: "),
        ("empty", "the folder has no data file. "),
        ("empty/*.jsonl", "no file matches "),
        ("none/", "no such file or folder: "),
        ("./none", "no such file or folder: "),
        ("none.tsv.gz", "no such file or folder: "),
        ("/none/at/all", "no such file or folder: "),
        ("hollow", "the file is empty: "),
    ],
)
def test_data_that_is_not_there_is_told(source: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("rows").write_text("x")
    Path("empty").mkdir()
    Path("hollow").mkdir()
    Path("hollow/rows.csv").touch()
    for key, dataset in (
        ("dataset.source", f"source: '{source}'"),
        ("dataset.eval.source", f"source: a/b, eval: {{source: '{source}'}}"),
        ("dataset.additional.x.source", f"source: a/b, additional: {{x: {{source: '{source}'}}}}"),
    ):
        Path("f.yaml").write_text(f"model: gpt2\ninstance: cpu\ndataset: {{{dataset}}}\n")
        assert genvalues("check", "f.yaml") == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f" {key}: " in line and said in line


def test_what_exists_is_a_path_and_never_a_hub_id(capsys: pytest.CaptureFixture[str]) -> None:
    """As the trainer and `datasets` take it; pods of a cluster cannot read it."""
    Path("org/rows").mkdir(parents=True)
    Path("org/rows/a.jsonl").write_text("{}\n")
    Path("f.yaml").write_text(
        "model: gpt2\ninstance: cpu\ndataset: {source: org/rows, eval: {source: org/rows/a.jsonl}}\n"
    )
    assert genvalues("write", "f.yaml") == 0
    dataset = yaml.safe_load(Path("values.yaml").read_text())["dataset"]
    assert (dataset["source"], dataset["eval"]["source"]) == (
        str(Path("org/rows").resolve()),
        str(Path("org/rows/a.jsonl").resolve()),
    )
    capsys.readouterr()
    Path("f.yaml").write_text("model: gpt2\ninstance: trn1.32xlarge\nimage: a:1\ndataset: {source: org/rows}\n")
    assert genvalues("check", "f.yaml") == 2
    assert "dataset.source: org/rows is a path on this machine" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("dataset", "said"),
    [
        ("source: s3://b-b/a.csv, split: 'test[:10%]'", 'dataset.split: "s3://b-b/a.csv" has the split train only'),
        (
            "source: s3://b-b/*.csv, eval: {split: test}",
            'dataset.eval.split: "s3://b-b/*.csv" has the split train only',
        ),
        ("source: s3://b-b/c/, config: en", "dataset.config: applies to Hub datasets only"),
        (
            "source: a/b, eval: {source: s3://b-b/c/, revision: v1}",
            "dataset.eval.revision: applies to Hub datasets only",
        ),
        ("source: a/b, eval: {split: train}", "dataset.eval.split: the held-out rows are those that are trained on"),
        (
            "source: a/b, additional: {x: {source: s3://b}}",
            'dataset.additional.x.source: "b" is not a valid name of a bucket',
        ),
        (
            "source: a/b, additional: {x: {source: a/c, format: chat, columns: {output: o}}}",
            "dataset.additional.x.columns.output: format chat has no such column. (columns: messages, system, tools)",
        ),
        ("source: a/b, columns: {tools: t}", "dataset.columns.tools: format instruction has no such column"),
        (
            "source: a/b, additional: {x: {source: a/c, wieght: 2}}",
            "dataset.additional.x.wieght: unknown key. Did you mean",
        ),
        ("source: a/b, additional: {x: {source: a/c, weight: 0}}", "dataset.additional.x.weight: must be more than 0"),
        ("source: a/b, additional: {../x: {source: a/c}}", 'dataset.additional: "../x" is invalid. (Further sources'),
        ("source: a/b, additional: {x: {split: test}}", "dataset.additional.x.source: missing. (Hub id, or path"),
        ("source: a/b, split: 'train[90%:10%]'", 'dataset.split: "train[90%:10%]" has a part without rows'),
        (
            "source: a/b, eval: {split: 'test+train[:0]'}",
            'dataset.eval.split: "test+train[:0]" has a part without rows',
        ),
        ("source: a/b, split: 'train[-:5]'", 'dataset.split: "train[-:5]" is invalid'),
        ("source: a/b, split: 'train[:10'", 'dataset.split: "train[:10" is invalid'),
        (
            "source: a/b, groupColumn: user, eval: {split: test}",
            "dataset.groupColumn: has no effect: dataset.eval says",
        ),
    ],
)
def test_settings_of_a_dataset_that_make_no_sense_are_told_at_their_key(
    dataset: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("f.yaml").write_text(f"model: gpt2\ninstance: cpu\ndataset: {{{dataset}}}\n")
    assert genvalues("check", "f.yaml") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line and ". " in line


@pytest.mark.parametrize(
    "dataset",
    [
        "source: s3://b-b/a.csv.gz, split: 'train[:90%]', eval: {split: 'train[90%:]'}, evalFraction: 0",
        "source: s3://b-b/c/, eval: {split: test}, columns: {system: s, history: h}",
        "source: wikicorpus, config: raw_en, revision: refs/convert/parquet, format: text",
        "source: a/b, format: chat, columns: {tools: t}, additional: {x: {source: a.txt, format: text, weight: 0.5}}",
        "source: a/b, groupColumn: user, trainOn: last-answer, overlong: drop, maxDropped: 1, onBadRow: skip",
    ],
)
def test_every_setting_of_a_dataset_reaches_the_values(dataset: str) -> None:
    Path("a.txt").write_text("x\n")
    Path("f.yaml").write_text(f"model: gpt2\ninstance: cpu\ndataset: {{{dataset}}}\nevaluation: {{enabled: true}}\n")
    assert genvalues("write", "f.yaml") == 0
    written = yaml.safe_load(f"{{{dataset}}}")
    if "additional" in written:
        written["additional"]["x"]["source"] = str(Path("a.txt").resolve())
    values = yaml.safe_load(Path("values.yaml").read_text())["dataset"]
    assert merge(values, written) == values


def test_the_output_is_never_the_inputs_file_nor_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    Path("f.yaml").write_text(RIGHT)
    assert [genvalues("write", "f.yaml", "-o", place) for place in ("f.yaml", ".", "/proc/values.yaml")] == [2, 2, 2]
    assert Path("f.yaml").read_text() == RIGHT
    assert len(capsys.readouterr().err.splitlines()) == 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lora": "{targetModules: [up_proj, [gate_proj]]}"}, "lora.targetModules[1]: "),
        ({"dataset": "{source: s3://bucket/folder}"}, "dataset.source: "),
        ({"dataset": "{source: rows.csv.gz}"}, "dataset.source: "),
        ({"storage": "{size: 75Ti}"}, "storage.size: "),
        ({"storage": '{kind: fsx, storageClass: ""}'}, "storage.storageClass: "),
        ({"chartValues": "{stages: {train: {extraEnv: {WANDB_API_KEY: abc}}}}"}, "looks like a secret"),
        ({"chartValues": "{parallelism: {dataParallelSize: 3}}"}, "parallelism"),
        ({"chartValues": "{image: {tag: 'v1\n\n'}}"}, "chartValues.image.tag: 'v1\\n' does not match "),
        ({"chartValues": "{model: {path: /workspace/m}}"}, "model.id and model.path are both set"),
        (
            {"dataset": '{source: a/b, columns: {text: "a\\x7f"}}'},
            "dataset.columns.text: contains the character U+007F, ",
        ),
        (
            {"chartValues": '{serviceAccount: {annotations: {a: "\\x9f"}}}'},
            "annotations.a: contains the character U+009F",
        ),
        ({"instance": "trn2.3xlarge", "nodes": "2"}, "trn2.3xlarge has one device; Neuron supports jobs of several"),
    ],
)
def test_what_chart_or_trainer_would_refuse_later_is_told_now_with_a_fix(
    changes: dict[str, str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    right = yaml.safe_load(RIGHT)
    right |= {key: yaml.safe_load(value) for key, value in changes.items()}
    Path("f.yaml").write_text(yaml.safe_dump(right))
    assert genvalues("write", "f.yaml") == 2
    told = capsys.readouterr().err
    assert said in told and all(". " in line for line in told.splitlines()), "no fix"
    assert not Path("values.yaml").exists()


BESIDES = "model: Qwen/Qwen3-1.7B\ndataset: {source: a/b}\ninstance: trn2.48xlarge\n"


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (
            "image: x.com/a\ntraining: {globalBatchSize: 3}\n",
            "f.yaml:4:1 image: has no tag\nf.yaml:5:12 training.globalBatchSize: 3 is not divisible by 64",
        ),
        (
            "image: x.com/a:1\nstorage: {existingClaim: a, sizze: 5}\nparallelism: {shardSize: 8}\n"
            "training: {maxSequenceLength: 131072}\n",
            "f.yaml:5:29 storage.sizze: unknown key\nf.yaml:6:15 parallelism.shardSize: trn2.48xlarge supports\n"
            "f.yaml:7:12 training.maxSequenceLength: 131072 is more than the 40960 positions",
        ),
        (
            "image: x.com/a:1\nnope: 1\npublish: {hub: {adapter: a/b, merged: a/b}}\nkueue: {priorityClass: x}\n"
            "monitoring: {secretName: x}\n",
            "f.yaml:5:1 nope: unknown key\nf.yaml:6:31 publish.hub.merged: ... both a/b\n"
            "f.yaml:7:9 kueue.priorityClass: ... kueue.queueName\nf.yaml:8:14 monitoring.secretName: ... no effect",
        ),
        (
            "image: x.com/a:1\nnope: 1\nhuggingFace: null\npublish: {hub: {adapter: a/b}}\n",
            "f.yaml:5:1 nope: unknown key\nf.yaml:7:17 publish.hub.adapter: ... tokenSecret is required",
        ),
        (
            "image: x.com/a:1\nmonitoring: {wandb: true, secretName: A B}\nnope: 1\n",
            "f.yaml:5:27 monitoring.secretName: ... Kubernetes name\nf.yaml:6:1 nope: unknown key",
        ),
        (  # the plan may follow from what the unknown key stands for
            "image: x.com/a\ntraining: {globalBatchSize: 3, perDevice: 1}\n",
            "f.yaml:4:1 image: has no tag\nf.yaml:5:32 training.perDevice: unknown key",
        ),
    ],
)
def test_no_error_hides_one_of_another_block_or_of_the_plan(
    written: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("f.yaml").write_text(BESIDES + written)
    assert genvalues("check", "f.yaml") == 2
    assert_told(capsys.readouterr().err, expected)
