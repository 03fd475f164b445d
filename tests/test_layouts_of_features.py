"""The axes of features: stated by a pattern, inferred from modules, labels and inputs, or refused."""

import copy
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

import kdloss
from kdloss import Distiller, FeatureKD, Features, distances

SIZES = {"b": 3, "c": 5, "d": 2, "h": 4, "w": 6, "t": 4}
LAYOUTS = ["b c h w", "b h w c", "b c t", "t b c", "b c d h w", "b d h w c", "w c b h", "b t d", "c b"]


def features_in(pattern, seed, width=5):
    """Random features in a layout, and the same features rearranged to `[B, N, D]`."""
    names = pattern.split()
    wide = "c" if "c" in names else "d"
    sizes = SIZES | {wide: width}
    x = torch.randn(*(sizes[n] for n in names), generator=torch.Generator().manual_seed(seed)).double()
    positions = " ".join(n for n in names if n not in ("b", wide))
    return x.requires_grad_(), rearrange(x, f"{pattern} -> b ({positions}) {wide}")


def capture(x, name="stage"):
    captured = kdloss.Captured()
    captured.features[name] = x
    return captured


def assert_same(loss, expected, x):
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(y, x)[0] for y in (loss, expected)), rtol=1e-9, atol=1e-12)


# -- stated layouts --


@pytest.mark.parametrize("pattern", LAYOUTS)
@pytest.mark.parametrize("distance", [distances.mse, distances.cosine, distances.cwd, distances.similarity])
def test_a_stated_layout_gives_value_and_gradient_of_the_permuted_features(pattern, distance):
    (s, flat_s), (t, flat_t) = features_in(pattern, 0), features_in(pattern, 1)
    if pattern == "c b":
        flat_s, flat_t = (x[:, 0] for x in (flat_s, flat_t))  # no axis of positions: examples are compared
    criterion = 1.0 * Features(["stage"], pairing="same", distance=distance, layout=pattern)
    assert_same(criterion(capture(s), capture(t)), distance(flat_s, flat_t.detach()).mean(), s)


def test_labels_have_their_axes_in_the_order_of_the_pattern():
    (s, flat_s), (t, flat_t) = features_in("w c b h", 0), features_in("b h w c", 1)
    labels = torch.zeros(3, 6, 4, dtype=torch.long)  # [B, W, H], as in the student's layout
    labels[0, 1:] = -100
    criterion = 1.0 * Features(["stage"], pairing="same", layout="w c b h", teacher_layout="b w h c")
    keep = labels.flatten(1) != -100
    t = rearrange(t, "b h w c -> b w h c")
    flat_t = rearrange(flat_t, "b (h w) c -> b (w h) c", h=4)
    assert_same(criterion(capture(s), capture(t), labels), (flat_s - flat_t)[keep].square().mean(), s)


def test_each_layer_may_have_its_own_layout():
    (first, a), (second, b) = features_in("b h w c", 0), features_in("b c t", 1)
    (first_t, c), (second_t, d) = features_in("b c h w", 2), features_in("t b d", 3)
    captured = [capture(x) for x in (first, first_t)]
    for one, x in zip(captured, (second, second_t), strict=True):
        one.features["last"] = x
    layouts = {"layout": {"stage": "b h w c", "last": "b c t"}, "teacher_layout": {"last": "t b d"}}
    criterion = FeatureKD(["stage", "last"], pairing="same", alpha=0.0, **layouts)
    expected = ((a - c).square().mean() + (b - d).square().mean()) / 2
    assert_same(criterion(*captured), expected, first)
    for copied in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        torch.testing.assert_close(copied(*captured), expected)
    with pytest.raises(ValueError, match=r"layout names \['stag'\], and the layers are \['stage', 'last'\]"):
        FeatureKD(["stage", "last"], pairing="same", alpha=0.0, layout={"stag": "b h w c"})(*captured)
    with pytest.raises(
        ValueError, match=r"layout names \['last'\], and the layers are blocks, which are named by number"
    ):
        FeatureKD("last", depths=(1, 1), alpha=0.0, take={"last": 0})(*captured)


@pytest.mark.parametrize(("axes", "kind"), [(1, nn.Conv1d), (2, nn.Conv2d), (3, nn.Conv3d)])
def test_a_convolution_projects_features_with_its_number_of_axes_in_any_layout(axes, kind):
    pattern = {1: "b t c", 2: "b h w c", 3: "b d h w c"}[axes]
    (s, _), (t, flat_t) = features_in(pattern, 0), features_in(pattern, 1, width=7)
    settings = {"projection": partial(kind, kernel_size=1), "widths": (5, 7), "layout": pattern}
    criterion = FeatureKD(["stage"], pairing="same", alpha=0.0, **settings).double()
    (projection,) = criterion.projections.values()
    projected = projection(s.movedim(-1, 1)).flatten(2).mT
    assert_same(criterion(capture(s), capture(t)), (projected - flat_t).square().mean(), s)
    (s, _), (t, _) = features_in("b c", 0), features_in("b c", 1, width=7)
    criterion = FeatureKD(["stage"], pairing="same", alpha=0.0, **settings | {"layout": None}).double()
    with pytest.raises(ValueError, match=r"features with \d axes of positions.*projection=kdloss\.projections\.linear"):
        criterion(capture(s), capture(t))


