"""What the chart's templates refuse (chart/templates/_validations.tpl), told before Helm does.

Not all of it: what the inputs can get wrong, what chartValues can make of what was derived, and secrets, which must not
even be written. The rest, such as mounts that collide, is Helm's to say.
Values may be incomplete: a key that is left out, or of the wrong type, is in no contradiction.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from genvalues.accelerators.instances import trainium
from genvalues.accelerators.neuron_rules import FLASH_ROWS
from genvalues.common.dicts import get
from genvalues.common.problems import Problem, key_paths
from genvalues.common.text import SECRET_NAME, KeyPath, number_of, one_line
from genvalues.settings.values import DURATION

Values = dict[str, Any]
SECRETS_FIX = (
    "Put a Hugging Face token in a Secret and name it in huggingFace.tokenSecret; "
    "give access to AWS by chartValues.serviceAccount.annotations."
)


EXAMPLE_REGISTRY = "123456789012.dkr.ecr."  # of the account that AWS's documentation uses for everybody's
DEFAULT_MOUNT = "/workspace"  # workspace.mountPath (chart/values.yaml)
STALL_TIMEOUT = "30m"  # of a training whose graphs are compiled: the chart's, too
COMPILING_STALL_TIMEOUT = "2h"  # of one that may compile for an hour in its first step (chart/values.yaml, guards)
STARTING_STALL_TIMEOUT = "18m"  # what a start may take, by the plan's estimate (plan/estimate.py, START_HOURS)
# Not measured, and below any guess: a node's workers (32 on trn1) load their libraries, meet and read the model first.
SHORTEST_STALL_TIMEOUT = "2m"
GRACE_SECONDS = 120  # terminationGracePeriodSeconds (chart/templates/_stage-pod.tpl), which the gate keeps back


def contradictions(values: Values) -> Iterator[Problem]:
    rules = (
        model,
        dataset,
        attention,
        parallelism,
        process_groups,
        devices,
        guards,
        storage,
        access_modes,
        environment,
        secrets,
    )
    for rule in rules:
        yield from rule(values)


def warnings(values: Values) -> Iterator[Problem]:
    """What works, and may not be what was meant."""
    format_ = get(values, "dataset.format", str)
    flash = get(values, "training.attention", str) == "flash" and get(values, "training.packing", bool)
    if flash and get(values, "backend", str) == "neuron" and format_ != "text":
        yield Problem(
            key_paths("training.attention"),
            f"flash is causal only, so each packed example of format {format_} is trained with those before it in "
            "its row in sight",
            "Write attention: eager or packing: false to keep them apart.",
        )

    if get(values, "image.repository", str) and values["image"]["repository"].startswith(EXAMPLE_REGISTRY):
        yield Problem(
            (*key_paths("image.repository"), ("image",)),
            "123456789012 is the example account of AWS documentation, so the image cannot be pulled",
            "Use your own account, then run genvalues image push.",
        )

    yield from short_standstill(values)


def short_standstill(values: Values) -> Iterator[Problem]:
    """A guards.stallTimeout that a training may well need until its first step is done."""
    timeout = get(values, "guards.stallTimeout", str)
    if not timeout or get(values, "backend", str) != "neuron":
        return
    compiles = get(values, "compile.onMismatch", str) == "warn"
    if compiles and seconds(timeout) < seconds(COMPILING_STALL_TIMEOUT):
        yield Problem(
            key_paths("guards.stallTimeout", "compile.onMismatch"),
            f"{timeout} may end the training in its first step, which with compile.onMismatch: warn may compile for an "
            "hour",
            f"Write {COMPILING_STALL_TIMEOUT}, or leave it out, which is that.",
        )
    elif not compiles and seconds(timeout) < seconds(STARTING_STALL_TIMEOUT):
        yield Problem(
            key_paths("guards.stallTimeout"),
            f"{timeout} may end the training before its first step: to start and to read the model may take "
            f"{STARTING_STALL_TIMEOUT}, by the plan's estimate",
            f"Write {STALL_TIMEOUT}, or leave it out, which is that.",
        )


def model(values: Values) -> Iterator[Problem]:
    hub_id, path = get(values, "model.id", str), get(values, "model.path", str)
    if hub_id and path:
        yield Problem(key_paths("model.path", "model.id"), "model.id and model.path are both set", "Remove one.")
    elif hub_id == path == "":
        yield Problem(key_paths("model.id", "model.path"), "no model is set", "Write a hub id, or a path.")
    if path and get(values, "model.revision", str):
        yield Problem(
            key_paths("model.revision", "model.path"), "model.path cannot be combined with a revision", "Remove it."
        )


def dataset(values: Values) -> Iterator[Problem]:
    for key in ("dataset.source", "dataset.format"):
        if get(values, key, str) == "":
            yield Problem(key_paths(key), "is empty", "Remove it here: the inputs say it.")
    if get(values, "evaluation.enabled", bool) and get(values, "dataset.evalFraction", float) == 0:
        yield Problem(
            key_paths("evaluation.enabled", "dataset.evalFraction"),
            "evaluation is enabled, but no rows are held out",
            "Raise dataset.evalFraction above 0.",
        )


def attention(values: Values) -> Iterator[Problem]:
    if get(values, "training.attention", str) != "flash":
        return
    length, backend = get(values, "training.maxSequenceLength", int), get(values, "backend", str)
    if backend == "cpu":
        yield Problem(key_paths("training.attention"), "flash requires backend neuron", "Write eager, or remove it.")
    elif backend == "neuron" and length is not None and length % FLASH_ROWS:
        yield Problem(
            key_paths("training.attention", "training.maxSequenceLength"),
            f"flash needs a maxSequenceLength that is a multiple of {FLASH_ROWS}, not {length}",
            f"Write maxSequenceLength: {-(-length // FLASH_ROWS) * FLASH_ROWS}, or attention: eager.",
        )


def parallelism(values: Values) -> Iterator[Problem]:
    names = ("nodes", "processesPerNode", "tensorParallelSize", "dataParallelSize")
    nodes, per_node, tensor, data = (get(values, f"parallelism.{name}", int) for name in names)
    if all((nodes, per_node, tensor, data)) and nodes * per_node != tensor * data:
        yield Problem(
            key_paths(*(f"parallelism.{name}" for name in names)),
            f"nodes {nodes} * processesPerNode {per_node} is not tensorParallelSize {tensor} * dataParallelSize {data}",
            "Leave parallelism out: instance and nodes give it.",
        )
    if get(values, "backend", str) == "cpu" and (tensor or 1) > 1:
        yield Problem(
            key_paths("parallelism.tensorParallelSize", "backend"), "backend cpu is data parallel only", "Write 1."
        )


def process_groups(values: Values) -> Iterator[Problem]:
    """Groups of processes that Neuron cannot make, or that neuronx_distributed cannot place."""
    instance = trainium(get(values, "instance", str) or "")
    if instance is None:
        return
    groups = instance.generation.groups
    for name in ("tensorParallelSize", "processesPerNode"):
        size = get(values, f"parallelism.{name}", int)
        if size is not None and (size not in groups or size > instance.cores):
            fitting = ", ".join(str(group) for group in groups if group <= instance.cores)
            yield Problem(
                key_paths(f"parallelism.{name}", "instance"),
                f"{values['instance']} does not support process groups of {size} processes",
                f"Leave parallelism out, or write one of {fitting}.",
            )


def devices(values: Values) -> Iterator[Problem]:
    asked = get(values, "devices", dict)
    if get(values, "backend", str) == "neuron" and get(values, "instance", str) == "cpu":
        yield Problem(
            key_paths("backend", "instance"),
            "backend neuron requires a Trainium instance",
            "Change the inputs' instance.",
        )
    elif get(values, "backend", str) == "neuron" and asked is not None and "aws.amazon.com/neuron" not in asked:
        yield Problem(
            key_paths("backend", "devices"),
            "backend neuron requires aws.amazon.com/neuron in devices",
            "Remove it here.",
        )
    for name in ("aws.amazon.com/neurondevice", "aws.amazon.com/neuroncore"):
        if name in (asked or {}):
            yield Problem(
                (("devices", name),),
                "the Neuron device plugin does not offer whole nodes under this name",
                "Use aws.amazon.com/neuron.",
            )


def guards(values: Values) -> Iterator[Problem]:
    """A limit on the cost needs a price, which the price list has for Trainium alone; a time must be one."""
    if get(values, "guards.maxCost", float) and not get(values, "guards.pricePerNodeHour", float):
        yield Problem(
            key_paths("guards.maxCost", "guards.pricePerNodeHour"),
            f"the price of a {values.get('instance', '')} node is unknown, so the cost cannot be counted",
            "Write guards.pricePerNodeHour, the dollars that one node costs an hour.",
        )
    most, price = get(values, "guards.maxCost", float), get(values, "guards.pricePerNodeHour", float)
    nodes = get(values, "parallelism.nodes", int) or 1
    if most and price and most <= (kept := nodes * GRACE_SECONDS / 3600 * price):
        yield Problem(
            key_paths("guards.maxCost", "guards.pricePerNodeHour"),
            f"${most:g} is too low to start: ${kept:.2f} is reserved for stopping {number_of(nodes, 'node')}",
            "Raise it. `genvalues plan` estimates the cost of the run.",
        )
    timeout = get(values, "guards.stallTimeout", str)
    if timeout and not (re.fullmatch(DURATION, timeout) and re.search("[1-9]", timeout)):
        yield Problem(
            key_paths("guards.stallTimeout"),
            f"{one_line(timeout)!r} is not a valid duration",
            "Write one like 45m or 1h30m, or '' for none.",
        )
    elif timeout and get(values, "backend", str) == "neuron" and seconds(timeout) < seconds(SHORTEST_STALL_TIMEOUT):
        yield Problem(
            key_paths("guards.stallTimeout"),
            f"{timeout} ends every training before its first step: to start and to read the model takes longer",
            "Leave it out: what is long enough is chosen then.",
        )


def seconds(duration: str) -> int:
    """Of a text that DURATION takes."""
    return sum(
        int(number) * {"h": 3600, "m": 60, "s": 1}[unit] for number, unit in re.findall("([0-9]+)([hms])", duration)
    )


def storage(values: Values) -> Iterator[Problem]:
    """The kinds' own rules, where the release makes a claim."""
    kind = get(values, "storage.kind", str)
    if get(values, "storage.existingClaim", str):
        return
    if get(values, "storage.enabled", bool) is False:
        yield Problem(
            key_paths("storage.enabled"),
            "is false, but no existingClaim is set",
            "Write storage: {existingClaim: NAME}.",
        )
        return
    if kind == "fsx" and (fitting := fsx_size(get(values, "storage.size", str) or "")):
        yield Problem(
            key_paths("storage.size"),
            f"FSx for Lustre has no size of {one_line(values['storage']['size'])}",
            f"Use {fitting} (1200Gi or a multiple of 2400Gi).",
        )
    if kind == "fsx-static":
        for name in ("fileSystemId", "dnsName", "mountName"):
            if get(values, f"storage.static.{name}", str) == "":
                yield Problem(
                    key_paths(f"storage.static.{name}", "storage.kind"),
                    f"fsx-static needs static.{name}",
                    "`aws fsx describe-file-systems` says it.",
                )
    creates = get(values, "storage.fsx.createStorageClass", bool)
    if kind == "fsx" and creates:
        for name, empty in (("subnetId", ""), ("securityGroupIds", [])):
            if get(values, f"storage.fsx.{name}", type(empty)) == empty:
                yield Problem(
                    key_paths("storage.fsx.createStorageClass", f"storage.fsx.{name}"),
                    f"needs storage.fsx.{name}",
                    f"Write chartValues.storage.fsx.{name}, of the Trainium nodes.",
                )
    elif kind == "fsx" and get(values, "storage.storageClass", str) == "":
        yield Problem(
            key_paths("storage.storageClass"),
            "FSx for Lustre has no default storage class",
            "Name the class of the FSx CSI driver (often fsx-sc).",
        )


