"""What a run needs from AWS, the Hub and the cluster, read from its values."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from genvalues.accelerators.instances import HYPERPOD, Instance, trainium
from genvalues.common.dicts import get
from genvalues.ops.registries import ImageReference, invalid_account, is_aws_container, parse_image
from genvalues.settings.datasets import is_on_hub

# fs-0123456789abcdef0.fsx.us-west-2.amazonaws.com
FSX_ADDRESS = re.compile(r"fs-[0-9a-f]+\.fsx\.(?P<region>[a-z]{2,4}(-[a-z]+)+-[0-9]+)\.amazonaws\.com(\.cn)?")


@dataclass(frozen=True)
class RunRequirements:
    """``file`` is the inputs file, quoted for a shell; ``values`` are the chart values written from it."""

    file: str
    values: dict[str, Any]

    def text(self, key: str) -> str:
        """The text at a dotted key of the chart values; empty if unset."""
        return get(self.values, key, str) or ""

    def set_command(self, key: str, value: object) -> str:
        """The command that writes the values with another value for a key of the inputs."""
        return f"genvalues write {self.file} -o values.yaml --set {key}={value}"

    def preflight_command(self, *options: str) -> str:
        return " ".join(("genvalues preflight", self.file, *options))

    @property
    def instance(self) -> str:
        return self.text("instance")

    @property
    def hardware(self) -> Instance | None:
        """The Trainium instance type; None for cpu."""
        return trainium(self.instance)

    @property
    def on_hyperpod(self) -> bool:
        return self.instance.startswith(HYPERPOD)

    @property
    def ec2_type(self) -> str:
        return self.instance.removeprefix(HYPERPOD)

    @property
    def nodes(self) -> int:
        return get(self.values, "parallelism.nodes", int) or 1

    @property
    def devices(self) -> set[str]:
        return set(get(self.values, "devices", dict) or {})

    @property
    def image(self) -> ImageReference:
        tag, digest = self.text("image.tag"), self.text("image.digest")
        reference = self.text("image.repository") + (f":{tag}" if tag else "") + (f"@{digest}" if digest else "")
        return parse_image(reference)

    @property
    def image_in_ecr(self) -> bool:
        """Whether the address is one of ECR, even if its account number is invalid."""
        return self.image.in_ecr or bool(invalid_account(self.image))

    @property
    def own_image_in_ecr(self) -> bool:
        return self.image.in_ecr and not is_aws_container(self.image)

    @property
    def makes_claim(self) -> bool:
        return not self.text("storage.existingClaim") and get(self.values, "storage.enabled", bool) is not False

    @property
    def storage_kind(self) -> str:
        """Empty for an existing claim, whose storage only the cluster knows."""
        return self.text("storage.kind") if self.makes_claim else ""

    @property
    def makes_storage_class(self) -> bool:
        return self.storage_kind == "fsx" and bool(get(self.values, "storage.fsx.createStorageClass", bool))

    @property
    def file_system(self) -> str:
        return self.text("storage.static.fileSystemId") if self.storage_kind == "fsx-static" else ""

    @property
    def subnet(self) -> str:
        return self.text("storage.fsx.subnetId") if self.makes_storage_class else ""

    @property
    def security_groups(self) -> list[str]:
        groups = get(self.values, "storage.fsx.securityGroupIds", list) if self.makes_storage_class else []
        return [group for group in groups or [] if isinstance(group, str)]

    @property
    def dataset(self) -> str:
        return self.text("dataset.source")

    @property
    def s3_source(self) -> tuple[str, str] | None:
        """Bucket and key of an s3:// dataset."""
        if not self.dataset.startswith("s3://"):
            return None
        bucket, _, key = self.dataset.removeprefix("s3://").partition("/")
        return bucket, key

    @property
    def hub_datasets(self) -> list[tuple[str, str]]:
        """Name and revision of each source of rows on the Hub."""
        dataset = get(self.values, "dataset", dict) or {}
        sources = [dataset, *(get(dataset, "additional", dict) or {}).values(), get(dataset, "eval", dict)]
        found = [(get(source, "source", str) or "", get(source, "revision", str) or "") for source in sources]
        return [(name, revision) for name, revision in dict.fromkeys(found) if name and is_on_hub(name)]

    @property
    def token_secret(self) -> str:
        return self.text("huggingFace.tokenSecret")

    def regions(self, asked: str | None, configured: str | None) -> list[tuple[str, str]]:
        """The sources that name a region, each with its region. The first one is used."""
        named = [("--region", asked or ""), ("the image's address", self.image.region)]
        if self.file_system and (address := FSX_ADDRESS.fullmatch(self.text("storage.static.dnsName"))):
            named.append(("the file system's address", address["region"]))
        named.append(("AWS_REGION or the profile", configured or ""))
        return [(source, region) for source, region in named if region]
