"""Image references as in Docker and Kubernetes."""

from __future__ import annotations


def split_image(image: str) -> tuple[str, str, str]:
    """Repository, tag and digest of an image reference."""
    name, _, digest = image.partition("@")
    repository, colon, tag = name.rpartition(":")
    if not colon or "/" in tag:  # the colon belongs to the registry's port
        return name, "", digest
    return repository, tag, digest
