"""Students of kept blocks: their configuration says of each block what the teacher's said, or they are refused."""

import copy

import pytest
import torch
import transformers as hf
from torch import nn
from versions import since_torch

import kdloss
from kdloss.layers.lists import block_lists

DEPTH = 8
WINDOWS = [4, 8, 8, 8, 4, 4, 8, 4]
SIZES = {
    "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 31, "num_hidden_layers": DEPTH,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
DECODER = SIZES | {"num_key_value_heads": 2}
MOE = DECODER | {"num_experts_per_tok": 1, "moe_intermediate_size": 8}
LATENT = {"kv_lora_rank": 4, "q_lora_rank": 4, "qk_rope_head_dim": 4, "v_head_dim": 8, "qk_nope_head_dim": 4}
SEQ2SEQ = {
    "d_model": 16, "hidden_size": 16, "vocab_size": 31, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "num_encoder_attention_heads": 2, "num_decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 2, "forced_eos_token_id": 2,
}  # fmt: skip


def deepseek(first_dense):
    sizes = MOE | LATENT | {"n_routed_experts": 4, "n_group": 2, "topk_group": 1}
    return hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**sizes, first_k_dense_replace=first_dense))


def qwen_moe(**extra):
    sizes = MOE | {"num_experts": 2, "shared_expert_intermediate_size": 8}
    return hf.Qwen2MoeForCausalLM(hf.Qwen2MoeConfig(**sizes, **extra))


def llama4():
    sizes = DECODER | {"intermediate_size_mlp": 32, "num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8}
    config = hf.Llama4TextConfig(**sizes, interleave_moe_layer_step=2, attention_chunk_size=4)
    return hf.Llama4ForCausalLM(config)


def gpt_neo():
    sizes = {k: v for k, v in SIZES.items() if k not in ("num_hidden_layers", "num_attention_heads")}
    kinds = [[["global", "local"], DEPTH // 2]]
    return hf.GPTNeoForCausalLM(
        hf.GPTNeoConfig(**sizes, num_layers=DEPTH, num_heads=2, attention_types=kinds, window_size=3)
    )


def gpt2(**extra):
    return hf.GPT2LMHeadModel(hf.GPT2Config(n_layer=DEPTH, n_embd=16, n_head=2, vocab_size=31, **extra))


def dinov2(**extra):
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": DEPTH, "image_size": 16, "patch_size": 8}
    return hf.Dinov2Backbone(hf.Dinov2Config(**sizes, **extra))


def longformer():
    sizes = SIZES | {"sep_token_id": 2, "max_position_embeddings": 80}
    return hf.LongformerForMaskedLM(hf.LongformerConfig(**sizes, attention_window=WINDOWS))


MODELS = {
    "deepseek_v3": lambda: deepseek(2),
    "qwen2_moe": lambda: qwen_moe(mlp_only_layers=[0, 3]),
    "qwen2_moe_all_dense": lambda: qwen_moe(mlp_only_layers=list(range(DEPTH))),
    "smollm3": lambda: hf.SmolLM3ForCausalLM(hf.SmolLM3Config(**DECODER)),
    "llama4": llama4,
    "gpt_neo": gpt_neo,
    "gpt2": gpt2,
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**DECODER, head_dim=8, sliding_window=3)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**DECODER, head_dim=8, sliding_window=3)),
    "longformer": longformer,
}
WINDOWED = "llama4", "gemma2", "gemma3"  # transformers can't mask a batch of them under torch before 2.5
CASES = [pytest.param(name, marks=[since_torch(2, 5)] if name in WINDOWED else []) for name in MODELS]


def seq2seq(model, config, encoder=DEPTH, decoder=DEPTH, **extra):
    depths = {"encoder_layers": encoder, "decoder_layers": decoder}
    if config is hf.ProphetNetConfig:
        depths = {f"num_{name}": depth for name, depth in depths.items()} | {"num_buckets": 8, "ngram": 2}
    return model(config(**SEQ2SEQ | depths | extra))


STACKS = {
    "bart": lambda **d: seq2seq(hf.BartForConditionalGeneration, hf.BartConfig, **d),
    "mbart": lambda **d: seq2seq(hf.MBartForConditionalGeneration, hf.MBartConfig, **d),
    "pegasus": lambda **d: seq2seq(hf.PegasusForConditionalGeneration, hf.PegasusConfig, **d),
    "m2m_100": lambda **d: seq2seq(hf.M2M100ForConditionalGeneration, hf.M2M100Config, **d),
    "marian": lambda **d: seq2seq(hf.MarianMTModel, hf.MarianConfig, decoder_vocab_size=31, **d),
    "prophetnet": lambda **d: seq2seq(hf.ProphetNetForConditionalGeneration, hf.ProphetNetConfig, **d),
    "led": lambda **d: seq2seq(
        hf.LEDForConditionalGeneration,
        hf.LEDConfig,
        **d,
        attention_window=WINDOWS[: d.get("encoder", DEPTH)],
        max_encoder_position_embeddings=64,
        max_decoder_position_embeddings=64,
    ),
    "whisper": lambda **d: seq2seq(
        hf.WhisperForConditionalGeneration,
        hf.WhisperConfig,
        **d,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=32,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    ),
}


