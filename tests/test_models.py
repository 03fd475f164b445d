"""Every family of models: blocks are found, captured, distilled, kept in a smaller student, and saved."""

import copy

import pytest
import torch
import transformers as hf
from families import CAUSAL, FAMILIES, VOCAB, ResNet, batch, blocks_argument, build
from torch import nn

import kdloss
from kdloss.layers.lists import block_lists

pytestmark = pytest.mark.filterwarnings("ignore:.*loss_type=None.*")
every_family = pytest.mark.parametrize("family", FAMILIES)


@every_family
def test_the_list_of_blocks_is_found(family):
    model = build(family)
    name = FAMILIES[family][2]
    assert list(block_lists(model)) == (["encoder.block", name] if family == "t5" else [name])
    found = kdloss.layers.find_blocks(model, blocks_argument(family))
    assert list(found) == list(model.get_submodule(name))


@every_family
def test_the_same_blocks_are_found_with_any_head_and_with_none(family):
    model = build(family)
    kind = type(kdloss.layers.find_blocks(model, blocks_argument(family))[0])
    heads = hf.AutoModel, hf.AutoModelForSequenceClassification, hf.AutoModelForTokenClassification
    for head in [h for h in heads if type(model.config) in h._model_mapping]:
        found = block_lists(head.from_config(model.config))
        assert len(found) == 1 or family == "t5"
        assert {(type(block), len(blocks)) for blocks in found.values() for block in blocks} == {(kind, 3)}


def test_an_encoder_decoders_blocks_are_the_decoders_unless_others_are_named():
    t5 = build("t5")
    assert list(kdloss.layers.find_blocks(t5)) == list(t5.decoder.block)
    assert list(kdloss.layers.find_blocks(t5, "encoder.block")) == list(t5.encoder.block)


TINY = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}


def test_blocks_of_a_vision_language_model_are_those_of_its_language_model():
    vision = hf.CLIPVisionConfig(**TINY, num_hidden_layers=2, image_size=16, patch_size=8)
    text = FAMILIES["llama"][0](16, 3)
    llava = hf.LlavaForConditionalGeneration(hf.LlavaConfig(vision_config=vision, text_config=text))
    assert list(kdloss.layers.find_blocks(llava)) == list(llava.model.language_model.layers)
    vision = [name for name in block_lists(llava) if "vision" in name]
    assert len(kdloss.layers.find_blocks(llava, *vision)) == 2


def test_experts_are_not_listed_as_blocks():
    sizes = TINY | {"vocab_size": VOCAB, "num_key_value_heads": 1}
    mixtral = hf.MixtralForCausalLM(hf.MixtralConfig(**sizes, num_hidden_layers=3))
    assert {name: len(blocks) for name, blocks in block_lists(mixtral).items()} == {"model.layers": 3}
    mamba = {"mamba_d_state": 4, "mamba_dt_rank": 2, "num_experts": 2, "use_mamba_kernels": False}
    unequal = hf.JambaForCausalLM(hf.JambaConfig(**sizes, **mamba, num_hidden_layers=8))
    listed = r"lists of unequal modules, \{'model\.layers': 8\}.*blocks='model\.layers'"
    with pytest.raises(ValueError, match=listed):
        kdloss.layers.find_blocks(unequal)
    assert len(kdloss.layers.find_blocks(unequal, "model.layers")) == 8


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_a_resnets_blocks_are_those_of_all_its_stages(kind):
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16, 32], "depths": [2, 1, 3]}
    config = hf.ResNetConfig(**sizes, layer_type=kind, num_labels=5)
    classifier, plain = hf.ResNetForImageClassification(config), ResNet()
    for model, name in ((classifier, "resnet."), (hf.ResNetModel(config), "")):
        blocks = [b for stage in model.get_submodule(f"{name}encoder.stages") for b in stage.layers]
        assert [list(found) for found in block_lists(model).values()] == [blocks]
        assert list(kdloss.layers.find_blocks(model, f"{name}encoder.stages.*.layers")) == blocks
    assert list(kdloss.layers.find_blocks(plain)) == [*plain.layer1, *plain.layer2, *plain.layer3]
    assert list(kdloss.layers.find_blocks(plain, "layer*")) == list(kdloss.layers.find_blocks(plain))
    assert list(kdloss.layers.find_blocks(plain, "layer3")) == list(plain.layer3)
    with pytest.raises(ValueError, match=r"no stages.*'block\*'.*'layer\*': 6"):
        kdloss.layers.find_blocks(plain, "block*")
    with pytest.raises(TypeError, match=r"stages of several widths, 'resnet\.encoder\.stages\.\*\.layers'"):
        kdloss.keep_blocks(classifier, [0, 2])


