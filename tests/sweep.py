"""Run each class of transformers' mappings as a tiny random model, and judge the result.

`python tests/sweep.py` writes the tables of docs/models.md. A class is *right* if its loss at alpha = 1 equals the
model's loss, and its distillation term equals the divergence of the logits at the positions where the model predicts a
label; both are computed here. It is *refused* if kdloss raises a ValueError or TypeError. It is *not run* if
transformers cannot build or run such a small model. Anything else is a fault of kdloss.
"""

import contextlib
import copy
import itertools
import re
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers.models.auto import configuration_auto, modeling_auto

import kdloss

VOCAB, CLASSES = 61, 3
BEGIN, END = "<!-- by tests/sweep.py -->", "<!-- end -->"
PAGE = Path(__file__).parent.parent / "docs" / "models.md"
MAPPINGS = {  # name of the mapping: kind of labels, title on the page, suffix of its AutoModelFor class
    "CAUSAL_LM": ("text", "Causal language models", "CausalLM"),
    "IMAGE_TEXT_TO_TEXT": ("text", "Vision-language models", "ImageTextToText"),
    "MULTIMODAL_LM": ("text", "Multimodal language models", "MultimodalLM"),
    "SEQ_TO_SEQ_CAUSAL_LM": ("text", "Encoder-decoders", "Seq2SeqLM"),
    "MASKED_LM": ("text", "Masked language models", "MaskedLM"),
    "TOKEN_CLASSIFICATION": ("tags", "Token classifiers", "TokenClassification"),
    "SEQUENCE_CLASSIFICATION": ("class", "Sequence classifiers", "SequenceClassification"),
    "IMAGE_CLASSIFICATION": ("class", "Image classifiers", "ImageClassification"),
    "VIDEO_CLASSIFICATION": ("class", "Video classifiers", "VideoClassification"),
    "AUDIO_CLASSIFICATION": ("class", "Audio classifiers", "AudioClassification"),
    "SPEECH_SEQ_2_SEQ": ("text", "Speech to text", "SpeechSeq2Seq"),
    "CTC": ("transcript", "Speech to text by CTC", "CTC"),
}
SIZES = {  # size: the names of the settings that are reduced to it
    16: "hidden_size d_model n_embd embed_dim dim emb_dim word_embed_proj_dim d_embed model_dim embedding_size out_dim "
    "conv_channels projection_dim text_embed_dim attention_hidden_size lm_hidden_size rnn_hidden_size output_size",
    32: "intermediate_size ffn_dim d_ff encoder_ffn_dim decoder_ffn_dim hidden_dim n_inner feed_forward_hidden_size "
    "d_inner ffn_hidden_size moe_intermediate_size shared_expert_intermediate_size image_size ff_dim intermediate_dim "
    "expert_ffn_hidden_size zero_expert_num",
    2: "num_hidden_layers n_layer num_layers encoder_layers decoder_layers n_layers num_attention_heads n_head n_heads "
    "num_heads encoder_attention_heads decoder_attention_heads num_decoder_layers num_key_value_heads depth "
    "num_encoder_layers num_kv_heads encoder_num_attention_heads decoder_num_attention_heads adapter_layers "
    "encoder_num_key_value_heads decoder_num_key_value_heads first_k_dense_replace encoder_num_hidden_layers "
    "decoder_num_hidden_layers top_k num_experts_per_tok moe_topk",
    4: "n_routed_experts num_local_experts num_experts moe_num_experts num_frames index_topk index_n_heads window_size",
    8: "head_dim d_kv attention_head_size kv_channels qk_nope_head_dim qk_rope_head_dim v_head_dim patch_size "
    "num_mel_bins index_head_dim swa_head_dim global_head_dim chunk_size mamba_chunk_size",
    12: "kv_lora_rank q_lora_rank",
    64: "max_position_embeddings n_positions max_source_positions max_target_positions max_seq_len n_ctx",
}
SIZE_OF = {name: size for size, names in SIZES.items() for name in names.split()}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


def classes() -> Iterator[tuple[str, str, str, str]]:
    """Yield mapping, kind of labels, model type and name of each class, without duplicates."""
    seen = set()
    for mapping, (kind, *_) in MAPPINGS.items():
        for model_type, names in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").items():
            name = names[0] if isinstance(names, tuple | list) else names
            if name not in seen:
                seen.add(name)
                yield mapping, kind, model_type, name


