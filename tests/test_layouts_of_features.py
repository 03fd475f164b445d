"""The axes of features: said by a pattern, told by modules, labels and inputs, or refused."""

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


def of(pattern, seed, width=5):
    """Features in a layout, and by hand `[B, N, D]`."""
    names = pattern.split()
    wide = "c" if "c" in names else "d"
    sizes = SIZES | {wide: width}
    x = torch.randn(*(sizes[n] for n in names), generator=torch.Generator().manual_seed(seed)).double()
    positions = " ".join(n for n in names if n not in ("b", wide))
    return x.requires_grad_(), rearrange(x, f"{pattern} -> b ({positions}) {wide}")


def seen(x, name="stage"):
    captured = kdloss.Captured()
    captured.features[name] = x
    return captured


def same(loss, expected, x):
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(y, x)[0] for y in (loss, expected)), rtol=1e-9, atol=1e-12)


# -- what is said --


@pytest.mark.parametrize("pattern", LAYOUTS)
@pytest.mark.parametrize("distance", [distances.mse, distances.cosine, distances.cwd, distances.similarity])
def test_a_stated_layout_gives_value_and_gradient_of_the_permuted_features(pattern, distance):
    (s, rows), (t, others) = of(pattern, 0), of(pattern, 1)
    if pattern == "c b":
        rows, others = (x[:, 0] for x in (rows, others))  # examples are the rows
    criterion = 1.0 * Features(["stage"], pairing="same", distance=distance, layout=pattern)
    same(criterion(seen(s), seen(t)), distance(rows, others.detach()).mean(), s)


def test_labels_stand_at_the_positions_in_the_patterns_order():
    (s, rows), (t, others) = of("w c b h", 0), of("b h w c", 1)
    labels = torch.zeros(3, 6, 4, dtype=torch.long)  # [B, W, H], as the student's are
    labels[0, 1:] = -100
    criterion = 1.0 * Features(["stage"], pairing="same", layout="w c b h", teacher_layout="b w h c")
    keep = labels.flatten(1) != -100
    t = rearrange(t, "b h w c -> b w h c")
    others = rearrange(others, "b (h w) c -> b (w h) c", h=4)
    same(criterion(seen(s), seen(t), labels), (rows - others)[keep].square().mean(), s)


def test_each_layer_may_have_its_own_layout():
    (first, a), (second, b) = of("b h w c", 0), of("b c t", 1)
    (first_t, c), (second_t, d) = of("b c h w", 2), of("t b d", 3)
    captured = [seen(x) for x in (first, first_t)]
    for one, x in zip(captured, (second, second_t), strict=True):
        one.features["last"] = x
    said = {"layout": {"stage": "b h w c", "last": "b c t"}, "teacher_layout": {"last": "t b d"}}
    criterion = FeatureKD(["stage", "last"], pairing="same", alpha=0.0, **said)
    expected = ((a - c).square().mean() + (b - d).square().mean()) / 2
    same(criterion(*captured), expected, first)
    for again in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        torch.testing.assert_close(again(*captured), expected)
    with pytest.raises(ValueError, match=r"layout names \['stag'\], and the layers are \['stage', 'last'\]"):
        FeatureKD(["stage", "last"], pairing="same", alpha=0.0, layout={"stag": "b h w c"})(*captured)
    with pytest.raises(
        ValueError, match=r"layout names \['last'\], and the layers are blocks, which are named by number"
    ):
        FeatureKD("last", depths=(1, 1), alpha=0.0, take={"last": 0})(*captured)


