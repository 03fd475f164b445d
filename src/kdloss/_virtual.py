"""Remove virtual tokens, which prompt tuning and p-tuning put before the text, from logits and features."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from kdloss._capture import Captured
from kdloss._towers import encoder_side
from kdloss.layers.names import attribute
from kdloss.targets.kinds import at
from kdloss.terms._outputs import find_logits

_OF_DECODER, _OF_INPUT = ("decoder_input_ids", "decoder_inputs_embeds", "labels"), ("input_ids", "inputs_embeds")

_WRAPPED = ("module", "_orig_mod", "_fsdp_wrapped_module")


def without_virtual_tokens(
    model: nn.Module,
    seen: Captured,
    args: tuple[Any, ...],
    batch: Mapping[str, Any],
    module: Callable[[Any], nn.Module],
) -> None:
    """Cut the virtual tokens off logits and features that are longer than the batch by exactly their number.

    `module` gives the module of a feature's key.
    """
    n = virtual_tokens(model)
    if not n:
        return
    of_input = _lengths([*args, *map(batch.get, _OF_INPUT)])
    of_output = _lengths(map(batch.get, _OF_DECODER)) or of_input
    of_encoder = encoder_side(model)
    logits = find_logits(seen.output)
    if logits is not None and len(logits.shape) == 3 and _longer(logits, n, of_output):
        _put(seen.output, at(logits, partial(_behind, n)))
    for key, x in seen.features.items():
        if x.ndim == 3 and _longer(x, n, of_input if module(key) in of_encoder else of_output):
            seen.features[key] = _behind(n, x)


def _longer(x: Any, n: int, lengths: set[int]) -> bool:
    """Whether the length is none of these, but one of them plus n."""
    return x.shape[1] not in lengths and x.shape[1] - n in lengths


def virtual_tokens(model: nn.Module) -> int:
    """The number of virtual tokens of a peft model's active adapter; prefix tuning has some but lengthens nothing."""
    inner: nn.Module | None = model
    while inner is not None and (configs := attribute(inner, "peft_config")) is None:
        children = inner._modules  # TorchScript's `_modules` have no `get`
        name = next(filter(children.__contains__, _WRAPPED), None)
        inner = None if name is None else children[name]
    if inner is None:
        return 0
    active = getattr(inner, "active_adapter", None)
    config = configs.get(active) if isinstance(configs, Mapping) and isinstance(active, str) else None
    return int(getattr(config, "num_virtual_tokens", None) or 0)


def _lengths(tensors: Any) -> set[int]:
    return {x.shape[1] for x in tensors if isinstance(x, Tensor) and x.ndim > 1}


def _behind(n: int, x: Tensor) -> Tensor:
    return x[:, n:]


def _put(output: Any, logits: Any) -> None:
    if isinstance(output, dict):
        output["logits"] = logits
    else:
        output.logits = logits
