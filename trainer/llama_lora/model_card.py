"""The model card (README.md) of an adapter or a merged model, in the format of the Hugging Face Hub.

``card`` is pure, and equal facts give equal text: a rerun writes the same bytes. Only values of known form reach the
card, or values that are escaped: names come from settings, from the Hub and from files.
The front matter's keys: https://huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from genvalues.common.dicts import get
from genvalues.common.json_files import InvalidJson, read_bytes, read_object
from genvalues.common.text import one_line
from genvalues.settings.base import HUB_ID
from genvalues.settings.dataset_files import exists_here
from genvalues.settings.datasets import on_s3
from llama_lora.config import INVALID_YAML
from llama_lora.data.parts import Part, training_parts
from llama_lora.data.resolve import ResolvedSources
from llama_lora.paths import Paths
from llama_lora.runlog import read_of_manifest
from llama_lora.stage import Manifest, Stage

CARD = "README.md"
Kind = Literal["adapter", "merged"]

LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,63}")  # the Hub's identifiers: apache-2.0, llama3.1
NOT_PLAIN = re.compile(r"[^\w .,;:%()+'/-]")  # may begin markup
MOST_CARD_BYTES = 1 << 20
MOST_AVERAGED = 10  # steps whose mean loss the card shows as the last


@dataclass(frozen=True)
class Data:
    """A source of rows. ``hub_id`` is empty for files, whose paths are not published."""

    hub_id: str = ""
    revision: str = ""
    split: str = ""
    format: str = ""


@dataclass(frozen=True)
class Losses:
    """Of the training, in nats per trained token: the first step, and the mean of the last ``averaged`` steps."""

    first: float
    last: float
    steps: int
    averaged: int = 1


@dataclass(frozen=True)
class HeldOut:
    """Losses of both models on held-out rows."""

    base: float
    merged: float
    rows: int
    verdict: str = ""


@dataclass(frozen=True)
class Facts:
    """What is known. Everything but ``kind`` may be missing: the tools know only the files that they are given."""

    kind: Kind
    run: str = ""
    base_model: str = ""  # Hub id
    base_revision: str = ""
    license: str = ""
    data: Sequence[Data] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    losses: Losses | None = None
    held_out: HeldOut | None = None
    versions: Mapping[str, str] = field(default_factory=dict)


def card(facts: Facts) -> str:
    """The card's text: front matter, then what it is, data, settings, results, use, limits and versions."""
    base = facts.base_model if is_hub_id(facts.base_model) else ""
    datasets = sorted({each.hub_id for each in facts.data if is_hub_id(each.hub_id)})
    known_license = facts.license if LICENSE.fullmatch(facts.license) else ""
    matter: dict[str, Any] = {
        "library_name": "peft" if facts.kind == "adapter" else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["llama-lora", "lora"],
    }
    if base:
        matter |= {"base_model": base, "base_model_relation": "adapter" if facts.kind == "adapter" else "finetune"}
    if known_license:
        matter["license"] = known_license
    if datasets:
        matter["datasets"] = datasets
    sections = [
        _summary(facts, base, known_license),
        *_section("Data", _data(facts)),
        *_section("Settings", _table(facts.settings)),
        *_section("Results", _results(facts)),
        *_section("Use", _use(facts, base)),
        *_section("Limits", [LIMITS]),
        *_section("Versions", _table(facts.versions)),
    ]
    front = yaml.safe_dump(matter, sort_keys=True, allow_unicode=True, width=1000)
    return f"---\n{front}---\n\n" + "\n\n".join(sections) + "\n"


LIMITS = (
    "The model has the limits and biases of its base model, and those of the data it was trained on. No safety "
    "evaluation has been made. Held-out loss says how well it predicts such data, not how useful its answers are."
)


def is_hub_id(text: str) -> bool:
    return re.fullmatch(HUB_ID, text) is not None and len(text) <= 256