@pytest.mark.parametrize(("axes", "kind"), [(1, nn.Conv1d), (2, nn.Conv2d), (3, nn.Conv3d)])
def test_a_convolution_projects_features_of_as_many_axes_whatever_their_layout(axes, kind):
    pattern = {1: "b t c", 2: "b h w c", 3: "b d h w c"}[axes]
    (s, _), (t, others) = of(pattern, 0), of(pattern, 1, width=7)
    settings = {"projection": partial(kind, kernel_size=1), "widths": (5, 7), "layout": pattern}
    criterion = FeatureKD(["stage"], pairing="same", alpha=0.0, **settings).double()
    (projection,) = criterion.projections.values()
    made = projection(s.movedim(-1, 1)).flatten(2).mT
    same(criterion(seen(s), seen(t)), (made - others).square().mean(), s)
    (s, _), (t, _) = of("b c", 0), of("b c", 1, width=7)
    criterion = FeatureKD(["stage"], pairing="same", alpha=0.0, **settings | {"layout": None}).double()
    with pytest.raises(ValueError, match=r"features with \d axes of positions.*projection=kdloss\.projections\.linear"):
        criterion(seen(s), seen(t))


def test_layers_side_by_side_are_joined_along_their_widths_whatever_their_layouts():
    (a, x), (b, y) = of("b h w c", 0), of("b c h w", 1, width=3)
    (t, other) = of("b h w c", 2, width=8)
    captured = seen(a)
    captured.features["norm"] = b
    said = {"layout": {"stage": "b h w c"}, "teacher_layout": "b h w c"}
    criterion = FeatureKD(pairing=[(("stage", "norm"), "stage")], alpha=0.0, **said)
    same(criterion(captured, seen(t)), (torch.cat([x, y], -1) - other).square().mean(), a)


def test_resizing_gets_maps_with_their_channels_second_and_volumes_and_tokens_as_they_are():
    asked = []

    def watched(s, t):
        asked.append((tuple(s.shape), tuple(t.shape)))
        return kdloss.resize.pool(s, t, size=(8, -1))

    s = torch.randn(2, 4, 6, 5).double().requires_grad_()  # [B, H, W, C]
    t = torch.randn(2, 96, 5).double()  # 8 x 12 patches
    criterion = FeatureKD(["stage"], pairing="same", alpha=0.0, resize=watched, layout="b h w c", teacher_layout=None)
    blocks = t.unflatten(1, (4, 2, 6, 2)).mean((2, 4)).flatten(1, 2)
    same(criterion(seen(s), seen(t)), (s.flatten(1, 2) - blocks).square().mean(), s)
    assert asked == [((2, 5, 4, 6), (2, 96, 5))]
    s, t = torch.randn(2, 2, 4, 6, 5).double().requires_grad_(), torch.randn(2, 5, 2, 2, 3).double()
    criterion = FeatureKD(
        ["stage"], pairing="same", alpha=0.0, resize=watched, layout="b d h w c", teacher_layout="b c d h w"
    )
    coarse = s.unflatten(3, (3, 2)).unflatten(2, (2, 2)).mean((3, 5))
    same(criterion(seen(s), seen(t)), (coarse.movedim(-1, 1) - t).square().mean(), s)
    with pytest.raises(ValueError, match=r"^stage-stage: teacher features.*97 positions.*fit a grid of size=\(8, -1\)"):
        FeatureKD(["stage"], pairing="same", alpha=0.0, resize=watched)(
            seen(torch.randn(2, 5, 4, 6)), seen(torch.randn(2, 97, 5))
        )


def test_a_generator_of_maps_is_told_their_grid_and_that_of_tokens_has_to_be_said():
    (s, _), (t, others) = of("b h w c", 0), of("b h w c", 1)
    build = partial(distances.MGD, ratio=0.0)
    settings = {"pairing": "same", "alpha": 0.0, "widths": (5, 5), "layout": "b h w c"}
    criterion = FeatureKD(["stage"], distance=build, **settings).double()
    module = criterion.terms["feature"].distances["stage"]
    made = module.second(module.first(s.movedim(-1, 1)).relu()).flatten(2).mT
    same(criterion(seen(s), seen(t)), (made - others).square().mean(), s)
    tokens = FeatureKD(["stage"], distance=build, **settings | {"layout": None}).double()
    with pytest.raises(ValueError, match=r"16 positions, and their grid isn't given"):
        tokens(*(seen(torch.randn(3, 16, 5).double()) for _ in range(2)))


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


