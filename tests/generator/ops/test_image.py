"""genvalues image build and push, with stand-ins for the builders on PATH and botocore's stubber for AWS."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore import exceptions
from botocore.stub import ANY, Stubber

from generator.cluster.waiting import PATIENCE, until
from genvalues import cli
from genvalues.common.errors import Unavailable, UserError
from genvalues.common.process import Command, run_together
from genvalues.inputs.yaml_text import replaced
from genvalues.ops.image import build, ecr, plan, registries

ROOT = Path(__file__).parents[3]
ACCOUNT, REGION = "111122223333", "us-west-2"
REGISTRY = f"{ACCOUNT}.dkr.ecr.{REGION}.amazonaws.com"
IMAGE = f"{REGISTRY}/llama-lora:0.1.0"
BASE = f"763104351884.dkr.ecr.{REGION}.amazonaws.com/{registries.REPOSITORY}:{registries.TAG}"
DIGEST = "sha256:" + "0123456789abcdef" * 4
PASSWORD = "the-password-of-" + "x" * 2000  # ECR's are of that size
INPUTS = f"""\
# What I train, with a comment \N{LATIN SMALL LETTER E WITH ACUTE}\r
model: gpt2
dataset: {{source: a/b}}   # two columns
instance: trn1.32xlarge
image:    "{IMAGE}"  # where it goes

name: demo
"""


class Builder:
    """Stand-ins for docker, podman and buildah: they note what they are told and answer as they are bid."""

    def __init__(self, folder: Path, *names: str) -> None:
        self.folder = folder
        folder.mkdir()
        for name in names:
            script = folder / name
            script.write_text(
                f"""#!{sys.executable}
import json, os, pathlib, sys, time
folder, step = pathlib.Path({str(folder)!r}), sys.argv[1]
stdin = sys.stdin.read()
with open(folder / "calls", "a") as calls:
    calls.write(json.dumps([sys.argv, stdin, os.getcwd()]) + "\\n")
if "--digestfile" in sys.argv:
    pathlib.Path(sys.argv[sys.argv.index("--digestfile") + 1]).write_text({DIGEST!r})
answer = folder / (step + ".answer")
print(answer.read_text() if answer.exists() else "", end="", flush=True)
status = folder / (step + ".status")
if step == "push" and {name!r} == "docker" and not status.exists():
    print("0.1.0: digest: {DIGEST} size: 4711", flush=True)
while (folder / "hang").exists():
    time.sleep(0.05)
sys.exit(int(status.read_text()) if status.exists() else 0)
"""
            )
            script.chmod(0o755)

    def answers(self, step: str, text: str, status: int = 1) -> None:
        (self.folder / f"{step}.answer").write_text(text)
        (self.folder / f"{step}.status").write_text(str(status))

    @property
    def calls(self) -> list[tuple[list[str], str]]:
        noted = self.folder / "calls"
        lines = noted.read_text().splitlines() if noted.exists() else []
        return [([argv[0].rpartition("/")[2], *argv[1:]], stdin) for argv, stdin, _ in map(json.loads, lines)]

    @property
    def commands(self) -> list[str]:
        """What was done, in two words each."""
        return [" ".join(argv[:2]) for argv, _ in self.calls]


class Aws:
    """ECR and STS: what is asked must be asked in this order, and gets these answers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        keys = {"aws_access_key_id": "x", "aws_secret_access_key": "x", "region_name": REGION}
        self.clients = {name: boto3.client(name, **keys) for name in ("ecr", "sts")}
        self.stubs = {name: Stubber(client) for name, client in self.clients.items()}
        for stub in self.stubs.values():
            stub.activate()
        self.regions: list[str] = []

        def client(service: str, region: str) -> Any:
            self.regions.append(region)
            return self.clients[service]

        monkeypatch.setattr(ecr, "client", client)

    def repository(self, mutability: str = "MUTABLE") -> None:
        answer = {"repositories": [{"imageTagMutability": mutability}]}
        expected = {"registryId": ACCOUNT, "repositoryNames": ["llama-lora"]}
        self.stubs["ecr"].add_response("describe_repositories", answer, expected)

    def no_repository(self) -> None:
        self.refuses("describe_repositories", "RepositoryNotFoundException")

    def made(self) -> None:
        expected = {
            "repositoryName": "llama-lora",
            "imageTagMutability": "IMMUTABLE",
            "imageScanningConfiguration": {"scanOnPush": True},
        }
        self.stubs["ecr"].add_response("create_repository", {}, expected)

    def account(self, number: str = ACCOUNT) -> None:
        self.stubs["sts"].add_response("get_caller_identity", {"Account": number}, {})

    def passwords(self, count: int = 1) -> None:
        token = base64.b64encode(f"AWS:{PASSWORD}".encode()).decode()
        for _ in range(count):
            answer = {"authorizationData": [{"authorizationToken": token}]}
            self.stubs["ecr"].add_response("get_authorization_token", answer, {})

    def refuses(self, operation: str, code: str, message: str = "no", service: str = "ecr") -> None:
        self.stubs[service].add_client_error(operation, code, message)

    def all_asked(self) -> None:
        for stub in self.stubs.values():
            stub.assert_no_pending_responses()


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Aws:
    return Aws(monkeypatch)


