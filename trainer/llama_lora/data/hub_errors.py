"""Translate errors of the Hugging Face Hub into errors that say what the user must change."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from genvalues.common.errors import Unavailable, UserError
from genvalues.common.text import is_web_address, one_line
from llama_lora.environment import proxy_variables, without_passwords

UNAUTHORIZED, FORBIDDEN = 401, 403
PARQUET_REVISION = "refs/convert/parquet"  # the branch on which the Hub keeps Parquet files of a dataset
# What huggingface_hub raises for an answer of any content, such as the page of a proxy, or a Retry-After of 10^14.
NOT_OF_THE_HUB = (AttributeError, LookupError, OverflowError, TypeError, ValueError)


@contextmanager
def translate_hub_errors(key: str, name: str, *, dataset: bool = False) -> Iterator[None]:
    """Within the block, Hub errors that the user must fix become UserErrors for ``key``; others become Unavailable.

    A gated repository allows access to its metadata and refuses its files.
    """
    from huggingface_hub import errors

    from llama_lora.library_versions import hub_connection_errors

    name = one_line(name, 255)
    page = f"https://huggingface.co/{'datasets/' if dataset else ''}{name}"
    check_hub_variables()
    limit_waits()
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
        what = one_line(" ".join(str(first or error).split()), 300)
        raise Unavailable(f"{name}: request to the Hugging Face Hub failed: {what}") from None
    except NOT_OF_THE_HUB as error:
        raise Unavailable(f"{name}: this is not an answer of the Hugging Face Hub: {brief(error)}") from None


def check_hub_variables() -> None:
    """Raise UserError for an environment variable that huggingface_hub or its HTTP client cannot use.

    Values are not shown: a token, or the URL of a proxy with a password.
    """
    from huggingface_hub.utils import get_session

    if not is_web_address(os.environ.get("HF_ENDPOINT") or "https://huggingface.co"):
        fix = "Write https://HOST, or unset it for the Hugging Face Hub."
        raise UserError("is not the URL of a Hub", where="HF_ENDPOINT", fix=fix)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if not os.environ.get(name, "").isascii():
            fix = "Copy the token again; in a pod it is in the Secret of the stage."
            raise UserError("has a character that is in no token", where=name, fix=fix)
    for name in proxy_variables():
        value = os.environ[name]
        if not is_web_address(value if "://" in value else f"http://{value}", ("socks5", "socks5h")):
            raise UserError("is not the URL of a proxy", where=name, fix="Write http://HOST:PORT, or unset it.")
    try:
        get_session()
    except OSError as error:
        name = next((each for each in ("SSL_CERT_FILE", "SSL_CERT_DIR") if os.environ.get(each)), "")
        if not name:
            raise
        what = f"{one_line(os.environ[name], 255)} has no certificates: {error.strerror}"
        fix = "Name a file with the certificates of authorities, in PEM, or unset it."
        raise UserError(what, where=name, fix=fix) from None
    except (ImportError, ValueError) as error:  # socksio is missing, which SOCKS needs
        names = " and ".join(proxy_variables())
        if not names:
            raise
        raise UserError(one_line(without_passwords(str(error)), 200), where=names, fix="Name another proxy.") from None


def limit_waits(most_seconds: float | None = None) -> None:
    """Limit the wait in each request to the Hub that has no time limit: for a connection, and for each byte.

    The default is HF_HUB_DOWNLOAD_TIMEOUT (10 s). huggingface_hub waits forever for an answer to a request of metadata.
    A transfer that goes on has no limit.
    """
    from huggingface_hub import constants

    from llama_lora.library_versions import limit_hub_waits

    limit_hub_waits(float(constants.HF_HUB_DOWNLOAD_TIMEOUT if most_seconds is None else most_seconds))


@contextmanager
def translate_dataset_errors(key: str, name: str) -> Iterator[None]:
    """Within the block, errors of `datasets` become UserErrors for the block of settings ``key``.

    Those of the Hub that caused them are translated as by translate_hub_errors. A full disk, and unknown errors, pass.
    """
    with translate_hub_errors(f"{key}.source", name, dataset=True):
        try:
            yield
        except (UserError, Unavailable):
            raise
        except Exception as error:
            raise _dataset_error(key, name, error) from None


def _dataset_error(key: str, name: str, error: Exception) -> Exception:
    """The error to raise for an error of `datasets`."""
    import pyarrow
    from datasets import exceptions
    from datasets.table import CastError
    from huggingface_hub import errors

    from llama_lora.library_versions import hub_connection_errors

    causes = list(_causes(error))
    hub_errors = (errors.HfHubHTTPError, errors.HFValidationError, errors.LocalEntryNotFoundError)
    for each in causes:
        if isinstance(each, (*hub_errors, *hub_connection_errors())):
            return each
    if any(isinstance(each, OSError) and each.errno in (errno.ENOSPC, errno.EDQUOT) for each in causes):
        return error
    if any(isinstance(each, (ConnectionError, TimeoutError)) for each in causes):
        return Unavailable(f"{name}: the Hugging Face Hub cannot be reached.")
    page = f"https://huggingface.co/datasets/{name}"
    if "scripts are no longer supported" in str(error):
        return UserError(
            f"{name} is read by a Python script, which `datasets` no longer runs",
            where=f"{key}.revision",
            fix=f"Set it to {PARQUET_REVISION}: there the Hub keeps the same rows as Parquet files ({page}).",
        )
    if any(isinstance(each, CastError) or "Schema at index" in str(each) for each in causes):
        what, fix = "its files have different columns", f"Set {key}.config, or name files with the same columns."
    elif any(isinstance(each, FileNotFoundError) for each in causes):
        what, fix = f"a file is missing: {error}", f"See {page}: it may be gated or have no data files."
    else:
        known = (exceptions.DatasetsError, pyarrow.ArrowInvalid, RuntimeError, ValueError, TypeError, LookupError)
        if not isinstance(error, (*known, ImportError, AttributeError)):
            return error
        what = f"{type(causes[-1]).__name__}: {causes[-1]}"
        fix = f"Check {key}.config and {key}.split with {page}, or use {key}.revision: {PARQUET_REVISION}."
    return UserError(f"`datasets` cannot read {name}: {one_line(what, 300)}", where=f"{key}.source", fix=fix)


def _causes(error: BaseException | None) -> Iterator[Exception]:
    """An error and those that led to it, the first last."""
    while isinstance(error, Exception):
        yield error
        error = error.__cause__ or error.__context__


def brief(error: Exception) -> str:
    """The kind of an error and the first line of its message."""
    line, *_ = str(error).strip().splitlines() or [""]
    return one_line(f"{type(error).__name__}: {line}", 300)
