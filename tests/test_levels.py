"""Modules that return several features: each has a name, and none is chosen without being named."""

from types import SimpleNamespace as Output

import pytest
import torch
import torch.nn.functional as F
from stepping import Steps, holds_to, recipe
from torch import nn
from torch.optim import SGD

import kdloss
from kdloss import Distillation, Distiller, FeatureKD, Features, Sum, Task

KINDS = {
    "list": list,
    "tuple": tuple,
    "dict": lambda levels: {str(i): level for i, level in enumerate(levels)},  # like torchvision's feature pyramid
}


class Pyramid(nn.Module):
    """Returns maps of three sizes, in a list, a tuple or a dict."""

    def __init__(self, width, kind):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, width + i, 3, 2 ** (i + 1), 1) for i in range(3))
        self.kind = KINDS[kind]

    def forward(self, x):
        return self.kind([conv(x) * 2 for conv in self.convs])


class Detector(nn.Module):
    """A pyramid with a head on each level, which returns its own loss."""

    def __init__(self, width, kind="list", seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.fpn = Pyramid(width, kind)
        self.heads = nn.ModuleList(nn.Conv2d(width + i, 7, 1) for i in range(3))
        self.double()

    def forward(self, images, labels=None):
        levels = self.fpn(images)
        levels = levels.values() if isinstance(levels, dict) else levels
        boxes = [head(level) for head, level in zip(self.heads, levels, strict=True)]
        loss = None
        if labels is not None:
            loss = sum((b.mean((2, 3)) - y["box"]).square().sum() for b in boxes for y in labels)
        return Output(boxes=boxes, loss=loss)


images = torch.randn(2, 3, 16, 24).double()
LEVELS = ["fpn[0]", "fpn[1]", "fpn[2]"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_level_of_a_pyramid_is_compared_in_one_pass_with_its_own_projection(kind):
    student, teacher = Detector(4, kind), Detector(6, kind, seed=1)
    criterion = FeatureKD(LEVELS, pairing="same", alpha=0.0)
    distill = Distiller(teacher, criterion).prepare(student, images)
    assert [(p.in_features, p.out_features) for p in criterion.projections.values()] == [(4, 6), (5, 7), (6, 8)]
    criterion.double()
    with Steps() as steps:
        out = distill(student, images)
    assert steps.ran[student] == steps.ran[teacher] == steps.ran[student.fpn] == 1
    expected = 0
    for i, name in enumerate(LEVELS):
        s, t = (2 * m.fpn.convs[i](images).movedim(1, -1) for m in (student, teacher))
        one = F.mse_loss(criterion.projections[name](s), t.detach())
        torch.testing.assert_close(out.components[f"feature/{name}-{name}"], one.detach())
        expected = expected + one / 3
    torch.testing.assert_close(out.loss, expected)
    for p in student.fpn.parameters():
        torch.testing.assert_close(*(torch.autograd.grad(x, p, retain_graph=True)[0] for x in (out.loss, expected)))


@recipe
def detector(student, teacher, images, boxes):
    levels = Features(["fpn[0]", "fpn[1]", "fpn[2]"], pairing="same")
    model = Distillation(student, teacher, Sum(Task(), 0.5 * levels)).prepare(images)
    optimizer = SGD(model.double().parameters(), lr=0.1)
    model(images, labels=boxes).loss.backward()
    optimizer.step()


def test_a_detector_learns_from_its_own_loss_and_from_all_levels_of_its_pyramid():
    student, teacher = Detector(4), Detector(6, seed=1)
    boxes = [{"box": torch.randn(7).double()} for _ in range(2)]
    with Steps() as steps:
        detector(student, teacher, images, boxes)
    assert steps.ran[student] == steps.ran[teacher] == 2, "one pass to measure widths, one to train"

    def loss(before):
        own = before.student(images, labels=boxes).loss
        for name, s, t in zip(LEVELS, before.student.fpn(images), teacher.fpn(images), strict=True):
            projection = before.criterion.terms["feature"].projections[name]
            own = own + 0.5 / 3 * F.mse_loss(projection(s.movedim(1, -1)), t.movedim(1, -1).detach())
        return own

    holds_to(steps, loss)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("take", [None, lambda levels: levels])
def test_a_module_that_returns_several_features_is_refused_with_their_names(kind, take):
    student = Detector(4, kind)
    criterion = FeatureKD(["fpn"], pairing="same", alpha=0.0, take=take)
    with pytest.raises(
        TypeError, match=r"'fpn' returned.*several features.*'fpn\[0\]', 'fpn\[1\]', 'fpn\[2\]'"
    ) as error:
        Distiller(Detector(4, kind), criterion).prepare(student, images)
    assert "(2, 4, 8, 12)" in str(error.value), "the message lists their shapes"


@pytest.mark.parametrize(
    "pairs", [[("fpn[0]", "fpn[1]")], [("fpn[-1]", "fpn[2]", 2.0)], [(("fpn[1]", "fpn[1]"), "fpn[1]")]]
)
def test_features_of_a_module_can_be_layers_in_explicit_pairs(pairs):
    student, teacher = Detector(4), Detector(4)
    criterion = FeatureKD(pairing=pairs, alpha=0.0, resize=kdloss.resize.pool)
    distill = Distiller(teacher, criterion).prepare(student, images)
    components = distill(student, images).components
    s, t = pairs[0][:2]
    s = "+".join(s) if isinstance(s, tuple) else s
    assert list(components) == [f"feature/{s}-{t}", "feature"]


def test_take_and_layout_apply_to_features_by_their_names():
    student, teacher = Detector(4), Detector(4, seed=1)
    settings = {"take": {"fpn[1]": lambda x: x.movedim(1, -1)}, "layout": {"fpn[1]": "b h w c"}, "teacher_take": None}
    criterion = FeatureKD(["fpn[1]"], pairing="same", alpha=0.0, teacher_layout=None, **settings)
    loss = Distiller(teacher, criterion).prepare(student, images)(student, images).loss
    torch.testing.assert_close(loss, F.mse_loss(student.fpn(images)[1], teacher.fpn(images)[1]))


class Nested(nn.Module):
    """A backbone that returns nested dicts, lists and tuples."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        x = self.conv(x)
        return {"levels": [x, (x + 1, {"deep": x + 2})], "mask": x > 0, "out": None}


def test_capture_finds_nested_features_by_their_paths():
    model = nn.Sequential(Nested())
    names = ["0[levels][0]", "0[levels][1][0]", "0['levels'][-1][1][deep]", "0[mask]", "0.conv"]
    with kdloss.capture(model, names) as seen:
        out = model(images.float())
    x = seen["0.conv"]
    for name, expected in zip(names, (x, x + 1, x + 2, x > 0, x), strict=True):
        assert torch.equal(seen[name], expected)
    assert out is seen.output
    with kdloss.capture(model, ["0[levels]"], take={"0[levels]": (1, 1, "deep")}) as seen:
        model(images.float())
    assert seen["0[levels]"].shape == (2, 4, 16, 24)
    for missing in ("0[levels][2]", "0[other]", "0[out]"):
        refused = pytest.raises(TypeError, match=r"'0' returned a dict of .*which has no part '0\[")
        with refused, kdloss.capture(model, [missing]):
            model(images.float())
    with pytest.raises(ValueError, match=r"has no module 'body'"), kdloss.capture(model, ["body[0]"]):
        pass


FEATURE_FIRST = {
    "hidden states and attentions": lambda x: (x, torch.rand(2, 2, 7, 7)),
    "hidden states and a state": lambda x: (x, x[:1]),
    "a list with a mask": lambda x: [x, x > 0, None],
    "a dict with numbers": lambda x: {"hidden": x, "loss": x.mean(), "pooled": x[:, 0]},
    "a map and its sizes": lambda x: (x.unflatten(1, (7, 1)).movedim(-1, 1), (7, 1)),
}


@pytest.mark.parametrize("name", FEATURE_FIRST)
def test_an_output_that_begins_with_its_feature_needs_no_name(name):
    class Block(nn.Module):
        def forward(self, x):
            return FEATURE_FIRST[name](x)

    model = nn.Sequential(Block())
    x = torch.randn(2, 7, 4)
    with kdloss.capture(model, ["0"]) as seen:
        model(x)
    assert seen["0"].shape[0] == 2
    assert seen["0"].numel() == x.numel()


def test_a_hugging_face_output_begins_with_its_last_hidden_state():
    from families import build

    model = build("gpt2", width=16, depth=2)
    with kdloss.capture(model, ["transformer"]) as seen:
        model(torch.tensor([[1, 2, 3]]), output_hidden_states=True)
    assert torch.equal(seen["transformer"], seen.output.hidden_states[-1])


def test_the_levels_of_a_channels_last_model_are_not_read_as_channels_first():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 4))

        def forward(self, x):
            x = self.norm(x.movedim(1, -1))
            return [x, x[:, ::2, ::2]]

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.neck = Last()

        def forward(self, x):
            return self.neck(x)[0].mean((1, 2))

    x = images.float()
    criterion = FeatureKD(["neck[0]", "neck[1]"], pairing="same", alpha=0.0)
    with pytest.raises(ValueError, match=r"'neck\[0\]' gives \(2, 16, 24, 4\).*layout='b h w c'"):
        Distiller(Model(), criterion).prepare(Model(), x)
    student, teacher = Model(), Model()
    criterion = FeatureKD(["neck[0]", "neck[1]"], pairing="same", alpha=0.0, layout="b h w c")
    loss = Distiller(teacher, criterion).prepare(student, x)(student, x).loss
    pairs = zip(student.neck(x), teacher.neck(x), strict=True)
    torch.testing.assert_close(loss, sum(F.mse_loss(s, t) for s, t in pairs) / 2)


def test_features_of_blocks_are_compared_under_their_own_names():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            x = self.fc(x[0] if isinstance(x, tuple) else x)
            return x, x + 1

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(2))

        def forward(self, x):
            return self.blocks[1](self.blocks[0](x))[0]

    x, models = torch.randn(3, 4), (Model(), Model())
    criterion = FeatureKD(["blocks.0[1]", "blocks.1[0]"], pairing="same", alpha=0.0)
    components = Distiller(models[0], criterion)(models[1], x).components
    assert list(components) == ["feature/blocks.0[1]-blocks.0[1]", "feature/blocks.1[0]-blocks.1[0]", "feature"]
