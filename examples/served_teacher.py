"""Distil from a teacher on a server: the student reads a file of the teacher's top-k log-probabilities.

With `prompt_logprobs`, a server such as vLLM returns the log-probabilities of the k most likely tokens at each position
of a text. Here a small teacher writes the same into a file, one line of JSON per text, and the student learns from the
file alone. The teacher trains on Python's documentation, the student on a tenth of it, for many epochs.

    python examples/served_teacher.py
"""

import json
import math
import random
from pathlib import Path
from pydoc_data.topics import topics

import torch
import tyro
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import trange
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

import kdloss


def collate(rows):
    """Make a batch from lines of the file. Padding, on the right of shorter texts, does not count."""
    labels = pad_sequence([torch.tensor(row["prompt_token_ids"]) for row in rows], True, -100)
    batch = {"input_ids": labels.clamp(min=0), "labels": labels}
    if "prompt_logprobs" in rows[0]:  # distillation: the server's answers for this batch replace the teacher
        batch["teacher"] = kdloss.TopKLogits.from_served([row["prompt_logprobs"] for row in rows])
    return batch


def train(name, student, rows, steps, batch_size, lr, alpha=None):
    """Train a student on lines of the file. Without alpha the lines hold no answers of a teacher."""
    model = student
    if alpha is not None:  # distillation: the teacher is None, because each batch holds its answers
        model = kdloss.Distillation(student, None, kdloss.VanillaKD(temperature=1.0, alpha=alpha))
    optimizer = AdamW(model.parameters(), lr, weight_decay=0.1)
    schedule = OneCycleLR(optimizer, lr, steps)
    for _ in trange(steps, desc=name):
        batch = collate(random.choices(rows, k=batch_size))
        model(**batch).loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return student.eval()


@torch.no_grad()
def served(teacher, ids, k):
    """The answer of a server for a text: None for its first token, then ids and log-probabilities."""
    top = teacher(torch.tensor([ids])).logits[0, :-1].log_softmax(-1).topk(k)
    likeliest = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [None, *({token: {"logprob": x} for token, x in zip(*row, strict=True)} for row in likeliest)]


def gpt2(vocab_size, n_layer, n_embd, seed):
    """A new GPT-2. The seed sets its weights, and the batches drawn after it."""
    random.seed(seed)
    torch.manual_seed(seed)
    shape = {"n_layer": n_layer, "n_embd": n_embd, "n_head": n_embd // 32, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, n_positions=64, **shape))


def main(
    steps: int = 300, batch_size: int = 8, lr: float = 3e-3, alpha: float = 0.1, k: int = 20, seed: int = 0
) -> dict[str, float]:
    """Train a teacher, write its answers for the student's text to a file, and train a student from the file.

    Args:
        steps: steps of each student; the teacher takes twice as many
        batch_size: texts of 64 tokens per step
        lr: peak learning rate
        alpha: weight of the labels; the teacher's weight is 1 - alpha
        k: number of tokens in the server's answer for each position
        seed: seed of weights and batches
    """
    paragraphs = sorted({part for topic in topics.values() for part in topic.split("\n\n")})
    random.Random(0).shuffle(paragraphs)
    tokenizer = GPT2Tokenizer().train_new_from_iterator(paragraphs, 1024, show_progress=False)
    tokens = tokenizer("\n\n".join(paragraphs), return_tensors="pt").input_ids[0]
    heldout, few, *more = tokens.unfold(0, 64, 64).chunk(10)
    texts = [{"prompt_token_ids": ids} for ids in torch.cat([few, *more]).tolist()]
    teacher = train("teacher", gpt2(1024, 4, 128, seed), texts, 2 * steps, batch_size, lr)
    file = Path("runs/served_teacher.jsonl")
    file.parent.mkdir(exist_ok=True)
    answers = (text | {"prompt_logprobs": served(teacher, text["prompt_token_ids"], k)} for text in texts[: len(few)])
    file.write_text("\n".join(map(json.dumps, answers)))
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    models = {
        "teacher": teacher,
        "alone": train("alone", gpt2(1024, 2, 64, seed), texts[: len(few)], steps, batch_size, lr),
        "from the file": train("from the file", gpt2(1024, 2, 64, seed), rows, steps, batch_size, lr, alpha),
    }
    with torch.no_grad():
        found = {name: math.exp(model(input_ids=heldout, labels=heldout).loss) for name, model in models.items()}
    print("| model | held-out perplexity |\n|---|---|")
    print(*(f"| {name} | {value:.1f} |" for name, value in found.items()), sep="\n")
    return found


if __name__ == "__main__":
    tyro.cli(main)
