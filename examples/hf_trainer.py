"""Distil a language model with Hugging Face's Trainer.

The teacher trains on nine tenths of Python's documentation, the student on one of these, for many epochs. The
baseline is the same student under the stock Trainer, for the same number of steps. The Trainer logs every loss term,
and sends it to TensorBoard or whatever `report_to` names. If the run is killed, the same command with --resume resumes.

    python examples/hf_trainer.py
    python examples/hf_trainer.py --data my.txt --teacher gpt2     # or a model's folder
"""

import math
import random
from pathlib import Path
from pydoc_data.topics import topics

import torch
import tyro
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)

import kdloss
from kdloss.hf import DistillationTrainer, newest_complete


def trainer_of(student, arguments, train, heldout, teacher=None, alpha=0.1):
    """The stock Trainer; with a teacher, the one that distils."""
    data = {"train_dataset": train, "eval_dataset": heldout}
    if teacher is None:
        return Trainer(student, arguments, **data)
    # distillation: another Trainer class, a teacher and a criterion
    criterion = kdloss.VanillaKD(temperature=1.0, alpha=alpha)
    return DistillationTrainer(student, arguments, teacher=teacher, criterion=criterion, **data)


def llama(vocab_size, depth, width, seed):
    """A new Llama; the seed sets its weights."""
    set_seed(seed)
    shape = {"num_hidden_layers": depth, "hidden_size": width, "intermediate_size": 3 * width}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, num_attention_heads=width // 32, **shape))


def blocks_of(tokens):
    """A data set of blocks of 64 tokens."""
    return Dataset.from_dict({"input_ids": tokens, "labels": tokens})


def main(
    data: Path | None = None, teacher: str | None = None, steps: int = 300, batch_size: int = 8, lr: float = 3e-3,
    alpha: float = 0.1, seed: int = 0, resume: bool = False
) -> dict[str, float]:  # fmt: skip
    """Train a student with the stock Trainer, and one with the Trainer that distils.

    Args:
        data: a text file; without one, Python's documentation
        teacher: folder or name of a causal language model; without one, the script trains a small one
        steps: steps of each student; the teacher takes twice as many
        batch_size: blocks of 64 tokens per step and device
        lr: peak learning rate
        alpha: weight of the labels; the teacher's weight is 1 - alpha
        seed: seed of weights and batches
        resume: resume from the newest complete checkpoint of the same command
    """
    text = data.read_text() if data else "\n\n".join(topics.values())
    paragraphs = list(dict.fromkeys(text.split("\n\n")))  # each once, so no model has seen the held-out text
    random.Random(0).shuffle(paragraphs)
    if teacher:
        tokenizer, expert = AutoTokenizer.from_pretrained(teacher), AutoModelForCausalLM.from_pretrained(teacher)
    else:
        tokenizer = GPT2Tokenizer().train_new_from_iterator(paragraphs, 1024, show_progress=False)
        expert = llama(len(tokenizer), 4, 128, seed)
    tokens = tokenizer("\n\n".join(paragraphs), return_tensors="pt").input_ids[0]
    heldout, few, *more = tokens.unfold(0, 64, 64).chunk(10)

    def train(name, model, blocks, steps, *taught):
        arguments = TrainingArguments(
            f"runs/hf_trainer/{name}", max_steps=steps, learning_rate=lr, lr_scheduler_type="cosine", warmup_steps=0.1,
            per_device_train_batch_size=batch_size, per_device_eval_batch_size=64, seed=seed,
            logging_steps=max(1, steps // 3), eval_strategy="steps", save_steps=max(1, steps // 3), save_total_limit=1,
            report_to="none", dataloader_pin_memory=torch.cuda.is_available(),
        )  # fmt: skip
        trainer = trainer_of(model, arguments, blocks_of(blocks), blocks_of(heldout), *taught)
        trainer.train(resume_from_checkpoint=newest_complete(arguments.output_dir) if resume else None)
        return math.exp(trainer.evaluate()["eval_loss"])

    found = {} if teacher else {"teacher": train("teacher", expert, torch.cat([few, *more]), 2 * steps)}
    for name, taught in {"alone": [], "distilled": [expert, alpha]}.items():
        found[name] = train(name, llama(expert.config.vocab_size, 2, 64, seed), few, steps, *taught)
    print("| model | held-out perplexity |\n|---|---|")
    print(*(f"| {name} | {value:.1f} |" for name, value in found.items()), sep="\n")
    return found


if __name__ == "__main__":
    tyro.cli(main)
