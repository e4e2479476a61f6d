"""Base against merged model on the held-out rows: loss, perplexity, sample answers, and the run's report."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from genvalues.common import files
from genvalues.common.errors import UserError
from llama_lora import evaluation, report
from llama_lora.progress import track
from llama_lora.stage import Declaration, Stage
from llama_lora.stages.tokenize import load_tokenizer


def evaluate(stage: Stage) -> None:
    """Score both models, let both answer, write evaluation/ and report.html."""
    from datasets import load_from_disk

    wished = stage.config.evaluation
    tokenized = stage.upstream("tokenize").facts
    base = stage.paths.workspace / tokenized["model"]
    dataset = stage.paths.workspace / tokenized["dataset"]
    held_out = load_from_disk(str(dataset / "eval"))
    if not len(held_out):
        raise UserError("no rows were held out", where="dataset.evalFraction", fix="Raise it.")
    rows: list[dict[str, Any]] = [held_out[index] for index in range(min(wished.max_rows, len(held_out)))]
    prompts = [evaluation.prompt_of(row) for row in rows[: wished.samples]]
    tokenizer = load_tokenizer(base)

    scores, answers = {}, {}
    for name, folder in {"base": base, "merged": stage.paths.merged}.items():
        model = evaluation.load_model(folder)  # one at a time: an 8B model in bf16 is 16 GB
        scores[name] = evaluation.score(model, rows)
        print(f"{name}: loss {scores[name].loss:.4f}, perplexity {scores[name].perplexity:.2f}", flush=True)
        answers[name] = [
            evaluation.answer(model, tokenizer, prompt, wished.max_new_tokens)
            for prompt in track(prompts, "sample", len(prompts))
        ]
        del model
    samples = [
        {
            "prompt": tokenizer.decode(prompt.prompt),
            "reference": tokenizer.decode(prompt.answer, skip_special_tokens=True).strip(),
            "base": before,
            "merged": after,
        }
        for prompt, before, after in zip(prompts, answers["base"], answers["merged"], strict=True)
    ]
    result = {name: asdict(score) for name, score in scores.items()} | {"rows": len(rows)}
    page = report.page(stage, result, samples)
    stage.facts = result
    with stage.output(stage.paths.evaluation, beside=[stage.paths.report]) as folder:
        files.write_json(folder / "eval.json", result)
        files.write_json(folder / "samples.json", samples)
        files.write_text(stage.paths.report, page)
    print(f"report: {stage.paths.report}", flush=True)


STAGE = Declaration(
    name="evaluate",
    version=1,
    summary="Held-out loss and perplexity, base against merged, sample answers, report.html.",
    after=["tokenize", "merge"],
    reads=lambda config: {"evaluation": config.evaluation.as_keys()},
    run=evaluate,
)
