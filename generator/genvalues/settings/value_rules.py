"""Rules that span settings, for values: genvalues reports what the chart's templates would refuse at install.

chart/templates/_validations.tpl has the same rules for values written by hand (tests/chart/test_value_rules.py compares
them) and a few more, such as conflicting mounts, that inputs cannot break. The values may be incomplete: a key that is
missing or of the wrong type breaks no rule.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from genvalues.accelerators import native_rules
from genvalues.accelerators.instances import (
    HYPERPOD,
    NEURON,
    TRN1,
    of_same_service,
    refusal,
    row,
    trainium,
    unsupported,
)
from genvalues.accelerators.memory import keeps_scores
from genvalues.accelerators.neuron_rules import (
    either,
    flash_length_problems,
    group_problems,
    packed_flash_problems,
    process_problems,
    shard_problems,
)
from genvalues.common.dicts import get, merge
from genvalues.common.problems import Problem, key_paths
from genvalues.common.text import SECRET_KEYS, SECRET_NAME, KeyPath, number_of, one_line
from genvalues.settings.base import DNS_NAME
from genvalues.settings.by_instance import logical_cores, on_neuron, weights_gib
from genvalues.settings.datasets import SPLIT, split_parts
from genvalues.settings.run import TRAIN_GRACE_SECONDS, with_own_words
from genvalues.settings.shared import DURATION, FSX_TYPES

Values = dict[str, Any]
SECRETS_FIX = (
    "Put a Hugging Face token in a Secret and name it in huggingFace.tokenSecret, other secrets in "
    "chartValues.stages.STAGE.extraEnvSecrets; give access to AWS by chartValues.serviceAccount.annotations."
)


MONITORS = ("wandb", "mlflow", "pushgateway", "otlpEndpoint")
EXAMPLE_REGISTRY = "123456789012.dkr.ecr."  # the example account of AWS documentation
# Units of Kubernetes' quantities: https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/quantity/
BINARY = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40}
UNITS = {"m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, **BINARY}
DEFAULT_MOUNT = "/workspace"  # default of workspace.mountPath
STALL_TIMEOUT = "30m"  # default if all graphs are compiled before train; also the chart's default
STALL_TIMEOUT_GIB = 16  # the weights for which it is enough
COMPILING_STALL_TIMEOUT = "2h"  # default if the first step of train may compile for an hour
STARTING_STALL_TIMEOUT = "18m"  # estimated longest start of a training (planner/estimate.py, START_HOURS)
# Backend native: graphs come from compile's cache, but that TorchNeuron finds all of them there is not verified on
# hardware, and the first step may compile some again.
NATIVE_STALL_TIMEOUT = "1h"
# Not measured; a lower bound: the workers of a node (32 on trn1) load libraries, rendezvous and read the model first.
SHORTEST_STALL_TIMEOUT = "2m"


def contradictions(values: Values) -> Iterator[Problem]:
    values = with_own_words(values)
    rules = (
        model,
        dataset,
        held_out_loss,
        attention,
        instance_type,
        parallelism,
        backend,
        process_groups,
        weights,
        devices,
        neuron,
        guards,
        storage,
        access_modes,
        environment,
        pod_settings,
        resources,
        publish,
        monitoring,
        secret_names,
        secrets,
        kueue,
        extra_objects,
        characters,
    )
    for rule in rules:
        yield from rule(values)


def warnings(values: Values) -> Iterator[Problem]:
    """Settings that work but are probably not intended."""
    values = with_own_words(values)
    attention, packing = get(values, "training.attention", str), get(values, "training.packing", bool)
    additional = (get(values, "dataset.additional", dict) or {}).values()
    formats = [get(values, "dataset.format", str), *(get(source, "format", str) for source in additional)]
    other = next((each for each in formats if each and each != "text"), formats[0])
    yield from packed_flash_problems(attention, packing, other)

    if get(values, "image.repository", str) and values["image"]["repository"].startswith(EXAMPLE_REGISTRY):
        yield Problem(
            (*key_paths("image.repository"), ("image",)),
            "123456789012 is the example account of AWS documentation, so the image cannot be pulled",
            "Use your own account, then run genvalues image push.",
        )

    yield from unusual(values)
    yield from short_standstill(values)


# Used for LoRA: learning rates of 1e-5 to 1e-3 and ranks of 8 to 256 (Hu et al. 2021, arXiv:2106.09685, appendix D, and
# Biderman et al. 2024, arXiv:2405.09673). Beyond these bounds a value is probably a slip.
HIGHEST_LEARNING_RATE, LOWEST_LEARNING_RATE, HIGHEST_RANK = 5e-3, 1e-7, 512


def unusual(values: Values) -> Iterator[Problem]:
    """A learning rate or a rank far from the usual ones."""
    rate, rank = get(values, "training.learningRate", float), get(values, "lora.r", int)
    if rate and not LOWEST_LEARNING_RATE <= rate <= HIGHEST_LEARNING_RATE:
        what = f"{rate:g} is unusual for LoRA: 1e-5 to 1e-3 is usual"
        yield Problem(key_paths("training.learningRate"), what, "Check it; 2e-4 is common.")
    if rank and rank > HIGHEST_RANK:
        what = f"{rank} is unusual: 8 to 256 is usual, and the adapter's memory grows with it"
        yield Problem(key_paths("lora.r"), what, "Check it; 16 is common.")


def short_standstill(values: Values) -> Iterator[Problem]:
    """A guards.stallTimeout that may be shorter than what precedes the first step."""
    timeout = get(values, "guards.stallTimeout", str)
    if not timeout or not on_trainium(values):
        return
    compiles = get(values, "compile.onMismatch", str) == "warn"
    if compiles and seconds(timeout) < seconds(COMPILING_STALL_TIMEOUT):
        yield Problem(
            key_paths("guards.stallTimeout", "compile.onMismatch"),
            f"{timeout} may end the training in its first step, which may compile for an hour with "
            "compile.onMismatch: warn",
            f"Write {COMPILING_STALL_TIMEOUT}, or leave it out to get the same.",
        )
    elif not compiles and seconds(timeout) < seconds(STARTING_STALL_TIMEOUT):
        usual = usual_stall_timeout(get(values, "backend", str), get(values, "model.id", str))
        yield Problem(
            key_paths("guards.stallTimeout"),
            f"{timeout} may end the training before its first step: starting and reading the model may take "
            f"{STARTING_STALL_TIMEOUT}, by the plan's estimate",
            f"Write {usual}, or leave it out to get the same.",
        )


def usual_stall_timeout(backend: str | None, model_id: str | None) -> str:
    """The default of guards.stallTimeout if train compiles nothing by itself.

    With xla a minute more for each GiB of weights beyond those of 8B: optimum-neuron draws random weights before it
    loads them, which takes 3 to 11 minutes for 8B and 25 to 110 for 70B (counted, not measured on Trainium).
    """
    if backend == "native":
        return NATIVE_STALL_TIMEOUT
    more = math.ceil(weights_gib(model_id or "") or 0) - STALL_TIMEOUT_GIB
    return f"{seconds(STALL_TIMEOUT) // 60 + more:.0f}m" if more > 0 else STALL_TIMEOUT


def model(values: Values) -> Iterator[Problem]:
    hub_id, path = get(values, "model.id", str), get(values, "model.path", str)
    if hub_id and path:
        yield Problem(key_paths("model.path", "model.id"), "model.id and model.path are both set", "Remove one.")
    elif hub_id == path == "":
        yield Problem(key_paths("model.id", "model.path"), "no model is set", "Write a Hub id or a path.")
    if path and get(values, "model.revision", str):
        yield Problem(
            key_paths("model.revision", "model.path"), "model.path cannot be combined with a revision", "Remove it."
        )


def dataset(values: Values) -> Iterator[Problem]:
    for key in ("dataset.source", "dataset.format"):
        if get(values, key, str) == "":
            yield Problem(key_paths(key), "is empty", "Remove it: the inputs set it.")
    split_off = get(values, "dataset.evalFraction", float) != 0
    apart = any(get(values, f"dataset.eval.{name}", str) for name in ("source", "split"))
    if get(values, "evaluation.enabled", bool) and not split_off and not apart:
        yield Problem(
            key_paths("evaluation.enabled", "dataset.evalFraction"),
            "evaluation is enabled, but no rows are held out",
            "Raise dataset.evalFraction above 0, or set dataset.eval.",
        )
    yield from held_out_source(values, apart)
    yield from splits(values)
    if get(values, "dataset.groupColumn", str) and (apart or not split_off):
        yield Problem(
            key_paths("dataset.groupColumn", "dataset.eval" if apart else "dataset.evalFraction"),
            "has no effect: " + ("dataset.eval says which rows are held out" if apart else "no rows are held out"),
            "Remove one of the two." if apart else "Raise dataset.evalFraction above 0, or remove it.",
        )
    format_ = get(values, "dataset.format", str)
    additional = (get(values, "dataset.additional", dict) or {}).values()
    formats = {format_, *(get(source, "format", str) or format_ for source in additional)}
    if get(values, "dataset.overlong", str) == "split" and formats - {"text", None, ""}:
        yield Problem(
            key_paths("dataset.overlong", "dataset.format"),
            "split applies to format text only",
            "Write truncate or drop.",
        )
    if get(values, "dataset.trainOn", str) == "last-answer" and formats == {"text"}:
        yield Problem(key_paths("dataset.trainOn", "dataset.format"), "format text has no answers", "Remove it.")


def splits(values: Values) -> Iterator[Problem]:
    """Splits with a part that has no rows, however many the source has."""
    dataset = get(values, "dataset", dict) or {}
    sources: list[tuple[KeyPath, Any]] = [((), dataset), (("eval",), dataset.get("eval"))]
    sources += [(("additional", name), other) for name, other in (get(dataset, "additional", dict) or {}).items()]
    for key, source in sources:
        split = get(source, "split", str) or ""
        if re.fullmatch(SPLIT, split) and any(part.is_empty() for part in split_parts(split)):
            what = f'"{one_line(split, 60)}" has a part without rows'
            fix = "Write the first row before the end, such as train[:10%]."
            yield Problem((("dataset", *key, "split"),), what, fix)


def held_out_source(values: Values, apart: bool) -> Iterator[Problem]:
    """dataset.eval: must say which rows, and not those that are trained on."""
    config, revision, split = (
        get(values, f"dataset.eval.{name}", str) or "" for name in ("config", "revision", "split")
    )
    if (config or revision) and not apart:
        name = "config" if config else "revision"
        yield Problem(
            key_paths(f"dataset.eval.{name}"), "has no effect without a source or split", "Write dataset.eval.split."
        )
    trained = {name: get(values, f"dataset.{name}", str) or "" for name in ("source", "config", "split")}
    same = (get(values, "dataset.eval.source", str) or "") in ("", trained["source"])
    if apart and same and config in ("", trained["config"]) and (split or "train") == (trained["split"] or "train"):
        yield Problem(
            key_paths("dataset.eval.split", "dataset.eval.source", "dataset.eval"),
            "the held-out rows are those that are trained on",
            "Write another split, or a part such as train[90%:] with dataset.split: train[:90%].",
        )


def held_out_loss(values: Values) -> Iterator[Problem]:
    """training.evalSteps needs held-out rows; the keys that depend on the held-out loss need evalSteps."""
    measures = get(values, "training.evalSteps", int) is not None
    apart = any(get(values, f"dataset.eval.{name}", str) for name in ("source", "split"))
    if measures and get(values, "dataset.evalFraction", float) == 0 and not apart:
        yield Problem(
            key_paths("training.evalSteps", "dataset.evalFraction"),
            "requires held-out rows, and no rows are held out",
            "Raise dataset.evalFraction above 0, or set dataset.eval.",
        )
    patience = get(values, "training.earlyStoppingPatience", int)
    wanted = {
        "loadBestModelAtEnd": get(values, "training.loadBestModelAtEnd", bool),
        "earlyStoppingPatience": patience,
    }
    for name in (name for name, value in wanted.items() if value and not measures):
        yield Problem(
            key_paths(f"training.{name}", "training.evalSteps"),
            "requires training.evalSteps, which measures the held-out loss",
            "Write training.evalSteps, or remove it.",
        )
    if get(values, "training.earlyStoppingThreshold", float) and patience is None:
        yield Problem(
            key_paths("training.earlyStoppingThreshold", "training.earlyStoppingPatience"),
            "has no effect without training.earlyStoppingPatience",
            "Write training.earlyStoppingPatience, or remove it.",
        )


def on_trainium(values: Values) -> bool:
    return trainium(get(values, "instance", str) or "") is not None


def attention(values: Values) -> Iterator[Problem]:
    length = get(values, "training.maxSequenceLength", int)
    if length is None:
        return
    wanted, backend = get(values, "training.attention", str) or "isolated", get(values, "backend", str)
    if backend == "xla" and not keeps_scores(wanted):
        yield from flash_length_problems(length, wanted)
    elif backend == "native":
        yield from native_rules.length_problems(length, wanted, "neuron" if on_trainium(values) else "cpu")


def instance_type(values: Values) -> Iterator[Problem]:
    """An instance type that cannot train, or not on so many nodes, and auto-resume where HyperPod does not have it."""
    name = get(values, "instance", str) or ""
    choices = of_same_service(name)
    if why := unsupported(name):
        yield Problem(key_paths("instance"), f"{one_line(name)} is {why}", f"Use {either([*choices])}, or cpu.")
    if reason := refusal(name, get(values, "parallelism.nodes", int) or 1):
        several = [other for other in choices if refusal(other, 2) is None]
        yield Problem(key_paths("parallelism.nodes", "instance"), reason, f"Use nodes: 1, or {either(several)}.")
    if name and not name.startswith(HYPERPOD) and get(values, "hyperpod.autoResume", bool):
        yield Problem(
            key_paths("hyperpod.autoResume", "instance"),
            f"requires an instance type of HyperPod, and instance is {one_line(name)}",
            f"Remove it, or write instance: {HYPERPOD}... as the HyperPod nodes are named.",
        )
    if get(values, "workload", str) == "trainjob" and get(values, "hyperpod.autoResume", bool):
        yield Problem(
            key_paths("hyperpod.autoResume", "workload"),
            "HyperPod resumes PyTorchJobs only, and workload is trainjob",
            "Remove it, or write workload: pytorchjob.",
        )


def parallelism(values: Values) -> Iterator[Problem]:
    names = ("nodes", "processesPerNode", "tensorParallelSize", "dataParallelSize")
    nodes, per_node, tensor, data = (get(values, f"parallelism.{name}", int) for name in names)
    if nodes and per_node and tensor and data:
        yield from process_problems(nodes, per_node, tensor, data)
    shard = get(values, "parallelism.shardSize", int) or 1
    yield from shard_problems(get(values, "backend", str), shard, data)


# Values that one backend has, and what to write for the other.
OF_ONE_BACKEND = {
    "compile.mode": ("off", "native", "layers"),
    "compile.onFallback": ("warn", "native", "refuse"),
    "compile.runsOn": ("cpu", "xla", "accelerator"),
}


def backend(values: Values) -> Iterator[Problem]:
    """Keys of the other backend, and backends that do not run on the instance type."""
    wanted, instance = get(values, "backend", str), get(values, "instance", str) or ""
    found = trainium(instance)
    if wanted == "xla" and instance and not found:
        yield Problem(
            key_paths("backend", "instance"),
            "backend xla requires a Trainium instance",
            "Write backend: native, or remove it.",
        )
    elif wanted == "native" and found and found.generation is TRN1:
        yield Problem(
            key_paths("backend", "instance"),
            f"backend native requires Trn2 or later; {instance} has Trn1",
            "Write backend: xla, or remove it.",
        )
    for key, (value, owner, other) in OF_ONE_BACKEND.items() if found else ():  # on CPUs they have no effect
        if wanted and wanted != owner and get(values, key, str) == value:
            what = f"{value} requires backend {owner}, and this run has backend {wanted}"
            yield Problem(key_paths(key, "backend"), what, f"Write {other}, or backend: {owner}.")


def process_groups(values: Values) -> Iterator[Problem]:
    """Process groups that the Neuron runtime does not support or neuronx_distributed cannot place, and processes that
    leave cores idle or have none.
    """
    name = get(values, "instance", str) or ""
    for key in ("parallelism.tensorParallelSize", "parallelism.shardSize"):
        if size := get(values, key, int):
            yield from group_problems(name, size, key)
    found, per_node = trainium(name), get(values, "parallelism.processesPerNode", int)
    if found and per_node and on_neuron(values) and per_node != (cores := logical_cores(values, row(found))):
        yield Problem(
            key_paths("parallelism.processesPerNode", "devices", "instance"),
            f"{per_node} processes, but the devices of {name} have {cores} logical cores, one process each",
            f"Write {cores}, or leave it out.",
        )


def weights(values: Values) -> Iterator[Problem]:
    """A known model whose weights alone do not fit the memory of a core. The planner counts all that a step needs."""
    found, model_id = trainium(get(values, "instance", str) or ""), get(values, "model.id", str) or ""
    names = ("tensorParallelSize", "shardSize", "dataParallelSize")
    size, shard, copies = (get(values, f"parallelism.{name}", int) or 1 for name in names)
    total = weights_gib(model_id) if found and on_neuron(values) else None
    if not found or total is None or total / (size * shard) <= (usable := row(found)["usableGib"]):
        return
    key, divided = ("shardSize", size) if get(values, "backend", str) == "native" else ("tensorParallelSize", 1)
    fitting = [
        each for each in found.groups if total / (divided * each) <= usable and (divided == 1 or copies % each == 0)
    ]
    yield Problem(
        key_paths(f"parallelism.{key}", "model.id", "instance"),
        f"{model_id} has {total / (size * shard):.1f} GiB of weights per core with tensorParallelSize {size} and "
        f"shardSize {shard}, and a core of {values['instance']} has {usable:.1f} GiB for them",
        f"Write {key}: {fitting[0]}, or more." if fitting else "Use a larger instance type or a smaller model.",
    )


def devices(values: Values) -> Iterator[Problem]:
    asked, found = get(values, "devices", dict), trainium(get(values, "instance", str) or "")
    if found and asked and NEURON not in asked:
        yield Problem(
            key_paths("devices", "instance"),
            f"instance {values['instance']} requires aws.amazon.com/neuron in devices",
            "Remove this override.",
        )
    for name, most in found.devices.items() if found else ():
        if (count := (asked or {}).get(name)) and isinstance(count, int) and count > most:
            yield Problem(
                (("devices", name), ("instance",)),
                f"{count} devices, but a node of {values['instance']} has {most}",
                f"Write {most}, or remove devices.",
            )
    for name in ("aws.amazon.com/neurondevice", "aws.amazon.com/neuroncore"):
        if name in (asked or {}):
            yield Problem(
                (("devices", name),),
                "the Neuron device plugin does not offer whole nodes under this name",
                "Use aws.amazon.com/neuron.",
            )


def neuron(values: Values) -> Iterator[Problem]:
    """The settings of compiler and runtime must be those of the instance type."""
    found, target = trainium(get(values, "instance", str) or ""), get(values, "neuron.target", str)
    size = get(values, "neuron.logicalCoreSize", int)
    if found and on_neuron(values) and target and target != found.generation.target:
        yield Problem(
            key_paths("neuron.target", "instance"),
            f"{target} is not the generation of {values['instance']}",
            f"Write {found.generation.target}, or remove it.",
        )
    elif found and on_neuron(values) and found.generation is TRN1 and size not in (None, 1):
        yield Problem(key_paths("neuron.logicalCoreSize"), f"{size} is not supported on trn1", "Write 1, or remove it.")
    nodes, asked = get(values, "parallelism.nodes", int) or 1, get(values, "devices", dict)
    if found and found.efa and on_neuron(values) and nodes > 1 and asked and "vpc.amazonaws.com/efa" not in asked:
        yield Problem(
            key_paths("devices", "parallelism.nodes"),
            f"{nodes} nodes require vpc.amazonaws.com/efa in devices",
            f"Write {found.efa}, the number of a node, or remove devices.",
        )


def guards(values: Values) -> Iterator[Problem]:
    """maxCost requires a price and must exceed the cost of stopping; stallTimeout must be a usable duration."""
    if get(values, "guards.maxCost", float) and not get(values, "guards.pricePerNodeHour", float):
        yield Problem(
            key_paths("guards.maxCost", "guards.pricePerNodeHour"),
            f"the price of a {values.get('instance', '')} node is unknown, so the cost cannot be counted",
            "Write guards.pricePerNodeHour, in dollars.",
        )
    most, price = get(values, "guards.maxCost", float), get(values, "guards.pricePerNodeHour", float)
    nodes = get(values, "parallelism.nodes", int) or 1
    grace = get(values, "stages.train.terminationGracePeriodSeconds", int) or TRAIN_GRACE_SECONDS
    if most and price and most <= (kept := nodes * grace / 3600 * price):
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
    elif timeout and on_trainium(values) and seconds(timeout) < seconds(SHORTEST_STALL_TIMEOUT):
        yield Problem(
            key_paths("guards.stallTimeout"),
            f"{timeout} ends every training before its first step: starting and reading the model takes longer",
            "Leave it out to get a default that is long enough.",
        )


def seconds(duration: str) -> int:
    """The seconds of a duration that DURATION matches."""
    return sum(
        int(number) * {"h": 3600, "m": 60, "s": 1}[unit] for number, unit in re.findall("([0-9]+)([hms])", duration)
    )


def storage(values: Values) -> Iterator[Problem]:
    """The rules of each storage kind, if the release creates a claim."""
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
    creates = get(values, "storage.fsx.createStorageClass", bool)
    unit = (
        FSX_TYPES.get(get(values, "storage.fsx.deploymentType", str) or "", {}).get("unit", 2400) if creates else 2400
    )
    if kind == "fsx" and (fitting := fsx_size(get(values, "storage.size", str) or "", unit)):
        yield Problem(
            key_paths("storage.size"),
            f"FSx for Lustre has no size of {one_line(values['storage']['size'])}",
            f"Use {fitting} (1200Gi, 2400Gi or a multiple of {unit}Gi).",
        )
    if kind == "fsx" and creates:
        yield from fsx_class(get(values, "storage.fsx", dict) or {})
    if kind == "fsx-static":
        for name in ("fileSystemId", "dnsName", "mountName"):
            if get(values, "storage.static", dict) is not None and not get(values, f"storage.static.{name}", str):
                yield Problem(
                    key_paths(f"storage.static.{name}", "storage.kind"),
                    f"kind fsx-static requires static.{name}",
                    "`aws fsx describe-file-systems` shows it.",
                )
    if kind == "fsx" and creates:
        for name, empty in (("subnetId", ""), ("securityGroupIds", [])):
            if get(values, f"storage.fsx.{name}", type(empty)) == empty:
                yield Problem(
                    key_paths("storage.fsx.createStorageClass", f"storage.fsx.{name}"),
                    f"requires storage.fsx.{name}",
                    f"Write chartValues.storage.fsx.{name}: that of the Trainium nodes.",
                )
    elif kind == "fsx" and get(values, "storage.storageClass", str) == "":
        yield Problem(
            key_paths("storage.storageClass"),
            "FSx for Lustre has no default storage class",
            "Write the class of the FSx CSI driver (often fsx-sc).",
        )


def fsx_class(fsx: Values) -> Iterator[Problem]:
    """Parameters of the storage class that FSx refuses for its deployment type."""
    type_, key = get(fsx, "deploymentType", str) or "", "storage.fsx."
    throughput, allowed = get(fsx, "perUnitStorageThroughput", int), FSX_TYPES.get(type_, {}).get("throughputs", [])
    if throughput and type_ in FSX_TYPES and throughput not in allowed:
        what = f"{type_} has no throughput of {throughput} MB/s per TiB" if allowed else f"{type_} has none to choose"
        fix = f"Write {either(allowed)}." if allowed else "Remove it."
        yield Problem(key_paths(f"{key}perUnitStorageThroughput", f"{key}deploymentType"), what, fix)
    if type_ == "PERSISTENT_2" and get(fsx, "fileSystemTypeVersion", str) == "2.10":
        what = "PERSISTENT_2 requires Lustre 2.12 or 2.15"
        yield Problem(key_paths(f"{key}fileSystemTypeVersion", f"{key}deploymentType"), what, "Write 2.15.")
    if type_.startswith("SCRATCH") and get(fsx, "kmsKeyId", str):
        what = f"{type_} has the key of FSx only"
        yield Problem(key_paths(f"{key}kmsKeyId", f"{key}deploymentType"), what, "Remove it, or use PERSISTENT_2.")
    import_path = get(fsx, "s3ImportPath", str) or ""
    for name in ("s3ImportPath", "s3ExportPath", "autoImportPolicy"):
        written = get(fsx, name, str)
        if written and type_ == "PERSISTENT_2":
            yield Problem(
                key_paths(f"{key}{name}", f"{key}deploymentType"),
                "PERSISTENT_2 requires a data repository association, which the FSx CSI driver does not make",
                "Use SCRATCH_2 or PERSISTENT_1, or make the association with aws fsx.",
            )
        elif written and not import_path:
            what = "has no effect without s3ImportPath"
            yield Problem(key_paths(f"{key}{name}"), what, "Write s3ImportPath, or remove it.")
        elif written and name == "s3ExportPath" and written.split("/")[2] != import_path.split("/")[2]:
            what = "is in another bucket than s3ImportPath"
            yield Problem(key_paths(f"{key}{name}", f"{key}s3ImportPath"), what, "Use the same bucket.")


def fsx_size(size: str, unit: int = 2400) -> str:
    """The next valid FSx size, above 2400Gi a multiple of ``unit``; empty if this one is valid or not a size."""
    match = re.match(r"^([1-9][0-9]{0,6})(Mi|Gi|Ti)$", size)
    if not match:
        return ""
    mebibytes = int(match[1]) * BINARY[match[2]] // BINARY["Mi"]
    small = next((each for each in (1200, 2400) if mebibytes <= each << 10), None)
    fitting = small or -(-mebibytes // (unit << 10)) * unit
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
            f"{nodes} nodes require ReadWriteMany",
            "Write [ReadWriteMany].",
        )


CHARTS_OWN = {  # environment variables that the chart sets, and what to do instead
    "LLAMA_LORA_WORKSPACE": ("is set by the chart", "Use chartValues.workspace.mountPath."),
    "LLAMA_LORA_IMAGE": ("is set by the chart", "Use image."),
    "LLAMA_LORA_GRACE_SECONDS": (
        "is set by the chart",
        "Use chartValues.stages.train.terminationGracePeriodSeconds.",
    ),
}
CACHE_FIX = ("is set by the chart", "Remove it: the cache is on the volume.")
CHARTS_OWN_ON_NEURON = {
    "NEURON_LOGICAL_NC_CONFIG": ("is set by the chart", "Use chartValues.neuron.logicalCoreSize."),
    **dict.fromkeys(
        ("XLA_USE_BF16", "XLA_DOWNCAST_BF16"),
        (
            "is deprecated since Neuron 2.25 and corrupts values that are kept in fp32",
            "Remove it: weights are loaded in bf16.",
        ),
    ),
}
CHARTS_OWN_OF = {
    "xla": {"NEURON_COMPILE_CACHE_URL": CACHE_FIX},
    "native": {
        "TORCH_NEURONX_NEFF_CACHE_DIR": CACHE_FIX,
        "NEURON_RT_VISIBLE_CORES": (
            "is set by TorchNeuron in each worker, and not with a value of the pod",
            "Remove it.",
        ),
    },
}
OF_THE_GRAPHS = ("NEURON_", "XLA_", "TORCH_NEURONX_", "NKI_")  # prefixes


def environment(values: Values) -> Iterator[Problem]:
    """Variables that extraEnv must not set, or must set alike in compile and train."""
    common = get(values, "stageDefaults", dict) or {}
    stages = get(values, "stages", dict) or {}
    on_neuron = on_trainium(values)
    own_on_neuron = CHARTS_OWN_ON_NEURON | CHARTS_OWN_OF.get(get(values, "backend", str), {})
    compiling = {"compile", "neff", "train"} if on_neuron else set()
    settings = {stage: merge(common, get(stages, stage, dict) or {}) for stage in compiling | set(stages)}
    extra = {stage: get(own, "extraEnv", dict) or {} for stage, own in settings.items()}  # of a stage, null is none
    for stage in sorted(extra):
        taken = CHARTS_OWN | (own_on_neuron if stage in compiling else {})
        for name in sorted(taken.keys() & extra[stage].keys()):
            yield Problem(variable(name, stage), *taken[name])
        if stage in compiling and "--cache_dir" in as_text(extra[stage].get("NEURON_CC_FLAGS")):
            what = "--cache_dir moves the compiler's cache away from where the stages look for it"
            yield Problem(variable("NEURON_CC_FLAGS", stage), what, "Remove --cache_dir.")
    for name in sorted(set(extra.get("compile", ())) | set(extra.get("train", ()))) if on_neuron else []:
        if name.startswith("NEURON_RT_") or name in own_on_neuron:
            continue
        if name.startswith(OF_THE_GRAPHS) and as_text(extra["compile"].get(name)) != as_text(extra["train"].get(name)):
            yield Problem(
                variable(name, "train", "compile"),
                "differs between compile and train, so train would need other graphs than compile made",
                "Set it in both, or in chartValues.stageDefaults.extraEnv.",
            )


def variable(name: str, *stages: str) -> tuple[KeyPath, ...]:
    return *(("stages", stage, "extraEnv", name) for stage in stages), ("stageDefaults", "extraEnv", name)


def as_text(value: Any) -> str:
    """The value as Helm's toString shows it, which the chart compares."""
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


