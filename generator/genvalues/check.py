"""Every mistake of an inputs file at once: by the JSON schema, then by the rules that span keys."""

from __future__ import annotations

import difflib
import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import jsonschema
import pydantic
from jsonschema.exceptions import ValidationError

from genvalues.document import SECRET_KEYS, TOKEN, Document, KeyPath, Mistake, dotted, one_line
from genvalues.inputs import SCHEMA, Inputs
from genvalues.instances import CPU, HYPERPOD, NAMES, trainium

FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
REQUIRED_COLUMNS = {
    "text": ["text"],
    "instruction": ["instruction", "output"],
    "prompt-completion": ["prompt", "completion"],
    "chat": ["messages"],
}
OPTIONAL_COLUMNS = {"instruction": ["input"]}
DEFAULT_MOUNT = "/workspace"
ALSO_CALLED = {  # names from other tools for ours
    "rank": "r",
    "lorar": "r",
    "loraalpha": "alpha",
    "loradropout": "dropout",
    "lr": "learningRate",
    "lrschedulertype": "lrScheduler",
    "scheduler": "lrScheduler",
    "batchsize": "perDeviceBatchSize",
    "perdevicetrainbatchsize": "perDeviceBatchSize",
    "maxlength": "maxSequenceLength",
    "maxseqlength": "maxSequenceLength",
    "modulestosave": "targetModules",
    "numtrainepochs": "epochs",
    "instancetype": "instance",
    "modelid": "model",
    "modelname": "model",
    "numnodes": "nodes",
    "nodecount": "nodes",
    "steps": "maxSteps",
    "token": "tokenSecret",
    "values": "chartValues",
}


def check(document: Document) -> Inputs:
    """The inputs, or every mistake in them."""
    mistakes = [*document.mistakes, *schema_mistakes(document.value), *rule_mistakes(document), *tokens(document.value)]
    document.raise_mistakes(first_of_each_place(mistakes, document))
    try:
        return Inputs.model_validate(document.value)
    except pydantic.ValidationError as error:  # in JSON schema, as Python reads it, $ lets a last line break through
        keys = [problem["loc"] for problem in error.errors()]
        # A place in the model may be deeper than in the file: ("model", "ModelPath")
        keys = [next(key[:end] for end in range(len(key), -1, -1) if key[:end] in document.positions) for key in keys]
        document.raise_mistakes(Mistake(key, pattern_words(key, get(document.value, dotted(key), str))) for key in keys)
        raise


def first_of_each_place(mistakes: list[Mistake], document: Document) -> Iterator[Mistake]:
    """A value that YAML itself made senseless is not also told that its type is wrong."""
    read_badly = {mistake.key for mistake in document.mistakes if mistake.key}
    for mistake in mistakes:
        if mistake in document.mistakes or mistake.key not in read_badly:
            yield mistake


# --- by the schema


def schema_mistakes(value: Any) -> Iterator[Mistake]:
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    validator = jsonschema.Draft202012Validator(schema)
    for error in validator.iter_errors(value):
        yield from explain(error, schema)


def items_of(branch: dict[str, Any], schema: dict[str, Any]) -> list[Any]:
    """What a list may hold, where the schema names it all."""
    items: dict[str, Any] = resolve(resolve(branch, schema).get("items", {}), schema)
    return list(items.get("enum", []))


