"""Read YAML that Helm rendered."""

from __future__ import annotations

from typing import Any

import yaml

# toYaml writes the texts = and << without quotes. In YAML 1.1, which PyYAML reads, they have a meaning of their own.
NOT_QUOTED = ("tag:yaml.org,2002:value", "tag:yaml.org,2002:merge")
RESOLVERS = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in NOT_QUOTED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class RenderedLoader(yaml.SafeLoader):
    """PyYAML's loader, for which = and << are text."""

    yaml_implicit_resolvers = RESOLVERS


def load_rendered(text: str) -> Any:
    """The content of one YAML document. Raises yaml.YAMLError."""
    return yaml.load(text, Loader=RenderedLoader)
