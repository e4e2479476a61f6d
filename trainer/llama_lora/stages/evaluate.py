"""Compare the base and the merged model on the held-out rows: verdict, loss, sample answers, report.html."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from genvalues.common import files
from genvalues.common.errors import UserError
from llama_lora import evaluation
from llama_lora.config import Evaluation
from llama_lora.evaluation import Prompt, Score
from llama_lora.probe import trained_tokens
from llama_lora.stage import Declaration, Stage
from llama_lora.stages.tokenize import load_tokenizer
from llama_lora.verdict import verdict

log = logging.getLogger(__name__)


# The share of the time that losses may take; the rest is for answers.
LOSSES = 0.8


def evaluate(stage: Stage) -> None:
    """Score both models, generate sample answers, and write evaluation/ and report.html."""
    from llama_lora.report.facts import collect
    from llama_lora.report.html import encode
    from llama_lora.report.page import page

    began = time.monotonic()
    settings = stage.config.evaluation
    base, dataset = (stage.upstream_path("tokenize", fact) for fact in ("model", "dataset"))
    stage.verify_read("tokenize", base, dataset / "eval", dataset / "report.json")
    stage.verify_read("merge", stage.paths.merged)
    rows = held_out_rows(dataset, settings.max_rows)
    compared = compare(base, stage.paths.merged, rows, load_tokenizer(base), settings, began)
    scores, samples = compared.scores, compared.samples
    found = verdict(scores["base"].losses, scores["merged"].losses, scores["base"].tokens)
    result = {name: score.as_record() for name, score in scores.items()}
    report = encode(page(collect(stage, found, result, samples, compared.notes)))
    rows_used = len(scores["base"].losses)
    sentence = {"verdict": {**asdict(found), "sentence": str(found)}}
    stage.facts = {**result, "rows": rows_used, **sentence, "notes": compared.notes}
    with stage.output(stage.paths.evaluation, beside=[stage.paths.report]) as folder:
        files.write_json(folder / "eval.json", stage.facts)
        files.write_json(folder / "samples.json", samples)
        files.write_bytes(stage.paths.report, report)
    log.info(f"{found}")
    log.info(f"report: {stage.paths.report}")


@dataclass(frozen=True)
class Comparison:
    """Both models on the same rows. ``notes``: why there are fewer rows or samples than the settings ask for."""

    scores: dict[str, Score]
    samples: list[dict[str, str]]
    notes: list[str]


def compare(
    base: Path, merged: Path, rows: list[dict[str, Any]], tokenizer: Any, settings: Evaluation, began: float
) -> Comparison:
    """Score both models and let them answer, within maxHours of ``began`` (time.monotonic)."""
    from llama_lora.streaming import StreamedModel

    def ends(share: float) -> float | None:
        return began + share * settings.max_hours * 3600 if settings.max_hours else None

    lacking = evaluation.lacking_memory(base) if settings.samples else ""
    prompts = [] if lacking else [evaluation.prompt_of(row) for row in rows[: settings.samples]]
    wanted_rows, wanted_prompts, cut = len(rows), len(prompts), False
    scores: dict[str, Score] = {}
    answers: dict[str, list[str]] = {}
    for number, (name, folder) in enumerate({"base": base, "merged": merged}.items()):
        share = LOSSES if prompts else 1.0
        scores[name] = evaluation.score(StreamedModel(folder), rows, ends((number + share) / 2))
        rows = rows[: len(scores[name].losses)]
        check_losses(scores[name], folder)
        log.info(f"{name}: loss {scores[name].loss:.4f}, perplexity {scores[name].perplexity:.2f}")
        end = ends((number + 1) / 2)
        if is_over(end):
            prompts = []
        answers[name] = []
        if prompts:
            model = evaluation.load_model(folder)  # one at a time: an 8B model in bf16 takes 16 GB
            answers[name] = evaluation.answers(model, tokenizer, prompts, settings.max_new_tokens, end)
            prompts = prompts[: len(answers[name])]
            cut = cut or is_over(end)
            del model
    notes = []
    limit = f"evaluation.maxHours is {settings.max_hours:g}"
    if len(rows) < wanted_rows:
        notes.append(f"The losses are of the first {len(rows)} of {wanted_rows} held-out rows: {limit}.")
    if lacking:
        notes.append(f"No sample answers: {lacking}. Raise stages.evaluate.resources.limits.memory.")
    if len(prompts) < wanted_prompts:
        notes.append(f"There are {len(prompts)} of {wanted_prompts} sample answers: {limit}.")
    if cut and prompts:
        notes.append(f"Sample answers may end early: {limit}.")
    for note in notes:
        log.warning(note)
    both = {name: score.first(len(rows)) for name, score in scores.items()}
    return Comparison(both, describe_samples(tokenizer, prompts, answers), notes)


def is_over(end: float | None) -> bool:
    return end is not None and time.monotonic() >= end


def held_out_rows(dataset: Path, limit: int) -> list[dict[str, Any]]:
    """Load the first ``limit`` held-out rows. Raises UserError if there are none."""
    from datasets import load_from_disk

    held_out = load_from_disk(str(dataset / "eval"))
    if not len(held_out):
        raise UserError("no rows are held out", where="dataset.evalFraction", fix="Raise it.")
    rows = [held_out[index] for index in range(min(limit, len(held_out)))]
    if not any(map(trained_tokens, rows)):
        raise UserError("no held-out row has a trained token", where="evaluation.maxRows", fix="Raise it.")
    return rows


def check_losses(score: Score, model: Path) -> None:
    """Raise UserError if the loss of a row is not finite: there is nothing to compare, and a retry would not help."""
    for number, loss in enumerate(score.losses):
        if not math.isfinite(loss):
            raise UserError(
                f"the model's loss of held-out row {number} (from 0) is {loss}",
                where=str(model),
                fix="Check the base model: it has weights that are not finite, or values beyond its dtype.",
            )


def describe_samples(tokenizer: Any, prompts: Sequence[Prompt], answers: dict[str, list[str]]) -> list[dict[str, str]]:
    """Put each prompt that both models answered, its reference answer and theirs together as text."""
    return [
        {
            "prompt": tokenizer.decode(prompt.prompt),
            "reference": tokenizer.decode(prompt.answer, skip_special_tokens=True).strip(),
            "base": before,
            "merged": after,
        }
        for prompt, before, after in zip(prompts, answers["base"], answers["merged"], strict=False)
    ]


STAGE = Declaration(
    name="evaluate",
    version=2,
    summary="Compare base and merged model: held-out loss, perplexity, sample answers, report.html.",
    after=["tokenize", "merge"],
    reads=lambda config: {"evaluation": config.evaluation.settings_of_result()},
    run=evaluate,
)
