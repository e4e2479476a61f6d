"""Helm: found, asked for a rendering (by pyhelm3), or run."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from genvalues.errors import UserError

GET_HELM = "Run `make setup`, or install Helm 3.14 or newer: https://helm.sh/docs/intro/install/"


def find_helm() -> str:
    """The helm beside this Python (where `make setup` puts it), else the one on PATH."""
    beside = Path(sys.executable).with_name("helm")
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which("helm")
    if not found:
        raise UserError("helm is not to be found", fix=GET_HELM)
    return found


def run_helm(arguments: list[str]) -> int:
    """Helm, with our own output; stopped when we are.

    Not pyhelm3: it holds the output back until the end, which is hours away, and stops only the shell around Helm.
    """
    helm = find_helm()
    try:
        started = subprocess.Popen([helm, *arguments])
    except OSError as error:
        raise UserError(f"{helm} does not run: {error.strerror}", fix=GET_HELM) from None
    with started as process:
        try:
            process.wait()
        finally:
            if process.poll() is None:
                process.terminate()  # Helm marks the release as failed and leaves the stage's Job running
                process.wait()
    return process.returncode


def render(chart: Path, release: str, values: dict[str, Any], namespace: str = "default") -> list[dict[str, Any]]:
    """The chart's objects for these values, hooks included. Needs no cluster."""
    import pyhelm3

    logging.getLogger("pyhelm3").setLevel(logging.ERROR)  # the error below says the same, once

    try:
        client = pyhelm3.Client(executable=find_helm())
    except (ValueError, OSError, subprocess.CalledProcessError) as error:  # no SemVer version, or no version at all
        raise UserError(f"{find_helm()} does not say its version: {error}", fix=GET_HELM) from None

    async def template() -> list[dict[str, Any]]:
        # An absolute path: Helm could take a relative one for the name of a repository.
        found = await client.get_chart(chart.resolve())
        objects = await client.template_resources(found, release, values, namespace=namespace)
        return [item for item in objects if item]

    try:
        return asyncio.run(template())
    except pyhelm3.Error as error:
        message = error.stderr.decode(errors="replace").strip().removeprefix("Error: ")
        raise UserError(f"Helm cannot render the chart:\n{message}", where=str(chart)) from None
    except ValueError as error:  # a Chart.yaml that Helm takes and pyhelm3 does not, or values that hold themselves
        raise UserError(f"cannot be rendered: {' '.join(str(error).split())}", where=str(chart)) from None