# -- what modules tell --


class Around(nn.Module):
    """A module named "part" whose output, maybe turned around, is the model's feature; the model gives classes."""

    def __init__(self, part, turn=None):
        super().__init__()
        self.part, self.turn = part, turn

    def forward(self, x):
        x = self.part(x)
        x = x[0] if isinstance(x, tuple) else x
        return x.flatten(1).mean(1, keepdim=True).expand(-1, 5)


class Turned(nn.Module):
    """Parts, one after the other, and the last one's output turned around."""

    def __init__(self, *parts, turn):
        super().__init__()
        self.parts, self.order = nn.ModuleList(parts), turn

    def forward(self, x):
        for part in self.parts:
            x = part(x)
        return x.permute(self.order)


class Unfolded(nn.Module):
    """Frames [B, T, C, H, W] that go through a part one by one."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x):
        return self.part(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def read(part, x, labels=None, **said):
    """The loss of a student against itself, and the feature's width in the projection that was built."""
    student = Around(part).double()
    criterion = FeatureKD(["part"], pairing="same", alpha=0.0, projection=kdloss.projections.linear, **said)
    distill = Distiller(copy.deepcopy(student), criterion).prepare(student, x)
    criterion.double()
    distill(student, x, labels=labels)
    return criterion.projections["part"].in_features


def conv(n, *widths):
    kind, norm = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[n - 1], (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[n - 1]
    return [m for w in widths for m in (kind(3, w, 1), norm(w), nn.ReLU())]


x1, x2, x3 = (torch.randn(2, 3, *size).double() for size in ((7,), (4, 6), (2, 4, 6)))
last2 = torch.randn(2, 4, 6, 3).double()  # [B, H, W, C]
LAST, SECOND = (0, 2, 3, 1), (0, 3, 1, 2)
REFUSED = {
    "a 1-d convolution": (nn.Conv1d(3, 8, 1), x1, "layout='b c t'"),
    "one as wide as there are frames": (nn.Conv1d(3, 7, 1), x1, "layout='b c t'"),
    "a stack of them": (nn.Sequential(*conv(1, 8)), x1, "layout='b c t'"),
    "one with a pool behind it": (nn.Sequential(nn.Conv1d(3, 8, 1), nn.MaxPool1d(2)), x1, "layout='b c t'"),
    "a map turned around behind a convolution": (Turned(*conv(2, 8), turn=LAST), x2, "layout='b h w c'"),
    "channels last": (nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 8), nn.GELU()), last2, "layout='b h w c'"),
    "as many as rows": (nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 4)), last2, "layout='b h w c'"),
    "a norm alone": (nn.LayerNorm(3), last2, "layout='b h w c'"),
    "of both kinds, and last": (Turned(nn.Conv2d(3, 8, 1), turn=LAST), x2, "layout='b h w c'"),
    "volumes, channels last": (nn.Linear(3, 8), torch.randn(2, 2, 4, 6, 3).double(), "layout='b d h w c'"),
    "frames, channels last, turned": (
        Turned(nn.Linear(3, 8), turn=(0, 2, 1)),
        torch.randn(2, 7, 3).double(),
        "'b c t'",
    ),
    "an activation behind a convolution": (nn.Sequential(nn.Conv1d(3, 8, 1), nn.ReLU()), x1, "layout='b c t'"),
    "frames of maps": (Unfolded(nn.Conv2d(3, 8, 1)), torch.randn(2, 4, 3, 5, 6).double(), "'b c d h w' or layout="),
    "volumes of nothing": (nn.Identity(), torch.randn(2, 3, 4, 5, 6).double(), "'b c d h w' or layout='b d h w c'"),
    "six axes": (nn.Identity(), torch.randn(2, 3, 4, 5, 6, 7).double(), "name its axes by layout="),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_default_that_the_module_speaks_against_is_refused_with_the_layout_to_write(name):
    part, x, write = REFUSED[name]
    with pytest.raises(ValueError, match=f"student layer 'part' gives.*{write}"):
        read(part, x)


