"""Similarity of the blocks of two models, to look at before you pair them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor, nn

from kdloss._capture import Captured, Located, Request, record
from kdloss._decoder_inputs import DecoderInputs
from kdloss._inputs import by_name, named, of_student, of_teacher, refuse_other_order
from kdloss._layout import Patterns
from kdloss._masks import Padding, mask_of_features
from kdloss._own_loss import own_loss
from kdloss._packing import Packing
from kdloss._towers import Towers
from kdloss.adapter import evaluating, without_cache
from kdloss.analysis._matplotlib import matplotlib
from kdloss.layers import find_blocks, select
from kdloss.layers.select import Layers
from kdloss.reduction import widest
from kdloss.teacher import Teacher
from kdloss.terms._axes import Axes

__all__ = ["CKAMatrix", "cka_matrix"]

LEAST = 4  # the unbiased estimator divides by n - 3


@dataclass(frozen=True, eq=False)
class CKAMatrix:
    """The result of `kdloss.analysis.cka_matrix`: `values[s, t]` is the CKA of student block s and teacher block t."""

    values: Tensor

    def pairing(self, layers: Layers = "auto") -> list[tuple[int, int, float]]:
        """Pair each selected student block with the teacher block that it resembles most, in ascending order.

        `layers` selects student blocks, as in `kdloss.layers.select`. Among all assignments whose teacher blocks never
        descend, this is the one with the largest sum of values. Several student blocks may share a teacher block. Each
        of N pairs has the weight 1/N. Give the list to `FeatureKD(pairing=...)`.

        >>> CKAMatrix(torch.tensor([[0.9, 0.8, 0.1], [0.3, 0.2, 0.7]])).pairing("all")
        [(0, 0, 0.5), (1, 2, 0.5)]
        """
        chosen = sorted(select(layers, len(self.values)))
        best, partners = torch.zeros_like(self.values[0]), []
        for values in self.values[chosen]:
            before, partner = best.cummax(0)  # for each teacher block: the best sum so far that ends at or before it
            best = before + values
            partners.append(partner)
        t = int(best.argmax())
        pairs = []
        for s, partner in zip(reversed(chosen), reversed(partners), strict=True):
            pairs.append((s, t, 1 / len(chosen)))
            t = int(partner[t])
        return pairs[::-1]

    def heatmap(self, target: Any) -> None:
        """Draw the matrix on a `target`: matplotlib axes, or the path of a file to write.

        The teacher's blocks are on x, the student's on y, block 0 at the bottom left; a dot marks each
        student block's partner in `pairing("all")`.

        Raises: ImportError without matplotlib (`pip install 'kdloss[plot]'`).
        """
        if isinstance(target, (str, Path)):
            students, teachers = self.values.shape
            size = (2.5 + 0.3 * min(teachers, 40), 2 + 0.3 * min(students, 40))
            figure = matplotlib("figure", "a heat map").Figure(size, layout="constrained")
            self.heatmap(figure.subplots())
            figure.savefig(target, dpi=150)
            return
        image = target.imshow(self.values.numpy(), origin="lower", vmin=0, vmax=1)
        partners = [t for _, t, _ in self.pairing("all")]
        target.plot(partners, range(len(partners)), "o", color="white", markeredgecolor="black")
        target.set(xlabel="teacher block", ylabel="student block")
        for axis in (target.xaxis, target.yaxis):
            axis.set_major_locator(matplotlib("ticker", "a heat map").MaxNLocator(integer=True))
        target.figure.colorbar(image, ax=target, label="CKA")


def cka_matrix(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Any],
    *,
    blocks: str | None = None,
    samples: int = 512,
    layout: Patterns = None,
    teacher_layout: Patterns | EllipsisType = ...,
) -> CKAMatrix:
    r"""Measure the centred kernel alignment (CKA) between all blocks of two models on some batches.

    $\frac{\sum_b \mathrm{HSIC}_1(K_b, L_b)}{\sqrt{\sum_b \mathrm{HSIC}_1(K_b, K_b)}
    \sqrt{\sum_b \mathrm{HSIC}_1(L_b, L_b)}}$ with $K_b = X_b X_b^\top$ for a student block's features
    on batch b, $L_b$ likewise for a teacher block's, and the unbiased
    $\mathrm{HSIC}_1(K, L) = \frac{1}{n(n-3)} \left(\mathrm{tr}(\tilde K \tilde L) +
    \frac{1^\top \tilde K 1\; 1^\top \tilde L 1}{(n-1)(n-2)} - \frac{2}{n-2} 1^\top \tilde K \tilde L 1
    \right)$, $\tilde K$ is K without its diagonal. The value is 1 for a block and itself and about 0
    for unrelated blocks (slightly negative by chance). Shifts, rotations and scale do not change it. It is computed
    in float64.

    The n samples of a batch are its tokens if the features of all blocks are `[B, T, D]` with the same T.
    `attention_mask` (or `mask`) and labels of -100 exclude tokens as in `FeatureKD`. If more than `samples` tokens are
    left, `samples` of them are drawn, the same ones in every run. Otherwise, for example for a CNN's maps, the samples
    are the examples, with their features flattened. `layout` and `teacher_layout` are those of `kdloss.Features`.

    `batches` yields mappings of inputs, from which `student` and `teacher` each get the inputs that their forward
    names, or tuples of inputs, on the models' device. Both models run once for each batch, in eval mode, without
    gradient and only up to their last block. Afterwards they are as they were. Memory does not grow with the number of
    batches. For a progress bar pass `tqdm(batches)`.

    Raises: ValueError for no batch, a batch of fewer than 4 samples, a model whose blocks are not found (`blocks` names
    the list), or features in another layout.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=8, n_head=2, vocab_size=9))
    >>> found = cka_matrix(model, model, [{"input_ids": torch.tensor([[1, 2, 3, 4, 5, 6, 7]])}])
    >>> found.values.shape, found.values.diagonal().round(decimals=6).tolist()
    (torch.Size([3, 3]), [1.0, 1.0, 1.0])

    Kornblith et al. 2019, "Similarity of Neural Network Representations Revisited", arXiv:1905.00414;
    Nguyen, Raghu, Kornblith 2021, "Do Wide and Deep Networks Learn the Same Things?",
    arXiv:2010.15327; Song et al. 2012, "Feature Selection via Dependence Maximization", JMLR 13.
    """
    if samples < LEAST:
        raise ValueError(f"samples={samples} are too few for the unbiased estimator; it needs {LEAST}")
    sums: list[Tensor] = []
    taught = layout if isinstance(teacher_layout, EllipsisType) else teacher_layout
    axes = Axes("student", layout), Axes("teacher", taught, "teacher_layout")
    causal: bool | None = None
    towers, packing = Towers(), Packing()
    for number, batch in enumerate(batches):
        args, inputs, labels, mask = _split_batch(batch)
        own = of_student(student, [Teacher(teacher)], inputs)
        refuse_other_order(student, teacher, args)
        packing.check(student, student, args, own, "student")
        packing.check(teacher, teacher, args, of_teacher(teacher, inputs), "teacher")
        if labels is not None and causal is None:
            causal = getattr(own_loss(student, args, own, labels), "causal", None) or False
        features, keep = _features(student, teacher, args, inputs, labels, mask, causal, blocks, towers, axes)
        if keep is not None:
            rows = keep.nonzero()
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(number))
            rows = rows[order[:samples].to(rows.device)]
            features = [[h[rows[:, 0], rows[:, 1]] for h in side] for side in features]
        s, t = (torch.stack([_u_centred(h, number) for h in side]) for side in features)
        t = t.to(s.device)
        n = features[0][0].shape[0]
        new = [x.cpu() / (n * (n - 3)) for x in (s @ t.T, s.square().sum(-1), t.square().sum(-1))]
        sums = [x + y for x, y in zip(sums, new, strict=True)] if sums else new
    if not sums:
        raise ValueError("no batch was given; pass some batches of text or images that both models take")
    both, students, teachers = sums
    scale = (students[:, None] * teachers).sqrt()
    return CKAMatrix(torch.where(scale > 0, both / scale, 0.0))


def _split_batch(batch: Any) -> tuple[Any, dict[str, Any], Any, Any]:
    """A batch's positional inputs, keyword inputs, labels and mask."""
    inputs = dict(batch) if isinstance(batch, Mapping) else {}
    args = () if inputs else batch if isinstance(batch, (tuple, list)) else (batch,)
    return args, inputs, inputs.pop("labels", None), inputs.pop("mask", None)


