"""What a bundle may show: an allow-list of field names. Everything else is replaced by ``(redacted)``.

Of Kubernetes objects, ``selected`` keeps the kinds that a release has and their known top-level fields. Structured data
(objects, values, documents) goes through ``redact_object``: the text of a field is shown only if the field's name is on
the list; numbers and flags are shown unless the name looks secret. Logs have no fields, so
``redact_text`` removes what has the form of a credential, and the value after every name that looks secret and is not
on the list. Both replace AWS account numbers.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import unquote

import yaml

from genvalues.cluster.workloads import NAMES, PARTS
from genvalues.common.rendered_yaml import load_rendered
from genvalues.common.text import TOKEN
from genvalues.inputs.yaml_text import dump

HIDDEN = "(redacted)"


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Text under these names is shown: fields of Kubernetes and Helm, and of our own documents. shown_names adds the chart's
# settings.
SHOWN = words("""
    apiVersion kind name namespace generateName uid resourceVersion creationTimestamp deletionTimestamp finalizers key
    type reason message action operator effect phase lastTimestamp firstTimestamp eventTime reportingComponent component
    image imagePullPolicy command args workingDir restartPolicy nodeName schedulerName serviceAccountName path fieldPath
    priorityClassName preemptionPolicy dnsPolicy terminationMessagePath terminationMessagePolicy medium sizeLimit
    mountPath mountPropagation subPath claimName completionMode podReplacementPolicy containerName cleanPodPolicy
    nprocPerNode rdzvBackend rdzvHost rdzvId accessModes storageClassName volumeMode volumeName mountOptions provisioner
    reclaimPolicy persistentVolumeReclaimPolicy volumeBindingMode
    genvalues helm kubernetes trainingOperator kubelet release revision helmStatus mode chart version appVersion outcome
    state note tail tailOf pods nodes result notRead updated started ended finished stage fingerprint fullname run
    lastTransitionTime lastProbeTime lastUpdateTime lastReconcileTime startTime completionTime startedAt finishedAt
    imageID containerID qosClass status reportingInstance apiGroup apiGroups resources verbs resourceNames
    nonResourceURLs add drop driver volumeHandle fsType runtimeClassName
""")
# Below these, text is shown under any name that does not look secret: labels, resources, what controllers write.
FREE = words("""
    parameters volumeAttributes affinity tolerations taints nodeSelector labels commonLabels jobLabels podLabels tags
    matchLabels matchExpressions limits requests allocatable capacity devices facts versions outputs progress cost