@pytest.fixture
def builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Builder:
    made = Builder(tmp_path / "bin", "docker", "podman", "buildah")
    monkeypatch.setenv("PATH", str(made.folder))
    return made


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setattr(build, "STUDIO", tmp_path / "resource-metadata.json")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    Path("f.yaml").write_bytes(INPUTS.encode())


def genvalues(*arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["genvalues", *arguments])
        cli.main()
    return int(ended.value.code or 0)


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()[-1]


# --- what happens


@pytest.mark.parametrize("name", ["docker", "podman", "buildah"])
def test_push_builds_pushes_and_writes_the_digest_and_not_a_byte_beside(
    aws: Aws, builder: Builder, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    aws.no_repository()
    aws.account()
    aws.made()
    aws.passwords(2)
    Path("f.yaml").chmod(0o640)
    assert genvalues("image", "push", "f.yaml", "--builder", name) == 0
    aws.all_asked()
    assert builder.commands == [f"{name} login", f"{name} build", f"{name} login", f"{name} push"]
    assert Path("f.yaml").read_bytes() == INPUTS.replace(IMAGE, f"{IMAGE}@{DIGEST}").encode()
    assert stat.S_IMODE(Path("f.yaml").stat().st_mode) == 0o640
    assert [path.name for path in Path().iterdir()] == ["f.yaml"]
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "made the ECR repository llama-lora: it scans what is pushed and keeps tags as they are"
    assert told[-1] == f"Pushed {IMAGE}. Wrote its digest into f.yaml: {DIGEST}"


def test_the_file_that_push_has_written_is_right_and_its_values_name_tag_and_digest(
    aws: Aws, builder: Builder, capsys: pytest.CaptureFixture[str]
) -> None:
    aws.repository()
    aws.passwords(2)
    assert genvalues("image", "push", "f.yaml") == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["genvalues", "write", "f.yaml", "-o", "-"])
        cli.genvalues(standalone_mode=False)
    values = capsys.readouterr().out
    assert f"digest: {DIGEST}" in values and f"repository: {REGISTRY}/llama-lora" in values


def test_a_second_push_of_another_tag_replaces_tag_and_digest(aws: Aws, builder: Builder) -> None:
    Path("f.yaml").write_bytes(INPUTS.replace(IMAGE, f"{REGISTRY}/llama-lora:0.2.0@sha256:{'f' * 64}").encode())
    aws.repository()
    aws.passwords(2)
    assert genvalues("image", "push", "f.yaml") == 0
    assert Path("f.yaml").read_bytes() == INPUTS.replace(IMAGE, f"{REGISTRY}/llama-lora:0.2.0@{DIGEST}").encode()


def test_build_asks_for_the_base_registry_alone_and_changes_nothing(
    aws: Aws, builder: Builder, capsys: pytest.CaptureFixture[str]
) -> None:
    aws.passwords()
    assert genvalues("image", "build", "f.yaml") == 0
    aws.all_asked()
    assert builder.commands == ["docker login", "docker build"]
    login, told = (argv for argv, _ in builder.calls)
    assert login[-1] == BASE.partition("/")[0]
    assert f"BASE={BASE}" in told and told[told.index("--tag") + 1] == IMAGE and told[-1] == str(ROOT)
    assert told[told.index("--file") + 1] == str(ROOT / "trainer/Dockerfile")
    assert not any(argument.startswith("--network") for argument in told)
    assert Path("f.yaml").read_bytes() == INPUTS.encode()
    assert capsys.readouterr().err.splitlines()[-1] == f"Built {IMAGE}."


