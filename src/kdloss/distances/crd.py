"""Contrastive representation distillation."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from kdloss import _checks
from kdloss.distances._layers import linear
from kdloss.distances._rows import product, rows, spread, whole


class CRD(nn.Module):
    r"""Tell a row's own teacher from the teachers of other rows, and its own student from other students.

    $\sum_{\text{anchor}} \left( -\log h(s, t) - \sum_{j=1}^N \log (1 - h(s, t_j)) \right)$, the anchor once
    the student among remembered teachers $t_j$, once the teacher among remembered students, with

    $h(s, t) = \frac{e^{g_s(s) \cdot g_t(t) / \tau}}{e^{g_s(s) \cdot g_t(t) / \tau} + N z}$: two linear
    heads g to unit vectors of length `width`, and $\tau$ = `temperature`. It is the authors' code, whose
    constant Z, estimated on the first batch against a random memory, makes of the paper's N/M (M examples in the
    data set) this N z, with z the mean of $e^{\cdot/\tau}$ over random directions. Here z is $e^{1/(2 D \tau^2)}$,
    that mean's value for a large D = `width`.

    The last N = `negatives` embeddings of both sides are remembered, in buffers: `state_dict()` holds
    them, `to()` moves them, they never grow. Rows that count enter after each call in training mode,
    without gradient; `eval()` reads only. At first the memory holds random directions, as the authors'
    does. Theirs has a place for each example of the data set, a moving average; here a positive is the row's own
    pair in the batch, through which both heads learn. It takes N numbers per row and side.

    What is remembered of the row itself is no negative of it: `index`, an integer for each row, says which row it
    is, in the data set say. `labels` leaves out all that is remembered of the row's class, as the authors do where
    there are classes. Without both, a row seen again while it is remembered is held against itself.

    `CRD(student_width, teacher_width)`: widths may differ, no projection is needed. Shapes: student
    `[..., N, D]` and teacher `[..., N, D']`; `[N, D]` are examples (the paper's, pooled
    features), of `[B, N, D]` every position is a row of its own. `mask` is `[..., N]` (True = counts), index and
    labels `[..., N]` (integers from 0). Returns `[..., N]`, in float32 or better. The teacher is detached; the heads
    hold parameters: give them to the optimizer. It is not 0 at the teacher. In a criterion `labels` are the step's,
    where it has class indices for these rows, and `index` is what the call was given as `index=`.

    Raises: ValueError for positions or devices that differ, maps that are not rows, and indices or labels that are
    none of each row; TypeError for integer features.

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
        for name in ("indices", "labels"):  # below 0 where it isn't known
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
        s, t, mask = rows("CRD", student, teacher, mask, least=1)
        keep = whole(mask, s)
        s = F.normalize(linear(s, self.student), dim=-1)
        t = F.normalize(linear(t, self.teacher), dim=-1)
        # -log h and -log(1 - h) are softplus of the gap to log(N z)
        bar = math.log(len(self.students)) + 1 / (2 * s.shape[-1] * self.temperature**2)
        own = 2 * F.softplus(bar - (s * t).sum(-1) / self.temperature)
        # In training copies, since the memory changes before backward.
        teachers, students = (x.to(s.dtype, copy=self.training) for x in (self.teachers, self.students))
        others = (s / self.temperature, teachers), (t / self.temperature, students)
        given = ("index", index, self.indices), ("labels", labels, self.labels)
        whose = [_known(name, numbers, student.shape[:-1], keep) for name, numbers, _ in given]
        same = [_alike(x, memory) for x, (_, numbers, memory) in zip(whose, given, strict=True) if numbers is not None]
        values = own + sum(_apart(product(*x) - bar, same) for x in others)
        if self.training:
            self._remember(keep.flatten(), s, t, *whose)
        return spread(values, mask, student.shape[:-1])

    @torch.no_grad()
    def _remember(self, keep: Tensor, *rows: Tensor) -> None:
        """Write the rows that count over the oldest, without a shape that depends on how many do."""
        places, total = len(self.students), keep.sum()
        latest = keep & (keep.cumsum(0) > total - places)
        # Those that enter come first; where others would, what stands there is written once more.
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
    """What each row is `[B, N]`, -1 where it isn't known."""
    if numbers is None:
        return torch.full_like(keep, -1, dtype=torch.int64)
    if numbers.is_floating_point() or numbers.shape != shape:
        raise ValueError(
            f"CRD's {name} is an integer for each of the rows {tuple(shape)}, got {numbers.dtype} of shape "
            f"{tuple(numbers.shape)}"
        )
    return numbers.reshape(keep.shape).to(torch.int64)


def _apart(gaps: Tensor, same: list[Tensor]) -> Tensor:
    """The sum of -log(1 - h) over what is remembered and is not the same."""
    values = F.softplus(gaps)
    for one in same:
        values = values.masked_fill(one, 0)
    return values.sum(-1)


def _alike(rows: Tensor, remembered: Tensor) -> Tensor:
    """Which of the remembered are the same as the rows, `[B, N, M]`, as far as both are known."""
    return (rows.unsqueeze(-1) == remembered) & (remembered >= 0)