def explain(error: ValidationError, schema: dict[str, Any], above: KeyPath = ()) -> Iterator[Mistake]:
    """One error of the validator in words, with what to write instead."""
    key: KeyPath = (*above, *error.path)
    keyword = str(error.validator)
    found: Any = error.instance
    wanted: Any = error.validator_value
    rules: Any = error.schema
    described = purpose(rules)
    if keyword == "anyOf" and any(found in items_of(branch, schema) for branch in wanted):
        yield Mistake(key, f"must be a list, not {shown(found, key)}", f"Write [{found}].")
    elif keyword == "anyOf":
        fitting = [branch for branch in wanted if type_fits(found, resolve(branch, schema))]
        if len(fitting) == 1:
            index = wanted.index(fitting[0])
            for inner in error.context or []:
                if inner.relative_schema_path[0] == index:
                    yield from explain(inner, schema, key[: len(key)])
        else:
            types = [kind for branch in wanted if (kind := type_words(resolve(branch, schema)))]
            yield Mistake(key, f"must be {either(types)}, not {shown(found, key)}", described)
    elif keyword == "additionalProperties":
        properties = rules["properties"]
        for name in found:
            if name not in properties:
                needed = [key for key in rules.get("required", []) if key not in found]
                yield Mistake((*key, name), "unknown key", did_you_mean(name, key, properties, needed, schema))
    elif keyword == "required":
        for name in wanted:
            if name not in found:
                yield Mistake((*key, name), "missing", purpose(rules["properties"][name]) or f"Write {name}: ...")
    elif keyword == "type":
        yield Mistake(key, f"must be {type_words(rules)}, not {shown(found, key)}", described)
    elif keyword in ("enum", "const"):
        choices = wanted if keyword == "enum" else [wanted]
        beginning = [choice for choice in choices if choice.startswith(str(found)) and found]
        close = difflib.get_close_matches(str(found), choices, 1) or beginning
        guess = f"Did you mean {close[0]}? " if close else ""
        listed = ", ".join(choice for choice in choices if not choice.startswith(HYPERPOD))
        also = f"; on HyperPod with {HYPERPOD} before it" if key == ("instance",) else ""
        yield Mistake(key, f"{shown(found, key)} is not one of its values", f"{guess}({listed}{also})")
    elif keyword == "pattern":
        yield Mistake(key, pattern_words(key, found), described)
    elif keyword in BOUNDS:
        yield Mistake(key, f"must be {BOUNDS[keyword]} {number(wanted)}, not {shown(found, key)}", described)
    elif keyword == "uniqueItems":
        twice = sorted({str(item) for item in found if found.count(item) > 1})
        yield Mistake(key, f"names {', '.join(map(one_line, twice))} twice", "Keep one.")
    elif keyword in ("minLength", "minItems"):
        yield Mistake(key, "must not be empty", described)
    elif keyword == "maxLength":
        yield Mistake(key, f"longer than {wanted} characters", described)
    else:
        yield Mistake(key, one_line(error.message, 200), described)


BOUNDS = {
    "minimum": "at least",
    "maximum": "at most",
    "exclusiveMinimum": "more than",
    "exclusiveMaximum": "less than",
}
TYPES = {
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "boolean": "true or false",
    "null": "null",
    "array": "a list",
    "object": "keys and values",
}
PYTHON_TYPES: dict[str, tuple[type, ...]] = {
    "integer": (int,),
    "number": (int, float),
    "string": (str,),
    "array": (list,),
    "object": (dict,),
}


def resolve(schema: dict[str, Any], root: dict[str, Any]) -> dict[str, Any]:
    reference = schema.get("$ref")
    return root["$defs"][reference.rpartition("/")[2]] if reference else schema


def type_fits(value: Any, schema: dict[str, Any]) -> bool:
    if "const" in schema:
        return isinstance(value, str)
    return not isinstance(value, bool) and isinstance(value, PYTHON_TYPES.get(schema.get("type", ""), ()))


def type_words(schema: dict[str, Any]) -> str:
    if "const" in schema:
        return str(schema["const"])
    if "enum" in schema:
        return either(list(schema["enum"]))
    return TYPES.get(schema.get("type", ""), "")


def either(words: list[str]) -> str:
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def purpose(schema: Any) -> str:
    """What a key is for, as a sentence."""
    description = schema.get("description", "") if isinstance(schema, dict) else ""
    return f"({description.rstrip('.')})" if description else ""


def pattern_words(key: KeyPath, found: Any) -> str:
    if key == ("model",):
        return f"{shown(found, key)} is not a hub id; a folder or file is written {{path: ...}}"
    if key == ("image",):
        return (
            f"{shown(found, key)} is not an image reference (registry/name:tag or registry/name@sha256:64 hex digits)"
        )
    if key in SECRET_KEYS:
        return "is not a name that Kubernetes allows; the token itself must never be written here"
    return f"{shown(found, key)} is not of the right form"


def shown(value: Any, key: KeyPath) -> str:
    """The offending value, as short as it can be recognised; never one where a token may stand."""
    if key in SECRET_KEYS and value is not None:
        return "what is there"
    if isinstance(value, dict):
        return "keys and values"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, str):
        return f"the text {json.dumps(one_line(value, 60), ensure_ascii=False)}"
    return number(value)


