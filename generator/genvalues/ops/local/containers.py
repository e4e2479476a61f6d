"""What replaces the cluster on this computer: folders for volumes, processes for containers."""

from __future__ import annotations

import os
import re
import shutil
import site
import socket
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from genvalues.cluster.workloads import NAMES, workload_of
from genvalues.common.errors import POD, UserError
from genvalues.common.files import write_text
from genvalues.common.process import GRACE, Command
from genvalues.common.progress_bar import RELAY
from genvalues.inputs.chart import load
from genvalues.inputs.yaml_text import dump
from genvalues.ops.local.chart_stages import STAGE, Object, annotation_of, config_maps

# Variables of torchrun and the training operator, which would change how a stage starts its workers.
TORCHRUN = re.compile(
    r"PET_.*|TORCHELASTIC_.*|(LOCAL_|GROUP_|ROLE_|NODE_)?RANK|(LOCAL_|GROUP_|ROLE_)?WORLD_SIZE|MASTER_(ADDR|PORT)"
)
IMAGE = "LLAMA_LORA_IMAGE"  # the image that a pod runs, which no process of this computer does
# As in a cluster, only a stage whose container takes a token from a Secret gets one.
TOKENS = {"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN", "HF_TOKEN_PATH"}


@dataclass(frozen=True)
class LocalStage:
    """A stage as processes: groups of commands that run one after the other, those of a group in parallel."""

    name: str
    groups: tuple[tuple[Command, ...], ...]


class Machine:
    """Turns the jobs of stages into commands. ``relay_progress``: the stages leave drawing a bar to this process."""

    def __init__(self, workspace: Path, objects: Sequence[Object], *, relay_progress: bool = False) -> None:
        self.workspace = workspace
        self.hidden = workspace / ".local"
        self.logs = self.hidden / "logs"
        self.relay_progress = relay_progress
        self.objects = objects
        self.config_maps = config_maps(objects)
        self._written: set[str] = set()  # files of ConfigMaps: most stages mount the same

    def stage(self, item: Object) -> LocalStage:
        """The commands of a stage's job. Raises UserError where one cannot run on this computer."""
        return LocalStage(annotation_of(item, STAGE), tuple(self.groups(item)))

    def groups(self, item: Object) -> Iterator[tuple[Command, ...]]:
        """A Job's init containers and then its container, one by one; all workers of compile and train together."""
        stage = annotation_of(item, STAGE)
        if item["kind"] in NAMES:
            workload = workload_of(item)
            pod = workload.worker_template(item, self.objects)["spec"]
            settings = torchrun_settings(workload.workers(item), workload.processes(item), free_port())
            yield tuple(
                self.command(f"worker-{index}", stage, pod, pod["containers"][0], settings)
                for index in range(workload.workers(item))
            )
            return
        pod = item["spec"]["template"]["spec"]
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            yield (self.command(container["name"], stage, pod, container, {}),)

    def command(self, name: str, stage: str, pod: Object, container: Object, settings: dict[str, str]) -> Command:
        folders = self.folders(stage, pod, container)
        words = [*container.get("command", []), *container.get("args", [])]
        if not container.get("command"):
            raise UserError(f"the container {container['name']} of stage {stage} names no command")
        program, *arguments = (with_local_paths(str(word), folders) for word in words)
        environment = user_environment(container)
        environment |= {RELAY: "1"} if self.relay_progress else {}
        environment["PATH"] = f"{python_folder()}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        environment.setdefault(
            "PYTHONUSERBASE", site.getuserbase()
        )  # for packages of `pip install --user`: HOME may change
        for variable in container.get("env") or []:
            if "value" in variable and variable["name"] != IMAGE:
                environment[variable["name"]] = with_local_paths(str(variable["value"]), folders)
        # As in a cluster: a training saves a checkpoint in this time.
        grace = float(pod.get("terminationGracePeriodSeconds", GRACE))
        arguments = [find_program(program, stage), *arguments]
        return Command(name, tuple(arguments), environment | settings, self.workspace, grace=grace)

    def folders(self, stage: str, pod: Object, container: Object) -> dict[str, Path]:
        """Map each mounted path of a container to a folder of this computer, and write the ConfigMaps' files."""
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
                folder = self.hidden / "tmp" / mount["name"]  # of all stages: forks of one process have one HF_HOME
            elif "hostPath" in volume:
                folder = Path(volume["hostPath"]["path"])
            else:
                raise UserError(f"the volume {mount['name']} of stage {stage} is available only in a cluster")
            folders[mount["mountPath"]] = folder / mount.get("subPath", "")
        for mount in mounts:
            volume = volumes[mount["name"]]
            if "emptyDir" in volume:
                folders[mount["mountPath"]].mkdir(parents=True, exist_ok=True)
            if "configMap" in volume:
                # All stages share the ConfigMaps, so only paths on the shared volume are replaced in them.
                for file, text in self.config_map(volume["configMap"]["name"]).items():
                    if file not in self._written:
                        write_text(self.hidden / "config" / file, file_with_local_paths(file, text, shared))
                        self._written.add(file)
        return folders

    def config_map(self, name: str) -> dict[str, str]:
        if name not in self.config_maps:
            raise UserError(f"a stage mounts the ConfigMap {name}, which the chart does not render")
        return self.config_maps[name]


