"""What the base model scores and answers, kept on the volume for other runs with the same rows and settings.

A file is believed only if it records its own digest and its key, which says of what it is. As with the other folders
that runs share, that finds damage; it does not stop a neighbor who may write to the volume as the run's user.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path

from genvalues.common import files
from genvalues.common.json_files import (
    InvalidJson,
    JsonNotFound,
    Sha256,
    as_record,
    check_own_digest,
    read_object,
    with_own_digest,
)
from llama_lora.evaluation import Score

log = logging.getLogger(__name__)

MOST_FILES = 100  # of a few KB each; the oldest are deleted


@dataclass(frozen=True)
class Measured:
    """A model's losses of the first held-out rows, and its answers to the first prompts.

    ``cut``: the time was up, so that answers may end early.
    """

    score: Score
    answers: list[str]
    cut: bool


@dataclass(frozen=True)
class BaseScores(Measured):
    """The content of base-scores/KEY.json. ``run``: the run that wrote it."""

    run: str
    key: Sha256


def file_of(folder: Path, key: str) -> Path:
    """Where the scores of a key are."""
    return folder / f"{key[:16]}.json"


def read(folder: Path, key: str) -> BaseScores | None:
    """The kept scores of a key; None if there are none, or with a warning if the file is not as it was written."""
    file = file_of(folder, key)
    try:
        content = read_object(file)
        found = as_record(content, BaseScores)
        check_own_digest(content)
        if found.key != key:
            raise InvalidJson("is of another base model, other rows or other settings")
        return found
    except JsonNotFound:
        return None
    except InvalidJson as error:
        log.warning(f"{file} {error}: the base model is measured again")
        return None


def keep(folder: Path, scores: BaseScores) -> None:
    """Write scores for other runs. Nothing depends on it: a failure is only logged."""
    content = asdict(scores)
    try:
        files.write_json(file_of(folder, scores.key), with_own_digest(content))
        found = sorted(folder.glob("*.json*"), key=lambda file: file.lstat().st_mtime)  # also of killed writes
        for old in found[:-MOST_FILES]:
            old.unlink()
    except OSError as error:
        log.debug(f"the scores of the base model are not kept: {error}")
