"""Each mask applies only to what it describes: text or images, inputs or outputs, logits or features."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from families import batch as texts_of
from families import build
from stepping import Steps, asked, holds_to, kl, recipe
from torch import nn

import kdloss
from kdloss import CrossEntropy, Distillation, Distiller, Features, Logits, Sum

assert_close = torch.testing.assert_close
FIRST = {"pairing": [(0, 1)]}  # the first block of the student with the second of the teacher


def squared_errors(student, teacher, batch, where, pair=(0, 1)):
    """Return the mean squared error at every position of a pair of blocks, recorded with plain hooks."""
    outputs = []
    for model, i in zip((student, teacher), pair, strict=True):
        hooked = model.get_submodule(where if i is None else f"{where}.{i}")
        handle = hooked.register_forward_hook(lambda m, a, out: outputs.append(out if torch.is_tensor(out) else out[0]))
        model(**batch)
        handle.remove()
    return (outputs[0] - outputs[1].detach()).square().mean(-1)


# -- two towers --


def clip(depth, seed, kind="CLIP", patch=8):
    torch.manual_seed(seed)
    small = {"hidden_size": 16, "num_hidden_layers": depth, "num_attention_heads": 2, "intermediate_size": 16}
    text = small | {"vocab_size": 40, "max_position_embeddings": 20, "eos_token_id": 2, "bos_token_id": 1}
    vision = small | {"image_size": 32, "patch_size": patch}
    more = {"projection_dim": 12} if kind == "CLIP" else {}
    config = getattr(hf, f"{kind}Config")(text_config=text | {"pad_token_id": 0}, vision_config=vision, **more)
    return getattr(hf, f"{kind}Model")(config).eval()


def captioned_images(length):
    lengths = torch.tensor([[length], [3], [1]])
    return {
        "input_ids": torch.randint(3, 40, (3, length)),
        "attention_mask": (torch.arange(length) < lengths).long(),
        "pixel_values": torch.randn(3, 3, 32, 32),
    }


VISION, TEXT = "vision_model.encoder.layers", "text_model.encoder.layers"


@pytest.mark.parametrize(("kind", "length"), [("CLIP", 8), ("CLIP", 17), ("Siglip", 16)])
def test_caption_padding_excludes_no_image_patch_even_if_there_are_as_many_tokens_as_patches(kind, length):
    student, teacher, batch = clip(2, 0, kind), clip(3, 1, kind), captioned_images(length)
    values = squared_errors(student, teacher, batch, VISION)
    assert (values.shape[1] == length) == (length > 8)
    loss = Distiller(teacher, 1.0 * Features(blocks=VISION, **FIRST))(student, **batch).loss
    assert_close(loss, values.mean())


@pytest.mark.parametrize("length", [8, 17])
def test_the_term_of_a_tower_has_the_same_value_alone_and_beside_the_other_towers_term(length):
    student, teacher, batch = clip(2, 0), clip(3, 1), captioned_images(length)
    mask = batch["attention_mask"].bool()
    pictures = squared_errors(student, teacher, batch, VISION).mean()
    words = squared_errors(student, teacher, batch, TEXT)[mask].mean()
    terms = [Features(blocks=blocks, name=name, **FIRST) for blocks, name in ((TEXT, "words"), (VISION, "pictures"))]
    for order in (terms, terms[::-1]):
        out = Distiller(teacher, Sum(*order))(student, **batch)
        assert_close(out.loss, pictures + words)
        assert_close(out.components["words"], words.detach())
        assert_close(out.components["pictures"], pictures.detach())
    assert_close(Distiller(teacher, Sum(terms[0]))(student, **batch).loss, words)


def test_towers_are_recognised_once_and_the_students_mode_and_random_numbers_are_unchanged():
    student, teacher, batch = clip(2, 0).train(), clip(3, 1), captioned_images(17)
    runs = []
    student.register_forward_hook(lambda m, a, out: runs.append(m.training))
    distill = Distiller(teacher, 1.0 * Features(blocks=VISION, **FIRST))
    for _ in range(2):
        torch.manual_seed(3)
        distill(student, **batch)
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(3)))
    modes = runs[-4:]  # CLIP of transformers 5 takes any keyword, so it is first asked for its own loss
    assert modes == [True, False, False, True], "none of these follows the first step"
    assert student.vision_model.training


class Towers(nn.Module):
    """A user's model with two towers."""

    def __init__(self, embeds=True):
        super().__init__()
        self.embed = nn.Embedding(40, 8)
        self.words, self.patches = nn.Linear(8, 8), nn.Linear(6, 8)
        self.embeds = embeds

    def forward(self, input_ids, attention_mask, pictures):
        embedded = self.embed(input_ids) if self.embeds else self.embed.weight[input_ids]
        return {"words": self.words(embedded), "pictures": self.patches(pictures)}


