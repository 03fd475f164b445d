"""How `Features` finds the features in outputs and compares one pair of them, one value per position."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Size, Tensor, nn

from kdloss import _checks
from kdloss._capture import Captured
from kdloss._layout import standard, width_last
from kdloss.distances._rows import needs_no_width
from kdloss.layers.layer_map import Layer, LayerMap
from kdloss.projections import convolves
from kdloss.reduction import fill, per_example, precise, savable, takes, with_mask
from kdloss.terms._axes import Axes, Batch
from kdloss.terms._positions import Positions
from kdloss.terms.reads import Pairs, Reads

Features = Mapping[tuple[Layer, Layer], tuple[Tensor, Tensor]]
Distance = Callable[..., Tensor]
Resize = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def feature_pairs(
    student: Any,
    teacher: Any,
    chosen: LayerMap,
    pairs: Pairs | None,
    resize: Resize | None,
    axes: tuple[Axes, Axes],
    batch: int | None,
) -> tuple[Features, dict[tuple[Layer, Layer], float]]:
    """Both features of every pair, at the same positions and with the width last, and the weights of the pairs."""
    s, t = _hidden(student, chosen.blocks), _hidden(teacher, chosen.blocks)
    depths = (len(s) - 1, len(t) - 1) if s is not None and t is not None else None
    pairs = chosen.pairs(depths) if pairs is None else pairs
    if depths is not None:
        _last_against_last(pairs, depths)
    features = {}
    for i, j, _ in pairs:
        both = _feature(student, s, i, axes[0], batch), savable(_feature(teacher, t, j, axes[1], batch).detach())
        features[i, j] = _resized(resize, both, label(i, j)) if resize else both
    return features, {(i, j): w for i, j, w in pairs}


def _resized(resize: Resize, both: tuple[Tensor, Tensor], pair: str) -> tuple[Tensor, Tensor]:
    """Both features at the same positions; `resize` gets them in the default layouts."""
    try:
        student, teacher = resize(*map(standard, both))
    except ValueError as error:
        raise ValueError(f"{pair}: {error}") from None
    return width_last(student), width_last(teacher)


def label(student: Layer, teacher: Layer) -> str:
    """A pair's name in `components`, which follows the name of its term."""
    s, t = ("+".join(map(str, n)) if isinstance(n, tuple) else n for n in (student, teacher))
    return f"{s}-{t}"


def one_width(
    widths: Mapping[tuple[Layer, Layer], tuple[int, int]],
) -> dict[Layer, tuple[int, int]]:
    """The widths (student, teacher) for each student layer, which has only one projection."""
    found: dict[Layer, tuple[int, int]] = {}
    for (s, t), both in widths.items():
        if found.setdefault(s, both) != both:
            raise ValueError(
                f"student layer {s!r} is paired with teacher layers of widths {found[s][1]} and "
                f"{both[1]} ({t!r}), but has one projection; pair it with layers of one width"
            )
    return found


@dataclass(frozen=True)
class Compared:
    """A pair's features as they are compared, one value for each of their positions, and which positions count.

    `elsewhere`: whether these are other positions than those of the labels.
    """

    student: Tensor
    teacher: Tensor
    each: Tensor
    keep: Tensor | None
    elsewhere: bool

    def values(self, where: Positions, weight: float | Tensor = 1.0) -> Tensor:
        """One value per position of the batch; if the features stand elsewhere, the mean of their example."""
        values = self.each if isinstance(weight, float) and weight == 1 else self.each * weight
        return where.spread(per_example(values, self.keep)) if self.elsewhere else values


def compare(
    name: str,
    distance: Distance,
    projections: tuple[nn.Module, nn.Module],
    student: Tensor,
    teacher: Tensor,
    where: Positions,
    own: Callable[[Size], tuple[Tensor | None, bool]],
    index: Tensor | None = None,
) -> Compared:
    """Compare the features of a pair.

    Features at the positions of the labels are compared there. The distances of other features (an image's patches, an
    encoder's tokens) are averaged within their example, over their own mask if there is one, and all positions of the
    example share that value.
    """
    _checks.floating(f"student features of {name}", student)
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"{name}: student features {tuple(student.shape)} and teacher features "
            f"{tuple(teacher.shape)} (width last) stand at different positions; nothing is broadcast. "
            f"{_turned(student, teacher)}"
        )
    mask, elsewhere = own(student.shape[:-1])
    elsewhere = elsewhere or student.shape[:-1] != where.shape
    if not elsewhere:
        student, teacher, keep = where.take(student), where.take(teacher), where.keep
    else:
        keep = where.examples(student.shape[:-1])
        if mask is not None:
            _checks.mask(mask, student.shape[:-1], "feature positions")
            keep = mask if keep is None else keep & mask
        student, teacher = fill(student, keep), fill(teacher, keep)
    student, teacher = (_project(p, x) for p, x in zip(projections, (student, teacher), strict=True))
    _same_width(name, distance, projections, student, teacher)
    known = _labels_and_index(student, where, index, elsewhere)
    return Compared(student, teacher, _each(name, distance, student, teacher, keep, known), keep, elsewhere)


