"""Distil a language model with Accelerate: one process or several, in the precision that `accelerate config` sets.

Accelerate wraps, moves, clips and saves one module, which holds the student and the criterion. The teacher is not part
of that module and follows it to its device. A batch is split over all processes. The teacher trains on Python's
documentation, the student on a tenth of it, for many epochs. The student alone takes the same number of steps.

    python examples/accelerate_loop.py
    accelerate launch examples/accelerate_loop.py
    torchrun --nproc-per-node 2 examples/accelerate_loop.py                # works without a GPU, too
"""

import math
import random
from itertools import chain, islice, repeat
from pydoc_data.topics import topics

import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

import kdloss


def train(name, accelerator, student, blocks, steps, batch_size, lr, teacher=None, alpha=0.1, temperature=1.0):
    """Train a student, with a teacher or without."""
    model = student
    if teacher is not None:  # distillation: student and criterion become one module; prepare it like any other
        model = kdloss.Distillation(student, teacher, kdloss.VanillaKD(temperature=temperature, alpha=alpha))
    optimizer = AdamW(model.parameters(), lr, weight_decay=0.1)
    schedule = OneCycleLR(optimizer, lr, steps)
    loader = DataLoader(blocks, batch_size, shuffle=True, drop_last=True)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    batches = islice(chain.from_iterable(repeat(loader)), steps)
    for batch in tqdm(batches, name, steps, disable=not accelerator.is_main_process):
        loss = model(input_ids=batch, labels=batch).loss  # blocks have equally many labels: the mean is exact
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    accelerator.save_state(f"runs/accelerate_loop/{name}")  # `load_state` resumes from it
    accelerator.free_memory()
    return student


@torch.no_grad()
def perplexity(accelerator, model, blocks):
    """The exponential of the mean loss. Every process computes its share."""
    model.eval()
    loader = accelerator.prepare(DataLoader(blocks, 64))
    losses = [model(input_ids=batch, labels=batch).loss.expand(len(batch)) for batch in loader]
    return math.exp(torch.cat([accelerator.gather_for_metrics(loss) for loss in losses]).mean().item())


def gpt2(vocab_size, n_layer, n_embd, seed):
    """A new GPT-2. The seed sets its weights, and the batches drawn after it."""
    torch.manual_seed(seed)
    shape = {"n_layer": n_layer, "n_embd": n_embd, "n_head": n_embd // 32, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, n_positions=64, **shape))


def main(steps: int = 300, batch_size: int = 8, lr: float = 3e-3, alpha: float = 0.1, temperature: float = 1.0,
         seed: int = 0) -> dict[str, float]:  # fmt: skip
    """Train a teacher, a student alone and a student with the teacher.

    Args:
        steps: steps of each student; the teacher takes twice as many
        batch_size: blocks of 64 tokens per step, over all processes
        lr: peak learning rate
        alpha: weight of the labels; the teacher's weight is 1 - alpha
        temperature: T of the teacher's term; divides both models' logits
        seed: seed of weights and batches
    """
    # Without a GPU and without `cpu=True`, Accelerate would let each process train on its own.
    cpu = not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=cpu, dataloader_config=DataLoaderConfiguration(split_batches=True))
    paragraphs = sorted({part for topic in topics.values() for part in topic.split("\n\n")})
    random.Random(0).shuffle(paragraphs)
    tokenizer = GPT2Tokenizer().train_new_from_iterator(paragraphs, 1024, show_progress=False)
    tokens = tokenizer("\n\n".join(paragraphs), return_tensors="pt").input_ids[0]
    heldout, few, *more = tokens.unfold(0, 64, 64).chunk(10)
    teacher = gpt2(1024, 4, 128, seed)
    train("teacher", accelerator, teacher, torch.cat([few, *more]), 2 * steps, batch_size, lr)
    models = {"teacher": teacher}
    for name, taught in {"alone": None, "distilled": teacher}.items():
        student = gpt2(1024, 2, 64, seed)
        models[name] = train(name, accelerator, student, few, steps, batch_size, lr, taught, alpha, temperature)
    found = {name: perplexity(accelerator, model, heldout) for name, model in models.items()}
    accelerator.print("| model | held-out perplexity |\n|---|---|")
    accelerator.print(*(f"| {name} | {value:.1f} |" for name, value in found.items()), sep="\n")
    accelerator.end_training()
    return found


if __name__ == "__main__":
    tyro.cli(main)
