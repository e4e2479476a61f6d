"""Build the image that an inputs file names, push it, and write its digest into the file.

A thin wrapper of docker, podman or buildah, and of the logins to ECR that they need.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from genvalues import __version__
from genvalues.common.errors import UserError, write_errors_as_user_errors
from genvalues.common.files import place_of, write_named
from genvalues.common.process import Command, Interrupted, run_together
from genvalues.common.text import one_line, redacted
from genvalues.inputs.check import check
from genvalues.inputs.document import read
from genvalues.inputs.yaml_text import UnreadableYAML, replaced
from genvalues.ops.aws import default_region
from genvalues.ops.registries import (
    NATIVE_BASE,
    ImageReference,
    base_image,
    ensure_repository,
    image_to_build,
    login_password,
    parse_image,
)

log = logging.getLogger(__name__)

BUILDERS = ("docker", "podman", "buildah")
DOCKERFILE = Path("trainer/Dockerfile")
SOURCE_TREE = Path(__file__).parents[3]
# An app of SageMaker Studio names its type in this file ("Dockerfile specifications" of Code Editor,
# https://docs.aws.amazon.com/sagemaker/latest/dg/code-editor-custom-images-specifications.html). Docker can be enabled
# in two types of app, and its builds may use one network only.
STUDIO_METADATA = Path("/opt/ml/metadata/resource-metadata.json")
STUDIO_APPS = ("CodeEditor", "JupyterLab")
STUDIO_NETWORK = "sagemaker"
TAIL = 20  # lines of a builder's output that are searched for the reason of a failure


@dataclass(frozen=True)
class ImageBuild:
    """One build, checked before anything runs. ``reference`` is the image as the file names it, ``target`` that of
    trainer/Dockerfile.
    """

    file: Path
    reference: str
    image: ImageReference
    target: str
    base: str
    builder: str
    sources: Path
    network: str | None
    neuron_runtime: str = ""  # empty: the base image's


def build(
    file: Path,
    builder: str | None,
    network: str | None,
    base: str | None,
    neuron_runtime: str | None = None,
    *,
    push: bool = False,
) -> int:
    """Build the image that a file names. With ``push``, also push it and write its digest into the file.

    Returns 0, or 128 plus the number of the signal that stopped the build. Raises UserError.
    """
    try:
        wanted = plan_build(file, builder, network, base, neuron_runtime)
        if push:
            push_image(wanted)
        else:
            build_image(wanted)
    except Interrupted as interrupted:
        log.warning("stopped by %s; %s is unchanged", interrupted, file)
        return interrupted.status
    return 0


def plan_build(
    file: Path, builder: str | None, network: str | None, base: str | None, neuron_runtime: str | None = None
) -> ImageBuild:
    """Check the file, this machine, the builder, the sources and the base image. Raises UserError."""
    document = read(file)
    inputs = check(document)
    reference, backend = inputs.image, inputs.chosen_backend
    where = f"{document.position(('image',)).label} image"
    image = image_to_build(reference, where)
    if platform.machine().lower() not in ("x86_64", "amd64"):
        what = f"cannot build on {platform.machine()}: Trainium nodes and the base images are x86-64"
        fix = "Build on an x86-64 machine: Code Editor in SageMaker Studio, or an EC2 instance."
        raise UserError(what, fix=fix)
    if neuron_runtime and backend != "xla":
        fix = "Omit it: the base image of backend native brings its runtime."
        raise UserError("applies to backend xla only", where="--neuron-runtime", fix=fix)
    builder = find_builder(builder)
    sources = find_sources()
    if base is None and backend == "native":
        what = "backend native has no default base image"
        raise UserError(what, where=f"{file} instance {inputs.instance}", fix=NATIVE_BASE)
    if base is None:
        region = image.region or default_region()
        if not region:
            fix = "Set AWS_REGION, or name the base image: --base IMAGE."
            raise UserError("no region is set, so the base image is unknown", where=where, fix=fix)
        base = base_image(region, where if image.in_ecr else f"AWS_REGION {region}")
    network = network or studio_network()
    return ImageBuild(file, str(reference), image, backend, base, builder, sources, network, neuron_runtime or "")


def find_builder(name: str | None) -> str:
    """The builder called ``name``, or else the first one on PATH."""
    for candidate in [name] if name else BUILDERS:
        if shutil.which(candidate):
            return candidate
    if name:
        raise UserError("not found on PATH", where=f"--builder {name}", fix="Install it, or omit --builder.")
    raise UserError("no image builder found on PATH", fix=f"Install one of {', '.join(BUILDERS)}.")


def find_sources() -> Path:
    """The source tree to build: the working directory, or else the tree that contains this package."""
    for candidate in (Path(), SOURCE_TREE):
        if (candidate / DOCKERFILE).is_file() and (candidate / "chart/Chart.yaml").is_file():
            return candidate.resolve()
    raise UserError(f"{DOCKERFILE} not found", fix="Run this command in the source tree of llama-lora.")


def studio_network() -> str | None:
    """The network that builds in SageMaker Studio must use; None on any other machine."""
    try:
        app = json.loads(STUDIO_METADATA.read_text(encoding="utf-8"))["AppType"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return STUDIO_NETWORK if app in STUDIO_APPS else None


def git_revision(sources: Path) -> str:
    """The commit of the sources, with "-dirty" if files differ from it; empty if git cannot tell."""
    command = ["git", "-C", str(sources), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def build_image(wanted: ImageBuild) -> None:
    """Build the target of trainer/Dockerfile. Logs in to the base image's registry first if that is ECR."""
    base = parse_image(wanted.base)
    log_in(wanted, base)
    dockerfile = str(wanted.sources / DOCKERFILE)
    arguments = ["build", "--file", dockerfile, "--target", wanted.target, "--tag", wanted.image.tagged]
    if wanted.builder == "buildah":
        arguments += ["--layers"]  # cache layers for the next build, as docker and podman do by default
    if wanted.network:
        arguments += [f"--network={wanted.network}"]
    given = {
        "BASE": wanted.base,
        "NEURON_RUNTIME": wanted.neuron_runtime,
        "VERSION": __version__,
        "REVISION": git_revision(wanted.sources),
    }
    for name, value in given.items():
        arguments += ["--build-arg", f"{name}={value}"] if value else []
    run_builder(wanted, [*arguments, str(wanted.sources)], base.registry)
    log.info("Built %s.", wanted.image.tagged)


