"""What is known about a model before it runs: its size, family, blocks, width and classes."""

from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Real
from typing import Any

from torch import nn
from torch.jit import ScriptModule

from kdloss import _checks
from kdloss.layers import find_blocks
from kdloss.layers.blocks import kept_blocks, width
from kdloss.layers.names import attribute, unwrap, unwrapped_block


@dataclass(frozen=True)
class Facts:
    """What is known about a model. If only a size was given, `parameters` is set and `built` is False.

    `kinds` are the Python classes of the model and of its blocks. `tokens`: it predicts tokens. `maps`: its blocks
    contain convolutions.
    """

    parameters: float
    family: str | None = None
    kinds: tuple[frozenset[type], frozenset[type]] = (frozenset(), frozenset())
    depth: int | None = None
    width: int | None = None
    classes: int | None = None
    tokens: bool = False
    maps: bool = False
    kept: tuple[int, ...] | None = None
    built: bool = True


def facts(whose: str, model: object) -> Facts:
    """The facts about a model, or about a number of parameters.

    Raises: TypeError for anything else; ValueError for a size that is not positive.
    """
    if not isinstance(model, nn.Module):
        if isinstance(model, bool) or not isinstance(model, Real):
            raise TypeError(
                f"{whose} is a model or its number of parameters, got {type(model).__name__}; of a kdloss.Teacher "
                "give its .module"
            )
        return Facts(_checks.positive(f"the {whose}'s number of parameters", model), built=False)
    inner = unwrap(model)
    if not (size := parameters(inner)):
        raise ValueError(f"the {whose}, {type(inner).__name__}, has no parameters; give their number in its place")
    config: Any = attribute(inner, "config")
    blocks, kept = _blocks(inner)
    head: Any = attribute(inner, "get_output_embeddings")
    head = head() if callable(head) else None
    classes = attribute(head, "out_features") if isinstance(head, nn.Module) else None
    said = (attribute(inner, name) for name in ("num_labels", "num_classes"))
    inside = [module for block in blocks for module in block.modules()]
    return Facts(
        size,
        getattr(config, "model_type", None) or None,
        (_own(inner), _own(*blocks)),
        len(blocks) or None,
        width(model),
        classes or next((n for n in said if isinstance(n, int)), None),
        tokens=head is not None,
        maps=width(model) is None and any(isinstance(module, nn.Conv2d) for module in inside),
        kept=None if kept is None else tuple(kept),
    )


@dataclass(frozen=True)
class Pair:
    """What is known about a student and its teacher."""

    student: Facts
    teacher: Facts

    @property
    def smaller(self) -> float:
        """How many times smaller the student is."""
        return self.teacher.parameters / self.student.parameters

    @property
    def text(self) -> bool:
        """Whether both predict tokens; a model that is only a size counts as one that does."""
        return all(one.tokens or not one.built for one in (self.student, self.teacher))

    @property
    def found(self) -> bool:
        """Whether both have blocks to compare; a model that is only a size counts as one that does."""
        return all(one.depth is not None or not one.built for one in (self.student, self.teacher))

    @property
    def kept(self) -> bool:
        """Whether the student was made of this teacher's blocks, judged by the numbers of blocks."""
        kept = self.student.kept
        return kept is not None and len(kept) == self.student.depth and max(kept) < (self.teacher.depth or 0)

    @property
    def alike(self) -> bool | None:
        """Whether both are of one family; None if that is unknown.

        They are if one `config.model_type` contains the other (bert, distilbert); without it, if the models or their
        blocks are of the same class.
        """
        ours, theirs = self.student.family, self.teacher.family
        if ours and theirs:
            return ours in theirs or theirs in ours
        kinds = list(zip(self.student.kinds, self.teacher.kinds, strict=True))
        if any(a & b for a, b in kinds):
            return True
        return False if any(a and b for a, b in kinds) else None


def _blocks(model: nn.Module) -> tuple[list[nn.Module], list[int] | None]:
    """A model's blocks, and the teacher's blocks they were made from; empty if several lists could be meant."""
    if any(isinstance(module, ScriptModule) for module in model.modules()):  # whose modules can't be captured
        return [], None
    try:
        return list(map(unwrapped_block, find_blocks(model))), kept_blocks(model)
    except ValueError:
        return [], None


def parameters(model: nn.Module) -> int:
    """Count a model's parameters: tied ones once, all experts, quantised ones as many as they represent."""
    packed = list(_packed(model))
    inside = {id(p) for module in packed for p in module.parameters() if not p.is_floating_point()}
    plain = sum(p.numel() for p in model.parameters() if id(p) not in inside)
    return plain + sum(int(module.in_features * module.out_features) for module in packed)


def _packed(model: nn.Module) -> Iterator[Any]:
    """Linear layers whose weight is not a floating-point matrix: quantised, packed into bytes, or a buffer."""
    for module in model.modules():
        sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
        matrices = (p for p in module.parameters() if p.is_floating_point() and p.ndim > 1)
        if all(isinstance(n, int) for n in sizes) and next(matrices, None) is None:
            yield module


def _own(*modules: nn.Module) -> frozenset[type]:
    """The classes of modules, without those of torch itself, which all models share."""
    return frozenset(kind for kind in map(type, modules) if not kind.__module__.startswith("torch."))
