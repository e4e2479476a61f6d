"""A small Llama is trained for real in the cluster, and what disturbs the training leaves no trace in its result."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from chart.manifests import Values, merged
from cluster.space import EFA, NEURON, SMALL, TRAINER_IMAGE, Space, holds, image, is_stage, labels_of, uids
from trainer.conftest import make_model, write_rows

STAGES = ["tokenize", "compile", "train", "consolidate", "merge", "evaluate"]
TRAINING: Values = merged(
    SMALL,
    image(TRAINER_IMAGE),
    {
        "dataset": {"evalFraction": 0.1},
        "lora": {"r": 4, "alpha": 8, "dropout": 0.1, "targetModules": ["q_proj", "v_proj"]},
        "training": {
            "maxSequenceLength": 128,
            "gradientAccumulationSteps": 1,
            "maxSteps": 40,
            "learningRate": 1e-2,
            "saveSteps": 5,
        },
        "evaluation": {"maxRows": 8, "samples": 1, "maxNewTokens": 8},
    },
)
