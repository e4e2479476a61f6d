"""Check an inputs file: by its JSON schema, then by the rules that span keys. All errors are reported at once."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from genvalues.accelerators.instances import CPU, HYPERPOD, NAMES, default_backend, refusal
from genvalues.accelerators.neuron_rules import target_problems
from genvalues.common.dicts import get, merge, without_null
from genvalues.common.errors import UserError
from genvalues.common.problems import Problem
from genvalues.common.text import SECRET_KEYS, TOKEN, KeyPath, has_surrogate, one_line
from genvalues.inputs.chart import written_in_chart_values
from genvalues.inputs.document import Document, Mistake
from genvalues.inputs.schema_errors import MISSING, UNKNOWN, schema_mistakes, shown
from genvalues.settings.base import HUB_ID
from genvalues.settings.dataset_files import CHAINED, files_of, is_chained, is_saved
from genvalues.settings.datasets import (
    BUCKET,
    BUCKET_RULES,
    COLUMNS,
    FILES,
    MODEL_SUFFIXES,
    OPTIONAL_COLUMNS,
    OTHER_SUFFIXES,
    REQUIRED_COLUMNS,
    file_format,
    hub_id_of,
    invalid_bucket,
    is_glob,
    is_path,
    is_prefix,
    is_url,
    on_s3,
    row_format,
    split_parts,
)
from genvalues.settings.images import split_image
from genvalues.settings.inputs import HuggingFaceInputs, Inputs, inputs_from
from genvalues.settings.run import with_own_words
from genvalues.settings.shared import DURATION
from genvalues.settings.value_rules import DEFAULT_MOUNT, contradictions

LONGEST_NAME = 255  # bytes of a file name, the limit of ext4, XFS and Lustre
STAGES_WITH_MOUNTS = ("stageDefaults", "stages.resolve", "stages.tokenize")  # whose pods read the dataset's file


def check(document: Document, more: Callable[[Inputs], Iterable[Mistake]] = lambda inputs: ()) -> Inputs:
    """Return the inputs. Raises UserErrors with every error in them.

    ``more``: further errors of the inputs without the keys that have one. They are not asked for if such a key is one
    that a later error may come from.
    """
    if is_values_file(document.value):
        document.raise_mistakes([VALUES_FILE])
    found = [*schema_mistakes(document.value), *tokens(document.value)]
    if document.all_files_read:
        told_by_schema = {mistake.key for mistake in found} & SECRET_KEYS  # which the chart's schema does not check
        found += [mistake for mistake in rule_mistakes(document) if mistake.key not in told_by_schema]
    else:  # the file that could not be read may have the missing keys, or change those that conflict
        found = [mistake for mistake in found if mistake.what != MISSING]
    # A value that could not be read has an error already; do not report its type as well.
    read_badly = {mistake.key for mistake in document.mistakes if not document.holds(mistake.key)}
    told = [mistake for mistake in found if mistake.what == UNKNOWN or mistake.key not in read_badly]
    told += document.mistakes
    if told and all(mistake.key and mistake.key[0] in NOT_PLANNED_BY for mistake in told):
        rest = without(document.value, {mistake.key for mistake in told})
        told += () if any(schema_mistakes(rest)) else more(inputs_from(rest))
    document.raise_mistakes(told)
    return inputs_from(document.value)


# The plan depends on none of these, or (parallelism) only becomes freer without them.
NOT_PLANNED_BY = {
    *("name", "image", "parallelism", "probe", "rehearse", "evaluation", "publish", "monitoring", "verify", "guards"),
    *("storage", "kueue", "huggingFace", "mode", "chartValues"),
}


def without(value: Any, keys: set[KeyPath], above: KeyPath = ()) -> Any:
    """The value without these keys, or without the list around them."""
    if not isinstance(value, dict):
        return value
    inner = {name: (*above, name) for name in value}
    kept = [name for name, key in inner.items() if key not in keys]
    kept = [n for n in kept if not isinstance(value[n], list) or all(key[: len(inner[n])] != inner[n] for key in keys)]
    return {name: without(value[name], keys, inner[name]) for name in kept}


VALUES_FILE = Mistake(
    (),
    "this is a values file of the chart, not an inputs file",
    "Name the inputs file that it was written from; Helm checks values: helm template chart -f FILE.",
)


def is_values_file(value: dict[str, Any]) -> bool:
    """Whether a file has the keys of the chart's values, in forms that an inputs file does not have."""
    from genvalues.settings.values import Values

    model, image = value.get("model"), value.get("image")
    keys = {block: {block.key_of(name) for name in block.model_fields} for block in (Values, Inputs)}
    if not isinstance(model, dict) or isinstance(image, str) or not value.keys() <= keys[Values]:
        return False
    return bool("id" in model or isinstance(image, dict) or value.keys() - keys[Inputs])