def test_towers_of_a_custom_model_are_recognised():
    student, teacher = Towers(), Towers()
    batch = {"input_ids": torch.randint(40, (2, 5)), "pictures": torch.randn(2, 5, 6)}
    batch["attention_mask"] = torch.tensor([[1] * 5, [1, 1, 0, 0, 0]])
    s, t = student(**batch), teacher(**batch)
    gaps = {name: (s[name] - t[name].detach()).square().mean(-1) for name in s}
    for name, counted in (("words", gaps["words"][batch["attention_mask"].bool()]), ("patches", gaps["pictures"])):
        loss = Distiller(teacher, 1.0 * Features([name], pairing="same"))(student, **batch).loss
        assert_close(loss, counted.mean())


def test_a_feature_mask_is_required_if_towers_cannot_be_recognised():
    student, teacher = Towers(embeds=False), Towers(embeds=False)
    batch = {"input_ids": torch.randint(40, (2, 5)), "pictures": torch.randn(2, 5, 6)}
    batch["attention_mask"] = torch.tensor([[1] * 5, [1, 1, 0, 0, 0]])
    distill = Distiller(teacher, 1.0 * Features(["patches"], pairing="same"))
    with pytest.raises(ValueError, match=r"nothing tells whether attention_mask .*feature_mask=\{"):
        distill(student, **batch)
    gaps = (student(**batch)["pictures"] - teacher(**batch)["pictures"].detach()).square().mean(-1)
    assert_close(distill(student, **batch, feature_mask={"feature": None}).loss, gaps.mean())


def llava(depth, seed):
    torch.manual_seed(seed)
    small = {"hidden_size": 16, "num_hidden_layers": depth, "num_attention_heads": 2, "intermediate_size": 16}
    vision = hf.CLIPVisionConfig(**small, image_size=32, patch_size=8)
    text = hf.LlamaConfig(**small, vocab_size=40, num_key_value_heads=1, pad_token_id=0)
    config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_id=39, vision_feature_layer=-1)
    return hf.LlavaForConditionalGeneration(config).double().eval()


def test_in_a_vision_language_model_the_text_mask_applies_only_to_features_of_the_language_model():
    student, teacher = llava(2, 0), llava(3, 1)
    ids = torch.cat([torch.full((2, 16), 39), torch.randint(3, 39, (2, 1))], 1)  # 17, as in the vision tower
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch |= {"pixel_values": torch.randn(2, 3, 32, 32, dtype=torch.float64)}
    batch["attention_mask"][1, 16] = 0
    mask = batch["attention_mask"].bool()
    tower = next(name for name, _ in student.named_modules() if name.endswith("encoder.layers"))
    for where, pair, settings, counted in (
        (tower, (0, 1), {"blocks": tower}, None),
        ("model.multi_modal_projector", (None, None), {"pairing": "same"}, None),
        ("model.language_model.layers", (0, 1), {"blocks": "model.language_model.layers"}, mask),
    ):
        term = Features([where], **settings) if pair[0] is None else Features(**FIRST, **settings)
        loss = Distiller(teacher, Sum(term, causal=False))(student, **batch).loss
        values = squared_errors(student, teacher, batch, where, pair)
        assert_close(loss, values.mean() if counted is None else values[counted].mean())


