"""Contrastive representation distillation."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from kdloss import _checks
from kdloss.distances._layers import linear
from kdloss.distances._rows import full_mask, prepare_rows, product, spread


class CRD(nn.Module):
    r"""Contrastive loss: match each row of the student with its own row of the teacher, among rows of earlier batches.

    $\sum_{\text{anchor}} \left( -\log h(s, t) - \sum_{j=1}^N \log (1 - h(s, t_j)) \right)$. The anchor is
    once the student, against remembered teacher rows $t_j$, and once the teacher, against remembered student rows.

    $h(s, t) = \frac{e^{g_s(s) \cdot g_t(t) / \tau}}{e^{g_s(s) \cdot g_t(t) / \tau} + N z}$ with two linear
    heads g that map to unit vectors of length `width`, and $\tau$ = `temperature`. This follows the authors' code.
    Their constant Z, estimated on the first batch against a random memory, replaces the paper's N/M (M examples in
    the data set) by N z, where z is the mean of $e^{\cdot/\tau}$ over random directions. Here z is
    $e^{1/(2 D \tau^2)}$, the value of that mean for a large D = `width`.

    The last N = `negatives` embeddings of both sides are the negatives. They are kept in buffers of fixed size, so
    `state_dict()` saves them and `to()` moves them. In training mode each call adds the rows that count, without
    gradient; in `eval()` mode the memory does not change. It starts with random directions, as in the authors' code.
    Their memory has one slot for each example of the data set, a moving average. Here the positive of a row is
    its own pair in the batch, so both heads learn from it. The loss takes N numbers per row and side.

    `index` and `labels` exclude remembered rows that are no true negatives. `index` is an integer for each row that
    identifies it, for example its index in the data set: a row is then never its own negative. `labels` excludes all
    remembered rows of the same class, as the authors do for classification. Without both, a row that comes back while
    it is still remembered is its own negative.

    Build it as `CRD(student_width, teacher_width)`. Widths may differ; no projection is needed. Shapes: student
    `[..., N, D]` and teacher `[..., N, D']`. `[N, D]` are examples (as in the paper: pooled features); in
    `[B, N, D]` every position is a row. `mask` is `[..., N]` (True = counts), `index` and `labels` are `[..., N]`
    (integers from 0). Returns `[..., N]`, in float32 or better. The teacher is detached. The heads have parameters:
    give them to the optimizer. The loss is not 0 at the teacher. In a criterion `labels` are those of the step, if
    it has class indices for these rows, and `index` is what the call was given as `index=`.

    Raises: ValueError for positions or devices that differ, for maps (call `tokens` first), and for indices or labels
    that are not one integer for each row; TypeError for integer features.

    >>> crd = CRD(8, 12, negatives=64)
    >>> crd(torch.randn(4, 8), torch.randn(4, 12)).shape, crd.teachers.shape
    (torch.Size([4]), torch.Size([64, 128]))

    Tian, Krishnan, Isola 2020, "Contrastive Representation Distillation", arXiv:1910.10699, and their code.
    """

    any_width = True
    students: Tensor
    teachers: Tensor
    indices: Tensor
    labels: Tensor
    next: Tensor

    def __init__(
        self,
        student_width: int,
        teacher_width: int,
        *,
        width: int = 128,
        negatives: int = 16384,
        temperature: float = 0.07,
    ) -> None:
        super().__init__()
        _checks.whole_number("width", width)
        _checks.whole_number("negatives", negatives)
        self.temperature = _checks.temperature(temperature)
        self.student = nn.Linear(student_width, width)
        self.teacher = nn.Linear(teacher_width, width)
        self.register_buffer("students", F.normalize(torch.randn(negatives, width), dim=-1))
        self.register_buffer("teachers", F.normalize(torch.randn(negatives, width), dim=-1))
        for name in ("indices", "labels"):  # -1: unknown
            self.register_buffer(name, torch.full((negatives,), -1))
        self.register_buffer("next", torch.zeros((), dtype=torch.int64))

    def forward(
        self,
        student: Float[Tensor, "*batch rows student_width"],
        teacher: Float[Tensor, "*batch rows teacher_width"],
        *,
        mask: Bool[Tensor, "*batch rows"] | None = None,
        index: Int[Tensor, "*batch rows"] | None = None,
        labels: Int[Tensor, "*batch rows"] | None = None,
    ) -> Float[Tensor, "*batch rows"]:
        """The value at every row; see the class."""
        s, t, mask = prepare_rows("CRD", student, teacher, mask, least=1)
        keep = full_mask(mask, s)
        s = F.normalize(linear(s, self.student), dim=-1)
        t = F.normalize(linear(t, self.teacher), dim=-1)
        # -log h and -log(1 - h) are softplus of the gap to log(N z)
        bar = math.log(len(self.students)) + 1 / (2 * s.shape[-1] * self.temperature**2)
        own = 2 * F.softplus(bar - (s * t).sum(-1) / self.temperature)
        # Copies in training mode, because the memory changes before the backward pass.
        teachers, students = (x.to(s.dtype, copy=self.training) for x in (self.teachers, self.students))
        others = (s / self.temperature, teachers), (t / self.temperature, students)
        given = ("index", index, self.indices), ("labels", labels, self.labels)
        whose = [_known(name, numbers, student.shape[:-1], keep) for name, numbers, _ in given]
        same = [_alike(x, memory) for x, (_, numbers, memory) in zip(whose, given, strict=True) if numbers is not None]
        values = own + sum(_loss_of_negatives(product(*x) - bar, same) for x in others)
        if self.training:
            self._remember(keep.flatten(), s, t, *whose)
        return spread(values, mask, student.shape[:-1])

    @torch.no_grad()
    def _remember(self, keep: Tensor, *rows: Tensor) -> None:
        """Overwrite the oldest memory with the rows that count. No shape depends on how many rows count."""
        places, total = len(self.students), keep.sum()
        latest = keep & (keep.cumsum(0) > total - places)
        # Rows that enter come first; the slots of all others are overwritten with their own content.
        order = (~latest).int().argsort(stable=True)[:places]
        enters = latest[order]
        first = self.next + (total - places).clamp_min(0)
        index = (first + torch.arange(len(order), device=keep.device)) % places
        for memory, new in zip((self.students, self.teachers, self.indices, self.labels), rows, strict=True):
            new = new.flatten(0, 1)[order].to(memory.dtype)
            chosen = enters.reshape(-1, *[1] * (new.ndim - 1))
            memory.index_copy_(0, index, torch.where(chosen, new, memory[index]))
        self.next.copy_((self.next + total) % places)

    def extra_repr(self) -> str:
        """Settings for `repr`."""
        return f"negatives={len(self.students)}, temperature={self.temperature}"


def _known(name: str, numbers: Tensor | None, shape: torch.Size, keep: Tensor) -> Tensor:
    """The index or label of each row, `[B, N]`; -1 if unknown."""
    if numbers is None:
        return torch.full_like(keep, -1, dtype=torch.int64)
    if numbers.is_floating_point() or numbers.shape != shape:
        raise ValueError(
            f"CRD's {name} is an integer for each of the rows {tuple(shape)}, got {numbers.dtype} of shape "
            f"{tuple(numbers.shape)}"
        )
    return numbers.reshape(keep.shape).to(torch.int64)


def _loss_of_negatives(gaps: Tensor, same: list[Tensor]) -> Tensor:
    """The sum of -log(1 - h) over the remembered rows, except those excluded as the same row or class."""
    values = F.softplus(gaps)
    for one in same:
        values = values.masked_fill(one, 0)
    return values.sum(-1)


def _alike(rows: Tensor, remembered: Tensor) -> Tensor:
    """Which remembered rows have the index or label of each row, `[B, N, M]`; an unknown one matches none."""
    return (rows.unsqueeze(-1) == remembered) & (remembered >= 0)
