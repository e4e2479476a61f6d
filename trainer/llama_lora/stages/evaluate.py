"""Compare the base and the merged model on the held-out rows: verdict, loss, sample answers, report.html."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from genvalues.common import files
from genvalues.common.errors import UserError
from llama_lora import evaluation
from llama_lora.evaluation import Prompt, Score
from llama_lora.probe import trained_tokens
from llama_lora.progress import track
from llama_lora.stage import Declaration, Stage
from llama_lora.stages.tokenize import load_tokenizer
from llama_lora.verdict import verdict

log = logging.getLogger(__name__)


def evaluate(stage: Stage) -> None:
    """Score both models, generate sample answers, and write evaluation/ and report.html."""
    from llama_lora.report.facts import collect
    from llama_lora.report.html import encode
    from llama_lora.report.page import page

    settings = stage.config.evaluation
    base, dataset = (stage.upstream_path("tokenize", fact) for fact in ("model", "dataset"))
    stage.verify_read("tokenize", base, dataset / "eval", dataset / "report.json")
    stage.verify_read("merge", stage.paths.merged)
    rows = held_out_rows(dataset, settings.max_rows)
    prompts = [evaluation.prompt_of(row) for row in rows[: settings.samples]]
    tokenizer = load_tokenizer(base)

    scores: dict[str, Score] = {}
    answers: dict[str, list[str]] = {}
    for name, folder in {"base": base, "merged": stage.paths.merged}.items():
        model = evaluation.load_model(folder)  # one at a time: an 8B model in bf16 takes 16 GB
        scores[name] = evaluation.score(model, rows)
        check_losses(scores[name], folder)
        log.info(f"{name}: loss {scores[name].loss:.4f}, perplexity {scores[name].perplexity:.2f}")
        answers[name] = [
            evaluation.answer(model, tokenizer, prompt, settings.max_new_tokens)
            for prompt in track(prompts, "sample", len(prompts))
        ]
        del model
    samples = describe_samples(tokenizer, prompts, answers)
    found = verdict(scores["base"].losses, scores["merged"].losses, scores["base"].tokens)
    result = {name: score.as_record() for name, score in scores.items()}
    report = encode(page(collect(stage, found, result, samples)))
    stage.facts = {**result, "rows": len(rows), "verdict": {**asdict(found), "sentence": str(found)}}
    with stage.output(stage.paths.evaluation, beside=[stage.paths.report]) as folder:
        files.write_json(folder / "eval.json", stage.facts)
        files.write_json(folder / "samples.json", samples)
        files.write_bytes(stage.paths.report, report)
    log.info(f"{found}")
    log.info(f"report: {stage.paths.report}")


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
    """Put each prompt, its reference answer and both models' answers together as text."""
    return [
        {
            "prompt": tokenizer.decode(prompt.prompt),
            "reference": tokenizer.decode(prompt.answer, skip_special_tokens=True).strip(),
            "base": before,
            "merged": after,
        }
        for prompt, before, after in zip(prompts, answers["base"], answers["merged"], strict=True)
    ]


STAGE = Declaration(
    name="evaluate",
    version=2,
    summary="Compare base and merged model: held-out loss, perplexity, sample answers, report.html.",
    after=["tokenize", "merge"],
    reads=lambda config: {"evaluation": config.evaluation.as_keys()},
    run=evaluate,
)
