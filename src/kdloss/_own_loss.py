"""Measure how a model's own loss reads labels: shifted or not, and what it adds to cross-entropy."""

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from kdloss import _checks
from kdloss._decoder_inputs import DecoderInputs
from kdloss._virtual import virtual_tokens
from kdloss.adapter import measuring, takes_input, without_cache
from kdloss.layers.names import unwrap
from kdloss.reduction import on_cpu
from kdloss.terms._outputs import find_logits

IGNORED = -100  # the ignored label of all Hugging Face models
WINDOW = 32  # this many positions are enough to tell, without the logits of a full batch


@dataclass(frozen=True)
class OwnLoss:
    """How a model's own loss reads labels: logits at t against label t+1 (`causal`) or t, plus named losses.

    `causal` is None if the model shows neither. `terms` has the coefficient of each named loss, `seen` the measured
    numbers as text. `of_labels`: the model returns the named losses only if it is given labels.
    """

    causal: bool | None = None
    terms: Mapping[str, float] = field(default_factory=dict)
    seen: str = ""
    of_labels: bool = False

    def __str__(self) -> str:
        return self.seen + "".join(f" + {factor:g} * {name}" for name, factor in self.terms.items())

    def added(self, output: Any) -> dict[str, Tensor]:
        """The losses that the model adds to cross-entropy, each times its coefficient, as far as an output has them."""
        if not self.terms:
            return {}
        named = _named_terms(output)
        return {name: factor * named[name] for name, factor in self.terms.items() if name in named}


@torch.compiler.disable  # type: ignore[untyped-decorator]
def own_loss(
    model: nn.Module, args: tuple[Any, ...], inputs: Mapping[str, Any], labels: Any, ignore_index: int = IGNORED
) -> OwnLoss | None:
    """Compare the loss of one pass with labels, in eval mode and without gradient, with both readings of the labels.

    If no label counts, or there are none, a pattern of the first two classes is used, so that every rank makes the same
    pass whatever its batch holds. None if a batch shows nothing: it is empty, or has one label per example.
    """
    if not takes_input(model, "labels"):
        return OwnLoss()
    ids = inputs.get("input_ids", args[0] if args else None)
    classes_given = isinstance(labels, Tensor) and not labels.is_floating_point()
    # Soft labels have 3 axes; others are one per example.
    if labels is not None and not classes_given and getattr(labels, "ndim", 0) != 3:
        return None
    shown = labels if classes_given else ids
    if not isinstance(shown, Tensor) or shown.is_floating_point() or shown.ndim != 2 or not shown.numel():
        return None
    if shown.is_meta:
        return OwnLoss()
    with measuring(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about labels that aren't for this model
        labels = shown.masked_fill(shown == ignore_index, IGNORED) if classes_given else shown
        if not classes_given or not bool((labels[:, 1:] != IGNORED).any()):
            labels = torch.zeros_like(shown) + torch.arange(shown.shape[1], device=shown.device) % 3 // 2
        labels, few = _window(model, labels)
        try:
            output = model(*args, **without_cache(model, {**inputs, **few, "labels": labels}))
        except (TypeError, ValueError, RuntimeError, IndexError) as error:  # labels that are not for its own loss
            return OwnLoss(seen=f"{type(unwrap(model)).__name__} makes no loss of these labels itself ({error})")
    logits, loss = find_logits(output), _field(output, "loss")
    if not isinstance(logits, Tensor) or logits.ndim != 3 or not isinstance(loss, Tensor) or loss.numel() != 1:
        return OwnLoss()
    if (ahead := logits.shape[1] - labels.shape[1]) and ahead == virtual_tokens(model):
        labels = pad(labels, (ahead, 0), value=IGNORED)  # as peft does
    if (labels.shape[0], labels.shape[1]) != (logits.shape[0], logits.shape[1]):
        return OwnLoss()
    own = _read(model, output, loss.float().item(), logits, labels.to(logits.device))
    if not own.terms:
        return own
    with measuring(model):
        fed = DecoderInputs().of(model, args, inputs, labels)
        output = model(*args, **without_cache(model, {**fed, **few}))
    return replace(own, of_labels=own.added(output).keys() != own.terms.keys())


def _keeps_few(model: nn.Module) -> bool:
    return takes_input(model, "logits_to_keep", by_name=True) and not virtual_tokens(model)


def _window(model: nn.Module, labels: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """The labels of a few positions around the first that counts, and the input that limits the model to them."""
    if not _keeps_few(model) or labels.ndim != 2 or labels.shape[1] <= WINDOW:
        return labels, {}
    first = int((labels[:, 1:] != IGNORED).any(0).nonzero()[0])
    first = min(first, labels.shape[1] - WINDOW)
    index = torch.arange(first, first + WINDOW, device=labels.device)
    return labels[:, index], {"logits_to_keep": index}


def _read(model: nn.Module, output: Any, loss: float, logits: Tensor, labels: Tensor) -> OwnLoss:
    """The reading of the labels, and the coefficients, that reproduce the loss."""
    coarse = logits.dtype in (torch.float16, torch.bfloat16)  # some models compute their loss in these, others don't
    every = [_readings(z, labels) for z in ([logits.float(), logits] if coarse else [logits])]
    named = {name: value.float().item() for name, value in _named_terms(output).items()}
    fits = [
        (_difference(loss, value + sum(factors[name] * named[name] for name in named)), causal, factors)
        for readings in every
        for causal, value in readings.items()
        for factors in _coefficients(model, named)
    ]
    off, causal, factors = min(fits, key=lambda fit: fit[0])
    other = min(fit[0] for fit in fits if fit[1] != causal)
    readings = every[0]
    name, shifted, beside = type(unwrap(model)).__name__, readings[True], readings[False]
    seen = f"{name}'s own loss is {loss:.6g}, cross-entropy {shifted:.6g} with shifted labels, {beside:.6g} without"
    if off > (1e-2 if coarse else 1e-4) or other < max(8 * off, 1e-6):
        return OwnLoss(None, {}, seen)
    return OwnLoss(causal, {key: factor for key, factor in factors.items() if factor}, seen)


def _readings(logits: Tensor, labels: Tensor) -> dict[bool, float]:
    """Cross-entropy with shifted labels (True) and without (False)."""
    return {
        True: cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED).item(),
        False: cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED).item(),
    }