def push_image(wanted: ImageBuild) -> None:
    """Create the ECR repository if needed, build, push, and write the digest. The file is checked before the build."""
    image = wanted.image
    with_reference(wanted, wanted.reference)
    with write_errors_as_user_errors(str(wanted.file), "Make it writable: the image's digest is written into it."):
        place_of(wanted.file)
    if not image.in_ecr:
        log.info("%s is not in ECR: pushing with the existing login of %s", image.repository, wanted.builder)
    elif ensure_repository(image):
        log.info("created the ECR repository %s with scan on push and immutable tags", image.name)
    build_image(wanted)
    log_in(wanted, image)
    with tempfile.TemporaryDirectory() as folder:
        digest_file = Path(folder) / "digest"  # written by podman and buildah; docker prints the digest instead
        option = [] if wanted.builder == "docker" else ["--digestfile", str(digest_file)]
        output = run_builder(wanted, ["push", *option, image.tagged], image.registry)
        digest = digest_file.read_text().strip() if digest_file.exists() else pushed_digest(output)
    if not digest:
        fix = f"Look it up and write image: {image.tagged}@sha256:... in {wanted.file}."
        raise UserError("the image is pushed, but the builder printed no digest", where=image.tagged, fix=fix)
    # A build takes long: the file is read again, and only the reference in it is replaced.
    text = with_reference(wanted, image.at(digest))
    with write_errors_as_user_errors(str(wanted.file), f"Write image: {image.at(digest)} in it."):
        write_named(wanted.file, text.encode("utf-8"))
    log.info("Pushed %s and wrote its digest into %s: %s", image.tagged, wanted.file, digest)


