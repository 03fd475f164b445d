"""Logits whose classes are not the last axis: described by a pattern, recognised by the labels, or refused."""

from types import SimpleNamespace as Output

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from stepping import Steps, holds_to, kl, recipe
from torch import nn
from torch.optim import SGD

import kdloss
from kdloss import CrossEntropy, Distillation, Features, LazyLogits, Logits, Sum, Task, TopKLogits, distances

SIZES = {"b": 3, "c": 5, "d": 2, "h": 4, "w": 6, "t": 4}
LAYOUTS = ["b c h w", "b h w c", "b c t", "t b c", "b c d h w", "c b", "w c b h", "t b d"]


def batch(pattern, seed=0, **sizes):
    """Logits of student and teacher in a layout, labels, a mask, and the names of the axes of the positions."""
    draw = torch.Generator().manual_seed(seed)
    names = pattern.split()
    classes = "c" if "c" in names else "d"
    sizes = SIZES | ({"d": 5} if classes == "d" else {}) | sizes
    shape = [sizes[n] for n in names]
    s, t = (torch.randn(*shape, generator=draw).double() for _ in range(2))
    positions = ["b", *(n for n in names if n not in ("b", classes))]
    last = [rearrange(x, f"{pattern} -> {' '.join(positions)} {classes}") for x in (s, t)]
    labels = torch.randint(0, sizes[classes], last[0].shape[:-1], generator=draw)
    labels.flatten()[1] = 255
    mask = torch.rand(labels.shape, generator=draw) > 0.2
    return s.requires_grad_(), t, labels, mask, positions


def by_hand(s, t, labels, mask, pattern, positions, temperature=2.0, alpha=0.3):
    """Cross-entropy and KL at every position that counts, in plain torch."""
    classes = next(n for n in pattern.split() if n == ("c" if "c" in pattern.split() else "d"))
    s, t = (rearrange(x, f"{pattern} -> {' '.join(positions)} {classes}") for x in (s, t))
    keep = (labels != 255) & mask
    ce = F.cross_entropy(s[keep], labels[keep], reduction="none")
    values = alpha * ce + (1 - alpha) * kl(s[keep], t[keep], temperature)
    return torch.zeros(labels.shape, dtype=s.dtype).masked_scatter(keep, values), keep


@pytest.mark.parametrize("pattern", LAYOUTS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_stated_layout_gives_the_value_and_gradient_of_permuted_logits(pattern, reduction):
    s, t, labels, mask, positions = batch(pattern)
    settings = {"ignore_index": 255, "reduction": reduction, "layout": pattern, "check_finite": True}
    criterion = kdloss.VanillaKD(2.0, 0.3, **settings)
    loss = criterion(s, t, labels, mask=mask)
    values, keep = by_hand(s, t, labels, mask, pattern, positions)
    expected = values if reduction == "none" else values.sum() / keep.sum()
    assert loss.shape == (labels.shape if reduction == "none" else ())
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    weight = torch.randn(loss.shape).double()
    ours, expected_gradient = (torch.autograd.grad((x * weight).sum(), s)[0] for x in (loss, expected))
    torch.testing.assert_close(ours, expected_gradient, rtol=1e-9, atol=1e-12)
    assert ours.shape == s.shape


@pytest.mark.parametrize(
    "settings", [{"overwrite_logits": True}, {"positions": "mask"}, {"several": True}, {"part": 1}]
)
def test_a_layout_applies_to_every_term_on_logits_with_any_other_setting(settings):
    s, t, labels, mask, _ = batch("b c h w")
    pattern, settings = "b c h w", dict(settings)
    several, part = settings.pop("several", False), settings.pop("part", None)
    teacher = "all" if several else 0
    weights = {"weights": [0.25, 0.75]} if several else {}
    where = settings.pop("positions", "labels")
    takes = {"take": part, "teacher_take": None}
    criterion = Sum(
        0.3 * CrossEntropy(take=part),
        0.7 * Logits(temperature=2.0, teacher=teacher, positions=where, **weights, **takes),
        ignore_index=255,
        layout=pattern,
        **settings,
    )
    teachers = [t, t.flip(0)] if several else t
    logits = s.clone() if settings else s
    out = (None, logits) if part else logits
    loss = criterion(out, teachers, labels, mask=mask)
    s2, t2 = (x.movedim(1, -1) for x in (s, t))
    keep = (labels != 255) & mask
    at = mask if where == "mask" else keep
    if several:
        mixed = 0.25 * (t2 / 2).softmax(-1) + 0.75 * (t2.flip(0) / 2).softmax(-1)
        kd = 4 * (mixed * (mixed.log() - (s2 / 2).log_softmax(-1))).sum(-1)
    else:
        kd = kl(s2, t2, 2.0)
    expected = 0.3 * F.cross_entropy(s2[keep], labels[keep]) + 0.7 * kd[at].mean()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(x, s)[0] for x in (loss, expected)), rtol=1e-9, atol=1e-12)


