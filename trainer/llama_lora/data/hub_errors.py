"""Translate errors of the Hugging Face Hub into errors that say what the user must change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from genvalues.common.errors import Unavailable, UserError

UNAUTHORIZED, FORBIDDEN = 401, 403


@contextmanager
def translate_hub_errors(key: str, name: str, *, dataset: bool = False) -> Iterator[None]:
    """Within the block, Hub errors that the user must fix become UserErrors for ``key``; others become Unavailable.

    A gated repository allows access to its metadata and refuses its files.
    """
    from huggingface_hub import errors

    from llama_lora.library_versions import hub_connection_errors

    page = f"https://huggingface.co/{'datasets/' if dataset else ''}{name}"
    try:
        yield
    except errors.GatedRepoError:
        raise UserError(
            f"{name} is gated, and the token's account has no access to it",
            where=key,
            fix=f"Accept its terms at {page} with the account of huggingFace.tokenSecret.",
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{name} has no such revision", where=key, fix=f"Choose one from {page}/tree/main.") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise UserError(
            f"{name} not found on the Hugging Face Hub, or private and not readable with this token",
            where=key,
            fix="Check the id. A private repository needs huggingFace.tokenSecret.",
        ) from None
    except hub_connection_errors():
        raise Unavailable(f"{name}: the Hugging Face Hub cannot be reached.") from None
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError) as error:
        # snapshot_download raises LocalEntryNotFoundError from the first error.
        first = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else error
        response = first.response if isinstance(first, errors.HfHubHTTPError) else None
        if response is not None and response.status_code == UNAUTHORIZED:
            raise UserError(
                "the Hugging Face Hub rejects the token", where="huggingFace.tokenSecret", fix="Create a new token."
            ) from None
        if response is not None and response.status_code == FORBIDDEN:
            raise UserError(
                f"the token has no permission to read {name}",
                where="huggingFace.tokenSecret",
                fix="Allow read access to gated repositories, or use a classic read token.",
            ) from None
        raise Unavailable(f"{name}: request to the Hugging Face Hub failed: {first or error}") from None