def sharpened(make):
    """A model in evaluation whose blocks all have different, large weights."""
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    return model


def by_hand(teacher, blocks):
    """The teacher with other blocks in its lists. Some models read the depth and `layer_types` when they run."""
    model = copy.deepcopy(teacher)
    for name, found in block_lists(model).items():
        parent, _, child = name.rpartition(".")
        chosen = blocks(len(found)) if callable(blocks) else blocks
        setattr(model.get_submodule(parent), child, nn.ModuleList(found[i] for i in chosen))
        if len(block_lists(teacher)) == 1:
            model.config.num_hidden_layers = len(chosen)
            if getattr(model.config, "layer_types", None):
                model.config.layer_types = [model.config.layer_types[i] for i in chosen]
    return model


def outputs(model):
    tokens = torch.arange(3, 27).reshape(2, 12)
    inputs = {"input_ids": tokens}
    if model.config.model_type == "whisper":
        inputs = {"input_features": torch.linspace(-1.0, 1.0, 2 * 8 * 32).reshape(2, 8, 32)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens
    if model.config.model_type != "longformer":
        inputs["use_cache"] = False  # blocks of a shortened list keep their old cache indices
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("blocks", [[0, 3, 4, 7], [1, 2, 6]])
@pytest.mark.parametrize("model", CASES)
def test_a_student_computes_what_the_teacher_with_only_the_kept_blocks_computes(model, blocks, tmp_path):
    teacher = sharpened(MODELS[model])
    student = kdloss.keep_blocks(teacher, blocks)
    assert torch.equal(outputs(student), outputs(by_hand(teacher, blocks)))
    student.save_pretrained(tmp_path)
    loaded = type(student).from_pretrained(tmp_path).eval()
    assert torch.equal(outputs(loaded), outputs(student))


def both_ends(depth):
    return [1, depth - 1]


@pytest.mark.parametrize("depths", [{"encoder": 6, "decoder": 3}, {"encoder": 3, "decoder": 6}], ids=str)
@pytest.mark.parametrize("model", STACKS)
def test_both_stacks_of_an_encoder_decoder_are_cut_whatever_their_depths(model, depths):
    teacher = sharpened(lambda: STACKS[model](**depths))
    student = kdloss.keep_blocks(teacher, both_ends)
    assert sorted(len(found) for found in block_lists(student).values()) == [2, 2]
    assert torch.equal(outputs(student), outputs(by_hand(teacher, both_ends)))


def test_a_decoder_alone_is_cut_by_its_own_depth():
    teacher = seq2seq(hf.BartForCausalLM, hf.BartConfig, encoder=4, decoder=3)
    student = kdloss.keep_blocks(teacher, [0, 2])
    assert (student.config.encoder_layers, student.config.decoder_layers) == (4, 2)
    weights = [block.fc1.weight for block in teacher.model.decoder.layers]
    kept = [block.fc1.weight for block in student.model.decoder.layers]
    assert all(torch.equal(a, b) for a, b in zip(kept, [weights[0], weights[2]], strict=True))


def test_the_configuration_says_of_each_kept_block_what_it_said_in_the_teacher():
    kept = [0, 3, 4, 7]
    assert kdloss.keep_blocks(deepseek(2), kept).config.first_k_dense_replace == 1
    assert kdloss.keep_blocks(qwen_moe(mlp_only_layers=[0, 3]), kept).config.mlp_only_layers == [0, 1]
    teacher = llama4()
    student = kdloss.keep_blocks(teacher, kept)
    assert student.config.moe_layers == [1, 3]
    assert student.config.no_rope_layers == [1, 0, 1, 0] == [teacher.config.no_rope_layers[i] for i in kept]
    assert teacher.config.moe_layers == [1, 3, 5, 7]
    assert kdloss.keep_blocks(gpt_neo(), [1, 3]).config.attention_layers == ["local", "local"]


def test_a_backbones_outputs_are_those_of_the_same_blocks(tmp_path):
    student = kdloss.keep_blocks(dinov2(out_features=["stem", "stage1", "stage4"]), [0, 2, 3])
    assert student.config.out_features == ["stem", "stage1", "stage3"]
    student.save_pretrained(tmp_path)
    assert type(student).from_pretrained(tmp_path).config.out_features == ["stem", "stage1", "stage3"]
    assert kdloss.keep_blocks(dinov2(), [0, 2]).config.out_features == ["stage2"]
    with pytest.raises(ValueError, match=r"outputs \['stage1', 'stage4'\], so blocks \[3\] must be among those kept"):
        kdloss.keep_blocks(dinov2(out_features=["stage1", "stage4"]), [0, 2])


def test_attention_that_is_scaled_by_the_blocks_place_is_refused_except_for_the_first_blocks():
    teacher = sharpened(lambda: gpt2(scale_attn_by_inverse_layer_idx=True))
    with pytest.raises(ValueError, match=r"scale_attn_by_inverse_layer_idx.*\[0, 3\]\}; keep the first ones"):
        kdloss.keep_blocks(teacher, [0, 3])
    student = kdloss.keep_blocks(teacher, [0, 1, 2])
    assert torch.equal(outputs(student), outputs(by_hand(teacher, [0, 1, 2])))


def test_a_block_that_would_have_other_modules_at_its_new_place_is_refused_with_the_parameters_name():
    teacher = qwen_moe(decoder_sparse_step=2)  # every second block is a mixture of experts
    assert len(kdloss.keep_blocks(teacher, [0, 3]).model.layers) == 2
    named = (
        r"student's model\.layers\.0\.mlp\.\S+ would be the teacher's model\.layers\.1\.mlp\.\S+, which doesn't exist"
    )
    with pytest.raises(ValueError, match=named + r".*build the student yourself"):
        kdloss.keep_blocks(teacher, [1, 2])


class Block(nn.Module):
    """A block whose attribute, module or buffer depends on its place in a way that no configuration says."""

    def __init__(self, kind, i):
        super().__init__()
        self.layer_idx = i
        self.inner, self.out = nn.Linear(3, 3), nn.Linear(3, 3)
        if kind == "attribute":
            self.scale = 1.0 / (i + 1)
        if kind == "class":
            self.act = nn.ReLU() if i % 2 else nn.GELU()
        if kind == "buffer":
            self.register_buffer("slope", torch.tensor(0.5**i), persistent=False)
        if kind == "first" and i == 0:
            self.wide = nn.Linear(3, 3)
            del self.out


class Placed(hf.PreTrainedModel):
    config_class = hf.BertConfig

    def __init__(self, config):
        super().__init__(config)
        self.layers = nn.ModuleList(Block(config.hidden_act, i) for i in range(config.num_hidden_layers))
        if config.hidden_act == "outside":
            self.norms = nn.ModuleList(nn.LayerNorm(3) for _ in range(config.num_hidden_layers))
        self.post_init()


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("attribute", r"block 1 .* block 2 .*: scale is 0\.5, in the teacher 0\.33"),
        ("class", r"block 1 .* block 2 .*: act\.class is 'ReLU', in the teacher 'GELU'"),
        ("buffer", r"layers\.1\.slope isn't equal to the teacher's layers\.2\.slope"),
        ("outside", r"the student has no norms\.2\.weight, which the teacher has outside its blocks"),
    ],
)
def test_what_depends_on_a_blocks_place_without_a_word_in_the_configuration_is_refused(kind, named):
    teacher = Placed(hf.BertConfig(num_hidden_layers=4, hidden_act=kind))
    with pytest.raises(ValueError, match=named):
        kdloss.keep_blocks(teacher, [0, 2])
    plain = kdloss.keep_blocks(Placed(hf.BertConfig(num_hidden_layers=4, hidden_act="none")), [0, 2])
    assert len(plain.layers) == 2


