"""Checkpoints: an interrupted training resumes, and ends with the same result as without the interruption."""

import time
import warnings
from pathlib import Path
from typing import Any

import torch

from parts.files import replacing


class Checkpoint:
    """A folder with the newest two states of a model, an optimizer and so on.

    A file gets its name only when it is complete, so SIGKILL or a full disk costs only the steps since the last file.
    `torch.load` reads with `weights_only=True`, which runs no code from the file.
    """

    def __init__(self, folder: Path | None, *, every: float = 60.0, **objects: Any) -> None:
        self.folder, self.every, self.objects = folder, every, objects
        self.saved = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """Load the newest readable state into all objects and the random generators; return its notes."""
        for file in self._files():
            try:
                state = torch.load(file, weights_only=True)
            except Exception as error:  # damaged after it was written: take the one before
                warnings.warn(f"{file} can't be read and is passed over: {error}", stacklevel=2)
                continue
            for name, target in self.objects.items():
                target.load_state_dict(state[name])
            torch.set_rng_state(state["random"])
            if torch.cuda.is_available():
                torch.cuda.set_rng_state_all(state["random_cuda"])
            return state["notes"]
        return None

    def save(self, step: int, notes: dict[str, Any]) -> None:
        """Write the state after this step, if the last write was at least `every` seconds ago."""
        if self.folder is None or time.monotonic() - self.saved < self.every:
            return
        state = {name: source.state_dict() for name, source in self.objects.items()}
        state |= {"notes": notes, "random": torch.get_rng_state()}
        if torch.cuda.is_available():
            state["random_cuda"] = torch.cuda.get_rng_state_all()
        with replacing(self.folder / f"step-{step:08d}.pt") as partial:
            torch.save(state, partial)
        for old in self._files()[2:]:
            old.unlink()
        self.saved = time.monotonic()

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.pt"), reverse=True) if self.folder is not None else []
