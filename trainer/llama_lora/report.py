"""The run's report.html: one self-contained file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from genvalues.common.dicts import flatten
from llama_lora.runlog import read_metrics
from llama_lora.stage import LIBRARIES, Stage, installed_versions, now

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; } th, td { text-align: left; padding: .2rem 1.2rem .2rem 0; vertical-align: top; }
pre { white-space: pre-wrap; background: #f6f6f6; padding: .6rem; overflow-wrap: anywhere; }
mark { background: #cdeccd; } .number { font-variant-numeric: tabular-nums; }
svg { width: 100%; height: auto; } figcaption { color: #666; }
"""


def page(stage: Stage, result: Mapping[str, Any], samples: Sequence[Mapping[str, str]]) -> str:
    """Render the report: held-out loss, loss curve, samples, data, settings, versions."""
    dataset = stage.upstream_path("tokenize", "dataset")
    data = json.loads((dataset / "report.json").read_text(encoding="utf-8"))
    trained = stage.upstream("train")
    metrics = read_metrics(stage.paths.metrics(trained.fingerprint))
    on_cpu = stage.config.device == "cpu"
    backend = "Trained on CPUs: the times and memory here do not apply to Trainium" if on_cpu else "Trainium"
    base, merged = result["base"], result["merged"]
    change = (merged["loss"] - base["loss"]) / base["loss"]
    sections = [
        f"<h1>{escape(stage.config.name)}</h1><p>{escape(backend)}. Written {now()}.</p>",
        f"<h2>Held-out loss: {base['loss']:.4f} &rarr; {merged['loss']:.4f} ({change:+.1%})</h2>",
        _table(
            {
                "": "base / merged",
                "loss, nats per token": f"{base['loss']:.4f} / {merged['loss']:.4f}",
                "perplexity": f"{base['perplexity']:.2f} / {merged['perplexity']:.2f}",
                "rows": result["rows"],
            }
        ),
        "<h2>Training loss</h2>" + loss_curve([step["loss"] for step in metrics]),
        "<h2>Samples</h2>" + "".join(_sample(sample) for sample in samples),
        "<h2>Data</h2>" + _table({key: value for key, value in flatten(data).items() if key != "shown"}),
        "<h3>Sample training rows</h3><p>The loss covers the <mark>marked</mark> text.</p>"
        + "".join(f"<pre>{_with_marks(pieces)}</pre>" for pieces in data["shown"]),
        "<h2>Settings</h2>" + _table(flatten(stage.config.as_keys())),
        "<h2>Versions</h2>" + _table(installed_versions(LIBRARIES)),
    ]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(stage.config.name)}</title>'
        f"<style>{STYLE}</style>{''.join(sections)}</html>\n"
    )


def loss_curve(losses: Sequence[float]) -> str:
    """Draw the loss of every step as inline SVG."""
    if len(losses) < 2:
        return "<p>Fewer than two steps.</p>"
    width, height, left, bottom = 800, 300, 50, 30
    low, high = min(losses), max(losses)
    span = (high - low) or 1.0

    def x(index: float) -> float:
        return left + index / (len(losses) - 1) * (width - left - 10)

    def y(loss: float) -> float:
        return 10 + (high - loss) / span * (height - bottom - 10)

    points = " ".join(f"{x(index):.1f},{y(loss):.1f}" for index, loss in enumerate(losses))
    ticks = "".join(
        f'<text x="{left - 6}" y="{y(loss) + 4:.1f}" text-anchor="end">{loss:.2f}</text>'
        f'<line x1="{left}" x2="{width - 10}" y1="{y(loss):.1f}" y2="{y(loss):.1f}" stroke="#ddd"/>'
        for loss in (low, low + span / 2, high)
    )
    return (
        f'<figure><svg viewBox="0 0 {width} {height}" font-size="12" role="img" aria-label="Training loss">'
        f"{ticks}"
        f'<polyline points="{points}" fill="none" stroke="#1f6feb" stroke-width="1.5"/>'
        f'<text x="{left}" y="{height - 8}">step 1</text>'
        f'<text x="{width - 10}" y="{height - 8}" text-anchor="end">step {len(losses)}</text></svg>'
        "<figcaption>Nats per trained token, by step.</figcaption></figure>"
    )


def _table(rows: Mapping[str, Any]) -> str:
    cells = "".join(
        f"<tr><th>{escape(key)}</th><td class=number>{escape(str(value))}</td></tr>" for key, value in rows.items()
    )
    return f"<table>{cells}</table>"


def _sample(sample: Mapping[str, str]) -> str:
    names = {"prompt": "Prompt", "reference": "Reference", "base": "Base", "merged": "Merged"}
    return "".join(f"<h4>{title}</h4><pre>{escape(sample[key])}</pre>" for key, title in names.items()) + "<hr>"


def _with_marks(pieces: Sequence[Mapping[str, Any]]) -> str:
    return "".join(
        f"<mark>{escape(piece['text'])}</mark>" if piece["trained"] else escape(piece["text"]) for piece in pieces
    )
