"""Keep the libraries' notices out of the log, so that what is left in it is worth reading. Imported first."""

from __future__ import annotations

import os
import warnings

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # "module name tiny@1a2b is not a valid identifier", a load
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else a warning after every fork
for library in ("torch", "transformers", "peft"):
    warnings.filterwarnings("ignore", module=library)