""")
# What enters a bundle of the objects of each kind, besides apiVersion, kind and metadata. Of other kinds, such as those
# that a policy engine adds, only what they are; of a Secret nothing.
FIELDS = {
    **dict.fromkeys(("Job", *NAMES, *PARTS, "Pod", "PersistentVolumeClaim", "PersistentVolume"), words("spec status")),
    "ConfigMap": words("data"),
    "ServiceAccount": words("imagePullSecrets automountServiceAccountToken"),
    **dict.fromkeys(("Role", "ClusterRole"), words("rules")),
    **dict.fromkeys(("RoleBinding", "ClusterRoleBinding"), words("roleRef subjects")),
    "StorageClass": words("provisioner parameters mountOptions reclaimPolicy volumeBindingMode allowVolumeExpansion"),
    "Event": words(
        "involvedObject reason message type count action firstTimestamp lastTimestamp eventTime series source"
        " reportingComponent reportingInstance"
    ),
}
METADATA = words(
    "name namespace uid resourceVersion generation creationTimestamp deletionTimestamp labels annotations finalizers"
    " ownerReferences generateName"
)
CONFIG_FILES = words("run.yaml cluster.yaml values.yaml")  # the files of the chart's ConfigMap
# Environment variables of the chart's programs, and annotations of the chart and of the controllers it works with.
SHOWN_PREFIX = re.compile(
    r"(CCOM|FI|HF_HUB|LLAMA_LORA|MALLOC|NCCL|NEURON|OMP|PYTHON|TORCH|TRANSFORMERS|XLA)_"
    r"|(HF_HOME|HOME|PYTHONUNBUFFERED|TOKENIZERS_PARALLELISM)$"
    r"|(llama-lora|(meta\.)?helm\.sh|([a-z-]+\.)?kubernetes\.io|karpenter\.sh|kueue\.x-k8s\.io"
    r"|(sagemaker|eks)\.amazonaws\.com)/"
)
# Long and of no use: which controller wrote which field, and kubectl's own copy of the object.
DROPPED = {"managedFields", "kubectl.kubernetes.io/last-applied-configuration"}


def selected(item: Any, kind: str = "") -> dict[str, Any] | None:
    """The part of a Kubernetes object that enters a bundle; None if nothing does. In a list objects have no kind."""
    if not isinstance(item, dict) or "Secret" in (kind := str(kind or item.get("kind") or "Secret")):
        return None
    found = item.get("metadata")
    metadata: dict[str, Any] = found if isinstance(found, dict) else {}
    if kind not in FIELDS:
        return {"kind": kind, "metadata": {key: metadata[key] for key in ("name", "namespace") if key in metadata}}
    kept = {key: value for key, value in item.items() if key in FIELDS[kind] | {"apiVersion", "kind"}}
    if kind == "ConfigMap" and isinstance(kept.get("data"), dict):
        kept["data"] = {name: text for name, text in kept["data"].items() if name in CONFIG_FILES}
    return {**kept, "metadata": {key: value for key, value in metadata.items() if key in METADATA}}


# --- names that look secret, in any spelling

# key: only as a last word (sshKey), or after a word that makes it one.
SECRET = (
    r"token(?!i[sz]|s)|secret|passw|passphrase|passcode|pwd|credential|signature|cookie|(?:pass|pw)(?![a-z0-9_-])"
    r"|auth(?:orization)?(?![a-z0-9_-])|(?:access|api|auth|master|private)[_-]?key|[a-z0-9_-]key(?![a-z0-9_-])"
)
# These look secret, but say where a secret is stored, or are names of a tokenizer, of Kubernetes or of a training log.
HARMLESS = (
    r"token[_-]?(?:secret|key|ids?|type[_-]ids|count|limit|size)|existing[_-]?secret|secret[_-]?(?:key[_-]?)?(?:name|ref)"
    r"|(?:image)?pullsecrets|automountserviceaccounttoken|topologykey|(?:forward|backward)[_-]pass"
    r"|(?:bos|eos|pad|unk|cls|sep|mask|num|max|(?:max[_-])?new|input|output|per|special|total)[_-]?token(?:[_-]ids?)?"
)
LOOKS_SECRET = re.compile(SECRET, re.IGNORECASE)
MAY_BE_SHOWN = re.compile(f"(?:{HARMLESS})", re.IGNORECASE)

# --- forms of secrets in text

JWT = re.compile(r"\beyJ[A-Za-z0-9_-]{5,}(?:\.[A-Za-z0-9_-]*){1,4}")  # RFC 7519: base64 of {"
BEARER = re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=%-]{8,}")
# The id of an AWS access key, also where a log has no space before or after it.
AWS_KEY_ID = re.compile(r"(?:AKIA|ASIA)[0-9A-Z]{16}")
# A key of Weights & Biases: 40 hexadecimal digits, as a commit has them too, so only in lines about a key.
WANDB_LINE = re.compile(r"(?i)wandb|weights *& *biases|api[ _-]?key")
WANDB_KEY = re.compile(r"(?i)(?<![0-9a-z])[0-9a-f]{40}(?![0-9a-z])|wandb_v1_[0-9a-z_]{20,}")
LINE = re.compile(r"[^\n]+")
# Words with percent-encoded characters, as in URLs and in the headers of OpenTelemetry.
WORD = re.compile(r"\S+")
ENCODED = re.compile(r"%[0-9A-Fa-f]{2}")
MOST_ENCODINGS = 3  # %2525 is an encoded %25, which is an encoded %
# https://user:password@host, https://token@host. A password may have a slash; a name alone (ssh://git@host) may not.
IN_URL = re.compile(r"(?<=://)(?:[^\s/@:\"'<>]{0,200}:[^\s@\"'<>]{1,200}|[^\s/@:\"'<>]{16,200})(?=@)")
# An AWS secret access key alone, 40 characters of base64, and a session token. A SHA-1 has no upper case.
AWS_SECRET = re.compile(
    r"(?<![A-Za-z0-9/+=_.-])(?=[A-Za-z0-9/+]{0,39}[a-z])(?=[A-Za-z0-9/+]{0,39}[A-Z])(?=[A-Za-z0-9/+]{0,39}[0-9])"
    r"[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+=_-])|(?<![A-Za-z0-9/+])(?:IQoJ|FwoG)[A-Za-z0-9/+=]{40,}"
)
# A name that looks secret. It starts at a word boundary, so that a long text is scanned once. Not: the names above, the
# shell's folders, and prose such as "loss per token: 1.25".
NAME = (
    rf"(?<![a-z0-9_-])(?!(?:--)?(?:{HARMLESS}|(?-i:PWD|OLDPWD))(?![a-z0-9_-]))"
    r"(?!(?:pass|token)[ \t]*[=:][ \t]*(?:\d{1,3}|\d+\.\d+)(?![\w.]))"
    rf"(?=[a-z0-9_-]*?(?:{SECRET}))[a-z0-9_-]+"
)
NO_VALUE = r"(?!(?:true|false|null|none)\b|[{\[|>~][ \t]*$)"
# The rest of a line: of an HTTP header, and of a key at the start of a line (YAML), whose text may have several words
# or lines.
HEADER = re.compile(r"(?im)(\b(?:authorization|cookie)\\*[\"']?[ \t]*[=:][ \t]*)(?!\\*[\"'])\S.*")
YAML_KEY = re.compile(rf"(?im)(^[ \t-]*{NAME}:[ \t]+)(?![\"'])(?:[|>][-+0-9]*(?:\n[ \t]+\S.*)+|{NO_VALUE}\S.*)")
# NAME=, NAME: and --NAME before a value; name and value may be quoted, also inside a text that is quoted itself. A
# quoted value ends at its quote, or with the line if that was cut.
NAMED = re.compile(
    rf"(?im)({NAME}\\*[\"']?[ \t]*[=:][ \t]*|(?=--){NAME}\\*[\"']?(?:[ \t]*,\s*|[ \t]+|[ \t]*\n\s*-[ \t]+)(?!-))"
    rf"{NO_VALUE}(?:(\\+[\"'])[^\n]*?(?=\2|$)|(')(?:[^'\n]|'')*|(\")(?:[^\"\\\n]|\\.)*|[^\s\"'\\,;&}}]+)"
)
# NAME VALUE. Whether the value is one, or a word of a sentence, is for ``is_value`` to tell.
SPACED = re.compile(rf"(?i)({NAME})([ \t]{{1,4}}\\?[\"']?)([^\s\"'\\,;&}}]{{4,}})")
NUMBER = re.compile(r"[\d.,:%]+[A-Za-z]{0,3}")
# Twelve digits, also within a bucket's name; not those of a decimal, and not in what stands before: a UUID, a digest or
# fingerprint, and the 17 digits of an AWS resource's id.
ACCOUNT = re.compile(
    r"(?<![0-9A-Za-z])(?:[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9a-f]{32,128}|[a-z]{1,12}-[0-9a-f]{17})"
    r"(?![0-9A-Za-z])"
    r"|(?<!\d)(?<!\d\.)(?P<account>\d{12})(?!\d|\.\d)"
)
ANY_ACCOUNT = "000000000000"
# AWS's own registries: https://github.com/aws/deep-learning-containers/blob/master/available_images.md
PUBLIC_ACCOUNTS = {"763104351884"}


def redact_object(value: Any, name: str = "", *, free: bool = False) -> Any:
    """Return the same structure with every value replaced whose field's ``name`` may not be shown.

    ``free``: the field is below one of FREE.
    """
    if isinstance(value, dict):
        return {
            redact_text(key) if isinstance(key, str) else key: redact_object(
                inner, field_name(value, str(key)), free=free or key in FREE
            )
            for key, inner in value.items()
            if key not in DROPPED
        }
    if isinstance(value, list):
        return [
            HIDDEN if is_secret_argument(before, item) else redact_object(item, name, free=free)
            for before, item in zip([None, *value], value, strict=False)
        ]
    if value is None or value == "" or isinstance(value, bool):
        return value
    if isinstance(value, str) and name.endswith(".yaml"):  # a file in a ConfigMap
        return redact_yaml(value)
    if not may_show(name, is_text=isinstance(value, str), free=free):
        return HIDDEN
    return redact_text(value) if isinstance(value, str) else value


def field_name(item: dict[Any, Any], key: str) -> str:
    """The name that says what the field holds: for the value of ``{name: X, value: ...}``, X."""
    named = item.get("name", item.get("key")) if key == "value" else None
    return named if isinstance(named, str) else key


def may_show(name: str, *, is_text: bool, free: bool = False) -> bool:
    if name in shown_names() or MAY_BE_SHOWN.fullmatch(name):
        return True
    return not LOOKS_SECRET.search(name) and (free or not is_text or bool(SHOWN_PREFIX.match(name)))


@functools.cache
def shown_names() -> frozenset[str]:
    """SHOWN, and the names of the chart's settings that do not look secret."""
    from genvalues.settings.schemas import values_schema

    return SHOWN | {name for name in names_in(values_schema()) if not LOOKS_SECRET.search(name)}


