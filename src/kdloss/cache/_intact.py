"""Check that files are unchanged. The result is remembered on this machine, so a file is not read again for it."""

import hashlib
import os
import platform
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from kdloss.cache import _files

_SETTLED = 2.0  # seconds after which another change surely gets another time stamp, on any file system


def check_intact(file: Path, expected: str, *, again: bool = False) -> None:
    """Raise unless a file has this checksum. `again` computes it even if a result is remembered."""
    try:
        before = file.stat()
    except FileNotFoundError as error:
        raise ValueError(f"{file} is gone; the same call of kdloss.cache.write writes it again") from error
    mark = _mark(file, before, expected)
    if not again and _is_mine(mark):
        return
    check_checksum(file, _files.sha256(file), expected)
    if mark == _mark(file, file.stat(), expected) and time.time() - before.st_ctime > _SETTLED:
        with suppress(OSError):  # if nothing can be written, nothing is remembered
            mark.parent.mkdir(mode=0o700, exist_ok=True)
            mark.touch()


def check_checksum(file: Path, found: str, expected: str) -> None:
    """Raise if two checksums differ."""
    if found != expected:
        raise ValueError(
            f"{file} was cut or altered: its checksum is not the manifest's; the same call of "
            "kdloss.cache.write writes it again"
        )


def _mark(file: Path, now: os.stat_result, expected: str) -> Path:
    """The path of an empty file that records that this file, in its present state, has this checksum."""
    state = (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns)
    record = repr((_machine(), str(file.resolve()), state, expected))
    try:
        place = tempfile.gettempdir()
    except FileNotFoundError:
        place = os.devnull  # no file can exist in there
    return Path(place, f"kdloss-{_user()}", hashlib.sha256(record.encode()).hexdigest())


def _is_mine(mark: Path) -> bool:
    """Whether this user made the mark."""
    try:
        return mark.stat().st_uid == _user()
    except OSError:
        return False


def _user() -> int:
    """The user's id; 0 on systems without user ids."""
    return getattr(os, "getuid", int)()


def _machine() -> str:
    """Identify the machine since its last boot, because data may be lost in a power cut."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    except OSError:
        return platform.node()