def with_local_paths(text: str, folders: dict[str, Path]) -> str:
    """Replace every path under a mounted path by its place on this computer; the longest matching mount wins."""
    if not folders:
        return text
    longest_first = sorted((mount.rstrip("/") for mount in folders), key=len, reverse=True)
    whole_path = rf"(?<![\w./-])({'|'.join(map(re.escape, longest_first))})(?=/|[^\w.-]|$)"
    by_mount = {mount.rstrip("/"): folder for mount, folder in folders.items()}
    return re.sub(whole_path, lambda match: str(by_mount[match[1]]), text)


def file_with_local_paths(name: str, text: str, folders: dict[str, Path]) -> str:
    """Replace the paths in a file of a ConfigMap. YAML is parsed: a folder's name may contain YAML syntax."""
    if not name.endswith((".yaml", ".yml")):
        return with_local_paths(text, folders)

    def replaced(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: replaced(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [replaced(inner) for inner in value]
        return with_local_paths(value, folders) if isinstance(value, str) else value

    try:
        return dump(replaced(load(text)))
    except yaml.YAMLError as error:
        raise UserError(f"the chart's {name} is not valid YAML: {' '.join(str(error).split())}") from None


def user_environment(container: Object) -> dict[str, str]:
    """The user's environment, without what the container must not get. Nothing of it is written to a file."""
    from_secrets = {
        variable["name"]
        for variable in container.get("env") or []
        if "secretKeyRef" in (variable.get("valueFrom") or {})
    }
    hidden = {RELAY, POD} | (set() if from_secrets & TOKENS else TOKENS)
    return {name: value for name, value in os.environ.items() if name not in hidden and not TORCHRUN.fullmatch(name)}


def torchrun_settings(workers: int, processes: int, port: int) -> dict[str, str]:
    """The variables that a worker has in a cluster, with the rendezvous on this computer. ``processes``: on each."""
    return {
        "PET_NNODES": f"{workers}:{workers}",
        "PET_NPROC_PER_NODE": str(processes),
        "PET_RDZV_BACKEND": "c10d",
        "PET_RDZV_ENDPOINT": f"localhost:{port}",
        "PET_LOCAL_ADDR": "127.0.0.1",
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def python_folder() -> Path:
    return Path(sys.executable).parent


def find_program(program: str, stage: str) -> str:
    """Find a program in the folder of this Python, where packages install theirs, else on PATH."""
    found = shutil.which(program, path=str(python_folder())) or shutil.which(program)
    if not found:
        raise UserError(
            f"stage {stage} requires the command {program}, which is not installed",
            fix="Run `make setup`, or: pip install '.[trainer]'",
        )
    return found
