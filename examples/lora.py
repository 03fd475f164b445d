"""Fine-tune LoRA adapters without forgetting: their own base model is the teacher.

A small GPT-2 is trained on Python's documentation, then its adapters on Python code. LoRA alone learns the code and
forgets the documentation. With the base as teacher on documentation, it learns the code and keeps the documentation.
`kdloss.base_of` runs the base with the adapters off, so there is no second copy of its weights.

    python examples/lora.py
"""

import argparse
import copy
import inspect
import math
import random
from pydoc_data.topics import topics

import torch
import tyro
from peft import LoraConfig, get_peft_model
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import trange
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

import kdloss


def train(name, model, blocks, steps, batch_size, lr, old=None, weight=1.0):
    """Train the trainable parameters. If old blocks are passed, the model stays near its base on them."""
    optimizer = AdamW((p for p in model.parameters() if p.requires_grad), lr)
    schedule = OneCycleLR(optimizer, lr, steps)
    if old is not None:  # distillation: the student's own base is the teacher, and no labels are needed
        near_base = kdloss.Distillation(model, kdloss.base_of(model), weight * kdloss.Logits())
    for _ in trange(steps, desc=name):
        batch = blocks[torch.randint(len(blocks), [batch_size])]
        loss = model(input_ids=batch, labels=batch).loss
        if old is not None:
            loss = loss + near_base(input_ids=old[torch.randint(len(old), [batch_size])]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model


@torch.no_grad()
def perplexity(model, blocks):
    """The exponential of the mean loss."""
    return math.exp(model.eval()(input_ids=blocks, labels=blocks).loss.item())


def main(
    steps: int = 200, batch_size: int = 8, lr: float = 5e-3, weight: float = 1.0, rank: int = 8, seed: int = 0
) -> dict[str, float]:
    """Train a base on documentation, then adapters on code: without the base as teacher, and with it.

    Args:
        steps: steps of the adapters; the base takes three times as many
        batch_size: blocks of 64 tokens per step, of each kind of text
        lr: peak learning rate of the adapters
        weight: weight of the divergence from the base; the loss on code has weight 1
        rank: rank of the adapters
        seed: seed of weights and batches
    """
    paragraphs = sorted({part for topic in topics.values() for part in topic.split("\n\n")})
    random.Random(0).shuffle(paragraphs)
    tokenizer = GPT2Tokenizer().train_new_from_iterator(paragraphs, 1024, show_progress=False)
    texts = {"documentation": "\n\n".join(paragraphs), "code": "".join(map(inspect.getsource, (argparse, inspect)))}
    heldout, seen = {}, {}
    for kind, text in texts.items():
        blocks = tokenizer(text, return_tensors="pt").input_ids[0].unfold(0, 64, 64)
        heldout[kind], seen[kind] = blocks.tensor_split([len(blocks) // 10])
    torch.manual_seed(seed)
    shape = {"n_layer": 4, "n_embd": 128, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
    base = GPT2LMHeadModel(GPT2Config(vocab_size=1024, n_positions=64, **shape))
    models = {"base": train("base", base, seen["documentation"], 3 * steps, batch_size, 3e-3)}
    adapters = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", fan_in_fan_out=True)
    for name, old in {"LoRA alone": None, "LoRA near its base": seen["documentation"]}.items():
        torch.manual_seed(seed)
        student = get_peft_model(copy.deepcopy(base), adapters)
        models[name] = train(name, student, seen["code"], steps, batch_size, lr, old, weight)
    found, print_row = {}, "| {} | {} | {} |".format
    print(print_row("held-out perplexity", *heldout), print_row(*["---"] * 3), sep="\n")
    for name, model in models.items():
        values = {f"{name}, {kind}": perplexity(model, blocks) for kind, blocks in heldout.items()}
        print(print_row(name, *(f"{value:.1f}" for value in values.values())))
        found |= values
    return found


if __name__ == "__main__":
    tyro.cli(main)
