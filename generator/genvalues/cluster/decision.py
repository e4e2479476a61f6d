"""Which of the existing jobs a gate follows, releases, deletes and stops. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from genvalues.cluster.kinds import Object
from genvalues.cluster.objects import (
    FINGERPRINT,
    INSTANCE,
    annotations_of,
    component_of,
    created,
    family_of,
    is_being_deleted,
    labels_of,
    name_of,
)
from genvalues.cluster.trainer_client import ReadStageState, StageState
from genvalues.cluster.workloads import is_active, is_finished, is_released, workload_of
from genvalues.common.errors import UserError


@dataclass(frozen=True)
class GateDecision:
    """Names of jobs."""

    follow: str = ""
    release: bool = False  # release the job to follow
    delete: list[str] = field(default_factory=list)  # never released, so they have no pods
    stop: list[str] = field(default_factory=list)  # released: their pods must end before another job starts


def decide(jobs: list[Object], own: str, release: str, state: StageState, busy: set[str]) -> GateDecision:
    """Decide about the jobs of one stage and run, which may belong to several revisions and releases.

    ``own`` is the job of this revision of ``release``. ``busy``: names of jobs with pods that have not ended. Raises
    UserError if an unrelated release uses the run's folder.
    """
    ours = [job for job in jobs if is_ours(job, release)]
    waiting = [name_of(job) for job in ours if not is_released(job)]  # another release's jobs have their own gate
    released = [job for job in jobs if is_released(job)]
    newest_first = sorted(released, key=lambda job: (name_of(job) == own, created(job)), reverse=True)
    same = [job for job in newest_first if annotations_of(job)[FINGERPRINT] == state.fingerprint]
    active = [name_of(job) for job in same if is_active(job) or is_ending(job, busy)]
    # Two trainers in one run folder would overwrite each other's checkpoints.
    stop = names_to_stop([job for job in released if name_of(job) not in active[:1]], release)
    if active:
        return GateDecision(follow=active[0], delete=waiting, stop=stop)
    if state.up_to_date:
        return GateDecision(delete=waiting, stop=stop)
    if own in waiting:
        finished = [name_of(job) for job in released if is_finished(job) and is_ours(job, release)]
        others = [name for name in waiting if name != own]
        return GateDecision(follow=own, release=True, delete=others, stop=stop + finished)
    ended = [name_of(job) for job in same if is_finished(job) and is_ours(job, release)]
    if ended:  # a gate that restarts after the job's end still reports it
        return GateDecision(follow=ended[0], delete=waiting, stop=stop)
    return GateDecision(stop=stop)


def outdated_jobs_of_other_stages(
    jobs: list[Object], stage: str, release: str, read_state: ReadStageState
) -> list[str]:
    """Names of the run's active jobs of other stages with an old configuration: they hold the nodes ``stage`` needs.

    A job is also outdated if its stage's fingerprint is unknown, because then a stage that it depends on has changed.
    If that is wrong, little is lost: the stage resumes from its checkpoints.
    """
    released = [job for job in jobs if is_released(job) and not is_finished(job)]
    others = [job for job in released if component_of(job) != stage]
    current = {other: read_state(other).fingerprint for other in sorted({component_of(job) for job in others})}
    outdated = [job for job in others if annotations_of(job)[FINGERPRINT] != current[component_of(job)]]
    return names_to_stop(outdated, release)


def names_to_stop(jobs: list[Object], release: str) -> list[str]:
    """Names of the jobs that have not finished, including those being deleted: the gate waits for their pods too."""
    for job in jobs:
        if is_active(job) and not is_ours(job, release):
            owner = labels_of(job).get(INSTANCE)
            named = f"{workload_of(job).name} {name_of(job)}"
            raise UserError(
                f"{named} of release {owner} uses the same run folder with another configuration",
                where="name",
                fix=f"Set another name in this release's values, or uninstall that release: helm uninstall {owner}",
            )
    return [name_of(job) for job in jobs if not is_finished(job)]


def is_ending(job: Object, busy: set[str]) -> bool:
    """Whether it has succeeded and has workers that have not ended: a PyTorchJob succeeds as soon as one worker has."""
    return bool(workload_of(job).succeeded(job)) and name_of(job) in busy and not is_being_deleted(job)


def is_ours(job: Object, release: str) -> bool:
    return family_of(labels_of(job).get(INSTANCE, "")) == family_of(release)
