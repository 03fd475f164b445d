"""Cells: pieces of work whose results are kept, so that a killed run resumes with the missing ones."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from parts import files


def key(settings: Mapping[str, Any]) -> str:
    """A hash of these settings, the same in every process."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:12]


def cell(
    folder: Path,
    name: str,
    settings: Mapping[str, Any],
    work: Callable[[Path], dict[str, Any]],
    product: Path | None = None,
) -> dict[str, Any]:
    """The result of `work` with these settings; read from a file if it was finished earlier.

    `work` gets a folder for checkpoints, to resume after an interruption. If `product` is missing, it runs again.
    """
    file = folder / f"{name}-{key(settings)}.json"
    if file.is_file() and (product is None or product.exists()):
        return json.loads(file.read_text(encoding="utf-8"))["result"]
    unfinished = file.with_suffix(".checkpoints")
    result = work(unfinished)
    files.save_json({"settings": settings, "result": result}, file)
    files.remove(unfinished)
    return result


def begun(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Whether a folder holds a run with these settings (settings.json). Raise an error if it holds another run."""
    file = folder / "settings.json"
    if not file.is_file():
        return False
    theirs = json.loads(file.read_text(encoding="utf-8"))
    mine = {name: str(value) for name, value in settings.items()}
    if differ := [name for name in mine if mine[name] != str(theirs.get(name))]:
        raise ValueError(
            f"{folder} holds a run with other settings: "
            + ", ".join(f"{name} {theirs.get(name)}, not {mine[name]}" for name in differ)
            + "; give another --output, or remove the folder"
        )
    return True