def _turned(student: Tensor, teacher: Tensor) -> str:
    """What to write for features at different positions: a layout, if one would bring them together."""
    sides = (("layout", student, teacher), ("teacher_layout", teacher, student))
    for argument, x, other in sides:
        given, axes = standard(x).shape, x.ndim
        if axes > 2 and other.shape[1:-1] == (given[2:] if axes == 3 else given[1:-1]):
            pattern = {3: "b c t", 4: "b h w c", 5: "b d h w c"}.get(axes, "...")
            return f"With {argument}={pattern!r} they stand at the same positions: write it if these are its axes"
    return (
        "Write FeatureKD(resize=kdloss.resize.pool) for another grid of pixels or patches; maps of several resolutions "
        "are paired by pairing='resolution'"
    )


def _project(projection: nn.Module, features: Tensor) -> Tensor:
    """Project features, width last, in the projection's own precision."""
    if isinstance(projection, nn.Identity):
        return precise(features)
    own = next(projection.parameters(), None)
    features = precise(features) if own is None else features.to(own.dtype)
    axes = convolves(projection)
    if axes and features.ndim != axes + 2:
        raise ValueError(
            f"{type(projection).__name__} projects features with {axes} axes of positions (maps have 2); these have "
            f"their width last, {tuple(features.shape)}; write projection=kdloss.projections.linear"
        )
    projected: Tensor = projection(features.movedim(-1, 1)).movedim(1, -1) if axes else projection(features)
    return projected


def _labels_and_index(features: Tensor, where: Positions, index: Tensor | None, elsewhere: bool) -> dict[str, Tensor]:
    """The class and the example index at each of the features' positions, as far as they are known."""
    shape = features.shape[:-1]
    if index is not None and not isinstance(index, Tensor):
        raise TypeError(
            f"index is an integer tensor, one for each example, got a {type(index).__name__}; write torch.tensor(index)"
        )
    if index is not None and (index.is_floating_point() or index.shape != shape[:1]):
        raise ValueError(
            f"index is an integer for each of the {shape[0]} examples, got {index.dtype} of shape {tuple(index.shape)}"
        )
    classes = where.labels if where.labels is None or not elsewhere or where.labels.ndim == 1 else None
    known = {"labels": classes, "index": index}
    return {
        name: x.reshape(*x.shape, *[1] * (len(shape) - x.ndim)).expand(shape)
        for name, x in known.items()
        if x is not None
    }


def _each(
    name: str, distance: Distance, student: Tensor, teacher: Tensor, keep: Tensor | None, known: Mapping[str, Any]
) -> Tensor:
    """The distance at every position. It gets the pixels of a map as one axis, and their `grid` if it takes that."""
    shape = student.shape[:-1]
    if student.ndim > 3:
        student, teacher = student.flatten(1, -2), teacher.flatten(1, -2)
        keep = None if keep is None else keep.flatten(1)
        known = {name: x.flatten(1) for name, x in known.items()} | {"grid": tuple(shape[1:])}
    more = {name: x for name, x in known.items() if takes(distance, name)}
    values = with_mask(distance, student, teacher, keep, **more)
    if not isinstance(values, Tensor):
        raise _checks.no_tensor(f"{name}: the distance {_word(distance)}", values)
    if values.shape != student.shape[:-1]:
        raise ValueError(
            f"{name}: a distance returns one value per position, {tuple(student.shape[:-1])} for features "
            f"{tuple(student.shape)}, and {_word(distance)} returned {tuple(values.shape)}: take the mean over the "
            "last dimension only. A loss of torch.nn.functional is distance=lambda student, teacher: "
            "torch.nn.functional.mse_loss(student, teacher, reduction='none').mean(-1)"
        )
    return values.view(shape)


def _word(distance: Distance) -> str:
    return getattr(distance, "__name__", type(distance).__name__)


