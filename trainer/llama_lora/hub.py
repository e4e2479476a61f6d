"""What the Hugging Face Hub answers, as what the user has to change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from genvalues.common.errors import Unavailable, UserError

UNAUTHORIZED, FORBIDDEN = 401, 403


@contextmanager
def translate_errors(key: str, name: str, *, dataset: bool = False) -> Iterator[None]:
    """Around a call to the Hub: its refusals become UserErrors that name ``key``.

    Gated repositories answer for their metadata and refuse their files. Raises Unavailable where it cannot be reached.
    """
    import requests
    from huggingface_hub import errors

    page = f"https://huggingface.co/{'datasets/' if dataset else ''}{name}"
    try:
        yield
    except errors.GatedRepoError:
        raise UserError(
            f"{name} is gated, and this token's account has not been given access",
            where=key,
            fix=f"Accept its terms at {page}, with the account huggingFace.tokenSecret is of.",
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{name} has no such revision", where=key, fix=f"Write one of {page}/tree/main.") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise UserError(
            f"the Hugging Face Hub knows no {name}, or it is private and the token may not see it",
            where=key,
            fix="Check the id; for a private one set huggingFace.tokenSecret.",
        ) from None
    except (requests.ConnectionError, requests.Timeout, errors.OfflineModeIsEnabled):
        raise Unavailable(f"The Hugging Face Hub cannot be reached for {name}.") from None
    except errors.HfHubHTTPError as error:
        # snapshot_download wraps what it met first into "not in the local cache either".
        met = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else error
        response = met.response if isinstance(met, errors.HfHubHTTPError) else None
        if response is not None and response.status_code == UNAUTHORIZED:
            raise UserError(
                "the Hugging Face Hub does not accept the token", where="huggingFace.tokenSecret", fix="Make a new one."
            ) from None
        if response is not None and response.status_code == FORBIDDEN:
            raise UserError(
                f"the token may not read {name}",
                where="huggingFace.tokenSecret",
                fix="Give it read access to gated repositories, or use a classic read token.",
            ) from None
        raise Unavailable(f"The Hugging Face Hub fails for {name}: {met or error}") from None