def test_a_teacher_may_have_another_layout_and_a_sum_of_sums_keeps_both_layouts():
    s, t, labels, mask, positions = batch("b c h w")
    values, keep = by_hand(s, t, labels, mask, "b c h w", positions)
    settings = {"layout": "b c h w", "teacher_layout": "b h w c", "ignore_index": 255}
    terms = 0.3 * CrossEntropy(), 0.7 * Logits(temperature=2.0)
    permuted = rearrange(t, "b c h w -> b h w c")
    for criterion in (
        Sum(*terms, **settings),
        2.0 * Sum(*(0.5 * term for term in terms), **settings),
        kdloss.VanillaKD(2.0, 0.3, **settings),
        kdloss.MultiTeacherKD(temperature=2.0, alpha=0.3, **settings),
    ):
        teacher = [permuted] if isinstance(criterion, kdloss.MultiTeacherKD) else permuted
        torch.testing.assert_close(criterion(s, teacher, labels, mask=mask), values.sum() / keep.sum())
        assert "layout='b c h w', teacher_layout='b h w c'" in repr(criterion)
    teacher_last = kdloss.VanillaKD(2.0, 0.3, layout="b c h w", teacher_layout=None, ignore_index=255)
    torch.testing.assert_close(teacher_last(s, permuted, labels, mask=mask), values.sum() / keep.sum())


def test_causal_logits_with_time_first_shift_along_time():
    s, t, labels, mask, _ = batch("t b c", b=2, t=5)
    labels[labels == 255] = -100
    criterion = kdloss.VanillaKD(2.0, 0.3, causal=True, layout="t b c")
    s2, t2 = (x.transpose(0, 1)[:, :-1] for x in (s, t))
    keep = (labels[:, 1:] != -100) & mask[:, 1:]
    expected = 0.3 * F.cross_entropy(s2[keep], labels[:, 1:][keep]) + 0.7 * kl(s2, t2, 2.0)[keep].mean()
    torch.testing.assert_close(criterion(s, t, labels, mask=mask), expected)


def test_soft_labels_have_their_classes_last_where_logits_have_them_second():
    s, t, labels, _, _ = batch("b c h w")
    soft = F.one_hot(labels.where(labels != 255, 0), 5).double() * 0.9 + 0.02
    loss = kdloss.VanillaKD(2.0, 0.3, layout="b c h w")(s, t, soft)
    ce = F.cross_entropy(s, rearrange(soft, "b h w c -> b c h w"))
    kd = kl(s.movedim(1, -1), t.movedim(1, -1), 2.0).mean()
    torch.testing.assert_close(loss, 0.3 * ce + 0.7 * kd)