RIGHT = {
    "a map": (nn.Sequential(*conv(2, 8)), x2, {}, 8),
    "a map as wide as high and broad": (nn.Conv2d(3, 4, 1), x2[..., :4], {}, 4),
    "a volume": (nn.Sequential(*conv(3, 8)), x3, {}, 8),
    "a volume of cubes": (nn.Conv3d(3, 4, 1), torch.randn(2, 3, 4, 4, 4).double(), {}, 4),
    "frames": (nn.Sequential(*conv(1, 8)), x1, {"layout": "b c t"}, 8),
    "channels last": (nn.Linear(3, 8), last2, {"layout": "b h w c"}, 8),
    "tokens": (nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 8)), torch.randn(2, 7, 3).double(), {}, 8),
    "as many tokens as channels": (nn.Linear(3, 7), torch.randn(2, 7, 3).double(), {}, 7),
    "recurrent, both ways": (nn.LSTM(3, 4, batch_first=True, bidirectional=True), torch.randn(2, 8, 3).double(), {}, 8),
    "vectors": (nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8)), torch.randn(6, 3).double(), {}, 8),
    "channels last and back": (Turned(nn.Linear(3, 8), turn=SECOND), last2, {}, 8),
    "said and of another kind": (Turned(*conv(2, 8), turn=LAST), x2, {"layout": "b h w c"}, 8),
    "maps of an activation": (nn.Sequential(nn.PReLU(), nn.Identity()), x2, {}, 3),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_layout_that_nothing_speaks_against_is_read(name):
    part, x, said, width = RIGHT[name]
    assert read(part, x, **said) == width


def test_an_activation_is_told_by_what_stands_before_it():
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


def test_numbers_to_regress_tell_how_many_examples_there_are():
    s, t = torch.randn(6, 4, 5), torch.randn(6, 4, 5)
    score = torch.randn(4)
    regress = kdloss.Task(lambda output, y: (output - y).square().mean())
    captured = [seen(x) for x in (s, t)]
    captured[0].output = torch.randn(4)
    with pytest.raises(ValueError, match=r"gives \(6, 4, 5\).*there are 4 examples.*layout='t b d'"):
        (regress + Features(["stage"], pairing="same"))(*captured, score)


class Mixed(nn.Module):
    """A block that convolves maps, and mixes channels where they are last; it gives maps."""

    def __init__(self, width, channels_last=False):
        super().__init__()
        self.conv, self.mlp, self.last = nn.Conv2d(3, width, 1), nn.Linear(width, width), channels_last

    def forward(self, x):
        x = self.mlp(self.conv(x).permute(LAST))
        return x if self.last else x.permute(SECOND)


def test_a_block_of_both_kinds_is_told_by_its_numbers_and_refused_where_they_say_nothing():
    assert read(Mixed(8), x2) == 8
    with pytest.raises(ValueError, match="layout='b h w c'"):
        read(Mixed(8, channels_last=True), x2)
    square = torch.randn(2, 3, 6, 6).double()
    for last in (False, True):
        with pytest.raises(ValueError, match=r"nothing tells.*layout='b c h w' or layout='b h w c'"):
            read(Mixed(6, channels_last=last), square)
        assert read(Mixed(6, channels_last=last), square, layout="b h w c" if last else "b c h w") == 6


@pytest.mark.parametrize("place", ["model", "module"])
def test_the_format_that_timm_writes_on_models_counts_where_modules_say_nothing(place):
    square = torch.randn(2, 6, 6, 6).double()
    student = Around(nn.Identity())
    (student if place == "model" else student.part).output_fmt = "NHWC"
    criterion = FeatureKD(["part"], pairing="same", alpha=0.0)
    with pytest.raises(ValueError, match="layout='b h w c'"):
        Distiller(copy.deepcopy(student), criterion).prepare(student, square)
    student.part = nn.Conv2d(6, 6, 1).double()
    Distiller(copy.deepcopy(student), FeatureKD(["part"], pairing="same", alpha=0.0)).prepare(student, square)


