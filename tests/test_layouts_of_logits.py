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