JOBS_LABELS = r"controller-uid|job-name|batch\.kubernetes\.io/.*"  # by which a Job finds its pods


def pod_settings(values: Values) -> Iterator[Problem]:
    """Labels that the API server refuses, and capabilities that the runtime refuses."""
    blocks: list[tuple[KeyPath, Any]] = [(("stageDefaults",), values.get("stageDefaults"))]
    blocks += [(("stages", stage), block) for stage, block in (get(values, "stages", dict) or {}).items()]
    labels: list[tuple[KeyPath, Any]] = [(("commonLabels",), get(values, "commonLabels", dict))]
    labels += [((*key, "podLabels"), get(block, "podLabels", dict)) for key, block in blocks]
    for above, written in labels:
        for name in written or {}:
            if re.fullmatch(JOBS_LABELS, name):
                yield Problem(((*above, name),), "is a label that Jobs give their pods themselves", "Remove it.")
    for key, block in blocks:
        for name, added in (get(block, "capabilities", dict) or {}).items():
            if added is True and name in ("ALL", "SYS_ADMIN", "CAP_SYS_ADMIN"):
                what = "is refused by Kubernetes, because the pods forbid privilege escalation"
                yield Problem(((*key, "capabilities", name),), what, "Remove it.")
            elif added is True and name.startswith("CAP_"):
                what = "has the prefix CAP_, which Kubernetes adds itself"
                yield Problem(((*key, "capabilities", name),), what, f"Write {name.removeprefix('CAP_')}.")


