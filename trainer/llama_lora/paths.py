"""The workspace layout: every path that a stage reads or writes on the volume."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from genvalues.common.locks import lock_beside

RUNS, SMALL_RUN, ACCEPTANCE = "runs", "small-run", "acceptance"


@dataclass(frozen=True)
class Paths:
    """Paths of one run in a workspace. Runs share models, datasets, base scores and the compile cache."""

    workspace: Path
    run_name: str

    @property
    def roots(self) -> list[Path]:
        """The folders that a manifest may name paths in: the workspace.

        The workspaces of rehearse and acceptance are in a run's folder, and read the model of that run.
        """
        return [self.workspace, self.workspace.parents[2]] if self.in_a_run else [self.workspace]

    @property
    def in_a_run(self) -> bool:
        """Whether the workspace is that of rehearse or acceptance, in a run's folder."""
        own = (self.workspace.name, self.workspace.parent.parent.name)
        return own in [(SMALL_RUN, RUNS), (ACCEPTANCE, RUNS)]

    def links(self) -> list[Path]:
        """Those folders of the run that are symbolic links. What is written to them would go elsewhere."""
        checkpoints = self.checkpoints("")
        folders = [
            *(self.models, self.datasets, self.base_scores, self.run.parent, self.run, self.manifest("any").parent),
            *(self.stacks, self.compile_reports, self.rehearsal, self.small_run, self.acceptance_trainings),
            *(self.adapter, self.merged, self.evaluation, self.published),
            *(checkpoints, *checkpoints.glob("*"), *checkpoints.glob("*/tensorboard"), *checkpoints.glob("*/step-*")),
        ]
        return [folder for folder in folders if folder.is_symlink()]

    @property
    def models(self) -> Path:
        return self.workspace / "models"

    @property
    def datasets(self) -> Path:
        return self.workspace / "datasets"

    @property
    def base_scores(self) -> Path:
        """What the base model scores and answers, by what that depends on."""
        return self.workspace / "base-scores"

    @property
    def compile_cache(self) -> Path:
        """The Neuron compiler's persistent cache, of backend xla."""
        return self.workspace / "compile-cache"

    @property
    def neff_cache(self) -> Path:
        """TorchNeuron's cache of compiled graphs."""
        return self.workspace / "neff-cache"

    @property
    def compile_users(self) -> Path:
        """One file for each process that uses the compile cache."""
        return self.compile_cache / "users"

    @property
    def run(self) -> Path:
        return self.workspace / RUNS / self.run_name

    @property
    def lock(self) -> Path:
        """Held by the one stage of the run that writes at a time."""
        return lock_beside(self.run)

    @property
    def config(self) -> Path:
        return self.run / "run.yaml"

    @property
    def resolved(self) -> Path:
        """The pinned versions of the run's sources: commits of Hub repositories, digests of files."""
        return self.run / "resolved.json"

    def manifest(self, stage: str) -> Path:
        return self.run / "stages" / f"{stage}.json"

    @property
    def compile_reports(self) -> Path:
        """The reports that the nodes of the compile stage exchange."""
        return self.run / "compile"

    @property
    def progress(self) -> Path:
        return self.run / "progress.json"

    @property
    def stacks(self) -> Path:
        """The workers' stack traces at the time they were asked to stop, one file per worker."""
        return self.run / "stacks"

    def worker_stacks(self, stage: str, rank: int) -> Path:
        return self.stacks / f"{stage}-rank-{rank}.txt"

    def checkpoints(self, fingerprint: str) -> Path:
        """The checkpoints of one training configuration; going back to that configuration resumes from them."""
        return self.run / "checkpoints" / fingerprint[:16]

    def metrics(self, fingerprint: str) -> Path:
        return self.checkpoints(fingerprint) / "metrics.jsonl"

    def tensorboard(self, fingerprint: str) -> Path:
        return self.checkpoints(fingerprint) / "tensorboard"

    @property
    def rehearsal(self) -> Path:
        """The checkpoints of a dry run, deleted when it ends."""
        return self.run / "rehearsal"

    @property
    def small_run(self) -> Path:
        """The workspace of the small run of the stage rehearse, deleted when it ends."""
        return self.run / SMALL_RUN

    @property
    def acceptance_trainings(self) -> Path:
        """The workspace of the trainings of `llama-lora acceptance`."""
        return self.run / ACCEPTANCE

    @property
    def acceptance(self) -> Path:
        """The result of `llama-lora acceptance`."""
        return self.run / "acceptance.json"

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

    @property
    def published(self) -> Path:
        """What the last publish uploaded besides the other stages' files: model cards and manifests."""
        return self.run / "published"

    @property
    def begun_uploads(self) -> Path:
        """The uploads to S3 that have begun, for the next publish to continue."""
        return self.run / "begun-uploads.json"

    @property
    def prometheus(self) -> Path:
        """Progress and metrics in Prometheus' text format."""
        return self.run / "metrics.prom"
