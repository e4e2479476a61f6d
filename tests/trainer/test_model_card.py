"""The model card: valid front matter, the run's facts, and nothing that a hostile name could inject."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from llama_lora import model_card
from llama_lora.model_card import CARD, Data, Facts, HeldOut, Losses, card, license_in
from trainer.conftest import Run, llama_lora_here, make_model

FULL = Facts(
    kind="adapter",
    run="my-run",
    base_model="meta-llama/Llama-3.1-8B",
    base_revision="d04e592bb4f6aa9cfee91e2e20afa771667e1d4b",
    license="llama3.1",
    data=[Data("databricks/dolly", "abc", "train[:10%]", "instruction"), Data(format="chat")],
    settings={"LoRA rank": 16},
    losses=Losses(2.5, 1.25, 100, 10),
    held_out=HeldOut(2.4, 1.3, 256, "Better: the interval is below zero."),
    versions={"torch": "2.15.0"},
)


def matter_of(text: str) -> dict[str, Any]:
    return dict(ModelCard(text).data.to_dict())


@pytest.mark.parametrize(
    ("kind", "library", "relation"), [("adapter", "peft", "adapter"), ("merged", "transformers", "finetune")]
)
def test_the_front_matter_has_what_the_hub_reads(kind: model_card.Kind, library: str, relation: str) -> None:
    matter = matter_of(card(Facts(**{**vars(FULL), "kind": kind})))
    assert matter["base_model"] == "meta-llama/Llama-3.1-8B" and matter["base_model_relation"] == relation
    assert matter["library_name"] == library
    assert (matter["license"], matter["datasets"]) == ("llama3.1", ["databricks/dolly"])
    assert matter["pipeline_tag"] == "text-generation"


def test_the_text_has_data_settings_results_and_versions() -> None:
    text = card(FULL)
    for words in (
        "`train[:10%]`",
        "| `LoRA rank` | `16` |",
        "1.2500",
        "256 rows",
        "Better: the",
        "`torch`",
        "`d04e592",
    ):
        assert words in text
    assert card(FULL) == text


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_a_card_of_unknown_origin_says_what_is_unknown(kind: model_card.Kind) -> None:
    text = card(Facts(kind))
    assert not {"base_model", "license", "datasets"} & matter_of(text).keys()
    assert "license of the base model is unknown" in text


HOSTILE = [
    "a\n---\nlicense: mit\n---\n",
    "org/model\nlicense: mit",
    "]( http://evil.example ) [x",
    "`<script>alert(1)</script>`",
    "a|b\n|---|\n# Heading",
    "../../etc/passwd",
    "!!python/object/apply:os.system ['true']",
    'x", trust_remote_code=True, y="',
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_injects_nothing(name: str) -> None:
    facts = Facts(
        kind="adapter",
        run=name,
        base_model=name,
        base_revision=name,
        license=name,
        data=[Data(name, name, name, name)],
        settings={name: name},
        held_out=HeldOut(1.0, 1.0, 1, name),
        versions={name: name},
    )
    text = card(facts)
    matter = matter_of(text)
    assert matter.keys() == {"library_name", "pipeline_tag", "tags"}
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert len(headings) == 7, headings
    assert text.count("\n---\n") == 1, "the end of the front matter"
    assert "](http" not in outside_code(text).replace(" ", "")
    assert "<script>" not in outside_code(text)
    assert name not in text.partition("```python")[2].partition("```")[0]


def outside_code(text: str) -> str:
    """The text without inline code, in which nothing is rendered."""
    return "".join(text.split("`")[::2])


def test_only_datasets_of_the_hub_are_named(new_run: Callable[..., Run]) -> None:
    run = new_run()
    run("tokenize")
    from llama_lora.stage import Stage

    facts = model_card.facts_of(Stage("consolidate", run.load(), run.paths), "adapter")
    text = card(facts)
    assert "files that are not on the Hugging Face Hub" in text
    assert str(run.folder) not in text and "rows.jsonl" not in text


def test_adapter_and_merged_have_a_card(whole_run: Run) -> None:
    adapter, merged = ((folder / CARD).read_text() for folder in (whole_run.paths.adapter, whole_run.paths.merged))
    assert matter_of(adapter)["library_name"] == "peft" and matter_of(merged)["library_name"] == "transformers"
    for text in (adapter, merged):
        assert "`learning rate` | `0.01`" in text and "of 6 steps" in text


def test_a_rerun_writes_the_same_card(finished_run: Run) -> None:
    before = [(folder / CARD).read_bytes() for folder in (finished_run.paths.adapter, finished_run.paths.merged)]
    for stage in ("consolidate", "merge"):
        finished_run.paths.manifest(stage).unlink()
        finished_run(stage)
    assert before == [
        (folder / CARD).read_bytes() for folder in (finished_run.paths.adapter, finished_run.paths.merged)
    ]


def test_the_license_of_a_local_base_model_is_taken_from_its_card(tmp_path: Path, whole_run: Run) -> None:
    base = make_model(tmp_path / "base")
    (base / CARD).write_text("---\nlicense: apache-2.0\n---\nThe base model's own card.\n")
    output = tmp_path / "merged"
    llama_lora_here("merge", "--base", str(base), "--adapter", str(whole_run.paths.adapter), "--output", str(output))
    text = (output / CARD).read_text()
    assert matter_of(text)["license"] == "apache-2.0"
    assert "own card" not in text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"---\nlicense: [mit]\n---\n",
        b"---\n- a\n---\n",
        b"---\n\tbad: [\n---\n",
        b"\xff\xfe---\nlicense: mit\n---\n",
        b"---\n" + b"[" * 5000 + b"\n---\n",
        b"---\nlicense: !!python/object/apply:os.system ['true']\n---\n",
        b"license: mit\n",
        b'---\nlicense: !!bool "zz"\n---\n',
        b'---\nlicense: !!int ""\n---\n',
        b"---\nlicense: !!timestamp x\n---\n",
    ],
)
def test_a_card_of_any_content_gives_no_license(tmp_path: Path, content: bytes) -> None:
    (tmp_path / CARD).write_bytes(content)
    assert license_in(tmp_path / CARD) == ""
    assert license_in(tmp_path / "missing") == ""


def test_yaml_is_dumped_and_not_formatted() -> None:
    text = card(Facts("merged", license="no"))  # YAML 1.1 reads a bare no as false
    assert yaml.safe_load(text.split("---")[1])["license"] == "no"
