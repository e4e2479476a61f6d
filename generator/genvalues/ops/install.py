"""Inputs file to running pipeline: check, ask the world, take over what a killed Helm client left, run Helm, follow."""

from __future__ import annotations

import json
import re
import shlex
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from genvalues.common import findings
from genvalues.common.errors import EXIT_USER_ERROR, Unavailable, UserError
from genvalues.common.files import write_text
from genvalues.common.helm import NoSuchRelease, find_helm, run_helm
from genvalues.common.process import STOP_SIGNALS
from genvalues.common.text import one_line
from genvalues.inputs.chart import need_chart
from genvalues.inputs.check import placed, unseen_by_pods
from genvalues.inputs.input_options import Sources
from genvalues.inputs.write import Checked, checked, text_of
from genvalues.settings.base import DNS_NAME

# Helm's --timeout, for each hook. Attached, training is one; detached, only the cleanup before an install, which gives
# up after 10 minutes of pulling the image and 200 s of work: that is told by its own Job.
TIMEOUT = {"attached": "48h", "detached": "15m"}
# A release's name, by Helm's rule; detached, the runner installs NAME-run.
LONGEST_NAME = {"attached": 53, "detached": 49}
INTERVAL = 2.0  # seconds between two looks at what is waited for
FIRST_ANSWER_SECONDS = 10.0  # from then on, a server that is away for a while is waited for


@dataclass(frozen=True)
class Where:
    """Which release; what is None is chosen as Helm chooses it."""

    release: str | None = None
    namespace: str | None = None
    context: str | None = None


def install(
    sources: Sources,
    where: Where,
    *,
    follow: bool = True,
    preflight: bool = True,
    as_json: bool = False,
) -> int:
    """Install and, with ``follow``, stay to the pipeline's end: 0 done, 2 where the user must change something (also an
    error that preflight has found, before Helm), 1 what else failed."""
    found = checked(sources)
    values, file = found.values, sources.file
    found.document.raise_mistakes(placed(one, found.document) for one in unseen_by_pods(values))
    chart = need_chart(sources.chart)
    mode = values["pipeline"]["mode"]
    release = release_name(where.release, values["name"], file, mode)
    find_helm()
    progress = Progress(release, mode)
    if line := plan_line(found):
        say(line)
    with told_when_stopped(progress), tempfile.TemporaryDirectory() as folder:
        if preflight and (answers := what_stops(found, release, where, chart)):
            if as_json:
                print(json.dumps({"release": release, **findings.as_json(answers)}, indent=2, ensure_ascii=False))
            return findings.exit_status(answers)
        namespace = progress.namespace = take_over_pending_release(release, where.namespace, where.context)
        values_file = Path(folder) / "values.yaml"
        write_text(values_file, text_of(found, sources))
        # An absolute path: Helm could take a relative one for the name of a repository.
        arguments = ["upgrade", "--install", release, str(chart.resolve()), "-f", str(values_file)]
        arguments += ["--namespace", namespace, *(["--kube-context", where.context] if where.context else [])]
        arguments += ["--timeout", TIMEOUT[mode]]
        say(f"{sources.are_right}. Running: helm {shlex.join(arguments)}")
        return Following(release, namespace, where.context, mode, progress).install(arguments, follow, as_json)


@dataclass
class Progress:
    """How far the command is: what a signal then means for the cluster."""

    release: str
    mode: str
    namespace: str = ""
    is_installed: bool = False  # Helm has ended well

    def when_stopped(self) -> str:
        if self.is_installed and self.mode == "detached":
            return f"Stopped following. The cluster goes on with {self.release}. Follow it again: {self.watched()}"
        return f"Stopped. What the cluster has begun of {self.release} goes on; the same command takes it up again."

    def when_not_followed(self) -> str:
        if self.mode == "detached":
            return f"The cluster goes on with {self.release}. Follow it: {self.watched()}"
        return f"{self.release}: done. Look: genvalues status {self.release} --namespace {self.namespace}"

    def watched(self) -> str:
        return f"genvalues status {self.release} --watch --namespace {self.namespace}"


def plan_line(found: Checked) -> str:
    """What the run takes, as far as it is known; nothing on the CPU, which costs nobody by the hour."""
    from genvalues.planner.report import figures

    plan = found.plan
    costed = plan.estimate
    if costed is None:
        return ""
    layout = plan.layout
    copies = f"tensor parallel {layout.tensor_parallel} x {layout.data_parallel} copies"
    parts = [f"{layout.nodes} x {plan.instance}, {copies}"]
    if costed.training_hours:
        parts.append(f"{figures(costed.training_hours)} hours of training")
    if costed.dollars:
        parts.append(figures(costed.dollars, "$"))
    return f"plan: {', '.join(parts)} (why: genvalues plan)"