@pytest.mark.parametrize("length", [8, 17])
def test_the_similarity_of_image_blocks_does_not_depend_on_caption_padding(length):
    student, teacher, batch = clip(2, 0), clip(3, 1), captioned_images(length)
    full = batch | {"attention_mask": torch.ones_like(batch["attention_mask"])}
    masked, unmasked = (kdloss.analysis.cka_matrix(student, teacher, [b], blocks=VISION).values for b in (batch, full))
    assert_close(masked, unmasked)
    wrong = full | {"mask": torch.ones(3, 5).bool()}
    with pytest.raises(ValueError, match=r"mask has shape \(3, 5\) but features have shape \(3, 17\)"):
        kdloss.analysis.cka_matrix(student, teacher, [wrong], blocks=VISION)


# -- padding on the left --


def padded_left():
    ids = torch.randint(3, 61, (2, 8))
    attention = (torch.arange(8) >= torch.tensor([[0], [3]])).long()
    labels = ids.masked_fill(attention == 0, -100)
    positions = (attention.cumsum(-1) - 1).clamp_min(0)
    return {"input_ids": ids, "attention_mask": attention, "position_ids": positions, "labels": labels}


def llamas():
    return build("llama", depth=2).double().eval(), build("llama", depth=3, seed=1).double().eval()


@pytest.mark.parametrize("masks", ["attention_mask", "attention_mask by position", "attention_mask and mask"])
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("positions", ["labels", "mask"])
def test_logits_and_features_at_left_padding_are_excluded(masks, labelled, positions):
    (student, teacher), batch = llamas(), padded_left()
    labels = batch.pop("labels").masked_fill(torch.arange(8) == 5, -100)
    settings = {"labels": labels} if labelled else {}
    real = batch["attention_mask"].bool()
    keep = real[:, 1:] & real[:, :-1]
    if masks.endswith("and mask"):
        settings["mask"] = torch.arange(8).expand(2, 8) != 6
        keep = keep & settings["mask"][:, 1:]
    if labelled and positions == "labels":
        keep = keep & (labels[:, 1:] != -100)
    criterion = Logits(temperature=2.0, positions=positions) + 0.5 * Features(positions=positions, **FIRST)
    given = dict(batch)
    args = [given.pop(name) for name in ("input_ids", "attention_mask") if masks.endswith("by position")]
    loss = Distiller(teacher, criterion)(student, *args, **given, **settings).loss
    with torch.no_grad():
        target = teacher(**batch).logits
    logits = kl(student(**batch).logits, target, 2.0)[:, :-1][keep].mean()
    expected = logits + 0.5 * squared_errors(student, teacher, batch, "model.layers")[:, :-1][keep].mean()
    assert_close(loss, expected)
    weight = student.model.layers[0].mlp.up_proj.weight
    assert_close(*(torch.autograd.grad(x, weight)[0] for x in (loss, expected)))


