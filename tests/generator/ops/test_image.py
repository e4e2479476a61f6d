"""genvalues image build and push, with fake builders on PATH and botocore's stubber for AWS."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.stub import Stubber

from generator.cluster.waiting import PATIENCE, until
from genvalues import cli
from genvalues.common import log
from genvalues.common.errors import UserError
from genvalues.common.process import Command, run_together
from genvalues.inputs.yaml_text import replaced
from genvalues.ops import image as image_module
from genvalues.ops import registries
from genvalues.ops.aws import AwsClients

ROOT = Path(__file__).parents[3]
ACCOUNT, REGION = "111122223333", "us-west-2"
REGISTRY = f"{ACCOUNT}.dkr.ecr.{REGION}.amazonaws.com"
IMAGE = f"{REGISTRY}/llama-lora:0.1.0"
BASE = f"763104351884.dkr.ecr.{REGION}.amazonaws.com/{registries.REPOSITORY}:{registries.TAG}"
DIGEST = "sha256:" + "0123456789abcdef" * 4
PASSWORD = "the-password-of-" + "x" * 2000  # as long as ECR's
INPUTS = f"""\
# A comment that must stay \N{LATIN SMALL LETTER E WITH ACUTE}\r
model: gpt2
dataset: {{source: a/b}}   # two columns
instance: trn1.32xlarge
image:    "{IMAGE}"  # where it goes

name: demo
"""


class Builder:
    """Fake docker, podman and buildah: they record their calls and print the answers that a test sets."""

    def __init__(self, folder: Path, *names: str) -> None:
        self.folder = folder
        folder.mkdir()
        for name in names:
            script = folder / name
            script.write_text(
                f"""#!{sys.executable} -IS
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
        """Each call's builder and first argument."""
        return [" ".join(argv[:2]) for argv, _ in self.calls]


