"""Masked generative distillation."""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from kdloss import _checks
from kdloss.distances._features import mean, squared_gap
from kdloss.distances._layers import convolution
from kdloss.distances._rows import prepare_rows, spread
from kdloss.reduction import fill


class MGD(nn.Module):
    r"""Squared error of the teacher's features, generated from randomly masked student features.

    $\frac1D \| G(m \odot s)_n - t_n \|^2$ at every position n. In training mode m sets a random `ratio` of the
    positions to zero, in all channels (drawn from torch's generator). G, two 3x3 convolutions with a ReLU
    between them, generates the teacher's features from the rest. In `eval()` mode nothing is set to zero, as in
    dropout. The authors sum the squares and divide by the number of examples, with a weight of 2e-5; this
    is the mean over positions and channels instead. The default ratio, 0.65, is that of their detectors; their
    classifiers drop whole channels instead.

    Positions come as rows (`kdloss.distances.tokens` of a map) and are put back on the grid `size` = (H, W); one of
    the two may be -1. For text write `size=(1, -1)`. For maps `kdloss.Features` passes the grid (as `grid`, beside
    student and teacher); for tokens you have to give `size`. Positions that the `mask` excludes are zeros to both
    convolutions, like everything outside the grid.

    Build it as `MGD(student_width, teacher_width)` with the widths of the features it is called with; they are equal,
    after `FeatureKD`'s projection. Shapes: student and teacher `[..., N, D]`, mask `[..., N]` (True = counts).
    Returns `[..., N]`, in float32 or better. The teacher is detached. The generator has parameters: give them to the
    optimizer. The loss is not 0 at the teacher.

    Raises: ValueError for a missing grid or one that doesn't hold N positions, for widths, positions or devices that
    differ, and for maps (call `tokens` first); TypeError for integer features.

    >>> student, teacher = torch.randn(2, 16, 8), torch.randn(2, 16, 8)
    >>> MGD(8, 8, size=(2, 8))(student, teacher).shape
    torch.Size([2, 16])

    Yang et al. 2022, "Masked Generative Distillation", arXiv:2205.01529, and their code.
    """

    def __init__(
        self,
        student_width: int,
        teacher_width: int,
        *,
        ratio: float = 0.65,
        size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        width = _checks.one_width("MGD", student_width, teacher_width)
        self.ratio = _checks.fraction("ratio", ratio)
        self.size = size
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(
        self,
        student: Float[Tensor, "*batch rows width"],
        teacher: Float[Tensor, "*batch rows width"],
        *,
        mask: Bool[Tensor, "*batch rows"] | None = None,
        grid: tuple[int, ...] | None = None,
    ) -> Float[Tensor, "*batch rows"]:
        """The value at every position; see the class."""
        s, t, keep = prepare_rows("MGD", student, teacher, mask, same_width=True, least=1)
        if s.numel():
            s = self._generate(s, keep, grid)
        return spread(mean(squared_gap(s, t)), keep, student.shape[:-1])

    def _generate(self, s: Tensor, keep: Tensor | None, told: tuple[int, ...] | None) -> Tensor:
        size = told if self.size is None else self.size
        where = None if size is None or len(size) != 2 else _checks.grid(size, s.shape[1])
        if where is None or (told is not None and where != told):
            origin = f", of a map {told}" if told else ""
            problem = "and their grid isn't given" if size is None else f"which don't fit a grid of size={size}"
            raise ValueError(
                f"MGD got {s.shape[1]} positions{origin}, {problem}; write functools.partial(kdloss.distances.MGD, "
                "size=(H, W)), or size=(1, -1) for text"
            )
        height, width = where
        if self.training:
            s = fill(s, torch.rand(s.shape[:2], device=s.device) >= self.ratio)
        grid = rearrange(s, "b (h w) c -> b c h w", h=height, w=width)
        hidden = F.relu(convolution(grid, self.first))
        if keep is not None:
            hidden = hidden.masked_fill(~rearrange(keep, "b (h w) -> b 1 h w", h=height, w=width), 0)
        return rearrange(convolution(hidden, self.second), "b c h w -> b (h w) c")

    def extra_repr(self) -> str:
        """Settings for `repr`."""
        return f"ratio={self.ratio}, size={self.size}"
