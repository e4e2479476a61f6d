"""Read the JSON files of a model folder, which come with a model from elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from genvalues.common.errors import UserError
from genvalues.common.json_files import InvalidJson, JsonNotFound, read_object

COPY_AGAIN = "Copy the file again from its source."


def read_model_json(file: Path) -> dict[str, Any]:
    """Read a file such as config.json; empty if there is none. Raises UserError if it is damaged."""
    try:
        return read_object(file)
    except JsonNotFound:
        return {}
    except InvalidJson as error:
        raise UserError(str(error), where=str(file), fix=COPY_AGAIN) from None
