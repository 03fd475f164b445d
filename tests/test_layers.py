"""Selecting blocks, pairing them, and finding them in a model."""

from functools import partial

import numpy as np
import pytest
import torch
from families import ResNet
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import nn

import kdloss
from kdloss.layers.lists import block_lists
from kdloss.layers.names import resolve, unwrap
from kdloss.layers.select import STRATEGIES


def test_strategies_choose_the_blocks_that_the_guide_lists_for_twelve_blocks():
    chosen = {name: kdloss.layers.select(name, 12) for name in STRATEGIES}
    assert chosen == {
        "auto": [0, 3, 6, 9],
        "all": list(range(12)),
        "key": [0, 5, 11],
        "late": [8, 9, 10, 11],
        "last": [11],
    }
    assert kdloss.layers.select("auto", 3) == [0, 1, 2]
    assert kdloss.layers.select([-1, 0], 12) == [11, 0]
    assert kdloss.layers.select(lambda depth: range(0, depth, 5), 12) == [0, 5, 10]


@given(depth=st.integers(1, 100), name=st.sampled_from(sorted(STRATEGIES)))
def test_every_strategy_chooses_existing_blocks_in_ascending_order_at_any_depth(depth, name):
    chosen = kdloss.layers.select(name, depth)
    assert chosen
    assert chosen == sorted(set(chosen))
    assert set(chosen) <= set(range(depth))


@pytest.mark.parametrize(
    ("layers", "error", "match"),
    [
        ("lately", ValueError, r"'lately' is unknown.*'auto', 'all', 'key', 'late', 'last'"),
        ([12], ValueError, r"block 12 does not exist: 12 blocks, -12 to 11"),
        ([-13], ValueError, "-13 does not exist"),
        ([0, -12], ValueError, "twice"),
        ([], ValueError, "empty"),
        ([1.0], TypeError, "integer"),
        ([True], TypeError, "integer"),
    ],
)
def test_an_invalid_selection_is_refused_with_the_valid_choices(layers, error, match):
    with pytest.raises(error, match=match):
        kdloss.layers.select(layers, 12)


def test_pairings_of_four_student_blocks_with_twelve_teacher_blocks():
    def teachers(pairing, **settings):
        pairs = kdloss.layers.pair([0, 1, 2, 3], 4, 12, pairing, **settings)
        assert [w for *_, w in pairs] == [1 / len(pairs)] * len(pairs)
        return [t for _, t, _ in pairs]

    assert teachers("uniform") == [0, 4, 7, 11]  # i * 11 / 3: 0, 3.67, 7.33, 11
    assert teachers("same") == [0, 1, 2, 3]
    assert teachers("first") == [0, 1, 2, 3]
    assert teachers("last") == [8, 9, 10, 11]
    assert teachers("reverse") == [11, 7, 4, 0]
    assert teachers("kept", kept=[0, 3, 6, 9]) == [2, 5, 8, 11]
    assert teachers("all_to_one") == [11, 11, 11, 11]
    assert teachers([(0, 5), (-1, -1)]) == [5, 11]
    assert teachers(lambda selected, s, t: [(i, t - s + i) for i in selected]) == [8, 9, 10, 11]


@given(student=st.integers(1, 40), teacher=st.integers(1, 40))
def test_uniform_pairing_keeps_relative_depths_and_pairs_the_last_blocks(student, teacher):
    pairs = kdloss.layers.pair(list(range(student)), student, teacher)
    partners = [t for _, t, _ in pairs]
    assert partners == sorted(partners)
    assert partners[-1] == teacher - 1
    for s, t, _ in pairs if student > 1 else []:
        assert abs(t - s * (teacher - 1) / (student - 1)) <= 0.5


def test_random_pairing_draws_ascending_blocks_from_torchs_generator_at_every_call():
    draws = {tuple(kdloss.layers.pair([0, 1, 2], 3, 12, "random")) for _ in range(50)}
    assert len(draws) > 10
    assert all([t for _, t, _ in d] == sorted({t for _, t, _ in d}) for d in draws)
    torch.manual_seed(3)
    first = kdloss.layers.pair([0, 1, 2], 3, 12, "random")
    torch.manual_seed(3)
    assert kdloss.layers.pair([0, 1, 2], 3, 12, "random") == first