@every_family
def test_captured_blocks_are_the_hidden_states_that_the_model_returns(family):
    model, inputs = build(family).eval(), batch(family)
    with kdloss.capture(model, [0, 1, 2], blocks=blocks_argument(family)) as seen:
        out = model(**inputs, output_hidden_states=True)
    hidden = out.decoder_hidden_states if family == "t5" else out.hidden_states
    for i in (0, 1):  # in some families the last hidden state is the one after the final norm
        assert torch.equal(seen[i], hidden[i + 1])
    assert seen.output is out


@every_family
def test_a_narrower_and_shallower_student_learns_from_features_and_logits(family):
    teacher, student = build(family, width=24, depth=5), build(family, width=16, depth=3, seed=1)
    criterion = kdloss.FeatureKD(layers="auto", logit_weight=1.0, blocks=blocks_argument(family))
    distill = kdloss.Distiller(teacher, criterion).prepare(student)
    assert [p[:2] for p in criterion.terms["feature"].layer_map.pairs()] == [(0, 0), (1, 2), (2, 4)]
    optimizer = torch.optim.AdamW([*student.parameters(), *criterion.parameters()], lr=1e-2)
    losses, before = [], copy.deepcopy(criterion.state_dict())
    for _ in range(8):
        out = distill(student, **batch(family))
        out.loss.backward()
        losses.append(out.loss.item())
        for block in kdloss.layers.find_blocks(student, blocks_argument(family)):
            assert all(p.grad is not None for p in block.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert set(out.components) == {"ce", "kd", "feature", "feature/0-0", "feature/1-2", "feature/2-4"}
    for name, value in criterion.state_dict().items():
        assert not torch.equal(value, before[name]), f"{name} did not learn"
    assert all(p.grad is None for p in teacher.parameters())


@every_family
def test_keep_blocks_makes_a_student_that_runs_the_kept_blocks_in_order(family):
    teacher, inputs = build(family, depth=4).eval(), batch(family)
    student = kdloss.keep_blocks(teacher, [0, 1, 3])
    by_hand = copy.deepcopy(teacher)
    for name in block_lists(by_hand):
        blocks = by_hand.get_submodule(name)
        kept = nn.ModuleList(blocks[i] for i in (0, 1, 3))
        parent, _, child = name.rpartition(".")
        setattr(by_hand.get_submodule(parent), child, kept)
    by_hand.config.num_hidden_layers = 3  # some models loop over this number, not over the list
    if family in CAUSAL or family == "t5":
        inputs["use_cache"] = False  # blocks of a shortened list keep their old cache indices
    assert torch.equal(student(**inputs).logits, by_hand(**inputs).logits)
    assert type(student) is type(teacher)
    assert not student.training
    assert student.config.num_hidden_layers == 3
    assert teacher.config.num_hidden_layers == 4
    of_teacher = {p.data_ptr() for p in teacher.parameters()}
    assert not any(p.data_ptr() in of_teacher for p in student.parameters())


@every_family
def test_pairing_kept_compares_each_block_with_the_teachers_block_before_the_next_kept_one(family):
    teacher = build(family, depth=6)
    student = kdloss.keep_blocks(teacher, [0, 2, 5])
    blocks = blocks_argument(family)
    criterion = kdloss.FeatureKD("all", pairing="kept", alpha=0.0, blocks=blocks)
    distill = kdloss.Distiller(teacher, criterion).prepare(student)
    assert [p[:2] for p in criterion.terms["feature"].layer_map.pairs()] == [(0, 1), (1, 4), (2, 5)]
    assert list(criterion.parameters()) == []
    assert distill(student, **batch(family)).loss > 0


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "t5"])
def test_a_student_of_kept_blocks_survives_saving(family, tmp_path):
    teacher = build(family, depth=4)
    student = kdloss.keep_blocks(teacher, "late").eval()
    student.save_pretrained(tmp_path)
    loaded = type(student).from_pretrained(tmp_path).eval()
    inputs = batch(family)
    assert torch.equal(loaded(**inputs).logits, student(**inputs).logits)
    assert loaded.config.kept_blocks == student.config.kept_blocks
    kdloss.FeatureKD("all", pairing="kept", blocks=blocks_argument(family)).prepare(loaded, teacher)


