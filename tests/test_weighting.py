"""Terms weighted by their teachers' outputs, compared with explicit formulas in float64."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from families import batch, build
from parts.memory import LiveTensors
from torch import nn

import kdloss
from kdloss import CrossEntropy, Features, LazyLogits, Logits, TokenMap
from kdloss.weighting import Learned, Weighting, confidence, drawn, entropy

N, V = 7, 5
IGNORED = -100


def logits(count, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(*shape, dtype=torch.float64, generator=generator) for _ in range(count)]


def kl(student, teacher, temperature):
    p, log_q = (teacher / temperature).softmax(-1), (student / temperature).log_softmax(-1)
    return temperature**2 * (p * (p.log() - log_q)).sum(-1)


def ca_mkd(teachers, labels):
    losses = torch.stack([F.cross_entropy(t.flatten(0, -2), labels.flatten(), reduction="none") for t in teachers])
    return (1 - losses.exp() / losses.exp().sum(0)) / (len(teachers) - 1)


def logits_terms(count, **settings):
    return sum(Logits(teacher=k, name=f"kd{k}", **settings) for k in range(count))


def assert_same(value, by_hand, leaf):
    torch.testing.assert_close(value, by_hand)
    torch.testing.assert_close(*(torch.autograd.grad(x, leaf, retain_graph=True)[0] for x in (value, by_hand)))


def test_confidence_weights_each_example_by_the_teachers_cross_entropies():
    student, *teachers = logits(4, N, V)
    labels = torch.tensor([0, 1, IGNORED, 3, 4, 0, 1])
    student.requires_grad_()
    criterion = 0.5 * CrossEntropy() + confidence * logits_terms(3, temperature=2.0)
    assert repr(confidence) == "kdloss.weighting.confidence"
    value = criterion(student, teachers, labels)
    keep = labels != IGNORED
    s, ts, y = student[keep], [t[keep] for t in teachers], labels[keep]
    w = ca_mkd(ts, y)
    by_hand = 0.5 * F.cross_entropy(s, y) + sum(w[k] * kl(s, t, 2.0) for k, t in enumerate(ts)).mean()
    assert_same(value, by_hand, student)
    for k in range(3):
        assert torch.isclose(criterion.components[f"kd{k}/share"], w[k].mean())
        assert torch.isclose(criterion.components[f"kd{k}"], kl(s, ts[k], 2.0).mean())


def test_ignored_positions_change_neither_value_nor_gradient():
    student, *teachers = logits(3, N, V)
    labels = torch.tensor([0, 1, IGNORED, 3, 4, IGNORED, 1])
    keep = labels != IGNORED
    expected = (confidence * logits_terms(2))(student[keep], [t[keep] for t in teachers], labels[keep])
    for x in (student, *teachers):
        x[~keep] = math.nan
    student.requires_grad_()
    value = (confidence * logits_terms(2))(student, teachers, labels)
    torch.testing.assert_close(value, expected)
    (gradient,) = torch.autograd.grad(value, student)
    assert gradient.isfinite().all()
    assert (gradient[~keep] == 0).all()


def test_a_share_of_zero_leaves_out_even_an_infinite_term():
    student, first, second = logits(3, N, V)
    student[0, 1], second[0] = -math.inf, torch.tensor([-2000.0, 0, 0, 0, 0])
    labels = torch.zeros(N, dtype=torch.long)  # to which the second teacher gives no probability at position 0
    student.requires_grad_()
    value = (confidence * (Logits(teacher=1, name="b") + Logits(teacher=0, name="a")))(student, [first, second], labels)
    assert value == math.inf  # from the first teacher: it gives class 1 a probability, and the student gives it none
    first[0, 1] = -math.inf
    value = (confidence * logits_terms(2))(student, [first, second], labels)
    (gradient,) = torch.autograd.grad(value, student)
    assert value.isfinite()
    assert gradient.isfinite().all()


def test_no_gradient_passes_through_the_shares():
    student, *teachers = logits(3, N, V)
    scale = torch.ones((), requires_grad=True)
    weighting = Weighting(lambda z, y: z[:, 0], lambda scores: (scale * scores).softmax(0))
    student.requires_grad_()
    (weighting * logits_terms(2))(student, teachers, torch.zeros(N, dtype=torch.long)).backward()
    assert scale.grad is None
    assert student.grad is not None


def test_entropy_gives_teachers_of_lower_entropy_larger_weights_and_needs_no_labels():
    student, *teachers = logits(3, N, V)
    student.requires_grad_()
    value = (entropy * logits_terms(2))(student, teachers)
    h = torch.stack([-(t.softmax(-1) * t.log_softmax(-1)).sum(-1) for t in teachers])
    w = 1 - h.exp() / h.exp().sum(0)
    assert_same(value, (w[0] * kl(student, teachers[0], 1.0) + w[1] * kl(student, teachers[1], 1.0)).mean(), student)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_shares_apply_under_every_reduction(reduction):
    student, *teachers = logits(3, 2, 4, V)
    labels = torch.randint(0, V, (2, 4))
    student.requires_grad_()
    value = kdloss.Sum(confidence * logits_terms(2), reduction=reduction)(student, teachers, labels)
    w = ca_mkd(teachers, labels).reshape(2, 2, 4)
    by_hand = sum(w[k] * kl(student, t, 1.0) for k, t in enumerate(teachers))
    assert_same(value.sum(), by_hand.sum(), student)
    assert value.shape == ((2, 4) if reduction == "none" else ())


def test_maps_are_weighted_along_the_class_dimension_of_their_layout():
    student, *teachers = logits(3, 2, V, 3, 2)
    labels = torch.randint(0, V, (2, 3, 2))
    labels[0, 0, 0] = V - 1  # no index along a map's width or height
    value = kdloss.Sum(confidence * logits_terms(2), layout="b c h w")(student, teachers, labels)
    last = [x.movedim(1, -1) for x in (student, *teachers)]
    w = ca_mkd(last[1:], labels).reshape(2, 2, 3, 2)
    torch.testing.assert_close(value, sum(w[k] * kl(last[0], t, 1.0) for k, t in enumerate(last[1:])).mean())


def test_micro_batches_add_up_to_one_batch():
    student, *teachers = logits(3, N, V)
    labels = torch.randint(0, V, (N,))
    criterion = confidence * logits_terms(2)
    full = criterion(student, teachers, labels)
    parts = [slice(0, 3), slice(3, N)]
    sizes = {"num_items_in_batch": N}
    added = sum(criterion(student[p], [t[p] for t in teachers], labels[p], **sizes) for p in parts)
    torch.testing.assert_close(added, full)


def test_features_are_weighted_by_the_share_of_their_position():
    class Output:
        def __init__(self, hidden, logits):
            self.hidden_states, self.logits = [hidden] * 2, logits

    s, t0, t1, h, h0, h1 = *logits(3, 2, 4, V), *logits(3, 2, 4, 6, seed=1)
    labels = torch.randint(0, V, (2, 4))
    h.requires_grad_()
    terms = Features("last", teacher=0, name="f0") + Features("last", teacher=1, name="f1")
    value = (CrossEntropy() + confidence * (3.0 * terms))(Output(h, s), [Output(h0, t0), Output(h1, t1)], labels)
    w = ca_mkd([t0, t1], labels).reshape(2, 2, 4)
    gaps = [(h - x).square().mean(-1) for x in (h0, h1)]
    by_hand = F.cross_entropy(s.flatten(0, 1), labels.flatten()) + 3 * (w[0] * gaps[0] + w[1] * gaps[1]).mean()
    assert_same(value, by_hand, h)


def test_a_scalar_term_is_weighted_by_the_mean_share():
    student, *teachers = logits(3, N, V)
    labels = torch.randint(0, V, (N,))

    class Gap(kdloss.terms.Term):
        def loss(self, step):
            return (step.student_logits() - step.teacher).square().mean()

    value = (confidence * (Gap(name="a", teacher=0) + Gap(name="b", teacher=1)))(student, teachers, labels)
    w = ca_mkd(teachers, labels).mean(1)
    gaps = [(student - t).square().mean() for t in teachers]
    torch.testing.assert_close(value, w[0] * gaps[0] + w[1] * gaps[1])


def test_lazy_teachers_are_weighted_like_their_full_logits():
    hidden, heads = logits(3, 2, 6, 4), logits(3, V, 4, seed=1)
    labels = torch.randint(0, V, (2, 6))
    hidden[0].requires_grad_()
    lazy = [LazyLogits(h, w) for h, w in zip(hidden, heads, strict=True)]
    criterion = kdloss.Sum(CrossEntropy() + confidence * logits_terms(2), causal=True)
    value = criterion(lazy[0], lazy[1:], labels)
    by_hand = criterion(hidden[0] @ heads[0].T, [h @ w.T for h, w in zip(hidden[1:], heads[1:], strict=True)], labels)
    assert_same(value, by_hand, hidden[0])


def test_scores_of_any_number_of_lazy_teachers_take_the_memory_of_one_block():
    def peak(count):
        torch.manual_seed(0)
        lazy = [LazyLogits(torch.randn(4096, 4), torch.randn(8192, 4)) for _ in range(count + 1)]
        lazy[0].hidden.requires_grad_()
        with LiveTensors() as live:
            (confidence * logits_terms(count))(lazy[0], lazy[1:], torch.zeros(4096, dtype=torch.long)).backward()
        return live.peak

    one = peak(1)
    assert one < 4096 * 8192 * 4
    assert peak(3) < 1.1 * one


def test_scores_computed_in_several_blocks_equal_those_of_one_block():
    student, *teachers = logits(3, 2500, 3)
    labels = torch.randint(0, 3, (2500,))
    value = (confidence * logits_terms(2))(student, teachers, labels)
    w = ca_mkd(teachers, labels)
    torch.testing.assert_close(value, sum(w[k] * kl(student, t, 1.0) for k, t in enumerate(teachers)).mean())


def test_a_teacher_with_another_vocabulary_is_scored_by_its_own_token_ids():
    student, first, second = *logits(2, N, V), *logits(1, N, 4, seed=1)
    tokens = TokenMap(torch.tensor([0, 1, 3]), torch.tensor([2, 0, 1]))
    labels = torch.tensor([0, 1, 3, 0, 1, 3, 0])
    student.requires_grad_()
    terms = Logits(teacher=0, name="a") + Logits(teacher=1, name="b", vocabulary=tokens)
    value = (confidence * terms)(student, [first, second], labels)
    mapped = torch.tensor([2, 0, 1, 2, 0, 1, 2])
    losses = [F.cross_entropy(first, labels, reduction="none"), F.cross_entropy(second, mapped, reduction="none")]
    w = 1 - torch.stack(losses).softmax(0)
    shared = kl(student[:, [0, 1, 3]], second[:, [2, 0, 1]], 1.0)
    assert_same(value, (w[0] * kl(student, first, 1.0) + w[1] * shared).mean(), student)


def test_a_label_outside_a_teachers_vocabulary_is_scored_like_a_uniform_prediction():
    student, first, second = *logits(2, N, V), *logits(1, N, 4, seed=1)
    labels = torch.tensor([0, 1, 3, 0, 1, 3, 4])
    terms = Logits(teacher=0, name="a") + Logits(teacher=1, name="b", vocabulary=kdloss.truncate)
    value = (confidence * terms)(student, [first, second], labels)
    inside = F.cross_entropy(second[:-1], labels[:-1], reduction="none")
    losses = [F.cross_entropy(first, labels, reduction="none"), torch.cat([inside, torch.tensor([math.log(4)])])]
    w = 1 - torch.stack(losses).softmax(0)
    by_hand = w[0] * kl(student, first, 1.0) + w[1] * kl(student[:, :4], second, 1.0)
    torch.testing.assert_close(value, by_hand.mean())


def test_learned_weights_depend_on_the_labels_and_not_on_the_student():
    student, *teachers = logits(3, N, V)
    labels = torch.tensor([0, 1, IGNORED, 3, 4, 0, 1])
    learned = Learned(2, momentum=0.8).double()
    criterion = learned * logits_terms(2)
    weights = torch.full((2,), 0.5, dtype=torch.float64)
    keep = labels != IGNORED
    for seed in range(3):
        student = logits(1, N, V, seed=seed)[0].requires_grad_()
        value = criterion(student, teachers, labels)
        by_hand = sum(weights[k] * kl(student, t, 1.0)[keep] for k, t in enumerate(teachers)).mean()
        assert_same(value, by_hand, student)
        probabilities = torch.stack([t.softmax(-1)[keep, labels[keep]] for t in teachers]) * weights[:, None]
        weights = 0.8 * weights + 0.2 * (probabilities / probabilities.sum(0)).mean(1)
        torch.testing.assert_close(learned.weights, weights)
    assert not weights.isclose(torch.tensor(0.5).double()).any()
    assert [*criterion.state_dict()] == ["weightings.0.weights"]
    restored = Learned(2).double() * logits_terms(2)
    restored.load_state_dict(criterion.state_dict())
    torch.testing.assert_close(next(iter(restored.weights.values())).weighting.weights, weights)


def test_learned_weights_do_not_change_in_evaluation_without_gradients_or_without_labels():
    student, *teachers = logits(3, N, V)
    criterion = Learned(2) * logits_terms(2)
    before = copy.deepcopy(criterion.state_dict())
    criterion(student, teachers, torch.full((N,), IGNORED))
    criterion.eval()
    criterion(student, teachers, torch.zeros(N, dtype=torch.long))
    with torch.no_grad():
        criterion.train()(student, teachers, torch.zeros(N, dtype=torch.long))
    assert all(torch.equal(x, before[name]) for name, x in criterion.state_dict().items())


def test_a_teacher_that_is_not_drawn_does_not_run():
    runs = []

    class Model(nn.Linear):
        def forward(self, x):
            runs.append(self)
            return super().forward(x)

    teachers, student = [Model(3, V), Model(3, V)], nn.Linear(3, V)
    first, second = drawn([0.5, 0.5], seed=1)
    criterion = CrossEntropy() + first * Logits(teacher=0) + second * Logits(teacher=1, name="second")
    distill, x, labels = kdloss.Distiller(teachers, criterion), torch.randn(4, 3), torch.zeros(4, dtype=torch.long)
    seen = []
    for step in range(20):
        runs.clear()
        out = distill(student, x, labels=labels)
        (ran,) = runs
        assert ("second" in out.components) == (ran is teachers[1])
        assert first(step) + second(step) == 1
        seen.append(ran)
        criterion.advance()
    assert 4 < seen.count(teachers[0]) < 16


@pytest.mark.parametrize("weighting", [confidence, entropy, Learned(2)], ids=str)
def test_a_weighted_sum_compiles_without_a_graph_break(weighting):
    student, *teachers = (x.float() for x in logits(3, 2, 4, V))
    labels = torch.randint(0, V, (2, 4))
    labels[0, 1] = IGNORED
    student.requires_grad_()
    criterion = kdloss.Sum(CrossEntropy() + weighting * logits_terms(2), causal=True)
    compiled = torch.compile(lambda s, *t: criterion(s, [*t], labels), fullgraph=True, backend="eager")
    criterion.eval()  # so that Learned does not change its weights between the two calls
    assert_same(compiled(student, *teachers), criterion(student, teachers, labels), student)


def test_draws_follow_their_probabilities():
    first, second, third = drawn([0.7, 0.3, 0.0])
    count = sum(first(step) for step in range(2000))
    assert abs(count - 1400) < 100
    assert not any(third(step) for step in range(2000))
    assert [second(step) for step in range(50)] == [drawn([0.7, 0.3, 0.0])[1](step) for step in range(50)]


@pytest.mark.filterwarnings("ignore:.*loss_type=None.*")
def test_a_distiller_with_two_teachers_of_other_sizes_gives_the_loss_of_their_outputs():
    student = build("gpt2", width=16, depth=2)
    teachers = [build("gpt2", width=24, depth=3, seed=1), build("gpt2", width=16, depth=3, seed=2).bfloat16()]
    features = [Features(pairing=[(0, 1)], teacher=k, name=f"f{k}") for k in range(2)]
    criterion = CrossEntropy() + confidence * (logits_terms(2) + sum(features))
    distill = kdloss.Distiller(teachers, criterion).prepare(student)
    data = batch("gpt2")
    out = distill(student, **data)
    out.loss.backward()
    with torch.no_grad():
        inputs = {name: x for name, x in data.items() if name != "labels"}
        theirs = [t.eval()(**inputs, output_hidden_states=True) for t in teachers]
        mine = student(**inputs, output_hidden_states=True)
        expected = kdloss.Sum(criterion, causal=True)(mine, theirs, data["labels"])
    torch.testing.assert_close(out.loss.detach(), expected, rtol=1e-4, atol=1e-5)
    shares = [out.components[f"kd{k}/share"] for k in range(2)]
    assert torch.isclose(sum(shares), torch.ones(()))
    assert criterion.terms["f0"].projections["0"].weight.grad.abs().sum() > 0


def test_a_teacher_that_is_weighted_by_its_logits_is_not_stopped_early():
    features = sum(Features(["0"], pairing="same", teacher=k, name=f"f{k}") for k in range(2))
    student, *teachers = (nn.Sequential(nn.Linear(3, 4), nn.Linear(4, V)) for _ in range(3))
    x, labels = torch.randn(6, 3), torch.randint(0, V, (6,))
    out = kdloss.Distiller(teachers, CrossEntropy() + confidence * features)(student, x, labels=labels)
    w = ca_mkd([t(x) for t in teachers], labels)
    torch.testing.assert_close(out.components["f0/share"], w[0].mean())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: confidence * CrossEntropy(), "reads none"),
        (lambda: confidence * Logits(teacher="all"), "reads several"),
        (lambda: confidence * (entropy * Logits()), "one weighting"),
        (lambda: drawn([0.5, 0.6]), "sum to 1"),
        (lambda: drawn([1.5, -0.5]), "non-negative"),
        (lambda: drawn([]), "no teacher"),
        (lambda: Learned(0), "one teacher at least"),
        (lambda: drawn([0.0, 0.0]), "sum to 1"),
    ],
)
def test_invalid_weightings_are_refused_at_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_weighting_passed_instead_of_numbers_is_refused_with_the_correct_form():
    with pytest.raises(TypeError, match=r"kdloss.weighting.confidence \* \(kdloss.Logits"):
        kdloss.MultiTeacherKD(confidence)


@pytest.mark.parametrize(
    ("weighting", "error", "message"),
    [
        (Weighting(lambda z, y: z[:, 0], lambda s: s - s.mean(0)), ValueError, "non-negative and add up to 1"),
        (Weighting(lambda z, y: z[:, 0], torch.zeros_like), ValueError, "add up to 1"),
        (Weighting(lambda z, y: z[:, 0], lambda s: s[0]), ValueError, "one for each"),
        (Weighting(lambda z, y: z, lambda s: s.softmax(0)), ValueError, "return one for each"),
        (Learned(3), ValueError, "as many teachers"),
    ],
)
def test_invalid_shares_are_refused(weighting, error, message):
    student, *teachers = logits(3, N, V)
    with pytest.raises(error, match=message):
        (weighting * logits_terms(2))(student, teachers, torch.zeros(N, dtype=torch.long))


def test_confidence_without_valid_labels_or_with_top_k_logits_is_refused():
    student, *teachers = logits(3, N, V)
    with pytest.raises(ValueError, match="needs labels"):
        (confidence * logits_terms(2))(student, teachers)
    with pytest.raises(ValueError, match="labels that are classes"):
        (confidence * logits_terms(2))(student, teachers, student.softmax(-1))
    with pytest.raises(ValueError, match="label"):
        (confidence * logits_terms(2))(student, teachers, torch.full((N,), V))
    stored = [kdloss.TopKLogits.of(t, k=2) for t in teachers]
    with pytest.raises(TypeError, match="all classes"):
        (confidence * logits_terms(2))(student, stored, torch.zeros(N, dtype=torch.long))


def test_a_single_teacher_has_weight_one():
    student, teacher = logits(2, N, V)
    labels = torch.randint(0, V, (N,))
    for weighting in (confidence, entropy, Learned(1)):
        torch.testing.assert_close((weighting * Logits())(student, teacher, labels), kl(student, teacher, 1.0).mean())