def test_the_error_is_about_the_side_that_is_another():
    student, teacher = Around(nn.Conv2d(3, 8, 1)), Around(nn.Sequential(Turned(nn.Conv2d(3, 8, 1), turn=LAST)))
    x = torch.randn(2, 3, 4, 6)
    criterion = FeatureKD(["part"], pairing="same", alpha=0.0)
    with pytest.raises(
        ValueError, match=r"teacher layer 'part' gives.*write teacher_layout=.* or teacher_layout='b h w c'"
    ):
        Distiller(teacher, criterion).prepare(student, x)
    criterion = FeatureKD(["part"], pairing="same", alpha=0.0, teacher_layout="b h w c")
    loss = Distiller(teacher, criterion).prepare(student, x)(student, x).loss
    torch.testing.assert_close(loss, F.mse_loss(student.part(x), teacher.part(x).permute(SECOND)))
    with pytest.raises(ValueError, match=r"layout='b h w c' reads student layer 'part'.*as 6 wide.*8 channels"):
        Distiller(teacher, FeatureKD(["part"], pairing="same", layout="b h w c")).prepare(student, x)


def test_a_width_inside_a_block_that_is_as_long_as_a_map_is_no_advice():
    """DenseNet's blocks append 32 channels to what came in, and 32 pixels make a row."""

    class Appends(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 1)

        def forward(self, x):
            return torch.cat([x, self.conv(x)], 1)

    student, teacher, x = Around(Appends()), Around(Appends()), torch.randn(2, 3, 4, 6)
    criterion = FeatureKD(["part"], pairing="same", alpha=0.0)
    with pytest.raises(ValueError, match=r"nothing tells which axis.*layout='b c h w' or layout='b h w c'"):
        Distiller(teacher, criterion).prepare(student, x)
    criterion = FeatureKD(["part"], pairing="same", alpha=0.0, layout="b c h w")
    loss = Distiller(teacher, criterion).prepare(student, x)(student, x).loss
    torch.testing.assert_close(loss, F.mse_loss(student.part(x), teacher.part(x)))


def test_one_layer_among_others_is_told_by_its_name():
    """TinyViT's first blocks have channels second, the later ones last."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 1), nn.Linear(8, 8)

        def forward(self, x):
            return self.second(self.first(x).permute(LAST))

    student, teacher, x = Both(), Both(), torch.randn(2, 3, 4, 6)
    both = ["first", "second"]
    with pytest.raises(ValueError, match=r"layer 'second'.*write layout=\{'second': 'b h w c'\}"):
        Distiller(teacher, FeatureKD(both, pairing="same", alpha=0.0)).prepare(student, x)
    criterion = FeatureKD(both, pairing="same", alpha=0.0, layout={"second": "b h w c"})
    loss = Distiller(teacher, criterion).prepare(student, x)(student, x).loss
    expected = F.mse_loss(student.first(x), teacher.first(x)) + F.mse_loss(student(x), teacher(x))
    torch.testing.assert_close(loss, expected / 2)


def test_a_layer_is_decided_where_it_is_seen_first_and_held_to_it():
    """Later numbers may meet by chance; they leave nothing open again, but they may contradict."""
    student = Around(Mixed(8)).double()
    distill = Distiller(copy.deepcopy(student), FeatureKD(["part"], pairing="same", alpha=0.0)).prepare(student, x2)
    distill(student, x2)
    distill(student, torch.randn(2, 3, 8, 8).double())  # by itself this would be refused
    student.part.last = True
    with pytest.raises(ValueError, match=r"layout='b c h w' reads student layer 'part'.*as 4 wide.*8 channels"):
        distill(student, x2)


# -- which axis is the batch --


class Encoder(nn.Module):
    """Tokens first [B, T], then layers that have time first."""

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


class Own(nn.Module):
    """A block of which nothing tells that time is first."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(width) + 0.1 * torch.randn(width, width))

    def forward(self, x):
        return torch.tanh(x @ self.weight)