def shrink(config: Any) -> Any:
    """Reduce all sizes of a configuration, and set initial weights so large that positions differ."""
    depth = None
    for key, value in list(vars(config).items()):
        if hasattr(value, "to_dict"):
            shrink(value)
        elif key.endswith("vocab_size"):
            setattr(config, key, VOCAB)
        elif key in SIZE_OF and isinstance(value, int) and not isinstance(value, bool):
            setattr(config, key, min(value, SIZE_OF[key]))
        elif key.endswith("token_id") and isinstance(value, int):
            setattr(config, key, TOKENS.get(key, value % VOCAB))
        elif key in ("initializer_range", "init_std", "initializer_factor"):
            setattr(config, key, 0.3 if key != "initializer_factor" else 1.0)
        elif key == "layer_types" and isinstance(value, list):
            kinds = list(dict.fromkeys(value))
            depth = max(2, len(kinds))
            config.layer_types = (kinds * 2)[:depth]
        elif key in ("num_heads", "num_attention_heads") and isinstance(value, list | tuple):
            setattr(config, key, [2] * len(value))
        elif isinstance(value, dict) and "mrope_section" in value:
            value["mrope_section"] = [2, 1, 1]
        elif key == "output_router_logits":
            config.output_router_logits = True
        elif key in ("router_aux_loss_coef", "aux_loss_coef", "router_z_loss_coef"):
            setattr(config, key, 0.1)
        elif "layerdrop" in key or key == "mask_time_prob":
            setattr(config, key, 0.0)
    if depth is not None and hasattr(config, "num_hidden_layers"):
        config.num_hidden_layers = depth
    return config


def build_tiny(model_type: str, name: str) -> Any:
    """A tiny random model."""
    config = shrink(getattr(hf, configuration_auto.CONFIG_MAPPING_NAMES[model_type])())
    with contextlib.suppress(Exception):
        config.num_labels = CLASSES
    for key, value in TOKENS.items():
        if getattr(config, key, None) is None:
            setattr(config, key, value)
    kind = getattr(hf, name)
    with torch.device("meta"):
        size = sum(p.numel() for p in kind(config).parameters())
    if size > 30_000_000:
        raise MemoryError(f"{size} parameters")
    torch.manual_seed(0)
    return kind(config).eval()


def flipped(model: Any) -> Any:
    """Another model of the same class: a copy with all weights flipped."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.parameters():
            weight.copy_(weight.flip(*range(weight.ndim)))
    return other


def mel_bins(config: Any) -> int:
    """The number of mel bins in a frame of audio."""
    names = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "input_dim")
    for part in (config, *(v for k, v in vars(config).items() if k.endswith("_config"))):
        for key in names:
            if isinstance(getattr(part, key, None), int):
                return int(getattr(part, key))
    return 8


def batch(model: Any, kind: str) -> dict[str, Any]:
    """Inputs under the name of the model's main input, and labels of this kind."""
    torch.manual_seed(7)
    tokens, config = torch.randint(3, 57, (2, 9)), model.config
    main, labels, name = model.main_input_name, tokens.clone(), type(model).__name__
    if kind == "class":
        labels = torch.tensor([0, 2])
    elif kind == "tags":
        labels = tokens % CLASSES
    if main == "pixel_values":
        size = getattr(config, "image_size", 32)
        height, width = (size, size) if isinstance(size, int) else size
        frames = (config.num_frames,) if hasattr(config, "num_frames") else ()
        inputs = {"pixel_values": torch.randn(2, *frames, getattr(config, "num_channels", 3), height, width)}
    elif main == "input_values":
        inputs = {"input_values": torch.randn(2, 4000)}
    elif main == "input_features":
        mels, time = mel_bins(config), 2 * getattr(config, "max_source_positions", 64)
        inputs = {"input_features": torch.randn(2, *((mels, time) if "Whisper" in name else (time, mels)))}
    elif main == "flattened_patches":
        inputs = {"flattened_patches": torch.cat([torch.ones(2, 4, 2), torch.randn(2, 4, 768)], -1)}
    else:
        tokens[:, -1] = 2 if kind == "class" else tokens[:, -1]  # some models classify at the end-of-text token
        inputs = {"input_ids": tokens}
    if kind in ("text", "tags"):
        labels[0, :2] = -100
    return {**inputs, "labels": labels}


def divergence(student: Tensor, teacher: Tensor, keep: Any) -> float:
    """KL(teacher || student) in float64, averaged over the positions of `keep`."""
    s, t = student[keep].double().log_softmax(-1), teacher[keep].double().log_softmax(-1)
    return (t.exp() * (t - s)).sum(-1).mean().item()


def verdict(kind: str, model_type: str, name: str) -> tuple[str, str]:
    """The verdict on a class, and the reason."""
    try:
        student = build_tiny(model_type, name)
        teacher = flipped(student)
        inputs = batch(student, kind)
        more = {"use_cache": False} if "use_cache" in vars(student.config) else {}
        with torch.no_grad():
            ours, theirs = student(**inputs, **more), teacher(**inputs, **more)
        if not ours.loss.isfinite():
            raise ValueError("its loss is not finite")
    except Exception as error:
        return "not run", f"{type(error).__name__}: {error}".splitlines()[0][:90]
    labels = inputs["labels"]
    task = kdloss.CrossEntropy() if kind != "transcript" else kdloss.Task(name="ce")
    try:
        distill = kdloss.Distiller(teacher, 0.5 * task + 0.5 * kdloss.Logits())
        out = distill(student, **inputs, **more)
    except (ValueError, TypeError) as error:
        if "kdloss" in traceback.extract_tb(error.__traceback__)[-1].filename:
            return "refused", str(error).splitlines()[0][:160]
        raise
    parts = {key: value.item() for key, value in out.components.items()}
    task_loss = sum(value for key, value in parts.items() if key != "kd")
    if abs(task_loss - ours.loss.item()) > 2e-4 * max(1, abs(ours.loss.item())):
        return "silent", f"its own loss is {ours.loss.item()}, the task's {task_loss}"
    added = task_loss - parts["ce"]
    expected = divergence(*compared(kind, ours, theirs, labels, ours.loss.item() - added))
    if abs(parts["kd"] - expected) > 2e-4 * max(1, expected):
        return "silent", f"the divergence is {expected}, and came as {parts['kd']}"
    return "right", ", ".join(sorted(parts.keys() - {"ce", "kd"}))


