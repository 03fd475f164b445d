"""Checkpoints of a Trainer that include the criterion, and are either complete or removed."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object

FILE = "criterion.safetensors"


class WholeCheckpoints(Trainer):
    """Saves the criterion beside the student, and resumes from the newest complete checkpoint."""

    criterion: nn.Module

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the student as the Trainer does, and the criterion's parameters beside it; no teacher is saved."""
        super().save_model(output_dir, _internal_call)
        weights = {
            name: value.clone(memory_format=torch.contiguous_format)
            for name, value in self.criterion.state_dict().items()
        }
        if self.args.should_save and weights:
            save_file(weights, Path(output_dir or str(self.args.output_dir), FILE))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **settings: Any) -> Any:
        """The Trainer's `train`; True resumes from the newest complete checkpoint, or starts if there is none."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_complete(str(self.args.output_dir))
        return super().train(resume_from_checkpoint, *args, **settings)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_criterion(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_criterion(str(self.state.best_model_checkpoint))

    def _load_criterion(self, checkpoint: str) -> None:
        file = Path(checkpoint, FILE)
        if file.is_file():
            self.criterion.load_state_dict(load_file(file))
        elif self.criterion.state_dict():
            raise ValueError(
                f"{checkpoint} has no {FILE}, which holds a criterion's projections or step: it was written without "
                "this criterion. Resume with the criterion that it was trained with, or begin in another output_dir"
            )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
        (folder / "trainer_state.json").unlink(missing_ok=True)  # an earlier run's would mark this one complete
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch's and safetensors' own kinds
            shutil.rmtree(folder, ignore_errors=True)
            raise OSError(
                f"{folder} could not be written ({error}); it was removed, and earlier checkpoints are complete: free "
                "some space, then train(resume_from_checkpoint=True) goes on"
            ) from error

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # so that trainer_state.json is written last, after all processes


def newest_complete(folder: str | Path) -> str | None:
    """The newest complete checkpoint in a Trainer's output folder; None if there is none.

    - `folder`: the `output_dir`. Checkpoints that a killed run left incomplete are removed from it.

    >>> newest_complete("no/such/folder") is None
    True
    """
    found = Path(folder).glob("checkpoint-[0-9]*")
    for checkpoint in sorted(found, key=lambda c: int(c.name.rpartition("-")[2]), reverse=True):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())  # the file that a Trainer writes last
            return str(checkpoint)
        except (OSError, ValueError):
            shutil.rmtree(checkpoint, ignore_errors=True)
    return None
