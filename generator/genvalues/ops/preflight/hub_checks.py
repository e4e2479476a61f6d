"""The checks that ask the Hugging Face Hub: may this token read the model and the dataset?

A gated repository's page and list of files are public, its files are not: so a file is asked for too.
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
# Readable to everybody in a gated repository too.
PUBLIC_FILES = ("README.md", ".gitattributes")

Kind = Literal["model", "dataset"]


@dataclass(frozen=True)
class Repository:
    kind: Kind
    name: str
    revision: str = "main"

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


def repositories(wanted: RunRequirements) -> list[Repository]:
    """What a run downloads from the Hub."""
    found = []
    if name := wanted.text("model.id"):
        found.append(Repository("model", name, wanted.text("model.revision") or "main"))
    if wanted.hub_dataset:
        found.append(Repository("dataset", wanted.hub_dataset, wanted.text("dataset.revision") or "main"))
    return found


def check_hub(wanted: RunRequirements, offline: bool = False) -> list[Finding]:
    asked = repositories(wanted)
    if not asked:
        return [Finding("ok", "Hugging Face Hub", "nothing to check there: model and dataset are elsewhere")]
    if offline:
        return [Finding("not checked", str(repository), "--offline") for repository in asked]
    endpoint, token = endpoint_of_environment(), token_of_environment()
    with ThreadPoolExecutor(len(asked)) as pool:
        return list(pool.map(lambda repository: check_repository(repository, wanted, endpoint, token), asked))


def check_repository(repository: Repository, wanted: RunRequirements, endpoint: str, token: str) -> Finding:
    listed = ask(endpoint, repository.api, token)
    file = None
    if listed.status == 200 and (path := telling_file(repository, listed.json())):
        file = ask(endpoint, repository.file(path), token, method="HEAD")
    return judge(repository, listed, file, wanted, endpoint, has_token=bool(token))


def telling_file(repository: Repository, listed: Mapping[str, Any]) -> str:
    """The file whose answer tells whether the repository may be read; none where it has no files."""
    if repository.kind == "model":
        return CONFIG
    names = [str(one.get("rfilename", "")) for one in listed.get("siblings") or [] if isinstance(one, dict)]
    return next((name for name in names if name and name not in PUBLIC_FILES), "")


# --- what the answers mean


def judge(
    repository: Repository, listed: Answer, file: Answer | None, wanted: RunRequirements, endpoint: str, has_token: bool
) -> Finding:
    """``listed``: the repository's description; ``file``: a file of it, where that was asked for."""
    answer = listed if file is None or listed.status != 200 else file
    subject = str(repository)
    preflight = f"genvalues preflight {wanted.file}"
    page = f"{endpoint}/{repository.page}"
    if answer.status == 0:
        look = f"curl -sI {endpoint}"
        return Finding("not checked", subject, f"the Hub does not answer: {answer.problem}", look, unanswered=True)
    if answer.status >= 500 or answer.status == 429:
        return Finding("not checked", subject, f"the Hub answers {answer.status}", preflight, unanswered=True)
    if answer.status < 400:
        return readable(repository, listed, wanted)
    if answer.error == "GatedRepo":
        return gated(repository, answer, wanted, page, has_token)
    if answer.error == "RevisionNotFound":
        fix = f"open {page}/tree/main   # its branches, tags and commits; then {repository.kind}'s revision"
        return Finding("error", subject, f"there is no revision {repository.revision}", fix)
    if answer.error == "EntryNotFound":
        found = f"has no {CONFIG}: it is no model that transformers loads"
        return Finding("error", subject, found, f"open {page}/tree/{repository.revision}")
    if answer.status == 401 and has_token and answer.error != "RepoNotFound":
        return Finding("error", subject, "the Hub does not know this token (any more)", "hf auth login   # or HF_TOKEN")
    if answer.error == "RepoNotFound" or answer.status in (401, 404):
        return missing(repository, wanted, endpoint, has_token)
    said = answer.message or f"status {answer.status}"
    level: Level = "error" if answer.status == 403 else "not checked"
    return Finding(level, subject, f"the Hub refuses: {said}", f"open {page}")


def readable(repository: Repository, listed: Answer, wanted: RunRequirements) -> Finding:
    subject = str(repository)
    description = listed.json()
    commit = str(description.get("sha") or "")[:12]
    found = f"readable{f', at commit {commit}' if commit else ''}"
    closed = "gated" if description.get("gated") else "private" if description.get("private") else ""
    if not closed:
        return Finding("ok", subject, found)
    if not wanted.token_secret:
        fix = f"genvalues write {wanted.file} -o values.yaml --set huggingFace.tokenSecret=hf-token"
        return Finding("error", subject, f"{closed}, and the run gets no token: huggingFace.tokenSecret is empty", fix)
    return Finding("ok", subject, f"{closed}, and {found} with this token; {theirs(wanted)}")


def theirs(wanted: RunRequirements) -> str:
    return f"the run uses that of Secret {wanted.token_secret}, which may be another"


def gated(repository: Repository, answer: Answer, wanted: RunRequirements, page: str, has_token: bool) -> Finding:
    subject = str(repository)
    if has_token:
        said = f" ({answer.message})" if answer.message else ""
        found = f"gated, and its terms are not accepted by the account of this token{said}; {theirs(wanted)}"
        if not wanted.token_secret:
            found = f"gated, and its terms are not accepted by the account of this token{said}"
        return Finding("error", subject, found, f"open {page}   # accept its terms there, as the token's account")
    if wanted.token_secret:
        fix = f"HF_TOKEN=hf_... genvalues preflight {wanted.file}   # with the token of Secret {wanted.token_secret}"
        return Finding("not checked", subject, "gated, and there is no token here to ask with", fix)
    fix = f"genvalues write {wanted.file} -o values.yaml --set huggingFace.tokenSecret=hf-token"
    return Finding("error", subject, "gated, and the run gets no token: huggingFace.tokenSecret is empty", fix)


def missing(repository: Repository, wanted: RunRequirements, endpoint: str, has_token: bool) -> Finding:
    """Without a token the Hub says the same of a private repository and of one that is not there."""
    subject = str(repository)
    search = f"open '{endpoint}/{repository.kind}s?search={quote(repository.name.rpartition('/')[2])}'"
    if has_token:
        return Finding("error", subject, "there is none of this name, or it is private to others", search)
    if wanted.token_secret:
        found = f"there is none of this name, or it is private; there is no token here to ask with, {theirs(wanted)}"
        return Finding("warning", subject, found, search)
    return Finding("error", subject, "there is none of this name that can be read without a token", search)