def test_a_model_whose_weights_were_rescaled_as_it_ran_is_refused_until_it_ran_in_training_again():
    """RWKV halves the outputs of later blocks in eval mode, by their place, and says so in a flag outside of them."""
    sizes = {"hidden_size": 16, "attention_hidden_size": 16, "intermediate_size": 32, "vocab_size": 31}
    teacher = hf.RwkvForCausalLM(hf.RwkvConfig(**sizes, num_hidden_layers=DEPTH, rescale_every=2))
    tokens = torch.randint(31, (2, 5))
    fresh = kdloss.keep_blocks(teacher, [0, 3, 7]).eval()
    teacher.eval()(tokens)
    with pytest.raises(ValueError, match=r"rwkv\.layers_are_rescaled is True in the teacher and False in a new model"):
        kdloss.keep_blocks(teacher, [0, 3, 7])
    teacher.train()(tokens)
    again = kdloss.keep_blocks(teacher, [0, 3, 7]).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, fresh(tokens).logits)


def test_another_first_block_is_not_mixed_with_the_kept_one():
    teacher = Placed(hf.BertConfig(num_hidden_layers=4, hidden_act="first"))
    assert len(kdloss.keep_blocks(teacher, [0, 2]).layers) == 2
    with pytest.raises(ValueError, match=r"block 0 .* block 1 .*out\.class is None, in the teacher 'Linear'"):
        kdloss.keep_blocks(teacher, [1, 2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_each_tensor_keeps_the_teachers_dtype_and_all_its_digits(dtype, tmp_path):
    torch.manual_seed(0)
    teacher = hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER)).double()
    teacher.save_pretrained(tmp_path)
    teacher = hf.LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    assert teacher.model.rotary_emb.inv_freq.dtype == torch.float32
    student = kdloss.keep_blocks(teacher, "all")
    for (name, ours), (_, theirs) in zip(student.named_buffers(), teacher.named_buffers(), strict=True):
        assert ours.dtype == theirs.dtype, name
    assert torch.equal(outputs(student), outputs(teacher))
