"""Where blocks of the docs run: in a folder of their own, with stand-ins for loggers that nobody has installed."""

import importlib.util
import sys
from unittest.mock import MagicMock

LOGGERS = ["wandb", "trackio", "mlflow", "tensorboard"]


def go_there(monkeypatch, folder):
    """Files that a block writes are the test's, and what it logs goes nowhere."""
    monkeypatch.chdir(folder)
    for name in LOGGERS:
        if importlib.util.find_spec(name) is None:
            module = "torch.utils.tensorboard" if name == "tensorboard" else name
            monkeypatch.setitem(sys.modules, module, MagicMock())
