"""Write files atomically, so that a file that exists is complete; and compute checksums."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path, rank: int) -> Iterator[Path]:
    """Yield a temporary path to write to; after a sync to disk it replaces `path`."""
    partial = path.with_name(f"{path.name}.{rank}.partial")
    try:
        yield partial
        _sync(partial)
        os.replace(partial, path)
        _sync(path.parent)
    except OSError as error:
        raise OSError(
            f"{path} could not be written ({error}); nothing of it is left and finished shards are complete: "
            "free some space, then the same call goes on"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def remove_partials(folder: Path, rank: int, world: int) -> None:
    """Remove partial files that a killed process left: those of this rank, and of ranks this run doesn't have."""
    for partial in folder.glob("*.partial"):
        of = int(partial.name.split(".")[-2])
        if of == rank or of >= world:
            partial.unlink(missing_ok=True)


def save_json(content: Any, path: Path, rank: int) -> None:
    """Write JSON."""
    with replacing(path, rank) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def sha256(path: Path) -> str:
    """The SHA-256 of a file, read in pieces."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            found.update(piece)
    return found.hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