class Aws:
    """ECR and STS: calls must come in the order in which a test adds their answers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        keys = {"aws_access_key_id": "x", "aws_secret_access_key": "x", "region_name": REGION}
        self.clients = {name: boto3.client(name, **keys) for name in ("ecr", "sts")}
        self.stubs = {name: Stubber(client) for name, client in self.clients.items()}
        for stub in self.stubs.values():
            stub.activate()
        self.regions: list[str] = []

        def client(aws: AwsClients, service: str) -> Any:
            self.regions.append(aws.region)
            return self.clients[service]

        monkeypatch.setattr(AwsClients, "client", client)

    def repository(self, mutability: str = "MUTABLE") -> None:
        answer = {"repositories": [{"imageTagMutability": mutability}]}
        expected = {"registryId": ACCOUNT, "repositoryNames": ["llama-lora"]}
        self.stubs["ecr"].add_response("describe_repositories", answer, expected)

    def no_repository(self) -> None:
        self.refuses("describe_repositories", "RepositoryNotFoundException")

    def creates_repository(self) -> None:
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
def clean_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log.configure()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setattr(image_module, "STUDIO_METADATA", tmp_path / "resource-metadata.json")
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


# --- build and push


@pytest.mark.parametrize("name", ["docker", "podman", "buildah"])
def test_push_builds_pushes_and_writes_the_digest_and_changes_nothing_else_in_the_file(
    aws: Aws, builder: Builder, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    aws.no_repository()
    aws.account()
    aws.creates_repository()
    aws.passwords(2)
    Path("f.yaml").chmod(0o640)
    assert genvalues("image", "push", "f.yaml", "--builder", name) == 0
    aws.all_asked()
    assert builder.commands == [f"{name} login", f"{name} build", f"{name} login", f"{name} push"]
    assert Path("f.yaml").read_bytes() == INPUTS.replace(IMAGE, f"{IMAGE}@{DIGEST}").encode()
    assert stat.S_IMODE(Path("f.yaml").stat().st_mode) == 0o640
    assert [path.name for path in Path().iterdir()] == ["f.yaml"]
    assert [stdin for _, stdin in builder.calls] == [PASSWORD, "", PASSWORD, ""], "passed by stdin, and only to login"
    assert not any("the-password" in argument for argv, _ in builder.calls for argument in argv)
    out, err = capsys.readouterr()
    assert "the-password" not in out + err
    first, *_, last = err.splitlines()
    assert "created the ECR repository llama-lora" in first and "immutable tags" in first
    assert all(part in last for part in (IMAGE, "f.yaml", DIGEST))


def test_the_file_after_a_push_is_valid_and_its_values_name_repository_and_digest(
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


def test_build_logs_in_to_the_base_registry_only_and_leaves_the_file_unchanged(
    aws: Aws, builder: Builder, capsys: pytest.CaptureFixture[str]
) -> None:
    aws.passwords()
    assert genvalues("image", "build", "f.yaml") == 0
    aws.all_asked()
    assert builder.commands == ["docker login", "docker build"]
    login, built = (argv for argv, _ in builder.calls)
    assert login[-1] == BASE.partition("/")[0]
    assert f"BASE={BASE}" in built and built[built.index("--tag") + 1] == IMAGE and built[-1] == str(ROOT)
    assert built[built.index("--file") + 1] == str(ROOT / "trainer/Dockerfile")
    assert not any(argument.startswith("--network") for argument in built)
    assert Path("f.yaml").read_bytes() == INPUTS.encode()
    assert IMAGE in last_line(capsys)


def test_a_newer_neuron_runtime_is_a_build_argument(aws: Aws, builder: Builder) -> None:
    aws.passwords()
    assert genvalues("image", "build", "f.yaml", "--neuron-runtime", "2.33.10.0") == 0
    built = builder.calls[1][0]
    assert built[built.index("NEURON_RUNTIME=2.33.10.0") - 1] == "--build-arg"


def test_backend_native_takes_its_runtime_from_the_base_image(
    aws: Aws, builder: Builder, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("f.yaml").write_text(INPUTS.replace("trn1.32xlarge", "trn2.48xlarge"))
    assert genvalues("image", "build", "f.yaml", "--base", BASE, "--neuron-runtime", "2.33.10.0") == 2
    assert "--neuron-runtime" in last_line(capsys) and builder.calls == []


def test_a_password_is_not_in_the_representation_of_a_command() -> None:
    assert "the-password" not in repr(Command("login", ("x",), {}, Path(), PASSWORD.encode()))


def test_each_command_is_printed_so_that_it_can_be_copied(
    aws: Aws, builder: Builder, capsys: pytest.CaptureFixture[str]
) -> None:
    aws.passwords()
    genvalues("image", "build", "f.yaml")
    shown = [line for line in capsys.readouterr().err.splitlines() if line.startswith("$ ")]
    assert shown[0] == f"$ docker login --username AWS --password-stdin {BASE.partition('/')[0]}"
    built = f"$ docker build --file {ROOT}/trainer/Dockerfile --target xla --tag {IMAGE} --build-arg BASE={BASE}"
    assert shown[1].startswith(built)


def test_a_link_to_the_file_stays_a_link(aws: Aws, builder: Builder) -> None:
    Path("f.yaml").rename("real.yaml")
    Path("f.yaml").symlink_to("real.yaml")
    aws.repository()
    aws.passwords(2)
    assert genvalues("image", "push", "f.yaml") == 0
    assert Path("f.yaml").is_symlink() and DIGEST in Path("real.yaml").read_text()


def test_a_read_only_file_is_an_error_before_anything_is_built(
    aws: Aws, builder: Builder, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("f.yaml").chmod(0o444)
    assert genvalues("image", "push", "f.yaml") == 2
    line = last_line(capsys)
    assert line.startswith("f.yaml: ") and "read-only (mode 444)" in line and "Make it writable" in line
    assert builder.commands == []


def test_a_push_to_another_registry_uses_the_builders_own_login(
    aws: Aws, builder: Builder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    Path("f.yaml").write_text(INPUTS.replace(IMAGE, "ghcr.io/me/llama-lora:0.1.0"))
    aws.passwords()
    assert genvalues("image", "push", "f.yaml") == 0
    assert builder.commands == ["docker login", "docker build", "docker push"]
    assert builder.calls[0][0][-1] == "763104351884.dkr.ecr.eu-west-1.amazonaws.com" and aws.regions == ["eu-west-1"]
    assert f'image:    "ghcr.io/me/llama-lora:0.1.0@{DIGEST}"' in Path("f.yaml").read_text()
    assert "ghcr.io/me/llama-lora is not in ECR" in capsys.readouterr().err


def test_a_base_image_outside_ecr_needs_no_login(aws: Aws, builder: Builder) -> None:
    assert genvalues("image", "build", "f.yaml", "--base", "localhost/base:1") == 0
    assert builder.commands == ["docker build"] and "BASE=localhost/base:1" in builder.calls[0][0]
    assert aws.regions == []


@pytest.mark.parametrize(
    ("inputs", "target"),
    [
        ("instance: trn1.32xlarge", "xla"),
        ("instance: trn2.48xlarge", "native"),
        ("instance: trn2.48xlarge\nbackend: xla", "xla"),
        ("instance: cpu", "native"),
    ],
)
def test_the_target_is_the_backend_of_the_file(aws: Aws, builder: Builder, inputs: str, target: str) -> None:
    Path("f.yaml").write_text(INPUTS.replace("instance: trn1.32xlarge", inputs))
    assert genvalues("image", "build", "f.yaml", "--base", "localhost/base:1") == 0
    built = builder.calls[0][0]
    assert built[built.index("--target") + 1] == target and "BASE=localhost/base:1" in built


@pytest.mark.parametrize("instance", ["trn2.48xlarge", "cpu"])
def test_backend_native_without_a_base_image_is_an_error_that_says_where_to_look(
    aws: Aws, builder: Builder, capsys: pytest.CaptureFixture[str], instance: str
) -> None:
    Path("f.yaml").write_text(INPUTS.replace("trn1.32xlarge", instance))
    assert genvalues("image", "push", "f.yaml") == 2
    line = last_line(capsys)
    assert line.startswith(f"f.yaml instance {instance}: backend native")
    assert all(word in line for word in ("--base IMAGE", "awsdocs-neuron.readthedocs-hosted.com", "gallery.ecr.aws"))
    assert builder.calls == [] and aws.regions == []


def test_a_base_image_of_the_public_gallery_needs_no_login(aws: Aws, builder: Builder) -> None:
    Path("f.yaml").write_text(INPUTS.replace("trn1.32xlarge", "trn2.48xlarge"))
    base = "public.ecr.aws/neuron/x:1"
    assert genvalues("image", "build", "f.yaml", "--base", base) == 0
    assert builder.commands == ["docker build"] and f"BASE={base}" in builder.calls[0][0] and aws.regions == []


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
def test_a_build_in_sagemaker_studio_uses_its_network(
    aws: Aws, builder: Builder, metadata: str | None, network: str | None
) -> None:
    if metadata is not None:
        image_module.STUDIO_METADATA.write_text(metadata)
    aws.passwords()
    assert genvalues("image", "build", "f.yaml") == 0
    assert [word for word in builder.calls[1][0] if word.startswith("--network")] == ([network] if network else [])


def test_the_network_option_is_passed_on(aws: Aws, builder: Builder) -> None:
    aws.passwords()
    assert genvalues("image", "build", "f.yaml", "--network", "host") == 0
    assert "--network=host" in builder.calls[1][0]


# --- errors, in one line each


@pytest.mark.parametrize("machine", ["arm64", "aarch64"])
def test_an_arm64_machine_is_an_error_that_says_where_to_build(
    aws: Aws, builder: Builder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, machine: str
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert genvalues("image", "push", "f.yaml") == 2
    line = last_line(capsys)
    assert machine in line and "Build on an x86-64 machine" in line
    assert builder.calls == [] and aws.regions == []


def test_without_a_builder_the_error_names_those_that_can_be_installed(
    aws: Aws, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert genvalues("image", "build", "f.yaml") == 2
    assert "docker, podman, buildah" in last_line(capsys)
    assert genvalues("image", "build", "f.yaml", "--builder", "podman") == 2
    assert last_line(capsys).startswith("--builder podman: not found on PATH")


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (None, ["f.yaml:1:1 image: missing", "ACCOUNT.dkr.ecr.REGION.amazonaws.com/"]),
        ("x/llama-lora:latest", ["f.yaml:4:1 image: ", "latest"]),
        (f"{IMAGE[:-6]}:latest@{DIGEST}", ["f.yaml:4:1 image: ", "latest"]),
        (f"{IMAGE[:-6]}@{DIGEST}", ["f.yaml:4:1 image: ", "no tag", "REPOSITORY:TAG"]),
        (IMAGE.replace("us-west-2", "us-wset-2"), ["us-wset-2", "Did you mean us-west-2?", "--base"]),
        (IMAGE.replace("us-west-2", "eu-north-1"), ["not available in eu-north-1", f"--base {BASE}."]),
        ("ghcr.io/me/llama-lora:1", ["f.yaml:4:1 image: ", "no region", "AWS_REGION", "--base"]),
    ],
)
def test_an_image_address_that_cannot_be_built_is_an_error_before_anything_runs(
    aws: Aws, builder: Builder, capsys: pytest.CaptureFixture[str], image: str | None, words: list[str]
) -> None:
    line = f"image: {image}\n" if image else ""
    instance = "trn1.32xlarge" if image else "cpu"  # with Trainium the check of the file asks for an image
    Path("f.yaml").write_text(f"model: gpt2\ndataset: {{source: a/b}}\ninstance: {instance}\n{line}")
    assert genvalues("image", "push", "f.yaml") == 2
    line = last_line(capsys)
    assert all(word in line for word in words), line
    assert builder.calls == [] and aws.regions == []


def test_a_mistake_elsewhere_in_the_file_is_reported_first(
    aws: Aws, builder: Builder, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("f.yaml").write_text(INPUTS.replace("instance:", "instnce:"))
    assert genvalues("image", "push", "f.yaml") == 2
    assert "instnce: unknown key" in capsys.readouterr().err
    assert builder.calls == []


def test_an_immutable_tag_that_exists_is_an_error_before_the_build(
    aws: Aws, builder: Builder, capsys: pytest.CaptureFixture[str]
) -> None:
    aws.repository("IMMUTABLE")
    expected = {"registryId": ACCOUNT, "repositoryName": "llama-lora", "imageIds": [{"imageTag": "0.1.0"}]}
    aws.stubs["ecr"].add_response("describe_images", {"imageDetails": [{"imageDigest": DIGEST}]}, expected)
    assert genvalues("image", "push", "f.yaml") == 2
    line = last_line(capsys)
    assert line.startswith(f"{IMAGE}: ") and "immutable" in line and f"image: {IMAGE}@{DIGEST}" in line
    assert builder.calls == [] and Path("f.yaml").read_bytes() == INPUTS.encode()


@pytest.mark.parametrize("account", ["12345678901", "1234567890123", "1"])
def test_an_account_number_without_12_digits_is_an_error(
    account: str, builder: Builder, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("f.yaml").write_text(INPUTS.replace(ACCOUNT, account))
    assert genvalues("image", "build", "f.yaml") == 2
    line = last_line(capsys)
    assert account in line and f"{len(account)} digits, not 12" in line and "AWS_REGION" not in line
    assert not registries.parse_image(IMAGE.replace(ACCOUNT, account)).in_ecr, "so it is never logged in to"
    assert builder.calls == []


def test_a_new_tag_is_built(aws: Aws, builder: Builder) -> None:
    aws.repository("IMMUTABLE")
    aws.refuses("describe_images", "ImageNotFoundException")
    aws.passwords(2)
    assert genvalues("image", "push", "f.yaml") == 0


@pytest.mark.parametrize("code", ["RepositoryNotFoundException", "AccessDeniedException"])
def test_a_repository_of_another_account_is_an_error_that_names_both_accounts(
    aws: Aws, builder: Builder, capsys: pytest.CaptureFixture[str], code: str
) -> None:
    aws.refuses("describe_repositories", code)
    aws.account("999988887777")
    assert genvalues("image", "push", "f.yaml") == 2
    line = last_line(capsys)
    assert line.startswith(f"{IMAGE}: ") and ACCOUNT in line
    assert "Write 999988887777 in image:" in line and "AWS_PROFILE" in line
    assert builder.calls == []


@pytest.mark.parametrize(
    ("operation", "code", "status", "words"),
    [
        ("describe_repositories", "AccessDeniedException", 2, "Allow ecr:DescribeRepositories"),
        ("create_repository", "AccessDeniedException", 2, "Allow ecr:CreateRepository"),
        ("describe_repositories", "ExpiredTokenException", 2, "have expired. Log in again: aws sso"),
        ("describe_repositories", "UnrecognizedClientException", 2, "(UnrecognizedClientException). Log in"),
        ("describe_repositories", "InvalidParameterException", 2, "InvalidParameterException: no. Check image:"),
        ("describe_repositories", "ThrottlingException", 1, "AWS answers ThrottlingException: no. Try again."),
    ],
)
def test_an_error_of_ecr_is_one_line(
    aws: Aws,
    builder: Builder,
    capsys: pytest.CaptureFixture[str],
    operation: str,
    code: str,
    status: int,
    words: str,
) -> None:
    if operation == "create_repository":
        aws.no_repository()
        aws.account()
    aws.refuses(operation, code)
    if code == "AccessDeniedException":
        aws.account()
    assert genvalues("image", "push", "f.yaml") == status
    line = last_line(capsys)
    assert line.startswith(f"{IMAGE}: ") and words in line
    assert builder.calls == [] and Path("f.yaml").read_bytes() == INPUTS.encode()


def test_a_login_that_ecr_denies_names_the_region_and_the_action(
    aws: Aws, builder: Builder, capsys: pytest.CaptureFixture[str]
) -> None:
    aws.refuses("get_authorization_token", "AccessDeniedException", "not you")
    assert genvalues("image", "build", "f.yaml") == 2
    line = last_line(capsys)
    assert line.startswith("ECR in us-west-2: ") and "not you" in line and "ecr:GetAuthorizationToken" in line


def test_without_credentials_the_error_says_how_to_log_in(builder: Builder, capsys: pytest.CaptureFixture[str]) -> None:
    """With boto3 itself, which makes no request without a key to sign it."""
    assert genvalues("image", "push", "f.yaml") == 2
    line = last_line(capsys)
    assert line.startswith(f"{IMAGE}: ") and "aws sso login" in line and "AWS_PROFILE" in line
    assert builder.calls == []


def test_a_missing_profile_is_one_line(
    builder: Builder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    assert genvalues("image", "build", "f.yaml") == 2
    assert "nobody" in last_line(capsys)


LOGIN, BUILD, PUSH = "login", "build", "push"


@pytest.mark.parametrize(
    ("step", "output", "fix"),
    [
        (LOGIN, "Cannot connect to the Docker daemon at unix:///var/run/docker.sock.", "Start docker, or use another"),
        (BUILD, "ERROR: failed to connect to the docker API at unix:///var/run/docker.sock", "Start docker, or use"),
        (BUILD, "permission denied while trying to connect to the Docker daemon socket", "Join the docker group"),
        (BUILD, "SageMaker Studio Docker Usage only allows 'sagemaker' as network input", "Add --network sagemaker."),
        (BUILD, f"ERROR: {BASE}: not found", f"{BASE.partition('/')[0]} refuses access"),
        (
            BUILD,
            f"failed to resolve {BASE}: unexpected status: 403 Forbidden",
            f"{BASE.partition('/')[0]} refuses access",
        ),
        (BUILD, "write /x: no space left on device", "Free some tens of GB"),
        (BUILD, "ERROR: BuildKit is enabled but the buildx component is missing or broken.", "Install docker's buildx"),
        (BUILD, "exec /bin/sh: exec format error", "Build on an x86-64 machine."),
        (BUILD, "The image is not whole (1):", "Correct that, then run the same command again."),
        (PUSH, "tag invalid: The image tag '0.1.0' already exists in the 'llama-lora' repository", "write a new one"),
        (PUSH, "denied: Your authorization token has expired. Reauthenticate and try again.", f"{REGISTRY} refuses"),
        (PUSH, "no basic auth credentials", f"{REGISTRY} refuses access"),
        (PUSH, "dial tcp: lookup x on 10.0.0.2:53: no such host", "Correct that, then run the same command again."),
        (LOGIN, "Error saving credentials: error storing credentials - err: exit status 1", "Check credsStore"),
        (LOGIN, 'Error: logging into "x": invalid username/password', "refuses access"),
        (LOGIN, "", "Correct that, then run the same command again."),
    ],
)
def test_an_error_of_the_builder_is_one_line_with_a_fix_and_the_file_is_unchanged(
    aws: Aws, builder: Builder, capsys: pytest.CaptureFixture[str], step: str, output: str, fix: str
) -> None:
    builder.answers(step, f"#1 hello\n{output}\n" if output else "")
    aws.repository()
    aws.passwords(2)
    assert genvalues("image", "push", "f.yaml") == 2
    line = last_line(capsys)
    assert line.startswith(f"{IMAGE}: docker {step} failed with status 1: {output or 'no output'}") and fix in line
    assert builder.commands[-1] == f"docker {step}"
    assert Path("f.yaml").read_bytes() == INPUTS.encode()


def test_a_failed_build_shows_its_log_before_the_error(
    aws: Aws, builder: Builder, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [f"line {number}" for number in range(100)]
    builder.answers(BUILD, "".join(f"{line}\n" for line in lines))
    aws.passwords()
    assert genvalues("image", "build", "f.yaml") == 2
    *shown, error = capsys.readouterr().err.splitlines()
    assert shown[-100:] == lines and "line 99" in error


def test_a_token_in_a_builders_output_is_not_shown(
    aws: Aws, builder: Builder, capsys: pytest.CaptureFixture[str]
) -> None:
    token = "hf_" + "a1" * 17
    builder.answers(BUILD, f"echo {token}\n")
    aws.passwords()
    assert genvalues("image", "build", "f.yaml") == 2
    assert token not in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        lambda file: file.chmod(0o444),
        lambda file: file.write_bytes(INPUTS.replace("0.1.0", "0.2.0").encode()),
    ],
    ids=["made read-only", "another image"],
)
def test_a_file_changed_during_the_build_is_kept_and_the_error_has_the_digest(
    aws: Aws,
    builder: Builder,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], object],
) -> None:
    aws.repository()
    aws.passwords(2)
    original = image_module.build_image

    def build_image(wanted: image_module.ImageBuild) -> None:
        original(wanted)
        change(Path("f.yaml"))

    monkeypatch.setattr(image_module, "build_image", build_image)
    assert genvalues("image", "push", "f.yaml") == 2
    line = last_line(capsys)
    assert line.startswith("f.yaml: ") and f"Write image: {IMAGE}@{DIGEST}" in line
    assert DIGEST not in Path("f.yaml").read_text()


def test_a_push_without_a_digest_changes_no_file(
    aws: Aws, builder: Builder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    aws.repository()
    aws.passwords(2)
    monkeypatch.setattr(image_module, "pushed_digest", lambda output: "")
    assert genvalues("image", "push", "f.yaml") == 2
    line = last_line(capsys)
    assert line.startswith(f"{IMAGE}: ") and "no digest" in line and f"image: {IMAGE}@sha256:..." in line
    assert Path("f.yaml").read_bytes() == INPUTS.encode()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_builder_and_the_file_is_unchanged(builder: Builder, number: int, status: int) -> None:
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
    assert f"stopped by {signal.Signals(number).name}; f.yaml is unchanged" in err.splitlines()[-1]
    assert Path("f.yaml").read_bytes() == INPUTS.encode()


# --- image addresses, and the file


@pytest.mark.parametrize(
    ("registry", "region", "name"),
    [
        (REGISTRY, REGION, "llama-lora"),
        (REGISTRY, REGION, "team/llama-lora"),
        (f"{ACCOUNT}.dkr.ecr.cn-north-1.amazonaws.com.cn", "cn-north-1", "x"),
        (f"{ACCOUNT}.dkr.ecr-fips.us-gov-west-1.amazonaws.com", "us-gov-west-1", "x"),
        (f"{ACCOUNT}.dkr-ecr.eu-west-1.on.aws", "eu-west-1", "x"),
        ("ghcr.io", "", "me/x"),
        ("localhost:5000", "", "x"),
        ("localhost", "", "x"),
        ("", "", "me/x"),
        ("public.ecr.aws", "", "x/y"),
        (f"{REGISTRY}.evil.example", "", "x"),
    ],
)
def test_an_image_reference_in_parts(registry: str, region: str, name: str) -> None:
    reference = f"{registry}/{name}:1".removeprefix("/")
    image = registries.parse_image(reference)
    assert (image.registry, image.region, image.name) == (registry, region, name)
    assert image.account == (ACCOUNT if region else "") and image.in_ecr == bool(region)
    assert image.tagged == reference


def test_every_region_with_the_base_image_has_an_account_and_a_domain() -> None:
    assert set(registries.ACCOUNTS) >= registries.OFFERED
    for region in registries.OFFERED:
        base = registries.parse_image(registries.base_image(region, "x"))
        assert (base.account, base.region) == (registries.ACCOUNTS[region], region)
        assert base.registry.endswith(".cn") == region.startswith("cn-")
    with pytest.raises(UserError, match="not available in af-south-1"):
        registries.base_image("af-south-1", "x")


def test_the_default_base_of_the_dockerfile_is_that_of_the_table() -> None:
    text = (ROOT / "trainer/Dockerfile").read_text(encoding="utf-8")
    given = dict(re.findall(r"^ARG (\w+)=(\S+)$", text, re.MULTILINE))
    base = given["XLA_BASE"]
    while names := re.findall(r"\$\{(\w+)\}", base):
        for name in names:
            base = base.replace(f"${{{name}}}", given[name])
    assert base == registries.base_address(given["REGION"])
    assert given["TAG"] == registries.TAG and given["ACCOUNT"] == registries.ACCOUNTS[given["REGION"]]


def test_every_build_argument_is_one_of_the_dockerfile(aws: Aws, builder: Builder) -> None:
    aws.passwords()
    genvalues("image", "build", "f.yaml")
    built = builder.calls[1][0]
    given = {built[place + 1].partition("=")[0] for place, word in enumerate(built) if word == "--build-arg"}
    text = (ROOT / "trainer/Dockerfile").read_text(encoding="utf-8")
    assert "BASE" in given and "VERSION" in given
    assert {"native", "xla"} <= set(re.findall(r"^FROM \S+ AS (\w+)$", text, re.MULTILINE))
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
def test_only_the_value_of_the_key_is_replaced(text: str) -> None:
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
def test_a_value_that_is_absent_or_escaped_is_not_replaced(text: str) -> None:
    assert replaced(text, "image", "x.io/a:1", "new") is None


def test_a_command_gets_all_of_its_stdin_and_then_its_end(tmp_path: Path) -> None:
    lines: list[str] = []
    secret = b"s" * 60_000
    command = Command("cat", ("/bin/sh", "-c", "wc -c"), {"PATH": "/usr/bin:/bin"}, tmp_path, secret)
    assert run_together([command], lambda name, line: lines.append(line.strip())) == 0
    deaf = Command("true", ("/bin/sh", "-c", "exit 3"), {}, tmp_path, secret)
    assert run_together([deaf], lambda name, line: None) == 3
    assert lines == ["60000"]


def test_the_digest_is_the_last_that_docker_prints() -> None:
    lines = ["0123: Pushed", "older: digest: sha256:" + "1" * 64 + " size: 2", f"0.1.0: digest: {DIGEST} size: 4711"]
    assert image_module.pushed_digest(lines) == DIGEST
    assert image_module.pushed_digest(["digest: sha256:short size: 1", "writing image sha256:" + "1" * 64]) == ""


@pytest.mark.parametrize("arguments", [["image", "--help"], ["image", "push", "--help"], ["--help"]])
def test_help_imports_no_boto3(arguments: list[str]) -> None:
    code = (
        "import sys; from genvalues.cli import main; sys.argv = ['genvalues', *sys.argv[1:]]\n"
        "try: main()\nfinally: print('imported:', *({'boto3', 'botocore', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "imported:"
    assert "image" in done.stdout


def test_a_mistake_in_the_file_is_reported_before_boto3_is_imported() -> None:
    Path("f.yaml").write_text("model: 3\n")
    code = (
        "import sys; from genvalues.cli import main; sys.argv = ['genvalues', 'image', 'push', 'f.yaml']\n"
        "try: main()\nfinally: print('imported:', 'boto3' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "imported: False\n")
