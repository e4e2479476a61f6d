"""Whether the image is one of llama-lora: by its address, and by the labels that trainer/Dockerfile sets."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Mapping
from typing import Any

from genvalues import __version__
from genvalues.common.errors import Unavailable
from genvalues.common.findings import Finding
from genvalues.common.hub import within_time
from genvalues.common.text import one_line
from genvalues.ops.aws import AwsClients, Missing
from genvalues.ops.preflight.run_requirements import RunRequirements
from genvalues.ops.registries import EXAMPLE, ImageReference, is_aws_container

TITLE, NAME = "org.opencontainers.image.title", "llama-lora"
VERSION = "org.opencontainers.image.version"
INDEXES = ("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json")
MANIFESTS = ("application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json")
SECONDS, MOST_BYTES = 10, 4 << 20  # for the image's configuration, which is a few kilobytes


def check_image_address(requirements: RunRequirements) -> list[Finding]:
    """An error for a container of AWS's own registries: it is a base image, without llama-lora. No network access."""
    image = requirements.image
    if not is_aws_container(image):
        return []
    found = "is a container of AWS: a base image, which has no llama-lora. The stages would not start"
    fix = f"genvalues image push {requirements.file} --base {image.tagged}   # with image: {EXAMPLE}"
    return [Finding("error", f"image {image.name}", found, fix)]


def check_labels(clients: AwsClients, requirements: RunRequirements, subject: str) -> list[Finding]:
    """Whether the image has the labels of trainer/Dockerfile, which an image built over it inherits."""
    image = requirements.image
    registry = clients if image.region == clients.region else AwsClients(image.region)
    labels = labels_of(registry, image)
    push = f"genvalues image push {requirements.file}"
    if labels.get(TITLE) != NAME:
        found = f"is not an image of llama-lora: no label {TITLE}={NAME}. The stages would not start"
        return [Finding("error", subject, found, push)]
    version = one_line(labels.get(VERSION, ""))
    if version and version != __version__:
        found = f"is of llama-lora {version}, and this is genvalues {__version__}"
        return [Finding("warning", subject, found, push)]
    return [Finding("ok", subject, f"built from trainer/Dockerfile, llama-lora {version or 'of an unknown version'}")]


def labels_of(registry: AwsClients, image: ImageReference) -> Mapping[str, str]:
    """The labels in the configuration of an image in ECR. Raises as AwsClients.ask does."""
    manifest = manifest_of(registry, image, image.ecr_id)
    if "manifests" in manifest:
        linux = {"os": "linux", "architecture": "amd64"}
        fitting = [one for one in manifest["manifests"] if linux.items() <= (one.get("platform") or {}).items()]
        if not fitting:
            return {}
        manifest = manifest_of(registry, image, {"imageDigest": fitting[0]["digest"]})
    digest = (manifest.get("config") or {}).get("digest")
    if not digest:  # a manifest without labels, such as one of Docker's first version
        return {}
    answer = registry.ask("ecr", "get_download_url_for_layer", layerDigest=digest, **image.ecr_repository)
    configuration = download(answer["downloadUrl"])
    labels = (configuration.get("config") or {}).get("Labels") or {}
    return {str(key): str(value) for key, value in labels.items()}


def manifest_of(registry: AwsClients, image: ImageReference, which: dict[str, str]) -> dict[str, Any]:
    parameters = {"imageIds": [which], "acceptedMediaTypes": [*INDEXES, *MANIFESTS]}
    answer = registry.ask("ecr", "batch_get_image", **image.ecr_repository, **parameters)
    if not answer.get("images"):
        raise Missing
    manifest: dict[str, Any] = json.loads(answer["images"][0]["imageManifest"])
    return manifest


def download(url: str) -> dict[str, Any]:
    """The JSON at a signed address of S3, which is in no message: it gives access."""

    def get() -> bytes:
        with urllib.request.urlopen(url, timeout=SECONDS) as answer:
            content: bytes = answer.read(MOST_BYTES)
        return content

    try:
        document: dict[str, Any] = json.loads(within_time(get))
    except (OSError, ValueError) as error:
        raise Unavailable(f"ECR does not return the image's configuration: {type(error).__name__}") from None
    return document
