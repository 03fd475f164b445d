"""Load, make, check and save teachers and students."""

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from parts.files import replacing

logging.disable_progress_bar()  # for loading and saving, which are short


def load(source: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model in float32 and its tokenizer from a folder, a .gguf file or the hub."""
    path, options = Path(source), {}
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"there is no file {source!r}")
        source, options = str(path.parent), {"gguf_file": path.name}
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except OSError as error:
        raise ValueError(
            f"{source!r} is neither a folder with a model and its tokenizer nor a name on the hub: "
            f"{str(error).splitlines()[0]}"
        ) from error
    return (dequantized(model) if options else model), tokenizer


def dequantized(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a model without a quantization config, which can be saved."""
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    clean = type(model)(type(model.config).from_dict(config))
    clean.load_state_dict(model.state_dict())
    clean.generation_config = model.generation_config
    return clean


def gpt2(
    layers: int, width: int, heads: int, *, dropout: float, tokenizer: PreTrainedTokenizerBase, length: int
) -> PreTrainedModel:
    """A new GPT-2 for this tokenizer's vocabulary."""
    if width % heads:
        raise ValueError(f"a width of {width} does not divide into {heads} heads")
    config = GPT2Config(
        n_layer=layers,
        n_embd=width,
        n_head=heads,
        vocab_size=len(tokenizer),
        n_positions=length,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return GPT2LMHeadModel(config)


def check_length(model: PreTrainedModel, length: int, who: str) -> None:
    """Raise an error if blocks are longer than the model's context."""
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and length > context:
        raise ValueError(f"the {who} reads at most {context} tokens, not {length}: pass --max-length {context}")


def check_vocabulary(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Raise an error unless both models have the same vocabulary."""
    ours, theirs = student.config.vocab_size, teacher.config.vocab_size
    if ours == theirs and tokenizer.get_vocab() == teacher_tokenizer.get_vocab():
        return
    other = "; the sizes are equal, but ids stand for different tokens" if ours == theirs else ""
    raise ValueError(
        f"the student has a vocabulary of {ours} tokens, the teacher one of {theirs}{other}: choose a "
        "--student and a --teacher of the same family, or leave out --student"
    )


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a folder that `from_pretrained` loads; it is complete or absent."""
    with replacing(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
