"""The images of the tests, from packages alone: nothing is pulled.

trainer     target native of trainer/Dockerfile over Debian with torch and the trainer's libraries from PyPI
stand-in    the same target without torch, its llama-lora replaced by images/llama-lora
and the managers (operators and Kueue) and the pause container, each around one static binary.

Each image except pause is named with a hash of its sources, and built when the node's containerd does not have it.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Container, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from genvalues.common.errors import UserError
from genvalues.common.files import sha256

from .binaries import CACHE, OPERATORS, program
from .node import BUSYBOX, ctr

ROOT = Path(__file__).parents[3]
HERE = Path(__file__).parents[1] / "images"
DEBIAN = "trixie"  # Python 3.13
DEBIAN_PACKAGES = ["python3", "python3-pip", "ca-certificates", "libgomp1"]
TORCH = "torch==2.14.0"  # that of TorchNeuron's newest container; `make test` has a newer one
STORAGE = CACHE / "buildah"
IN_THE_TRAINER_IMAGE = [
    *("pyproject.toml", "README.md", "LICENSE", "generator", "trainer", "chart", "tests/helm_binaries.py")
]
CERTIFICATES = Path("/etc/ssl/certs")


@cache
def digest(*names: str) -> str:
    """Hash files and folders of the repository, without what git ignores."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *names],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    sum_ = hashlib.sha256()
    for name in sorted(filter(None, listed.stdout.split("\0"))):
        if (ROOT / name).is_file():
            sum_.update(name.encode() + (ROOT / name).read_bytes())
    return sum_.hexdigest()[:12]


def requirements() -> list[str]:
    """The requirements of the trainer image, torch included, in versions that work together. torch has no hash, so none
    has."""
    listed = command(sys.executable, ROOT / "trainer/pins.py", "native", "[trainer]")
    return [TORCH, *(line.partition(" ")[0] for line in listed.splitlines())]


def trainer() -> str:
    return f"localhost/llama-lora:{digest(*IN_THE_TRAINER_IMAGE)}-{base('libraries').rpartition(':')[2]}"


def stand_in() -> str:
    sources = digest(*IN_THE_TRAINER_IMAGE, "tests/cluster/images")
    return f"localhost/llama-lora-stand-in:{sources}-{base('debian').rpartition(':')[2]}"


MANAGERS = [
    *(f"training-operator-{minor}" for minor in OPERATORS),
    *("kueue/kueue", "kueue/trainer-controller-manager", "jobset"),
    *("trainer-2.0/trainer-controller-manager", "trainer-2.0/jobset"),
]


def manager(name: str) -> str:
    """The image of a program."""
    return f"localhost/{program(name).name}:{program(name).parent.name}"


def load_trainers() -> None:
    """Build the trainer's images that the node does not have, and delete those of other sources."""
    wanted = {stand_in(): make_stand_in, trainer(): make_trainer}
    forget_images_but(wanted)
    make_missing(wanted)
    forget_all_but(base("debian"), base("libraries"))


def load_managers() -> None:
    """Build the pause container and the managers that the node does not have."""
    wanted: dict[str, Callable[[str], None]] = {
        "localhost/pause:1": lambda name: around(BUSYBOX, name, ["/bin/sleep", "2147483647"], as_="bin/sleep")
    }
    for each in MANAGERS:
        binary = program(each)
        wanted[manager(each)] = lambda name, binary=binary: around(binary, name, ["/manager"], as_="manager")
    make_missing(wanted)


def make_missing(wanted: Mapping[str, Callable[[str], None]]) -> None:
    there = set(ctr("images", "ls", "-q").stdout.split())
    for name, make in wanted.items():
        if name not in there:
            print(f"making the image {name}", flush=True)
            make(name)


def forget_images_but(wanted: Container[str]) -> None:
    """Delete images of other sources, also by the digests under which the kubelet keeps them again."""
    listed = [line.split()[:3] for line in ctr("images", "ls").stdout.splitlines()[1:]]
    ours = "localhost/llama-lora"
    kept = {digest for name, _, digest in listed if name.startswith("localhost/") and not name.startswith(ours)}
    kept |= {digest for name, _, digest in listed if name in wanted}
    for name, _, digest in listed:
        if name.startswith((ours, "sha256:")) and digest not in kept:
            ctr("images", "rm", name)


def make_trainer(name: str) -> None:
    build(name, ROOT / "trainer/Dockerfile", ROOT, "--target", "native", BASE=base("libraries"), EXTRAS="[trainer]")
    load(name)


def make_stand_in(name: str) -> None:
    without_torch = name.replace("stand-in", "without-torch")
    build(without_torch, ROOT / "trainer/Dockerfile", ROOT, "--target", "native", BASE=base("debian"), EXTRAS="")
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(HERE / "llama-lora", folder)
        (Path(folder) / "Dockerfile").write_text(f"FROM {without_torch}\nCOPY llama-lora /opt/venv/bin/llama-lora\n")
        build(name, Path(folder) / "Dockerfile", Path(folder))
    load(name)


def base(target: str) -> str:
    """The name of the image of a target in images/Dockerfile."""
    made_from: list[str] = [DEBIAN, *DEBIAN_PACKAGES]
    made_from += [digest("tests/cluster/images/Dockerfile", "tests/cluster/images/unused_libraries.py")]
    made_from += requirements() if target == "libraries" else []
    return f"localhost/{target}:{hashlib.sha256(repr(made_from).encode()).hexdigest()[:12]}"


