"""What `Features` reads from outputs, and the one value per position it makes of a pair."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Size, Tensor, nn

from kdloss import _checks
from kdloss._capture import Captured
from kdloss.distances._rows import needs_no_width
from kdloss.layers.layer_map import Layer, LayerMap, parts
from kdloss.projections import takes_maps
from kdloss.reduction import fill, per_example, precise, takes
from kdloss.terms._positions import Positions
from kdloss.terms.reads import Pairs, Reads

Features = Mapping[tuple[Layer, Layer], tuple[Tensor, Tensor]]
Distance = Callable[..., Tensor]
Resize = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def feature_pairs(
    student: Any, teacher: Any, chosen: LayerMap, pairs: Pairs | None, resize: Resize | None
) -> tuple[Features, dict[tuple[Layer, Layer], float]]:
    """Both features of every pair, at the same positions with the width last, and the pairs' weights."""
    s, t = _hidden(student, chosen.blocks), _hidden(teacher, chosen.blocks)
    depths = (len(s) - 1, len(t) - 1) if s is not None and t is not None else None
    pairs = chosen.pairs(depths) if pairs is None else pairs
    if depths is not None:
        _last_against_last(pairs, depths)
    features = {}
    for i, j, _ in pairs:
        both = _feature(student, s, i, "student"), _feature(teacher, t, j, "teacher").detach()
        s_features, t_features = map(_width_last, resize(*both) if resize else both)
        features[i, j] = s_features, t_features
    return features, {(i, j): w for i, j, w in pairs}


def label(student: Layer, teacher: Layer) -> str:
    """A pair among the components, behind the name of its term."""
    s, t = ("+".join(map(str, n)) if isinstance(n, tuple) else n for n in (student, teacher))
    return f"{s}-{t}"


def one_width(
    widths: Mapping[tuple[Layer, Layer], tuple[int, int]],
) -> dict[Layer, tuple[int, int]]:
    """The (student, teacher) width of each student layer, which has one projection."""
    found: dict[Layer, tuple[int, int]] = {}
    for (s, t), both in widths.items():
        if found.setdefault(s, both) != both:
            raise ValueError(
                f"student layer {s!r} is held against teacher layers of widths {found[s][1]} and "
                f"{both[1]} ({t!r}), but has one projection; pair it with layers of one width"
            )
    return found


def example_shape(features: Tensor, feature_mask: Tensor | None) -> Size:
    """The positions that features stand at, where nothing else tells: whole examples for maps."""
    whole_examples = features.ndim == 4 or feature_mask is not None
    return features.shape[:1] if whole_examples else features.shape[:-1]


@dataclass(frozen=True)
class Compared:
    """A pair's features where they are compared, the distance at each place, and which places count."""

    student: Tensor
    teacher: Tensor
    distances: Tensor
    keep: Tensor | None
    apart: bool

    def values(self, where: Positions, weight: float | Tensor = 1.0) -> Tensor:
        """One value per position of the batch; where features stand elsewhere, their example's mean."""
        values = self.distances * weight
        return where.spread(per_example(values, self.keep)) if self.apart else values


def compare(
    name: str,
    distance: Distance,
    projections: tuple[nn.Module, nn.Module],
    student: Tensor,
    teacher: Tensor,
    where: Positions,
    feature_mask: Tensor | None,
    index: Tensor | None = None,
) -> Compared:
    """The distances of a pair's features.

    Features that stand at the labels' positions are taken there. Others (an image's patches, an
    encoder's tokens) are averaged within their example, over `feature_mask` where given, and all
    positions of the example share that value.
    """
    _checks.floating(f"student features of {name}", student)
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"{name}: student features {tuple(student.shape)} and teacher features "
            f"{tuple(teacher.shape)} (width last) stand at different positions; nothing is broadcast. "
            "Write FeatureKD(resize=kdloss.resize.pool) for another grid of pixels or patches; maps of several "
            "resolutions are paired by pairing='resolution'"
        )
    apart = feature_mask is not None or student.shape[:-1] != where.shape
    if not apart:
        student, teacher, keep = where.take(student), where.take(teacher), where.keep
    else:
        keep = where.examples(student.shape[:-1])
        if feature_mask is not None:
            _checks.mask(feature_mask, student.shape[:-1], "feature positions")
            keep = feature_mask if keep is None else keep & feature_mask
        student, teacher = fill(student, keep), fill(teacher, keep)
    student, teacher = (_project(p, x) for p, x in zip(projections, (student, teacher), strict=True))
    _same_width(name, distance, student, teacher)
    told = {"mask": keep} | _which(student, where, index, apart)
    return Compared(student, teacher, _distances(distance, student, teacher, told), keep, apart)


def _project(projection: nn.Module, features: Tensor) -> Tensor:
    """A projection of features, width last, in its own precision."""
    own = next(projection.parameters(), None)
    features = precise(features) if own is None else features.to(own.dtype)
    if not takes_maps(projection):
        projected: Tensor = projection(features)
        return projected
    if features.ndim != 4:
        raise ValueError(
            f"{type(projection).__name__} projects maps [B, C, H, W], got {tuple(features.shape)}; "
            "write projection=kdloss.projections.linear"
        )
    return _width_last(projection(rearrange(features, "b h w c -> b c h w")))


