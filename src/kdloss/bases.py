"""`base_of`: the model under a student's adapters as its teacher; and an error for teachers that the student trains."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from kdloss.adapter import evaluating

_SWITCH = "_disable_adapters"  # peft's, on every layer that has adapters or a trained copy
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class Base(nn.Module):
    """A model that runs with its adapters off; see `base_of`. It has the names and blocks of the model inside."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model

    def forward(self, *args: Any, **inputs: Any) -> Any:
        """What the model under the adapters returns, in eval mode and without gradient."""
        with torch.no_grad(), evaluating(self.module), adapters_off(self.module):
            return self.module(*args, **inputs)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "Base":
        raise TypeError(
            "base_of(model) has the model's own weights, so it has the model's device and dtype; move the "
            "model, or load the base a second time to have it elsewhere"
        )


def base_of(model: nn.Module) -> Base:
    """The model under a peft model's adapters, as a teacher that shares its weights: no second copy in memory.

    `get_peft_model` changes the base model in place: after it, the base has the adapters and is the student, so you
    can't use it as the teacher. `base_of` runs the same modules with all adapters off, in eval mode and without
    gradient. Afterwards, also after an exception, adapters, modes and `requires_grad` are as before. `kdloss.Features`
    reads the features of the base. Modules that peft trains beside its adapters (`modules_to_save`) count as adapters.

    - `model`: what `get_peft_model` returned, or a transformers model after `add_adapter`. DDP and torch.compile
      around it are removed.

    Raises: TypeError for a model without adapters; ValueError if turning the adapters off doesn't give the base: they
    are merged into it, they were initialised with a part of its weights (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA), or its
    biases are trained too.

    >>> import kdloss
    >>> from peft import LoraConfig, get_peft_model
    >>> plain = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    >>> student = get_peft_model(plain, LoraConfig(target_modules=["0"]))
    >>> model = kdloss.Distillation(student, kdloss.base_of(student), kdloss.VanillaKD())
    >>> model(torch.ones(2, 4), labels=torch.tensor([0, 2])).components["kd"]  # adapters start at 0
    tensor(0.)

    Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"base_of takes a model with adapters, got {type(model).__name__}")
    inner = _plain(model)
    _switched_off(inner)
    _refuse_changed(inner)
    return Base(inner)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Turn all adapters off inside the `with`; switches, `requires_grad` and methods are restored after it."""
    _refuse_changed(model)
    switches = {m: getattr(m, _SWITCH) for m in model.modules() if hasattr(m, _SWITCH)}
    trained = {p: p.requires_grad for p in model.parameters()}
    own = {name for name in ("forward", "prepare_inputs_for_generation") if name in vars(model)}
    try:
        with _switched_off(model):
            yield
    finally:
        for module, off in switches.items():
            setattr(module, _SWITCH, off)
        for parameter, before in trained.items():
            if parameter.requires_grad != before:
                parameter.requires_grad_(before)
        for name in {"forward", "prepare_inputs_for_generation"} - own:
            vars(model).pop(name, None)  # prompt learning leaves the method, bound, on the model