# --- by the rules that span keys


def rule_mistakes(document: Document) -> Iterator[Mistake]:
    """The errors that span keys. A key of the wrong type counts as left out: the schema has reported it."""
    value = document.value
    instance = get(value, "instance", str) or ""
    if instance and instance not in NAMES:
        return
    on_cpu = instance == CPU
    if instance:
        yield from instance_rules(value, instance, on_cpu)
        yield from path_rules(document, on_cpu)
    model = get(value, "model", str) or ""
    if model.lower().endswith(MODEL_SUFFIXES):
        yield Mistake(("model",), f"{shown(model, ())} looks like a file", "Write {path: ...} for a file or folder.")
    yield from dataset_rules(document)
    yield from image_rules(value)
    yield from storage_rules(value)
    for found in contradictions(values_so_far(value)):
        yield placed(found, document)


def instance_rules(value: dict[str, Any], instance: str, on_cpu: bool) -> Iterator[Mistake]:
    if on_cpu:
        return
    if "image" not in value or value["image"] is None:
        yield Mistake(("image",), "missing", f"{instance} requires the image that you built, with tag or digest.")
    if value.get("cpu") is not None:
        yield Mistake(("cpu",), f"applies to instance: cpu only, not to {instance}", "Remove it.")
    if reason := refusal(instance, get(value, "nodes", int) or 1):
        prefix = HYPERPOD if instance.startswith(HYPERPOD) else ""
        yield Mistake(("nodes",), reason, f"Use nodes: 1, or {prefix}trn1.32xlarge or {prefix}trn2.48xlarge.")
    backend = get(with_own_words(value), "backend", str) or default_backend(instance)
    targets = [target for target in get(value, "lora.targetModules", list) or [] if isinstance(target, str)]
    for problem in target_problems(targets) if backend == "xla" else ():
        yield Mistake(problem.keys[0], problem.what, problem.fix)


def dataset_rules(document: Document) -> Iterator[Mistake]:
    dataset = get(document.value, "dataset", dict) or {}
    for key, part in dataset_parts(dataset):
        yield from source_rules(key, part, document)
        format_ = get(part, "format", str) or ""
        columns = get(part, "columns", dict) or {}
        allowed = [*REQUIRED_COLUMNS.get(format_, []), *OPTIONAL_COLUMNS.get(format_, [])]
        for name in columns:
            if allowed and name in COLUMNS and name not in allowed:
                yield Mistake(
                    (*key, "columns", name), f"format {format_} has no such column", f"(columns: {', '.join(allowed)})"
                )


def dataset_parts(dataset: dict[str, Any]) -> Iterator[tuple[KeyPath, dict[str, Any]]]:
    """Each source of the dataset block with its key: complete with the format, and the source where it is another's."""
    source = get(dataset, "source", str) or ""
    format_ = row_format(get(dataset, "format", str), source)
    yield ("dataset",), {**dataset, "source": source, "format": format_}
    for name, other in (get(dataset, "additional", dict) or {}).items():
        if isinstance(other, dict):
            yield ("dataset", "additional", name), {"format": format_, **without_null(other)}
    held_out = get(dataset, "eval", dict) or {}
    if get(held_out, "source", str) or get(held_out, "split", str):
        yield ("dataset", "eval"), {**held_out, "source": get(held_out, "source", str) or source, "format": format_}


