"""Distil a model of your own, as in nanoGPT: its forward takes (idx, targets) and returns (logits, loss).

The model does not change. `take=` says where in its output the logits (0) and the loss (1) are. kdloss finds the list
of blocks, and measures their widths on a batch, because there is no config to read them from. The teacher trains on
Python's documentation, the student on a tenth of it, for many epochs.

    python examples/not_hugging_face.py
"""

import random
from pydoc_data.topics import topics

import torch
import tyro
from tokenizers import ByteLevelBPETokenizer
from torch import nn
from torch.nn import functional as F
from tqdm import trange

import kdloss


def train(name, student, rows, steps, batch_size, lr, teacher=None, alpha=0.1):
    """Train a student, with a teacher or without."""
    model = student
    if teacher is not None:  # distillation: the student's own loss, the teacher's logits, its last block
        labels = alpha * kdloss.Task(take=1)
        predictions = (1 - alpha) * kdloss.Logits(take=0)
        features = 0.1 * kdloss.Features("last", distance=kdloss.distances.layer_norm_mse)
        model = kdloss.Distillation(student, teacher, labels + predictions + features)
        model.prepare(rows[:1, :-1], rows[:1, 1:])
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    for _ in trange(steps, desc=name):
        batch = rows[torch.randint(len(rows), [batch_size])]
        output = model(batch[:, :-1], batch[:, 1:])
        loss = output[1] if teacher is None else output.loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return student


class Block(nn.Module):
    """Attention and an MLP."""

    def __init__(self, width):
        super().__init__()
        self.heads, self.norm1, self.norm2 = width // 32, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        """Hidden states [B, T, width] in and out."""
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A small language model."""

    def __init__(self, depth, width, vocabulary=1024, length=64):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)
        for weight in (p for p in self.parameters() if p.ndim == 2):
            nn.init.normal_(weight, std=0.02)

    def forward(self, idx, targets=None):
        """The logits of the next token at each position, and the loss."""
        x = self.tokens(idx) + self.positions.weight[: idx.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return logits, None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def main(steps: int = 300, batch_size: int = 8, lr: float = 2e-3, alpha: float = 0.1, seed: int = 0) -> dict:
    """Train a teacher, a student alone and a student with the teacher.

    Args:
        steps: steps of each student; the teacher takes twice as many
        batch_size: blocks of 64 tokens per step
        lr: peak learning rate
        alpha: weight of the student's own loss; the weight of the teacher's logits is 1 - alpha
        seed: seed of weights and batches
    """
    paragraphs = sorted({part for topic in topics.values() for part in topic.split("\n\n")})
    random.Random(0).shuffle(paragraphs)
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(paragraphs, vocab_size=1024, show_progress=False)
    heldout, few, *more = torch.tensor(tokenizer.encode("\n\n".join(paragraphs)).ids).unfold(0, 65, 64).chunk(10)
    torch.manual_seed(seed)
    models = {"teacher": train("teacher", GPT(4, 128), torch.cat([few, *more]), 2 * steps, batch_size, lr)}
    for name, taught in {"alone": None, "distilled": models["teacher"]}.items():
        torch.manual_seed(seed)
        models[name] = train(name, GPT(2, 64), few, steps, batch_size, lr, taught, alpha)
    with torch.no_grad():
        found = {name: model(heldout[:, :-1], heldout[:, 1:])[1].exp().item() for name, model in models.items()}
    print("| model | held-out perplexity |\n|---|---|")
    print(*(f"| {name} | {value:.1f} |" for name, value in found.items()), sep="\n")
    return found


if __name__ == "__main__":
    tyro.cli(main)
