"""The workspace layout: what a stage reads and writes on the volume, and the only place that spells it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Paths:
    """Paths of one run in a workspace. ``models``, ``datasets`` and the compile cache are shared by runs."""

    workspace: Path
    run_name: str

    @property
    def models(self) -> Path:
        return self.workspace / "models"

    @property
    def datasets(self) -> Path:
        return self.workspace / "datasets"

    @property
    def compile_cache(self) -> Path:
        """The Neuron compiler's own cache."""
        return self.workspace / "compile-cache"

    @property
    def compile_users(self) -> Path:
        """A file for each process that uses that cache."""
        return self.compile_cache / "users"

    @property
    def run(self) -> Path:
        return self.workspace / "runs" / self.run_name

    @property
    def config(self) -> Path:
        return self.run / "run.yaml"

    @property
    def resolved(self) -> Path:
        """What names outside the workspace were resolved to: hub revisions to commits, files to digests."""
        return self.run / "resolved.json"

    def manifest(self, stage: str) -> Path:
        return self.run / "stages" / f"{stage}.json"

    @property
    def compile_reports(self) -> Path:
        """What the nodes of the stage compile tell each other."""
        return self.run / "compile"

    @property
    def progress(self) -> Path:
        return self.run / "progress.json"

    @property
    def stacks(self) -> Path:
        """What the workers of a stage did when they were told to stop: a file each, ``worker_stacks``."""
        return self.run / "stacks"

    def worker_stacks(self, stage: str, rank: int) -> Path:
        return self.stacks / f"{stage}-rank-{rank}.txt"

    def checkpoints(self, fingerprint: str) -> Path:
        """Checkpoints of one training: another configuration's are kept apart, so going back to it resumes them."""
        return self.run / "checkpoints" / fingerprint[:16]

    def metrics(self, fingerprint: str) -> Path:
        return self.checkpoints(fingerprint) / "metrics.jsonl"

    def tensorboard(self, fingerprint: str) -> Path:
        return self.checkpoints(fingerprint) / "tensorboard"

    @property
    def rehearsal(self) -> Path:
        """Checkpoints of a dry run: nobody reads them, and they are removed at its end."""
        return self.run / "rehearsal"

    @property
    def adapter(self) -> Path:
        return self.run / "adapter"

    @property
    def merged(self) -> Path:
        return self.run / "merged"

    @property
    def evaluation(self) -> Path:
        return self.run / "evaluation"

    @property
    def report(self) -> Path:
        return self.run / "report.html"
