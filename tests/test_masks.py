"""Each mask counts where it stands, and nowhere else."""

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

same = torch.testing.assert_close
FIRST = {"pairing": [(0, 1)]}


def squares(student, teacher, batch, where, pair=(0, 1)):
    """The mean squared error at every position of a pair of blocks, asked of the models themselves."""
    found = []
    for model, i in zip((student, teacher), pair, strict=True):
        hooked = model.get_submodule(where if i is None else f"{where}.{i}")
        handle = hooked.register_forward_hook(lambda m, a, out: found.append(out if torch.is_tensor(out) else out[0]))
        model(**batch)
        handle.remove()
    return (found[0] - found[1].detach()).square().mean(-1)


# -- two towers --


def clip(depth, seed, kind="CLIP", patch=8):
    torch.manual_seed(seed)
    small = {"hidden_size": 16, "num_hidden_layers": depth, "num_attention_heads": 2, "intermediate_size": 16}
    text = small | {"vocab_size": 40, "max_position_embeddings": 20, "eos_token_id": 2, "bos_token_id": 1}
    vision = small | {"image_size": 32, "patch_size": patch}
    more = {"projection_dim": 12} if kind == "CLIP" else {}
    config = getattr(hf, f"{kind}Config")(text_config=text | {"pad_token_id": 0}, vision_config=vision, **more)
    return getattr(hf, f"{kind}Model")(config).eval()


def captions(length):
    lengths = torch.tensor([[length], [3], [1]])
    return {
        "input_ids": torch.randint(3, 40, (3, length)),
        "attention_mask": (torch.arange(length) < lengths).long(),
        "pixel_values": torch.randn(3, 3, 32, 32),
    }


VISION, TEXT = "vision_model.encoder.layers", "text_model.encoder.layers"


@pytest.mark.parametrize(("kind", "length"), [("CLIP", 8), ("CLIP", 17), ("Siglip", 16)])
def test_a_captions_padding_weighs_no_patch_even_where_there_are_as_many(kind, length):
    student, teacher, batch = clip(2, 0, kind), clip(3, 1, kind), captions(length)
    values = squares(student, teacher, batch, VISION)
    assert (values.shape[1] == length) == (length > 8)
    loss = Distiller(teacher, 1.0 * Features(blocks=VISION, **FIRST))(student, **batch).loss
    same(loss, values.mean())


@pytest.mark.parametrize("length", [8, 17])
def test_each_towers_term_is_the_same_alone_and_beside_the_other(length):
    student, teacher, batch = clip(2, 0), clip(3, 1), captions(length)
    mask = batch["attention_mask"].bool()
    pictures = squares(student, teacher, batch, VISION).mean()
    words = squares(student, teacher, batch, TEXT)[mask].mean()
    terms = [Features(blocks=blocks, name=name, **FIRST) for blocks, name in ((TEXT, "words"), (VISION, "pictures"))]
    for order in (terms, terms[::-1]):
        out = Distiller(teacher, Sum(*order))(student, **batch)
        same(out.loss, pictures + words)
        same(out.components["words"], words.detach())
        same(out.components["pictures"], pictures.detach())
    same(Distiller(teacher, Sum(terms[0]))(student, **batch).loss, words)


def test_towers_are_recognised_once_and_the_students_mode_and_random_numbers_stay():
    student, teacher, batch = clip(2, 0).train(), clip(3, 1), captions(17)
    runs = []
    student.register_forward_hook(lambda m, a, out: runs.append(m.training))
    distill = Distiller(teacher, 1.0 * Features(blocks=VISION, **FIRST))
    for _ in range(2):
        torch.manual_seed(3)
        distill(student, **batch)
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(3)))
    steps = runs[-4:]  # transformers 5's CLIP takes any keyword: whether it has a loss of its own is asked before
    assert steps == [True, False, False, True], "none of these follows the first step"
    assert student.vision_model.training


class Towers(nn.Module):
    """Somebody's own two towers."""

    def __init__(self, embeds=True):
        super().__init__()
        self.embed = nn.Embedding(40, 8)
        self.words, self.patches = nn.Linear(8, 8), nn.Linear(6, 8)
        self.embeds = embeds

    def forward(self, input_ids, attention_mask, pictures):
        embedded = self.embed(input_ids) if self.embeds else self.embed.weight[input_ids]
        return {"words": self.words(embedded), "pictures": self.patches(pictures)}