def _same_width(
    name: str, distance: Distance, projections: tuple[nn.Module, nn.Module], student: Tensor, teacher: Tensor
) -> None:
    s, t = student.shape[-1], teacher.shape[-1]
    if s == t or needs_no_width(distance):
        return
    if made := next((p for p in projections if not isinstance(p, nn.Identity)), None):
        raise ValueError(
            f"{name}: after the projection {type(made).__name__} the student's features have width {s} and the "
            f"teacher's {t}; a projection is made by a function of (width that it gets, width that it gives): write "
            "projection=lambda width, wanted: torch.nn.Linear(width, wanted)"
        )
    raise ValueError(
        f"{name}: the student's features have width {s} and the teacher's {t}, and there is no "
        "projection between them. Before building the optimizer write model.prepare(**batch) with a "
        "kdloss.Distillation, distill.prepare(student, **batch) with a kdloss.Distiller, or "
        f"give the term widths=({s}, {t}) and depths=(student_blocks, teacher_blocks)"
    )


def _hidden(output: Any, blocks: str | None) -> Sequence[Tensor] | None:
    """Hugging Face's hidden states: the embedding, then the output of every block."""
    if isinstance(output, Captured):
        return None
    own: Sequence[Tensor] | None = getattr(output, "hidden_states", None)
    stack = "encoder" if blocks is not None and "encoder" in blocks else "decoder"
    return own if own is not None else getattr(output, f"{stack}_hidden_states", None)


def _feature(output: Any, hidden: Sequence[Tensor] | None, name: Layer, axes: Axes, batch: Batch = ...) -> Tensor:
    """A layer's features, width last."""
    if isinstance(name, tuple):
        return torch.cat([_feature(output, hidden, part, axes, batch) for part in name], -1)
    if isinstance(output, Captured):
        return axes.width_last(output[name], name, output.tells.get(name), batch)
    if hidden is None:
        raise TypeError(
            f"the {axes.whose}'s features are needed: call kdloss.Distiller, pass what kdloss.capture "
            "recorded, or a Hugging Face output made with output_hidden_states=True; got "
            f"{type(output).__name__}"
        )
    if not isinstance(name, int):
        raise TypeError(f"hidden_states are in order of blocks, they don't know {name!r}; capture it")
    return axes.width_last(hidden[name + 1], name, None, batch)


def _last_against_last(pairs: Pairs, depths: tuple[int, int]) -> None:
    """Hugging Face's last hidden state comes after the final norm, the others before it."""
    for s, t, _ in pairs:
        if (s == depths[0] - 1) != (t == depths[1] - 1):
            raise ValueError(
                f"pair {(s, t)} of {depths} blocks holds a last block against another: in hidden_states "
                "the last entry has passed the model's final norm, the others have not. "
                "Call kdloss.Distiller, which captures the blocks themselves"
            )


def first_feature(output: Any, reads: Reads, axes: Axes | None) -> tuple[Layer, Tensor] | None:
    """One of the student's features, width last, and its layer; they tell the positions if nothing else does."""
    hidden = _hidden(output, reads.blocks)
    if hidden is not None:
        return 0, hidden[1] if axes is None else _feature(output, hidden, 0, axes)
    if not isinstance(output, Captured) or output.views:  # views belong to other terms
        return None
    name = next(iter(output), None)
    if name is None:
        return None
    return name, output[name] if axes is None else _feature(output, None, name, axes)


def sizes(seen: Captured, axes: Axes) -> list[tuple[int, ...]]:
    """Height and width of the blocks' maps, the sizes of volumes, or lengths of sequences where a layout was given."""
    found = {name: tuple(_feature(seen, None, name, axes).shape) for name in seen}
    flat = [shape for name, shape in found.items() if len(shape) < (3 if axes.of(name) else 4)]
    if flat:
        raise ValueError(
            f"pairing='resolution' compares the sizes of maps, and some blocks of the {axes.whose} return {flat[0]} "
            "(width last); write pairing='uniform'"
        )
    return [shape[1:-1] for shape in found.values()]


def width_of(seen: Captured, name: Layer, axes: Axes) -> int:
    """The width of a layer's features; of several concatenated layers the sum."""
    return sum(_feature(seen, None, one, axes).shape[-1] for one in (name if isinstance(name, tuple) else (name,)))


def refuse_take(output: Any, take: Any, reads: Reads, whose: str) -> None:
    """Raise for `take` with hidden states: it selects a part of a module's output, and they are features already."""
    if take is not None and _hidden(output, reads.blocks) is not None:
        raise TypeError(
            f"take={take!r} takes a part of what a module of the {whose} returned, and hidden_states aren't outputs of "
            "modules: call kdloss.Distiller or kdloss.Distillation, which capture the modules, or leave it out"
        )
