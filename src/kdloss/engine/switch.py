"""Whether the work on logits is compiled."""

import os
from typing import Literal

import torch

Mode = Literal["auto"] | bool
_MODES: dict[str, Mode] = {"auto": "auto", "1": True, "0": False}
_mode: list[Mode] = []


def set_compile(mode: Mode) -> None:
    """Set whether `torch.compile` fuses the work on logits: True, False, or "auto", which means on CUDA devices only.

    Compiled code reads the logits once for all sums and once for the gradient. Values and gradients are the same up to
    rounding. The first step takes some seconds longer, and needs a C++ compiler on CPUs and Triton on CUDA devices.
    The first use compares the compiled work with the uncompiled work. Where they differ, or compiling fails, a warning
    is logged and the work is done uncompiled. Your own functions and logits sharded over processes are never compiled.
    Neither is work with a top-k teacher on a CPU, or with one of tail="uniform".

    - `mode`: applies to the process, and replaces the environment variable `KDLOSS_COMPILE` ("auto", "1", "0").

    Raises: ValueError for anything else.

    >>> import kdloss
    >>> kdloss.set_compile("auto")
    """
    if mode not in ("auto", True, False):
        raise ValueError(f'mode is "auto", True or False, got {mode!r}')
    _mode[:] = [mode]


def wanted(device: torch.device) -> bool:
    """Whether to compile the work on this device."""
    said = os.environ.get("KDLOSS_COMPILE", "auto")
    if not _mode and said not in _MODES:
        raise ValueError(f'KDLOSS_COMPILE is "auto", "1" or "0", got {said!r}')
    mode = _mode[0] if _mode else _MODES[said]
    return device.type == "cuda" if mode == "auto" else mode