def fsx_size(size: str) -> str:
    """The size to write instead; nothing where this one fits, or is none."""
    match = re.match(r"^([1-9][0-9]{0,6})(Mi|Gi|Ti)$", size)
    if not match:
        return ""
    mebibytes = int(match[1]) * {"Mi": 1, "Gi": 1 << 10, "Ti": 1 << 20}[match[2]]
    fitting = 1200 if mebibytes <= 1200 << 10 else -(-mebibytes // (2400 << 10)) * 2400
    return "" if size == f"{fitting}Gi" else f"{fitting}Gi"


def access_modes(values: Values) -> Iterator[Problem]:
    modes, nodes = get(values, "storage.accessModes", list), get(values, "parallelism.nodes", int) or 1
    if (
        not get(values, "storage.existingClaim", str)
        and modes is not None
        and nodes > 1
        and "ReadWriteMany" not in modes
    ):
        yield Problem(
            key_paths("storage.accessModes", "parallelism.nodes"),
            f"{nodes} nodes need ReadWriteMany",
            "Write [ReadWriteMany].",
        )


CHARTS_OWN = {  # environment variables of the stages that take no other value, and what to do instead
    "LLAMA_LORA_WORKSPACE": ("is set by the chart", "Use chartValues.workspace.mountPath."),
}
CHARTS_OWN_ON_NEURON = {
    "NEURON_COMPILE_CACHE_URL": ("is set by the chart", "Remove it: the cache is on the volume."),
    "NEURON_LOGICAL_NC_CONFIG": ("is set by the chart", "Use chartValues.neuron.logicalCoreSize."),
    **dict.fromkeys(
        ("XLA_USE_BF16", "XLA_DOWNCAST_BF16"),
        ("is out of use since Neuron 2.25, and spoils what is kept in fp32", "Remove it: weights are loaded in bf16."),
    ),
}


def environment(values: Values) -> Iterator[Problem]:
    """What extraEnv must not change, or must change in compile and train alike: llama-lora.validations.neuron."""
    common = get(values, "stageDefaults.extraEnv", dict) or {}
    stages = get(values, "stages", dict) or {}
    on_neuron = get(values, "backend", str) == "neuron"
    compiling = {"compile", "neff", "train"} if on_neuron else set()
    extra = {stage: {**common, **(get(stages, f"{stage}.extraEnv", dict) or {})} for stage in compiling | set(stages)}
    for stage in sorted(extra):
        taken = CHARTS_OWN | (CHARTS_OWN_ON_NEURON if stage in compiling else {})
        for name in sorted(taken.keys() & extra[stage].keys()):
            yield Problem(variable(name, stage), *taken[name])
        if stage in compiling and "--cache_dir" in as_text(extra[stage].get("NEURON_CC_FLAGS")):
            what = "--cache_dir moves the compiler's cache away from where the stages look for it"
            yield Problem(variable("NEURON_CC_FLAGS", stage), what, "Remove --cache_dir.")
    for name in sorted(set(extra.get("compile", ())) | set(extra.get("train", ()))) if on_neuron else []:
        if name.startswith("NEURON_RT_") or name in CHARTS_OWN_ON_NEURON:
            continue
        of_the_graphs = name.startswith(("NEURON_", "XLA_"))
        if of_the_graphs and as_text(extra["compile"].get(name)) != as_text(extra["train"].get(name)):
            yield Problem(
                variable(name, "train", "compile"),
                "differs between stages compile and train, so that train's graphs would not be those that compile made",
                "Set it in both, or in chartValues.stageDefaults.extraEnv.",
            )


def variable(name: str, *stages: str) -> tuple[KeyPath, ...]:
    return *(("stages", stage, "extraEnv", name) for stage in stages), ("stageDefaults", "extraEnv", name)


def as_text(value: Any) -> str:
    """As Helm's toString has it, with which the chart compares."""
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def secrets(values: Values) -> Iterator[Problem]:
    """A value is readable by everybody who can read the release."""
    stages = get(values, "stages", dict) or {}
    blocks: list[tuple[KeyPath, Any]] = [(("stages", stage), block) for stage, block in stages.items()]
    for key, block in [(("stageDefaults",), values.get("stageDefaults")), *blocks]:
        for name in get(block, "extraEnv", dict) or {}:
            if SECRET_NAME.search(name):
                yield Problem(
                    ((*key, "extraEnv", name),), "looks like a secret, and values are no place for one", SECRETS_FIX
                )
