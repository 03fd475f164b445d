"""Blocks of the docs run in a temporary folder, with mocks for loggers that are not installed."""

import importlib.util
import sys
from unittest.mock import MagicMock

LOGGERS = ["wandb", "trackio", "mlflow", "tensorboard"]


def go_there(monkeypatch, folder):
    """Change to a folder, so that a block writes its files there, and mock the loggers that are missing."""
    monkeypatch.chdir(folder)
    for name in LOGGERS:
        if importlib.util.find_spec(name) is None:
            module = "torch.utils.tensorboard" if name == "tensorboard" else name
            monkeypatch.setitem(sys.modules, module, MagicMock())
