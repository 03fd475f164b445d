"""The blocks of a model's trunk, in the forms of vision models and in models with several stacks."""

import pytest
import torch
import transformers as hf
from families import FAMILIES, VOCAB, build
from torch import nn
from versions import since_transformers_5

import kdloss
from kdloss._capture import Located, Request, record
from kdloss.layers import find_blocks
from kdloss.layers.lists import block_lists


def conv(before, after, stride=1):
    """One layer, made of three modules."""
    return nn.Sequential(nn.Conv2d(before, after, 3, stride, 1), nn.BatchNorm2d(after), nn.ReLU())


class Residual(nn.Module):
    """A block like MobileNet's: its only child is a list of layers, like a stage's list of blocks."""

    def __init__(self, width=4):
        super().__init__()
        self.block = nn.Sequential(conv(width, width), conv(width, width))

    def forward(self, x):
        return x + self.block(x)


class Branches(nn.Module):
    """A block like Inception's: parallel layers."""

    def __init__(self, width=4):
        super().__init__()
        self.branch1 = conv(width, width // 2)
        self.branch2 = nn.Sequential(conv(width, width), conv(width, width // 2))

    def forward(self, x):
        return torch.cat([self.branch1(x), self.branch2(x)], 1)


class OtherBranches(Branches):
    """A second kind of Inception's blocks."""


class ThirdBranches(Branches):
    """A third kind of Inception's blocks."""


class Separable(nn.Module):
    """Two convolutions."""

    def __init__(self):
        super().__init__()
        self.deep, self.wide = nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 1)


class Xception(nn.Module):
    """A block that contains a list of composed modules and single layers."""

    def __init__(self):
        super().__init__()
        self.rep = nn.Sequential(nn.ReLU(), Separable(), nn.BatchNorm2d(4), Separable(), Separable())


class Attributes(nn.Module):
    """Modules in attributes of their own, run in this order."""

    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        for module in self.children():
            x = module(x)
        return x


def mobilenet():
    return Attributes(features=nn.Sequential(conv(3, 4), *(Residual() for _ in range(3)), conv(4, 6)))


@pytest.mark.parametrize("last", [conv(4, 6), nn.Conv2d(4, 6, 1)])
def test_the_blocks_of_a_sequential_are_the_modules_of_its_most_common_class(last):
    model = Attributes(features=nn.Sequential(conv(3, 4), *(Residual() for _ in range(3)), last))
    assert list(find_blocks(model)) == list(model.features[1:4])
    assert list(find_blocks(model, "features.*")) == list(model.features[1:4])
    assert list(find_blocks(model, "features")) == list(model.features)


def test_layers_without_weights_between_blocks_are_no_blocks():
    fire = [Branches() for _ in range(4)]
    model = Attributes(features=nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), *fire[:2], nn.MaxPool2d(2), *fire[2:]))
    assert list(find_blocks(model)) == fire


def test_blocks_in_numbered_attributes_are_found():
    names = ("inception3a", "inception3b", "inception4a", "inception4b")
    model = Attributes(conv1=conv(3, 4), **{name: Branches() for name in names}, fc=nn.Conv2d(4, 2, 1))
    assert list(find_blocks(model)) == [model.get_submodule(name) for name in names]
    assert list(block_lists(model)) == ["inception*"]
    model = Attributes(**{f"block{i}": Xception() for i in range(1, 4)}, conv3=Separable(), conv4=Separable())
    assert list(find_blocks(model)) == [model.block1, model.block2, model.block3]


def test_a_list_is_preferred_to_fewer_blocks_in_numbered_attributes():
    heads = {f"head{i}": Residual() for i in range(3)}
    model = Attributes(layers=nn.ModuleList(Residual() for _ in range(4)), **heads)
    assert list(find_blocks(model)) == list(model.layers)
    model = Attributes(layers=nn.ModuleList(Residual() for _ in range(2)), **heads)
    with pytest.raises(ValueError, match=r"\{'head\*': 3, 'layers': 2\}; say which: blocks='head\*'"):
        find_blocks(model)


