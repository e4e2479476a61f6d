"""``genvalues cluster``: the commands that the chart's pods run. They parse arguments and print results."""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import click

from genvalues.common.errors import (
    EXIT_USER_ERROR,
    UserError,
    internal_error,
    traceback_wanted,
    user_errors_end_with_status_2,
)
from genvalues.common.system_errors import explain

STOPPED = 128 + signal.SIGTERM
GRACE = 25.0  # seconds from SIGTERM to the end of the gate; the kubelet waits 30
PREFLIGHT_PATIENCE_SECONDS = 8.0

config_option = click.option(
    "--config", type=click.Path(path_type=Path), required=True, help="The chart's cluster.yaml."
)


@click.group()
def cluster() -> None:
    """Commands for the chart's pods, which use the Kubernetes API."""


def stop(number: int, frame: Any) -> NoReturn:
    """Handle SIGTERM: exit with status 143."""
    sys.exit(STOPPED)


def stop_within_grace(number: int, frame: Any) -> NoReturn:
    """The same, within GRACE seconds even if a request blocks what still has to be done. Not where Helm must end first.

    An exit that is lost, because a library swallows the exception, is made up for too.
    """
    timer = threading.Timer(GRACE, os._exit, [STOPPED])
    timer.daemon = True
    timer.start()
    stop(number, frame)


def command(work: Callable[..., int]) -> Callable[..., None]:
    """Decorate a command: print errors, exit with the status that the chart expects, stop at once on SIGTERM."""

    @functools.wraps(work)
    @user_errors_end_with_status_2
    def wrapper(**options: Any) -> None:
        from genvalues.cluster.failures import RETRY
        from genvalues.cluster.kinds import ApiError, NotAllowed
        from genvalues.cluster.trainer_client import TrainerCommandFailed

        # Without a handler, a container's first process ignores SIGTERM, and its pod takes 30 s longer to stop.
        signal.signal(signal.SIGTERM, stop)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # the parent's mask is inherited
        try:
            status = work(**options)
        except NotAllowed as error:
            click.echo(f"{error}. Required permissions: see genvalues/cluster/__init__.py", err=True)
            status = EXIT_USER_ERROR
        except (ApiError, TrainerCommandFailed) as error:
            click.echo(str(error), err=True)
            status = RETRY
        except UserError:
            raise
        except Exception as error:  # Python's own status, 1, would mean that the stage has failed
            click.echo(
                explain(error) or internal_error(error, "genvalues", with_traceback=traceback_wanted()), err=True
            )
            status = RETRY
        sys.exit(status)

    return wrapper


@cluster.command("preflight")
@config_option
@command
def preflight_command(config: Path) -> int:
    """Check everything the pipeline needs from the cluster. Report all findings at once.

    \b
    Example:
        genvalues cluster preflight --config /etc/llama-lora/cluster.yaml
    """
    import time

    from genvalues.cluster import api, preflight
    from genvalues.cluster.config import load
    from genvalues.cluster.events import stage_events
    from genvalues.cluster.failures import RETRY, StageFailed
    from genvalues.common.findings import EXIT_UNANSWERED, exit_status, show

    settings = load(config)
    deadline = time.monotonic() + preflight.BUDGET_SECONDS
    server = api.connect(settings.namespace, patience=PREFLIGHT_PATIENCE_SECONDS, interval=1.0, deadline=deadline)
    try:
        with stage_events(server, "preflight", f"{settings.fullname}-preflight") as ending:
            findings = preflight.preflight(server, settings)
            show(findings, click.echo)
            status = exit_status(findings)
            if status == EXIT_USER_ERROR:
                raise StageFailed(next(f"{each.subject}: {each.found}" for each in findings if each.level == "error"))
            ending.message = f"{len(findings)} checks without an error"
    except StageFailed:
        return EXIT_USER_ERROR
    return RETRY if status == EXIT_UNANSWERED else status