def test_layers_in_different_layouts_are_concatenated_along_their_widths():
    (a, x), (b, y) = features_in("b h w c", 0), features_in("b c h w", 1, width=3)
    (t, other) = features_in("b h w c", 2, width=8)
    captured = capture(a)
    captured.features["norm"] = b
    layouts = {"layout": {"stage": "b h w c"}, "teacher_layout": "b h w c"}
    criterion = FeatureKD(pairing=[(("stage", "norm"), "stage")], alpha=0.0, **layouts)
    assert_same(criterion(captured, capture(t)), (torch.cat([x, y], -1) - other).square().mean(), a)


def test_resize_gets_maps_and_volumes_with_channels_second_and_tokens_unchanged():
    shapes = []

    def recording_pool(s, t):
        shapes.append((tuple(s.shape), tuple(t.shape)))
        return kdloss.resize.pool(s, t, size=(8, -1))

    s = torch.randn(2, 4, 6, 5).double().requires_grad_()  # [B, H, W, C]
    t = torch.randn(2, 96, 5).double()  # 8 x 12 patches
    criterion = FeatureKD(
        ["stage"], pairing="same", alpha=0.0, resize=recording_pool, layout="b h w c", teacher_layout=None
    )
    blocks = t.unflatten(1, (4, 2, 6, 2)).mean((2, 4)).flatten(1, 2)
    assert_same(criterion(capture(s), capture(t)), (s.flatten(1, 2) - blocks).square().mean(), s)
    assert shapes == [((2, 5, 4, 6), (2, 96, 5))]
    s, t = torch.randn(2, 2, 4, 6, 5).double().requires_grad_(), torch.randn(2, 5, 2, 2, 3).double()
    criterion = FeatureKD(
        ["stage"], pairing="same", alpha=0.0, resize=recording_pool, layout="b d h w c", teacher_layout="b c d h w"
    )
    coarse = s.unflatten(3, (3, 2)).unflatten(2, (2, 2)).mean((3, 5))
    assert_same(criterion(capture(s), capture(t)), (coarse.movedim(-1, 1) - t).square().mean(), s)
    with pytest.raises(ValueError, match=r"^stage-stage: teacher features.*97 positions.*fit a grid of size=\(8, -1\)"):
        FeatureKD(["stage"], pairing="same", alpha=0.0, resize=recording_pool)(
            capture(torch.randn(2, 5, 4, 6)), capture(torch.randn(2, 97, 5))
        )


def test_mgd_reads_the_grid_of_maps_from_the_layout_and_refuses_tokens_without_a_grid():
    (s, _), (t, flat_t) = features_in("b h w c", 0), features_in("b h w c", 1)
    build = partial(distances.MGD, ratio=0.0)
    settings = {"pairing": "same", "alpha": 0.0, "widths": (5, 5), "layout": "b h w c"}
    criterion = FeatureKD(["stage"], distance=build, **settings).double()
    module = criterion.terms["feature"].distances["stage"]
    generated = module.second(module.first(s.movedim(-1, 1)).relu()).flatten(2).mT
    assert_same(criterion(capture(s), capture(t)), (generated - flat_t).square().mean(), s)
    tokens = FeatureKD(["stage"], distance=build, **settings | {"layout": None}).double()
    with pytest.raises(ValueError, match=r"16 positions, and their grid isn't given"):
        tokens(*(capture(torch.randn(3, 16, 5).double()) for _ in range(2)))


@pytest.mark.parametrize("pattern", ["b h w c", "b c d h w"])
def test_resolutions_are_read_in_the_stated_layout(pattern):
    class Stages(nn.Module):
        def __init__(self, sizes):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Identity(), Sized(pattern, n)) for n in sizes)
            self.head = nn.Linear(3, 5)

        def forward(self, x):
            return [self.head(x), *(block(x) for block in self.blocks)][0]

    class Sized(nn.Module):
        def __init__(self, pattern, n):
            super().__init__()
            self.shape = [{"c": 3, "b": 2, "h": n, "w": n + 1, "d": n}[axis] for axis in pattern.split()]

        def forward(self, x):
            return x.new_zeros(self.shape) + x.sum()

    criterion = FeatureKD(pairing="resolution", layout=pattern, alpha=0.0)
    distill = Distiller(Stages([8, 8, 4, 2]), criterion).prepare(Stages([8, 4, 4]), torch.zeros(2, 3))
    assert [(s, t) for s, t, _ in criterion.terms["feature"].layer_map.pairs()] == [(0, 1), (2, 2)]
    assert distill(Stages([8, 4, 4]), torch.zeros(2, 3)).loss == 0


# -- layouts inferred from modules --


