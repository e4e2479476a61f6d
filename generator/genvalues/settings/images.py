"""Image references as in Docker and Kubernetes."""

from __future__ import annotations

import re

# ACCOUNT.dkr.ecr.REGION.amazonaws.com, and its FIPS, China and dual-stack forms:
# https://docs.aws.amazon.com/AmazonECR/latest/userguide/Registries.html
ECR = re.compile(
    r"(?P<account>[0-9]+)\.dkr[.-]ecr(-fips)?\.(?P<region>[a-z]{2,4}(-[a-z]+)+-[0-9]+)"
    r"\.(?P<domain>amazonaws\.com(\.cn)?|on\.aws|on\.amazonwebservices\.com\.cn)"
)


def split_image(image: str) -> tuple[str, str, str]:
    """Repository, tag and digest of an image reference."""
    name, _, digest = image.partition("@")
    repository, colon, tag = name.rpartition(":")
    if not colon or "/" in tag:  # the colon belongs to the registry's port
        return name, "", digest
    return repository, tag, digest