def _features(
    student: nn.Module,
    teacher: nn.Module,
    args: Any,
    inputs: dict[str, Any],
    labels: Any,
    mask: Tensor | None,
    causal: bool | None,
    blocks: str | None,
    towers: Towers,
    axes: tuple[Axes, Axes],
) -> tuple[list[list[Tensor]], Tensor | None]:
    """The features of all blocks of both models, and the mask of tokens; None if samples are examples."""
    fed = DecoderInputs()
    read = ((student, named(student, inputs)), (teacher, of_teacher(teacher, inputs)))
    both = [fed.of(model, args, own, labels) for model, own in read]
    seen = [_run(model, args, own, blocks) for model, own in zip((student, teacher), both, strict=True)]
    examples = None if labels is None else len(labels)
    features = [
        [own.width_last(x, name, side.tells["", name], examples) for (_, name), x in side.items()]
        for side, own in zip(seen, axes, strict=True)
    ]
    everything = [h for side in features for h in side]
    positions = everything[0].shape[:2]
    if any(h.ndim != 3 or h.shape[:2] != positions for h in everything):
        return [[h.flatten(1) for h in side] for side in features], None
    asked = {key: Request(key[1], blocks) for key in seen[0]}
    inputs = by_name(student, args, inputs)
    place = towers.of(student, asked, inputs, Located(), lambda: _run(student, args, both[0], blocks, stop=False))
    found = mask_of_features(Padding.of(student, inputs), place, mask, positions)
    keep = torch.ones(positions, dtype=torch.bool, device=everything[0].device) if found is None else found
    if labels is not None and labels.shape == positions and place.side("", 0) == "outputs":
        counted = labels != -100
        if causal:
            counted = torch.cat([counted[:, 1:], torch.zeros_like(counted[:, :1])], 1)
        keep = keep & counted
    return features, keep


