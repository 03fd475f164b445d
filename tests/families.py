"""A small random model of each family that the library supports, and a batch for it."""

import copy

import torch
import transformers as hf
from torch import nn

VOCAB = 61
VIT_BLOCKS = "vit.layers" if int(hf.__version__.split(".")[0]) >= 5 else "vit.encoder.layer"


def _decoder(config, **extra):
    return lambda width, depth: config(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=depth,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        **({"num_key_value_heads": 1, "head_dim": width // 2} | extra),
    )


def _gpt2(width, depth):
    return hf.GPT2Config(
        vocab_size=VOCAB,
        n_embd=width,
        n_layer=depth,
        n_head=2,
        n_positions=16,
        bos_token_id=0,
        eos_token_id=1,
    )


def _opt(width, depth):
    return hf.OPTConfig(
        vocab_size=VOCAB, hidden_size=width, ffn_dim=width, num_hidden_layers=depth,
        num_attention_heads=2, word_embed_proj_dim=width, max_position_embeddings=16, pad_token_id=2,
    )  # fmt: skip


def _neox(width, depth):
    return hf.GPTNeoXConfig(
        vocab_size=VOCAB, hidden_size=width, intermediate_size=width, num_hidden_layers=depth,
        num_attention_heads=2, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip


def _bert(width, depth):
    return hf.BertConfig(
        vocab_size=VOCAB, hidden_size=width, intermediate_size=width, num_hidden_layers=depth,
        num_attention_heads=2,
    )  # fmt: skip


def _roberta(width, depth):
    return hf.RobertaConfig(
        vocab_size=VOCAB, hidden_size=width, intermediate_size=width, num_hidden_layers=depth,
        num_attention_heads=2, max_position_embeddings=20, pad_token_id=2, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip


def _distilbert(width, depth):
    return hf.DistilBertConfig(vocab_size=VOCAB, dim=width, hidden_dim=width, n_layers=depth, n_heads=2)


def _t5(width, depth):
    return hf.T5Config(
        vocab_size=VOCAB, d_model=width, d_kv=8, d_ff=width, num_layers=depth, num_decoder_layers=depth,
        num_heads=2, decoder_start_token_id=0,
    )  # fmt: skip


def _vit(width, depth):
    return hf.ViTConfig(
        hidden_size=width, intermediate_size=width, num_hidden_layers=depth, num_attention_heads=2,
        image_size=16, patch_size=8, num_labels=5,
    )  # fmt: skip


FAMILIES = {
    "gpt2": (_gpt2, hf.AutoModelForCausalLM, "transformer.h"),
    "llama": (_decoder(hf.LlamaConfig), hf.AutoModelForCausalLM, "model.layers"),
    "qwen2": (_decoder(hf.Qwen2Config), hf.AutoModelForCausalLM, "model.layers"),
    "qwen3": (_decoder(hf.Qwen3Config), hf.AutoModelForCausalLM, "model.layers"),
    "gemma": (_decoder(hf.GemmaConfig), hf.AutoModelForCausalLM, "model.layers"),
    "gemma2": (_decoder(hf.Gemma2Config), hf.AutoModelForCausalLM, "model.layers"),
    "gemma3": (_decoder(hf.Gemma3TextConfig), hf.AutoModelForCausalLM, "model.layers"),
    "opt": (_opt, hf.AutoModelForCausalLM, "model.decoder.layers"),
    "gpt_neox": (_neox, hf.AutoModelForCausalLM, "gpt_neox.layers"),
    "bert": (_bert, hf.AutoModelForMaskedLM, "bert.encoder.layer"),
    "roberta": (_roberta, hf.AutoModelForMaskedLM, "roberta.encoder.layer"),
    "distilbert": (_distilbert, hf.AutoModelForMaskedLM, "distilbert.transformer.layer"),
    "t5": (_t5, hf.AutoModelForSeq2SeqLM, "decoder.block"),
    "vit": (_vit, hf.AutoModelForImageClassification, VIT_BLOCKS),
}
CAUSAL = ["gpt2", "llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "opt", "gpt_neox"]


def build(family: str, width: int = 16, depth: int = 3, seed: int = 0) -> torch.nn.Module:
    """A random model without dropout, so that two passes agree."""
    config, auto, _ = FAMILIES[family]
    config = copy.deepcopy(config(width, depth))
    for name in ("dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "attention_dropout",
                 "hidden_dropout", "hidden_dropout_prob",
                 "attention_probs_dropout_prob", "dropout_rate"):  # fmt: skip
        if hasattr(config, name):
            setattr(config, name, 0.0)
    torch.manual_seed(seed)
    return auto.from_config(config)


def batch(family: str) -> dict[str, torch.Tensor]:
    """Two examples with padding in the second, and labels that skip it."""
    generator = torch.Generator().manual_seed(1)
    if family == "vit":
        return {
            "pixel_values": torch.randn(2, 3, 16, 16, generator=generator),
            "labels": torch.tensor([1, 4]),
        }
    tokens = torch.randint(3, VOCAB, (2, 8), generator=generator)
    attention = torch.ones(2, 8, dtype=torch.long)
    attention[1, 5:] = 0
    labels = tokens.masked_fill(attention == 0, -100)
    if family == "t5":
        labels = labels[:, :6].contiguous()
    return {"input_ids": tokens, "attention_mask": attention, "labels": labels}


def blocks_argument(family: str) -> str | None:
    """The argument that names the blocks of T5, which has two lists of them."""
    return "decoder.block" if family == "t5" else None


def checkpointing(model: nn.Module, settings: dict) -> None:
    """Turn on activation checkpointing, under the name that it has in the installed transformers."""
    old = getattr(model, "gradient_checkpointing_enable", None)
    getattr(model, "activation_checkpointing_enable", old)(settings)


class ResidualBlock(nn.Module):
    """Two convolutions with a shortcut around them."""

    def __init__(self, before, after, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        self.downsample = nn.Sequential(nn.Conv2d(before, after, 1, stride), nn.BatchNorm2d(after))

    def forward(self, x):
        return torch.relu(self.conv2(torch.relu(self.conv1(x))) + self.downsample(x))


class ResNet(nn.Module):
    """Stages called layer1, layer2, ..., each an `nn.Sequential` of blocks, as in torchvision."""

    def __init__(self, depths=(2, 1, 3), width=4):
        super().__init__()
        self.conv1, self.stages = nn.Conv2d(3, width, 3, padding=1), len(depths)
        for i, depth in enumerate(depths):
            before, after = width << max(i - 1, 0), width << i
            first = ResidualBlock(before, after, 2 if i else 1)
            rest = [ResidualBlock(after, after, 1) for _ in range(depth - 1)]
            setattr(self, f"layer{i + 1}", nn.Sequential(first, *rest))
        self.fc = nn.Linear(after, 5)

    def forward(self, x):
        x = self.conv1(x)
        for i in range(self.stages):
            x = getattr(self, f"layer{i + 1}")(x)
        return self.fc(x.mean((2, 3)))
