"""Inputs file to image: log in, build, push, and write the digest into the file."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from genvalues import __version__
from genvalues.common.errors import UserError, write_errors_as_user_errors
from genvalues.common.files import place_of, write_named
from genvalues.common.process import Command, Interrupted, run_together
from genvalues.common.text import redacted
from genvalues.inputs.check import check
from genvalues.inputs.document import Document, read
from genvalues.inputs.yaml_text import UnreadableYAML, replaced
from genvalues.ops.image import ecr
from genvalues.ops.image.plan import (
    BUILDERS,
    DOCKERFILE,
    STUDIO_APPS,
    STUDIO_NETWORK,
    build_command,
    digest_in,
    explained,
    login_command,
    push_command,
)
from genvalues.ops.image.registries import Image, base_image, parse, to_build

BESIDE_US = Path(__file__).parents[4]
STUDIO = Path("/opt/ml/metadata/resource-metadata.json")
KEPT_LINES = 200  # of a builder's output, to say what went wrong


@dataclass(frozen=True)
class Job:
    """What one command is to do, all of it checked before anything runs."""

    file: Path
    reference: str  # as the file has it
    image: Image
    base: str
    builder: str
    sources: Path
    network: str | None

    def arguments(self) -> dict[str, str]:
        """The build arguments of trainer/Dockerfile."""
        revision = git_revision(self.sources)
        return {"BASE": self.base, "VERSION": __version__, **({"REVISION": revision} if revision else {})}


def build(file: Path, builder: str | None, network: str | None, base: str | None) -> int:
    """Build the image that a file names. Returns 0, or 128 and the number of a signal."""
    return stopped_in_words(file, lambda: build_image(job(file, builder, network, base)))


def push(file: Path, builder: str | None, network: str | None, base: str | None) -> int:
    """Build the image that a file names, push it and write its digest there. Returns as ``build`` does."""
    return stopped_in_words(file, lambda: push_image(job(file, builder, network, base)))


def stopped_in_words(file: Path, work: Callable[[], None]) -> int:
    try:
        work()
    except Interrupted as interrupted:
        say(f"Stopped by {interrupted}. {file} is as it was.")
        return interrupted.status
    return 0


# --- before anything runs


def job(file: Path, builder: str | None, network: str | None, base: str | None) -> Job:
    """Raises UserError for what the user must change first: file, machine, builder, sources, region."""
    document = read(file)
    reference = check(document).image
    where = place(document)
    image = to_build(reference, where)
    check_machine()
    builder = find_builder(builder)
    sources = find_sources()
    if base is None:
        region = image.region or ecr.default_region()
        if not region:
            fix = "Set AWS_REGION, or name the base image: --base IMAGE."
            raise UserError("not in ECR, and no region is set to take the base image from", where=where, fix=fix)
        base = base_image(region, where if image.in_ecr else f"AWS_REGION {region}")
    return Job(file, str(reference), image, base, builder, sources, network or studio_network())


def place(document: Document) -> str:
    return f"{document.position(('image',)).label} image"


def check_machine() -> None:
    if platform.machine().lower() not in ("x86_64", "amd64"):
        raise UserError(
            f"this machine is {platform.machine()}, and Trainium nodes and their base image are x86-64",
            fix="Build on an x86-64 machine: Code Editor in SageMaker Studio, or an EC2 instance.",
        )


def find_builder(wanted: str | None) -> str:
    """The builder that was asked for, else the first there is."""
    for name in [wanted] if wanted else BUILDERS:
        if shutil.which(name):
            return name
    if wanted:
        raise UserError("is not to be found on PATH", where=f"--builder {wanted}", fix="Install it, or leave that out.")
    raise UserError(f"none of {', '.join(BUILDERS)} is to be found on PATH", fix="Install one of them.")


def find_sources() -> Path:
    """The source tree that the image is made of: this folder, else the one that this package is in."""
    for candidate in (Path(), BESIDE_US):
        if (candidate / DOCKERFILE).is_file() and (candidate / "chart/Chart.yaml").is_file():
            return candidate.resolve()
    raise UserError(f"no {DOCKERFILE} here", fix="Start this in the source tree of llama-lora.")


def studio_network() -> str | None:
    """The network for builds in SageMaker Studio, whose Docker allows no other; elsewhere none.

    An app of Studio says what it is in resource-metadata.json: "Dockerfile specifications" of Code Editor,
    https://docs.aws.amazon.com/sagemaker/latest/dg/code-editor-custom-images-specifications.html
    """
    try:
        app = json.loads(STUDIO.read_text(encoding="utf-8"))["AppType"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return STUDIO_NETWORK if app in STUDIO_APPS else None


def git_revision(sources: Path) -> str:
    """The commit that is built, "-dirty" where files differ; nothing where git does not say."""
    command = ["git", "-C", str(sources), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


# --- the work


def build_image(job: Job) -> None:
    log_in(job, parse(job.base))
    run("build", job, build_command(job.builder, job.sources, job.image.tagged, job.arguments(), job.network))
    say(f"Built {job.image.tagged}.")


def push_image(job: Job) -> None:
    check_unchanged(job)
    if job.image.in_ecr:
        if ecr.ensure_repository(job.image):
            say(f"made the ECR repository {job.image.name}: it scans what is pushed and keeps tags as they are")
    else:
        say(f"{job.image.repository} is not in ECR: {job.builder} pushes with the login that it has")
    build_image(job)
    if job.image.in_ecr:
        log_in(job, job.image)
    with tempfile.TemporaryDirectory() as folder:
        digest_file = Path(folder) / "digest"
        output = run("push", job, push_command(job.builder, job.image.tagged, digest_file))
        digest = digest_file.read_text().strip() if digest_file.exists() else digest_in(output)
    if not digest:
        fix = f"Look it up and write image: {job.image.tagged}@sha256:... into {job.file}."
        raise UserError("pushed, and its digest was not told", where=job.image.tagged, fix=fix)
    write_digest(job, digest)
    say(f"Pushed {job.image.tagged}. Wrote its digest into {job.file}: {digest}")


def log_in(job: Job, at: Image) -> None:
    if at.in_ecr:
        secret = ecr.password(at.region)
        run("login", job, login_command(job.builder, at.registry), secret=secret, registry=at.registry)


def run(step: str, job: Job, arguments: tuple[str, ...], *, secret: str = "", registry: str = "") -> list[str]:
    """Run a builder, its output to stderr; the last lines of it. Raises UserError where it fails."""
    say(f"$ {shlex.join(arguments)}")
    lines: deque[str] = deque(maxlen=KEPT_LINES)

    def on_line(name: str, line: str) -> None:
        lines.append(line)
        say(redacted(line))

    # Docker would push, beside the image, a record of its build, and the digest would be that of a list of the two.
    environment = {**os.environ, "BUILDX_NO_DEFAULT_ATTESTATIONS": "1"}
    command = Command(step, arguments, environment, Path.cwd(), secret.encode() if secret else None)
    if run_together([command], on_line):
        what, fix = explained(step, lines, job.builder, registry or job.image.registry or "docker.io", job.base)
        raise UserError(what, where=registry or job.image.tagged, fix=fix)
    return list(lines)


# --- the file


def check_unchanged(job: Job) -> None:
    """Raises UserError where the digest could not be written into the file: before hours of building."""
    with_reference(job, job.reference)
    with write_errors_as_user_errors(str(job.file), "Make it writable: its image's digest is to be written there."):
        place_of(job.file)


def write_digest(job: Job, digest: str) -> None:
    """Into the file, the rest of it byte for byte as it is. A build takes long: the file is read anew."""
    text = with_reference(job, job.image.at(digest))
    with write_errors_as_user_errors(str(job.file), f"Write image: {job.image.at(digest)} into it."):
        write_named(job.file, text.encode("utf-8"))


def with_reference(job: Job, new: str) -> str:
    """The file's text with another image. Raises UserError where it no longer names the one that was built."""
    fix = f"Write image: {new} there."
    try:
        text = job.file.read_bytes().decode("utf-8")
        changed = replaced(text, "image", job.reference, new)
    except (OSError, UnicodeDecodeError, UnreadableYAML):
        changed = None
    if changed is None:
        raise UserError(f"does not say image: {job.reference} on a line of its own", where=str(job.file), fix=fix)
    return changed


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