class Residual(nn.Module):
    """Attention with time first inside a block, as in OpenAI's CLIP."""

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
    "own": Own,
}


@pytest.mark.parametrize("kind", TIME_FIRST)
@pytest.mark.parametrize("known", ["labels", "inputs"])
def test_time_first_is_found_out_and_right_where_it_is_said(kind, known):
    student, teacher = Encoder(TIME_FIRST[kind]).double(), Encoder(TIME_FIRST[kind], depth=3).double()
    x, labels = torch.randn(4, 6, 3).double(), torch.tensor([0, 1, -100, 2])
    settings = {"alpha": 0.0, "layers": "last"}
    given = {"labels": labels} if known == "labels" else {}
    with pytest.raises(ValueError, match=r"student block 1 gives \(6, 4, 8\).*batch.*layout='t b d'"):
        Distiller(teacher, FeatureKD(**settings)).prepare(student, x)(student, x, **given)
    criterion = FeatureKD(**settings, layout="t b d")
    loss = Distiller(teacher, criterion).prepare(student, x)(student, x, **given).loss
    s, t = (run(m, x) for m in (student, teacher))
    values = (s - t.detach()).square().mean(-1)  # [T, B]
    expected = values[:, labels != -100].mean() if known == "labels" else values.mean()
    torch.testing.assert_close(loss, expected)
    one = next(p for p in student.parameters() if p.requires_grad)
    torch.testing.assert_close(*(torch.autograd.grad(y, one)[0] for y in (loss, expected)))
    if known == "labels":  # what was said is held against the numbers, too
        with pytest.raises(ValueError, match=r"as 'b t d' is a batch of 6, but there are 4 examples.*layout='t b d'"):
            Distiller(teacher, FeatureKD(**settings, layout="b t d"))(student, x, **given)


def run(model, x):
    x = model.embed(x).transpose(0, 1)
    for layer in model.layers:
        x = layer(x)
        x = x[0] if isinstance(x, tuple) else x
    return x


@pytest.mark.parametrize("kind", ["transformer", "lstm", "gru", "residual"])
def test_time_first_is_found_out_where_there_are_as_many_frames_as_examples(kind):
    student, x = Encoder(TIME_FIRST[kind]).double(), torch.randn(4, 4, 3).double()
    labels = torch.tensor([0, 1, 3, 2])
    with pytest.raises(ValueError, match=r"gives \(4, 4, 8\).*second axis.*layout='t b d'"):
        Distiller(copy.deepcopy(student), FeatureKD()).prepare(student, x)(student, x, labels=labels)


def test_attention_that_has_time_first_only_inside_is_told_by_the_batch():
    class Inside(Residual):
        def forward(self, x):
            return super().forward(x.transpose(0, 1)).transpose(0, 1)

    student, x = Encoder(Inside, first=False).double(), torch.randn(4, 6, 3).double()
    distill = Distiller(copy.deepcopy(student), FeatureKD("last", alpha=0.0)).prepare(student, x)
    distill(student, x, labels=torch.tensor([0, 1, -100, 2]))
    distill(student, x[:, :4], labels=torch.tensor([0, 1, -100, 2]))  # settled by then
    assert Distiller(copy.deepcopy(student), FeatureKD("last", alpha=0.0, layout="b t d"))(student, x[:, :4]).loss == 0


def test_packed_rows_are_no_batch_and_padded_ones_are():
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


# -- features of other positions than the labels --