def test_keep_blocks_takes_every_kind_of_selection_and_refuses_invalid_ones():
    teacher = build("gpt2", depth=6)
    for blocks, kept in [("key", [0, 2, 5]), ([1, -1], [1, 5]), (lambda d: range(0, d, 3), [0, 3])]:
        assert kdloss.keep_blocks(teacher, blocks).config.kept_blocks == {"transformer.h": kept}
    with pytest.raises(ValueError, match="ascending"):
        kdloss.keep_blocks(teacher, [3, 1])
    with pytest.raises(ValueError, match="6 blocks"):
        kdloss.keep_blocks(teacher, [6])
    with pytest.raises(TypeError, match="Hugging Face"):
        kdloss.keep_blocks(nn.Sequential(nn.Linear(2, 2)), [0])
    half = kdloss.keep_blocks(teacher.bfloat16(), "key")
    assert half.dtype == torch.bfloat16


def test_keep_blocks_refuses_a_model_of_two_towers():
    small = TINY | {"num_hidden_layers": 2}
    clip = hf.CLIPModel(hf.CLIPConfig(text_config=small, vision_config=small | {"image_size": 16, "patch_size": 8}))
    with pytest.raises(ValueError, match=r"2 lists of blocks.*text_model.*vision_model"):
        kdloss.keep_blocks(clip, [0])


def test_kept_blocks_keep_their_layer_types_and_the_first_one_gets_the_position_bias():
    teacher = build("gemma2", depth=4)
    student = kdloss.keep_blocks(teacher, [1, 2])
    assert student.config.layer_types == [teacher.config.layer_types[i] for i in (1, 2)]
    teacher = build("t5", depth=4).eval()
    student = kdloss.keep_blocks(teacher, [2, 3])
    bias = "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert torch.equal(student.state_dict()[bias], teacher.state_dict()[bias])
    assert torch.equal(
        student.state_dict()["decoder.block.0.layer.2.layer_norm.weight"],
        teacher.state_dict()["decoder.block.2.layer.2.layer_norm.weight"],
    )


def test_a_student_of_kept_blocks_generates_with_its_cache():
    teacher = build("llama", depth=4).eval()
    student = kdloss.keep_blocks(teacher, [0, 3])
    tokens = torch.tensor([[5, 6, 7]])
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    with_cache = student.generate(tokens, use_cache=True, **settings)
    assert torch.equal(with_cache, student.generate(tokens, use_cache=False, **settings))


