"""`kdloss.Distilled`: the result of one step."""

from typing import Any

from torch import Tensor
from torch.utils._pytree import MappingKey, register_pytree_node

from kdloss.targets.kinds import dense
from kdloss.terms._outputs import find_logits, logits_of


class Distilled(dict[str, Any]):
    """The result of one step: `loss`, `logits`, `components` for logging, and `output`, what the student returned.

    Each is an attribute and a key. If the full logits were never made, `output.logits` is a `LazyLogits`, and `logits`
    computes them each time you read it; `items()` leaves them lazy.
    """

    @classmethod
    def of(cls, loss: Tensor | None, output: Any, components: dict[str, Tensor]) -> "Distilled":
        """The result of a step whose student returned `output`."""
        return cls(loss=loss, logits=find_logits(output), components=components, output=output)

    def __getitem__(self, key: str) -> Any:
        if key == "logits":
            lazy = super().__getitem__(key)
            return dense(logits_of(self.output, "student") if lazy is None else lazy)
        return super().__getitem__(key)

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"a step has {list(self)}, not {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __reduce__(self) -> Any:
        return type(self), (dict(self.items()),)


def _flatten(step: Distilled) -> tuple[list[Any], list[str]]:
    return list(step.values()), list(step)


def _flatten_with_keys(step: Distilled) -> tuple[list[Any], list[str]]:
    return [(MappingKey(name), value) for name, value in step.items()], list(step)


def _unflatten(values: Any, keys: list[str]) -> Distilled:
    return Distilled(zip(keys, values, strict=True))


# FSDP and torch.compile look for tensors in what a module returns.
register_pytree_node(
    Distilled,
    _flatten,
    _unflatten,
    serialized_type_name="kdloss.Distilled",
    flatten_with_keys_fn=_flatten_with_keys,
)
