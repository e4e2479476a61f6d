"""Is the world ready for this run? AWS, the Hub and the cluster are asked from here, before anything is paid for.

What is answered is judged by pure functions (``judge``, ``hub.judge``, genvalues.cluster.preflight); who asks is thin.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from genvalues.common.findings import Finding, show

if TYPE_CHECKING:
    from genvalues.inputs.write import Checked

__all__ = ["Finding", "run", "show"]


def run(
    checked: Checked,
    *,
    aws: bool = True,
    cluster: bool = True,
    hub: bool = True,
    offline: bool = False,
    namespace: str | None = None,
    context: str | None = None,
    release: str | None = None,
    region: str | None = None,
    chart: Path | None = None,
) -> list[Finding]:
    """All findings of what is asked for: AWS first, then the Hub, then the cluster; the three are asked side by side.
    Before them, unless AWS alone is asked, the files of this computer that no pod could read.

    Whatever the world answers is a finding. Raises UserError for what is wrong here: no chart, no Helm, a release's
    name that Helm does not take.
    """
    from concurrent.futures import ThreadPoolExecutor

    from genvalues.inputs.chart import need_chart
    from genvalues.ops.preflight.judge import judge_files, with_nodes_there
    from genvalues.ops.preflight.run_requirements import RunRequirements

    wanted = RunRequirements(shlex.quote(str(checked.document.path)), checked.values)
    parts: dict[str, Callable[[], list[Finding]]] = {}
    if aws:
        from genvalues.ops.preflight.aws_checks import check_aws

        parts["aws"] = lambda: check_aws(wanted, region, offline)
    if hub:
        from genvalues.ops.preflight.hub_checks import check_hub

        parts["hub"] = lambda: check_hub(wanted, offline)
    if cluster:
        from genvalues.ops.preflight.cluster_checks import check_cluster

        folder = need_chart(chart)
        name = release or wanted.text("name")
        parts["cluster"] = lambda: check_cluster(folder, checked.values, name, namespace, context, offline)
    with ThreadPoolExecutor(max(1, len(parts))) as pool:
        found = dict(zip(parts, pool.map(lambda part: part(), parts.values()), strict=True))
    if "aws" in found and "cluster" in found:
        found["aws"] = with_nodes_there(found["aws"], found["cluster"], wanted)
    here = judge_files(wanted) if hub or cluster else []
    return [*here, *(finding for findings in found.values() for finding in findings)]
