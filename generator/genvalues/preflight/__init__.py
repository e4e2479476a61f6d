"""Is the world ready for this run? AWS, the Hub and the cluster are asked from here, before anything is paid for.

What is answered is judged by pure functions (``judge``, ``hub.judge``, genvalues.cluster.preflight); who asks is thin.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from genvalues.findings import Finding, show

if TYPE_CHECKING:
    from genvalues.write import Checked

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
) -> list[Finding]:
    """All findings of what is asked for: AWS first, then the Hub, then the cluster; all three are asked side by side.

    Whatever the world answers is a finding. Raises UserError for what is wrong here: no chart, no Helm, a release's
    name that Helm does not take.
    """
    raise NotImplementedError
