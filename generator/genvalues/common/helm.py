"""Helm: found, asked for a rendering (by pyhelm3), or run."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from genvalues.common.errors import Unavailable, UserError
from genvalues.common.text import one_line

Answer = TypeVar("Answer")

GET_HELM = "Run `make setup`, or install Helm 3.14 or newer: https://helm.sh/docs/intro/install/"


STDERR = 2  # the file descriptor, for Helm's words where stdout is for a document


class NoSuchRelease(UserError):
    """Names those ``there`` are."""

    def __init__(self, release: str, namespace: str, there: Sequence[str]) -> None:
        names = ", ".join(sorted(there))
        fix = f"There: {names}." if names else "There is none here: look in another with --namespace."
        super().__init__(f'no release "{one_line(release)}"', where=f"namespace {namespace}", fix=fix)


def find_helm() -> str:
    """The helm beside this Python (where `make setup` puts it), else the one on PATH."""
    beside = Path(sys.executable).with_name("helm")
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which("helm")
    if not found:
        raise UserError("helm is not to be found", fix=GET_HELM)
    return found


def run_helm(
    arguments: list[str],
    *,
    meanwhile: Callable[[], None] | None = None,
    interval: float = 2.0,
    output: int | None = None,
) -> int:
    """Helm, with our own output (or its stdout to the file ``output``); stopped when we are. ``meanwhile`` is called
    every ``interval`` seconds as long as Helm runs.

    Not pyhelm3: it holds the output back until the end, which is hours away, and stops only the shell around Helm.
    """
    helm = find_helm()
    try:
        started = subprocess.Popen([helm, *arguments], stdout=output)
    except OSError as error:
        raise UserError(f"{helm} does not run: {error.strerror}", fix=GET_HELM) from None
    with started as process:
        try:
            while True:
                try:
                    process.wait(interval if meanwhile else None)
                    break
                except subprocess.TimeoutExpired:
                    assert meanwhile is not None
                    meanwhile()
        finally:
            if process.poll() is None:
                process.terminate()  # Helm marks the release as failed and leaves the stage's Job running
                process.wait()
    return process.returncode


def client(context: str | None = None) -> Any:
    """pyhelm3's, of the helm that find_helm finds."""
    return client_of(find_helm(), context)


@functools.cache
def client_of(helm: str, context: str | None) -> Any:
    """Once, because it asks helm for its version."""
    import pyhelm3

    logging.getLogger("pyhelm3").setLevel(logging.ERROR)  # the errors here say the same, once
    try:
        return pyhelm3.Client(executable=helm, kubecontext=context)
    except (ValueError, OSError, subprocess.CalledProcessError) as error:  # no SemVer version, or no version at all
        raise UserError(f"{helm} does not say its version: {error}", fix=GET_HELM) from None


def asked(question: Callable[[], Awaitable[Answer]], what: str) -> Answer | None:
    """Helm's answer about a cluster; None when there is no such release. ``what`` was asked, for the error's place.

    Raises Unavailable when the cluster cannot be reached, and UserError for what else Helm complains about, such as a
    right that is missing.
    """
    import pyhelm3

    async def ask() -> Answer:
        return await question()

    try:
        return asyncio.run(ask())
    except pyhelm3.errors.ReleaseNotFoundError:
        return None
    except pyhelm3.Error as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines()
        message = " ".join(line.strip() for line in lines if "WARNING" not in line).removeprefix("Error: ")
        if any(word in message.lower() for word in AWAY) and "does not exist" not in message:
            raise Unavailable(f"{what}: {message}. Look: kubectl cluster-info") from None
        raise UserError(message, where=what) from None


# What Helm says, in both versions, when the API server gives no answer.
AWAY = ("unreachable", "connection refused", "timed out", "timeout", "no such host", "connection reset", "eof")


def revision(release: str, namespace: str, context: str | None) -> tuple[Any, list[Any], list[Any]] | None:
    """pyhelm3's ReleaseRevision of the newest revision, its hooks and its rendered objects; None for no release."""
    of = client(context)

    async def ask() -> tuple[Any, list[Any], list[Any]]:
        found = await of.get_current_revision(release, namespace=namespace)
        return found, list(await found.hooks()), list(await found.resources())

    return asked(ask, f"release {release}")


def user_values(release: str, namespace: str, context: str | None, *, computed: bool = False) -> dict[str, Any]:
    """The values that the release was given, or with ``computed`` those on top of the chart's; {} for no release."""
    of = client(context)

    async def ask() -> dict[str, Any]:
        found = await of.get_current_revision(release, namespace=namespace)
        return dict(await found.values(computed=computed))

    return asked(ask, f"release {release}") or {}


def releases(namespace: str, context: str | None) -> list[str]:
    """The names of the releases in a namespace, whatever their state."""
    of = client(context)
    every = ("deployed", "failed", "pending", "uninstalling")

    async def ask() -> list[str]:
        listed = await of.list_releases(namespace=namespace, **{f"include_{state}": True for state in every})
        return [one.name for one in listed]

    return asked(ask, f"namespace {namespace}") or []


def render(chart: Path, release: str, values: dict[str, Any], namespace: str = "default") -> list[dict[str, Any]]:
    """The chart's objects for these values, hooks included. Needs no cluster."""
    import pyhelm3

    of = client()

    async def template() -> list[dict[str, Any]]:
        # An absolute path: Helm could take a relative one for the name of a repository.
        found = await of.get_chart(chart.resolve())
        objects = await of.template_resources(found, release, values, namespace=namespace)
        return [item for item in objects if item]

    try:
        return asyncio.run(template())
    except pyhelm3.Error as error:
        message = error.stderr.decode(errors="replace").strip().removeprefix("Error: ")
        raise UserError(f"Helm cannot render the chart:\n{message}", where=str(chart)) from None
    except ValueError as error:  # a Chart.yaml that Helm takes and pyhelm3 does not, or values that hold themselves
        raise UserError(f"cannot be rendered: {' '.join(str(error).split())}", where=str(chart)) from None
