"""What a run asks of the world, read from its values."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from genvalues.accelerators.instances import HYPERPOD, Instance, trainium
from genvalues.common.dicts import get
from genvalues.ops.registries import Image, invalid_account, parse_image
from genvalues.settings.datasets import is_file

# fs-0123456789abcdef0.fsx.us-west-2.amazonaws.com
FSX_ADDRESS = re.compile(r"fs-[0-9a-f]+\.fsx\.(?P<region>[a-z]{2,4}(-[a-z]+)+-[0-9]+)\.amazonaws\.com(\.cn)?")
PUBLIC_ECR = "public.ecr.aws"


@dataclass(frozen=True)
class RunRequirements:
    file: str  # the inputs, as a shell's command names them
    values: dict[str, Any]

    def text(self, key: str) -> str:
        """The value at a key of the chart's values; empty where there is none."""
        return get(self.values, key, str) or ""

    @property
    def instance(self) -> str:
        return self.text("instance")

    @property
    def hardware(self) -> Instance | None:
        """None for cpu."""
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
    def image(self) -> Image:
        tag, digest = self.text("image.tag"), self.text("image.digest")
        reference = self.text("image.repository") + (f":{tag}" if tag else "") + (f"@{digest}" if digest else "")
        return parse_image(reference)

    @property
    def image_is_ecrs(self) -> bool:
        """By its address, even where that has a mistake."""
        return self.image.in_ecr or bool(invalid_account(self.image))

    @property
    def makes_claim(self) -> bool:
        return not self.text("storage.existingClaim") and get(self.values, "storage.enabled", bool) is not False

    @property
    def storage_kind(self) -> str:
        """Empty where an existing claim is used: what is behind that only the cluster knows."""
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
    def s3_source(self) -> tuple[str, str] | None:
        """Bucket and key of an s3:// dataset."""
        source = self.text("dataset.source")
        if not source.startswith("s3://"):
            return None
        bucket, _, key = source.removeprefix("s3://").partition("/")
        return bucket, key

    @property
    def hub_dataset(self) -> str:
        source = self.text("dataset.source")
        return "" if "://" in source or source.startswith("/") or is_file(source) else source

    @property
    def token_secret(self) -> str:
        return self.text("huggingFace.tokenSecret")

    def regions(self, asked: str | None, configured: str | None) -> list[tuple[str, str]]:
        """Who names a region, and which: the first is the one that is used."""
        named = [("--region", asked or ""), ("the image's address", self.image.region)]
        if self.file_system and (address := FSX_ADDRESS.fullmatch(self.text("storage.static.dnsName"))):
            named.append(("the file system's address", address["region"]))
        named.append(("AWS_REGION or the profile", configured or ""))
        return [(who, region) for who, region in named if region]
