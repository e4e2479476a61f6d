"""Copy the model to the workspace, and convert the dataset to packed token rows with a data report."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genvalues.common import files
from genvalues.common.errors import UserError, UserErrors
from genvalues.common.json_files import InvalidJson, read_object
from genvalues.common.text import one_line
from llama_lora import backends
from llama_lora.config import Dataset
from llama_lora.data import resolve
from llama_lora.data.shared_folders import make_once, recorded
from llama_lora.data.snapshot import take_snapshot
from llama_lora.stage import Declaration, Stage, rerun

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


def tokenize(stage: Stage) -> None:
    """Take the model snapshot, then make the dataset folder if no other run has made it."""
    from llama_lora.data.tokenized_dataset import tokenize_dataset

    assert stage.sources is not None and stage.fingerprint is not None
    verify = stage.config.verify
    model = take_snapshot(stage.config.model, stage.sources.model, stage.paths.models, verify)
    backends.get(stage.config.backend).check(stage.config, model)  # before any Trainium node is requested
    dataset = stage.paths.datasets / stage.fingerprint[:16]
    with make_once(dataset, verify) as missing:
        if missing:
            with files.whole_folder(dataset) as folder:
                tokenize_dataset(stage.config, stage.sources, load_tokenizer(model), folder)
                check_unchanged(stage)
    report = read_report(dataset)
    stage.facts = {
        "model": str(model.relative_to(stage.paths.workspace)),
        "dataset": str(dataset.relative_to(stage.paths.workspace)),
    }
    stage.digested = recorded(model) | recorded(dataset)
    stage.finish([model, dataset])
    _log_report(report, dataset)


def check_unchanged(stage: Stage) -> None:
    """Raise UserErrors for files of rows that have changed since their digest was taken: it names the dataset."""
    assert stage.sources is not None
    known = resolve.known_sources(stage.config, stage.paths)
    now, pinned = known.identity() if known else {}, stage.sources.identity()
    if changed := [key for key in pinned if key != "model" and now.get(key) != pinned[key]]:
        what, fix = "has changed while it was read", "Run tokenize again when nothing writes to it."
        raise UserErrors([UserError(what, where=f"{key}.source", fix=fix) for key in changed])


def read_report(dataset: Path) -> dict[str, Any]:
    """Read the data report of a dataset's folder. Raises UserError if it is not valid."""
    from llama_lora.data.data_report import is_valid

    file = dataset / "report.json"
    fix = f"Delete it and run {rerun('tokenize')}."
    try:
        report = read_object(file)
    except InvalidJson as error:
        raise UserError(str(error), where=str(file), fix=fix) from None
    if not is_valid(report):
        raise UserError("is not a data report", where=str(file), fix=fix)
    return report


def dataset_settings(dataset: Dataset) -> dict[str, Any]:
    """What the rows depend on besides the content of the sources: each source's suffix instead of its name and path.

    The same bytes give other rows as .txt than as .jsonl.
    """
    return _without_names(dataset.model_dump())


def _without_names(settings: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if key == "source":
            found["kind"] = Path(value).suffix
        elif key != "revision":
            found[key] = _without_names(value) if isinstance(value, dict) else value
    return found


STAGE = Declaration(
    name="tokenize",
    version=2,
    summary="Copy the model, and tokenize, split and pack the rows; writes a data report.",
    reads_sources=True,
    reads=lambda config: {
        "dataset": dataset_settings(config.dataset),
        "training": config.training.model_dump(include={"max_sequence_length", "packing", "seed"}),
    },
    run=tokenize,
)


def load_tokenizer(model: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder. Raises UserError if transformers cannot."""
    from llama_lora import library_versions

    library_versions.import_tokenizers()  # an error of the installation or of a variable is not one of the tokenizer
    try:
        tokenizer: PreTrainedTokenizerBase = library_versions.load_tokenizer(model)
        return tokenizer
    except UserError:
        raise
    except Exception as error:  # of any kind, for a damaged tokenizer.json or tokenizer_config.json
        what = one_line(f"{type(error).__name__}: {error}", 300)
        raise UserError(
            f"transformers cannot load the tokenizer: {what}", where=str(model), fix="Copy its files again."
        ) from None


def _log_report(report: dict[str, Any], dataset: Path) -> None:
    from llama_lora.data import data_report

    for line in data_report.lines(report):
        log.info(line)
    if warning := data_report.warning(report):
        log.warning(warning)
    log.info(f"report: {dataset / 'report.html'}")
