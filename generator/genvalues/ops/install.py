"""From an inputs file to a running pipeline: check, run preflight, take over a pending release, run Helm, follow."""

from __future__ import annotations

import logging
import re
import shlex
import signal
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
from genvalues.common.helm import NoSuchRelease, find_helm, place_arguments, run_helm
from genvalues.common.process import STOP_SIGNALS
from genvalues.common.text import one_line
from genvalues.inputs.chart import need_chart, on_top_of_defaults
from genvalues.inputs.check import placed, unseen_by_pods
from genvalues.inputs.input_options import Sources
from genvalues.inputs.write import Checked, checked, text_of
from genvalues.ops.redact import hide_secrets
from genvalues.settings.base import DNS_NAME

log = logging.getLogger(__name__)

# Helm's --timeout, for each hook. Attached, training is a hook. Detached, only the cleanup before an install is, which
# fails by itself after 10 minutes of pulling the image and 200 s of work.
TIMEOUT = {"attached": "48h", "detached": "15m"}
# Of a release's name, by Helm's rule; detached, the runner installs NAME-run.
LONGEST_NAME = {"attached": 53, "detached": 49}
INTERVAL = 2.0  # seconds between two looks while waiting
FIRST_ANSWER_SECONDS = 10.0  # a user waits for it; after it, requests are retried for longer


Report = tuple[int, dict[str, Any]]  # the exit status, and the document that --json prints


def install(
    sources: Sources,
    wanted: str | None,
    namespace: str | None,
    context: str | None,
    *,
    follow: bool,
    preflight: bool,
    as_json: bool,
) -> Report:
    """Install the release ``wanted`` (None: as the inputs name it) and, with ``follow``, stay until the pipeline ends.

    Exit status: 0 done; 2 if the user must change something, also if preflight finds an error, which stops before
    Helm; 1 for other failures. ``as_json``: the report needs its document. Raises UserError for invalid inputs.
    """
    found = checked(sources)
    values = found.values
    found.document.raise_mistakes(placed(one, found.document) for one in unseen_by_pods(values))
    chart = need_chart(sources.chart)
    complete = on_top_of_defaults(chart, values)  # chartValues may have a null over what the inputs say
    mode = complete["pipeline"]["mode"]
    release = release_name(wanted, complete["name"], sources.file, mode)
    find_helm()
    running = ReleaseInstall(release, mode, context)
    log_plan(found)
    with stopping_on_signals(running), tempfile.TemporaryDirectory() as folder:
        if preflight and (answers := preflight_errors(found, release, namespace, context, chart)):
            return findings.exit_status(answers), {"release": release, **findings.as_json(answers)}
        running.namespace = take_over_pending_release(release, namespace, context)
        values_file = Path(folder) / "values.yaml"
        write_text(values_file, text_of(found, sources))
        arguments = running.arguments(chart, values_file)
        log.info("No problems found. Running: helm %s", shlex.join(arguments))
        return running.install(arguments, follow=follow, as_json=as_json)


def release_name(wanted: str | None, name: str, file: Path, mode: str) -> str:
    """``wanted`` or else the ``name`` of the inputs. Raises UserError if Helm does not accept it."""
    release = wanted if wanted is not None else name
    longest = LONGEST_NAME[mode]
    if len(release) <= longest and re.fullmatch(DNS_NAME, release):
        return release
    where = "--release" if wanted is not None else f"{file}: name"
    what = f'"{one_line(release)}" is not a valid release name'
    raise UserError(what, where=where, fix=f"Set --release to at most {longest} characters of a-z, 0-9 and hyphens.")


def log_plan(found: Checked) -> None:
    """What the run uses and costs, as far as known; nothing on the CPU, which has no estimate."""
    from genvalues.planner.report import figures

    plan = found.plan
    costed = plan.estimate
    if costed is None:
        return
    layout = plan.layout
    copies = f"tensor parallel {layout.tensor_parallel} x {layout.data_parallel} copies"
    parts = [f"{layout.nodes} x {plan.instance}, {copies}"]
    if costed.training_hours:
        parts.append(f"{figures(costed.training_hours)} hours of training")
    if costed.dollars:
        parts.append(figures(costed.dollars, "$"))
    log.info("plan: %s (details: genvalues plan)", ", ".join(parts))


def preflight_errors(
    found: Checked, release: str, namespace: str | None, context: str | None, chart: Path
) -> list[findings.Finding]:
    """Run the preflight checks and log their findings. Returns all findings if one is an error, else none.

    The only caller of genvalues.ops.preflight here. A service that does not answer stops nothing: Helm and the stages
    report it.
    """
    from genvalues.ops.preflight import run

    answers = run.run_preflight(found, namespace=namespace, context=context, release=release, chart=chart)
    findings.show(answers, log.info)
    return answers if findings.exit_status(answers) == EXIT_USER_ERROR else []