@pytest.mark.parametrize("family", CAUSAL)
def test_hugging_face_outputs_give_the_distillers_loss(family):
    """The last block is left out, because hidden_states hold it after the final norm."""
    teacher, student = build(family, depth=5).eval(), build(family, depth=4, seed=1).eval()
    inputs = batch(family)
    criterion = kdloss.FeatureKD([0, 1, 2], logit_weight=0.5)
    loss = kdloss.Distiller(teacher, criterion)(student, **inputs).loss
    settings = {k: inputs[k] for k in ("input_ids", "attention_mask")} | {"output_hidden_states": True}
    with torch.no_grad():
        target = teacher(**settings)
    twin = kdloss.FeatureKD([0, 1, 2], logit_weight=0.5, causal=True)
    mask = inputs["attention_mask"].bool()
    direct = twin(student(**settings), target, inputs["labels"], mask=mask)
    torch.testing.assert_close(direct, loss)


def test_features_of_an_encoder_are_masked_by_its_own_padding():
    teacher, student = build("t5", depth=3).eval(), build("t5", depth=2, seed=1).eval()
    inputs = batch("t5")
    criterion = kdloss.FeatureKD("last", alpha=0.0, blocks="encoder.block")
    out = kdloss.Distiller(teacher, criterion)(student, **inputs)
    mask = inputs["attention_mask"].bool()
    settings = {"input_ids": inputs["input_ids"], "attention_mask": mask.long()}
    with kdloss.capture(student.encoder, ["block.1"]) as s:
        student.encoder(**settings)
    with kdloss.capture(teacher.encoder, ["block.2"]) as t:
        teacher.encoder(**settings)
    squares = (s["block.1"] - t["block.2"]).square().mean(-1)
    examples = torch.stack([squares[i][mask[i]].mean() for i in range(2)])
    counted = (inputs["labels"] != -100).sum(1)
    torch.testing.assert_close(out.loss, (examples * counted).sum() / counted.sum())


def test_the_loss_of_a_classifiers_features_does_not_depend_on_padding_tokens():
    teacher, student = (
        hf.AutoModelForSequenceClassification.from_config(build("bert", depth=d).config).eval() for d in (3, 2)
    )
    inputs = batch("bert") | {"labels": torch.tensor([1, 0])}
    criterion = kdloss.FeatureKD("last", logit_weight=1.0)
    distill = kdloss.Distiller(teacher, criterion).prepare(student)
    loss = distill(student, **inputs).loss
    inputs["input_ids"] = inputs["input_ids"].clone()
    inputs["input_ids"][1, 5:] = 7  # padding
    torch.testing.assert_close(distill(student, **inputs).loss, loss)


def test_cnns_pair_by_resolution_after_prepare_has_seen_a_batch():
    teacher, student = ResNet((2, 2, 2), width=6), ResNet((1, 2))
    images = {"x": torch.randn(2, 3, 8, 8)}
    criterion = kdloss.FeatureKD(pairing="resolution", alpha=0.0)
    distill = kdloss.Distiller(teacher, criterion)
    with pytest.raises(ValueError, match=r"distill\.prepare\(student, \*\*batch\)"):
        distill.prepare(student)(student, **images)
    calls = [0, 0]
    for i, model in enumerate((student, teacher)):
        model.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    distill.prepare(student, **images)
    assert calls[0] == 1
    assert calls[1] <= 1  # its pass may stop early
    assert criterion.terms["feature"].layer_map.pairs() == [(0, 1, 0.5), (2, 3, 0.5)]
    assert [tuple(p.shape) for p in criterion.parameters()] == [(6, 4), (6,), (12, 8), (12,)]
    loss = distill(student, **images).loss
    loss.backward()
    assert student.layer2[1].conv2.weight.grad.any()
    text = kdloss.Distiller(build("bert"), kdloss.FeatureKD(pairing="resolution", alpha=0.0))
    with pytest.raises(ValueError, match=r"8, 16.*pairing='uniform'"):
        text.prepare(build("bert"), **batch("bert"))
    with pytest.raises(ValueError, match="leave layers out"):
        kdloss.FeatureKD("all", pairing="resolution")


