"""Detectors: their own loss beside features, with labels that are lists of dicts and losses that are a dict."""

import logging

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from families import ResNet
from stepping import Steps, holds_to, recipe
from torch import nn
from torch.optim import SGD

import kdloss
from kdloss import Distillation, Features, Task


def boxes(n):
    """Random boxes inside an image: relative center and size."""
    return torch.rand(n, 4, dtype=torch.float64) * 0.4 + 0.3


def hooked(model, modules, *args, **batch):
    """The outputs of modules in one forward pass, and the output of the model."""
    seen = []
    handles = [
        m.register_forward_hook(lambda m, a, y: seen.append(y[0] if isinstance(y, tuple) else y)) for m in modules
    ]
    out = model(*args, **batch)
    for handle in handles:
        handle.remove()
    return seen, out


# -- DETR: labels=[{"class_labels", "boxes"}, ...], which the loss matches with predictions --


@recipe
def detr_with_features(student, teacher, batch):
    criterion = Task() + 0.5 * Features("all")
    model = Distillation(student, teacher, criterion).prepare(**batch)
    optimizer = SGD(model.parameters(), lr=0.1)
    model(**batch).loss.backward()
    optimizer.step()


def detr(width=16, depth=2, seed=0):
    torch.manual_seed(seed)
    stages = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "out_features": ["stage2"]}
    backbone = hf.ResNetConfig(**stages, layer_type="basic")
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    sizes = {"d_model": width, "encoder_layers": depth, "decoder_layers": depth, "num_queries": 5, "num_labels": 4}
    own = {"backbone_config": backbone, "use_timm_backbone": False, "use_pretrained_backbone": False, "dropout": 0.0}
    return hf.DetrForObjectDetection(hf.DetrConfig(**heads, **sizes, **own))


def detr_labels(objects=(2, 1)):
    """Classes and boxes of the objects in each image."""
    return [{"class_labels": torch.randint(0, 4, (n,)), "boxes": boxes(n).float()} for n in objects]


def test_a_detr_learns_from_its_own_loss_and_its_decoders_features_in_one_pass():
    pytest.importorskip("scipy")
    student, teacher = detr().train(), detr(width=24, depth=3, seed=1)
    batch = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": detr_labels()}
    with Steps() as steps:
        detr_with_features(student, teacher, batch)
    assert steps.ran[student] == steps.ran[teacher] == 2, "one pass to measure widths, one to train"

    def loss(before):
        own, out = hooked(before.student, before.student.model.decoder.layers, **batch)
        guides, _ = hooked(teacher.eval(), teacher.model.decoder.layers, pixel_values=batch["pixel_values"])
        project = before.criterion.terms["feature"].projections
        gaps = [(project[str(i)](own[i]) - guides[j].detach()).square().mean() for i, j in ((0, 0), (1, 2))]
        return out.loss + 0.5 * sum(gaps) / 2

    holds_to(steps, loss, rtol=1e-4, atol=1e-6)  # the model computes its own loss in float32
    assert sorted(steps.outs[0].components) == ["feature", "feature/0-0", "feature/1-2", "task"]


def test_a_detector_in_evaluation_predicts_without_labels_and_returns_its_own_loss_with_them():
    pytest.importorskip("scipy")
    model = Distillation(detr(), detr(seed=1), Task() + Features("last")).eval()
    x = torch.randn(2, 3, 32, 32)
    out = model(pixel_values=x)
    assert out.loss is None
    assert out.output.pred_boxes.shape == (2, 5, 4)
    labels = detr_labels()
    torch.testing.assert_close(
        model(pixel_values=x, labels=labels).loss, model.student(pixel_values=x, labels=labels).loss
    )


def test_cross_entropy_of_a_detectors_labels_is_refused_and_the_error_names_task():
    batch = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": detr_labels()}
    for criterion in (kdloss.FeatureKD(), kdloss.VanillaKD()):
        with pytest.raises(TypeError, match=r"labels are a list of dicts.*kdloss\.Task\(\)"):
            Distillation(detr().train(), detr(seed=1), criterion)(**batch)


