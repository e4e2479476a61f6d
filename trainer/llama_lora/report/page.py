"""Render the report. What a reader wants first comes first: the verdict, then the training, answers, and the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from html import escape
from typing import Any

from genvalues.common.dicts import get
from genvalues.common.text import duration
from llama_lora.data import data_report
from llama_lora.report import charts, differences
from llama_lora.report.charts import Series, chart, smoothed
from llama_lora.report.facts import Facts
from llama_lora.report.html import document, shortened, table
from llama_lora.runlog import is_number
from llama_lora.verdict import RESAMPLES

MOST_SAMPLES = 20

STYLE = """
.verdict { margin: 1rem 0; padding: .8rem 1rem; border-radius: 8px; border-left: 6px solid var(--muted);
  background: var(--panel); font-size: 1.1rem; } .verdict strong { font-size: 1.3rem; }
.verdict.better { border-color: var(--good); background: var(--good-paper); }
.verdict.worse { border-color: var(--bad); background: var(--bad-paper); }
.verdict p { font-size: .85rem; } .note { border-left: 4px solid var(--second); padding-left: .7rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .6rem; margin: 1rem 0; }
.tiles div { border: 1px solid var(--line); border-radius: 8px; padding: .5rem .7rem; }
.tiles span { display: block; color: var(--muted); font-size: .8rem; } .tiles b { font-size: 1.1rem; }
.tiles small { display: block; color: var(--muted); }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); gap: .8rem; }
.charts > figure:first-child { grid-column: 1 / -1; }
.sample { margin: 1rem 0 1.6rem; } .sample h4 { margin: .5rem 0 .2rem; font-size: .85rem; color: var(--muted); }
.times th { width: auto; color: var(--ink); } .times td { white-space: nowrap; }
.times td:last-child { width: 55%; vertical-align: middle; padding-right: 0; }
code { font: .85rem ui-monospace, monospace; }
"""


def page(facts: Facts) -> str:
    """The page as text; see ``html.encode`` for its bytes."""
    sections = [
        *_heading(facts),
        _section("Training", _training(facts)),
        _section("Answers", _samples(facts)),
        _section("Data", _data(facts)),
        _section("Stages and cost", _stages(facts)),
        _section("Provenance", _provenance(facts)),
    ]
    return document(f"{facts.name}: {facts.verdict.verdict}", sections, charts.STYLE + STYLE)


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""


def _heading(facts: Facts) -> Iterator[str]:
    yield f"<h1>{escape(facts.name)}</h1>"
    model, _, revision = facts.sources.get("base model", "").rpartition(" @ ")
    yield f'<p class="muted">{escape(model)} @ {escape(revision[:12])} &middot; written {_time(facts.written)}</p>'
    if facts.on_cpu:
        yield '<p class="note">CPU run: times, memory and cost here say nothing about Trainium.</p>'
    word, _, rest = str(facts.verdict).partition(": ")
    yield (
        f'<div class="verdict {facts.verdict.verdict.split()[-1]}"><strong>{escape(word.capitalize())}:</strong> '
        f"{escape(rest)}<p>Both models on the same held-out rows, with an interval from {RESAMPLES:,} bootstrap "
        "resamples of these rows. It says nothing about other data, nor how good an answer is.</p></div>"
    )
    for note in facts.notes:
        yield f'<p class="note">{escape(note)}</p>'
    yield f'<div class="tiles">{"".join(_tiles(facts))}</div>'


def _tiles(facts: Facts) -> Iterator[str]:
    base, merged = facts.scores["base"], facts.scores["merged"]
    change = f"{(merged['loss'] - base['loss']) / base['loss']:+.1%}" if base["loss"] else ""
    yield _tile("Held-out loss", f"{base['loss']:.3f} &rarr; {merged['loss']:.3f}", change)
    yield _tile("Perplexity", f"{base['perplexity']:,.2f} &rarr; {merged['perplexity']:,.2f}")
    if facts.metrics:
        yield _tile("Steps", f"{len(facts.metrics):,}", _end_of_training(facts))
        trained = sum(step["trained_tokens"] for step in facts.metrics)
        yield _tile("Tokens", f"{sum(step['tokens'] for step in facts.metrics):,}", f"{trained:,} with loss")
    if facts.stages:
        yield _tile("Time in stages", duration(sum(each.seconds for each in facts.stages)))
    if cost := _cost(facts):
        yield _tile("Cost", *cost)


def _tile(title: str, value: str, note: str = "") -> str:
    return f"<div><span>{escape(title)}</span><b>{value}</b><small>{escape(note)}</small></div>"


def _end_of_training(facts: Facts) -> str:
    best = get(facts.training, "held_out.best_step", int)
    parts = ["stopped early"] if facts.training.get("stopped_early") else []
    return ", ".join(parts + ([f"lowest held-out loss at {best}"] if best else []))


def _training(facts: Facts) -> str:
    def of(name: str) -> list[charts.Point]:
        return [(step["step"], step[name]) for step in facts.metrics if is_number(step.get(name))]

    losses, norms = of("loss"), of("grad_norm")
    long = len(losses) >= charts.SMOOTHED_FROM
    held_out = [(point["step"], point["eval_loss"]) for point in facts.held_out]
    best = get(facts.training, "held_out.best_step", int)
    figures = [
        chart(
            "Loss",
            "nats per trained token",
            [
                Series("each step", losses, "faint" if long else "line"),
                Series("smoothed", smoothed(losses) if long else []),
                Series("held out", held_out, "dots", best),
            ],
            wide=True,
        ),
        chart("Learning rate", "", [Series("peak", of("learning_rate"), peak=True)], from_zero=True),
        chart(
            "Gradient norm",
            "before clipping",
            [
                Series("each step", norms, "faint" if long else "line"),
                Series("smoothed", smoothed(norms) if long else []),
            ],
            from_zero=True,
        ),
        chart("Speed", "tokens per second", [Series("last", of("tokens_per_second"))], from_zero=True),
    ]
    drawn = "".join(figures)
    return f'<div class="grid charts">{drawn}</div>' if drawn else "<p>Fewer than two steps.</p>"


def _data(facts: Facts) -> str:
    """The data section; nothing without a data report, or with one that lacks keys (verify: off reads any)."""
    try:
        return data_report.summary(facts.data) if facts.data else ""
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, ArithmeticError):
        return ""


def _samples(facts: Facts) -> str:
    shown = "".join(_sample(number, sample) for number, sample in enumerate(facts.samples[:MOST_SAMPLES], start=1))
    if not shown:
        return ""
    more = len(facts.samples) - MOST_SAMPLES
    note = f'<p class="muted">{more} more in evaluation/samples.json.</p>' if more > 0 else ""
    return (
        '<p class="muted">Held-out rows, answered without sampling. Marked: what only the <del>base</del> and what '
        f"only the <ins>merged</ins> model says.</p>{shown}{note}"
    )


def _sample(number: int, sample: Mapping[str, str]) -> str:
    base, merged = differences.marked(shortened(sample["base"]), shortened(sample["merged"]))
    texts = {
        "Prompt": escape(shortened(sample["prompt"])),
        "Reference": escape(shortened(sample["reference"])),
        "Base": base,
        "Merged": merged,
    }
    prompt, reference, before, after = (
        f"<div><h4>{title}</h4><pre>{text}</pre></div>" for title, text in texts.items()
    )
    answers = f'<div class="grid">{before}{after}</div>'
    return f'<article class="sample"><h3>Sample {number}</h3>{prompt}{reference}{answers}</article>'


def _stages(facts: Facts) -> str:
    if not facts.stages:
        return ""
    longest = max(each.seconds for each in facts.stages) or 1
    rows = "".join(
        f"<tr><th>{escape(each.name)}</th><td>{duration(each.seconds)}</td>"
        f'<td><span class="bar" style="width:{100 * max(0, each.seconds) / longest:.1f}%"></span></td></tr>'
        for each in facts.stages
    )
    first, last = facts.stages[0].started, facts.stages[-1].finished
    cost = _cost(facts)
    return (
        f'<table class="times">{rows}</table><p class="muted">From {_time(first)} to {_time(last)}. A stage that was '
        "interrupted or repeated has the time of its last run.</p>"
        + (f"<p>Cost of compile and train: {cost[0]} ({escape(cost[1])}).</p>" if cost else "")
    )


def _cost(facts: Facts) -> tuple[str, str] | None:
    """Dollars, or node hours where the price is not known, and a note."""
    if not facts.node_hours:
        return None
    hours = f"{facts.node_hours:,.2f} node hours"
    if facts.price is None:
        return hours, "price per node hour unknown"
    return f"${facts.node_hours * facts.price:,.2f}", f"{hours} at ${facts.price:,.10g}"


def _provenance(facts: Facts) -> str:
    folded: dict[str, Mapping[str, Any]] = {
        "Settings": facts.settings,
        "Versions": facts.versions,
        "Fingerprints of the stages": facts.fingerprints,
        "SHA-256 of the adapter and the merged model": facts.digests,
    }
    return table(facts.sources) + "".join(
        f"<details><summary>{escape(title)}</summary>{table(rows)}</details>" for title, rows in folded.items() if rows
    )


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
