"""Distil while fine-tuning on prompts and completions with TRL's SFTTrainer.

The task: given the name of a function of Python's standard library, write one line that says what it does. The teacher
trains on all functions except the held-out ones, the student on a tenth of all functions, for many epochs. TRL still
logs its own metrics (entropy, token accuracy). All losses, the teacher's too, count only the tokens of completions.

    python examples/trl_sft.py
    python examples/trl_sft.py --data my.jsonl --teacher Qwen/Qwen3-4B --student Qwen/Qwen3-0.6B
"""

import inspect
import math
import random
import sys

import torch
import tyro
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Tokenizer, LlamaConfig, LlamaForCausalLM, set_seed
from trl import SFTConfig, SFTTrainer

import kdloss
from kdloss.hf import Distilling


class SFTDistiller(Distilling, SFTTrainer):  # distillation: a mixin makes any Trainer distil
    """TRL's Trainer, with a teacher."""


def trainer_of(student, arguments, tokenizer, train, heldout, teacher=None, alpha=0.1):
    """TRL's Trainer; with a teacher, the one above."""
    data = {"train_dataset": train, "eval_dataset": heldout, "processing_class": tokenizer}
    if teacher is None:
        return SFTTrainer(student, arguments, **data)
    criterion = kdloss.VanillaKD(temperature=1.0, alpha=alpha)
    return SFTDistiller(student, arguments, teacher=teacher, criterion=criterion, **data)


def functions():
    """Functions of the imported modules of the standard library, each with the first line of its docstring."""
    found = {}
    for module in [m for name, m in sorted(sys.modules.items()) if name in sys.stdlib_module_names]:
        for name, function in inspect.getmembers(module, inspect.isroutine):
            line = (inspect.getdoc(function) or "").split("\n")[0]
            if 20 < len(line) < 90 and not name.startswith("_"):
                found[line] = f"{module.__name__}.{name}: "
    return [{"prompt": prompt, "completion": line} for line, prompt in found.items()]


def llama(tokenizer, depth, width, seed):
    """A new Llama; the seed sets its weights."""
    set_seed(seed)
    shape = {"num_hidden_layers": depth, "hidden_size": width, "intermediate_size": 3 * width}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), num_attention_heads=width // 32, eos_token_id=0, **shape)
    )


def main(
    data: str | None = None, teacher: str | None = None, student: str | None = None, steps: int = 200,
    batch_size: int = 16, lr: float = 3e-3, alpha: float = 0.1, seed: int = 0
) -> dict[str, float]:  # fmt: skip
    """Fine-tune a student with TRL's Trainer, and one with the Trainer that distils.

    Args:
        data: a .jsonl file of prompts and completions; without one, Python's functions and their docstrings
        teacher: folder or name of a causal language model that knows the task; without one, a small one is trained
        student: folder or name of a model with the teacher's tokenizer; without one, a smaller new Llama
        steps: steps of each student; the teacher takes three times as many
        batch_size: texts per step and device
        lr: peak learning rate
        alpha: weight of the labels; the teacher's weight is 1 - alpha
        seed: seed of weights and batches
    """
    rows = list(load_dataset("json", data_files=data, split="train")) if data else functions()
    random.Random(0).shuffle(rows)
    tenth = len(rows) // 10
    heldout, few, known = rows[:tenth], rows[tenth : 2 * tenth], rows[tenth:]
    if teacher is None:
        words = [row["prompt"] + row["completion"] for row in known]
        tokenizer = GPT2Tokenizer().train_new_from_iterator(words, 1024, show_progress=False)
        tokenizer.pad_token = tokenizer.eos_token
        expert = llama(tokenizer, 4, 128, seed)
    else:
        tokenizer, expert = AutoTokenizer.from_pretrained(teacher), AutoModelForCausalLM.from_pretrained(teacher)

    def train(name, model, rows, steps, *taught):
        arguments = SFTConfig(
            f"runs/trl_sft/{name}", max_steps=steps, learning_rate=lr, lr_scheduler_type="cosine", seed=seed,
            per_device_train_batch_size=batch_size, per_device_eval_batch_size=64, logging_steps=max(1, steps // 2),
            save_strategy="no", report_to="none", dataloader_pin_memory=torch.cuda.is_available(),
            gradient_checkpointing=False, bf16=torch.cuda.is_available(), completion_only_loss=True,
        )  # fmt: skip
        trainer = trainer_of(model, arguments, tokenizer, Dataset.from_list(rows), Dataset.from_list(heldout), *taught)
        trainer.train()
        found = trainer.evaluate()
        return math.exp(found["eval_loss"]), found["eval_mean_token_accuracy"]

    found = {} if teacher else {"teacher": train("teacher", expert, known, 3 * steps)}
    for name, taught in {"alone": [], "distilled": [expert, alpha]}.items():
        model = AutoModelForCausalLM.from_pretrained(student) if student else llama(tokenizer, 2, 64, seed)
        found[name] = train(name, model, few, steps, *taught)
    print("| model | held-out perplexity | right tokens in 100 |\n|---|---|---|")
    print(*(f"| {name} | {value:.1f} | {100 * right:.1f} |" for name, (value, right) in found.items()), sep="\n")
    return {name: value for name, (value, _) in found.items()}


if __name__ == "__main__":
    tyro.cli(main)