def names_in(schema: Any) -> Iterator[str]:
    """The names of all properties in a JSON schema."""
    if isinstance(schema, list):
        for one in schema:
            yield from names_in(one)
    elif isinstance(schema, dict):
        yield from schema.get("properties", {})
        for one in schema.values():
            yield from names_in(one)


def is_secret_argument(before: Any, item: Any) -> bool:
    """Whether ``item`` of a command line is the value of the option before it, and that may not be shown."""
    if not (isinstance(before, str) and isinstance(item, str)) or item.startswith("-"):
        return False
    return before.startswith("--") and not may_show(before.lstrip("-"), is_text=True, free=True)


def redact_yaml(text: str) -> str:
    """Return the YAML document ``text`` as ``redact_object`` shows it."""
    try:
        return dump(redact_object(load_rendered(text)))
    except yaml.YAMLError:
        return HIDDEN


def redact_text(text: str) -> str:
    """Return the same text without what looks like a secret, and without AWS account numbers.

    A word that hides a secret in percent-encoding is returned decoded, without the secret.
    """
    return without(redact_plain, text)


def hide_secrets(text: str) -> str:
    """The same for a message to the user, who needs their account numbers to understand it."""
    return without(hide_plain, text)


def without(redact: Callable[[str], str], text: str) -> str:
    text = redact(text)
    return WORD.sub(lambda word: redact_encoded(redact, word[0]), text) if ENCODED.search(text) else text


