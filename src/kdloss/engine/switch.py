"""Whether the work on logits is compiled."""

import os
from typing import Literal

import torch

Mode = Literal["auto"] | bool
_MODES: dict[str, Mode] = {"auto": "auto", "1": True, "0": False}
_mode: list[Mode] = []


def set_compile(mode: Mode) -> None:
    """Whether the work on logits is fused by `torch.compile`: True, False, or "auto", which is on CUDA devices alone.

    Compiled, the logits are read once for all sums and once for the gradient. Values and gradients are the same up to
    rounding. The first step takes some seconds longer, and needs a C++ compiler on CPUs and Triton on CUDA devices.
    What was compiled is compared with the uncompiled work where it is used first: where they differ, or compiling
    fails, a warning is logged, and the work is done uncompiled. Functions of your own and logits sharded over processes
    are never compiled, nor is what has a top-k teacher on a CPU, or one with tail="uniform".

    - `mode`: holds for the whole process, in place of the environment variable `KDLOSS_COMPILE` ("auto", "1", "0").

    Raises: ValueError for anything else.

    >>> import kdloss
    >>> kdloss.set_compile("auto")
    """
    if mode not in ("auto", True, False):
        raise ValueError(f'mode is "auto", True or False, got {mode!r}')
    _mode[:] = [mode]


def wanted(device: torch.device) -> bool:
    """Whether work on this device is to be compiled."""
    said = os.environ.get("KDLOSS_COMPILE", "auto")
    if not _mode and said not in _MODES:
        raise ValueError(f'KDLOSS_COMPILE is "auto", "1" or "0", got {said!r}')
    mode = _mode[0] if _mode else _MODES[said]
    return device.type == "cuda" if mode == "auto" else mode
