"""Inputs from several files: laid one over the other, each mistake told where the value that counts was written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from forked import genvalues
from generator.inputs.messages import tells
from genvalues.common.dicts import merge
from genvalues.common.errors import UserError
from genvalues.inputs.document import Document, read
from genvalues.inputs.input_options import Sources
from genvalues.inputs.write import checked, text_of

BASE = """\
name: base
model: meta-llama/Meta-Llama-3.1-8B
dataset:
  source: databricks/databricks-dolly-15k
  columns: {input: context, output: response}
lora: {r: 16, targetModules: [q_proj, v_proj]}
huggingFace: {tokenSecret: mine}
training:
  learningRate: 5e-5
  maxSteps: 10
"""
TRN2 = "instance: trn2.48xlarge\nimage: a/b:1\nlora: {r: 32, targetModules: [o_proj]}\nname: trn2\n"
MINE = "training: {maxSteps: 20}\nname: mine\n"


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def files(**contents: str) -> list[Path]:
    for name, content in contents.items():
        Path(f"{name}.yaml").write_text(content)
    return [Path(f"{name}.yaml") for name in contents]


def values(*paths: Path, sets: tuple[str, ...] = ()) -> dict[str, Any]:
    return checked(Sources(paths, sets)).values


def told(*paths: Path, sets: tuple[str, ...] = ()) -> list[str]:
    with pytest.raises(UserError) as refused:
        checked(Sources(paths, sets))
    return str(refused.value).splitlines()


def test_mappings_are_merged_and_of_lists_and_texts_the_later_wins() -> None:
    found = values(*files(base=BASE, trn2=TRN2, mine=MINE))
    assert found["name"] == "mine"
    assert found["instance"] == "trn2.48xlarge"
    assert (found["lora"]["r"], found["lora"]["targetModules"]) == (32, ["o_proj"])
    assert (found["training"]["learningRate"], found["training"]["maxSteps"]) == (5e-5, 20)
    assert found["dataset"]["columns"] == {"input": "context", "output": "response"}


def test_the_order_of_the_files_is_the_order_of_the_options_and_set_comes_last() -> None:
    files(base=BASE, trn2=TRN2, mine=MINE)
    for overlays, name in ((("trn2", "mine"), "mine"), (("mine", "trn2"), "trn2")):
        options = [word for overlay in overlays for word in ("-f", f"{overlay}.yaml")]
        done = genvalues("write", "base.yaml", *options, "-o", "-")
        assert done.returncode == 0, done.stderr
        assert yaml.safe_load(done.stdout)["name"] == name
        done = genvalues("write", "base.yaml", "--set", "name=set", *options, "-o", "-")
        assert yaml.safe_load(done.stdout)["name"] == "set"


def test_the_values_file_names_every_file_and_set() -> None:
    sources = Sources(tuple(files(base=BASE, trn2=TRN2, mine=MINE)), ("lora.r=8",), None, ("dataset.config=5",))
    lines = text_of(checked(sources), sources).splitlines()
    assert " from base.yaml, trn2.yaml and mine.yaml: edit those and run genvalues write again." in lines[0]
    assert lines[1:3] == ["#   --set lora.r=8", "#   --set-string dataset.config=5"]


def test_every_file_is_called_right() -> None:
    files(base=BASE, trn2=TRN2, mine=MINE)
    said = "No problems found in base.yaml, trn2.yaml and mine.yaml."
    done = genvalues("check", "base.yaml", "-f", "trn2.yaml", "-f", "mine.yaml")
    assert (done.returncode, done.stderr.splitlines()[-1]) == (0, said)
    done = genvalues("write", "base.yaml", "-f", "trn2.yaml", "-f", "mine.yaml")
    assert (done.returncode, done.stderr.splitlines()[-1]) == (0, f"{said} Wrote values.yaml.")


def test_null_takes_a_key_away_so_that_it_has_its_default() -> None:
    found = values(*files(base=BASE, trn2=TRN2, mine="lora: null\ntraining: {maxSteps: null, learningRate:}\nname:\n"))
    assert (found["lora"]["r"], found["lora"]["targetModules"]) == (16, ["q_proj", "v_proj"])
    assert (found["training"]["maxSteps"], found["training"]["learningRate"]) == (None, 5e-5)
    assert found["name"] == "llama-lora"
    by_set = values(*files(base=BASE, trn2=TRN2), sets=("lora=null", "name=null", "training.learningRate=null"))
    assert (by_set["lora"], by_set["name"]) == (found["lora"], "llama-lora")


def test_null_that_is_a_value_of_its_own_stays_one() -> None:
    """huggingFace: null says that no token is needed; below chartValues, null is Helm's."""
    overlay = "huggingFace: null\nchartValues: {kueue: null}\n"
    paths = files(base=BASE + "chartValues: {kueue: {queueName: a}}\n", trn2=TRN2, mine=overlay)
    assert read(*paths).value["chartValues"] == {"kueue": None}
    assert values(*paths)["kueue"] is None
    assert values(*files(base=BASE, trn2=TRN2, mine="huggingFace: null\n"))["huggingFace"]["tokenSecret"] == ""