def _which(features: Tensor, where: Positions, index: Tensor | None, apart: bool) -> dict[str, Tensor]:
    """Class and example of all that features are of, where they are known."""
    shape = features.shape[:-1]
    if index is not None and (index.is_floating_point() or index.shape != shape[:1]):
        raise ValueError(
            f"index is an integer for each of the {shape[0]} examples, got {index.dtype} of shape {tuple(index.shape)}"
        )
    classes = where.labels if where.labels is None or not apart or where.labels.ndim == 1 else None
    known = {"labels": classes, "index": index}
    return {
        name: x.reshape(*x.shape, *[1] * (len(shape) - x.ndim)).expand(shape)
        for name, x in known.items()
        if x is not None
    }


def _distances(distance: Distance, student: Tensor, teacher: Tensor, told: Mapping[str, Tensor | None]) -> Tensor:
    """One value per position; a map's rows of pixels are one list of them to the distance."""
    shape = student.shape[:-1]
    told = {name: x for name, x in told.items() if takes(distance, name)}
    if student.ndim == 4:
        student, teacher = student.flatten(1, 2), teacher.flatten(1, 2)
        told = {name: None if x is None else x.flatten(1, 2) for name, x in told.items()}
    return distance(student, teacher, **told).view(shape)


def _same_width(name: str, distance: Distance, student: Tensor, teacher: Tensor) -> None:
    s, t = student.shape[-1], teacher.shape[-1]
    if s != t and not needs_no_width(distance):
        raise ValueError(
            f"{name}: the student's features have width {s} and the teacher's {t}, and there is no "
            "projection between them. Before building the optimizer write distill.prepare(student), for "
            "named modules and models without a Hugging Face configuration distill.prepare(student, **batch), of a "
            f"kdloss.Distillation model.prepare(**batch), or FeatureKD(..., widths=({s}, {t}), depths=...)"
        )


def _hidden(output: Any, blocks: str | None) -> Sequence[Tensor] | None:
    """Hugging Face's hidden states: the embedding, then the output of every block."""
    if isinstance(output, Captured):
        return None
    own: Sequence[Tensor] | None = getattr(output, "hidden_states", None)
    stack = "encoder" if blocks is not None and "encoder" in blocks else "decoder"
    return own if own is not None else getattr(output, f"{stack}_hidden_states", None)


def _feature(output: Any, hidden: Sequence[Tensor] | None, name: Layer, whose: str) -> Tensor:
    if isinstance(name, tuple):
        side_by_side = [_feature(output, hidden, part, whose) for part in name]
        return torch.cat(side_by_side, 1 if side_by_side[0].ndim == 4 else -1)
    if isinstance(output, Captured):
        captured: Tensor = output[name]
        return captured
    if hidden is None:
        raise TypeError(
            f"the {whose}'s features are needed: call kdloss.Distiller, pass what kdloss.capture "
            "recorded, or a Hugging Face output made with output_hidden_states=True; got "
            f"{type(output).__name__}"
        )
    if not isinstance(name, int):
        raise TypeError(f"hidden_states are in order of blocks, they don't know {name!r}; capture it")
    return hidden[name + 1]


def _width_last(features: Tensor) -> Tensor:
    return rearrange(features, "b c h w -> b h w c") if features.ndim == 4 else features


def _last_against_last(pairs: Pairs, depths: tuple[int, int]) -> None:
    """Hugging Face's last hidden state comes after the final norm, the others before it."""
    for s, t, _ in pairs:
        if (s == depths[0] - 1) != (t == depths[1] - 1):
            raise ValueError(
                f"pair {(s, t)} of {depths} blocks holds a last block against another: in hidden_states "
                "the last entry has passed the model's final norm, the others have not. "
                "Call kdloss.Distiller, which captures the blocks themselves"
            )


def first_feature(output: Any, reads: Reads) -> Tensor | None:
    """One of the student's features, which tells the positions where nothing else does."""
    hidden = _hidden(output, reads.blocks)
    if hidden is not None:
        return hidden[1]
    return next(iter(output.values()), None) if isinstance(output, Captured) else None


def sizes(seen: Captured) -> list[tuple[int, int]]:
    """Height and width of the maps that blocks gave."""
    flat = {name: tuple(features.shape) for name, features in seen.items() if features.ndim != 4}
    if flat:
        raise ValueError(
            "pairing='resolution' goes by maps [B, C, H, W], but there are blocks that give "
            f"{next(iter(flat.values()))}; write pairing='uniform'"
        )
    return [(features.shape[2], features.shape[3]) for features in seen.values()]


def width_of(seen: Captured, name: Layer) -> int:
    """The width of a layer's features, of several side by side their sum."""
    return sum(x.shape[1] if x.ndim == 4 else x.shape[-1] for x in map(seen.__getitem__, parts([name])))


def refuse_take(output: Any, take: Any, reads: Reads, whose: str) -> None:
    """`take` says what counts of a module's output; hidden states are features already."""
    if take is not None and _hidden(output, reads.blocks) is not None:
        raise TypeError(
            f"take={take!r} takes a part of what a module of the {whose} returned, and hidden_states are no modules' "
            "outputs: call kdloss.Distiller or kdloss.Distillation, which capture the modules, or leave it out"
        )