@cluster.command("gate")
@config_option
@click.option("--run-config", type=click.Path(path_type=Path), required=True, help="The chart's run.yaml.")
@click.option("--stage", required=True, help="Name of the stage.")
@click.option("--job", required=True, help="Name of this revision's PyTorchJob or TrainJob.")
@command
def gate_command(config: Path, run_config: Path, stage: str, job: str) -> int:
    """Release a stage's job unless the stage is up to date, follow it, and exit with its outcome.

    \b
    Example:
        genvalues cluster gate --config /etc/llama-lora/cluster.yaml --run-config /etc/llama-lora/run.yaml \\
          --stage train --job llama-lora-train-3
    """
    from genvalues.cluster import api
    from genvalues.cluster.config import load
    from genvalues.cluster.events import JOB_UID, stage_events
    from genvalues.cluster.failures import StageFailed, describe_failure
    from genvalues.cluster.gate import gate
    from genvalues.cluster.succession import OwnJob
    from genvalues.cluster.trainer_client import read_stage_state

    signal.signal(signal.SIGTERM, stop_within_grace)
    settings = load(config)
    server = api.connect(settings.namespace)
    try:
        own = OwnJob(f"{settings.fullname}-{stage}-gate", os.environ.get(JOB_UID, ""))
        with stage_events(server, "gate", own.name) as ending:
            read_state = lambda of: read_stage_state(of, run_config)  # noqa: E731
            ending.message = gate(server, settings, stage, job, read_state, has_successor=own.has_successor)
    except StageFailed as failure:
        click.echo(describe_failure(stage, failure), err=True)  # the stream of the log, so that it is its end
        return failure.status
    return 0


@cluster.command("cleanup")
@click.option("--release", required=True, help="The release to stop.")
@click.option("--namespace", required=True, help="Its namespace.")
@click.option(
    "--run", default="", help="Value of the label llama-lora/run. Stages of RELEASE-run that have it are stopped too."
)
@click.option(
    "--workload",
    default="pytorchjob",
    show_default=True,
    type=click.Choice(["pytorchjob", "trainjob"]),
    help="The setting workload.",
)
@click.option(
    "--timeout-seconds", type=click.FloatRange(min=1), default=180.0, show_default=True, help="Fail after this time."
)
@click.option(
    "--own-job",
    type=(str, int),
    default=None,
    metavar="NAME SECONDS",
    help="Name of the Job that runs this command, and the deadline to set now that its pod has started.",
)
@command
def cleanup_command(
    release: str, namespace: str, run: str, workload: str, timeout_seconds: float, own_job: tuple[str, int] | None
) -> int:
    """Stop everything of a release that still runs, and wait until its pods are gone.

    \b
    Example:
        genvalues cluster cleanup --release llama-lora --namespace default
    """
    from genvalues.cluster import api, cleanup
    from genvalues.cluster.kinds import JOBS
    from genvalues.cluster.workloads import workload_for

    server = api.connect(namespace, patience=timeout_seconds)
    if own_job:
        server.patch(JOBS, own_job[0], {"spec": {"activeDeadlineSeconds": own_job[1]}})
    try:
        cleanup.cleanup(server, release, timeout_seconds, workload=workload_for(workload), run=run)
    except cleanup.StillRunning as problem:
        click.echo(str(problem), err=True)
        return 1
    return 0


@cluster.command("runner")
@config_option
@click.option("--chart", type=click.Path(path_type=Path), required=True, help="Path of the chart in the image.")
@click.option(
    "--values",
    type=click.Path(path_type=Path),
    required=True,
    help="Values of the inner release, rendered by the chart.",
)
@click.option("--own-job", required=True, help="Name of the Job that runs this command. Older runners are stopped.")
@command
def runner_command(config: Path, chart: Path, values: Path, own_job: str) -> int:
    """Run the pipeline as the release RELEASE-run, from inside the cluster.

    \b
    Example:
        genvalues cluster runner --config /etc/llama-lora/cluster.yaml --chart /opt/llama-lora/chart \\
          --values /etc/llama-lora/values.yaml --own-job llama-lora-runner-1
    """
    from genvalues.cluster import api, runner
    from genvalues.cluster.config import load

    settings = load(config)
    return runner.run(api.connect(settings.namespace), settings, chart, values, own_job)
