"""Counted floating-point operations of training steps, compared with counts by hand."""

import pytest
import torch
from parts import operations
from torch.nn.functional import scaled_dot_product_attention
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import kdloss

ROWS, TOKENS = 3, 24
ENDS = {"bos_token_id": 0, "eos_token_id": 0}


def gpt2(layers, width, vocabulary=50):
    plain = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    shape = {"n_layer": layers, "n_embd": width, "n_head": 2, "n_positions": TOKENS}
    return GPT2LMHeadModel(GPT2Config(**shape, vocab_size=vocabulary, **plain, **ENDS))


def llama():
    """Four query heads share two heads of keys and values."""
    shape = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "vocab_size": 50, "max_position_embeddings": TOKENS}
    return LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=False, **ENDS))


def batch_of(rows=ROWS, vocabulary=50):
    tokens = torch.randint(vocabulary, [rows, TOKENS])
    return {"input_ids": tokens, "labels": tokens}


def operations_of(student, teacher, criterion, batches):
    """Count the operations as the applications do."""
    distill = kdloss.Distiller(teacher, criterion).prepare(student)
    return 1e12 * operations.of_training(lambda batch: distill(student, **batch).loss.backward(), batches)


def by_hand(layers, width, block_weights, vocabulary=50, rows=ROWS, *, trained=True):
    """Count 6 operations per weight and token in training, 2 in a teacher's pass, and those of attention.

    The head skips the last token of every row, which has no label, and computes one position more (`kdloss.lazy_head`).
    Attention is two products, queries with keys and probabilities with values. The backward pass computes the scores
    again, and two products for each of the two.
    """
    tokens = rows * TOKENS
    products, attention = (6, 4 + 10) if trained else (2, 4)
    in_blocks = layers * (products * block_weights * tokens + attention * rows * TOKENS**2 * width)
    return in_blocks + width * vocabulary * (products * rows * (TOKENS - 1) + 2)


GPT2_BLOCK = 12 * 16**2  # queries, keys, values, output; an MLP four times as wide
LLAMA_BLOCK = 16 * (16 + 8 + 8 + 16) + 3 * 16 * 40


@pytest.mark.parametrize(
    ("model", "layers", "block_weights"), [(lambda: gpt2(2, 16), 2, GPT2_BLOCK), (llama, 3, LLAMA_BLOCK)]
)
def test_a_step_without_a_teacher_takes_6_operations_per_weight_and_token_plus_attention(model, layers, block_weights):
    operations_of_step = operations_of(model(), None, kdloss.VanillaKD(alpha=1.0), [batch_of()])
    assert operations_of_step == pytest.approx(by_hand(layers, 16, block_weights))


@pytest.mark.parametrize("model", [lambda: gpt2(2, 16), llama])
def test_a_teacher_adds_its_forward_pass(model):
    student, teacher, batches = model(), gpt2(5, 32), [batch_of()]
    alone = operations_of(student, None, kdloss.VanillaKD(alpha=1.0), batches)
    of_teacher = by_hand(5, 32, 12 * 32**2, trained=False)
    assert operations_of(student, teacher, kdloss.VanillaKD(1.0, 0.1), batches) == pytest.approx(alone + of_teacher)
    assert operations_of(student, teacher, kdloss.VanillaKD(alpha=1.0), batches) == pytest.approx(alone)  # does not run


def test_features_add_the_blocks_that_run_and_the_projection():
    student, teacher, batches = gpt2(2, 16), gpt2(5, 32), [batch_of()]
    alone = operations_of(student, None, kdloss.VanillaKD(alpha=1.0), batches)
    criterion = kdloss.FeatureKD(pairing=[(1, 2)])
    three_blocks = by_hand(3, 32, 12 * 32**2, vocabulary=0, trained=False)
    projection = 6 * 16 * 32 * ROWS * (TOKENS - 1)  # last tokens have no label, so their features do not count
    assert operations_of(student, teacher, criterion, batches) == pytest.approx(alone + three_blocks + projection)


def test_a_head_computed_in_blocks_takes_the_operations_of_one_product():
    many, large = 48, 64  # more positions than a block of the engine has
    shape = {"layers": 1, "width": 16, "vocabulary": large}
    total = operations_of(gpt2(**shape), gpt2(**shape), kdloss.VanillaKD(1.0, 0.1), [batch_of(many, large)])
    both = [by_hand(block_weights=GPT2_BLOCK, rows=many, trained=trained, **shape) for trained in (True, False)]
    assert total == pytest.approx(sum(both))


def test_attention_is_counted_in_fused_and_plain_kernels():
    query, key, value = (torch.randn(2, 4, n, d, requires_grad=True) for n, d in ((5, 8), (9, 8), (9, 8)))

    def work(kernel):
        with torch.nn.attention.sdpa_kernel(kernel):
            scaled_dot_product_attention(query, key, value).sum().backward()

    fused, plain = (
        operations.counted(lambda kernel=kernel: work(kernel))
        for kernel in (torch.nn.attention.SDPBackend.FLASH_ATTENTION, torch.nn.attention.SDPBackend.MATH)
    )
    scores = 2 * 2 * 4 * 5 * 9 * 8
    assert plain == 6 * scores
    assert fused == 7 * scores  # it does not store the scores and computes them twice


def test_every_batch_is_counted_and_only_one_of_each_shape_is_run():
    ran = []

    def step(batch):
        ran.append(len(batch["input_ids"]))
        torch.ones(len(batch["input_ids"]), 5) @ torch.ones(5, 7)

    rows = [4, 4, 4, 1, 4, 1]
    total = operations.of_training(step, [{"input_ids": torch.zeros(n, 3)} for n in rows])
    assert 1e12 * total == pytest.approx(2 * sum(rows) * 5 * 7)
    assert ran == [4, 4, 1]  # the first batch also runs once uncounted
