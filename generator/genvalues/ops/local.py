"""The chart's stages on this computer: rendered by Helm, run as processes, one after the other."""

from __future__ import annotations

import fcntl
import os
import re
import shlex
import shutil
import site
import socket
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml

from genvalues.common import helm
from genvalues.common.dicts import merge
from genvalues.common.errors import UserError, UserErrors
from genvalues.common.files import write_text
from genvalues.common.process import Command, Interrupted, run_together
from genvalues.common.text import dotted, one_line
from genvalues.inputs.chart import NAME, need_chart, on_top_of_defaults, part, refusals
from genvalues.inputs.yaml_text import UnreadableYAML, decode, dump, load_as_helm

STAGE = "llama-lora/stage"
NEEDS_CLUSTER = "llama-lora/needs-cluster"
# The first Neuron device, as the driver names it (AWS Neuron documentation, "How to Build and Run a Neuron Container").
NEURON_DEVICE = Path("/dev/neuron0")
ENDING = 30.0  # seconds given to the stages of a run that was killed, to notice it and end
RELEASE = "llama-lora"  # the chart needs a name; runs have theirs in values.name
TAIL = 20  # lines of a failed stage's log that are shown again at the end
# What a stage must not find in the user's own environment: what torchrun and the training operator set for a worker,
TORCHRUN = re.compile(
    r"PET_.*|TORCHELASTIC_.*|(LOCAL_|GROUP_|ROLE_|NODE_)?RANK|(LOCAL_|GROUP_|ROLE_)?WORLD_SIZE|MASTER_(ADDR|PORT)"
)
# and, as in a cluster, a token, unless the stage's container takes one from a Secret.
TOKENS = {"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN", "HF_TOKEN_PATH"}

Object = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """A hook of the chart: groups of commands to run one after the other, those of a group side by side."""

    name: str
    groups: tuple[tuple[Command, ...], ...]


@dataclass
class Outcome:
    stage: str
    result: str = "not run"
    seconds: float = 0.0


def run(values_file: Path, workspace: Path, chart: Path | None, *, on_cpu: bool = False) -> int:
    """Run all stages of a values file, or of a bundle's values; the status is 0 or the first failing stage's.

    With ``on_cpu`` values for Trainium run on the CPU, as one process.
    """
    try:
        objects = rendered(values_file, chart, on_cpu)
        with locked(workspace) as lock:
            stages = stages_of(objects, Local(workspace.resolve(), objects))
            return run_stages(stages, left_out(objects), workspace.resolve(), lock)
    except KeyboardInterrupt:  # outside of the stages: nothing runs
        return 130


def rendered(values_file: Path, chart: Path | None, on_cpu: bool = False) -> list[Object]:
    found = need_chart(chart)
    values = of_bundle(values_file, found) if is_bundle(values_file) else read_values(values_file)
    if on_cpu:
        values = for_the_cpu(values)
    elif values.get("backend") == "neuron" and not NEURON_DEVICE.exists():
        fix = "Run its stages on the CPU, which takes a small model: --cpu"
        what = "is for Trainium (backend: neuron), which this computer does not have"
        raise UserError(what, where=str(values_file), fix=fix)
    check_against(found, values, values_file)
    values = merge(values, {"pipeline": {"mode": "attached"}})  # as the runner in a cluster does
    objects = helm.render(found, RELEASE, values)
    if all(annotation(item, NEEDS_CLUSTER) for item in in_order(objects)):
        raise UserError("has no stage that runs here", where=str(found), fix=f"Name the folder of the chart {NAME}.")
    return objects


def check_against(chart: Path, values: dict[str, Any], file: Path) -> None:
    """What Helm would have against the values by the chart's schema, told of the file; it names the chart alone."""
    if not (chart / "values.schema.json").exists():
        return
    found = list(refusals(chart, on_top_of_defaults(chart, values)))
    if not found:
        return
    if not is_bundle(file) and mistakes_as_inputs(file) < len(found):
        fix = f"First: genvalues write {shlex.quote(str(file))} -o values.yaml, then give values.yaml."
        raise UserError("this is an inputs file, and no values file", where=str(file), fix=fix)
    where, fix = one_line(str(file), 200), f"The chart is {chart}; `genvalues write` writes values that are right."
    raise UserErrors([UserError(reason, where=f"{where}: {dotted(key) or 'values'}", fix=fix) for key, reason in found])