@pytest.mark.parametrize("kind", ["sequential", "attributes"])
def test_blocks_of_several_classes_are_listed_without_their_branches_and_can_be_named(kind):
    blocks = [Branches(), Branches(), OtherBranches(), OtherBranches(), ThirdBranches()]
    if kind == "sequential":
        model, name = Attributes(features=nn.Sequential(conv(3, 4), *blocks)), "features"
        blocks = list(model.features)
    else:
        model, name = (
            Attributes(conv1=conv(3, 4), **{f"Mixed_5{x}": b for x, b in zip("abcde", blocks, strict=True)}),
            r"Mixed_*",
        )
    listed = rf"unequal modules, {{'{name}': {len(blocks)}}}; take a list as it is by blocks='{name}'".replace(
        "*", r"\*"
    )
    with pytest.raises(ValueError, match=listed):
        find_blocks(model)
    assert list(find_blocks(model, name)) == blocks


@pytest.mark.parametrize(
    "stem", [nn.Sequential(conv(3, 4), conv(4, 4)), nn.Sequential(*map(conv, (3, 4, 4), (4, 4, 4)))]
)
def test_a_stem_is_no_list_of_blocks(stem):
    stages = nn.ModuleList(nn.Sequential(Residual(), Residual()) for _ in range(2))
    model = Attributes(stem=stem, stages=stages)
    assert list(find_blocks(model)) == [*stages[0], *stages[1]]


def test_of_several_lists_the_largest_is_proposed_first():
    stem = nn.Sequential(Residual(2), Residual(2))
    model = Attributes(
        stem=stem, body=nn.ModuleList(Residual(2) for _ in range(3)), tokens=nn.ModuleList([Branches(9)])
    )
    with pytest.raises(ValueError, match=r"\{'body': 3, 'stem': 2, 'tokens': 1\}; say which: blocks='body'"):
        find_blocks(model)


def test_a_short_list_behind_a_larger_one_of_unequal_modules_is_not_taken_for_the_trunk():
    network = nn.ModuleList([nn.Sequential(Residual(), Residual()), nn.Conv2d(4, 4, 1), nn.Sequential(Branches())])
    model = Attributes(network=network, post_network=nn.ModuleList([Residual()]))
    with pytest.raises(ValueError, match=r"\{'network': 3, 'post_network': 1\}; say which: blocks='network'"):
        find_blocks(model)
    assert list(find_blocks(model, "network")) == list(network)


def test_blocks_among_other_modules_are_located_once_and_captured(monkeypatch):
    from kdloss._capture import located

    model, x, found = mobilenet(), torch.randn(2, 3, 4, 4), Located()
    for _ in range(2):
        with record(model, {i: Request(i) for i in range(3)}, located=found) as seen:
            model(x)
        y = model.features[0](x)
        for i in range(3):
            y = model.features[1 + i](y)
            torch.testing.assert_close(seen[i], y)
        monkeypatch.setattr(located, "find_blocks", None)


def test_the_feature_loss_of_a_mobilenet_is_that_of_its_blocks():
    torch.manual_seed(0)
    student, teacher = mobilenet().eval(), mobilenet().eval()
    x, criterion = torch.randn(2, 3, 4, 4), kdloss.FeatureKD("all", alpha=0.0)
    out = kdloss.Distiller(teacher, criterion)(student, x)
    expected = torch.zeros(())
    for i in range(1, 4):
        s, t = student.features[: i + 1](x), teacher.features[: i + 1](x)
        expected = expected + (s - t).square().mean() / 3
    torch.testing.assert_close(out.loss, expected)


def vgg():
    """Convolutions, whose outputs are changed in place by the next module."""
    layers = [nn.Conv2d(3, 4, 3, 1, 1), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    return Attributes(features=nn.Sequential(*layers, nn.Conv2d(4, 4, 3, 1, 1), nn.ReLU(inplace=True), nn.MaxPool2d(2)))


def test_single_layers_in_a_row_are_no_blocks_but_can_be_named_as_blocks():
    deep = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(4)))
    model = Attributes(features=deep, classifier=nn.Sequential(*(nn.Linear(3, 3) for _ in range(3))))
    with pytest.raises(
        ValueError, match=r"layers in a row, \{'features': 4, 'classifier': 3\}; take .* blocks='features', or"
    ):
        find_blocks(model)
    assert list(find_blocks(model, "features")) == list(deep)


