"""Which of a layer's features count, where they stand elsewhere than the labels."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Size, Tensor

from kdloss.layers.layer_map import Layer

# A function of a layer and the shape of its features' positions. It returns their mask (None: all count), and whether
# they stand elsewhere than the labels although there are as many.
FeatureMask = Callable[[Layer, Size], tuple[Tensor | None, bool]]


def given_to(name: str, given: Any) -> Any:
    """The entry of `feature_mask` for one term.

    Raises: TypeError if it is not a tensor.
    """
    own = given.get(name) if isinstance(given, Mapping) else given
    if not (own is None or isinstance(own, Tensor) or callable(own)):
        raise TypeError(
            f"feature_mask is a boolean tensor (True = keep), or a dict of these by the names of the terms, got a "
            f"{type(own).__name__}; write torch.tensor(mask), or {{{name!r}: mask}}"
        )
    return own


def of_term(name: str, given: Any) -> FeatureMask:
    """The term's feature mask, as a function."""
    own = given_to(name, given)
    if callable(own):
        found: FeatureMask = own
        return found
    return lambda layer, shape: (own, own is not None)


def check_given(given: Any, terms: Mapping[str, Any]) -> None:
    """Raise for a `feature_mask` that no term can read."""
    unknown = [name for name in given if name not in terms] if isinstance(given, Mapping) else []
    if unknown:
        raise ValueError(f"feature_mask has {unknown}, and the terms are {list(terms)}; give it by the terms' names")
    for name in terms:
        given_to(name, given)
    if isinstance(given, Tensor) and all(term.reads().pairs == () for term in terms.values()):
        raise ValueError(
            f"feature_mask {tuple(given.shape)} is a mask of features, and none of the terms {list(terms)} reads any; "
            "write mask=..., at the positions of labels and logits"
        )
