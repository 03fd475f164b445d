"""What a model tells of itself before it runs: its size, family, blocks, width and classes."""

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
    """What is known of a model; of one that only its size is known of, nothing else.

    `kinds` are the classes of the model and of its blocks, `tokens` whether it predicts tokens, `maps` whether its
    blocks convolve.
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
    """Of a model, or of a number of parameters.

    Raises: TypeError for anything else; ValueError for a size that is none.
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
    parts = [module for block in blocks for module in block.modules()]
    return Facts(
        size,
        getattr(config, "model_type", None) or None,
        (_own(inner), _own(*blocks)),
        len(blocks) or None,
        width(model),
        classes or next((n for n in said if isinstance(n, int)), None),
        tokens=head is not None,
        maps=width(model) is None and any(isinstance(part, nn.Conv2d) for part in parts),
        kept=None if kept is None else tuple(kept),
    )


@dataclass(frozen=True)
class Pair:
    """What is known of a student and its teacher."""

    student: Facts
    teacher: Facts

    @property
    def smaller(self) -> float:
        """How many times smaller the student is."""
        return self.teacher.parameters / self.student.parameters

    @property
    def text(self) -> bool:
        """Whether both predict tokens, as far as they are known."""
        return all(one.tokens or not one.built for one in (self.student, self.teacher))

    @property
    def found(self) -> bool:
        """Whether both have blocks to compare, as far as they are known."""
        return all(one.depth is not None or not one.built for one in (self.student, self.teacher))

    @property
    def kept(self) -> bool:
        """Whether the student was made of this teacher's blocks, as far as their numbers tell."""
        kept = self.student.kept
        return kept is not None and len(kept) == self.student.depth and max(kept) < (self.teacher.depth or 0)

    @property
    def alike(self) -> bool | None:
        """Whether both are of one family; None where nothing tells.

        Families go by `config.model_type`, where one name may hold the other (bert, distilbert); without it by the
        class of the model or of its blocks.
        """
        ours, theirs = self.student.family, self.teacher.family
        if ours and theirs:
            return ours in theirs or theirs in ours
        kinds = list(zip(self.student.kinds, self.teacher.kinds, strict=True))
        if any(a & b for a, b in kinds):
            return True
        return False if any(a and b for a, b in kinds) else None


def _blocks(model: nn.Module) -> tuple[list[nn.Module], list[int] | None]:
    """A model's blocks, and those of another that they were; none where there are several lists to choose from."""
    if any(isinstance(module, ScriptModule) for module in model.modules()):  # whose parts can't be captured
        return [], None
    try:
        return list(map(unwrapped_block, find_blocks(model))), kept_blocks(model)
    except ValueError:
        return [], None


def parameters(model: nn.Module) -> int:
    """The weights of a model: tied ones once, all experts, and quantised ones as many as they stand for."""
    packed = list(_packed(model))
    inside = {id(p) for module in packed for p in module.parameters() if not p.is_floating_point()}
    plain = sum(p.numel() for p in model.parameters() if id(p) not in inside)
    return plain + sum(int(module.in_features * module.out_features) for module in packed)


def _packed(model: nn.Module) -> Iterator[Any]:
    """Linear layers whose weight is no matrix of floating numbers: several to a byte, or a buffer."""
    for module in model.modules():
        sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
        matrices = (p for p in module.parameters() if p.is_floating_point() and p.ndim > 1)
        if all(isinstance(n, int) for n in sizes) and next(matrices, None) is None:
            yield module


def _own(*modules: nn.Module) -> frozenset[type]:
    """Classes but those of torch's own containers and layers, which are everybody's."""
    return frozenset(kind for kind in map(type, modules) if not kind.__module__.startswith("torch."))
