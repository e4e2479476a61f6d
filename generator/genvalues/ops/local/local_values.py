"""The values to run: from an inputs file, a values file, or an archive of ``genvalues bundle``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from genvalues.accelerators.instances import trainium
from genvalues.common.dicts import merge
from genvalues.common.errors import UserError, UserErrors
from genvalues.common.text import dotted, one_line, redacted
from genvalues.inputs.chart import load, on_top_of_defaults, part, refusals
from genvalues.inputs.input_options import Sources
from genvalues.inputs.yaml_text import UnreadableYAML, decode, load_as_helm
from genvalues.settings.run import with_own_words

log = logging.getLogger(__name__)

# The first Neuron device, as the driver names it (AWS Neuron documentation, "How to Build and Run a Neuron Container").
NEURON_DEVICE = Path("/dev/neuron0")


def values_to_run(sources: Sources, chart: Path, on_cpu: bool) -> dict[str, Any]:
    """The values for this computer. Raises UserErrors for what the inputs' checks or the chart's schema refuse."""
    file = sources.file
    if file.name.endswith((".tar.gz", ".tgz")):
        refuse_input_options(sources)
        values = values_of_bundle(file, chart)
    elif is_inputs_file(sources, chart):
        from genvalues.inputs.write import checked

        values = checked(sources).values
    else:
        refuse_input_options(sources)
        values = read_values(file)
    values = with_own_words(values)
    if on_cpu:
        values = values_on_cpu(values)
    elif trainium(str(values.get("instance"))) and not NEURON_DEVICE.exists():
        what = f"instance {values['instance']} requires a Trainium device, and this computer has none"
        raise UserError(what, where=str(file), fix="Run the stages on the CPU, which takes a small model: --cpu")
    if errors := schema_errors(chart, values, file):
        raise UserErrors(errors)
    return values


def has_input_options(sources: Sources) -> bool:
    return len(sources.files) > 1 or bool(sources.sets or sources.set_strings)


def refuse_input_options(sources: Sources) -> None:
    """Raise UserError for -f and --set: they change inputs."""
    if has_input_options(sources):
        what = "is not an inputs file, so it cannot be combined with -f, --set and --set-string"
        raise UserError(what, where=str(sources.file), fix="Name the inputs file, or change this file.")


def is_inputs_file(sources: Sources, chart: Path) -> bool:
    """Whether FILE is an inputs file rather than a values file.

    It is one if -f or --set are given. Otherwise, if it has no more errors as inputs than as values: a file with an
    error in it is then reported as what it was meant to be.
    """
    if has_input_options(sources):
        return True
    from genvalues.inputs.check import is_values_file

    values = read_values(sources.file)
    if is_values_file(values):
        return False
    errors = schema_errors(chart, values, sources.file)
    return bool(errors) and number_of_input_errors(sources.file) <= len(errors)


def number_of_input_errors(file: Path) -> int:
    from genvalues.inputs.check import check
    from genvalues.inputs.document import read

    try:
        check(read(file))
    except UserErrors as found:
        return len(found.errors)
    return 0


def schema_errors(chart: Path, values: dict[str, Any], file: Path) -> list[UserError]:
    """What the chart's schema refuses in the values, with the name of the file: Helm names only the chart."""
    if not (chart / "values.schema.json").exists():
        return []
    where, fix = one_line(str(file), 200), f"The chart is {chart}; `genvalues write` writes valid values."
    return [
        UserError(reason, where=f"{where}: {redacted(dotted(key)) or 'values'}", fix=fix)
        for key, reason in refusals(chart, on_top_of_defaults(chart, values))
    ]


def values_of_bundle(path: Path, chart: Path) -> dict[str, Any]:
    """The values of the release in an archive. Warns where the chart is not the release's."""
    from genvalues.ops.bundle import VALUES, read_bundle
    from genvalues.ops.redact import HIDDEN

    about, text = read_bundle(path)
    values = parsed_values(text, f"{path}: {VALUES}")
    version = part(chart, "Chart.yaml", load).get("version")
    if (packed := about.get("chart")) != version:
        of = f"was made with chart version {one_line(str(packed))}" if packed else "does not name its chart version"
        log.warning("%s %s; it runs with %s, version %s", path, of, chart, version)
    if HIDDEN in text:
        log.warning("values in %s were redacted; a stage that needs them fails", path)
    release = about.get("release")
    return {**values, "name": values.get("name") or (release if isinstance(release, str) else "")}


def values_on_cpu(values: dict[str, Any]) -> dict[str, Any]:
    """Change values for Trainium to the CPU: one process, no devices."""
    one_process = {
        "nodes": 1,
        "processesPerNode": 1,
        "tensorParallelSize": 1,
        "dataParallelSize": 1,
        "shardSize": 1,
    }
    without = {key: value for key, value in values.items() if key not in ("neuron", "devices")}
    return merge(
        without,
        {
            "backend": "native",
            "instance": "cpu",
            "parallelism": one_process,
            "compile": {"runsOn": "accelerator"},
            "rehearse": {"enabled": False},  # the run itself is on a CPU
        },
    )


def read_values(path: Path) -> dict[str, Any]:
    """A values file, parsed as Helm parses it."""
    return parsed_values(decode(path, str(path)), str(path))


def parsed_values(text: str, name: str) -> dict[str, Any]:
    try:
        values = load_as_helm(text)
    except UnreadableYAML as error:
        raise error.at(name) from None
    if not isinstance(values, dict):
        raise UserError(
            "must contain keys and values", where=name, fix="`genvalues init` writes such a file, with every key."
        )
    return values
