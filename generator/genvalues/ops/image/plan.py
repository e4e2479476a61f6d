"""What a builder is told, and what its complaints mean. Runs nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from genvalues.common.text import one_line, redacted

BUILDERS = ("docker", "podman", "buildah")
DOCKERFILE = Path("trainer/Dockerfile")
STUDIO_APPS = ("CodeEditor", "JupyterLab")  # those of SageMaker Studio in which Docker can be enabled
STUDIO_NETWORK = "sagemaker"  # the one network that Studio's Docker allows
TAIL = 20  # lines of a failed build's log that are told again


def login_command(builder: str, registry: str) -> tuple[str, ...]:
    """The password comes by stdin: a command line can be read by everybody on the machine."""
    return (builder, "login", "--username", "AWS", "--password-stdin", registry)


def build_command(
    builder: str, sources: Path, tag: str, arguments: dict[str, str], network: str | None
) -> tuple[str, ...]:
    command = [builder, "build", "--file", str(sources / DOCKERFILE), "--tag", tag]
    if builder == "buildah":
        command += ["--layers"]  # keep them for the next build, as the others do
    if network:
        command += [f"--network={network}"]
    for name, value in arguments.items():
        command += ["--build-arg", f"{name}={value}"]
    return (*command, str(sources))


def push_command(builder: str, tag: str, digest_file: Path) -> tuple[str, ...]:
    """Podman and Buildah write the digest to a file; Docker prints it."""
    if builder == "docker":
        return (builder, "push", tag)
    return (builder, "push", "--digestfile", str(digest_file), tag)


def digest_in(lines: Iterable[str]) -> str:
    """The digest that `docker push` prints last (0.1.0: digest: sha256:... size: 1234), or nothing."""
    found = [match[1] for line in lines if (match := re.search(r"\bdigest: (sha256:[0-9a-f]{64})\b", line))]
    return found[-1] if found else ""


@dataclass(frozen=True)
class Complaint:
    """Words of a builder's output, and what they mean: in a login, a build or a push, or in any."""

    pattern: str
    what: str
    fix: str
    steps: tuple[str, ...] = ("login", "build", "push")


COMPLAINTS = (
    Complaint(
        r"cannot connect to the docker daemon|failed to connect to the docker api|is the docker daemon running"
        r"|cannot connect to podman|unable to connect to podman",
        "{builder} is installed and does not run",
        "Start it, or use another: --builder {others}.",
    ),
    Complaint(
        r"permission denied while trying to connect to the docker|dial unix .*: connect: permission denied",
        "docker runs, and you may not use it",
        "Join its group (sudo usermod -aG docker $USER, then log in again), or use --builder podman.",
    ),
    Complaint(
        r"only allows 'sagemaker' as network input",
        "SageMaker Studio allows builds one network alone",
        "Add --network sagemaker.",
    ),
    Complaint(r"no space left on device", "the disk is full", "Free some tens of GB: {builder} {prune}."),
    Complaint(
        r"exec format error|no match(ing manifest)? for (platform|linux/arm)",
        "the base image is for x86-64, and {builder} builds for another processor",
        "Use an x86-64 machine, such as Code Editor in SageMaker Studio.",
    ),
    Complaint(
        r"tag .*already exists.*(immutable|cannot be overwritten)|ImageTagAlreadyExists",
        "the tag is taken, and its repository keeps tags as they are",
        "Write a new tag in image:.",
        ("push",),
    ),
    Complaint(
        r"authorization token has expired|token .*expired",
        "the login has expired",
        "Write the same command again.",
    ),
    Complaint(
        r"no basic auth credentials|unauthorized|denied|403 forbidden|authentication required",
        "{registry} refuses the push",
        "Log in there as somebody who may push: {builder} login {registry}; in ECR with ecr:PutImage allowed.",
        ("push",),
    ),
    Complaint(
        r"(saving|storing) credentials",
        "{builder} cannot keep the login: its credential helper fails",
        "Look at credsStore in ~/.docker/config.json, or use another: --builder {others}.",
        ("login",),
    ),
    Complaint(
        r"invalid username/password|unauthorized|400 bad request|403 forbidden",
        "{registry} does not take the password that ECR has given",
        "Look whether your credentials may use ECR there, then write the same command again.",
        ("login",),
    ),
    Complaint(
        r"x509: |certificate signed by unknown authority",
        "the registry's certificate is not trusted here",
        "Have your proxy's certificate trusted by {builder}.",
    ),
    Complaint(
        r"no such host|i/o timeout|connection refused|temporary failure in name resolution|network is unreachable"
        r"|tls handshake timeout",
        "the network does not let {builder} through",
        "Look at the network, then write the same command again.",
    ),
)
# What a registry answers for an image that is not there, or not for these credentials; and the line says which image.
REFUSED_BASE = re.compile(
    r"(?i)(manifest unknown|not found|no basic auth credentials|unauthorized|denied|403 forbidden|does not exist"
    r"|authentication required)"
)


def explained(step: str, lines: Iterable[str], builder: str, registry: str, base: str) -> tuple[str, str]:
    """What went wrong in a login, a build or a push, and the fix, by the last lines of its output.

    ``registry`` is the one logged in at or pushed to; ``base`` the image that is built upon.
    """
    tail = [line for line in lines if line.strip()][-TAIL:]
    text = "\n".join(tail)
    if step == "build" and any(base.partition("/")[0] in line and REFUSED_BASE.search(line) for line in tail):
        fix = "Its account and tag are in docs/image.md; your credentials need ecr:BatchGetImage there."
        return f"the registry refuses the base image {base}", fix
    others = " or ".join(name for name in BUILDERS if name != builder)
    for complaint in COMPLAINTS:
        if step in complaint.steps and re.search(complaint.pattern, text, re.IGNORECASE):
            prune = "prune --all" if builder == "buildah" else "system prune"
            names = {"builder": builder, "others": others, "registry": registry, "prune": prune}
            return complaint.what.format(**names), complaint.fix.format(**names)
    if step == "build":
        shown = "".join(f"\n  {one_line(redacted(line), 300)}" for line in tail)
        return "the build failed", f"The end of its log:{shown}"
    said = one_line(redacted(tail[-1]), 300) if tail else "it says nothing"
    return f"{builder} {step} failed: {said}", "Look at that, then write the same command again."
