"""Whether files are as they were written; what was found whole on this machine isn't read for it again."""

import hashlib
import os
import platform
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from kdloss.cache import _files

_SETTLED = 2.0  # seconds after which a file that changes again has another time, on any file system


def whole(file: Path, expected: str, *, again: bool = False) -> None:
    """Raise unless a file has this checksum; `again` computes it whatever is remembered."""
    try:
        before = file.stat()
    except FileNotFoundError as error:
        raise ValueError(f"{file} is gone; the same call of kdloss.cache.write writes it again") from error
    mark = _mark(file, before, expected)
    if not again and _is_mine(mark):
        return
    refuse_other(file, _files.sha256(file), expected)
    if mark == _mark(file, file.stat(), expected) and time.time() - before.st_ctime > _SETTLED:
        with suppress(OSError):  # where nothing can be written nothing is remembered
            mark.parent.mkdir(mode=0o700, exist_ok=True)
            mark.touch()


def refuse_other(file: Path, found: str, expected: str) -> None:
    """Raise where a checksum is not the one there was."""
    if found != expected:
        raise ValueError(
            f"{file} was cut or altered: its checksum is not the manifest's; the same call of "
            "kdloss.cache.write writes it again"
        )


def _mark(file: Path, now: os.stat_result, expected: str) -> Path:
    """An empty file whose name says that this file, as it is now, has this checksum."""
    state = (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns)
    said = repr((_machine(), str(file.resolve()), state, expected))
    try:
        place = tempfile.gettempdir()
    except FileNotFoundError:
        place = os.devnull  # in which nothing is, nor can be made
    return Path(place, f"kdloss-{_user()}", hashlib.sha256(said.encode()).hexdigest())


def _is_mine(mark: Path) -> bool:
    """Whether this user made the mark."""
    try:
        return mark.stat().st_uid == _user()
    except OSError:
        return False


def _user() -> int:
    """Who this is; 0 where there are no numbers for it."""
    return getattr(os, "getuid", int)()


def _machine() -> str:
    """The machine since it was started: what a power cut took from a file is not remembered as being there."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    except OSError:
        return platform.node()