def what_stops(found: Checked, release: str, where: Where, chart: Path) -> list[findings.Finding]:
    """All findings where an error is among them, which stops before Helm; none to go on. Asks AWS, the Hub and the
    cluster, and says what they answer.

    The one seam to genvalues.ops.preflight. Who gives no answer stops nothing: Helm and the stages will say so.
    """
    from genvalues.ops.preflight import run

    answers = run.run_preflight(found, namespace=where.namespace, context=where.context, release=release, chart=chart)
    findings.show(answers, say)
    return answers if findings.exit_status(answers) == EXIT_USER_ERROR else []


class Following:
    """Helm's command, and what is told of the release while it runs and after it."""

    def __init__(self, release: str, namespace: str, context: str | None, mode: str, progress: Progress) -> None:
        from genvalues.ops import follow
        from genvalues.ops.status import watcher

        self.mode = mode
        self.progress = progress
        self._said = ""
        self.follower = follow.Follower(watcher(release, namespace, context), say)

    def install(self, arguments: list[str], follow: bool, as_json: bool) -> int:
        # Attached, Helm itself stays to the end: there the stages are told meanwhile.
        attached = self.mode == "attached"
        # Helm's notes are for who installs with Helm alone: what they tell is told here. Not every Helm that we allow
        # has --hide-notes, and those that have it print more than notes.
        with tempfile.TemporaryFile() as held_back:
            status = run_helm(
                arguments, meanwhile=self.look if attached and follow else None, output=held_back.fileno()
            )
            if status:
                held_back.seek(0)
                for line in held_back.read().decode(errors="replace").splitlines():
                    say(line)
        self.progress.is_installed = status == 0
        if not follow:
            if status == 0:
                say(self.progress.when_not_followed())
            if not as_json:
                return 1 if status else 0
        if follow and not attached and status == 0:
            self.follower.to_the_end()
        return self.end(status, follow, as_json)

    def look(self) -> None:
        """One look while Helm works. Whatever keeps us from looking is no reason to stop Helm."""
        try:
            self.follower.look()
        except NoSuchRelease:  # Helm has not written its record yet
            pass
        except (UserError, Unavailable) as problem:
            self.say_once(str(problem))

    def say_once(self, line: str) -> None:
        if line != self._said:
            self._said = line
            say(line)

    def end(self, of_helm: int, follow: bool, as_json: bool) -> int:
        from genvalues.ops.follow import closing
        from genvalues.ops.status import as_json as document_of

        last = None
        try:
            last = self.follower.look()
        except NoSuchRelease:  # Helm has refused it, and said why
            pass
        except (UserError, Unavailable) as problem:
            self.say_once(str(problem))
        ours = 1 if of_helm else 0
        if last is not None and follow:
            # A stage that failed says more than Helm's own status, which is 1 for everything.
            ours = last.exit_status if last.outcome in ("failed", "stopped") or not of_helm else 1
            for line in closing(last):
                say(line)
        if as_json:
            document: dict[str, Any] = document_of(last) if last else {"release": self.progress.release}
            print(json.dumps({**document, "exitStatus": ours}, indent=2, ensure_ascii=False))
        return ours


def release_name(wanted: str | None, name: str, file: Path, mode: str) -> str:
    release = wanted if wanted is not None else name
    longest = LONGEST_NAME[mode]
    if len(release) <= longest and re.fullmatch(DNS_NAME, release):
        return release
    where = "--release" if wanted is not None else f"{file}: name"
    what = f'"{one_line(release)}" is no name for a release'
    raise UserError(what, where=where, fix=f"Give --release at most {longest} of a-z, 0-9 and hyphens.")


def take_over_pending_release(release: str, namespace: str | None, context: str | None) -> str:
    """Take the release over if a killed Helm client has left it pending; the namespace, which may be the context's."""
    from genvalues.cluster import api, recovery
    from genvalues.ops.status import told_in_a_line

    server = api.connect(namespace, context=context, patience=FIRST_ANSWER_SECONDS)
    with told_in_a_line(server.namespace):
        if recovery.pending(server, release):
            server = api.connect(namespace, context=context)
            recovery.take_over(server, release, interval=INTERVAL)
    return server.namespace


@contextmanager
def told_when_stopped(progress: Progress) -> Iterator[None]:
    """A signal that asks for the end ends what runs here, Helm too, and then us with status 128 and its number."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(128 + number)

    before = {number: signal.signal(number, stop) for number in STOP_SIGNALS}
    try:
        yield
    except Stopped:
        say(progress.when_stopped())
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Stopped(SystemExit):
    """By a signal."""


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
