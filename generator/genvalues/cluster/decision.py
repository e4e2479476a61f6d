"""What a gate does with the PyTorchJobs that it finds: which it follows, releases, deletes and stops."""

from __future__ import annotations

from dataclasses import dataclass, field

from genvalues.cluster.api import Object
from genvalues.cluster.objects import (
    FINGERPRINT,
    INSTANCE,
    annotations_of,
    component_of,
    created,
    family_of,
    is_finished,
    labels_of,
    name_of,
)
from genvalues.cluster.trainer_client import Ask, StageState
from genvalues.common.errors import UserError


@dataclass(frozen=True)
class Plan:
    follow: str = ""
    release: bool = False
    delete: list[str] = field(default_factory=list)  # never ran
    stop: list[str] = field(default_factory=list)  # ran or runs: its pods must be gone before anything else starts


def plan(jobs: list[Object], own: str, release: str, state: StageState) -> Plan:
    """What to do with the PyTorchJobs of this stage and run: this revision's (``own``), earlier ones, others'."""
    ours = [job for job in jobs if is_ours(job, release)]
    waiting = [name_of(job) for job in ours if FINGERPRINT not in annotations_of(job)]  # another's has its own gate
    released = [job for job in jobs if FINGERPRINT in annotations_of(job)]
    newest_first = sorted(released, key=lambda job: (name_of(job) == own, created(job)), reverse=True)
    same = [job for job in newest_first if annotations_of(job)[FINGERPRINT] == state.fingerprint]
    alive = [name_of(job) for job in same if is_alive(job)]
    # Two trainers on one run directory would overwrite each other's checkpoints.
    stop = names_to_stop([job for job in released if name_of(job) not in alive[:1]], release)
    if state.up_to_date:
        return Plan(delete=waiting, stop=stop)
    if alive:
        return Plan(follow=alive[0], delete=waiting, stop=stop)
    if own in waiting:
        over = [name_of(job) for job in released if is_finished(job) and is_ours(job, release)]
        return Plan(follow=own, release=True, delete=[name for name in waiting if name != own], stop=stop + over)
    ended = [name_of(job) for job in same if is_finished(job) and is_ours(job, release)]
    if ended:  # a gate that comes after the end reports it
        return Plan(follow=ended[0], delete=waiting, stop=stop)
    return Plan(stop=stop)


def in_the_way(jobs: list[Object], stage: str, release: str, ask: Ask) -> list[str]:
    """Jobs of the run's other stages that run for another configuration: they hold the nodes that ``stage`` needs.

    A stage whose fingerprint is not known yet has an upstream that has changed since its job was released, so that job
    is another configuration's too. Little is lost where that is wrong: it resumes from its checkpoints.
    """
    released = [job for job in jobs if FINGERPRINT in annotations_of(job) and not is_finished(job)]
    others = [job for job in released if component_of(job) != stage]
    current = {other: ask(other).fingerprint for other in sorted({component_of(job) for job in others})}
    outdated = [job for job in others if annotations_of(job)[FINGERPRINT] != current[component_of(job)]]
    return names_to_stop(outdated, release)


def names_to_stop(jobs: list[Object], release: str) -> list[str]:
    """Those that have not ended. One that is being deleted is here too: it is waited for."""
    for job in jobs:
        if is_alive(job) and not is_ours(job, release):
            owner = labels_of(job).get(INSTANCE)
            raise UserError(
                f"PyTorchJob {name_of(job)} of release {owner} works in this run's folder with another configuration",
                where="name",
                fix=f"Set another name: in this release's values, or first: helm uninstall {owner}",
            )
    return [name_of(job) for job in jobs if not is_finished(job)]


def is_ours(job: Object, release: str) -> bool:
    return family_of(labels_of(job).get(INSTANCE, "")) == family_of(release)


def is_alive(job: Object) -> bool:
    return not is_finished(job) and not is_being_deleted(job)


def is_being_deleted(job: Object) -> bool:
    return "deletionTimestamp" in job["metadata"]
