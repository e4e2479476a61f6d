"""Read report.html as evaluate wrote it."""

from __future__ import annotations

import hashlib

from genvalues.common.errors import UserError
from genvalues.common.json_files import InvalidJson, read_bytes
from genvalues.common.log_file import MOST_BYTES, InvalidLog, lines_of
from llama_lora.config import RunConfig
from llama_lora.paths import Paths
from llama_lora.stage import Stage


def read_report(config: RunConfig, paths: Paths) -> bytes:
    """The report of the run. Raises UserError if there is none, or if it is not what evaluate's manifest lists."""
    manifest = Stage("evaluate", config, paths).manifest
    name = str(paths.report.relative_to(paths.workspace))
    fix = "Run evaluate: `helm upgrade`, or `llama-lora evaluate --config ...`."
    if manifest is None or name not in manifest.outputs:
        raise UserError("the run has no report: evaluate has not ended", where=str(paths.report), fix=fix)
    try:
        content = read_bytes(paths.report, MOST_BYTES)
    except InvalidJson as error:
        raise UserError(str(error), where=str(paths.report), fix=fix) from None
    if hashlib.sha256(content).hexdigest() != manifest.outputs[name].sha256:
        what = "has another SHA-256 than evaluate's manifest lists"
        raise UserError(what, where=str(paths.report), fix=f"Delete the file. {fix}")
    return content


def report_lines(config: RunConfig, paths: Paths) -> list[str]:
    """The report as lines for a log. Raises UserError as ``read_report`` does, and if it is too large."""
    content = read_report(config, paths)
    try:
        return list(lines_of(content))
    except InvalidLog as error:
        fix = "Copy it from the volume, or lower evaluation.samples."
        raise UserError(str(error), where=str(paths.report), fix=fix) from None