@pytest.mark.parametrize("name", ["docker", "podman", "buildah"])
def test_the_password_goes_by_stdin_and_is_shown_nowhere(
    aws: Aws, builder: Builder, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    aws.repository()
    aws.passwords(2)
    assert genvalues("image", "push", "f.yaml", "--builder", name) == 0
    assert [stdin for argv, stdin in builder.calls if argv[1] == "login"] == [PASSWORD, PASSWORD]
    assert [stdin for argv, stdin in builder.calls if argv[1] != "login"] == ["", ""]
    assert not any("the-password" in argument for argv, _ in builder.calls for argument in argv)
    assert "the-password" not in "".join(capsys.readouterr())
    assert "the-password" not in repr(Command("login", ("x",), {}, Path(), PASSWORD.encode()))


def test_what_is_run_is_printed_so_that_it_can_be_copied(
    aws: Aws, builder: Builder, capsys: pytest.CaptureFixture[str]
) -> None:
    aws.passwords()
    genvalues("image", "build", "f.yaml")
    shown = [line for line in capsys.readouterr().err.splitlines() if line.startswith("$ ")]
    assert shown[0] == f"$ docker login --username AWS --password-stdin {BASE.partition('/')[0]}"
    assert shown[1].startswith(f"$ docker build --file {ROOT}/trainer/Dockerfile --tag {IMAGE} --build-arg BASE={BASE}")


def test_a_link_to_the_file_stays_a_link(aws: Aws, builder: Builder) -> None:
    Path("f.yaml").rename("real.yaml")
    Path("f.yaml").symlink_to("real.yaml")
    aws.repository()
    aws.passwords(2)
    assert genvalues("image", "push", "f.yaml") == 0
    assert Path("f.yaml").is_symlink() and DIGEST in Path("real.yaml").read_text()


def test_a_file_that_is_read_only_is_told_before_anything_is_built(
    aws: Aws, builder: Builder, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("f.yaml").chmod(0o444)
    assert genvalues("image", "push", "f.yaml") == 2
    assert last_line(capsys) == (
        "f.yaml: cannot be written: the existing file is read-only (mode 444). Make it writable: its image's "
        "digest is to be written there."
    )
    assert builder.commands == []


def test_a_file_made_read_only_during_the_build_stays_and_the_digest_is_told(
    aws: Aws, builder: Builder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    aws.repository()
    aws.passwords(2)
    done = build.build_image

    def build_image(job: build.Job) -> None:
        done(job)
        Path("f.yaml").chmod(0o444)

    monkeypatch.setattr(build, "build_image", build_image)
    assert genvalues("image", "push", "f.yaml") == 2
    line = last_line(capsys)
    assert line.startswith("f.yaml: cannot be written: ") and f"Write image: {IMAGE}@{DIGEST} into it." in line
    assert Path("f.yaml").read_bytes() == INPUTS.encode()


def test_another_registry_is_pushed_to_with_the_users_own_login(
    aws: Aws, builder: Builder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    Path("f.yaml").write_text(INPUTS.replace(IMAGE, "ghcr.io/me/llama-lora:0.1.0"))
    aws.passwords()
    assert genvalues("image", "push", "f.yaml") == 0
    assert builder.commands == ["docker login", "docker build", "docker push"]
    assert builder.calls[0][0][-1] == "763104351884.dkr.ecr.eu-west-1.amazonaws.com" and aws.regions == ["eu-west-1"]
    assert f'image:    "ghcr.io/me/llama-lora:0.1.0@{DIGEST}"' in Path("f.yaml").read_text()
    assert "ghcr.io/me/llama-lora is not in ECR: docker pushes with the login that it has" in capsys.readouterr().err


def test_a_base_of_ones_own_needs_no_login_where_it_is_not_in_ecr(aws: Aws, builder: Builder) -> None:
    assert genvalues("image", "build", "f.yaml", "--base", "localhost/base:1") == 0
    assert builder.commands == ["docker build"] and "BASE=localhost/base:1" in builder.calls[0][0]
    assert aws.regions == []


@pytest.mark.parametrize(
    ("metadata", "network"),
    [
        ('{"AppType":"CodeEditor","DomainId":"d-1"}', "--network=sagemaker"),
        ('{"AppType":"JupyterLab"}', "--network=sagemaker"),
        ('{"ResourceArn":"arn:aws:sagemaker:us-west-2:1:notebook-instance/x","ResourceName":"x"}', None),
        ("{", None),
        ("[]", None),
        (None, None),
    ],
)
def test_in_sagemaker_studio_the_build_gets_its_network(
    aws: Aws, builder: Builder, metadata: str | None, network: str | None
) -> None:
    if metadata is not None:
        build.STUDIO.write_text(metadata)
    aws.passwords()
    assert genvalues("image", "build", "f.yaml") == 0
    assert [word for word in builder.calls[1][0] if word.startswith("--network")] == ([network] if network else [])


def test_a_network_can_be_named(aws: Aws, builder: Builder) -> None:
    aws.passwords()
    assert genvalues("image", "build", "f.yaml", "--network", "host") == 0
    assert "--network=host" in builder.calls[1][0]


# --- what goes wrong, in one line each


@pytest.mark.parametrize("machine", ["arm64", "aarch64"])
def test_an_arm64_machine_is_told_what_to_use(
    aws: Aws, builder: Builder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, machine: str
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert genvalues("image", "push", "f.yaml") == 2
    assert last_line(capsys) == (
        f"this machine is {machine}, and Trainium nodes and their base image are x86-64. "
        "Build on an x86-64 machine: Code Editor in SageMaker Studio, or an EC2 instance."
    )
    assert builder.calls == [] and aws.regions == []


def test_without_a_builder_a_line_names_them(
    aws: Aws, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert genvalues("image", "build", "f.yaml") == 2
    assert last_line(capsys) == "none of docker, podman, buildah is to be found on PATH. Install one of them."
    assert genvalues("image", "build", "f.yaml", "--builder", "podman") == 2
    assert last_line(capsys).startswith("--builder podman: is not to be found on PATH. ")


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (None, "f.yaml:1:1 image: missing. Write where the image goes: ACCOUNT.dkr.ecr.REGION.amazonaws.com/"),
        ("x/llama-lora:latest", "f.yaml:4:1 image: :latest is another image tomorrow. Name a version's tag, or"),
        (f"{IMAGE[:-6]}:latest@{DIGEST}", "f.yaml:4:1 image: :latest is another image tomorrow. Name a version's tag,"),
        (f"{IMAGE[:-6]}@{DIGEST}", "f.yaml:4:1 image: names no tag to build. Write REPOSITORY:TAG, such as"),
        (
            IMAGE.replace("us-west-2", "us-wset-2"),
            "us-wset-2 is no region that AWS lists a registry of its Deep Learning",
        ),
        (IMAGE.replace("us-west-2", "us-wset-2"), "Did you mean us-west-2?"),
        (IMAGE.replace("us-west-2", "eu-north-1"), "the base image is not offered in eu-north-1. Take it from another"),
        (IMAGE.replace("us-west-2", "eu-north-1"), f"--base {BASE}."),
        ("ghcr.io/me/llama-lora:1", "not in ECR, and no region is set to take the base image from. Set AWS_REGION, or"),
    ],
)
def test_an_address_that_cannot_be_built_for_is_told_before_anything_runs(
    aws: Aws, builder: Builder, capsys: pytest.CaptureFixture[str], image: str | None, said: str
) -> None:
    line = f"image: {image}\n" if image else ""
    Path("f.yaml").write_text(f"model: gpt2\ndataset: {{source: a/b}}\ninstance: cpu\n{line}")
    assert genvalues("image", "push", "f.yaml") == 2
    assert said in last_line(capsys)
    assert builder.calls == [] and aws.regions == []


def test_a_mistake_elsewhere_in_the_file_is_told_first(
    aws: Aws, builder: Builder, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("f.yaml").write_text(INPUTS.replace("instance:", "instnce:"))
    assert genvalues("image", "push", "f.yaml") == 2
    assert "instnce: unknown key" in capsys.readouterr().err
    assert builder.calls == []


def test_a_tag_that_is_taken_is_told_before_the_build(
    aws: Aws, builder: Builder, capsys: pytest.CaptureFixture[str]
) -> None:
    aws.repository("IMMUTABLE")
    expected = {"registryId": ACCOUNT, "repositoryName": "llama-lora", "imageIds": [{"imageTag": "0.1.0"}]}
    aws.stubs["ecr"].add_response("describe_images", {"imageDetails": [{"imageDigest": DIGEST}]}, expected)
    assert genvalues("image", "push", "f.yaml") == 2
    assert last_line(capsys) == (
        f"{IMAGE}: is pushed already, and its repository keeps tags as they are. "
        f"To use it write image: {IMAGE}@{DIGEST}. For another image write a new tag."
    )
    assert builder.calls == [] and Path("f.yaml").read_bytes() == INPUTS.encode()


@pytest.mark.parametrize("account", ["12345678901", "1234567890123", "1"])
def test_an_account_that_has_not_12_digits_is_told_as_that(
    account: str, builder: Builder, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("f.yaml").write_text(INPUTS.replace(ACCOUNT, account))
    assert genvalues("image", "build", "f.yaml") == 2
    said = last_line(capsys)
    assert f"the account number {account} has {len(account)} digits, not 12" in said and "AWS_REGION" not in said
    assert not registries.parse(IMAGE.replace(ACCOUNT, account)).in_ecr, "no registry is logged in at by that account"
    assert builder.calls == []


def test_a_tag_that_is_free_is_built(aws: Aws, builder: Builder) -> None:
    aws.repository("IMMUTABLE")
    aws.refuses("describe_images", "ImageNotFoundException")
    aws.passwords(2)
    assert genvalues("image", "push", "f.yaml") == 0


@pytest.mark.parametrize("code", ["RepositoryNotFoundException", "AccessDeniedException"])
def test_a_repository_of_another_account_is_told_with_both(
    aws: Aws, builder: Builder, capsys: pytest.CaptureFixture[str], code: str
) -> None:
    aws.refuses("describe_repositories", code)
    aws.account("999988887777")
    assert genvalues("image", "push", "f.yaml") == 2
    assert last_line(capsys) == (
        f"{IMAGE}: account {ACCOUNT} shows no repository llama-lora to these credentials, which are 999988887777's. "
        "Write 999988887777 in image:, or use that account's credentials: AWS_PROFILE=NAME."
    )
    assert builder.calls == []


@pytest.mark.parametrize(
    ("operation", "code", "status", "said"),
    [
        (
            "describe_repositories",
            "AccessDeniedException",
            2,
            "not allowed to these credentials: no. Have ecr:Describe",
        ),
        ("create_repository", "AccessDeniedException", 2, "Have ecr:CreateRepository allowed for them, or use others"),
        (
            "describe_repositories",
            "ExpiredTokenException",
            2,
            "the AWS credentials have expired. Log in again: aws sso",
        ),
        (
            "describe_repositories",
            "UnrecognizedClientException",
            2,
            "AWS does not know these credentials (Unrecognized",
        ),
        ("describe_repositories", "InvalidParameterException", 2, "AWS answers InvalidParameterException: no. Look at"),
        ("describe_repositories", "ThrottlingException", 1, "AWS answers ThrottlingException: no. Try again."),
    ],
)
def test_what_ecr_refuses_is_told_in_a_line(
    aws: Aws,
    builder: Builder,
    capsys: pytest.CaptureFixture[str],
    operation: str,
    code: str,
    status: int,
    said: str,
) -> None:
    if operation == "create_repository":
        aws.no_repository()
        aws.account()
    aws.refuses(operation, code)
    if code == "AccessDeniedException":
        aws.account()
    assert genvalues("image", "push", "f.yaml") == status
    line = last_line(capsys)
    assert line.startswith(f"{IMAGE}: ") and said in line
    assert builder.calls == [] and Path("f.yaml").read_bytes() == INPUTS.encode()


def test_a_token_that_is_refused_names_the_region(
    aws: Aws, builder: Builder, capsys: pytest.CaptureFixture[str]
) -> None:
    aws.refuses("get_authorization_token", "AccessDeniedException", "not you")
    assert genvalues("image", "build", "f.yaml") == 2
    assert last_line(capsys) == (
        "ECR in us-west-2: not allowed to these credentials: not you. "
        "Have ecr:GetAuthorizationToken allowed for them, or use others: AWS_PROFILE=NAME."
    )


def test_without_credentials_a_line_says_how_to_log_in(builder: Builder, capsys: pytest.CaptureFixture[str]) -> None:
    """With boto3 itself, which asks nobody when it has no key to sign with."""
    assert genvalues("image", "push", "f.yaml") == 2
    assert last_line(capsys) == (
        f"{IMAGE}: no AWS credentials. Log in: aws configure, aws sso login, or AWS_PROFILE=NAME."
    )
    assert builder.calls == []


def test_a_profile_that_is_not_there_is_told_in_a_line(
    builder: Builder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    assert genvalues("image", "build", "f.yaml") == 2
    assert "nobody" in last_line(capsys)


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (exceptions.PartialCredentialsError(provider="env", cred_var="key"), UserError, "Partial credentials found"),
        (exceptions.UnauthorizedSSOTokenError(), UserError, "Log in again: aws sso login"),
        (exceptions.TokenRetrievalError(provider="sso", error_msg="x"), UserError, "Log in again: aws sso login"),
        (exceptions.EndpointConnectionError(endpoint_url="https://x"), Unavailable, "AWS does not answer"),
        (exceptions.ConnectTimeoutError(endpoint_url="https://x"), Unavailable, "AWS does not answer"),
    ],
)
def test_botocores_own_errors_are_told_in_a_line(error: Exception, kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=re.escape(said)) as told, ecr.told("somewhere"):
        raise error
    assert str(told.value).startswith("somewhere: ") and "\n" not in str(told.value)


LOGIN, BUILD, PUSH = "login", "build", "push"


@pytest.mark.parametrize(
    ("step", "output", "said"),
    [
        (
            LOGIN,
            "Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?",
            "docker is installed and does not run. Start it, or use another: --builder podman or buildah.",
        ),
        (
            BUILD,
            "ERROR: failed to connect to the docker API at unix:///var/run/docker.sock; check if the path is correct",
            "docker is installed and does not run. Start it, or use another: --builder podman or buildah.",
        ),
        (
            BUILD,
            "permission denied while trying to connect to the Docker daemon socket at unix:///var/run/docker.sock",
            "docker runs, and you may not use it. Join its group",
        ),
        (
            BUILD,
            "Forbidden. Reason: [ImageBuild] SageMaker Studio Docker Usage only allows 'sagemaker' as network input",
            "SageMaker Studio allows builds one network alone. Add --network sagemaker.",
        ),
        (BUILD, f"ERROR: {BASE}: not found", f"the registry refuses the base image {BASE}. Its account and tag are in"),
        (
            BUILD,
            f"failed to resolve source metadata for {BASE}: unexpected status from HEAD request: 403 Forbidden",
            f"the registry refuses the base image {BASE}. ",
        ),
        (BUILD, "write /x: no space left on device", "the disk is full. Free some tens of GB: docker system prune."),
        (BUILD, "exec /bin/sh: exec format error", "the base image is for x86-64, and docker builds for another"),
        (
            PUSH,
            "tag invalid: The image tag '0.1.0' already exists in the 'llama-lora' repository and cannot be "
            "overwritten because the tag is immutable.",
            "the tag is taken, and its repository keeps tags as they are. Write a new tag in image:.",
        ),
        (
            PUSH,
            "denied: Your authorization token has expired. Reauthenticate and try again.",
            "the login has expired. ",
        ),
        (PUSH, "no basic auth credentials", f"{REGISTRY} refuses the push. Log in there as somebody who may push"),
        (
            PUSH,
            "denied: User: x is not authorized to perform: ecr:InitiateLayerUpload",
            f"{REGISTRY} refuses the push. ",
        ),
        (PUSH, "dial tcp: lookup x on 10.0.0.2:53: no such host", "the network does not let docker through. Look at"),
        (
            PUSH,
            "tls: failed to verify certificate: x509: certificate signed by unknown authority",
            "is not trusted here",
        ),
        (
            PUSH,
            "something nobody knows",
            "docker push failed: something nobody knows. Look at that, then",
        ),
        (
            LOGIN,
            "Error saving credentials: error storing credentials - err: exit status 1",
            "credential helper fails. ",
        ),
        (
            LOGIN,
            'Error: logging into "x": invalid username/password',
            "does not take the password that ECR has given. ",
        ),
        (
            LOGIN,
            "login attempt to https://x/v2/ failed with status: 400 Bad Request",
            "does not take the password that",
        ),
        (LOGIN, "", "docker login failed: it says nothing. "),
    ],
)
def test_what_a_builder_complains_of_is_told_in_a_line_and_the_file_stays(
    aws: Aws, builder: Builder, capsys: pytest.CaptureFixture[str], step: str, output: str, said: str
) -> None:
    builder.answers(step, f"#1 hello\n{output}\n" if output else "")
    aws.repository()
    aws.passwords(2)
    assert genvalues("image", "push", "f.yaml") == 2
    line = last_line(capsys)
    assert line.startswith(f"{BASE.partition('/')[0] if step == LOGIN else IMAGE}: ") and said in line
    assert builder.commands[-1] == f"docker {step}"
    assert Path("f.yaml").read_bytes() == INPUTS.encode()


def test_a_failed_build_ends_with_the_end_of_its_log(
    aws: Aws, builder: Builder, capsys: pytest.CaptureFixture[str]
) -> None:
    builder.answers(BUILD, "".join(f"line {number}\n" for number in range(100)) + "The image is not whole (1):\n  x\n")
    aws.passwords()
    assert genvalues("image", "build", "f.yaml") == 2
    *_, told = capsys.readouterr().err.partition(f"{IMAGE}: ")[2].partition("the build failed.")
    assert told.splitlines()[0] == " The end of its log:"
    assert told.splitlines()[1:] == [f"  line {number}" for number in range(82, 100)] + [
        "  The image is not whole (1):",
        "    x",
    ]


def test_a_token_in_a_builders_output_is_not_shown(
    aws: Aws, builder: Builder, capsys: pytest.CaptureFixture[str]
) -> None:
    token = "hf_" + "a1" * 17
    builder.answers(BUILD, f"echo {token}\n")
    aws.passwords()
    assert genvalues("image", "build", "f.yaml") == 2
    assert token not in capsys.readouterr().err


def test_a_file_changed_during_the_build_is_left_as_it_is_and_the_digest_told(
    aws: Aws, builder: Builder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    aws.repository()
    aws.passwords(2)
    other = INPUTS.replace("0.1.0", "0.2.0").encode()
    done = build.build_image

    def build_image(job: build.Job) -> None:
        done(job)
        Path("f.yaml").write_bytes(other)

    monkeypatch.setattr(build, "build_image", build_image)
    assert genvalues("image", "push", "f.yaml") == 2
    line = last_line(capsys)
    assert line.startswith(f"f.yaml: does not say image: {IMAGE} ") and f"Write image: {IMAGE}@{DIGEST} there." in line
    assert Path("f.yaml").read_bytes() == other


def test_a_push_that_tells_no_digest_changes_no_file(
    aws: Aws, builder: Builder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    aws.repository()
    aws.passwords(2)
    monkeypatch.setattr(build, "digest_in", lambda lines: "")
    assert genvalues("image", "push", "f.yaml") == 2
    assert "pushed, and its digest was not told" in last_line(capsys)
    assert Path("f.yaml").read_bytes() == INPUTS.encode()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_builder_and_leaves_the_file(builder: Builder, number: int, status: int) -> None:
    (builder.folder / "hang").touch()
    code = "from genvalues.cli import main; main()"
    arguments = ["image", "build", "f.yaml", "--base", "localhost/base:1"]
    command = [sys.executable, "-c", code, *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            until(lambda: builder.calls)
            os.kill(process.pid, number)
            _, err = process.communicate(timeout=PATIENCE)
        finally:
            (builder.folder / "hang").unlink()
    assert process.returncode == status
    assert err.splitlines()[-1] == f"Stopped by {signal.Signals(number).name}. f.yaml is as it was."
    assert Path("f.yaml").read_bytes() == INPUTS.encode()


# --- the pieces


@pytest.mark.parametrize(
    ("reference", "registry", "account", "region", "name"),
    [
        (IMAGE, REGISTRY, ACCOUNT, REGION, "llama-lora"),
        (f"{REGISTRY}/team/llama-lora:1", REGISTRY, ACCOUNT, REGION, "team/llama-lora"),
        (
            "111122223333.dkr.ecr.cn-north-1.amazonaws.com.cn/x:1",
            "111122223333.dkr.ecr.cn-north-1.amazonaws.com.cn",
            ACCOUNT,
            "cn-north-1",
            "x",
        ),
        (
            "111122223333.dkr.ecr-fips.us-gov-west-1.amazonaws.com/x:1",
            "111122223333.dkr.ecr-fips.us-gov-west-1.amazonaws.com",
            ACCOUNT,
            "us-gov-west-1",
            "x",
        ),
        (
            "111122223333.dkr-ecr.eu-west-1.on.aws/x:1",
            "111122223333.dkr-ecr.eu-west-1.on.aws",
            ACCOUNT,
            "eu-west-1",
            "x",
        ),
        ("ghcr.io/me/x:1", "ghcr.io", "", "", "me/x"),
        ("localhost:5000/x:1", "localhost:5000", "", "", "x"),
        ("localhost/x:1", "localhost", "", "", "x"),
        ("me/x:1", "", "", "", "me/x"),
        ("public.ecr.aws/x/y:1", "public.ecr.aws", "", "", "x/y"),
        (f"{ACCOUNT}.dkr.ecr.us-west-2.amazonaws.com.evil.example/x:1", ANY, "", "", "x"),
    ],
)
def test_an_address_is_taken_apart(reference: str, registry: str, account: str, region: str, name: str) -> None:
    image = registries.parse(reference)
    assert (image.registry, image.account, image.region, image.name) == (registry, account, region, name)
    assert image.in_ecr == bool(account) and image.tagged == reference


def test_every_region_offered_has_an_account_and_its_own_domain() -> None:
    assert set(registries.ACCOUNTS) >= registries.OFFERED
    for region in registries.OFFERED:
        base = registries.parse(registries.base_image(region, "x"))
        assert (base.account, base.region) == (registries.ACCOUNTS[region], region)
        assert base.registry.endswith(".cn") == region.startswith("cn-")
    with pytest.raises(UserError, match="not offered in af-south-1"):
        registries.base_image("af-south-1", "x")


def test_the_dockerfiles_own_base_is_the_tables() -> None:
    text = (ROOT / "trainer/Dockerfile").read_text(encoding="utf-8")
    given = dict(re.findall(r"^ARG (\w+)=(\S+)$", text, re.MULTILINE))
    base = given["BASE"]
    while names := re.findall(r"\$\{(\w+)\}", base):
        for name in names:
            base = base.replace(f"${{{name}}}", given[name])
    assert base == registries.address(given["REGION"])
    assert given["TAG"] == registries.TAG and given["ACCOUNT"] == registries.ACCOUNTS[given["REGION"]]


def test_the_build_arguments_are_those_of_the_dockerfile(aws: Aws, builder: Builder) -> None:
    aws.passwords()
    genvalues("image", "build", "f.yaml")
    told = builder.calls[1][0]
    given = {told[place + 1].partition("=")[0] for place, word in enumerate(told) if word == "--build-arg"}
    text = (ROOT / "trainer/Dockerfile").read_text(encoding="utf-8")
    assert "BASE" in given and "VERSION" in given
    assert given <= set(re.findall(r"^ARG (\w+)", text, re.MULTILINE))


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\nimage: OLD\nb: 2\n",
        "image: 'OLD'",
        'image: "OLD"   # OLD is in this comment, too\n',
        "{a: 1, image: OLD, b: [OLD]}\n",
        "nested: {image: OLD}\nimage: OLD\r\n",
        "image: &anchor OLD\n",
        "image: >-\n  OLD\nb: OLD\n",
        "\ufeffimage: OLD\n",
        "# \N{GRINNING FACE}\nimage:\n  OLD\n",
    ],
)
def test_a_value_is_replaced_and_the_rest_stays(text: str) -> None:
    old, new = "x.io/a:1", "x.io/a:1@sha256:0"
    written = text.replace("OLD", old)
    places = [match.start() for match in re.finditer(re.escape(old), written)]
    expected = [written[:at] + new + written[at + len(old) :] for at in places]
    changed = replaced(written, "image", old, new)
    assert changed in expected
    if "nested" in text:
        assert changed == expected[1]
    elif text.startswith(('image: "', "image: >", "{")):
        assert changed == expected[0]


@pytest.mark.parametrize(
    "text", ["image: other\n", "images: x.io/a:1\n", "- x.io/a:1\n", 'image: "x\\x2eio/a:1"\n', ""]
)
def test_a_value_that_is_not_there_as_it_is_written_is_not_replaced(text: str) -> None:
    assert replaced(text, "image", "x.io/a:1", "new") is None


def test_what_a_command_reads_reaches_it_whole_and_ends(tmp_path: Path) -> None:
    lines: list[str] = []
    secret = b"s" * 60_000
    command = Command("cat", ("/bin/sh", "-c", "wc -c"), {"PATH": "/usr/bin:/bin"}, tmp_path, secret)
    assert run_together([command], lambda name, line: lines.append(line.strip())) == 0
    deaf = Command("true", ("/bin/sh", "-c", "exit 3"), {}, tmp_path, secret)
    assert run_together([deaf], lambda name, line: None) == 3
    assert lines == ["60000"]


def test_docker_tells_its_digest_last() -> None:
    lines = ["0123: Pushed", "older: digest: sha256:" + "1" * 64 + " size: 2", f"0.1.0: digest: {DIGEST} size: 4711"]
    assert plan.digest_in(lines) == DIGEST
    assert plan.digest_in(["digest: sha256:short size: 1", "writing image sha256:" + "1" * 64]) == ""


@pytest.mark.parametrize("arguments", [["image", "--help"], ["image", "push", "--help"], ["--help"]])
def test_help_imports_no_boto3(arguments: list[str]) -> None:
    code = (
        "import sys; from genvalues.cli import main; sys.argv = ['genvalues', *sys.argv[1:]]\n"
        "try: main()\nfinally: print('imported:', *({'boto3', 'botocore', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "imported:"
    assert "image" in done.stdout


def test_a_mistake_in_the_file_is_told_before_boto3_is_imported() -> None:
    Path("f.yaml").write_text("model: 3\n")
    code = (
        "import sys; from genvalues.cli import main; sys.argv = ['genvalues', 'image', 'push', 'f.yaml']\n"
        "try: main()\nfinally: print('imported:', 'boto3' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "imported: False\n")