@pytest.mark.parametrize("positions", ["labels", "mask"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("first", ["ce", "kd"])
def test_with_left_padding_cross_entropy_uses_the_same_labels_as_the_models_own_loss(positions, reduction, first):
    (student, teacher), batch = llamas(), padded_left()
    terms = [0.3 * CrossEntropy(), 0.7 * Logits(temperature=2.0, positions=positions)]
    sums = Sum(*(terms if first == "ce" else terms[::-1]), reduction=reduction)
    out = Distiller(teacher, sums)(student, **batch)
    own = student(**batch).loss
    assert_close(out.components["ce"], own.detach(), rtol=1e-6, atol=0.0, check_dtype=False)
    inputs = {k: x for k, x in batch.items() if k != "labels"}
    with torch.no_grad():
        target = teacher(**inputs).logits
    z, y = student(**inputs).logits[:, :-1], batch["labels"][:, 1:]
    ce = F.cross_entropy(z.transpose(1, 2), y, ignore_index=-100, reduction="none")
    learned = kl(z, target[:, :-1], 2.0)
    real = batch["attention_mask"][:, :-1].bool() & batch["attention_mask"][:, 1:].bool()
    learned = learned.masked_fill(~real, 0)
    if reduction == "mean":
        expected = 0.3 * ce.sum() / (y != -100).sum() + 0.7 * learned.sum() / real.sum()
    else:
        expected = 0.3 * ce + 0.7 * learned
        expected = expected.sum() if reduction == "sum" else expected
    assert_close(out.loss, expected)
    weight = student.lm_head.weight
    assert_close(*(torch.autograd.grad(x.sum(), weight)[0] for x in (out.loss, expected)))


def test_a_criterion_called_in_a_users_loop_takes_attention_mask_and_mask():
    (student, teacher), batch = llamas(), padded_left()
    labels, real = batch.pop("labels"), batch["attention_mask"].bool()
    s, t = student(**batch).logits, teacher(**batch).logits.detach()
    loss = kdloss.VanillaKD(1.0, alpha=0.0, causal=True)(s, t, labels, attention_mask=real)
    keep = real[:, 1:] & real[:, :-1]
    assert_close(loss, kl(s, t, 1.0)[:, :-1][keep].mean())
    answer = torch.arange(8).expand(2, 8) > 4  # masks align with labels: the first token of an answer counts
    loss = kdloss.VanillaKD(1.0, alpha=0.0, causal=True)(s, t, mask=answer)
    assert_close(loss, kl(s, t, 1.0)[:, :-1][answer[:, 1:]].mean())
    with pytest.raises(ValueError, match=r"\(2, 7\).*\(2, 8\)"):
        kdloss.VanillaKD(causal=True)(s, t, labels, mask=answer, attention_mask=real[:, 1:])


# -- encoders, classifiers --


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("labelled", [True, False])
def test_an_encoder_with_as_many_tokens_as_its_decoder_is_masked_by_its_own_attention_mask(masked, labelled):
    student, teacher = (build("t5", depth=n, seed=n).double().eval() for n in (2, 3))
    batch = texts_of("t5")
    batch = {"input_ids": batch["input_ids"][:, :6], "attention_mask": batch["attention_mask"][:, :6]} | {
        "labels": batch["labels"], "decoder_input_ids": batch["labels"].clamp_min(0).roll(1, 1)
    }  # fmt: skip
    keep = batch["attention_mask"].bool()
    if not masked:
        del batch["attention_mask"]
        keep = torch.ones_like(keep)
    labels = batch["labels"] if labelled else batch.pop("labels")
    inputs = {k: x for k, x in batch.items() if k != "labels"}
    loss = Distiller(teacher, 1.0 * Features(blocks="encoder.block", **FIRST))(student, **batch).loss
    values = squared_errors(student, teacher, inputs, "encoder.block")
    examples = torch.stack([values[i][keep[i]].mean() for i in range(2)])
    count = (labels != -100).sum(1) if labelled else torch.ones(2)
    assert_close(loss, (examples * count).sum() / count.sum())


def test_labels_and_padding_of_a_token_classifier_exclude_the_same_positions_from_every_term():
    config = [build("bert", depth=n).config for n in (2, 3)]
    student, teacher = (hf.AutoModelForTokenClassification.from_config(c).double().eval() for c in config)
    batch = texts_of("bert")
    batch["labels"] = torch.tensor([[0, 1, -100, 1, 0, 0, 1, 1], [1, 0, 0, 1, 1, 1, 1, 1]])  # also at padding
    inputs = {k: x for k, x in batch.items() if k != "labels"}
    keep = batch["attention_mask"].bool() & (batch["labels"] != -100)
    criterion = CrossEntropy() + Logits(temperature=1.0) + Features(**FIRST)
    loss = Distiller(teacher, criterion)(student, **batch).loss
    s, t = student(**inputs).logits, teacher(**inputs).logits.detach()
    ce = F.cross_entropy(s[keep], batch["labels"][keep])
    values = squared_errors(student, teacher, inputs, "bert.encoder.layer")
    assert_close(loss, ce + kl(s, t, 1.0)[keep].mean() + values[keep].mean())


def test_padding_does_not_apply_to_the_pooled_vector_of_a_classifier():
    config = [build("bert", depth=n).config for n in (2, 3)]
    student, teacher = (hf.AutoModelForSequenceClassification.from_config(c).double().eval() for c in config)
    batch = texts_of("bert") | {"labels": torch.tensor([1, 0])}
    inputs = {k: x for k, x in batch.items() if k != "labels"}
    loss = Distiller(teacher, 1.0 * Features(["bert.pooler"], pairing="same"))(student, **batch).loss
    assert_close(loss, squared_errors(student, teacher, inputs, "bert.pooler", (None, None)).mean())


class Maps(nn.Module):
    """A model with an attention map `[B, H, T, T]` of queries and keys."""

    def __init__(self):
        super().__init__()
        self.embed, self.maps, self.head = nn.Embedding(9, 8), nn.Bilinear(4, 4, 1), nn.Linear(8, 9)
        self.scores = nn.Identity()

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        heads = x.unflatten(-1, (2, 4)).transpose(1, 2)
        self.scores(heads @ heads.mT)
        return self.head(x)


def test_a_position_of_an_attention_map_counts_if_neither_query_nor_key_is_padding():
    student, teacher = Maps(), Maps()
    ids, mask = torch.randint(9, (2, 4)), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    scores = Features(["scores"], pairing="same", layout="b c q k")
    loss = Distiller(teacher, 1.0 * scores)(student, input_ids=ids, attention_mask=mask)
    found = []
    for model in (student, teacher):
        model.scores.register_forward_hook(lambda m, a, out: found.append(out))
        model(ids)
    gaps = (found[0] - found[1]).square().mean(1).detach()
    examples = torch.stack([gaps[0].mean(), gaps[1, :2, :2].mean()])
    assert_close(loss.loss.detach(), (4 * examples[0] + 2 * examples[1]) / 6)  # weighted by the number of tokens


# -- masks that do not fit, and masks of features --


def test_a_mask_that_fits_nothing_is_an_error():
    (student, teacher), batch = llamas(), padded_left()
    logits = Distiller(teacher, kdloss.VanillaKD())
    for wrong in (torch.ones(2, 7).bool(), torch.ones(2).bool(), torch.ones(2, 8, 1).bool()):
        with pytest.raises(ValueError, match=r"mask has shape .* labels and logits have shape \(2, 8\)"):
            logits(student, **batch, mask=wrong)
    inputs = {k: x for k, x in batch.items() if k != "labels"}
    features = Distiller(teacher.model, 1.0 * Features(**FIRST))
    with pytest.raises(
        ValueError, match=r"mask \(2, 7\) fits neither logits nor features, which stand at \[\(2,\), \(2, 8\)\]"
    ):
        features(student.model, **inputs, mask=torch.ones(2, 7).bool())
    short = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"][:, 1:]}
    with pytest.raises(ValueError, match=r"attention_mask \(2, 7\).*\(2, 8\).*write mask="):
        Distiller(Embeds(), kdloss.VanillaKD(alpha=0.0))(Embeds(), **short)


class Halves(nn.Module):
    """A text model that halves the sequence length and has the length function of audio models."""

    def __init__(self):
        super().__init__()
        self.embed, self.conv = nn.Embedding(9, 4), nn.Conv1d(4, 4, 2, 2)
        self.halves = nn.Identity()

    def _get_feat_extract_output_lengths(self, lengths):
        return lengths // 2

    def forward(self, input_ids, attention_mask):
        return self.embed(input_ids) + self.halves(self.conv(self.embed(input_ids).mT).mT).mean(1, keepdim=True)


def test_a_text_mask_is_not_mapped_by_the_length_function_of_audio_models():
    student, teacher = Halves(), Halves()
    batch = {"input_ids": torch.randint(9, (2, 6)), "attention_mask": torch.ones(2, 6)}
    distill = Distiller(teacher, 1.0 * Features(["halves"], pairing="same"))
    with pytest.raises(ValueError, match=r"attention_mask \(2, 6\) doesn't .* 'feature' at 'halves', \(2, 3\)"):
        distill(student, **batch)
    distill(student, **batch, feature_mask=torch.ones(2, 3).bool())


def test_a_mask_for_a_criterion_of_features_only_must_fit_the_features():
    student, teacher = ({"features": torch.randn(2, 5, 4)} for _ in range(2))
    outputs = [SimpleNamespace(hidden_states=[side["features"]] * 2) for side in (student, teacher)]
    criterion = kdloss.FeatureKD("last", alpha=0.0)
    keep = torch.arange(5).expand(2, 5) < torch.tensor([[5], [2]])
    gaps = (student["features"] - teacher["features"]).square().mean(-1)
    assert_close(criterion(*outputs, mask=keep), gaps[keep].mean())
    assert_close(criterion(*outputs, mask=torch.tensor([True, False])), gaps[0].mean())
    with pytest.raises(ValueError, match=r"mask \(2, 4\) fits neither logits nor features, which stand at .*\(2, 5\)"):
        criterion(*outputs, mask=keep[:, 1:])


def test_values_at_different_positions_cannot_be_added_with_reduction_none():
    student, teacher, batch = clip(2, 0), clip(3, 1), captioned_images(8)
    terms = [Features(blocks=blocks, name=name, **FIRST) for blocks, name in ((TEXT, "words"), (VISION, "pictures"))]
    with pytest.raises(ValueError, match=r"different ones, \[\(3,\), \(3, 8\)\]; write reduction='mean' or 'sum'"):
        Distiller(teacher, Sum(*terms, reduction="none"))(student, **batch)


class Embeds(nn.Module):
    """An embedding that takes an attention mask of any length."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(61, 7)

    def forward(self, input_ids, attention_mask):
        return self.embed(input_ids)


def test_a_feature_mask_that_no_term_reads_is_an_error():
    (student, teacher), batch = llamas(), padded_left()
    mask = torch.ones(2, 8).bool()
    with pytest.raises(ValueError, match=r"feature_mask has \['features'\], and the terms are \['feature'\]"):
        Distiller(teacher, 1.0 * Features(**FIRST))(student, **batch, feature_mask={"features": mask})
    with pytest.raises(ValueError, match=r"\(2, 8\) is a mask of features, and none of the terms \['ce', 'kd'\]"):
        Distiller(teacher, kdloss.VanillaKD())(student, **batch, feature_mask=mask)


def test_feature_masks_are_passed_by_term_and_combined_with_the_attention_mask():
    (student, teacher), batch = llamas(), padded_left()
    even = torch.arange(8).expand(2, 8) % 2 == 0
    terms = Features(**FIRST, name="some") + Features(**FIRST, name="all")
    criterion = Sum(CrossEntropy(), terms, causal=False)
    model = Distillation(student, teacher, criterion).eval()
    out = model(**batch, teacher=None, feature_mask={"some": even})
    assert set(out.components) == {"ce"}
    out = model.train()(**batch, feature_mask={"some": even})
    inputs = {k: x for k, x in batch.items() if k != "labels"}
    values = squared_errors(student, teacher, inputs, "model.layers").detach()
    real = batch["attention_mask"].bool()
    keep = even & real
    examples = torch.stack([values[i][keep[i]].mean() for i in range(2)])
    count = real.sum(1)
    assert_close(out.components["some"], (examples * count).sum() / count.sum())
    assert_close(out.components["all"], values[real].mean())


# -- examples without labels --


@recipe
def unlabelled_examples(student, teacher, batch):
    criterion = 0.5 * CrossEntropy() + 0.5 * Logits(temperature=2.0, positions="mask")
    model = Distillation(student, teacher, criterion)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = model(**batch).loss  # examples without a label have -100
    loss.backward()
    optimizer.step()


def test_examples_without_labels_still_learn_from_the_teacher():
    config = [build("bert", depth=n).config for n in (2, 3)]
    student, teacher = (hf.AutoModelForSequenceClassification.from_config(c).double().eval() for c in config)
    batch = {"input_ids": torch.randint(3, 61, (4, 6)), "labels": torch.tensor([1, -100, 0, -100])}

    def expected(model):
        with torch.no_grad():
            t = asked(teacher, batch).logits
        s = asked(model.student, batch).logits
        rows = batch["labels"] != -100
        return 0.5 * F.cross_entropy(s[rows], batch["labels"][rows]) + 0.5 * kl(s, t, 2.0).mean()

    with Steps() as steps:
        unlabelled_examples(student, teacher, batch)
    assert (steps.ran[student], steps.ran[teacher]) == (1, 1)
    holds_to(steps, expected)