class WithPart(nn.Module):
    """A model with a module named "part", whose output is the feature, and five logits."""

    def __init__(self, part, axes=None):
        super().__init__()
        self.part, self.axes = part, axes

    def forward(self, x):
        x = self.part(x)
        x = x[0] if isinstance(x, tuple) else x
        return x.flatten(1).mean(1, keepdim=True).expand(-1, 5)


class Permuted(nn.Module):
    """Modules in sequence; the axes of the last output are permuted."""

    def __init__(self, *parts, axes):
        super().__init__()
        self.parts, self.order = nn.ModuleList(parts), axes

    def forward(self, x):
        for part in self.parts:
            x = part(x)
        return x.permute(self.order)


class PerFrame(nn.Module):
    """Apply a module to each of the frames [B, T, C, H, W]."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x):
        return self.part(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def width_read(part, x, labels=None, **layouts):
    """Distil a student from a copy of itself; return the width for which its projection was built."""
    student = WithPart(part).double()
    criterion = FeatureKD(["part"], pairing="same", alpha=0.0, projection=kdloss.projections.linear, **layouts)
    distill = Distiller(copy.deepcopy(student), criterion).prepare(student, x)
    criterion.double()
    distill(student, x, labels=labels)
    return criterion.projections["part"].in_features


def conv(n, *widths):
    kind, norm = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[n - 1], (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[n - 1]
    return [m for w in widths for m in (kind(3, w, 1), norm(w), nn.ReLU())]


x1, x2, x3 = (torch.randn(2, 3, *size).double() for size in ((7,), (4, 6), (2, 4, 6)))
x2_last = torch.randn(2, 4, 6, 3).double()  # [B, H, W, C]
TO_LAST, TO_SECOND = (0, 2, 3, 1), (0, 3, 1, 2)
REFUSED = {
    "a 1-d convolution": (nn.Conv1d(3, 8, 1), x1, "layout='b c t'"),
    "a 1-d convolution with as many channels as frames": (nn.Conv1d(3, 7, 1), x1, "layout='b c t'"),
    "a stack of 1-d convolutions": (nn.Sequential(*conv(1, 8)), x1, "layout='b c t'"),
    "a 1-d convolution, then a pool": (nn.Sequential(nn.Conv1d(3, 8, 1), nn.MaxPool1d(2)), x1, "layout='b c t'"),
    "2-d convolutions, then channels last": (Permuted(*conv(2, 8), axes=TO_LAST), x2, "layout='b h w c'"),
    "linear layers on maps": (nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 8), nn.GELU()), x2_last, "layout='b h w c'"),
    "as many channels as rows": (nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 4)), x2_last, "layout='b h w c'"),
    "only a norm": (nn.LayerNorm(3), x2_last, "layout='b h w c'"),
    "one 2-d convolution, then channels last": (Permuted(nn.Conv2d(3, 8, 1), axes=TO_LAST), x2, "layout='b h w c'"),
    "volumes with channels last": (nn.Linear(3, 8), torch.randn(2, 2, 4, 6, 3).double(), "layout='b d h w c'"),
    "a linear layer, then channels second": (
        Permuted(nn.Linear(3, 8), axes=(0, 2, 1)),
        torch.randn(2, 7, 3).double(),
        "'b c t'",
    ),
    "a 1-d convolution, then an activation": (nn.Sequential(nn.Conv1d(3, 8, 1), nn.ReLU()), x1, "layout='b c t'"),
    "several maps per example": (
        PerFrame(nn.Conv2d(3, 8, 1)),
        torch.randn(2, 4, 3, 5, 6).double(),
        "'b c d h w' or layout=",
    ),
    "volumes from a module without weights": (
        nn.Identity(),
        torch.randn(2, 3, 4, 5, 6).double(),
        "'b c d h w' or layout='b d h w c'",
    ),
    "six axes": (nn.Identity(), torch.randn(2, 3, 4, 5, 6, 7).double(), "name its axes by layout="),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_default_layout_that_the_module_contradicts_is_refused_with_the_layout_to_write(name):
    part, x, write = REFUSED[name]
    with pytest.raises(ValueError, match=f"student layer 'part' gives.*{write}"):
        width_read(part, x)


ACCEPTED = {
    "a map": (nn.Sequential(*conv(2, 8)), x2, {}, 8),
    "a square map with as many channels as rows": (nn.Conv2d(3, 4, 1), x2[..., :4], {}, 4),
    "a volume": (nn.Sequential(*conv(3, 8)), x3, {}, 8),
    "a volume with all axes equal": (nn.Conv3d(3, 4, 1), torch.randn(2, 3, 4, 4, 4).double(), {}, 4),
    "frames with channels second": (nn.Sequential(*conv(1, 8)), x1, {"layout": "b c t"}, 8),
    "a map with channels last": (nn.Linear(3, 8), x2_last, {"layout": "b h w c"}, 8),
    "tokens": (nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 8)), torch.randn(2, 7, 3).double(), {}, 8),
    "as many tokens as channels": (nn.Linear(3, 7), torch.randn(2, 7, 3).double(), {}, 7),
    "a bidirectional LSTM": (nn.LSTM(3, 4, batch_first=True, bidirectional=True), torch.randn(2, 8, 3).double(), {}, 8),
    "vectors": (nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8)), torch.randn(6, 3).double(), {}, 8),
    "a linear layer on a map, then channels second": (Permuted(nn.Linear(3, 8), axes=TO_SECOND), x2_last, {}, 8),
    "2-d convolutions, then channels last": (Permuted(*conv(2, 8), axes=TO_LAST), x2, {"layout": "b h w c"}, 8),
    "a map from an activation": (nn.Sequential(nn.PReLU(), nn.Identity()), x2, {}, 3),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_layout_that_nothing_contradicts_is_used(name):
    part, x, layouts, width = ACCEPTED[name]
    assert width_read(part, x, **layouts) == width


def test_the_layout_of_an_activation_follows_from_the_layer_before_it():
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act, self.norm, self.gelu = nn.Conv1d(3, 7, 1), nn.ReLU(), nn.LayerNorm(7), nn.GELU()

        def forward(self, x):
            x = self.act(self.conv(x))
            return self.gelu(self.norm(x.mT)).mean(1)

    student, x = Stack(), torch.randn(2, 3, 7)
    criterion = FeatureKD(["act"], pairing="same", alpha=0.0)
    with pytest.raises(ValueError, match=r"student layer 'act' gives \(2, 7, 7\).*layout='b c t'"):
        Distiller(copy.deepcopy(student), criterion).prepare(student, x)
    Distiller(copy.deepcopy(student), FeatureKD(["gelu"], pairing="same", alpha=0.0)).prepare(student, x)


def test_regression_targets_show_the_number_of_examples():
    s, t = torch.randn(6, 4, 5), torch.randn(6, 4, 5)
    score = torch.randn(4)
    regress = kdloss.Task(lambda output, y: (output - y).square().mean())
    captured = [capture(x) for x in (s, t)]
    captured[0].output = torch.randn(4)
    with pytest.raises(ValueError, match=r"gives \(6, 4, 5\).*there are 4 examples.*layout='t b d'"):
        (regress + Features(["stage"], pairing="same"))(*captured, score)


class Mixed(nn.Module):
    """A block with a convolution on channels second and a linear layer on channels last."""

    def __init__(self, width, channels_last=False):
        super().__init__()
        self.conv, self.mlp, self.last = nn.Conv2d(3, width, 1), nn.Linear(width, width), channels_last

    def forward(self, x):
        x = self.mlp(self.conv(x).permute(TO_LAST))
        return x if self.last else x.permute(TO_SECOND)


def test_sizes_decide_the_layout_of_a_mixed_block_and_equal_sizes_are_refused():
    assert width_read(Mixed(8), x2) == 8
    with pytest.raises(ValueError, match="layout='b h w c'"):
        width_read(Mixed(8, channels_last=True), x2)
    square = torch.randn(2, 3, 6, 6).double()
    for last in (False, True):
        with pytest.raises(ValueError, match=r"nothing tells.*layout='b c h w' or layout='b h w c'"):
            width_read(Mixed(6, channels_last=last), square)
        assert width_read(Mixed(6, channels_last=last), square, layout="b h w c" if last else "b c h w") == 6


@pytest.mark.parametrize("place", ["model", "module"])
def test_timms_output_fmt_decides_where_the_modules_do_not(place):
    square = torch.randn(2, 6, 6, 6).double()
    student = WithPart(nn.Identity())
    (student if place == "model" else student.part).output_fmt = "NHWC"
    criterion = FeatureKD(["part"], pairing="same", alpha=0.0)
    with pytest.raises(ValueError, match="layout='b h w c'"):
        Distiller(copy.deepcopy(student), criterion).prepare(student, square)
    student.part = nn.Conv2d(6, 6, 1).double()
    Distiller(copy.deepcopy(student), FeatureKD(["part"], pairing="same", alpha=0.0)).prepare(student, square)


def test_the_error_names_the_side_whose_layout_differs():
    student, teacher = WithPart(nn.Conv2d(3, 8, 1)), WithPart(nn.Sequential(Permuted(nn.Conv2d(3, 8, 1), axes=TO_LAST)))
    x = torch.randn(2, 3, 4, 6)
    criterion = FeatureKD(["part"], pairing="same", alpha=0.0)
    with pytest.raises(
        ValueError, match=r"teacher layer 'part' gives.*write teacher_layout=.* or teacher_layout='b h w c'"
    ):
        Distiller(teacher, criterion).prepare(student, x)
    criterion = FeatureKD(["part"], pairing="same", alpha=0.0, teacher_layout="b h w c")
    loss = Distiller(teacher, criterion).prepare(student, x)(student, x).loss
    torch.testing.assert_close(loss, F.mse_loss(student.part(x), teacher.part(x).permute(TO_SECOND)))
    with pytest.raises(ValueError, match=r"layout='b h w c' reads student layer 'part'.*as 6 wide.*8 channels"):
        Distiller(teacher, FeatureKD(["part"], pairing="same", layout="b h w c")).prepare(student, x)


def test_an_inner_width_that_equals_the_width_of_a_map_does_not_decide_its_layout():
    """DenseNet's blocks append 32 channels to their input, and a map may be 32 pixels wide."""

    class Appends(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 1)

        def forward(self, x):
            return torch.cat([x, self.conv(x)], 1)

    student, teacher, x = WithPart(Appends()), WithPart(Appends()), torch.randn(2, 3, 4, 6)
    criterion = FeatureKD(["part"], pairing="same", alpha=0.0)
    with pytest.raises(ValueError, match=r"nothing tells which axis.*layout='b c h w' or layout='b h w c'"):
        Distiller(teacher, criterion).prepare(student, x)
    criterion = FeatureKD(["part"], pairing="same", alpha=0.0, layout="b c h w")
    loss = Distiller(teacher, criterion).prepare(student, x)(student, x).loss
    torch.testing.assert_close(loss, F.mse_loss(student.part(x), teacher.part(x)))