@pytest.mark.parametrize(
    "learned", [kdloss.layers.pair_by_emd, kdloss.layers.pair_by_attention], ids=["emd", "attention"]
)
def test_learned_pairings_train_through_the_distiller(learned):
    teacher, student = build("gpt2", width=24, depth=5), build("gpt2", depth=3, seed=1)
    criterion = kdloss.FeatureKD("all", pairing=learned, alpha=0.3)
    distill = kdloss.Distiller(teacher, criterion).prepare(student)
    optimizer = torch.optim.AdamW([*student.parameters(), *criterion.parameters()], lr=1e-2)
    terms = []
    for _ in range(8):
        out = distill(student, **batch("gpt2"))
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        terms.append(out.components["feature"].item())
    assert set(out.components) == {"ce", "feature", "feature/0", "feature/1", "feature/2"}
    assert terms[-1] < terms[0]


def cnn(*channels):
    layers, last = [], 1
    for c in channels:
        layers += [nn.Conv2d(last, c, 3, padding=1), nn.ReLU()]
        last = c
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, 10))


def test_a_plain_cnn_is_distilled_by_module_names():
    teacher, student = cnn(12, 24, 24), cnn(6, 8)
    x, y = torch.randn(4, 1, 8, 8), torch.randint(0, 10, (4,))
    criterion = kdloss.FeatureKD(pairing=[("1", "1"), ("3", "5")], logit_weight=1.0)
    distill = kdloss.Distiller(teacher, criterion)
    with pytest.raises(ValueError, match=r"distill\.prepare\(student, \*\*batch\)"):
        distill(student, x, labels=y)
    distill.prepare(student, x)
    assert [p.shape for p in criterion.parameters()] == [(12, 6), (12,), (24, 8), (24,)]
    optimizer = torch.optim.Adam([*student.parameters(), *criterion.parameters()], lr=1e-2)
    losses = []
    for _ in range(10):
        out = distill(student, x, labels=y)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
    assert losses[-1] < losses[0]
    assert out.logits.shape == (4, 10)
    assert set(out.components) == {"ce", "kd", "feature", "feature/1-1", "feature/3-5"}


def test_modules_of_the_same_names_are_paired_only_by_pairing_same():
    teacher, student = cnn(6, 8), cnn(6, 8)
    x, y = torch.randn(4, 1, 8, 8), torch.randint(0, 10, (4,))
    with pytest.raises(ValueError, match="pairing='same'"):
        kdloss.Distiller(teacher, kdloss.FeatureKD(["1", "3"])).prepare(student)
    same = kdloss.Distiller(teacher, kdloss.FeatureKD(["1", "3"], pairing="same")).prepare(student)
    assert set(same(student, x, labels=y).components) == {"ce", "feature", "feature/1-1", "feature/3-3"}
    with pytest.raises(ValueError, match="no module 'missing'"):
        kdloss.Distiller(teacher, kdloss.FeatureKD(["missing"], pairing="same")).prepare(student)
    with pytest.raises(ValueError, match="name the modules"):
        kdloss.Distiller(teacher, kdloss.FeatureKD()).prepare(student)


def test_blocks_may_be_named_instead_of_indexed():
    teacher, student = build("gpt2", depth=6), build("gpt2", depth=3, seed=1)
    criterion = kdloss.FeatureKD(["transformer.h.0", "transformer.h.2"])
    kdloss.Distiller(teacher, criterion).prepare(student)
    assert criterion.terms["feature"].layer_map.pairs() == [(0, 0, 0.5), (2, 5, 0.5)]


def test_a_base_model_without_head_is_distilled_from_features_only():
    teacher = hf.AutoModel.from_config(build("bert", width=24, depth=4).config)
    student = hf.AutoModel.from_config(build("bert", depth=2).config)
    inputs = {k: v for k, v in batch("bert").items() if k != "labels"}
    criterion = kdloss.FeatureKD(alpha=0.0)
    out = kdloss.Distiller(teacher, criterion).prepare(student)(student, **inputs)
    out.loss.backward()
    assert out.loss > 0