def take_over_pending_release(release: str, namespace: str | None, context: str | None) -> str:
    """Take over a release that a killed Helm client has left pending; return the namespace (default: the context's)."""
    from genvalues.cluster import api, recovery
    from genvalues.ops.status import api_errors_as_user_errors

    server = api.connect(namespace, context=context, patience=FIRST_ANSWER_SECONDS)
    with api_errors_as_user_errors(server.namespace):
        if recovery.pending(server, release):
            server = api.connect(namespace, context=context)
            recovery.take_over(server, release, interval=INTERVAL)
    return server.namespace


@dataclass
class ReleaseInstall:
    """One ``helm upgrade --install``, and what is reported while it runs and after it."""

    release: str
    mode: str
    context: str | None
    namespace: str = ""
    is_installed: bool = False  # Helm has succeeded
    _problem: str = ""

    def arguments(self, chart: Path, values: Path) -> list[str]:
        # An absolute path: Helm could take a relative one for the name of a repository.
        arguments = ["upgrade", "--install", self.release, str(chart.resolve()), "-f", str(values)]
        return [*arguments, *place_arguments(self.namespace, self.context), "--timeout", TIMEOUT[self.mode]]

    def install(self, arguments: list[str], *, follow: bool, as_json: bool) -> Report:
        from genvalues.ops.follow import ReleaseFollower
        from genvalues.ops.status import watch_release

        self.follower = ReleaseFollower(watch_release(self.release, self.namespace, self.context))
        # Attached, Helm itself runs until the pipeline ends, so the stages are reported meanwhile.
        attached = self.mode == "attached"
        status = self.run(arguments, report_stages=attached and follow)
        self.is_installed = status == 0
        if not follow and status == 0:
            log.info(self.how_to_follow())
        if follow and not attached and status == 0:
            for line in self.follower.follow():
                log.info(line)
        if not follow and not as_json:
            return 1 if status else 0, {}
        return self.report(status, follow)

    def run(self, arguments: list[str], *, report_stages: bool) -> int:
        """Run Helm and return its exit status.

        Its notes are for users of Helm alone, so stdout is shown only if it fails. (Not every supported Helm has
        --hide-notes, and those that have it print more than notes.)
        """
        with tempfile.TemporaryFile() as output:
            meanwhile = self.look if report_stages else None
            status = run_helm(arguments, hide=hide_secrets, meanwhile=meanwhile, output=output.fileno())
            if status:
                output.seek(0)
                for line in hide_secrets(output.read().decode(errors="replace")).splitlines():
                    log.info("%s", line)
        return status

    def look(self) -> None:
        """Log what has changed. A failed look must not stop Helm, so it is only logged, once."""
        try:
            for line in self.follower.look():
                log.info(line)
        except NoSuchRelease:  # Helm has not written its record, or has refused the release and said why
            pass
        except (UserError, Unavailable) as problem:
            if str(problem) != self._problem:
                self._problem = str(problem)
                log.warning(self._problem)

    def report(self, of_helm: int, follow: bool) -> Report:
        from genvalues.ops.status_text import final_lines

        self.look()
        last = self.follower.status
        exit_status = 1 if of_helm else 0
        if last is not None and follow:
            # A stage that failed says more than Helm's exit status, which is 1 for everything.
            exit_status = last.exit_status if last.outcome in ("failed", "stopped") or not of_helm else 1
            log.log(logging.ERROR if exit_status else logging.INFO, "\n".join(final_lines(last)))
        document = last.document() if last else {"release": self.release}
        return exit_status, {**document, "exitStatus": exit_status}

    def when_stopped(self) -> str:
        if self.is_installed and self.mode == "detached":
            return f"Stopped following. The run continues in the cluster. To follow it again: {self.watch_command}"
        return f"Stopped. Stages of {self.release} that run in the cluster continue; run the same command to resume."

    def how_to_follow(self) -> str:
        if self.mode == "detached":
            return f"The run continues in the cluster. To follow it: {self.watch_command}"
        return f"{self.release}: done. For its status: genvalues status {self.release} --namespace {self.namespace}"

    @property
    def watch_command(self) -> str:
        return f"genvalues status {self.release} --watch --namespace {self.namespace}"


@contextmanager
def stopping_on_signals(running: ReleaseInstall) -> Iterator[None]:
    """On SIGINT, SIGTERM or SIGHUP stop what runs here, Helm included, and exit with status 128 + signal number."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise StoppedBySignal(128 + number)

    before = {number: signal.signal(number, stop) for number in STOP_SIGNALS}
    try:
        yield
    except StoppedBySignal:
        log.warning(running.when_stopped())
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StoppedBySignal(SystemExit):
    pass
