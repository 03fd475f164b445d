"""A Hugging Face Trainer that distils, and survives being killed; copy this file as it is."""

import json
import shutil
from pathlib import Path

from accelerate.utils import broadcast
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import Trainer

import kdloss
from kdloss.adapter import named


class DistillationTrainer(Trainer):
    """A Trainer whose training loss a `kdloss.Distiller` computes; evaluation is the student's alone.

    The criterion's projections are trained, clipped and saved like the student's own weights.
    `train(resume_from_checkpoint=True)` goes on from the newest checkpoint that is whole.
    """

    def __init__(self, *args, distill: kdloss.Distiller, **settings):
        super().__init__(*args, **settings)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"one process sees {self.args.n_gpu} GPUs and would run copies of the student, which no "
                f"hook reaches; start it by torchrun --nproc-per-node {self.args.n_gpu} SCRIPT, or with "
                "CUDA_VISIBLE_DEVICES=0"
            )
        if self.label_smoother is not None or self.compute_loss_func is not None:
            raise ValueError("the distiller computes the loss; leave out label_smoothing_factor and compute_loss_func")
        self.model_accepts_loss_kwargs = True  # the distiller takes num_items_in_batch for it
        self.distill, self.criterion = distill.prepare(self.model), distill.criterion
        self.args.remove_unused_columns &= distill.columns is not None
        if not hasattr(Trainer, "_clip_grad_norm"):  # transformers 4 asks the accelerator
            clip = self.accelerator.clip_grad_norm_
            self.accelerator.clip_grad_norm_ = lambda own, *limit: clip([*own, *self.criterion.parameters()], *limit)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The distiller's loss in training; in evaluation the student's own, hidden states left out."""
        if model.training:
            with self.accelerator.autocast():  # the teacher too
                out = self.distill(model, **inputs, num_items_in_batch=num_items_in_batch)
            return (out.loss, out.output) if return_outputs else out.loss
        loss, output = super().compute_loss(model, named(self.model, inputs), return_outputs=True)
        output = {name: value for name, value in output.items() if "hidden_state" not in name}
        return (loss, output) if return_outputs else loss

    def _set_signature_columns_if_needed(self):
        """The columns that the Trainer keeps: those that the student's forward names, and the teachers'."""
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            self._signature_columns += self.distill.columns

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one step, and how many labels in them count (those of padding are -100).

        The Trainer's own count includes labels that GPT-2 never predicts. It is the mean over
        processes, as DDP averages the gradients.
        """
        if self.state.global_step >= self.state.max_steps:
            return [], None  # resumed at the end, where the Trainer would go one step too far
        self.criterion.zero_grad()  # the Trainer does so with its model only
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches or "labels" not in batches[0]:
            return batches, None
        on_device = {name: x.to(self.args.device) for name, x in batches[0].items()}
        first = int(self.distill.shifts(self.model, **on_device))
        count = sum((batch["labels"][..., first:] != -100).sum() for batch in batches)
        total = self.accelerator.reduce(count.to(device), "sum").clamp_min(1)
        return batches, total / self.accelerator.num_processes

    def training_step(self, model, inputs, num_items_in_batch=None):
        """The Trainer's step; DDP knows of the student only, so projections are averaged here."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            for p in self.criterion.parameters():
                p.grad = None if p.grad is None else self.accelerator.reduce(p.grad, "mean")
        return loss

    def create_optimizer(self, *given):
        """The Trainer's optimizer, with the projections; they start alike on all processes."""
        optimizer = super().create_optimizer(*given)  # transformers 5 gives the model
        self.criterion.to(self.args.device)
        for p in self.criterion.parameters():
            p.data = broadcast(p.data)
        known = {p for group in optimizer.param_groups for p in group["params"]}
        if new := [p for p in self.criterion.parameters() if p not in known]:
            optimizer.add_param_group({"params": new, "weight_decay": self.args.weight_decay})
        return optimizer

    def _clip_grad_norm(self, model):
        trained = [*model.parameters(), *self.criterion.parameters()]
        return self.accelerator.clip_grad_norm_(trained, self.args.max_grad_norm)

    def save_model(self, output_dir=None, _internal_call=False):
        """The student as ever, the projections beside it, nothing of the teacher."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save and (weights := self.criterion.state_dict()):
            save_file(weights, Path(output_dir or self.args.output_dir, "criterion.safetensors"))

    def train(self, resume_from_checkpoint=None, **settings):
        """The Trainer's; True means the newest whole checkpoint, or the start where there is none."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_whole(Path(self.args.output_dir))
        if resume_from_checkpoint and self.criterion.state_dict():
            file = Path(resume_from_checkpoint, "criterion.safetensors")
            self.criterion.load_state_dict(load_file(file))
        return super().train(resume_from_checkpoint, **settings)

    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
        (folder / "trainer_state.json").unlink(missing_ok=True)  # of an earlier run
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch's and safetensors' own kinds
            shutil.rmtree(folder, ignore_errors=True)
            raise OSError(
                f"{folder} could not be written ({error}); nothing of it is left and earlier checkpoints "
                "are whole: free some space, then the same command goes on"
            ) from error

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # so that trainer_state.json is last, whoever writes


def newest_whole(folder: Path) -> str | None:
    """The newest checkpoint that has all its files: trainer_state.json is written last."""
    found = folder.glob("checkpoint-[0-9]*")
    for checkpoint in sorted(found, key=lambda c: int(c.name.rpartition("-")[2]), reverse=True):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())
            return str(checkpoint)
        except (OSError, ValueError):
            shutil.rmtree(checkpoint, ignore_errors=True)
    return None
