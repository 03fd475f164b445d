"""Write files and folders atomically: they are complete or absent."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path for a file or a folder; when it is complete, it replaces `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    remove(partial)  # left by a killed run
    try:
        yield partial
        for file in partial.rglob("*") if partial.is_dir() else [partial]:
            sync(file)
    except Exception as error:
        remove(partial)
        raise OSError(
            f"{path} could not be written ({error}). The partial copy was removed, and all other files are kept: "
            "free some space, then run the same command again; it resumes"
        ) from error
    except BaseException:
        remove(partial)
        raise
    if partial.is_dir():
        remove(path)
    os.replace(partial, path)
    sync(path.parent)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until the content is on the disk, so that it is there before its name is."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_json(content: Any, path: Path) -> None:
    """Write JSON; values of other types are written as text."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
