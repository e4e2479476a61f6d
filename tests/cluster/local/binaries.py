"""Kubernetes, etcd, CoreDNS, Helm 3, helmfile, the training operators and Kueue, built from their Go modules.

Each is built once and kept in the cache, under its version and a hash of how it is built.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from genvalues.common.errors import UserError
from genvalues.common.files import whole_folder

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama-lora-tests"

KUBERNETES = "1.34.4"
KUBERNETES_PROGRAMS = ["kube-apiserver", "kube-controller-manager", "kube-scheduler", "kube-proxy", "kubelet"]
OPERATORS = {"1.7": "1.7.0", "1.9": "1.9.3"}  # HyperPod installs 1.7.0
TRAINERS = {"2.0": "2.0.0", "2.2": "2.2.0"}  # Kueue's integration needs 2.2: it writes spec.runtimePatches
JOBSETS = {"2.0": "0.8.2", "2.2": "0.11.1"}  # that a minor version of Trainer requires
KUEUE, KUEUE_LIBRARIES = "0.17.0", "v0.35.3"
KUEUE_MODULE, JOBSET_MODULE = "sigs.k8s.io/kueue", "sigs.k8s.io/jobset"
TRAINER_MODULE = "github.com/kubeflow/trainer/v2"
LEAN = "-s -w"
QUICKLY = "-gcflags=all=-dwarf=false"  # and GOGC=400: a quarter less CPU time to compile k8s.io/api/core/v1
STATIC = {"CGO_ENABLED": "0"}  # an operator's image holds nothing but its binary


@dataclass(frozen=True)
class Program:
    """Something to build: ``build(version, work, out)`` leaves its binaries in ``out``."""

    name: str
    version: str
    build: Callable[[str, Path, Path], None]

    @property
    def folder(self) -> Path:
        recipe = hashlib.sha256(inspect.getsource(self.build).encode()).hexdigest()[:8]
        return CACHE / "programs" / f"{self.name}-{self.version}-{recipe}"


def kubernetes(version: str, work: Path, out: Path) -> None:
    """k8s.io/kubernetes keeps its libraries as ./staging replaces: each is replaced with the published one."""
    go_mod = go_mod_of("k8s.io/kubernetes", version)
    staged = re.findall(r"^\s+(k8s\.io/[a-z0-9-]+) => \./staging", go_mod, re.MULTILINE)
    library_version = f"v0.{version.removeprefix('1.')}"
    replaces = "\n".join(f"replace {module} => {module} {library_version}" for module in sorted(set(staged)))
    write_module(work, f"require k8s.io/kubernetes v{version}\n{replaces}\n")
    commands = [f"k8s.io/kubernetes/cmd/{program}" for program in KUBERNETES_PROGRAMS]
    imports = "\n".join(f'import _ "{command}"' for command in commands)
    (work / "tools.go").write_text(f"//go:build tools\npackage tools\n{imports}\n")
    go("mod", "tidy", folder=work)
    variable = "k8s.io/component-base/version"
    major, minor, _ = version.split(".")
    told = f"-X {variable}.gitVersion=v{version} -X {variable}.gitMajor={major} -X {variable}.gitMinor={minor}"
    go("build", "-trimpath", "-ldflags", f"{LEAN} {told}", "-o", f"{out}/", *commands, folder=work)


def etcd(version: str, work: Path, out: Path) -> None:
    write_module(work, f"require go.etcd.io/etcd/server/v3 v{version}\n")
    imports = 'import ("os"; "go.etcd.io/etcd/server/v3/etcdmain")'
    (work / "main.go").write_text(f"package main\n{imports}\nfunc main() {{ etcdmain.Main(os.Args) }}\n")
    go("mod", "tidy", folder=work)
    go("build", "-ldflags", LEAN, "-o", out / "etcd", ".", folder=work)


def coredns(version: str, work: Path, out: Path) -> None:
    """With the three plugins that a cluster's own names need."""
    plugins = ["bind", "errors", "kubernetes"]
    module = "github.com/coredns/coredns"
    names = [f'"{module}/core/dnsserver"', f'"{module}/coremain"', *(f'_ "{module}/plugin/{p}"' for p in plugins)]
    directives = ", ".join(f'"{plugin}"' for plugin in plugins)
    (work / "main.go").write_text(
        f"package main\nimport ({'; '.join(names)})\n"
        f"func init() {{ dnsserver.Directives = []string{{{directives}}} }}\nfunc main() {{ coremain.Run() }}\n"
    )
    write_module(work, f"require {module} v{version}\n")
    go("mod", "tidy", folder=work)
    go("build", "-ldflags", LEAN, "-o", out / "coredns", ".", folder=work)


def helm(version: str, work: Path, out: Path) -> None:
    """PyPI's is older, and does not print the logs of hooks. Told its version, which pyhelm3 wants to be SemVer, and
    Kubernetes', which it takes for 1.20 where it asks no cluster."""
    module = "helm.sh/helm/v3"
    major, minor, _ = KUBERNETES.split(".")
    kubernetes = f"-X {module}/pkg/chartutil.k8sVersionMajor={major} -X {module}/pkg/chartutil.k8sVersionMinor={minor}"
    install(f"{module}/cmd/helm", version, out, f"-X {module}/internal/version.version=v{version} {kubernetes}")


