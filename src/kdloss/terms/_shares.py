"""Weights of terms at each position, computed from the teachers' predictions."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kdloss.engine.block_sizes import block_rows, equal_blocks
from kdloss.reduction import on_cpu, precise
from kdloss.targets import LazyLogits
from kdloss.targets.kinds import at, dense
from kdloss.terms._positions import Positions
from kdloss.terms.reads import Reads
from kdloss.weighting import Weighting


class Shares:
    """Scores each teacher when it has run, and then gives each term its share from its weighting."""

    def __init__(self, weightings: Mapping[str, Weighting], teachers: Mapping[str, tuple[int, ...]]) -> None:
        self.weightings, self.teacher = weightings, {name: teachers[name][0] for name in weightings}
        self._scores: dict[tuple[Weighting, int], Tensor] = {}
        self._shares: dict[tuple[Weighting, int], Tensor] = {}
        self.where: Positions | None = None

    def taught(self, k: int, logits: Any, rename: Any, where: Positions) -> None:
        """Score teacher k's logits at the positions that count; `rename` turns labels into the teacher's ids."""
        self.where = where
        for weighting in {w for name, w in self.weightings.items() if self.teacher[name] == k}:
            self._scores[weighting, k] = _score(weighting, logits, rename, where)

    def of(self, name: str) -> Tensor:
        """A term's share at every position."""
        weighting, teacher = self.weightings[name], self.teacher[name]
        if (weighting, teacher) not in self._shares:
            several = sorted(k for w, k in self._scores if w is weighting)
            scores = torch.stack([self._scores[weighting, k] for k in several])
            assert self.where is not None
            shares = _checked(weighting, weighting.shares(scores, self.where.keep), scores)
            self._shares |= {(weighting, k): share for k, share in zip(several, shares, strict=True)}
        return self._shares[weighting, teacher]

    def beside(self, name: str, values: Tensor, where: Positions) -> Tensor:
        """The share in the shape of a term's values; for values at other positions its mean per example, or overall."""
        share = self.of(name)
        if values.shape == share.shape:
            return share
        counted = self.where
        assert counted is not None
        keep = torch.ones_like(share) if counted.keep is None else counted.keep.to(share.dtype)
        axes = range(1 if values.shape[:1] == share.shape[:1] and values.ndim == 1 else 0, share.ndim)
        return (share * keep).sum(tuple(axes)) / keep.sum(tuple(axes)).clamp_min(1)


def weighed(reads: Reads, weighting: Weighting) -> Reads:
    """What a term with a weighting reads: also its teacher's logits."""
    logits: Any = "any" if reads.logits == "none" else reads.logits
    return replace(reads, teacher_output=True, logits=logits, labels=reads.labels or weighting.labels)


def _score(weighting: Weighting, logits: Any, rename: Any, where: Positions) -> Tensor:
    """A score at each position, 0 where the position doesn't count."""
    if not isinstance(logits, (Tensor, LazyLogits)):
        raise TypeError(
            f"{weighting} needs one teacher's logits of all classes, and {type(logits).__name__} holds a few or an "
            "average; give weights as numbers, 0.5 * kdloss.Logits(teacher=0) + ..."
        )
    if logits.shape[:-1] != where.shape:
        raise ValueError(
            f"{weighting} scores a teacher's logits {tuple(logits.shape)} at the positions of labels or mask, "
            f"{tuple(where.shape)}; they have to be the same positions"
        )
    if where.labels is None and weighting.labels:
        raise ValueError(
            f"{weighting} compares teachers by labels that are classes, and there are none (soft labels have no single "
            "class): pass class indices as labels=..."
        )
    if torch.compiler.is_compiling():  # numbers are unknown: score all positions at once, zeros where none counts
        z = precise(dense(where.take(logits))).detach().flatten(0, -2)
        y = z.new_zeros(len(z)).long() if where.labels is None else where.labels.reshape(-1)
        return where.fill(weighting.score(z, y if rename is None else rename(y)).reshape(where.shifted))
    places, index = where.counted(logits.device)
    labels = where.labels
    if labels is not None:
        labels = labels.reshape(-1) if places is None else labels.take(places)
        labels = labels if rename is None else rename(labels)
    count, flat = where.numel if places is None else len(places), len(logits.shape) - 1
    found = []
    with torch.no_grad():
        for start, stop in equal_blocks(count, block_rows(logits.device, 8 * logits.shape[-1])):
            block = slice(start, stop)

            def rows(t: Tensor, block: slice = block) -> Tensor:
                t = t.flatten(0, flat - 1)
                return t[block] if index is None else t[index[block]]

            z = precise(dense(at(logits, rows)))
            found.append(weighting.score(z, z.new_zeros(len(z)).long() if labels is None else labels[block]))
        scores = torch.cat(found) if found else torch.zeros(0, device=logits.device)
    if scores.shape != (count,):
        raise ValueError(
            f"{weighting} returned scores of shape {tuple(scores.shape)} for {count} positions; return one for each"
        )
    return where.back(scores, places)


def _checked(weighting: Weighting, shares: Tensor, scores: Tensor) -> Tensor:
    if shares.shape != scores.shape:
        raise ValueError(
            f"{weighting} returned shares of shape {tuple(shares.shape)} for scores {tuple(scores.shape)}; return one "
            "for each"
        )
    shares = shares.detach()
    if on_cpu(shares.device) and not torch.compiler.is_compiling():
        wrong = (shares < 0).any() | ((shares.sum(0) - 1).abs() > 1e-4).any()
        if bool(wrong):
            raise ValueError(
                f"{weighting} returned shares from {shares.min().item():.4g} to {shares.max().item():.4g} with sums "
                f"from {shares.sum(0).min().item():.4g} to {shares.sum(0).max().item():.4g}; the shares of all "
                "teachers must be non-negative and add up to 1"
            )
    return shares
