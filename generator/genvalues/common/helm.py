"""Helm: find it, ask it about releases and renderings (through pyhelm3), run it."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import select
import shutil
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar

import yaml

from genvalues.common.errors import MOST_CHARACTERS, Unavailable, UserError
from genvalues.common.rendered_yaml import RESOLVERS
from genvalues.common.text import one_line, redacted

Answer = TypeVar("Answer")

OLDEST = (3, 14)
GET_HELM = "Run `make setup`, or install Helm 3.14 or newer: https://helm.sh/docs/intro/install/"
# What pyhelm3 raises for output of Helm that it does not expect. ValueError: not JSON, not UTF-8, or a missing field.
INVALID_OUTPUT = (AttributeError, LookupError, RecursionError, TypeError, ValueError, yaml.YAMLError)

STDERR = 2  # file descriptor, for Helm's output when stdout is for a document
LEFTOVER_SECONDS = 2.0  # to wait for the end of Helm's stderr, which a program that it started may hold open
SILENCE = 0.5  # seconds after which an unfinished line is shown: it may be a question


class NoSuchRelease(UserError):
    """The release does not exist. ``existing``: the names of those that do."""

    def __init__(self, release: str, namespace: str, existing: Sequence[str]) -> None:
        fix = (
            f"Releases: {', '.join(sorted(existing))}." if existing else "It has no releases; try another --namespace."
        )
        super().__init__(f'release "{one_line(release)}" not found', where=f"namespace {namespace}", fix=fix)


def find_helm() -> str:
    """The helm in this Python's folder, where `make setup` installs it, else the one on PATH."""
    beside = Path(sys.executable).with_name("helm")
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which("helm")
    if not found:
        raise UserError("helm not found", fix=GET_HELM)
    return found


