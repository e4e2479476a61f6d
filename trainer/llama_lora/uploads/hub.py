"""Upload files to a repository of the Hugging Face Hub, in one commit: it has all of them or none.

What the Hub has of large files already, from an upload that was killed, is not sent again.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from genvalues.common.errors import Unavailable, UserError
from llama_lora.data.hub_errors import (
    FORBIDDEN,
    NOT_OF_THE_HUB,
    UNAUTHORIZED,
    brief,
    check_hub_variables,
    limit_waits,
)
from llama_lora.uploads import File, check_digest, published_files

log = logging.getLogger(__name__)

MANIFEST = "llama-lora.json"
OF_THE_HUB = {".gitattributes"}  # what a new repository has
TOKEN_KEY = "publish.hub.tokenSecret"
# Of silence, not of an upload: before it answers, the Hub assembles the parts of a large file, and checks a commit.
MOST_SILENCE = 300.0


def upload(key: str, repository: str, run: str, files: Sequence[File], manifest: bytes, *, private: bool) -> str:
    """Make the repository's files those of ``files``, and return the commit. Files of other commits are kept.

    ``key`` is the setting that names the repository. Raises UserError for what the user must change, such as a
    repository with content of someone else, and Unavailable for what a retry may resolve.
    """
    check_hub_variables()
    limit_waits(MOST_SILENCE)
    with translate_errors(key, repository):
        return HubUpload(key, repository, run).put_all(files, manifest, private)


class HubUpload:
    def __init__(self, key: str, repository: str, run: str) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
        self.key = key
        self.repository = repository
        self.run = run
        self.api = HfApi()

    def put_all(self, files: Sequence[File], manifest: bytes, private: bool) -> str:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        info = self.repository_info(private)
        there = {each.rfilename: each for each in info.siblings or []}
        before = self.read_manifest(there)
        missing = [file for file in files if not same(there.get(file.name), file)]
        if before is not None and before[0] == manifest and not missing:
            log.info(f"{self.repository}: {len(files)} files are there already")
            return str(info.sha)
        for file in missing:
            check_digest(file)
        stale = sorted((set(before[1]) if before else set()) & there.keys() - {file.name for file in files})
        operations: list[Any] = [CommitOperationAdd(file.name, str(file.path)) for file in missing]
        operations += [CommitOperationDelete(name) for name in stale]
        operations.append(CommitOperationAdd(MANIFEST, manifest))
        log.info(f"{self.repository}: uploading {len(missing)} files, {len(files) - len(missing)} are there already")
        commit = self.api.create_commit(
            self.repository, operations, commit_message=f"llama-lora: run {self.run}", parent_commit=info.sha
        )
        after = self.api.model_info(self.repository, revision=commit.oid, files_metadata=True)
        uploaded = {each.rfilename: each for each in after.siblings or []}
        for file in files:
            if not same(uploaded.get(file.name), file):
                raise Unavailable(f"{self.repository}: the Hub does not return what was uploaded as {file.name}.")
        log.info(f"{self.repository}: commit {commit.oid}")
        return str(commit.oid)

    def repository_info(self, private: bool) -> Any:
        """The repository as it is; made if it does not exist. Raises UserError if it is public, and must not be."""
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            info = self.api.model_info(self.repository, files_metadata=True)
        except RepositoryNotFoundError:
            self.api.create_repo(self.repository, private=private, exist_ok=True)
            info = self.api.model_info(self.repository, files_metadata=True)
        if private and not info.private:
            raise UserError(
                f"the repository {self.repository} is public",
                where=self.key,
                fix="Make it private on the Hub, or set publish.hub.private: false.",
            )
        return info

    def read_manifest(self, there: dict[str, Any]) -> tuple[bytes, dict[str, Any]] | None:
        """The manifest of the last upload and its files; None in a new repository.

        Raises UserError if the repository has files that llama-lora did not write for this run.
        """
        if MANIFEST not in there:
            if others := sorted(there.keys() - OF_THE_HUB):
                raise UserError(
                    f"the repository {self.repository} has files that llama-lora did not write: {others[0]}",
                    where=self.key,
                    fix="Name a repository that is new or empty.",
                )
            return None
        with tempfile.TemporaryDirectory() as folder:
            content = Path(self.api.hf_hub_download(self.repository, MANIFEST, cache_dir=folder)).read_bytes()
        return content, published_files(content, self.run, self.key, self.repository)


def same(sibling: Any, file: File) -> bool:
    """Whether a file of the repository has the file's size and digest: of a small file, git's of its content."""
    if sibling is None or sibling.size != file.bytes:
        return False
    if sibling.lfs:
        return bool(sibling.lfs.sha256 == file.sha256)
    digest = hashlib.sha1(f"blob {file.bytes}\0".encode(), usedforsecurity=False)
    with file.opened() as source:
        while piece := source.read(1 << 20):
            digest.update(piece)
    return bool(sibling.blob_id == digest.hexdigest())


@contextmanager
def translate_errors(key: str, repository: str) -> Iterator[None]:
    """Within the block, errors of the Hub that the user must fix become UserErrors; the others become Unavailable."""
    from huggingface_hub import errors

    from llama_lora.library_versions import hub_connection_errors

    try:
        yield
    except errors.HFValidationError as error:
        raise UserError(f"{repository} is not a valid name: {error}", where=key, fix="Write ORG/NAME.") from None
    except (errors.RepositoryNotFoundError, errors.GatedRepoError):
        raise UserError(
            f"the repository {repository} is not found, or this token cannot see it",
            where=key,
            fix=f"Use a token of {TOKEN_KEY} whose account may write to it.",
        ) from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status == UNAUTHORIZED:
            raise UserError(
                "the Hugging Face Hub rejects the token", where=TOKEN_KEY, fix="Create a new one."
            ) from None
        if status in (402, FORBIDDEN):
            raise UserError(
                f"the token may not write to {repository} (status {status})",
                where=TOKEN_KEY,
                fix="Use a token with the right to write to this repository, or one of this account's own.",
            ) from None
        raise Unavailable(f"{repository}: request to the Hugging Face Hub failed: {brief(error)}") from None
    except hub_connection_errors():
        raise Unavailable(f"{repository}: the Hugging Face Hub cannot be reached.") from None
    except (OSError, RuntimeError, *NOT_OF_THE_HUB) as error:  # hf_xet raises RuntimeError, LFS errors are ValueErrors
        raise Unavailable(f"{repository}: upload failed: {brief(error)}") from None
