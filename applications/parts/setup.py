"""Prepare a study: text, teacher and student."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import kdloss
from parts import cells, evaluation, files, models, text

Train = Callable[..., Any]  # distill_lm.train


@dataclass
class Setup:
    """The teacher, the text and the blocks that students are trained and measured on."""

    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    texts: list[str]
    texts_of_student: int
    unseen: list[str]
    blocks: Tensor
    heldout: Tensor
    prompts: Tensor
    reference: Tensor
    key: str
    judge: PreTrainedModel | None  # of sampled text: always the first teacher


def prepare(args: Any, train: Train) -> Setup:
    """Read the text, load or train the teacher, cut the text into blocks, and hold some of it out."""
    source = {"config": args.data_config, "split": args.split, "column": args.text_column}
    texts = text.read_texts(args.data, **source, limit=args.samples)
    seen, heldout = texts[: -args.heldout_samples], texts[-args.heldout_samples :]
    if not seen:
        raise ValueError(f"all {len(texts)} texts are held out, none is left to train on: lower --heldout-samples")
    teacher, tokenizer = teacher_of(args, seen, train)
    models.check_length(teacher, args.max_length, "teacher")
    student_samples = args.student_samples or (len(seen) if args.teacher else 320)
    blocks = text.pack(text.tokenize(tokenizer, seen[:student_samples]), args.max_length)
    token_ids = text.tokenize(tokenizer, heldout)
    prompts, reference = evaluation.continuations(token_ids, args.continuations, args.max_length)
    unseen_blocks = text.pack(token_ids, args.max_length)
    made_of = {"teacher": str(teacher.name_or_path), "blocks": blocks.tolist(), "heldout": token_ids}
    teacher.to(args.device).eval()
    return Setup(
        teacher=teacher,
        tokenizer=tokenizer,
        texts=seen,
        texts_of_student=student_samples,
        unseen=heldout,
        blocks=blocks.to(args.device),
        heldout=unseen_blocks,
        prompts=prompts,
        reference=reference,
        key=cells.key(made_of),
        judge=teacher,
    )


def teacher_of(
    args: Any,
    texts: Sequence[str],
    train: Train,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the teacher; or train one on these texts, and save it for the next run."""
    if args.teacher is not None:
        return models.load(args.teacher)
    texts = texts[: args.teacher_samples]
    names = ("vocabulary", "max_length", "batch_size", *(n for n in vars(args) if n.startswith("teacher_")))
    words = None if tokenizer is None else tokenizer.get_vocab()
    key = cells.key({name: getattr(args, name) for name in names} | {"texts": texts, "words": words})
    folder = args.teachers / key
    if folder.is_dir():
        print(f"teacher: {folder}, trained earlier with these settings")
        return models.load(str(folder))
    torch.manual_seed(0)
    tokenizer = tokenizer or text.train_tokenizer(texts, args.vocabulary)
    shape = (args.teacher_layers, args.teacher_width, args.teacher_heads)
    teacher = models.gpt2(*shape, dropout=0.0, tokenizer=tokenizer, length=args.max_length)
    blocks = text.pack(text.tokenize(tokenizer, texts), args.max_length).to(args.device)
    steps = args.teacher_epochs * -(-len(blocks) // args.batch_size)
    alone = kdloss.Distiller(teacher.to(args.device), kdloss.VanillaKD(alpha=1.0))
    unfinished = args.teachers / f"{key}.checkpoints"
    train(
        alone,
        teacher,
        AdamW(teacher.parameters(), lr=args.teacher_lr),
        text.batches(blocks, args.batch_size, steps, seed=0),
        steps,
        checkpoints=unfinished,
        save_every=args.save_every,
        title="teacher",
    )
    models.save(teacher, tokenizer, folder)
    files.remove(unfinished)
    print(f"teacher: saved in {folder}")
    return models.load(str(folder))


def student_of(args: Any, teacher: PreTrainedModel, teacher_tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A student before training; the same seed gives the same student."""
    torch.manual_seed(args.seed)
    if args.student is not None:
        student, tokenizer = models.load(args.student)
        models.check_vocabulary(student, teacher, tokenizer, teacher_tokenizer)
    elif args.keep_blocks is not None:
        student = kdloss.keep_blocks(teacher, args.keep_blocks)
    else:
        shape = (args.student_layers, args.student_width, args.student_heads)
        student = models.gpt2(*shape, dropout=args.dropout, tokenizer=teacher_tokenizer, length=args.max_length)
        student.resize_token_embeddings(teacher.config.vocab_size)  # some teachers have more embeddings than tokens
    models.check_length(student, args.max_length, "student")
    student.get_input_embeddings().requires_grad_(not args.freeze_embeddings)
    return student.to(args.device)
