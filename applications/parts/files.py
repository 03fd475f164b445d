"""Files and folders that are whole whenever they are there."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name to write a file or a folder under; once whole, it takes the place of `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    remove(partial)  # of a run that was killed
    try:
        yield partial
        for file in partial.rglob("*") if partial.is_dir() else [partial]:
            sync(file)
    except Exception as error:
        remove(partial)
        raise OSError(
            f"{path} could not be written ({error}); nothing of it is left and nothing else is lost: "
            "free some space, then the same command goes on"
        ) from error
    except BaseException:
        remove(partial)
        raise
    if partial.is_dir():
        remove(path)
    os.replace(partial, path)
    sync(path.parent)


def remove(path: Path) -> None:
    """Whatever is there, if anything."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until it is on the disk, so that a name never goes before its content."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_json(content: Any, path: Path) -> None:
    """Write JSON; what JSON doesn't know is written as text."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
