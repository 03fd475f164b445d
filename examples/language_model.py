"""Distil a small language model in a plain PyTorch loop.

The teacher is a GPT-2 with 4 blocks of width 128, trained on nine tenths of Python's documentation. The student has 2
blocks of width 64 and trains on one of these tenths, for many epochs: text is often scarce when people distil. The
baseline is the same student without a teacher, for as many steps. A step with a teacher takes about twice as long.

    python examples/language_model.py
    python examples/language_model.py --data my.txt --teacher gpt2     # --teacher also takes a folder
"""

import math
import random
from pathlib import Path
from pydoc_data.topics import topics

import matplotlib.pyplot as plt
import torch
import tyro
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import trange
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

import kdloss


def train(name, student, blocks, heldout, steps, batch_size, lr, teacher=None, alpha=0.1, temperature=1.0):
    """Train a student, with a teacher or without; return its held-out perplexity by step."""
    model = student
    if teacher is not None:  # distillation: student and criterion become one model, called like the student
        model = kdloss.Distillation(student, teacher, kdloss.VanillaKD(temperature=temperature, alpha=alpha))
    optimizer = AdamW(model.parameters(), lr, weight_decay=0.1)
    schedule, curve = OneCycleLR(optimizer, lr, steps), {}
    for step in (bar := trange(1, steps + 1, desc=name)):
        batch = blocks[torch.randint(len(blocks), [batch_size])]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % max(1, steps // 6) == 0 or step == steps:
            curve[step] = perplexity(student, heldout)
            bar.set_postfix(perplexity=f"{curve[step]:.1f}")
    return curve


@torch.no_grad()
def perplexity(model, blocks):
    """The exponential of the mean loss."""
    model.eval()
    losses = [model(input_ids=batch, labels=batch).loss.item() * len(batch) for batch in blocks.split(64)]
    model.train()
    return math.exp(sum(losses) / len(blocks))


def gpt2(vocab_size, n_layer, n_embd, seed):
    """A new GPT-2. The seed sets its weights, and the batches drawn after it."""
    torch.manual_seed(seed)
    shape = {"n_layer": n_layer, "n_embd": n_embd, "n_head": n_embd // 32, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, n_positions=64, **shape))


def main(
    data: Path | None = None, teacher: str | None = None, steps: int = 300, batch_size: int = 8, lr: float = 3e-3,
    alpha: float = 0.1, temperature: float = 1.0, seed: int = 0
) -> dict[str, float]:  # fmt: skip
    """Train a student alone and with a teacher.

    Args:
        data: a text file; without one, Python's documentation
        teacher: folder or name of a causal language model; without one, the script trains a small one
        steps: steps of each student; the teacher takes twice as many
        batch_size: blocks of 64 tokens per step
        lr: peak learning rate
        alpha: weight of the labels; the teacher's weight is 1 - alpha
        temperature: T of the teacher's term; divides both models' logits
        seed: seed of weights and batches
    """
    text = data.read_text() if data else "\n\n".join(topics.values())
    paragraphs = list(dict.fromkeys(text.split("\n\n")))  # each once, so no model has seen the held-out text
    random.Random(0).shuffle(paragraphs)
    if teacher:
        tokenizer, expert = AutoTokenizer.from_pretrained(teacher), AutoModelForCausalLM.from_pretrained(teacher)
    else:
        tokenizer = GPT2Tokenizer().train_new_from_iterator(paragraphs, 1024, show_progress=False)
        expert = gpt2(len(tokenizer), 4, 128, seed)
    tokens = tokenizer("\n\n".join(paragraphs), return_tensors="pt").input_ids[0]
    heldout, few, *more = tokens.unfold(0, 64, 64).chunk(10)
    if not teacher:
        train("teacher", expert, torch.cat([few, *more]), heldout, 2 * steps, batch_size, lr)
    found = {"teacher": perplexity(expert, heldout)}
    figure, axes = plt.subplots()
    for name, taught in {"alone": None, "distilled": expert}.items():
        student = gpt2(expert.config.vocab_size, 2, 64, seed)
        curve = train(name, student, few, heldout, steps, batch_size, lr, taught, alpha, temperature)
        axes.plot(curve.keys(), curve.values(), label=name)
        found[name] = curve[steps]
    axes.set(xlabel="step", ylabel="held-out perplexity")
    axes.legend()
    Path("runs").mkdir(exist_ok=True)
    figure.savefig("runs/language_model.png")
    print("| model | held-out perplexity |\n|---|---|")
    print(*(f"| {name} | {value:.1f} |" for name, value in found.items()), sep="\n")
    return found


if __name__ == "__main__":
    tyro.cli(main)