def test_a_key_that_is_needed_and_taken_away_is_missing_where_that_was_done() -> None:
    paths = files(base=BASE, trn2=TRN2, mine="lora: {r: 8}\nmodel:\n")
    assert told(*paths) == ["mine.yaml:2:1 model: missing. (Hub id, id@revision, or {path: /somewhere})"]


def test_required_keys_may_come_from_any_file_and_a_file_may_be_empty() -> None:
    paths = files(
        nothing="# nothing\n",
        a="model: a/b\n",
        b="instance: cpu\n",
        c="dataset: {source: a/b}\n",
        empty="",
        e="{}\n",
        f="---\n# x\n",
    )
    assert values(*paths)["model"]["id"] == "a/b"
    assert told(paths[0])[0].startswith("nothing.yaml: the file is empty.")
    assert [line.split(": ")[0] for line in told(*paths[:2])] == [
        "nothing.yaml:1:1 dataset",
        "nothing.yaml:1:1 instance",
    ]


def test_each_mistake_is_told_with_the_file_that_it_is_in_all_at_once_by_their_order() -> None:
    paths = files(
        base=BASE.replace("maxSteps: 10", "maxSteps: ten").replace("r: 16", "rank: 16"),
        trn2=TRN2.replace("[o_proj]", "[o_proj, x_proj]"),
        mine="nodes: none\nnonsense: 1\n",
    )
    lines = told(*paths, sets=("evaluation.samples=x", "lora.r=0"))
    assert [line.split(": ")[0] for line in lines] == [
        "base.yaml:6:8 lora.rank",
        "base.yaml:10:3 training.maxSteps",
        "trn2.yaml:3:39 lora.targetModules[1]",
        "mine.yaml:1:1 nodes",
        "mine.yaml:2:1 nonsense",
        "--set evaluation.samples=x",
        "--set lora.r=0",
    ]


@pytest.mark.parametrize(
    "base",
    [
        BASE.replace("maxSteps: 10", "maxSteps: ten"),
        BASE.replace("maxSteps: 10", "maxSteps: .nan"),
        BASE.replace("maxSteps: 10", "maxSteps: !!set {}"),
        BASE.replace("maxSteps: 10", "maxSteps: 1\n  maxSteps: 2"),
        BASE.replace("maxSteps: 10", "maxSteps: {1: 2}"),
    ],
)
def test_a_mistake_in_a_value_that_a_later_file_overrides_is_not_told(base: str) -> None:
    paths = files(base=base, trn2=TRN2, mine=MINE)
    assert values(*paths)["training"]["maxSteps"] == 20
    assert values(*paths[:2], sets=("training.maxSteps=5",))["training"]["maxSteps"] == 5
    (line,) = told(*paths[:2])
    assert line.startswith("base.yaml:1") and " training.maxSteps: " in line


def test_a_mapping_takes_the_place_of_what_is_none_and_the_other_way_round() -> None:
    paths = files(base=BASE.replace("lora: {r: 16, targetModules: [q_proj, v_proj]}", "lora: none"), trn2=TRN2)
    assert values(*paths)["lora"]["r"] == 32
    lines = told(*files(base=BASE, trn2=TRN2, mine="lora: 5\n"))
    assert len(lines) == 1
    assert tells(lines[0], "mine.yaml:1:1 lora: must be a mapping, not 5 ... keys: r, alpha, dropout, targetModules")


def test_a_syntax_error_is_told_of_every_file_that_has_one_whatever_is_overridden() -> None:
    lines = told(*files(base="name: [\n", trn2=TRN2, mine="a: b: c\n"), Path("absent.yaml"))
    assert [line.split(": ")[0] for line in lines] == ["base.yaml:2:1", "mine.yaml:1:5", "absent.yaml"]