def training_operator(version: str, work: Path, out: Path) -> None:
    install("github.com/kubeflow/training-operator/cmd/training-operator.v1", version, out)


def helmfile(version: str, work: Path, out: Path) -> None:
    module = "github.com/helmfile/helmfile"
    under_its_go_mod(module, version, [module], work, out)


def kueue(version: str, work: Path, out: Path) -> None:
    """With the Trainer that it requires: they share its libraries, which are compiled once."""
    commands = [f"{KUEUE_MODULE}/cmd/kueue", f"{TRAINER_MODULE}/cmd/trainer-controller-manager"]
    under_its_go_mod(KUEUE_MODULE, version, commands, work, out)


def jobset(version: str, work: Path, out: Path) -> None:
    """With Kueue's patch version of Kubernetes' libraries, which are compiled already."""
    under_its_go_mod(JOBSET_MODULE, version, [JOBSET_MODULE], work, out, KUEUE_LIBRARIES)


def trainer(version: str, work: Path, out: Path) -> None:
    """With the JobSet that it requires."""
    commands = [f"{TRAINER_MODULE}/cmd/trainer-controller-manager", JOBSET_MODULE]
    under_its_go_mod(TRAINER_MODULE, version, commands, work, out)


PROGRAMS = [
    Program("kubernetes", KUBERNETES, kubernetes),
    Program("etcd", "3.6.16", etcd),
    Program("coredns", "1.12.4", coredns),
    Program("helm3", "3.22.0", helm),
    *(Program(f"training-operator-{minor}", version, training_operator) for minor, version in OPERATORS.items()),
    Program("kueue", KUEUE, kueue),  # and Trainer 2.2
    Program("jobset", JOBSETS["2.2"], jobset),
    Program("trainer-2.0", TRAINERS["2.0"], trainer),
    Program("helmfile", "1.8.0", helmfile),
]

OF_THE_NODE = ["kubernetes", "etcd", "coredns"]  # without which it does not start


def build_all(names: Sequence[str] = ()) -> None:
    """Build what the cache does not have yet: these, or all."""
    for program in PROGRAMS:
        if not program.folder.exists() and (not names or program.name in names):
            print(f"building {program.name} {program.version}", flush=True)
            with tempfile.TemporaryDirectory() as work, whole_folder(program.folder) as out:
                program.build(program.version, Path(work), out)


def program(name: str) -> Path:
    """A binary: helm3, training-operator-1.9, or of a program with several: kubernetes/kubelet, kueue/kueue ..."""
    of, _, binary = name.partition("/")
    folder = next(one.folder for one in PROGRAMS if one.name == of)
    return folder / binary if binary else next(folder.iterdir())


def module_folder(module: str, version: str) -> Path:
    """Where Go keeps a module's files."""
    return Path(downloaded(module, version)["Dir"])


def go_mod_of(module: str, version: str) -> str:
    return Path(downloaded(module, version)["GoMod"]).read_text(encoding="utf-8")


def downloaded(module: str, version: str) -> Mapping[str, str]:
    answer: Mapping[str, str] = json.loads(go("mod", "download", "-json", f"{module}@v{version}", folder=Path("/")))
    return answer


def write_module(work: Path, body: str) -> None:
    (work / "go.mod").write_text(f"module local/build\ngo 1.24.0\n{body}")


def under_its_go_mod(
    module: str, version: str, packages: Sequence[str], work: Path, out: Path, libraries: str = ""
) -> None:
    """Build packages under a copy of the module's go.mod: it has replaces, which `go install` refuses, or requires the
    modules of the other packages. ``libraries``: another version of Kubernetes' libraries."""
    text = re.sub(r"^module .*", "module local/build", go_mod_of(module, version), flags=re.MULTILINE)
    if libraries:
        text = re.sub(r"(\sk8s\.io/[a-z-]+) v0\.\d+\.\d+(?!-)\b", rf"\1 {libraries}", text)
    (work / "go.mod").write_text(text)
    go("mod", "edit", "-require", f"{module}@v{version}", folder=work)
    go("build", "-mod=mod", "-ldflags", LEAN, "-o", f"{out}/", *packages, folder=work, **STATIC)


def install(package: str, version: str, out: Path, told: str = "") -> None:
    go("install", "-ldflags", f"{LEAN} {told}", f"{package}@v{version}", folder=Path("/"), GOBIN=str(out), **STATIC)


def go(*arguments: str | Path, folder: Path, **environment: str) -> str:
    command = ["go", *map(str, arguments)]
    flags = f"{os.environ.get('GOFLAGS', '')} {QUICKLY}".strip()
    settings = {**os.environ, "GOFLAGS": flags, "GOGC": "400", **environment}
    done = subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UserError(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stderr.strip()}")
    return done.stdout
