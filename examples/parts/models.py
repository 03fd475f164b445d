"""Teachers and students: loaded, made of a teacher's blocks, or new."""

import shutil
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import AdamW
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_linear_schedule_with_warmup,
)

from parts.text import batches


def load(source: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in float32 and its tokenizer: a folder, a .gguf file or a hub name."""
    path, options = Path(source), {}
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"there is no file {source!r}")
        source, options = str(path.parent), {"gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    return (dequantized(model) if options else model), tokenizer


def dequantized(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a model that knows nothing of quantization, so that it can be saved."""
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    clean = type(model)(type(model.config).from_dict(config))
    clean.load_state_dict(model.state_dict())
    clean.generation_config = model.generation_config
    return clean


def gpt2(
    layers: int, width: int, heads: int, *, dropout: float, tokenizer: PreTrainedTokenizerBase, length: int
) -> PreTrainedModel:
    """A new GPT-2-shaped model for this tokenizer's vocabulary."""
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


def train_alone(model: PreTrainedModel, blocks: Tensor, *, epochs: int, batch_size: int, lr: float) -> None:
    """Plain training of a teacher on blocks of tokens."""
    steps = epochs * -(-len(blocks) // batch_size)
    optimizer = AdamW(model.parameters(), lr=lr)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 20, steps)
    model.train()
    for batch in tqdm(batches(blocks, batch_size, steps, seed=0), "teacher", steps, unit="step"):
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write both under another name first, so that a folder of this name is always whole."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
