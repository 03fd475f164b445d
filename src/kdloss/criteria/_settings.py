"""Properties for a recipe's settings, which check an assigned value as the constructor does."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from kdloss import _checks
from kdloss.schedules import Setting
from kdloss.terms._weight import Weight


def checked_alpha(value: Setting) -> Setting:
    """A number between 0 and 1, or a function of the step."""
    return value if callable(value) else _checks.fraction("alpha", value)


def rest(alpha: Setting) -> Setting:
    """1 - alpha."""
    return partial(_rest, alpha) if callable(alpha) else 1 - alpha


def mixing() -> Any:
    """The property `alpha`, the weight of "ce"; other terms have the weight 1 - alpha times their share (`_shares`)."""

    def get(self: Any) -> Setting:
        alpha: Setting = self._alpha
        return alpha

    def assign(self: Any, value: Setting) -> None:
        checked = checked_alpha(value)
        self.weights["ce"], self._alpha = Weight(value), checked
        for name, share in self._shares.items():
            self.weights[name] = Weight(rest(value), share)

    return property(get, assign, doc="The weight of cross-entropy; the rest has the weight 1 - alpha.")


def share_of(name: str, setting: str) -> Any:
    """The property for a term's factor beside 1 - alpha."""

    def get(self: Any) -> float:
        share: float = self._shares[name]
        return share

    def assign(self: Any, value: float) -> None:
        self._shares[name] = _checks.weight(setting, value)
        self.alpha = self.alpha

    return property(get, assign, doc=f"The weight of {name!r} within 1 - alpha.")


def of_term(name: str, setting: str) -> Any:
    """The property for a setting of one term."""

    def get(self: Any) -> Any:
        return getattr(self.terms[name], setting)

    def assign(self: Any, value: Any) -> None:
        setattr(self.terms[name], setting, value)

    return property(get, assign, doc=f"`{setting}` of the term {name!r}.")


def projections_of(name: str) -> Any:
    """The property for a term's projections, by the student's layer."""

    def get(self: Any) -> nn.ModuleDict:
        found: nn.ModuleDict = self.terms[name].projections
        return found

    def assign(self: Any, value: Mapping[str, nn.Module]) -> None:
        own, given = get(self), dict(value.items())
        if set(given) != set(own) or not all(isinstance(module, nn.Module) for module in given.values()):
            raise ValueError(
                f"projections are modules by the student's layer, {sorted(own)}, got {sorted(given)}; prepare makes "
                "them, and projection=... chooses their kind"
            )
        own.update(given)

    return property(get, assign, doc="The trained projections, by the student's layer.")


def _rest(alpha: Any, step: int) -> Any:
    return 1 - alpha(step)
