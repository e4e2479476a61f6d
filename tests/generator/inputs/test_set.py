"""--set has Helm's syntax, and means what it means to Helm."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from genvalues.common.helm import find_helm
from genvalues.inputs.document import Document, read

INPUTS = "model: a/b\ndataset: {source: a/b}\ninstance: cpu\nlora: {r: 4, targetModules: [q_proj, k_proj]}\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "f.yaml"
    path.write_text(INPUTS)
    return path


def told(document: Document) -> list[str]:
    return [str(document.error(mistake)) for mistake in document.mistakes]


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("lora.r=8", "lora", {"r": 8, "targetModules": ["q_proj", "k_proj"]}),
        ("lora.r=8,lora.alpha=2", "lora", {"r": 8, "alpha": 2, "targetModules": ["q_proj", "k_proj"]}),
        ("lora.targetModules={v_proj,o_proj}", "lora", {"r": 4, "targetModules": ["v_proj", "o_proj"]}),
        ("lora.targetModules={}", "lora", {"r": 4, "targetModules": []}),
        ("lora.targetModules=[]", "lora", {"r": 4, "targetModules": []}),
        ("lora.targetModules[1]=v_proj", "lora", {"r": 4, "targetModules": ["q_proj", "v_proj"]}),
        ("lora.targetModules[2]=v_proj,nodes=2", "lora", {"r": 4, "targetModules": ["q_proj", "k_proj", "v_proj"]}),
        ("lora=null", "lora", None),
        ("lora.r=null", "lora", {"targetModules": ["q_proj", "k_proj"]}),
        ("chartValues.a[0].b=c", "chartValues", {"a": [{"b": "c"}]}),
        ("chartValues.a[1][0]=1", "chartValues", {"a": [None, [1]]}),
        (r"chartValues.a=x\,y", "chartValues", {"a": "x,y"}),
        (r"chartValues.a={x\,y,z\}}", "chartValues", {"a": ["x,y", "z}"]}),
        (r"chartValues.example\.com/pool=gold", "chartValues", {"example.com/pool": "gold"}),
        (r"chartValues.a\=b=c", "chartValues", {"a=b": "c"}),
        ("chartValues.a=--x=1 --y", "chartValues", {"a": "--x=1 --y"}),
        ("chartValues.a=TRUE,chartValues.b=False", "chartValues", {"a": True, "b": False}),
        ("chartValues.a=007,chartValues.b=0,chartValues.c=-5", "chartValues", {"a": "007", "b": 0, "c": -5}),
        ("chartValues.a=1.10,chartValues.b=yes,chartValues.c=", "chartValues", {"a": "1.10", "b": "yes", "c": ""}),
        ("chartValues.stages=null", "chartValues", {"stages": None}),
        ("training.learningRate=5e-5", "training", {"learningRate": 5e-5}),
        ("training.learningRate=.5,training.epochs=3", "training", {"learningRate": 0.5, "epochs": 3}),
        ("chartValues.training.learningRate=1e-4", "chartValues", {"training": {"learningRate": 1e-4}}),
        ("training.maxSteps=null", "training", {"maxSteps": None}),
        ("dataset.revision=1234567", "dataset", {"source": "a/b", "revision": "1234567"}),
        ("dataset.config=true", "dataset", {"source": "a/b", "config": "true"}),
        ("dataset.split=train[:10%]+test", "dataset", {"source": "a/b", "split": "train[:10%]+test"}),
        ("dataset.source=data/*.jsonl.gz", "dataset", {"source": "data/*.jsonl.gz"}),
        (
            "dataset.additional.more.source=a/c,dataset.additional.more.weight=0.5,dataset.eval.split=test",
            "dataset",
            {"source": "a/b", "additional": {"more": {"source": "a/c", "weight": 0.5}}, "eval": {"split": "test"}},
        ),
        ("dataset=text", "dataset", "text"),
        ("instance.a=b", "instance", {"a": "b"}),
        ("nodes=2,", "nodes", 2),
        (" nodes =2", "nodes", 2),
        ("lora.r=" + "9" * 30, "lora", {"r": int("9" * 30), "targetModules": ["q_proj", "k_proj"]}),
    ],
)
def test_an_assignment_changes_its_key_alone(file: Path, text: str, key: str, value: Any) -> None:
    document = read(file, sets=[text])
    assert told(document) == []
    assert document.value.get(key) == value
    untouched = yaml.safe_load(INPUTS).keys() - {key}
    assert {name: document.value[name] for name in untouched} == {
        name: yaml.safe_load(INPUTS)[name] for name in untouched
    }


def test_set_string_makes_text_and_comes_after_set(file: Path) -> None:
    strings = ["chartValues.a=true,chartValues.b={1,null},chartValues.c=5"]
    document = read(file, sets=["chartValues.a=no,chartValues.d=5"], set_strings=strings)
    assert document.value["chartValues"] == {"a": "true", "b": ["1", "null"], "c": "5", "d": 5}
    assert str(document.position(("chartValues", "c")).label) == "--set-string chartValues.c=5"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "--set : is not of the form key=value. Write --set lora.r=8."),
        ("lora", "--set lora: is not of the form key=value. Write --set lora.r=8."),
        ("=5", "--set =5: is not of the form key=value: a key has no name. Write --set lora.r=8."),
        ("lora..r=5", "--set lora..r=5: is not of the form key=value: a key has no name. Write --set lora.r=8."),
        (
            "dataset.config=a,b",
            "--set b: is not of the form key=value. Write --set lora.r=8. Write \\, for a comma",
        ),
        (
            "lora.targetModules=[q_proj,v_proj]",
            "--set v_proj]: is not of the form key=value. Write --set lora.r=8. Write \\, for a comma",
        ),
        ("a={b", "--set a={b: the list has no closing }. Write {a,b}."),
        (
            "a={b}c",
            "--set a={b}c: unexpected text after the closing }. Write --set lora.r=8. Write",
        ),
        ("a[x]=1", "--set a[x]=1: the text in [ ] is not a valid index. Write a[0] for the first."),
        ("a[-1]=1", "--set a[-1]=1: the text in [ ] is not a valid index. Write a[0] for the first."),
        ("a[1", "--set a[1: the text in [ ] is not a valid index. Write a[0] for the first."),
        ("a[99999]=1", "--set a[99999]=1: the text in [ ] is not a valid index. Write a[0] for the first."),
        ("a[0]b=1", "--set a[0]b=1: a[0] has no value. Write --set lora.r=8. Write \\, for a comma"),
        ("a[0]", "--set a[0]: a[0] has no value. Write --set lora.r=8."),
        (".".join("a" * 60) + "=1", "more than 50 levels deep"),
        (f"lora.r={'9' * 5000}", "a number of 5000 digits is too large. Write a number such as 16 or 5e-5."),
        ("training.epochs=1e999", "--set training.epochs=1e999: 1e999 is not a finite number. Write a number such as"),
        ("dataset.config=\udcff", "--set dataset.config=?: not UTF-8 text. Write"),
    ],
)
def test_what_is_no_assignment_is_told_in_a_line(file: Path, text: str, said: str) -> None:
    (line,) = told(read(file, sets=[text]))
    assert said in line
    assert "\n" not in line


def test_every_assignment_that_is_wrong_is_told_by_itself(file: Path) -> None:
    document = read(file, sets=["lora.r=x,nodes=5,a={", "b"], set_strings=["c"])
    assert told(document)[0] == "--set a={: the list has no closing }. Write {a,b}."
    assert [line.split(":")[0] for line in told(document)] == ["--set a={", "--set b", "--set-string c"]
    assert document.position(("lora", "r")).label == "--set lora.r=x"
    assert document.position(("nodes",)).label == "--set nodes=5"


@pytest.mark.parametrize(
    "text",
    [
        "chartValues.stageDefaults.extraEnv.WANDB_API_KEY=QwEr,TyUiOp",
        "chartValues.stageDefaults.extraEnv.WANDB_API_KEY={QwEr,TyUiOp",
        "huggingFace.tokenSecret=QwEr,TyUiOp",
        "huggingFace.tokenSecret[QwEr]=1",
        "huggingFace=QwEr,TyUiOp",
    ],
)
def test_what_may_be_a_secret_is_not_repeated_in_pieces_either(file: Path, text: str) -> None:
    document = read(file, sets=[text])
    labels = [position.label for position in document.positions.values()]
    for line in [*told(document), *labels]:
        assert "QwEr" not in line and "TyUi" not in line


# --- beside Helm itself, on a chart that shows its values

SHOWS_VALUES = {
    "Chart.yaml": "apiVersion: v2\nname: shows\nversion: 0.1.0\n",
    "values.yaml": "{}\n",
    "templates/shown.yaml": 'shown: {{ toJson (omit .Values "global") | quote }}\n',
}
WORD = st.from_regex(r"\A[a-z]{1,3}(\\\.[a-z])?\Z")
INDEX = st.sampled_from(["", "", "", "[0]", "[1]"])
VALUE = st.sampled_from(
    [
        "1",
        "0",
        "-3",
        "+4",
        "007",
        "1.5",
        "true",
        "True",
        "false",
        "x",
        "x y",
        r"a\,b",
        "a=b",
        "",
        "{a,b}",
        "{1,true}",
        "1e3",
    ]
)
# Each its own first key: what Helm does where two assignments want a key to be two things (it panics) is not ours.
ASSIGNMENTS = st.lists(st.tuples(st.lists(WORD, max_size=2), INDEX, VALUE), min_size=1, max_size=4).map(
    lambda parts: ",".join(
        f"k{number}{'.' if names else ''}{'.'.join(names)}{index}={value}"
        for number, (names, index, value) in enumerate(parts)
    )
)


@given(text=ASSIGNMENTS)
def test_helm_reads_an_assignment_alike(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    folder = tmp_path_factory.mktemp("shows")
    for name, content in SHOWS_VALUES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    (folder / "f.yaml").write_text("{}\n")
    command = [find_helm(), "template", "x", str(folder), "--set", text]
    rendered = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    document = read(folder / "f.yaml", sets=[text])
    assert told(document) == []
    assert document.value == json.loads(yaml.safe_load(rendered)["shown"])
