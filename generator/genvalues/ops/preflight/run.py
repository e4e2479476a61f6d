"""The checks of `genvalues preflight`, which `genvalues install` runs too."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from genvalues.common.findings import Finding
from genvalues.common.text import dotted

if TYPE_CHECKING:
    from genvalues.inputs.write import Checked
    from genvalues.ops.preflight.run_requirements import RunRequirements


def run_preflight(
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
    """All findings, in the order local files, AWS, Hub, cluster. The last three are checked in parallel.

    Local files are checked unless only AWS is. Raises UserError for mistakes on this machine: no chart, no Helm, an
    invalid release name. Everything else is a finding.
    """
    from genvalues.inputs.chart import need_chart
    from genvalues.ops.preflight.image_checks import check_image_address
    from genvalues.ops.preflight.instance_checks import soften_for_existing_nodes
    from genvalues.ops.preflight.run_requirements import RunRequirements

    requirements = RunRequirements(shlex.quote(str(checked.document.path)), checked.values)
    parts: dict[str, Callable[[], list[Finding]]] = {}
    if aws:
        from genvalues.ops.preflight.aws_checks import check_aws

        parts["aws"] = lambda: check_aws(requirements, region, offline)
    if hub:
        from genvalues.ops.preflight.hub_checks import check_hub

        parts["hub"] = lambda: check_hub(requirements, offline)
    if cluster:
        from genvalues.ops.preflight.cluster_checks import check_cluster

        folder = need_chart(chart)
        name = release or requirements.text("name")
        parts["cluster"] = lambda: check_cluster(folder, checked.values, name, namespace, context, offline)
    with ThreadPoolExecutor(max(1, len(parts))) as pool:
        found = dict(zip(parts, pool.map(lambda part: part(), parts.values()), strict=True))
    if "aws" in found and "cluster" in found:
        found["aws"] = soften_for_existing_nodes(found["aws"], found["cluster"], requirements)
    local = check_local_files(requirements) if hub or cluster else []
    return [
        *check_image_address(requirements),
        *local,
        *(finding for findings in found.values() for finding in findings),
    ]


def check_local_files(requirements: RunRequirements) -> list[Finding]:
    """Errors for a model or dataset on this machine's disk: `genvalues local` can read it, a pod cannot."""
    from genvalues.inputs.check import unseen_by_pods

    file = requirements.file
    run_here = f"genvalues write {file} -o values.yaml && genvalues local values.yaml --workspace ./workspace"
    return [
        Finding("error", dotted(found.keys[0]), found.what, f"{run_here}   # {found.fix}")
        for found in unseen_by_pods(requirements.values)
    ]
