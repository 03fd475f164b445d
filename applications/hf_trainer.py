"""Distil a causal language model with the Hugging Face Trainer.

Trains the same student twice, without and with distillation, and compares both on held-out text:

    python applications/hf_trainer.py                               # a small teacher, trained first
    python applications/hf_trainer.py --teacher gpt2-large --student gpt2 --data my.jsonl

Interrupted or killed at any moment, the same command goes on from the newest whole checkpoint.
"""

import argparse
import hashlib
import json
import math
import os
from pathlib import Path

import torch
from parts import cells, evaluation, models, report, text
from parts.files import replacing, save_json
from parts.trainer import DistillationTrainer
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed

import kdloss


def train(
    folder: Path,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    criterion: nn.Module,
    blocks: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    steps: int,
    flags: argparse.Namespace,
) -> None:
    """Train a student into `folder`, unless it is there; its perplexities are in result.json."""
    arguments = TrainingArguments(
        output_dir=str(flags.output / "checkpoints" / folder.name),
        max_steps=steps,
        per_device_train_batch_size=flags.batch_size,
        learning_rate=flags.learning_rate,
        bf16=flags.bf16,
        seed=flags.seed,
        logging_steps=max(1, steps // 5),
        eval_strategy="steps",
        save_steps=max(1, steps // 5),
        save_total_limit=1,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
    )
    teacher.to(arguments.device)
    if folder.is_dir():
        return
    data = {name: [{"input_ids": x, "labels": x} for x in part] for name, part in blocks.items()}
    trainer = DistillationTrainer(
        student,
        arguments,
        distill=kdloss.Distiller(teacher, criterion),
        train_dataset=data["train"],
        eval_dataset=data["held-out"],
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=True)
    if trainer.is_world_process_zero():
        measured = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
        result = {
            "perplexity": evaluation.perplexity(student, blocks["held-out"]),
            # a little different at the end: the Trainer gives a last, smaller batch full weight
            "curve": [(entry["step"], math.exp(min(entry["eval_loss"], 700))) for entry in measured],
        }
        with replacing(folder) as partial:
            trainer.save_model(str(partial))
            (partial / "result.json").write_text(json.dumps(result))
    trainer.accelerator.wait_for_everyone()


def new_student(teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, flags: argparse.Namespace) -> nn.Module:
    """The student before training, the same one each time."""
    set_seed(flags.seed)
    if flags.student:
        student, own_tokenizer = models.load(flags.student)
        models.check_vocabulary(student, teacher, own_tokenizer, tokenizer)
    else:
        student = models.gpt2(2, 64, 4, dropout=0.1, tokenizer=tokenizer, length=flags.max_length)
        student.resize_token_embeddings(teacher.config.vocab_size)  # some are padded
    models.check_length(student, flags.max_length, "student")
    if flags.lora:
        from peft import LoraConfig, get_peft_model

        student = get_peft_model(student, LoraConfig(r=flags.lora, target_modules="all-linear"))
    return student


def main(argv: list[str] | None = None) -> dict[str, dict]:
    """Read the flags, train a teacher where none is given, train two students, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--teacher", help="folder, .gguf file or hub name (default: train a small one first)")
    add("--student", help="folder, .gguf file or hub name (default: a new GPT-2 of 2 blocks)")
    add("--lora", type=int, metavar="RANK", help="train LoRA adapters of this rank on the student (by peft)")
    add("--data", help=".jsonl, .json, .csv, .txt or a dataset's name (default: packaged)")
    add("--samples", type=int, default=2000, help="number of texts (%(default)s)")
    add("--max-length", type=int, default=128, help="tokens in a block of text (%(default)s)")
    add("--steps", type=int, default=200, help="optimizer steps of each student (%(default)s)")
    add("--batch-size", type=int, default=8, help="blocks in a batch, per device (%(default)s)")
    add("--learning-rate", type=float, default=2e-3, help="(%(default)s)")
    add("--temperature", type=float, default=1.0, help="of both models' predictions (%(default)s)")
    add("--alpha", type=float, default=0.3, help="share of cross-entropy in the loss (%(default)s)")
    add("--bf16", action="store_true", help="mixed precision")
    add("--seed", type=int, default=0, help="(%(default)s)")
    add("--output", type=Path, default=Path("runs/hf_trainer"), help="folder of results (%(default)s)")
    flags = parser.parse_args(argv)

    texts = text.read_texts(flags.data, limit=flags.samples)
    set_seed(flags.seed)
    if flags.teacher:
        teacher, tokenizer = models.load(flags.teacher)
    else:
        tokenizer = text.train_tokenizer(texts, vocabulary=2048)
        teacher = models.gpt2(4, 128, 4, dropout=0.1, tokenizer=tokenizer, length=flags.max_length)
    models.check_length(teacher, flags.max_length, "teacher")
    new_student(teacher, tokenizer, flags)  # what does not fit is refused before anything is trained
    held_out = max(1, len(texts) // 10)
    blocks = {
        name: text.pack(text.tokenize(tokenizer, part), flags.max_length)
        for name, part in (("train", texts[held_out:]), ("held-out", texts[:held_out]))
    }
    fingerprint = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    settings = {n: v for n, v in vars(flags).items() if n != "output"} | {"texts": fingerprint}
    first = int(os.environ.get("RANK", 0)) == 0
    if not cells.begun(flags.output, settings) and first:
        save_json(settings, flags.output / "settings.json")

    alone = kdloss.VanillaKD(alpha=1.0)  # cross-entropy; the teacher does not even run
    if not flags.teacher:
        folder = flags.output / "teacher"
        train(folder, teacher, teacher, alone, blocks, tokenizer, 2 * flags.steps, flags)
        teacher, _ = models.load(str(folder))
    distilling = kdloss.FeatureKD(
        distance=kdloss.distances.layer_norm_mse,
        alpha=flags.alpha,
        temperature=flags.temperature,
        logit_weight=1.0,
    )
    results = {}
    for name, criterion in (("cross-entropy", alone), ("distilled", distilling)):
        folder, student = flags.output / name, new_student(teacher, tokenizer, flags)
        train(folder, student, teacher, criterion, blocks, tokenizer, flags.steps, flags)
        results[name] = json.loads((folder / "result.json").read_text())
    level = evaluation.perplexity(teacher, blocks["held-out"])
    if first:
        save_json({"teacher": level, "students": results}, flags.output / "results.json")
        perplexities = {"teacher": level} | {name: found["perplexity"] for name, found in results.items()}
        curves = {name: found["curve"] for name, found in results.items()}
        print(report.curves(perplexities, curves, flags.output))
    return results


if __name__ == "__main__":
    main()