def run_helm(
    arguments: list[str],
    *,
    hide: Callable[[str], str] = redacted,
    meanwhile: Callable[[], None] | None = None,
    interval: float = 2.0,
    output: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> int:
    """Run Helm and return its exit status. It is stopped when this process is.

    ``hide`` removes secrets from its stderr, which is shown as it comes. ``output``: file descriptor for its stdout
    (default: our own). ``environment``: variables besides our own. ``meanwhile`` is called every ``interval`` seconds
    while Helm runs. Does not use pyhelm3, which holds the output back until Helm ends, hours later, and stops only the
    shell around Helm. Raises UserError if helm is not found or cannot be started.
    """
    helm = find_helm()
    try:
        started = subprocess.Popen(
            [helm, *arguments], stdout=output, stderr=subprocess.PIPE, env={**os.environ, **(environment or {})}
        )
    except OSError as error:
        raise UserError(f"{helm} cannot be run: {error.strerror}", fix=GET_HELM) from None
    with started as process:
        assert process.stderr is not None
        shows = threading.Thread(target=show, args=(process.stderr, hide), daemon=True)
        shows.start()
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
                process.terminate()  # Helm marks the release as failed and does not stop the stage's Job
                process.wait()
            shows.join(LEFTOVER_SECONDS)
    return process.returncode


def show(stream: IO[bytes], hide: Callable[[str], str]) -> None:
    """Copy a program's stderr to ours without its secrets, whole lines at a time."""
    unfinished, ended = b"", False
    while not ended:
        silent = bool(unfinished) and not select.select([stream], [], [], SILENCE)[0]
        if not silent:
            output = os.read(stream.fileno(), 1 << 16)
            unfinished, ended = unfinished + output, not output
        lines, newline, rest = (unfinished, b"", b"") if silent or ended else unfinished.rpartition(b"\n")
        unfinished = rest
        with suppress(OSError, ValueError):  # ours is closed or full: Helm's is still read, or Helm would wait
            print(hide((lines + newline).decode(errors="replace")), end="", file=sys.stderr, flush=True)


def place_arguments(namespace: str, context: str | None) -> list[str]:
    return ["--namespace", namespace, *(["--kube-context", context] if context else [])]


def client(context: str | None = None) -> Any:
    """The pyhelm3 client of the helm that ``find_helm`` finds."""
    return client_of(find_helm(), context)


@functools.cache
def client_of(helm: str, context: str | None) -> Any:
    """Cached, because creating a client runs `helm version`."""
    import pyhelm3

    read_answers_with_libyaml()
    logging.getLogger("pyhelm3").setLevel(logging.ERROR)  # what it logs is raised as an error, too
    try:
        found = pyhelm3.Client(executable=helm, kubecontext=context)
    except (ValueError, OSError, subprocess.CalledProcessError) as error:  # a version that is not SemVer, or none
        what = f"cannot read the version of {helm}: {one_line(str(error), MOST_CHARACTERS)}"
        raise UserError(what, fix=GET_HELM) from None
    version = getattr(found, "version", None)  # pyhelm3 0.4 does not read it
    if version and (version.major, version.minor) < OLDEST:
        raise UserError(f"{helm} is Helm {version}", fix=GET_HELM)
    return found


def read_answers_with_libyaml() -> None:
    """Have pyhelm3 parse what Helm prints with libyaml, if PyYAML has it: a tenth of the time, which is most of a
    command's for a release with many objects."""
    from pyhelm3 import command, models

    if not hasattr(yaml, "CSafeLoader"):
        return

    class Loader(yaml.CSafeLoader):
        yaml_implicit_resolvers = RESOLVERS

    command.SafeLoader = models.SafeLoader = Loader


def asked(question: Callable[[], Awaitable[Answer]], what: str) -> Answer | None:
    """Return Helm's answer about a cluster; None if the release does not exist.

    ``what``: what is asked about, for error messages. Raises Unavailable if the cluster does not answer, and UserError
    for other errors of Helm, such as a missing right, and for output that is not Helm's.
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
        message = one_line(redacted(message), MOST_CHARACTERS)
        if any(word in message.lower() for word in AWAY) and "does not exist" not in message:
            raise Unavailable(f"{what}: {message}. Try: kubectl cluster-info") from None
        raise UserError(message, where=what) from None
    except INVALID_OUTPUT as error:
        raise invalid_output(error, what) from None


def invalid_output(error: Exception, where: str) -> UserError:
    problem = one_line(f"{type(error).__name__}: {error}", 200)
    return UserError(f"the output of {find_helm()} is not valid ({problem})", where=where, fix=GET_HELM)


def kubernetes_objects(documents: Iterable[Any]) -> list[dict[str, Any]]:
    """The documents that are not empty. Raises TypeError if they are not Kubernetes objects."""
    objects = [one for one in documents if one]
    for one in objects:
        if not (isinstance(one, dict) and isinstance(one.get("kind"), str) and isinstance(one.get("metadata"), dict)):
            raise TypeError("not a Kubernetes object")
    return objects


# Words in the errors of Helm 3 and 4 when the API server does not answer.
AWAY = ("unreachable", "connection refused", "timed out", "timeout", "no such host", "connection reset", "eof")


@contextmanager
def with_variables(environment: Mapping[str, str]) -> Iterator[None]:
    """Have these variables within the block: pyhelm3 gives Helm this process's own."""
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def revision(
    release: str, namespace: str, context: str | None, environment: Mapping[str, str] | None = None
) -> tuple[Any, list[Any], list[Any]] | None:
    """pyhelm3's ReleaseRevision of the newest revision, its hooks and its rendered objects; None if not found.

    ``environment``: variables besides our own.
    """
    of = client(context)

    async def ask() -> tuple[Any, list[Any], list[Any]]:
        found = await of.get_current_revision(release, namespace=namespace)
        hooks = list(await found.hooks())
        kubernetes_objects(hook.resource for hook in hooks)
        return found, hooks, kubernetes_objects(await found.resources())

    with with_variables(environment or {}):
        return asked(ask, f"release {release}")


def user_values(release: str, namespace: str, context: str | None, *, computed: bool = False) -> dict[str, Any]:
    """The values that the user set; with ``computed`` merged with the chart's defaults. {} if not found."""
    of = client(context)

    async def ask() -> dict[str, Any]:
        found = await of.get_current_revision(release, namespace=namespace)
        return dict(await found.values(computed=computed))

    return asked(ask, f"release {release}") or {}


def releases(namespace: str, context: str | None) -> list[str]:
    """The names of the releases in a namespace, in any state."""
    of = client(context)
    every = ("deployed", "failed", "pending", "uninstalling")

    async def ask() -> list[str]:
        listed = await of.list_releases(namespace=namespace, **{f"include_{state}": True for state in every})
        return [one.name for one in listed]

    return asked(ask, f"namespace {namespace}") or []


def render(chart: Path, release: str, values: dict[str, Any], namespace: str = "default") -> list[dict[str, Any]]:
    """Render the chart's objects, hooks included. Needs no cluster. Raises UserError if Helm or pyhelm3 refuses."""
    import pyhelm3

    of = client()

    async def template() -> list[dict[str, Any]]:
        # An absolute path: Helm could take a relative one for the name of a repository.
        found = await of.get_chart(chart.resolve())
        return kubernetes_objects(await of.template_resources(found, release, values, namespace=namespace))

    try:
        return asyncio.run(template())
    except pyhelm3.Error as error:
        message = redacted(error.stderr.decode(errors="replace")).strip().removeprefix("Error: ")
        raise UserError(f"Helm cannot render the chart:\n{message}", where=str(chart)) from None
    except UnicodeError as error:  # a ValueError, too
        raise invalid_output(error, str(chart)) from None
    except ValueError as error:  # a Chart.yaml that only pyhelm3 refuses, or recursive values
        fix = f"Check Chart.yaml, and that {find_helm()} is Helm 3.14 or newer."
        problem = redacted(" ".join(str(error).split()))
        raise UserError(f"cannot be rendered: {problem}", where=str(chart), fix=fix) from None
    except INVALID_OUTPUT as error:
        raise invalid_output(error, str(chart)) from None