def code(value: Any) -> str:
    """A value as inline code, in which it cannot begin anything: no backticks, pipes or line breaks."""
    return f"`{re.sub('[`|]', '?', one_line(str(value), 200)) or ' '}`"


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return [f"## {title}\n\n" + "\n".join(lines)] if lines else []


def _summary(facts: Facts, base: str, known_license: str) -> str:
    what = "LoRA adapter, for PEFT" if facts.kind == "adapter" else "model, into which a LoRA adapter has been merged"
    name = code(facts.run) if facts.run else "A fine-tuned model"
    of = f" of [{base}](https://huggingface.co/{base})" if base else ""
    at = f" (revision {code(facts.base_revision)})" if base and facts.base_revision else ""
    text = f"# {name}\n\nA {what}: a fine-tune{of}{at}, made with llama-lora."
    if not base:
        text += " The base model is not on the Hugging Face Hub, or its name is unknown."
    if not known_license:
        text += " The license of the base model is unknown; it applies to this model too."
    return text


def _data(facts: Facts) -> list[str]:
    lines = []
    for each in facts.data:
        where = f"[{each.hub_id}](https://huggingface.co/datasets/{each.hub_id})" if is_hub_id(each.hub_id) else ""
        details = {"revision": each.revision, "split": each.split, "format": each.format}
        shown = ", ".join(f"{key} {code(value)}" for key, value in details.items() if value)
        lines.append(f"- {where or 'files that are not on the Hugging Face Hub'}{f': {shown}' if shown else ''}")
    return lines


def _table(rows: Mapping[str, Any]) -> list[str]:
    if not rows:
        return []
    return ["| | |", "|---|---|", *(f"| {code(key)} | {code(value)} |" for key, value in rows.items())]


def _results(facts: Facts) -> list[str]:
    lines = []
    if losses := facts.losses:
        lines.append(
            f"- Training loss: {losses.first:.4f} in the first step, {losses.last:.4f} over the last {losses.averaged} "
            f"of {losses.steps} steps."
        )
    if held := facts.held_out:
        lines.append(f"- Held-out loss on {held.rows} rows: base {held.base:.4f}, fine-tuned {held.merged:.4f}.")
        if held.verdict:
            lines.append(f"- {NOT_PLAIN.sub('?', one_line(held.verdict, 500))}")
    if lines:
        lines.append("")
        lines.append("Losses are in nats per trained token.")
    return lines


def _use(facts: Facts, base: str) -> list[str]:
    if facts.kind == "merged":
        lines = [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'folder = "."  # of this file, or the id of this repository',
            'model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")',
            "tokenizer = AutoTokenizer.from_pretrained(folder)",
        ]
    else:
        revision = f', revision="{facts.base_revision}"' if base and is_hub_id(facts.base_revision) else ""
        lines = [
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'base = "{base or "PATH"}"',
            'folder = "."  # of this file, or the id of this repository',
            f'model = AutoModelForCausalLM.from_pretrained(base, dtype="auto"{revision})',
            "model = PeftModel.from_pretrained(model, folder)",
            f"tokenizer = AutoTokenizer.from_pretrained(base{revision})",
        ]
    return ["```python", *lines, "```"]


# --- what a run knows


