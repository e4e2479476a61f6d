"""Mark the differences of two texts, word by word."""

from __future__ import annotations

import re
from difflib import SequenceMatcher
from html import escape

MOST_WORDS = 2_000  # of a text; the comparison takes the product of both in the worst case


def marked(before: str, after: str) -> tuple[str, str]:
    """Both texts as HTML: what only the first has in <del>, what only the second has in <ins>. Long texts unmarked."""
    old, new = words(before), words(after)
    if max(len(old), len(new)) > MOST_WORDS:
        return escape(before), escape(after)
    removed, added = [], []
    for kind, old_start, old_end, new_start, new_end in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        gone, come = escape("".join(old[old_start:old_end])), escape("".join(new[new_start:new_end]))
        removed.append(gone if kind == "equal" or not gone else f"<del>{gone}</del>")
        added.append(come if kind == "equal" or not come else f"<ins>{come}</ins>")
    return "".join(removed), "".join(added)


def words(text: str) -> list[str]:
    """Words with the space after them, and other characters one by one. Joined they are the text."""
    return re.findall(r"\w+\s*|\s+|[^\w\s]\s*", text)