def test_a_custom_term_sees_logits_with_their_classes_last():
    class Confidence(kdloss.terms.Term):
        def loss(self, step):
            return step.where.take(step.student_logits()).softmax(-1).square().sum(-1)

    s, _, labels, _, _ = batch("b c h w")
    criterion = Sum(Confidence(name="own"), layout="b c h w", ignore_index=255)
    keep = labels != 255
    torch.testing.assert_close(criterion(s, labels=labels), s.movedim(1, -1)[keep].softmax(-1).square().sum(-1).mean())


def test_a_custom_term_sees_the_teachers_logits_with_their_classes_last():
    class Gap(kdloss.terms.Term):
        def loss(self, step):
            s, t = step.student_logits(), step.teacher_logits()
            return step.where.take(s - t).square().sum(-1)

    s, t, labels, _, _ = batch("b c h w")
    criterion = Sum(Gap(name="own", teacher=0), layout="b c h w", teacher_layout="c b h w", ignore_index=255)
    keep = labels != 255
    expected = (s - t).square().sum(1)[keep].mean()
    torch.testing.assert_close(criterion(s, t.movedim(1, 0), labels), expected)


def test_classes_that_labels_show_to_be_last_need_no_layout():
    s, t, labels, mask, positions = batch("b h w c")
    values, keep = by_hand(s, t, labels, mask, "b h w c", positions)
    criterion = kdloss.VanillaKD(2.0, 0.3, ignore_index=255)
    torch.testing.assert_close(criterion(s, t, labels, mask=mask), values.sum() / keep.sum())
    kd = kdloss.VanillaKD(2.0, 0.0)(s, t, mask=mask)
    torch.testing.assert_close(kd, kl(s, t, 2.0)[mask].mean())


@pytest.mark.parametrize(
    ("shape", "labels", "write"),
    [
        ((2, 5, 6, 7), (2, 6, 7), r"second axis.*layout='b c h w', in FeatureKD logit_layout"),
        ((2, 5, 6), (2, 6), r"second axis.*layout='b c t'"),
        ((2, 5, 3, 6, 7), (2, 3, 6, 7), r"second axis.*layout='b c d h w'"),
        ((2, 5, 6, 7), None, r"nothing tells.*layout='b c h w' or layout='b h w c'"),
        ((2, 6, 6, 6), (2, 6, 6), r"nothing tells.*layout='b c h w' or layout='b h w c'"),
        ((2, 5, 6, 7), (2, 24, 28), r"nothing tells.*layout='b c h w' or layout='b h w c'"),
        ((2, 3, 4, 5, 6), None, r"nothing tells.*layout='b c d h w' or layout='b d h w c'"),
        ((2, 3, 4, 5, 6, 7), None, r"nothing tells.*layout='b c x1 x2 x3 x4' or layout='b x1 x2 x3 x4 c'"),
    ],
)
def test_logits_with_classes_second_or_on_an_unknown_axis_are_refused_with_the_layout_to_write(shape, labels, write):
    s, t = torch.randn(2, *shape)
    y = None if labels is None else torch.randint(0, 5, labels)
    with pytest.raises(ValueError, match=write) as error:
        kdloss.VanillaKD(alpha=0.5 if labels else 0.0)(s, t, y)
    assert "permute" not in str(error.value), "advice to permute would hide the layout to write"
    if labels is not None:  # a mask shows the shape of the positions as labels do
        with pytest.raises(ValueError, match=write):
            kdloss.VanillaKD(alpha=0.0)(s, t, mask=torch.ones(labels).bool())


def test_three_axes_without_labels_are_read_as_batch_time_classes():
    s, t = torch.randn(2, 3, 4, 4).double()
    torch.testing.assert_close(kdloss.VanillaKD(2.0, 0.0)(s, t), kl(s, t, 2.0).mean())
    y = torch.randint(0, 4, (3, 4))
    torch.testing.assert_close(kdloss.VanillaKD(1.0, 1.0)(s, t, y), F.cross_entropy(s.flatten(0, 1), y.flatten()))