@pytest.mark.parametrize("distance", [distances.mse, distances.similarity, distances.rkd_distance])
def test_one_feature_for_each_example_counts_for_all_labels_of_its_example(distance):
    s, t = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5)
    labels = torch.full((3, 7), -100)
    labels[0, :2], labels[2, 1:6] = 1, 2
    logits = torch.randn(3, 7, 4)
    captured = [seen(x) for x in (s, t)]
    captured[0].output = captured[1].output = logits
    for causal, counts in ((False, [2, 0, 5]), (True, [1, 0, 5])):
        criterion = FeatureKD(["stage"], pairing="same", distance=distance, alpha=0.0, causal=causal)
        value = criterion(*captured, labels)
        per = torch.zeros(3)
        kept = [0, 2]
        per[kept] = distance(s[kept], t[kept])
        expected = (per * torch.tensor(counts)).sum() / sum(counts)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(*(torch.autograd.grad(y, s, retain_graph=True)[0] for y in (value, expected)))


def test_nodes_are_labelled_one_by_one_and_a_batch_of_another_size_is_refused():
    s, t = torch.randn(9, 5, requires_grad=True), torch.randn(9, 5)
    labels = torch.randint(0, 3, (9,))
    labels[4:] = -100
    criterion = FeatureKD(["stage"], pairing="same", alpha=0.0)
    same(criterion(seen(s), seen(t), labels), (s[:4] - t[:4]).square().mean(), s)
    with pytest.raises(ValueError, match=r"student layer 'stage' gives \(9, 5\).*batch of 9, but there are 2 examples"):
        criterion(seen(s), seen(t), labels[:2])


def test_hidden_states_are_batch_time_width_by_definition():
    from types import SimpleNamespace as Output

    states = [torch.randn(4, 4, 4) for _ in range(3)]
    criterion = FeatureKD("last", alpha=0.0)
    other = [torch.randn(4, 4, 4) for _ in range(3)]
    labels = torch.zeros(4, 4, dtype=torch.long)
    labels[0] = -100
    value = criterion(Output(hidden_states=states), Output(hidden_states=other), labels)
    torch.testing.assert_close(value, (states[2] - other[2])[1:].square().mean())


def test_the_matrix_of_likenesses_reads_features_as_the_loss_does():
    student, x = Encoder(TIME_FIRST["own"]).double(), torch.randn(4, 6, 3).double()
    with pytest.raises(ValueError, match=r"student block 0 gives \(6, 4, 8\).*layout='t b d'"):
        kdloss.analysis.cka_matrix(student, student, [x])

    class Batch(Encoder):
        def forward(self, x):
            for layer in self.layers:
                x = layer(self.embed(x) if layer is self.layers[0] else x)
            return x

    first = Batch(Own, first=False).double()
    first.load_state_dict(student.state_dict())
    expected = kdloss.analysis.cka_matrix(first, first, [x]).values
    torch.testing.assert_close(kdloss.analysis.cka_matrix(student, student, [x], layout="t b d").values, expected)


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize(("pattern", "usual"), [("b h w c", "b c h w"), ("b c t", "b t c"), ("b d h w c", "b c d h w")])
def test_positions_that_a_layout_would_bring_together_are_not_to_be_resized(side, pattern, usual):
    (s, _), (t, _) = of(pattern, 0), of(usual, 1, width=7)
    layouts = {"layout": usual, "teacher_layout": usual}
    argument = "layout"
    if side == "teacher":
        s, t, argument = t, s, "teacher_layout"
    criterion = FeatureKD(["stage"], pairing="same", alpha=0.0, distance=distances.similarity, **layouts)
    with pytest.raises(ValueError, match=rf"different positions.*With {argument}='{pattern}' they stand") as error:
        criterion(seen(s), seen(t))
    assert "resize" not in str(error.value), "which would hide it"


def test_blocks_of_xlnet_run_with_time_first_and_equal_its_own_hidden_states():
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
    one = student.transformer.layer[0].ff.layer_2.weight
    torch.testing.assert_close(*(torch.autograd.grad(x, one)[0] for x in (loss, expected)))