HUGE_PAGES = {"hugepages-2Mi": 2 * BINARY["Mi"], "hugepages-1Gi": BINARY["Gi"]}


def quantity(amount: Any) -> float:
    """A Kubernetes quantity as a number; 0 for anything else."""
    found = re.fullmatch(rf"([0-9]+(?:\.[0-9]+)?)({'|'.join(UNITS)})?", str(amount))
    return float(found[1]) * UNITS.get(found[2], 1) if found else 0


def resources(values: Values) -> Iterator[Problem]:
    """Requests beyond their limits, and huge pages, of which Kubernetes reserves whole pages, as many as the limit."""
    defaults = get(values, "stageDefaults", dict) or {}
    for stage, block in (get(values, "stages", dict) or {}).items():
        usual = {} if stage in ("compile", "train") else defaults  # theirs follow the instance type and what is written
        of_stage = merge(usual, block) if isinstance(block, dict) else {}
        requests, limits = (get(of_stage, f"resources.{bound}", dict) or {} for bound in ("requests", "limits"))
        for name in [name for name in {**requests, **limits} if isinstance(name, str)]:
            keys = tuple(
                (*above, "resources", bound, name)
                for above in (("stages", stage), ("stageDefaults",))
                for bound in ("requests", "limits")
            )
            request, limit, page = quantity(requests.get(name)), quantity(limits.get(name)), HUGE_PAGES.get(name)
            if page and request and request != limit:
                yield Problem(keys, "requires the same request and limit", "Write the same amount for both.")
            elif page and (request or limit) % page:
                what = f"is not a multiple of {name.removeprefix('hugepages-')}, the size of a page"
                yield Problem(keys, what, "Write a number of whole pages.")
            elif limits.get(name) is not None and request > limit:
                yield Problem(keys, "the request is more than the limit", "Raise the limit or lower the request.")


