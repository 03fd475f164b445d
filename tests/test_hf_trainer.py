"""examples/hf_trainer.py in small, and the real Trainer's gradient accumulation."""

import copy
import json

import hf_trainer
import pytest
import torch
from families import batch, build
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

import kdloss

pytestmark = pytest.mark.filterwarnings("ignore:.*loss_type=None.*")


def test_the_example_trains_two_students_and_writes_them(tmp_path):
    sentence = "the teacher knows what the student will learn from every page of this book"
    words = sentence.split()
    lines = [{"id": i, "text": " ".join(words[i % 7 :] + words[: i % 11])} for i in range(40)]
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    flags = ["--data", str(file), "--steps", "6", "--max-length", "16", "--output", str(tmp_path / "out")]
    results = hf_trainer.main(flags)
    assert set(results) == {"cross-entropy", "distilled"}
    assert json.loads((tmp_path / "out/results.json").read_text()) == results
    for name, perplexity in results.items():
        assert 1 < perplexity < 1000
        student = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / name)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / name)
        assert student(**tokenizer("the teacher", return_tensors="pt")).logits.isfinite().all()


def test_accumulated_micro_batches_take_the_step_of_one_batch(tmp_path):
    teacher, start = build("gpt2", width=24, depth=4), build("gpt2", depth=2, seed=1)
    rows = [batch("gpt2") for _ in range(2)]
    data = [{name: x[i] for name, x in b.items()} for b in rows for i in range(2)]
    data[1]["labels"][2:] = -100  # micro-batches of unequal size

    def step(per_device, accumulation):
        torch.manual_seed(0)  # the same projections
        student = copy.deepcopy(start)
        criterion = kdloss.FeatureKD(logit_weight=1.0)
        distill = kdloss.Distiller(teacher, criterion).prepare(student)
        parameters = [*student.parameters(), *criterion.parameters()]
        arguments = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=per_device,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            max_grad_norm=0.0,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            use_cpu=True,
        )
        trainer = hf_trainer.DistillationTrainer(
            student,
            arguments,
            distill=distill,
            train_dataset=data,
            optimizers=(torch.optim.SGD(parameters, lr=1.0), None),
        )
        before = [p.detach().clone() for p in parameters]
        trainer.train()
        return [b - p.detach() for b, p in zip(before, parameters, strict=True)]

    whole, parts = step(4, 1), step(1, 4)
    assert all(x.any() for x in whole)
    for one, many in zip(whole, parts, strict=True):
        torch.testing.assert_close(many, one, rtol=1e-4, atol=1e-6)
