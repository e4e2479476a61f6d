"""Rehearse the run on a CPU before any Trainium node is requested.

A model of two layers of the same architecture is trained by two workers with the run's settings, tokenizer and rows,
saved, resumed, consolidated, merged and loaded. Then the layout of the real model is traced, for its memory. Whatever
fails here would fail, or never end, in train or after it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from genvalues.common.errors import UserError, VolumeError, traceback_wanted
from genvalues.common.system_errors import explain
from llama_lora import backends, evaluation
from llama_lora.backends.failures import WorkersFailed
from llama_lora.config import EVALUATES
from llama_lora.data import row_checks
from llama_lora.layout_trace import trace
from llama_lora.model_files import read_model_json
from llama_lora.paths import Paths
from llama_lora.runlog import read_metrics
from llama_lora.small_run import SAVE_STEPS, first_rows, make_small_run, other_stage
from llama_lora.stage import Declaration, Stage
from llama_lora.stages.consolidate import consolidate
from llama_lora.stages.merge import merge
from llama_lora.stages.tokenize import load_tokenizer
from llama_lora.stages.train import train

log = logging.getLogger(__name__)

CHECKED_ROWS = 256  # rows whose answers are checked for their ends
NEW_TOKENS = 4
RESUMED_DIFFERENCE = 1e-4  # nats; a resumed training has equal losses, up to the order of sums


def rehearse(stage: Stage) -> None:
    """Check rows and settings, run the stages on the small model, and trace the real one."""
    from datasets import load_from_disk

    model, dataset = (stage.upstream_path("tokenize", fact) for fact in ("model", "dataset"))
    configs = [file for file in model.iterdir() if file.suffix != ".safetensors"]  # it reads no weights
    stage.verify_read("tokenize", dataset / "train", *configs)
    rows = load_from_disk(str(dataset / "train"))
    began = time.monotonic()
    with step("check", stage.paths.small_run):
        check(stage, model, rows)
    with small_run_folder(stage.paths):
        with step("prepare", stage.paths.small_run):
            small = make_small_run(stage, model, first_rows(rows))
        with step("train", stage.paths.small_run):
            losses = train_small(small)
        with step("resume", stage.paths.small_run):
            check_resume(small, losses)
        with step("consolidate", stage.paths.small_run):
            consolidate(other_stage(small, "consolidate"))
        with step("merge", stage.paths.small_run):
            merge(other_stage(small, "merge"))
        with step("generate", stage.paths.small_run):
            generate(small.paths.merged, first_rows(rows, 1)[0])
    stage.facts = {"losses": losses, "seconds": round(time.monotonic() - began, 1)}
    if stage.config.device == "neuron" and stage.config.backend == "native":
        with step("trace", stage.paths.small_run):
            stage.facts["trace"] = trace(stage.paths.config, model)
    stage.finish([])
    log.info(
        f"rehearsed in {time.monotonic() - began:.0f} s: trained, saved, resumed, consolidated, merged and loaded a "
        f"model of two layers; loss {losses[0]:.4f} -> {losses[-1]:.4f}"
    )


def check(stage: Stage, model: Path, rows: Any) -> None:
    """Check settings and rows against the model, as far as that needs no training."""
    backends.get(stage.config.backend).check(stage.config, model)
    tokenizer = load_tokenizer(model)
    vocabulary = read_model_json(model / "config.json")["vocab_size"]
    row_checks.check_vocabulary(rows, tokenizer, vocabulary)
    first = [rows[number] for number in range(min(CHECKED_ROWS, len(rows)))]
    stops = row_checks.stop_tokens(model, tokenizer)
    row_checks.check_ends(first, tokenizer, stops, stage.config.training.max_sequence_length)


def train_small(small: Stage) -> list[float]:
    """Train the small model from the start; the loss of each step."""
    trained = other_stage(small, "train")
    train(trained)
    return recorded_losses(trained)


def check_resume(small: Stage, losses: list[float]) -> None:
    """Resume from the first checkpoint in new processes, which must take the remaining steps as the first ones did."""
    from llama_lora.backends import checkpoints

    trained = other_stage(small, "train")
    assert trained.fingerprint is not None
    saved = checkpoints.complete(trained.paths.checkpoints(trained.fingerprint), trained.fingerprint)
    for newer in saved[1:]:
        shutil.rmtree(newer)
    trained.paths.manifest("train").unlink()
    train(trained)
    again = recorded_losses(trained)
    for number, (loss, resumed) in enumerate(zip(losses, again, strict=True), start=1):
        if not math.isclose(loss, resumed, abs_tol=RESUMED_DIFFERENCE):
            raise UserError(
                f"after resuming at step {SAVE_STEPS} the loss of step {number} is {resumed:.6f}, before it was "
                f"{loss:.6f}",
                where="rehearse: resume",
                fix="Report this with the log of the stage: a run that is interrupted would not continue as it was.",
            )


def recorded_losses(trained: Stage) -> list[float]:
    assert trained.fingerprint is not None
    return [step["loss"] for step in read_metrics(trained.paths.metrics(trained.fingerprint))]


def generate(merged: Path, row: dict[str, Any]) -> None:
    """Load the merged model and its tokenizer with transformers, and generate a few tokens of an answer."""
    prompts = [evaluation.prompt_of(row)]
    found = evaluation.answers(evaluation.load_model(merged), load_tokenizer(merged), prompts, NEW_TOKENS)
    log.debug(f"the small model answers {found[0]!r}")


@contextlib.contextmanager
def small_run_folder(paths: Paths) -> Iterator[None]:
    """Delete the small run's folder before, if another rehearsal was killed, and after the block."""
    shutil.rmtree(paths.small_run, ignore_errors=True)
    try:
        yield
    finally:
        shutil.rmtree(paths.small_run, ignore_errors=True)


@contextlib.contextmanager
def step(name: str, small: Path) -> Iterator[None]:
    """Log a step, and raise whatever fails in it as one UserError: repeating it would not help.

    Errors of the volume pass, also of ``small``, the folder of the small run. A signal that ends the workers ends this
    stage too, to be retried.
    """
    log.info(f"rehearse: {name}")
    where = f"rehearse: {name}"
    memory = "If it fails again without an error, raise stages.rehearse.resources.limits.memory."
    skip = "or set rehearse.enabled: false to train without a rehearsal."
    try:
        yield
    except WorkersFailed as error:
        raise UserError(str(error), where=where, fix=f"{memory} Else report it, {skip}") from None
    except (UserError, VolumeError):
        raise
    except Exception as error:
        found = explain(error, small)
        if isinstance(found, VolumeError):
            raise found from error
        if found is not None:
            raise UserError(str(found), where=where) from error
        if traceback_wanted():
            log.error("the error in full:", exc_info=True)
        what = f"{type(error).__name__}: {error}"
        raise UserError(what, where=where, fix=f"Report it with the log of the stage, {skip}") from None


STAGE = Declaration(
    name="rehearse",
    version=1,
    summary="Train, resume, merge and load a small model with the run's settings and rows, on a CPU.",
    after=["tokenize"],
    reads=lambda config: {
        "backend": config.backend,
        "device": config.device,
        "lora": config.lora.as_keys(),
        "training": config.training.model_dump(
            exclude={"save_steps", "save_total_limit", "epochs", "max_steps", *EVALUATES}  # see small_config
        ),
        "parallelism": config.parallelism.model_dump(exclude={"nodes", "processes_per_node"}),
        "probe": config.probe.as_keys(),
        "compile": config.compile.mode,
    },
    run=rehearse,
)