def number(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return one_line(text, 40)


def did_you_mean(
    name: str, inside: KeyPath, properties: dict[str, Any], needed: list[str], schema: dict[str, Any]
) -> str:
    """The closest key here (one that is needed first), else the same name in another block; and the keys there are."""
    plain = re.sub(r"[-_ ]", "", name).lower()
    here = {key.lower(): key for key in properties}
    guess = ""
    if plain in here:
        guess = dotted((*inside, here[plain]))
    elif ALSO_CALLED.get(plain) in properties:
        guess = dotted((*inside, ALSO_CALLED[plain]))
    elif elsewhere := keys_named(ALSO_CALLED.get(plain, plain).lower(), schema):
        guess = elsewhere
    elif close := [
        *difflib.get_close_matches(plain, [key.lower() for key in needed], 1, cutoff=0.7),
        *difflib.get_close_matches(plain, here, 1, cutoff=0.7),
    ]:
        guess = dotted((*inside, here[close[0]]))
    return f"{f'Did you mean {guess}? ' if guess else ''}(keys: {', '.join(properties)})"


def keys_named(name: str, schema: dict[str, Any]) -> str:
    """The path of the key with that name in the whole inputs file, if there is one."""
    for block, block_schema in schema["properties"].items():
        if block.lower() == name:
            return block
        references = [block_schema, *block_schema.get("anyOf", [])]
        for reference in references:
            for key in resolve(reference, schema).get("properties", {}):
                if key.lower() == name:
                    return f"{block}.{key}"
    return ""


# --- by the rules that span keys


def rule_mistakes(document: Document) -> Iterator[Mistake]:
    """What no single key shows. A key whose type is wrong counts as left out: the schema has said so already."""
    value = document.value
    instance = get(value, "instance", str) or ""
    if instance and instance not in NAMES:
        return
    on_cpu = instance == CPU
    if instance:
        yield from instance_rules(value, instance, on_cpu)
        yield from path_rules(value, on_cpu, document.path.parent)
    yield from dataset_rules(value)
    yield from image_rules(value)
    yield from storage_rules(value)


def instance_rules(value: dict[str, Any], instance: str, on_cpu: bool) -> Iterator[Mistake]:
    if on_cpu:
        return
    if "image" not in value or value["image"] is None:
        yield Mistake(("image",), "missing", f"{instance} needs the image that you built, by tag or digest.")
    if value.get("cpu") is not None:
        yield Mistake(("cpu",), f"is for instance cpu only, not for {instance}", "Remove it.")
    nodes = get(value, "nodes", int) or 1
    hardware = trainium(instance)
    if nodes > 1 and hardware and not hardware.efa:
        larger = [
            f"{HYPERPOD if instance.startswith(HYPERPOD) else ''}{name}" for name in ("trn1.32xlarge", "trn2.48xlarge")
        ]
        yield Mistake(
            ("nodes",),
            f"{instance} has no EFA and cannot be one of {nodes} nodes",
            f"Use nodes: 1, or {' or '.join(larger)}.",
        )
    targets = get(value, "lora.targetModules", list) or []
    together = {"gate_proj", "up_proj"}
    if len(together.intersection(map(str, targets))) == 1:
        (there,) = together.intersection(targets)
        (absent,) = together - {there}
        yield Mistake(
            ("lora", "targetModules"),
            f"{there} without {absent}: on Trainium the two are one layer",
            f"Add {absent} or remove {there}.",
        )


def dataset_rules(value: dict[str, Any]) -> Iterator[Mistake]:
    source = get(value, "dataset.source", str) or ""
    format_ = row_format(get(value, "dataset.format", str), source)
    if source.endswith(".txt") and format_ in REQUIRED_COLUMNS and format_ != "text":
        yield Mistake(("dataset", "format"), f"a .txt file has no columns for {format_}", "Write format: text.")
    columns = get(value, "dataset.columns", dict) or {}
    known = {name for names in [*REQUIRED_COLUMNS.values(), *OPTIONAL_COLUMNS.values()] for name in names}
    allowed = [*REQUIRED_COLUMNS.get(format_, []), *OPTIONAL_COLUMNS.get(format_, [])]
    for name in columns:
        if allowed and name in known and name not in allowed:
            yield Mistake(
                ("dataset", "columns", name), f"format {format_} has no such column", f"(columns: {', '.join(allowed)})"
            )
    if source.startswith("s3://") and not re.match(r"^s3://[a-z0-9][a-z0-9.-]+/\S+$", source):
        yield Mistake(("dataset", "source"), "is not s3://bucket/key", "")
    if is_file(source) or source.startswith("s3://"):
        for name in ("config", "revision", "split"):
            if get(value, f"dataset.{name}", str):
                yield Mistake(("dataset", name), "is for hub datasets, and this one is a file", "Remove it.")
    elif source and not re.match(r"^[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)?$", source):
        yield Mistake(
            ("dataset", "source"),
            f"{shown(source, ())} is neither a hub id nor s3://... nor a file",
            f"(files end with {' '.join(FILE_SUFFIXES)})",
        )
    if get(value, "evaluation.enabled", bool) and get(value, "dataset.evalFraction", float) == 0:
        yield Mistake(
            ("evaluation", "enabled"),
            "there are no held-out rows to evaluate on",
            "Raise dataset.evalFraction above 0.",
        )


def path_rules(value: dict[str, Any], on_cpu: bool, folder: Path) -> Iterator[Mistake]:
    """Paths are read by the stages: in pods, which don't see this computer, or here."""
    mount = get(value, "chartValues.workspace.mountPath", str) or DEFAULT_MOUNT
    for key, path in paths(value):
        there = PurePosixPath(posixpath.normpath(path))
        on_volume = PurePosixPath(mount) in there.parents
        if not on_cpu and not on_volume:
            yield Mistake(
                key,
                f"{one_line(path)} is on this computer, which the pods on {value['instance']} cannot see",
                f"Use a hub id, s3://, or an absolute path under {mount}, the volume.",
            )
        elif on_cpu and not there.is_absolute():
            here = absolute(path, folder)
            if "\0" in path or not here.exists():
                yield Mistake(key, f"no such file or folder: {one_line(str(here), 200)}", "")
            elif PurePosixPath(mount) in PurePosixPath(here).parents:
                yield Mistake(
                    key,
                    f"{one_line(str(here), 200)} is under {mount}, where the stages have their volume",
                    "Move it elsewhere, or set chartValues.workspace.mountPath to another folder.",
                )


def image_rules(value: dict[str, Any]) -> Iterator[Mistake]:
    image = get(value, "image", str)
    if not image:
        return
    _, tag, digest = split_image(image)
    if not tag and not digest:
        yield Mistake(
            ("image",), "names neither tag nor digest", "Add :0.1.0 or @sha256:..., so that every stage runs the same."
        )
    elif tag == "latest" and not digest:
        yield Mistake(("image",), ":latest is another image tomorrow", "Name a version's tag, or the digest.")


def storage_rules(value: dict[str, Any]) -> Iterator[Mistake]:
    storage = get(value, "storage", dict) or {}
    if storage.get("existingClaim"):
        for name in ("kind", "size", "storageClass", "static"):
            if storage.get(name):
                yield Mistake(("storage", name), "means nothing beside existingClaim", "Remove one of the two.")
        return
    kind = storage.get("kind") or ("generic" if get(value, "instance", str) == CPU else "fsx")
    if kind == "fsx-static" and not storage.get("static"):
        yield Mistake(("storage", "static"), "missing", "fsx-static needs {fileSystemId, dnsName, mountName}.")
    if kind != "fsx-static" and storage.get("static"):
        yield Mistake(
            ("storage", "static"), f"is for kind fsx-static, not {one_line(str(kind))}", "Remove it or change kind."
        )
    size = get(value, "storage.size", str) or ""
    match = re.match(r"^([1-9][0-9]{0,6})(Mi|Gi|Ti)$", size)
    if kind == "fsx" and match:
        gib = int(match[1]) * {"Mi": 1 / 1024, "Gi": 1, "Ti": 1024}[match[2]]
        if gib != 1200 and gib % 2400:
            larger = max(2400, -(-int(gib) // 2400) * 2400)
            fitting = "1200Gi" if gib < 1200 else f"{larger}Gi"
            yield Mistake(
                ("storage", "size"),
                f"FSx for Lustre is not made in {size}",
                f"Use {fitting} (1200Gi or a multiple of 2400Gi).",
            )


def tokens(value: Any, key: KeyPath = ()) -> Iterator[Mistake]:
    """A token anywhere in the file would end up in the release and in the logs."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from tokens(inner, (*key, name))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from tokens(inner, (*key, index))
    elif isinstance(value, str) and TOKEN.search(value) and key not in SECRET_KEYS:
        yield Mistake(
            key, "looks like a Hugging Face token", "Put it in a Secret and name that in huggingFace.tokenSecret."
        )


# --- what the rules and the values share


def get(value: Any, dotted_key: str, kind: type) -> Any:
    """The value at a key when it is of that kind, else None."""
    for part in dotted_key.split("."):
        if not isinstance(value, dict) or part not in value:
            return None
        value = value[part]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind is int and isinstance(value, bool):
        return None
    return value if isinstance(value, kind) else None


def is_file(source: str) -> bool:
    return source.endswith(FILE_SUFFIXES) and not source.startswith("s3://")


def paths(value: dict[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    """The keys that name something on a disk, with what they name."""
    if model := get(value, "model.path", str):
        yield ("model", "path"), model
    source = get(value, "dataset.source", str) or ""
    if is_file(source):
        yield ("dataset", "source"), source


def absolute(path: str, folder: Path) -> Path:
    """As seen from the inputs file's folder."""
    return (folder / Path(path)).resolve()


def row_format(format_: str | None, source: str) -> str:
    return format_ or ("text" if source.endswith(".txt") else "instruction")


def split_image(image: str) -> tuple[str, str, str]:
    """Repository, tag and digest of an image reference."""
    name, _, digest = image.partition("@")
    repository, colon, tag = name.rpartition(":")
    if not colon or "/" in tag:  # the colon of a registry's port
        return name, "", digest
    return repository, tag, digest