@pytest.mark.parametrize(
    ("pairing", "error", "match"),
    [
        ("uniformly", ValueError, r"'uniform', 'same'"),
        ("same", ValueError, "pairing='uniform'"),
        ("first", ValueError, "pairing='uniform'"),
        ("last", ValueError, "4 selected"),
        ("random", ValueError, "teacher has 3"),
        ("kept", ValueError, "keep_blocks"),
        ([(0, 3)], ValueError, "teacher block 3 does not exist"),
        ([(4, 0)], ValueError, "student block 4 does not exist"),
        ([(0, 0), (0, 1)], ValueError, r"twice.*pairing=\[\(0, 0, 0\.5\), \(0, 1, 0\.5\)\]"),
        ([(0, 2), (0, -1)], ValueError, "pair twice"),
        ([(0, 0, 0.5), (-4, 0, 0.5)], ValueError, "pair twice"),
        ([(0, 0), (1, 1, 0.5)], TypeError, "all of them with a weight"),
        ([(0, 0, -0.5), (1, 1, 1.0)], ValueError, "at least 0"),
        ([(0, 0, float("nan"))], ValueError, "finite"),
        ([(0, 0, float("inf"))], ValueError, "finite"),
        ([(0, 0, 0.0), (1, 1, 0)], ValueError, "not all 0"),
        ([(0, 0, "1")], TypeError, "numbers"),
        ([(0, 0, True)], TypeError, "numbers"),
        (lambda *_: [(0, 0), (0, 1)], ValueError, "twice"),
        ([(0, 0.5)], TypeError, "integer"),
        ([], TypeError, "pairs"),
        ([0, 1], TypeError, "pairs"),
    ],
)
def test_a_pairing_that_is_invalid_for_a_shallow_teacher_is_refused(pairing, error, match):
    with pytest.raises(error, match=match):
        kdloss.layers.pair([0, 1, 2, 3], 4, 3, pairing)


def test_weights_are_not_normalised_and_allow_several_teacher_blocks_per_student_block():
    pairs = [(3, 1, 2), (3, -1, 0.25), (0, 1, 0)]
    assert kdloss.layers.pair([], 4, 12, pairs) == [(3, 1, 2.0), (3, 11, 0.25), (0, 1, 0.0)]
    assert kdloss.layers.pair([0], 4, 12, lambda selected, s, t: [(0, 0, 0.1)]) == [(0, 0, 0.1)]
    assert kdloss.layers.pair([], 4, 12, [(0, 5), (1, 5)]) == [(0, 5, 0.5), (1, 5, 0.5)]


def test_repr_shows_the_blocks_of_negative_indices_once_depths_are_known():
    cases = [
        (kdloss.FeatureKD([0, -1]), "layers=[0, -1], pairing='uniform', depths=None"),
        (kdloss.FeatureKD([0, -1], depths=(4, 8)), "layers=[0, 3], pairing='uniform', depths=(4, 8)"),
        (kdloss.FeatureKD(pairing=[(-1, -2)], depths=(4, 8)), "layers='auto', pairing=[(3, 6, 1.0)]"),
        (kdloss.FeatureKD(["a.-1"], pairing="same"), "layers=['a.-1'], pairing='same', depths=None"),
    ]
    for criterion, expected in cases:
        assert expected in repr(criterion)


@pytest.mark.parametrize("pairing", ["uniform", "reverse", "all_to_one"])
def test_a_shallower_teacher_is_enough_for_pairings_that_may_repeat_its_blocks(pairing):
    partners = {"uniform": [0, 0, 1, 1], "reverse": [1, 1, 0, 0], "all_to_one": [1] * 4}
    assert [t for _, t, _ in kdloss.layers.pair([0, 1, 2, 3], 4, 2, pairing)] == partners[pairing]


def test_kept_blocks_of_another_teacher_are_refused():
    with pytest.raises(ValueError, match="the teacher it was made from"):
        kdloss.layers.pair([0], 2, 4, "kept", kept=[0, 5])
    with pytest.raises(ValueError, match="the teacher it was made from"):
        kdloss.layers.pair([0], 2, 8, "kept", kept=[0, 3, 5])


def cheapest(cost):
    """Return the cost of the optimal transport, which scipy finds as a linear program over all flows."""
    students, teachers = cost.shape
    rows = [np.kron(np.eye(students)[i], np.ones(teachers)) for i in range(students)]
    columns = [np.kron(np.ones(students), np.eye(teachers)[j]) for j in range(teachers)]
    shares = [1 / students] * students + [1 / teachers] * teachers
    return linprog(cost.ravel(), A_eq=np.array(rows + columns), b_eq=shares).fun