def test_towers_of_a_custom_model_are_recognised_too():
    student, teacher = Towers(), Towers()
    batch = {"input_ids": torch.randint(40, (2, 5)), "pictures": torch.randn(2, 5, 6)}
    batch["attention_mask"] = torch.tensor([[1] * 5, [1, 1, 0, 0, 0]])
    own, its = student(**batch), teacher(**batch)
    gaps = {name: (own[name] - its[name].detach()).square().mean(-1) for name in own}
    for name, counted in (("words", gaps["words"][batch["attention_mask"].bool()]), ("patches", gaps["pictures"])):
        loss = Distiller(teacher, 1.0 * Features([name], pairing="same"))(student, **batch).loss
        same(loss, counted.mean())


def test_a_feature_mask_is_required_where_towers_cannot_be_recognised():
    student, teacher = Towers(embeds=False), Towers(embeds=False)
    batch = {"input_ids": torch.randint(40, (2, 5)), "pictures": torch.randn(2, 5, 6)}
    batch["attention_mask"] = torch.tensor([[1] * 5, [1, 1, 0, 0, 0]])
    distill = Distiller(teacher, 1.0 * Features(["patches"], pairing="same"))
    with pytest.raises(ValueError, match=r"nothing tells whether attention_mask .*feature_mask=\{"):
        distill(student, **batch)
    gaps = (student(**batch)["pictures"] - teacher(**batch)["pictures"].detach()).square().mean(-1)
    same(distill(student, **batch, feature_mask={"feature": None}).loss, gaps.mean())


def llava(depth, seed):
    torch.manual_seed(seed)
    small = {"hidden_size": 16, "num_hidden_layers": depth, "num_attention_heads": 2, "intermediate_size": 16}
    vision = hf.CLIPVisionConfig(**small, image_size=32, patch_size=8)
    text = hf.LlamaConfig(**small, vocab_size=40, num_key_value_heads=1, pad_token_id=0)
    config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_id=39, vision_feature_layer=-1)
    return hf.LlavaForConditionalGeneration(config).double().eval()


def test_inside_a_vision_language_model_only_the_language_models_features_follow_the_texts_mask():
    student, teacher = llava(2, 0), llava(3, 1)
    ids = torch.cat([torch.full((2, 16), 39), torch.randint(3, 39, (2, 1))], 1)  # 17, as many as the tower has patches
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
        values = squares(student, teacher, batch, where, pair)
        same(loss, values.mean() if counted is None else values[counted].mean())


@pytest.mark.parametrize("length", [8, 17])
def test_blocks_of_pictures_resemble_each_other_whatever_their_captions_lengths(length):
    student, teacher, batch = clip(2, 0), clip(3, 1), captions(length)
    every = batch | {"attention_mask": torch.ones_like(batch["attention_mask"])}
    masked, whole = (kdloss.analysis.cka_matrix(student, teacher, [b], blocks=VISION).values for b in (batch, every))
    same(masked, whole)
    wrong = every | {"mask": torch.ones(3, 5).bool()}
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


@pytest.mark.parametrize("given", ["attention_mask", "attention_mask and mask"])
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("positions", ["labels", "mask"])
def test_logits_and_features_of_padding_on_the_left_teach_nothing(given, labelled, positions):
    (student, teacher), batch = llamas(), padded_left()
    labels = batch.pop("labels").masked_fill(torch.arange(8) == 5, -100)
    settings = {"labels": labels} if labelled else {}
    real = batch["attention_mask"].bool()
    keep = real[:, 1:] & real[:, :-1]
    if given.endswith("and mask"):
        settings["mask"] = torch.arange(8).expand(2, 8) != 6
        keep = keep & settings["mask"][:, 1:]
    if labelled and positions == "labels":
        keep = keep & (labels[:, 1:] != -100)
    criterion = Logits(temperature=2.0, positions=positions) + 0.5 * Features(positions=positions, **FIRST)
    loss = Distiller(teacher, criterion)(student, **batch, **settings).loss
    with torch.no_grad():
        target = teacher(**batch).logits
    logits = kl(student(**batch).logits, target, 2.0)[:, :-1][keep].mean()
    expected = logits + 0.5 * squares(student, teacher, batch, "model.layers")[:, :-1][keep].mean()
    same(loss, expected)
    weight = student.model.layers[0].mlp.up_proj.weight
    same(*(torch.autograd.grad(x, weight)[0] for x in (loss, expected)))


