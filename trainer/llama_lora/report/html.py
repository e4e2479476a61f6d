"""What every page of a run shares: the document, its style, and tables. All text is escaped: rows are not trusted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

LONGEST_TEXT = 20_000  # characters of one text that a page shows

STYLE = """
:root { color-scheme: light dark;
  --paper: #fff; --panel: #f6f8fa; --ink: #1f2328; --muted: #59636e; --line: #d1d9e0; --first: #0969da;
  --second: #bc4c00; --good: #1a7f37; --good-paper: #dafbe1; --bad: #b42318; --bad-paper: #ffebe9;
  --trained: #c8ecd0; --special: #8250df; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #0d1117; --panel: #161b22; --ink: #e6edf3; --muted: #9198a1; --line: #30363d; --first: #58a6ff;
  --second: #f0883e; --good: #56d364; --good-paper: #12361f; --bad: #ff8780; --bad-paper: #4a1a1d;
  --trained: #1c4428; --special: #c297ff; } }
* { box-sizing: border-box; }
body { margin: 0; font: 16px/1.5 system-ui, sans-serif; background: var(--paper); color: var(--ink);
  overflow-wrap: anywhere; -webkit-text-size-adjust: 100%; }
main { max-width: 68rem; margin: 0 auto; padding: 1rem 1rem 3rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 1rem 0 .25rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
p { margin: .4rem 0; } .muted { color: var(--muted); }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line); }
th { font-weight: 400; color: var(--muted); width: 34%; } td { font-variant-numeric: tabular-nums; }
pre { margin: 0; padding: .6rem .7rem; background: var(--panel); border: 1px solid var(--line); border-radius: 6px;
  font: .85rem/1.5 ui-monospace, monospace; white-space: pre-wrap; unicode-bidi: isolate; }
mark { background: var(--trained); color: inherit; border-radius: 2px; }
b.special { font-weight: 600; color: var(--special); }
ins { background: var(--good-paper); color: var(--good); text-decoration: none; border-radius: 2px; }
del { background: var(--bad-paper); color: var(--bad); text-decoration: none; border-radius: 2px; }
summary { cursor: pointer; padding: .3rem 0; } details { margin: .5rem 0; }
.bar { display: block; height: .7rem; min-width: 1px; border-radius: 2px; background: var(--first); }
"""


def document(title: str, sections: Iterable[str], style: str = "") -> str:
    """A page that can load nothing and run nothing, whatever its text is."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style></head>\n<body><main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main></body></html>\n"
    )


def encode(page: str) -> bytes:
    """A page as UTF-8. Text of rows may have half a surrogate pair, which UTF-8 cannot encode."""
    return page.encode("utf-8", "backslashreplace")


def table(rows: Mapping[str, Any]) -> str:
    """Names and values."""
    cells = "".join(f"<tr><th>{escape(key)}</th><td>{escape(str(value))}</td></tr>" for key, value in rows.items())
    return f"<table>{cells}</table>"


def masked(pieces: Sequence[Mapping[str, Any]]) -> str:
    """An example (``data_report.masked_text``) with its trained text marked and its special tokens emphasized."""
    shown = []
    for piece in pieces:
        text = escape(piece["text"])
        text = f'<b class="special">{text}</b>' if piece["special"] else text
        shown.append(f"<mark>{text}</mark>" if piece["trained"] else text)
    return f"<pre>{''.join(shown)}</pre>"


def histogram(bins: Sequence[Mapping[str, int]]) -> str:
    """Examples by their length, {up_to, examples}."""
    most = max((each["examples"] for each in bins), default=1)
    rows = (
        f"<tr><th>up to {each['up_to']} tokens</th><td>{each['examples']}</td>"
        f'<td style="width:50%"><span class="bar" style="width:{100 * each["examples"] / most:.1f}%"></span></td></tr>'
        for each in bins
    )
    return f"<table>{''.join(rows)}</table>"


def shortened(text: str) -> str:
    """The text, cut to what a page shows."""
    more = len(text) - LONGEST_TEXT
    return text if more <= 0 else f"{text[:LONGEST_TEXT]} ... ({more:,} characters more)"
