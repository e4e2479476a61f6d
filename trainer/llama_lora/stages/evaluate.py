"""Compare the base and the merged model on the held-out rows: verdict, loss, sample answers, report.html."""

from __future__ import annotations

import logging
import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from genvalues.common import files
from genvalues.common.errors import UserError
from genvalues.common.json_files import json_digest
from genvalues.common.text import one_line
from llama_lora import base_scores, evaluation
from llama_lora.base_scores import BaseScores, Measured
from llama_lora.evaluation import Prompt, Score
from llama_lora.probe import trained_tokens
from llama_lora.stage import LIBRARIES, Declaration, Stage, installed_versions
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
    dataset = stage.upstream_path("tokenize", "dataset")
    stage.verify_read("tokenize", dataset / "eval", dataset / "report.json")
    stage.verify_read("merge", stage.paths.merged)
    compared = compare(stage, held_out_rows(dataset, stage.config.evaluation.max_rows), began)
    scores, samples = compared.scores, compared.samples
    found = verdict(scores["base"].losses, scores["merged"].losses, scores["base"].tokens)
    result = {name: score.as_record() for name, score in scores.items()}
    report = encode(page(collect(stage, found, result, samples, compared.notes, compared.base_scores)))
    rows_used = len(scores["base"].losses)
    sentence = {"verdict": {**asdict(found), "sentence": str(found)}}
    written = {**result, "rows": rows_used, **sentence, "notes": compared.notes}
    stage.facts = {**written, "base_scores": compared.base_scores}
    with stage.output(stage.paths.evaluation, beside=[stage.paths.report]) as folder:
        files.write_json(folder / "eval.json", written)
        files.write_json(folder / "samples.json", samples)
        files.write_bytes(stage.paths.report, report)
    log.info(f"{found}")
    log.info(f"report: {stage.paths.report}")


@dataclass(frozen=True)
class Comparison:
    """Both models on the same rows. ``notes``: why there are fewer rows or samples than the settings ask for.

    ``base_scores``: "computed", or where the base model's are from.
    """

    scores: dict[str, Score]
    samples: list[dict[str, str]]
    notes: list[str]
    base_scores: str


def compare(stage: Stage, rows: list[dict[str, Any]], began: float) -> Comparison:
    """Score both models and let them answer, within maxHours of ``began`` (time.monotonic).

    What a run has kept of the base model is not computed again.
    """
    from llama_lora.streaming import StreamedModel

    settings, paths = stage.config.evaluation, stage.paths
    tokenizer = load_tokenizer(paths.merged)  # the base model's, which merge has copied
    lacking = evaluation.lacking_memory(paths.merged) if settings.samples else ""
    prompts = [] if lacking else [evaluation.prompt_of(row) for row in rows[: settings.samples]]
    wanted_rows, wanted_prompts = len(rows), len(prompts)

    def measure(part: int, folder: Path, rows: list[dict[str, Any]], prompts: list[Prompt]) -> Measured:
        """Measure the base model (part 0) or the merged one (part 1) in its half of the time."""

        def ends(share: float) -> float | None:
            return began + (part + share) / 2 * settings.max_hours * 3600 if settings.max_hours else None

        score = evaluation.score(StreamedModel(folder), rows, ends(LOSSES if prompts else 1.0))
        check_losses(score, folder)
        if not prompts or is_over(ends(1.0)):
            return Measured(score, [], cut=False)
        model = evaluation.load_model(folder)  # one at a time: an 8B model in bf16 takes 16 GB
        answers = evaluation.answers(model, tokenizer, prompts, settings.max_new_tokens, ends(1.0))
        return Measured(score, answers, cut=is_over(ends(1.0)))

    base, origin = measured_base(stage, rows, len(prompts), lambda folder: measure(0, folder, rows, prompts))
    log.info(f"base: {base.score}")
    rows, prompts = rows[: len(base.score.losses)], prompts[: len(base.answers)]
    merged = measure(1, paths.merged, rows, prompts)
    log.info(f"merged: {merged.score}")
    rows, prompts = rows[: len(merged.score.losses)], prompts[: len(merged.answers)]
    notes = []
    limit = f"evaluation.maxHours is {settings.max_hours:g}"
    if len(rows) < wanted_rows:
        notes.append(f"The losses are of the first {len(rows)} of {wanted_rows} held-out rows: {limit}.")
    if lacking:
        notes.append(f"No sample answers: {lacking}. Raise stages.evaluate.resources.limits.memory.")
    if len(prompts) < wanted_prompts:
        notes.append(f"There are {len(prompts)} of {wanted_prompts} sample answers: {limit}.")
    if prompts and (base.cut or merged.cut):
        notes.append(f"Sample answers may end early: {limit}.")
    for note in notes:
        log.warning(note)
    scores = {"base": base.score.first(len(rows)), "merged": merged.score}
    return Comparison(scores, describe_samples(tokenizer, prompts, base.answers, merged.answers), notes, origin)


def measured_base(
    stage: Stage, rows: list[dict[str, Any]], samples: int, measure: Callable[[Path], Measured]
) -> tuple[Measured, str]:
    """What a run has kept of the base model, or what is measured now and kept; and where it is from."""
    base = stage.upstream_path("tokenize", "model")
    key = key_of(stage, base, rows, samples)
    if kept := base_scores.read(stage.paths.base_scores, key):
        file = base_scores.file_of(stage.paths.base_scores, key).relative_to(stage.paths.workspace)
        origin = f"reused from {file}, where run {one_line(kept.run)} has written it"
        log.info(f"base: {origin}")
        return kept, origin
    stage.verify_read("tokenize", base)
    measured = measure(base)
    if stage.config.verify != "off":  # else the base model may not be the one of its digests
        kept = BaseScores(measured.score, measured.answers, measured.cut, stage.config.name, key)
        base_scores.keep(stage.paths.base_scores, kept)
    return measured, "computed"


def key_of(stage: Stage, base: Path, rows: list[dict[str, Any]], samples: int) -> str:
    """The hex SHA-256 of what the base model's losses and answers depend on.

    The machine's instruction set is part of it; its number of threads is not, which changes only the order of sums.
    """
    import torch

    recorded = stage.upstream_files("tokenize", base)
    what = {
        "version": STAGE.version,
        "base": {str(file.relative_to(base)): record.sha256 for file, record in recorded.items()},
        "rows": rows,
        "samples": samples,
        "evaluation": stage.config.evaluation.settings_of_result(),
        "libraries": installed_versions([*LIBRARIES, "tokenizers"]),
        "instructions": [platform.machine(), torch.backends.cpu.get_cpu_capability()],
    }
    return json_digest(what)


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


def describe_samples(
    tokenizer: Any, prompts: Sequence[Prompt], base: Sequence[str], merged: Sequence[str]
) -> list[dict[str, str]]:
    """Put each prompt that both models answered, its reference answer and theirs together as text."""
    return [
        {
            "prompt": tokenizer.decode(prompt.prompt),
            "reference": tokenizer.decode(prompt.answer, skip_special_tokens=True).strip(),
            "base": before,
            "merged": after,
        }
        for prompt, before, after in zip(prompts, base, merged, strict=False)
    ]


STAGE = Declaration(
    name="evaluate",
    version=2,
    summary="Compare base and merged model: held-out loss, perplexity, sample answers, report.html.",
    after=["tokenize", "merge"],
    reads=lambda config: {"evaluation": config.evaluation.settings_of_result()},
    run=evaluate,
)