@pytest.mark.parametrize("positions", ["labels", "mask"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("first", ["ce", "kd"])
def test_with_padding_on_the_left_cross_entropy_counts_the_labels_of_the_models_own_loss(positions, reduction, first):
    (student, teacher), batch = llamas(), padded_left()
    terms = [0.3 * CrossEntropy(), 0.7 * Logits(temperature=2.0, positions=positions)]
    sums = Sum(*(terms if first == "ce" else terms[::-1]), reduction=reduction)
    out = Distiller(teacher, sums)(student, **batch)
    own = student(**batch).loss
    same(out.components["ce"], own.detach(), rtol=1e-6, atol=0.0, check_dtype=False)
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
    same(out.loss, expected)
    weight = student.lm_head.weight
    same(*(torch.autograd.grad(x.sum(), weight)[0] for x in (out.loss, expected)))


def test_a_loop_of_ones_own_gives_attention_mask_beside_mask():
    (student, teacher), batch = llamas(), padded_left()
    labels, real = batch.pop("labels"), batch["attention_mask"].bool()
    s, t = student(**batch).logits, teacher(**batch).logits.detach()
    loss = kdloss.VanillaKD(1.0, alpha=0.0, causal=True)(s, t, labels, attention_mask=real)
    keep = real[:, 1:] & real[:, :-1]
    same(loss, kl(s, t, 1.0)[:, :-1][keep].mean())
    answer = torch.arange(8).expand(2, 8) > 4  # a mask stands beside labels: the first token of an answer counts
    loss = kdloss.VanillaKD(1.0, alpha=0.0, causal=True)(s, t, mask=answer)
    same(loss, kl(s, t, 1.0)[:, :-1][answer[:, 1:]].mean())
    with pytest.raises(ValueError, match=r"\(2, 7\).*\(2, 8\)"):
        kdloss.VanillaKD(causal=True)(s, t, labels, mask=answer, attention_mask=real[:, 1:])


# -- encoders, classifiers --


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("labelled", [True, False])
def test_an_encoder_that_reads_as_many_tokens_as_its_decoder_writes_keeps_its_own_mask(masked, labelled):
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
    values = squares(student, teacher, inputs, "encoder.block")
    examples = torch.stack([values[i][keep[i]].mean() for i in range(2)])
    count = (labels != -100).sum(1) if labelled else torch.ones(2)
    same(loss, (examples * count).sum() / count.sum())


def test_a_token_classifiers_labels_and_padding_take_out_the_same_positions_of_every_term():
    config = [build("bert", depth=n).config for n in (2, 3)]
    student, teacher = (hf.AutoModelForTokenClassification.from_config(c).double().eval() for c in config)
    batch = texts_of("bert")
    batch["labels"] = torch.tensor([[0, 1, -100, 1, 0, 0, 1, 1], [1, 0, 0, 1, 1, 1, 1, 1]])  # of padding, too
    inputs = {k: x for k, x in batch.items() if k != "labels"}
    keep = batch["attention_mask"].bool() & (batch["labels"] != -100)
    criterion = CrossEntropy() + Logits(temperature=1.0) + Features(**FIRST)
    loss = Distiller(teacher, criterion)(student, **batch).loss
    s, t = student(**inputs).logits, teacher(**inputs).logits.detach()
    own = F.cross_entropy(s[keep], batch["labels"][keep])
    values = squares(student, teacher, inputs, "bert.encoder.layer")
    same(loss, own + kl(s, t, 1.0)[keep].mean() + values[keep].mean())


def test_a_classifiers_pooled_vector_has_no_padding():
    config = [build("bert", depth=n).config for n in (2, 3)]
    student, teacher = (hf.AutoModelForSequenceClassification.from_config(c).double().eval() for c in config)
    batch = texts_of("bert") | {"labels": torch.tensor([1, 0])}
    inputs = {k: x for k, x in batch.items() if k != "labels"}
    loss = Distiller(teacher, 1.0 * Features(["bert.pooler"], pairing="same"))(student, **batch).loss
    same(loss, squares(student, teacher, inputs, "bert.pooler", (None, None)).mean())


class Maps(nn.Module):
    """Attention maps `[B, H, T, T]` of queries and keys."""

    def __init__(self):
        super().__init__()
        self.embed, self.maps, self.head = nn.Embedding(9, 8), nn.Bilinear(4, 4, 1), nn.Linear(8, 9)
        self.scores = nn.Identity()

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        heads = x.unflatten(-1, (2, 4)).transpose(1, 2)
        self.scores(heads @ heads.mT)
        return self.head(x)


def test_an_attention_map_counts_where_query_and_key_do():
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
    same(loss.loss.detach(), (4 * examples[0] + 2 * examples[1]) / 6)  # an example's value stands at its tokens


# -- what is said --


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
    """Reads text, makes half as many vectors, and knows lengths of sound."""

    def __init__(self):
        super().__init__()
        self.embed, self.conv = nn.Embedding(9, 4), nn.Conv1d(4, 4, 2, 2)
        self.halves = nn.Identity()

    def _get_feat_extract_output_lengths(self, lengths):
        return lengths // 2

    def forward(self, input_ids, attention_mask):
        return self.embed(input_ids) + self.halves(self.conv(self.embed(input_ids).mT).mT).mean(1, keepdim=True)


def test_a_text_mask_is_not_mapped_by_a_length_function_of_sound():
    student, teacher = Halves(), Halves()
    batch = {"input_ids": torch.randint(9, (2, 6)), "attention_mask": torch.ones(2, 6)}
    distill = Distiller(teacher, 1.0 * Features(["halves"], pairing="same"))
    with pytest.raises(ValueError, match=r"attention_mask \(2, 6\) doesn't .* 'feature' at 'halves', \(2, 3\)"):
        distill(student, **batch)
    distill(student, **batch, feature_mask=torch.ones(2, 3).bool())


def test_a_mask_beside_features_alone_fits_them_or_is_an_error():
    student, teacher = ({"features": torch.randn(2, 5, 4)} for _ in range(2))
    outputs = [SimpleNamespace(hidden_states=[side["features"]] * 2) for side in (student, teacher)]
    criterion = kdloss.FeatureKD("last", alpha=0.0)
    keep = torch.arange(5).expand(2, 5) < torch.tensor([[5], [2]])
    gaps = (student["features"] - teacher["features"]).square().mean(-1)
    same(criterion(*outputs, mask=keep), gaps[keep].mean())
    same(criterion(*outputs, mask=torch.tensor([True, False])), gaps[0].mean())
    with pytest.raises(ValueError, match=r"mask \(2, 4\) fits neither logits nor features, which stand at .*\(2, 5\)"):
        criterion(*outputs, mask=keep[:, 1:])


def test_values_at_different_positions_are_not_added_one_by_one():
    student, teacher, batch = clip(2, 0), clip(3, 1), captions(8)
    terms = [Features(blocks=blocks, name=name, **FIRST) for blocks, name in ((TEXT, "words"), (VISION, "pictures"))]
    with pytest.raises(ValueError, match=r"different ones, \[\(3,\), \(3, 8\)\]; write reduction='mean' or 'sum'"):
        Distiller(teacher, Sum(*terms, reduction="none"))(student, **batch)


class Embeds(nn.Module):
    """Reads its mask, whatever its length."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(61, 7)

    def forward(self, input_ids, attention_mask):
        return self.embed(input_ids)


def test_a_feature_mask_that_no_term_reads_is_an_error():
    (student, teacher), batch = llamas(), padded_left()
    own = torch.ones(2, 8).bool()
    with pytest.raises(ValueError, match=r"feature_mask has \['features'\], and the terms are \['feature'\]"):
        Distiller(teacher, 1.0 * Features(**FIRST))(student, **batch, feature_mask={"features": own})
    with pytest.raises(ValueError, match=r"\(2, 8\) is a mask of features, and none of the terms \['ce', 'kd'\]"):
        Distiller(teacher, kdloss.VanillaKD())(student, **batch, feature_mask=own)


def test_feature_masks_go_by_term_and_meet_the_batchs_own():
    (student, teacher), batch = llamas(), padded_left()
    own = torch.arange(8).expand(2, 8) % 2 == 0
    terms = Features(**FIRST, name="some") + Features(**FIRST, name="all")
    criterion = Sum(CrossEntropy(), terms, causal=False)
    model = Distillation(student, teacher, criterion).eval()
    out = model(**batch, teacher=None, feature_mask={"some": own})
    assert set(out.components) == {"ce"}
    out = model.train()(**batch, feature_mask={"some": own})
    inputs = {k: x for k, x in batch.items() if k != "labels"}
    values = squares(student, teacher, inputs, "model.layers").detach()
    real = batch["attention_mask"].bool()
    keep = own & real
    examples = torch.stack([values[i][keep[i]].mean() for i in range(2)])
    count = real.sum(1)
    same(out.components["some"], (examples * count).sum() / count.sum())
    same(out.components["all"], values[real].mean())


# -- examples without labels --


@recipe
def unlabelled_examples(student, teacher, batch):
    criterion = 0.5 * CrossEntropy() + 0.5 * Logits(temperature=2.0, positions="mask")
    model = Distillation(student, teacher, criterion)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = model(**batch).loss  # labels of -100 where nobody knows
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