def source_rules(key: KeyPath, part: dict[str, Any], document: Document) -> Iterator[Mistake]:
    source, format_ = get(part, "source", str) or "", get(part, "format", str)
    place = (*key, "source")
    here = is_path(source) or exists(source, document, place)
    if file_format(source) == "text" and format_ in REQUIRED_COLUMNS and format_ != "text":
        yield Mistake((*key, "format"), f"a .txt file has no columns for {format_}", "Write format: text.")
    if here or on_s3(source):
        for name in ("config", "revision"):
            if get(part, name, str):
                yield Mistake((*key, name), "applies to Hub datasets only, and this is a file", "Remove it.")
        named = {each.name for each in split_parts(get(part, "split", str) or "")}
        if (file_format(source) or is_glob(source)) and named - {"train"}:
            what = f"{shown(source, ())} has the split train only"
            yield Mistake((*key, "split"), what, "Name a folder with train and test files, or write train[...].")
    if is_url(source):
        yield url_mistake(place, source, "datasets")
    elif on_s3(source) and (bucket := invalid_bucket(source)) is not None:
        what = f"{shown(bucket, ())} is not a valid name of a bucket"
        yield Mistake(place, what, f"A bucket's name has {BUCKET_RULES}.")
    elif on_s3(source):
        matched = re.match(rf"^s3://{BUCKET}/([^\s?#]+)$", source)
        if not matched or not (file_format(source) or is_prefix(source)):
            fix = f"Write s3://bucket/key of a file, s3://bucket/prefix/ or a glob. {FILES}"
            yield Mistake(place, f"{shown(source, ())} is not data in S3", fix)
    elif source.lower().endswith(OTHER_SUFFIXES) and not file_format(source):
        yield Mistake(place, f"{shown(source, ())} has an unsupported file format", FILES)
    elif source and not here and not re.match(rf"^{HUB_ID}$", source):
        yield Mistake(place, f"{shown(source, ())} is not a Hub id, an s3:// URI, a file or a folder", FILES)


def url_mistake(key: KeyPath, url: str, kind: str) -> Mistake:
    """The error of a web address where a stage reads the Hub, S3 or files."""
    named = hub_id_of(url, kind)
    there = f"Copy the file to S3, or to the volume. {FILES}" if kind == "datasets" else "Write a Hub id."
    return Mistake(
        key, f"{shown(url, ())} is a web address, which the stages do not read", f"Write {named}." if named else there
    )


def exists(source: str, document: Document, key: KeyPath) -> bool:
    """Whether a source that looks like a Hub id is a file or folder beside the inputs file: then it is that."""
    if not source or "://" in source or "\0" in source:
        return False
    return os.path.exists(absolute(source, document.position(key).folder))  # noqa: PTH110 - which never raises


def path_rules(document: Document, on_cpu: bool) -> Iterator[Mistake]:
    """Check the paths. The stages read them: in pods, which cannot read this machine's files, or on this machine."""
    value = document.value
    mount = get(value, "chartValues.workspace.mountPath", str) or DEFAULT_MOUNT
    for key, path in paths(value, document):
        if is_url(path):
            yield url_mistake(key, path, "models")
            continue
        if "\0" in path or any(len(name.encode(errors="replace")) > LONGEST_NAME for name in path.split("/")):
            yield Mistake(
                key,
                f"{shown(path, ())} is not a valid path: a NUL byte, or a name of more than {LONGEST_NAME} bytes",
                "Write the path of the file or folder.",
            )
            continue
        there = PurePosixPath(posixpath.normpath(path))
        on_volume = PurePosixPath(mount) in there.parents
        here = absolute(path, document.position(key).folder)
        if on_cpu and has_surrogate(str(here)):
            what = f"{one_line(str(here), 200)} is in a folder whose name is not UTF-8"
            yield Mistake(key, what, "Rename the folder, or move the file.")
        elif not on_cpu and not on_volume:
            yield Mistake(
                key,
                f"{one_line(path)} is a path on this machine, and the pods on {value['instance']} cannot read it",
                f"Use a Hub id, s3://, or an absolute path under {mount}, the volume.",
            )
        elif on_cpu and not on_volume and key[0] == "dataset" and (lacks := lacking(path, document, key)):
            yield lacks
        elif on_cpu and not there.is_absolute():
            if not os.path.exists(here) and not is_glob(path):  # noqa: PTH110 - which never raises
                yield Mistake(
                    key,
                    f"no such file or folder: {one_line(str(here), 200)}",
                    "Write an absolute path, or one relative to the directory of the inputs file (with --set: to the "
                    "working directory).",
                )
            elif PurePosixPath(mount) in PurePosixPath(here).parents:
                yield Mistake(
                    key,
                    f"{one_line(str(here), 200)} is under {mount}, where the stages mount their volume",
                    "Move it elsewhere, or set chartValues.workspace.mountPath to another directory.",
                )