@pytest.mark.parametrize(("students", "teachers"), [(1, 1), (1, 5), (4, 12), (3, 4), (5, 5), (6, 4), (7, 3)])
def test_emd_is_the_optimal_transport_with_uniform_marginals(students, teachers):
    cost = np.random.default_rng(students * teachers).random((students, teachers))
    distances = {(2 * i, j): torch.tensor(c) for (i, j), c in np.ndenumerate(cost)}
    flow = np.zeros_like(cost)
    for s, t, w in kdloss.layers.pair_by_emd({}, {}, distances):
        flow[s // 2, t] = w
    np.testing.assert_allclose(flow.sum(1), 1 / students, rtol=1e-12)
    np.testing.assert_allclose(flow.sum(0), 1 / teachers, rtol=1e-12)
    assert (flow * cost).sum() == pytest.approx(cheapest(cost), rel=1e-9)


def test_emd_refuses_distances_that_are_not_finite():
    with pytest.raises(ValueError, match=r"not finite: \{\(0, 1\): nan\}"):
        kdloss.layers.pair_by_emd({}, {}, {(0, 0): torch.tensor(1.0), (0, 1): torch.tensor(float("nan"))})


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_attention_is_a_softmax_over_teacher_blocks_at_every_position(scale):
    rng = np.random.default_rng(0)
    s, t = rng.normal(size=(2, 3, 4, 5)), rng.normal(size=(6, 3, 4, 5))
    student = {2 * i: torch.tensor(h) for i, h in enumerate(s)}
    teacher = {j: torch.tensor(h) for j, h in enumerate(t)}
    pairs = kdloss.layers.pair_by_attention(
        student, teacher, dict.fromkeys((i, j) for i in student for j in teacher), scale=scale
    )
    scores = np.exp(scale * np.einsum("spqd,tpqd->stpq", s, t))
    expected = scores / scores.sum(1, keepdims=True) / 2
    assert [(i, j) for i, j, _ in pairs] == [(i, j) for i in (0, 2) for j in range(6)]
    for i, j, w in pairs:
        np.testing.assert_allclose(w, expected[i // 2, j], rtol=1e-12)
    with pytest.raises(ValueError, match=r"widths \[5, 7\]"):
        kdloss.layers.pair_by_attention(student, {0: torch.zeros(3, 4, 7)}, {(0, 0): torch.zeros(())})


def test_learned_pairings_may_choose_from_all_teacher_blocks():
    pairs = kdloss.layers.pair([0, 2], 3, 4, kdloss.layers.pair_by_emd)
    assert [p[:2] for p in pairs] == [(s, t) for s in (0, 2) for t in range(4)]
    assert kdloss.layers.pair([0, 2], 3, 4, partial(kdloss.layers.pair_by_attention, scale=0.1)) == pairs


def test_pairing_by_resolution_pairs_the_last_blocks_of_each_common_resolution():
    student = [(16, 16), (8, 8), (8, 8), (2, 2)]
    teacher = [(16, 16), (16, 16), (16, 8), (8, 8), (4, 4)]
    assert kdloss.layers.pair_by_resolution(student, teacher) == [(0, 1, 0.5), (2, 3, 0.5)]
    with pytest.raises(ValueError, match=r"student, \[\(2, 2\)\], and teacher, \[\(16, 16\), \(4, 4\)\]"):
        kdloss.layers.pair_by_resolution([(2, 2)], [(16, 16), (4, 4), (4, 4)])
    with pytest.raises(ValueError, match=r"distill\.prepare\(student, \*\*batch\)"):
        kdloss.layers.pair([0], 2, 2, "resolution")


class Wrapper(nn.Module):
    """A wrapper that holds its model as `module`, like DDP."""

    def __init__(self, module):
        super().__init__()
        self.module = module


class Stack(nn.Module):
    def __init__(self, depth=3):
        super().__init__()
        self.body = nn.ModuleList(nn.Linear(4, 4) for _ in range(depth))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        for block in self.body:
            x = block(x)
        return self.head(x)


def test_wrappers_are_unwrapped_and_their_name_prefixes_ignored():
    model, compiled = Stack(), partial(torch.compile, backend="eager")
    for wrapped in (Wrapper(model), compiled(model), Wrapper(compiled(Wrapper(model)))):
        assert unwrap(wrapped) is model
        assert len(kdloss.layers.find_blocks(wrapped)) == 3
        for name in ("body.1", "module.body.1", "_orig_mod.body.1"):
            assert resolve(wrapped, name) is model.body[1]


def test_blocks_are_found_inside_a_peft_model_and_a_wrapped_model_with_stages():
    from peft import LoraConfig, get_peft_model

    model = Stack()
    block = model.body
    lora = get_peft_model(model, LoraConfig(target_modules=["head"]))
    assert list(kdloss.layers.find_blocks(lora)) == list(block)
    staged = ResNet()
    for wrapped in (staged, Wrapper(staged), torch.compile(staged, backend="eager")):
        assert list(kdloss.layers.find_blocks(wrapped)) == list(kdloss.layers.find_blocks(wrapped, "layer*"))
        assert list(kdloss.layers.find_blocks(wrapped))[:2] == list(staged.layer1)
    assert resolve(lora, "body.2") is block[2]


def test_an_unknown_name_is_refused_with_similar_names():
    with pytest.raises(ValueError, match=r"no module 'body\.7'.*'body\.[012]'"):
        resolve(Stack(), "body.7")


def test_several_lists_of_blocks_are_listed_in_the_error_and_one_can_be_named():
    both = nn.ModuleDict({"left": Stack(2), "right": Stack(5)})
    with pytest.raises(ValueError, match=r"right\.body': 5, 'left\.body': 2.*blocks='right\.body'"):
        kdloss.layers.find_blocks(both)
    assert len(kdloss.layers.find_blocks(both, "right.body")) == 5
    with pytest.raises(ValueError, match="not a list of blocks"):
        kdloss.layers.find_blocks(both, "right.head")


class Block(nn.Module):
    def __init__(self, experts=0):
        super().__init__()
        self.experts = nn.ModuleList(blocks(experts))
        self.linear, self.act, self.out = nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)

    def forward(self, x):
        return self.out(self.act(self.linear(x)))


def blocks(depth):
    return [Block() for _ in range(depth)]


class WithExtras(nn.Module):
    """A model with experts inside its blocks, a stem, and a list of heads."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.body = nn.ModuleList(Block(experts=2) for _ in range(3))
        self.heads = nn.ModuleList(nn.Linear(4, 2) for _ in range(5))


def test_experts_stems_and_lists_of_heads_are_not_blocks():
    model = WithExtras()
    assert list(kdloss.layers.find_blocks(model)) == list(model.body)
    model.body.append(Stack())
    with pytest.raises(ValueError, match=r"\{'body': 4, 'heads': 5\}; say which: blocks='body'"):
        kdloss.layers.find_blocks(model)
    model.heads = None
    with pytest.raises(ValueError, match=r"lists of unequal modules, \{'body': 4\}.*blocks='body'"):
        kdloss.layers.find_blocks(model)


def test_a_second_list_of_blocks_for_multi_token_prediction_is_named_in_the_error():
    model = WithExtras()
    model.multi_token = nn.ModuleList(blocks(1))
    with pytest.raises(ValueError, match=r"\{'body': 3, 'multi_token': 1\}"):
        kdloss.layers.find_blocks(model)


def test_blocks_are_found_in_an_nn_sequential_and_in_numbered_stages():
    def lists(**modules):
        return {name: len(members) for name, members in block_lists(nn.ModuleDict(modules)).items()}

    net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(*blocks(3)), nn.Linear(4, 2))
    assert lists(net=net) == {"net.1": 3}
    assert len(kdloss.layers.find_blocks(nn.Sequential(*blocks(3)))) == 3
    first, second = nn.Sequential(*blocks(1)), nn.Sequential(*blocks(2))
    staged = nn.ModuleDict({"conv2_x": first, "conv3_x": second})
    assert list(kdloss.layers.find_blocks(staged)) == [*first, *second]
    assert lists(conv2_x=first, conv3_x=second) == {"conv*_x": 3}
    stages = {f"block{i}": nn.ModuleDict({"layer": stage}) for i, stage in enumerate((first, second))}
    assert lists(**stages) == {"block*.layer": 3}
    assert lists(stages=nn.ModuleList([first, second])) == {"stages.*": 3}
    assert lists(stages=nn.ModuleList(stages.values())) == {"stages.*.layer": 3}
    assert lists(stages=nn.Sequential(*stages.values())) == {"stages.*.layer": 3}
    assert lists(encoder1=nn.ModuleList(blocks(1)), encoder2=nn.ModuleList(blocks(2))) == {
        "encoder1": 1,
        "encoder2": 2,
    }


def test_blocks_that_are_wrapped_individually_are_still_one_list_of_blocks():
    model = WithExtras()
    model.body[1] = torch.compile(model.body[1], backend="eager")
    model.body[2] = Wrapper(model.body[2])
    assert list(kdloss.layers.find_blocks(model)) == list(model.body)


def test_the_error_for_a_model_without_blocks_says_to_name_modules():
    with pytest.raises(ValueError, match=r"name the modules instead.*layers=\['0'\]"):
        kdloss.layers.find_blocks(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    assert block_lists(nn.ModuleDict({"mixed": nn.ModuleList([nn.ReLU(), nn.Tanh()])})) == {}