def _run(model: nn.Module, args: Any, inputs: dict[str, Any], blocks: str | None, *, stop: bool = True) -> Captured:
    asked = {("", i): Request(i, blocks) for i in range(len(find_blocks(model, blocks)))}
    with evaluating(model), torch.no_grad(), record(model, asked, stop=stop) as seen:
        model(*args, **without_cache(model, inputs))
    return seen


def _u_centred(features: Tensor, number: int) -> Tensor:
    """The Gram matrix `[n, n]` of features `[n, D]`, centred without its diagonal, flattened."""
    n = len(features)
    if n < LEAST:
        raise ValueError(
            f"batch {number} has {n} samples that count, the unbiased estimator needs {LEAST}; use larger "
            "batches, or DataLoader(..., drop_last=True)"
        )
    x = features.to(widest(features.device))
    size, x = x.abs().amax(), x - x.mean(0)  # centring changes only the rounding
    x = torch.where(x.abs() > 1e-12 * size, x, 0.0)  # and the rounding of constant features is removed
    kernel = (x @ x.T).fill_diagonal_(0)
    rows = kernel.sum(0) / (n - 2)
    centred = kernel - rows - rows[:, None] + kernel.sum() / ((n - 1) * (n - 2))
    return centred.fill_diagonal_(0).flatten()
