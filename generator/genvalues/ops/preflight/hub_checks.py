"""The checks of the Hugging Face Hub: whether this token can read the model and the dataset.

The description and file list of a gated repository are public, its files are not. So each check also requests a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import quote

from genvalues.common.findings import Finding, Level
from genvalues.common.hub import Answer, ask, endpoint_of_environment, token_of_environment
from genvalues.ops.preflight.run_requirements import RunRequirements

CONFIG = "config.json"
PUBLIC_FILES = ("README.md", ".gitattributes")  # readable even in a gated repository


@dataclass(frozen=True)
class HubRepository:
    kind: Literal["model", "dataset"]
    name: str
    revision: str

    @property
    def page(self) -> str:
        return f"{'datasets/' if self.kind == 'dataset' else ''}{self.name}"

    @property
    def api(self) -> str:
        return f"/api/{self.kind}s/{self.name}/revision/{quote(self.revision, safe='')}"

    def file(self, path: str) -> str:
        return f"/{self.page}/resolve/{quote(self.revision, safe='')}/{quote(path)}"

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision != "main" else ""
        return f"{self.kind} {self.name}{at}"


def repositories(requirements: RunRequirements) -> list[HubRepository]:
    """What the run downloads from the Hub."""
    text = requirements.text
    found = [
        HubRepository("model", text("model.id"), text("model.revision") or "main"),
        *(HubRepository("dataset", name, revision or "main") for name, revision in requirements.hub_datasets),
    ]
    return [repository for repository in found if repository.name]


def check_hub(requirements: RunRequirements, offline: bool = False) -> list[Finding]:
    needed = repositories(requirements)
    if not needed:
        return [Finding("ok", "Hugging Face Hub", "nothing to check: model and dataset are not on the Hub")]
    if offline:
        return [Finding("not checked", str(repository), "--offline") for repository in needed]
    endpoint, token = endpoint_of_environment(), token_of_environment()
    with ThreadPoolExecutor(len(needed)) as pool:
        return list(pool.map(lambda repository: check_repository(repository, requirements, endpoint, token), needed))


def check_repository(repository: HubRepository, requirements: RunRequirements, endpoint: str, token: str) -> Finding:
    description = ask(endpoint, repository.api, token)
    file = None
    if description.status == 200 and (path := protected_file(repository, description.json())):
        file = ask(endpoint, repository.file(path), token, method="HEAD")
    return judge_repository(repository, description, file, requirements, endpoint, has_token=bool(token))


def protected_file(repository: HubRepository, description: Mapping[str, Any]) -> str:
    """A file that only those can read who may read the repository; empty if it lists none."""
    if repository.kind == "model":
        return CONFIG
    names = [str(one.get("rfilename", "")) for one in description.get("siblings") or [] if isinstance(one, dict)]
    return next((name for name in names if name and name not in PUBLIC_FILES), "")


def judge_repository(
    repository: HubRepository,
    description: Answer,
    file: Answer | None,
    requirements: RunRequirements,
    endpoint: str,
    has_token: bool,
) -> Finding:
    """Judge the Hub's answers for a repository's description and for one of its files, if that was requested."""
    answer = description if file is None or description.status != 200 else file
    subject = str(repository)
    page = f"{endpoint}/{repository.page}"
    if answer.status == 0:
        found = f"the Hub does not answer: {answer.problem}"
        return Finding("not checked", subject, found, f"curl -sI {endpoint}", unanswered=True)
    if answer.status >= 500 or answer.status == 429:
        found = f"the Hub answers {answer.status}"
        return Finding("not checked", subject, found, requirements.preflight_command(), unanswered=True)
    if answer.status < 400:
        return judge_readable(subject, description, requirements)
    if answer.error == "GatedRepo":
        return judge_gated(subject, answer, requirements, page, has_token)
    if answer.error == "RevisionNotFound":
        fix = f"open {page}/tree/main   # for branches, tags and commits; then set {repository.kind}.revision"
        return Finding("error", subject, f"revision {repository.revision} not found", fix)
    if answer.error == "EntryNotFound":
        found = f"has no {CONFIG}, so transformers cannot load it"
        return Finding("error", subject, found, f"open {page}/tree/{repository.revision}")
    if answer.status == 401 and has_token and answer.error != "RepoNotFound":
        return Finding("error", subject, "the Hub rejects this token", "hf auth login   # or HF_TOKEN")
    if answer.error == "RepoNotFound" or answer.status in (401, 404):
        return judge_missing(repository, requirements, endpoint, has_token)
    level: Level = "error" if answer.status == 403 else "not checked"
    reason = answer.message or f"status {answer.status}"
    return Finding(level, subject, f"the Hub denies access: {reason}", f"open {page}")


def judge_readable(subject: str, description: Answer, requirements: RunRequirements) -> Finding:
    facts = description.json()
    commit = str(facts.get("sha") or "")[:12]
    found = f"readable{f', at commit {commit}' if commit else ''}"
    access = "gated" if facts.get("gated") else "private" if facts.get("private") else ""
    if not access:
        return Finding("ok", subject, found)
    if not requirements.token_secret:
        return without_run_token(subject, access, requirements)
    return Finding("ok", subject, f"{access}, and {found} with this token; {run_token(requirements)}")


def judge_gated(subject: str, answer: Answer, requirements: RunRequirements, page: str, has_token: bool) -> Finding:
    if has_token:
        found = "gated, and this token's account has not accepted the terms"
        found += f" ({answer.message})" if answer.message else ""
        found += f"; {run_token(requirements)}" if requirements.token_secret else ""
        return Finding("error", subject, found, f"open {page}   # and accept the terms as the token's account")
    if not requirements.token_secret:
        return without_run_token(subject, "gated", requirements)
    secret = f"with the token of Secret {requirements.token_secret}"
    fix = f"HF_TOKEN=hf_... {requirements.preflight_command()}   # {secret}"
    return Finding("not checked", subject, "gated, and no token is set here", fix)


def judge_missing(repository: HubRepository, requirements: RunRequirements, endpoint: str, has_token: bool) -> Finding:
    """Without a token, the Hub's answer for a private repository is that for a missing one."""
    subject = str(repository)
    search = f"open '{endpoint}/{repository.kind}s?search={quote(repository.name.rpartition('/')[2])}'"
    if has_token:
        return Finding("error", subject, "not found, or private and not readable with this token", search)
    if requirements.token_secret:
        found = f"not found, or private; no token is set here, and {run_token(requirements)}"
        return Finding("warning", subject, found, search)
    return Finding("error", subject, "not found without a token", search)


def without_run_token(subject: str, access: str, requirements: RunRequirements) -> Finding:
    found = f"{access}, and the run has no token: huggingFace.tokenSecret is empty"
    return Finding("error", subject, found, requirements.set_command("huggingFace.tokenSecret", "hf-token"))


def run_token(requirements: RunRequirements) -> str:
    return f"the run uses the token of Secret {requirements.token_secret}, which can be another one"