def publish(values: Values) -> Iterator[Problem]:
    """Where results are uploaded, and with which token."""
    adapter, merged = (get(values, f"publish.hub.{name}", str) or "" for name in ("adapter", "merged"))
    own_secret = get(values, "publish.hub.tokenSecret", str) or ""
    if adapter and adapter == merged:
        yield Problem(
            key_paths("publish.hub.merged", "publish.hub.adapter"),
            f"publish.hub.adapter and publish.hub.merged are both {one_line(adapter)}",
            "Use a repository for each: a model card describes one model.",
        )
    if (adapter or merged) and not (own_secret or get(values, "huggingFace.tokenSecret", str)):
        yield Problem(
            key_paths("publish.hub.tokenSecret", "publish.hub.merged" if merged else "publish.hub.adapter"),
            "publish.hub.tokenSecret is required to write to the Hub",
            "Set it, or huggingFace.tokenSecret, to the name of a Secret with a token that may write.",
        )
    if own_secret and not (adapter or merged):
        yield Problem(
            key_paths("publish.hub.tokenSecret"),
            "publish.hub.tokenSecret has no effect without publish.hub.adapter or publish.hub.merged",
            "Set one of them, or remove it.",
        )
    only_report = get(values, "publish.s3.artifacts", list) == ["report"]
    if get(values, "publish.s3.uri", str) and only_report and get(values, "evaluation.enabled", bool) is False:
        yield Problem(
            key_paths("publish.s3.artifacts", "evaluation.enabled"),
            "publish.s3.artifacts has only the report, which is not written with evaluation.enabled false",
            "Add adapter or merged, or set evaluation.enabled to true.",
        )


