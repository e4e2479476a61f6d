"""Image references, as Docker and Kubernetes write them."""

from __future__ import annotations


def split_image(image: str) -> tuple[str, str, str]:
    """Repository, tag and digest of an image reference."""
    name, _, digest = image.partition("@")
    repository, colon, tag = name.rpartition(":")
    if not colon or "/" in tag:  # the colon of a registry's port
        return name, "", digest
    return repository, tag, digest
