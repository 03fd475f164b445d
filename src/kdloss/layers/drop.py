"""LayerDrop: models that skip blocks at random in training mode (Fan et al. 2020, arXiv:1909.11556)."""

from typing import Any

from torch import nn

from kdloss.layers.names import unwrap

SETTINGS = ("layerdrop", "speech_encoder_layerdrop")


def layer_drop(model: nn.Module, block: nn.Module) -> tuple[float, str] | None:
    """The rate at which a block is skipped in the model's current mode, and the line that turns it off; None if never.

    The module that runs the list of blocks stores the rate as its own attribute, as Hugging Face's BART does, or in
    its configuration, as Wav2Vec2 does.
    """
    model = unwrap(model)
    for path, holder in model.named_modules():
        children = (child for child in holder.children() if isinstance(child, nn.ModuleList))
        if not holder.training or not any(block is item for child in children for item in child):
            continue
        config = getattr(holder, "config", None)
        there: Any = "model.config" if config is getattr(model, "config", None) else f"model.{path}.config"
        for place, owner in ((f"model.{path}".rstrip("."), holder), (there, config)):
            for name in SETTINGS:
                rate = getattr(owner, name, None)
                if isinstance(rate, (float, int)) and rate > 0:
                    return float(rate), f"{place}.{name} = 0.0"
    return None