def mistakes_as_inputs(file: Path) -> int:
    """How many there are if it is meant as an inputs file."""
    from genvalues.inputs.check import check
    from genvalues.inputs.document import read

    try:
        check(read(file))
    except UserErrors as mistakes:
        return len(mistakes.errors)
    return 0


def is_bundle(path: Path) -> bool:
    return path.name.endswith((".tar.gz", ".tgz"))


def of_bundle(path: Path, chart: Path) -> dict[str, Any]:
    """The values of the release that was packed. Says where this chart is not the release's."""
    from genvalues.ops.bundle import VALUES, read_bundle
    from genvalues.ops.redact import HIDDEN

    about, text = read_bundle(path)
    values = values_in(text, f"{path}: {VALUES}")
    ours = part(chart, "Chart.yaml", yaml.safe_load).get("version")
    if (theirs := about.get("chart")) != ours:
        of = f"is of chart {one_line(str(theirs))}" if theirs else "does not say of which chart it is"
        warn(f"{path} {of}; it is run with {chart}, which is {ours}")
    if HIDDEN in text:
        warn(f"values in {path} were redacted; a stage that needs them fails")
    release = about.get("release")
    return {**values, "name": values.get("name") or (release if isinstance(release, str) else "")}


def for_the_cpu(values: dict[str, Any]) -> dict[str, Any]:
    """The same run with what Trainium alone has taken away: one process, no devices, and eager attention."""
    one_process = {"nodes": 1, "processesPerNode": 1, "tensorParallelSize": 1, "dataParallelSize": 1}
    without = {key: value for key, value in values.items() if key not in ("neuron", "devices")}
    return merge(
        without,
        {
            "backend": "cpu",
            "instance": "cpu",
            "parallelism": one_process,
            "training": {"attention": "eager"},
            "compile": {"runsOn": "accelerator"},
        },
    )


def warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr)


def read_values(path: Path) -> dict[str, Any]:
    """A values file as Helm reads it."""
    return values_in(decode(path, str(path)), str(path))


def values_in(text: str, name: str) -> dict[str, Any]:
    try:
        values = load_as_helm(text)
    except UnreadableYAML as error:
        raise error.at(name) from None
    if not isinstance(values, dict):
        fix = "`genvalues write` writes such a file."
        raise UserError("holds no keys and values", where=name, fix=fix)
    return values


@contextmanager
def locked(workspace: Path) -> Iterator[int]:
    """One run at a time: two would write the same files. Held by the stages too, until the last one is gone."""
    path = workspace / ".local" / "lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        fix = "Name a folder that you may write to, or one that is not there yet."
        raise UserError(f"cannot be used: {error.strerror}", where=f"--workspace {workspace}", fix=fix) from None
    with file:
        deadline = time.monotonic() + ENDING
        while not taken(file):
            file.seek(0)
            holder = file.read().strip()
            # A killed one's stages notice it and end; until the last has, they write.
            if process_exists(holder) or time.monotonic() > deadline:
                raise UserError(
                    f"another `genvalues local` (process {holder or '?'}) is at work here",
                    where=f"--workspace {workspace}",
                    fix="Wait for its end, stop it, or use another folder.",
                )
            time.sleep(0.1)
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield file.fileno()