def unseen_by_pods(values: dict[str, Any]) -> Iterator[Problem]:
    """Paths of this machine, which pods cannot read. `genvalues local` can."""
    mount = get(values, "workspace.mountPath", str) or DEFAULT_MOUNT
    stages = [get(values, "stageDefaults", dict), *(get(values, "stages", dict) or {}).values()]
    volumes = [volume for stage in stages for volume in (get(stage, "extraVolumeMounts", dict) or {}).values()]
    folders = [PurePosixPath(mount), *(PurePosixPath(get(volume, "mountPath", str) or mount) for volume in volumes)]
    for key, path in paths(values):
        there = PurePosixPath(posixpath.normpath(path))
        if not any(folder in (there, *there.parents) for folder in folders):
            what = f"{one_line(path, 200)} is not on the volume ({mount}): pods cannot read files of this machine"
            elsewhere = "a Hub id" if key == ("model", "path") else "a Hub id, s3://,"
            fix = f"`genvalues local` can use it; for a cluster use {elsewhere} or an absolute path under {mount}."
            yield Problem((key,), what, fix)


def lacking(path: str, document: Document, key: KeyPath) -> Mistake | None:
    """The error of data that does not exist or is empty; None if the stages mount a volume for it."""
    mounts = [get(document.value, f"chartValues.{where}.extraVolumeMounts", dict) for where in STAGES_WITH_MOUNTS]
    here = absolute(path, document.position(key).folder)
    if any(mounts):
        return None
    try:
        if is_chained(here) and is_saved(here):
            return Mistake(key, f"{CHAINED}: {one_line(str(here), 200)}", "Rename the folder.")
        found = files_of(str(here))
    except UserError as error:
        return Mistake(key, f"{one_line(error.where, 200)}: {error.what}", error.fix)
    except OSError:
        return None  # the stage may be allowed to read it
    if found:
        empty = not any(os.path.getsize(file.path) for file in found)  # noqa: PTH202
        what, fix = "the file is empty", "Name a file with rows."
        return Mistake(key, f"{what}: {one_line(str(here), 200)}", fix) if empty else None
    if is_glob(path):
        return Mistake(key, f"no file matches {one_line(str(here), 200)}", "Write the path of existing files.")
    if not path.startswith("/"):
        return None  # told as every other relative path
    what, fix = "no such file or folder", "Write the path of an existing file or folder, or one on the volume."
    return Mistake(key, f"{what}: {one_line(str(here), 200)}", fix)


def image_rules(value: dict[str, Any]) -> Iterator[Mistake]:
    image = get(value, "image", str)
    if not image:
        return
    _, tag, digest = split_image(image)
    if not tag and not digest:
        yield Mistake(
            ("image",), "has no tag or digest", "Add :0.1.0 or @sha256:..., so that every stage runs the same."
        )
    elif tag == "latest" and not digest:
        yield Mistake(("image",), "the tag latest can change between stages", "Pin a version's tag or a digest.")