def make_bases() -> None:
    """Build the base images, which change rarely. Needs no node."""
    there = {one: buildah("images", "--quiet", base(one), check=False).stdout for one in ("debian", "libraries")}
    missing = [one for one, image in there.items() if not image]
    if not missing:
        return
    buildah("rm", "--all", check=False)  # left by a killed run
    for leftover in CACHE.glob("making-*"):
        shutil.rmtree(leftover)
    forget_all_but(*(base(one) for one in there if one not in missing))
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="making-") as folder:
        context = Path(folder)
        for file in HERE.iterdir():
            shutil.copy(file, context)
        print("making a Debian for the images", flush=True)
        packages = f"--include={','.join(DEBIAN_PACKAGES)}"
        command("mmdebstrap", "--quiet", "--variant=minbase", packages, DEBIAN, context / "root.tar")
        (context / "requirements.txt").write_text("\n".join(requirements()))
        for target in missing:
            print(f"making the image {base(target)}", flush=True)
            build(base(target), context / "Dockerfile", context, "--target", target)


def forget_all_but(*names: str) -> None:
    """Delete from buildah's storage the images of other sources, and those that the node has."""
    listed = buildah("images", "--format", "{{.Name}}:{{.Tag}}").stdout.split()
    if others := [name for name in listed if name not in names and not name.startswith("<none>")]:
        buildah("rmi", "--force", *others, check=False)
    buildah("rmi", "--prune", "--force", check=False)


def build(name: str, dockerfile: Path, context: Path, *options: str, **arguments: str) -> None:
    """Build with this machine's certificates and pip settings, which may be needed for PyPI. None stay in the image."""
    with tempfile.NamedTemporaryFile("w", suffix=".conf") as settings:
        settings.write(pip_settings())
        settings.flush()
        build_arguments = [part for key, value in arguments.items() for part in ("--build-arg", f"{key}={value}")]
        volumes = ["--volume", f"{CERTIFICATES}:{CERTIFICATES}:ro", "--volume", f"{settings.name}:/etc/pip.conf:ro"]
        where = ["--file", str(dockerfile), "--tag", name, str(context)]
        buildah("build", "--quiet", "--network", "host", *volumes, *build_arguments, *options, *where)


def pip_settings() -> str:
    listed = command(sys.executable, "-m", "pip", "config", "list")
    wanted = {"cert", "index-url", "extra-index-url", "trusted-host", "timeout", "default-timeout"}
    lines = []
    for line in listed.splitlines():
        key, _, value = line.partition("=")
        key = key.rpartition(".")[2]
        if key in wanted:
            lines.append(f"{key.removeprefix('default-')} = {value.strip(chr(39))}")
    return "\n".join(["[global]", *dict.fromkeys(lines), ""])


def around(binary: Path, name: str, entrypoint: list[str], *, as_: str) -> None:
    """Give the node an image of one static binary. Without buildah, which takes much longer for so little."""
    with tempfile.TemporaryDirectory() as folder:
        layer, archive = Path(folder) / "layer.tar", Path(folder) / "image.tar"
        with tarfile.open(layer, "w") as tar:
            tar.add(binary.resolve(), as_, filter=owned_by_root)
        config = {
            "architecture": {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()],
            "os": "linux",
            "config": {"Entrypoint": entrypoint},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{sha256(layer)}"]},
        }
        (Path(folder) / "config.json").write_text(json.dumps(config))
        manifest = [{"Config": "config.json", "RepoTags": [name], "Layers": [layer.name]}]
        (Path(folder) / "manifest.json").write_text(json.dumps(manifest))
        with tarfile.open(archive, "w") as tar:
            for file in ("config.json", "manifest.json", layer.name):
                tar.add(Path(folder) / file, file)
        ctr("images", "import", archive)


def owned_by_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.mode = 0o755
    return member


def load(name: str) -> None:
    """Copy an image from buildah to the node as a stream: the archive of the trainer image would be 6 GB."""
    with tempfile.TemporaryDirectory() as folder:
        stream = Path(folder) / "stream"
        os.mkfifo(stream)
        held = os.open(stream, os.O_RDWR)  # so that neither side waits for the other to open it
        target = f"docker-archive:{stream}:{name}"
        push = ["buildah", *STORE, "push", "--quiet", "--disable-compression", name, target]
        with ThreadPoolExecutor(1) as beside:
            pushing = subprocess.Popen(push, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
            loading = beside.submit(ctr, "images", "import", stream, check=False)
            # For example a full disk: without a reader the writer would block.
            loading.add_done_callback(lambda loaded: pushing.kill() if loaded.result().returncode else None)
            _, complaint = pushing.communicate()
            os.close(held)
            loaded = loading.result()
        if pushing.returncode or loaded.returncode:
            raise UserError(f"{name} cannot be loaded: {loaded.stderr}{complaint}")


STORE = ["--root", str(STORAGE), "--runroot", str(CACHE / "buildah-run")]
ENVIRONMENT = {**os.environ, "STORAGE_DRIVER": "overlay", "BUILDAH_ISOLATION": "chroot"}


def buildah(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    whole = ["buildah", *STORE, *arguments]
    done = subprocess.run(whole, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    if check and done.returncode != 0:
        raise UserError(f"buildah {arguments[0]} failed:\n{(done.stdout + done.stderr).strip()[-3000:]}")
    return done


def command(*arguments: str | Path) -> str:
    words: Iterable[str] = map(str, arguments)
    done = subprocess.run(list(words), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UserError(f"{arguments[0]} failed: {done.stderr.strip()[-3000:]}")
    return done.stdout