# -- torchvision's interface: model(images, targets) returns losses in training, detections in evaluation --


class Detector(nn.Module):
    """Predicts one class and one box per image from the maps of a backbone."""

    def __init__(self, width):
        super().__init__()
        self.backbone = ResNet((1, 1, 2), width=width)
        self.backbone.fc = nn.Identity()
        self.scores, self.boxes = nn.Linear(4 * width, 5), nn.Linear(4 * width, 4)

    def forward(self, images, targets=None):
        features = self.backbone(torch.stack(images))
        scores, where = self.scores(features), self.boxes(features).sigmoid()
        if not self.training:
            return [{"boxes": b[None], "labels": s.argmax()[None]} for b, s in zip(where, scores, strict=True)]
        wanted = torch.stack([t["labels"][0] for t in targets]), torch.stack([t["boxes"][0] for t in targets])
        return {"loss_class": F.cross_entropy(scores, wanted[0]), "loss_box": F.smooth_l1_loss(where, wanted[1])}


@recipe
def detector_with_maps(student, teacher, images, targets):
    maps = Features(["backbone.layer2", "backbone.layer3"], pairing="same")
    criterion = Task(lambda losses, _: sum(losses.values())) + 2.0 * maps
    model = Distillation(student, teacher, criterion).prepare(images, targets).double()
    optimizer = SGD(model.parameters(), lr=0.1)
    model(images, targets).loss.backward()
    optimizer.step()


def test_a_detector_with_torchvisions_interface_learns_from_its_losses_and_its_maps():
    torch.manual_seed(0)
    student, teacher = Detector(4).double().train(), Detector(6).double().train()
    images = [torch.randn(3, 8, 8, dtype=torch.float64) for _ in range(3)]
    targets = [{"labels": torch.randint(0, 5, (1,)), "boxes": boxes(1)} for _ in images]
    with Steps() as steps:
        detector_with_maps(student, teacher, images, targets)
    assert steps.ran[student] == steps.ran[teacher] == 2, "one pass to measure widths, one to train"
    assert teacher.training

    def loss(before):
        def stages(model):
            return model.backbone.layer2, model.backbone.layer3

        own, losses = hooked(before.student, stages(before.student), images, targets)
        guides, detections = hooked(teacher.eval(), stages(teacher), images)
        assert isinstance(detections, list)
        project = before.criterion.terms["feature"].projections.values()
        gaps = [
            (p(s.movedim(1, -1)) - t.movedim(1, -1).detach()).square().mean()
            for p, s, t in zip(project, own, guides, strict=True)
        ]
        return losses["loss_class"] + losses["loss_box"] + 2 * sum(gaps) / 2

    holds_to(steps, loss)


def test_targets_passed_to_the_models_may_also_be_the_labels(caplog):
    student, teacher = Detector(4).train(), Detector(4)
    images = [torch.randn(3, 8, 8) for _ in range(2)]
    targets = [{"labels": torch.randint(0, 5, (1,)), "boxes": boxes(1).float()} for _ in images]

    def own(losses, labels):
        assert labels is targets
        return sum(losses.values())

    with caplog.at_level(logging.WARNING, "kdloss"):
        out = kdloss.Distiller(teacher, 1.0 * Task(own))(student, images, targets=targets, labels=targets)
    torch.testing.assert_close(out.loss, sum(student(images, targets).values()))
    assert not caplog.records


def test_a_student_whose_own_loss_takes_no_labels_gets_none():
    class Autoencoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            y = self.decoder(self.encoder(x))
            return {"loss": (y - x).square().mean(), "y": y}

    student, teacher, x = Autoencoder(), Autoencoder(), torch.randn(3, 4)
    out = kdloss.Distiller(teacher, Task() + Features(["encoder"], pairing="same"))(student, x)
    gap = (student.encoder(x) - teacher.encoder(x)).square().mean()
    torch.testing.assert_close(out.loss, student(x)["loss"] + gap)