class Own:
    """Finds out, in one pass of a teacher, whether it runs on weights that its student trains."""

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        self.student, self.teacher = student, teacher
        self.used: dict[str, None] = {}
        trained = {id(p): name for name, p in student.named_parameters() if p.requires_grad}
        self.watched: dict[nn.Module, str] = {}
        for path, module in teacher.named_modules():
            found = [trained[id(p)] for p in module._parameters.values() if p is not None and id(p) in trained]
            if found:
                self.watched.setdefault(_runs(teacher, path), found[0])

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Watch the one pass made inside the `with`."""
        handles = [module.register_forward_pre_hook(self._ran) for module in self.watched]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _ran(self, module: nn.Module, args: object) -> None:
        if not getattr(module, _SWITCH, False):
            self.used[self.watched[module]] = None

    def refuse(self, k: int) -> None:
        """Raise where such weights were used."""
        if not self.used:
            return
        name = next(iter(self.used))
        if isinstance(self.teacher, Base):
            raise ValueError(
                f"teacher {k} is base_of a model whose base is trained too ({name!r}): training anything but the "
                "adapters changes the teacher. Freeze it (LoraConfig(bias='none')), or load the base a second time"
            )
        adapters = any(hasattr(module, _SWITCH) for module in self.student.modules())
        way = (
            "get_peft_model changes a model in place: the base with its adapters off is kdloss.base_of(student)"
            if adapters
            else "Give another model: one loaded again, or copy.deepcopy(student) before it is trained"
        )
        raise ValueError(
            f"teacher {k} runs on weights that the student trains ({name!r}), so the student is its own teacher. "
            f"{way}. If the student is meant to teach itself, give a function: kdloss.Teacher(lambda *x, **batch: "
            "student(*x, **batch))"
        )


def owner(teacher: Any) -> nn.Module | None:
    """The model of a teacher: the teacher itself, or the model whose method it is."""
    module = teacher if isinstance(teacher, nn.Module) else getattr(teacher, "__self__", None)
    return module if isinstance(module, nn.Module) else None


def _plain(model: nn.Module) -> nn.Module:
    """The model inside DDP and torch.compile, which don't expect a second pass."""
    while list(model._modules) in (["module"], ["_orig_mod"]) and not model._parameters:
        model = next(iter(model.children()))
    return model


def _switched_off(model: nn.Module) -> AbstractContextManager[Any]:
    """The context manager of peft, or one made of transformers' own methods for adapters."""
    disable: Any = getattr(model, "disable_adapter", None)
    if callable(disable):
        found: AbstractContextManager[Any] = disable()
        return found
    if any(hasattr(module, _SWITCH) for module in model.modules()) and hasattr(model, "disable_adapters"):
        return _by_methods(model)
    raise TypeError(
        f"base_of takes what peft.get_peft_model returned, and {type(model).__name__} has no adapters to turn off; a "
        "model without adapters is a teacher as it is (copy.deepcopy(model), where it is the student)"
    )


@contextmanager
def _by_methods(model: Any) -> Iterator[None]:
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()


def _refuse_changed(model: nn.Module) -> None:
    """Raise if turning the adapters off doesn't give the base."""
    if any(getattr(module, "merged", False) is True for module in model.modules() if hasattr(module, _SWITCH)):
        raise ValueError(
            "adapters are merged into the base, so there is no base to run; write model.unmerge_adapter() before"
        )
    configs: Any = getattr(model, "peft_config", {})
    for name, config in configs.items() if isinstance(configs, dict) else ():
        start = getattr(config, "init_lora_weights", None)
        if isinstance(start, str) and start.lower().startswith(_CHANGES_THE_BASE):
            raise ValueError(
                f"the adapter {name!r} has init_lora_weights={start!r}, which takes a part of the base's weights into "
                "the adapter: with adapters off it isn't the base. Load the base a second time as the teacher"
            )
        if getattr(config, "bias", "none") != "none":
            raise ValueError(
                f"the adapter {name!r} has bias={config.bias!r}: the base's own biases are trained, and with adapters "
                "off it isn't the base. Write bias='none', or load the base a second time as the teacher"
            )


def _runs(model: nn.Module, path: str) -> nn.Module:
    """The module whose call shows that the parameters of the module at this path are used."""
    names = path.split(".") if path else []
    chain = [model]
    for name in names:
        chain.append(chain[-1]._modules[name])  # type: ignore[arg-type]
    for i in range(len(names), -1, -1):
        if hasattr(chain[i], _SWITCH):
            inside = names[i] if i < len(names) else ""
            return chain[-1] if inside in ("base_layer", "original_module") else chain[i]
    while len(chain) > 1 and isinstance(chain[-1], (nn.ParameterDict, nn.ParameterList)):
        chain.pop()
    return chain[-1]
