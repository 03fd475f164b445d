"""Distances on queries, keys and values, against the attention of models and against explicit loops."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

import kdloss

IDS = torch.tensor([[5, 3, 8, 1, 9, 2], [4, 4, 7, 6, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
HEADS = 4


def gpt2(width, attention="sdpa", seed=0):
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=10, n_positions=8, n_embd=width, n_layer=2, n_head=HEADS)
    config.initializer_range = 0.5
    config._attn_implementation = attention
    return GPT2Model(config).eval()


def bert(width, attention="sdpa", seed=0):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=10,
        max_position_embeddings=8,
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        intermediate_size=2 * width,
        initializer_range=0.5,
    )
    config._attn_implementation = attention
    return BertModel(config).eval()


def captured(model, names):
    """The concatenated projections of the last block, from a model with fused attention."""
    with torch.no_grad(), kdloss.capture(model, names) as seen:
        model(IDS, attention_mask=MASK)
    return torch.cat([seen[name] for name in names], -1)


FAMILIES = {
    "gpt2": (gpt2, ["h.1.attn.c_attn"], True),
    "bert": (bert, [f"encoder.layer.1.attention.self.{part}" for part in ("query", "key", "value")], False),
}
families = pytest.mark.parametrize("family", FAMILIES)


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def softmax(x):
    e = np.exp(np.array(x) - max(x))
    return e / e.sum()


@families
def test_minilm_of_projections_is_the_kl_of_the_models_attention_probabilities_and_value_relations(family):
    """The value relations, which no model computes, are added by explicit loops."""
    build, names, causal = FAMILIES[family]
    widths = (16, 24)
    features = [captured(build(w, seed=w), names) for w in widths]
    own = []
    for w in widths:
        with torch.no_grad():
            out = build(w, "eager", seed=w)(IDS, attention_mask=MASK, output_attentions=True)
        own.append(out.attentions[-1].double().numpy())
    value = kdloss.distances.minilm(*features, heads=HEADS, mask=MASK.bool(), causal=causal)
    values = [x[..., 2 * w :].double().numpy() for x, w in zip(features, widths, strict=True)]
    expected = np.zeros((2, 6))
    for b, length in enumerate((6, 4)):
        for head in range(HEADS):
            for i in range(length):
                expected[b, i] += kl(own[1][b, head, i], own[0][b, head, i]) / HEADS
                relations = []
                for v, w in zip(values, widths, strict=True):
                    d = w // HEADS
                    part = v[b, :, head * d : (head + 1) * d]
                    others = range(i + 1 if causal else length)
                    relations.append(softmax([part[i] @ part[j] / math.sqrt(d) for j in others]))
                expected[b, i] += kl(relations[1], relations[0]) / HEADS
    np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-6)
    assert expected[MASK.bool()].mean() > 0.05


@families
def test_attention_mse_compares_the_scores_behind_the_models_attention_probabilities(family):
    """Probabilities determine scores up to a constant per query, so the model gives only the centred difference."""
    build, names, causal = FAMILIES[family]
    features = [captured(build(16, seed=seed), names)[..., :32].double() for seed in (1, 2)]
    gap = np.zeros((2, HEADS, 6, 6))
    for sign, seed in ((1, 1), (-1, 2)):
        with torch.no_grad():
            out = build(16, "eager", seed=seed)(IDS, attention_mask=MASK, output_attentions=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            gap += sign * np.log(out.attentions[-1].double().numpy())
    value = kdloss.distances.attention_mse(*features, heads=HEADS, mask=MASK.bool(), causal=causal).numpy()
    for b, i in MASK.nonzero().tolist():
        seen = range(i + 1 if causal else int(MASK[b].sum()))
        spread = np.mean([gap[b, head, i, seen].var() for head in range(HEADS)])
        shift = np.mean([np.mean([_score_gap(features, b, head, i, j) for j in seen]) ** 2 for head in range(HEADS)])
        assert value[b, i] == pytest.approx(spread + shift, rel=1e-4, abs=1e-7)


def _score_gap(features, b, head, i, j):
    scores = [x[b, i, 4 * head : 4 * head + 4] @ x[b, j, 16 + 4 * head : 20 + 4 * head] / 2 for x in features]
    return float(scores[0] - scores[1])


def test_attention_mse_by_hand_with_two_heads_a_mask_and_causality():
    queries = torch.tensor([[1.0, 0.0], [2.0, 1.0], [0.0, 3.0]])  # one number for each head
    keys = torch.tensor([[1.0, 2.0], [3.0, 1.0], [1.0, 1.0]])
    student, teacher = torch.cat([queries, keys], -1), torch.zeros(3, 4)
    # scores by query, head 1: (1, 3, 1), (2, 6, 2), (0, 0, 0); head 2: (0, 0, 0), (2, 1, 1), (6, 3, 3)
    every = kdloss.distances.attention_mse(student, teacher, heads=2)
    torch.testing.assert_close(every, torch.tensor([11 / 6, (44 + 6) / 6, 54 / 6]))
    earlier = kdloss.distances.attention_mse(student, teacher, heads=2, causal=True)
    torch.testing.assert_close(earlier, torch.tensor([1 / 2, (40 / 2 + 5 / 2) / 2, 54 / 6]))
    keep = torch.tensor([True, False, True])
    some = kdloss.distances.attention_mse(student, teacher, heads=2, mask=keep)
    torch.testing.assert_close(some, torch.tensor([2 / 4, 0.0, 45 / 4]))
    # one head of width 2: products (1, 3, 1), (4, 7, 3), (6, 3, 3) over the root of 2
    one = kdloss.distances.attention_mse(student, teacher, heads=1)
    torch.testing.assert_close(one, torch.tensor([11 / 6, 74 / 6, 54 / 6]))


def test_minilm_v2_splits_features_of_any_width_into_its_relation_heads():
    """Twelve columns become four relation heads of width three, however many heads the model has."""
    torch.manual_seed(1)
    student, teacher = torch.randn(4, 36, dtype=torch.float64), torch.randn(4, 24, dtype=torch.float64)
    value = kdloss.distances.minilm_v2(student, teacher, relation_heads=4)
    expected = np.zeros(4)
    for part in range(3):
        for head in range(4):
            for i in range(4):
                rows = []
                for x, d in ((student, 3), (teacher, 2)):
                    start = part * 4 * d + head * d
                    cut = x[:, start : start + d].numpy()
                    rows.append(softmax([cut[i] @ cut[j] / math.sqrt(d) for j in range(4)]))
                expected[i] += kl(rows[1], rows[0]) / 4
    np.testing.assert_allclose(value, expected, rtol=1e-12)


def test_minilm_v2_of_all_parts_is_the_sum_of_minilm_v2_of_each_part():
    student, teacher = torch.randn(2, 5, 24), torch.randn(2, 5, 36)
    together = kdloss.distances.minilm_v2(student, teacher, relation_heads=4)
    separate = [
        kdloss.distances.minilm_v2(s, t, relation_heads=4, parts=1)
        for s, t in zip(student.chunk(3, -1), teacher.chunk(3, -1), strict=True)
    ]
    torch.testing.assert_close(sum(separate), together)
    assert all((x > 0.01).all() for x in separate)


CALLS = [
    partial(kdloss.distances.attention_mse, heads=2),
    partial(kdloss.distances.minilm, heads=2),
    partial(kdloss.distances.minilm_v2, relation_heads=2),
]
every_call = pytest.mark.parametrize("distance", CALLS, ids=lambda x: x.func.__name__)


@every_call
def test_with_causal_later_positions_change_nothing_and_get_no_gradient(distance):
    student, teacher = torch.randn(2, 6, 12, requires_grad=True), torch.randn(2, 6, 12)
    value = distance(student, teacher, causal=True)
    changed = student.detach().clone()
    changed[:, 4:] = 100.0
    torch.testing.assert_close(distance(changed, teacher, causal=True)[:, :4], value[:, :4])
    assert not torch.allclose(distance(changed, teacher)[:, :4], distance(student, teacher)[:, :4])
    slope = torch.autograd.grad(value[:, :4].sum(), student)[0]
    assert not slope[:, 4:].any()
    assert slope[:, :4].any()


@every_call
def test_padding_on_either_side_changes_nothing(distance):
    text, other = torch.randn(1, 4, 12), torch.randn(1, 4, 12)
    for causal in (False, True):
        unpadded = distance(text, other, causal=causal)
        for cut in (slice(0, 4), slice(3, 7)):
            student, teacher, mask = torch.randn(1, 7, 12), torch.randn(1, 7, 12), torch.zeros(1, 7).bool()
            student[:, cut], teacher[:, cut], mask[:, cut] = text, other, True
            value = distance(student, teacher, mask=mask, causal=causal)
            torch.testing.assert_close(value[:, cut], unpadded)
            assert not value[~mask].any()


@every_call
def test_large_scores_and_16_bit_projections_are_computed_in_float32(distance):
    student, teacher = 30 * torch.randn(2, 5, 12), 30 * torch.randn(2, 5, 12)
    rounded = student.half(), teacher.half()
    value = distance(*rounded)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, distance(*(x.double() for x in rounded)).float(), rtol=1e-4, atol=1e-4)


@every_call
def test_widths_that_heads_do_not_divide_and_invalid_heads_are_refused_with_their_values(distance):
    with pytest.raises(ValueError, match=r"multiple of \d+; got 14 \(student\) and 12 \(teacher\)"):
        distance(torch.zeros(3, 14), torch.zeros(3, 12))
    name = "relation_heads" if "relation_heads" in distance.keywords else "heads"
    for wrong in (0, 1.5, True):
        with pytest.raises(ValueError, match=f"got {wrong}"):
            distance.func(torch.zeros(3, 12), torch.zeros(3, 12), **{name: wrong})
