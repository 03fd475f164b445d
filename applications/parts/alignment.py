"""Align the tokens of two tokenizers of the same text, and map one vocabulary to the other."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def read(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The tokens of all texts in one sequence, and the position in characters at which each token ends."""
    ids, ends, start = [], [], 0
    found = tokenizer(list(texts), add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    for words, tokens, offsets in zip(texts, found["input_ids"], found["offset_mapping"], strict=True):
        ids += [*tokens, tokenizer.eos_token_id]
        ends += [*(start + end for _, end in offsets), start + len(words) + 1]
        start = ends[-1]
    return torch.tensor(ids), torch.tensor(ends)


def aligned(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], length: int, context: int) -> Any:
    """Blocks of the student's tokens, each with the teacher's tokens of the same text.

    - `input_ids` `[blocks, length]`: the student's tokens.
    - `teacher_ids` `[blocks, n]`: the teacher's tokens, from the first one that begins in the block.
    - `teacher_at` `[blocks, length]`: the index in `teacher_ids` of the token that ends where the student's token ends.
    - `mask` `[blocks, length]`: True for tokens that both models predict from the same characters.
    """
    (ids, ends), (their_ids, their_ends) = student, teacher
    count = len(ids) // length
    at = torch.searchsorted(their_ends, ends, right=True) - 1
    complete = ends != torch.cat([ends[1:], ends[-1:] + 1])  # False inside a character of several tokens
    both = complete & (at >= 0) & (their_ends[at] == ends)
    at, both = (x[: count * length].view(count, length) for x in (at, both))
    begins = torch.cat([ends.new_zeros(1), ends[length - 1 : count * length - 1 : length]])
    first = torch.searchsorted(their_ends, begins, right=True)
    first += (first > 0) & (their_ends[first - 1] != begins)  # skip a token that begins before the block
    at = at - first[:, None]
    both &= (at >= 0) & (at < context)
    at = at.where(both, 0)
    window = first[:, None] + torch.arange(int(at.max()) + 1)
    return {
        "input_ids": ids[: count * length].view(count, length),
        "teacher_ids": their_ids[window.clamp(max=len(their_ids) - 1)],
        "teacher_at": at,
        "mask": torch.cat([both.new_zeros(count, 1), both[:, :-1]], 1),
    }


class TeacherAtStudentTokens(nn.Module):
    """A teacher whose logits are taken at the student's positions."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, at: Tensor) -> Tensor:
        """Logits `[batch, length, classes]`."""
        logits = self.model(input_ids=ids).logits
        return logits.gather(1, at[..., None].expand(*at.shape, logits.shape[-1]))


def begun(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> Callable[..., tuple[Any, Tensor]]:
    """A `vocabulary` that maps each token of the teacher to the first of the student's tokens that spell it."""
    words = [teacher.decode([i]) for i in range(len(teacher))]
    ids = student(words, add_special_tokens=False)["input_ids"]
    both = enumerate(zip(words, ids, strict=True))
    pairs = {i: found[0] for i, (word, found) in both if found and "\ufffd" not in word}  # skip parts of a character
    pairs[teacher.eos_token_id] = student.eos_token_id
    known, first = torch.tensor([*pairs]), torch.tensor([*pairs.values()])

    def over_student_vocabulary(s: Any, t: Tensor) -> tuple[Any, Tensor]:
        mass = t.float().softmax(-1)[..., known.to(t.device)]
        found = mass.new_zeros(*mass.shape[:-1], len(student)).index_add_(-1, first.to(t.device), mass)
        return s, found.log()

    return over_student_vocabulary