def compared(kind: str, ours: Any, theirs: Any, labels: Tensor, loss: float) -> tuple[Tensor, Tensor, Any]:
    """Logits of student and teacher, and the mask of positions where the model's loss has a label."""
    s, t = ours.logits, theirs.logits
    if kind in ("class", "transcript"):
        return s, t, torch.ones(s.shape[:-1], dtype=torch.bool)
    unshifted = cross_entropy(s.flatten(0, 1).float(), labels.flatten()).item()
    shifted = cross_entropy(s[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()).item()
    if abs(loss - shifted) < abs(loss - unshifted):
        return s[:, :-1], t[:, :-1], labels[:, 1:] != -100
    return s, t, labels != -100


Verdicts = dict[str, list[tuple[str, str, str]]]  # for each mapping: class, verdict, reason


def table(verdicts: Verdicts) -> str:
    """The section of the page on transformers."""
    lines = ["| models | loaded by | right | refused | not run |", "|---|---|---|---|---|"]
    for mapping, rows in verdicts.items():
        counts = [sum(what == state for _, what, _ in rows) for state in ("right", "refused", "not run")]
        _, title, auto = MAPPINGS[mapping]
        lines.append(f"| {title} | AutoModelFor{auto} | {' | '.join(map(str, counts))} |")
    lines += ["", "### Right", ""]
    for title, rows in of_state(verdicts, "right"):
        lines += [f'??? success "{title}: {len(rows)}"', "", *by_letter([name for name, _ in rows])]
    every = sorted((row for rows in verdicts.values() for row in rows), key=lambda row: row[0].lower())
    joined = [f"`{name}` ({why})" for name, what, why in every if what == "right" and why]
    lines += ["### With a loss term of their own", "", "The loss of these models has a term beside cross-entropy:"]
    lines += [", ".join(joined) + ".", "", "### Refused", "", "| class | message |", "|---|---|"]
    lines += [f"| `{name}` | {why} |" for name, what, why in every if what == "refused"]
    lines += ["", "### Not run", ""]
    for title, rows in of_state(verdicts, "not run"):
        lines += [f'??? note "{title}: {len(rows)}"', "", "    | class | message |", "    |---|---|"]
        lines += [*(f"    | `{name}` | {why} |" for name, why in rows), ""]
    return "\n".join(lines)


def of_state(verdicts: Verdicts, state: str) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Yield the title of each mapping with classes in this state, and these with reasons in alphabetical order."""
    for mapping, every in verdicts.items():
        rows = sorted(((name, why) for name, what, why in every if what == state), key=lambda row: row[0].lower())
        if rows:
            yield MAPPINGS[mapping][1], rows


def by_letter(names: list[str]) -> list[str]:
    """A paragraph for each initial letter, indented for a collapsed block."""
    lines = []
    for letter, group in itertools.groupby(names, key=lambda name: name[0].upper()):
        lines += [f"    **{letter}**  " + ", ".join(f"`{name}`" for name in group), ""]
    return lines


def stated() -> dict[str, tuple[str, str]]:
    """The verdict and the reason on the page, for each class."""
    text = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    parts = dict(re.findall(r"^### (.+)\n((?:(?!### ).*\n)*)", text, re.MULTILINE))
    joined = dict(re.findall(r"`(\w+)` \((.+?)\)", parts["With a loss term of their own"]))
    verdicts = {name: ("right", joined.get(name, "")) for name in re.findall(r"`(\w+)`", parts["Right"])}
    for state in ("Refused", "Not run"):
        rows = re.findall(r"^ *\| `(\w+)` \| (.*) \|$", parts[state], re.MULTILINE)
        verdicts |= {name: (state.lower(), why) for name, why in rows}
    return verdicts


def main() -> None:
    """Write the tables."""
    verdicts: Verdicts = {}
    for mapping, kind, model_type, name in classes():
        what, why = verdict(kind, model_type, name)
        verdicts.setdefault(mapping, []).append((name, what, why.replace("|", "/")))
        print(*verdicts[mapping][-1], sep=" | ", flush=True)
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(verdicts)}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    hf.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    main()