def test_the_layout_to_write_for_one_of_several_layers_is_given_by_name():
    """TinyViT's first blocks have channels second, its later blocks have channels last."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 1), nn.Linear(8, 8)

        def forward(self, x):
            return self.second(self.first(x).permute(TO_LAST))

    student, teacher, x = Both(), Both(), torch.randn(2, 3, 4, 6)
    both = ["first", "second"]
    with pytest.raises(ValueError, match=r"layer 'second'.*write layout=\{'second': 'b h w c'\}"):
        Distiller(teacher, FeatureKD(both, pairing="same", alpha=0.0)).prepare(student, x)
    criterion = FeatureKD(both, pairing="same", alpha=0.0, layout={"second": "b h w c"})
    loss = Distiller(teacher, criterion).prepare(student, x)(student, x).loss
    expected = F.mse_loss(student.first(x), teacher.first(x)) + F.mse_loss(student(x), teacher(x))
    torch.testing.assert_close(loss, expected / 2)


def test_the_first_call_decides_a_layout_and_later_calls_are_checked_against_it():
    """Sizes that are equal by chance in a later call do not reopen the decision; a contradiction is an error."""
    student = WithPart(Mixed(8)).double()
    distill = Distiller(copy.deepcopy(student), FeatureKD(["part"], pairing="same", alpha=0.0)).prepare(student, x2)
    distill(student, x2)
    distill(student, torch.randn(2, 3, 8, 8).double())  # as the first call this would be refused
    student.part.last = True
    with pytest.raises(ValueError, match=r"layout='b c h w' reads student layer 'part'.*as 4 wide.*8 channels"):
        distill(student, x2)


# -- which axis is the batch --


class Encoder(nn.Module):
    """Embed inputs [B, T, 3], then apply layers that have time first, or the batch first without `first`."""

    def __init__(self, layer, width=8, depth=2, first=True):
        super().__init__()
        self.embed, self.head = nn.Linear(3, width), nn.Linear(width, 5)
        self.layers, self.first = nn.ModuleList(layer(width) for _ in range(depth)), first

    def forward(self, x):
        x = self.embed(x).transpose(0, 1) if self.first else self.embed(x)
        for layer in self.layers:
            x = layer(x)
            x = x[0] if isinstance(x, tuple) else x
        return self.head(x.mean(0 if self.first else 1))


class Custom(nn.Module):
    """A block that does not show that time is first."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(width) + 0.1 * torch.randn(width, width))

    def forward(self, x):
        return torch.tanh(x @ self.weight)


