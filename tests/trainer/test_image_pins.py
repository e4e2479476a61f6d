"""The image's Dockerfile and its pins: complete, exact and compatible. No network access."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from genvalues.common.neuron_files import runtime_version
from trainer.image_pins import TARGETS, drop_unused_extras, record_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).parents[2]
TRAINER = ROOT / "trainer"
DOCKERFILE = TRAINER / "Dockerfile"
SMOKE_TEST = [sys.executable, str(TRAINER / "smoke_test.py"), "native"]


def module(name: str) -> Any:
    """Import a script of the image that is not in a package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TRAINER))
        return importlib.import_module(name)


pins = module("pins")
base_image = module("base_image")
neuron_runtime = module("neuron_runtime")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


class PinSet:
    """The constraints file of a backend, with the recorded requirements of its packages."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.sections: dict[str, dict[str, Any]] = pins.sections(pins.constraints(backend))
        self.pins = {name: pin for section in self.sections.values() for name, pin in section.items()}
        self.of_the_base = {name for section in ("base", "sdk") for name in self.sections.get(section, {})}
        self.recorded: dict[str, dict[str, Any]] = json.loads(record_of(backend).read_text(encoding="utf-8"))
        self.needed = self.closure(pins.extras_of(pins.EXTRAS[backend]))

    def closure(self, extras: list[str]) -> dict[str, list[Requirement]]:
        """Map all packages that llama-lora with these extras needs, directly or not, to their requirements, without
        those of the base image."""
        lines = [
            *PROJECT["dependencies"],
            *(one for extra in extras for one in PROJECT["optional-dependencies"][extra]),
        ]
        asked: dict[str, list[Requirement]] = {}
        for python in TARGETS[self.backend].pythons:
            seen: set[str] = set()
            todo = [parsed(line) for line in lines]
            while todo:
                wanted = todo.pop()
                name = pins.normalized(wanted.name)
                asked.setdefault(name, []).append(wanted)
                if name in self.of_the_base or name not in self.recorded or str(wanted) in seen:
                    continue
                seen.add(str(wanted))
                for line in self.recorded[name]["requires"]:
                    below = parsed(line)
                    if below.marker is None or any(
                        below.marker.evaluate({**environment(python), "extra": one}) for one in ("", *wanted.extras)
                    ):
                        todo.append(below)
        return asked


parsed = functools.cache(Requirement)


def environment(python: str) -> dict[str, str]:
    found = {"python_version": python, "python_full_version": f"{python}.12", "sys_platform": "linux"}
    found |= {"platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix"}
    return found | {"implementation_name": "cpython", "platform_python_implementation": "CPython"}


NATIVE, XLA = SETS = [PinSet(backend) for backend in ("native", "xla")]
both = pytest.mark.parametrize("of", SETS, ids=lambda of: of.backend)


@both
def test_every_required_package_is_pinned(of: PinSet) -> None:
    assert len(of.needed) > 80
    assert sorted(set(of.needed) - set(of.pins)) == []


@both
def test_every_pinned_package_is_required(of: PinSet) -> None:
    of_torch_neuronx = {"torch-xla"}
    assert sorted(set(of.pins) - set(of.needed) - of.of_the_base - of_torch_neuronx) == []


@pytest.mark.parametrize(
    ("of", "name"), [pytest.param(of, name, id=f"{of.backend} {name}") for of in SETS for name in sorted(of.needed)]
)
def test_a_pin_meets_all_requirements(of: PinSet, name: str) -> None:
    version = of.pins[name].specifier.partition(",")[0].lstrip("=>")  # of torch in a base image, the oldest
    for wanted in of.needed[name]:
        assert wanted.specifier.contains(version, prereleases=True), f"{wanted}, and {version} is pinned"


@both
def test_each_section_is_complete_without_the_next(of: PinSet) -> None:
    """Images without extras, and without the Neuron libraries, install only their sections."""
    there = of.of_the_base | set(of.sections.get("build", {}))
    extras: list[str] = []
    for section in ("command", *pins.extras_of(pins.EXTRAS[of.backend])):
        extras += [section] if section != "command" else []
        there |= set(of.sections[section])
        assert set(of.closure(extras)) <= there, section


@both
def test_the_recorded_requirements_of_the_pins_are_up_to_date(of: PinSet) -> None:
    """If not, run: python tests/trainer/image_pins.py"""
    skipped = {"sdk", "base"} if of.backend == "native" else {"sdk"}
    of_pypi = {
        name: pin.version for key, found in of.sections.items() if key not in skipped for name, pin in found.items()
    }
    assert {name: found["version"] for name, found in of.recorded.items()} == of_pypi
    before = json.dumps(of.recorded)
    drop_unused_extras(of.recorded)
    assert json.dumps(of.recorded) == before


@pytest.mark.parametrize(
    ("of", "name"), [pytest.param(of, name, id=f"{of.backend} {name}") for of in SETS for name in sorted(of.recorded)]
)
def test_a_pin_has_a_wheel_for_every_python_of_the_image(of: PinSet, name: str) -> None:
    found, (pythons, newest_glibc) = of.recorded[name], TARGETS[of.backend]
    assert set(found["wheels"]) == set(pythons)
    for python, wheel in found["wheels"].items():
        tag, abi, platform = wheel.removesuffix(".whl").split("-")[-3:]
        minor = int(python.removeprefix("3."))
        assert SpecifierSet(found["python"]).contains(f"{python}.12")
        stable = abi == "abi3" and int(tag.removeprefix("cp3")) <= minor
        assert {"py3", f"py3{minor}", f"cp3{minor}"} & set(tag.split(".")) or stable
        glibc = [int(minor) for minor in re.findall(r"manylinux_2_(\d+)_x86_64", platform)]
        assert platform == "any" or "manylinux2014_x86_64" in platform or min(glibc, default=99) <= newest_glibc


def test_every_native_pin_has_the_hash_of_each_wheel() -> None:
    for name, found in NATIVE.recorded.items():
        assert len(set(NATIVE.pins[name].hashes)) == len(set(found["wheels"].values())), name


def test_the_torch_of_a_native_base_image_is_in_the_range_of_the_extra() -> None:
    torch = Requirement(next(one for one in PROJECT["optional-dependencies"]["trainer"] if one.startswith("torch")))
    assert torch.specifier == SpecifierSet(NATIVE.sections["base"]["torch"].specifier) == SpecifierSet(">=2.13,<2.16")


def test_the_native_pins_are_current_libraries_of_hugging_face() -> None:
    majors = {name: NATIVE.pins[name].version.partition(".")[0] for name in ("transformers", "datasets")}
    assert majors == {"transformers": "5", "datasets": "5"} and NATIVE.pins["peft"].version.startswith("0.21.")
    assert "torch-xla" not in NATIVE.pins and "optimum-neuron" not in NATIVE.pins


def test_the_pins_of_the_neuron_stack_are_those_of_optimum_neuron() -> None:
    """Its extras training and neuronx, version 0.4.5."""
    expected = {
        "accelerate": "1.8.1",
        "libneuronxla": "2.2.12677.0",
        "neuronx-cc": "2.21.33363.0",
        "neuronx-distributed": "0.15.22404",
        "optimum-neuron": "0.4.5",
        "peft": "0.17.0",
        "torch": "2.8.0",
        "torch-neuronx": "2.8.0.2.10.16998",
        "trl": "0.24.0",
    }
    assert {name: XLA.pins[name].version for name in expected} == expected
    assert XLA.pins["transformers"].version.startswith("4.57.")
    assert SpecifierSet(">=1.22.2,<=1.26.4").contains(XLA.pins["numpy"].version)
    assert SpecifierSet(">=3.20.3,<4").contains(XLA.pins["protobuf"].version)


@pytest.mark.parametrize(
    "wrong",
    ["torch>=2.8", "torch", "torch==2.8.0 # why", "torch==2.8.*", "a==1\nA==2", "a_b==1\nA-b==1", "a==1 --hash=md5:0"],
)
def test_a_pin_that_is_not_exact_is_an_error(tmp_path: Path, wrong: str) -> None:
    (tmp_path / "constraints.txt").write_text(f"# [trainer]\n{wrong}\n")
    with pytest.raises(ValueError, match="write each package once"):
        pins.sections(tmp_path / "constraints.txt")


@both
def test_pip_never_installs_packages_of_the_base_image(of: PinSet) -> None:
    for extras in ("", *(f"[{one}]" for one in pins.extras_of(pins.EXTRAS[of.backend])), pins.EXTRAS[of.backend]):
        command = [sys.executable, TRAINER / "pins.py", of.backend, extras]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        given = {pins.normalized(line.partition("==")[0]) for line in lines}
        assert len(given) > 30 and not given & of.of_the_base
        assert not any(name.startswith(("nvidia", "triton", "torchvision")) for name in given)
        assert all((" --hash=sha256:" in line) == (of.backend == "native") for line in lines)


# --- the Dockerfile

Instructions = list[tuple[str, str]]
BACKENDS = ("xla", "native")
each_target = pytest.mark.parametrize("backend", BACKENDS)


def stages() -> dict[str, Instructions]:
    lines = [line for line in DOCKERFILE.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    whole = re.sub(r"\\\n", " ", "\n".join(lines))
    found: dict[str, Instructions] = {"": []}
    for kind, text in re.findall(r"^([A-Z]+) (.*)$", whole, re.MULTILINE):
        if kind == "FROM":
            found[text.rpartition(" AS ")[2]] = []
        list(found.values())[-1].append((kind, text))
    return found


def instructions() -> Instructions:
    return [one for stage in stages().values() for one in stage]


def test_the_targets_are_xla_and_by_default_native() -> None:
    order = list(stages())
    assert order[-1] == "native"
    # Docker without BuildKit runs every stage before the target's.
    assert order.index("xla") < order.index("no-base")
    bases = {name: of[0][1].partition(" ")[0] for name, of in stages().items() if name}
    assert bases["native"] == "${BASE:-no-base}", "no default"
    [error] = [text for kind, text in stages()["no-base"] if kind == "COPY"]
    assert "--build-arg BASE=" in error and "docs/image.md" in error


@each_target
def test_every_install_is_without_dependencies(backend: str) -> None:
    runs = [text for kind, text in stages()[backend] if kind == "RUN"]
    installs = re.findall(r"pip install [^&;]*", " ".join(runs))
    assert len(installs) == {"xla": 3, "native": 2}[backend]
    assert all("--no-deps" in install and "--no-cache-dir" in install for install in installs)
    aws = [install for install in installs if "sdk.txt" in install]
    if backend == "xla":
        assert len(aws) == 1 and "--index-url https://pip.repos.neuron.amazonaws.com " in aws[0]
    else:
        dependencies, own = installs
        assert "--require-hashes" in dependencies and "--only-binary=:all:" in dependencies and not aws
        assert "--no-build-isolation" in own, "or pip downloads setuptools without a hash"


def test_no_system_package_and_no_kernel_module_is_installed() -> None:
    text = " ".join(text for _, text in instructions())
    assert not re.search(r"\b(apt|apt-get|dpkg|yum|dnf|dkms|modprobe|insmod|sudo)\b", text)


def test_no_secret_can_get_into_a_layer() -> None:
    for kind, text in instructions():
        if kind in ("ARG", "ENV"):
            assert not re.search(r"(?i)token|secret|passw|credential|key|auth", text), text
        assert "--mount=type=secret" not in text
        if kind in ("ADD", "COPY"):
            assert not text.startswith((". ", "./ ", "* ", "/")), text
    assert not any(kind == "ADD" for kind, _ in instructions())


def test_the_context_is_what_the_dockerfile_copies() -> None:
    """A build sends nothing else: no inputs files, keys or environments."""
    ignore = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert ignore[0] == "*"
    let_in = {line[1:] for line in ignore if line.startswith("!")}
    copies = [text for kind, text in instructions() if kind == "COPY" and not text.startswith(("--from=", "["))]
    copied = {part for text in copies for part in text.split()[:-1]}
    assert all(any(Path(part).is_relative_to(one) for one in let_in) for part in copied)
    assert all(any(Path(part).is_relative_to(one) for part in copied) for one in let_in)


@each_target
def test_the_last_user_is_not_root_and_runs_the_smoke_test(backend: str) -> None:
    order = [(kind, text) for kind, text in stages()[backend] if kind in ("USER", "RUN")]
    users = [place for place, (kind, _) in enumerate(order) if kind == "USER"]
    assert order[users[-1]] == ("USER", "1000:1000")
    assert [text for kind, text in order[users[-1] :] if kind == "RUN"] == [
        f'HOME=/tmp PYTHONDONTWRITEBYTECODE=1 python3 trainer/smoke_test.py {backend} "${{EXTRAS}}"'
    ]


@each_target
def test_the_scripts_that_the_smoke_test_imports_are_in_the_image(backend: str) -> None:
    of_stage = stages()["sources"] + stages()[backend]
    there = {part for kind, text in of_stage if kind == "COPY" for part in text.split()}
    for script in ("smoke_test", "base_image", "pins"):
        imported = re.findall(r"^import (\w+)$", (TRAINER / f"{script}.py").read_text(encoding="utf-8"), re.MULTILINE)
        wanted = {f"trainer/{name}.py" for name in [script, *imported] if (TRAINER / f"{name}.py").exists()}
        assert wanted <= there, script


@each_target
def test_dependencies_come_before_sources(backend: str) -> None:
    """A change of the sources rebuilds no large layer, and a change of labels rebuilds none."""
    text = [f"{kind} {text}" for kind, text in stages()[backend]]
    at = [
        next(place for place, line in enumerate(text) if word in line) for word in ("pins.txt", "COPY --from=sources")
    ]
    assert at == sorted(at)
    assert text[-1].startswith("LABEL ") and text[-2].startswith("ARG ")


def test_both_targets_differ_only_in_their_libraries_and_base() -> None:
    """What follows the sources is the same, but for how pip installs them and the name of the base image."""

    def tail(backend: str) -> list[str]:
        lines = [f"{kind} {text}" for kind, text in stages()[backend]]
        after = lines[lines.index("COPY --from=sources / ./") + 2 :]
        same = [line for line in after if not line.startswith("ARG XLA_BASE")]
        own = " llama-lora.neuron-runtime=${NEURON_RUNTIME}"  # only the base image of xla is older than the drivers
        alike = [line.replace("${BASE:-${XLA_BASE}}", "${BASE}").replace(own, "") for line in same]
        return [re.sub(" +", " ", line.replace(backend, "BACKEND")).strip() for line in alike]

    assert tail("xla") == tail("native")


@each_target
def test_the_labels_describe_the_image(backend: str) -> None:
    labels = next(text for kind, text in stages()[backend] if kind == "LABEL")
    named = set(re.findall(r"org\.opencontainers\.image\.([a-z.]+)=", labels))
    assert named == {"title", "description", "licenses", "version", "revision", "base.name"}


# --- a newer Neuron runtime


class Apt:
    """Stands in for apt-get: installs what it is asked for, or ``offered`` instead."""

    def __init__(self, root: Path, offered: str = "") -> None:
        self.root, self.offered = root, offered
        self.calls: list[list[str]] = []
        self.sources = ""
        (root / "etc").mkdir()
        (root / "etc/os-release").write_text('NAME="Ubuntu"\nVERSION_CODENAME=jammy\n')
        (root / "opt/aws/neuron/lib").mkdir(parents=True)
        self.install("2.28.23.0")

    def install(self, version: str) -> None:
        library = self.root / "opt/aws/neuron/lib/libnrt.so.1"
        library.unlink(missing_ok=True)
        (library.parent / f"libnrt.so.{version}").touch()
        library.symlink_to(f"libnrt.so.{version}")

    def __call__(self, command: list[str]) -> None:
        self.calls.append(command)
        self.sources = Path(command[2].partition("=")[2]).read_text()
        for word in command:
            if version := re.match(r"aws-neuronx-runtime-lib=([\d.]+)\*$", word):
                self.install(self.offered or version[1])


@pytest.fixture
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neuron_runtime.urllib.request, "urlopen", lambda _: io.BytesIO(b"key"))


def test_the_image_can_take_a_newer_runtime_from_awss_repository_alone(tmp_path: Path, no_key: None) -> None:
    apt = Apt(tmp_path)
    assert neuron_runtime.install("2.33.10.0", apt, tmp_path) == ""
    assert [call[5:] for call in apt.calls] == [
        ["update"],
        [
            *("install", "-y", "--no-install-recommends", "--allow-downgrades"),
            *("aws-neuronx-runtime-lib=2.33.10.0*", "aws-neuronx-collectives=2.33.*"),
        ],
    ]
    assert re.fullmatch(r"deb \[signed-by=\S+\] https://apt\.repos\.neuron\.amazonaws\.com jammy main\n", apt.sources)
    assert runtime_version(tmp_path) == "2.33.10.0"


@pytest.mark.parametrize(
    ("version", "offered", "words"),
    [("newest", "", "such as 2.33.10.0"), ("2.33.10.0", "2.33.9.0", "2.33.9.0, not 2.33.10.0")],
)
def test_a_runtime_that_is_not_installed_fails_the_build(
    tmp_path: Path, no_key: None, version: str, offered: str, words: str
) -> None:
    assert words in neuron_runtime.install(version, Apt(tmp_path, offered), tmp_path)


def test_the_dockerfile_installs_the_runtime_before_the_libraries_and_only_if_asked() -> None:
    assert neuron_runtime.main("") == 0, "the default of the build argument"
    lines = [f"{kind} {text}" for kind, text in stages()["xla"]]
    assert "ARG NEURON_RUNTIME=" in lines
    [at] = [place for place, line in enumerate(lines) if line.startswith("RUN python3 trainer/neuron_runtime.py")]
    assert lines[at].endswith('"${NEURON_RUNTIME}"')
    assert at < next(place for place, line in enumerate(lines) if "pip install" in line)


@each_target
def test_the_build_fails_first_on_another_processor(backend: str) -> None:
    first = next(text for kind, text in stages()[backend] if kind == "RUN")
    assert "uname -m" in first and "x86_64" in first and "exit 1" in first


# --- the base image of target native


def distribution(folder: Path, name: str, version: str) -> None:
    (folder / f"{name}-{version}.dist-info").mkdir(parents=True)
    (folder / f"{name}-{version}.dist-info/METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    )


@pytest.mark.parametrize("version", ["2.12.1", "2.16.0"])
def test_a_base_image_with_another_torch_or_with_torch_xla_is_an_error_that_says_where_to_look(
    tmp_path: Path, version: str
) -> None:
    distribution(tmp_path, "torch", version)
    (tmp_path / "torch_xla").mkdir()
    command = [sys.executable, TRAINER / "base_image.py", "[trainer]"]
    done = subprocess.run(command, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "docs/image.md" in done.stderr
    assert f"  torch is {version}; the image needs torch>=2.13,<2.16" in done.stderr.splitlines()
    assert "  torch_xla is installed" in done.stderr


def test_a_build_of_torchneuron_is_in_the_range(tmp_path: Path) -> None:
    distribution(tmp_path, "torch", "2.14.0+cpu")
    code = "import base_image; print(*base_image.problems(['trainer']), sep='\\n')"
    environment = {"PYTHONPATH": f"{TRAINER}:{tmp_path}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "torch is" not in done.stdout


@pytest.mark.parametrize(
    ("python", "fits"), [((3, 11, 9), False), ((3, 12, 0), True), ((3, 14, 9), True), ((3, 15, 0), False)]
)
def test_the_python_of_the_base_image(monkeypatch: pytest.MonkeyPatch, python: tuple[int, ...], fits: bool) -> None:
    monkeypatch.setattr(sys, "version_info", python)
    assert any("3.12 to 3.14" in line for line in base_image.problems([])) != fits


def test_what_the_installation_changes_in_the_base_image_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"torch": "2.14.0", "neuronx-cc": "2.28.1", "numpy": "2.2.0"}
    unmet = {"a 1 requires b, which is not installed."}
    monkeypatch.setattr(base_image, "packages", lambda: there)
    monkeypatch.setattr(base_image, "unmet_requirements", lambda: unmet)
    before = base_image.record()
    there["numpy"] = NATIVE.pins["numpy"].version
    assert list(base_image.changes(before)) == [], "a pinned package may have another version"
    there |= {"torch": "2.15.0", "neuronx-cc": "2.29"}
    unmet.add("neuronx-cc 2.28.1 has requirement numpy<2.3")
    torch, compiler, conflict = base_image.changes(before)
    assert "2.14.0" in torch and "2.15.0" in torch and "neuronx-cc" in compiler and "numpy<2.3" in conflict


def test_of_two_installed_versions_that_on_top_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    distribution(tmp_path / "venv", "torch", "1.0")
    distribution(tmp_path / "base", "torch", "2.0")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "venv"), str(tmp_path / "base")])
    assert base_image.packages() == {"torch": "1.0"}


# --- the smoke test


def freeze(folder: Path, **changed: str) -> Path:
    """Write a constraints file with the versions of this environment."""
    there = {pins.normalized(of.metadata["Name"]): of.version for of in importlib.metadata.distributions()} | changed
    there.pop("llama-lora", None)
    lines = [f"{name}=={version}" for name, version in there.items() if name != "torch"]
    file = folder / "constraints.txt"
    file.write_text("\n".join(["# [base]", f"torch=={there['torch']}", "# [command]", *lines, "# [trainer]"]))
    return file


def smoke_test(*arguments: str | Path, path: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": path, "HOME": "/tmp"}
    command = [*SMOKE_TEST, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_complete_image_passes(tmp_path: Path) -> None:
    done = smoke_test("[trainer]", "--constraints", freeze(tmp_path), path=str(Path(sys.executable).parent))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "The image is complete: command, trainer.\n"


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    helm = tmp_path / "helm"
    helm.write_text("#!/bin/sh\necho Error: no such chart >&2\nexit 1\n")
    helm.chmod(0o755)
    (tmp_path / "genvalues").write_text("#!/bin/sh\n")
    (tmp_path / "genvalues").chmod(0o755)
    file = freeze(tmp_path, peft="0.16.0", **{"no-such-package": "1.0"})
    file.write_text(file.read_text().replace(f"idna=={version('idna')}\n", ""))
    done = smoke_test("", "--constraints", file, path=str(tmp_path))
    assert done.returncode == 1 and done.stdout == ""
    first, *rest = done.stderr.splitlines()
    assert first == f"The image is not complete ({len(rest)} problems):"
    peft = f"  peft is {version('peft')}; the constraints file has 0.16.0"
    assert {peft, "  no-such-package is not installed; the constraints file has 1.0"} <= set(rest)
    assert "  helm version --short: exits with status 1: Error: no such chart" in rest
    assert any(re.fullmatch(r"  idna, which \S+ needs, is not in the constraints file", line) for line in rest)
    assert not any("genvalues" in line for line in rest)


def test_a_gradient_that_is_zero_is_a_problem() -> None:
    """In this process, which has torch imported; the complete image above runs it as it is."""
    gradient = module("smoke_test").GRADIENT
    broken = gradient.replace(".loss.backward()", ".loss.mul(0).backward()")
    assert broken != gradient
    with pytest.raises(AssertionError, match="gradient is 0"):
        exec(broken, {})


def version(name: str) -> str:
    return importlib.metadata.version(name)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise RuntimeError('no\\n  device')", "import broken: RuntimeError: no device"),
        ("raise SystemExit(3)", "import broken: SystemExit: 3"),
        ("import os; os.abort()", "import broken: exits with status -6: importing broken"),
        ("import no_such_module", "import broken: ModuleNotFoundError: No module named 'no_such_module'"),
    ],
)
def test_an_import_that_fails_or_crashes_is_reported_by_name(tmp_path: Path, body: str, said: str) -> None:
    (tmp_path / "broken.py").write_text(body)
    code = "import smoke_test; print(*smoke_test.failing_imports('command', ['json', 'broken', 'csv']), sep='\\n')"
    environment = {"PYTHONPATH": f"{TRAINER}:{tmp_path}", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [said]


def test_a_backends_modules_are_imported_only_with_its_extras() -> None:
    code = "import json, smoke_test as s; print(json.dumps({part: s.modules_of(part) for part in s.IMPORTS}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": f"{TRAINER}:{ROOT / 'generator'}"},
        capture_output=True,
        text=True,
        check=True,
    )
    listed = json.loads(done.stdout)
    assert "genvalues.ops.image" in listed["command"] and "genvalues.cluster.runner" in listed["command"]
    of_xla = re.compile(r"llama_lora\.backends\.xla\b")
    for part in ("trainer", "trainer-xla"):
        assert "llama_lora.stages.merge" in listed[part] and not any(of_xla.match(one) for one in listed[part])
    assert not any(one.startswith("llama_lora.backends.native") for one in listed["trainer-xla"])
    assert listed["xla"] and all(of_xla.match(one) for one in listed["xla"])
