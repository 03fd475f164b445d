"""Distil a language model with Lightning.

The LightningModule holds a `kdloss.Distillation`, one module with the student and the criterion. The Trainer moves,
clips and saves what that module trains, and nothing of the teacher. In validation the teacher does not run and the loss
is plain cross-entropy, so you can compare the losses of both students. The teacher trains on Python's documentation,
the student on a tenth of it, for many epochs.

    python examples/lightning_loop.py
"""

import math
import random
import warnings
from pydoc_data.topics import topics

import pytorch_lightning as pl
import tyro
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import ConcatDataset, DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

import kdloss


class Training(pl.LightningModule):
    """A student, with a teacher or without."""

    def __init__(self, student, lr, teacher=None, alpha=0.1, temperature=1.0):
        super().__init__()
        self.model, self.lr = student, lr
        if teacher is not None:  # distillation: student and criterion become one module, called like the student
            self.model = kdloss.Distillation(student, teacher, kdloss.VanillaKD(temperature=temperature, alpha=alpha))

    def training_step(self, batch):
        """Return the loss; with a teacher, log its terms, too."""
        output = self.model(input_ids=batch, labels=batch)
        self.log_dict(output.get("components", {}))
        return output.loss

    def validation_step(self, batch):
        """Log the loss on held-out text."""
        self.log("heldout", self.model(input_ids=batch, labels=batch).loss, prog_bar=True)

    def configure_optimizers(self):
        """`parameters()` holds the student and the projections, not the teacher."""
        optimizer = AdamW(self.parameters(), self.lr, weight_decay=0.1)
        schedule = OneCycleLR(optimizer, self.lr, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def gpt2(vocab_size, n_layer, n_embd, seed):
    """A new GPT-2. The seed sets its weights, and the batches drawn after it."""
    pl.seed_everything(seed, verbose=False)
    shape = {"n_layer": n_layer, "n_embd": n_embd, "n_head": n_embd // 32, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, n_positions=64, **shape))


def main(steps: int = 300, batch_size: int = 8, lr: float = 3e-3, alpha: float = 0.1, temperature: float = 1.0,
         seed: int = 0) -> dict[str, float]:  # fmt: skip
    """Train a teacher, a student alone and a student with the teacher.

    Args:
        steps: steps of each student; the teacher takes twice as many
        batch_size: blocks of 64 tokens per step
        lr: peak learning rate
        alpha: weight of the labels; the teacher's weight is 1 - alpha
        temperature: T of the teacher's term; divides both models' logits
        seed: seed of weights and batches
    """
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    paragraphs = sorted({part for topic in topics.values() for part in topic.split("\n\n")})
    random.Random(0).shuffle(paragraphs)
    tokenizer = GPT2Tokenizer().train_new_from_iterator(paragraphs, 1024, show_progress=False)
    tokens = tokenizer("\n\n".join(paragraphs), return_tensors="pt").input_ids[0]
    heldout, few, *more = tokens.unfold(0, 64, 64).chunk(10)
    validation = DataLoader(heldout, 64)
    found = {}

    def fit(name, model, text, steps, **taught):
        module = Training(model, lr, **taught)
        logger = pl.loggers.CSVLogger("runs/lightning_loop", name)
        quiet = {"enable_model_summary": False, "log_every_n_steps": 10}
        trainer = pl.Trainer(max_steps=steps, gradient_clip_val=1.0, logger=logger, **quiet)
        trainer.fit(module, DataLoader(text, batch_size, shuffle=True), validation)
        found[name] = math.exp(trainer.validate(module, validation, verbose=False)[0]["heldout"])
        return model

    teacher = fit("teacher", gpt2(1024, 4, 128, seed), ConcatDataset([few, *more]), 2 * steps)
    fit("alone", gpt2(1024, 2, 64, seed), few, steps)
    fit("distilled", gpt2(1024, 2, 64, seed), few, steps, teacher=teacher, alpha=alpha, temperature=temperature)
    print("| model | held-out perplexity |\n|---|---|")
    print(*(f"| {name} | {value:.1f} |" for name, value in found.items()), sep="\n")
    return found


if __name__ == "__main__":
    tyro.cli(main)
