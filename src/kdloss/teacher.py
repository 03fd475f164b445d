"""`kdloss.Teacher`: a teacher with its own inputs or device."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from kdloss._graphs import refuse_trained
from kdloss._inputs import of_teacher
from kdloss.targets import LazyLogits, TopKLogits
from kdloss.terms import Features


@dataclass(frozen=True, eq=False)
class Teacher:
    """A teacher with inputs of its own, or on a device of its own.

    - `module`: the model, or any function of its inputs if you need only its outputs, not its features (such as a call
      of an ONNX session; numpy arrays become tensors). TorchScript works too, and so does a model from torch.export,
      given as `exported.module()`. A graph made in training mode is refused.
    - `inputs`: a function that makes the teacher's inputs from the batch, such as another tokenizer's ids or another
      normalisation or resolution. It gets the positional inputs, then all keyword inputs as one dict: for
      `model(**batch)` the batch, for `model(x)` x. It returns keyword inputs as a dict, positional inputs as a tuple,
      or a single input. The batch may then hold inputs that no model names. The student gets what its forward names
      (with `**kwargs` everything, except names that begin with "teacher_").
    - `device`: the device on which the teacher stays; its inputs and outputs are moved. None: the student's device. A
      model that is quantised, offloaded, sharded or spread over several devices stays where it is; give the device of
      its inputs.

    Copies of a `Distillation` or `Distiller` share the teacher.

    >>> teacher = Teacher(nn.Linear(4, 2), inputs=lambda x: x / 255)
    >>> teacher.of((torch.ones(1, 4),), {})
    ((tensor([[0.0039, 0.0039, 0.0039, 0.0039]]),), {})
    """

    module: Callable[..., Any]
    inputs: Callable[..., Any] | None = None
    device: torch.device | str | None = None

    def __post_init__(self) -> None:
        if not callable(self.module):
            raise TypeError(f"a teacher is a model or a function, got {type(self.module).__name__}")
        if not isinstance(self.module, nn.Module) and callable(getattr(self.module, "module", None)):
            raise TypeError(f"an {type(self.module).__name__} can't be called; write teacher.module(), which can")
        if isinstance(self.module, nn.Module):
            if getattr(self.module.forward, "__func__", None) is nn.Module.forward:
                raise TypeError(
                    f"a {type(self.module).__name__} has no forward and can't be run; give several teachers as a list "
                    "of models"
                )
            refuse_trained(self.module)
        if self.inputs is not None and not callable(self.inputs):
            raise TypeError(f"inputs is a function of the batch, got {self.inputs!r}; write inputs=lambda batch: ...")
        if self.device is not None:
            self._go(torch.device(self.device))

    def of(self, args: tuple[Any, ...], inputs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The teacher's inputs for this batch, positional and by keyword, on its device.

        `args` and `inputs` are the student's.
        """
        own_args, own = args, dict(inputs)
        if self.inputs is None:
            own = of_teacher(self.module, inputs)
        else:
            given = self.inputs(*args, own) if own else self.inputs(*args)
            own = dict(given) if isinstance(given, Mapping) else {}
            own_args = () if isinstance(given, Mapping) else given if isinstance(given, tuple) else (given,)
        return (own_args, own) if self.device is None else (moved(own_args, self.device), moved(own, self.device))

    def follow(self, device: torch.device) -> None:
        """Move the teacher to the student's `device`, unless it has its own or can't be moved.

        It never moves to "meta", where students can be until they are sharded: a teacher would lose its weights.
        """
        if self.device is None and device.type != "meta":
            self._go(device)

    def _go(self, device: torch.device) -> None:
        module = self.module
        if isinstance(module, nn.Module) and place(module) != device and _movable(module):
            module.to(device)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Teacher":
        return self


def moved(x: Any, device: torch.device | str) -> Any:
    """Move all tensors of a nested value to a device. Copies to the host wait, since the data is read there."""
    ahead = torch.device(device).type != "cpu"

    def move(t: Any) -> Any:
        if isinstance(t, LazyLogits):
            return replace(t, **{name: move(part) for name, part in vars(t).items()})
        return t.to(device, non_blocking=ahead) if isinstance(t, (Tensor, TopKLogits)) else t

    return tree_map(move, x)


def refuse_functions(criterion: Any, teachers: Sequence[Any]) -> None:
    """Raise if a term reads features of a teacher that is a function and so has no modules."""
    for name, term in criterion.terms.items():
        for k in term.teachers(len(teachers)) if isinstance(term, Features) else ():
            teacher = teachers[k]
            if teacher is not None and not isinstance(teacher.module, nn.Module):
                raise TypeError(
                    f"the term {name!r} reads features of teacher {k}, and {teacher.module!r} is a function, which has "
                    "outputs only: give the model, an nn.Module"
                )


def tensors(output: Any, inputs: Any) -> Any:
    """A teacher's output with its numpy arrays as tensors, on the device of its inputs."""
    parts = output.values() if isinstance(output, Mapping) else [output]
    if all(part is None or isinstance(part, (Tensor, LazyLogits)) for part in parts):
        return output
    if not any(map(_is_numpy, tree_leaves(output))):
        return output
    device = next((x.device for x in tree_leaves(inputs) if isinstance(x, Tensor)), None)
    return tree_map(lambda x: torch.tensor(x, device=device) if _is_numpy(x) else x, output)


def _is_numpy(x: Any) -> bool:
    return hasattr(x, "__array_interface__")


def place(module: nn.Module) -> torch.device | None:
    """The device of a module's first parameter or buffer."""
    for kind in ("_parameters", "_buffers"):
        for inner in module.modules():
            for tensor in getattr(inner, kind).values():
                if tensor is not None:
                    return tensor.device  # type: ignore[no-any-return]
    return None


def _movable(module: nn.Module) -> bool:
    """Whether a model may be moved: not if it is quantised, offloaded, sharded or on several devices."""
    if any(getattr(module, name, None) for name in ("is_quantized", "hf_quantizer", "hf_device_map", "_hf_hook")):
        return False
    tensors = (*module.parameters(), *module.buffers())
    if any(t.is_meta or hasattr(t, "placements") or hasattr(t, "ds_id") for t in tensors):  # DTensors', ZeRO-3's
        return False
    return len({t.device for t in tensors}) == 1
