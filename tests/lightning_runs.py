"""A LightningModule around a `Distillation`, as a user would write it."""

import pytorch_lightning as pl
from distillation_processes import BATCH, made, recipe, rows, sgd, weights, world
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.strategies import DDPStrategy
from torch.utils.data import DataLoader, DistributedSampler


class Distilling(pl.LightningModule):
    """The training loop of the README as a LightningModule."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch):
        outputs = self.model(**batch)
        self.log_dict({name: value.float() for name, value in outputs.components.items()})
        return outputs.loss

    def validation_step(self, batch):
        self.log("validation", self.model(**batch).loss.float())

    def optimizer_step(self, *args, **settings):
        super().optimizer_step(*args, **settings)
        self.model.criterion.advance()  # not in on_train_batch_end, before which Lightning saves

    def configure_optimizers(self):
        return sgd(self.model)


def loader(data, accumulate=1):
    """A loader in the order of the data, which Lightning's sampler for several processes changes."""
    sampler = DistributedSampler(data, world(), shuffle=False) if world() > 1 else None
    return DataLoader(data, BATCH // world() // accumulate, sampler=sampler)


def lightened(folder, criterion=recipe, accumulate=1, resume=None):
    """Train two epochs, or resume from a saved epoch; returns the final weights, the step and the metrics."""
    module = Distilling(made(criterion))
    trainer = pl.Trainer(
        accelerator="cpu", devices=world(), max_epochs=2, accumulate_grad_batches=accumulate, logger=False,
        use_distributed_sampler=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        strategy=DDPStrategy(process_group_backend="gloo") if world() > 1 else "auto",
        callbacks=[ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)],
    )  # fmt: skip
    trainer.fit(module, loader(rows(), accumulate), loader(rows(1)), ckpt_path=resume)
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    return {"weights": weights(module.model), "step": module.model.criterion.step, "metrics": metrics}
