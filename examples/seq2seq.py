"""Sequence to sequence: a small T5 learns from a larger one to write dates as numbers.

The models read "thursday, 5 march 2026" and write "2026-03-05", byte by byte. The teacher trains on 20000 pairs. Both
students have 200 pairs. One also has a teacher and 5000 dates without a target: the teacher generates the targets
(sequence-level distillation) and predicts every byte (word-level distillation). Both take the same number of steps.
"""

import copy
import datetime
import random

import torch
import tyro
from tqdm import trange
from transformers import ByT5Tokenizer, T5Config, T5ForConditionalGeneration, set_seed

import kdloss


def train(name, student, pairs, steps, lr, teacher=None, sources=(), alpha=0.1, temperature=1.0, batch_size=32):
    """The usual training loop. With a teacher, it trains a `Distillation` instead of the student alone."""
    model = student
    if teacher is not None:
        # distillation: the teacher generates the missing targets, and the student learns its logits, too
        pairs = pairs + list(zip(sources, written(teacher, sources), strict=True))
        model = kdloss.Distillation(student, teacher, kdloss.VanillaKD(temperature=temperature, alpha=alpha))
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for _ in (bar := trange(steps, desc=name)):
        texts, targets = zip(*random.sample(pairs, batch_size), strict=True)
        labels = encoded(targets)["input_ids"]
        loss = model.train()(**encoded(texts), labels=labels.masked_fill(labels == 0, -100)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
    return student.eval()


TOKENIZER = ByT5Tokenizer()
SPELLINGS = "%A, %d %B %Y|%B %d, %Y|%d %b %Y|%a %d %b %y|%b %d %Y|%d.%m.%Y|%m/%d/%Y|%d %B %y|%A %B %d %Y|%Y, %d %B"


def encoded(texts):
    """Tokenize texts into bytes, padded with 0."""
    return TOKENIZER(list(texts), padding=True, return_tensors="pt")


def written(model, texts):
    """Generate the output for each text."""
    parts = [texts[i : i + 500] for i in range(0, len(texts), 500)]
    ids = [model.generate(**encoded(part), max_new_tokens=12, do_sample=False) for part in parts]
    return [text for part in ids for text in TOKENIZER.batch_decode(part, skip_special_tokens=True)]


def pair():
    """A random date between 1950 and 2049, in a random spelling and as numbers."""
    date = datetime.date(1950, 1, 1) + datetime.timedelta(days=random.randrange(36500))
    text = date.strftime(random.choice(SPELLINGS.split("|")))
    text = text.lower() if random.random() < 0.5 else text
    return text.replace(" 0", " ") if random.random() < 0.5 else text, date.isoformat()


def t5(width, depth):
    """A new T5 that reads and writes bytes."""
    sizes = {"d_model": width, "d_kv": width // 4, "d_ff": 2 * width, "num_heads": 4, "num_layers": depth}
    config = T5Config(
        **sizes, vocab_size=384, dropout_rate=0.0, feed_forward_proj="gated-gelu", decoder_start_token_id=0
    )
    return T5ForConditionalGeneration(config)


def main(
    known: int = 200, steps: int = 400, lr: float = 5e-3, alpha: float = 0.1, temperature: float = 1.0, seed: int = 0
) -> dict[str, float]:
    """Train a student alone and with a teacher; test on 500 spellings that no model was trained on.

    Args:
        known: number of pairs that the students have
        steps: steps of each student; the teacher takes twice as many
        lr: peak learning rate
        alpha: weight of the labels; the teacher's weight is 1 - alpha
        temperature: T of the teacher's term; divides both models' logits
        seed: seed of dates, weights and batches
    """
    set_seed(seed)
    pairs = list(dict(pair() for _ in range(20500)).items())
    test, pairs = pairs[:500], pairs[500:]
    sources = [source for source, _ in pairs[known : known + 5000]]
    teacher = train("teacher", t5(64, 2), pairs, 2 * steps, lr)
    small, pairs = t5(32, 2), pairs[:known]
    alone = train("alone", copy.deepcopy(small), pairs, steps, lr)
    distilled = train("distilled", small, pairs, steps, lr, teacher, sources, alpha, temperature)
    found = {}
    print("| model | parameters | right, % |\n|---|---|---|")
    for name, model in {"teacher": teacher, "alone": alone, "distilled": distilled}.items():
        answers = written(model, [source for source, _ in test])
        found[name] = sum(a == target for a, (_, target) in zip(answers, test, strict=True)) / 5
        print(f"| {name} | {model.num_parameters():,} | {found[name]:.1f} |")
    return found


if __name__ == "__main__":
    tyro.cli(main)
