"""manifest.json: the settings of a cache, and the checksums once all of its shards are written."""

import json
from pathlib import Path
from typing import Any

from kdloss.cache import _files, _shard

NAME = "manifest.json"
FORMAT = 1


def begin(folder: Path, settings: dict[str, Any], rank: int) -> None:
    """Write the settings of a new cache, or raise if the folder was begun with other settings."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / NAME).exists():
        _files.save_json(settings, folder / NAME, rank)
        return
    known = read(folder)
    if differ := [name for name in settings if settings[name] != known.get(name)]:
        changes = ", ".join(f"{name}={known.get(name)!r}, not {settings[name]!r}" for name in differ)
        raise ValueError(
            f"{folder} holds a cache written with other settings: {changes}; write into another folder, "
            "or remove this one"
        )


def complete(folder: Path, settings: dict[str, Any], rank: int) -> None:
    """Add the checksums if all shards are there; the process that finishes last does it."""
    names = _shard.names(shard_count(settings))
    if missing(folder, settings):
        return
    shards = {
        name: {
            "sha256": json.loads(_shard.index_file(folder, name).read_text(encoding="utf-8"))["sha256"],
            "index": _files.sha256(_shard.index_file(folder, name)),
        }
        for name in names
    }
    _files.save_json(settings | {"shards": shards}, folder / NAME, rank)


def shard_count(settings: dict[str, Any]) -> int:
    """The number of shards of the complete cache."""
    return -(-int(settings["examples"]) // int(settings["shard_size"]))


def missing(folder: Path, settings: dict[str, Any]) -> list[str]:
    """The shards that are not finished yet."""
    names = _shard.names(shard_count(settings))
    return [name for name in names if not _shard.index_file(folder, name).exists()]


def read(folder: Path) -> dict[str, Any]:
    """Read the manifest."""
    try:
        found: dict[str, Any] = json.loads((folder / NAME).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{folder} holds no {NAME}, so it is no cache: kdloss.cache.write makes one") from error
    except ValueError as error:
        raise ValueError(f"{folder / NAME} can't be read ({error}): remove it and write the cache again") from error
    if found.get("format") != FORMAT:
        raise ValueError(f"{folder} has format {found.get('format')!r}; kdloss reads {FORMAT} here: write it again")
    return found
