"""Inputs file to running pipeline: check, derive, take over what a killed Helm client left, and run Helm."""

from __future__ import annotations

import re
import shlex
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from genvalues.chart import need_chart
from genvalues.errors import Unavailable, UserError
from genvalues.files import write_text
from genvalues.helm import find_helm, run_helm
from genvalues.inputs import DNS_NAME
from genvalues.process import STOP_SIGNALS
from genvalues.sources import Sources
from genvalues.wording import one_line
from genvalues.write import checked, text_of

# Helm's --timeout, for each hook. Attached, training is one; detached, only the cleanup before an install, which gives
# up after 10 minutes of pulling the image and 200 s of work: that is told by its own Job.
TIMEOUT = {"attached": "48h", "detached": "15m"}
# A release's name, by Helm's rule; detached, the runner installs NAME-run.
LONGEST_NAME = {"attached": 53, "detached": 49}
INTERVAL = 2.0  # seconds between two looks at what is waited for
FIRST_ANSWER_SECONDS = 10.0  # from then on, a server that is away for a while is waited for


def install(
    sources: Sources,
    release: str | None,
    namespace: str | None,
    context: str | None,
) -> int:
    """Returns when Helm does: 0, or 1 when Helm failed."""
    found = checked(sources)
    values, file = found.values, sources.file
    chart = need_chart(sources.chart)
    mode = values["pipeline"]["mode"]
    release = release_name(release, values["name"], file, mode)
    find_helm()
    with told_when_stopped(release), tempfile.TemporaryDirectory() as folder:
        namespace = make_way(release, namespace, context)
        values_file = Path(folder) / "values.yaml"
        write_text(values_file, text_of(found, sources))
        # An absolute path: Helm could take a relative one for the name of a repository.
        arguments = ["upgrade", "--install", release, str(chart.resolve()), "-f", str(values_file)]
        arguments += ["--namespace", namespace, *(["--kube-context", context] if context else [])]
        arguments += ["--timeout", TIMEOUT[mode]]
        say(f"{file} is right. Running: helm {shlex.join(arguments)}")
        return 1 if run_helm(arguments) else 0


def release_name(wanted: str | None, name: str, file: Path, mode: str) -> str:
    release = wanted if wanted is not None else name
    longest = LONGEST_NAME[mode]
    if len(release) <= longest and re.fullmatch(DNS_NAME, release):
        return release
    where = "--release" if wanted is not None else f"{file}: name"
    what = f'"{one_line(release)}" is no name for a release'
    raise UserError(what, where=where, fix=f"Give --release at most {longest} of a-z, 0-9 and hyphens.")


def make_way(release: str, namespace: str | None, context: str | None) -> str:
    """Take the release over if a killed Helm client has left it pending; the namespace, which may be the context's."""
    from genvalues.cluster import api, recovery

    server = api.connect(namespace, context=context, patience=FIRST_ANSWER_SECONDS)
    try:
        if recovery.pending(server, release):
            server = api.connect(namespace, context=context, say=say)
            recovery.take_over(server, release, say, interval=INTERVAL)
    except api.ServerAway as error:
        raise Unavailable(f"{error.message}. Look: kubectl cluster-info") from None
    except api.ApiError as error:
        fix = "Ask the cluster's administrator for it, or name another cluster with --kube-context."
        raise UserError(error.message, where=f"namespace {server.namespace}", fix=fix) from None
    return server.namespace


@contextmanager
def told_when_stopped(release: str) -> Iterator[None]:
    """A signal that asks for the end ends what runs here, Helm too, and then us with status 128 and its number."""

    def stop(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = {number: signal.signal(number, stop) for number in STOP_SIGNALS}
    try:
        yield
    except SystemExit:
        say(f"Stopped. What the cluster has begun of {release} goes on; the same command takes it up again.")
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