def monitoring(values: Values) -> Iterator[Problem]:
    """A tracker without its server, and a Secret that nothing reads."""
    monitored = get(values, "monitoring", dict) or {}
    blocks = (get(values, f"{block}.extraEnv", dict) or {} for block in ("stages.train", "stageDefaults"))
    if monitored.get("mlflow") is True and not any(block.get("MLFLOW_TRACKING_URI") for block in blocks):
        yield Problem(
            key_paths("monitoring.mlflow"),
            "monitoring.mlflow requires stages.train.extraEnv.MLFLOW_TRACKING_URI",
            "Set it, below chartValues in an inputs file, to the URL of the tracking server.",
        )
    if monitored.get("secretName") and not any(monitored.get(key) for key in MONITORS):
        yield Problem(
            key_paths("monitoring.secretName"),
            "monitoring.secretName has no effect: nothing is monitored",
            f"Set one of {', '.join(f'monitoring.{key}' for key in MONITORS)}, or remove it.",
        )


# Values of switches such as HF_HUB_DISABLE_IMPLICIT_TOKEN, which are no secrets.
SWITCHES = ("", "0", "1", "true", "false", "yes", "no", "on", "off")


def kueue(values: Values) -> Iterator[Problem]:
    """A priority without a queue to have it in."""
    if get(values, "kueue.priorityClass", str) and not get(values, "kueue.queueName", str):
        yield Problem(
            key_paths("kueue.priorityClass", "kueue.queueName"),
            "kueue.priorityClass has no effect without kueue.queueName",
            "Set kueue.queueName to a LocalQueue, or remove kueue.priorityClass.",
        )