def taken(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def process_exists(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True


# --- from the chart's objects to commands


def annotation(item: Object, name: str) -> str:
    return str((item["metadata"].get("annotations") or {}).get(name, ""))


def is_stage(item: Object) -> bool:
    hooks = annotation(item, "helm.sh/hook").replace(" ", "").split(",")
    return bool(annotation(item, STAGE)) and bool({"post-install", "post-upgrade"}.intersection(hooks))


def in_order(objects: Iterable[Object]) -> list[Object]:
    """By weight, then name: the order in which Helm runs hooks."""
    weighed = [item for item in objects if is_stage(item) and item["kind"] in ("Job", "PyTorchJob")]
    return sorted(
        weighed, key=lambda item: (int(annotation(item, "helm.sh/hook-weight") or 0), item["metadata"]["name"])
    )


def left_out(objects: Iterable[Object]) -> list[str]:
    """The stages that make sense in a cluster only."""
    return list(dict.fromkeys(annotation(item, STAGE) for item in in_order(objects) if annotation(item, NEEDS_CLUSTER)))


def stages_of(objects: list[Object], local: Local) -> list[Stage]:
    """The stages that run here, in their order, every command of theirs found."""
    return [
        Stage(annotation(item, STAGE), tuple(local.groups(item)))
        for item in in_order(objects)
        if not annotation(item, NEEDS_CLUSTER)
    ]


class Local:
    """What stands for the cluster: folders for volumes, processes for containers."""

    def __init__(self, workspace: Path, objects: list[Object]) -> None:
        self.workspace = workspace
        self.hidden = workspace / ".local"
        self.config_maps = {item["metadata"]["name"]: item for item in objects if item["kind"] == "ConfigMap"}

    def groups(self, item: Object) -> Iterator[tuple[Command, ...]]:
        """A Job's init containers in turn and then its container; all workers of a PyTorchJob at once."""
        stage = annotation(item, STAGE)
        if item["kind"] == "PyTorchJob":
            worker = item["spec"]["pytorchReplicaSpecs"]["Worker"]
            replicas, pod = worker["replicas"], worker["template"]["spec"]
            port = free_port()
            yield tuple(
                self.command(
                    f"worker-{index}", stage, pod, pod["containers"][0], torchrun_settings(item, replicas, port)
                )
                for index in range(replicas)
            )
            return
        pod = item["spec"]["template"]["spec"]
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            yield (self.command(container["name"], stage, pod, container, {}),)

    def command(self, name: str, stage: str, pod: Object, container: Object, settings: dict[str, str]) -> Command:
        folders = self.folders(stage, pod, container)
        words = [*container.get("command", []), *container.get("args", [])]
        if not container.get("command"):
            raise UserError(f"the container {container['name']} of stage {stage} has no command to run here")
        program, *arguments = (translated(str(word), folders) for word in words)
        environment = own_environment(container)
        environment["PATH"] = f"{beside_python()}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        environment.setdefault("PYTHONUSERBASE", site.getuserbase())  # packages of `pip install --user`, HOME or not
        for variable in container.get("env") or []:
            if "value" in variable:
                environment[variable["name"]] = translated(str(variable["value"]), folders)
        return Command(name, (find_program(program, stage), *arguments), environment | settings, self.workspace)

    def folders(self, stage: str, pod: Object, container: Object) -> dict[str, Path]:
        """Where each mounted path of a container is on this computer."""
        volumes = {volume["name"]: volume for volume in pod.get("volumes") or []}
        mounts = container.get("volumeMounts") or []
        folders: dict[str, Path] = {}
        shared: dict[str, Path] = {}
        for mount in mounts:
            volume = volumes[mount["name"]]
            if "persistentVolumeClaim" in volume:
                folder = shared[mount["mountPath"]] = self.workspace
            elif "configMap" in volume:
                folder = self.hidden / "config"
            elif "emptyDir" in volume:
                folder = self.hidden / "tmp" / stage / mount["name"]
            elif "hostPath" in volume:
                folder = Path(volume["hostPath"]["path"])
            else:
                raise UserError(f"the volume {mount['name']} of stage {stage} is to be had in a cluster only")
            folders[mount["mountPath"]] = folder / mount.get("subPath", "")
        for mount in mounts:
            volume = volumes[mount["name"]]
            if "emptyDir" in volume:
                folders[mount["mountPath"]].mkdir(parents=True, exist_ok=True)
            if "configMap" in volume:
                # Config maps are shared by the stages, and so are the paths in them: those on the claim.
                for file, text in self.config_map(volume["configMap"]["name"]).items():
                    write_text(self.hidden / "config" / file, translated_file(file, text, shared))
        return folders

    def config_map(self, name: str) -> dict[str, str]:
        if name not in self.config_maps:
            raise UserError(f"the chart renders no ConfigMap {name}, which a stage mounts")
        data: dict[str, str] = self.config_maps[name].get("data") or {}
        return data


def translated(text: str, folders: dict[str, Path]) -> str:
    """Every path under a mounted one, as it is on this computer; the longest fitting mount counts."""
    if not folders:
        return text
    longest_first = sorted((mount.rstrip("/") for mount in folders), key=len, reverse=True)
    whole_path = rf"(?<![\w./-])({'|'.join(map(re.escape, longest_first))})(?=/|[^\w.-]|$)"
    by_mount = {mount.rstrip("/"): folder for mount, folder in folders.items()}
    return re.sub(whole_path, lambda match: str(by_mount[match[1]]), text)


def translated_file(name: str, text: str, folders: dict[str, Path]) -> str:
    """A file of a config map. In YAML, text by text: a folder's name may hold what YAML takes for its own."""
    if not name.endswith((".yaml", ".yml")):
        return translated(text, folders)

    def inside(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: inside(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [inside(inner) for inner in value]
        return translated(value, folders) if isinstance(value, str) else value

    try:
        return dump(inside(yaml.safe_load(text)))
    except yaml.YAMLError as error:
        raise UserError(f"the chart's {name} is not YAML: {' '.join(str(error).split())}") from None


def own_environment(container: Object) -> dict[str, str]:
    """The user's environment as far as a container may see it. A secret is never written anywhere."""
    from_secrets = {
        variable["name"]
        for variable in container.get("env") or []
        if "secretKeyRef" in (variable.get("valueFrom") or {})
    }
    held_back = set() if from_secrets & TOKENS else TOKENS
    return {name: value for name, value in os.environ.items() if name not in held_back and not TORCHRUN.fullmatch(name)}


def torchrun_settings(item: Object, replicas: int, port: int) -> dict[str, str]:
    """What the training operator sets for an elastic job, with the rendezvous on this computer."""
    return {
        "PET_NNODES": f"{replicas}:{replicas}",
        "PET_NPROC_PER_NODE": str(item["spec"].get("nprocPerNode", 1)),
        "PET_RDZV_BACKEND": "c10d",
        "PET_RDZV_ENDPOINT": f"localhost:{port}",
        "PET_LOCAL_ADDR": "127.0.0.1",
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def beside_python() -> Path:
    return Path(sys.executable).parent


def find_program(program: str, stage: str) -> str:
    """The program beside this Python, where its packages are installed, else on PATH."""
    found = shutil.which(program, path=str(beside_python())) or shutil.which(program)
    if not found:
        raise UserError(
            f"the stage {stage} needs the command {program}, which is not installed",
            fix="Run `make setup`, or pip install '.[trainer]'.",
        )
    return found


# --- running and telling


def run_stages(stages: list[Stage], left_out: list[str], workspace: Path, lock: int) -> int:
    from rich.console import Console

    console = Console(highlight=False, markup=False, soft_wrap=True)
    if left_out:
        console.print(f"Left out, for want of a cluster: {', '.join(left_out)}")
    outcomes = [Outcome(stage.name) for stage in stages]
    status = 0
    for stage, outcome in zip(stages, outcomes, strict=True):
        header(console, stage.name)
        log = workspace / ".local" / "logs" / f"{stage.name}.log"
        began = time.monotonic()
        try:
            status, tail = run_stage(stage, log, lock)
            outcome.result = f"failed with status {status}" if status else "done"
        except Interrupted as interrupted:
            status, tail = interrupted.status, []
            outcome.result = f"stopped by {interrupted}"
        outcome.seconds = time.monotonic() - began
        if status:
            break
    print_table(console, outcomes)
    if status:
        print(f"{outcome.stage}: {outcome.result}. Its log: {log}", file=sys.stderr)
        for line in tail:
            print(f"  {line}", file=sys.stderr)
    return status


def run_stage(stage: Stage, log: Path, lock: int) -> tuple[int, Iterable[str]]:
    """Run one stage, its output to the terminal and to its log; the status, and the last lines."""
    log.parent.mkdir(parents=True, exist_ok=True)
    tail: deque[str] = deque(maxlen=TAIL)
    with log.open("w", encoding="utf-8") as file:
        for group in stage.groups:

            def on_line(name: str, line: str, several: bool = len(group) > 1) -> None:
                text = f"[{name}] {line}" if several else line
                tail.append(text)
                file.write(text + "\n")
                file.flush()
                print(text, flush=True)

            status = run_together(group, on_line, hold_open=[lock])
            if status:
                return status, tail
    return 0, tail


def header(console: Any, stage: str) -> None:
    if console.is_terminal:
        console.rule(f"[bold]{stage}", align="left")
    else:
        console.print(f"--- {stage}")


def print_table(console: Any, outcomes: list[Outcome]) -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD if console.is_terminal else None, pad_edge=False)
    table.add_column("stage")
    table.add_column("result")
    table.add_column("time", justify="right")
    for outcome in outcomes:
        table.add_row(outcome.stage, outcome.result, duration(outcome.seconds) if outcome.result != "not run" else "")
    console.print(table)


def duration(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    return f"{int(minutes)} min {rest:02.0f} s" if minutes else f"{rest:.1f} s"