def redact_encoded(redact: Callable[[str], str], word: str) -> str:
    decoded = word
    for _ in range(MOST_ENCODINGS):
        if not ENCODED.search(decoded):
            break
        decoded = unquote(decoded)
    told = redact(decoded)
    return word if told == decoded else told


def redact_plain(text: str) -> str:
    return ACCOUNT.sub(
        lambda found: ANY_ACCOUNT if found["account"] not in (None, *PUBLIC_ACCOUNTS) else found[0], hide_plain(text)
    )


def hide_plain(text: str) -> str:
    text = AWS_KEY_ID.sub(lambda key: f"{key[0][:3]}{HIDDEN}", text)
    text = LINE.sub(lambda line: WANDB_KEY.sub(HIDDEN, line[0]) if WANDB_LINE.search(line[0]) else line[0], text)
    text = TOKEN.sub(lambda token: f"{token[0][:3]}{HIDDEN}", text)
    text = JWT.sub(HIDDEN, text)
    text = HEADER.sub(rf"\1{HIDDEN}", text)
    text = BEARER.sub(rf"\1 {HIDDEN}", text)
    text = IN_URL.sub(HIDDEN, text)
    text = AWS_SECRET.sub(HIDDEN, text)
    text = YAML_KEY.sub(rf"\1{HIDDEN}", text)
    text = NAMED.sub(lambda found: f"{found[1]}{found[2] or found[3] or found[4] or ''}{HIDDEN}", text)
    return SPACED.sub(
        lambda found: f"{found[1]}{found[2]}{HIDDEN}" if is_value(found[1], found[2], found[3]) else found[0], text
    )


def is_value(name: str, between: str, value: str) -> bool:
    """Whether a secret name's next word is its value, and not the next word of a sentence.

    After a name such as HF_TOKEN or db-password anything is that is no plain word or number. After a word such as token
    it must have letters and digits, and must not be quoted: Kubernetes quotes the names of Secrets.
    """
    word = value.strip(".,:;!?()[]<>")
    compound = "_" in name or "-" in name or name.isupper()
    if NUMBER.fullmatch(word) or len(word) < 4 or (('"' in between or "'" in between) and not compound):
        return False
    if word.isalpha():
        return len(word) >= 20 or (compound and not (word.isupper() or word[1:].islower()))
    has_digit, has_letter = any(map(str.isdigit, word)), any(map(str.isalpha, word))
    return (has_digit and has_letter and len(word) >= 6) or (compound and any(each in "/+=@#$%^*!~" for each in word))