class Residual(nn.Module):
    """A residual block whose attention has time first, as in OpenAI's CLIP."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(width), nn.MultiheadAttention(width, 2)

    def forward(self, x):
        y = self.norm(x)
        return x + self.attn(y, y, y, need_weights=False)[0]


TIME_FIRST = {
    "transformer": lambda width: nn.TransformerEncoderLayer(width, 2, 16, dropout=0.0),
    "lstm": lambda width: nn.LSTM(width, width),
    "gru": lambda width: nn.GRU(width, width),
    "residual": Residual,
    "custom": Custom,
}


# Either the module says where its batch is, or the number of labels does.
SAID_OTHERWISE = (
    r"('b t d' reads axis 0 of .* as the batch|as 'b t d' is a batch of 6, but there are 4 examples).*layout='t b d'"
)


@pytest.mark.parametrize("kind", TIME_FIRST)
@pytest.mark.parametrize("batch_from", ["labels", "inputs"])
def test_time_first_is_noticed_and_correct_once_it_is_stated(kind, batch_from):
    student, teacher = Encoder(TIME_FIRST[kind]).double(), Encoder(TIME_FIRST[kind], depth=3).double()
    x, labels = torch.randn(4, 6, 3).double(), torch.tensor([0, 1, -100, 2])
    settings = {"alpha": 0.0, "layers": "last"}
    extra = {"labels": labels} if batch_from == "labels" else {}
    with pytest.raises(ValueError, match=r"student block 1 gives \(6, 4, 8\).*batch.*layout='t b d'"):
        Distiller(teacher, FeatureKD(**settings)).prepare(student, x)(student, x, **extra)
    criterion = FeatureKD(**settings, layout="t b d")
    loss = Distiller(teacher, criterion).prepare(student, x)(student, x, **extra).loss
    s, t = (last_features(m, x) for m in (student, teacher))
    values = (s - t.detach()).square().mean(-1)  # [T, B]
    expected = values[:, labels != -100].mean() if batch_from == "labels" else values.mean()
    torch.testing.assert_close(loss, expected)
    weight = next(p for p in student.parameters() if p.requires_grad)
    torch.testing.assert_close(*(torch.autograd.grad(y, weight)[0] for y in (loss, expected)))
    if batch_from == "labels":  # a stated layout is also checked against the sizes
        with pytest.raises(ValueError, match=SAID_OTHERWISE):
            Distiller(teacher, FeatureKD(**settings, layout="b t d"))(student, x, **extra)


@pytest.mark.parametrize("kind", TIME_FIRST)
def test_a_stated_layout_that_module_or_inputs_contradict_is_refused_without_labels(kind):
    student, x = Encoder(TIME_FIRST[kind]).double(), torch.randn(4, 6, 3).double()
    settings = {"distance": distances.cka, "layers": "last"}
    with pytest.raises(ValueError, match=r"layout='b t d' reads axis 0.*batch|as 'b t d' is a batch of 6.*'t b d'"):
        Distiller(copy.deepcopy(student), 1.0 * Features(**settings, layout="b t d"))(student, x)
    batch_first = Encoder(lambda width: nn.GRU(width, width, batch_first=True), first=False).double()
    with pytest.raises(ValueError, match=r"layout='t b d' reads axis 1.*as the batch.*axis 0: write layout='b t d'"):
        Distiller(copy.deepcopy(batch_first), 1.0 * Features(**settings, layout="t b d"))(batch_first, x)
    with pytest.raises(ValueError, match=r"teacher_layout='t b d' reads axis 1 of teacher block 1"):
        Distiller(batch_first, 1.0 * Features(**settings, layout="t b d", teacher_layout="t b d"))(student, x)
    other = Encoder(TIME_FIRST[kind], depth=3).double()
    loss = Distiller(other, 1.0 * Features(**settings, layout="t b d"))(student, x).loss
    s, t = (last_features(m, x).transpose(0, 1) for m in (student, other))
    expected = distances.cka(s, t.detach()).mean()
    torch.testing.assert_close(loss, expected)
    weight = student.embed.weight
    torch.testing.assert_close(*(torch.autograd.grad(y, weight)[0] for y in (loss, expected)))


def test_models_that_take_time_first_keep_their_stated_layout():
    class TimeFirst(Encoder):
        def forward(self, x):
            return super().forward(x.transpose(0, 1))

    student, teacher = (TimeFirst(TIME_FIRST["gru"]).double() for _ in range(2))
    x = torch.randn(6, 4, 3).double()  # [T, B, D]
    loss = Distiller(teacher, 1.0 * Features("last", layout="t b d"))(student, x).loss
    s, t = (last_features(m, x.transpose(0, 1)) for m in (student, teacher))
    torch.testing.assert_close(loss, F.mse_loss(s, t))


def test_a_stated_width_at_another_axis_than_the_modules_is_refused_where_lengths_are_equal():
    student = WithPart(nn.Conv1d(3, 7, 1)).double()
    with pytest.raises(ValueError, match=r"layout='b t c' reads axis 2.*as the width.*7 channels at axis 1.*'b c t'"):
        Distiller(copy.deepcopy(student), Features(["part"], pairing="same", layout="b t c") * 1.0)(student, x1)
    taken = Features(["part"], pairing="same", layout="b t c", take=lambda x: x.mT)  # belongs to no module
    assert Distiller(copy.deepcopy(student), 1.0 * taken)(student, x1).loss == 0


def test_logits_with_time_first_are_named_where_the_features_agree_with_the_inputs():
    class CTC(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Sequential(*conv(1, 4)), nn.Linear(4, 5)

        def forward(self, x):
            return self.head(self.conv(x).permute(2, 0, 1))  # [T, B, C]

    def ctc(logits, labels):
        sizes = [torch.full((6,), n) for n in (9, 3)]
        return F.ctc_loss(logits.log_softmax(-1), labels, *sizes)

    student, teacher = CTC().double().eval(), CTC().double().eval()
    x, labels = torch.randn(6, 3, 9).double(), torch.randint(1, 5, (6, 3))
    terms = lambda layout: kdloss.Task(ctc) + kdloss.Logits() + Features(["conv"], pairing="same", layout=layout)  # noqa: E731
    with pytest.raises(
        ValueError, match=r"logits have time first write kdloss\.Sum\(\.\.\., layout='t b c'\)"
    ) as error:
        Distiller(teacher, terms("b c t"))(student, x, labels=labels)
    assert "layout='t c b'" not in str(error.value)
    with pytest.raises(ValueError, match=r"layout='t c b' reads axis 2.*as the batch.*write layout='b c t'"):
        Distiller(teacher, terms("t c b"))(student, x, labels=labels)
    loss = Distiller(teacher, kdloss.Sum(terms("b c t"), layout="t b c"))(student, x, labels=labels).loss
    s, t = student(x), teacher(x).detach()
    kd = (t.softmax(-1) * (t.log_softmax(-1) - s.log_softmax(-1))).sum(-1).mean()
    expected = ctc(s, labels) + kd + F.mse_loss(student.conv(x), teacher.conv(x).detach())
    torch.testing.assert_close(loss, expected)


def test_a_pruned_module_is_read_anew_and_others_are_walked_once(monkeypatch):
    from kdloss._layout import evidence

    def pruned():
        return nn.Sequential(*conv(2, 5)).double()

    student, teacher = WithPart(nn.Sequential(*conv(2, 8))).double(), WithPart(pruned()).double()
    settings = {"pairing": "same", "distance": distances.attention_transfer}
    named = [1.0 * Features(["part"], layout=layout, **settings) for layout in ("b c h w", None)]
    walks, walk = [], evidence._of
    monkeypatch.setattr(evidence, "_of", lambda module: walks.append(module) or walk(module))
    distillers = [Distiller(teacher, criterion) for criterion in named]
    for distill in distillers:
        distill(student, x2)
        walked = len(walks)
        distill(student, x2.repeat(2, 1, 1, 1))
        assert len(walks) == walked
    student.part[0], student.part[1] = pruned()[:2]
    student.eval(), teacher.eval()
    for distill in (*distillers, Distiller(teacher, 1.0 * Features(["part"], **settings))):
        expected = distances.attention_transfer(*(m.part(x2).flatten(2).mT for m in (student, teacher))).mean()
        torch.testing.assert_close(distill(student, x2).loss, expected)


def last_features(model, x):
    x = model.embed(x).transpose(0, 1)
    for layer in model.layers:
        x = layer(x)
        x = x[0] if isinstance(x, tuple) else x
    return x


@pytest.mark.parametrize("kind", ["transformer", "lstm", "gru", "residual"])
def test_time_first_is_noticed_with_as_many_frames_as_examples(kind):
    student, x = Encoder(TIME_FIRST[kind]).double(), torch.randn(4, 4, 3).double()
    labels = torch.tensor([0, 1, 3, 2])
    with pytest.raises(ValueError, match=r"gives \(4, 4, 8\).*second axis.*layout='t b d'"):
        Distiller(copy.deepcopy(student), FeatureKD()).prepare(student, x)(student, x, labels=labels)


def test_the_batch_shows_that_attention_has_time_first_only_inside_its_block():
    class Inside(Residual):
        def forward(self, x):
            return super().forward(x.transpose(0, 1)).transpose(0, 1)

    student, x = Encoder(Inside, first=False).double(), torch.randn(4, 6, 3).double()
    distill = Distiller(copy.deepcopy(student), FeatureKD("last", alpha=0.0)).prepare(student, x)
    distill(student, x, labels=torch.tensor([0, 1, -100, 2]))
    distill(student, x[:, :4], labels=torch.tensor([0, 1, -100, 2]))  # already decided
    assert Distiller(copy.deepcopy(student), FeatureKD("last", alpha=0.0, layout="b t d"))(student, x[:, :4]).loss == 0


def test_packed_sequences_are_refused_and_padded_ones_are_compared():
    class Packed(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.rnn, self.head = nn.LSTM(3, width), nn.Linear(width, 5)

        def forward(self, x):
            _, (h, _) = self.rnn(pack(x))
            return self.head(h[-1])

    student, teacher = Packed(6).double(), Packed(6).double()
    x, labels = torch.randn(2, 4, 3).double(), torch.tensor([0, 3])
    settings = {"layers": ["rnn"], "pairing": "same", "alpha": 0.0}
    with pytest.raises(TypeError, match=r"'rnn' returned a PackedSequence.*pad_packed_sequence.*feature_mask"):
        Distiller(teacher, FeatureKD(**settings))(student, x, labels=labels)
    with pytest.raises(ValueError, match=r"\(6, 6\).*batch of 6, but there are 2 examples.*no axis.*take=\.\.\."):
        Distiller(teacher, FeatureKD(**settings, take=(0, 0)))(student, x, labels=labels)

    def padded(output):
        return nn.utils.rnn.pad_packed_sequence(output[0], batch_first=True)[0]

    loss = Distiller(teacher, FeatureKD(**settings, take=padded))(student, x, labels=labels).loss
    s, t = (padded(m.rnn(pack(x))) for m in (student, teacher))
    torch.testing.assert_close(loss, F.mse_loss(s, t))


def pack(x):
    return nn.utils.rnn.pack_padded_sequence(x, torch.tensor([4, 2]), batch_first=True)


# -- features whose positions differ from those of the labels --


@pytest.mark.parametrize("distance", [distances.mse, distances.similarity, distances.rkd_distance])
def test_one_feature_per_example_is_weighted_by_the_labels_of_its_example(distance):
    s, t = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5)
    labels = torch.full((3, 7), -100)
    labels[0, :2], labels[2, 1:6] = 1, 2
    logits = torch.randn(3, 7, 4)
    captured = [capture(x) for x in (s, t)]
    captured[0].output = captured[1].output = logits
    for causal, counts in ((False, [2, 0, 5]), (True, [1, 0, 5])):
        criterion = FeatureKD(["stage"], pairing="same", distance=distance, alpha=0.0, causal=causal)
        value = criterion(*captured, labels)
        per_example = torch.zeros(3)
        labelled = [0, 2]
        per_example[labelled] = distance(s[labelled], t[labelled])
        expected = (per_example * torch.tensor(counts)).sum() / sum(counts)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(*(torch.autograd.grad(y, s, retain_graph=True)[0] for y in (value, expected)))


def test_each_node_has_a_label_and_a_batch_of_another_size_is_refused():
    s, t = torch.randn(9, 5, requires_grad=True), torch.randn(9, 5)
    labels = torch.randint(0, 3, (9,))
    labels[4:] = -100
    criterion = FeatureKD(["stage"], pairing="same", alpha=0.0)
    assert_same(criterion(capture(s), capture(t), labels), (s[:4] - t[:4]).square().mean(), s)
    with pytest.raises(ValueError, match=r"student layer 'stage' gives \(9, 5\).*batch of 9, but there are 2 examples"):
        criterion(capture(s), capture(t), labels[:2])


def test_hidden_states_are_always_batch_time_width():
    from types import SimpleNamespace as Output

    states = [torch.randn(4, 4, 4) for _ in range(3)]
    criterion = FeatureKD("last", alpha=0.0)
    other = [torch.randn(4, 4, 4) for _ in range(3)]
    labels = torch.zeros(4, 4, dtype=torch.long)
    labels[0] = -100
    value = criterion(Output(hidden_states=states), Output(hidden_states=other), labels)
    torch.testing.assert_close(value, (states[2] - other[2])[1:].square().mean())


def test_the_cka_matrix_reads_layouts_as_the_loss_does():
    student, x = Encoder(TIME_FIRST["custom"]).double(), torch.randn(4, 6, 3).double()
    with pytest.raises(ValueError, match=r"student block 0 gives \(6, 4, 8\).*layout='t b d'"):
        kdloss.analysis.cka_matrix(student, student, [x])

    class BatchFirst(Encoder):
        def forward(self, x):
            for layer in self.layers:
                x = layer(self.embed(x) if layer is self.layers[0] else x)
            return x

    batch_first = BatchFirst(Custom, first=False).double()
    batch_first.load_state_dict(student.state_dict())
    expected = kdloss.analysis.cka_matrix(batch_first, batch_first, [x]).values
    torch.testing.assert_close(kdloss.analysis.cka_matrix(student, student, [x], layout="t b d").values, expected)


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize(("pattern", "usual"), [("b h w c", "b c h w"), ("b c t", "b t c"), ("b d h w c", "b c d h w")])
def test_for_different_positions_the_layout_that_aligns_them_is_advised_and_not_a_resize(side, pattern, usual):
    (s, _), (t, _) = features_in(pattern, 0), features_in(usual, 1, width=7)
    layouts = {"layout": usual, "teacher_layout": usual}
    argument = "layout"
    if side == "teacher":
        s, t, argument = t, s, "teacher_layout"
    criterion = FeatureKD(["stage"], pairing="same", alpha=0.0, distance=distances.similarity, **layouts)
    with pytest.raises(ValueError, match=rf"different positions.*With {argument}='{pattern}' they stand") as error:
        criterion(capture(s), capture(t))
    assert "resize" not in str(error.value), "which would hide it"


def test_blocks_of_xlnet_have_time_first_and_equal_its_hidden_states():
    from transformers import XLNetConfig, XLNetLMHeadModel

    shape = {"vocab_size": 20, "d_model": 8, "n_layer": 2, "n_head": 2, "d_inner": 8}
    student, teacher = (XLNetLMHeadModel(XLNetConfig(**shape)).double().eval() for _ in range(2))
    tokens = torch.randint(0, 20, (2, 5))
    labels = tokens.clone()
    labels[0, 3:] = -100
    settings = {"depths": (2, 2)}
    with pytest.raises(ValueError, match=r"student block 0 gives \(5, 2, 8\).*there are 2 examples.*layout='t b d'"):
        Distiller(teacher, kdloss.Sum(Features([0], **settings), causal=False))(
            student, input_ids=tokens, labels=labels
        )
    criterion = kdloss.Sum(Features([0], layout="t b d", **settings), causal=False)
    loss = Distiller(teacher, criterion)(student, input_ids=tokens, labels=labels).loss
    s, t = (m(tokens, output_hidden_states=True).hidden_states[1] for m in (student, teacher))
    expected = (s - t.detach())[labels != -100].square().mean()
    torch.testing.assert_close(loss, expected)
    weight = student.transformer.layer[0].ff.layer_2.weight
    torch.testing.assert_close(*(torch.autograd.grad(x, weight)[0] for x in (loss, expected)))
