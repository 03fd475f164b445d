"""Training that goes on where it was interrupted, and ends as if it never had been."""

import time
import warnings
from pathlib import Path
from typing import Any

import torch

from parts.files import replacing


class Checkpoint:
    """States of a model, an optimizer and so on in a folder, the newest two of them.

    A file gets its name only when it is whole, so SIGKILL or a full disk at any instant cost the
    steps since the last one and nothing else. `torch.load` reads weights only, it runs no code.
    """

    def __init__(self, folder: Path | None, *, every: float = 60.0, **parts: Any) -> None:
        self.folder, self.every, self.parts = folder, every, parts
        self.saved = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """Bring all parts and the random numbers to the newest whole state; returns its notes."""
        for file in self._files():
            try:
                state = torch.load(file, weights_only=True)
            except Exception as error:  # damaged after it was written: the one before will do
                warnings.warn(f"{file} can't be read and is passed over: {error}", stacklevel=2)
                continue
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            torch.set_rng_state(state["random"])
            if torch.cuda.is_available():
                torch.cuda.set_rng_state_all(state["random_cuda"])
            return state["notes"]
        return None

    def save(self, step: int, notes: dict[str, Any]) -> None:
        """Write the state after this step, if the last one is `every` seconds old."""
        if self.folder is None or time.monotonic() - self.saved < self.every:
            return
        state = {name: part.state_dict() for name, part in self.parts.items()}
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
