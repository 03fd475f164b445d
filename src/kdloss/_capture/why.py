"""Error texts: why a module returned nothing that can be trained on, for the model at hand."""

import sys
from collections.abc import Mapping

import torch
from torch import fx, nn
from torch.utils import checkpoint

from kdloss._capture.compiled import BLOCKS
from kdloss.layers.drop import layer_drop
from kdloss.layers.graph import called
from kdloss.layers.layer_map import Name


def not_run(model: nn.Module, absent: Mapping[Name, nn.Module], begun: bool) -> str:
    """Why the modules with these names did not run in the forward pass."""
    missing = f"{list(absent)} did not run inside the `with`"
    if not begun:
        return (
            f"{missing}, nor did the {type(model).__name__} that `capture` was given: call it there, by itself, "
            "not its forward() nor a part of it. Where torch.compile compiled a function around it, hooks are not "
            f"seen; compile its blocks instead: {BLOCKS}"
        )
    module = next(iter(absent.values()))
    for holder in model.modules():
        if holder is module or module not in holder.modules():
            continue
        if isinstance(holder, fx.GraphModule):
            return f"{missing}: {_only_the_graph(model, absent)}"
        if isinstance(holder, nn.MultiheadAttention):
            return (
                f"{missing}: nn.MultiheadAttention computes with the weights of its parts and never calls them; "
                "capture the attention itself"
            )
    if (drop := layer_drop(model, module)) is not None:
        return f"{missing}: {dropped(model, *drop)}"
    return (
        f"{missing}: the model skipped it in this pass (an option, a condition, a random choice), computes with its "
        "weights without calling it, or it is part of something that torch.compile compiled before the hook was "
        f"there; then give `capture` the compiled model itself, or compile its blocks instead: {BLOCKS}"
    )


def dropped(model: nn.Module, rate: float, line: str) -> str:
    """What LayerDrop does to features, and how to turn it off."""
    return (
        f"{type(model).__name__} leaves blocks out of its training passes at random (LayerDrop, here {rate:g}), and "
        f"one that did not run has no features to learn from; write {line}"
    )


def no_gradient() -> str:
    """Why the output of a trained module has no gradient. Call it while the module's hook runs."""
    frozen = (
        "Freeze it by module.requires_grad_(False) if it is not to be trained, or capture a part that is; take the "
        "no_grad() away if it is"
    )
    if torch.is_grad_enabled():
        return f"its own forward detaches it, or makes it under torch.no_grad(). {frozen}"
    if _checkpointed():
        return "reentrant activation checkpointing hides it. Write use_reentrant=False where checkpointing is turned on"
    return (
        f"the module ran under torch.no_grad(), as a frozen backbone does. {frozen}. (So does the reentrant "
        "checkpointing of other libraries: there write use_reentrant=False, or torch.utils.checkpoint)"
    )


def _checkpointed() -> bool:
    """Whether the call stack contains a reentrant checkpoint of torch."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code is checkpoint.CheckpointFunction.forward.__code__:
            return True
    return False


def _only_the_graph(model: nn.Module, absent: Mapping[Name, nn.Module]) -> str:
    under = {name: called(model, module) for name, module in absent.items()}
    there = {name: names for name, names in under.items() if names}
    rest = f"{there}" if there else f"there are none, but elsewhere {called(model, model)[:12]}"
    return (
        f"{type(model).__name__} was traced by torch.fx (as for quantisation), and of a traced model only modules that "
        f"the graph calls can be captured; under the names asked for {rest}. What a block does besides, like adding a "
        "shortcut, is no module in there"
    )