def secret_names(values: Values) -> Iterator[Problem]:
    """A token where the name of its Secret belongs; the chart's schema lacks these patterns (schemas.HIDDEN)."""
    for key in sorted(SECRET_KEYS):
        name = get(values, ".".join(key), str)
        pattern, what = (r"[-._a-zA-Z0-9]+", "key in a") if key[-1] == "tokenKey" else (rf"({DNS_NAME})?", "name of a")
        if name is not None and not re.fullmatch(pattern, name):
            yield Problem((key,), f"is not a valid {what} Secret", "Never write the token itself here.")


def secrets(values: Values) -> Iterator[Problem]:
    """Secrets in environment variables: anyone who can read the release can read its values."""
    stages = get(values, "stages", dict) or {}
    blocks: list[tuple[KeyPath, Any]] = [(("stages", stage), block) for stage, block in stages.items()]
    for key, block in [(("stageDefaults",), values.get("stageDefaults")), *blocks]:
        for name, value in (get(block, "extraEnv", dict) or {}).items():
            if SECRET_NAME.search(name) and as_text(value).lower() not in SWITCHES:
                yield Problem(
                    ((*key, "extraEnv", name),), "looks like a secret, which must not be in values", SECRETS_FIX
                )


def extra_objects(values: Values) -> Iterator[Problem]:
    """Objects that the chart refuses, as far as they are no templates; the chart also knows the names of its own."""
    taken: dict[tuple[str, ...], str] = {}
    for name, extra in sorted((get(values, "extraObjects", dict) or {}).items()):
        version, kind = get(extra, "apiVersion", str) or "", get(extra, "kind", str) or ""
        namespace, called = (get(extra, f"metadata.{key}", str) or "" for key in ("namespace", "name"))
        same = (version.rpartition("/")[0], kind, namespace, called or name)
        key = (("extraObjects", name),)
        if not (version and kind):
            yield Problem(key, "has no apiVersion or kind", "Write both, e.g. {apiVersion: v1, kind: ConfigMap}.")
        elif kind == "Secret":
            what = "is a Secret, whose content anyone could read who can read the release"
            yield Problem(key, what, "Use kubectl create secret, or an operator such as External Secrets.")
        elif kind.endswith("List"):
            what = f"is a {one_line(kind)}, whose items the chart does not check"
            yield Problem(key, what, "Write each item as an object of its own, without Secrets.")
        elif same in taken:
            what = f"is {one_line(kind)} {one_line(same[-1])}, as is extraObjects.{one_line(taken[same])}"
            yield Problem(key, what, "Remove one of them, or write another metadata.name.")
        taken[same] = name


# YAML does not allow them, and Helm's toYaml does not escape them: it returns "" for a value that contains one, and
# makes U+0085, a line break, a space.
NOT_IN_YAML = re.compile("[\x7f-\x9f\ufffe\uffff]")


def characters(value: Any, key: KeyPath = ()) -> Iterator[Problem]:
    """Characters that Helm cannot render, in any name or text."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from characters(name, key)
            yield from characters(inner, (*key, name))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from characters(inner, (*key, index))
    elif isinstance(value, str) and (found := NOT_IN_YAML.search(value)):
        what = f"contains the character U+{ord(found[0]):04X}, with which Helm cannot render YAML"
        yield Problem((key,), what, "Remove it.")
