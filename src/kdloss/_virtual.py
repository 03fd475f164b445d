"""Virtual tokens: what prompt tuning and p-tuning put in front of the text has no label, and no place in a teacher."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from kdloss._capture import Captured
from kdloss.targets.kinds import at
from kdloss.terms._outputs import find_logits

_OF_DECODER, _OF_INPUT = ("decoder_input_ids", "decoder_inputs_embeds", "labels"), ("input_ids", "inputs_embeds")


def without_virtual_tokens(model: nn.Module, seen: Captured, args: tuple[Any, ...], batch: Mapping[str, Any]) -> None:
    """Cut them off logits and features that are longer than the batch by exactly as many as peft says."""
    counts = {n for module in model.modules() if (n := _virtual_tokens(module))}
    if not counts:
        return
    of_input = _lengths([*args, *map(batch.get, _OF_INPUT)])
    of_output = _lengths(map(batch.get, _OF_DECODER)) or of_input
    for n in counts:
        logits = find_logits(seen.output)
        if logits is not None and len(logits.shape) == 3 and logits.shape[1] - n in of_output:
            _put(seen.output, at(logits, partial(_behind, n)))
        for view in (seen, *seen.views.values()):
            longer = {k: x for k, x in view.features.items() if x.ndim == 3 and x.shape[1] - n in of_input | of_output}
            view.features.update({k: x[:, n:] for k, x in longer.items()})


def _virtual_tokens(module: nn.Module) -> int:
    """How many a peft model's active adapter has; not so a prefix, which lengthens nothing."""
    configs: Any = getattr(module, "peft_config", None)
    active = getattr(module, "active_adapter", None)
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