def _difference(x: float, y: float) -> float:
    """The relative difference of two losses; two NaN, means over no positions, are equal."""
    if math.isnan(x) or math.isnan(y):
        return 0.0 if math.isnan(x) and math.isnan(y) else math.inf
    return abs(x - y) / max(abs(x), abs(y), 1e-3)


def _field(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _named_terms(output: Any) -> dict[str, Tensor]:
    """The output's numbers whose names end in "_loss"."""
    fields = output if isinstance(output, Mapping) else {}
    return {
        name: value
        for name, value in fields.items()
        if name.endswith("_loss") and isinstance(value, Tensor) and value.numel() == 1
    }


def _coefficients(model: nn.Module, named: Mapping[str, Any]) -> Iterator[dict[str, float]]:
    """Every choice of coefficients for the named losses: one from the configuration, 1, or 0."""
    found = dict(_numbers(getattr(unwrap(model), "config", None)))
    choices = []
    for name in named:
        word = name.removesuffix("_loss").rpartition("_")[2]  # "aux" of "encoder_aux_loss"
        own = {value for key, value in found.items() if word in key.split("_")} or set(found.values())
        choices.append(sorted({0.0, 1.0, *own}))
    for factors in product(*choices):
        yield dict(zip(named, factors, strict=True))


def _numbers(config: Any) -> Iterator[tuple[str, float]]:
    """The coefficients and weights of losses in a configuration and in the configurations inside it."""
    for key, value in vars(config).items() if config is not None else ():
        if isinstance(value, float) and ("coef" in key or "loss_weight" in key):
            yield key, value
        elif key.endswith("config") and hasattr(value, "__dict__"):
            yield from _numbers(value)


def refuse_unread(own: OwnLoss, model: nn.Module, logits: Any, labels: Any, ignore_index: int) -> None:
    """Raise if labels `[B, T]` stand at logits `[B, T, V]` and nothing tells whether they are shifted.

    Wrong labels are named first: with them a model makes no loss.
    """
    if logits is None or len(logits.shape) != 3 or not isinstance(labels, Tensor) or labels.shape != logits.shape[:2]:
        return
    if not labels.is_floating_point():
        _checks.classes(labels, logits)
        if on_cpu(labels.device):
            _checks.label_range(labels, labels != ignore_index, logits.shape[-1])
    name = type(unwrap(model)).__name__
    raise ValueError(
        f"{own.seen or f'{name} makes no loss of labels [B, T] by itself'}: nothing tells whether its logits at t "
        "learn label t+1 or label t. Write causal=True where labels are the input's own ids, causal=False where "
        "they stand beside their logits. To train with the student's own loss write kdloss.Task() in place of "
        "cross-entropy: kdloss.Sum(0.5 * kdloss.Task(), 0.5 * kdloss.Logits(), causal=...)"
    )
