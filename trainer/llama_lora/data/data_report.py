"""The data report: report.json as a dict, its lines for the log, and its part of a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from llama_lora.data.preparation import Counts
from llama_lora.data.rendering import Renderer, special_tokens
from llama_lora.data.tokens import IGNORED, Example
from llama_lora.report.html import document, histogram, masked, table

WARN_LOST = 0.01  # share of the tokens


def report_of(counts: Counts, renderers: Mapping[str, Renderer]) -> dict[str, Any]:
    """The part of report.json on the rows as they were read and rendered. ``renderers`` are by source."""
    main = renderers[""]
    return {
        "rendered_with": main.template(),
        "template": template_of(main),
        "date_in_template": main.date(),
        "rows_read": counts.rows,
        "kept": counts.rows - counts.dropped_rows,
        "dropped": dict(counts.dropped),
        "dropped_shown": counts.dropped_shown,
        "notes": dict(counts.notes),
        "truncated": counts.truncated,
        "split": counts.split,
        "lost": {
            "tokens": counts.lost,
            "share": round(counts.lost / max(1, counts.tokens), 4),
            "trained_tokens": counts.lost_trained,
            "trained_share": round(counts.lost_trained / max(1, counts.trained), 4),
        },
        "histogram": [{"up_to": 2**power, "examples": counts.histogram[power]} for power in sorted(counts.histogram)],
    }


def template_of(renderer: Renderer) -> dict[str, str | None]:
    """The template's name, and the beginning of the SHA-256 of a chat template."""
    name = "the tokenizer's chat template" if renderer.uses_chat_template else f"format {renderer.format}"
    return {"name": name, "sha256": renderer.template_hash()}


def masked_text(example: Example, tokenizer: Any) -> list[dict[str, Any]]:
    """Decode an example in pieces, split where the loss mask changes and around special tokens."""
    special = set(tokenizer.convert_tokens_to_ids(list(special_tokens(tokenizer))))
    pieces: list[tuple[bool, bool, list[int]]] = []
    for token, label in zip(example.input_ids, example.labels, strict=True):
        kind = (label != IGNORED, token in special)
        if not pieces or pieces[-1][:2] != kind:
            pieces.append((*kind, []))
        pieces[-1][2].append(token)
    return [
        {
            "trained": trained,
            "special": is_special,
            "text": tokenizer.decode(ids, clean_up_tokenization_spaces=False),
        }
        for trained, is_special, ids in pieces
    ]


def lines(report: Mapping[str, Any]) -> Iterator[str]:
    """What the log says of a report."""
    held_out = f", {report['eval']['rows']} of them held out" if "eval" in report else ""
    yield f"rows: {report['rows_read']} read, {report['kept']} kept{held_out}"
    for reason, count in report["dropped"].items():
        yield f"rows dropped: {count} ({reason})"
    for note, count in report["notes"].items():
        yield f"{note}: {count}"
    if report["truncated"]:
        yield f"rows truncated to maxSequenceLength: {report['truncated']}"
    if report["split"]:
        yield f"texts split into pieces of maxSequenceLength: {report['split']}"
    if report["duplicates"]:
        yield f"duplicates: {report['duplicates']} (counted, not removed)"
    if report.get("in_train_and_eval"):
        yield f"removed from train because they are held out too: {report['in_train_and_eval']}"
    if train := report.get("train"):
        yield (
            f"train: {train['tokens']} tokens, {train['trained_tokens']} of them with loss, in {train['rows']} rows "
            f"({train['packing_efficiency']:.1%} full)"
        )


def is_valid(report: Mapping[str, Any]) -> bool:
    """Whether an object that was read from a file can be shown as a data report."""
    try:
        page(report), list(lines(report)), warning(report)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
        return False
    return True


def warning(report: Mapping[str, Any]) -> str:
    """The warning about lost tokens; empty if there are few."""
    lost = report["lost"]
    if max(lost["share"], lost["trained_share"]) <= WARN_LOST:
        return ""
    return (
        f"{_lost(report)}, are lost because their rows are longer than training.maxSequenceLength: raise it, or set "
        "dataset.overlong"
    )


def _lost(report: Mapping[str, Any]) -> str:
    lost = report["lost"]
    return (
        f"{lost['tokens']} tokens ({lost['share']:.1%}), {lost['trained_tokens']} of them with loss "
        f"({lost['trained_share']:.1%} of those)"
    )


def page(report: Mapping[str, Any]) -> str:
    """report.html."""
    return document(
        f"Data of {report['source']}", [f"<h1>Data of {escape(str(report['source']))}</h1>", summary(report)]
    )


def summary(report: Mapping[str, Any]) -> str:
    """The part of a page on the data: counts, lengths, examples with their loss mask, and what was dropped."""
    dropped = "".join(
        f"<h3>{escape(reason)}: {report['dropped'][reason]}</h3>"
        + "".join(f"<p>{escape(row['place'])}</p><pre>{escape(row['row'])}</pre>" for row in rows)
        for reason, rows in report["dropped_shown"].items()
    )
    sections = [
        table(_counts(report)),
        "<h3>Tokens of an example</h3>" + histogram(report["histogram"]),
        "<h3>Examples as the model sees them</h3>",
        '<p>The loss covers the <mark>marked</mark> text. <b class="special">Special tokens</b> are emphasized.</p>',
        *(masked(pieces) for pieces in report["shown"]),
        f"<h3>Notes</h3>{table(report['notes'])}" if report["notes"] else "",
        f"<details><summary>Dropped rows</summary>{dropped}</details>" if dropped else "",
    ]
    return "".join(sections)


def _counts(report: Mapping[str, Any]) -> dict[str, Any]:
    train, template = report.get("train", {}), report["template"]
    shown = {
        "revision": report.get("revision"),
        "rows read": report["rows_read"],
        "rows kept": report["kept"],
        "rows held out": report["eval"]["rows"] if "eval" in report else None,
        "duplicates": report["duplicates"],
        "removed from train, because held out too": report.get("in_train_and_eval"),
        "truncated": report["truncated"],
        "split": report["split"],
        "lost": _lost(report),
        "tokens in train": train.get("tokens"),
        "share with loss": f"{1 - train['mask_share']:.2%}" if train else None,
        "rows of maxSequenceLength": train.get("rows"),
        "full": f"{train['packing_efficiency']:.2%}" if train else None,
        "template": template["name"] + (f", SHA-256 {template['sha256']}..." if template["sha256"] else ""),
        "date in the template": report["date_in_template"],
    }
    return {key: value for key, value in shown.items() if value is not None}
