"""Draw docs/pipeline.svg from the stages that the chart renders for values/trn1.values.yaml: `make generate`.

Boxes and text have their own colors, and the gray of the lines has enough contrast on white and on black, so GitHub's
light and dark themes show the same file.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

import yaml

Object = dict[str, Any]

ROOT = Path(__file__).parents[1]
VALUES = ROOT / "values/trn1.values.yaml"
PICTURE = ROOT / "docs/pipeline.svg"

# What a stage does, in at most two lines of 24 characters. A stage without an entry is drawn with its name alone.
DOES = {
    "preflight": "checks cluster, nodes, volume and token",
    "storage-prepare": "gives the volume to the run's user",
    "tokenize": "downloads the model; tokenizes and packs rows",
    "rehearse": "the whole run on a small model",
    "compile": "compiles every graph of the training",
    "neff": "compiles the graphs on a CPU node",
    "train": "LoRA, with sharded checkpoints",
    "consolidate": "checkpoint shards to a PEFT adapter",
    "merge": "base + adapter to safetensors",
    "evaluate": "loss before and after, samples, report",
    "publish": "uploads the results to S3 or the Hub",
}
NEURON = "aws.amazon.com/neuron"
GATE = "-gate"

COLUMNS = 5
WIDTH, HEIGHT, GATE_HEIGHT = 152, 84, 38  # of a box, and of the gate below it, in pixels
ACROSS, DOWN, MARGIN = 20, 26, 2  # between columns, between rows, around everything
CPU_COLORS, NEURON_COLORS, GATE_COLORS = ("#ddf4ff", "#0969da"), ("#fff1e5", "#bc4c00"), ("#f6f8fa", "#6e7781")
TEXT, LINES = "#1f2328", "#7d8590"


class Stage(NamedTuple):
    name: str
    devices: int  # Neuron devices of each pod
    nodes: int
    gated: bool


def stages_of(objects: list[Object]) -> list[Stage]:
    """The hooks that run after an install, by weight. A gate is part of the stage that it is named after."""
    hooks = sorted((item for item in objects if "post-install" in annotation(item, "helm.sh/hook")), key=weight)
    names = [annotation(item, "llama-lora/stage") for item in hooks]
    return [
        Stage(name, *devices_and_nodes(item), gated=f"{name}{GATE}" in names)
        for name, item in zip(names, hooks, strict=True)
        if name and name.removesuffix(GATE) not in set(names) - {name}
    ]


def annotation(item: Object, key: str) -> str:
    return str((item["metadata"].get("annotations") or {}).get(key, ""))


def weight(item: Object) -> int:
    return int(annotation(item, "helm.sh/hook-weight") or 0)


def devices_and_nodes(item: Object) -> tuple[int, int]:
    """Neuron devices of each pod, and the number of pods."""
    if item["kind"] != "PyTorchJob":
        template, nodes = item["spec"]["template"], 1
    else:
        [workers] = item["spec"]["pytorchReplicaSpecs"].values()
        template, nodes = workers["template"], workers["replicas"]
    limits = template["spec"]["containers"][0].get("resources", {}).get("limits", {})
    return int(limits.get(NEURON, 0)), nodes


def picture(stages: list[Stage]) -> str:
    """The SVG: boxes in rows of COLUMNS, an arrow from each stage to the next, and a legend."""
    corners = list(corners_of(stages))
    width = MARGIN * 2 + COLUMNS * WIDTH + (COLUMNS - 1) * ACROSS
    legend = max(y for _, y in corners) + HEIGHT + DOWN
    height = legend + 20
    summary = ", ".join(f"{stage.name} ({'Trainium' if stage.devices else 'CPU'})" for stage in stages)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="-apple-system, BlinkMacSystemFont, Segoe UI, Helvetica, Arial, sans-serif" role="img">',
        f"<title>The pipeline: {escape(summary)}</title>",
    ]
    parts += [arrow(*here, *there) for here, there in pairwise(corners)]
    for stage, corner in zip(stages, corners, strict=True):
        parts += box(stage, *corner)
    return "\n".join([*parts, *key(legend), "</svg>", ""])


def corners_of(stages: list[Stage]) -> Iterator[tuple[int, int]]:
    """Left and top of each box. A row with a gate is as high as box and gate."""
    y = MARGIN
    for start in range(0, len(stages), COLUMNS):
        row = stages[start : start + COLUMNS]
        yield from ((MARGIN + column * (WIDTH + ACROSS), y) for column in range(len(row)))
        y += HEIGHT + DOWN + (GATE_HEIGHT if any(stage.gated for stage in row) else 0)


def box(stage: Stage, x: int, y: int) -> Iterator[str]:
    colors = NEURON_COLORS if stage.devices else CPU_COLORS
    if stage.gated:
        yield rectangle(x, y + HEIGHT - 5, WIDTH, GATE_HEIGHT + 5, GATE_COLORS)
        yield line_of_text(x + 10, y + HEIGHT + 15, "gate: skips or starts it,")
        yield line_of_text(x + 10, y + HEIGHT + 30, "follows it, enforces limits")
    yield rectangle(x, y, WIDTH, HEIGHT, colors)
    yield line_of_text(x + 10, y + 20, stage.name, size=14, weight=600)
    for number, line in enumerate(textwrap.wrap(DOES.get(stage.name, ""), 24)):
        yield line_of_text(x + 10, y + 38 + 15 * number, line)
    nodes = f"{stage.nodes} x " if stage.nodes > 1 else ""
    needs = f"{nodes}{stage.devices} Neuron devices" if stage.devices else "CPU"
    yield line_of_text(x + 10, y + 75, needs, weight=600, color=colors[1])


def arrow(x: int, y: int, next_x: int, next_y: int) -> str:
    if next_y == y:
        end, middle = next_x, y + HEIGHT // 2
        line, head = (
            f"M{x + WIDTH} {middle}H{end - 6}",
            f"M{end - 7} {middle - 4}L{end - 1} {middle}L{end - 7} {middle + 4}z",
        )
    else:  # from below the last box of a row, between the rows, to above the first box of the next
        end, turn = next_x + WIDTH // 2, next_y - DOWN + 8
        line = f"M{x + WIDTH // 2} {y + HEIGHT}V{turn}H{end}V{next_y - 6}"
        head = f"M{end - 4} {next_y - 7}L{end} {next_y - 1}L{end + 4} {next_y - 7}z"
    return f'<path d="{line}" fill="none" stroke="{LINES}" stroke-width="1.5"/><path d="{head}" fill="{LINES}"/>'


def key(y: int) -> Iterator[str]:
    x = MARGIN
    for colors, meaning in (
        (CPU_COLORS, "runs on a CPU node"),
        (NEURON_COLORS, "holds Trainium nodes"),
        (GATE_COLORS, "a Job on a CPU node that controls a PyTorchJob or TrainJob"),
    ):
        yield rectangle(x, y + 3, 14, 14, colors)
        yield line_of_text(x + 20, y + 14, meaning, color=LINES)
        x += 50 + 6 * len(meaning)


def rectangle(x: int, y: int, width: int, height: int, colors: tuple[str, str]) -> str:
    fill, stroke = colors
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="5" fill="{fill}" stroke="{stroke}"/>'


def line_of_text(x: int, y: int, text: str, *, size: int = 11, weight: int = 400, color: str = TEXT) -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" font-weight="{weight}" fill="{color}">{escape(text)}</text>'


def attached(values: Object) -> Object:
    """Set the mode in which the stages are hooks of the release itself."""
    return {**values, "pipeline": {**values.get("pipeline", {}), "mode": "attached"}}


if __name__ == "__main__":
    from genvalues.common import helm

    values = attached(yaml.safe_load(VALUES.read_text(encoding="utf-8")))
    PICTURE.write_text(picture(stages_of(helm.render(ROOT / "chart", "llama-lora", values))), encoding="utf-8")