def test_lazy_and_top_k_logits_always_have_their_classes_last():
    hidden, weight = torch.randn(2, 3, 4).double(), torch.randn(5, 4).double()
    labels = torch.randint(0, 5, (2, 3))
    plain, stated = (kdloss.VanillaKD(alpha=1.0, layout=layout) for layout in (None, "b t c"))
    lazy = LazyLogits(hidden, weight)
    torch.testing.assert_close(stated(lazy, None, labels), plain(lazy, None, labels))
    with pytest.raises(TypeError, match=r"LazyLogits have their classes last, and layout='b c t' says otherwise"):
        kdloss.VanillaKD(alpha=1.0, layout="b c t")(lazy, None, labels)
    s = torch.randn(2, 5, 3)
    log_probs, ids = s.movedim(1, -1).log_softmax(-1).topk(2)
    stored = TopKLogits(ids, log_probs, vocabulary=5)
    with pytest.raises(TypeError, match=r"TopKLogits have their classes last, and teacher_layout='b c t'"):
        kdloss.VanillaKD(alpha=0.0, layout="b c t")(s, stored)
    kdloss.VanillaKD(alpha=0.0, layout="b c t", teacher_layout=None)(s, stored)


@pytest.mark.parametrize(
    ("pattern", "error", "words"),
    [
        ("b c c", ValueError, "names an axis twice"),
        ("c h w", ValueError, "names no batch, b"),
        ("b h w", ValueError, "names no width, c"),
        ("b (h w) c", ValueError, "has names that are no words"),
        ("b ... c", ValueError, "has names that are no words"),
        ("", ValueError, "names no batch"),
        (4, TypeError, "in a string like 'b c h w'"),
        (["b", "c"], TypeError, "in a string like 'b c h w'"),
    ],
)
def test_invalid_patterns_are_refused_when_the_criterion_is_built(pattern, error, words):
    for make in (
        lambda: kdloss.VanillaKD(layout=pattern),
        lambda: Sum(CrossEntropy(), teacher_layout=pattern),
        lambda: kdloss.FeatureKD(logit_layout=pattern),
        lambda: Features(layout=pattern),
        lambda: Features(teacher_layout={"stem": pattern}),
    ):
        with pytest.raises(error, match=words):
            make()


def test_patterns_with_a_wrong_number_of_axes_and_conflicting_layouts_are_refused():
    s, t = torch.randn(2, 2, 5, 6, 7)
    with pytest.raises(ValueError, match=r"layout='b c t' names 3 axes, and the student's logits are \(2, 5, 6, 7\)"):
        kdloss.VanillaKD(alpha=0.0, layout="b c t")(s, t)
    with pytest.raises(ValueError, match=r"teacher_layout='b c' names 2 axes, and the teacher's logits are"):
        kdloss.VanillaKD(alpha=0.0, layout="b c h w", teacher_layout="b c")(s, t)
    with pytest.raises(ValueError, match=r"two sums say different things.*'layout': 'b c t'"):
        Sum(CrossEntropy(), layout="b c t") + Sum(Logits(), layout="t b c")


def test_a_convolution_that_returns_the_logits_shows_their_class_axis_without_labels():
    """A convolution over frames, whose logits [B, C, T] look like a language model's, and one over pixels."""
    for build, x, write in (
        (nn.Conv1d, torch.randn(2, 3, 7), "b c t"),
        (nn.Conv2d, torch.randn(2, 3, 7, 4), "b c h w"),
    ):
        student, teacher = (build(3, 5, 1) for _ in range(2))
        with pytest.raises(ValueError, match=rf"5 channels: their classes are the second axis. Write layout='{write}'"):
            kdloss.Distiller(teacher, kdloss.VanillaKD(alpha=0.0))(student, x)
        loss = kdloss.Distiller(teacher, kdloss.VanillaKD(2.0, 0.0, layout=write))(student, x).loss
        torch.testing.assert_close(loss, kl(student(x).movedim(1, -1), teacher(x).movedim(1, -1), 2.0).mean())
    last = [nn.Sequential(nn.Conv1d(7, 7, 1), nn.Linear(3, 5)) for _ in range(2)]
    kdloss.Distiller(last[0], kdloss.VanillaKD(alpha=0.0))(last[1], torch.randn(2, 7, 3))


