"""The trained modules of `Features`: projections, and distances with parameters."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from kdloss import _checks
from kdloss.distances._rows import needs_no_width
from kdloss.layers.layer_map import Layer
from kdloss.projections import linear

Projection = Callable[[int, int], nn.Module]
Side = Literal["student", "teacher"]
_NOTHING = nn.Identity()


@dataclass
class Trained:
    """Makes and holds projections and distances, by the name of the student's layer."""

    projection: Projection | None
    side: Side
    shared: bool
    distance: Any
    projections: nn.ModuleDict
    distances: nn.ModuleDict
    widths: dict[str, tuple[int, int]] = field(default_factory=dict)
    built: dict[str, tuple[int, int]] = field(default_factory=dict)
    configured: dict[str, tuple[int, int]] = field(default_factory=dict)
    known: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        _checks.choice("project", self.side, ("student", "teacher"))
        if isinstance(self.projection, nn.Module):
            raise TypeError(
                f"projection is a function of (student width, teacher width), got {self.projection}; write "
                "projection=lambda student, teacher: module, or one of kdloss.projections: linear, mlp, conv1x1"
            )
        if self.projection is not None:
            _checks.function("projection", self.projection, "projections.linear")

    @property
    def needed(self) -> bool:
        """Whether something has to be built even for equal widths."""
        return self.projection is not None or _is_class(self.distance)

    def configure(self, widths: Mapping[Layer, tuple[int, int]]) -> None:
        """Build for the widths in the models' configurations; widths that were given or measured take precedence."""
        for name, both in widths.items():
            self._refuse_other(name, self.configured.get(key(name)), both)
        for name, both in widths.items():
            if self.configured.get(key(name)) not in (None, both):
                self.known.discard(key(name))
            self.configured[key(name)] = both
        self._build({name: both for name, both in widths.items() if key(name) not in self.known})

    def build(self, widths: Mapping[Layer, tuple[int, int]]) -> None:
        """Build for student layers of these (student, teacher) widths; modules that fit keep what they learned.

        A module for other widths may have been trained, and may be in an optimizer: it is replaced only if its widths
        came from a configuration.
        """
        for name, both in widths.items():
            self._refuse_other(name, self.widths.get(key(name)) if key(name) in self.known else None, both)
        self._build(widths)
        self.known |= {key(name) for name in widths}

    def _refuse_other(self, name: Layer, before: tuple[int, int] | None, both: tuple[int, int]) -> None:
        there = self._place(name) in self.projections or key(name) in self.distances
        if there and before not in (None, both):
            raise ValueError(
                f"student layer {name!r} has a projection or distance of widths {before} (student, teacher), and now "
                f"come {both}: building it again would lose what it learned, and the optimizer would keep the old one. "
                "Write a criterion for each student and teacher: kdloss.Distiller(teacher, kdloss.FeatureKD(...))"
            )

    def _build(self, widths: Mapping[Layer, tuple[int, int]]) -> None:
        if self.shared and len(set(widths.values())) > 1:
            raise ValueError(
                f"shared=True makes one projection for all pairs, but they have widths {dict(widths)}; "
                "leave it out, or select layers of one width"
            )
        with _trainable():
            for name, both in widths.items():
                if self.widths.get(key(name)) == both:
                    continue
                self.widths[key(name)] = both
                arriving = self._project(self._place(name), *both)
                if _is_class(self.distance):
                    self.distances[key(name)] = self.distance(*arriving)

    def of(self, name: Layer) -> tuple[tuple[nn.Module, nn.Module], Any]:
        """The projections of the student's and the teacher's features, and the distance, for a student layer."""
        place, nothing = self._place(name), _NOTHING
        projection = dict(self.projections.items()).get(place, nothing)
        if self.needed and key(name) not in self.widths:
            raise ValueError(
                f"student layer {name!r} needs a projection or distance that has not been built. Before "
                "building the optimizer write model.prepare(**batch) with a kdloss.Distillation, "
                "distill.prepare(student, **batch) with a kdloss.Distiller, or "
                "give the term widths=(student, teacher) and depths=(student_blocks, teacher_blocks)"
            )
        distance = self.distances[key(name)] if _is_class(self.distance) else self.distance
        return (projection, nothing) if self.side == "student" else (nothing, projection), distance

    def _project(self, place: str, student: int, teacher: int) -> tuple[int, int]:
        """Build the projection, if one is needed, and return the widths after it."""
        make, arriving = self.projection, (student, teacher)
        if make is None and student != teacher and not needs_no_width(self.distance):
            make = linear if self.side == "student" else partial(linear, orthogonal=True)
        if make is None:
            self.built.pop(place, None)
            self.projections.pop(place) if place in self.projections else None
            return arriving
        if self.built.get(place) != (student, teacher):
            module = make(student, teacher) if self.side == "student" else make(teacher, student)
            # If a projection of the teacher were trained, both sides could learn to be zero.
            self.projections[place] = module.requires_grad_(False) if self.side == "teacher" else module
            self.built[place] = student, teacher
        return (teacher, teacher) if self.side == "student" else (student, student)

    def _place(self, name: Layer) -> str:
        return "shared" if self.shared else key(name)


def _trainable() -> AbstractContextManager[Any]:
    """Turn inference mode off, since parameters made in it can't be trained."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


def key(name: Layer) -> str:
    """A layer's name as the name of a submodule, which can't have dots."""
    return "+".join(map(key, name)) if isinstance(name, tuple) else str(name).replace(".", "/")


def _is_class(distance: Any) -> bool:
    while isinstance(distance, partial):
        distance = distance.func
    return isinstance(distance, type) and issubclass(distance, nn.Module)