def storage_rules(value: dict[str, Any]) -> Iterator[Mistake]:
    storage = get(value, "storage", dict) or {}
    if storage.get("existingClaim"):
        for name in ("kind", "size", "storageClass", "static"):
            if storage.get(name):
                yield Mistake(("storage", name), "cannot be combined with existingClaim", "Remove one of the two.")
        return
    kind = storage.get("kind") or ("generic" if get(value, "instance", str) == CPU else "fsx")
    if kind == "fsx-static" and not storage.get("static"):
        yield Mistake(("storage", "static"), "missing", "kind fsx-static requires {fileSystemId, dnsName, mountName}.")
    if kind != "fsx-static" and storage.get("static"):
        yield Mistake(
            ("storage", "static"),
            f"applies to kind fsx-static only, not to {one_line(str(kind))}",
            "Remove it or change kind.",
        )


def values_so_far(value: dict[str, Any]) -> dict[str, Any]:
    """The values as far as they are known before all errors are fixed: the sections that inputs and values share."""
    named = ("dataset", "training", "compile", "evaluation", "storage", "guards", "publish", "monitoring", "kueue")
    sections = {name: value[name] for name in named if isinstance(value.get(name), dict)}
    if guards := sections.get("guards"):
        sections["guards"] = {key: written for key, written in guards.items() if can_be_judged(key, guards)}
    if shard := get(value, "parallelism.shardSize", int):
        sections["parallelism"] = {"shardSize": shard}
    instance = get(value, "instance", str)
    below: dict[str, Any] = {"storage": {"kind": "generic" if instance == CPU else "fsx"}}
    default_secret = {} if instance == CPU else HuggingFaceInputs().as_keys()
    below["huggingFace"] = (get(value, "huggingFace", dict) or {}) if "huggingFace" in value else default_secret
    if instance:
        below["instance"] = instance
        below["backend"] = get(value, "backend", str) or default_backend(instance)
    below = merge(below, without_null(sections))
    return with_own_words(without_null(merge(below, get(value, "chartValues", dict) or {})))


def can_be_judged(key: str, guards: dict[str, Any]) -> bool:
    """Whether a guard is final: the price list may still add a price, and the schema reports an invalid duration."""
    if key == "maxCost":
        return get(guards, "pricePerNodeHour", float) is not None
    return key != "stallTimeout" or bool(re.fullmatch(DURATION, get(guards, key, str) or ""))


def placed(found: Problem, document: Document) -> Mistake:
    """Place a problem where the user wrote the key: under chartValues, which are merged last, or in the inputs."""
    chart_values = get(document.value, "chartValues", dict) or {}
    for key in found.keys:
        if written_in_chart_values(key, chart_values):
            return Mistake(("chartValues", *key), found.what, found.fix)
    key = next((key for key in found.keys if key in document.positions), found.keys[0])
    return Mistake(key, found.what, found.fix)


def tokens(value: Any, key: KeyPath = ()) -> Iterator[Mistake]:
    """Tokens anywhere in the file: they would end up in the release and in logs."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from tokens(inner, (*key, name))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from tokens(inner, (*key, index))
    elif isinstance(value, str) and TOKEN.search(value) and key not in SECRET_KEYS:
        yield Mistake(
            key, "looks like a token", "Put a Hugging Face token in a Secret and name that in huggingFace.tokenSecret."
        )


# --- shared by the rules and the values


def paths(value: dict[str, Any], document: Document | None = None) -> Iterator[tuple[KeyPath, str]]:
    """The keys that hold a path, with the path. With ``document``, also sources that exist beside the inputs file."""
    if model := get(value, "model.path", str):
        yield ("model", "path"), model
    dataset = get(value, "dataset", dict) or {}
    sources: list[tuple[KeyPath, Any]] = [((), dataset), (("eval",), dataset.get("eval"))]
    sources += [(("additional", name), other) for name, other in (get(dataset, "additional", dict) or {}).items()]
    for above, part in sources:
        key, source = ("dataset", *above, "source"), get(part, "source", str) or ""
        if is_path(source) or (document and exists(source, document, key)):
            yield key, source


def absolute(path: str, folder: Path) -> Path:
    """Resolve a path relative to the directory of the file it is written in."""
    return Path(os.path.realpath(folder / os.path.expanduser(path)))  # noqa: PTH111 - which never raises