def test_a_last_layer_that_is_also_used_earlier_is_still_the_last():
    conv, linear, x = nn.Conv1d(5, 5, 1), nn.Linear(7, 7), torch.randn(2, 5, 7)
    distill = kdloss.Distiller(nn.Sequential(nn.Linear(7, 7)), kdloss.VanillaKD(alpha=0.0))
    with pytest.raises(ValueError, match=r"5 channels: their classes are the second axis"):
        distill(nn.Sequential(conv, linear, conv), x)
    distill(nn.Sequential(linear, conv, linear), x)


def test_an_attention_mask_applies_to_the_positions_of_a_stated_layout():
    class Frames(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(3, 5, 1)

        def forward(self, x, attention_mask=None):
            return self.conv(x)

    student, teacher, x = Frames(), Frames(), torch.randn(2, 3, 7)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    loss = kdloss.Distiller(teacher, kdloss.VanillaKD(2.0, 0.0, layout="b c t"))(student, x, attention_mask=mask).loss
    values = kl(student(x).movedim(1, -1), teacher(x).movedim(1, -1), 2.0)
    torch.testing.assert_close(loss, values[mask.bool()].mean())


class Heads(nn.Module):
    """A model whose last layer is `head`; `then` follows it."""

    def __init__(self, head, then=lambda x: x):
        super().__init__()
        self.head, self.then = head, then

    def forward(self, x):
        return self.then(self.head(x))


def step(student, teacher, criterion, x, **batch):
    return Distillation(student.double(), teacher.double(), criterion)(x.double(), **batch).loss


def test_a_convolution_with_as_many_channels_as_frames_leaves_the_layout_open_until_one_is_stated():
    x, labels = torch.randn(4, 3, 7).double(), torch.randint(0, 7, (4, 7))
    student, teacher = (Heads(nn.Conv1d(3, 7, 1)) for _ in range(2))
    for batch in ({"labels": labels}, {}):
        alpha = 0.5 if batch else 0.0
        with pytest.raises(ValueError, match=r"nothing tells.*layout='b c t' or layout='b t c'"):
            step(student, teacher, kdloss.VanillaKD(2.0, alpha, causal=False), x, **batch)
        loss = step(student, teacher, kdloss.VanillaKD(2.0, alpha, causal=False, layout="b c t"), x, **batch)
        s, t = student(x), teacher(x).detach()
        ce = F.cross_entropy(s, labels)
        expected = alpha * ce + (1 - alpha) * kl(s.mT, t.mT, 2.0).mean()
        torch.testing.assert_close(loss, expected)
        weight = student.head.weight
        torch.testing.assert_close(*(torch.autograd.grad(y, weight)[0] for y in (loss, expected)))
    only = nn.Conv1d(3, 7, 1), nn.Conv1d(3, 7, 1)  # the convolution is the whole model
    with pytest.raises(ValueError, match=r"the last convolution has 7 channels.*Write layout='b c t'"):
        step(*only, kdloss.VanillaKD(alpha=0.0), x)
    with pytest.raises(ValueError, match=r"layout='b t c' reads axis 2.*7 channels, at axis 1: write layout='b c t'"):
        step(*only, kdloss.VanillaKD(alpha=0.0, layout="b t c"), x)


def test_a_convolution_whose_channels_came_last_once_is_not_questioned_over_equal_lengths():
    student, teacher = (Heads(nn.Conv1d(3, 7, 1), lambda x: x.mT).double() for _ in range(2))
    model = Distillation(student, teacher, kdloss.VanillaKD(2.0, 0.0))
    for frames in (5, 7):
        x = torch.randn(4, 3, frames).double()
        torch.testing.assert_close(model(x).loss, kl(student(x), teacher(x).detach(), 2.0).mean())


@pytest.mark.parametrize("take", [None, "out", ("out",)])
def test_the_last_layer_is_evidence_about_a_part_of_the_output_too(take):
    then = (lambda x: x) if take is None else lambda x: {"out": x}
    student, teacher = (Heads(nn.Conv1d(3, 5, 1), then) for _ in range(2))
    x = torch.randn(2, 3, 7)
    with pytest.raises(ValueError, match=r"5 channels: their classes are the second axis. Write layout='b c t'"):
        step(student, teacher, 1.0 * Logits(take=take), x)
    turned = 1.0 * Logits(take=lambda output: (output if take is None else output["out"]).mT)
    loss = step(student, teacher, turned, x)
    s, t = (m.head(x.double()).mT for m in (student, teacher))
    torch.testing.assert_close(loss, kl(s, t.detach(), 1.0).mean())


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_stated_layout_of_logits_that_the_last_layer_contradicts_is_refused(side):
    maps, last = [Heads(nn.Conv2d(3, 5, 1)) for _ in range(2)], torch.randn(2, 3, 8, 6)
    whose = {"student": {"layout": "b h w c"}, "teacher": {"layout": "b c h w", "teacher_layout": "b h w c"}}[side]
    argument = {"student": "layout", "teacher": "teacher_layout"}[side]
    with pytest.raises(
        ValueError,
        match=rf"{argument}='b h w c' reads axis 3 of the {side}'s .*5 channels, at axis 1: write {argument}='b c h w'",
    ):
        step(*maps, kdloss.VanillaKD(alpha=0.0, **whose), last)
    linear = [Heads(nn.Linear(3, 5), lambda x: x.movedim(-1, 1)) for _ in range(2)]
    x = torch.randn(2, 8, 6, 3)
    loss = step(*linear, kdloss.VanillaKD(2.0, 0.0, layout="b c h w"), x)  # nothing contradicts it
    s, t = (m.head(x.double()) for m in linear)
    torch.testing.assert_close(loss, kl(s, t.detach(), 2.0).mean())


def test_a_teacher_whose_convolution_gives_its_classes_second_needs_a_layout_of_its_own():
    student, teacher = nn.Linear(3, 7).double(), Heads(nn.Conv1d(3, 7, 1)).double()
    x = torch.randn(4, 7, 3).double()
    criterion = kdloss.VanillaKD(2.0, 0.0)
    give = kdloss.Teacher(teacher, inputs=lambda batch: {"x": batch["input"].mT})
    with pytest.raises(ValueError, match=r"the teacher's logits are.*teacher_layout='b c t' or teacher_layout='b t c'"):
        Distillation(student, give, criterion)(input=x)
    model = Distillation(student, give, kdloss.VanillaKD(2.0, 0.0, teacher_layout="b c t"))
    torch.testing.assert_close(model(input=x).loss, kl(student(x), teacher(x.mT).mT.detach(), 2.0).mean())


def test_squeezed_heads_have_no_axis_of_classes_and_are_right_once_it_is_put_back():
    bce, bernoulli = F.binary_cross_entropy_with_logits, kdloss.divergences.bernoulli_kl
    vector, image = torch.randn(4, 3), torch.randn(4, 3, 8, 6)
    for head, x, squeezed, write, take, layout in (
        (nn.Linear, vector, -1, r"no axis for the classes.*take=lambda output: output.unsqueeze\(-1\)", -1, None),
        (nn.Conv2d, image, 1, r"one channel, which was squeezed.*unsqueeze\(1\) and layout='b c h w'", 1, "b c h w"),
    ):
        more = {"kernel_size": 1} if head is nn.Conv2d else {}
        student, teacher = (Heads(head(3, 1, **more), lambda x, k=squeezed: x.squeeze(k)).double() for _ in range(2))
        yes = torch.randint(0, 2, student(x.double()).shape).double()
        for terms, batch in ((Task(bce) + Logits(bernoulli), {"labels": yes}), (1.0 * Logits(), {})):
            with pytest.raises(ValueError, match=write):
                step(student, teacher, terms, x, **batch)
        back = Logits(bernoulli, take=lambda output, k=take: output.unsqueeze(k))
        loss = step(student, teacher, Sum(Task(bce) + back, layout=layout), x, labels=yes)
        s, t = student(x.double()), teacher(x.double()).detach()
        p, q = t.sigmoid(), s.sigmoid()
        expected = bce(s, yes) + (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
        torch.testing.assert_close(loss, expected)
        weight = student.head.weight
        torch.testing.assert_close(*(torch.autograd.grad(y, weight)[0] for y in (loss, expected)))
    with pytest.raises(ValueError, match=r"the student's logits are \(4,\)"):
        kdloss.VanillaKD(alpha=0.0)(torch.randn(4), torch.randn(4))


class Two(nn.Module):
    """A clip head [B, 5] and a frame head [B, T, 7]."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.stem, self.clip, self.frame = nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(4, 7)
        self.double()

    def forward(self, x):
        h = self.stem(x).relu()
        return {"clip": self.clip(h.mean(1)), "frame": self.frame(h)}


@pytest.mark.parametrize("labelled", [True, False])
def test_heads_at_different_positions_are_refused_and_learned_as_features_of_the_head(labelled):
    student, teacher, x = Two(0), Two(1), torch.randn(6, 9, 3).double()
    labels = torch.tensor([-100, -100, 0, 1, 4, 2]) if labelled else None
    clip, frame = CrossEntropy(take="clip") if labelled else Logits(take="clip", name="clip"), Logits(take="frame")
    for criterion in (clip + frame, frame + clip, clip + Logits(kdloss.divergences.dkd, take="frame")):
        for reduction in ("mean", "sum", "none"):
            with pytest.raises(ValueError, match=r"positions \(6,|labels have shape \(6,\)"):
                Distillation(student, teacher, Sum(criterion, reduction=reduction))(x, labels=labels)
    frames = Features(["frame"], pairing="same", distance=kdloss.divergences.forward_kl)  # what the error says
    loss = Distillation(student, teacher, clip + frames)(x, labels=labels).loss
    s, t, count = student(x), teacher(x), slice(2, None) if labelled else slice(None)
    first = F.cross_entropy(s["clip"], labels) if labelled else kl(s["clip"], t["clip"].detach(), 1.0).mean()
    expected = first + kl(s["frame"], t["frame"].detach(), 1.0)[count].mean()
    torch.testing.assert_close(loss, expected)
    for weight in (student.stem.weight, student.frame.weight):
        torch.testing.assert_close(*(torch.autograd.grad(y, weight, retain_graph=True)[0] for y in (loss, expected)))


@pytest.mark.parametrize("scale", [0.5, 2])
def test_a_head_at_another_resolution_is_refused_and_right_once_it_is_brought_to_that_of_the_labels(scale):
    class Aux(nn.Module):
        def __init__(self):
            super().__init__()
            self.aux, self.out = nn.Conv2d(3, 5, 1), nn.Conv2d(3, 5, 1)
            self.double()

        def forward(self, x):
            return {"out": self.out(x), "aux": F.interpolate(self.aux(x), scale_factor=scale)}

    def resized(output):
        return F.interpolate(output["aux"], size=(8, 6))

    student, teacher, x = Aux(), Aux(), torch.randn(4, 3, 8, 6).double()
    labels = torch.randint(0, 5, (4, 8, 6))
    labels[0], labels[1, :3] = -100, -100
    for make in (CrossEntropy, Logits):
        criterion = Sum(CrossEntropy(take="out") + make(take="aux", name="aux"), layout="b c h w")
        with pytest.raises(ValueError, match=r"'aux' reads logits at positions .* stand at \(4, 8, 6\).*take="):
            Distillation(student, teacher, criterion)(x, labels=labels)
    criterion = Sum(CrossEntropy(take="out") + Logits(take=resized, name="aux"), layout="b c h w")
    loss = Distillation(student, teacher, criterion)(x, labels=labels).loss
    s, t = (resized(m(x)).movedim(1, -1) for m in (student, teacher))
    expected = F.cross_entropy(student(x)["out"], labels) + kl(s, t.detach(), 1.0)[labels != -100].mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y, student.aux.weight)[0] for y in (loss, expected)))


# -- a segmentation net: cross-entropy, distillation of predictions, channel-wise distillation --


class Net(nn.Module):
    """A segmentation net that returns its own loss."""

    def __init__(self, width, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.stem, self.head = nn.Conv2d(3, width, 3, 2, 1), nn.Conv2d(width, 5, 1)
        self.double()

    def forward(self, images, labels=None):
        logits = F.interpolate(self.head(torch.tanh(self.stem(images))), scale_factor=2.0)
        loss = None if labels is None else F.cross_entropy(logits, labels, ignore_index=255)
        return Output(logits=logits, loss=loss)


def images_and_labels():
    labels = torch.randint(0, 5, (2, 6, 10))
    labels[torch.rand(2, 6, 10) < 0.3] = 255
    return torch.randn(2, 3, 6, 10).double(), labels


def channels(s, t, temperature=4.0):
    """For each example, the KL of each channel's softmax over the pixels, averaged over the channels."""
    log_q, log_p = ((x.flatten(2) / temperature).log_softmax(-1) for x in (s, t))
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1).mean(-1)


@recipe
def segmentation(student, teacher, images, labels):
    channelwise = Features(["head"], pairing="same", distance=distances.cwd)
    terms = CrossEntropy() + 0.5 * Logits(temperature=2.0) + 3.0 * channelwise
    model = Distillation(student, teacher, Sum(terms, layout="b c h w", ignore_index=255))
    optimizer = SGD(model.parameters(), lr=0.1)
    model(images=images, labels=labels).loss.backward()
    optimizer.step()


@recipe
def segmentation_with_its_own_loss(student, teacher, images, labels):
    channelwise = Features(["head"], pairing="same", distance=distances.cwd)
    model = Distillation(student, teacher, Sum(Task() + 3.0 * channelwise, layout="b c h w", ignore_index=255))
    optimizer = SGD(model.parameters(), lr=0.1)
    model(images=images, labels=labels).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("step", [segmentation, segmentation_with_its_own_loss])
def test_a_segmentation_recipe_takes_the_step_of_a_loss_in_plain_torch(step):
    student, teacher, (images, labels) = Net(4, 0), Net(6, 1), images_and_labels()
    with Steps() as steps:
        step(student, teacher, images, labels)
    assert steps.ran[student] == steps.ran[teacher] == 1

    def loss(before):
        maps = [m.head(torch.tanh(m.stem(images))) for m in (before.student, teacher)]
        s, t = (F.interpolate(x, scale_factor=2.0) for x in maps)
        kd = kl(s.movedim(1, -1), t.detach().movedim(1, -1), 2.0)[labels != 255].mean()
        own = F.cross_entropy(s, labels, ignore_index=255)
        # An example is weighted by its number of labels.
        share = (labels != 255).sum((1, 2)).double() / (labels != 255).sum()
        return own + (step is segmentation) * 0.5 * kd + 3.0 * (share * channels(maps[0], maps[1].detach())).sum()

    holds_to(steps, loss)


def test_labels_that_only_the_task_reads_say_nothing_about_the_axes_of_logits():
    student, teacher = torch.randn(2, 2, 7, 5)
    transcripts = torch.randint(1, 5, (2, 5))  # as long as there are classes

    def task(logits, labels):
        return logits.square().mean() * labels.shape[1]

    criterion = Sum(0.5 * Task(task), 0.5 * Logits(temperature=1.0))
    kl = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean()
    torch.testing.assert_close(criterion(student, teacher, transcripts), 0.5 * 5 * student.square().mean() + 0.5 * kl)