def test_pairing_by_resolution_captures_only_modules_that_it_may_pair():
    torch.manual_seed(0)
    student, teacher, x = vgg().eval(), vgg().eval(), torch.randn(2, 3, 8, 8)
    criterion = kdloss.FeatureKD(pairing="resolution", blocks="features", alpha=0.0)
    out = kdloss.Distiller(teacher, criterion).prepare(student, x)(student, x)
    assert [pair[:2] for pair in criterion.terms["feature"].layer_map.pairs()] == [(1, 1), (4, 4), (5, 5)]
    expected = [(student.features[: i + 1](x) - teacher.features[: i + 1](x)).square().mean() for i in (1, 4, 5)]
    torch.testing.assert_close(out.loss, sum(expected) / 3)


# -- Hugging Face models with several stacks ---------------------------------------------------------

SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}


def whisper():
    sizes = {"d_model": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_mel_bins": 4}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    more = {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "vocab_size": VOCAB, "max_source_positions": 8}
    config = hf.WhisperConfig(**sizes, **ids, **more, encoder_layers=2, decoder_layers=3)
    return hf.WhisperForConditionalGeneration(config)


def bart(head=hf.BartForConditionalGeneration):
    sizes = {"d_model": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": VOCAB}
    config = hf.BartConfig(**sizes, encoder_ffn_dim=16, decoder_ffn_dim=16, encoder_layers=2, decoder_layers=3)
    return head(config)


def captioner():
    image = hf.ViTConfig(**SMALL, num_hidden_layers=2, image_size=16, patch_size=8)
    text = hf.BertConfig(**SMALL, num_hidden_layers=3, vocab_size=VOCAB, is_decoder=True, add_cross_attention=True)
    return hf.VisionEncoderDecoderModel(hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(image, text))


@pytest.mark.parametrize(
    ("model", "decoder"),
    [
        (whisper, "model.decoder.layers"),
        (bart, "model.decoder.layers"),
        (lambda: bart(hf.BartForSequenceClassification), "model.decoder.layers"),
        (lambda: bart(hf.BartModel), "decoder.layers"),
        (captioner, "decoder.bert.encoder.layer"),
        pytest.param(
            lambda: hf.T5ForSequenceClassification(FAMILIES["t5"][0](16, 3)),
            "transformer.decoder.block",
            marks=since_transformers_5,  # before, it returns itself as its decoder, and `blocks` must be set
        ),
    ],
)
def test_the_decoders_blocks_are_found_where_logits_come_from_the_decoder(model, decoder):
    model = model()
    assert len(block_lists(model)) == 2
    assert list(find_blocks(model)) == list(model.get_submodule(decoder))


def test_two_parallel_towers_raise_an_error_that_lists_both():
    clip = hf.CLIPModel(
        hf.CLIPConfig(
            text_config=SMALL | {"num_hidden_layers": 2},
            vision_config=SMALL | {"num_hidden_layers": 3, "image_size": 16, "patch_size": 8},
        )
    )
    with pytest.raises(ValueError, match=r"text_model.*vision_model|vision_model.*text_model"):
        find_blocks(clip)


def test_an_encoder_decoders_features_are_those_of_its_decoder_on_both_sides():
    student, teacher = build("t5", depth=2).eval(), build("t5", depth=3, seed=1).eval()
    tokens, labels = torch.randint(3, VOCAB, (2, 5)), torch.randint(3, VOCAB, (2, 4))
    out = kdloss.Distiller(teacher, kdloss.FeatureKD("all", alpha=0.0))(student, input_ids=tokens, labels=labels)

    def blocks(model):
        seen = []
        handles = [b.register_forward_hook(lambda m, a, y: seen.append(y[0])) for b in model.decoder.block]
        model(input_ids=tokens, labels=labels)
        for handle in handles:
            handle.remove()
        return seen

    s, t = blocks(student), blocks(teacher)
    torch.testing.assert_close(out.loss, ((s[0] - t[0]).square().mean() + (s[1] - t[2]).square().mean()) / 2)


def test_a_kept_student_of_an_encoder_decoder_is_paired_by_its_decoders_blocks():
    teacher = build("t5", depth=4).eval()
    student = kdloss.keep_blocks(teacher, [0, 2])
    student.config.kept_blocks["encoder.block"] = [0, 1]  # as if other blocks of the encoder had been kept
    criterion = kdloss.FeatureKD("all", pairing="kept", alpha=0.0)
    kdloss.Distiller(teacher, criterion).prepare(student)
    assert [pair[:2] for pair in criterion.terms["feature"].layer_map.pairs()] == [(0, 1), (1, 3)]