def log_in(wanted: ImageBuild, image: ImageReference) -> None:
    """Log the builder in to an image's registry if that is ECR; other registries need the user's own login."""
    if image.in_ecr:
        # By stdin: every user of the machine can read a process's arguments.
        arguments = ["login", "--username", "AWS", "--password-stdin", image.registry]
        run_builder(wanted, arguments, image.registry, secret=login_password(image.region))


def run_builder(wanted: ImageBuild, arguments: list[str], registry: str, secret: str = "") -> list[str]:
    """Run the builder, log its output, and return the output's last lines. Raises UserError if it fails."""
    log.info("$ %s", shlex.join([wanted.builder, *arguments]))
    lines: deque[str] = deque(maxlen=TAIL)

    def on_line(name: str, line: str) -> None:
        if line.strip():
            lines.append(line)
        log.info("%s", redacted(line))

    # With attestations, docker pushes an index of image and build record, and the digest would be the index's.
    environment = {**os.environ, "BUILDX_NO_DEFAULT_ATTESTATIONS": "1"}
    if wanted.target == "native":
        environment["DOCKER_BUILDKIT"] = "1"  # an old docker would build the stages of target xla, too
    stdin = secret.encode() if secret else None
    command = Command(arguments[0], (wanted.builder, *arguments), environment, Path.cwd(), stdin)
    if status := run_together([command], on_line):
        reason = one_line(redacted(lines[-1]), 300) if lines else "no output"
        what = f"{wanted.builder} {arguments[0]} failed with status {status}: {reason}"
        raise UserError(what, where=wanted.image.tagged, fix=builder_fix("\n".join(lines), wanted.builder, registry))
    return list(lines)


def builder_fix(output: str, builder: str, registry: str) -> str:
    """The fix for a builder's output. ``registry`` is the one that was logged in to, pulled from or pushed to."""
    registry = registry or "docker.io"
    fixes = {
        "only allows 'sagemaker' as network input": "Add --network sagemaker.",
        "buildx component is missing": "Install docker's buildx plugin, or add --builder podman.",
        "no space left on device": "Free some tens of GB of disk space.",
        r"exec format error|no match(ing manifest)? for (platform|linux/arm)": "Build on an x86-64 machine.",
        r"tag .*already exists|ImageTagAlreadyExists": "Tags are immutable there: write a new one in image:.",
        r"cannot connect to|failed to connect to the docker api|unable to connect to podman": (
            f"Start {builder}, or use another builder: --builder NAME."
        ),
        r"permission denied while trying to connect|dial unix .*: connect: permission denied": (
            "Join the docker group (sudo usermod -aG docker $USER, then log in again), or add --builder podman."
        ),
        r"(saving|storing) credentials": "Check credsStore in ~/.docker/config.json.",
        rf"{re.escape(registry)}\S*: not found|manifest unknown|denied|unauthorized|401|403|400 bad request|expired"
        r"|no basic auth|authentication required|invalid username/password": (
            f"{registry} refuses access: check the image's name there, and the permissions in docs/image.md."
        ),
    }
    for pattern, fix in fixes.items():
        if re.search(pattern, output, re.IGNORECASE):
            return fix
    return "Correct that, then run the same command again."


def pushed_digest(output: list[str]) -> str:
    """The digest that ``docker push`` prints last (0.1.0: digest: sha256:... size: 1234); empty if there is none."""
    found = re.findall(r"\bdigest: (sha256:[0-9a-f]{64})\b", "\n".join(output))
    return found[-1] if found else ""


def with_reference(wanted: ImageBuild, new: str) -> str:
    """The file's text with its image replaced by ``new``. Raises UserError unless it still names the same image."""
    try:
        text = wanted.file.read_bytes().decode("utf-8")
        changed = replaced(text, "image", wanted.reference, new)
    except (OSError, UnicodeDecodeError, UnreadableYAML):
        changed = None
    if changed is None:
        what = f"image: {wanted.reference} not found as a plain value"
        raise UserError(what, where=str(wanted.file), fix=f"Write image: {new} there.")
    return changed
