"""Distil a causal language model with the Hugging Face Trainer.

One method is all that distinguishes it from training without a teacher. Trains the same student
twice, without and with distillation, and prints both perplexities on held-out text:

    python examples/hf_trainer.py                               # a small teacher, trained first
    python examples/hf_trainer.py --teacher gpt2-large --student gpt2 --data my.jsonl
"""

import argparse
import json
import math
from pathlib import Path

import torch
from datasets import Dataset
from parts import text
from torch.optim import AdamW
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

import kdloss


class DistillationTrainer(Trainer):
    """A Trainer that asks a `kdloss.Distiller` for the training loss; evaluation stays plain."""

    def __init__(self, *args, distill: kdloss.Distiller, **settings):
        super().__init__(*args, **settings)
        self.distill = distill

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The Trainer's own loss in evaluation, the distiller's in training."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        out = self.distill(model, **inputs, num_items_in_batch=num_items_in_batch)
        return (out.loss, out.output) if return_outputs else out.loss


def train(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    criterion: torch.nn.Module,
    data: dict[str, Dataset],
    tokenizer: PreTrainedTokenizerBase,
    arguments: TrainingArguments,
) -> float:
    """Train the student; its perplexity on the held-out part."""
    distill = kdloss.Distiller(teacher, criterion).prepare(student)
    trainer = DistillationTrainer(
        student,
        arguments,
        distill=distill,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        optimizers=(
            AdamW([*student.parameters(), *criterion.parameters()], lr=arguments.learning_rate),
            None,
        ),
    )
    trainer.train()
    return math.exp(trainer.evaluate()["eval_loss"])


def fresh(tokenizer: PreTrainedTokenizerBase, blocks: int, width: int, length: int) -> PreTrainedModel:
    """A GPT-2-shaped model that has learned nothing."""
    torch.manual_seed(0)
    end = tokenizer.eos_token_id
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=length,
            n_layer=blocks,
            n_embd=width,
            n_head=4,
            bos_token_id=end,
            eos_token_id=end,
        )
    )


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Read the flags, train a teacher where none is given, train two students, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", help="path or hub name (default: train a small one first)")
    parser.add_argument("--student", help="path or hub name (default: a fresh one of 2 blocks)")
    parser.add_argument("--data", help=".jsonl, .json, .csv, .txt or a datasets name (default: packaged)")
    parser.add_argument("--samples", type=int, default=2000, help="number of texts")
    parser.add_argument("--max-length", type=int, default=128, help="tokens of a text that are used")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of each student")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--alpha", type=float, default=0.3)
    parser.add_argument("--output", type=Path, default=Path("runs/hf_trainer"))
    flags = parser.parse_args(argv)

    texts = text.read_texts(flags.data, limit=flags.samples)
    if flags.teacher:
        tokenizer = AutoTokenizer.from_pretrained(flags.teacher)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    else:
        tokenizer = text.train_tokenizer(texts, vocabulary=2048)
    encoded = tokenizer(texts, truncation=True, max_length=flags.max_length)
    data = Dataset.from_dict(dict(encoded)).train_test_split(test_size=0.1, seed=0)

    def arguments(name: str, steps: int) -> TrainingArguments:
        return TrainingArguments(
            output_dir=str(flags.output / name),
            max_steps=steps,
            per_device_train_batch_size=flags.batch_size,
            learning_rate=flags.learning_rate,
            logging_steps=max(1, steps // 5),
            save_strategy="no",
            dataloader_pin_memory=torch.cuda.is_available(),
            report_to="none",
        )

    plain = kdloss.VanillaKD(alpha=1.0)  # cross-entropy alone; the teacher does not even run
    if flags.teacher:
        teacher = AutoModelForCausalLM.from_pretrained(flags.teacher)
    else:
        teacher = fresh(tokenizer, blocks=4, width=128, length=flags.max_length)
        train(teacher, teacher, plain, data, tokenizer, arguments("teacher", 2 * flags.steps))

    results = {}
    distilling = kdloss.FeatureKD(
        distance=kdloss.layer_norm_mse,
        alpha=flags.alpha,
        temperature=flags.temperature,
        logit_weight=1.0,
    )
    for name, criterion in [("cross-entropy", plain), ("distilled", distilling)]:
        if flags.student:
            student = AutoModelForCausalLM.from_pretrained(flags.student)
        else:
            student = fresh(tokenizer, blocks=2, width=64, length=flags.max_length)
        results[name] = train(student, teacher, criterion, data, tokenizer, arguments(name, flags.steps))
        student.save_pretrained(flags.output / name)
        tokenizer.save_pretrained(flags.output / name)
    (flags.output / "results.json").write_text(json.dumps(results, indent=2))
    print("\nheld-out perplexity")
    for name, perplexity in results.items():
        print(f"{name:>14}  {perplexity:8.1f}")
    return results


if __name__ == "__main__":
    main()