def test_what_the_readable_files_have_is_told_beside_the_syntax_errors_of_the_others() -> None:
    paths = files(
        bad="model: {id: a}\nlora: {rank: 16}\ntraining: {maxSteps: ten}\nnodes: 1\n",
        tab="a:\n\t- b\n",
        dup="name: a\nname: b\nevaluation: !!set {}\n",
        latin="",
        last="nodes: 2\n",
    )
    paths[3].write_bytes(b"name: caf\xe9\n")
    lines = told(*paths, sets=("lora.r=x",))
    assert [line.split(": ")[0] for line in lines] == [
        "bad.yaml:1:9 model.id",
        "bad.yaml:2:8 lora.rank",
        "bad.yaml:3:12 training.maxSteps",
        "tab.yaml:2:1",
        "dup.yaml:2:1 name",
        "dup.yaml:3:13 evaluation",
        "latin.yaml:1:10",
        "--set lora.r=x",
    ]


def test_what_an_unreadable_file_may_have_is_not_told_to_be_missing_or_not_to_fit() -> None:
    base = "instance: trn1.2xlarge\nnodes: 2\nmodel: a/b\nstorage: {kind: fsx-static, static: {dnsName: a}}\n"
    (line,) = told(*files(base=base, mine="image: [\n"))
    assert line.startswith("mine.yaml:2:1: ")
    (line,) = told(*files(base=base, mine="nodes: two\n"), Path("absent.yaml"))[:-1]
    assert line.startswith("mine.yaml:1:1 nodes: ")


def test_a_relative_path_is_seen_from_the_file_that_it_is_written_in(tmp_path: Path) -> None:
    for place in ("a", "b/c"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "rows.jsonl").write_text("{}\n")
    (tmp_path / "llama").mkdir()
    Path("a/base.yaml").write_text("model: {path: ../llama}\ninstance: cpu\ndataset: {source: rows.jsonl}\n")
    Path("b/c/mine.yaml").write_text("dataset: {source: rows.jsonl}\n")
    Path("b/only-format.yaml").write_text("dataset: {format: text}\n")
    base, mine, other = Path("a/base.yaml"), Path("b/c/mine.yaml"), Path("b/only-format.yaml")
    assert values(base, other)["dataset"]["source"] == str(tmp_path / "a/rows.jsonl")
    found = values(base, mine, other)
    assert found["dataset"]["source"] == str(tmp_path / "b/c/rows.jsonl")
    assert found["model"]["path"] == str(tmp_path / "llama")
    os.chdir("b")
    base, mine = Path("../a/base.yaml"), Path("c/mine.yaml")
    by_set = values(base, mine, sets=("dataset.source=../a/rows.jsonl",))
    assert by_set["dataset"]["source"] == str(tmp_path / "a/rows.jsonl"), "what is typed is seen from here"
    (line,) = told(base, mine, sets=("dataset.source=rows.jsonl",))
    assert f"no such file or folder: {tmp_path / 'b/rows.jsonl'}." in line


def test_the_same_file_twice_changes_nothing() -> None:
    (base, trn2) = files(base=BASE, trn2=TRN2)
    assert values(base, trn2, trn2) == values(base, trn2)


SCALARS = st.none() | st.integers(0, 9) | st.sampled_from(["a", "b"]) | st.lists(st.integers(0, 3), max_size=2)
BLOCKS = st.recursive(
    SCALARS, lambda inner: st.dictionaries(st.sampled_from(["p", "q", "r"]), inner, max_size=3), max_leaves=8
)
LAYERS = st.lists(st.dictionaries(st.sampled_from(["p", "q", "r"]), BLOCKS, max_size=3), min_size=1, max_size=4)


def keys_in(value: Any, key: tuple[str | int, ...] = ()) -> set[tuple[str | int, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {key} | {deeper for name, below in inner for deeper in keys_in(below, (*key, name))}


@given(layers=LAYERS)
def test_laying_over_is_the_merge_of_the_values_and_every_key_has_its_place(layers: list[dict[str, Any]]) -> None:
    """Below chartValues, where null is a value."""
    paths = files(**{f"f{number}": yaml.safe_dump({"chartValues": layer}) for number, layer in enumerate(layers)})
    document: Document = read(*paths)
    wanted: dict[str, Any] = {}
    for layer in layers:
        wanted = merge(wanted, layer)
    assert document.value == {"chartValues": wanted}
    written = {key for key in keys_in(document.value) if key}
    assert written <= document.positions.keys()
    for key in written:
        order = document.positions[key].order
        assert key in keys_in({"chartValues": layers[order]}), "and that is in a file that says it"
