"""No test of the generator asks the Hub: a model that nobody knows stays unknown (plan/models.py)."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