def facts_of(stage: Stage, kind: Kind, *, final: bool = False) -> Facts:
    """What the run knows when ``stage`` runs; ``final`` also what evaluate has found."""
    config, paths = stage.config, stage.paths
    lora, training = config.lora, config.training
    trained = Stage("train", config, paths, stage.sources).manifest
    facts = trained.facts if trained else {}
    steps, rows = facts.get("steps", ""), None
    if training.load_best_model_at_end and get(facts, "held_out.best_step", int) not in (None, steps):
        steps = f"{facts['held_out']['best_step']} of {steps}: the lowest held-out loss"
        rows = get(facts, "held_out.best_rows_done", int)
    evaluate = Stage("evaluate", config, paths, stage.sources)
    evaluated = evaluate.manifest if final and config.evaluation.enabled and evaluate.is_done() else None
    settings = {
        "LoRA rank": lora.r,
        "LoRA alpha": f"{lora.alpha:g}",
        "LoRA dropout": f"{lora.dropout:g}",
        "target modules": lora.target_modules
        if isinstance(lora.target_modules, str)
        else ", ".join(lora.target_modules),
        "sequence length": training.max_sequence_length,
        "packing": training.packing,
        "learning rate": f"{training.learning_rate:g}",
        "schedule": training.lr_scheduler,
        "rows per step": training.per_device_batch_size
        * training.gradient_accumulation_steps
        * config.parallelism.data_parallel_size,
        "steps": steps,
        "seed": training.seed,
    }
    return Facts(
        kind=kind,
        run=config.name,
        base_model=config.model.id,
        base_revision=stage.sources.model.revision if stage.sources and config.model.id else "",
        license=base_license(config.model.path, paths),
        data=[data_of(part, stage.sources) for part in training_parts(config.dataset)],
        settings={key: value for key, value in settings.items() if value != ""},
        losses=losses_of(paths, trained, rows) if trained else None,
        held_out=held_out_of(evaluated),
        versions=trained.versions if trained else {},
    )


def data_of(part: Part, sources: ResolvedSources | None) -> Data:
    """A source as the card shows it: a Hub dataset by its id, anything else without its place."""
    of_hub = not (exists_here(part.source) or on_s3(part.source)) and is_hub_id(part.source)
    revision = sources.of(part).revision if sources else ""
    if not of_hub:
        return Data(format=part.format)
    return Data(part.source, revision, part.split, part.format)


def losses_of(paths: Paths, trained: Manifest, rows: int | None) -> Losses | None:
    """The losses of a training, or of its steps up to a position: where the weights are from."""
    steps, _ = read_of_manifest(paths, trained)
    losses = [step["loss"] for step in steps if rows is None or step["rows_done"] <= rows]
    if not losses:
        return None
    last = losses[-min(MOST_AVERAGED, 1 + len(losses) // 10) :]
    return Losses(losses[0], sum(last) / len(last), len(losses), len(last))


def held_out_of(evaluated: Manifest | None) -> HeldOut | None:
    """The result in evaluate's manifest; None if there is none."""
    try:
        facts = evaluated.facts if evaluated else {}
        verdict = facts.get("verdict", "")
        sentence = verdict.get("sentence", "") if isinstance(verdict, dict) else verdict
        return HeldOut(
            float(facts["base"]["loss"]),
            float(facts["merged"]["loss"]),
            int(facts["rows"]),
            sentence if isinstance(sentence, str) else "",
        )
    except (KeyError, TypeError, ValueError):
        return None


def base_in(adapter_config: Mapping[str, Any]) -> str:
    """The base model that an adapter_config.json names, if it has the form of a Hub id."""
    named = adapter_config.get("base_model_name_or_path")
    return named if isinstance(named, str) and is_hub_id(named) and not Path(named).exists() else ""


def base_license(folder: str, paths: Paths) -> str:
    """The license that the base model's README.md names, or the Hub when the model was pinned; empty if unknown."""
    if folder:
        return license_in(Path(folder) / CARD)
    try:
        found = read_object(paths.resolved)["model"].get("license")
    except (InvalidJson, KeyError, AttributeError):
        return ""
    return found if isinstance(found, str) else ""


def license_in(readme: Path) -> str:
    """The license in the front matter of a model card; empty if there is none."""
    try:
        text = read_bytes(readme, MOST_CARD_BYTES).decode("utf-8")
        matter = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
        found = yaml.safe_load(matter[1]).get("license") if matter else ""
    except (InvalidJson, *INVALID_YAML):
        return ""
    return found if isinstance(found, str) else ""
