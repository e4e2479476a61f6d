"""What a report can show, made here: of an ordinary run, and of one whose rows attack the reader."""

from __future__ import annotations

import math
from typing import Any

from llama_lora.report.facts import Facts, StageTime
from llama_lora.verdict import Verdict

ATTACKS = [
    "</script><img src=https://tracker.example/a onerror=\"attacked='img'\"><script>attacked='script'</script>",
    "</pre></main></style><style>body{background:url(https://tracker.example/b)}</style>",
    '" onload="attacked=1" x="<svg onload=attacked=1><iframe src=https://tracker.example/c>',
    "<meta http-equiv=refresh content='0;url=https://tracker.example/d'><base href=https://tracker.example>",
    "a" * 3000 + "\u202e\x00\x1b[31m\ud800 ]]> <!-- &amp; &#60;b&#62;",
]
NAME = "<b onclick=attacked=1>" + "n" * 200


def plain_facts(**changes: Any) -> Facts:
    steps = 240
    metrics = [
        {
            "step": step,
            "loss": 1.4 + math.exp(-step / 40) + 0.05 * math.sin(step * 7.3),
            "learning_rate": 2e-4 * (1 - step / steps),
            "grad_norm": 0.5 + 0.3 * math.sin(step) ** 2,
            "tokens": 8000,
            "trained_tokens": 5000,
            "rows_done": 4 * step,
            "tokens_per_second": 5100 + 20 * math.cos(step),
        }
        for step in range(1, steps + 1)
    ]
    held_out = [
        {"step": step, "eval_loss": 1.5 + math.exp(-step / 40) + step / 2000, "eval_rows": 64}
        for step in range(0, 241, 20)
    ]
    settings: dict[str, Any] = {
        "name": "greetings",
        "on_cpu": False,
        "written": 1_796_000_000.0,
        "verdict": Verdict("better", 0.31, 0.28, 0.34, 256),
        "scores": {"base": {"loss": 2.1, "perplexity": 8.2}, "merged": {"loss": 1.79, "perplexity": 6.0}},
        "samples": [
            {
                "prompt": "What is 2 + 2?",
                "reference": "It is 4.",
                "base": "2 + 2 is an addition of two numbers.",
                "merged": "It is 4, an addition of two numbers.",
            }
        ],
        "metrics": metrics,
        "held_out": held_out,
        "training": {"steps": steps, "held_out": {"best_step": 160}, "stopped_early": True},
        "stages": [StageTime("tokenize", 0, 60), StageTime("train", 90, 4000), StageTime("evaluate", 4000, 4500)],
        "node_hours": 2.5,
        "price": 21.5,
        "data": data_of("What is 2 + 2?"),
        "settings": {"lora.r": 16},
        "sources": {"base model": "meta-llama/Llama-3.1-8B @ " + "0123456789" * 4, "dataset": "org/rows @ " + "a" * 64},
        "versions": {"torch": "2.15.0"},
        "fingerprints": {"train": "f" * 64},
        "digests": {"runs/x/merged/model.safetensors": "b" * 64},
    }
    return Facts(**{**settings, **changes})


def hostile_facts() -> Facts:
    """Every text of the page is an attack."""
    text = " ".join(ATTACKS)
    hostile = {text: text}
    return plain_facts(
        name=NAME,
        samples=[dict.fromkeys(("prompt", "reference", "base", "merged"), attack) for attack in ATTACKS]
        + [{"prompt": "x", "reference": "y", "base": ATTACKS[0], "merged": ATTACKS[1]}],
        data=data_of(text),
        stages=[StageTime(text, 0, 1)],
        **dict.fromkeys(("settings", "sources", "versions", "fingerprints", "digests"), hostile | {"base model": text}),
    )


def data_of(text: str) -> dict[str, Any]:
    """A data report with this text wherever it has text of rows."""
    return {
        "source": text,
        "revision": text,
        "rows_read": 10,
        "kept": 9,
        "dropped": {text: 1},
        "dropped_shown": {text: [{"place": text, "row": text}]},
        "notes": {text: 3},
        "truncated": 0,
        "split": 0,
        "lost": {"tokens": 0, "share": 0.0, "trained_tokens": 0, "trained_share": 0.0},
        "histogram": [{"up_to": 32, "examples": 4}, {"up_to": 64, "examples": 5}],
        "duplicates": 1,
        "template": {"name": text, "sha256": text[:12]},
        "date_in_template": text,
        "train": {"tokens": 100, "mask_share": 0.5, "rows": 3, "packing_efficiency": 0.9},
        "eval": {"rows": 2},
        "shown": [
            [{"trained": True, "special": True, "text": text}, {"trained": False, "special": False, "text": text}]
        ],
    }
