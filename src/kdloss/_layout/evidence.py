"""Evidence from modules about the axes of their outputs."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import Size, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from kdloss.layers.names import unwrap

FIRST, LAST = 1, -1  # the axis of the width: right after the batch, or the last one
_KEEP = tuple(f"torch.nn.modules.{name}" for name in ("activation", "dropout", "pooling"))


@dataclass(frozen=True)
class Evidence:
    """What a module shows about the axes of its output; None where it shows nothing.

    - `width`: the number of channels of its output; `axis`: the axis of the channels, FIRST or LAST.
    - `batch`: the axis of the examples.
    - `sure`: the module itself defines them. Otherwise they are those of its last layers, and the module may permute
      axes after these.
    - `conflicting`: its layers disagree about the axis, so `axis` isn't known.
    - `maps`: the axis of the channels of maps in its model, as timm's models state in `output_fmt`.
    - `axes`: the number of axes of its output, where the module defines it.
    """

    width: int | None = None
    axis: int | None = None
    batch: int | None = None
    sure: bool = False
    conflicting: bool = False
    maps: int | None = None
    axes: int | None = None

    def of_part(self) -> "Evidence":
        """What also holds for one of several tensors that a module returns."""
        return replace(self, width=None, batch=None, sure=False)


NOTHING = Evidence()
_RMS: Any = getattr(nn, "RMSNorm", nn.LayerNorm)
_Structure = list[ref[nn.Module]]  # each module with others inside it, followed by these
_Read = dict[ref[nn.Module], tuple[Evidence, bool]]


class Evident:
    """`evidence_of` with a memory for each model, which lasts until one of its modules is replaced, added or moved.

    A module whose width is no longer in its output, as after pruning, is read anew, too.
    """

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[nn.Module, tuple[_Structure, _Read]] = WeakKeyDictionary()

    def meet(self, model: nn.Module, modules: Iterable[nn.Module]) -> None:
        """Call before `of` in every step; `modules` are all modules of the model, in the same order in every step."""
        structure = [ref(x) for m in modules if m._modules for x in (m, *m._modules.values()) if x is not None]
        if model not in self._known or self._known[model][0] != structure:
            self._known[model] = structure, {}

    def of(self, module: nn.Module, model: nn.Module, shape: Size) -> Evidence:
        """The evidence from a module of `model` whose output has this shape."""
        _, read = self._known[model]
        known, fitted = read.get(ref(module), (None, False))
        if known is None or (fitted and not _fits(known, shape)):
            known = evidence_of(module, unwrap(model))
            read[ref(module)] = known, _fits(known, shape)
        return known


def evidence_of(module: nn.Module, model: nn.Module | None = None) -> Evidence:
    """The evidence from a module. If it says nothing about its axes, its model may.

    >>> evidence_of(nn.Conv1d(3, 8, 1)).axis, evidence_of(nn.LSTM(3, 8)).batch
    (1, 1)
    """
    found = _of(module)
    found = _beside(module, model) if found == Evidence() and model is not None else found
    found = replace(found, maps=_format(module))
    return found if found.axis is not None or found.maps is not None else replace(found, maps=_format(model))


def ends(model: nn.Module) -> Evidence:
    """The evidence from the last layer of a model, which makes the logits if it is a head; sure if nothing follows it.

    >>> ends(nn.Sequential(nn.Conv1d(3, 8, 1), nn.ReLU())).width
    8
    """
    own = _own(model)
    if own is not None:
        return own
    follows = not _in_sequence(model)
    for child in reversed(_inside(model)):
        found = ends(child)
        if found != NOTHING:
            return replace(found, sure=False) if found.sure and follows else found
        follows = follows or not _keeps_axes(child)
    return NOTHING


def _inside(module: nn.Module) -> list[nn.Module]:
    """The children of a module, in order; a child that is used twice is there twice, unlike in `children()`."""
    return [child for child in module._modules.values() if child is not None]


def _fits(evidence: Evidence, shape: Size) -> bool:
    return evidence.width in (*shape[1:2], *shape[-1:])


def _of(module: nn.Module) -> Evidence:
    own = _own(module)
    if own is not None:
        return own
    if _in_sequence(module):  # its output is that of its last module
        last = next((m for m in reversed(_inside(module)) if not _keeps_axes(m)), None)
        if last is not None and (found := _of(last)).sure:
            return found
    layers = list(_layers(module))
    widths = [e.width for e in layers if e.width is not None]
    axes = {e.axis for e in layers if e.axis is not None}
    batches = {e.batch for e in layers if e.batch is not None}
    return Evidence(
        widths[-1] if widths else None,
        axes.pop() if len(axes) == 1 else None,
        batches.pop() if len(batches) == 1 else None,
        conflicting=len(axes) > 1,
    )


def _beside(module: nn.Module, model: nn.Module) -> Evidence:
    """For a module without weights, like an activation: the evidence from the module before it."""
    for parent in model.modules():
        children = _inside(parent)
        if any(child is module for child in children):
            place = next(i for i, child in enumerate(children) if child is module)
            before = (_of(child) for child in reversed(children[:place]))
            found = next((e for e in before if e != Evidence()), Evidence())
            return replace(found, axis=found.axis if _keeps_axes(module) else None, batch=None, sure=False)
    return Evidence()


def _layers(module: nn.Module) -> Iterator[Evidence]:
    """The evidence from the innermost layers, in the order of the modules."""
    for child in _inside(module):
        own = _own(child)
        if own is not None:
            yield own
        else:
            yield from _layers(child)


def _own(module: Any) -> Evidence | None:
    """The evidence that follows from the definition of a PyTorch layer; None for other modules."""
    width: Any
    axis, batch, axes = LAST, None, None
    if isinstance(module, _ConvNd):
        width, axis, axes = module.out_channels, FIRST, len(module.kernel_size) + 2
    elif isinstance(module, _NormBase):
        width, axis = module.num_features, FIRST
    elif isinstance(module, nn.GroupNorm):
        width, axis = module.num_channels, FIRST
    elif isinstance(module, (nn.LayerNorm, _RMS)):
        if len(module.normalized_shape) != 1:
            return None
        theirs = type(module).forward in (nn.LayerNorm.forward, _RMS.forward)  # timm's LayerNorm2d has its own
        return Evidence(module.normalized_shape[0], LAST if theirs else None, sure=theirs)
    elif isinstance(module, nn.MultiheadAttention):
        width, batch = module.embed_dim, 0 if module.batch_first else 1
    elif isinstance(module, nn.RNNBase):
        width = (module.proj_size or module.hidden_size) * (1 + module.bidirectional)
        batch = 0 if module.batch_first else 1
    elif isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        return _own(module.self_attn)
    elif isinstance(module, (nn.TransformerEncoder, nn.TransformerDecoder)):
        return _own(module.layers[0])
    elif isinstance(module, nn.Embedding):
        width = module.embedding_dim
    else:
        width = getattr(module, "out_features", None) if isinstance(module, nn.Linear) else _of_gpt2(module)
    known = isinstance(width, int) and width > 0
    return Evidence(width, axis, batch, sure=True, axes=axes) if known else None


def _of_gpt2(module: Any) -> Any:
    """The width of transformers' `Conv1D`, which is a linear layer."""
    return getattr(module, "nf", None) if type(module).__name__ == "Conv1D" else None


def _in_sequence(module: nn.Module) -> bool:
    """Whether a module's output is that of the last of its children."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _keeps_axes(module: nn.Module) -> bool:
    plain = type(module).__module__ in _KEEP and not isinstance(module, nn.MultiheadAttention)
    return plain or isinstance(module, nn.Identity)


def _format(module: nn.Module | None) -> int | None:
    said: Any = getattr(module, "output_fmt", None)
    return {"NHWC": LAST, "NCHW": FIRST}.get(str(getattr(said, "value", said)))
