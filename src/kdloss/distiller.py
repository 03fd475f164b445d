"""Teachers and a criterion, called with the student and its batch."""

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int64
from torch import Tensor, nn

from kdloss._capture import Captured, capture
from kdloss.adapter import evaluating, is_causal, masks, resharded, with_decoder_inputs, without_cache
from kdloss.criteria import FeatureKD, MultiTeacherKD, VanillaKD
from kdloss.criteria._terms import find_logits, logits_of
from kdloss.engine.task import unwrapped
from kdloss.layers import Layer, parts, unwrap
from kdloss.lazy_head import LazyHeads
from kdloss.reduction import takes
from kdloss.targets import TokenMap, dense

_log = logging.getLogger("kdloss")


@dataclass(frozen=True)
class Distilled:
    """One step: the loss to backpropagate, the student's own output, and the terms for logging.

    Where its logits were never made, `output.logits` is a `LazyLogits` and `logits` makes them.
    """

    loss: Tensor
    output: Any
    components: dict[str, Tensor]

    @property
    def logits(self) -> Tensor:
        """The student's logits; each time anew, where the loss did without."""
        return dense(logits_of(self.output, "student"))


class Distiller:
    """Runs student and teachers once each on a batch and returns the criterion's loss.

    The teacher is run in eval mode without gradient and left as it was found; it ends at the
    deepest block needed where its logits are not, and is not run at all where alpha is 1. A
    `Distiller` is no module: nothing of the teacher is in anyone's parameters or state dict.

    Called as `distill(student, *args, labels=..., **inputs)`, with the inputs that both models
    take. `labels` go to the criterion (an encoder-decoder's decoder inputs are made from them), so
    does `num_items_in_batch`, and an `attention_mask` (or `mask`, True = keep) takes positions out
    of every term. Where the criterion's `vocabulary` is a `TokenMap`, the teacher reads its own ids of the
    student's tokens. Returns a `Distilled` with `loss`, `logits`, `components` and `output`.

    Hugging Face's causal models make no logits `[B, T, V]`: hidden states and head go to the criterion as
    `LazyLogits`, with the same loss and gradients. Where that can't be, the logger "kdloss" says why.

    Raises: TypeError for a criterion that doesn't fit the number of teachers; whatever criterion
    and capture raise.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> import kdloss
    >>> shape = dict(n_head=2, vocab_size=9, bos_token_id=0, eos_token_id=0)
    >>> teacher = GPT2LMHeadModel(GPT2Config(n_layer=6, n_embd=16, **shape))
    >>> student = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, **shape))
    >>> distill = kdloss.Distiller(teacher, kdloss.FeatureKD(layers="auto")).prepare(student)
    >>> tokens = torch.tensor([[1, 2, 3, 4]])
    >>> out = distill(student, input_ids=tokens, labels=tokens)
    >>> sorted(out.components)
    ['ce', 'feature', 'feature/0-0', 'feature/1-5']
    """

    def __init__(self, teacher: nn.Module | Sequence[nn.Module], criterion: nn.Module) -> None:
        self.criterion: Any = criterion
        self.teachers = [teacher] if isinstance(teacher, nn.Module) else list(teacher)
        self._as_list = isinstance(criterion, MultiTeacherKD) or not isinstance(teacher, nn.Module)
        ours = isinstance(criterion, VanillaKD | FeatureKD)
        if ours and self._as_list and not isinstance(criterion, MultiTeacherKD):
            raise TypeError(
                f"{type(criterion).__name__} takes one teacher, got a list of {len(self.teachers)}; "
                "write MultiTeacherKD(...), or pass the teacher itself"
            )
        self._prepared_for: Callable[[], nn.Module | None] = lambda: None
        self._heads = LazyHeads()

    def prepare(self, student: nn.Module, *args: Any, **batch: Any) -> "Distiller":
        """Pair the blocks and build the projections; do it before the optimizer.

        With a batch, the widths of the features, and the sizes of maps for pairing="resolution", are
        measured on it; without one widths are read from Hugging Face configurations.
        """
        self._settle(student)
        if isinstance(self.criterion, FeatureKD):
            self.criterion.prepare(student, self.teachers[0])
            if args or batch:
                self._measure(self.criterion, student, args, batch)
        return self

    def __call__(
        self,
        student: nn.Module,
        *args: Any,
        labels: Int64[Tensor, "..."] | None = None,
        mask: Bool[Tensor, "..."] | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **inputs: Any,
    ) -> Distilled:
        """One forward pass of each model, and the loss; see the class."""
        self._settle(student)
        inputs = with_decoder_inputs(student, inputs, labels)
        pairs = self._pairs()
        seen = self._run(student, [s for s, _, _ in pairs], args, inputs)
        target: Any = None
        if pairs or getattr(self.criterion, "uses_teacher_logits", True):
            outputs = [self._teach(teacher, pairs, args, inputs) for teacher in self.teachers]
            target = outputs if self._as_list else outputs[0]
        settings: dict[str, Any] = {"num_items_in_batch": num_items_in_batch}
        settings |= self._masks(student, seen, inputs, labels, mask)
        if pairs:
            settings["pairs"] = pairs
        loss = self.criterion(seen, target, labels, **settings)
        return Distilled(loss, seen.output, getattr(self.criterion, "components", {}))

    def _settle(self, student: nn.Module) -> None:
        """Once per student: find out whether it is causal and where its blocks are."""
        if self._prepared_for() is student:
            return
        if getattr(self.criterion, "causal", False) is None:
            self.criterion.causal = is_causal(student)
            _log.info(
                "causal=%s, as %s is: logits at t are held against label %s",
                self.criterion.causal,
                type(unwrap(student)).__name__,
                "t+1" if self.criterion.causal else "t",
            )
        if isinstance(self.criterion, FeatureKD):
            self.criterion.layer_map.locate(student, self.teachers[0])
        self._prepared_for = weakref.ref(student)

    def _pairs(self) -> list[tuple[Layer, Layer, float]]:
        criterion = self.criterion
        if isinstance(criterion, FeatureKD) and criterion.alpha < 1:
            return criterion.layer_map.pairs()
        return []

    def _run(
        self,
        model: nn.Module,
        names: Sequence[Layer],
        args: tuple[Any, ...],
        inputs: dict[str, Any],
        stop: bool = False,
    ) -> Captured:
        blocks = self.criterion.layer_map.blocks if isinstance(self.criterion, FeatureKD) else None
        take = getattr(self.criterion, "take", None)
        if isinstance(take, Mapping):  # of the names of both models
            take = {name: how for name, how in take.items() if name in parts(names)}
        with (
            capture(model, parts(names), blocks=blocks, stop=stop, take=take) as seen,
            nullcontext() if stop else self._heads.apart(model, self._whole()) as head,
        ):
            seen.output = model(*args, **without_cache(model, inputs))
        if head is None or self._heads.finish(model, head, seen.output):
            return seen
        return self._run(model, names, args, inputs)

    def _whole(self) -> str | None:
        """Why the criterion needs logits as tensors, if it does."""
        if type(self.criterion) not in (VanillaKD, FeatureKD, MultiTeacherKD):
            return f"{type(self.criterion).__name__} may want them"
        divergence = self.criterion.divergence
        if takes(divergence, "mask") or getattr(unwrapped(divergence)[0], "any_vocabulary", False):
            return "its divergence needs all of them at once"
        return None

    def _teach(
        self,
        teacher: nn.Module,
        pairs: Sequence[tuple[Layer, Layer, float]],
        args: tuple[Any, ...],
        inputs: dict[str, Any],
    ) -> Captured:
        stop = not getattr(self.criterion, "uses_teacher_logits", True)
        vocabulary = getattr(self.criterion, "vocabulary", None)
        if isinstance(vocabulary, TokenMap) and "input_ids" in inputs:
            inputs = {**inputs, "input_ids": vocabulary.to_teacher(inputs["input_ids"])}
        with evaluating(teacher), torch.no_grad():
            seen = self._run(teacher, [t for _, t, _ in pairs], args, inputs, stop)
        resharded(teacher)
        return seen

    def _measure(self, criterion: FeatureKD, student: nn.Module, args: tuple[Any, ...], batch: dict[str, Any]) -> None:
        labels = batch.pop("labels", None)
        inputs = with_decoder_inputs(student, batch, labels)
        chosen = criterion.layer_map
        pairs = chosen.candidates() if chosen.by_resolution else chosen.pairs()
        with evaluating(student), torch.no_grad():
            seen = self._run(student, [s for s, _, _ in pairs], args, inputs)
        target = self._teach(self.teachers[0], pairs, args, inputs)
        if chosen.by_resolution:
            chosen.sizes = _sizes(seen), _sizes(target)
            pairs = chosen.pairs()
        criterion.build({(s, t): (_width(seen, s), _width(target, t)) for s, t, _ in pairs})
        criterion.to(next(student.parameters()).device)

    def _masks(
        self,
        student: nn.Module,
        seen: Captured,
        inputs: dict[str, Any],
        labels: Tensor | None,
        mask: Tensor | None,
    ) -> dict[str, Tensor | None]:
        """The criterion's masks, as far as it knows them."""
        logits = find_logits(seen.output)
        positions = labels.shape if labels is not None else None if logits is None else logits.shape[:-1]
        if not isinstance(self.criterion, FeatureKD) or not seen:
            return {"mask": masks(student, inputs, mask, positions, None)[0]}
        of_encoder = "encoder" in (self.criterion.layer_map.blocks or "")
        first = next(iter(seen.values()))
        mask, own = masks(student, inputs, mask, positions, first if of_encoder else None)
        return {"mask": mask, "feature_mask": own}


def _sizes(seen: Captured) -> list[tuple[int, int]]:
    flat = {name: tuple(features.shape) for name, features in seen.items() if features.ndim != 4}
    if flat:
        raise ValueError(
            "pairing='resolution' goes by maps [B, C, H, W], but there are blocks that give "
            f"{next(iter(flat.values()))}; write pairing='uniform'"
        )
    return [(features.shape[2], features.shape[3]) for features in seen.values()]


def _width(seen: Captured, name: Layer) -> int:
    return sum(x.shape[1] if x.ndim == 4 else x.shape[-1] for x in map(seen.__getitem__, parts([name])))
