"""``genvalues cluster``: the commands that the chart's pods run. They parse and print; the work is in their modules."""

from __future__ import annotations

import functools
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from genvalues.common.errors import EXIT_USER_ERROR, UserError, user_errors_end_with_status_2

TRY_AGAIN = 3  # see genvalues.cluster: the command itself could not do its work
STOPPED = 143
PREFLIGHT_PATIENCE_SECONDS = 8.0

config_option = click.option(
    "--config", type=click.Path(path_type=Path), required=True, help="The chart's cluster.yaml."
)


@click.group()
def cluster() -> None:
    """What the chart's pods do with the Kubernetes API."""


def command(work: Callable[..., int]) -> Callable[..., None]:
    """Print errors once, end with the status the chart acts on, and at once when asked to stop."""

    @functools.wraps(work)
    @user_errors_end_with_status_2
    def wrapper(**options: Any) -> None:
        from genvalues.cluster.api import ApiError, NotAllowed
        from genvalues.cluster.trainer_client import CannotAsk

        # A container's first process ignores SIGTERM unless it says otherwise, and would cost its pod 30 s.
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(STOPPED))
        try:
            status = work(**options)
        except NotAllowed as error:
            click.echo(f"{error}. The chart's RBAC for this command is in genvalues/cluster/__init__.py", err=True)
            status = EXIT_USER_ERROR
        except (ApiError, CannotAsk) as error:
            click.echo(str(error), err=True)
            status = TRY_AGAIN
        except UserError:
            raise
        except Exception:  # a defect of ours; Python's own status 1 would say that the stage has failed
            traceback.print_exc()
            status = TRY_AGAIN
        sys.exit(status)

    return wrapper


@cluster.command("preflight")
@config_option
@command
def preflight_command(config: Path) -> int:
    """Check everything the pipeline needs from the cluster; all findings at once.

    \b
    Example:
        genvalues cluster preflight --config /etc/llama-lora/cluster.yaml
    """
    import time

    from genvalues.cluster import api, preflight
    from genvalues.cluster.config import load
    from genvalues.common.findings import EXIT_UNANSWERED, exit_status, show

    settings = load(config)
    deadline = time.monotonic() + preflight.BUDGET_SECONDS
    server = api.connect(settings.namespace, patience=PREFLIGHT_PATIENCE_SECONDS, interval=1.0, deadline=deadline)
    findings = preflight.preflight(server, settings)
    show(findings, click.echo)
    status = exit_status(findings)
    return TRY_AGAIN if status == EXIT_UNANSWERED else status


@cluster.command("gate")
@config_option
@click.option("--run-config", type=click.Path(path_type=Path), required=True, help="The chart's run.yaml.")
@click.option("--stage", required=True, help="The stage whose PyTorchJob this gate releases.")
@click.option("--job", required=True, help="This revision's PyTorchJob.")
@command
def gate_command(config: Path, run_config: Path, stage: str, job: str) -> int:
    """Release a stage's PyTorchJob if it has something to do, follow it, and end as it ends.

    \b
    Example:
        genvalues cluster gate --config /etc/llama-lora/cluster.yaml --run-config /etc/llama-lora/run.yaml \\
          --stage train --job llama-lora-train-3
    """
    from genvalues.cluster import api
    from genvalues.cluster.config import load
    from genvalues.cluster.failures import StageFailed, describe_failure
    from genvalues.cluster.gate import gate
    from genvalues.cluster.trainer_client import ask_trainer

    settings = load(config)
    server = api.connect(settings.namespace, say=click.echo)
    try:
        gate(server, settings, stage, job, lambda of: ask_trainer(of, run_config), click.echo)
    except StageFailed as failure:
        click.echo(describe_failure(stage, failure))
        return failure.status
    return 0


@cluster.command("cleanup")
@click.option("--release", required=True, help="The release to stop.")
@click.option("--namespace", required=True, help="Where it is.")
@click.option("--run", default="", help="The run's label: of RELEASE-run, stages that have it are stopped too.")
@click.option(
    "--timeout-seconds", type=click.FloatRange(min=1), default=180.0, show_default=True, help="Until this gives up."
)
@click.option(
    "--own-job",
    type=(str, int),
    default=None,
    metavar="NAME SECONDS",
    help="The Job that this runs in, and the deadline it gets now that its pod has started.",
)
@command
def cleanup_command(
    release: str, namespace: str, run: str, timeout_seconds: float, own_job: tuple[str, int] | None
) -> int:
    """Stop what still runs of a release, and wait until its pods are gone.

    \b
    Example:
        genvalues cluster cleanup --release llama-lora --namespace default
    """
    from genvalues.cluster import api, cleanup

    server = api.connect(namespace, patience=timeout_seconds, say=click.echo)
    if own_job:
        server.patch(api.JOBS, own_job[0], {"spec": {"activeDeadlineSeconds": own_job[1]}})
    try:
        cleanup.cleanup(server, release, timeout_seconds, click.echo, run=run)
    except cleanup.StillRunning as problem:
        click.echo(str(problem), err=True)
        return 1
    return 0


@cluster.command("runner")
@config_option
@click.option("--chart", type=click.Path(path_type=Path), required=True, help="The chart in the image.")
@click.option(
    "--values",
    type=click.Path(path_type=Path),
    required=True,
    help="The inner release's values, as the chart renders them.",
)
@click.option("--own-job", required=True, help="The Job that this runs in; older runners are stopped.")
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
    return runner.run(api.connect(settings.namespace, say=click.echo), settings, chart, values, own_job, click.echo)
